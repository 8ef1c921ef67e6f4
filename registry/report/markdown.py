"""The verdict as Markdown, for a pull request or a wiki."""

import re

from registry.records import Campaign, Failure
from registry.report import numbers
from registry.report.champions import champion_sentence
from registry.report.resources import Table
from registry.report.sections import all_tables
from registry.report.table import Row, engine_words, latency_name, printable, rows

_HEADINGS = (
    ("#", "variant", "engine", "server", "protocol", "accuracy", "drop"),
    ("throughput", "against baseline", "MB", "verdict"),
)
# What Markdown or the HTML inside it would act on.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$@])")


def render_markdown(campaign: Campaign) -> str:
    """The verdict, the table of candidates, and a reason for each that lost or failed; the same text each time."""
    verdict = campaign.verdict
    parts = [f"# {_text(campaign.name)}: the verdict", f"**{_text(verdict.sentence)}**"]
    if verdict.provisional:
        parts.append(f"> **Provisional.** Level `{campaign.level}` does not earn a promotion.")
    if against := champion_sentence(campaign):
        parts.append(_text(against))
    shown = rows(campaign)
    if shown:
        parts.append(_table(campaign, shown))
    parts += [part for table in all_tables(campaign, shown) for part in _small_table(table)]
    parts += _section("Why not the others", [_loser(row) for row in shown if row.outcome != "selected"])
    parts += _section(
        "Closest misses",
        [
            f"{_text(miss.constraint.text)}: {_text(miss.candidate_name)}, {_text(numbers.text(miss.observed))}. "
            f"{_text(miss.relaxation)}"
            for miss in verdict.closest
        ],
    )
    parts += _section("Not served", [_failure(failure) for failure in campaign.failures])
    parts += _section("How it was measured", _method(campaign))
    return "\n\n".join(parts) + "\n"


def _table(campaign: Campaign, shown: tuple[Row, ...]) -> str:
    metric, load = latency_name(campaign)
    latency = _text(metric if load is None else f"{metric} at {load}")
    head = [*_HEADINGS[0], latency, *_HEADINGS[1]]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line(_cells(row)) for row in shown]
    return "\n".join(lines)


def _small_table(table: Table) -> list[str]:
    lines = [_line([_text(cell) for cell in table.headings]), _line(["---"] * len(table.headings))]
    lines += [_line([_text(cell) for cell in row]) for row in table.rows]
    return [f"## {_text(table.title)}", "\n".join(lines), *(_text(note) for note in table.notes)]


def _cells(row: Row) -> list[str]:
    serving = row.candidate.serving
    against = "baseline" if row.baseline else numbers.NOT_KNOWN
    if row.comparison is not None:
        against = f"{numbers.times(row.comparison.ratio)} {row.comparison.word}"
    mark = f"**{row.outcome}**" if row.outcome == "selected" else row.outcome
    mark += ", champion" if row.champion else ""
    return [
        str(row.number),
        _text(row.candidate.variant_name),
        _text(engine_words(row.candidate.engine)),
        serving.server,
        serving.protocol,
        _text(numbers.number(row.accuracy)),
        _text(numbers.text(row.drop)),
        _text(numbers.text(row.latency)),
        _text(numbers.text(row.throughput)),
        against,
        _text(numbers.number(row.size_mb)),
        mark,
    ]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _loser(row: Row) -> str:
    return f"{_text(row.candidate.name)} ({row.outcome}): {_text(row.reason)}"


def _failure(failure: Failure) -> str:
    kind = failure.kind.replace("_", " ")
    return f"{_text(failure.subject)} ({kind}, {failure.phase}): {_text(failure.reason)}"


def _method(campaign: Campaign) -> list[str]:
    host = campaign.host
    versions = ", ".join(f"{name} {version}" for name, version in sorted(campaign.versions.items()))
    clusters = sorted({one.cluster for one in campaign.candidates if one.cluster})
    return [
        f"campaign {campaign.id}, level {campaign.level}, seed {campaign.seed}, started {_text(campaign.started_at)}",
        f"host {host.fingerprint}: {_text(host.cpu_model)}, {host.cores} cores; {_text(host.pinning)}",
        *(f"served by {_text(cluster)}; the load came from that host" for cluster in clusters),
        f"versions: {_text(versions)}",
    ]


def _section(title: str, items: list[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {item}" for item in items)] if items else []


def _text(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))
