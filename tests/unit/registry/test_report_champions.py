"""What the reports say of the champion, and of capacities."""

import dataclasses
import io

from rich.console import Console

from registry.records import Campaign, Champion
from registry.report.capacities import capacity_table
from registry.report.champions import champion_sentence, champion_table
from registry.report.html import render_html
from registry.report.markdown import render_markdown
from registry.report.table import rows
from registry.report.terminal import render_terminal
from tests.doubles import campaigns, reports


def selecting(selected: str | None) -> Campaign:
    made = reports.rich()
    return dataclasses.replace(made, verdict=dataclasses.replace(made.verdict, selected=selected))


def test_the_selected_is_held_against_the_champion() -> None:
    told = champion_sentence(reports.rich())
    assert told == (
        "Against the champion (int8-static @ mlserver-grpc-b8-d2), in the same rounds: maximum throughput "
        "1.40× [1.35, 1.45], faster."
    )
    assert "certainly better than the champion" in champion_sentence(selecting(campaigns.STATIC_MLSERVER.id))
    assert "goes on serving" in champion_sentence(selecting(None))
    assert "is not known" in champion_sentence(selecting(campaigns.OPENVINO_TRITON.id))
    assert champion_sentence(campaigns.campaign()) == ""


def test_where_there_is_none_yet_the_reports_say_which_limits_were_passed_over() -> None:
    limit = "latency_p90_ms <= 105% rel vs champion"
    champion = Champion(
        named="models:/digits@champion", candidate_id=None, passed_over=(limit,), notes=("There is no champion yet.",)
    )
    made = dataclasses.replace(campaigns.campaign(), champion=champion)
    assert champion_sentence(made) == f"There is no champion yet. Passed over: {limit}."
    assert champion_table(made, rows(made)) is None
    page = render_html(made)
    assert "<span>passed over</span>" in page
    assert "There is no champion yet." in render_markdown(made)


def test_every_candidate_that_was_compared_is_in_the_table() -> None:
    made = reports.rich()
    table = champion_table(made, rows(made))
    assert table is not None
    assert [row[0] for row in table.rows] == ["1. int8-static, triton", "4. float32, mlserver"]
    assert table.rows[0][1] == "1.40× [1.35, 1.45], faster"
    assert "1.30.0" in table.notes[1]


def test_each_report_marks_the_champion() -> None:
    made = reports.rich()
    assert "<small>champion</small>" in render_html(made)
    assert "rejected, champion" in render_markdown(made)
    console = Console(width=100, record=True, file=io.StringIO())
    render_terminal(made, console)
    text = console.export_text()
    assert "Against the champion" in text
    assert "What each lever bought (maximum throughput)" in text
    assert "More than 8 requests at a time only wait longer." in text


def test_capacities_stand_side_by_side_with_the_law_told_once() -> None:
    made = reports.rich()
    table = capacity_table(made, rows(made))
    assert table is not None
    assert table.rows[0] == ("1. int8-static, triton", "8", "8", "1,104 [1,049, 1,159]", "883.2 to 993.6")
    assert table.notes[1].startswith("1: 41% of the work")
    assert table.notes[2] == "2, 3, 4: No law is fitted: 4 concurrencies were tried, it takes 6."
    limited = tuple(
        dataclasses.replace(one, slo_max=campaigns.estimate(700.0, 20.0, "1/s")) for one in made.capacities[:1]
    )
    kept = dataclasses.replace(made, capacities=(*limited, *made.capacities[1:]))
    wider = capacity_table(kept, rows(kept))
    assert wider is not None
    assert wider.headings[4] == "within the latency limit, requests/s"
    assert "700 [680, 720]" in [row[4] for row in wider.rows]
    assert capacity_table(dataclasses.replace(made, capacities=()), rows(made)) is None
