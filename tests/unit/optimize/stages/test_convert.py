import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize.stages.base import Context, read_input
from optimize.stages.convert import FixedShape, FreeBatch, Opset
from optimize.testing import run_model, samples_for, tiny_conv_net, tiny_transformer
from registry.errors import InputError, NotApplicableError


def write(folder, text, **weights):
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    onnx.checker.check_model(model)
    folder.mkdir()
    onnx.save(model, str(folder / "model.onnx"))
    return read_input(folder, "model.onnx")


def made_by(stage, source, tmp_path, **given):
    out = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    return stage(source, Context(out=out, **given))


def model_of(result):
    return onnx.load(str(result.folder / result.entry))


# --- opset -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("opset", "ir_version"), [(16, 8), (20, 9), (22, 10)])
def test_an_opset_brings_the_ir_version_of_its_time(tmp_path, opset, ir_version):
    made = made_by(Opset({"opset": opset}), tiny_conv_net(tmp_path / "source"), tmp_path)
    model = model_of(made)
    assert (model.opset_import[0].version, model.ir_version) == (opset, ir_version)
    assert made.notes == (f"opset 17 to {opset}, IR version 8 to {ir_version}",)


@pytest.mark.parametrize(
    ("given", "target", "opset"),
    [(17, "triton 23.03", 17), (20, "triton 23.03", 18), (22, "tensorrt 10", 20), (8, "tensorrt 10", 9)],
)
def test_an_opset_is_moved_to_the_nearest_that_the_target_takes(tmp_path, given, target, opset):
    source = tiny_conv_net(tmp_path / "source", opset=given)
    model = model_of(made_by(Opset({"opset": 0, "target": target}), source, tmp_path))
    assert model.opset_import[0].version == opset
    assert model.ir_version <= (8 if target == "triton 23.03" else 10)


@pytest.mark.parametrize("params", [{"target": "triton 20.01"}, {"target": "onnx"}, {"opset": 6}])
def test_a_target_or_opset_that_is_none_is_the_users_error(params):
    with pytest.raises(InputError, match=r"convert\.opset does not take"):
        Opset(params)


def test_an_ir_version_can_be_asked_for(tmp_path):
    made = made_by(Opset({"opset": 17, "ir_version": 9}), tiny_conv_net(tmp_path / "source"), tmp_path)
    assert model_of(made).ir_version == 9


def test_an_opset_that_is_there_already_changes_nothing(tmp_path):
    assert not made_by(Opset({"opset": 17}), tiny_conv_net(tmp_path / "source"), tmp_path).changed


def test_a_node_without_a_form_in_the_opset_is_named(tmp_path):
    source = tiny_transformer(tmp_path / "source")
    with pytest.raises(NotApplicableError, match="LayerNormalization_9' and 1 more"):
        made_by(Opset({"opset": 16}), source, tmp_path)


@pytest.mark.parametrize("opset", [9, 11, 12, 13])
def test_operators_that_hardly_changed_go_down_without_an_adapter(tmp_path, opset):
    source = tiny_conv_net(tmp_path / "source")
    made = made_by(Opset({"opset": opset}), source, tmp_path)
    assert model_of(made).opset_import[0].version == opset
    feeds = samples_for(source.inputs, count=3)
    np.testing.assert_allclose(run_model(made, feeds)[0], run_model(source, feeds)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        # Relu has no adapter from 14 to 13, and each of these means something else there.
        ("a = Relu(x)\n y = BatchNormalization<training_mode = 1>(a, one, one, one, one)", "not valid in opset 11"),
        ("a = Relu(x)\n b = HardSwish(a)\n y = Neg(b)", "HardSwish|not valid"),
    ],
)
def test_a_step_without_an_adapter_that_was_wrong_is_refused(tmp_path, body, told):
    text = f"g (float[n, 2] x) => (float[n, 2] y) <float[2] one = {{1.0, 1.0}}> {{ {body} }}"
    source = write(tmp_path / "source", text)
    with pytest.raises(NotApplicableError, match=told):
        made_by(Opset({"opset": 11}), source, tmp_path)


def test_functions_that_a_model_brings_are_put_in_their_place(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[n, 2] x) => (float[n, 2] y) { y = own.twice (x) }
    <domain: "own", opset_import: ["" : 17]> twice (a) => (b) { b = Add (a, a) }
    """
    (tmp_path / "source").mkdir()
    onnx.save(onnx.parser.parse_model(text), str(tmp_path / "source" / "model.onnx"))
    made = made_by(Opset({"opset": 20}), read_input(tmp_path / "source", "model.onnx"), tmp_path)
    assert run_model(made, {"x": np.ones((1, 2), np.float32)})[0].tolist() == [[2, 2]]


def test_a_model_too_new_for_onnx_runtime_is_converted_and_the_note_says_what_was_not_compared(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    model = onnx.load(str(source.path))
    model.ir_version = 99
    onnx.save(model, str(source.path))
    made = made_by(Opset({"opset": 18}), source, tmp_path)
    assert "not compared" in made.notes[-1]
    assert model_of(made).ir_version == 8


# --- fixed shape -----------------------------------------------------------------------------------------------

SHAPE_ARITHMETIC = """
flat (float[batch, rows, 4] x) => (float[batch, all] y) {
    shape = Shape(x)
    zero = Constant<value = int64[1] {0}>()
    first = Gather<axis = 0>(shape, zero)
    rest = Constant<value = int64[1] {-1}>()
    wanted = Concat<axis = 0>(first, rest)
    y = Reshape(x, wanted)
}
"""


def test_what_a_fixed_size_makes_constant_is_folded(tmp_path):
    source = write(tmp_path / "source", SHAPE_ARITHMETIC)
    made = made_by(FixedShape({"dims": ("batch=2", "rows=3")}), source, tmp_path)
    assert [node.op_type for node in model_of(made).graph.node] == ["Reshape"]
    assert made.inputs[0].shape == (2, 3, 4)
    assert made.outputs[0].shape[0] == 2
    assert FixedShape.changes_signature


def test_dimensions_that_are_not_named_stay_free(tmp_path):
    source = write(tmp_path / "source", SHAPE_ARITHMETIC)
    assert made_by(FixedShape({"dims": ("x[1]=3",)}), source, tmp_path).inputs[0].shape == ("batch", 3, 4)


@pytest.mark.parametrize(
    ("dim", "told"),
    [("width=3", "no input has a free dimension 'width'"), ("x[7]=3", "no input 'x' with an axis 7"),
     ("x[2]=5", "fixed at 4 already"), ("z[0]=1", "no input 'z'")],
)  # fmt: skip
def test_a_dimension_that_is_not_free_is_refused(tmp_path, dim, told):
    source = write(tmp_path / "source", SHAPE_ARITHMETIC)
    with pytest.raises(NotApplicableError, match=told.replace("[", r"\[")):
        made_by(FixedShape({"dims": (dim,)}), source, tmp_path)


@pytest.mark.parametrize("dim", ["batch", "batch=0", "=3", "batch=-1"])
def test_a_size_that_is_none_is_the_users_error(dim):
    with pytest.raises(InputError, match="name=size"):
        FixedShape({"dims": (dim,)})


# --- free batch ------------------------------------------------------------------------------------------------

HEADS = """
heads (float[1, 6, 4] x) => (float[1, 6, 4] y) {
    split = Reshape(x, apart)
    turned = Transpose<perm = [0, 2, 1, 3]>(split)
    turned_key = Transpose<perm = [0, 2, 3, 1]>(split)
    scores = MatMul(turned, turned_key)
    shares = Softmax<axis = -1>(scores)
    mixed = MatMul(shares, turned)
    back = Transpose<perm = [0, 2, 1, 3]>(mixed)
    y = Reshape(back, together)
}
"""


@pytest.mark.parametrize("together", [[1, 6, 4], [1, -1, 4]])
def test_a_fixed_batch_is_freed_through_constant_reshapes(tmp_path, together):
    shapes = {"apart": np.array([1, 6, 2, 2]), "together": np.array(together)}
    source = write(tmp_path / "source", HEADS, **shapes)
    made = made_by(FreeBatch(), source, tmp_path)
    assert (made.inputs[0].shape, made.outputs[0].shape) == (("batch", 6, 4), ("batch", 6, 4))
    assert "2 constant shapes" in made.notes[0]
    rows = samples_for(source.inputs, count=5)
    alone = [run_model(source, {"x": rows["x"][i : i + 1]})[0] for i in range(5)]
    np.testing.assert_allclose(run_model(made, rows)[0], np.concatenate(alone), rtol=1e-5, atol=1e-6)


def test_the_shape_that_another_node_takes_stays_as_it_was(tmp_path):
    text = """
    g (float[1, 4] x) => (float[1, 2, 2] y, float[1, 3] z) {
        y = Reshape(x, shape)
        as_float = Cast<to = 1>(shape)
        sums = ReduceSum<keepdims = 1>(x, axes)
        z = Add(sums, as_float)
    }
    """
    source = write(tmp_path / "source", text, shape=np.array([1, 2, 2]), axes=np.array([1]))
    made = made_by(FreeBatch(), source, tmp_path)
    feeds = {"x": np.ones((2, 4), np.float32)}
    np.testing.assert_array_equal(run_model(made, feeds)[1], [[5, 6, 6], [5, 6, 6]])


@pytest.mark.parametrize(
    "body",
    [
        "g (float[1, 4] x) => (float[1, 4] y) { y = Softmax<axis = 0>(x) }",
        "g (float[1, 4] x) => (float[1, 4] y) { m = ReduceMean<axes = [0, 1], keepdims = 1>(x)\n y = Sub(x, m) }",
        "g (float[1, 4] x) => (float[4] y) { y = Squeeze(x, zero) }",
        "g (float[1, 4] x) => (float[1, 4] y) { f = Gather<axis = 0>(x, zero)\n y = Relu(f) }",
    ],
    ids=["softmax over the batch", "mean over the batch", "no batch in the output", "the first row alone"],
)
def test_a_graph_that_mixes_rows_is_refused_by_its_answers(tmp_path, body):
    source = write(tmp_path / "source", body, zero=np.array([0]))
    with pytest.raises(NotApplicableError, match="holds on to a batch of 1"):
        made_by(FreeBatch(), source, tmp_path)


def test_a_session_that_needs_the_fixed_batch_no_more_is_not_padded(tmp_path):
    source = tiny_transformer(tmp_path / "source", batch=1)
    made = made_by(FreeBatch(), source, tmp_path)
    session = onnxruntime.InferenceSession(str(made.folder / made.entry), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == "batch"


def test_a_state_beside_the_batch_is_refused(tmp_path):
    hidden = helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 1, 4])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["y"])], "g", [hidden],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 1, 4])],
    )  # fmt: skip
    (tmp_path / "source").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "source" / "model.onnx"))
    with pytest.raises(NotApplicableError, match=r"'h' has shape \[2, 1, 4\]"):
        made_by(FreeBatch(), read_input(tmp_path / "source", "model.onnx"), tmp_path)
