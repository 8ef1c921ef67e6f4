"""Each step of a pipeline measured alone, and the whole, by the same load generator as any model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from profiles.deploy.cluster import Usage
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Payload
from profiles.load.recording import latency_ms, load_arrays
from profiles.measure.capacity import find_capacity
from profiles.measure.levels import Level
from profiles.measure.rounds import run_until_valid
from profiles.pipelines.measured import StepNumbers, WholeNumbers, thin
from registry.errors import UnreachableError
from registry.records import ClosedLoop, LoadProfile, OpenLoop, RateStage, RunRecord, Target

# Gates that make latencies worthless, and leave the CPU time of a request what it is.
_OF_LATENCY = frozenset({"lateness", "steal"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One endpoint, measured.

    Attributes:
        latencies_ms: of single requests with nothing else to do.
        saturation_rps: the highest rate that was sustained.
        cpu_ms: the servers' CPU time for one request at the closed-loop maximum, or None where it is not known.
        memory_mb: their resident memory then, or None.
        rates: offered rate, as text -> (p50, p90) in ms, of the rates that were sustained on the way to saturation.
    """

    latencies_ms: NDArray[np.float64]
    saturation_rps: float
    cpu_ms: float | None
    memory_mb: float | None
    rates: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def measure_endpoint(
    generator: LoadGenerator,
    target: Target,
    payloads: tuple[Payload, ...],
    *,
    level: Level,
    raw_root: Path,
    usage: Callable[[], Usage | None] | None = None,
    seed: int = 0,
) -> Found:
    """Latency without other load, and where the endpoint saturates.

    Args:
        generator: offers the load.
        target: a model, or a pipeline.
        payloads: encoded for it.
        level: how long windows are, and which concurrencies and rates are tried.
        raw_root: folder for the arrays of a window, removed afterwards.
        usage: of its servers.
        seed: of arrivals and of the order of payloads.

    Raises:
        UnreachableError: it refused, stopped answering, or sustained no rate at all; or no window of single requests
            was valid.
    """
    scratch = raw_root / "pipeline-window.npz"
    best: list[RunRecord] = []

    def run(profile: LoadProfile, path: Path = scratch) -> RunRecord:
        record = generator.run(target, payloads, profile, raw_path=path, raw_root=raw_root, usage=usage)
        closed = isinstance(profile.load, ClosedLoop)
        if closed and (not best or record.metrics["throughput_rps"] > best[0].metrics["throughput_rps"]):
            best[:] = [record]
        return record

    try:
        single = LoadProfile(
            name="single", load=ClosedLoop(concurrency=1), warmup_s=level.warmup_s, duration_s=level.closed_s,
            timeout_s=level.timeout_s, seed=seed,
        )  # fmt: skip
        # A machine that is busy for a moment spoils a window or a search; one that is busy for long spoils them all.
        for _ in range(1 + level.reruns):
            record = run_until_valid(run, single, scratch, level)
            if record.valid:
                break
        else:
            gates = ", ".join(f"{one.gate} {one.observed} (limit {one.limit})" for one in record.findings)
            raise UnreachableError(
                f"no window of single requests to {target.model} was valid: {gates}",
                hint="Is the machine busy with something else? Look at the server's log.",
            )
        latencies = _latencies(scratch, record)
        for attempt in range(1 + level.reruns):
            capacity = find_capacity(run, level, candidate_id=target.model, seed=seed + attempt)
            if capacity.saturation_rps is not None:
                break
    finally:
        scratch.unlink(missing_ok=True)
    if capacity.saturation_rps is None or not len(latencies):
        raise UnreachableError(
            f"{target.model} sustained no rate that was tried, up to "
            f"{max((stage.offered_rps for stage in capacity.stages), default=0.0):.4g} a second",
            hint="Is the machine busy with something else? Look at the server's log.",
        )
    used = best[0].metrics if best else {}
    cpu_s, memory = used.get("cpu_s_per_1k"), used.get("rss_mb")
    return Found(
        latencies_ms=latencies,
        saturation_rps=capacity.saturation_rps,
        cpu_ms=cpu_s,
        memory_mb=memory,
        rates=rates_of(capacity.stages),
    )


def rates_of(stages: Sequence[RateStage]) -> dict[str, tuple[float, float]]:
    """Offered rate, as text -> (p50, p90) in ms, of the stages that were sustained and earned both."""
    return {
        f"{stage.offered_rps:.4g}": (stage.latency_p50_ms, stage.latency_p90_ms)
        for stage in stages
        if stage.sustained and stage.latency_p50_ms is not None and stage.latency_p90_ms is not None
    }


def _latencies(raw: Path, record: RunRecord) -> NDArray[np.float64]:
    """Of the window's answered requests, in ms."""
    stored = load_arrays(raw, record.raw_sha256)
    latencies = latency_ms(stored["intended_ns"], stored["done_ns"], stored["status"])
    return latencies[np.isfinite(latencies) & (latencies > 0)]


def cpu_at(
    generator: LoadGenerator,
    target: Target,
    payloads: tuple[Payload, ...],
    rate_rps: float,
    *,
    level: Level,
    raw_root: Path,
    usage: Callable[[], Usage | None],
    seed: int = 0,
) -> float | None:
    """CPU time of the servers for one request, in ms, where requests come at random at this rate; None if unknown.

    Of an invalid window nothing is known, unless all that is wrong with it is that requests were late.
    """
    scratch = raw_root / "pipeline-cpu.npz"
    profile = LoadProfile(
        name=f"{rate_rps:.4g} rps", load=OpenLoop(rate_rps=rate_rps), warmup_s=level.warmup_s,
        duration_s=level.window_s(level.open_s, rate_rps), timeout_s=level.timeout_s, seed=seed,
    )  # fmt: skip
    try:
        record = run_until_valid(
            lambda one, path: generator.run(target, payloads, one, raw_path=path, raw_root=raw_root, usage=usage),
            profile,
            scratch,
            level,
        )
    finally:
        scratch.unlink(missing_ok=True)
    return None if {one.gate for one in record.findings} - _OF_LATENCY else record.metrics.get("cpu_s_per_1k")


def as_step(
    found: Found, *, workers: int, cpu_ms: float | None = None, accuracy_drop: float | None = None
) -> StepNumbers:
    """What is kept of a step.

    Args:
        found: at its saturation and without load.
        workers: that served.
        cpu_ms: at the pipeline's rate, see `cpu_at`; None for that at saturation.
        accuracy_drop: of its variant.
    """
    return StepNumbers(
        latency_ms=thin(found.latencies_ms),
        saturation_rps=found.saturation_rps,
        workers=workers,
        cpu_ms=cpu_ms or found.cpu_ms,
        busy_cpus=None if found.cpu_ms is None else found.cpu_ms * found.saturation_rps / 1000,
        memory_mb=found.memory_mb,
        accuracy_drop=accuracy_drop,
        rates=dict(found.rates),
    )


def as_whole(
    found: Found, *, variants: dict[str, str], rates: dict[str, tuple[float, float]] | None = None, without: str = ""
) -> WholeNumbers:
    """What is kept of the whole."""
    return WholeNumbers(
        latency_ms=thin(found.latencies_ms),
        saturation_rps=found.saturation_rps,
        variants=variants,
        rates=rates or {},
        without=without,
    )


def latency_at(
    generator: LoadGenerator,
    target: Target,
    payloads: tuple[Payload, ...],
    rates_rps: Sequence[float],
    *,
    level: Level,
    raw_root: Path,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Offered rate, as text -> (p50, p99) in ms under arrivals at random; rates with an invalid window are left out."""
    scratch = raw_root / "pipeline-rate.npz"
    found = {}
    try:
        for rate in rates_rps:
            profile = LoadProfile(
                name=f"{rate:.4g} rps", load=OpenLoop(rate_rps=rate), warmup_s=level.warmup_s,
                duration_s=level.window_s(level.open_s, rate), timeout_s=level.timeout_s, seed=seed,
            )  # fmt: skip
            record = run_until_valid(
                lambda one, path: generator.run(target, payloads, one, raw_path=path, raw_root=raw_root),
                profile,
                scratch,
                level,
            )
            if record.valid and len(latencies := _latencies(scratch, record)):
                p50, p99 = np.percentile(latencies, (50, 99)).tolist()
                found[f"{rate:.4g}"] = (p50, p99)
    finally:
        scratch.unlink(missing_ok=True)
    return found
