import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimize import screening
from optimize.screening import median_interval, time_runs


@pytest.fixture
def work(monkeypatch):
    """Takes so many seconds of the clock by which runs are timed, which goes on by nothing else."""
    now_ns = [0]

    def take(seconds):
        now_ns[0] += round(seconds * 1e9)

    clock = SimpleNamespace(perf_counter=lambda: now_ns[0] / 1e9, perf_counter_ns=lambda: now_ns[0])
    monkeypatch.setattr(screening, "time", clock)
    return take


def test_time_of_a_known_run(work):
    calls = []
    # Every tenth run is late: the median is that of the others.
    estimate = time_runs(lambda i: (calls.append(i), work(0.004 if len(calls) % 10 else 0.04)), 0.4)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((4.0, 4.0, 4.0))
    assert estimate.unit == "ms"
    assert 50 < len(calls) < 110


def test_the_time_of_real_work_is_what_it_took():
    began = time.perf_counter()
    estimate = time_runs(lambda _: sum(range(10_000)), 0.05)
    assert 0 < estimate.value < 1e3 * (time.perf_counter() - began)


def test_a_slow_run_is_bounded_and_has_no_interval(work):
    calls = []
    estimate = time_runs(lambda i: (calls.append(i), work(0.05)), 0.01)
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
