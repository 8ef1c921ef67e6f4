"""Where each candidate's time goes, and what it takes and costs, as tables for every report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from registry.records import Campaign, Candidate, Estimate, HardwareProfile, RunRecord
from registry.report import numbers
from registry.report.table import Row, estimate_of, latency_name

BY_DIFFERENCE = "*"
_PARTS = {
    "time_lateness_ms": "client late, ms",
    "time_service_ms": "from then to the answer, ms",
    "time_network_ms": "network and protocol, ms",
    "time_queue_ms": "queue, ms",
    "time_compute_ms": "compute, ms",
    "batch_rows": "rows a run",
}
_DIFFERENCES = {"time_network_ms": "network_ms", "time_queue_ms": "queue_ms"}
_RESOURCES = {
    "cpu_s_per_1k": "CPU s per 1,000",
    "rss_mb": "resident MB",
    "peak_rss_mb": "peak MB",
    "load_time_s": "load, s",
    "first_request_ms": "first request, ms",
    "gpu_memory_mb": "GPU MB",
    "gpu_utilisation": "GPU busy",
    "cpu_joules_per_1k": "CPU J per 1,000",
    "gpu_joules_per_1k": "GPU J per 1,000",
    "cost_per_million": "cost per million",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts; the first column is the candidate's number, and none is empty of values.

    Attributes:
        title: what it shows.
        headings: of the columns.
        rows: a cell a heading each.
        notes: what a reader must know of it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def tables(campaign: Campaign, shown: Sequence[Row]) -> tuple[Table, ...]:
    """The tables that have anything to show."""
    both = (time_table(campaign, shown), resource_table(campaign, shown))
    return tuple(table for table in both if table is not None)


def time_table(campaign: Campaign, shown: Sequence[Row]) -> Table | None:
    """Where the time goes at the load whose latency is reported; None where no server told."""
    _, load = latency_name(campaign)
    cells: dict[str, list[str]] = {"in process, ms": [_text(_in_process(campaign, row.candidate)) for row in shown]}
    for metric, heading in _PARTS.items():
        cells[heading] = [
            _part(campaign, row.candidate, metric, load, by_difference=_DIFFERENCES.get(metric)) for row in shown
        ]
    of_server = [_PARTS["time_network_ms"], _PARTS["time_queue_ms"], _PARTS["time_compute_ms"]]
    if all(cell == numbers.NOT_KNOWN for heading in of_server for cell in cells[heading]):
        return None
    notes = [
        "Means of a request; compute includes what other work of the machine took from it. In process: one request "
        "alone, without a server.",
        f"{BY_DIFFERENCE} what is left of a larger part, so that it holds all that nobody counts.",
        *_contradictions(campaign, shown, load),
    ]
    return _table(f"Where the time goes{f' at {load}' if load else ''}", shown, cells, notes)


def resource_table(campaign: Campaign, shown: Sequence[Row]) -> Table | None:
    """What each candidate takes at its closed-loop maximum, and costs; None where nothing is known."""
    cells = {
        heading: [_text(estimate_of(campaign, row.candidate.id, metric, None)) for row in shown]
        for metric, heading in _RESOURCES.items()
    }
    cells = {heading: column for heading, column in cells.items() if {*column} - {numbers.NOT_KNOWN}}
    if not cells:
        return None
    costs = [estimate_of(campaign, row.candidate.id, "cost_per_million", None) for row in shown]
    return _table("What it takes", shown, cells, _notes(campaign.hardware, costs, cells))


def _notes(hardware: HardwareProfile | None, costs: Iterable[Estimate | None], cells: Iterable[str]) -> Iterable[str]:
    if _RESOURCES["peak_rss_mb"] in cells:
        yield "Peak: the highest of each process of the server since its start, summed."
    if any(heading.endswith("J per 1,000") for heading in cells):
        yield "Energy is that of the whole package or card, idle power included: an estimate."
    method = next((cost.method for cost in costs if cost is not None), None)
    if hardware is not None and method is not None:
        yield (
            f"Cost in {hardware.currency} on {hardware.name}: {method}; price by {hardware.price_source}, "
            f"{hardware.price_date}."
        )


def _table(title: str, shown: Sequence[Row], cells: dict[str, list[str]], notes: Iterable[str]) -> Table:
    rows = zip(
        (f"{row.number}. {row.candidate.variant_name}, {row.candidate.serving.server}" for row in shown),
        *cells.values(),
        strict=True,
    )
    return Table(title=title, headings=("candidate", *cells), rows=tuple(rows), notes=tuple(notes))


def _text(estimate: Estimate | None) -> str:
    """Value and interval; the unit stands in the heading."""
    return " ".join(part for part in (numbers.number(estimate), numbers.interval(estimate)) if part)


def _in_process(campaign: Campaign, candidate: Candidate) -> Estimate | None:
    for one in campaign.screenings:
        if one.variant_id == candidate.variant_id and one.engine == candidate.engine:
            return one.metrics.get("inprocess_ms.batch_1")
    return None


def _part(campaign: Campaign, candidate: Candidate, metric: str, load: str | None, *, by_difference: str | None) -> str:
    estimate = estimate_of(campaign, candidate.id, metric, load)
    marked = estimate is not None and any(
        run.breakdown is not None and by_difference in run.breakdown.by_difference
        for run in _runs(campaign, candidate, load)
    )
    return _text(estimate) + (BY_DIFFERENCE if marked else "")


def _runs(campaign: Campaign, candidate: Candidate, load: str | None) -> list[RunRecord]:
    return [
        run
        for one in campaign.rounds
        if one.candidate_id == candidate.id
        for run in one.runs
        if run.load.name == load and run.valid
    ]


def _contradictions(campaign: Campaign, shown: Sequence[Row], load: str | None) -> Iterable[str]:
    for row in shown:
        runs = _runs(campaign, row.candidate, load)
        odd = [run.breakdown.notes[0] for run in runs if run.breakdown is not None and run.breakdown.notes]
        if odd:
            yield f"{row.number}: in {len(odd)} of {len(runs)} windows {odd[0]}."
