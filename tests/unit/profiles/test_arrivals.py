import numpy as np
import pytest
from scipy import stats

from profiles.load.arrivals import schedule_ns


def test_poisson_count_is_within_three_sigma() -> None:
    counts = [len(schedule_ns(500, 4, seed=seed)) for seed in range(50)]
    assert all(abs(count - 2000) < 4 * np.sqrt(2000) for count in counts)
    assert min(counts) < 2000 < max(counts)
    assert np.mean(counts) == pytest.approx(2000, abs=3 * np.sqrt(2000 / 50))


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(schedule_ns(1000, 20, seed=3)) / 1e9
    assert stats.kstest(gaps, "expon", args=(0, 1 / 1000)).pvalue > 0.01


def test_constant_gaps_are_equal() -> None:
    due = schedule_ns(200, 1, arrivals="constant")
    assert len(due) == 200
    assert set(np.diff(due)) == {5_000_000}


def test_a_schedule_is_absolute_rising_and_inside() -> None:
    due = schedule_ns(100, 3, seed=1)
    assert due.dtype == np.int64
    assert (np.diff(due) >= 0).all()
    assert due[0] >= 0
    assert due[-1] < 3e9


def test_the_same_seed_gives_the_same_arrivals_stretched() -> None:
    slow, fast = schedule_ns(100, 4, seed=5), schedule_ns(200, 2, seed=5)
    assert len(slow) == len(fast)
    assert np.abs(slow - 2 * fast).max() <= 2
    assert not np.array_equal(slow, schedule_ns(100, 4, seed=6)[: len(slow)])


@pytest.mark.parametrize(("rate", "duration"), [(0, 1), (1, 0), (-1, 1)])
def test_nothing_to_schedule_is_an_error(rate: float, duration: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        schedule_ns(rate, duration)
