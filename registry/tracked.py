"""A campaign as flat parameters, metrics, curves and tags: what a tracker's tables compare. No tracker in here."""

import re
from collections.abc import Mapping

from registry.records import Campaign, Candidate, Estimate, HardwareProfile, Metrics, StageCall
from registry.report.table import BYTES_PER_MB, capacity_of, outcome, variant_of
from registry.selection import fidelity_of

# What MLflow takes in the name of a metric or parameter; a blank is one of ours.
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_./-]")
MOST_TAG_CHARS = 5000


def name_of(metric: str, load: str | None = None) -> str:
    """A metric's name with its load, in the characters a tracker takes: ``latency_p90_ms.at_0.8_saturation``."""
    return _NOT_IN_A_NAME.sub("_", metric if load is None else f"{metric}.at_{load}")


def parameters(campaign: Campaign, candidate: Candidate) -> dict[str, str]:
    """What was set for a candidate: recipe, engine, serving, and what it ran on. One flat value a name."""
    serving, variant = candidate.serving, variant_of(campaign, candidate)
    params = {
        "variant": candidate.variant_name,
        "variant_id": candidate.variant_id,
        "engine": candidate.engine.name,
        "engine_version": candidate.engine_version,
        "precision": candidate.engine.precision,
        "graph_level": candidate.engine.graph_level,
        "server": serving.server,
        "server_version": candidate.server_version,
        "served_by": candidate.cluster or "this machine",
        "backend": serving.backend,
        "protocol": serving.protocol,
        "max_batch_size": str(serving.max_batch_size),
        "max_batch_delay_ms": f"{serving.max_batch_delay_ms:g}",
        "instances": str(serving.instances),
        "parallel_workers": str(serving.parallel_workers),
        "threads": str(serving.threads),
        "level": campaign.level,
        "host_fingerprint": campaign.host.fingerprint,
    }
    if variant is not None:
        params |= {
            "source": variant.source,
            "recipe": " | ".join(stage_words(stage) for stage in variant.recipe.stages) or "none",
            "format": variant.artifact.format,
            "artifact_digest": variant.artifact.digest,
            "seed": str(variant.seed),
        }
    return params


def campaign_parameters(campaign: Campaign) -> dict[str, str]:
    """What was set for the whole campaign, its host and its policy; versions as ``version.<package>``."""
    policy = campaign.verdict.policy
    host = campaign.host
    return {
        "level": campaign.level,
        "seed": str(campaign.seed),
        "task_metric": campaign.task_metric,
        "samples_digest": campaign.samples_digest,
        "sources": ", ".join(source.name for source in campaign.sources),
        "policy.constraints": "; ".join(constraint.text for constraint in policy.constraints),
        "policy.objectives": "; ".join(objective.text for objective in policy.objectives),
        "host.fingerprint": host.fingerprint,
        "host.cpu_model": host.cpu_model,
        "host.cores": str(host.cores),
        "host.instruction_sets": " ".join(host.instruction_sets),
        "host.gpus": ", ".join(host.gpus),
        "host.pinning": host.pinning,
        **_hardware_parameters(campaign.hardware),
        **{name_of(f"version.{package}"): version for package, version in campaign.versions.items()},
    }


def _hardware_parameters(hardware: HardwareProfile | None) -> dict[str, str]:
    """What the machine costs, without which a cost says nothing; empty where the campaign names none."""
    if hardware is None:
        return {}
    found = {"hardware.name": hardware.name, "hardware.cores": str(hardware.cores), "hardware.gpus": str(hardware.gpus)}
    if hardware.price_per_hour is not None:
        found |= {
            "hardware.price_per_hour": f"{hardware.price_per_hour:g} {hardware.currency}",
            "hardware.price_source": f"{hardware.price_source}, {hardware.price_date}",
        }
    return found


def metrics(campaign: Campaign, candidate: Candidate) -> dict[str, float]:
    """Every number of a candidate: ``<name>``, and ``<name>_low`` and ``<name>_high`` where they are known."""
    found: dict[str, float] = {}
    fidelity = fidelity_of(candidate, campaign.variants, campaign.fidelities)
    if fidelity is not None:
        found |= _flat(fidelity.metrics)
    for screening in campaign.screenings:
        if (screening.variant_id, screening.engine) == (candidate.variant_id, candidate.engine):
            found |= _flat(screening.metrics)
    for measurement in campaign.measurements:
        if measurement.candidate_id == candidate.id:
            found |= _flat(measurement.metrics, measurement.load)
            found[name_of("invalid_runs", measurement.load)] = float(measurement.invalid_runs)
    for comparison in campaign.comparisons:
        if comparison.candidate_id == candidate.id:
            found |= _flat({f"ratio.{comparison.metric}": comparison.ratio}, comparison.load)
    variant = variant_of(campaign, candidate)
    if variant is not None:
        found["size_mb"] = variant.artifact.size_bytes / BYTES_PER_MB
    return found


def curves(campaign: Campaign, candidate: Candidate) -> list[tuple[str, int, float]]:
    """Points (name, step, value) of the candidate's curves.

    ``curve.latency_p50_ms``, ``curve.latency_p90_ms`` and ``curve.achieved_rps`` step by the offered rate in requests
    a second, rounded; ``curve.closed_rps`` by the requests outstanding.
    """
    capacity = capacity_of(campaign, candidate.id)
    if capacity is None:
        return []
    points = {("curve.closed_rps", concurrency): rate for concurrency, rate in capacity.ladder}
    for stage in capacity.stages:
        step = round(stage.offered_rps)
        points["curve.achieved_rps", step] = stage.achieved_rps
        if stage.latency_p50_ms is not None:
            points["curve.latency_p50_ms", step] = stage.latency_p50_ms
        if stage.latency_p90_ms is not None:
            points["curve.latency_p90_ms", step] = stage.latency_p90_ms
    return [(name, step, value) for (name, step), value in points.items()]


def tags(campaign: Campaign, candidate: Candidate) -> dict[str, str]:
    """Who a candidate is, and what the verdict says of it."""
    word, reason = outcome(campaign, candidate)
    return {
        "burnish.campaign_id": campaign.id,
        "burnish.candidate_id": candidate.id,
        "burnish.baseline": _flag(candidate.id == campaign.verdict.baseline),
        "burnish.pareto": _flag(candidate.id in campaign.verdict.pareto),
        "burnish.verdict": word,
        "burnish.reason": reason[:MOST_TAG_CHARS],
    }


def campaign_tags(campaign: Campaign) -> dict[str, str]:
    """Who a campaign is, its verdict, and how many of its failures were of which kind."""
    kinds = [failure.kind for failure in campaign.failures]
    verdict = campaign.verdict
    return {
        "burnish.campaign_id": campaign.id,
        "burnish.kind": "campaign",
        "burnish.level": campaign.level,
        "burnish.verdict": "selected" if verdict.selected is not None else "none",
        "burnish.reason": verdict.sentence[:MOST_TAG_CHARS],
        "burnish.selected": verdict.selected or "",
        "burnish.provisional": _flag(verdict.provisional),
        "burnish.failures": str(len(kinds)),
        **{f"burnish.failures.{kind}": str(kinds.count(kind)) for kind in sorted(set(kinds))},
    }


def failures_table(campaign: Campaign) -> dict[str, list[object]]:
    """The failures as columns and rows, as trackers show tables."""
    columns = ["subject", "phase", "kind", "reason", "detail"]
    return {
        "columns": list(columns),
        "data": [[getattr(failure, column) for column in columns] for failure in campaign.failures],
    }


def stage_words(stage: StageCall) -> str:
    """A stage with its parameters in one line: ``quantize(per_channel=true, scheme=static)``."""
    params = ", ".join(f"{name}={_scalar(value)}" for name, value in sorted(stage.params.items()))
    return f"{stage.name}({params})" if params else stage.name


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


def _scalar(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flag(value: bool) -> str:
    return "true" if value else "false"
