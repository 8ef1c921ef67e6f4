import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from profiles.load.recording import COLUMNS, Trace, load_arrays, merge_parts, save_arrays, save_columns
from profiles.load.summary import summarize
from profiles.load.transports import Status
from profiles.load.window import UNANSWERED, _Log
from profiles.testing import Batches, Bimodal, Exponential, Fixed, Queue, Stall, simulate
from registry.codec import file_sha256
from registry.errors import InputError
from registry.records import ClosedLoop, LoadProfile, OpenLoop

MS = 1_000_000


def profile(
    load: ClosedLoop | OpenLoop, duration_s: float, warmup_s: float = 0.0, timeout_s: float = 10.0
) -> LoadProfile:
    return LoadProfile(name="test", load=load, warmup_s=warmup_s, duration_s=duration_s, timeout_s=timeout_s, seed=3)


def test_percentiles_of_a_fixed_law_are_its_latency() -> None:
    wanted = profile(OpenLoop(rate_rps=500), 4)
    metrics = summarize(simulate(Fixed(0.012), wanted), wanted, raw="r").metrics
    for name in ("latency_p50_ms", "latency_p99_ms", "latency_max_ms", "service_p50_ms"):
        assert metrics[name] == pytest.approx(12, abs=0.001)


def test_percentiles_of_an_exponential_law_match_theory() -> None:
    wanted = profile(OpenLoop(rate_rps=500), 40)
    metrics = summarize(simulate(Exponential(0.010), wanted), wanted, raw="r").metrics
    for percentile in (50, 90, 99):
        theory = -10 * np.log(1 - percentile / 100)
        assert metrics[f"latency_p{percentile}_ms"] == pytest.approx(theory, rel=0.05)


def test_sojourn_times_of_a_queue_match_theory() -> None:
    # M/M/1 at 70 %: sojourn times are exponential with mean 1 / (mu - lambda) = 33.3 ms.
    wanted = profile(OpenLoop(rate_rps=70), 2000, warmup_s=20)
    latency = simulate(Queue(0.010, service="exponential"), wanted).latency_ms
    assert latency.mean() == pytest.approx(33.3, rel=0.08)


def test_a_freeze_of_two_seconds_is_seen_whole() -> None:
    law = Stall(Queue(0.002), from_s=30.0, for_s=2.0)
    opened = profile(OpenLoop(rate_rps=200), 60)
    closed = profile(ClosedLoop(concurrency=1), 60)
    assert summarize(simulate(law, opened), opened, raw="r").metrics["latency_p99_ms"] > 1000
    hidden = summarize(simulate(Stall(Queue(0.002), from_s=30.0, for_s=2.0), closed), closed, raw="r").metrics
    assert hidden["latency_p99_ms"] == pytest.approx(2, abs=0.1)
    assert hidden["latency_max_ms"] == pytest.approx(2001, abs=2)


def test_throughput_of_a_closed_loop_does_not_jump_by_whole_answers() -> None:
    # Batches of eight every 400 ms in a window of 700 ms: whole answers would give 11 or 23 a second, by chance.
    sent = np.repeat(np.arange(0, 4000, 400) * MS, 8)
    trace = Trace(
        intended_ns=sent,
        sent_ns=sent,
        done_ns=sent + 400 * MS,
        status=np.zeros(len(sent), np.int8),
        payload=np.zeros(len(sent), np.int32),
    )
    for start in (810, 1000, 1190):
        recording = trace.window(start * MS, (start + 700) * MS)
        assert recording.answered_share / recording.window_s == pytest.approx(20, rel=1e-6)


def test_misses_have_no_end() -> None:
    zeros = np.zeros(4, np.int64)
    trace = Trace(
        intended_ns=zeros,
        sent_ns=zeros,
        done_ns=np.array([5, 5, 0, 700]) * MS,
        status=np.array([Status.OK, Status.STATUS, Status.DROPPED, Status.TIMEOUT], np.int8),
        payload=np.zeros(4, np.int32),
    )
    recording = trace.window(0, 1000 * MS)
    assert recording.latency_ms.tolist() == [5, np.inf, np.inf, np.inf]
    assert recording.service_ms.tolist() == [5]
    assert recording.sent == 3
    assert recording.errors == {"status": 1, "dropped": 1, "timeout": 1}


def test_percentiles_that_are_not_earned_are_not_there() -> None:
    wanted = profile(OpenLoop(rate_rps=100, arrivals="constant"), 1.5)
    metrics = summarize(simulate(Fixed(0.01), wanted), wanted, raw="r").metrics
    assert "latency_p90_ms" in metrics
    assert "latency_p95_ms" not in metrics


def test_an_empty_window_is_invalid() -> None:
    wanted = profile(OpenLoop(rate_rps=0.001), 0.1)
    record = summarize(simulate(Fixed(0.01), wanted), wanted, raw="r")
    assert [finding.gate for finding in record.findings] == ["errors"]


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 300)), max_size=60),
    st.integers(0, 500),
    st.integers(1, 500),
)
def test_what_came_and_went_adds_up(requests: list[tuple[int, int]], start: int, length: int) -> None:
    requests.sort()
    sent = np.array([at for at, _ in requests], dtype=np.int64)
    done = sent + np.array([took for _, took in requests], dtype=np.int64)
    zeros = np.zeros(len(sent), np.int64)
    trace = Trace(intended_ns=sent, sent_ns=sent, done_ns=done, status=zeros.astype("i1"), payload=zeros.astype("i4"))
    window = trace.window(start, start + length)
    assert 0 <= window.answered_share <= len(requests)
    gone_before = int(((done <= start) & (sent <= start)).sum())
    here = int((sent <= start).sum()) - gone_before
    assert window.in_flight_start == here
    left = int(((done > start) & (done <= start + length)).sum())
    arrived = int(((sent > start) & (sent <= start + length)).sum())
    assert window.in_flight_end == here + arrived - left


def test_arrays_come_back_or_are_refused(tmp_path: Path) -> None:
    wanted = profile(OpenLoop(rate_rps=500), 1)
    recording = simulate(Fixed(0.012), wanted)
    path = tmp_path / "w.npz"
    save_arrays(path, recording)
    assert np.array_equal(load_arrays(path, file_sha256(path))["done_ns"], recording.done_ns)
    with pytest.raises(InputError, match="not the file that was written"):
        load_arrays(path, "0" * 64)
    whole = path.read_bytes()
    for end in (0, 3, 100, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=str(path)):
            load_arrays(path)


def test_percentiles_of_a_bimodal_law_are_its_two_times() -> None:
    wanted = profile(OpenLoop(rate_rps=500), 8)
    metrics = summarize(simulate(Bimodal(0.010, 0.100, rare_share=0.05), wanted), wanted, raw="r").metrics
    assert metrics["latency_p90_ms"] == pytest.approx(10, abs=0.001)
    assert metrics["latency_p99_ms"] == pytest.approx(100, abs=0.001)


def test_throughput_of_a_batch_server_is_that_of_its_batches() -> None:
    # Everything that waits, at most eight: 4 ms a batch and 1 ms a request give N / (4 + N) a millisecond.
    for concurrency, rate in ((1, 200.0), (4, 500.0), (8, 8000 / 12), (32, 8000 / 12)):
        wanted = profile(ClosedLoop(concurrency=concurrency), 4)
        metrics = summarize(simulate(Batches(0.004, 0.001, most=8), wanted), wanted, raw="r").metrics
        assert metrics["throughput_rps"] == pytest.approx(rate, rel=0.15)


def test_a_percentile_that_falls_among_misses_is_unknown() -> None:
    wanted = profile(OpenLoop(rate_rps=500, arrivals="constant"), 4, timeout_s=0.05)
    record = summarize(simulate(Bimodal(0.010, 0.100, rare_share=0.05), wanted), wanted, raw="r")
    assert record.metrics["latency_p90_ms"] == pytest.approx(10, abs=0.001)
    assert not {"latency_p99_ms", "latency_max_ms"} & set(record.metrics)
    assert "errors" in {finding.gate for finding in record.findings}


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 300)), min_size=1, max_size=80), st.integers(1, 4))
@settings(max_examples=20)
def test_records_of_several_processes_are_those_of_one(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[int, int]], lanes: int
) -> None:
    requests.sort()
    folder = tmp_path_factory.mktemp("merge")
    sent = np.array([at for at, _ in requests], dtype=np.int64)
    whole = trace_of(sent, np.array([took for _, took in requests], dtype=np.int64), np.arange(len(sent)))
    parts = [
        Trace(**{name: getattr(whole, name)[lane::lanes] for name in COLUMNS})  # type: ignore[arg-type]
        for lane in range(lanes)
    ]
    for lane, part in enumerate(parts):
        save_arrays(folder / f"{lane}.npz", part.window(500, 1500))
    columns, count = merge_parts([folder / f"{lane}.npz" for lane in range(lanes)])
    save_columns(folder / "merged.npz", columns, count)
    merged, single = load_arrays(folder / "merged.npz"), whole.window(500, 1500)
    assert count == single.scheduled
    # Requests that were due at the same time may stand in any order.
    for name in COLUMNS:
        rows = [sorted(zip(found["intended_ns"], found[name], strict=True)) for found in (merged, single.columns)]
        assert rows[0] == rows[1]
    counted = [part.counts(500, 1500) for part in parts]
    for name, value in whole.counts(500, 1500).items():
        if name not in {"window_s", "sampled", "recorded"}:
            assert sum(one[name] for one in counted) == pytest.approx(value)


def trace_of(sent: NDArray[np.int64], took: NDArray[np.int64], payload: NDArray[np.int64]) -> Trace:
    status = np.where(took % 7 == 3, Status.STATUS, Status.OK).astype(np.int8)
    return Trace(intended_ns=sent, sent_ns=sent, done_ns=sent + took, status=status, payload=payload)


@pytest.mark.parametrize("requests", [1, 1000, 5000])
def test_a_log_holds_more_than_was_expected(requests: int) -> None:
    log = _Log(300, requests)
    for index in range(3000):
        assert log.append(10 * index, index % 300, UNANSWERED) == index
    log.sent[7], log.done[7], log.status[7] = 71, 72, Status.OK
    trace = log.trace()
    assert trace.intended_ns.tolist() == list(range(0, 30_000, 10))
    assert (trace.sent_ns[7], trace.done_ns[7], trace.status[7]) == (71, 72, Status.OK)
    assert trace.payload.tolist() == [index % 300 for index in range(3000)]
    assert (np.delete(trace.status, 7) == UNANSWERED).all()


def test_a_log_takes_what_it_holds_and_gives_it_back() -> None:
    """Also the second time, when an allocator would have learned to keep large pieces."""
    # In a process where nothing else takes memory meanwhile.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for held, left in json.loads(done.stdout):
        assert held < 30
        assert left < 4


MEMORY = """
import json, psutil
from profiles.load.window import _Log

def resident_bytes():
    return psutil.Process().memory_info().rss

count, seen, before = 300_000, [], resident_bytes()
for _ in range(3):
    log = _Log(32, 10 * count)
    for index in range(count):
        log.append(index, 0, 0)
    held = resident_bytes() - before
    del log
    seen.append((held / count, (resident_bytes() - before) / count))
print(json.dumps(seen))
"""
