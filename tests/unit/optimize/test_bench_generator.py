"""The load generator of ``burnish bench``, and what it keeps."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimize.bench_generator import BenchGenerator, Journal
from profiles.deploy.local_process import watch_process
from profiles.load.payloads import encode_payloads, expected_answers
from profiles.load.recording import load_arrays
from profiles.measure.host import fingerprint_host
from profiles.measure.recorded import read_recorded, recorded_of, write_recorded
from profiles.testing import FakeV2Server
from registry.errors import StorageError
from registry.records import ClosedLoop, GateFinding, LoadProfile, OpenLoop, RunRecord, Target
from tests.doubles.busy import undisturbed

X = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
WINDOW = LoadProfile(name="capacity", load=ClosedLoop(concurrency=2), warmup_s=0.0, duration_s=0.2)


def test_windows_are_held_against_the_reference_and_told_of_the_server(tmp_path: Path) -> None:
    with FakeV2Server(wrong_every=2) as server:
        target = server.target("grpc")
        payloads = encode_payloads({"x": X}, target=target)
        looks = {
            "expected": expected_answers(payloads, {"sum": X.sum(axis=1, keepdims=True)}),
            "usage": watch_process(os.getpid()),
        }

        def search() -> tuple[RunRecord, Journal, list[str]]:
            told: list[str] = []
            journal = Journal(told.append, tmp_path)
            with BenchGenerator(
                cpus=None, work=tmp_path / "work", statistics=None, on_search=journal.keep_search, **looks
            ) as generator:
                raw = tmp_path / "scratch.npz"
                record = generator.run(target, payloads, WINDOW, raw_path=raw, raw_root=tmp_path)
                # As the ceiling is measured.
                generator.run(target, payloads, WINDOW, raw_path=raw, against_ceiling=False)
            return record, journal, told

        record, journal, told = undisturbed(
            search, lambda seen: seen[0].scheduled > 10 and seen[0].metrics.get("cpu_s_per_1k")
        )
    assert "mismatch" in {finding.gate for finding in record.findings}
    assert record.metrics["cpu_s_per_1k"] > 0
    assert record.metrics["peak_rss_mb"] >= record.metrics["rss_mb"] > 1
    assert told[0].startswith("search, concurrency 2: invalid: ")
    [kept] = journal.searched
    assert len(load_arrays(tmp_path / kept.raw, kept.raw_sha256)["status"]) == record.scheduled
    recorded = recorded_of(target, (), None, client=fingerprint_host("none"), samples_digest="", settings={})
    write_recorded(replace(recorded, searched=tuple(journal.searched)), tmp_path)
    assert read_recorded(tmp_path).searched == (kept,)


def record(load: ClosedLoop | OpenLoop, *gates: str) -> RunRecord:
    findings = tuple(GateFinding(gate=gate, observed="much", limit="little") for gate in gates)
    profile = LoadProfile(name="slo", load=load, warmup_s=0, duration_s=1)
    metrics = {"throughput_rps": 12.34, "latency_p50_ms": 5.0}
    return RunRecord(
        load=profile, scheduled=1, ok=1, errors={}, window_s=1, metrics=metrics, findings=findings, raw="r.npz"
    )


def test_every_window_is_a_line_and_rounds_keep_their_numbers(tmp_path: Path) -> None:
    told: list[str] = []
    journal = Journal(told.append, None)
    journal.keep_search(record(OpenLoop(rate_rps=640.0)), tmp_path / "gone.npz")
    journal.keep(1, record(ClosedLoop(concurrency=1), "steal"))
    journal.keep(0, record(ClosedLoop(concurrency=1)))
    assert told == [
        "search, 640 rps: 12.3 requests a second, p50 5.00 ms",
        "run 2, slo: invalid: steal much",
        "run 1, slo: 12.3 requests a second, p50 5.00 ms",
    ]
    assert [one.number for one in journal.rounds] == [0, 1]
    assert journal.searched == []


def test_a_record_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = Target(url="127.0.0.1:1", protocol="grpc", model="m")
    made = recorded_of(target, (), None, client=fingerprint_host("none"), samples_digest="", settings={})
    with pytest.raises(StorageError, match=r"bench\.json could not be written"):
        write_recorded(made, tmp_path / "file")


def test_times_that_cannot_be_kept_are_told(tmp_path: Path) -> None:
    (tmp_path / "r.npz").touch()
    journal = Journal(lambda _: None, tmp_path / "gone")
    with pytest.raises(StorageError, match=r"search-0\.npz cannot be written"):
        journal.keep_search(record(ClosedLoop(concurrency=1)), tmp_path / "r.npz")
