"""A fleet in a terminal: what was won, ranked, then the models without a winner, each with its reason."""

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from registry.records import Fleet
from registry.report.fleet import (
    STATES,
    FleetRow,
    cost_words,
    drop_words,
    fleet_rows,
    fleet_sentence,
    fleet_tables,
    minutes_words,
    notes_of,
    size_words,
    speed_up_words,
)
from registry.report.table import printable

_STYLES = {"won": "", "no_winner": "yellow", "failed": "red", "stopped": "yellow", "waiting": "dim"}
# Below this the columns of cost and size are left to the other reports.
_WIDE = 96


def render_fleet_terminal(fleet: Fleet, console: Console) -> None:
    """Prints the ranking, the sentence, and the reasons; fits 80 columns."""
    rows = fleet_rows(fleet)
    won = [row for row in rows if row.rank is not None]
    if won:
        console.print(_ranking(won, narrow=console.width < _WIDE))
        console.print()
    console.print(
        Text(printable(fleet_sentence(fleet)), style="bold green" if len(won) == len(rows) else "bold yellow")
    )
    for row in won:
        for words in notes_of(row):
            _item(console, row.model.name, words)
    for row in rows:
        if row.rank is None:
            _without(console, row)
    for table in fleet_tables(fleet):
        if table.title == "Groups":
            console.print(Text(f"\n{table.title}", style="bold"))
            for cells in table.rows:
                console.print(Text(printable(f"{cells[0]}: share {cells[1]}, {cells[2]} minutes, {cells[3]} won")))


def _ranking(won: list[FleetRow], *, narrow: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column(Text("model\nwinner"), overflow="fold", min_width=12)
    headings = ["speed-up", "accuracy\nlost"] if narrow else ["speed-up", "MB", "accuracy\nlost", "cost per\nmillion"]
    for heading in (*headings, "minutes"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in won:
        gain = row.gain
        name = row.model.name + (f" ({row.model.group})" if row.model.group else "")
        found = [speed_up_words(gain), *([] if narrow else [size_words(gain)]), drop_words(gain)]
        found += [] if narrow else [cost_words(gain)]
        cells = [
            str(row.rank),
            f"{name}\n{gain.candidate if gain else ''}",
            *("\n".join(part for part in pair if part) for pair in found),
            minutes_words(row.minutes),
        ]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _without(console: Console, row: FleetRow) -> None:
    kind = f", {row.outcome.kind}" if row.outcome is not None and row.outcome.kind else ""
    console.print(Text(printable(f"\n{row.model.name}: {STATES[row.state]}{kind}"), style=_STYLES[row.state]))
    _indented(console, row.reason)
    for miss in row.outcome.misses if row.outcome is not None else ():
        _indented(console, miss)


def _item(console: Console, what: str, why: str) -> None:
    console.print(Text(printable(f"{what}: {why}"), style="yellow"))


def _indented(console: Console, words: str) -> None:
    console.print(Padding(Text(printable(words), style="dim"), (0, 0, 0, 4), expand=False))
