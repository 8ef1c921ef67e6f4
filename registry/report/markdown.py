"""The verdict as Markdown, for a pull request or a wiki."""

import re
from collections.abc import Sequence

from registry.records import Campaign, Failure
from registry.report import numbers
from registry.report.champions import champion_sentence
from registry.report.resources import Table
from registry.report.sections import all_tables
from registry.report.table import Row, engine_words, latency_name, printable, provisional_words, rows

_HEADINGS = (
    ("#", "variant", "engine", "server", "protocol", "accuracy", "drop"),
    ("throughput", "against baseline", "MB", "verdict"),
)
# What Markdown or the HTML inside it would act on.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$@])")


def render_markdown(campaign: Campaign) -> str:
    """The verdict, the table of candidates, and a reason for each that lost or failed; the same text each time."""
    verdict = campaign.verdict
    parts = [f"# {escaped(campaign.name)}: the verdict", f"**{escaped(verdict.sentence)}**"]
    if words := provisional_words(campaign):
        parts.append(f"> **Provisional.** {escaped(words)}")
    if against := champion_sentence(campaign):
        parts.append(escaped(against))
    shown = rows(campaign)
    if shown:
        parts.append(_table(campaign, shown))
    parts += [part for table in all_tables(campaign, shown) for part in small_table(table)]
    parts += _section("Why not the others", [_loser(row) for row in shown if row.outcome != "selected"])
    parts += _section(
        "Closest misses",
        [
            f"{escaped(miss.constraint.text)}: {escaped(miss.candidate_name)}, {escaped(numbers.text(miss.observed))}. "
            f"{escaped(miss.relaxation)}"
            for miss in verdict.closest
        ],
    )
    parts += _section("Not served", [_failure(failure) for failure in campaign.failures])
    parts += _section("How it was measured", _method(campaign))
    return "\n\n".join(parts) + "\n"


def _table(campaign: Campaign, shown: tuple[Row, ...]) -> str:
    metric, load = latency_name(campaign)
    latency = escaped(metric if load is None else f"{metric} at {load}")
    head = [*_HEADINGS[0], latency, *_HEADINGS[1]]
    lines = [table_line(head), table_line(["---"] * len(head))]
    lines += [table_line(_cells(row)) for row in shown]
    return "\n".join(lines)


def small_table(table: Table) -> list[str]:
    """A table with its title above and its notes below, a part each."""
    lines = [table_line([escaped(cell) for cell in table.headings]), table_line(["---"] * len(table.headings))]
    lines += [table_line([escaped(cell) for cell in row]) for row in table.rows]
    return [f"## {escaped(table.title)}", "\n".join(lines), *(escaped(note) for note in table.notes)]


def _cells(row: Row) -> list[str]:
    serving = row.candidate.serving
    against = "baseline" if row.baseline else numbers.NOT_KNOWN
    if row.comparison is not None:
        against = f"{numbers.times(row.comparison.ratio)} {row.comparison.word}"
    mark = f"**{row.outcome}**" if row.outcome == "selected" else row.outcome
    mark += ", champion" if row.champion else ""
    return [
        str(row.number),
        escaped(row.candidate.variant_name),
        escaped(engine_words(row.candidate.engine)),
        serving.server,
        serving.protocol,
        escaped(numbers.number(row.accuracy)),
        escaped(numbers.text(row.drop)),
        escaped(numbers.text(row.latency)),
        escaped(numbers.text(row.throughput)),
        against,
        escaped(numbers.number(row.size_mb)),
        mark,
    ]


def table_line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def _loser(row: Row) -> str:
    return f"{escaped(row.candidate.name)} ({row.outcome}): {escaped(row.reason)}"


def _failure(failure: Failure) -> str:
    kind = failure.kind.replace("_", " ")
    return f"{escaped(failure.subject)} ({kind}, {failure.phase}): {escaped(failure.reason)}"


def _method(campaign: Campaign) -> list[str]:
    host = campaign.host
    versions = ", ".join(f"{name} {version}" for name, version in sorted(campaign.versions.items()))
    clusters = sorted({one.cluster for one in campaign.candidates if one.cluster})
    return [
        f"campaign {campaign.id}, level {campaign.level}, seed {campaign.seed}, started {escaped(campaign.started_at)}",
        f"host {host.fingerprint}: {escaped(host.cpu_model)}, {host.cores} cores; {escaped(host.pinning)}",
        *(f"served by {escaped(cluster)}; the load came from that host" for cluster in clusters),
        f"versions: {escaped(versions)}",
    ]


def _section(title: str, items: list[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {item}" for item in items)] if items else []


def escaped(text: str) -> str:
    """The text on one line, without anything that Markdown or HTML would act on."""
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))
