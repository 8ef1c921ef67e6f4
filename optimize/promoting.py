"""Promotion for the command line: the campaign, the registry, the place of production and the probe, put together."""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import passports, reporting
from optimize.cluster_config import ClusterConfig, LocalConfig, load_cluster
from optimize.live_fidelity import JUDGED, LiveFidelity, variant_of
from optimize.production import Place, Served, open_pipeline_place, open_place, production_name
from registry import promotion as promotions
from registry.errors import CheckFailedError, InputError
from registry.keyless import SignerIdentity
from registry.ledger import Ledger
from registry.ports import Probe, RegisteredVersion
from registry.promotion import CHALLENGER, CHAMPION, Journal, Promoter
from registry.records import Campaign, Candidate, Constraint, Promotion, PromotionStep, Reign, Variant, Watching
from registry.store import FolderStore
from registry.tracking import store_uri

if TYPE_CHECKING:
    from optimize.samples import Samples
    from profiles.measure.prometheus import Prometheus
    from registry.mlflow_registry import MlflowRegistry

JOURNAL = "promotions.jsonl"
UNREGISTERED = promotions.UNREGISTERED
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a candidate is to be promoted.

    Attributes:
        production: the name of the Model that callers ask; None for one made of the registered model's.
        weights: percent of the requests that the challenger answers, step by step.
        mirror: percent of the requests that it gets copies of before; 0 for none.
        watch_s: how long each of these steps is watched.
        rate_rps: requests a second of our own meanwhile.
        samples: the evaluation samples, which our own requests are made of, and live answers are judged by.
        prometheus: URL of a Prometheus that scrapes Envoy.
        matchers: more matchers of PromQL, to tell this Envoy from others.
        scrape_s: how often Prometheus asks Envoy.
        passport: file of the challenger's passport.
        signer: PEM file of the public key, or the identity, that it must be signed by.
        port: of this machine's Envoy.
    """

    production: str | None = None
    weights: tuple[int, ...] = promotions.WEIGHTS
    mirror: int = 100
    watch_s: float = 60.0
    rate_rps: float = 25.0
    samples: Path | None = None
    prometheus: str | None = None
    matchers: str = ""
    scrape_s: float = 15.0
    passport: Path | None = None
    signer: Path | SignerIdentity | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            InputError: a rate or time is no number above zero, or the port none that a port may be.
        """
        for option, value in (("--rate", self.rate_rps), ("--scrape", self.scrape_s)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{option} is {value:g}", hint="It is a number above 0.")
        if self.port is not None and not 0 < self.port <= 65535:
            raise InputError(f"--port is {self.port}", hint="It is 1 to 65535.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is to be promoted, and where.

    Attributes:
        campaign: that chose it.
        candidate: it.
        variant: what it serves.
        files: folder with the variant's files.
        work: the working folder.
        cluster: where it is in production.
        base: the folder that the cluster's paths are relative to.
        samples: the evaluation samples, where they are known.
        notes: what is to be known, a sentence each.
    """

    campaign: Campaign
    candidate: Candidate
    variant: Variant
    files: Path
    work: Path
    cluster: ClusterConfig
    base: Path
    samples: Path | None
    notes: tuple[str, ...]


def find_subject(where: Path, *, work: Path | None, cluster: Path | None, options: Options) -> Subject:
    """What a campaign chose, checked: its verdict, its files, and its passport.

    Args:
        where: a campaign file, or a working folder.
        work: the working folder, where a campaign file is named and it is not beside it.
        cluster: a file with a section ``cluster:``, in place of the campaign file's.
        options: name samples and passport.

    Raises:
        NoVariantError: the campaign selected nothing.
        InputError: its verdict is provisional, there is no finished campaign, or a file is missing or was changed.
        CheckFailedError: the passport is not genuine, or says something else.
    """
    samples, base, configured = options.samples, where, load_cluster(cluster)
    if where.is_file():
        from optimize.config import load_campaign

        config = load_campaign(where)
        base = where.resolve().parent
        work = work or where.parent / "burnish-work"
        configured = configured if cluster is not None else config.cluster
        samples = samples or (base / Path(config.samples.evaluation).expanduser())
    elif work is not None and work != where:
        raise InputError(f"{where} is no campaign file, and goes with no --work", hint="Name one of them.")
    work = work or where
    if cluster is not None:
        base = cluster.resolve().parent
    campaign = reporting.read_campaign(work)
    candidate = promotions.chosen(campaign)
    variant = variant_of(campaign, candidate)
    files = FolderStore(work).path(variant.artifact)
    notes = _check_passport(campaign, variant, files, work, options)
    return Subject(
        campaign=campaign,
        candidate=candidate,
        variant=variant,
        files=files,
        work=work,
        cluster=configured,
        base=base,
        samples=samples,
        notes=notes,
    )


def _check_passport(campaign: Campaign, variant: Variant, files: Path, work: Path, options: Options) -> tuple[str, ...]:
    from registry import passport

    if options.signer is None and options.passport is None:
        return ("No passport was checked: none was asked for with --public-key or --identity.",)
    signer = passports.resolved_signer(options.signer)
    usual = passports.passport_path(work, variant, keyless=isinstance(signer, SignerIdentity))
    path = options.passport or usual
    checked = passport.check(path, signer, artifact=files, campaign=campaign)
    told = checked.statement["predicate"].get("variant")
    findings = list(checked.findings)
    if not isinstance(told, dict) or told.get("id") != variant.id:
        findings.append(f"it is not the passport of {variant.name}")
    if findings:
        raise CheckFailedError(f"{path}: {'; '.join(findings)}", hint="Nothing was promoted.")
    return (f"The passport {path} is genuine, and says what files and record do.",)


# --- the plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A promotion, and what else is to be known before it begins.

    Attributes:
        promotion: what would be done.
        state: how far it is already.
        short: why its steps would be watched for too short a time; empty where they would not.
    """

    promotion: Promotion
    state: str
    short: str

    def lines(self) -> list[str]:
        """The plan for people."""
        one = self.promotion
        old = "no version" if one.champion is None else f"version {one.champion}"
        told = [
            f"{one.candidate_name} is to serve {one.production} at {one.location}.",
            f"  {one.reason}",
            f"  champion of {one.model} is {old}; challenger is {promotions.version_words(one)}",
        ]
        if self.state == "completed":
            return [*told, "  It is the champion already; nothing is to be done."]
        if self.state != "new":
            told.append(f"  {self.state}: it goes on where it stopped")
        told += [f"  {number}. {promotions.in_words(step, one)}" for number, step in enumerate(one.steps, start=1)]
        told += [f"note: {note}" for note in one.notes]
        return told + ([f"note: {self.short}"] if self.short else [])

    def summary(self) -> dict[str, Any]:
        """The same as plain values."""
        from registry.codec import to_jsonable

        steps = [
            {"name": step.name, "does": promotions.in_words(step, self.promotion), "watch_s": step.watch_s}
            for step in self.promotion.steps
        ]
        record = to_jsonable(self.promotion)
        return {**record, "steps": steps, "state": self.state, "too_short": self.short or None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is promoted, as the journal knows it, and where.

    Attributes:
        campaign_id: of what chose it.
        candidate_id: it.
        production: the name of what callers ask.
        work: the working folder.
        cluster: where it is in production.
        base: the folder that the cluster's paths are relative to.
    """

    campaign_id: str
    candidate_id: str
    production: str
    work: Path
    cluster: ClusterConfig
    base: Path


class BasePromoting(ABC):
    """One promotion: planned, and carried out where it is wanted; of what, subclasses say."""

    def __init__(
        self,
        task: Task,
        options: Options,
        registry: "MlflowRegistry",
        told: Told,
    ) -> None:
        """Asks nobody yet.

        Args:
            task: what is promoted, and where.
            options: how.
            registry: where its version is.
            told: hears what is done.
        """
        self._task = task
        self._options = options
        self._registry = registry
        self._told = told
        self._production = task.production

    def plan(self) -> Planned:
        """What `apply` would do; nothing is changed.

        Raises:
            InputError: it may not be promoted, or something stands in its way.
            UnreachableError: the registry or the cluster does not answer.
        """
        self._registry.check()
        journal = _read_journal(self._task.work)
        with self._place(serve=False) as place:
            wanted, state = self._wanted(journal, place, self._registered())
            if state == "new" and (journal is None or journal.unfinished() is None):
                place.rollout.snapshot()
            with self._probe(place) as probe:
                return self._told_of(wanted, state, probe, journal)

    def apply(self, *, hold: Callable[[Place], None] = lambda _: None) -> Planned:
        """Carries the promotion out, or goes on with one that was cut short.

        Args:
            hold: called at the end, while what is served on this machine is served.

        Raises:
            CheckFailedError: a limit was missed while it was watched.
            InputError: it may not be promoted, or somebody has changed what it had done.
            UnreachableError: the registry or the cluster does not answer, or refuses.
        """
        planned = self.plan()
        if planned.short:
            raise InputError(planned.short, hint="Raise --watch or --rate. Unknown never wins.")
        work = self._task.work
        with Ledger.open(work / JOURNAL) as ledger:
            journal = Journal(ledger, _now)
            self._complete_rollback(journal)
            with self._place(serve=True) as place:
                planned = self._carried_out(journal, place)
                hold(place)
        return planned

    # --- parts of it ---

    @contextmanager
    def _probe(self, place: Place) -> Iterator[Probe | None]:
        """What watches; None where nothing is watched."""
        from profiles.measure.prometheus import Prometheus

        if not self._options.watch_s:
            yield None
            return
        with ExitStack() as stack:
            own = self._own_probe(place, stack)
            if self._options.prometheus is None:
                yield own
                return
            prometheus = Prometheus(self._options.prometheus)
            prometheus.query("vector(1)")
            yield self._by_prometheus(own, place, prometheus)

    def _carried_out(self, journal: Journal, place: Place) -> Planned:
        with self._probe(place) as probe:
            registered = self._registered() or self._register()
            wanted, state = self._wanted(journal, place, registered)
            planned = self._told_of(wanted, state, probe, journal)
            promoter = Promoter(
                registry=self._registry, rollout=place.rollout, probe=probe, journal=journal, told=self._told
            )
            if state == "completed":
                promoter.check_in_force(wanted)
                self._told("it is the champion already; nothing is to be done")
            else:
                promoter.carry_out(planned.promotion)
        return replace(planned, state=journal.state(wanted))

    def _complete_rollback(self, journal: Journal) -> None:
        unfinished = journal.unfinished()
        if unfinished is None or journal.state(unfinished) != "rolling back":
            return
        self._told(f"the rollback of {unfinished.candidate_name} is completed first")
        task = self._task
        with place_of(unfinished, task.cluster, base=task.base, work=task.work) as place:
            promoter = Promoter(
                registry=self._registry, rollout=place.rollout, probe=None, journal=journal, told=self._told
            )
            promoter.roll_back(unfinished, reason="as was begun")

    def _wanted(
        self, journal: Journal | None, place: Place, registered: RegisteredVersion | None
    ) -> tuple[Promotion, str]:
        """The promotion that is under way, or a new one."""
        unfinished = None if journal is None else journal.unfinished()
        if journal is None or unfinished is None or journal.state(unfinished) == "rolling back":
            last = None if journal is None or unfinished is not None else journal.undoable()
            if last is not None and self._is_last(last, registered):
                return last, "completed"
            return self._new(journal, place, registered), "new"
        ours = (self._task.campaign_id, self._task.candidate_id, self._production)
        if (unfinished.campaign_id, unfinished.candidate_id, unfinished.production) != ours:
            raise InputError(
                f"the promotion of {unfinished.candidate_name} to {unfinished.production} is under way",
                hint="Finish it with the campaign that chose it, or end it with `burnish rollback`.",
            )
        if unfinished.location != place.rollout.location:
            raise InputError(
                f"the promotion of {unfinished.candidate_name} is under way at {unfinished.location}, not at "
                f"{place.rollout.location}",
                hint="Name the same cluster, or end it with `burnish rollback`.",
            )
        return unfinished, journal.state(unfinished)

    def _is_last(self, last: Promotion, registered: RegisteredVersion | None) -> bool:
        """Whether the last promotion is this one, and nobody has become the champion since."""
        same = (last.candidate_id, last.production) == (self._task.candidate_id, self._production)
        champion = self._registry.aliases(last.model).get(CHAMPION)
        return same and registered is not None and last.version == registered.version == champion

    def _told_of(self, wanted: Promotion, state: str, probe: Probe | None, journal: Journal | None) -> Planned:
        """The plan of a promotion with what is watched; one that was begun goes on as it was begun, or not at all."""
        left = promotions.left_to_watch(wanted, journal)
        steps = [step for step in wanted.steps if step.watch_s]
        compared = [step.name for step in steps if promotions.compares(step)]
        watched, blind = promotions.limits_watched(wanted.policy, probe, compared=bool(compared))
        if journal is not None and wanted in journal.promotions:
            promotions.check_probe(wanted, journal, probe)
            _check_watching(wanted, left, self._options)
        else:
            told = [_watched_words(watched)] if watched else []
            if compared and any(one.reference == "champion" for one in watched):
                told.append(f"Limits against the champion are watched where it answers enough: {', '.join(compared)}.")
            told += _counted_by(probe)
            watching = Watching(
                metrics=tuple(sorted({one.metric for one in watched})),
                rate_rps=self._options.rate_rps,
                prometheus=self._options.prometheus,
            )
            wanted = replace(wanted, notes=(*wanted.notes, *told, *blind), watching=None if probe is None else watching)
        return Planned(promotion=wanted, state=state, short=_too_short(watched, left, self._options.rate_rps))

    # --- what subclasses know ---

    @abstractmethod
    def _place(self, *, serve: bool) -> AbstractContextManager[Place]:
        """Where it is to be in production, open; ``serve`` says whether something will be changed."""

    @abstractmethod
    def _registered(self) -> RegisteredVersion | None:
        """The version that it is already, or None."""

    @abstractmethod
    def _register(self) -> RegisteredVersion:
        """Makes it a version."""

    @abstractmethod
    def _new(self, journal: Journal | None, place: Place, registered: RegisteredVersion | None) -> Promotion:
        """What is to be done, where nothing of it was begun."""

    @abstractmethod
    def _own_probe(self, place: Place, stack: ExitStack) -> Probe:
        """What watches by requests of our own; what it holds open is closed by the stack."""

    @abstractmethod
    def _by_prometheus(self, own: Probe, place: Place, prometheus: "Prometheus") -> Probe:
        """What watches by what a Prometheus knows, with requests of our own meanwhile."""


class Promoting(BasePromoting):
    """The promotion of what a campaign chose."""

    def __init__(self, subject: Subject, options: Options, registry: "MlflowRegistry", told: Told) -> None:
        """Asks nobody yet.

        Args:
            subject: what is promoted.
            options: how.
            registry: where its version is.
            told: hears what is done.
        """
        task = Task(
            campaign_id=subject.campaign.id,
            candidate_id=subject.candidate.id,
            production=options.production or production_name(subject.campaign.model_name),
            work=subject.work,
            cluster=subject.cluster,
            base=subject.base,
        )
        super().__init__(task, options, registry, told)
        self._subject = subject

    @contextmanager
    def _place(self, *, serve: bool) -> Iterator[Place]:
        subject = self._subject
        served = Served(candidate=subject.candidate, artifact=subject.variant.artifact, files=subject.files)
        with open_place(
            subject.cluster,
            base=subject.base,
            work=subject.work,
            production=self._production,
            served=served,
            serve=serve,
            port=self._options.port,
        ) as place:
            yield place

    def _registered(self) -> RegisteredVersion | None:
        campaign = self._subject.campaign
        return self._registry.find(
            campaign.model_name, campaign_id=campaign.id, candidate_id=self._subject.candidate.id
        )

    def _register(self) -> RegisteredVersion:
        """Sends the campaign to MLflow, where the selected candidate becomes a version."""
        self._told("the campaign is recorded in MLflow")
        reporting.publish(self._subject.campaign, self._subject.work)
        registered = self._registered()
        if registered is None:
            raise InputError(
                f"MLflow has no version of {self._subject.campaign.model_name} for {self._subject.candidate.name}",
                hint="Its files have to be on this machine when the campaign is recorded.",
            )
        return registered

    def _new(self, journal: Journal | None, place: Place, registered: RegisteredVersion | None) -> Promotion:
        subject, options, rollout = self._subject, self._options, place.rollout
        campaign = subject.campaign
        aliases = self._registry.aliases(campaign.model_name)
        champion = self._version(aliases.get(CHAMPION))
        challenger = registered or self._described()
        policy = campaign.verdict.policy
        at_once = promotions.at_once(policy, challenger, champion)
        serving = rollout.serving()
        beside = serving != "" and not at_once
        version = challenger.version
        if serving and champion is None:
            raise InputError(
                f"{self._production} serves something at {rollout.location}, and no version of {campaign.model_name} "
                "is the champion, so that nobody knows whether the two take the same requests",
                hint=f"Give the alias {CHAMPION} to the version that it serves, or name another Model with "
                "--production.",
            )
        if champion is not None and version == champion.version and serving:
            raise InputError(
                f"{subject.candidate.name} is the champion of {campaign.model_name} already: version {version}",
                hint="There is nothing to promote.",
            )
        begun = 0 if journal is None else sum(journal.state(one) != "new" for one in journal.promotions)
        return Promotion(
            id=promotions.identity(
                campaign, production=self._production, location=rollout.location, version=version, begun_before=begun
            ),
            model=campaign.model_name,
            production=self._production,
            challenger=rollout.challenger,
            experiment=rollout.experiment,
            location=rollout.location,
            campaign_id=campaign.id,
            candidate_id=subject.candidate.id,
            candidate_name=subject.candidate.name,
            version=version,
            fingerprint=challenger.fingerprint,
            champion=aliases.get(CHAMPION),
            challenger_before=aliases.get(CHALLENGER),
            policy=policy,
            steps=promotions.steps_of(
                weights=options.weights, mirror=options.mirror, watch_s=options.watch_s, beside=beside
            ),
            reason=campaign.verdict.sentence,
            notes=(
                *subject.notes,
                *self._place_notes(),
                *_notes(beside=beside, at_once=at_once, judged=subject.samples is not None, options=options),
            ),
        )

    def _place_notes(self) -> tuple[str, ...]:
        if not isinstance(self._subject.cluster, LocalConfig):
            return ()
        return ("On this machine servers run while the command does: a rehearsal. --hold goes on serving.",)

    def _version(self, version: str | None) -> RegisteredVersion | None:
        model = self._subject.campaign.model_name
        return None if version is None else self._registry.version(model, version)

    def _described(self) -> RegisteredVersion:
        """What the registry will say of the challenger."""
        artifact = self._subject.variant.artifact
        return RegisteredVersion(
            model=self._subject.campaign.model_name,
            version=UNREGISTERED,
            fingerprint="",
            candidate_id=self._subject.candidate.id,
            candidate=self._subject.candidate.name,
            signature=promotions.described(artifact.inputs, artifact.outputs),
        )

    def _own_probe(self, place: Place, stack: ExitStack) -> Probe:
        from profiles.measure.live import RequestProbe, made_up

        subject = self._subject
        loaded, fidelity = None, None
        if subject.samples is not None:
            loaded, fidelity = self._fidelity(subject.samples)
            stack.callback(fidelity.close)
        return RequestProbe(
            production=place.rollout.production,
            challenger=place.rollout.challenger,
            target_of=place.target_of,
            inputs=made_up(subject.variant.artifact.inputs) if loaded is None else self._inputs(loaded),
            rate_rps=self._options.rate_rps,
            fidelity=fidelity,
            judged=frozenset() if fidelity is None else self._judged(),
        )

    def _by_prometheus(self, own: Probe, place: Place, prometheus: "Prometheus") -> Probe:
        from profiles.deploy.envoy_config import FLUSH_S as FLUSH_HERE_S
        from profiles.measure.prometheus import FLUSH_S, PrometheusProbe

        options = self._options
        flush_s = FLUSH_HERE_S if isinstance(self._subject.cluster, LocalConfig) else FLUSH_S
        return PrometheusProbe(
            prometheus=prometheus,
            production=place.rollout.production,
            challenger=place.rollout.challenger,
            meanwhile=own,
            # What happened last is in the histogram after a flush, and scraped at the second scrape from then on.
            settle=lambda: time.sleep(flush_s + 2 * options.scrape_s),
            matchers=options.matchers,
        )

    def _fidelity(self, samples: Path) -> tuple["Samples", LiveFidelity]:
        from optimize.samples import load_samples

        subject = self._subject
        loaded = load_samples(samples)
        return loaded, LiveFidelity(
            subject.campaign,
            subject.candidate,
            samples=samples,
            loaded=loaded,
            store=FolderStore(subject.work),
            base=subject.base,
        )

    def _inputs(self, loaded: "Samples") -> Mapping[str, Any]:
        from optimize.adaptation import adapt

        return adapt(loaded.inputs, self._subject.variant.adaptation)

    def _judged(self) -> frozenset[str]:
        """What live answers will tell: of all that can be judged, what the campaign knew of the candidate."""
        fidelities = [one for one in self._subject.campaign.fidelities if one.variant_id == self._subject.variant.id]
        return frozenset(name for one in fidelities for name in one.metrics) & JUDGED


def _notes(*, beside: bool, at_once: bool, judged: bool, options: Options) -> tuple[str, ...]:
    told = []
    if at_once:
        told.append(
            "It takes or gives other tensors than the champion, so that it takes its place at once, never by weights: "
            "callers have to change with it."
        )
    elif not beside:
        told.append("Nothing is in production yet, so that there is nobody to share requests with.")
    if not options.watch_s:
        return (*told, "Nothing is watched: --watch 0.")
    if beside:
        told.append(
            "Envoy sends a request that fails with a 5xx again, up to 5 times: callers see slowness, not failure, so "
            "that latency tells of failures, too."
        )
        told.append(
            "Replies to mirrored requests are dropped, and those to callers are not seen: what the challenger answers "
            "is judged by requests of our own alone."
        )
    shared = ", half of them to the challenger itself" if beside else ""
    source = (
        "Envoy's histogram, as Prometheus has it: of all traffic, no finer than its buckets"
        if options.prometheus
        else f"requests of our own alone ({options.rate_rps:g} a second{shared})"
    )
    told.append(f"Latency is that of {source}.")
    if not judged:
        told.append("Live answers are judged where the evaluation samples are known (a campaign file, or --samples).")
    return tuple(told)


def _watched_words(limits: Sequence[Constraint]) -> str:
    loads = " (at the load that there is)" if any(one.metric.startswith("latency_") for one in limits) else ""
    return f"Watched on live traffic{loads}: {', '.join(f'`{one.text}`' for one in limits)}."


def _counted_by(probe: Probe | None) -> list[str]:
    """Whose counts Prometheus tells, where it is asked."""
    from profiles.measure.prometheus import PrometheusProbe

    if not isinstance(probe, PrometheusProbe):
        return []
    envoys, kind = probe.envoys(), probe.who.removeprefix("the ")
    if not envoys:
        return [f"The Prometheus at {probe.prometheus.url} knows no {kind} that has led requests to it yet."]
    return [f"What Prometheus tells is of {len(envoys)} {kind}, added up by who answered: {', '.join(envoys)}."]


def _check_watching(begun: Promotion, left: Sequence[PromotionStep], options: Options) -> None:
    """Returns where a promotion that was begun goes on with as many requests, and Prometheus where it had that.

    Raises:
        InputError: it would be watched by less.
    """
    watching = begun.watching
    if watching is None or not left:
        return
    asked = []
    if options.rate_rps < watching.rate_rps:
        asked.append(f"--rate {watching.rate_rps:g}")
    if watching.prometheus is not None and options.prometheus is None:
        asked.append(f"--prometheus {watching.prometheus}")
    if asked:
        raise InputError(
            f"the promotion of {begun.candidate_name} was begun with {' and '.join(asked)}, and would be watched by "
            "less now",
            hint="Go on as it was begun, or end it with `burnish rollback`.",
        )


def _too_short(watched: Sequence[Constraint], left: Sequence[PromotionStep], rate_rps: float) -> str:
    """Why the requests of a watched step are too few to decide on a limit; empty where they are not."""
    from profiles.measure.live import requests_needed, requests_watched

    def needed(limits: Iterable[Constraint]) -> int:
        return max((requests_needed(one.metric) for one in limits), default=0)

    found = []
    for step in left:
        # Half go to the challenger itself; in the champion's place it gets all.
        wanted = {"challenger": (needed(watched), 2.0 if step.action == "swap" else 1.0)}
        if promotions.compares(step):
            shared = 1 - step.percent / 100 if step.action == "weights" else 1.0
            wanted["champion"] = (needed(one for one in watched if one.reference == "champion"), shared)
        for who, (count, share) in wanted.items():
            there = math.floor(requests_watched(rate_rps, step.watch_s) * share)
            if there < count:
                found.append((2 * count / share / rate_rps, step, who, there, count))
    if not found:
        return ""
    long_s, step, who, there, count = max(found, key=lambda one: one[0])
    return (
        f"{step.watch_s:g} s at {rate_rps:g} requests a second give the {who} {there} requests in the step "
        f"{step.name}, and the limits take {count} to decide on: watch for {math.ceil(long_s)} s, or send more"
    )


# --- back, and who was when ------------------------------------------------------------------------------------


def roll_back(work: Path, *, cluster: Path | None, campaign_file: Path | None, reason: str, told: Told) -> Promotion:
    """Takes the last promotion of a working folder back, and returns it.

    Args:
        work: the working folder.
        cluster: a file with a section ``cluster:``; None for this machine, or the campaign file's.
        campaign_file: names the cluster, where ``cluster`` does not.
        reason: why, for the history.
        told: hears what is done.

    Raises:
        InputError: there is nothing to roll back, the cluster is another one, or somebody has changed what was done.
        UnreachableError: the registry or the cluster does not answer.
    """
    config, base = load_cluster(cluster), work if cluster is None else cluster.resolve().parent
    if campaign_file is not None and cluster is None:
        from optimize.config import load_campaign

        config, base = load_campaign(campaign_file).cluster, campaign_file.resolve().parent
    if not (work / JOURNAL).is_file():
        raise InputError(f"nothing was promoted from {work}", hint="Name the working folder of a campaign.")
    registry = open_registry(work)
    registry.check()
    with Ledger.open(work / JOURNAL) as ledger:
        journal = Journal(ledger, _now)
        last = journal.undoable()
        if last is None:
            raise InputError(f"all that was promoted from {work} was rolled back already")
        with place_of(last, config, base=base, work=work) as place:
            promoter = Promoter(registry=registry, rollout=place.rollout, probe=None, journal=journal, told=told)
            promoter.roll_back(last, reason=reason)
    return last


@contextmanager
def place_of(last: Promotion, config: ClusterConfig, *, base: Path, work: Path) -> Iterator[Place]:
    """Where a promotion was, to take it back.

    Raises:
        InputError: it was elsewhere.
    """
    if last.resource == "pipeline":
        opened = open_pipeline_place(config, base=base, work=work, production=last.production)
    else:
        opened = open_place(config, base=base, work=work, production=last.production, served=None, serve=False)
    with opened as place:
        _check_location(last, place)
        yield place


def _check_location(last: Promotion, place: Place) -> None:
    if last.location != place.rollout.location:
        raise InputError(
            f"{last.candidate_name} was promoted at {last.location}, not at {place.rollout.location}",
            hint="Name the same cluster with --cluster or --campaign.",
        )


def after_interruption(work: Path, back: str) -> tuple[str, str]:
    """How things stand once a promotion, or the way back from one, was interrupted; and what goes on or back.

    Args:
        work: the working folder.
        back: the command that takes the promotion back.
    """
    journal = _read_journal(work)
    last = journal.promotions[-1] if journal is not None and journal.promotions else None
    if journal is None or last is None:
        return "Nothing was changed.", "The same command begins anew."
    name, state = last.candidate_name, journal.state(last)
    old = "no version" if last.champion is None else f"version {last.champion}"
    if state in {"new", "rolled back"}:
        return f"All is as it was before {name}: {old} is the champion.", "The same command begins anew."
    if state == "rolling back":
        return f"{name} is not taken back whole yet.", f"`{back}` completes it."
    done = journal.done(last)
    if state == "completed":
        return f"{name} is the champion of {last.model}, and nothing is under way.", f"Back to what was: `{back}`."
    if CHAMPION in done:
        left = f"{last.experiment} and {last.challenger} are left to be taken away"
        return f"{name} is the champion already; {left}.", f"The same command does it; `{back}` goes back."
    at = next((step.name for step in last.steps if step.name not in done), promotions.WHOLE)
    return (
        f"The promotion of {name} stands at {at}; {old} is the champion.",
        f"The same command goes on there; `{back}` goes back.",
    )


def open_registry(work: Path) -> "MlflowRegistry":
    """The registry of a working folder's campaign, not connected yet."""
    # MLflow takes seconds to import.
    from registry.mlflow_registry import MlflowRegistry

    return MlflowRegistry(store_uri(reporting.named_store(work), work), work)


def history(model: str, work: Path) -> tuple[tuple[Reign, ...], str]:
    """Who was the champion when; see `registry.promotion.history`.

    Raises:
        InputError: there is no such registered model, or no store.
        UnreachableError: the registry does not answer.
    """
    if not (reporting.named_store(work) or os.environ.get("MLFLOW_TRACKING_URI") or (work / "mlflow.db").is_file()):
        raise InputError(
            f"there is no tracking store in {work}", hint="Name the working folder with --work, or MLFLOW_TRACKING_URI."
        )
    registry = open_registry(work)
    registry.check()
    return promotions.history(model, registry)


def _read_journal(work: Path) -> Journal | None:
    path = work / JOURNAL
    return Journal(Ledger.read(path), _now) if path.is_file() else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
