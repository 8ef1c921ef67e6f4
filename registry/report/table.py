"""What every report shows of a campaign, looked up once: a row a candidate, with its outcome and the reason."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from registry.records import (
    Campaign,
    Candidate,
    Capacity,
    Comparison,
    Constraint,
    EngineSpec,
    Estimate,
    Variant,
    exact,
)
from registry.selection import fidelity_of

Outcome = Literal["selected", "rejected", "unknown", "failed"]
BYTES_PER_MB = 1_000_000
DEFAULT_LATENCY = "latency_p90_ms"
THROUGHPUTS = ("max_throughput_rps", "saturation_rps", "throughput_rps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate as the reports show it.

    Attributes:
        number: its place in the table, from 1; pictures name it by this.
        latency: the latency that the policy limits, else p90; None where it is not known.
        throughput: ``max_throughput_rps``, else the saturation point.
        outcome: what the verdict says of it.
        reason: why, for all but the selected.
    """

    number: int
    candidate: Candidate
    baseline: bool
    champion: bool
    accuracy: Estimate | None
    drop: Estimate | None
    latency: Estimate | None
    throughput: Estimate | None
    comparison: Comparison | None
    size_mb: Estimate | None
    outcome: Outcome
    reason: str
    pareto: bool


def rows(campaign: Campaign) -> tuple[Row, ...]:
    """A row a candidate: the selected first, then by falling throughput, those of unknown throughput last."""
    unnumbered = [_row(campaign, candidate) for candidate in campaign.candidates]
    unnumbered.sort(key=_place)
    return tuple(replace(row, number=number) for number, row in enumerate(unnumbered, start=1))


def outcome(campaign: Campaign, candidate: Candidate) -> tuple[Outcome, str]:
    """What became of a candidate, and why (empty for the selected)."""
    verdict = campaign.verdict
    if candidate.id == verdict.selected:
        return "selected", ""
    for failure in campaign.failures:
        if failure.subject == candidate.name and failure.kind != "budget":
            return "failed", failure.reason
    reasons = [rejection.reason for rejection in verdict.rejections if rejection.candidate_id == candidate.id]
    if candidate.id in verdict.unknown or not reasons:
        return "unknown", reasons[0] if reasons else "nothing was measured that could judge it"
    return "rejected", reasons[0]


def provisional_words(campaign: Campaign) -> str:
    """Why the verdict earns no promotion; empty where it does."""
    verdict = campaign.verdict
    if not verdict.provisional:
        return ""
    if verdict.cut_short:
        return f"What was measured before the budget was used up does not earn a promotion at level {campaign.level}."
    return f"Level {campaign.level} does not earn a promotion."


def latency_limit(campaign: Campaign) -> Constraint | None:
    """The policy's first absolute limit on a latency, if it has one."""
    for constraint in campaign.verdict.policy.constraints:
        if constraint.metric.startswith("latency_") and not constraint.relative:
            return constraint
    return None


def accuracy_limit(campaign: Campaign) -> Constraint | None:
    """The policy's absolute limit on the accuracy lost, if it has one."""
    for constraint in campaign.verdict.policy.constraints:
        if constraint.metric == "accuracy_drop" and not constraint.relative:
            return constraint
    return None


def latency_name(campaign: Campaign) -> tuple[str, str | None]:
    """The latency that the reports show: its metric and its load."""
    limit = latency_limit(campaign)
    if limit is not None:
        return limit.metric, limit.load
    loads = (one.load for one in campaign.measurements if DEFAULT_LATENCY in one.metrics)
    return DEFAULT_LATENCY, next(loads, None)


def estimate_of(campaign: Campaign, candidate_id: str, metric: str, load: str | None) -> Estimate | None:
    """A candidate's metric at a load, or None where it was not measured."""
    for one in campaign.measurements:
        if one.candidate_id == candidate_id and one.load == load and metric in one.metrics:
            return one.metrics[metric]
    return None


def variant_of(campaign: Campaign, candidate: Candidate) -> Variant | None:
    """The candidate's variant, or None where the campaign does not hold it."""
    return next((one for one in campaign.variants if one.id == candidate.variant_id), None)


def capacity_of(campaign: Campaign, candidate_id: str) -> Capacity | None:
    """Where the candidate saturates, or None where it was not looked for."""
    return next((one for one in campaign.capacities if one.candidate_id == candidate_id), None)


def comparison_of(campaign: Campaign, candidate_id: str) -> Comparison | None:
    """The candidate against the baseline, by throughput if that was compared."""
    found = {one.metric: one for one in campaign.comparisons if one.candidate_id == candidate_id}
    for metric in THROUGHPUTS:
        if metric in found:
            return found[metric]
    return next(iter(found.values()), None)


def engine_words(engine: EngineSpec) -> str:
    """The engine, and how it is set where that is not the default: ``onnxruntime``, ``openvino, float32``."""
    words: list[str] = [engine.name]
    if engine.precision != "default":
        words.append(engine.precision)
    if engine.graph_level != "all":
        words.append(f"graph {engine.graph_level}")
    return ", ".join(words)


def serving_words(candidate: Candidate) -> str:
    """How the candidate is served beyond server and protocol: ``batch 8, delay 2 ms, 1 thread``."""
    serving = candidate.serving
    words = [f"batch {serving.max_batch_size}" if serving.max_batch_size > 1 else "no batching"]
    if serving.max_batch_delay_ms:
        words.append(f"delay {serving.max_batch_delay_ms:g} ms")
    if serving.instances > 1:
        words.append(f"{serving.instances} instances")
    if serving.parallel_workers:
        words.append(f"{serving.parallel_workers} workers")
    words.append(f"{serving.threads} thread{'s' if serving.threads > 1 else ''}")
    return ", ".join(words)


def printable(text: str) -> str:
    """The text without control characters and direction marks, which could disguise what a reader sees."""
    return "".join(
        char if char == "\n" or not unicodedata.category(char).startswith("C") else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def _row(campaign: Campaign, candidate: Candidate) -> Row:
    fidelity = fidelity_of(candidate, campaign.variants, campaign.fidelities)
    variant = variant_of(campaign, candidate)
    metric, load = latency_name(campaign)
    word, reason = outcome(campaign, candidate)
    return Row(
        number=0,
        candidate=candidate,
        baseline=candidate.id == campaign.verdict.baseline,
        champion=candidate.id == campaign.verdict.champion,
        accuracy=fidelity.metrics.get("accuracy") if fidelity else None,
        drop=fidelity.metrics.get("accuracy_drop") if fidelity else None,
        latency=estimate_of(campaign, candidate.id, metric, load),
        throughput=_first(estimate_of(campaign, candidate.id, name, None) for name in THROUGHPUTS),
        comparison=comparison_of(campaign, candidate.id),
        size_mb=exact(variant.artifact.size_bytes / BYTES_PER_MB, "MB") if variant else None,
        outcome=word,
        reason=reason,
        pareto=candidate.id in campaign.verdict.pareto,
    )


def _first(estimates: Iterable[Estimate | None]) -> Estimate | None:
    return next((one for one in estimates if one is not None), None)


def _place(row: Row) -> tuple[bool, float, str]:
    return row.outcome != "selected", -row.throughput.value if row.throughput else float("inf"), row.candidate.name
