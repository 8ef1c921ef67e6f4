"""The search for a serving profile in the reports."""

import dataclasses

from registry import codec
from registry.records import Campaign, Estimate, ServingPoint, ServingProfile, ServingSearch
from registry.report.html import render_html
from registry.report.markdown import render_markdown
from registry.report.searches import search_tables
from tests.doubles.campaigns import campaign

ONE = ServingPoint(
    profile=ServingProfile(server="triton", backend="python"),
    score=Estimate(value=100.0, low=95.0, high=105.0, runs=1, method="single run", unit="1/s"),
    reason="it was named",
)
BOTH = dataclasses.replace(
    ONE,
    profile=dataclasses.replace(ONE.profile, instances=2),
    score=dataclasses.replace(ONE.score, value=180.0, low=170.0, high=190.0),
    reason="the first with workers or instances 2",
)
FAILED = ServingPoint(
    profile=dataclasses.replace(ONE.profile, protocol="rest"), score=None, reason="expected 90", failure="no <answer>"
)
SEARCH = ServingSearch(
    space=40,
    points=(ONE, BOTH, FAILED),
    best=BOTH,
    maxima={"1": ONE, "2": BOTH},
    bounded_out=3,
    stopped="points",
    sentence="triton-grpc-b1-i2 with 180 1/s: looked at 3 of 40 serving profiles (8 %), which is the budget",
    variant_name="int8",
)


def searched() -> Campaign:
    return dataclasses.replace(campaign(), serving_searches=(SEARCH,))


def test_a_search_is_a_table_in_the_order_it_looked() -> None:
    [table] = search_tables(searched())
    assert table.title == "The search for a serving profile for int8"
    assert [row[0] for row in table.rows] == ["1. triton-grpc-b1", "2. triton-grpc-b1-i2", "3. triton-rest-b1"]
    assert table.rows[1][2].endswith(", the best")
    assert "no <answer>" in table.rows[2][1]
    assert "looked at 3 of 40" in table.notes[0]
    assert table.notes[1].startswith("Most with one worker or instance: 100")
    assert "with 2 of them: 180" in table.notes[1]


def test_every_report_shows_it() -> None:
    assert "The search for a serving profile for int8" in render_markdown(searched())
    page = render_html(searched())
    assert "The search for a serving profile for int8" in page
    assert "no &lt;answer&gt;" in page


def test_a_campaign_without_a_search_shows_none() -> None:
    assert search_tables(campaign()) == ()


def test_a_campaign_with_a_search_is_read_back() -> None:
    assert codec.loads(codec.dumps(searched())) == searched()
