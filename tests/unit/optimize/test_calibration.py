"""Ranges against numpy and against what onnxruntime finds when it has all samples at once."""

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator, load_tensors_data

from optimize.calibration import BINS, Histograms, whole_batches, write_ranges
from optimize.samples import open_samples
from optimize.testing import samples_for, tiny_conv_net, tiny_transformer
from registry.errors import InputError, NotApplicableError
from registry.records import TensorSpec

METHODS = ("minmax", "entropy", "percentile")
KINDS = dict(
    zip(METHODS, (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile), strict=True)
)
OPS = ["Conv", "Gemm", "MatMul", "Relu", "Sub"]
FLOAT = TensorSpec(name="x", dtype="float32", shape=("batch",))


def ranges(path, batches, tmp_path, *, method="minmax", percentile=99.0, symmetric=False):
    target = tmp_path / "ranges.json"
    options = {"method": method, "percentile": percentile, "symmetric": symmetric, "threads": 1}
    write_ranges(path, batches, target, op_types=OPS, **options)
    return {name: told(found.range_value) for name, found in load_tensors_data(target).items()}


def told(ends):
    return tuple(float(np.ravel(end)[0]) for end in ends)


def relu(tmp_path, shape=("batch",), *, op="Relu"):
    """One node from ``x`` to ``y``."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in ("x", "y")]
    node = helper.make_node(op, ["x", "x"] if op == "Sub" else ["x"], ["y"])
    graph = helper.make_graph([node], "one", ends[:1], ends[1:])
    path = tmp_path / "one.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def all_at_once(path, samples, tmp_path, method, percentile, symmetric):
    """What onnxruntime's calibrator finds, and the width of its bins."""

    class Everything(CalibrationDataReader):
        left = iter([samples])

        def get_next(self):
            return next(self.left, None)

    options = {"symmetric": symmetric} | ({"percentile": percentile} if method == "percentile" else {})
    augmented = str(tmp_path / "all.onnx")
    calibrator = create_calibrator(path, OPS, augmented, calibrate_method=KINDS[method], extra_options=options)
    calibrator.collect_data(Everything())
    found = {name: told(data.range_value) for name, data in calibrator.compute_data().items()}
    if method == "minmax":
        return found, dict.fromkeys(found, 0.0)
    histograms = calibrator.collector.get_histogram_dict()
    return found, {name: float(histogram[1][1] - histogram[1][0]) for name, histogram in histograms.items()}


@pytest.mark.parametrize("make", [tiny_conv_net, tiny_transformer])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_all_samples_at_once(tmp_path, make, method, symmetric):
    source = make(tmp_path / "source")
    samples = samples_for(source.inputs, count=24)
    batches = whole_batches(samples, source.inputs, wanted=5)
    found = ranges(source.path, batches, tmp_path, method=method, percentile=99.0, symmetric=symmetric)
    expected, widths = all_at_once(source.path, samples, tmp_path, method, 99.0, symmetric)
    assert found.keys() == expected.keys()
    for name in expected:
        # Matrix products round otherwise in batches of another size.
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6 + widths[name])


numbers = st.floats(-(2.0**100), 2.0**100, width=32)
parts = st.lists(st.lists(numbers, min_size=1, max_size=30), min_size=1, max_size=6)
small = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("symmetric", [False, True])
@given(parts)
@small
def test_minmax_is_numpys_however_the_values_were_split(tmp_path, symmetric, values):
    batches = [{"x": np.array(part, np.float32)} for part in values]
    whole = np.concatenate([batch["x"] for batch in batches])
    found = ranges(relu(tmp_path), batches, tmp_path, symmetric=symmetric)
    reach = float(np.abs(whole).max())
    assert found["x"] == ((-reach, reach) if symmetric else (whole.min(), whole.max()))
    positive = np.maximum(whole, 0)
    assert found["y"] == ((-positive.max(), positive.max()) if symmetric else (positive.min(), positive.max()))


@given(parts, st.sampled_from([60.0, 90.0, 99.0, 99.999, 100.0]))
@example([[3.0]], 99.0)
@example([[-3.0, -3.0], [-3.0]], 99.0)
@example([[0.0], [0.0, -0.0]], 99.0)
@example([[1e-42], [0.0]], 99.0)
@example([[1e-6] * 20, [1e30]], 99.0)
@example([[0.0] * 7, [1.31e26, 3.9e26, 1.29e26]], 60.0)
@small
def test_a_percentile_is_numpys_however_the_values_were_split(tmp_path, values, percent):
    batches = [np.array(part, np.float32) for part in values]
    whole = np.concatenate(batches)
    extremes = {"x": (whole.min(), whole.max())}
    split, together = (Histograms(extremes, method="percentile") for _ in range(2))
    for batch in batches:
        split.add({"x": batch})
    together.add({"x": whole})
    found = told(split.ranges(percent)["x"])
    assert found == told(together.ranges(percent)["x"])
    bin_ = 2 * float(np.abs(whole).max()) / BINS["percentile"]
    tail = (100 - percent) / 2
    # Where as many values are below as the percentile says, the last digit of a sum decides which of two it is.
    least, most = (
        np.percentile(whole.astype(np.float64), np.clip([tail + off, 100 - tail + off], 0, 100), method="inverted_cdf")
        for off in (-1e-9, 1e-9)
    )
    width = bin_ * 1.001 + 1e-37
    assert (least - width <= found).all()
    assert (found <= most + width).all()
    assert whole.min() <= found[0] <= found[1] <= whole.max()


@given(parts, st.sampled_from([60.0, 99.0, 100.0]))
@small
def test_a_percentile_of_absolute_values_is_numpys(tmp_path, values, percent):
    whole = np.concatenate([np.array(part, np.float32) for part in values])
    histograms = Histograms({"x": (whole.min(), whole.max())}, method="percentile", symmetric=True)
    for part in values:
        histograms.add({"x": np.array(part, np.float32)})
    low, high = told(histograms.ranges(percent)["x"])
    reach = float(np.abs(whole).max())
    wanted = np.percentile(np.abs(whole.astype(np.float64)), percent, method="inverted_cdf")
    assert max(abs(low), abs(high)) == pytest.approx(wanted, rel=0, abs=reach / BINS["percentile"] * 1.001 + 1e-37)


@pytest.mark.parametrize("method", METHODS)
def test_a_later_batch_that_reaches_further_takes_no_more_bins(tmp_path, method):
    batches = [{"x": np.full(8, value, np.float32)} for value in (0.0, 1e-30, 1e-3, 1e30)]
    found = ranges(relu(tmp_path), batches, tmp_path, method=method, percentile=100.0)
    assert found["x"][0] == 0
    assert found["x"][1] == pytest.approx(1e30, rel=1 / 1000)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_is_always_zero_has_a_range(tmp_path, method, symmetric):
    batches = [{"x": np.array([1.0, -2.0, 3.0], np.float32)}] * 2
    found = ranges(relu(tmp_path, op="Sub"), batches, tmp_path, method=method, symmetric=symmetric)
    assert found["y"] == (0, 0)
    assert found["x"][0] < 0 < found["x"][1]


@pytest.mark.parametrize("method", METHODS)
def test_batches_may_differ_in_shape_and_be_empty(tmp_path, method):
    shapes = [(2, 3), (1, 7), (0, 5), (4, 1)]
    batches = [{"x": np.full(shape, 2.0 + place, np.float32)} for place, shape in enumerate(shapes)]
    found = ranges(relu(tmp_path, (None, None)), batches, tmp_path, method=method, percentile=100.0)
    assert found["x"][0] == pytest.approx(2, abs=0.01)
    assert found["x"][1] == pytest.approx(5, abs=0.01)
    nothing = ranges(relu(tmp_path, (None, None)), [batches[2]], tmp_path, method=method)
    assert nothing["x"] == (0, 0)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(tmp_path, method, value, place):
    batches = [{"x": np.ones(100, np.float32)} for _ in range(2)]
    batches[place]["x"][50] = value
    with pytest.raises(NotApplicableError, match="the tensor 'x' is not finite on the calibration samples"):
        ranges(relu(tmp_path), batches, tmp_path, method=method)


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf, -np.inf], [np.inf, -np.inf, 1]])
def test_nothing_but_values_that_are_not_finite(tmp_path, values):
    with pytest.raises(NotApplicableError, match="the tensor 'x' is not finite on the calibration samples"):
        ranges(relu(tmp_path), [{"x": np.array(values, np.float32)}], tmp_path)


def test_no_batches_and_batches_that_can_be_read_once_only(tmp_path):
    with pytest.raises(InputError, match="the calibration samples are empty"):
        ranges(relu(tmp_path), [], tmp_path)
    with pytest.raises(InputError, match="the calibration samples are empty"):
        whole_batches({"x": np.ones(0, np.float32)}, (FLOAT,), wanted=2)
    with pytest.raises(ValueError, match="must not be an iterator"):
        ranges(relu(tmp_path), iter([{"x": np.ones(1, np.float32)}]), tmp_path, method="entropy")


@pytest.mark.parametrize("from_file", [False, True])
def test_batches_are_as_the_model_fixes_them(tmp_path, from_file):
    samples = {"x": np.arange(7, dtype=np.float32)}
    if from_file:
        np.savez(tmp_path / "s.npz", **samples)
        samples = open_samples(tmp_path / "s.npz")
    free = whole_batches(samples, (FLOAT,), wanted=3)
    assert len(free) == 3
    for _ in range(2):
        assert [batch["x"].tolist() for batch in free] == [[0, 1, 2], [3, 4, 5], [6]]
    fixed = whole_batches(samples, (TensorSpec(name="x", dtype="float32", shape=(2,)),), wanted=3)
    assert len(fixed) == 3
    assert [batch["x"].tolist() for batch in fixed] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(NotApplicableError, match="fixes its batch at 8, and there are only 7 samples"):
        whole_batches(samples, (TensorSpec(name="x", dtype="float32", shape=(8,)),), wanted=3)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_gives_the_ranges_of_its_arrays(tmp_path, method):
    source = tiny_conv_net(tmp_path / "source")
    samples = samples_for(source.inputs, count=10)
    np.savez_compressed(tmp_path / "s.npz", **samples)
    found = [
        ranges(source.path, whole_batches(given_, source.inputs, wanted=4), tmp_path, method=method)
        for given_ in (samples, open_samples(tmp_path / "s.npz"))
    ]
    assert found[0] == found[1]
