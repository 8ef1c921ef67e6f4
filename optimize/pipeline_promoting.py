"""A pipeline's new step variants promoted together: where they come from, what is to be done, how it is watched."""

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from optimize.cluster_config import ClusterConfig, LocalConfig, load_cluster
from optimize.engines.local import run_in_child
from optimize.fidelity import save_outputs
from optimize.metrics import find_metric
from optimize.pipelines import answers, file_of, judged_outputs, profile_of, signatures
from optimize.production import Place, Served, check_core2, open_pipeline_place
from optimize.promoting import UNREGISTERED, BasePromoting, Options, Task, Told, find_subject
from optimize.samples import Samples, load_samples
from optimize.serving import stored_candidate
from profiles.pipelines.checks import Signature, pipeline_inputs
from profiles.pipelines.documents import Plan, load_plan
from profiles.pipelines.rollout import plain_spec, with_models
from profiles.serving.core2.manifests import Manifest, as_yaml
from profiles.serving.core2.schema import MLOPS
from profiles.serving.naming import MAX_NAME
from registry import promotion as promotions
from registry.codec import canonical, digest
from registry.documents import load_document
from registry.errors import InputError
from registry.policy import parse_policy
from registry.ports import Probe, RegisteredVersion
from registry.promotion import CHALLENGER, CHAMPION, Journal
from registry.records import Candidate, Estimate, Metrics, Policy, Promotion, Target

if TYPE_CHECKING:
    from profiles.measure.prometheus import Prometheus
    from registry.mlflow_registry import MlflowRegistry

# What a policy has to have, and a promotion does not look at.
_OBJECTIVE = "minimize latency_p50_ms"
_ID_LENGTH = 8


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
            what = "names a step twice" if step in found else f"is not step={option[2:]}"
            raise InputError(f"{option} {text!r} {what}", hint=f"Steps: {', '.join(plan.pipeline.names)}.")
        found[step] = rest
    return found


def _in_use(plan: Plan, step: str, variant: str) -> str:
    """The variant that a step has now, where the other one is known, too."""
    file_of(plan, step, variant)
    return next(iter(plan.models[step].variants))


def _of_campaign(step: str, folder: Path, cluster: Path | None, options: Options) -> tuple[Change, tuple[str, ...]]:
    """What the campaign of a working folder chose; see `optimize.promoting.find_subject`."""
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


# --- the promotion ---------------------------------------------------------------------------------------------


class PipelinePromoting(BasePromoting):
    """The promotion of a pipeline's new Models."""

    def __init__(self, subject: PipelineSubject, options: Options, registry: "MlflowRegistry", told: Told) -> None:
        """Asks nobody yet.

        Args:
            subject: what is promoted.
            options: how.
            registry: where its version is.
            told: hears what is done.
        """
        task = Task(
            campaign_id=subject.campaign_id,
            candidate_id=subject.candidate_id,
            production=subject.name,
            work=subject.work,
            cluster=subject.cluster,
            base=subject.base,
        )
        super().__init__(task, options, registry, told)
        self._subject = subject

    def _place(self, *, serve: bool) -> AbstractContextManager[Place]:
        subject = self._subject
        return open_pipeline_place(
            subject.cluster,
            base=subject.base,
            work=subject.work,
            production=subject.name,
            models=subject.models,
            brought=subject.brought,
        )

    def _registered(self) -> RegisteredVersion | None:
        subject = self._subject
        return self._registry.find(
            _registered_name(subject), campaign_id=subject.campaign_id, candidate_id=subject.candidate_id
        )

    def _register(self) -> RegisteredVersion:
        """Makes the pipeline with its new Models a version of its registered model."""
        # MLflow takes seconds to import.
        from optimize import reporting
        from registry.mlflow_pipelines import register_pipeline

        subject = self._subject
        self._told("the pipeline is recorded in MLflow")
        version = register_pipeline(
            subject.name,
            as_yaml(subject.after),
            campaign_id=subject.campaign_id,
            candidate_id=subject.candidate_id,
            candidate=subject.candidate_name,
            models=subject.models,
            reason=subject.reason,
            work=subject.work,
            uri=reporting.named_store(subject.work),
        )
        registered = self._registry.version(_registered_name(subject), version)
        if registered is None:
            raise InputError(f"version {version} of {_registered_name(subject)} was deleted as soon as it was made")
        return registered

    def _new(self, journal: Journal | None, place: Place, registered: RegisteredVersion | None) -> Promotion:
        subject, options, rollout = self._subject, self._options, place.rollout
        self._check_in_production(place)
        model = _registered_name(subject)
        aliases = self._registry.aliases(model)
        version = UNREGISTERED if registered is None else registered.version
        begun = 0 if journal is None else sum(journal.state(one) != "new" for one in journal.promotions)
        marks = [subject.campaign_id, subject.candidate_id, subject.name, rollout.location, version, begun]
        return Promotion(
            id=digest(marks),
            model=model,
            production=subject.name,
            challenger=rollout.challenger,
            experiment=rollout.experiment,
            location=rollout.location,
            campaign_id=subject.campaign_id,
            candidate_id=subject.candidate_id,
            candidate_name=subject.candidate_name,
            version=version,
            fingerprint="" if registered is None else registered.fingerprint,
            champion=aliases.get(CHAMPION),
            challenger_before=aliases.get(CHALLENGER),
            policy=subject.policy,
            steps=promotions.steps_of(
                weights=options.weights, mirror=options.mirror, watch_s=options.watch_s, beside=True
            ),
            reason=subject.reason,
            notes=(*subject.notes, *_first(model, aliases), *_notes(subject, options)),
            resource="pipeline",
        )

    def _check_in_production(self, place: Place) -> None:
        """Returns where what is in production is the plan's pipeline.

        Raises:
            InputError: it is not, or there is none.
        """
        subject, serving = self._subject, place.rollout.serving()
        if not serving:
            raise InputError(
                f"there is no Pipeline {subject.name} at {place.rollout.location}", hint="Deploy it first."
            )
        if serving != canonical(plain_spec(subject.plan.spec, subject.name)):
            raise InputError(
                f"the Pipeline {subject.name} at {place.rollout.location} is not that of {subject.plan.path}: it is "
                f"{serving}",
                hint="Bring the file up to date: after a promotion its steps are the new Models.",
            )

    def _own_probe(self, place: Place, stack: ExitStack) -> Probe:
        from profiles.measure.live import RequestProbe

        subject = self._subject
        loaded = None if subject.samples is None else load_samples(subject.samples)
        fidelity = None
        if loaded is not None and _unjudged(subject, loaded) is None:
            fidelity = stack.enter_context(PipelineFidelity(subject, loaded))
        return RequestProbe(
            production=place.rollout.production,
            challenger=place.rollout.challenger,
            target_of=place.target_of,
            inputs=_made_up(subject) if loaded is None else loaded.inputs,
            rate_rps=self._options.rate_rps,
            fidelity=fidelity,
            judged=frozenset() if fidelity is None else fidelity.judged,
            only=dict.fromkeys(subject.models, "champion") | dict.fromkeys(subject.models.values(), "challenger"),
        )

    def _by_prometheus(self, own: Probe, place: Place, prometheus: "Prometheus") -> Probe:
        from profiles.measure.gateway_counts import GatewayProbe

        options = self._options
        return GatewayProbe(
            prometheus=prometheus,
            production=place.rollout.production,
            challenger=place.rollout.challenger,
            meanwhile=own,
            # What happened last is there at the second scrape from then on.
            settle=lambda: time.sleep(2 * options.scrape_s),
            matchers=options.matchers,
        )


def _registered_name(subject: PipelineSubject) -> str:
    from registry.mlflow_pipelines import registered_name

    return registered_name(subject.name)


def _made_up(subject: PipelineSubject) -> Mapping[str, Any]:
    """Samples that fit the pipeline's inputs, where there are none.

    Raises:
        InputError: the models that take them are not known here.
    """
    from profiles.measure.live import made_up

    plan = subject.plan
    wanted = pipeline_inputs(plan.pipeline, signatures(plan)) if plan.models else {}
    if not wanted:
        raise InputError(
            "nothing tells what requests to the pipeline are made of",
            hint="Name samples of its inputs with --samples, or models in the plan; --watch 0 watches nothing.",
        )
    return made_up([replace(takers[0][1], name=name) for name, takers in wanted.items()])


def _first(model: str, aliases: Mapping[str, str]) -> tuple[str, ...]:
    if CHAMPION in aliases:
        return ()
    return (f"What is in production is no version of {model}: the way back restores it from what is in force.",)


def _notes(subject: PipelineSubject, options: Options) -> tuple[str, ...]:
    """What can be watched on a pipeline and what cannot, and what its promotion does to others."""
    shared = [name for name in subject.plan.pipeline.names if name not in subject.models]
    told = []
    if shared:
        told.append(
            f"Both pipelines have {', '.join(shared)}: mirrored requests reach these Models twice. A smaller --mirror "
            "spares them."
        )
    told.append(
        f"The Models of before ({', '.join(subject.models)}) stay served, so that the way back is one resource. Delete "
        "them once nobody wants to go back."
    )
    if not options.watch_s:
        return (*told, "Nothing is watched: --watch 0.")
    told += [
        "Envoy's histogram knows Models, not pipelines, so that no time of a pipeline is in it.",
        "Latency is that of the pipeline gateway's histogram, as Prometheus has it: of all traffic and mirrored "
        "requests, no finer than its buckets (5 ms and up). A Core 2 that does not tell pipelines apart there leaves "
        "requests of our own."
        if options.prometheus
        else f"Latency is that of requests of our own alone ({options.rate_rps:g} a second, half of them to the "
        "challenger itself), end to end: Kafka and the gateways are in it, single steps are not told apart. With "
        "--prometheus the pipeline gateway's metrics tell of all traffic.",
        "Replies to mirrored requests are dropped, and those to callers are not seen: what the challenger answers is "
        "judged by requests of our own alone.",
    ]
    loaded = None if subject.samples is None else load_samples(subject.samples)
    why = "no samples are named" if loaded is None else _unjudged(subject, loaded)
    return tuple(told) if why is None else (*told, f"Live answers are not judged: {why}.")


# --- what answers are worth ------------------------------------------------------------------------------------


def _unjudged(subject: PipelineSubject, loaded: Samples) -> str | None:
    """Why live answers cannot be judged, or None."""
    if loaded.labels is None:
        return "the samples have no labels"
    if lacking := [name for name in subject.plan.pipeline.names if name not in subject.plan.models]:
        return f"the plan has no model of {lacking[0]}, so that nothing tells what the present pipeline answers"
    return None


class PipelineFidelity:
    """Judges what a pipeline answers to samples, against the present variants' answers in process. A context manager.

    Attributes:
        judged: the metrics that it gives.
    """

    def __init__(self, subject: PipelineSubject, loaded: Samples) -> None:
        """Runs nothing yet.

        Args:
            subject: whose plan has a model for each step.
            loaded: its samples, with labels.
        """
        self._subject = subject
        self._loaded = loaded
        decides = getattr(find_metric(subject.metric), "decide", None) is not None
        self.judged = frozenset({"accuracy", "accuracy_drop"} | ({"flip_rate"} if decides else set()))

    def __enter__(self) -> "PipelineFidelity":
        self._scratch = tempfile.TemporaryDirectory(prefix="burnish-live-")
        self._reference: Path | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    def __call__(self, target: Target) -> Metrics:
        """The metrics of what a target answers.

        Raises:
            UnreachableError: it does not answer.
            BurnishError: its answers cannot be judged.
        """
        from profiles.measure.answers import answers_of

        plan, folder = self._subject.plan, Path(self._scratch.name)
        if self._reference is None:
            self._reference = folder / "reference.npz"
            save_outputs(self._reference, judged_outputs(plan, answers(plan, self._loaded, {})[0]))
        save_outputs(folder / "answers.npz", judged_outputs(plan, answers_of(target, self._loaded.inputs)))
        found = run_in_child(
            "optimize.fidelity:evaluate_answers",
            {
                "answers": str(folder / "answers.npz"),
                "samples": str(Path(str(self._subject.samples)).resolve()),
                "samples_digest": self._loaded.digest,
                "reference": str(self._reference),
                "parity": False,
                "metric": self._subject.metric,
                "adapted": False,
            },
        )
        return {name: Estimate(**fields) for name, fields in found["metrics"].items() if name in self.judged}
