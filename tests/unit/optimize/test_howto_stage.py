"""The stage of docs/howto/write-a-stage.md, word for word, through the suite that the page offers."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimize.stages.base import read_input
from optimize.testing import StageContract, run_model, samples_for, tiny_conv_net

PAGE = Path(__file__).parents[3] / "docs" / "howto" / "write-a-stage.md"


@pytest.fixture
def strip_outputs(monkeypatch):
    code = re.search(r'```python\n("""my_stages\.py""".*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module = types.ModuleType("my_stages")
    monkeypatch.setitem(sys.modules, "my_stages", module)  # pydantic looks a model's module up
    exec(compile(code[1], str(PAGE), "exec"), module.__dict__)
    return module.StripOutputs


class TestStageOfThePage(StageContract):
    @pytest.fixture
    def stage(self, strip_outputs):
        return strip_outputs({"prefix": "aux_"})

    @pytest.fixture
    def source(self, tmp_path):
        made = tiny_conv_net(tmp_path / "source")
        model = onnx.load(str(made.path))
        model.graph.output.append(onnx.helper.make_tensor_value_info("aux_p", onnx.TensorProto.FLOAT, None))
        model.graph.node.append(onnx.helper.make_node("Identity", [model.graph.output[0].name], ["aux_p"]))
        onnx.save(onnx.shape_inference.infer_shapes(model), str(made.path))
        return read_input(made.folder, made.entry)

    @pytest.fixture
    def refused(self, tmp_path):
        return tiny_conv_net(tmp_path / "refused")

    def test_its_output_runs_and_is_close(self, source, made):
        feeds = samples_for(source.inputs, count=2)
        np.testing.assert_array_equal(run_model(made, feeds)[0], run_model(source, feeds)[0])

    def test_it_drops_what_it_says(self, made):
        assert [spec.name for spec in made.outputs] == ["logits"]


def test_the_stage_takes_thirty_lines():
    code = re.search(r"class StripParams.*?```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len(code.splitlines()) <= 30
