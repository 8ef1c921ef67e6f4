"""A promotion as the commands carry it out, of a model or a pipeline: planned, watched, gone on with, completed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimize.cluster_config import ClusterConfig
from optimize.production import Place
from optimize.rollback import JOURNAL, Told, now, place_of, read_journal
from registry import promotion as promotions
from registry.errors import InputError
from registry.keyless import SignerIdentity
from registry.ledger import Ledger
from registry.ports import Probe, RegisteredVersion
from registry.promotion import CHALLENGER, CHAMPION, UNREGISTERED, Journal, Promoter
from registry.records import Constraint, Policy, Promotion, PromotionStep, Watching

if TYPE_CHECKING:
    from optimize.samples import Samples
    from profiles.measure.prometheus import Prometheus
    from registry.mlflow_registry import MlflowRegistry


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
        samples: the file of evaluation samples, where it is known.
    """

    campaign_id: str
    candidate_id: str
    production: str
    work: Path
    cluster: ClusterConfig
    base: Path
    samples: Path | None


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
        journal = read_journal(self._task.work)
        with self._place(serve=False) as place:
            wanted, state = self._wanted(journal, place, self._registered())
            if state == "new" and (journal is None or journal.unfinished() is None):
                # What stands in its way is told.
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
        self._complete_rollback()
        planned = self.plan()
        if planned.short:
            raise InputError(planned.short, hint="Raise --watch or --rate. Unknown never wins.")
        with Ledger.open(self._task.work / JOURNAL) as ledger, self._place(serve=True) as place:
            planned = self._carried_out(Journal(ledger, now), place)
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

    def _complete_rollback(self) -> None:
        """Completes a way back that was cut short: what is there until then is half of one and half of another."""
        task = self._task
        if not (task.work / JOURNAL).is_file():
            return
        with Ledger.open(task.work / JOURNAL) as ledger:
            journal = Journal(ledger, now)
            unfinished = journal.unfinished()
            if unfinished is None or journal.state(unfinished) != "rolling back":
                return
            self._told(f"the rollback of {unfinished.candidate_name} is completed first")
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
        if journal is None or unfinished is None:
            last = None if journal is None else journal.undoable()
            if last is not None and self._is_last(last, registered):
                _check_there(last, place)
                return last, "completed"
            return self._new(journal, place, registered), "new"
        if journal.state(unfinished) == "rolling back":
            raise InputError(
                f"{unfinished.candidate_name} is not taken back whole yet, and until then nothing can be planned",
                hint="`burnish rollback` completes it; --apply does so first.",
            )
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

    def _drafted(
        self,
        journal: Journal | None,
        place: Place,
        registered: RegisteredVersion | None,
        *,
        model: str,
        candidate_name: str,
        policy: Policy,
        beside: bool,
        reason: str,
        notes: Sequence[str],
        resource: Literal["model", "pipeline"],
    ) -> Promotion:
        """A promotion that was not begun.

        Args:
            journal: what was promoted before; None where nothing was.
            place: of production.
            registered: the version that it is already, or None.
            model: the registered model.
            candidate_name: what is promoted, for people.
            policy: whose limits are watched.
            beside: whether challenger and champion are served beside each other.
            reason: why it is promoted.
            notes: what is to be known, a sentence each.
            resource: what is in production.
        """
        task, options, rollout = self._task, self._options, place.rollout
        aliases = self._registry.aliases(model)
        version = UNREGISTERED if registered is None else registered.version
        return Promotion(
            id=promotions.identity(
                task.campaign_id,
                task.candidate_id,
                production=task.production,
                location=rollout.location,
                version=version,
                begun_before=0 if journal is None else sum(journal.state(one) != "new" for one in journal.promotions),
            ),
            model=model,
            production=task.production,
            challenger=rollout.challenger,
            experiment=rollout.experiment,
            location=rollout.location,
            campaign_id=task.campaign_id,
            candidate_id=task.candidate_id,
            candidate_name=candidate_name,
            version=version,
            fingerprint="" if registered is None else registered.fingerprint,
            champion=aliases.get(CHAMPION),
            challenger_before=aliases.get(CHALLENGER),
            policy=policy,
            steps=promotions.steps_of(
                weights=options.weights, mirror=options.mirror, watch_s=options.watch_s, beside=beside
            ),
            reason=reason,
            notes=tuple(notes),
            resource=resource,
        )

    @cached_property
    def _samples(self) -> "Samples | None":
        """The evaluation samples, read once; None where they are not known."""
        from optimize.samples import load_samples

        return None if self._task.samples is None else load_samples(self._task.samples)

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


# --- what is watched --------------------------------------------------------------------------------------------


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


def _check_there(last: Promotion, place: Place) -> None:
    """Returns where a promotion was to this very place.

    Raises:
        InputError: it was elsewhere, so that the alias says nothing of what is served here.
    """
    if last.location != place.rollout.location:
        raise InputError(
            f"{last.candidate_name} became the champion at {last.location}, not at {place.rollout.location}",
            hint="Name the same cluster; or take it back there with `burnish rollback`, and promote it here then.",
        )


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
