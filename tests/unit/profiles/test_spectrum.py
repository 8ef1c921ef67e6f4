"""Latency by percentile: no further than the requests earn, over valid runs, and misses end it."""

from pathlib import Path

import numpy as np
import pytest

from profiles.load.engine import LoadProfile
from profiles.load.recording import save_arrays
from profiles.load.summary import summarize
from profiles.measure.advice import advice_of
from profiles.measure.plans import curves_of
from profiles.measure.spectrum import spectra_of
from profiles.testing import Queue, simulate
from registry.records import Capacity, ClosedLoop, GateFinding, OpenLoop, Round, RunRecord
from registry.report.curves import law_rps

RATE_RPS = 400.0


def run(folder: Path, name: str, load: ClosedLoop | OpenLoop, *, seconds: float = 1.0, valid: bool = True) -> RunRecord:
    """A window on a simulated server with an exponential service time of 1 ms."""
    profile = LoadProfile(name=name, load=load, warmup_s=0.1, duration_s=seconds)
    recording = simulate(Queue(0.001, service="exponential", seed=3), profile)
    path = folder / f"{name}-{valid}.npz"
    save_arrays(path, recording)
    made = summarize(recording, profile, raw=path.name, raw_sha256="")
    findings = () if valid else (GateFinding(gate="lateness", observed="9 ms", limit="1 ms"),)
    return RunRecord(**{field: getattr(made, field) for field in made.__slots__} | {"findings": findings})


def rounds(*runs: RunRecord) -> tuple[Round, ...]:
    return tuple(Round(candidate_id="a", number=n, position=0, runs=(one,)) for n, one in enumerate(runs))


@pytest.mark.parametrize(("seconds", "highest"), [(1.0, 97.0), (6.0, 99.5)])
def test_a_spectrum_ends_where_fewer_than_ten_requests_lie_beyond(
    tmp_path: Path, seconds: float, highest: float
) -> None:
    made = rounds(run(tmp_path, "400 rps", OpenLoop(rate_rps=RATE_RPS), seconds=seconds))
    [found] = spectra_of(made, raw_root=tmp_path, loads=["400 rps"])
    assert found.points[-1][0] == highest
    latencies = [latency for _, latency in found.points]
    assert latencies == sorted(latencies)
    assert found.requests == made[0].runs[0].scheduled
    median = dict(found.points)[50.0]
    assert median == pytest.approx(made[0].runs[0].metrics["latency_p50_ms"], rel=1e-3)


def test_invalid_runs_and_other_loads_are_no_part_of_it(tmp_path: Path) -> None:
    good = run(tmp_path, "400 rps", OpenLoop(rate_rps=RATE_RPS))
    bad = run(tmp_path, "400 rps", OpenLoop(rate_rps=RATE_RPS), valid=False)
    assert spectra_of(rounds(good, bad), raw_root=tmp_path, loads=["400 rps"])[0].requests == good.scheduled
    assert spectra_of(rounds(bad), raw_root=tmp_path, loads=["400 rps"]) == ()
    assert spectra_of(rounds(good), raw_root=tmp_path, loads=["100 rps"]) == ()


def test_too_few_requests_earn_no_spectrum(tmp_path: Path) -> None:
    made = rounds(run(tmp_path, "10 rps", OpenLoop(rate_rps=10.0, arrivals="constant")))
    assert spectra_of(made, raw_root=tmp_path, loads=["10 rps"]) == ()


@pytest.mark.parametrize(("requests", "highest"), [(99, 85.0), (100, 90.0), (200, 95.0), (1000, 99.0)])
def test_so_many_requests_as_earn_a_percentile_show_it(tmp_path: Path, requests: int, highest: float) -> None:
    made = rounds(run(tmp_path, "some", OpenLoop(rate_rps=float(requests), arrivals="constant")))
    [found] = spectra_of(made, raw_root=tmp_path, loads=["some"])
    assert (found.requests, found.points[-1][0]) == (requests, highest)


def test_windows_at_several_loads_are_curves(tmp_path: Path) -> None:
    closed = [run(tmp_path, f"concurrency {n}", ClosedLoop(concurrency=n)) for n in (1, 4)]
    opened = [run(tmp_path, f"{rate} rps", OpenLoop(rate_rps=float(rate))) for rate in (400, 200)]
    spoiled = run(tmp_path, "concurrency 8", ClosedLoop(concurrency=8), valid=False)
    found = curves_of(rounds(*closed, *opened, spoiled))
    assert [n for n, _ in found.ladder] == [1, 4]
    assert [stage.offered_rps for stage in found.stages] == [200.0, 400.0]
    assert found.saturation_rps is None
    assert curves_of(()).ladder == ()


def test_advice_is_recorded_with_the_law_that_a_ladder_follows() -> None:
    law = {"gamma": 100.0, "sigma": 0.2, "kappa": 0.0}
    ladder = tuple((n, 100.0 * n / (1 + 0.2 * (n - 1))) for n in (1, 2, 4, 8, 16, 32))
    capacity = Capacity(candidate_id="a", concurrency=32, ladder=ladder, stages=(), saturation_rps=400.0)
    found = advice_of(capacity)
    assert {name: round(estimate.value, 6) for name, estimate in found.law.items()} == law
    assert found.explanation.startswith("20% of the work cannot be done side by side")
    assert found.explanation in found.lines
    assert found.target_rps == (pytest.approx(320.0), pytest.approx(360.0))
    # The picture's law is the fit's.
    assert [law_rps(found.law, n) for n, _ in ladder] == pytest.approx([rps for _, rps in ladder])
    empty = advice_of(Capacity(candidate_id="a", concurrency=1, ladder=(), stages=(), saturation_rps=None))
    assert (empty.knee, empty.law, empty.explanation, empty.target_rps, empty.lines) == (None, {}, "", None, ())
    assert np.isfinite(found.law["gamma"].value)
