import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from optimize.stages.base import Context, read_input
from optimize.stages.precision import Float16, MixedFloat16
from registry.errors import NotApplicableError

# The square of 300 and more is beyond float16; its root is not.
ROOT_OF_SQUARES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 4] x) => (float[batch, 4] y) {
    wide = MatMul(x, grow)
    square = Mul(wide, wide)
    root = Sqrt(square)
    y = MatMul(root, shrink)
}
"""
WEIGHTS = {"grow": np.eye(4, dtype=np.float32) * 400, "shrink": np.eye(4, dtype=np.float32) / 400}


def write(folder, text, weights):
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in weights.items())
    folder.mkdir()
    onnx.save(model, str(folder / "model.onnx"))
    return read_input(folder, "model.onnx")


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", ROOT_OF_SQUARES, WEIGHTS)


@pytest.fixture
def feeds():
    return {"x": np.random.default_rng(0).uniform(1, 2, (20, 4)).astype(np.float32)}


def computed(made, feeds):
    """The answer of true float16 arithmetic, as a GPU has it: on a CPU ONNX Runtime computes much of it in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(str(made.folder / made.entry)).run(None, feeds)[0]


def made_by(stage, source, tmp_path, calibration):
    out = tmp_path / stage.name
    out.mkdir()
    return stage(source, Context(out=out, calibration=calibration))


def test_what_overflows_in_float16_stays_in_float32(tmp_path, source, feeds):
    plain = made_by(Float16(), source, tmp_path, feeds)
    assert not np.isfinite(computed(plain, feeds)).any()
    mixed = made_by(MixedFloat16(), source, tmp_path, feeds)
    np.testing.assert_allclose(computed(mixed, feeds), feeds["x"], rtol=3e-3)
    assert mixed.notes == ("2 nodes stayed in float32: Mul 'Mul_1_1', Sqrt 'Sqrt_2_2'",)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(str(mixed.folder / mixed.entry)).graph.initializer}
    assert kinds == {"grow": onnx.TensorProto.FLOAT16, "shrink": onnx.TensorProto.FLOAT16}


def test_a_smaller_share_keeps_more(tmp_path, source, feeds):
    feeds["x"] = np.full((4, 4), 0.6, np.float32)  # whose squares are 57,600
    whole = made_by(MixedFloat16({"share": 1.0}), source, tmp_path, feeds)
    assert whole.notes == ("no value reached 65504, so nothing stayed in float32",)
    half = made_by(MixedFloat16(), source, tmp_path / "source", feeds)
    assert half.notes[0].startswith("2 nodes stayed in float32")


def test_weights_beyond_the_range_or_that_vanish_stay(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[batch, 4] x) => (float[batch, 4] y) {
        small = Mul(x, tiny)
        large = Mul(small, huge)
        y = Mul(large, one)
    }
    """
    weights = {"tiny": np.float32([1e-9]), "huge": np.float32([1e9]), "one": np.float32([1.0])}
    source = write(tmp_path / "source", text, weights)
    feeds = {"x": np.ones((2, 4), np.float32)}
    mixed = made_by(MixedFloat16(), source, tmp_path, feeds)
    np.testing.assert_allclose(computed(mixed, feeds), feeds["x"], rtol=1e-3)
    assert mixed.notes[0].startswith("2 nodes stayed in float32: Mul 'Mul_0_0', Mul 'Mul_1_1'")


def test_a_weight_that_both_kinds_of_nodes_take_is_kept_in_both_types(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[batch, 4] x) => (float[batch, 4] y) {
        a = Mul(x, third)
        b = Mul(a, huge)
        c = Mul(b, third)
        y = Mul(c, tiny)
    }
    """
    weights = {"third": np.float32([1 / 3]), "huge": np.float32([1e6]), "tiny": np.float32([9e-6])}
    source = write(tmp_path / "source", text, weights)
    feeds = {"x": np.ones((2, 4), np.float32)}
    mixed = made_by(MixedFloat16(), source, tmp_path, feeds)
    np.testing.assert_allclose(computed(mixed, feeds), feeds["x"], rtol=2e-3)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(str(mixed.folder / mixed.entry)).graph.initializer}
    assert (kinds["third"], kinds["third_float32"]) == (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT)


def test_a_model_all_of_whose_values_overflow_is_refused(tmp_path):
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[b, 4] x) => (float[b, 4] y) { y = Mul(x, huge) }'
    source = write(tmp_path / "source", text, {"huge": np.float32([1e9])})
    with pytest.raises(NotApplicableError, match="every node"):
        made_by(MixedFloat16(), source, tmp_path, {"x": np.ones((2, 4), np.float32)})


def test_batches_do_not_change_what_is_found(tmp_path, source, feeds):
    feeds["x"][:-1] = 0.1  # only the last sample overflows
    mixed = made_by(MixedFloat16({"batch_size": 3}), source, tmp_path, feeds)
    assert mixed.notes[0].startswith("2 nodes")


def test_the_note_counts_what_is_clipped_wherever_it_stands(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[batch, 4] x) => (float[batch, 4] y) {
        held = Constant<value = float[4] {100000.0, -70000.0, 1.0, 2.0}>()
        scaled = Mul(x, weight)
        masked = Max(scaled, mask)
        y = Add(masked, held)
    }
    """
    weights = {
        "weight": np.array([2e5, 1, 1, 1], np.float32),
        "mask": np.full(4, -np.inf, np.float32),  # float16 holds an infinity
    }
    made = made_by(Float16(), write(tmp_path / "source", text, weights), tmp_path, None)
    assert made.notes == ("3 weights beyond float16's range were clipped to it",)
