"""The end that turns token states into one vector, in the operators of the model's opset."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from optimize.export import append_pooling
from registry.errors import InputError


def states(path: Path, opset: int) -> Path:
    text = f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    g (float[b, s, 2] given, int64[b, s] attention_mask) => (float[b, s, 2] states) {{ states = Identity(given) }}
    """
    onnx.save(onnx.parser.parse_model(text), str(path))
    return path


def test_the_mean_is_that_of_the_tokens_that_the_mask_keeps(tmp_path: Path) -> None:
    path = states(tmp_path / "model.onnx", 13)
    append_pooling(path, "mean", normalize=True)
    feeds = {
        "given": np.array([[[3, 0], [0, 4], [9, 9]]], np.float32),
        "attention_mask": np.array([[1, 1, 0]]),
    }
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, feeds)
    assert found == pytest.approx(np.array([[0.6, 0.8]]))


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("cls", True)])
def test_an_opset_without_its_operators_is_refused(tmp_path: Path, pooling: str, normalize: bool) -> None:
    path = states(tmp_path / "model.onnx", 12)
    with pytest.raises(InputError, match="needs opset 13, and the model is of opset 12"):
        append_pooling(path, pooling, normalize=normalize)


def test_the_first_token_alone_needs_no_new_operator(tmp_path: Path) -> None:
    path = states(tmp_path / "model.onnx", 12)
    append_pooling(path, "cls", normalize=False)
    onnxruntime.InferenceSession(str(path))
