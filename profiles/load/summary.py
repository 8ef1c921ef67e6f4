"""A recording reduced to a `RunRecord`: numbers of this run alone, and the gates it failed."""

import math

import numpy as np
from numpy.typing import NDArray

from profiles.load import gates
from profiles.load.recording import Recording
from profiles.measure.percentiles import EARNED, is_earned, nearest_rank
from registry.records import ClosedLoop, GateFinding, LoadProfile, RunRecord


def summarize(
    recording: Recording,
    profile: LoadProfile,
    *,
    raw: str,
    raw_sha256: str = "",
    usage: tuple[float, float] | None = None,
    checked: int = 0,
    wrong: int = 0,
    stranger: str | None = None,
    instances: tuple[str, str] | None = None,
    ceiling_rps: float | None = None,
) -> RunRecord:
    """The record of one window.

    Args:
        recording: what the window left behind.
        profile: what was offered.
        raw: where the arrays are kept, as the record shall name it.
        raw_sha256: of that file.
        usage: (CPU seconds of the server during the window, its resident memory in MB after), where known.
        checked: replies compared with the reference.
        wrong: those of them that differed.
        stranger: what is wrong where another model answered than the one asked; see `find_stranger`.
        instances: which server it was when the window began and when it ended, where known.
        ceiling_rps: requests a second that the client has of a server that does nothing, where known.
    """
    errors = recording.errors
    if wrong:
        errors["mismatch"] = wrong
    metrics = _metrics(recording, profile)
    if usage is not None:
        metrics["rss_mb"] = usage[1]
        if recording.answered:
            metrics["cpu_s_per_1k"] = 1000 * usage[0] / recording.answered
    return RunRecord(
        load=profile,
        scheduled=recording.scheduled,
        ok=recording.ok - wrong,
        errors=errors,
        window_s=recording.window_s,
        metrics=metrics,
        findings=_findings(
            recording,
            profile,
            metrics,
            checked=checked,
            wrong=wrong,
            stranger=stranger,
            instances=instances,
            ceiling_rps=ceiling_rps,
        ),
        raw=raw,
        raw_sha256=raw_sha256,
    )


def _metrics(recording: Recording, profile: LoadProfile) -> dict[str, float]:
    """All metrics of `RunRecord`, and those by which a capacity search tells whether the server kept up."""
    closed = isinstance(profile.load, ClosedLoop)
    answered = recording.answered_share if closed else recording.answered
    metrics = {
        "throughput_rps": answered / recording.window_s,
        "offered_rps": recording.scheduled / recording.window_s,
        "client_cpu": recording.client_cpu,
        "steal": recording.steal,
        "in_flight_start": float(recording.in_flight_start),
        "in_flight_end": float(recording.in_flight_end),
    }
    metrics |= _of_latency(recording.latency_ms)
    if recording.sent:
        metrics["lateness_p99_ms"] = nearest_rank(recording.lateness_ms, 99)
    if is_earned(50, recording.ok):
        metrics["service_p50_ms"] = nearest_rank(recording.service_ms, 50)
    return metrics


def _of_latency(latency: NDArray[np.float64]) -> dict[str, float]:
    """The latencies that are known: one that falls among the misses, which have none, is left out."""
    known = {
        f"latency_p{percentile}_ms": nearest_rank(latency, percentile)
        for percentile in EARNED
        if is_earned(percentile, len(latency))
    }
    if len(latency):
        known["latency_max_ms"] = float(latency.max())
    if len(latency) >= 3:
        thirds = np.array_split(latency, 3)
        known["latency_first_third_ms"] = nearest_rank(thirds[0], 50)
        known["latency_last_third_ms"] = nearest_rank(thirds[2], 50)
    return {name: value for name, value in known.items() if math.isfinite(value)}


def _findings(
    recording: Recording,
    profile: LoadProfile,
    metrics: dict[str, float],
    *,
    checked: int,
    wrong: int,
    stranger: str | None,
    instances: tuple[str, str] | None,
    ceiling_rps: float | None,
) -> tuple[GateFinding, ...]:
    closed = isinstance(profile.load, ClosedLoop)
    found = [
        gates.errors(recording.scheduled - recording.ok, recording.scheduled),
        gates.mismatches(wrong, checked),
        gates.answered_by(stranger),
        gates.client_cpu(recording.client_cpu, closed=closed),
        gates.in_flight(recording.sampled, recording.recorded),
        gates.steal(recording.steal),
        gates.throttling(recording.throttled),
        gates.restarts(instances),
    ]
    if ceiling_rps is not None:
        found.append(
            gates.ceiling(metrics["throughput_rps"] if closed else metrics["offered_rps"], ceiling_rps, closed=closed)
        )
    if not closed and recording.sent:
        # In a closed loop nothing is due before it is sent.
        median_ms = nearest_rank(recording.latency_ms, 50)
        found.append(gates.lateness(metrics["lateness_p99_ms"], median_ms if math.isfinite(median_ms) else 0.0))
        found.append(gates.offered(recording.sent, recording.scheduled))
    return tuple(finding for finding in found if finding is not None)
