"""Tables of where the time goes and of what it takes."""

import dataclasses

from registry import tracked
from registry.records import Breakdown, Campaign, HardwareProfile, Measurement
from registry.report.html import render_html
from registry.report.markdown import render_markdown
from registry.report.resources import resource_table, tables, time_table
from registry.report.table import rows
from tests.doubles import campaigns

PARTS = {
    "time_lateness_ms": campaigns.estimate(0.1, 0.01, "ms"),
    "time_network_ms": campaigns.estimate(1.5, 0.1, "ms"),
    "time_queue_ms": campaigns.estimate(4.0, 0.2, "ms"),
    "time_compute_ms": campaigns.estimate(3.0, 0.2, "ms"),
    "batch_rows": campaigns.estimate(2.5, 0.2, "1"),
}

SERVERS = {"time_network_ms", "time_queue_ms", "time_compute_ms"}


def made(*, notes: tuple[str, ...] = ()) -> Campaign:
    """The campaign of the double, whose first candidate's server told of its times."""
    campaign = campaigns.campaign()
    first = campaign.candidates[0].id
    broken_down = Breakdown(
        requests=10, lateness_ms=0.1, service_ms=8.6, network_ms=1.5, by_difference=("network_ms",), notes=notes
    )
    rounds = tuple(
        dataclasses.replace(one, runs=tuple(dataclasses.replace(run, breakdown=broken_down) for run in one.runs))
        if one.candidate_id == first
        else one
        for one in campaign.rounds
    )
    return dataclasses.replace(
        campaign, rounds=rounds, measurements=tuple(_told(one, first) for one in campaign.measurements)
    )


def _told(one: Measurement, first: str) -> Measurement:
    if one.candidate_id != first:
        return one
    cost = campaigns.estimate(0.25, 0.01, "EUR", method="0.09 EUR an hour (1 of 4 cores) over saturation_rps")
    more = {"cost_per_million": cost, "peak_rss_mb": campaigns.estimate(300.0, 0.0, "MB")}
    return dataclasses.replace(one, metrics={**one.metrics, **(more if one.load is None else PARTS)})


def test_parts_stand_with_their_intervals_and_differences_are_marked() -> None:
    campaign = made()
    table = time_table(campaign, rows(campaign))
    assert table is not None
    by_name = {row[0].partition(" ")[2]: dict(zip(table.headings, row, strict=True)) for row in table.rows}
    (told,) = [row for row in by_name.values() if row["compute, ms"] != "not known"]
    assert told["network and protocol, ms"] == "1.50 [1.40, 1.60]*"
    assert told["queue, ms"] == "4.00 [3.80, 4.20]"
    assert table.title == "Where the time goes at 0.8 saturation"


def test_a_client_alone_makes_no_table() -> None:
    campaign = made()
    alone = [
        dataclasses.replace(one, metrics={name: one.metrics[name] for name in one.metrics if name not in SERVERS})
        for one in campaign.measurements
    ]
    assert time_table(dataclasses.replace(campaign, measurements=tuple(alone)), rows(campaign)) is None


def test_what_contradicts_itself_is_told() -> None:
    campaign = made(notes=("network_ms came out as -0.5",))
    table = time_table(campaign, rows(campaign))
    assert table is not None
    assert "in 3 of 3 windows network_ms came out as -0.5." in table.notes[-1]


def test_columns_that_nobody_knows_are_left_out() -> None:
    campaign = made()
    table = resource_table(campaign, rows(campaign))
    assert table is not None
    assert table.headings == ("candidate", "resident MB", "peak MB", "load, s", "cost per million")
    assert len({len(row) for row in table.rows}) == 1


def test_a_cost_says_what_it_was_counted_from() -> None:
    hardware = HardwareProfile(
        name="mine", cores=4, price_per_hour=0.36, currency="EUR", price_source="a contract", price_date="2026-01-31"
    )
    campaign = dataclasses.replace(made(), hardware=hardware)
    table = resource_table(campaign, rows(campaign))
    assert table is not None
    assert table.notes[-1] == (
        "Cost in EUR on mine: 0.09 EUR an hour (1 of 4 cores) over saturation_rps; price by a contract, 2026-01-31."
    )


def test_a_tracker_is_told_what_a_cost_was_counted_for() -> None:
    priced = HardwareProfile(
        name="mine", cores=4, price_per_hour=0.36, currency="EUR", price_source="a contract", price_date="2026-01-31"
    )
    told = tracked.campaign_parameters(dataclasses.replace(made(), hardware=priced))
    assert told["hardware.price_per_hour"] == "0.36 EUR"
    assert told["hardware.price_source"] == "a contract, 2026-01-31"
    plain = tracked.campaign_parameters(dataclasses.replace(made(), hardware=HardwareProfile(name="cpu-2", cores=2)))
    assert (plain["hardware.cores"], "hardware.price_per_hour" in plain) == ("2", False)


def test_a_campaign_of_which_nothing_is_known_has_no_tables() -> None:
    campaign = dataclasses.replace(campaigns.campaign(), measurements=())
    assert tables(campaign, rows(campaign)) == ()


def test_both_reports_have_them() -> None:
    campaign = made()
    for text in (render_markdown(campaign), render_html(campaign)):
        assert "Where the time goes at 0.8 saturation" in text
        assert "What it takes" in text
        assert "cost per million" in text
    assert "Where the time goes" not in render_markdown(campaigns.campaign())
