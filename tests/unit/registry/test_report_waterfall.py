"""What each lever bought: only over candidates that were measured, and with no made-up number between them."""

import dataclasses

import pytest

from registry.records import Campaign, Candidate, Measurement, Objective, exact
from registry.report.markdown import render_markdown
from registry.report.waterfall import waterfall, waterfall_table
from tests.doubles import campaigns
from tests.doubles.campaigns import BASELINE, STATIC_MLSERVER, STATIC_TRITON, campaign, estimate


def without(made: Campaign, gone: Candidate) -> Campaign:
    """The campaign as it would be had one candidate never been measured."""
    return dataclasses.replace(
        made,
        candidates=tuple(one for one in made.candidates if one != gone),
        rounds=tuple(one for one in made.rounds if one.candidate_id != gone.id),
        measurements=tuple(one for one in made.measurements if one.candidate_id != gone.id),
        comparisons=tuple(one for one in made.comparisons if one.candidate_id != gone.id),
    )


def test_each_step_is_a_candidate_that_was_measured() -> None:
    found = waterfall(campaign())
    assert found is not None
    assert [(step.levers, step.candidate) for step in found.steps] == [
        (("artifact",), STATIC_MLSERVER),
        (("server",), STATIC_TRITON),
    ]
    assert found.start.value == 455.3
    assert [step.value.value for step in found.steps] == [884.6, 1236.9]
    assert "no number" not in " ".join(found.notes)


def test_a_recorded_comparison_goes_before_what_rounds_say_again() -> None:
    made = campaign()
    found = waterfall(made)
    assert found is not None
    recorded = next(one for one in made.comparisons if one.candidate_id == STATIC_MLSERVER.id)
    assert found.steps[0].ratio == recorded.ratio
    # Two servers were not compared when it was recorded; they were measured in the same rounds.
    across = found.steps[1].ratio
    assert across is not None
    assert (across.runs, across.method) == (3, "t over paired rounds")
    assert across.low is not None
    assert across.low < 1236.9 / 884.6 < (across.high or 0)


def test_levers_between_which_nothing_was_measured_are_one_step() -> None:
    found = waterfall(without(campaign(), STATIC_MLSERVER))
    assert found is not None
    assert [step.levers for step in found.steps] == [("artifact", "server")]
    assert found.steps[0].name == "artifact and server"
    assert "Artifact and server are one step: nothing was measured with only some of them changed." in found.notes
    assert found.steps[0].ratio == found.total


def test_who_pulls_another_lever_is_no_step() -> None:
    """The selected serves with no batching; a candidate that batches by 4 is on no way from 8 to 1."""
    made = campaign()
    aside = dataclasses.replace(
        STATIC_MLSERVER, id="aside", serving=dataclasses.replace(STATIC_MLSERVER.serving, max_batch_size=4)
    )
    known = Measurement(candidate_id="aside", load=None, metrics={"max_throughput_rps": estimate(900.0, 3.0, "1/s")})
    made = dataclasses.replace(made, candidates=(*made.candidates, aside), measurements=(*made.measurements, known))
    found = waterfall(made)
    assert found is not None
    assert "aside" not in [step.candidate.id for step in found.steps]


def test_the_longest_way_is_taken_and_of_two_that_in_the_order_of_the_house() -> None:
    made = campaign()
    serving = BASELINE.serving
    last = dataclasses.replace(
        STATIC_MLSERVER, id="last", serving=dataclasses.replace(serving, max_batch_size=16, protocol="rest")
    )
    artifact_first = dataclasses.replace(STATIC_MLSERVER, id="artifact")
    batching_first = dataclasses.replace(
        BASELINE, id="batching", serving=dataclasses.replace(serving, max_batch_size=16)
    )
    both = dataclasses.replace(STATIC_MLSERVER, id="both", serving=dataclasses.replace(serving, max_batch_size=16))
    chain = (BASELINE, batching_first, artifact_first, both, last)
    made = dataclasses.replace(
        made,
        candidates=chain,
        failures=(),
        rounds=(),
        comparisons=(),
        measurements=tuple(
            Measurement(
                candidate_id=one.id, load=None, metrics={"max_throughput_rps": estimate(100.0 + place, 1.0, "1/s")}
            )
            for place, one in enumerate(chain)
        ),
        verdict=dataclasses.replace(made.verdict, selected="last"),
    )
    found = waterfall(made)
    assert found is not None
    assert [step.candidate.id for step in found.steps] == ["artifact", "both", "last"]
    assert [step.levers for step in found.steps] == [("artifact",), ("batching",), ("protocol",)]
    # No rounds: the two values have a ratio, and nobody knows how far to trust it.
    assert found.total is not None
    assert found.total.value == pytest.approx(104 / 100)
    assert found.total.low is None
    assert any("without an interval" in note for note in found.notes)


def test_a_metric_at_a_load_takes_the_runs_of_that_load() -> None:
    made = campaign()
    objective = Objective(
        text="minimize latency_p50_ms", direction="minimize", metric="latency_p50_ms", load=campaigns.AT_SATURATION
    )
    policy = dataclasses.replace(made.verdict.policy, objectives=(objective,))
    found = waterfall(dataclasses.replace(made, verdict=dataclasses.replace(made.verdict, policy=policy)))
    assert found is not None
    assert found.total is not None
    assert found.label == "p50 at 0.8 saturation"
    assert found.total.value == pytest.approx(2.3 / 8.1, rel=1e-3)
    assert found.total.runs == 3


@pytest.mark.parametrize("selected", [None, BASELINE.id])
def test_there_is_no_way_where_nothing_or_the_baseline_is_selected(selected: str | None) -> None:
    made = campaign()
    made = dataclasses.replace(made, verdict=dataclasses.replace(made.verdict, selected=selected))
    assert waterfall(made) is None
    assert waterfall_table(made) is None


def test_there_is_no_way_from_a_baseline_that_was_not_measured() -> None:
    made = campaign()
    left = tuple(one for one in made.measurements if one.candidate_id != BASELINE.id)
    assert waterfall(dataclasses.replace(made, measurements=left)) is None


def test_of_nothing_there_is_no_ratio() -> None:
    """The baseline loses nothing against itself: what a variant loses is no multiple of that."""
    made = campaign()
    objective = Objective(text="minimize accuracy_drop", direction="minimize", metric="accuracy_drop", load=None)
    policy = dataclasses.replace(made.verdict.policy, objectives=(objective,))
    fidelities = tuple(
        dataclasses.replace(one, metrics={**one.metrics, "accuracy_drop": exact(value, "fraction")})
        for one in made.fidelities
        for value in ((0.0,) if one.variant_id == BASELINE.variant_id else (0.002,))
    )
    verdict = dataclasses.replace(made.verdict, policy=policy)
    found = waterfall(dataclasses.replace(made, fidelities=fidelities, verdict=verdict))
    assert found is not None
    # The same variant on another server loses the same.
    assert [step.ratio is None or step.ratio.value for step in found.steps] == [True, 1.0]
    assert found.total is None
    table = waterfall_table(dataclasses.replace(made, fidelities=fidelities, verdict=verdict))
    assert table is not None
    assert [row[-1] for row in table.rows] == ["", "not known", "1.00×", "not known"]
    assert "Of values that are not above zero there is no ratio." in table.notes


def test_markdown_says_the_same() -> None:
    text = render_markdown(campaign())
    assert "## What each lever bought" in text
    assert "1.94× \\[1.88, 2.00\\]" in text
