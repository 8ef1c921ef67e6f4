import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from registry.policy import parse_policy
from registry.records import (
    Artifact,
    ArtifactFile,
    Candidate,
    Comparison,
    Constraint,
    EngineSpec,
    Estimate,
    Failure,
    Fidelity,
    Measurement,
    Recipe,
    ServingProfile,
    StageCall,
    Variant,
    Verdict,
    exact,
)
from registry.selection import References, judge, metric_table, pareto_front, relaxation, select

ORT = EngineSpec(name="onnxruntime")
GOAL = "maximize max_throughput_rps"
RATE = ("max_throughput_rps", None)
DROP = ("accuracy_drop", None)
P90 = ("latency_p90_ms", "0.8 saturation")


def estimate(value: float, low: float | None, high: float | None, unit: str = "1") -> Estimate:
    return Estimate(value=value, low=low, high=high, runs=5, method="t over runs", unit=unit)


def around(value: float, spread: float = 0.01, unit: str = "1/s") -> Estimate:
    return estimate(value, value * (1 - spread), value * (1 + spread), unit)


def variant(name: str, *, stages: int = 1, size_bytes: int = 10, batch_dependent: bool = False) -> Variant:
    file = Artifact(digest=name, format="onnx", entry="m.onnx", files=(), inputs=(), outputs=())
    calls = tuple(StageCall(name=f"s{number}") for number in range(stages))
    return Variant(
        id=name,
        name=name,
        source="s",
        source_digest="d",
        recipe=Recipe(name=name, stages=calls, engines=(ORT,)),
        calibration_digest=None,
        seed=0,
        tool_versions={},
        artifact=replace(file, files=(ArtifactFile(path="m.onnx", sha256="0", size_bytes=size_bytes),)),
        batch_dependent=batch_dependent,
    )


def candidate(of: Variant, *, suffix: str = "", batch: int = 1) -> Candidate:
    return Candidate(
        id=f"id-{of.name}{suffix}",
        name=f"{of.name}{suffix}",
        variant_id=of.id,
        variant_name=of.name,
        engine=ORT,
        engine_version="1",
        serving=ServingProfile(server="mlserver", backend="burnish", max_batch_size=batch),
        server_version="1",
    )


def comparison(one: str, other: str, word: Any, ratio: Estimate | None = None) -> Comparison:
    return Comparison(
        candidate_id=f"id-{one}",
        baseline_id=f"id-{other}",
        metric=RATE[0],
        load=None,
        ratio=ratio or estimate(1.1, 1.0, 1.2),
        noise_floor=0.02,
        word=word,
    )


class Case:
    """Candidates with their metrics; the first is the baseline."""

    def __init__(self, **metrics: Mapping[Any, Estimate]) -> None:
        self.variants = {name: variant(name, stages=number) for number, name in enumerate(metrics)}
        self.metrics = {f"id-{name}": dict(known) for name, known in metrics.items()}
        self.comparisons: list[Comparison] = []
        self.failures: list[Failure] = []

    def verdict(
        self,
        constraints: list[str],
        objective: Any = GOAL,
        *,
        provisional: bool = False,
        signature: Any = "same",
        champion: str | None = None,
    ) -> Verdict:
        candidates = [candidate(one) for one in self.variants.values()]
        return select(
            policy=parse_policy(constraints, objective, signature=signature),
            candidates=candidates,
            variants=list(self.variants.values()),
            metrics=self.metrics,
            comparisons=self.comparisons,
            failures=self.failures,
            baseline_id=candidates[0].id if candidates else None,
            provisional=provisional,
            champion_id=champion,
        )


def reasons(verdict: Verdict) -> dict[str, str]:
    return {rejection.candidate_name: rejection.reason for rejection in verdict.rejections}


def test_the_fastest_that_passes_is_selected_and_each_loser_hears_why():
    case = Case(
        base={RATE: around(200), DROP: exact(0, "fraction"), P90: around(20, unit="ms")},
        good={RATE: around(655), DROP: estimate(0.002, -0.001, 0.005, "fraction"), P90: around(31, unit="ms")},
        slower={RATE: around(412), DROP: estimate(0.0, 0.0, 0.003, "fraction"), P90: around(31, unit="ms")},
        wrong={RATE: around(900), DROP: estimate(0.03, 0.02, 0.04, "fraction"), P90: around(10, unit="ms")},
        doubtful={RATE: around(900), DROP: estimate(0.008, 0.0, 0.016, "fraction"), P90: around(10, unit="ms")},
        late={RATE: around(900), DROP: exact(0, "fraction"), P90: estimate(61, 58, 64, "ms")},
        unseen={RATE: around(900), DROP: exact(0, "fraction")},
    )
    case.comparisons = [comparison("good", "base", "faster", around(3.275, unit="1"))]
    verdict = case.verdict(["accuracy_drop <= 0.01", "latency_p90_ms <= 50"])
    assert verdict.selected == "id-good"
    assert verdict.baseline == "id-base"
    assert verdict.unknown == ("id-unseen",)
    assert verdict.closest == ()
    assert verdict.sentence.startswith("Serve good: it meets the policy, maximum throughput 655")
    assert "× that of the baseline served the same way" in verdict.sentence
    told = reasons(verdict)
    assert "good" not in told
    assert len(told) == 6
    assert told["slower"].startswith("passes, but maximum throughput 412")
    assert told["slower"].endswith("of the selected")
    assert "> 0.01" in told["wrong"]
    assert "is not certainly <= 0.01" in told["doubtful"]
    assert told["late"] == "p90 at 0.8 saturation 61.0 [58.0, 64.0] ms > 50 ms"
    assert told["unseen"] == "unknown: p90 at 0.8 saturation is not known"


def test_unknown_never_wins_though_it_be_the_fastest():
    case = Case(base={RATE: around(200), DROP: exact(0, "fraction")}, fast={RATE: around(900)})
    verdict = case.verdict(["accuracy_drop <= 0.01"])
    assert verdict.selected == "id-base"
    assert verdict.sentence.startswith("Keep the baseline base")
    assert verdict.unknown == ("id-fast",)


def test_an_objective_that_is_not_known_makes_a_candidate_unknown():
    case = Case(base={}, fast={DROP: exact(0, "fraction")})
    verdict = case.verdict(["accuracy_drop <= 0.01"])
    assert verdict.selected is None
    assert verdict.unknown == ("id-base", "id-fast")
    assert verdict.closest == ()
    assert verdict.sentence == "No candidate meets the policy (2 unknown)."
    assert "maximum throughput is not known" in reasons(verdict)["fast"]


@pytest.mark.parametrize(
    ("observed", "outcome", "part"),
    [
        (estimate(10, 9, 12, "ms"), "pass", "<= 12 ms"),
        (estimate(10, 9, 12.01, "ms"), "fail", "is not certainly <= 12 ms"),
        (estimate(13, 9, 14, "ms"), "fail", "> 12 ms"),
        (estimate(10, 9, None, "ms"), "unknown", "has no upper end"),
        (estimate(13, 9, None, "ms"), "unknown", "has no upper end"),
        (estimate(10, None, 11, "ms"), "pass", "<= 12 ms"),
        (None, "unknown", "p90 at 0.8 saturation is not known"),
    ],
)
def test_an_upper_limit_is_held_against_the_upper_end(observed, outcome, part):
    constraint = parse_policy(["latency_p90_ms <= 12"], GOAL).constraints[0]
    judgement = judge(constraint, {} if observed is None else {P90: observed}, {})
    assert (judgement.outcome, judgement.observed) == (outcome, observed)
    assert part in judgement.reason


def test_a_lower_limit_is_held_against_the_lower_end():
    constraint = parse_policy(["max_throughput_rps >= 100"], GOAL).constraints[0]
    assert judge(constraint, {RATE: estimate(110, 100, 120)}, {}).outcome == "pass"
    assert judge(constraint, {RATE: estimate(110, 99, 120)}, {}).outcome == "fail"
    assert judge(constraint, {RATE: estimate(110, None, 120)}, {}).outcome == "unknown"
    strict = replace(constraint, op=">")
    assert judge(strict, {RATE: estimate(110, 100, 120)}, {}).outcome == "fail"


def test_relative_limits_refer_to_the_baseline():
    drop, memory, latency = parse_policy(
        ["accuracy_drop <= 1% rel", "rss_mb <= 120% rel", "latency_p90_ms <= 50% rel at 100 rps"], GOAL
    ).constraints
    baseline = {("accuracy", None): exact(0.8, "fraction"), ("rss_mb", None): around(500, unit="MB")}
    assert judge(drop, {DROP: exact(0.008, "fraction")}, baseline).outcome == "pass"
    failed = judge(drop, {DROP: exact(0.0081, "fraction")}, baseline)
    assert failed.outcome == "fail"
    assert failed.reason == "accuracy drop 0.00810 > 0.008 (1% of the baseline's accuracy)"
    assert judge(memory, {("rss_mb", None): exact(600, "MB")}, baseline).outcome == "pass"
    assert judge(memory, {("rss_mb", None): exact(601, "MB")}, baseline).outcome == "fail"
    unknown = judge(latency, {("latency_p90_ms", "100 rps"): exact(1, "ms")}, baseline)
    assert unknown.outcome == "unknown"
    assert "relative to the baseline" in unknown.reason


def test_a_failed_baseline_makes_relative_limits_unknown_and_absolute_ones_not():
    known = {RATE: around(200), DROP: exact(0, "fraction"), ("accuracy", None): exact(0.9, "fraction")}
    case = Case(base=known, other=known)
    case.failures = [Failure(subject="base", phase="deploy", kind="died", reason="the server ended (exit 1)")]
    relative = case.verdict(["accuracy_drop <= 1% rel"])
    assert relative.selected is None
    assert relative.unknown == ("id-other",)
    assert reasons(relative)["base"] == "could not be served: the server ended (exit 1)"
    assert relative.sentence == "No candidate meets the policy (1 unknown, 1 failed)."
    assert case.verdict(["accuracy_drop <= 0.01"]).selected == "id-other"


def test_who_ties_with_the_baseline_does_not_replace_it():
    case = Case(base={RATE: around(200, 0.05)}, other={RATE: around(210, 0.05)})
    verdict = case.verdict([])
    assert verdict.selected == "id-base"
    assert reasons(verdict) == {"other": "ties with the selected, which is the baseline and needs no change"}


@pytest.mark.parametrize(
    ("word", "selected"), [("faster", "other"), ("undecided", "base"), ("equivalent", "base"), ("slower", "base")]
)
def test_interleaved_rounds_decide_where_intervals_overlap(word, selected):
    case = Case(base={RATE: around(200, 0.05)}, other={RATE: around(210, 0.05)})
    case.comparisons = [comparison("other", "base", word)]
    verdict = case.verdict([])
    assert verdict.selected == f"id-{selected}"
    if selected == "other":
        assert reasons(verdict)["base"].endswith("of the selected, by rounds measured in turns")


@pytest.mark.parametrize(("word", "selected"), [("equivalent", "base"), ("undecided", "other"), ("slower", "base")])
def test_interleaved_rounds_outweigh_intervals_that_do_not_overlap(word, selected):
    case = Case(base={RATE: around(200)}, other={RATE: around(206)})
    case.comparisons = [comparison("other", "base", word)]
    assert case.verdict([]).selected == f"id-{selected}"


def test_a_comparison_also_counts_the_other_way_round():
    case = Case(base={RATE: around(210, 0.05)}, other={RATE: around(200, 0.05)})
    case.variants["base"] = replace(case.variants["base"], recipe=replace(case.variants["base"].recipe, stages=()))
    case.comparisons = [comparison("other", "base", "slower")]
    assert "by rounds measured in turns" in reasons(case.verdict([]))["other"]


def test_ratios_to_a_common_baseline_decide_between_two_others():
    case = Case(base={RATE: around(100)}, simple={RATE: around(300, 0.2)}, best={RATE: around(330, 0.2)})
    assert case.verdict([]).selected == "id-simple"
    case.comparisons = [
        comparison("simple", "base", "faster", estimate(3.0, 2.95, 3.05)),
        comparison("best", "base", "faster", estimate(3.3, 3.25, 3.35)),
    ]
    assert case.verdict([]).selected == "id-best"


def test_among_ties_the_simpler_then_smaller_then_first_by_name_is_selected():
    same = {RATE: around(300, 0.1)}
    case = Case(base={RATE: around(100)}, a=same, b=same)
    assert reasons(case.verdict([]))["b"] == "ties with the selected, which is simpler (1 stage instead of 2)"
    case.variants["b"] = variant("b", stages=1, size_bytes=5)
    verdict = case.verdict([])
    assert verdict.selected == "id-b"
    assert reasons(verdict)["a"].startswith("ties with the selected, which is smaller (")
    case.variants["b"] = variant("b", stages=1, size_bytes=10)
    verdict = case.verdict([])
    assert verdict.selected == "id-a"
    assert reasons(verdict)["b"] == "ties with the selected, which comes first by name"


def test_a_second_objective_decides_among_those_that_tie_on_the_first():
    case = Case(
        base={RATE: around(300, 0.1), ("rss_mb", None): around(500, unit="MB")},
        lean={RATE: around(290, 0.1), ("rss_mb", None): around(200, unit="MB")},
        tiny={RATE: around(100, 0.1), ("rss_mb", None): around(20, unit="MB")},
    )
    verdict = case.verdict([], [GOAL, "minimize rss_mb"])
    assert verdict.selected == "id-lean"
    assert "resident memory" in reasons(verdict)["base"]
    assert "against" in reasons(verdict)["tiny"]
    assert "of base" in reasons(verdict)["tiny"]


def test_a_candidate_that_failed_to_run_is_out_whatever_is_known_of_it():
    case = Case(base={RATE: around(100)}, fast={RATE: around(900)})
    case.failures = [
        Failure(subject="fast", phase="measure", kind="died", reason="the server ended"),
        Failure(subject="other", phase="make", kind="error", reason="no candidate of this"),
    ]
    verdict = case.verdict([])
    assert verdict.selected == "id-base"
    assert verdict.unknown == ()
    assert verdict.pareto == ("id-base",)
    assert reasons(verdict) == {"fast": "could not be measured: the server ended"}


def test_the_closest_miss_says_what_would_admit_it():
    case = Case(
        base={RATE: around(100), DROP: exact(0, "fraction"), P90: estimate(80, 75, 85.01, "ms")},
        near={RATE: around(300), DROP: estimate(0.01, 0.005, 0.0123456, "fraction"), P90: around(20, unit="ms")},
        nearer={RATE: around(300), DROP: estimate(0.01, 0.005, 0.011, "fraction"), P90: around(90, unit="ms")},
        far={RATE: around(300), DROP: estimate(0.2, 0.1, 0.3, "fraction"), P90: around(20, unit="ms")},
    )
    constraints = ["accuracy_drop <= 0.01", "latency_p90_ms <= 50"]
    verdict = case.verdict(constraints, provisional=True)
    assert verdict.selected is None
    assert verdict.unknown == ()
    assert [(miss.candidate_name, miss.relaxation) for miss in verdict.closest] == [
        ("near", "accuracy_drop <= 0.0124"),
        ("base", "latency_p90_ms <= 85.1 at 0.8 saturation"),
    ]
    assert verdict.sentence == (
        "No candidate meets the policy (4 outside a limit). Closest: `accuracy_drop <= 0.0124` would admit near or "
        "`latency_p90_ms <= 85.1 at 0.8 saturation` would admit base. "
        "Provisional: the level of proof is too low to promote on."
    )
    assert case.verdict(["accuracy_drop <= 0.0124", constraints[1]]).selected == "id-near"
    assert case.verdict([constraints[0], "latency_p90_ms <= 85.1"]).selected == "id-base"


def test_where_no_single_limit_would_do_the_sentence_says_so():
    case = Case(base={RATE: around(100), DROP: exact(0.2, "fraction"), P90: around(80, unit="ms")})
    verdict = case.verdict(["accuracy_drop <= 0.01", "latency_p90_ms <= 50"])
    assert verdict.sentence.endswith(
        "No single limit, relaxed, would admit one; `accuracy_drop <= 0.201` and "
        "`latency_p90_ms <= 80.8 at 0.8 saturation` together would admit base."
    )
    assert len(verdict.closest) == 2
    assert case.verdict(["accuracy_drop <= 0.201", "latency_p90_ms <= 80.8"]).selected == "id-base"
    case.variants["base"] = replace(case.variants["base"], signature_changed=True)
    other = case.verdict(["accuracy_drop <= 0.01", "latency_p90_ms <= 50"])
    assert other.sentence.endswith("No single limit, relaxed, would admit one.")


def test_the_candidate_that_needs_the_least_relaxation_of_several_limits_is_named():
    known = {DROP: exact(0.2, "fraction"), P90: around(80, unit="ms"), ("rss_mb", None): around(900, unit="MB")}
    near = {**known, DROP: exact(0.02, "fraction"), ("rss_mb", None): around(100, unit="MB")}
    case = Case(base={RATE: around(100), **known}, near={RATE: around(100), **near}, blind={**near})
    sentence = case.verdict(["accuracy_drop <= 0.01", "latency_p90_ms <= 50", "rss_mb <= 600"]).sentence
    assert "together would admit near" in sentence
    assert "rss_mb" not in sentence


def test_a_limit_against_the_champion_is_unknown_without_one():
    case = Case(
        base={RATE: around(100), P90: around(50, unit="ms")},
        champion={RATE: around(200), P90: around(20, unit="ms")},
        other={RATE: around(900), P90: around(30, unit="ms")},
    )
    limit = "latency_p90_ms <= 110% rel vs champion"
    verdict = case.verdict([limit], champion="id-champion")
    assert verdict.selected == "id-champion"
    told = reasons(verdict)["other"]
    assert told.endswith("> 22 ms (110% of the champion's value)")
    unknown = case.verdict([limit])
    assert unknown.selected is None
    assert "relative to the champion, of which that value is not known" in reasons(unknown)["other"]
    nothing = case.verdict([limit, "max_throughput_rps >= 250"], champion="id-champion")
    assert "`latency_p90_ms <= 152% rel vs champion at 0.8 saturation` would admit other" in nothing.sentence
    case.failures = [Failure(subject="champion", phase="deploy", kind="died", reason="it ended")]
    assert case.verdict([limit], champion="id-champion").selected is None


def against_champion(one: str, ratio: Estimate, load: str | None = P90[1], metric: str = P90[0]) -> Comparison:
    return Comparison(
        candidate_id=f"id-{one}",
        baseline_id="id-champion",
        metric=metric,
        load=load,
        ratio=ratio,
        noise_floor=0.02,
        word="undecided",
    )


def test_a_limit_against_the_champion_is_judged_by_rounds_in_turns():
    """The machine drifted by more than the two differ: apart they prove nothing, in turns they do."""
    case = Case(
        base={RATE: around(100), P90: around(50, unit="ms")},
        champion={RATE: around(200), P90: estimate(20, 15, 27, "ms")},
        near={RATE: around(900), P90: estimate(20.5, 15, 28, "ms")},
    )
    limit = "latency_p90_ms <= 105% rel vs champion"
    apart = case.verdict([limit], champion="id-champion")
    assert apart.selected == "id-champion"
    assert "is not certainly <= 21 ms" in reasons(apart)["near"]
    case.comparisons = [against_champion("near", estimate(1.02, 1.00, 1.04, "1"))]
    assert case.verdict([limit], champion="id-champion").selected == "id-near"
    case.comparisons = [against_champion("near", estimate(1.02, 1.00, 1.07, "1"))]
    doubtful = case.verdict([limit], champion="id-champion")
    assert reasons(doubtful)["near"] == (
        "p90 at 0.8 saturation 1.02× [1.00, 1.07] the champion's is not certainly <= 105%"
    )
    case.comparisons = [against_champion("near", estimate(1.20, 1.15, 1.25, "1"))]
    slower = case.verdict([limit, "max_throughput_rps >= 250"], champion="id-champion")
    assert "1.20× [1.15, 1.25] the champion's > 105%" in reasons(slower)["near"]
    # What would admit it is the end of the ratio.
    assert "`latency_p90_ms <= 125% rel vs champion at 0.8 saturation` would admit near" in slower.sentence
    # A single pair has no end; then each stands with its own interval, as before.
    alone = Estimate(value=1.0, low=None, high=None, runs=1, method="single pair", unit="1")
    case.comparisons = [against_champion("near", alone)]
    assert "is not certainly <= 21 ms" in reasons(case.verdict([limit], champion="id-champion"))["near"]


def test_the_champion_keeps_its_own_limits_exactly():
    case = Case(base={RATE: around(100)}, champion={RATE: estimate(200, 150, 260, "1/s")})
    assert (
        case.verdict(["max_throughput_rps >= 100% rel vs champion"], champion="id-champion").selected == "id-champion"
    )


def test_what_serves_now_stays_where_nothing_is_certainly_better():
    case = Case(base={RATE: around(200)}, champion={RATE: around(200)}, other={RATE: around(201)})
    verdict = case.verdict([], champion="id-champion")
    assert verdict.selected == "id-champion"
    assert verdict.champion == "id-champion"
    assert verdict.sentence.startswith("Keep what serves now, champion: ")
    assert reasons(verdict)["base"] == "ties with the selected, which serves now and needs no change"
    assert case.verdict([]).selected == "id-base"


def test_the_sentence_tells_of_the_baseline_not_of_the_champion():
    case = Case(base={RATE: around(100)}, champion={RATE: around(200)}, best={RATE: around(900)})
    case.comparisons = [
        against_champion("best", around(4.5, unit="1"), load=None, metric="max_throughput_rps"),
        comparison("best", "base", "faster", around(9.0, unit="1")),
    ]
    assert "9.00× that of the baseline" in case.verdict([], champion="id-champion").sentence


MEMORY = ("rss_mb", None)


def test_weights_trade_one_objective_for_another():
    case = Case(
        base={RATE: around(100), MEMORY: around(100, unit="MB")},
        fast={RATE: around(220), MEMORY: around(300, unit="MB")},
        lean={RATE: around(90), MEMORY: around(40, unit="MB")},
    )
    even = case.verdict([], [f"{GOAL} weight 1", "minimize rss_mb weight 1"])
    assert even.selected == "id-lean"
    assert reasons(even)["fast"] == (
        "passes, but by the weights of the objectives it is behind: maximum throughput 220.0 [217.8, 222.2]/s against "
        "90.00 [89.10, 90.90]/s, resident memory 300.0 [297.0, 303.0] MB against 40.00 [39.60, 40.40] MB of the "
        "selected"
    )
    assert case.verdict([], [f"{GOAL} weight 3", "minimize rss_mb weight 1"]).selected == "id-fast"
    assert case.verdict([], [f"{GOAL} weight 3"]).selected == "id-fast"


def test_weights_leave_the_simpler_where_the_sum_is_not_certain():
    case = Case(
        base={RATE: around(100, 0.05), MEMORY: around(100, 0.05, unit="MB")},
        other={RATE: around(130, 0.05), MEMORY: around(110, 0.05, unit="MB")},
    )
    goals = [f"{GOAL} weight 1", "minimize rss_mb weight 1"]
    assert case.verdict([], goals).selected == "id-base"
    case.comparisons = [comparison("other", "base", "faster", estimate(1.3, 1.28, 1.32))]
    assert case.verdict([], goals).selected == "id-other"
    case.comparisons = [comparison("base", "other", "slower", estimate(1 / 1.3, 1 / 1.32, 1 / 1.28))]
    assert case.verdict([], goals).selected == "id-other"
    case.metrics["id-base"][MEMORY] = estimate(100, None, None, "MB")
    assert case.verdict([], goals).selected == "id-base"


def test_what_is_not_above_zero_cannot_be_weighed():
    case = Case(base={RATE: around(100), MEMORY: exact(0, "MB")})
    goals = [f"{GOAL} weight 1", "minimize rss_mb weight 1"]
    assert reasons(case.verdict([], goals))["base"] == "unknown: resident memory is 0, which cannot be weighed"
    assert case.verdict([], [GOAL, "minimize rss_mb"]).selected == "id-base"


def test_no_candidates_at_all():
    verdict = Case().verdict([])
    assert verdict.selected is None
    assert verdict.sentence == "There is no candidate to choose from."
    assert (verdict.pareto, verdict.rejections, verdict.closest) == ((), (), ())


def test_the_front_has_the_axes_of_the_policy():
    case = Case(
        base={RATE: around(100), DROP: exact(0, "fraction"), P90: around(10, unit="ms")},
        fast={RATE: around(300), DROP: exact(0.05, "fraction"), P90: around(20, unit="ms")},
        beaten={RATE: around(250), DROP: exact(0.06, "fraction"), P90: around(20, unit="ms")},
        late={RATE: around(290), DROP: exact(0.04, "fraction"), P90: around(90, unit="ms")},
        unseen={RATE: around(900)},
    )
    assert case.verdict(["accuracy_drop <= 0.01", "latency_p90_ms <= 50"]).pareto == ("id-base", "id-fast", "id-late")
    for known in case.metrics.values():
        known.pop(DROP, None)
    assert case.verdict([]).pareto == ("id-unseen",)


def test_the_table_joins_what_is_known_of_a_candidate():
    plain, mixed = variant("plain", size_bytes=2_500_000), variant("mixed", batch_dependent=True)
    candidates = [candidate(plain, batch=8), candidate(mixed), candidate(mixed, suffix="8", batch=8)]

    def fidelity(of: Variant, batch_size: int, drop: float, **changes: Any) -> Fidelity:
        made = Fidelity(
            variant_id=of.id,
            engine=ORT,
            engine_version="1",
            instruction_set="avx2",
            batch_size=batch_size,
            samples_digest="d",
            samples=900,
            task_metric="accuracy",
            metrics={"accuracy_drop": exact(drop, "fraction")},
        )
        return replace(made, **changes)

    fidelities = [
        fidelity(plain, 4, 0.9, engine=EngineSpec(name="openvino")),
        fidelity(plain, 4, 0.8, engine_version="2"),
        fidelity(plain, 4, 0.1),
        fidelity(mixed, 8, 0.3),
        fidelity(mixed, 4, 0.4),
    ]
    measurements = [
        Measurement(candidate_id=candidates[0].id, load=None, metrics={"max_throughput_rps": around(3)}),
        Measurement(candidate_id=candidates[0].id, load="100 rps", metrics={"latency_p90_ms": around(4)}),
        Measurement(candidate_id="unheard of", load=None, metrics={}),
    ]
    table = metric_table(candidates, measurements, fidelities, [plain, mixed])
    assert list(table) == [one.id for one in candidates]
    assert table[candidates[0].id] == {
        ("size_mb", None): exact(2.5, "MB"),
        DROP: exact(0.1, "fraction"),
        RATE: around(3),
        ("latency_p90_ms", "100 rps"): around(4),
    }
    assert DROP not in table[candidates[1].id]
    assert table[candidates[2].id][DROP] == exact(0.3, "fraction")


# --- properties ------------------------------------------------------------------------------------------------

# Below that a float has few digits left to round to, and nothing is measured.
finite = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False).map(lambda x: x if abs(x) > 1e-100 else 0.0)
positive = st.floats(min_value=1e-6, max_value=1e9)


@st.composite
def estimates(draw: Any, numbers: Any = finite, *, open_ended: bool = True) -> Estimate:
    low, value, high = sorted(draw(st.tuples(numbers, numbers, numbers)))
    ends = st.sampled_from([True, False]) if open_ended else st.just(False)
    return estimate(value, None if draw(ends) else low, None if draw(ends) else high)


@st.composite
def constraints(draw: Any) -> Constraint:
    metric = draw(st.sampled_from(["rss_mb", "accuracy_drop", "flip_rate", "latency_p90_ms", "max_throughput_rps"]))
    op = draw(st.sampled_from(["<=", "<", ">=", ">"]))
    relative = draw(st.booleans())
    percent = "%" if relative or (metric == "flip_rate" and draw(st.booleans())) else ""
    return parse_policy([f"{metric} {op} {draw(finite)!r}{percent}{' rel' if relative else ''}"], GOAL).constraints[0]


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), max_size=8))
def test_the_front_is_what_brute_force_finds(points):
    named = {str(number): point for number, point in enumerate(points)}
    beaten = set()
    for (one, a), (_, b) in itertools.permutations(named.items(), 2):
        if all(x <= y for x, y in zip(a, b, strict=True)) and a != b:
            beaten.add(one)
    assert pareto_front(named) == tuple(name for name in named if name not in beaten)


@given(constraints(), estimates(), estimates())
def test_no_interval_that_crosses_the_limit_passes(constraint, observed, baseline):
    key = (constraint.metric, constraint.load)
    reference = ("accuracy", None) if constraint.metric == "accuracy_drop" else key
    judgement = judge(constraint, {key: observed}, {reference: baseline})
    limit = constraint.limit * (baseline.value if constraint.relative else 1)
    upper = constraint.op in {"<=", "<"}
    end = observed.high if upper else observed.low
    if end is None:
        assert judgement.outcome == "unknown"
    elif judgement.outcome == "pass":
        for value in {observed.value, end}:
            assert value <= limit if upper else value >= limit
            assert value != limit or "=" in constraint.op
    else:
        assert judgement.outcome == "fail"
        assert end >= limit if upper else end <= limit


@settings(deadline=None)
@given(constraints(), estimates(open_ended=False), estimates(numbers=st.one_of(positive, finite)))
def test_a_relaxation_admits_what_it_was_made_for_and_little_more(constraint, observed, baseline):
    key = (constraint.metric, constraint.load)
    reference = ("accuracy", None) if constraint.metric == "accuracy_drop" else key
    known = {reference: baseline}
    assume(judge(constraint, {key: observed}, known).outcome == "fail")
    relaxed = parse_policy([relaxation(constraint, observed, References(baseline=known))], GOAL).constraints[0]
    assert (relaxed.metric, relaxed.op, relaxed.load) == (constraint.metric, constraint.op, constraint.load)
    assert judge(relaxed, {key: observed}, known).outcome == "pass"
    upper = constraint.op in {"<=", "<"}
    end = observed.high if upper else observed.low
    limit = relaxed.limit * (baseline.value if relaxed.relative else 1)
    assert abs(limit - end) <= 0.021 * abs(end) + (0.001 * max(1, baseline.value) if end == 0 else 0)


@st.composite
def cases(draw: Any) -> Case:
    names = [f"v{number}" for number in range(draw(st.integers(0, 6)))]
    whole = st.integers(1, 12).map(float)
    keys = [RATE, DROP, P90, ("accuracy", None)]
    case = Case(**{name: draw(st.dictionaries(st.sampled_from(keys), estimates(whole), min_size=2)) for name in names})
    words = st.sampled_from(["faster", "equivalent", "slower", "undecided"])
    for name in names[1:]:
        if draw(st.booleans()):
            case.comparisons.append(comparison(name, names[0], draw(words), draw(estimates(positive))))
        if draw(st.integers(0, 5)) == 0:
            case.failures.append(Failure(subject=name, phase="deploy", kind="error", reason="r"))
    return case


policies = st.lists(
    st.sampled_from(
        ["accuracy_drop <= 6", "accuracy_drop <= 90% rel", "latency_p90_ms < 9", "max_throughput_rps >= 2"]
    ),
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(cases(), policies, st.sampled_from([GOAL, [GOAL, "minimize latency_p90_ms"]]), st.randoms())
def test_what_holds_of_every_verdict(case, constraint_texts, objective, random):
    verdict = case.verdict(constraint_texts, objective)
    outcomes = {
        rejection.candidate_id: {judgement.outcome for judgement in rejection.judgements}
        for rejection in verdict.rejections
    }
    rejected = set(outcomes)
    everyone = set(case.metrics)
    assert rejected | {verdict.selected} - {None} == everyone
    assert verdict.selected not in rejected
    assert all(rejection.reason for rejection in verdict.rejections)
    failed = {f"id-{failure.subject}" for failure in case.failures}
    assert verdict.selected not in {*verdict.unknown, *failed}
    if verdict.selected:
        assert RATE in case.metrics[verdict.selected]
        assert verdict.closest == ()
    else:
        assert all(
            identity in failed or identity in verdict.unknown or "fail" in outcomes[identity] for identity in everyone
        )
    names = list(case.variants)
    others = names[1:]
    random.shuffle(others)
    case.variants = {name: case.variants[name] for name in names[:1] + others}
    assert case.verdict(constraint_texts, objective).selected == verdict.selected


def test_other_inputs_win_only_where_the_policy_allows_it():
    case = Case(base={RATE: around(200)}, smaller={RATE: around(900)})
    case.variants["smaller"] = replace(case.variants["smaller"], signature_changed=True)
    strict = case.verdict([])
    assert strict.selected == "id-base"
    assert "signature: may_change" in reasons(strict)["smaller"]
    assert case.verdict([], signature="may_change").selected == "id-smaller"
