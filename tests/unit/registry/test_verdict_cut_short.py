"""A verdict over what was measured before a campaign's time was used up."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from registry import codec
from registry.errors import InputError
from registry.promotion import chosen
from registry.records import Campaign, Failure, Policy, Verdict
from registry.report.html import render_html
from registry.report.markdown import render_markdown
from registry.report.table import outcome
from registry.report.terminal import render_terminal
from registry.selection import metric_table, select
from tests.doubles.campaigns import (
    ACCURACY,
    BASELINE,
    CANDIDATES,
    OPENVINO_TRITON,
    POLICY,
    STATIC_TRITON,
    VARIANTS,
    campaign,
    comparisons,
    fidelities,
    measurements,
)

WHY = "the budget of 30 minutes was used up"
LENIENT = replace(POLICY, constraints=(ACCURACY,))
CUT = "The budget of 30 minutes was used up before all was measured."


def verdict(*names: str, provisional: bool = False, policy: Policy = LENIENT) -> Verdict:
    """The verdict where there was no time for these."""
    failures = [Failure(subject=name, phase="measure", kind="budget", reason=WHY) for name in names]
    return select(
        policy=policy,
        candidates=CANDIDATES,
        variants=VARIANTS,
        metrics=metric_table(CANDIDATES, measurements(), fidelities(), VARIANTS),
        comparisons=comparisons(),
        failures=failures,
        baseline_id=BASELINE.id,
        provisional=provisional,
        cut_short=CUT if names else "",
    )


def of(found: Verdict, failures: tuple[Failure, ...] = ()) -> Campaign:
    return replace(campaign(), level="standard", verdict=found, failures=failures)


def test_what_there_was_no_time_for_is_unknown_and_never_wins():
    assert verdict().selected == STATIC_TRITON.id
    found = verdict(STATIC_TRITON.name)
    assert found.selected == OPENVINO_TRITON.id
    assert STATIC_TRITON.id in found.unknown
    [reason] = [one.reason for one in found.rejections if one.candidate_id == STATIC_TRITON.id]
    assert reason == f"unknown: {WHY}"
    assert STATIC_TRITON.id not in found.pareto
    assert found.cut_short == CUT
    assert found.sentence.endswith(f" {CUT}")
    assert codec.loads(codec.dumps(found)) == found


def test_a_limit_that_was_missed_counts_all_the_same():
    slow = next(one for one in CANDIDATES if one.name == "int8-static @ mlserver-grpc-b8-d2")
    found = verdict(slow.name, policy=POLICY)
    [reason] = [one.reason for one in found.rejections if one.candidate_id == slow.id]
    assert reason.endswith("ms > 50 ms")
    assert slow.id not in found.unknown


def test_where_nothing_was_measured_nothing_wins():
    found = verdict(*(one.name for one in CANDIDATES))
    assert found.selected is None
    assert "4 unknown" in found.sentence
    assert set(found.unknown) == {one.id for one in CANDIDATES}


def test_reports_tell_unknown_from_failed():
    failures = (Failure(subject=STATIC_TRITON.name, phase="measure", kind="budget", reason=WHY),)
    assert outcome(of(verdict(STATIC_TRITON.name), failures), STATIC_TRITON) == ("unknown", f"unknown: {WHY}")
    broken = (replace(failures[0], kind="died"),)
    assert outcome(of(verdict(STATIC_TRITON.name), broken), STATIC_TRITON)[0] == "failed"


def test_reports_say_what_was_cut_short():
    shown = of(verdict(STATIC_TRITON.name, provisional=True))
    told = StringIO()
    render_terminal(shown, Console(file=told, width=400))
    assert CUT in told.getvalue()
    assert "Provisional: what was measured before the budget was used up does not earn a promotion" in told.getvalue()
    assert "before the budget was used up does not earn a promotion" in render_markdown(shown)
    assert "The budget of time was used up before the rounds of the level standard were done" in render_html(shown)


def test_what_was_cut_short_is_not_promoted():
    with pytest.raises(InputError, match="is provisional: The budget of 30 minutes") as caught:
        chosen(of(verdict(BASELINE.name, provisional=True)))
    assert "more minutes" in (caught.value.hint or "")
