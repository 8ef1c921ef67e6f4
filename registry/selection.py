"""What meets the policy, and which of that to serve. Pure: records in, records out.

How the winner is found. A candidate passes when the pessimistic end of each constrained metric is within its limit,
and every objective is known. Among those that pass, the objectives count in their order: the best by point value
leads, and who is certainly worse than the leader is out; the rest tie with it and go on to the next objective.
Objectives with weights count all at once. Of those that tie to the end the simplest is selected: the champion, then the
baseline, then fewest stages, then the smaller artifact, then the name. So a variant that is not certainly better than
what serves now does not replace it.

``A`` is certainly better than ``B`` when interleaved rounds of the two say so, or where they say nothing, when A's
interval lies wholly beyond B's, or A's ratio to a common baseline lies wholly beyond B's ratio to the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from registry.records import (
    Candidate,
    ClosestMiss,
    Comparison,
    Estimate,
    Failure,
    Judgement,
    Objective,
    Policy,
    Rejection,
    Variant,
    Verdict,
    exact,
)
from registry.report import numbers
from registry.selection_contest import Loss, Standing, beyond, contest, goals_of
from registry.selection_front import pareto_front
from registry.selection_limits import (
    References,
    is_upper_limit,
    judge,
    judge_against,
    label,
    relaxation,
    violation,
)
from registry.selection_table import BYTES_IN_MB, Key, fidelity_of, metric_table

__all__ = [
    "OTHER_SIGNATURE",
    "Key",
    "References",
    "fidelity_of",
    "judge",
    "metric_table",
    "pareto_front",
    "relaxation",
    "select",
]

_FAILED_TO = {
    "source": "could not be read",
    "make": "could not be made",
    "fidelity": "could not be judged",
    "screen": "was not served",
    "deploy": "could not be served",
    "measure": "could not be measured",
}

_PROVISIONAL = "Provisional: the level of proof is too low to promote on."
OTHER_SIGNATURE = (
    "its inputs or outputs are not the baseline's, which the policy allows only with `signature: may_change`"
)


def select(
    *,
    policy: Policy,
    candidates: Sequence[Candidate],
    variants: Sequence[Variant],
    metrics: Mapping[str, Mapping[Key, Estimate]],
    comparisons: Sequence[Comparison],
    failures: Sequence[Failure],
    baseline_id: str | None,
    provisional: bool,
    champion_id: str | None = None,
    cut_short: str = "",
) -> Verdict:
    """The verdict: what to serve, why each other candidate is not it, and if none may be, what came closest.

    Args:
        policy: constraints and objectives.
        candidates: all that were to be served, the failed ones too.
        variants: those of the candidates.
        metrics: as `metric_table` gives them.
        comparisons: of candidates in interleaved rounds.
        failures: those whose subject is a candidate's name rule it out; of kind ``budget`` they leave it unknown.
        baseline_id: the candidate that relative limits refer to; where it has failed they are unknown.
        provisional: whether the level of proof is too low for promotion.
        champion_id: the candidate that serves now, which limits with ``vs champion`` refer to; without it, or where it
            has failed, they are unknown. Comparisons with it judge them where there are any.
        cut_short: what ended the measuring before its time, in a sentence; or empty.
    """
    failed = {failure.subject: failure for failure in failures}
    variant_of = {variant.id: variant for variant in variants}
    references = References(
        baseline=_whole_metrics(candidates, metrics, failed, baseline_id),
        champion=_whole_metrics(candidates, metrics, failed, champion_id),
        champion_id=champion_id,
        ratios={
            (one.candidate_id, (one.metric, one.load)): one.ratio
            for one in comparisons
            if champion_id is not None and one.baseline_id == champion_id
        },
    )
    judged = _Judged(policy, references)
    standings = [
        _standing(
            candidate,
            policy=policy,
            variant=variant_of[candidate.variant_id],
            is_baseline=candidate.id == baseline_id,
            metrics=metrics.get(candidate.id, {}),
            is_champion=candidate.id == champion_id,
            judgements=judged(metrics.get(candidate.id, {}), candidate.id),
            failure=failed.get(candidate.name),
        )
        for candidate in candidates
    ]
    passing = sorted((one for one in standings if one.outcome == "pass"), key=lambda one: one.simplicity)
    selected, lost = contest(passing, goals_of(policy.objectives), comparisons)
    closest = () if selected else _closest(policy, standings, references)
    with_baselines = [one for one in comparisons if one.baseline_id != champion_id or champion_id == baseline_id]
    sentence = (
        _selected_sentence(selected, policy.objectives[0], with_baselines)
        if selected
        else _nothing_sentence(standings, closest, references)
    )
    return Verdict(
        policy=policy,
        baseline=baseline_id,
        selected=selected.candidate.id if selected else None,
        sentence=" ".join(part for part in (sentence, cut_short, _PROVISIONAL if provisional else "") if part),
        provisional=provisional,
        pareto=_pareto(policy, standings),
        rejections=tuple(_rejection(one, selected, lost) for one in standings if one is not selected),
        unknown=tuple(one.candidate.id for one in standings if one.outcome == "unknown"),
        closest=closest,
        champion=champion_id,
        cut_short=cut_short,
    )


class _Judged:
    """Judges the same estimate once, though all candidates of a variant have it."""

    def __init__(self, policy: Policy, references: References) -> None:
        self._constraints = policy.constraints
        self._references = references
        # By identity, which is quick; the estimates outlive this object.
        self._known: dict[tuple[int, int], Judgement] = {}

    def __call__(self, metrics: Mapping[Key, Estimate], candidate_id: str) -> tuple[Judgement, ...]:
        """The judgements of all constraints."""
        return tuple(self._one(number, metrics, candidate_id) for number in range(len(self._constraints)))

    def _one(self, number: int, metrics: Mapping[Key, Estimate], candidate_id: str) -> Judgement:
        constraint = self._constraints[number]
        if constraint.reference == "champion":  # by its own ratio
            return judge_against(constraint, metrics, self._references, candidate_id)
        key = (number, id(metrics.get((constraint.metric, constraint.load))))
        if key not in self._known:
            self._known[key] = judge_against(constraint, metrics, self._references)
        return self._known[key]


def _standing(
    candidate: Candidate,
    *,
    policy: Policy,
    variant: Variant,
    is_baseline: bool,
    is_champion: bool,
    metrics: Mapping[Key, Estimate],
    judgements: tuple[Judgement, ...],
    failure: Failure | None,
) -> Standing:
    missing = _missing(policy, metrics)
    other_signature = variant.signature_changed and policy.signature == "same"
    outcomes = {judgement.outcome for judgement in judgements}
    outcome: Literal["failed", "fail", "unknown", "pass"]
    unmeasured = failure is not None and failure.kind == "budget"
    if failure is not None and not unmeasured:
        outcome = "failed"
    elif "fail" in outcomes or other_signature:
        outcome = "fail"
    else:
        outcome = "unknown" if "unknown" in outcomes or missing or unmeasured else "pass"
    return Standing(
        candidate=candidate,
        variant=variant,
        is_baseline=is_baseline,
        is_champion=is_champion,
        metrics=metrics,
        judgements=judgements,
        failure=failure,
        missing=missing,
        other_signature=other_signature,
        outcome=outcome,
    )


def _missing(policy: Policy, metrics: Mapping[Key, Estimate]) -> tuple[str, ...]:
    """What the objectives need and is not known, in words."""
    told = []
    for goal in goals_of(policy.objectives):
        for objective in goal:
            known = metrics.get((objective.metric, objective.load))
            if known is None:
                told.append(f"{label(objective.metric, objective.load)} is not known")
            elif len(goal) > 1 and known.value <= 0:
                told.append(f"{label(objective.metric, objective.load)} is {known.value:g}, which cannot be weighed")
    return tuple(dict.fromkeys(told))


def _whole_metrics(
    candidates: Sequence[Candidate],
    metrics: Mapping[str, Mapping[Key, Estimate]],
    failed: Mapping[str, Failure],
    candidate_id: str | None,
) -> Mapping[Key, Estimate]:
    """A candidate's metrics; empty where it has failed, so that nothing is held against half a reference."""
    found = next((candidate for candidate in candidates if candidate.id == candidate_id), None)
    return {} if found is None or found.name in failed else metrics.get(found.id, {})


def _pareto(policy: Policy, standings: Sequence[Standing]) -> tuple[str, ...]:
    """The front over objectives, accuracy drop, and the latencies that the policy limits, by point values.

    Candidates that fail a constraint are in it, since the front shows what a looser policy would buy; those that failed
    to run, or for which an axis is unknown, are not.
    """
    axes: dict[Key, bool] = {}
    for objective in policy.objectives:
        axes[(objective.metric, objective.load)] = objective.direction == "maximize"
    if any(("accuracy_drop", None) in one.metrics for one in standings):
        axes.setdefault(("accuracy_drop", None), False)
    for constraint in policy.constraints:
        if constraint.load is not None:
            axes.setdefault((constraint.metric, constraint.load), not is_upper_limit(constraint))
    points = {
        one.candidate.id: [one.metrics[key].value * (1 if larger else -1) for key, larger in axes.items()]
        for one in standings
        if one.failure is None and axes.keys() <= one.metrics.keys()
    }
    return pareto_front(points)


# --- where nothing passes --------------------------------------------------------------------------------------


def _closest(policy: Policy, standings: Sequence[Standing], references: References) -> tuple[ClosestMiss, ...]:
    """For each constraint that was missed, who came nearest; one that misses nothing else goes before all others."""
    closest = []
    for index, constraint in enumerate(policy.constraints):
        missed = [one for one in standings if one.failure is None and one.judgements[index].outcome == "fail"]
        if not missed:
            continue
        nearest = min(
            missed,
            key=lambda one: (
                not _misses_only_one(one),
                violation(one.judgements[index], references),
                one.simplicity,
            ),
        )
        observed = nearest.judgements[index].observed
        if observed is not None:
            closest.append(
                ClosestMiss(
                    constraint=constraint,
                    candidate_id=nearest.candidate.id,
                    candidate_name=nearest.candidate.name,
                    observed=observed,
                    relaxation=relaxation(constraint, observed, references),
                )
            )
    return tuple(closest)


def _misses_only_one(one: Standing) -> bool:
    missed = [judgement for judgement in one.judgements if judgement.outcome != "pass"]
    return len(missed) == 1 and not one.missing and not one.other_signature and one.failure is None


# --- words -----------------------------------------------------------------------------------------------------


def _rejection(one: Standing, selected: Standing | None, lost: Mapping[str, Loss]) -> Rejection:
    return Rejection(
        candidate_id=one.candidate.id,
        candidate_name=one.candidate.name,
        reason=_why_not(one, selected, lost),
        judgements=one.judgements,
    )


def _why_not(one: Standing, selected: Standing | None, lost: Mapping[str, Loss]) -> str:
    if one.failure is not None and one.outcome == "unknown":
        return f"unknown: {one.failure.reason}"
    if one.failure is not None and one.outcome == "failed":
        return f"{_FAILED_TO[one.failure.phase]}: {one.failure.reason}"
    if one.outcome == "fail":
        missed = [judgement.reason for judgement in one.judgements if judgement.outcome == "fail"]
        return _joined([*missed, *([OTHER_SIGNATURE] if one.other_signature else [])])
    if one.outcome == "unknown" or selected is None:
        reasons = [judgement.reason for judgement in one.judgements if judgement.outcome == "unknown"]
        return "unknown: " + _joined([*reasons, *one.missing])
    if one.candidate.id in lost:
        return _lost_reason(one, selected, lost[one.candidate.id])
    return f"ties with the selected, {_simpler(selected, one)}"


def _joined(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


def _lost_reason(one: Standing, selected: Standing, loss: Loss) -> str:
    whose = "the selected" if loss.leader is selected else loss.leader.candidate.name
    parts = [
        f"{label(objective.metric, objective.load)} {numbers.text(one.estimate(objective))} against {best}"
        for objective, best in zip(loss.goal, loss.leads_with, strict=True)
    ]
    if len(parts) > 1:
        return f"passes, but by the weights of the objectives it is behind: {', '.join(parts)} of {whose}"
    objective = loss.goal[0]
    certain = beyond(loss.leader.estimate(objective), one.estimate(objective), objective)
    return f"passes, but {parts[0]} of {whose}{'' if certain else ', by rounds measured in turns'}"


def _simpler(selected: Standing, other: Standing) -> str:
    if selected.is_champion:
        return "which serves now and needs no change"
    if selected.is_baseline:
        return "which is the baseline and needs no change"
    stages, more = len(selected.variant.recipe.stages), len(other.variant.recipe.stages)
    if stages < more:
        return f"which is simpler ({_count(stages, 'stage')} instead of {more})"
    size, larger = selected.variant.artifact.size_bytes, other.variant.artifact.size_bytes
    if size < larger:
        sizes = [numbers.short(exact(value / BYTES_IN_MB, "MB")) for value in (size, larger)]
        return f"which is smaller ({sizes[0]} instead of {sizes[1]})"
    return "which comes first by name"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _selected_sentence(selected: Standing, objective: Objective, comparisons: Sequence[Comparison]) -> str:
    said = f"{label(objective.metric, objective.load)} {numbers.text(selected.estimate(objective))}"
    if selected.is_champion:
        name = selected.candidate.name
        return f"Keep what serves now, {name}: nothing that meets the policy is certainly better ({said})."
    if selected.is_baseline:
        return (
            f"Keep the baseline {selected.candidate.name}: nothing that meets the policy is certainly better ({said})."
        )
    return f"Serve {selected.candidate.name}: it meets the policy, {said}{_against(selected, objective, comparisons)}."


def _against(selected: Standing, objective: Objective, comparisons: Sequence[Comparison]) -> str:
    wanted = (selected.candidate.id, objective.metric, objective.load)
    ratio = next((one.ratio for one in comparisons if (one.candidate_id, one.metric, one.load) == wanted), None)
    return f", {numbers.times(ratio)} that of the baseline served the same way" if ratio else ""


def _nothing_sentence(standings: Sequence[Standing], closest: Sequence[ClosestMiss], references: References) -> str:
    if not standings:
        return "There is no candidate to choose from."
    outcomes = [one.outcome for one in standings]
    counts = (("fail", "outside a limit"), ("unknown", "unknown"), ("failed", "failed"))
    told = ", ".join(f"{outcomes.count(outcome)} {words}" for outcome, words in counts if outcome in outcomes)
    only = {one.candidate.id for one in standings if _misses_only_one(one)}
    admitting = [miss for miss in closest if miss.candidate_id in only]
    head = f"No candidate meets the policy ({told})."
    if admitting:
        ways = " or ".join(f"`{miss.relaxation}` would admit {miss.candidate_name}" for miss in admitting)
        return f"{head} Closest: {ways}."
    if not closest:
        return head
    return f"{head} No single limit, relaxed, would admit one{_together(standings, references)}."


def _together(standings: Sequence[Standing], references: References) -> str:
    """The fewest limits, relaxed together, that would admit a candidate; empty where that takes more than limits."""
    missed = {one.candidate.id: [found for found in one.judgements if found.outcome == "fail"] for one in standings}
    near = [one for one in standings if _only_misses_limits(one)]
    if not near:
        return ""

    def distance(one: Standing) -> tuple[int, float, tuple[bool, bool, int, int, str]]:
        found = missed[one.candidate.id]
        return len(found), sum(violation(judgement, references) for judgement in found), one.simplicity

    nearest = min(near, key=distance)
    found = missed[nearest.candidate.id]
    ways = [relaxation(one.constraint, one.observed, references) for one in found if one.observed is not None]
    return f"; {' and '.join(f'`{way}`' for way in ways)} together would admit {nearest.candidate.name}"


def _only_misses_limits(one: Standing) -> bool:
    known = all(judgement.outcome != "unknown" for judgement in one.judgements)
    return one.outcome == "fail" and known and not one.missing and not one.other_signature
