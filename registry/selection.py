"""What meets the policy, and which of that to serve. Pure: records in, records out.

How the winner is found. A candidate passes when the pessimistic end of each constrained metric is within its limit,
and every objective is known. Among those that pass, the objectives count in their order: the best by point value
leads, and who is certainly worse than the leader is out; the rest tie with it and go on to the next objective. Of those
that tie to the end the simplest is selected: the baseline, then fewest stages, then the smaller artifact, then the
name. So a variant that is not certainly better than the baseline does not replace it.

``A`` is certainly better than ``B`` when interleaved rounds of the two say so, or where they say nothing, when A's
interval lies wholly beyond B's, or A's ratio to a common baseline lies wholly beyond B's ratio to the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Literal

from registry.policy import METRICS
from registry.records import (
    Candidate,
    ClosestMiss,
    Comparison,
    Constraint,
    Estimate,
    Failure,
    Fidelity,
    Judgement,
    Measurement,
    Objective,
    Policy,
    Rejection,
    Variant,
    Verdict,
    exact,
)
from registry.report import numbers

Key = tuple[str, str | None]
"""A metric's name, and the load it belongs to or None."""

_RELAXED_FIGURES = 3
_BYTES_IN_MB = 1e6
_DROPS = ("accuracy_drop", "slice_drop_max")
# A limit of more than a million times the baseline's value says nothing that people could use.
_SMALLEST_REFERENCE = 1e-6
_FAILED_TO = {
    "source": "could not be read",
    "make": "could not be made",
    "fidelity": "could not be judged",
    "screen": "was not served",
    "deploy": "could not be served",
    "measure": "could not be measured",
}
_OPPOSITE = {"<=": ">", "<": ">=", ">=": "<", ">": "<="}


OTHER_SIGNATURE = (
    "its inputs or outputs are not the baseline's, which the policy allows only with `signature: may_change`"
)

# --- what is known of each candidate ---------------------------------------------------------------------------


def metric_table(
    candidates: Sequence[Candidate],
    measurements: Sequence[Measurement],
    fidelities: Sequence[Fidelity],
    variants: Sequence[Variant],
) -> dict[str, dict[Key, Estimate]]:
    """Everything that is known of each candidate: candidate id -> (metric, load) -> estimate.

    Metrics of fidelity are those that `fidelity_of` finds; ``size_mb`` (10^6 bytes) is that of the artifact.
    """
    variant_of = {variant.id: variant for variant in variants}
    table: dict[str, dict[Key, Estimate]] = {}
    for candidate in candidates:
        variant = variant_of[candidate.variant_id]
        known: dict[Key, Estimate] = {("size_mb", None): exact(variant.artifact.size_bytes / _BYTES_IN_MB, "MB")}
        fidelity = fidelity_of(candidate, variants, fidelities)
        if fidelity is not None:
            known |= {(name, None): estimate for name, estimate in fidelity.metrics.items()}
        table[candidate.id] = known
    for measurement in measurements:
        if measurement.candidate_id in table:
            found = {(name, measurement.load): estimate for name, estimate in measurement.metrics.items()}
            table[measurement.candidate_id] |= found
    return table


def fidelity_of(candidate: Candidate, variants: Sequence[Variant], fidelities: Sequence[Fidelity]) -> Fidelity | None:
    """How the candidate answers: the fidelity of its variant in its engine and engine version, or None.

    That at the batch size it is served with goes before others, and where the variant's answers depend on the batch, or
    the variant is not among ``variants``, only that counts.
    """
    work = (candidate.variant_id, candidate.engine, candidate.engine_version)
    found = [one for one in fidelities if (one.variant_id, one.engine, one.engine_version) == work]
    served = [one for one in found if one.batch_size == candidate.serving.max_batch_size]
    independent = any(one.id == candidate.variant_id and not one.batch_dependent for one in variants)
    return next(iter(served or (found if independent else ())), None)


# --- one constraint on one candidate ---------------------------------------------------------------------------


def judge(
    constraint: Constraint, metrics: Mapping[Key, Estimate], baseline_metrics: Mapping[Key, Estimate]
) -> Judgement:
    """The constraint tested on the pessimistic end of the candidate's interval.

    A metric that is missing, an end that is not known, or a baseline's value that a relative limit needs and that is
    not known, give ``unknown``. A relative limit on ``accuracy_drop`` or ``slice_drop_max`` is a fraction of the
    baseline's accuracy; on any other metric, of the baseline's value of the same metric at the same load.
    """
    name = _label(constraint.metric, constraint.load)
    observed = metrics.get((constraint.metric, constraint.load))
    reference = _reference(constraint, baseline_metrics)
    outcome: Literal["pass", "fail", "unknown"] = "unknown"
    if observed is None:
        reason = f"{name} is not known"
    elif reference is None:
        reason = f"{name} has a limit relative to the baseline, of which that value is not known"
    else:
        end = _pessimistic_end(constraint, observed)
        limit = _limit_text(constraint, observed, reference)
        if end is None:
            side = "upper" if _is_upper_limit(constraint) else "lower"
            reason = f"{name} {numbers.text(observed)} has no {side} end to hold against the limit {limit}"
        elif _holds(end, constraint.op, constraint.limit * reference):
            outcome, reason = "pass", f"{name} {numbers.text(observed)} {constraint.op} {limit}"
        elif _holds(observed.value, constraint.op, constraint.limit * reference):
            outcome = "fail"
            reason = f"{name} {numbers.text(observed)} is not certainly {constraint.op} {limit}"
        else:
            outcome, reason = "fail", f"{name} {numbers.text(observed)} {_OPPOSITE[constraint.op]} {limit}"
    return Judgement(constraint=constraint, outcome=outcome, observed=observed, reason=reason)


def _reference(constraint: Constraint, baseline_metrics: Mapping[Key, Estimate]) -> float | None:
    """What the limit is multiplied with: 1 for an absolute one, else the baseline's value or None."""
    if not constraint.relative:
        return 1.0
    key: Key = (constraint.metric, constraint.load)
    known = baseline_metrics.get(("accuracy", None) if constraint.metric in _DROPS else key)
    return None if known is None else known.value


def _is_upper_limit(constraint: Constraint) -> bool:
    return constraint.op in {"<=", "<"}


def _pessimistic_end(constraint: Constraint, observed: Estimate) -> float | None:
    return observed.high if _is_upper_limit(constraint) else observed.low


def _holds(value: float, op: str, limit: float) -> bool:
    return {"<=": value <= limit, "<": value < limit, ">=": value >= limit, ">": value > limit}[op]


# --- the verdict -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standing:
    """A candidate with all that counts for or against it."""

    candidate: Candidate
    variant: Variant
    is_baseline: bool
    metrics: Mapping[Key, Estimate]
    judgements: tuple[Judgement, ...]
    failure: Failure | None
    missing: tuple[str, ...]
    other_signature: bool

    @property
    def outcome(self) -> Literal["failed", "fail", "unknown", "pass"]:
        outcomes = {judgement.outcome for judgement in self.judgements}
        if self.failure is not None:
            return "failed"
        if "fail" in outcomes or self.other_signature:
            return "fail"
        return "unknown" if "unknown" in outcomes or self.missing else "pass"

    @property
    def simplicity(self) -> tuple[bool, int, int, str]:
        """Sorts the simplest first."""
        stages = len(self.variant.recipe.stages)
        return (not self.is_baseline, stages, self.variant.artifact.size_bytes, self.candidate.name)


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
) -> Verdict:
    """The verdict: what to serve, why each other candidate is not it, and if none may be, what came closest.

    Args:
        policy: constraints and objectives.
        candidates: all that were to be served, the failed ones too.
        variants: those of the candidates.
        metrics: as `metric_table` gives them.
        comparisons: of candidates in interleaved rounds.
        failures: those whose subject is a candidate's name rule it out.
        baseline_id: the candidate that relative limits refer to; where it has failed they are unknown.
        provisional: whether the level of proof is too low for promotion.
    """
    failed = {failure.subject: failure for failure in failures}
    variant_of = {variant.id: variant for variant in variants}
    baseline_metrics = _baseline_metrics(candidates, metrics, failed, baseline_id)
    standings = [
        _standing(
            candidate,
            policy=policy,
            variant=variant_of[candidate.variant_id],
            is_baseline=candidate.id == baseline_id,
            metrics=metrics.get(candidate.id, {}),
            baseline_metrics=baseline_metrics,
            failure=failed.get(candidate.name),
        )
        for candidate in candidates
    ]
    passing = sorted((one for one in standings if one.outcome == "pass"), key=lambda one: one.simplicity)
    selected, lost = _contest(passing, policy.objectives, comparisons)
    closest = () if selected else _closest(policy, standings, baseline_metrics)
    sentence = (
        _selected_sentence(selected, policy.objectives[0], comparisons)
        if selected
        else _nothing_sentence(standings, closest)
    )
    return Verdict(
        policy=policy,
        baseline=baseline_id,
        selected=selected.candidate.id if selected else None,
        sentence=sentence + (" Provisional: the level of proof is too low to promote on." if provisional else ""),
        provisional=provisional,
        pareto=_pareto(policy, standings),
        rejections=tuple(_rejection(one, selected, lost) for one in standings if one is not selected),
        unknown=tuple(one.candidate.id for one in standings if one.outcome == "unknown"),
        closest=closest,
    )


def _standing(
    candidate: Candidate,
    *,
    policy: Policy,
    variant: Variant,
    is_baseline: bool,
    metrics: Mapping[Key, Estimate],
    baseline_metrics: Mapping[Key, Estimate],
    failure: Failure | None,
) -> _Standing:
    wanted = dict.fromkeys((objective.metric, objective.load) for objective in policy.objectives)
    return _Standing(
        candidate=candidate,
        variant=variant,
        is_baseline=is_baseline,
        metrics=metrics,
        judgements=tuple(judge(constraint, metrics, baseline_metrics) for constraint in policy.constraints),
        failure=failure,
        missing=tuple(_label(*key) for key in wanted if key not in metrics),
        other_signature=variant.signature_changed and policy.signature == "same",
    )


def _baseline_metrics(
    candidates: Sequence[Candidate],
    metrics: Mapping[str, Mapping[Key, Estimate]],
    failed: Mapping[str, Failure],
    baseline_id: str | None,
) -> Mapping[Key, Estimate]:
    """The baseline's metrics; empty where it has failed, so that nothing is held against half a baseline."""
    baseline = next((candidate for candidate in candidates if candidate.id == baseline_id), None)
    return {} if baseline is None or baseline.name in failed else metrics.get(baseline.id, {})


# --- the winner among those that pass --------------------------------------------------------------------------


def _contest(
    passing: Sequence[_Standing], objectives: Sequence[Objective], comparisons: Sequence[Comparison]
) -> tuple[_Standing | None, dict[str, tuple[Objective, _Standing]]]:
    """The winner, and for each that is certainly worse the objective it lost on and to whom.

    Args:
        passing: the candidates that meet all constraints, simplest first.
        objectives: in falling order of weight.
        comparisons: of candidates in interleaved rounds.
    """
    lost: dict[str, tuple[Objective, _Standing]] = {}
    remaining = list(passing)
    for objective in objectives if remaining else ():
        leader = max(remaining, key=lambda one: _gain(one, objective))
        beaten = [one for one in remaining if _certainly_better(leader, one, objective, comparisons)]
        lost |= {one.candidate.id: (objective, leader) for one in beaten}
        remaining = [one for one in remaining if one.candidate.id not in lost]
    return (remaining[0] if remaining else None), lost


def _estimate(one: _Standing, objective: Objective) -> Estimate:
    return one.metrics[(objective.metric, objective.load)]


def _gain(one: _Standing, objective: Objective) -> float:
    value = _estimate(one, objective).value
    return value if objective.direction == "maximize" else -value


def _certainly_better(
    leader: _Standing, other: _Standing, objective: Objective, comparisons: Sequence[Comparison]
) -> bool:
    if leader is other:
        return False
    known = {
        (one.candidate_id, one.baseline_id): one
        for one in comparisons
        if (one.metric, one.load) == (objective.metric, objective.load)
    }
    words = _words_between(leader.candidate.id, other.candidate.id, known)
    if words & {"faster", "slower", "equivalent"}:
        return words == {"faster"}
    common = [
        (one, known[(other.candidate.id, base)])
        for (candidate_id, base), one in known.items()
        if candidate_id == leader.candidate.id and (other.candidate.id, base) in known
    ]
    return _beyond(_estimate(leader, objective), _estimate(other, objective), objective) or any(
        _beyond(ours.ratio, theirs.ratio, objective) for ours, theirs in common
    )


def _words_between(one: str, other: str, known: Mapping[tuple[str, str], Comparison]) -> set[str]:
    """What rounds measured in turns say of the one against the other; empty where nothing is decided."""
    turned = {"faster": "slower", "slower": "faster"}
    words: set[str] = {known[(one, other)].word} if (one, other) in known else set()
    if (other, one) in known:
        word = known[(other, one)].word
        words.add(turned.get(word, word))
    return words - {"undecided"}


def _beyond(better: Estimate, worse: Estimate, objective: Objective) -> bool:
    """Whether the whole interval of the one is on the better side of the whole interval of the other."""
    if objective.direction == "maximize":
        return better.low is not None and worse.high is not None and better.low > worse.high
    return better.high is not None and worse.low is not None and better.high < worse.low


# --- the Pareto front ------------------------------------------------------------------------------------------


def pareto_front(points: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    """The names whose point no other point beats: none is as good on every axis and better on one. More is better."""
    return tuple(
        name for name, point in points.items() if not any(_dominates(other, point) for other in points.values())
    )


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _pareto(policy: Policy, standings: Sequence[_Standing]) -> tuple[str, ...]:
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
            axes.setdefault((constraint.metric, constraint.load), not _is_upper_limit(constraint))
    points = {
        one.candidate.id: [one.metrics[key].value * (1 if larger else -1) for key, larger in axes.items()]
        for one in standings
        if one.failure is None and axes.keys() <= one.metrics.keys()
    }
    return pareto_front(points)


# --- where nothing passes --------------------------------------------------------------------------------------


def _closest(
    policy: Policy, standings: Sequence[_Standing], baseline_metrics: Mapping[Key, Estimate]
) -> tuple[ClosestMiss, ...]:
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
                _violation(one.judgements[index], baseline_metrics),
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
                    relaxation=relaxation(constraint, observed, baseline_metrics),
                )
            )
    return tuple(closest)


def _misses_only_one(one: _Standing) -> bool:
    missed = [judgement for judgement in one.judgements if judgement.outcome != "pass"]
    return len(missed) == 1 and not one.missing and not one.other_signature and one.failure is None


def _violation(judgement: Judgement, baseline_metrics: Mapping[Key, Estimate]) -> float:
    """How far the pessimistic end is beyond the limit, as a part of the limit (of 1 where the limit is 0)."""
    constraint, observed = judgement.constraint, judgement.observed
    reference = _reference(constraint, baseline_metrics)
    end = None if observed is None else _pessimistic_end(constraint, observed)
    if end is None or reference is None:
        return float("inf")
    limit = constraint.limit * reference
    return abs(end - limit) / (abs(limit) or 1.0)


def relaxation(constraint: Constraint, observed: Estimate, baseline_metrics: Mapping[Key, Estimate]) -> str:
    """The constraint's text with the limit that would admit this estimate, rounded outward to three figures.

    A limit relative to a baseline's value that is not positive, or as good as zero, is written as an absolute one.

    Raises:
        ValueError: the estimate's pessimistic end is not known.
    """
    end = _pessimistic_end(constraint, observed)
    if end is None:
        raise ValueError(f"no limit on {constraint.metric} admits an estimate without an end")
    reference = _reference(constraint, baseline_metrics) or 0.0
    relative = constraint.relative and reference > abs(end) * _SMALLEST_REFERENCE
    scale = reference if relative else 1.0
    limit = _admitting(end, scale, constraint.op)
    part = relative or ("%" in constraint.text and _unit(constraint.metric) == "fraction")
    shown = f"{_written(limit * 100)}%" if part else _written(limit)
    at = f" at {constraint.load}" if constraint.load else ""
    return f"{constraint.metric} {constraint.op} {shown}{' rel' if relative else ''}{at}"


def _admitting(end: float, scale: float, op: str) -> Decimal:
    """The nearest number of three figures for which ``end op number * scale`` holds."""
    upward = op in {"<=", "<"}
    wanted = Decimal(end) / Decimal(scale)
    step = Decimal(1).scaleb(wanted.adjusted() - _RELAXED_FIGURES + 1 if wanted else -_RELAXED_FIGURES)
    limit = wanted.quantize(step, rounding=ROUND_CEILING if upward else ROUND_FLOOR)
    while not _holds(end, op, float(limit) * scale):
        limit += step if upward else -step
    return limit


def _written(number: Decimal) -> str:
    return f"{number.normalize():f}"


# --- words -----------------------------------------------------------------------------------------------------


def _label(metric: str, load: str | None) -> str:
    label = METRICS[metric].label if metric in METRICS else metric
    return f"{label} at {load}" if load else label


def _unit(metric: str) -> str:
    return METRICS[metric].unit if metric in METRICS else "1"


def _limit_text(constraint: Constraint, observed: Estimate, reference: float) -> str:
    unit = numbers.short(exact(1.0, observed.unit)).removeprefix("1")
    if not constraint.relative:
        return f"{numbers.plain(constraint.limit)}{unit}"
    whose = "accuracy" if constraint.metric in _DROPS else "value"
    absolute = numbers.plain(constraint.limit * reference)
    return f"{absolute}{unit} ({numbers.plain(constraint.limit * 100)}% of the baseline's {whose})"


def _rejection(
    one: _Standing, selected: _Standing | None, lost: Mapping[str, tuple[Objective, _Standing]]
) -> Rejection:
    return Rejection(
        candidate_id=one.candidate.id,
        candidate_name=one.candidate.name,
        reason=_why_not(one, selected, lost),
        judgements=one.judgements,
    )


def _why_not(one: _Standing, selected: _Standing | None, lost: Mapping[str, tuple[Objective, _Standing]]) -> str:
    if one.failure is not None:
        return f"{_FAILED_TO[one.failure.phase]}: {one.failure.reason}"
    if one.outcome == "fail":
        missed = [judgement.reason for judgement in one.judgements if judgement.outcome == "fail"]
        return _joined([*missed, *([OTHER_SIGNATURE] if one.other_signature else [])])
    if one.outcome == "unknown" or selected is None:
        reasons = [judgement.reason for judgement in one.judgements if judgement.outcome == "unknown"]
        return "unknown: " + _joined([*reasons, *(f"{name} is not known" for name in one.missing)])
    if one.candidate.id in lost:
        return _lost_reason(one, selected, *lost[one.candidate.id])
    return f"ties with the selected, {_simpler(selected, one)}"


def _joined(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


def _lost_reason(one: _Standing, selected: _Standing, objective: Objective, leader: _Standing) -> str:
    own, best = _estimate(one, objective), _estimate(leader, objective)
    whose = "the selected" if leader is selected else leader.candidate.name
    seen = "" if _beyond(best, own, objective) else ", by rounds measured in turns"
    name = _label(objective.metric, objective.load)
    return f"passes, but {name} {numbers.text(own)} against {numbers.text(best)} of {whose}{seen}"


def _simpler(selected: _Standing, other: _Standing) -> str:
    if selected.is_baseline:
        return "which is the baseline and needs no change"
    stages, more = len(selected.variant.recipe.stages), len(other.variant.recipe.stages)
    if stages < more:
        return f"which is simpler ({_count(stages, 'stage')} instead of {more})"
    size, larger = selected.variant.artifact.size_bytes, other.variant.artifact.size_bytes
    if size < larger:
        sizes = [numbers.short(exact(value / _BYTES_IN_MB, "MB")) for value in (size, larger)]
        return f"which is smaller ({sizes[0]} instead of {sizes[1]})"
    return "which comes first by name"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _selected_sentence(selected: _Standing, objective: Objective, comparisons: Sequence[Comparison]) -> str:
    said = f"{_label(objective.metric, objective.load)} {numbers.text(_estimate(selected, objective))}"
    if selected.is_baseline:
        return (
            f"Keep the baseline {selected.candidate.name}: nothing that meets the policy is certainly better ({said})."
        )
    return f"Serve {selected.candidate.name}: it meets the policy, {said}{_against(selected, objective, comparisons)}."


def _against(selected: _Standing, objective: Objective, comparisons: Sequence[Comparison]) -> str:
    wanted = (selected.candidate.id, objective.metric, objective.load)
    ratio = next((one.ratio for one in comparisons if (one.candidate_id, one.metric, one.load) == wanted), None)
    return f", {numbers.times(ratio)} that of the baseline served the same way" if ratio else ""


def _nothing_sentence(standings: Sequence[_Standing], closest: Sequence[ClosestMiss]) -> str:
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
    return f"{head} No single limit, relaxed, would admit one." if closest else head
