from pathlib import Path

import pytest

from profiles.load import gates
from profiles.load.worker import throttled_periods


def test_lateness_has_a_floor_of_a_millisecond_and_five_percent_of_the_median() -> None:
    assert gates.lateness(0.9, 2.0) is None
    assert gates.lateness(1.1, 2.0) is not None
    assert gates.lateness(4.9, 100.0) is None
    finding = gates.lateness(5.1, 100.0)
    assert finding is not None
    assert (finding.gate, finding.observed, finding.limit) == ("lateness", "p99 5.10 ms", "5.00 ms")


def test_a_closed_loop_may_use_more_of_its_core() -> None:
    assert gates.client_cpu(0.69, closed=False) is None
    assert gates.client_cpu(0.71, closed=False) is not None
    assert gates.client_cpu(0.89, closed=True) is None
    assert gates.client_cpu(0.91, closed=True) is not None


def test_sent_is_held_against_scheduled() -> None:
    assert gates.offered(990, 1000) is None
    assert gates.offered(989, 1000) is not None
    assert gates.offered(0, 0) is None


def test_errors() -> None:
    assert gates.errors(1, 1000) is None
    assert gates.errors(2, 1000) is not None
    assert gates.errors(1, 900) is not None
    assert gates.errors(0, 0) is not None


def test_one_wrong_answer_is_too_many() -> None:
    assert gates.mismatches(0, 64) is None
    finding = gates.mismatches(1, 64)
    assert finding is not None
    assert finding.observed == "1 of 64 checked answers are wrong"


def test_in_flight_must_agree_at_each_instant() -> None:
    assert gates.in_flight([], []) is None
    assert gates.in_flight([3, 4, 5], [3, 4, 5]) is None
    assert gates.in_flight([0, 0, 0], [0, 0, 0]) is None
    assert gates.in_flight([3, 4, 5], [5, 4, 3]) is not None
    assert gates.in_flight([100] * 50, [101] * 50) is None
    assert gates.in_flight([10] * 50, [11] * 50) is not None


@pytest.mark.parametrize(("share", "found"), [(0.0, False), (0.02, False), (0.021, True)])
def test_steal(share: float, found: bool) -> None:
    assert (gates.steal(share) is not None) == found


def test_any_throttling_and_any_restart_is_too_much() -> None:
    assert gates.throttling(0) is None
    assert (finding := gates.throttling(3)) is not None
    assert "3 periods" in finding.observed
    assert gates.restarts(None) is gates.restarts(("a", "a")) is None
    assert (finding := gates.restarts(("pid 1", "pid 2"))) is not None
    assert finding.observed == "pid 1, then pid 2"


def test_a_point_near_the_clients_own_ceiling_is_the_clients() -> None:
    assert gates.ceiling(700, 1000, closed=False) is None
    assert gates.ceiling(701, 1000, closed=False) is not None
    assert gates.ceiling(900, 1000, closed=True) is None
    assert gates.ceiling(901, 1000, closed=True) is not None


@pytest.mark.parametrize("place", ["cpu.stat", "cpu,cpuacct/cpu.stat", "cpu/cpu.stat"])
def test_throttling_is_read_from_the_control_group(tmp_path: Path, place: str) -> None:
    assert throttled_periods(tmp_path) == 0
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("nr_periods 9\nnr_throttled 4\nthrottled_usec 70\n", encoding="ascii")
    assert throttled_periods(tmp_path) == 4
