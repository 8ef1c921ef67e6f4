"""Rows of the reports, the terminal and the Markdown."""

import dataclasses
import io

import pytest
from rich.console import Console

from registry import tracked_metrics
from registry.records import Campaign, Candidate, Failure, Variant
from registry.report.markdown import render_markdown
from registry.report.table import latency_name, outcome, printable, rows
from registry.report.terminal import render_terminal
from registry.selection import metric_table
from tests.doubles import campaigns


def shown(width: int, made: object = None, *, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system="truecolor" if terminal else None)
    render_terminal(made or campaigns.campaign(), console)
    return out.getvalue()


def test_the_selected_comes_first_then_the_fastest() -> None:
    made = rows(campaigns.campaign())
    assert [row.number for row in made] == [1, 2, 3, 4]
    assert [row.candidate for row in made] == [
        campaigns.STATIC_TRITON,
        campaigns.OPENVINO_TRITON,
        campaigns.STATIC_MLSERVER,
        campaigns.BASELINE,
    ]
    assert [row.outcome for row in made] == ["selected", "unknown", "rejected", "rejected"]
    assert [row.baseline for row in made] == [False, False, False, True]


def test_a_metric_that_is_missing_is_none_not_zero() -> None:
    row = rows(campaigns.campaign())[1]
    assert row.latency is None
    assert row.throughput is not None


def test_a_candidate_that_failed_is_failed_whatever_the_verdict_says() -> None:
    made = campaigns.campaign()
    died = Failure(subject=campaigns.OPENVINO_TRITON.name, phase="measure", kind="died", reason="out of memory")
    made = dataclasses.replace(made, failures=(died,))
    assert outcome(made, campaigns.OPENVINO_TRITON) == ("failed", "out of memory")


def test_a_candidate_nothing_is_said_of_is_unknown() -> None:
    made = campaigns.campaign()
    verdict = dataclasses.replace(made.verdict, rejections=(), unknown=())
    word, reason = outcome(dataclasses.replace(made, verdict=verdict), campaigns.BASELINE)
    assert word == "unknown"
    assert reason


def only(candidate: Candidate) -> Campaign:
    """The campaign with this candidate alone, and nothing said of it."""
    return dataclasses.replace(campaigns.campaign(), candidates=(candidate,))


def test_accuracy_belongs_to_variant_and_engine() -> None:
    assert rows(only(campaigns.STATIC_TRITON))[0].accuracy is not None
    assert rows(only(dataclasses.replace(campaigns.STATIC_TRITON, engine=campaigns.OPENVINO)))[0].accuracy is None
    assert rows(only(dataclasses.replace(campaigns.STATIC_TRITON, engine_version="0.9")))[0].accuracy is None


@pytest.mark.parametrize(("variant", "known"), [(campaigns.STATIC, True), (campaigns.DYNAMIC, False)])
def test_reports_tracker_and_verdict_know_the_same_accuracy(variant: Variant, known: bool) -> None:
    """Fidelity was taken at batch 8; a variant whose answers depend on the batch is served at 4 here."""
    served = campaigns.candidate(variant, "triton")
    served = dataclasses.replace(served, serving=dataclasses.replace(served.serving, max_batch_size=4))
    made = only(served)
    judged = metric_table(made.candidates, made.measurements, made.fidelities, made.variants)[served.id]
    assert (("accuracy", None) in judged) is known
    assert (rows(made)[0].accuracy is not None) is known
    assert ("accuracy" in tracked_metrics.metrics(made, served)) is known


def test_without_a_limit_the_latency_shown_is_p90_as_it_was_measured() -> None:
    made = campaigns.campaign()
    policy = dataclasses.replace(campaigns.POLICY, constraints=())
    made = dataclasses.replace(made, verdict=dataclasses.replace(made.verdict, policy=policy))
    assert latency_name(made) == ("latency_p90_ms", "0.8 saturation")


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_terminal_report_fits(width: int) -> None:
    text = shown(width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    for expected in ("int8-static", "1,237", "2.72×", "undecided", "selected", "unknown", "not known", "17.3 ms"):
        assert expected in text
    assert "[16.2, 18.4]" in text


def test_a_long_name_is_broken_at_its_own_marks() -> None:
    made = campaigns.campaign()
    named = dataclasses.replace(campaigns.STATIC_TRITON, variant_name="resnet/openvino-int8.bfloat16")
    made = dataclasses.replace(made, candidates=(named, *(one for one in made.candidates if one.id != named.id)))
    cells = [line[:17].strip() for line in shown(80, made).splitlines()]
    assert {"1  resnet/", "openvino-", "int8.bfloat16"} <= set(cells)
    assert "resnet/openvino-int8.bfloat16" in shown(120, made)


def test_the_terminal_report_tells_every_reason() -> None:
    made = campaigns.campaign()
    text = " ".join(shown(100).split())
    assert made.verdict.sentence in text
    assert "Provisional" in text
    for one in (*made.verdict.rejections, *made.failures):
        assert one.reason in text


def test_the_terminal_report_says_what_nearly_passed() -> None:
    text = shown(100, dataclasses.replace(campaigns.campaign(), verdict=campaigns.no_winner()))
    assert "accuracy_drop <= 0.0044 would admit it" in text


def test_a_campaign_that_served_nothing_still_has_reports() -> None:
    made = campaigns.campaign()
    verdict = dataclasses.replace(campaigns.no_winner(), baseline=None, rejections=(), unknown=(), closest=())
    made = dataclasses.replace(
        made, candidates=(), capacities=(), rounds=(), measurements=(), comparisons=(), verdict=verdict
    )
    assert verdict.sentence in " ".join(shown(100, made).split())
    assert "float16" in render_markdown(made)


def test_control_characters_do_not_reach_a_terminal() -> None:
    made = campaigns.campaign()
    bad = Failure(subject="x\x1b[2J\u202e", phase="make", kind="error", reason="[red]boo[/red]\x07")
    text = shown(100, dataclasses.replace(made, failures=(bad,)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[red]boo[/red]" in text


def test_printable_keeps_what_people_read() -> None:
    assert printable("naïve ≤ 5 µs\n日本語") == "naïve ≤ 5 µs\n日本語"


def test_markdown_is_one_table_row_a_candidate_and_deterministic() -> None:
    text = render_markdown(campaigns.campaign())
    assert text == render_markdown(campaigns.campaign())
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(campaigns.CANDIDATES)
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


def test_markdown_does_not_act_on_what_comes_from_outside() -> None:
    made = campaigns.campaign()
    bad = Failure(
        subject="a|b", phase="make", kind="error", reason="<script>x</script>\n# head ![i](http://e.org/i.png)"
    )
    text = render_markdown(dataclasses.replace(made, failures=(bad,)))
    assert r"a\|b" in text
    assert "<script>" not in text
    assert "\n# head" not in text
    assert "![i]" not in text
