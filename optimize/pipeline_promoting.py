"""A pipeline's new step variants promoted together: registered, put beside the one in production, and watched."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optimize.pipeline_fidelity import PipelineFidelity, why_unjudged
from optimize.pipeline_sources import PipelineSubject
from optimize.pipelines import signatures
from optimize.production import Place, open_pipeline_place
from optimize.promoting import BasePromoting, Options, Task
from optimize.rollback import Told
from optimize.samples import Samples
from profiles.pipelines.checks import pipeline_inputs
from profiles.pipelines.rollout import plain_spec
from profiles.serving.core2.manifests import as_yaml
from registry.codec import canonical
from registry.errors import InputError
from registry.ports import Probe, RegisteredVersion
from registry.promotion import CHAMPION, Journal
from registry.records import Promotion

if TYPE_CHECKING:
    from profiles.measure.prometheus import Prometheus
    from registry.mlflow_registry import MlflowRegistry


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
            samples=subject.samples,
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
        subject = self._subject
        self._check_in_production(place)
        model = _registered_name(subject)
        return self._drafted(
            journal,
            place,
            registered,
            model=model,
            candidate_name=subject.candidate_name,
            policy=subject.policy,
            beside=True,
            reason=subject.reason,
            notes=(
                *subject.notes,
                *_first(model, self._registry.aliases(model)),
                *_notes(subject, self._options, self._samples if self._options.watch_s else None),
            ),
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

        subject, loaded = self._subject, self._samples
        fidelity = None
        if loaded is not None and subject.samples is not None and why_unjudged(subject.plan, loaded) is None:
            fidelity = PipelineFidelity(subject.plan, samples=subject.samples, loaded=loaded, metric=subject.metric)
            stack.enter_context(closing(fidelity))
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


def _notes(subject: PipelineSubject, options: Options, loaded: Samples | None) -> tuple[str, ...]:
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
    why = why_unjudged(subject.plan, loaded)
    return tuple(told) if why is None else (*told, f"Live answers are not judged: {why}.")
