from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from profiles.load.arrivals import read_arrivals, replay_s, schedule_blocks, schedule_ns
from registry.errors import InputError
from registry.records import OpenLoop


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


def test_a_ramp_rises_linearly_and_then_stays() -> None:
    load = OpenLoop(rate_rps=400, arrivals="constant", ramp_from_rps=0)
    due_s = np.concatenate([*schedule_blocks(load, 2.0, 1.0)]) / 1e9
    # The integral of the rate: a quarter of the ramp's arrivals come in its first half.
    assert [int((due_s < at).sum()) for at in (1.0, 2.0)] == [100, 400]
    assert len(due_s) == 800
    assert np.allclose(np.diff(due_s[due_s > 2]), 1 / 400)
    falling = OpenLoop(rate_rps=100, arrivals="constant", ramp_from_rps=300)
    assert sum(int((block < 2e9).sum()) for block in schedule_blocks(falling, 2.0, 1.0)) == 400


@given(st.sampled_from(["poisson", "constant"]), st.integers(1, 5), st.floats(10, 20000), st.integers(0, 99))
@settings(max_examples=25)
def test_lanes_together_offer_the_same_schedule(arrivals: Any, lanes: int, rate: float, seed: int) -> None:
    load = OpenLoop(rate_rps=rate, arrivals=arrivals)
    whole = np.concatenate([*schedule_blocks(load, 0.1, 0.5, seed=seed)])
    shares = [
        np.concatenate([*schedule_blocks(load, 0.1, 0.5, seed=seed, lane=lane, lanes=lanes)]) for lane in range(lanes)
    ]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert np.array_equal(np.sort(np.concatenate(shares)), whole)


def test_recorded_arrivals_are_replayed(tmp_path: Path) -> None:
    file = tmp_path / "times.txt"
    file.write_text(
        "# from the gateway's log\n1700000000.5\n\n1700000000.0\n1700000002.0  # the last\n", encoding="utf-8"
    )
    load = read_arrivals(file, speed=2.0)
    assert (load.count, load.span_s, load.rate_rps) == (3, 2.0, 3.0)
    due = np.concatenate([*schedule_blocks(load, 1.0, replay_s(load))])
    # Three a second, evenly spaced, before the window; then as recorded, twice as fast.
    assert due.tolist() == [0, 333333333, 666666666, 1_000_000_000, 1_250_000_000, 2_000_000_000]
    file.write_text("1\n2\n", encoding="utf-8")
    with pytest.raises(InputError, match="has changed"):
        list(schedule_blocks(load, 1.0, replay_s(load)))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"1\ntwo\n", ":2: 'two' is no time"),
        (b"1\nnan\n", ":2: 'nan'"),
        (b"5\n", "1 arrivals"),
        (b"1700000000000\n1700000100000\n", "would take 100,000 s, and a run is 86,400 s at most"),
        (b"", "0 arrivals"),
        (b"\xff", "no text"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "times.txt").write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read_arrivals(tmp_path / "times.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_arrivals(tmp_path / "absent.txt")
