"""A campaign's numbers as a tracker's metrics: single ones, curves with steps, and what machines were used. No tracker.

A slash in a name puts the metric into a section of its own on MLflow's pages: ``curve``, ``round``, ``search``,
``spectrum`` and, by MLflow's own convention, ``system``.
"""

import hashlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from registry.records import (
    Campaign,
    Candidate,
    CapacityAdvice,
    ClosedLoop,
    Comparison,
    Estimate,
    Metrics,
    RunRecord,
    ServingSearch,
)
from registry.report.table import BYTES_PER_MB, capacity_of, variant_of
from registry.selection import fidelity_of

# What MLflow takes in the name of a metric or parameter; a blank is one of ours.
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_./-]")
# MLflow takes 250, and ours get an ending.
_LONGEST_NAME = 240
_DIGEST_CHARS = 16
_PERCENT = 100.0
_MEASURED = ("latency_p50_ms", "latency_p90_ms", "latency_p99_ms")
_IN_ROUNDS = ("throughput_rps", *_MEASURED)
_PARTS = ("network_ms", "queue_ms", "compute_ms")


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a curve.

    Attributes:
        name: of the metric.
        step: a whole number, as trackers have it: a rate in requests a second, requests outstanding, or a count.
        value: there.
        at: what the step stands for, exactly.
    """

    name: str
    step: int
    value: float
    at: float


def name_of(metric: str, load: str | None = None) -> str:
    """A metric's name with its load, in the characters a tracker takes: ``latency_p90_ms.at_0.8_saturation``.

    A name that MLflow would take for another place (``a//b``) has no slashes, and one that is too long ends in its
    digest.
    """
    name = _NOT_IN_A_NAME.sub("_", metric if load is None else f"{metric}.at_{load}")
    if posixpath.normpath(name) != name or name.startswith(("/", "..")):
        name = name.replace("/", "_")
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_CHARS]
        name = f"{name[: _LONGEST_NAME - _DIGEST_CHARS - 1]}-{digest}"
    return name


# --- single numbers --------------------------------------------------------------------------------------------------


def judged_metrics(campaign: Campaign, candidate: Candidate) -> dict[str, float]:
    """How the candidate's variant answers in its engine, on the evaluation samples."""
    fidelity = fidelity_of(candidate, campaign.variants, campaign.fidelities)
    return {} if fidelity is None else _flat(fidelity.metrics)


def model_metrics(campaign: Campaign, candidate: Candidate) -> dict[str, float]:
    """What else is the model's own, however it is served: its time in process, and its size."""
    found: dict[str, float] = {}
    for screening in campaign.screenings:
        if (screening.variant_id, screening.engine) == (candidate.variant_id, candidate.engine):
            found |= _flat(screening.metrics)
    variant = variant_of(campaign, candidate)
    if variant is not None:
        found["size_mb"] = variant.artifact.size_bytes / BYTES_PER_MB
    return found


def served_metrics(campaign: Campaign, candidate: Candidate) -> dict[str, float]:
    """How the candidate behaves when it is served, and against the baseline."""
    found: dict[str, float] = {}
    for measurement in campaign.measurements:
        if measurement.candidate_id == candidate.id:
            found |= _flat(measurement.metrics, measurement.load)
            found[name_of("invalid_runs", measurement.load)] = float(measurement.invalid_runs)
    for comparison in campaign.comparisons:
        if comparison.candidate_id == candidate.id:
            for prefix in _against(campaign, candidate, comparison):
                found = _flat({f"{prefix}.{comparison.metric}": comparison.ratio}, comparison.load) | found
    for advice in campaign.advice:
        if advice.candidate_id == candidate.id:
            found |= _advised(advice)
    return found


def _against(campaign: Campaign, candidate: Candidate, comparison: Comparison) -> Iterator[str]:
    """What a ratio is called: ``ratio`` to the baseline as the candidate is served, ``ratio_vs_champion`` else."""
    verdict = campaign.verdict
    if comparison.baseline_id == verdict.champion:
        yield "ratio_vs_champion"
    candidates = {one.id: one for one in campaign.candidates}
    other, baseline = candidates.get(comparison.baseline_id), candidates.get(verdict.baseline or "")
    alike = (
        other is not None
        and baseline is not None
        and (other.variant_id, other.engine, other.serving) == (baseline.variant_id, baseline.engine, candidate.serving)
    )
    if alike or comparison.baseline_id == verdict.baseline or comparison.baseline_id != verdict.champion:
        yield "ratio"


def _advised(advice: CapacityAdvice) -> dict[str, float]:
    found = _flat({f"advice.{name}": estimate for name, estimate in advice.law.items()})
    if advice.knee is not None:
        found["advice.knee_concurrency"] = float(advice.knee)
    if advice.target_rps is not None:
        found["advice.target_rps_low"], found["advice.target_rps_high"] = advice.target_rps
    return found


def metrics(campaign: Campaign, candidate: Candidate) -> dict[str, float]:
    """Every number of a candidate: ``<name>``, and ``<name>_low`` and ``<name>_high`` where they are known."""
    return (
        judged_metrics(campaign, candidate) | served_metrics(campaign, candidate) | model_metrics(campaign, candidate)
    )


def _flat(estimates: Metrics | Mapping[str, Estimate], load: str | None = None) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric, estimate in estimates.items():
        name = name_of(metric, load)
        found[name] = estimate.value
        if estimate.low is not None:
            found[f"{name}_low"] = estimate.low
        if estimate.high is not None:
            found[f"{name}_high"] = estimate.high
    return found


# --- curves ----------------------------------------------------------------------------------------------------------


def curves(campaign: Campaign, candidate: Candidate) -> list[Point]:
    """How the candidate answers as the load rises.

    ``curve/closed_rps`` steps by the requests outstanding. All others step by the offered rate in requests a second,
    rounded: ``curve/achieved_rps``, ``curve/latency_p50_ms`` and ``curve/latency_p90_ms`` through the stages of the
    search for saturation, ``curve/measured_latency_p50_ms``, ``_p90_ms`` and ``_p99_ms`` at the loads of the rounds.
    """
    found: list[Point] = []
    capacity = capacity_of(campaign, candidate.id)
    if capacity is not None:
        stages = capacity.stages
        found += _stepped("curve/closed_rps", capacity.ladder)
        found += _stepped("curve/achieved_rps", [(one.offered_rps, one.achieved_rps) for one in stages])
        found += _stepped("curve/latency_p50_ms", [(one.offered_rps, one.latency_p50_ms) for one in stages])
        found += _stepped("curve/latency_p90_ms", [(one.offered_rps, one.latency_p90_ms) for one in stages])
    rates = _offered(campaign, candidate)
    for metric in _MEASURED:
        values = [
            (rates[one.load], one.metrics[metric].value)
            for one in campaign.measurements
            if one.candidate_id == candidate.id and one.load in rates and metric in one.metrics
        ]
        found += _stepped(f"curve/measured_{metric}", values)
    return found


def spectrum_curves(campaign: Campaign, candidate: Candidate) -> list[Point]:
    """The latency at each percentile: ``spectrum/latency_ms.at_<load>``, by hundredths of a percent (9990 is p99.9)."""
    return [
        Point(f"spectrum/{name_of('latency_ms', spectrum.load)}", round(_PERCENT * percentile), latency_ms, percentile)
        for spectrum in campaign.spectra
        if spectrum.candidate_id == candidate.id
        for percentile, latency_ms in spectrum.points
    ]


def round_curves(campaign: Campaign, candidate: Candidate) -> list[Point]:
    """What each round gave, by its number, so that a drift shows; windows that failed a gate are left out.

    ``round/latency_p90_ms.at_<load>`` and the like, and the means of the parts of a request's time
    (``round/queue_ms.at_<load>``) as far as the server tells.
    """
    found: list[Point] = []
    for number, run in _windows(campaign, candidate):
        values = {name: run.metrics[name] for name in _IN_ROUNDS if name in run.metrics}
        if run.breakdown is not None:
            parts = ((name, getattr(run.breakdown, name)) for name in _PARTS)
            values |= {name: value for name, value in parts if value is not None}
        found += [
            Point(f"round/{name_of(name, run.load.name)}", number, value, number) for name, value in values.items()
        ]
    return found


def system_metrics(campaign: Campaign, candidate: Candidate) -> list[Point]:
    """What the server's processes, and the client, took of the machine in each round, in MLflow's names and units.

    Memory in MB of 10^6 bytes; processors in percent of one core; a GPU in percent of itself. They are of the
    processes that were measured, not of the whole machine, and stand on MLflow's page of system metrics.
    """
    found: list[Point] = []
    for number, run in _windows(campaign, candidate):
        found += [
            Point(f"system/{name_of(name, run.load.name)}", number, value, number) for name, value in _used(run).items()
        ]
    return found


def _used(run: RunRecord) -> dict[str, float]:
    known = run.metrics
    found: dict[str, float] = {}
    if "rss_mb" in known:
        found["server_memory_usage_megabytes"] = known["rss_mb"]
    if "cpu_s_per_1k" in known and "throughput_rps" in known:
        seconds_a_second = known["cpu_s_per_1k"] * known["throughput_rps"] / 1000
        found["server_cpu_utilization_percentage"] = _PERCENT * seconds_a_second
    if "client_cpu" in known:
        found["client_cpu_utilization_percentage"] = _PERCENT * known["client_cpu"]
    if "gpu_memory_mb" in known:
        found["gpu_memory_usage_megabytes"] = known["gpu_memory_mb"]
    if "gpu_utilisation" in known:
        found["gpu_utilization_percentage"] = _PERCENT * known["gpu_utilisation"]
    return found


def search_curves(search: ServingSearch) -> list[Point]:
    """The rate of each profile that a search looked at, in their order from 1, and the best so far.

    ``search/closed_rps`` has a gap where a profile failed; ``search/best_rps`` has none after the first that did not.
    """
    found: list[Point] = []
    best: float | None = None
    for number, point in enumerate(search.points, 1):
        if point.score is not None:
            best = point.score.value if best is None else max(best, point.score.value)
            found.append(Point("search/closed_rps", number, point.score.value, number))
        if best is not None:
            found.append(Point("search/best_rps", number, best, number))
    return found


def _stepped(name: str, values: Iterable[tuple[float, float | None]]) -> Iterator[Point]:
    """The points in rising order of what they step by; two that round to one step go on neighbouring ones."""
    last: int | None = None
    for at, value in sorted((at, value) for at, value in values if value is not None):
        step = round(at) if last is None else max(round(at), last + 1)
        last = step
        yield Point(name, step, value, at)


def _offered(campaign: Campaign, candidate: Candidate) -> dict[str | None, float]:
    """The rate that each open load of the rounds stands for, in requests a second."""
    return {
        run.load.name: run.load.load.rate_rps
        for _, run in _windows(campaign, candidate)
        if not isinstance(run.load.load, ClosedLoop)
    }


def _windows(campaign: Campaign, candidate: Candidate) -> list[tuple[int, RunRecord]]:
    """The valid windows of a candidate, each with the number of its round."""
    return [
        (one.number, run)
        for one in campaign.rounds
        if one.candidate_id == candidate.id
        for run in one.runs
        if run.valid
    ]
