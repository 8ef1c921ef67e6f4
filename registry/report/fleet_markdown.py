"""A fleet as Markdown, for a pull request or a wiki."""

from registry.records import Fleet
from registry.report.fleet import (
    RANKING,
    STATES,
    FleetRow,
    cost_words,
    drop_words,
    fleet_rows,
    fleet_sentence,
    fleet_tables,
    metric_words,
    minutes_words,
    notes_of,
    size_words,
    speed_up_words,
)
from registry.report.markdown import escaped, small_table, table_line

_HEADINGS = ("#", "model", "group", "winner", "speed-up", "MB", "accuracy lost", "cost per million", "minutes", "host")


def render_fleet_markdown(fleet: Fleet) -> str:
    """The ranking, and a reason for each model without a winner; the same text each time."""
    rows = fleet_rows(fleet)
    won = [row for row in rows if row.rank is not None]
    parts = [f"# {escaped(fleet.name)}: what was won", f"**{escaped(fleet_sentence(fleet))}**"]
    if won:
        lines = [table_line(_HEADINGS), table_line(["---"] * len(_HEADINGS)), *(table_line(_cells(row)) for row in won)]
        parts += ["\n".join(lines), escaped(RANKING), escaped(metric_words(won))]
    parts += _list("To be known", [f"{row.model.name}: {words}" for row in won for words in notes_of(row)])
    for state, words in STATES.items():
        if state != "won":
            parts += _list(words.capitalize(), [_told(row) for row in rows if row.state == state])
    parts += [part for table in fleet_tables(fleet) for part in small_table(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(row: FleetRow) -> list[str]:
    gain = row.gain
    cells = [
        str(row.rank),
        row.model.name,
        row.model.group,
        gain.candidate if gain else "",
        *(" ".join(part for part in pair if part) for pair in (speed_up_words(gain), size_words(gain))),
        *(" ".join(part for part in pair if part) for pair in (drop_words(gain), cost_words(gain))),
        minutes_words(row.minutes),
        row.outcome.host if row.outcome else "",
    ]
    return [escaped(cell) for cell in cells]


def _told(row: FleetRow) -> str:
    misses = "".join(f"; closest: {miss}" for miss in (row.outcome.misses if row.outcome else ()))
    kind = f" ({row.outcome.kind})" if row.outcome is not None and row.outcome.kind else ""
    return f"{row.model.name}{kind}: {row.reason}{misses}"


def _list(title: str, items: list[str]) -> list[str]:
    return [f"## {escaped(title)}", "\n".join(f"- {escaped(item)}" for item in items)] if items else []
