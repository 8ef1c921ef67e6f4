"""Nodes of an OpenVINO model that stay in float32: named by hand, and ranked for the search."""

from pathlib import Path

import numpy as np
import pytest

from optimize import tuning
from optimize.fidelity import save_outputs
from optimize.stages import make_stage
from optimize.stages.base import Context, StageInput, read_input
from optimize.testing import run_model
from registry.codec import to_jsonable
from registry.errors import InputError
from registry.records import Artifact, EngineSpec, Recipe, Source, StageCall
from tests.doubles.sensitive import clear_samples, conv_chain

pytest.importorskip("nncf", reason="the extra openvino is not installed")
pytestmark = pytest.mark.slow

QUANTIZE = "quantize.openvino"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chain")
    model = conv_chain(place / "model", spiked=(1,))
    np.savez(place / "samples.npz", **clear_samples(model, count=24))
    return place


@pytest.fixture(scope="module")
def converted(folder: Path) -> StageInput:
    (folder / "ir").mkdir()
    source = read_input(folder / "model", "model.onnx")
    made = make_stage(StageCall(name="convert.openvino"))(source, Context(out=folder / "ir"))
    return read_input(made.folder, made.entry)


def quantized(converted: StageInput, folder: Path, out: Path, *left_out: str) -> tuple[str, ...]:
    out.mkdir()
    stage = make_stage(StageCall(name=QUANTIZE, params={"float_nodes": left_out}))
    return stage(converted, Context(out=out, calibration={"image": np.load(folder / "samples.npz")["image"]})).notes


def test_named_nodes_stay_in_float32(converted: StageInput, folder: Path, tmp_path: Path) -> None:
    assert quantized(converted, folder, tmp_path / "all") == ("7 FakeQuantize nodes, with nncf's defaults",)
    # The last layer goes by the name of the model's output.
    (note,) = quantized(converted, folder, tmp_path / "some", "conv_1", "logits")
    assert int(note.split()[0]) < 7
    with pytest.raises(InputError, match="float_nodes names 'conv_11'") as caught:
        quantized(converted, folder, tmp_path / "none", "conv_11")
    assert "Did you mean 'conv_1'?" in str(caught.value.hint)


def test_they_are_ranked_as_static_int8_would_round_them_by_their_names_in_the_ir(folder: Path, tmp_path: Path) -> None:
    source = read_input(folder / "model", "model.onnx")
    artifact = Artifact(
        digest="d", format="onnx", entry="model.onnx", files=(), inputs=source.inputs, outputs=source.outputs
    )
    images = np.load(folder / "samples.npz")["image"]
    save_outputs(tmp_path / "reference.npz", {"logits": run_model(source, {"image": images})[0]})
    np.savez(tmp_path / "calibration.npz", image=images)
    (tmp_path / "work").mkdir()
    stages = (StageCall(name="convert.openvino"), StageCall(name=QUANTIZE, params={"float_nodes": ("conv_5",)}))
    ranked = tuning.rank_here(
        recipe=to_jsonable(Recipe(name="int8", stages=stages, engines=(EngineSpec(name="openvino"),))),
        source=to_jsonable(Source(name="net", kind="onnx", location="model.onnx", digest="s", artifact=artifact)),
        files=str(folder / "model"),
        calibration=str(tmp_path / "calibration.npz"),
        seed=0,
        threads=1,
        work=str(tmp_path / "work"),
        samples=str(folder / "samples.npz"),
        reference=str(tmp_path / "reference.npz"),
        metric="accuracy",
    )
    named = [name for one in ranked["groups"] for name in one["nodes"]]
    assert set(named[:2]) == {"conv_1", "conv_2"}
    assert sorted(named[2:]) == ["conv_0", "conv_3", "conv_4", "logits"]
