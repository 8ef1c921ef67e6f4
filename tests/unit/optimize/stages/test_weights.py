"""Weights in 4 or 8 bits."""

import logging

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from optimize.testing import cosine, run_model, samples_for, tiny_conv_net, tiny_transformer
from registry.errors import NotApplicableError
from registry.records import StageCall


def run(source, out, name="quantize.weights", **params):
    out.mkdir()
    return make_stage(StageCall(name=name, params=params))(source, Context(out=out))


def graph_of(result):
    return onnx.load(str(result.folder / result.entry)).graph


def two_heads(folder, *, op, transposed):
    """Two nodes that share one weight, (16, 16)."""
    weight = (np.random.default_rng(0).standard_normal((16, 16)) / 4).astype(np.float32)
    given = {"transB": 1} if transposed else {}
    nodes = [
        helper.make_node(op, ["x", "w"], ["a"], name="first", **given),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node(op, ["b", "w"], ["y"], name="second", **given),
    ]
    ends = [[helper.make_tensor_value_info(name, 1, ["batch", 16])] for name in "xy"]
    graph = helper.make_graph(nodes, "tied", *ends, [numpy_helper.from_array(weight, "w")])
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / "model.onnx"))
    return read_input(folder, "model.onnx")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_answers_are_close(bits, block_size, symmetric, tmp_path):
    source = tiny_transformer(tmp_path / "source")
    made = run(source, tmp_path / "made", bits=bits, block_size=block_size, symmetric=symmetric)
    nodes = [node for node in graph_of(made).node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 6
    attributes = {one.name: one.i for one in nodes[0].attribute}
    assert (attributes["bits"], attributes["block_size"], attributes["accuracy_level"]) == (bits, block_size, 4)
    assert {len(node.input) for node in nodes} == {3 if symmetric else 4}
    feeds = samples_for(source.inputs, count=4, seed=5)
    least = {4: 0.98, 8: 0.9999}[bits]
    assert cosine(run_model(source, feeds)[0], run_model(made, feeds)[0]) > least
    assert f"the weights of 6 MatMul in int{bits}" in made.notes


def test_an_answer_does_not_depend_on_its_neighbours(tmp_path):
    source = tiny_transformer(tmp_path / "source")
    made = run(source, tmp_path / "made")
    feeds = samples_for(source.inputs, count=4)
    loud = {"hidden": feeds["hidden"] * np.array([1, 50, 50, 50], np.float32)[:, None, None]}
    np.testing.assert_allclose(run_model(made, feeds)[0][0], run_model(made, loud)[0][0], rtol=1e-5, atol=1e-5)


def test_a_named_node_stays_in_float(tmp_path):
    source = tiny_transformer(tmp_path / "source")
    made = run(source, tmp_path / "made", float_nodes=("MatMul_12",))
    assert "MatMul_12" in {node.name for node in graph_of(made).node if node.op_type == "MatMul"}
    assert "the weights of 5 MatMul in int4" in made.notes


@pytest.mark.parametrize("name", ["quantize.weights", "quantize.dynamic"])
@pytest.mark.parametrize(("op", "transposed"), [("MatMul", False), ("Gemm", False), ("Gemm", True)])
def test_a_weight_that_two_nodes_share(name, op, transposed, tmp_path):
    source = two_heads(tmp_path / "source", op=op, transposed=transposed)
    made = run(source, tmp_path / "made", name)
    feeds = samples_for(source.inputs, count=8, seed=5)
    assert cosine(run_model(source, feeds)[0], run_model(made, feeds)[0]) > 0.97
    names = [tensor.name for tensor in graph_of(made).initializer]
    assert len(names) == len(set(names))


def test_a_convolutional_net_is_refused(tmp_path):
    with pytest.raises(NotApplicableError, match=r"hold 5 % of the weights") as caught:
        run(tiny_conv_net(tmp_path / "source"), tmp_path / "made")
    assert "quantize.static" in caught.value.hint


def test_the_logging_of_the_process_is_left_alone(tmp_path):
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    run(tiny_transformer(tmp_path / "source"), tmp_path / "made")
    assert (root.level, list(root.handlers)) == before
