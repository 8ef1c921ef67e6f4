import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.measure.early_stopping import upper_bound
from profiles.measure.percentiles import (
    estimate_over_runs,
    estimate_percentile,
    is_earned,
    nearest_rank,
)
from tests.doubles.queues import quantile, response_times


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


def runs_of(count: int, requests: int, seed: int = 1) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).exponential(10, (count, requests)))


def test_a_percentile_is_judged_before_it_is_printed() -> None:
    assert estimate_percentile(runs_of(1, 661), 99) is None
    assert estimate_percentile(runs_of(2, 330), 99) is None
    told = estimate_percentile(runs_of(2, 334), 99)
    assert told is not None
    assert told.low is None
    assert told.value == told.high
    assert told.method == "upper end, t over runs"
    printed = estimate_percentile(runs_of(3, 334), 99)
    assert printed is not None
    assert printed.method == "t over runs"
    assert printed.low is not None
    assert printed.low < printed.value < (printed.high or 0)


def test_the_upper_end_is_no_lower_than_the_sample_can_tell() -> None:
    alike = np.arange(1.0, 335.0)
    told = estimate_percentile([alike, alike, alike], 99)  # runs that agree to the last digit
    assert told is not None
    assert (told.low, told.value, told.high) == (331, 331, 334)


def test_one_run_has_no_upper_end_and_nor_has_a_tail_near_saturation() -> None:
    alone = estimate_percentile(runs_of(1, 1000), 99)
    assert alone is not None
    assert alone.high is None
    assert estimate_percentile(runs_of(1, 700), 99) is None
    runs = runs_of(5, 400)
    for percentile, utilisation, known in [(99, 0.86, False), (90, 0.9, False), (99, 0.85, True), (50, 0.9, True)]:
        told = estimate_percentile(runs, percentile, utilisation=utilisation)
        assert told is not None
        assert (told.high is not None) == known
        assert told.low is not None
        assert ("near saturation" in told.method) != known
    assert estimate_percentile(runs_of(2, 334), 99, utilisation=0.9) is None


@pytest.mark.parametrize(("utilisation", "most"), [(0.3, 0.05), (0.7, 0.12)])
def test_the_upper_end_is_seldom_below_the_truth_though_requests_depend_on_each_other(
    utilisation: float, most: float
) -> None:
    # What five runs of 2,000 requests to an M/M/1 queue say of its p99; nominally 2.5 % of upper ends are too low.
    times = response_times(utilisation, 5 * 150, 2000, np.random.default_rng(8)).reshape(150, 5, 2000)
    true = quantile(utilisation, 99)
    told = [estimate_percentile(list(runs), 99) for runs in times]
    assert np.mean([one is not None and (one.high or 0) < true for one in told]) <= most
    alone = np.mean([(upper_bound(runs.ravel(), 99) or 0) < true for runs in times])
    assert (alone > 0.3) == (utilisation == 0.7)  # the binomial by itself does not know that requests queue
