"""The search for the highest rate that keeps a limit, on queues whose limit is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from profiles.measure import slo
from profiles.measure.levels import find_level
from profiles.measure.slo import LatencyLimit, SloSearch, find_slo_max, measure_slo_max
from registry.codec import file_sha256
from registry.errors import InputError
from registry.records import Capacity, GateFinding, LoadProfile, OpenLoop, RunRecord
from tests.doubles.queues import response_times

MOST_RPS = 1000.0
P99 = LatencyLimit(percentile=99, latency_ms=25)
TRUE_RPS = MOST_RPS - np.log(100) / 0.025


def queue_of(chance: np.random.Generator, requests: int = 1000) -> slo.Probe:
    def probe(rate_rps: float, number: int) -> NDArray[np.float64]:
        return response_times(rate_rps / MOST_RPS, 1, requests, chance)[0] * 1000 / MOST_RPS

    return probe


def test_at_most_one_search_in_ten_ends_above_what_an_m_m_1_queue_keeps() -> None:
    chance = np.random.default_rng(5)
    found = [find_slo_max(queue_of(chance), P99, most_rps=MOST_RPS).rate_rps or 0 for _ in range(200)]
    assert np.mean(np.array(found) > TRUE_RPS) <= 0.10
    assert np.median(found) >= 0.88 * TRUE_RPS
    assert min(found) >= 0.75 * TRUE_RPS


def test_bisection_alone_would_be_optimistic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slo, "CONFIRM_RUNS", 0)
    monkeypatch.setattr(slo, "PROBE_RUNS", 1)
    monkeypatch.setattr(slo._Search, "is_confirmed", lambda *_: True)
    chance = np.random.default_rng(5)
    found = [find_slo_max(queue_of(chance), P99, most_rps=MOST_RPS).rate_rps or 0 for _ in range(60)]
    assert np.mean(np.array(found) > TRUE_RPS) > 0.10


def test_a_sharp_limit_is_found_within_the_grid() -> None:
    def probe(rate_rps: float, number: int) -> NDArray[np.float64]:
        return np.full(1000, 10.0 if rate_rps <= 640 else 90.0) + np.arange(1000) / 1000

    found = find_slo_max(probe, P99, most_rps=1000)
    assert found.rate_rps is not None
    assert found.failing_rps is not None
    assert found.rate_rps <= 640 < found.failing_rps <= 1.06 * found.rate_rps
    assert found.estimate is not None
    assert (found.estimate.value, found.estimate.low, found.estimate.high) == (
        found.rate_rps, found.rate_rps, found.failing_rps,
    )  # fmt: skip
    assert [one.phase for one in found.runs[-5:]] == ["confirm"] * 5
    assert found.reason == "5 of 5 fresh runs keep the limit (5,000 requests)."


def test_a_rate_far_below_the_maximum_is_found_too_and_none_where_there_is_none() -> None:
    def limited(most_rps: float) -> SloSearch:
        return find_slo_max(lambda rate_rps, _: np.full(1000, 1.0 if rate_rps < most_rps else 90.0), P99, most_rps=1000)

    assert limited(40).rate_rps == pytest.approx(39, rel=0.06)
    nothing = limited(0)
    assert nothing.rate_rps is None
    assert nothing.estimate is None
    assert "Not even" in nothing.reason


def test_a_server_without_a_limit_ends_the_search() -> None:
    found = find_slo_max(lambda *_: np.full(1000, 1.0), P99, most_rps=1000)
    assert found.rate_rps is not None
    assert found.failing_rps is None
    assert len(found.runs) < 40


def test_too_few_requests_confirm_nothing() -> None:
    found = find_slo_max(lambda *_: np.full(200, 1.0), P99, most_rps=1000)
    assert found.rate_rps is None
    assert found.failing_rps is None  # nothing is known of the server, and lower rates have fewer requests still
    assert len(found.runs) == 1
    assert found.reason == (
        "No window told whether the limit is kept. 1 window was too short to tell, at so low a rate: a p99 takes 299 "
        "requests (a load profile's duration_s makes windows longer)."
    )


def test_few_requests_tell_that_a_limit_is_missed_by_far() -> None:
    found = find_slo_max(lambda *_: np.full(200, 90.0), P99, most_rps=1000)
    assert found.failing_rps is not None
    assert found.reason == f"Not even {found.failing_rps:.3g} requests a second keep the limit."


def test_windows_that_were_all_invalid_say_nothing_of_the_server() -> None:
    found = find_slo_max(lambda *_: None, P99, most_rps=1000)
    assert (found.rate_rps, found.failing_rps) == (None, None)
    assert found.reason == (
        "No window told whether the limit is kept. 7 windows were invalid, which counts as failing."
    )


def test_an_invalid_window_never_passes() -> None:
    found = find_slo_max(lambda rate_rps, _: None if rate_rps > 500 else np.ones(1000), P99, most_rps=1000)
    assert found.rate_rps is not None
    assert found.rate_rps <= 500
    assert found.failing_rps is None  # nothing is known of the server there
    assert "windows were invalid" in found.reason


def test_a_machine_that_is_not_steady_is_told() -> None:
    slow = iter([False] * 4 + [True] * 2)
    found = find_slo_max(
        lambda rate_rps, _: np.full(1000, 90.0 if next(slow, False) or rate_rps > 900 else 1.0), P99, most_rps=1000
    )
    assert found.rate_rps is not None
    assert found.failing_rps is not None


@pytest.mark.parametrize(("percentile", "latency_ms"), [(97, 10), (99, 0), (99, float("nan"))])
def test_limits_that_are_none(percentile: int, latency_ms: float) -> None:
    with pytest.raises(InputError):
        LatencyLimit(percentile=percentile, latency_ms=latency_ms)


LEVEL = find_level("quick")
CAPACITY = Capacity(candidate_id="c", concurrency=2, ladder=((1, 190.0), (2, 200.0)), stages=(), saturation_rps=200)


def serve(profile: LoadProfile, path: Path) -> RunRecord:
    """A queue of 200 a second whose times of service are all equal."""
    assert isinstance(profile.load, OpenLoop)
    rate_rps, count = profile.load.rate_rps, round(profile.load.rate_rps * profile.duration_s)
    chance = np.random.default_rng(profile.seed)
    times_s = response_times(rate_rps / 200, 1, count, chance, service="fixed")[0] / 200
    np.savez(
        path,
        intended_ns=np.zeros(count, dtype=np.int64),
        sent_ns=np.zeros(count, dtype=np.int64),
        done_ns=np.round(times_s * 1e9).astype(np.int64),
        status=np.zeros(count, dtype=np.int8),
        payload=np.zeros(count, dtype=np.int32),
    )
    return RunRecord(
        load=profile, scheduled=count, ok=count, errors={}, window_s=profile.duration_s, metrics={}, findings=(),
        raw=path.name, raw_sha256=file_sha256(path),
    )  # fmt: skip


def test_windows_are_long_enough_and_leave_nothing_behind(tmp_path: Path) -> None:
    offered: list[LoadProfile] = []

    def run(profile: LoadProfile, path: Path) -> RunRecord:
        offered.append(profile)
        return serve(profile, path)

    limit = LatencyLimit(percentile=90, latency_ms=20)
    found = measure_slo_max(run, limit, CAPACITY, level=LEVEL, seed=3, raw=tmp_path / "slo.npz")
    assert found.rate_rps is not None
    assert 0.5 * 200 < found.rate_rps < 200
    assert not list(tmp_path.iterdir())
    assert len({profile.seed for profile in offered}) == len(offered)
    assert min(one.requests for one in found.runs) >= 1000


def test_windows_that_were_asked_to_be_long_are(tmp_path: Path) -> None:
    offered: list[LoadProfile] = []

    def run(profile: LoadProfile, path: Path) -> RunRecord:
        offered.append(profile)
        return serve(profile, path)

    level, slow = replace(LEVEL, open_s=90.0), replace(CAPACITY, ladder=((1, 20.0),))
    limit = LatencyLimit(percentile=90, latency_ms=20)
    measure_slo_max(run, limit, slow, level=level, seed=3, raw=tmp_path / "slo.npz")
    assert {profile.duration_s for profile in offered} == {90.0}


def test_what_the_client_spoiled_passes_nothing_but_errors_are_the_servers(tmp_path: Path) -> None:
    def spoiled(gate: str) -> SloSearch:
        def run(profile: LoadProfile, path: Path) -> RunRecord:
            record = serve(profile, path)
            return replace(record, findings=(GateFinding(gate=gate, observed="x", limit="y"),))

        limit = LatencyLimit(percentile=50, latency_ms=900)
        return measure_slo_max(run, limit, CAPACITY, level=LEVEL, seed=3, raw=tmp_path / "slo.npz")

    assert spoiled("client_cpu").rate_rps is None
    assert all(one.requests for one in spoiled("errors").runs)


def test_a_limit_beyond_the_timeout_and_a_dead_server(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are misses"):
        measure_slo_max(
            serve, LatencyLimit(percentile=90, latency_ms=5000), CAPACITY, level=LEVEL, seed=0, raw=tmp_path / "a"
        )
    dead = replace(CAPACITY, ladder=((1, 0.0),))
    assert measure_slo_max(serve, P99, dead, level=LEVEL, seed=0, raw=tmp_path / "a").rate_rps is None
