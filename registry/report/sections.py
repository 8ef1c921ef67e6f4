"""The tables below the candidates, in their order, the same for every report."""

from collections.abc import Sequence

from registry.records import Campaign
from registry.report.capacities import capacity_table
from registry.report.champions import champion_table
from registry.report.resources import Table, tables
from registry.report.searches import search_tables
from registry.report.table import Row
from registry.report.waterfall import waterfall_table


def all_tables(campaign: Campaign, shown: Sequence[Row]) -> tuple[Table, ...]:
    """What levers bought, the champion, capacity, where time goes, what it takes, what was searched."""
    first = (waterfall_table(campaign), champion_table(campaign, shown), capacity_table(campaign, shown))
    return (*(one for one in first if one is not None), *tables(campaign, shown), *search_tables(campaign))
