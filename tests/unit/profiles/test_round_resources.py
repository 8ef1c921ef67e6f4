"""What a round's windows keep of resources and time, and what comes of it over rounds."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from profiles.deploy.cluster import Usage
from profiles.load.recording import save_arrays
from profiles.load.summary import summarize
from profiles.measure.levels import find_level
from profiles.measure.rounds import measure_in_round, reduce_rounds
from profiles.testing import Fixed, simulate
from registry.codec import file_sha256
from registry.records import Candidate, Capacity, GateFinding, LoadProfile, Measurement, Round, RunRecord, Target
from tests.doubles.candidates import candidate

LEVEL = replace(find_level("quick"), closed_s=0.5, open_s=0.5, warmup_s=0.0)
CAPACITY = Capacity(candidate_id="", concurrency=2, ladder=((2, 200.0),), stages=(), saturation_rps=100.0)

WHERE = Target(url="127.0.0.1:1", protocol="grpc", model="m")


@dataclass
class FakeDeployment:
    """A server whose peak of memory rises by 10 MB at each look."""

    candidate: Candidate = field(default_factory=candidate)
    target: Target = WHERE
    statistics: None = None
    peak_mb: float = 100.0

    def usage(self) -> Usage:
        self.peak_mb += 10
        return Usage(cpu_s=0.0, rss_mb=50.0, peak_rss_mb=self.peak_mb, pids=(7,))


class SimulatedGenerator:
    """Offers windows to a server of fixed latency in virtual time, and reads its usage at both ends."""

    def run(
        self,
        target: Target,
        payloads: Any,
        profile: LoadProfile,
        *,
        raw_path: Path,
        raw_root: Path,
        usage: Callable[[], Usage | None],
        **_: Any,
    ) -> RunRecord:
        usage()
        recording = simulate(Fixed(0.005), profile)
        usage()
        save_arrays(raw_path, recording)
        raw = raw_path.relative_to(raw_root).as_posix()
        return summarize(recording, profile, raw=raw, raw_sha256=file_sha256(raw_path))


def measured(root: Path, deployment: FakeDeployment, number: int) -> Round:
    return measure_in_round(
        SimulatedGenerator(), deployment, (), CAPACITY, ("0.8 saturation",),  # type: ignore[arg-type]
        level=LEVEL, number=number, position=0, seed=1, raw_root=root, folder=root / f"{number}",
    )  # fmt: skip


def test_a_round_keeps_peak_and_times(tmp_path: Path) -> None:
    deployment = FakeDeployment()
    rounds = [measured(tmp_path, deployment, number) for number in range(2)]
    assert [run.metrics["peak_rss_mb"] for one in rounds for run in one.runs] == [120.0, 140.0, 160.0, 180.0]
    for run in (run for one in rounds for run in one.runs):
        assert run.breakdown is not None
        assert run.breakdown.service_ms == pytest.approx(5.0)
        assert run.breakdown.notes == ("the server does not tell of its times",)
    whole, at_load = reduced(deployment, rounds, tmp_path)
    assert whole.metrics["peak_rss_mb"].high == 180.0
    assert whole.metrics["first_request_ms"].value == pytest.approx(7.0)
    assert at_load.metrics["time_service_ms"].value == pytest.approx(5.0)
    assert not {"time_network_ms", "time_queue_ms"} & at_load.metrics.keys()


def reduced(deployment: FakeDeployment, rounds: list[Round], root: Path) -> tuple[Measurement, ...]:
    return reduce_rounds(
        deployment.candidate.id, rounds, CAPACITY, raw_root=root, level=LEVEL, load_time_s=1.0, first_request_ms=7.0
    )


def test_windows_that_were_spoilt_still_show_the_peak(tmp_path: Path) -> None:
    deployment = FakeDeployment()
    one = measured(tmp_path, deployment, 0)
    late = (GateFinding(gate="lateness", observed="3 ms", limit="1 ms"),)
    spoilt = replace(one, runs=tuple(replace(run, findings=late) for run in one.runs))
    whole, *_ = reduced(deployment, [spoilt], tmp_path)
    assert whole.metrics["peak_rss_mb"].value == 140.0
    assert "rss_mb" not in whole.metrics
