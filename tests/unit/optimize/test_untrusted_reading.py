"""Files that nobody has vouched for are opened in a child process, never in the user's own."""

from pathlib import Path

import onnx
import pytest

from optimize.admission import ask_child
from optimize.engines.local import Limits
from optimize.inspection import describe, describe_here
from optimize.serving import _stored
from optimize.signature import describe_signature, read_signature, signature_of
from optimize.sources import load_onnx, source_components
from registry.errors import InputError, UntrustedModelError
from registry.store import FolderStore
from tests.doubles import zoo
from tests.doubles.models import mlp, two_inputs, write_onnx, write_openvino


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process cannot open a model."""

    def opened(*_: object, **__: object) -> None:
        pytest.fail("a model was opened in the parent")

    monkeypatch.setattr(onnx, "load", opened)
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setattr(openvino, "Core", opened)


def write(folder: Path, kind: str) -> Path:
    write = write_onnx if kind == "onnx" else write_openvino
    return folder / write(mlp(), folder).entry


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_model_is_inspected_by_a_child(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    model = write(tmp_path, kind)
    request.getfixturevalue("closed")
    found = describe(model)
    assert (found["format"], found["inputs"][0]["name"], found["path"]) == (kind, "x", str(model))
    assert found["size_bytes"] > 1000
    assert found["parameters"] > 100


def test_weights_in_other_files_count_for_its_size(tmp_path: Path) -> None:
    path = zoo.write("external-data", tmp_path)
    found = describe_here(path=str(path))
    assert found["beside"] == ["weights.bin"]
    assert describe(path)["size_bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_what_cannot_be_inspected_is_said(tmp_path: Path) -> None:
    """Damage behind the signature, and a pickle, which no child is asked to read."""
    whole = zoo.write("perceptron", tmp_path).read_bytes()
    # The name of an operator that says it is longer than its node.
    damaged = whole.replace(b"\x04Gemm", b"\x7fGemm")
    (tmp_path / "damaged.onnx").write_bytes(damaged)
    with pytest.raises(InputError, match=r"damaged\.onnx is not an ONNX model"):
        describe_here(path=str(tmp_path / "damaged.onnx"))
    (tmp_path / "pickle.onnx").write_bytes(b"\x80\x04\x95" + bytes(20))
    with pytest.raises(UntrustedModelError, match="a pickle; burnish unpickles nothing"):
        describe(tmp_path / "pickle.onnx")


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_model_to_serve_is_admitted_by_a_child(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    model = write(tmp_path / "from", kind)
    (tmp_path / "from" / "secret.txt").write_text("stays")
    request.getfixturevalue("closed")
    store = FolderStore(tmp_path / "work")
    artifact = _stored(model, store, tmp_path / "work")
    assert (artifact.format, [spec.name for spec in artifact.outputs]) == (kind, ["logits"])
    assert (store.path(artifact) / artifact.entry).is_file()
    assert not [file for file in artifact.files if "secret" in file.path]


def test_weights_missing_beside_an_openvino_model(tmp_path: Path) -> None:
    model = write(tmp_path, "openvino")
    model.with_suffix(".bin").unlink()
    (tmp_path / "work").mkdir()
    with pytest.raises(InputError, match=r"model\.xml has no model\.bin beside it"):
        _stored(model, FolderStore(tmp_path / "work"), tmp_path / "work")


def test_an_openvino_model_is_no_onnx_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an ONNX model"):
        load_onnx("m", write(tmp_path, "openvino"), FolderStore(tmp_path / "work"), tmp_path / "work")


def test_external_files_of_a_source_are_listed_by_a_child(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = write(tmp_path, "onnx")
    request.getfixturevalue("closed")
    assert set(source_components("onnx", str(model))["files"]) == {"model.onnx"}


def test_a_model_that_breaks_a_limit_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path, "onnx")
    with pytest.raises(UntrustedModelError, match=r"model\.onnx cannot be read: .* limit"):
        ask_child("optimize.admission:external_files", model, limits=Limits(timeout_s=0.01))


def test_a_signature_comes_back_from_the_child_as_it_was(tmp_path: Path) -> None:
    signature = read_signature(tmp_path / write_onnx(two_inputs(), tmp_path).entry)
    assert signature_of(describe_signature(signature)) == signature


def test_weights_in_constant_nodes_are_counted(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[batch, 2] x) => (float[batch, 2] y) <float[2] bias = {1.0, 2.0}> {
        weight = Constant<value = float[2, 2] {1.0, 2.0, 3.0, 4.0}>()
        product = MatMul(x, weight)
        y = Add(product, bias)
    }
    """
    onnx.save(onnx.parser.parse_model(text), str(tmp_path / "model.onnx"))
    assert describe_here(path=str(tmp_path / "model.onnx"))["parameters"] == 6
