"""The graph that is quantized: names that hold, and what leaves nodes in float32."""

import onnx
import pytest

from optimize.recipes import recipe_from_mapping, tool_versions, variant_id
from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from optimize.stages.quantize import prepare
from optimize.testing import cosine, run_model, samples_for, tiny_conv_net, tiny_transformer
from registry import codec
from registry.errors import InputError
from registry.records import Recipe, StageCall


def run(source, out, name, **params):
    out.mkdir()
    samples = samples_for(source.inputs, count=16)
    return make_stage(StageCall(name=name, params=params))(source, Context(out=out, calibration=samples))


def prepared(source, scratch):
    scratch.mkdir()
    return prepare(source, scratch)[0]


def renamed(source, name):
    model = onnx.load(str(source.path))
    for node in model.graph.node:
        node.name = name(node)
    onnx.save(model, str(source.path))
    return read_input(source.folder, source.entry)


def made_graph(result):
    return onnx.load(str(result.folder / result.entry)).graph


@pytest.mark.parametrize("make", [tiny_conv_net, tiny_transformer])
def test_nodes_without_names_get_the_same_ones_each_time(make, tmp_path):
    source = renamed(make(tmp_path / "source"), lambda node: "")
    first, again = (prepared(source, tmp_path / name) for name in ("first", "again"))
    names = [node.name for node in first.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert names == [node.name for node in again.graph.node]
    assert any(name.startswith(("Conv_c1", "MatMul_q")) for name in names)


def test_names_given_twice_become_two(tmp_path):
    source = renamed(tiny_conv_net(tmp_path / "source"), lambda node: node.op_type)
    names = [node.name for node in prepared(source, tmp_path / "scratch").graph.node]
    assert {"Conv", "Conv_2", "Relu", "Relu_2"} <= set(names)


def test_names_of_the_original_stay(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    names = [node.name for node in prepared(source, tmp_path / "scratch").graph.node]
    assert {"Conv_0", "Conv_3", "Gemm_7"} <= set(names)


def test_preparation_leaves_one_file(tmp_path):
    prepared(tiny_conv_net(tmp_path / "source"), tmp_path / "scratch")
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["prepared.onnx"]


@pytest.mark.parametrize("format", ["qdq", "qoperator"])
def test_a_float_node_keeps_its_float_weight(format, tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    all_int8 = run(source, tmp_path / "all", "quantize.static", format=format)
    one_float = run(source, tmp_path / "one", "quantize.static", format=format, float_nodes=("Conv_3",))

    def float_weights(result):
        return [tuple(one.dims) for one in made_graph(result).initializer if one.data_type == 1 and len(one.dims) > 1]

    assert float_weights(all_int8) == []
    assert float_weights(one_float) == [(16, 8, 3, 3)]
    feeds = samples_for(source.inputs, count=4, seed=5)
    assert cosine(run_model(source, feeds)[0], run_model(one_float, feeds)[0]) > 0.98


@pytest.mark.parametrize(("make", "name"), [(tiny_transformer, "MatMul_12"), (tiny_conv_net, "Gemm_7")])
def test_a_node_is_left_out_of_run_time_ranges(make, name, tmp_path):
    source = make(tmp_path / "source")
    params = {"ops": "all"}
    every = run(source, tmp_path / "all", "quantize.dynamic", **params)
    fewer = run(source, tmp_path / "one", "quantize.dynamic", float_nodes=[name], **params)

    def integer_nodes(result):
        return sum(node.op_type in {"MatMulInteger", "ConvInteger"} for node in made_graph(result).node)

    assert integer_nodes(fewer) == integer_nodes(every) - 1


@pytest.mark.parametrize("name", ["quantize.static", "quantize.dynamic"])
def test_an_unknown_float_node_is_told_with_the_nearest(name, tmp_path):
    with pytest.raises(InputError, match="float_nodes names 'MatMul_13'") as caught:
        run(tiny_transformer(tmp_path / "source"), tmp_path / "made", name, float_nodes=("MatMul_13",))
    assert "'MatMul_1" in caught.value.hint


def test_float_nodes_are_a_list_in_words_and_a_part_of_the_id():
    words = {"name": "mine", "stages": [{"name": "quantize.static", "float_nodes": ["head", "stem"]}]}
    made = recipe_from_mapping(words)
    assert made.stages[0].params == {"float_nodes": ("head", "stem")}
    assert codec.loads(codec.dumps(made)) == made
    assert make_stage(made.stages[0]).call.params["float_nodes"] == ("head", "stem")
    plain = Recipe(name="plain", stages=(StageCall(name="quantize.static"),), engines=made.engines)
    versions = tool_versions(made)
    assert variant_id("abc", made, "def", 0, versions) != variant_id("abc", plain, "def", 0, versions)


def test_one_name_is_not_a_list():
    with pytest.raises(InputError, match="does not take 'head' for 'float_nodes'"):
        make_stage(StageCall(name="quantize.static", params={"float_nodes": "head"}))


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8", "u8u8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_scheme_is_the_types_of_activations_and_weights(scheme, per_channel, tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    made = run(source, tmp_path / "made", "quantize.static", scheme=scheme, per_channel=per_channel)
    graph = made_graph(made)
    tensors = {one.name: one for one in graph.initializer}
    kinds = {"u": onnx.TensorProto.UINT8, "s": onnx.TensorProto.INT8}
    activations = {tensors[node.input[2]].data_type for node in graph.node if node.op_type == "QuantizeLinear"}
    weights = {one.data_type for one in tensors.values() if len(one.dims) > 1}
    assert (activations, weights) == ({kinds[scheme[0]]}, {kinds[scheme[2]]})
    scales = [tensors[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert any(onnx.numpy_helper.to_array(one).size > 1 for one in scales if "bias" not in one.name) == per_channel
    feeds = samples_for(source.inputs, count=4, seed=5)
    assert cosine(run_model(source, feeds)[0], run_model(made, feeds)[0]) > 0.98


def test_int8_operators_hold_no_pairs_around_float_ones(tmp_path):
    made = run(tiny_conv_net(tmp_path / "source"), tmp_path / "made", "quantize.static", format="qoperator")
    types = {node.op_type for node in made_graph(made).node}
    assert "QLinearConv" in types
    assert "Conv" not in types


def test_a_matmul_of_int8_operators_has_no_float_output():
    with pytest.raises(InputError, match="needs the format qdq"):
        make_stage(StageCall(name="quantize.static", params={"format": "qoperator", "matmul_output": "float"}))
