"""The verdict in a terminal: a table of candidates, the verdict, and what failed."""

import re
from textwrap import fill

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from registry.records import Campaign, Failure
from registry.report import numbers
from registry.report.champions import champion_sentence
from registry.report.table import Row, engine_words, latency_name, printable, provisional_words, rows
from registry.report.waterfall import TITLE, waterfall

# Every outcome has a word beside its colour: colour alone says nothing on a plain stream or to the colour-blind.
_STYLES = {"selected": "bold green", "rejected": "", "unknown": "yellow", "failed": "red"}

# Below this the server stands under the engine, and the size is left to the other reports.
_WIDE = 96
# "[1,222, 1,252]" and its like set the width of a column; a longer heading is broken.
_NUMBER_WIDTH = 14
# What the numbers leave to the variant's name at 80 columns; a longer name is broken after one of its own marks.
_NAME_WIDTH = 13
_NAME_PART = re.compile(r"[^./-]+[./-]*|[./-]+")


def render_terminal(campaign: Campaign, console: Console) -> None:
    """Prints the table, the verdict and the failures; fits 100 columns, and is plain where there is no terminal."""
    shown = rows(campaign)
    if shown:
        console.print(_table(campaign, shown, console.width))
    _sentence(campaign, console)
    _levers(campaign, console)
    _capacity(campaign, shown, console)
    _reasons(shown, console)
    _closest(campaign, console)
    _failures(campaign.failures, console)


def _table(campaign: Campaign, shown: tuple[Row, ...], width: int) -> Table:
    metric, load = latency_name(campaign)
    latency = f"{_latency_words(metric)} at {load}" if load else _latency_words(metric)
    narrow = width < _WIDE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column(Text("variant\nengine\nserver" if narrow else "variant\nengine"), overflow="fold", min_width=10)
    if not narrow:
        table.add_column(Text("server\nprotocol"), no_wrap=True)
    headings = ["accuracy\ndrop", fill(latency, _NUMBER_WIDTH), "throughput/s\ninterval", "against\nbaseline"]
    for heading in headings if narrow else [*headings, "MB"]:
        table.add_column(Text(printable(heading)), justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in shown:
        table.add_row(*_cells(row, narrow), style=_STYLES["selected"] if row.outcome == "selected" else "")
    return table


def _cells(row: Row, narrow: bool) -> list[Text]:
    candidate = row.candidate
    server, protocol = candidate.serving.server, f"{candidate.serving.protocol} b{candidate.serving.max_batch_size}"
    name = _broken(candidate.variant_name) if narrow else candidate.variant_name
    variant = f"{name}\n{engine_words(candidate.engine)}"
    verdict = Text(row.outcome, style=_STYLES[row.outcome])
    if row.baseline:
        verdict.append("\nbaseline", style="dim")
    if row.champion:
        verdict.append("\nchampion", style="dim")
    what = [f"{variant}\n{server} {protocol}"] if narrow else [variant, f"{server}\n{protocol}"]
    found = [
        _lines(numbers.number(row.accuracy), numbers.number(row.drop) if row.drop else ""),
        _lines(numbers.short(row.latency), numbers.interval(row.latency)),
        _lines(numbers.number(row.throughput), numbers.interval(row.throughput)),
        _against(row),
    ]
    size = [] if narrow else [numbers.number(row.size_mb)]
    return [Text(printable(cell)) for cell in (str(row.number), *what, *found, *size)] + [verdict]


def _broken(name: str) -> str:
    lines = [""]
    for part in _NAME_PART.findall(name):
        if lines[-1] and len(lines[-1] + part) > _NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _against(row: Row) -> str:
    if row.baseline:
        return "1×"
    if row.comparison is None:
        return numbers.NOT_KNOWN
    return f"{numbers.times(row.comparison.ratio)}\n{row.comparison.word}"


def _lines(first: str, second: str) -> str:
    return f"{first}\n{second}" if second else first


def _latency_words(metric: str) -> str:
    return metric.removeprefix("latency_").removesuffix("_ms")


def _sentence(campaign: Campaign, console: Console) -> None:
    selected = campaign.verdict.selected is not None
    console.print()
    console.print(Text(printable(campaign.verdict.sentence), style="bold green" if selected else "bold yellow"))
    if words := provisional_words(campaign):
        console.print(Text(f"Provisional: {words[0].lower()}{words[1:]}", style="yellow"))
    if against := champion_sentence(campaign):
        console.print(Text(printable(against)))


def _levers(campaign: Campaign, console: Console) -> None:
    """The way from the baseline to the selected, a line a step."""
    found = waterfall(campaign)
    if found is None:
        return
    console.print(Text(f"\n{TITLE} ({printable(found.label)})", style="bold"))
    steps = [(step.name, step.words, step.value, step.ratio) for step in found.steps]
    width = max(len(name) for name, _, _, _ in [*steps, ("baseline", "", found.start, None)])
    console.print(Text(printable(f"{'baseline':<{width}}  {numbers.text(found.start)}  {found.baseline.name}")))
    for name, words, value, ratio in steps:
        told = " ".join(part for part in (numbers.times(ratio), numbers.times_interval(ratio)) if part)
        console.print(Text(printable(f"{name:<{width}}  {numbers.text(value)}  {told}: {words}")))
    for note in found.notes[:-1]:
        console.print(Padding(Text(printable(note), style="dim"), (0, 0, 0, 4), expand=False))


def _capacity(campaign: Campaign, shown: tuple[Row, ...], console: Console) -> None:
    """What follows from the capacity of what is to be served; the other reports have all."""
    advice = {one.candidate_id: one for one in campaign.advice}
    chosen = next((row for row in shown if row.outcome == "selected"), None)
    if chosen is None or chosen.candidate.id not in advice:
        return
    console.print(Text("\nCapacity of the selected", style="bold"))
    for line in advice[chosen.candidate.id].lines:
        console.print(Text(printable(line)))


def _reasons(shown: tuple[Row, ...], console: Console) -> None:
    losers = [row for row in shown if row.outcome != "selected"]
    if losers:
        console.print(Text("\nWhy not the others", style="bold"))
    for row in losers:
        _item(console, f"{row.number}. {row.candidate.name} ({row.outcome})", row.reason)


def _closest(campaign: Campaign, console: Console) -> None:
    if campaign.verdict.closest:
        console.print(Text("\nClosest misses", style="bold"))
    for miss in campaign.verdict.closest:
        seen = numbers.text(miss.observed)
        _item(console, f"{miss.constraint.text}: {miss.candidate_name}, {seen}", miss.relaxation)


def _failures(failures: tuple[Failure, ...], console: Console) -> None:
    if failures:
        console.print(Text("\nNot served", style="bold"))
    for failure in failures:
        kind = failure.kind.replace("_", " ")
        _item(console, f"{failure.subject} ({kind}, {failure.phase})", failure.reason)


def _item(console: Console, what: str, why: str) -> None:
    console.print(Text(printable(what)))
    console.print(Padding(Text(printable(why), style="dim"), (0, 0, 0, 4), expand=False))
