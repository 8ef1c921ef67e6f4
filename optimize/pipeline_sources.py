"""Where a pipeline's new Models come from: named, checked against what is in their place, and put together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from optimize.cluster_config import ClusterConfig, LocalConfig, load_cluster
from optimize.model_promoting import find_subject
from optimize.pipelines import file_of, profile_of, signatures
from optimize.production import Served, check_core2
from optimize.promoting import Options
from optimize.serving import stored_candidate
from profiles.pipelines.checks import Signature
from profiles.pipelines.documents import Plan, load_plan
from profiles.pipelines.rollout import plain_spec, with_models
from profiles.serving.core2.manifests import Manifest
from profiles.serving.core2.schema import MLOPS
from profiles.serving.naming import MAX_NAME
from registry import promotion as promotions
from registry.codec import digest
from registry.documents import load_document
from registry.errors import InputError
from registry.policy import parse_policy
from registry.records import Candidate, Policy

# What a policy has to have, and a promotion does not look at.
_OBJECTIVE = "minimize latency_p50_ms"
_ID_LENGTH = 8
_FORMS = {"--model": "step=Model", "--step": "step=FOLDER", "--variant": "step=variant"}


class ChosenPart(BaseModel):
    """What ``burnish pipeline choose --out`` writes, and ``promote --chosen`` reads.

    Attributes:
        pipeline: its name.
        variants: step -> variant of the plan.
        limits: of the policy's language, to be watched when they are promoted.
        reason: why these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    pipeline: str
    variants: dict[str, str]
    limits: list[str] = []
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where a pipeline's new Models come from, as a command has it.

    Attributes:
        models: ``step=Model``, of Models that are served already.
        steps: ``step=FOLDER``, of working folders of campaigns: what each chose is brought.
        variants: ``step=variant``, of the plan's variants: their files are brought.
        chosen: a file of `ChosenPart`.
        limits: of the policy's language, beside those of the file.
    """

    models: Sequence[str] = ()
    steps: Sequence[str] = ()
    variants: Sequence[str] = ()
    chosen: Path | None = None
    limits: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A Model that takes a step's place.

    Attributes:
        step: whose place.
        model: its name.
        served: what it serves, where it is brought; None where it is served already.
        signature: what it takes and gives; None where that is not known here.
        note: where it comes from, a sentence.
    """

    step: str
    model: str
    served: Served | None
    signature: Signature | None
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSubject:
    """A pipeline with new Models, and where it is to be promoted.

    Attributes:
        plan: of the pipeline as it is in production.
        changes: in the order of the steps.
        policy: whose limits are watched.
        reason: why it is promoted.
        work: the working folder.
        cluster: where it is in production.
        base: the folder that the cluster's paths are relative to.
        samples: of the pipeline's inputs, where they are known.
        metric: the task metric.
        notes: what is to be known, a sentence each.
    """

    plan: Plan
    changes: tuple[Change, ...]
    policy: Policy
    reason: str
    work: Path
    cluster: ClusterConfig
    base: Path
    samples: Path | None
    metric: str
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The pipeline's."""
        return self.plan.pipeline.name

    @property
    def models(self) -> dict[str, str]:
        """Step -> Model that takes its place."""
        return {one.step: one.model for one in self.changes}

    @property
    def brought(self) -> dict[str, Served]:
        """Model -> what it serves, of those that are not served already."""
        return {one.model: one.served for one in self.changes if one.served is not None}

    @property
    def before(self) -> Manifest:
        """The pipeline as the plan has it."""
        return {"apiVersion": MLOPS, "kind": "Pipeline", "metadata": {"name": self.name}, "spec": self.plan.spec}

    @property
    def after(self) -> Manifest:
        """The pipeline with the new Models."""
        return with_models(self.before, self.models)

    @property
    def campaign_id(self) -> str:
        """Digest of the pipeline that it is made of."""
        return digest([self.name, plain_spec(self.plan.spec, self.name)])

    @property
    def candidate_id(self) -> str:
        """Digest of the pipeline that it is to be, and of what is brought for it."""
        brought = {model: served.candidate.id for model, served in self.brought.items()}
        return digest([self.name, plain_spec(self.after["spec"], self.name), brought])

    @property
    def candidate_name(self) -> str:
        """What changes, in words."""
        return ", ".join(f"{one.step}={one.model}" for one in self.changes)


# --- where the Models come from --------------------------------------------------------------------------------


def find_pipeline(
    where: Path,
    sources: Sources,
    *,
    work: Path,
    cluster: Path | None,
    options: Options,
    metric: str = "accuracy",
    by_hand: bool = False,
) -> PipelineSubject:
    """A pipeline with its new Models, checked: the steps are there, tensors fit, campaigns and passports hold.

    Args:
        where: the manifest that is in production, or a plan with models and samples.
        sources: of the new Models.
        work: the working folder.
        cluster: a file with a section ``cluster:``; None for this machine.
        options: name samples, and who must have signed passports of what campaigns chose.
        metric: the task metric, for the answers of samples.
        by_hand: whether only its manifests are wanted, for which there need be no Core 2.

    Raises:
        InputError: nothing changes, a step or variant is unknown, tensors do not fit, a Model cannot be served so, or
            the cluster is no Core 2.
        NoVariantError: a campaign selected nothing.
        CheckFailedError: a passport is not genuine.
        PolicyError: a limit is not understood.
    """
    plan, config = load_plan(where), load_cluster(cluster)
    chosen = None if sources.chosen is None else _load_chosen(sources.chosen, plan)
    if not by_hand:
        check_core2(config)
    models, folders = _pairs("--model", sources.models, plan), _pairs("--step", sources.steps, plan)
    variants = {**({} if chosen is None else chosen.variants), **_pairs("--variant", sources.variants, plan)}
    variants = {step: one for step, one in variants.items() if one != _in_use(plan, step, one)}
    _check_once([*models, *folders, *variants])
    found: list[Change] = []
    notes: list[str] = []
    for step, model in models.items():
        told = f"{model}, which takes the place of {step}, is served already, and stays in any case."
        found.append(Change(step=step, model=model, served=None, signature=None, note=told))
    for step, folder in folders.items():
        change, said = _of_campaign(step, Path(folder), cluster, options)
        found.append(change)
        notes += [f"{step}: {line}" for line in said]
    found += [_of_plan(plan, step, variant, work) for step, variant in variants.items()]
    changes = tuple(sorted(found, key=lambda one: plan.pipeline.names.index(one.step)))
    unfit = [
        why
        for one in changes
        if one.served is not None and (why := config.why_not(one.served.candidate.serving)) is not None
    ]
    if unfit and not isinstance(config, LocalConfig):
        raise InputError(f"a step cannot be served so: {unfit[0]}")
    limits = [*([] if chosen is None else chosen.limits), *sources.limits]
    subject = PipelineSubject(
        plan=plan,
        changes=changes,
        policy=parse_policy(limits, _OBJECTIVE),
        reason=(chosen.reason if chosen is not None else "") or "Chosen by hand.",
        work=work,
        cluster=config,
        base=work if cluster is None else cluster.resolve().parent,
        samples=options.samples or plan.samples,
        metric=metric,
        notes=(*(one.note for one in changes), *notes, *_check_tensors(plan, changes)),
    )
    with_models(subject.before, subject.models)
    return subject


def _load_chosen(path: Path, plan: Plan) -> ChosenPart:
    chosen = load_document(path, ChosenPart)
    if chosen.pipeline != plan.pipeline.name:
        raise InputError(f"{path} is of the pipeline {chosen.pipeline!r}, and {plan.path} of {plan.pipeline.name!r}")
    if unknown := sorted(set(chosen.variants) - set(plan.pipeline.names)):
        raise InputError(
            f"{path} names {unknown[0]!r}, which is no step", hint=f"Steps: {', '.join(plan.pipeline.names)}."
        )
    return chosen


def _pairs(option: str, texts: Sequence[str], plan: Plan) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        step, _, rest = text.partition("=")
        if not rest or step not in plan.pipeline.names or step in found:
            what = "names a step twice" if step in found else f"is not {_FORMS[option]}"
            raise InputError(f"{option} {text!r} {what}", hint=f"Steps: {', '.join(plan.pipeline.names)}.")
        found[step] = rest
    return found


def _in_use(plan: Plan, step: str, variant: str) -> str:
    """The variant that a step has now, where the other one is known, too."""
    file_of(plan, step, variant)
    return next(iter(plan.models[step].variants))


def _of_campaign(step: str, folder: Path, cluster: Path | None, options: Options) -> tuple[Change, tuple[str, ...]]:
    """What the campaign of a working folder chose; see `optimize.model_promoting.find_subject`."""
    subject = find_subject(folder, work=None, cluster=cluster, options=options)
    served = Served(candidate=subject.candidate, artifact=subject.variant.artifact, files=subject.files)
    model = _named(f"{subject.campaign.model_name}-{subject.candidate.variant_name}", subject.candidate)
    note = (
        f"{model} is brought for {step}: {subject.candidate.name}, which the campaign {subject.campaign.name} in "
        f"{folder} chose."
    )
    return _brought(step, model, served, note), subject.notes


def _of_plan(plan: Plan, step: str, variant: str, work: Path) -> Change:
    path = file_of(plan, step, variant)
    candidate, artifact, files = stored_candidate(path, profile_of(plan.models[step]), work=work)
    served = Served(candidate=candidate, artifact=artifact, files=files)
    model = _named(f"{re.sub(f'-[0-9a-f]{{{_ID_LENGTH}}}$', '', step)}-{variant}", candidate)
    return _brought(step, model, served, f"{model} is brought for {step}: its variant {variant}, from {path}.")


def _brought(step: str, model: str, served: Served, note: str) -> Change:
    signature = Signature(inputs=served.artifact.inputs, outputs=served.artifact.outputs)
    return Change(step=step, model=model, served=served, signature=signature, note=note)


def _named(words: str, candidate: Candidate) -> str:
    """The name of a Model that is brought: it ends with what the Model is, so that no two have the same."""
    plain = re.sub(r"[^a-z0-9]+", "-", words.lower())[: MAX_NAME - _ID_LENGTH - 1].strip("-") or "m"
    return f"{plain}-{candidate.id[:_ID_LENGTH].lower()}"


def _check_once(steps: Sequence[str]) -> None:
    """Returns where something changes, and each step once.

    Raises:
        InputError: it does not.
    """
    if not steps:
        raise InputError(
            "nothing of the pipeline changes",
            hint="Name new Models: --model step=Model, --step step=FOLDER, --variant step=variant, or --chosen FILE.",
        )
    if twice := sorted({step for step in steps if steps.count(step) > 1}):
        raise InputError(f"the step {twice[0]!r} is to become two Models", hint="Name one for each step.")


def _check_tensors(plan: Plan, changes: Sequence[Change]) -> tuple[str, ...]:
    """What is not known of whether the new Models take and give what those in their place do.

    Raises:
        InputError: one is known not to.
    """
    known = signatures(plan) if plan.models else {}
    unknown = []
    for one in changes:
        before = known.get(one.step)
        if before is None or one.signature is None:
            unknown.append(one.model)
        elif _tensors(before) != _tensors(one.signature):
            raise InputError(
                f"{one.model} takes or gives other tensors than {one.step}: {_tensors(one.signature)}, not "
                f"{_tensors(before)}",
                hint="Other steps or callers would have to change with it: deploy such a pipeline beside this one.",
            )
    if not unknown:
        return ()
    return (f"Whether {', '.join(unknown)} takes and gives what it takes the place of is not known here.",)


def _tensors(signature: Signature) -> str:
    return promotions.described(signature.inputs, signature.outputs)
