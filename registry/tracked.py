"""A campaign as flat parameters, tags and tables: what a tracker's pages compare and filter by. No tracker in here.

The numbers are in `registry.tracked_metrics`.
"""

from registry.records import Campaign, Candidate, HardwareProfile, ServingSearch, StageCall, Variant
from registry.report.table import outcome, variant_of
from registry.selection import fidelity_of
from registry.tracked_metrics import curves, name_of

MOST_TAG_CHARS = 5000
# MLflow's own limit on a parameter is 6000.
MOST_PARAM_CHARS = 5000
_CUT = " ..."


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
            "recipe": recipe_words(variant),
            "format": variant.artifact.format,
            "artifact_digest": variant.artifact.digest,
            "calibration_digest": variant.calibration_digest or "none",
            "seed": str(variant.seed),
        }
    fidelity = fidelity_of(candidate, campaign.variants, campaign.fidelities)
    if fidelity is not None:
        params["instruction_set"] = fidelity.instruction_set
    return {name: shortened(value, MOST_PARAM_CHARS) for name, value in params.items()}


def campaign_parameters(campaign: Campaign) -> dict[str, str]:
    """What was set for the whole campaign, its host and its policy; versions as ``version.<package>``."""
    policy = campaign.verdict.policy
    host = campaign.host
    params = {
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
    return {name: shortened(value, MOST_PARAM_CHARS) for name, value in params.items()}


def search_parameters(search: ServingSearch) -> dict[str, str]:
    """What a search for a serving profile could choose from, why it ended, and what it chose."""
    return {
        "variant": search.variant_name,
        "space": str(search.space),
        "looked_at": str(len(search.points)),
        "bounded_out": str(search.bounded_out),
        "stopped": search.stopped,
        "best": "none" if search.best is None else search.best.profile.key,
    }


def model_parameters(variant: Variant, precision: str) -> dict[str, str]:
    """What a logged model was made of, and how."""
    params = {
        "recipe": recipe_words(variant),
        "format": variant.artifact.format,
        "precision": precision,
        "size_bytes": str(variant.artifact.size_bytes),
        "source_digest": variant.source_digest,
        "calibration_digest": variant.calibration_digest or "none",
        "seed": str(variant.seed),
    }
    return {name: shortened(value, MOST_PARAM_CHARS) for name, value in params.items()}


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


def tags(campaign: Campaign, candidate: Candidate) -> dict[str, str]:
    """Who a candidate is, and what the verdict says of it."""
    word, reason = outcome_words(campaign, candidate)
    return {
        "burnish.campaign_id": campaign.id,
        "burnish.kind": "candidate",
        "burnish.candidate_id": candidate.id,
        "burnish.baseline": _flag(candidate.id == campaign.verdict.baseline),
        "burnish.champion": _flag(candidate.id == campaign.verdict.champion),
        "burnish.pareto": _flag(candidate.id in campaign.verdict.pareto),
        "burnish.verdict": word,
        "burnish.reason": shortened(reason, MOST_TAG_CHARS),
    }


def outcome_words(campaign: Campaign, candidate: Candidate) -> tuple[str, str]:
    """What became of a candidate, and why; of the selected it is the verdict that says why."""
    word, reason = outcome(campaign, candidate)
    return word, reason or campaign.verdict.sentence


def search_tags(campaign: Campaign, search: ServingSearch) -> dict[str, str]:
    """Whose search it is, and what came of it."""
    return {
        "burnish.campaign_id": campaign.id,
        "burnish.kind": "search",
        "burnish.reason": shortened(search.sentence, MOST_TAG_CHARS),
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
        "burnish.reason": shortened(verdict.sentence, MOST_TAG_CHARS),
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


def curves_table(campaign: Campaign) -> dict[str, list[object]]:
    """Every point of the candidates' curves, where the steps of a metric are whole numbers."""
    data: list[object] = [
        [candidate.name, point.name, point.at, point.value]
        for candidate in campaign.candidates
        for point in curves(campaign, candidate)
    ]
    return {"columns": ["candidate", "curve", "at", "value"], "data": data}


def search_table(search: ServingSearch) -> dict[str, list[object]]:
    """The profiles that a search looked at, in their order."""
    columns: list[object] = ["look", "profile", "closed_rps", "low", "high", "why", "failure", "best"]
    data: list[object] = []
    for number, point in enumerate(search.points, 1):
        score = point.score
        rate = [None, None, None] if score is None else [score.value, score.low, score.high]
        data.append([number, point.profile.key, *rate, point.reason, point.failure, point == search.best])
    return {"columns": columns, "data": data}


def recipe_words(variant: Variant) -> str:
    """The stages of a variant in one line; ``none`` for the source as it is."""
    return " | ".join(stage_words(stage) for stage in variant.recipe.stages) or "none"


def shortened(text: str, most: int) -> str:
    """The text, cut where a tracker would refuse it as too long."""
    return text if len(text) <= most else text[: most - len(_CUT)] + _CUT


def stage_words(stage: StageCall) -> str:
    """A stage with its parameters in one line: ``quantize(per_channel=true, scheme=static)``."""
    params = ", ".join(f"{name}={_scalar(value)}" for name, value in sorted(stage.params.items()))
    return f"{stage.name}({params})" if params else stage.name


def _scalar(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flag(value: bool) -> str:
    return "true" if value else "false"
