"""What is kept of a step that was measured."""

from pathlib import Path

import numpy as np

from profiles.pipelines.measured import Measured, load_measured, write_measured
from profiles.pipelines.measuring import Found, as_step, rates_of
from registry.records import RateStage


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
