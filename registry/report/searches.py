"""What the searches for a serving profile looked at, as tables for every report."""

from registry.records import Campaign, ServingPoint, ServingSearch
from registry.report import numbers
from registry.report.resources import Table

_WORDS = {"1": "one worker or instance"}


def search_tables(campaign: Campaign) -> tuple[Table, ...]:
    """One table for each search, the profiles in the order they were looked at."""
    return tuple(_table(search) for search in campaign.serving_searches)


def _table(search: ServingSearch) -> Table:
    rows = tuple(
        (
            f"{number}. {point.profile.key}",
            f"failed: {point.failure}" if point.score is None else numbers.text(point.score),
            point.reason + (", the best" if point == search.best else ""),
        )
        for number, point in enumerate(search.points, 1)
    )
    named = f" for {search.variant_name}" if search.variant_name else ""
    return Table(
        title=f"The search for a serving profile{named}",
        headings=("profile", "closed-loop rate", "why it was looked at"),
        rows=rows,
        notes=(f"{search.sentence}.", *_maxima(search)),
    )


def _maxima(search: ServingSearch) -> tuple[str, ...]:
    """The largest rates with one worker and with more, as Seldon's guide to performance asks for them."""
    told = [f"{_WORDS.get(count, f'{count} of them')}: {_rate(point)}" for count, point in search.maxima.items()]
    return (f"Most with {'; with '.join(told)}.",) if told else ()


def _rate(point: ServingPoint) -> str:
    return f"{numbers.text(point.score)} ({point.profile.key})"
