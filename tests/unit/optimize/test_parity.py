"""Statistics of parity on outputs that others divide by zero for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from optimize.intervals import resampled_means
from optimize.parity import MOST_DB, parity, row_cosines, spread

REFERENCE = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)


def metrics(reference, variant, name="y"):
    return parity({name: np.asarray(reference)}, {name: np.asarray(variant)})[0]


def test_no_difference():
    found = metrics(REFERENCE, REFERENCE.copy())
    values = {name: estimate.value for name, estimate in found.items()}
    assert values == {
        "max_abs_error": 0, "mismatch_share": 0, "p99_error": 0, "snr_db": MOST_DB,
        "cosine": pytest.approx(1), "worst_cosine": pytest.approx(1),
    }  # fmt: skip
    assert found["mismatch_share"].high == pytest.approx(3 / 200, rel=0.01), "none seen is not none"


def test_noise_of_a_known_size():
    noisy = REFERENCE + np.random.default_rng(1).normal(scale=0.03, size=REFERENCE.shape).astype(np.float32)
    found = metrics(REFERENCE, noisy)
    assert found["snr_db"].value == pytest.approx(30.5, abs=0.5)
    assert found["snr_db"].unit == "dB"
    width = np.quantile(REFERENCE, 0.99) - np.quantile(REFERENCE, 0.01)
    assert found["p99_error"].value == pytest.approx(0.03 * 2.576 / width, rel=0.05)
    assert 0 < found["mismatch_share"].value < 0.2
    for name in ("snr_db", "p99_error", "mismatch_share", "cosine"):
        assert found[name].low < found[name].value < found[name].high


def test_outlier_dimensions_rule_the_largest_error_only():
    reference = np.tile(REFERENCE, 16)
    reference[:, 7] = 100
    variant = reference + np.float32(0.001)
    variant[:, 7] += 5
    found = metrics(reference, variant)
    assert found["max_abs_error"].value == pytest.approx(5, rel=0.01)
    assert found["p99_error"].value < 0.001
    assert found["mismatch_share"].value == pytest.approx(1 / 256)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_an_output_that_never_changes(constant):
    reference = np.full((50, 4), constant, np.float32)
    assert metrics(reference, reference)["snr_db"].value == MOST_DB
    found = metrics(reference, reference + np.float32(0.3))
    assert found["p99_error"].value == pytest.approx(0.3 / (constant or 1), rel=1e-5)
    assert found["mismatch_share"].value == 1
    assert found["snr_db"].value == pytest.approx(-MOST_DB if constant == 0 else 20, abs=0.01)


@settings(max_examples=25, deadline=None)
@given(*[arrays(np.float64, (21, 3), elements=st.floats(-1e300, 1e300)) for _ in range(2)])
def test_every_number_is_finite(reference, variant):
    for estimate in metrics(reference, variant).values():
        assert all(math.isfinite(end) for end in (estimate.low, estimate.value, estimate.high))


def test_the_lowest_cosine_says_whose_it_is():
    variant = REFERENCE.copy()
    variant[17] = -variant[17]
    found, notes = parity({"y": REFERENCE}, {"y": variant})
    assert found["worst_cosine"].value == pytest.approx(-1)
    assert "sample 17: cosine -1.0000 in the output 'y'" in notes[0]
    assert not parity({"y": REFERENCE}, {"y": REFERENCE + np.float32(1e-4)})[1], "nothing worth saying"


def test_whole_numbers_are_equal_or_not():
    classes = np.arange(40, dtype=np.int64)
    found = metrics(classes, np.where(classes == 3, 0, classes))
    assert set(found) == {"max_abs_error", "mismatch_share"}
    assert found["mismatch_share"].value == 1 / 40


def test_several_outputs_are_told_apart_and_the_worst_counts():
    reference = {"a b": REFERENCE, "a_b": REFERENCE, "ids": np.arange(200), "text": np.array(["x"] * 200)}
    variant = reference | {"a_b": REFERENCE * 1.1 + 0.5}
    found, _ = parity(reference, variant)
    assert found["snr_db"] == found["snr_db.a_b_"]
    assert found["snr_db.a_b"].value == MOST_DB
    assert found["mismatch_share.ids"].value == 0
    assert not any("text" in name for name in found)


def test_few_samples_leave_the_ends_open():
    found = metrics(REFERENCE[:5], REFERENCE[:5] * 1.01)
    assert found["p99_error"].high is None
    assert found["snr_db"].low is None
    assert found["worst_cosine"].low is not None


def test_spread_is_not_ruled_by_outliers():
    values = np.append(np.linspace(0, 1, 1001), 1e6)
    assert spread(values) == pytest.approx(0.98, abs=0.01)
    assert spread(np.append(np.zeros(1000), 5.0)) == 5
    assert spread(np.array([-1.7e308, 1.7e308])) > 0


def test_columns_are_drawn_together():
    column = np.random.default_rng(1).normal(size=500)
    drawn = resampled_means(np.stack([column, 2 * column], axis=1))
    assert drawn[:, 1] == pytest.approx(2 * drawn[:, 0])
    assert drawn[:, 0].std() == pytest.approx(column.std() / math.sqrt(500), rel=0.1)
    assert resampled_means(np.ones((19, 1))) is None


def test_cosine_of_zero_rows_and_of_extremes():
    a = np.array([[0.0, 0.0], [0.0, 0.0], [1e300, 1e300], [1e-300, 0.0], [1.0, 0.0]])
    b = np.array([[0.0, 0.0], [1.0, 0.0], [1e-300, 1e-300], [1e300, 0.0], [-1.0, 0.0]])
    assert row_cosines(a, b) == pytest.approx([1.0, 0.0, 1.0, 1.0, -1.0])


@given(arrays(np.float64, (5, 3), elements=st.floats(-1e300, 1e300)))
def test_cosine_with_itself_is_one(rows):
    assert row_cosines(rows, rows) == pytest.approx(np.ones(5))


def test_a_noise_next_to_nothing_is_the_most_that_is_told():
    reference = np.tile([1.0, 0.0], (21, 1))
    assert metrics(reference, reference + np.array([0.0, 1e-160]))["snr_db"].value == MOST_DB
