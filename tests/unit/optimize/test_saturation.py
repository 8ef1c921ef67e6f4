"""Sums that overflow without VNNI, counted by emulation and by a plain loop."""

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from optimize.saturation import check_saturation, saturated_sums, saturates_on
from registry.errors import StageError


@pytest.fixture
def rng():
    """The same draws for each test, whatever ran before it."""
    return np.random.default_rng(0)


def loop(activations, weights):
    """The same, one sum at a time."""
    rows, depth = activations.shape
    found = 0
    for row in range(rows):
        for column in range(weights.shape[1]):
            for k in range(0, depth, 2):
                total = sum(int(activations[row, i]) * int(weights[i, column]) for i in range(k, min(k + 2, depth)))
                found += total > 32_767 or total < -32_768
    return found


@given(st.integers(1, 7), st.integers(1, 4), st.sampled_from([64, 100, 127]), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_the_count_is_that_of_a_plain_loop(depth, columns, largest, seed):
    rng = np.random.default_rng(seed)
    weights = rng.choice([-largest - (largest == 127), -largest, 0, largest], (depth, columns)).astype(np.int8)
    activations = rng.choice([0, 1, 128, 254, 255], (5, depth)).astype(np.uint8)
    assert saturated_sums(activations, weights) == loop(activations, weights)


def test_what_the_16_bits_hold():
    full = np.full((1, 2), 255, np.uint8)
    assert saturated_sums(full, np.array([[64], [64]], np.int8)) == 0  # 32,640
    assert saturated_sums(full, np.array([[64], [65]], np.int8)) == 1  # 32,895
    assert saturated_sums(full, np.array([[-64], [-64]], np.int8)) == 0
    assert saturated_sums(full, np.array([[-64], [-65]], np.int8)) == 1
    assert saturated_sums(full, np.array([[127], [-127]], np.int8)) == 0
    assert saturated_sums(np.array([[0, 255, 255, 0]], np.uint8), np.full((4, 1), 127, np.int8)) == 0, "1 and 2 part"


def save(folder, text, **weights):
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 13]> g {text}')
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


SCALES = {"s": np.float32(1), "zu": np.uint8(0), "zs": np.int8(0)}
DENSE = """(float[batch,6] x) => (float[batch,3] y) {
  q = QuantizeLinear(x, s, zu) d = DequantizeLinear(q, s, zu) e = DequantizeLinear(w, s, zs)
  y = MatMul(d, e)
}"""


def test_a_matmul_that_overflows_and_its_twin_of_7_bits(rng, tmp_path):
    weights = rng.choice([-128, -90, 90, 127], (6, 3)).astype(np.int8)
    rows = rng.integers(0, 256, (20, 6))
    found = check_saturation(save(tmp_path, DENSE, w=weights, **SCALES), {"x": rows.astype(np.float32)})
    expected = loop(rows.astype(np.uint8), weights)
    assert expected > 0
    assert (found.saturated, found.samples) == (expected, 20)
    assert found.share == expected / (20 * 3 * 3)
    assert [(node.name, node.op, node.sums) for node in found.nodes] == [("y", "MatMul", 180)]
    assert f"{expected} u8 x s8 sums overflow" in found.sentence
    assert "reduce_range" in found.sentence

    twin = check_saturation(save(tmp_path, DENSE, w=weights // 2, **SCALES), {"x": rows.astype(np.float32)})
    assert (twin.saturated, len(twin.nodes), twin.samples) == (0, 1, 0), "proved by the weights, without a run"


def test_weights_that_are_quantized_in_the_graph_and_transposed(tmp_path):
    text = """(float[batch,4] x) => (float[batch,2] y) {
      q = QuantizeLinear(x, s, zu) d = DequantizeLinear(q, s, zu)
      v = QuantizeLinear<axis = 0>(w, sw, zw) e = DequantizeLinear<axis = 0>(v, sw, zw)
      y = Gemm<transB = 1>(d, e)
    }"""
    weights = np.array([[127, 127, 0, 0], [50, 50, 50, 50]], np.float32)
    scales = {"sw": np.array([1, 0.5], np.float32), "zw": np.zeros(2, np.int8), **SCALES}
    found = check_saturation(save(tmp_path, text, w=weights, **scales), {"x": np.full((3, 4), 255, np.float32)})
    assert found.saturated == 3 * (1 + 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_laid_out_channels_last(rng, tmp_path, groups):
    text = f"""(float[2,4,5,6] x) => (float[2,4,h,v] y) {{
      q = QuantizeLinear(x, s, zp) d = DequantizeLinear(q, s, zp) e = DequantizeLinear(w, s, zs)
      y = Conv<pads = [1,0,0,1], strides = [2,1], dilations = [1,2], group = {groups}>(d, e)
    }}"""
    channels = 4 // groups
    weights = rng.integers(-128, 128, (4, channels, 2, 2)).astype(np.int8)
    images = rng.integers(0, 256, (2, 4, 5, 6)).astype(np.uint8)
    zero = np.uint8(200)
    path = save(tmp_path, text, w=weights, zp=zero, **SCALES)
    found = check_saturation(path, {"x": images.astype(np.float32) - 200})

    padded = np.pad(images, [(0, 0), (0, 0), (1, 0), (0, 1)], constant_values=zero)
    expected = rows = 0
    for group in range(groups):
        mine = slice(group * channels, (group + 1) * channels)
        windows = np.stack([
            padded[n, mine, top : top + 2, left : left + 3 : 2].transpose(1, 2, 0).reshape(-1)
            for n in range(2) for top in range(0, 5, 2) for left in range(5)
        ])  # fmt: skip
        kernel = weights[group * 4 // groups : (group + 1) * 4 // groups]
        expected += loop(windows, kernel.transpose(2, 3, 1, 0).reshape(-1, 4 // groups))
        rows = len(windows)
    assert expected > 0
    assert found.saturated == expected
    assert found.nodes[0].sums == rows * channels * 2 * 4


def test_a_depthwise_convolution_is_left_out(tmp_path):
    text = """(float[n,2,3,3] x) => (float[n,2,2,2] y) {
      q = QuantizeLinear(x, s, zu) d = DequantizeLinear(q, s, zu) e = DequantizeLinear(w, s, zs)
      y = Conv<group = 2>(d, e)
    }"""
    path = save(tmp_path, text, w=np.full((2, 1, 2, 2), 127, np.int8), **SCALES)
    assert not check_saturation(path, {"x": np.full((1, 2, 3, 3), 255, np.float32)}).nodes


@pytest.mark.parametrize(("mode", "shape"), [("SAME_UPPER", 3), ("SAME_LOWER", 3), ("VALID", 2)])
def test_auto_pad(tmp_path, mode, shape):
    text = f"""(float[n,2,3,3] x) => (float[n,1,{shape},{shape}] y) {{
      q = QuantizeLinear(x, s, zu) d = DequantizeLinear(q, s, zu) e = DequantizeLinear(w, s, zs)
      y = Conv<auto_pad = "{mode}">(d, e)
    }}"""
    path = save(tmp_path, text, w=np.full((1, 2, 2, 2), 127, np.int8), **SCALES)
    found = check_saturation(path, {"x": np.full((1, 2, 3, 3), 255, np.float32)})
    assert found.nodes[0].sums == shape * shape * 4
    # Padding is zero here, so all of the 2 x 2 windows overflow where they lie on the image.
    inside = 4 * 4 + (2 * 2 * 2 + 1 if shape == 3 else 0)
    assert found.saturated == inside


def test_run_time_ranges_and_a_fixed_batch(tmp_path):
    text = """(float[8,4] x) => (int32[8,2] y) {
      q, sq, zq = DynamicQuantizeLinear(x)
      y = MatMulInteger(q, w, zq, zs)
    }"""
    weights = np.array([[127, 1]] * 4, np.int8)
    path = save(tmp_path, text, w=weights, zs=np.int8(0))
    found = check_saturation(path, {"x": np.tile(np.float32([0, 9, 9, 9]), (12, 1))})
    assert (found.samples, found.saturated) == (8, 8)


@pytest.mark.parametrize("reduce_range", [False, True])
def test_what_onnxruntime_quantizes(rng, tmp_path, reduce_range):
    from onnxruntime.quantization import quantize_dynamic

    weights = rng.choice([-1, -0.99, 0.99, 1], (64, 8)).astype(np.float32)
    path = save(tmp_path, "(float[n,64] x) => (float[n,8] y) { y = MatMul(x, w) }", w=weights)
    quantize_dynamic(path, tmp_path / "int8.onnx", per_channel=True, reduce_range=reduce_range)
    found = check_saturation(tmp_path / "int8.onnx", {"x": rng.random((40, 64)).astype(np.float32)})
    assert [node.op for node in found.nodes] == ["MatMulInteger"]
    assert (found.saturated > 0) is not reduce_range


def test_signed_activations_and_float_models_have_nothing_to_overflow(tmp_path):
    signed = DENSE.replace("zu", "zs")
    rows = {"x": np.full((2, 6), 127, np.float32)}
    assert not check_saturation(save(tmp_path, signed, w=np.full((6, 3), 127, np.int8), **SCALES), rows).nodes
    plain = "(float[b,6] x) => (float[b,6] y) { y = Relu(x) }"
    assert not check_saturation(save(tmp_path, plain), rows).nodes


def test_external_weights_stay_where_they_are(tmp_path):
    path = save(tmp_path, DENSE, w=np.full((6, 3), 127, np.int8), **SCALES)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert check_saturation(path, {"x": np.full((2, 6), 255, np.float32)}).saturated == 2 * 9


def test_samples_that_do_not_fit_are_told(tmp_path):
    path = save(tmp_path, DENSE, w=np.full((6, 3), 127, np.int8), **SCALES)
    with pytest.raises(StageError, match="cannot be run to look for overflow"):
        check_saturation(path, {"x": np.ones((2, 5), np.float32)})


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ((), True),
        (("avx2", "avx512f"), True),
        (("avx2", "avx_vnni"), False),
        (("avx512_vnni",), False),
        (("neon",), False),
    ],
)
def test_which_machines_cut_off(sets, expected):
    assert saturates_on(sets) is expected
