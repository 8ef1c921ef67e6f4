import numpy as np
import onnx
import pytest

from optimize.adaptation import adapt
from optimize.stages.base import Context, read_input
from optimize.stages.reduce import ImageSide, InputType, SequenceLength
from optimize.testing import integer_model, run_model, samples_for, tiny_conv_net, tiny_transformer
from registry.errors import InputError, NotApplicableError
from tests.doubles import models


def made_by(stage, source, tmp_path):
    out = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    return stage(source, Context(out=out))


def written(model, folder):
    folder.mkdir()
    onnx.save(model, str(folder / "model.onnx"))
    return read_input(folder, "model.onnx")


# --- input type ------------------------------------------------------------------------------------------------


def test_a_uint8_image_is_answered_as_the_float_that_it_stands_for(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    made = made_by(InputType({"low": -1.0, "high": 1.0}), source, tmp_path)
    assert made.inputs[0].dtype == "uint8"
    assert made.outputs == source.outputs
    steps = np.arange(0, 256, 85)
    pixels = np.random.default_rng(0).choice(steps, (2, 3, 8, 8)).astype(np.uint8)
    floats = (pixels / 255 * 2 - 1).astype(np.float32)
    adapted = adapt({"image": floats}, made.adaptation)
    np.testing.assert_array_equal(adapted["image"], pixels)
    np.testing.assert_allclose(run_model(made, adapted)[0], run_model(source, {"image": floats})[0], rtol=1e-4)


def test_int64_ids_are_sent_as_int32(tmp_path):
    source = written(models.two_inputs(), tmp_path / "source")
    made = made_by(InputType({"dtype": "int32"}), source, tmp_path)
    assert [spec.dtype for spec in made.inputs] == ["int32", "int32"]
    feeds = samples_for(source.inputs, count=3)
    for before, after in zip(run_model(source, feeds), run_model(made, adapt(feeds, made.adaptation)), strict=True):
        np.testing.assert_array_equal(after, before)


def test_only_the_named_inputs_are_narrowed(tmp_path):
    source = written(models.two_inputs(), tmp_path / "source")
    made = made_by(InputType({"dtype": "int32", "inputs": ("mask",)}), source, tmp_path)
    assert {spec.name: spec.dtype for spec in made.inputs} == {"ids": "int64", "mask": "int32"}
    assert made.notes == ("mask: sent as int32",)


def test_an_input_that_subgraphs_take_is_cast_for_them_too(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 2] x, bool flag) => (float[n, 2] y) {
        y = If (flag) <
            then_branch = a () => (float[n, 2] same) { same = Relu(x) },
            else_branch = b () => (float[n, 2] other) { other = Neg(x) }
        >
    }
    """
    source = written(onnx.parser.parse_model(text), tmp_path / "source")
    made = made_by(InputType({"dtype": "float16"}), source, tmp_path)
    x = np.array([[1, -2]], np.float16)
    np.testing.assert_array_equal(run_model(made, {"x": x, "flag": np.array(False)})[0], [[-1, 2]])


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"dtype": "uint8"}, "no input of type float32"),
        ({"dtype": "int32", "inputs": ("nothing",)}, r"no input 'nothing' of type int64; there are: left \(int64\)"),
    ],
)
def test_a_type_that_no_input_has_is_refused(tmp_path, params, told):
    with pytest.raises(NotApplicableError, match=told):
        made_by(InputType(params), integer_model(tmp_path / "source"), tmp_path)


def test_low_above_high_is_the_users_error():
    with pytest.raises(InputError, match="low must be below high"):
        InputType({"low": 1.0, "high": 0.0})


# --- sequence length -------------------------------------------------------------------------------------------


def test_tokens_beyond_the_length_are_not_sent(tmp_path):
    source = written(models.two_inputs(), tmp_path / "source")
    made = made_by(SequenceLength({"length": 3}), source, tmp_path)
    assert [spec.shape for spec in made.inputs] == [("batch", 3), ("batch", 3)]
    feeds = {"ids": np.array([[1, 2, 3, 4, 5]]), "mask": np.ones((1, 5), np.int64)}
    total, present = run_model(made, adapt(feeds, made.adaptation))
    assert total.tolist() == [6]
    assert present.shape == (1, 3)
    assert made.outputs[1].shape[1] in (3, None, "sequence")


def test_other_inputs_than_tokens_are_cut_where_they_are_named(tmp_path):
    source = tiny_transformer(tmp_path / "source")
    made = made_by(SequenceLength({"length": 2, "inputs": ("hidden",)}), source, tmp_path)
    assert (made.inputs[0].shape, made.outputs[0].shape) == (("batch", 2, 32), ("batch", 2, 32))


@pytest.mark.parametrize(
    ("make", "params", "told"),
    [
        (integer_model, {"length": 2}, "'left' has 2 tokens"),
        (tiny_conv_net, {"length": 2}, "no whole-number input"),
        (tiny_conv_net, {"length": 2, "inputs": ("ids",)}, "no input 'ids'"),
        (tiny_conv_net, {"length": 2, "inputs": ("image",)}, "does not work with such inputs"),
    ],
)
def test_a_model_without_sequences_is_refused(tmp_path, make, params, told):
    with pytest.raises(NotApplicableError, match=told):
        made_by(SequenceLength(params), make(tmp_path / "source"), tmp_path)


# --- image side ------------------------------------------------------------------------------------------------


def test_half_the_side_is_a_quarter_of_the_bytes(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    made = made_by(ImageSide({"side": 4}), source, tmp_path)
    assert made.inputs[0].shape == ("batch", 3, 4, 4)
    assert made.outputs == source.outputs
    flat = np.broadcast_to(np.random.default_rng(0).normal(size=(5, 3, 1, 1)), (5, 3, 8, 8)).astype(np.float32)
    adapted = adapt({"image": flat}, made.adaptation)["image"]
    assert adapted.nbytes * 4 == flat.nbytes
    np.testing.assert_allclose(adapted, flat[:, :, :4, :4], rtol=1e-6)
    assert run_model(made, {"image": adapted})[0].shape == (5, 4)


def images(shape):
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[{shape}] x) => (float[batch, k, i, j] y) {{ y = Relu(x) }}
    """
    return onnx.parser.parse_model(text)


@pytest.mark.parametrize(
    ("shape", "layout", "sizes"),
    [
        ("batch, 3, 8, 12", "auto", (3, 4, 6)),
        ("batch, 8, 12, 3", "auto", (4, 6, 3)),
        ("batch, 8, 8, 8", "nhwc", (4, 4, 8)),
    ],
)
def test_the_layout_is_told_by_the_channels(tmp_path, shape, layout, sizes):
    source = written(images(shape), tmp_path / "source")
    made = made_by(ImageSide({"side": 4, "layout": layout}), source, tmp_path)
    assert made.inputs[0].shape == ("batch", *sizes)
    assert made.outputs[0].shape == ("batch", *sizes)
    adapted = adapt(samples_for(source.inputs, count=2), made.adaptation)
    assert adapted["x"].shape == (2, *sizes)


@pytest.mark.parametrize(
    ("shape", "params", "told"),
    [
        ("batch, 8, 8, 8", {"side": 4}, "cannot be told from its shape"),
        ("batch, 3, h, w", {"side": 4}, "free already"),
        ("batch, 3, 8, 8", {"side": 8}, "8 high, no more than 8"),
        ("batch, 3, 8, 8", {"side": 4, "input": "z"}, "no input 'z'"),
        ("batch, 8", {"side": 4}, "0 inputs of four dimensions"),
    ],
)
def test_an_image_that_cannot_shrink_is_refused(tmp_path, shape, params, told):
    model = images(shape)
    if shape == "batch, 8":
        del model.graph.output[0].type.tensor_type.shape.dim[2:]
    with pytest.raises(NotApplicableError, match=told):
        made_by(ImageSide(params), written(model, tmp_path / "source"), tmp_path)


def test_a_net_that_needs_its_size_is_refused(tmp_path):
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[batch, 1, 8, 8] x) => (float[batch, 2] y)
    <float[64, 2] w = {{{", ".join(["0.5"] * 128)}}}> {{ flat = Flatten(x)\n y = MatMul(flat, w) }}
    """
    with pytest.raises(NotApplicableError, match="does not work with such inputs"):
        made_by(ImageSide({"side": 4}), written(onnx.parser.parse_model(text), tmp_path / "source"), tmp_path)
