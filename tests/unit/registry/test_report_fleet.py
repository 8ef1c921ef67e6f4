"""The report of a fleet: the ranking, and the same said in a terminal, in Markdown and on a page."""

import dataclasses
import re

import pytest
from rich.console import Console

from registry.records import Fleet
from registry.report.fleet import fleet_rows, fleet_sentence, fleet_tables, size_words, speed_up_words
from registry.report.fleet_gains import gain_of
from registry.report.fleet_html import render_fleet_html
from registry.report.fleet_markdown import render_fleet_markdown
from registry.report.fleet_terminal import render_fleet_terminal
from tests.doubles import campaigns, fleets


def of(*outcomes: object) -> Fleet:
    return dataclasses.replace(
        fleets.fleet(), outcomes=outcomes, models=tuple(fleets.model(one.model) for one in outcomes)
    )


def test_what_was_won_is_the_selected_beside_the_baseline():
    made = campaigns.campaign()
    won = gain_of(made)
    assert won.candidate == campaigns.STATIC_TRITON.name
    assert won.against == campaigns.BASELINE.name
    assert won.word == "faster"
    assert won.speed_up == made.comparisons[1].ratio
    assert (won.baseline_size_mb, won.size_mb) == (1.118, 0.331)
    assert won.accuracy_drop.value == 0.0011
    assert not won.is_baseline
    assert gain_of(dataclasses.replace(made, verdict=campaigns.no_winner())) is None


def test_a_smaller_latency_is_a_speed_up():
    made = campaigns.campaign()
    found = gain_of(dataclasses.replace(made, comparisons=(fleets.compared("latency_p90_ms", 0.5, 0.4, 0.8),)))
    assert (found.speed_up.low, found.speed_up.value, found.speed_up.high) == (1.25, 2.0, 2.5)


def test_a_baseline_that_stays_wins_nothing():
    made = campaigns.campaign()
    kept = gain_of(dataclasses.replace(made, verdict=dataclasses.replace(made.verdict, selected=campaigns.BASELINE.id)))
    assert kept.is_baseline
    assert kept.speed_up is None
    assert speed_up_words(kept) == ("1×", "the baseline stays")


def test_what_was_never_compared_is_held_against_the_campaigns_baseline():
    made = campaigns.campaign()
    found = gain_of(dataclasses.replace(made, comparisons=()))
    assert found.word is None
    assert found.against == campaigns.BASELINE.name
    assert found.speed_up.value == pytest.approx(2.7, rel=0.05)
    assert f"over {campaigns.BASELINE.name}" in speed_up_words(found)[1]


def test_certain_gains_rank_before_larger_ones_that_are_not():
    rows = fleet_rows(fleets.fleet())
    assert [(row.rank, row.model.name) for row in rows] == [
        (1, "sure"), (2, "kept"), (3, "wide"), (None, "strict"), (None, "broken"), (None, "late"), (None, "next"),
    ]  # fmt: skip


def test_what_is_not_known_ranks_last_and_equal_gains_by_what_they_save():
    small = fleets.gain(2.0, 1.9, size_mb=0.1)
    fleet = of(
        fleets.won("open", fleets.gain(9.0, None)),
        fleets.won("none", fleets.gain(speed_up=None, word=None)),
        fleets.won("large", fleets.gain(2.0, 1.9)),
        fleets.won("small", small),
    )
    assert [row.model.name for row in fleet_rows(fleet)] == ["small", "large", "open", "none"]


def test_the_sentence_counts_all_of_them():
    assert fleet_sentence(fleets.fleet()) == (
        "3 of 7 models have a winner, 1 of them faster than the baseline, 1 the baseline itself; 1 without one, "
        "1 failed, 1 stopped, 1 not begun. Most was won for sure: 1.90× [1.80, 2.00]."
    )


def test_sizes_say_what_is_saved():
    assert size_words(fleets.gain(size_mb=0.5, baseline_size_mb=2.0)) == ("0.500", "75 % saved")
    assert size_words(fleets.gain(size_mb=3.0, baseline_size_mb=2.0)) == ("3", "50 % more")
    assert size_words(fleets.gain(size_mb=None)) == ("not known", "")


def test_groups_and_hosts_are_told_where_there_are_any():
    groups, hosts = fleet_tables(fleets.fleet())
    assert groups.rows == (("text", "1", "37.5", "2 of 4"), ("vision", "2", "37.5", "1 of 3"))
    assert {row[0]: row[2] for row in hosts.rows} == {
        campaigns.campaign().host.fingerprint: "sure, kept, wide",
        "b" * 16: "strict",
    }
    assert fleet_tables(of(fleets.lost("a", "failed"))) == ()


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_has_a_reason_for_each(width: int):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    render_fleet_terminal(fleets.fleet(), console)
    console.file.close()
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    flat = " ".join(text.split())
    for words in ("1.90×", "the baseline stays", "Provisional: level quick", "No candidate meets the policy", "Groups"):
        assert words in flat
    for row in fleet_rows(fleets.fleet()):
        assert row.model.name in flat
        assert row.reason in flat


def test_markdown_says_the_same_and_escapes_what_models_say():
    text = render_fleet_markdown(fleets.fleet())
    assert r"the samples \| do not fit \<x\>" in text
    assert "| 1 | sure | text |" in text
    assert "## No winner" in text
    assert "accuracy\\_drop <= 0.0044".replace("<", "\\<") in text
    assert text == render_fleet_markdown(fleets.fleet())


def test_the_page_needs_nothing_but_itself_and_leads_to_the_others():
    page = render_fleet_html(fleets.fleet())
    assert "the samples | do not fit &lt;x&gt;" in page
    assert 'href="models/sure/report.html"' in page
    assert 'href="models/strict/report.html"' in page
    assert 'href="models/broken/run.log"' in page
    assert "models/next/" not in page
    assert not re.search(r"<script|https?://|url\(['\"]?(?!#)", page)
    assert page.count("<svg") == 1
    assert page == render_fleet_html(fleets.fleet())


def test_the_page_of_a_fleet_without_winners():
    page = render_fleet_html(of(fleets.lost("a", "failed", reason="no <reason>")))
    assert "0 of 1 models have a winner; 1 failed." in page
    assert "<svg" not in page


def test_hundreds_of_models_are_drawn_in_part():
    page = render_fleet_html(of(*(fleets.won(f"m{n:03}", fleets.gain(2 + n / 100, 1.9 + n / 100)) for n in range(200))))
    assert "The first 40 of 200 are drawn." in page
    assert page.count('class="chip') == 0
    assert len(page) < 400_000
