import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.measure.percentiles import (
    estimate_over_runs,
    is_earned,
    nearest_rank,
)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.sampled_from([50, 90, 95, 99]))
def test_a_percentile_is_the_smallest_value_with_enough_below(values: list[float], percentile: int) -> None:
    found = nearest_rank(values, percentile)
    assert found == sorted(values)[math.ceil(len(values) * percentile / 100) - 1]


def test_a_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        nearest_rank([], 50)


@pytest.mark.parametrize(("percentile", "needed"), [(50, 20), (90, 100), (95, 200), (99, 1000)])
def test_percentiles_are_earned_by_ten_requests_beyond(percentile: int, needed: int) -> None:
    assert is_earned(percentile, needed)
    assert not is_earned(percentile, needed - 1)
    assert is_earned(percentile, needed // 3 + 1, in_run=True)
    assert not is_earned(percentile, needed // 4, in_run=True)


def test_an_unusual_percentile_is_never_earned() -> None:
    assert not is_earned(97, 10**9)


def test_one_run_has_no_interval() -> None:
    estimate = estimate_over_runs([12.0], None, "ms")
    assert (estimate.value, estimate.low, estimate.high, estimate.method) == (12.0, None, None, "single run")


def test_the_interval_is_students_over_logs_around_the_pooled_value() -> None:
    estimate = estimate_over_runs([8.0, 10.0, 12.5], 11.0, "ms")
    half = 4.302652729911275 * math.log(1.25) / math.sqrt(3)
    assert estimate.value == pytest.approx(11.0)
    assert (estimate.low, estimate.high) == pytest.approx((11 * math.exp(-half), 11 * math.exp(half)))
    assert estimate.runs == 3


def test_values_that_are_not_positive_are_taken_as_they_stand() -> None:
    estimate = estimate_over_runs([0.0, 0.0, 3.0], None, "s")
    assert estimate.value == pytest.approx(1.0)
    assert estimate.low is not None
    assert estimate.low < 0


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    chance = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        runs = np.exp(chance.normal(math.log(20), 0.2, 5))
        estimate = estimate_over_runs(runs.tolist(), None, "ms")
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 20 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.98
