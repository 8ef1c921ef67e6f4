"""What OpenVINO makes of graphs that it sees otherwise than ONNX does."""

from pathlib import Path

import onnx
import pytest

from optimize.stages.base import Context, read_input
from optimize.stages.openvino import ToOpenVino
from registry.errors import NotApplicableError

pytest.importorskip("openvino", reason="openvino is not installed")


def test_an_input_that_is_an_output_too_is_refused_with_the_reason(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[b, 2] x) => (float[b, 2] y, float[b, 2] x) { y = Relu(x) }
    """
    (tmp_path / "source").mkdir()
    (tmp_path / "made").mkdir()
    onnx.save(onnx.parser.parse_model(text), str(tmp_path / "source" / "model.onnx"))
    with pytest.raises(NotApplicableError, match=r"OpenVINO gives the model \d inputs and \d outputs, where it has"):
        ToOpenVino()(read_input(tmp_path / "source", "model.onnx"), Context(out=tmp_path / "made"))
