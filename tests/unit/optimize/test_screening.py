import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimize.screening import median_interval, time_runs


def test_time_of_a_known_sleep():
    estimate = time_runs(lambda _: time.sleep(0.004), 0.4)
    assert 4.0 <= estimate.value < 12.0
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate.unit == "ms"


def test_a_slow_run_is_bounded_and_has_no_interval():
    calls = []
    estimate = time_runs(lambda i: (calls.append(i), time.sleep(0.05)), 0.01)
    assert len(calls) == 5  # two to warm up, three timed
    assert (estimate.low, estimate.high, estimate.runs) == (None, None, 3)


def test_six_blocks_are_the_fewest_for_an_interval():
    assert median_interval([1, 2, 3, 4, 5]) == (None, None)
    assert median_interval([6, 2, 3, 4, 5, 1]) == (1, 6)


def test_interval_of_fifteen_takes_the_fourth_and_the_twelfth():
    assert median_interval(list(range(1, 16))) == (4, 12)


@given(st.lists(st.floats(0.1, 1e3), min_size=6, max_size=30))
def test_interval_holds_the_median(values):
    low, high = median_interval(values)
    assert low <= np.median(values) <= high


def test_interval_covers_the_true_median():
    generator = np.random.default_rng(0)
    drawn = [median_interval(generator.normal(size=15).tolist()) for _ in range(500)]
    assert np.mean([low <= 0 <= high for low, high in drawn]) == pytest.approx(0.965, abs=0.03)
