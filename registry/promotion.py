"""A candidate becomes the champion, step by step, or all is as it was. Pure over the ports; nothing is asked here.

Before each step the journal says what is about to be done, after it what came of it, so that whoever is killed between
two lines goes on where that was. Whatever goes wrong before the alias ``champion`` has moved leads back to the snapshot
that was taken before the first step; after that, what is left is to clean up.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from registry.codec import canonical, digest
from registry.errors import (
    BurnishError,
    CheckFailedError,
    InputError,
    NoVariantError,
    StorageError,
    UnreachableError,
)
from registry.ledger import Ledger
from registry.ports import ModelRegistry, Probe, RegisteredVersion, Rollout
from registry.records import (
    Campaign,
    Candidate,
    Constraint,
    Estimate,
    Observation,
    Policy,
    Promotion,
    PromotionEvent,
    PromotionStep,
    Reign,
    RolloutSnapshot,
    TensorSpec,
)
from registry.selection_limits import References, judge_against, label
from registry.selection_table import Key

CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
WEIGHTS: Final = (10, 50, 100)
"""Percent of the requests that the challenger answers, step by step, where the user names none."""
WHOLE: Final = "promotion"
ROLLBACK: Final = "rollback"
FAILED_SHARE: Final = "failed_share"
MOST_FAILED = Constraint(text="failed_share <= 1%", metric=FAILED_SHARE, op="<=", limit=0.01)
"""What every challenger is held to while it is watched, whatever the policy says."""
UNREGISTERED: Final = "(not registered yet)"
"""The version of a plan whose first step registers it."""
UNNAMED: Final = "unnamed"
"""Under it an `Observation` counts replies that do not say who answered."""
_COMPARED_UP_TO = 50
"""Up to such a share of the challenger's the champion answers enough requests to be compared with."""
# As unlikely a split is not the one that was asked for.
_UNLIKELY = 1e-9

Phase = Literal["intent", "done", "failed"]
State = Literal["new", "under way", "rolling back", "completed", "rolled back"]


# --- what is to be done ----------------------------------------------------------------------------------------


def chosen(campaign: Campaign) -> Candidate:
    """The candidate that a campaign's verdict lets be promoted.

    Raises:
        NoVariantError: it selected none.
        InputError: its level of proof is too low, or it selected what is the champion already.
    """
    verdict = campaign.verdict
    if verdict.selected is None:
        raise NoVariantError(
            f"the campaign {campaign.name} selected nothing that could be promoted: {verdict.sentence}",
            hint="`burnish select ... --record` judges its results by another policy.",
        )
    if verdict.provisional:
        raise InputError(
            f"the verdict of the campaign {campaign.name} is provisional: "
            + (verdict.cut_short or f"{campaign.level} proves too little"),
            hint="Run it again with more minutes; it goes on where it stopped."
            if verdict.cut_short
            else "Run it with `level: standard` or `level: proof`.",
        )
    candidate = next(one for one in campaign.candidates if one.id == verdict.selected)
    if campaign.champion is not None and campaign.champion.candidate_id == candidate.id:
        raise InputError(
            f"the campaign {campaign.name} found nothing better than the champion, {candidate.name}: it stays",
            hint="There is nothing to promote.",
        )
    return candidate


def described(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """A signature as `RegisteredVersion` has it: name, type and shape of each tensor, -1 for a size that is free."""

    def told(specs: Sequence[TensorSpec]) -> list[list[Any]]:
        return sorted(
            [one.name, one.dtype, [size if isinstance(size, int) else -1 for size in one.shape]] for one in specs
        )

    return canonical([told(inputs), told(outputs)])


def at_once(policy: Policy, challenger: RegisteredVersion, champion: RegisteredVersion | None) -> bool:
    """Whether the two take or give other tensors, so that they cannot share requests.

    Raises:
        InputError: the policy does not allow that, or it is not known.
    """
    if champion is None:
        return False
    if None in (challenger.signature, champion.signature):
        unknown = champion if champion.signature is None else challenger
        raise InputError(
            f"whether version {challenger.version} of {challenger.model} takes and gives what version "
            f"{champion.version} does is not known: the registry has no signature of version {unknown.version}",
            hint="Log that model with its signature.",
        )
    if challenger.signature == champion.signature:
        return False
    if policy.signature == "same":
        raise InputError(
            f"version {challenger.version} of {challenger.model} takes or gives other tensors than the champion, "
            f"version {champion.version}: {challenger.signature}, not {champion.signature}",
            hint="Callers would have to change with it. The policy allows that with `signature: may_change`.",
        )
    return True


def steps_of(
    *, weights: Sequence[int], mirror: int, watch_s: float, beside: bool, swap_watch_s: float = 0.0
) -> tuple[PromotionStep, ...]:
    """The steps of a promotion.

    Args:
        weights: percent of the requests that the challenger answers, one step each.
        mirror: percent of the requests that it gets copies of before; 0 for no such step.
        watch_s: how long each of these is watched.
        beside: whether challenger and champion are served beside each other at all; where not, the challenger takes
            the champion's place at once.
        swap_watch_s: how long it is watched in that place, before it is called the champion.

    Raises:
        InputError: weights, share or time cannot be.
    """
    if not math.isfinite(watch_s) or watch_s < 0:
        raise InputError(
            f"a step cannot be watched for {watch_s} s", hint="It is a number of seconds, 0 for not at all."
        )
    if not 0 <= mirror <= 100:
        raise InputError(f"a mirror cannot get {mirror} % of the requests", hint="It is 1 to 100; 0 for no mirror.")
    if list(weights) != sorted(set(weights)) or not weights or weights[0] < 1 or weights[-1] != 100:
        raise InputError(
            f"the weights are {', '.join(map(str, weights)) or 'none'}",
            hint="They are percentages that grow from 1 or more to 100: 10,50,100.",
        )
    shared: list[PromotionStep] = []
    if beside:
        shared = [PromotionStep(name="load", action="load")]
        if mirror:
            shared.append(PromotionStep(name="mirror", action="mirror", percent=mirror, watch_s=watch_s))
        shared += [
            PromotionStep(name=f"weights-{percent}", action="weights", percent=percent, watch_s=watch_s)
            for percent in weights
        ]
    return (
        PromotionStep(name="register", action="register"),
        *shared,
        PromotionStep(name="swap", action="swap", percent=100, watch_s=swap_watch_s if beside else watch_s),
        PromotionStep(name="champion", action="champion"),
        PromotionStep(name="unload", action="unload"),
    )


def in_words(step: PromotionStep, promotion: Promotion) -> str:
    """What a step does, for people."""
    version, old = version_words(promotion), promotion.champion
    split = f"the split {promotion.experiment} ends, and {promotion.challenger} is unloaded"
    told = {
        "register": f"{version} of {promotion.model} gets the alias {CHALLENGER}",
        "load": f"{promotion.challenger} is served beside {promotion.production}",
        "mirror": f"{promotion.challenger} gets copies of {step.percent} % of the requests to {promotion.production}; "
        "nobody gets its answers",
        "weights": f"{promotion.challenger} answers {step.percent} % of the requests to {promotion.production}",
        "swap": f"{promotion.production} serves {promotion.candidate_name}",
        "champion": f"the alias {CHAMPION} goes {f'from version {old} ' if old else ''}to {version}",
        "unload": split if is_beside(promotion) else f"nothing is left beside {promotion.production}",
    }[step.action]
    return f"{told}; watched for {step.watch_s:g} s" if step.watch_s else told


def version_words(promotion: Promotion) -> str:
    """The version that becomes the champion, for people."""
    return "a new version" if promotion.version == UNREGISTERED else f"version {promotion.version}"


def is_beside(promotion: Promotion) -> bool:
    """Whether challenger and champion are served beside each other."""
    return any(step.action == "load" for step in promotion.steps)


def compares(step: PromotionStep) -> bool:
    """Whether the champion answers at least half of the requests while a step is watched."""
    return step.action == "mirror" or (step.action == "weights" and step.percent <= _COMPARED_UP_TO)


def limits_watched(
    policy: Policy, probe: Probe | None, *, compared: bool = True
) -> tuple[tuple[Constraint, ...], tuple[str, ...]]:
    """The policy's limits that are watched on live traffic, and why each other one is not.

    Args:
        policy: that chose the challenger.
        probe: watches; None where nothing is watched.
        compared: whether the champion answers beside the challenger, see `compares`.
    """
    watched, told = [], []
    for one in (*policy.constraints, MOST_FAILED):
        if probe is None or not probe.sees(one.metric):
            if one is not MOST_FAILED:
                told.append(f"`{one.text}` cannot be watched here; it was judged by the campaign")
        elif one.relative and one.reference == "baseline":
            told.append(f"`{one.text}` is relative to the baseline, which serves nobody; it was judged by the campaign")
        elif one.reference == "champion" and not (compared and _is_latency(one.metric)):
            why = "of the champion only latency is seen" if compared else "the champion does not answer beside it"
            told.append(
                f"`{one.text}` cannot be watched: {why}. The campaign judged it, by measuring both in turns; a limit "
                "with a number of its own would be watched, too"
            )
        else:
            watched.append(replace(one, load=None))
    return tuple(watched), tuple(told)


def _is_latency(metric: str) -> bool:
    return metric.startswith("latency_")


# --- the journal -----------------------------------------------------------------------------------------------


class Journal:
    """What became of the promotions of a working folder, over its ledger."""

    def __init__(self, ledger: Ledger, now: Callable[[], str]) -> None:
        """Begins nothing yet.

        Args:
            ledger: open, so that nobody else promotes from this folder.
            now: the time, in ISO 8601, UTC.
        """
        self._ledger = ledger
        self.now = now

    @property
    def promotions(self) -> tuple[Promotion, ...]:
        """All that were begun, in that order."""
        return tuple(entry.record for entry in self._ledger.entries("promotion"))

    def snapshot(self, promotion: Promotion) -> RolloutSnapshot | None:
        """What was there before it."""
        found: RolloutSnapshot | None = self._ledger.find("promotion-snapshot", {"promotion": promotion.id})
        return found

    def events(self, promotion: Promotion) -> tuple[PromotionEvent, ...]:
        """What was done of it, in order."""
        entries = self._ledger.entries("promotion-event")
        return tuple(entry.record for entry in entries if entry.record.promotion_id == promotion.id)

    def done(self, promotion: Promotion) -> frozenset[str]:
        """The names of the steps that are done."""
        return frozenset(one.step for one in self.events(promotion) if one.phase == "done")

    def intent(self, promotion: Promotion, step: str) -> PromotionEvent | None:
        """The last word on what a step is about to do; None where it was never begun."""
        events = self.events(promotion)
        return next((one for one in reversed(events) if (one.step, one.phase) == (step, "intent")), None)

    def state(self, promotion: Promotion) -> State:
        """How far it is."""
        done = self.done(promotion)
        if ROLLBACK in done:
            return "rolled back"
        if self.intent(promotion, ROLLBACK) is not None:
            return "rolling back"
        if WHOLE in done:
            return "completed"
        return "under way" if self.events(promotion) else "new"

    def unfinished(self) -> Promotion | None:
        """The promotion that was begun and has come to no end."""
        for promotion in reversed(self.promotions):
            if self.state(promotion) in {"new", "under way", "rolling back"}:
                return promotion
        return None

    def undoable(self) -> Promotion | None:
        """The last promotion that was not rolled back."""
        return next((one for one in reversed(self.promotions) if self.state(one) != "rolled back"), None)

    def begin(self, promotion: Promotion) -> None:
        """Keeps what is to be done; once."""
        if self._ledger.find("promotion", {"promotion": promotion.id}) is None:
            self._ledger.commit("promotion", promotion.candidate_name, {"promotion": promotion.id}, promotion)

    def keep(self, promotion: Promotion, snapshot: RolloutSnapshot) -> RolloutSnapshot:
        """Keeps what was there before the first step."""
        return self._ledger.commit("promotion-snapshot", promotion.production, {"promotion": promotion.id}, snapshot)

    def add(
        self,
        promotion: Promotion,
        step: str,
        phase: Phase,
        detail: str = "",
        observation: Observation | None = None,
    ) -> None:
        """Adds a line, which survives any kill once this returns."""
        event = PromotionEvent(
            promotion_id=promotion.id,
            number=len(self.events(promotion)) + 1,
            step=step,
            phase=phase,
            at=self.now(),
            detail=detail,
            observation=observation,
        )
        where = {"promotion": promotion.id, "number": event.number}
        self._ledger.commit("promotion-event", f"{step} {phase}", where, event)


def left_to_watch(promotion: Promotion, journal: Journal | None) -> tuple[PromotionStep, ...]:
    """The steps that are still to be watched."""
    done: frozenset[str] = frozenset() if journal is None else journal.done(promotion)
    return tuple(step for step in promotion.steps if step.watch_s and step.name not in done)


def check_probe(promotion: Promotion, journal: Journal | None, probe: Probe | None) -> None:
    """Returns where what is left of a promotion can be watched as it was to be when it began.

    Raises:
        InputError: it would be watched by less; nothing was done.
    """
    left = left_to_watch(promotion, journal)
    if not left:
        return
    if probe is None:
        raise InputError(
            f"the step {left[0].name} is to be watched for {left[0].watch_s:g} s, and nothing watches",
            hint="Go on with --watch as it was begun, or end it with `burnish rollback`.",
        )
    events = () if journal is None else journal.events(promotion)
    seen = {name for one in events if one.observation for name in one.observation.challenger}
    seen |= set() if promotion.watching is None else set(promotion.watching.metrics)
    for limit in promotion.policy.constraints:
        if limit.metric in seen and not probe.sees(limit.metric):
            raise InputError(
                f"the promotion of {promotion.candidate_name} was begun with `{limit.text}` watched, and it cannot be "
                "now",
                hint="Go on with the campaign file or --samples, as it was begun, or end it with `burnish rollback`.",
            )


def identity(
    campaign_id: str, candidate_id: str, *, production: str, location: str, version: str, begun_before: int
) -> str:
    """The id of a promotion; another one each time that it is begun anew.

    Args:
        campaign_id: of what chose the candidate.
        candidate_id: what is promoted.
        production: the name of what callers ask.
        location: where that is.
        version: of the registered model.
        begun_before: how many promotions were begun from the working folder before.
    """
    return digest([campaign_id, candidate_id, production, location, version, begun_before])


# --- doing it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoter:
    """Carries promotions out, and takes them back.

    Attributes:
        registry: of the versions.
        rollout: where the model is in production.
        probe: watches; None where nothing is watched.
        journal: of the working folder.
        told: hears what is done, a line each.
    """

    registry: ModelRegistry
    rollout: Rollout
    probe: Probe | None
    journal: Journal
    told: Callable[[str], None]

    def carry_out(self, promotion: Promotion) -> None:
        """Does what is left of a promotion, and returns when the candidate is the champion.

        Raises:
            CheckFailedError: a limit was missed, or could not be decided on, while it was watched; all is as it was.
            InputError: somebody moved an alias, or changed the version or the production Model; what the promotion had
                done is undone, and what they did is left. Or a step that is to be watched cannot be, or not as those
                before it were; then nothing is done.
            UnreachableError: something did not answer, or refused. All is as it was, or the message says what is left.
        """
        journal = self.journal
        check_probe(promotion, journal, self.probe)
        snapshot = journal.snapshot(promotion)
        if snapshot is None:
            # What stands in the way is found before anything is begun.
            found = self.rollout.snapshot()
            journal.begin(promotion)
            snapshot = journal.keep(promotion, found)
        if snapshot.serving == "" and promotion.champion is not None:
            self.told(f"nothing serves {promotion.production} yet, though version {promotion.champion} is the champion")
        step = promotion.steps[0]
        try:
            for step in promotion.steps:
                if step.name not in journal.done(promotion):
                    self._do(promotion, step, snapshot)
            journal.add(promotion, WHOLE, "done")
        except BaseException as error:
            # Ctrl-C, too, leaves the old champion serving.
            self._give_up(promotion, step, error)
            raise

    def roll_back(self, promotion: Promotion, *, reason: str) -> None:
        """Makes all as it was before a promotion, and returns when what is in force is equal to that.

        Raises:
            InputError: it never began, or was rolled back, or somebody has changed since what it had done.
            UnreachableError: something did not answer, or refused; the same again completes it.
        """
        state, snapshot = self.journal.state(promotion), self.journal.snapshot(promotion)
        if state == "new":
            # Killed before its first step: there is nothing to undo.
            self.journal.add(promotion, ROLLBACK, "done", reason)
            return
        if state == "rolled back" or snapshot is None:
            raise InputError(
                f"there is nothing to roll back of {promotion.candidate_name}",
                hint="`burnish history` tells who was when.",
            )
        if state == "completed":
            found = self.registry.aliases(promotion.model).get(CHAMPION)
            if found != promotion.version:
                raise _moved(promotion, CHAMPION, found, promotion.version)
            self._check_serving(promotion, snapshot)
        self._undo(promotion, reason, add=self.journal.add)

    def check_in_force(self, promotion: Promotion) -> None:
        """Returns where what a completed promotion has done is as it was left.

        Raises:
            InputError: somebody has changed what the production Model serves.
            UnreachableError: it cannot be asked.
        """
        snapshot = self.journal.snapshot(promotion)
        if snapshot is not None:
            self._check_serving(promotion, snapshot)

    # --- steps ---

    def _do(self, promotion: Promotion, step: PromotionStep, snapshot: RolloutSnapshot) -> None:
        self._check_unmoved(promotion)
        self._check_serving(promotion, snapshot)
        told = in_words(step, promotion)
        self.told(told)
        detail = self.rollout.planned(snapshot) if step.action == "swap" else told
        self.journal.add(promotion, step.name, "intent", detail)
        self._act(promotion, step, snapshot)
        observation = self._watched(promotion, step) if step.watch_s else None
        self.journal.add(promotion, step.name, "done", _seen(observation), observation)

    def _act(self, promotion: Promotion, step: PromotionStep, snapshot: RolloutSnapshot) -> None:
        match step.action:
            case "register":
                self.registry.set_alias(promotion.model, CHALLENGER, promotion.version)
            case "load":
                self.rollout.load(snapshot)
            case "mirror":
                self.rollout.mirror(step.percent)
            case "weights":
                self.rollout.weights(step.percent)
            case "swap":
                self.rollout.swap(snapshot)
            case "champion":
                self._crown(promotion)
            case "unload":
                self.rollout.unload()

    def _crown(self, promotion: Promotion) -> None:
        registry, model = self.registry, promotion.model
        registry.set_alias(model, CHAMPION, promotion.version)
        intended = self.journal.intent(promotion, "champion")
        registry.crown(
            Reign(
                model=model,
                version=promotion.version,
                since=self.journal.now() if intended is None else intended.at,
                how="promoted",
                reason=promotion.reason,
                candidate=promotion.candidate_name,
                promotion_id=promotion.id,
                location=promotion.location,
            )
        )
        if registry.aliases(model).get(CHALLENGER) == promotion.version:
            registry.set_alias(model, CHALLENGER, None)

    def _watched(self, promotion: Promotion, step: PromotionStep) -> Observation | None:
        if self.probe is None:
            return None
        observation = self.probe.watch(step)
        for note in observation.notes:
            self.told(f"note: {note}")
        problems = judge_watch(promotion.policy, self.probe, step, observation)
        if problems:
            self.journal.add(promotion, step.name, "failed", "; ".join(problems), observation)
            raise CheckFailedError(
                f"{promotion.candidate_name} is not promoted: {'; '.join(problems)} ({in_words(step, promotion)})",
                hint=f"The champion serves as before. The journal has all that was seen: {step.name}.",
            )
        return observation

    # --- what others do ---

    def _check_unmoved(self, promotion: Promotion) -> None:
        """Returns where the registry is as the promotion has left it.

        Raises:
            InputError: somebody moved an alias, or changed or deleted the version.
        """
        aliases = self.registry.aliases(promotion.model)
        begun = self.journal.intent(promotion, CHAMPION) is not None
        done = self.journal.done(promotion)
        allowed = {promotion.version} if CHAMPION in done else {promotion.champion}
        allowed |= {promotion.version} if begun else set()
        if aliases.get(CHAMPION) not in allowed:
            raise _moved(promotion, CHAMPION, aliases.get(CHAMPION), promotion.champion)
        if "register" in done and aliases.get(CHALLENGER) != promotion.version and not begun:
            raise _moved(promotion, CHALLENGER, aliases.get(CHALLENGER), promotion.version)
        found = self.registry.version(promotion.model, promotion.version)
        if found is None or found.fingerprint != promotion.fingerprint:
            what = "deleted" if found is None else "changed"
            raise InputError(
                f"somebody has {what} version {promotion.version} of {promotion.model} in the registry since the "
                f"promotion of {promotion.candidate_name} was planned",
                hint="Look it up in MLflow's pages, then promote again.",
            )

    def _check_serving(self, promotion: Promotion, snapshot: RolloutSnapshot) -> None:
        intended = self.journal.intent(promotion, "swap")
        allowed = {snapshot.serving} if "swap" not in self.journal.done(promotion) else set()
        allowed |= set() if intended is None else {intended.detail}
        found = self.rollout.serving()
        if found not in allowed:
            raise InputError(
                f"somebody has changed what {promotion.production} serves at {promotion.location}: it is "
                f"{found or 'nothing'}, and should be {' or '.join(sorted(allowed)) or 'nothing'}",
                hint="What they did is left as it is. Put it back, or plan a new promotion.",
            )

    # --- back ---

    def _give_up(self, promotion: Promotion, step: PromotionStep, error: BaseException) -> None:
        """After a failure: back to what was, unless the champion has changed already."""
        journal = self.journal
        told = str(error) or type(error).__name__
        if CHAMPION in journal.done(promotion):
            self._add_if_possible(promotion, step.name, "failed", told)
            self.told(f"{promotion.candidate_name} is the champion; to clean up, give the same command again")
            return
        events = journal.events(promotion)
        if not events or (events[-1].step, events[-1].phase) != (step.name, "failed"):
            self._add_if_possible(promotion, step.name, "failed", told)
        try:
            self._undo(promotion, told, add=self._add_if_possible)
        except BurnishError as undoing:
            raise UnreachableError(
                f"{told}\nAnd what was done could not be undone: {undoing.message}",
                hint="Once it answers, `burnish rollback` makes all as it was.",
            ) from error

    def _add_if_possible(self, promotion: Promotion, step: str, phase: Phase, detail: str) -> None:
        """Adds a line; going back matters more than that it can be written down."""
        try:
            self.journal.add(promotion, step, phase, detail)
        except StorageError as error:
            self.told(error.message)

    def _undo(self, promotion: Promotion, reason: str, *, add: Callable[[Promotion, str, Phase, str], None]) -> None:
        snapshot = self.journal.snapshot(promotion)
        if snapshot is None:
            return
        self.told(f"all is made as it was before {promotion.candidate_name}")
        add(promotion, ROLLBACK, "intent", reason)
        if not self._taken_over(promotion, snapshot):
            self.rollout.restore(snapshot)
        self._restore_aliases(promotion, reason)
        add(promotion, ROLLBACK, "done", reason)

    def _taken_over(self, promotion: Promotion, snapshot: RolloutSnapshot) -> bool:
        """Whether the production Model is somebody else's by now; then only what is beside it goes."""
        intended = self.journal.intent(promotion, "swap")
        ours = {snapshot.serving, "" if intended is None else intended.detail}
        if self.rollout.serving() in ours:
            return False
        self.told(f"what {promotion.production} serves was changed by somebody else, and is left as it is")
        self.rollout.unload()
        return True

    def _restore_aliases(self, promotion: Promotion, reason: str) -> None:
        registry, model = self.registry, promotion.model
        aliases = registry.aliases(model)
        if aliases.get(CHALLENGER) == promotion.version or (
            promotion.challenger_before is not None and CHALLENGER not in aliases
        ):
            registry.set_alias(model, CHALLENGER, self._if_there(model, promotion.challenger_before))
        if not self._has_reigned(promotion, aliases.get(CHAMPION)):
            return
        champion = self._if_there(model, promotion.champion)
        registry.set_alias(model, CHAMPION, champion)
        old = None if champion is None else registry.version(model, champion)
        begun = self.journal.intent(promotion, ROLLBACK)
        registry.crown(
            Reign(
                model=model,
                version=champion,
                since=self.journal.now() if begun is None else begun.at,
                how="rolled back",
                reason=reason,
                candidate="" if old is None else old.candidate,
                promotion_id=promotion.id,
                location=promotion.location,
            )
        )

    def _has_reigned(self, promotion: Promotion, found: str | None) -> bool:
        """Whether the alias champion had moved to the challenger, and is nobody else's since."""
        if self.journal.intent(promotion, CHAMPION) is None or found not in {promotion.version, promotion.champion}:
            return False
        # A rollback that was killed has moved the alias back already; the history knows that it had moved.
        kept = self.registry.reigns(promotion.model)
        return found == promotion.version or any(one.promotion_id == promotion.id for one in kept)

    def _if_there(self, model: str, version: str | None) -> str | None:
        """The version, or None where somebody has deleted it: the way back does not end there."""
        if version is None or self.registry.version(model, version) is not None:
            return version
        self.told(f"somebody has deleted version {version} of {model}, which had an alias")
        return None


def _moved(promotion: Promotion, alias: str, found: str | None, wanted: str | None) -> InputError:
    def named(version: str | None) -> str:
        return "no version" if version is None else f"version {version}"

    return InputError(
        f"somebody has moved the alias {alias} of {promotion.model}: {named(found)} has it, and {named(wanted)} should",
        hint="It is left where it is. Decide who is the champion, then promote again.",
    )


# --- watching --------------------------------------------------------------------------------------------------


def judge_watch(policy: Policy, probe: Probe, step: PromotionStep, observation: Observation) -> tuple[str, ...]:
    """What forbids to go on after a step was watched, a phrase each; empty where nothing does.

    A limit holds on the pessimistic end of what was seen, at the load that there was. Unknown forbids it, too. Limits
    against the champion hold in the steps that it answers enough of, see `compares`.
    """
    told = []
    references = References(champion={(name, None): one for name, one in observation.champion.items()})
    seen: dict[Key, Estimate] = {(name, None): one for name, one in observation.challenger.items()}
    for limit in limits_watched(policy, probe, compared=compares(step))[0]:
        judgement = judge_against(limit, seen, references)
        if judgement.outcome == "unknown":
            told.append(f"unknown: {judgement.reason}")
        elif judgement.outcome == "fail":
            told.append(judgement.reason)
    return (*told, *_wrong_split(step, observation))


def _wrong_split(step: PromotionStep, observation: Observation) -> tuple[str, ...]:
    answered = observation.answered
    challenger, unnamed = answered.get(CHALLENGER, 0), answered.get(UNNAMED, 0)
    total = sum(answered.values()) - unnamed
    if step.action != "swap" and unnamed:
        return (
            f"{unnamed} of {total + unnamed} replies do not say who answered, as they carry no x-seldon-route: the "
            "`mesh` of the section `cluster` has to be Core 2's own Envoy, or what lets that header through",
        )
    if step.action != "swap" and not total:
        return ("no request was answered where callers ask, so that nothing says who answers there",)
    if not total:
        return ()
    if others := answered.get("others", 0):
        return (f"{others} of {total} requests were answered by neither champion nor challenger",)
    percent = 0 if step.action == "mirror" else step.percent
    if _tail(challenger, total, percent / 100) < _UNLIKELY:
        return (f"the challenger answered {challenger} of {total} requests, which is not {percent} %",)
    return ()


def _tail(events: int, count: int, probability: float) -> float:
    """How likely a number of events as far from the expected is, to its side."""
    from scipy import stats

    return float(min(stats.binom.cdf(events, count, probability), stats.binom.sf(events - 1, count, probability)))


def _seen(observation: Observation | None) -> str:
    if observation is None:
        return ""
    from registry.report import numbers

    return ", ".join(f"{label(name, None)} {numbers.text(one)}" for name, one in observation.challenger.items())


# --- who was when ----------------------------------------------------------------------------------------------


def history(model: str, registry: ModelRegistry) -> tuple[tuple[Reign, ...], str]:
    """Who was the champion when, the first one first; and a word where the alias says something else now.

    Raises:
        InputError: there is no such registered model.
        UnreachableError: the registry does not answer or refuses.
    """
    reigns = registry.reigns(model)
    found = registry.aliases(model).get(CHAMPION)
    last = reigns[-1].version if reigns else None
    if found == last:
        return reigns, ""
    now = "no version" if found is None else f"version {found}"
    return reigns, f"Now {now} has the alias {CHAMPION}; burnish did not do that."
