"""A real MLflow server, an embedded store, and a campaign whose variants are real files."""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from registry import codec
from registry.records import Artifact, ArtifactFile, Campaign, TensorSpec
from registry.tracking import embedded_uri
from tests.doubles import campaigns
from tests.doubles.tracking_servers import mlflow_server as served
from tests.doubles.tracking_servers import sqlite_stores

SPECS = {
    "inputs": (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    "outputs": (TensorSpec(name="y", dtype="float32", shape=("batch", 2)),),
}


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an MLflow server with an empty SQLite store; one for the whole session, as it starts slowly."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    with served(folder, *sqlite_stores(folder)) as url:
        yield url


@pytest.fixture
def work(tmp_path: Path, empty_store: Path) -> Path:
    """A working folder with an empty embedded store."""
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copyfile(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, work: Path) -> str:
    """A tracking store of each kind."""
    return embedded_uri(work) if request.param == "sqlite" else str(request.getfixturevalue("mlflow_server"))


def write_onnx(folder: Path, seed: int) -> None:
    """A tiny matrix product, its weights in a file beside it."""
    weights = np.random.default_rng(seed).normal(size=(4, 2)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)


def write_openvino(folder: Path, seed: int) -> None:
    """The same as an OpenVINO model."""
    openvino = pytest.importorskip("openvino")
    write_onnx(folder, seed)
    openvino.save_model(openvino.convert_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
    (folder / "model.onnx").unlink()
    (folder / "weights.bin").unlink()


def real_artifact(folder: Path, form: str) -> Artifact:
    """The artifact of the files in a folder."""
    files = [
        ArtifactFile(
            path=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size
        )
        for path in sorted(folder.iterdir())
    ]
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in files)
    return Artifact(
        digest=hashlib.sha256(lines.encode()).hexdigest(),
        format="onnx" if form == "onnx" else "openvino",
        entry="model.onnx" if form == "onnx" else "model.xml",
        files=tuple(files),
        **SPECS,
    )


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """The made-up campaign, its variants real models."""
    made = campaigns.campaign()
    variants, places = [], {}
    for seed, variant in enumerate(made.variants):
        folder = tmp_path_factory.mktemp(variant.id)
        (write_onnx if variant.artifact.format == "onnx" else write_openvino)(folder, seed)
        variants.append(dataclasses.replace(variant, artifact=real_artifact(folder, variant.artifact.format)))
        places[variant.id] = str(folder)
    return dataclasses.replace(made, variants=tuple(variants), artifacts=places, versions={"burnish": "0.1.0"})


@pytest.fixture
def own_name(campaign: Campaign, request: pytest.FixtureRequest) -> Campaign:
    """The campaign under a model name of its own, as the server is shared."""
    digest = codec.digest(request.node.nodeid)
    return dataclasses.replace(campaign, model_name=f"digits-{digest}")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A page to keep with a campaign."""
    path = tmp_path / "report.html"
    path.write_text("<!doctype html><title>report</title>")
    return path
