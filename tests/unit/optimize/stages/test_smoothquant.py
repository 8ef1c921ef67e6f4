"""Moving outliers of activations into weights: the same function, and less for int8 to lose."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from optimize.testing import cosine, run_model, samples_for, tiny_conv_net, tiny_transformer
from registry.errors import NotApplicableError
from registry.records import StageCall

WIDTH, LOUD = 16, 3


def encoder(folder, *, opset=17, decomposed=False, residual=False, gemm=False, shared_weight=False, constants=False):
    """A normalization whose channel 3 is a hundred times louder than the rest, and the three MatMuls that read it."""
    random = np.random.default_rng(3)
    scale = np.ones(WIDTH, np.float32)
    scale[LOUD] = 100
    tensors = {"scale": scale, "bias": random.standard_normal(WIDTH).astype(np.float32)}
    for name in "qkv":
        tensors[name] = (random.standard_normal((WIDTH, WIDTH)) / 4).astype(np.float32)
        tensors[name][LOUD] /= 100
    node = helper.make_node
    if decomposed:
        tensors["small"] = np.array([1e-5], np.float32)
        nodes = [
            node("ReduceMean", ["x"], ["mean"], axes=[-1]),
            node("Sub", ["x", "mean"], ["centred"]),
            node("Mul", ["centred", "centred"], ["square"]),
            node("ReduceMean", ["square"], ["variance"], axes=[-1]),
            node("Add", ["variance", "small"], ["more"]),
            node("Sqrt", ["more"], ["deviation"]),
            node("Div", ["centred", "deviation"], ["unit"]),
            node("Mul", ["scale", "unit"], ["scaled"]),
            node("Add", ["scaled", "bias"], ["normal"]),
        ]
    else:
        nodes = [node("LayerNormalization", ["x", "scale", "bias"], ["normal"], axis=-1)]
    for name in "qkv":
        weight = "q" if shared_weight and name == "k" else name
        nodes.append(node("Gemm" if gemm else "MatMul", ["normal", weight], [f"out_{name}"]))
    if residual:
        nodes.append(node("Add", ["normal", "out_q"], ["sum"]))
    outputs = ["out_q", "out_k", "out_v", *(["sum"] if residual else [])]
    if shared_weight:
        del tensors["k"]
    if gemm:
        nodes[-1].attribute.append(helper.make_attribute("transB", 1))
        tensors["v"] = np.ascontiguousarray(tensors["v"].T)
    shape = ["batch", WIDTH] if gemm else ["batch", 4, WIDTH]
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    if constants:
        nodes = [node("Constant", [], [one.name], value=one) for one in weights] + nodes
        weights = []
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info(name, 1, shape) for name in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    return read_input(folder, "model.onnx")


def run(source, out, name="quantize.smooth", samples=None, **params):
    out.mkdir()
    samples = samples_for(source.inputs, count=64) if samples is None else samples
    return make_stage(StageCall(name=name, params=params))(source, Context(out=out, calibration=samples))


def again(result):
    return read_input(result.folder, result.entry)


def graph_of(result):
    return onnx.load(str(result.folder / result.entry)).graph


def array(graph, name):
    return next(numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == name)


def same(source, made, tolerance=2e-4):
    feeds = samples_for(source.inputs, count=5, seed=9)
    for before, after in zip(run_model(source, feeds), run_model(made, feeds), strict=True):
        np.testing.assert_allclose(after, before, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "form",
    [{}, {"opset": 18}, {"opset": 13, "decomposed": True}, {"gemm": True}, {"shared_weight": True},
     {"residual": True}, {"constants": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("alpha", [0.3, 0.75])
def test_the_function_stays(form, alpha, tmp_path):
    source = encoder(tmp_path / "source", **form)
    same(source, run(source, tmp_path / "made", alpha=alpha))


@pytest.mark.parametrize("form", [{}, {"opset": 13, "decomposed": True}], ids=str)
def test_the_scale_is_folded_and_shared(form, tmp_path):
    source = encoder(tmp_path / "source", **form)
    before = onnx.load(str(source.path)).graph
    made = run(source, tmp_path / "made")
    after = graph_of(made)
    assert [node.op_type for node in after.node] == [node.op_type for node in before.node]
    divisor = array(before, "scale") / array(after, "scale")
    np.testing.assert_allclose(array(before, "bias") / array(after, "bias"), divisor, rtol=1e-5)
    for name in "qkv":
        np.testing.assert_allclose(array(after, name), array(before, name) * divisor[:, None], rtol=1e-5)
    assert "3 MatMul smoothed, the scales of 1 of 1 activations folded" in made.notes[0]


def test_weights_in_constant_nodes_are_replaced(tmp_path):
    source = encoder(tmp_path / "source", constants=True)
    made = graph_of(run(source, tmp_path / "made"))
    assert "Constant" not in {node.op_type for node in made.node}
    assert {"scale/smooth", "bias/smooth", "q/smooth"} <= {tensor.name for tensor in made.initializer}


def test_the_loud_channel_gets_quiet(tmp_path):
    source = encoder(tmp_path / "source")
    made = graph_of(run(source, tmp_path / "made"))
    scale = np.abs(array(made, "scale"))
    assert scale[LOUD] / np.median(scale) < 3


def test_alpha_one_levels_the_activations(tmp_path):
    source = encoder(tmp_path / "source")
    samples = samples_for(source.inputs, count=64)
    made = run(source, tmp_path / "made", samples=samples, alpha=1)
    model = onnx.load(str(made.folder / made.entry))
    model.graph.output.append(helper.make_tensor_value_info("normal", 1, ["batch", 4, WIDTH]))
    onnx.save(model, str(tmp_path / "watched.onnx"))
    watched = read_input(tmp_path, "watched.onnx")
    peaks = np.abs(run_model(watched, samples)[-1]).reshape(-1, WIDTH).max(axis=0)
    np.testing.assert_allclose(peaks, 1, rtol=1e-4)


def test_a_residual_that_reads_the_normalization_needs_a_mul(tmp_path):
    source = encoder(tmp_path / "source", residual=True)
    made = graph_of(run(source, tmp_path / "made", insert_mul="norm"))
    assert sum(node.op_type == "Mul" for node in made.node) == 1
    assert np.array_equal(array(made, "scale"), array(onnx.load(str(source.path)).graph, "scale"))
    with pytest.raises(NotApplicableError, match="whose input comes from a normalization") as caught:
        run(source, tmp_path / "never", insert_mul="never")
    assert "insert_mul" in caught.value.hint


def test_any_matmul_can_be_smoothed_with_a_mul(tmp_path):
    source = tiny_transformer(tmp_path / "source")
    fewer, every = (run(source, tmp_path / way, insert_mul=way) for way in ("norm", "always"))
    counts = [sum(node.op_type == "Mul" for node in graph_of(made).node) for made in (fewer, every)]
    assert counts == [1, 4]  # of l1; and of hidden, attended and active as well
    same(source, fewer)
    same(source, every)


def test_int8_loses_less_after_it(tmp_path):
    source = encoder(tmp_path / "source")
    smooth = again(run(source, tmp_path / "smooth"))
    feeds = samples_for(source.inputs, count=32, seed=9)
    exact = run_model(source, feeds)
    cosines = []
    for model, name in ((source, "plain"), (smooth, "after")):
        made = run(model, tmp_path / name, "quantize.static", ops="matmul", per_channel=False)
        cosines.append(min(cosine(left, right) for left, right in zip(exact, run_model(made, feeds), strict=True)))
    assert cosines[0] < 0.99
    assert cosines[1] > 0.998


def test_peaks_are_those_of_all_batches(tmp_path):
    source = encoder(tmp_path / "source")
    one, many = (run(source, tmp_path / f"by-{size}", batch_size=size) for size in (64, 7))
    assert (one.folder / one.entry).read_bytes() == (many.folder / many.entry).read_bytes()


def test_a_channel_that_is_never_used_stays(tmp_path):
    source = encoder(tmp_path / "source")
    model = onnx.load(str(source.path))
    scale, bias = (array(model.graph, name).copy() for name in ("scale", "bias"))
    scale[0] = bias[0] = 0
    for tensor in model.graph.initializer:
        if tensor.name in {"scale", "bias"}:
            tensor.CopyFrom(numpy_helper.from_array({"scale": scale, "bias": bias}[tensor.name], tensor.name))
    onnx.save(model, str(source.path))
    made = run(source, tmp_path / "made")
    before, after = (array(graph, "q")[0] for graph in (model.graph, graph_of(made)))
    np.testing.assert_array_equal(before, after)
    same(source, made)


def test_activations_that_are_not_finite_are_a_verdict(tmp_path):
    source = encoder(tmp_path / "source", opset=13, decomposed=True)
    samples = {"x": np.full((2, 4, WIDTH), 3e38, np.float32)}
    with pytest.raises(NotApplicableError, match="'normal' is not finite"):
        run(source, tmp_path / "made", samples=samples)


def test_a_net_without_normalization_is_refused(tmp_path):
    with pytest.raises(NotApplicableError, match="no MatMul or Gemm"):
        run(tiny_conv_net(tmp_path / "source"), tmp_path / "made")
