import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from optimize.stages.base import Context, read_input
from optimize.stages.simplify import Constants
from optimize.testing import run_model, tiny_transformer


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 2] x, int64[batch] unused) => (float[batch, 2] y) {
    two = Constant<value = float[1] {2.0}>()
    three = Constant<value_float = 3.0>()
    six = Mul(two, three)
    same = Identity(x)
    dead = Relu(x)
    y = Mul(same, six)
}
"""


def test_constants_become_one_initializer_and_dead_nodes_go(tmp_path, out):
    (tmp_path / "source").mkdir()
    onnx.save(onnx.parser.parse_model(TEXT), str(tmp_path / "source" / "model.onnx"))
    source = read_input(tmp_path / "source", "model.onnx")
    made = Constants()(source, Context(out=out))
    graph = onnx.load(str(made.folder / made.entry)).graph
    assert [node.op_type for node in graph.node] == ["Mul"]
    assert [float(numpy_helper.to_array(tensor).item()) for tensor in graph.initializer] == [6.0]
    assert made.inputs == source.inputs  # also the one that no node takes
    feeds = {"x": np.ones((3, 2), np.float32), "unused": np.zeros(3, np.int64)}
    np.testing.assert_array_equal(run_model(made, feeds)[0], np.full((3, 2), 6.0, np.float32))


def test_nothing_to_fold_is_said_so(tmp_path, out):
    made = Constants()(tiny_transformer(tmp_path / "source"), Context(out=out))
    assert not made.changed
    assert made.notes == ("there is nothing to fold",)


def test_weights_in_constant_nodes_become_initializers(tmp_path, out):
    made = Constants()(tiny_transformer(tmp_path / "source", constant_nodes=True), Context(out=out))
    graph = onnx.load(str(made.folder / made.entry)).graph
    assert len(graph.initializer) == 10
    assert made.notes == ("25 nodes became 15, Constant nodes 10 became 0",)
