"""Which model of a fleet comes next, and for how many minutes. Nothing here looks at a clock or starts anything."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A model that waits for its turn.

    Attributes:
        name: of the model.
        group: whose it is.
        share: its weight in its group.
        minutes: the most that it may take; None for any.
    """

    name: str
    group: str
    share: float = 1.0
    minutes: float | None = None


class FairQueue:
    """Models that wait, taken so that groups get their shares of the minutes.

    Next is a model of the group that has used the fewest minutes for its share, as in fair queueing (Demers, Keshav,
    Shenker: Analysis and Simulation of a Fair Queueing Algorithm, 1989). A campaign is not interrupted for another, so
    a group can be ahead by what its campaigns under way take. Of groups that are even, the one with fewer campaigns
    under way for its share comes first, then the one whose model stands first. In a group, larger shares come first,
    then the order that they were given in.
    """

    def __init__(
        self,
        tickets: Iterable[Ticket],
        *,
        groups: Mapping[str, float] | None = None,
        used: Mapping[str, float] | None = None,
    ) -> None:
        """All wait.

        Args:
            tickets: in the order of the file.
            groups: group -> its share; 1 for those that are not in it.
            used: group -> minutes that it has used before.
        """
        self._waiting = list(tickets)
        self._place = {ticket.name: place for place, ticket in enumerate(self._waiting)}
        self._running: dict[str, tuple[Ticket, float]] = {}
        self._shares = {ticket.group: (groups or {}).get(ticket.group, 1.0) for ticket in self._waiting}
        self._used = dict.fromkeys(self._shares, 0.0) | dict(used or {})
        totals: dict[str, float] = {}
        for ticket in self._waiting:
            totals[ticket.group] = totals.get(ticket.group, 0.0) + ticket.share
        self._weights = {
            ticket.name: self._shares[ticket.group] * ticket.share / totals[ticket.group] for ticket in self._waiting
        }

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> tuple[Ticket, ...]:
        """Those that were not taken yet, in the order that they were given in."""
        return tuple(self._waiting)

    def take(self, elapsed: Mapping[str, float]) -> Ticket:
        """Takes the next one.

        Args:
            elapsed: name of each model under way -> minutes that it took so far.

        Raises:
            LookupError: nobody waits.
        """
        if not self._waiting:
            raise LookupError("nobody waits in this queue")
        used, running = dict(self._used), dict.fromkeys(self._shares, 0)
        for name, (ticket, _) in self._running.items():
            used[ticket.group] += elapsed.get(name, 0.0)
            running[ticket.group] += 1

        def turn(ticket: Ticket) -> tuple[float, float, int]:
            share = self._shares[ticket.group]
            return used[ticket.group] / share, running[ticket.group] / share, self._place[ticket.name]

        group = min(self._waiting, key=turn).group
        chosen = min(
            (ticket for ticket in self._waiting if ticket.group == group),
            key=lambda ticket: (-ticket.share, self._place[ticket.name]),
        )
        self._waiting.remove(chosen)
        self._running[chosen.name] = chosen, 0.0
        return chosen

    def allot(self, ticket: Ticket, *, left: float | None, parallel: int, elapsed: Mapping[str, float]) -> float | None:
        """How many minutes a model that was just taken may have; None for any.

        Where the fleet has so many minutes and no more, they are divided by the weights of all that wait, so that
        each gets its part and all end in time. That holds for any order and any number at a time by the bound on list
        schedules (Graham: Bounds on Multiprocessing Timing Anomalies, 1969): the last to begin does so, at the latest,
        when the work before it is spread evenly. What others leave over goes to those that come later.

        Args:
            ticket: the one that was taken last.
            left: minutes that the fleet has left; None for any.
            parallel: how many are under way at the same time.
            elapsed: as for `take`.
        """
        limits = [] if ticket.minutes is None else [ticket.minutes]
        if left is not None:
            limits.append(min(left, self._part(ticket, left, parallel, elapsed)))
        allotted = min(limits, default=None)
        self._running[ticket.name] = ticket, 0.0 if allotted is None else allotted
        return allotted

    def ended(self, name: str, minutes: float) -> None:
        """Counts what a model took that is not under way any more."""
        ticket, _ = self._running.pop(name)
        self._used[ticket.group] += minutes

    def _part(self, ticket: Ticket, left: float, parallel: int, elapsed: Mapping[str, float]) -> float:
        others = [(name, given) for name, (_, given) in self._running.items() if name != ticket.name]
        if len(others) + len(self._waiting) < parallel:
            return left  # nobody has to wait for it
        promised = sum(max(0.0, given - elapsed.get(name, 0.0)) for name, given in others)
        weights = [self._weights[one.name] for one in (ticket, *self._waiting)]
        spread = sum(weights) / parallel + (1 - 1 / parallel) * max(weights)
        return max(0.0, left - promised / parallel) * self._weights[ticket.name] / spread
