"""Where each candidate saturates, why, and how much of that to use, as a table for every report."""

from collections.abc import Sequence

from registry.records import Campaign, Capacity, CapacityAdvice, Estimate
from registry.report import numbers
from registry.report.resources import Table
from registry.report.table import Row, capacity_of, estimate_of


def capacity_table(campaign: Campaign, shown: Sequence[Row]) -> Table | None:
    """The knee, the saturation point and what follows; None where no capacity was looked for."""
    advice = {one.candidate_id: one for one in campaign.advice}
    known = [
        (row, capacity, advice.get(row.candidate.id))
        for row in shown
        if (capacity := capacity_of(campaign, row.candidate.id)) is not None
    ]
    if not known:
        return None
    limited = any(capacity.slo_max is not None for _, capacity, _ in known)
    headings = ["candidate", "best concurrency", "knee", "saturation, requests/s"]
    headings += ["within the latency limit, requests/s"] if limited else []
    rows = []
    for row, capacity, advised in known:
        cells = [
            f"{row.number}. {row.candidate.variant_name}, {row.candidate.serving.server}",
            str(capacity.concurrency),
            str(advised.knee) if advised is not None and advised.knee is not None else numbers.NOT_KNOWN,
            _saturation(campaign, capacity),
        ]
        cells += [_with_interval(capacity.slo_max)] if limited else []
        rows.append((*cells, _target(advised)))
    return Table(
        title="Capacity",
        headings=(*headings, "to give a replica, requests/s"),
        rows=tuple(rows),
        notes=(
            "Knee: the smallest concurrency within 5 % of the highest throughput; more at a time only wait longer. A "
            "replica is best given 10 to 20 % less than its saturation.",
            *_explanations([(row, advised) for row, _, advised in known]),
        ),
    )


def _saturation(campaign: Campaign, capacity: Capacity) -> str:
    found = estimate_of(campaign, capacity.candidate_id, "saturation_rps", None)
    if found is not None:
        return _with_interval(found)
    return numbers.NOT_KNOWN if capacity.saturation_rps is None else numbers.plain(capacity.saturation_rps)


def _with_interval(estimate: Estimate | None) -> str:
    return " ".join(part for part in (numbers.number(estimate), numbers.interval(estimate)) if part)


def _target(advised: CapacityAdvice | None) -> str:
    if advised is None or advised.target_rps is None:
        return numbers.NOT_KNOWN
    least, most = advised.target_rps
    return f"{numbers.plain(least)} to {numbers.plain(most)}"


def _explanations(known: Sequence[tuple[Row, CapacityAdvice | None]]) -> list[str]:
    """What the law says of each ladder; once where it says the same of several."""
    said: dict[str, list[str]] = {}
    for row, advised in known:
        if advised is not None and advised.explanation:
            said.setdefault(advised.explanation, []).append(str(row.number))
    return [f"{', '.join(places)}: {words}" for words, places in said.items()]
