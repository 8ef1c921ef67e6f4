"""What a campaign won, in the few numbers that can stand beside those of other campaigns."""

from dataclasses import replace
from typing import Any

from registry.policy import metric_of
from registry.records import Campaign, Candidate, Comparison, Estimate, Gain
from registry.report.table import BYTES_PER_MB, comparison_of, estimate_of, variant_of
from registry.report.waterfall import waterfall
from registry.selection import fidelity_of

_COST = "cost_per_million"


def gain_of(campaign: Campaign) -> Gain | None:
    """What the selected candidate has over the baseline; None where nothing was selected.

    The speed-up is over the float32 baseline that was served the same way, by interleaved rounds. Where the selected is
    that baseline's own variant on another server, it is over the campaign's baseline, in the policy's first objective.
    """
    named = {one.id: one for one in campaign.candidates}
    selected, baseline = named.get(campaign.verdict.selected or ""), named.get(campaign.verdict.baseline or "")
    if selected is None:
        return None
    fidelity = fidelity_of(selected, campaign.variants, campaign.fidelities)
    return Gain(
        candidate=selected.name,
        variant_name=selected.variant_name,
        is_baseline=selected == baseline,
        size_mb=_size_mb(campaign, selected),
        baseline_size_mb=None if baseline is None else _size_mb(campaign, baseline),
        accuracy_drop=fidelity.metrics.get("accuracy_drop") if fidelity else None,
        cost=estimate_of(campaign, selected.id, _COST, None),
        baseline_cost=None if baseline is None else estimate_of(campaign, baseline.id, _COST, None),
        currency=campaign.hardware.currency if campaign.hardware else "",
        **_speed_up(campaign, selected, named),
    )


def _speed_up(campaign: Campaign, selected: Candidate, named: dict[str, Candidate]) -> dict[str, Any]:
    found: Comparison | None = comparison_of(campaign, selected.id)
    if found is not None:
        against = named.get(found.baseline_id)
        return {
            "against": "" if against is None else against.name,
            "metric": found.metric,
            "load": found.load,
            "speed_up": _better(found.metric, found.ratio),
            "word": found.word,
        }
    way = waterfall(campaign)
    if way is None or way.total is None:
        return {}
    objective = way.objective
    ratio = way.total if objective.direction == "maximize" else _turned(way.total)
    return {"against": way.baseline.name, "metric": objective.metric, "load": objective.load, "speed_up": ratio}


def _better(metric: str, ratio: Estimate) -> Estimate:
    """The ratio so that above 1 is better."""
    known = metric_of(metric)
    larger = metric.endswith("_rps") if known is None else known.larger_is_better
    return ratio if larger else _turned(ratio)


def _turned(ratio: Estimate) -> Estimate:
    return replace(ratio, value=1 / ratio.value, low=_one_over(ratio.high), high=_one_over(ratio.low))


def _one_over(end: float | None) -> float | None:
    return None if end is None or end <= 0 else 1 / end


def _size_mb(campaign: Campaign, candidate: Candidate) -> float | None:
    variant = variant_of(campaign, candidate)
    return None if variant is None else variant.artifact.size_bytes / BYTES_PER_MB
