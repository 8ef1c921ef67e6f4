"""A fleet from its file to a record: the campaigns of the queue, a few at a time, each in a process of its own."""

import time
from dataclasses import dataclass
from typing import Protocol

from optimize.budget import Budget
from optimize.fleet import JOURNAL
from optimize.fleet.config import Entry, FleetPlan
from optimize.fleet.journal import BUDGET, Journal, Past, fleet_of
from optimize.fleet.outcomes import outcome_of
from optimize.fleet.process import CampaignProcess, end_all
from optimize.fleet.queue import FairQueue, Ticket
from optimize.fleet.reporting import write_page
from optimize.plan import Observer, Plan
from optimize.progress import FAILED
from optimize.status import Watch
from registry.ledger import Ledger
from registry.records import Fleet, FleetOutcome
from registry.report import numbers
from registry.report.fleet import minutes_words

GRACE_MINUTES = 5.0
"""A campaign ends by its own budget; one that takes so much longer, or a quarter of it, is ended."""
_GRACE_SHARE = 0.25
_LAST_SHARE = 0.1
_POLL_S = 0.2
_STOPPED = "stopped"
_KIND = "Campaign"


class Start(Protocol):
    """Starts the campaign of a plan."""

    def __call__(self, planned: Plan, *, minutes: float | None) -> CampaignProcess:
        """The process, which has at most so many minutes."""


def run_fleet(
    fleet: FleetPlan,
    *,
    observer: Observer,
    grace_minutes: float = GRACE_MINUTES,
    start: Start = CampaignProcess.start,
) -> Fleet:
    """Runs the campaigns of a fleet, or goes on with those that are not done; only from the main thread.

    Whatever becomes of a campaign is a record, and the others go on. What ends this function ends the campaigns that
    are under way, and they go on where they stopped the next time.

    Args:
        fleet: planned.
        observer: told what becomes of each.
        grace_minutes: see `GRACE_MINUTES`.
        start: starts the campaign of a plan in a process of its own, with so many minutes for it.

    Raises:
        InputError: another process works in this folder.
        StorageError: the working folder cannot be written.
    """
    name, levels = fleet.config.name, sorted({entry.planned.level.name for entry in fleet.entries})
    budget = Budget.from_now(fleet.config.minutes)
    with (
        Ledger.open(fleet.work / JOURNAL) as ledger,
        Watch(fleet.work, observer, campaign=name, level=", ".join(levels), budget=budget) as watch,
    ):
        journal = Journal(ledger)
        journal.begin(fleet)
        run = _Run(fleet, journal, watch, budget=budget, grace_minutes=grace_minutes, start=start)
        try:
            run.begin_those_that_fit()
            while run.under_way:
                time.sleep(_POLL_S)
                run.collect()
                run.begin_those_that_fit()
        finally:
            run.end()
            found = fleet_of(ledger)
            write_page(found, fleet.work)
        return found


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """A campaign that runs."""

    entry: Entry
    past: Past
    process: CampaignProcess
    began: float
    allotted: float | None
    ended: str = ""


class _Run:
    """One run of a fleet, as it stands."""

    def __init__(
        self,
        fleet: FleetPlan,
        journal: Journal,
        observer: Observer,
        *,
        budget: Budget,
        grace_minutes: float,
        start: Start,
    ) -> None:
        self._fleet, self._journal, self._observer, self._budget = fleet, journal, observer, budget
        self._grace, self._start = grace_minutes, start
        self._entries = {entry.name: entry for entry in fleet.entries}
        self._running: dict[str, _Attempt] = {}
        self._pasts = {entry.name: journal.past(entry) for entry in fleet.entries}
        self._queue = self._queued()

    @property
    def under_way(self) -> bool:
        """Whether any campaign runs."""
        return bool(self._running)

    def begin_those_that_fit(self) -> None:
        """Starts campaigns until as many run as may, or nobody waits, or the fleet's minutes are used up."""
        while self._queue and len(self._running) < self._fleet.config.parallel:
            if self._budget.is_used_up:
                return
            left = None if self._budget.minutes is None else self._budget.left_s / 60
            ticket = self._queue.take(self._elapsed())
            allotted = self._queue.allot(
                ticket, left=left, parallel=self._fleet.config.parallel, elapsed=self._elapsed()
            )
            self._begin(self._entries[ticket.name], allotted)

    def collect(self) -> None:
        """Notes what became of campaigns that have ended, and ends those that are long over their time."""
        for name, attempt in list(self._running.items()):
            code = attempt.process.poll()
            if code is not None:
                self._note(name, attempt, code)
            elif self._is_overdue(attempt):
                attempt.ended = BUDGET
                end_all([attempt.process])

    def end(self) -> None:
        """Ends all campaigns that are under way, and notes it; says what was not begun."""
        for attempt in self._running.values():
            if attempt.process.poll() is None:
                attempt.ended = attempt.ended or _STOPPED
        end_all([attempt.process for attempt in self._running.values()])
        for name, attempt in list(self._running.items()):
            self._note(name, attempt, attempt.process.poll() or 0)
        if self._queue:
            names = ", ".join(ticket.name for ticket in self._queue.waiting)
            self._observer.note(f"not begun: {names}; the same command goes on there")

    # --- parts of it ---

    def _queued(self) -> FairQueue:
        """Those that another attempt is worth for; the others are told as they are."""
        used: dict[str, float] = {}
        tickets = []
        self._observer.phase("Models", len(self._entries))
        for entry in self._entries.values():
            past = self._pasts[entry.name]
            used[entry.group] = used.get(entry.group, 0.0) + past.spent
            if past.final is not None:
                self._observer.done(entry.name, f"{told(past.final)} (known)")
                continue
            if past.why is not None:
                self._observer.note(past.why)
            minutes = _minutes_left(entry, past)
            tickets.append(Ticket(name=entry.name, group=entry.group, share=entry.share, minutes=minutes))
        return FairQueue(tickets, groups=self._fleet.config.groups, used=used)

    def _begin(self, entry: Entry, allotted: float | None) -> None:
        limit = "" if allotted is None else f", {numbers.plain(allotted)} minutes at most"
        self._observer.note(f"{entry.name}: begun{limit}")
        self._observer.begun(_KIND, entry.name)
        self._running[entry.name] = _Attempt(
            entry=entry,
            past=self._pasts[entry.name],
            process=self._start(entry.planned, minutes=allotted),
            began=time.monotonic(),
            allotted=allotted,
        )

    def _note(self, name: str, attempt: _Attempt, code: int) -> None:
        minutes = self._minutes(attempt)
        del self._running[name]
        self._queue.ended(name, minutes)
        outcome = outcome_of(
            attempt.entry.planned,
            name=name,
            code=code,
            ended=attempt.ended,
            attempt=attempt.past.attempts + 1,
            minutes=minutes,
            allotted=attempt.allotted,
        )
        self._journal.commit(attempt.entry, outcome, attempt.past.components)
        self._observer.ended(_KIND, name)
        self._observer.done(name, told(outcome))

    def _is_overdue(self, attempt: _Attempt) -> bool:
        if attempt.allotted is None:
            return False
        return self._minutes(attempt) > attempt.allotted + max(self._grace, _GRACE_SHARE * attempt.allotted)

    def _minutes(self, attempt: _Attempt) -> float:
        return (time.monotonic() - attempt.began) / 60

    def _elapsed(self) -> dict[str, float]:
        return {name: self._minutes(attempt) for name, attempt in self._running.items()}


def _minutes_left(entry: Entry, past: Past) -> float | None:
    """What is left of a model's own minutes; None for any.

    Attempts that were stopped or killed may have used all of them up: there are a few at least, for a verdict over what
    those have found.
    """
    if entry.minutes is None:
        return None
    return max(entry.minutes - past.spent, _LAST_SHARE * entry.minutes)


def told(outcome: FleetOutcome) -> str:
    """What became of a model, for a line."""
    took = f"after {minutes_words(outcome.minutes)} min"
    early = ", with the best of what its minutes allowed" if outcome.cut else ""
    if outcome.state == "won":
        return f"winner {took}{early}: {outcome.sentence}"
    if outcome.state == "no_winner":
        return f"no winner {took}{early}: {outcome.reason}"
    if outcome.state == "failed":
        return f"{FAILED}{outcome.reason} ({outcome.kind}, {took})"
    return f"stopped {took}: {outcome.reason}"
