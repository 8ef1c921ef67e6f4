"""Int8 as TensorRT reads it: rules on types, zero points, axes and places of the pairs."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from optimize.testing import cosine, run_model, samples_for, tiny_conv_net, tiny_transformer
from registry.errors import NotApplicableError
from registry.records import StageCall


def run(source, out, name="quantize.tensorrt", **params):
    out.mkdir()
    samples = samples_for(source.inputs, count=16)
    return make_stage(StageCall(name=name, params=params))(source, Context(out=out, calibration=samples))


def residual_net(folder):
    """Conv and BatchNormalization around a shortcut, then ConvTranspose, a grouped Conv and two forms of Gemm."""
    random, tensors = np.random.default_rng(5), []

    def weight(*shape, positive=False):
        values = random.uniform(0.5, 1.5, shape) if positive else random.standard_normal(shape) / 3
        tensors.append(numpy_helper.from_array(values.astype(np.float32), f"w{len(tensors)}"))
        return tensors[-1].name

    node = helper.make_node
    nodes = [
        node("Conv", ["image", weight(8, 3, 3, 3)], ["c1"], pads=[1] * 4),
        node("BatchNormalization", ["c1", *(weight(8, positive=True) for _ in range(4))], ["n1"]),
        node("Relu", ["n1"], ["r1"]),
        node("Conv", ["r1", weight(8, 8, 3, 3), weight(8)], ["c2"], pads=[1] * 4),
        node("Add", ["c2", "r1"], ["s"]),
        node("Relu", ["s"], ["r2"]),
        node("ConvTranspose", ["r2", weight(8, 6, 2, 2), weight(6)], ["t"], strides=[2, 2]),
        node("Conv", ["t", weight(6, 1, 3, 3)], ["g"], group=6),
        node("GlobalAveragePool", ["g"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", weight(10, 6), weight(10)], ["h"], transB=1),
        node("Gemm", ["h", weight(10, 4)], ["logits"], beta=0.5),
    ]
    ends = [
        [helper.make_tensor_value_info(name, 1, ["batch", *shape])]
        for name, shape in (("image", (3, 8, 8)), ("logits", (4,)))
    ]
    graph = helper.make_graph(nodes, "residual", *ends, tensors)
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / "model.onnx"))
    return read_input(folder, "model.onnx")


# A model, and how many of its nodes have constant weights.
MODELS = {"residual": (residual_net, 6), "conv": (tiny_conv_net, 3), "transformer": (tiny_transformer, 6)}


class Made:
    def __init__(self, result, expected=0):
        self.expected = expected
        self.graph = onnx.load(str(result.folder / result.entry)).graph
        self.tensors = {one.name: numpy_helper.to_array(one) for one in self.graph.initializer}
        self.producer = {name: node for node in self.graph.node for name in node.output}

    def of(self, *types):
        return [node for node in self.graph.node if node.op_type in types]

    def made_by(self, name):
        return self.producer[name].op_type if name in self.producer else None

    def before_pair(self, name):
        """The tensor that is quantized to give ``name``."""
        back = self.producer[name]
        assert back.op_type == "DequantizeLinear"
        return self.producer[back.input[0]].input[0]


@pytest.fixture(scope="module", params=list(MODELS))
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model, expected = MODELS[request.param]
    return Made(run(model(folder / "source"), folder / "made"), expected)


def test_every_pair_is_symmetric_and_signed(made):
    pairs = made.of("QuantizeLinear", "DequantizeLinear")
    assert pairs
    for node in pairs:
        scale, zero_point = (made.tensors[name] for name in node.input[1:])
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        assert scale.dtype == np.float32
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
    # No int32 bias: whatever is dequantized was quantized in the graph.
    assert {made.made_by(node.input[0]) for node in made.of("DequantizeLinear")} == {"QuantizeLinear"}


def test_scales_stand_along_the_output_channels(made):
    for node in made.of("Conv", "ConvTranspose", "Gemm", "MatMul"):
        if made.made_by(node.input[1]) != "DequantizeLinear":
            continue
        back = made.producer[node.input[1]]
        shape = made.tensors[made.before_pair(node.input[1])].shape
        transposed = any(one.name == "transB" and one.i for one in node.attribute)
        axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1, "MatMul": len(shape) - 1}[node.op_type]
        assert [one.i for one in back.attribute if one.name == "axis"] == [axis]
        assert made.tensors[back.input[1]].shape == (shape[axis],)
        assert made.tensors[made.producer[node.input[0]].input[1]].shape == ()


def test_both_inputs_of_a_weighted_node_are_quantized_and_its_output_is_not(made):
    weighted = [node for node in made.of("Conv", "ConvTranspose", "Gemm", "MatMul")
                if any(made.made_by(name) == "DequantizeLinear" for name in node.input)]  # fmt: skip
    assert len(weighted) == made.expected
    outputs = {name for node in weighted for name in node.output}
    for node in weighted:
        assert [made.made_by(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
    # But where the next thing is a weighted node again, whose input it is.
    quantized = {node.input[0] for node in made.of("QuantizeLinear")}
    inputs = {made.before_pair(node.input[0]) for node in weighted}
    assert (quantized & outputs) <= inputs


def test_batch_normalization_is_gone_and_the_shortcut_is_quantized(tmp_path):
    source = residual_net(tmp_path / "source")
    result = run(source, tmp_path / "made")
    made = Made(result)
    assert not made.of("BatchNormalization")
    (add,) = made.of("Add")
    assert [made.made_by(name) for name in add.input] == ["Conv", "DequantizeLinear"]
    assert "6 nodes and 1 shortcuts in int8" in result.notes
    feeds = samples_for(source.inputs, count=4, seed=5)
    assert cosine(run_model(source, feeds)[0], run_model(result, feeds)[0]) > 0.99


def test_a_named_node_stays_in_float(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    made = Made(run(source, tmp_path / "made", float_nodes=("Conv_3",)))
    (node,) = [node for node in made.of("Conv") if node.name == "Conv_3"]
    assert "DequantizeLinear" not in {made.made_by(name) for name in node.input}


def test_it_refuses_operators_that_only_onnx_runtime_has(tmp_path):
    fused = run(tiny_conv_net(tmp_path / "source"), tmp_path / "fused", "simplify.ort")
    with pytest.raises(NotApplicableError, match=r"TensorRT does not know .*FusedConv"):
        run(read_input(fused.folder, fused.entry), tmp_path / "made")


def test_a_tensor_that_is_always_zero_has_a_positive_scale(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    model = onnx.load(str(source.path))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    onnx.save(model, str(source.path))
    made = Made(run(source, tmp_path / "made"))
    assert all((made.tensors[node.input[1]] > 0).all() for node in made.of("QuantizeLinear"))
