"""One constraint on one candidate: pass, fail or unknown; by how much it misses, and what would admit it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import cache
from typing import Literal

from registry.policy import DROPS, metric_of
from registry.records import Constraint, Estimate, Judgement, exact
from registry.report import numbers
from registry.selection_table import Key

_RELAXED_FIGURES = 3
# A limit of more than a million times the reference's value says nothing that people could use.
_SMALLEST_REFERENCE = 1e-6
_OPPOSITE = {"<=": ">", "<": ">=", ">=": "<", ">": "<="}


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What relative limits refer to; empty mappings where nothing is known of it.

    Attributes:
        baseline: its metrics.
        champion: its metrics.
        champion_id: who that is.
        ratios: (candidate, metric and load) -> times the champion's value, from rounds in which both were measured.
    """

    baseline: Mapping[Key, Estimate] = field(default_factory=dict)
    champion: Mapping[Key, Estimate] = field(default_factory=dict)
    champion_id: str | None = None
    ratios: Mapping[tuple[str, Key], Estimate] = field(default_factory=dict)

    def ratio(self, constraint: Constraint, candidate_id: str) -> Estimate | None:
        """Times the champion's value, where the limit holds against that and the two were compared in turns."""
        if constraint.reference != "champion":
            return None
        if candidate_id == self.champion_id:
            return exact(1.0, "1")
        return self.ratios.get((candidate_id, (constraint.metric, constraint.load)))

    def of(self, constraint: Constraint) -> float | None:
        """What the limit is multiplied with: 1 for an absolute one, else the reference's value or None."""
        if not constraint.relative:
            return 1.0
        key: Key = (constraint.metric, constraint.load)
        metrics = self.champion if constraint.reference == "champion" else self.baseline
        known = metrics.get(("accuracy", None) if constraint.metric in DROPS else key)
        return None if known is None else known.value


def judge(
    constraint: Constraint, metrics: Mapping[Key, Estimate], baseline_metrics: Mapping[Key, Estimate]
) -> Judgement:
    """As `judge_against`, where only the baseline is known."""
    return judge_against(constraint, metrics, References(baseline=baseline_metrics))


def judge_against(
    constraint: Constraint, metrics: Mapping[Key, Estimate], references: References, candidate_id: str = ""
) -> Judgement:
    """The constraint tested on the pessimistic end of the candidate's interval.

    Where the limit holds against the champion, and the two were compared in turns, that is the end of their ratio, in
    which the machine's drift cancels; what is observed is then that ratio of the champion's value.

    A metric that is missing, an end that is not known, or a reference's value that a relative limit needs and that is
    not known, give ``unknown``. A relative limit on ``accuracy_drop`` or ``slice_drop_max`` is a fraction of the
    baseline's accuracy; on any other metric, of the reference's value of the same metric at the same load.
    """
    name = label(constraint.metric, constraint.load)
    observed = metrics.get((constraint.metric, constraint.load))
    reference = references.of(constraint)
    outcome: Literal["pass", "fail", "unknown"] = "unknown"
    if observed is None:
        reason = f"{name} is not known"
    elif reference is None:
        reason = f"{name} has a limit relative to the {constraint.reference}, of which that value is not known"
    elif (judged := _in_turns(constraint, observed, reference, references.ratio(constraint, candidate_id))) is not None:
        return judged
    else:
        end = pessimistic_end(constraint, observed)
        limit = _limit_text(constraint, observed.unit, reference)
        if end is None:
            side = "upper" if is_upper_limit(constraint) else "lower"
            reason = f"{name} {numbers.text(observed)} has no {side} end to hold against the limit {limit}"
        elif _holds(end, constraint.op, constraint.limit * reference):
            outcome, reason = "pass", f"{name} {numbers.text(observed)} {constraint.op} {limit}"
        elif _holds(observed.value, constraint.op, constraint.limit * reference):
            outcome = "fail"
            reason = f"{name} {numbers.text(observed)} is not certainly {constraint.op} {limit}"
        else:
            outcome, reason = "fail", f"{name} {numbers.text(observed)} {_OPPOSITE[constraint.op]} {limit}"
    return Judgement(constraint=constraint, outcome=outcome, observed=observed, reason=reason)


def _in_turns(constraint: Constraint, observed: Estimate, reference: float, ratio: Estimate | None) -> Judgement | None:
    """The judgement by a ratio to the champion; None where there is none, or it has no such end."""
    end = None if ratio is None else pessimistic_end(constraint, ratio)
    if ratio is None or end is None or reference <= 0:
        return None
    said = " ".join(part for part in (numbers.times(ratio), numbers.times_interval(ratio)) if part)
    words = f"{label(constraint.metric, constraint.load)} {said} the champion's"
    part = f"{numbers.plain(constraint.limit * 100)}%"
    outcome: Literal["pass", "fail", "unknown"] = "fail"
    if _holds(end, constraint.op, constraint.limit):
        outcome, reason = "pass", f"{words} {constraint.op} {part}"
    elif _holds(ratio.value, constraint.op, constraint.limit):
        reason = f"{words} is not certainly {constraint.op} {part}"
    else:
        reason = f"{words} {_OPPOSITE[constraint.op]} {part}"
    scaled = replace(
        ratio,
        value=ratio.value * reference,
        low=None if ratio.low is None else ratio.low * reference,
        high=None if ratio.high is None else ratio.high * reference,
        unit=observed.unit,
    )
    return Judgement(constraint=constraint, outcome=outcome, observed=scaled, reason=reason)


def is_upper_limit(constraint: Constraint) -> bool:
    """Whether smaller values meet it."""
    return constraint.op in {"<=", "<"}


def pessimistic_end(constraint: Constraint, observed: Estimate) -> float | None:
    """The end of the interval that comes nearest to missing the limit, or None where it is not known."""
    return observed.high if is_upper_limit(constraint) else observed.low


def violation(judgement: Judgement, references: References) -> float:
    """How far the pessimistic end is beyond the limit, as a part of the limit (of 1 where the limit is 0)."""
    constraint, observed = judgement.constraint, judgement.observed
    reference = references.of(constraint)
    end = None if observed is None else pessimistic_end(constraint, observed)
    if end is None or reference is None:
        return float("inf")
    limit = constraint.limit * reference
    return abs(end - limit) / (abs(limit) or 1.0)


def relaxation(constraint: Constraint, observed: Estimate, references: References) -> str:
    """The constraint's text with the limit that would admit this estimate, rounded outward to three figures.

    A limit relative to a value that is not positive, or as good as zero, is written as an absolute one.

    Raises:
        ValueError: the estimate's pessimistic end is not known.
    """
    end = pessimistic_end(constraint, observed)
    if end is None:
        raise ValueError(f"no limit on {constraint.metric} admits an estimate without an end")
    reference = references.of(constraint) or 0.0
    relative = constraint.relative and reference > abs(end) * _SMALLEST_REFERENCE
    limit = _admitting(end, reference if relative else 1.0, constraint.op)
    part = relative or ("%" in constraint.text and unit(constraint.metric) == "fraction")
    shown = f"{_written(limit * 100)}%" if part else _written(limit)
    against = f" rel{' vs champion' if constraint.reference == 'champion' else ''}" if relative else ""
    at = f" at {constraint.load}" if constraint.load else ""
    return f"{constraint.metric} {constraint.op} {shown}{against}{at}"


@cache
def label(metric: str, load: str | None) -> str:
    """What people read of a metric at a load."""
    known = metric_of(metric)
    words = metric if known is None else known.label
    return f"{words} at {load}" if load else words


def unit(metric: str) -> str:
    """The metric's unit, as in `Estimate`."""
    known = metric_of(metric)
    return "1" if known is None else known.unit


def _holds(value: float, op: str, limit: float) -> bool:
    if op == "<=":
        return value <= limit
    if op == "<":
        return value < limit
    return value >= limit if op == ">=" else value > limit


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


@cache
def _limit_text(constraint: Constraint, unit_name: str, reference: float) -> str:
    shown_unit = numbers.short(exact(1.0, unit_name)).removeprefix("1")
    if not constraint.relative:
        return f"{numbers.plain(constraint.limit)}{shown_unit}"
    whose = "accuracy" if constraint.metric in DROPS else "value"
    absolute = numbers.plain(constraint.limit * reference)
    part = numbers.plain(constraint.limit * 100)
    return f"{absolute}{shown_unit} ({part}% of the {constraint.reference}'s {whose})"
