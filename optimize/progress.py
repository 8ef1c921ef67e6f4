"""How far a campaign is: what it was told to be doing, what runs, and how long the rest of a phase may take.

Times are seconds since 1970, so that another process can read on from them.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimize.plan import Observer

FAILED = "failed: "
"""Begins the outcome of a unit that failed."""
_DOING = {
    "Source": "loading {}",
    "Variant": "making {}",
    "Fidelity": "judging {}",
    "Screening": "timing {} in process",
    "Sensitivity": "ranking the nodes of {}",
    "SearchTrial": "trying {}",
    "AccuracySearch": "searching nodes for {}",
    "ServingPoint": "trying {}",
    "ServingSearch": "searching serving profiles for {}",
    "Deployed": "deploying {}",
    "Equivalence": "checking the answers of {}",
    "Capacity": "finding the capacity of {}",
    "Round": "measuring {}",
    "Published": "recording in {}",
    "Campaign": "running the campaign of {}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A piece of work that runs.

    Attributes:
        kind: of its result, as the journal has it (``Variant``, ``Round``, ...).
        subject: what people know it by.
        since: when it was begun.
        where: the machine that does it; empty for this one.
    """

    kind: str
    subject: str
    since: float
    where: str = ""

    @property
    def words(self) -> str:
        """What is done, and where."""
        done = _DOING.get(self.kind, "{}").format(self.subject)
        return f"{done} on {self.where}" if self.where else done


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of a campaign, as it stands.

    Attributes:
        name: what is done in it.
        total: how many units it has, at most.
        began: when.
        done: how many units are done, those included that were known before, or that failed.
        failed: how many of them failed.
        median_s: of the units that were worked on and are done; None where there is none yet.
        timed: how many these are.
        turned: when the last unit was done; when the phase began where none is.
        unit_s: what was spent on the unit that is not done yet, without what runs now.
    """

    name: str
    total: int
    began: float
    turned: float
    done: int = 0
    failed: int = 0
    median_s: float | None = None
    timed: int = 0
    unit_s: float = 0.0

    def left_s(self, running: Sequence[Running], now: float) -> float | None:
        """How long the rest of the phase may take, if units take as long as most did; None where nothing says so.

        Args:
            running: what runs now; as many units are done at the same time as there are pieces of one kind among it.
            now: the time.
        """
        remaining = self.total - self.done
        if remaining <= 0:
            return 0.0
        if self.median_s is None:
            return None
        kinds = Counter(one.kind for one in running)
        kind, lanes = kinds.most_common(1)[0] if kinds else ("", 1)
        spent = [max(0.0, now - one.since) for one in running if one.kind == kind]
        if lanes == 1:
            # What runs may be a search, and the unit one of its trials.
            spent = [min([*spent, max(0.0, now - self.turned)]) + self.unit_s] if spent else [self.unit_s]
        worked = sum(min(one, self.median_s) for one in spent)
        return max(0.0, remaining * self.median_s - worked) / min(lanes, remaining)


class Progress:
    """Implements `optimize.plan.Observer`: keeps what it is told. For several threads at once."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._past: list[Phase] = []
        self._running: dict[tuple[str, str], Running] = {}
        self._name, self._total, self._began, self._turned = "", 0, 0.0, 0.0
        self._done = self._failed = 0
        self._worked: dict[str, float] = {}
        self._took: list[float] = []
        self._parallel = False

    # --- what it is told ---

    def phase(self, name: str, total: int) -> None:
        """A phase of ``total`` units begins, and the last one is over."""
        with self._lock:
            if (before := self.current) is not None:
                self._past.append(before)
            self._name, self._total = name, total
            self._began = self._turned = self._clock()
            self._done = self._failed = 0
            self._worked, self._took, self._parallel = {}, [], False

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        """A piece of work begins, or begins anew somewhere else."""
        with self._lock:
            self._running[kind, subject] = Running(kind=kind, subject=subject, since=self._clock(), where=where)
            self._parallel |= sum(1 for one, _ in self._running if one == kind) > 1

    def ended(self, kind: str, subject: str) -> None:
        """A piece of work is over, with whatever outcome."""
        with self._lock:
            ran = self._running.pop((kind, subject), None)
            if ran is not None:
                since = ran.since if self._parallel else max(ran.since, self._turned)
                self._worked[subject] = self._worked.get(subject, 0.0) + max(0.0, self._clock() - since)

    def done(self, subject: str, outcome: str) -> None:
        """One unit of the phase is done; one that nothing was worked on for was known before, and says no time."""
        with self._lock:
            self._done += 1
            self._failed += outcome.startswith(FAILED)
            self._turned = self._clock()
            if self._parallel:
                took = self._worked.pop(subject, 0.0)
            else:
                took = sum(self._worked.values())
                self._worked = {}
            if took:
                self._took.append(took)

    def note(self, text: str) -> None:
        """Nothing to keep."""

    # --- what it knows ---

    @property
    def current(self) -> Phase | None:
        """The phase that the campaign is in; None before the first."""
        with self._lock:
            if not self._began:
                return None
            return Phase(
                name=self._name,
                total=self._total,
                began=self._began,
                turned=self._turned,
                done=self._done,
                failed=self._failed,
                median_s=median(self._took) if self._took else None,
                timed=len(self._took),
                unit_s=0.0 if self._parallel else sum(self._worked.values()),
            )

    @property
    def past(self) -> tuple[Phase, ...]:
        """The phases that are over."""
        with self._lock:
            return tuple(self._past)

    @property
    def running(self) -> tuple[Running, ...]:
        """What runs now, in the order in which it was begun."""
        with self._lock:
            return tuple(self._running.values())

    @property
    def left_s(self) -> float | None:
        """How long the rest of the phase may take; None where nothing says so."""
        with self._lock:
            current = self.current
            return None if current is None else current.left_s(self.running, self._clock())


@contextmanager
def working(observer: "Observer", kind: str, subject: str) -> Iterator[None]:
    """Tells the observer of a piece of work for the time of a block."""
    observer.begun(kind, subject)
    try:
        yield
    finally:
        observer.ended(kind, subject)


def duration(seconds: float) -> str:
    """A length of time in words: ``45 s``, ``2 min 40 s``, ``3 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(whole / 60), 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def remaining(left_s: float | None) -> str:
    """How long the rest of a phase may take, in words; what takes longer than most did is due."""
    if left_s is None:
        return "time left not known yet"
    return f"about {duration(left_s)} left" if left_s >= 0.5 else "due now"
