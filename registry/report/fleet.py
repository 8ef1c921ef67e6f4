"""What every report shows of a fleet, looked up once: what was won, ranked, and why nothing was elsewhere."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from registry.records import Estimate, Fleet, FleetModel, FleetOutcome, Gain, exact
from registry.report import numbers
from registry.report.resources import Table

RANKING = (
    "Ranked by the lower end of the speed-up's interval. Each ratio was formed within one campaign, on one host; two "
    "models' ratios say nothing of which model is faster."
)
STATES = {
    "won": "winner",
    "no_winner": "no winner",
    "failed": "failed",
    "stopped": "stopped",
    "waiting": "not begun",
}
_NOT_BEGUN = "its turn did not come; the same command goes on with it"
_REPORT, _LOG = "report.html", "run.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRow:
    """A model as the reports show it.

    Attributes:
        rank: its place among those with a winner, from 1; None for the others.
        model: of the fleet.
        outcome: the newest; None where it was not begun.
        state: a key of `STATES`.
        reason: why there is no winner; empty where there is one.
        minutes: of all attempts.
    """

    rank: int | None
    model: FleetModel
    outcome: FleetOutcome | None
    state: str
    reason: str
    minutes: float

    @property
    def gain(self) -> Gain | None:
        """What was won."""
        return None if self.outcome is None else self.outcome.gain

    @property
    def link(self) -> str:
        """The campaign's own report, or the log of what failed, relative to the fleet's folder; or empty."""
        if self.outcome is None:
            return ""
        return str(PurePosixPath(self.model.work, _REPORT if self.outcome.campaign_id else _LOG))


def fleet_rows(fleet: Fleet) -> tuple[FleetRow, ...]:
    """A row a model: those with a winner by what was won, then the others in the order of the fleet."""
    outcomes = {one.model: one for one in fleet.outcomes}
    won = [model for model in fleet.models if model.name in outcomes and outcomes[model.name].state == "won"]
    won.sort(key=lambda model: _place(outcomes[model.name]))
    places = {model.name: place for place, model in enumerate(won, start=1)}
    rest = [model for model in fleet.models if model.name not in places]
    rows = []
    for model in [*won, *rest]:
        outcome = outcomes.get(model.name)
        rows.append(
            FleetRow(
                rank=places.get(model.name),
                model=model,
                outcome=outcome,
                state="waiting" if outcome is None else outcome.state,
                reason=_NOT_BEGUN if outcome is None else outcome.reason,
                minutes=fleet.spent.get(model.name, 0.0),
            )
        )
    return tuple(rows)


def fleet_sentence(fleet: Fleet) -> str:
    """What came of the fleet, in a sentence or two."""
    rows = fleet_rows(fleet)
    counts = {state: sum(row.state == state for row in rows) for state in STATES}
    faster = sum(row.gain is not None and row.gain.word == "faster" for row in rows)
    others = [f"{counts[state]} {words}" for state, words in _COUNTED.items() if counts[state]]
    kept = sum(row.gain is not None and row.gain.is_baseline for row in rows)
    told = f"{counts['won']} of {len(rows)} models have a winner"
    told += f", {faster} of them faster than the baseline" if faster else ""
    told += f", {kept} the baseline itself" if kept else ""
    told += f"; {', '.join(others)}" if others else ""
    best = next((row for row in rows if row.rank == 1 and row.gain is not None and not row.gain.is_baseline), None)
    return f"{told}.{_most(best)}"


_COUNTED = {"no_winner": "without one", "failed": "failed", "stopped": "stopped", "waiting": "not begun"}


def _most(row: FleetRow | None) -> str:
    if row is None or row.gain is None or row.gain.speed_up is None:
        return ""
    ratio = row.gain.speed_up
    ends = numbers.times_interval(ratio)
    return f" Most was won for {row.model.name}: {numbers.times(ratio)}{f' {ends}' if ends else ''}."


def _place(outcome: FleetOutcome) -> tuple[bool, float, float, str]:
    """Certain gains first; of equal ones the one that saves more, then by name."""
    gain = outcome.gain
    if gain is None:
        return True, 0.0, 0.0, outcome.model
    certain = 1.0 if gain.is_baseline else None if gain.speed_up is None else gain.speed_up.low
    likely = gain.speed_up.value if gain.speed_up is not None else 0.0
    return certain is None, -(likely if certain is None else certain), -(saved_share(gain) or 0.0), outcome.model


def notes_of(row: FleetRow) -> list[str]:
    """What must be known of a winner, a sentence each."""
    outcome = row.outcome
    if outcome is None or row.rank is None:
        return []
    if outcome.cut:
        return ["Its minutes were used up: this is the best of what was measured by then."]
    return [f"Provisional: level {outcome.level} does not earn a promotion."] if outcome.provisional else []


# --- cells -----------------------------------------------------------------------------------------------------


def speed_up_words(gain: Gain | None) -> tuple[str, str]:
    """The speed-up, and below it its interval and word."""
    if gain is None:
        return "", ""
    if gain.is_baseline:
        return "1×", "the baseline stays"
    word = gain.word or ("" if gain.speed_up is None else f"over {gain.against}")
    return numbers.times(gain.speed_up), " ".join(
        part for part in (numbers.times_interval(gain.speed_up), word) if part
    )


def saved_share(gain: Gain) -> float | None:
    """The share of the baseline's size that the winner saves; negative where it is larger."""
    if gain.size_mb is None or not gain.baseline_size_mb:
        return None
    return 1 - gain.size_mb / gain.baseline_size_mb


def size_words(gain: Gain | None) -> tuple[str, str]:
    """The winner's size in MB, and below it what that saves."""
    if gain is None:
        return "", ""
    share = saved_share(gain)
    if gain.size_mb is None or share is None:
        return numbers.NOT_KNOWN, ""
    percent = round(100 * share)
    saved = f"{percent} % saved" if percent > 0 else f"{-percent} % more" if percent < 0 else "nothing saved"
    return numbers.number(exact(gain.size_mb, "MB")), saved


def drop_words(gain: Gain | None) -> tuple[str, str]:
    """The accuracy that the winner loses, and below it the interval."""
    return ("", "") if gain is None else _estimate(gain.accuracy_drop)


def cost_words(gain: Gain | None) -> tuple[str, str]:
    """What a million inferences cost, and below it what they cost with the baseline."""
    if gain is None:
        return "", ""
    if gain.cost is None:
        return numbers.NOT_KNOWN, ""
    before = "" if gain.baseline_cost is None else f"was {numbers.number(gain.baseline_cost)}"
    return f"{numbers.number(gain.cost)} {gain.currency}".strip(), before


def _estimate(estimate: Estimate | None) -> tuple[str, str]:
    return numbers.number(estimate), numbers.interval(estimate)


def metric_words(rows: Iterable[FleetRow]) -> str:
    """What the speed-ups are of, as a note; empty where there are none."""
    gains = [row.gain for row in rows if row.gain is not None and row.gain.metric]
    found = dict.fromkeys(f"{gain.metric} at {gain.load}" if gain.load else gain.metric for gain in gains)
    return f"Speed-up in {', '.join(found)}, over the float32 baseline served the same way." if found else ""


def minutes_words(minutes: float) -> str:
    """Minutes with as many figures as anybody needs."""
    return numbers.plain(minutes, 2) if minutes >= 0.05 else "0"


# --- tables ----------------------------------------------------------------------------------------------------


def fleet_tables(fleet: Fleet) -> tuple[Table, ...]:
    """Groups and hosts, where there is anything to say of them."""
    rows = fleet_rows(fleet)
    return tuple(one for one in (_groups(fleet, rows), _hosts(rows)) if one is not None)


def _groups(fleet: Fleet, rows: tuple[FleetRow, ...]) -> Table | None:
    names = list(dict.fromkeys(model.group for model in fleet.models))
    if names == [""] or not names:
        return None
    lines = []
    for name in names:
        own = [row for row in rows if row.model.group == name]
        won = sum(row.state == "won" for row in own)
        lines.append(
            (
                name or "of no group",
                numbers.plain(fleet.groups.get(name, 1.0)),
                minutes_words(sum(row.minutes for row in own)),
                f"{won} of {len(own)}",
            )
        )
    return Table(
        title="Groups",
        headings=("group", "share", "minutes", "models with a winner"),
        rows=tuple(lines),
        notes=("Next was a model of the group that had used the fewest minutes for its share.",),
    )


def _hosts(rows: tuple[FleetRow, ...]) -> Table | None:
    hosts: dict[str, list[FleetRow]] = {}
    for row in rows:
        if row.outcome is not None and row.outcome.host:
            hosts.setdefault(row.outcome.host, []).append(row)
    if not hosts:
        return None
    lines = [
        (host, own[0].outcome.cpu_model if own[0].outcome else "", ", ".join(row.model.name for row in own))
        for host, own in hosts.items()
    ]
    return Table(title="Hosts", headings=("fingerprint", "CPU", "models measured there"), rows=tuple(lines), notes=())
