"""What is kept of a step that was measured, and what is not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiles.measure.levels import find_level
from profiles.pipelines.measured import Measured, load_measured, write_measured
from profiles.pipelines.measuring import Found, as_step, cpu_at, measure_endpoint, rates_of
from registry.errors import UnreachableError
from registry.records import GateFinding, RateStage, RunRecord, Target
from tests.doubles.loads import StatedGenerator

TARGET = Target(url="here:1", protocol="grpc", model="a")


def stage(rate_rps: float, p50_ms: float | None, p90_ms: float | None, *, sustained: bool = True) -> RateStage:
    return RateStage(
        offered_rps=rate_rps,
        achieved_rps=rate_rps,
        latency_p50_ms=p50_ms,
        latency_p90_ms=p90_ms,
        sustained=sustained,
    )


def test_latency_against_rate_is_of_the_stages_that_were_sustained(tmp_path: Path):
    stages = [
        stage(70, 4.0, 6.0),
        stage(85, 5.0, None),
        stage(90.01, 6.0, 11.0),
        stage(110, 90.0, 200.0, sustained=False),
    ]
    found = Found(
        latencies_ms=np.array([3.0, 4.0]), saturation_rps=90.01, cpu_ms=2.0, memory_mb=None, rates=rates_of(stages)
    )
    step = as_step(found, workers=1)
    assert step.rates == {"70": (4.0, 6.0), "90.01": (6.0, 11.0)}
    write_measured(Measured(steps={"a": {"float": step}}), tmp_path / "m.yaml")
    assert load_measured(tmp_path / "m.yaml").of("a") == step


class Spoilt(StatedGenerator):
    """Its first windows fail a gate, and all know the servers' CPU time."""

    def __init__(self, gate: str, count: int) -> None:
        super().__init__({"a": 100.0})
        self.gate, self.count = GateFinding(gate=gate, observed="3 of 9 failed", limit="0"), count

    def run(self, *arguments: Any, **named: Any) -> RunRecord:
        self.findings = (self.gate,) if len(self.windows) < self.count else ()
        record = super().run(*arguments, **named)
        return replace(record, metrics={**record.metrics, "cpu_s_per_1k": 4.0})


def test_latencies_are_not_taken_from_windows_that_are_invalid(tmp_path: Path):
    level, where = replace(find_level("quick"), reruns=1), {"raw_root": tmp_path}
    spoilt: Any = Spoilt("errors", 3)
    found = measure_endpoint(spoilt, TARGET, (), level=level, **where)
    assert found.saturation_rps > 0
    assert [profile.name for _, profile in spoilt.windows[:4]] == ["single"] * 4
    always: Any = Spoilt("errors", 99)
    with pytest.raises(UnreachableError, match=r"no window of single requests to a was valid: errors 3 of 9 failed"):
        measure_endpoint(always, TARGET, (), level=level, **where)


@pytest.mark.parametrize(("gate", "count", "cpu_ms"), [("errors", 1, 4.0), ("errors", 9, None), ("lateness", 9, 4.0)])
def test_cpu_time_is_taken_from_windows_in_which_requests_were_answered(
    tmp_path: Path, gate: str, count: int, cpu_ms: float | None
):
    level = replace(find_level("quick"), reruns=1)
    spoilt: Any = Spoilt(gate, count)
    assert cpu_at(spoilt, TARGET, (), 50.0, level=level, raw_root=tmp_path, usage=lambda: None) == cpu_ms
