"""The winner among the candidates that meet all constraints, and what each of the others lost by.

Objectives without weights count in their order: the best by point value leads, who is certainly worse is out, and the
rest goes on to the next objective. Objectives with weights count together: what is compared is the sum of their
weighted log-ratios, so that a doubling of one with weight 1 makes up for a halving of another with weight 1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from registry.records import Candidate, Comparison, Estimate, Failure, Judgement, Objective, Variant, exact
from registry.report import numbers
from registry.selection_table import Key

Goal = tuple[Objective, ...]
"""One objective, or several that count together by their weights."""

_UNITY = exact(1.0, "1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A candidate with all that counts for or against it."""

    candidate: Candidate
    variant: Variant
    is_baseline: bool
    metrics: Mapping[Key, Estimate]
    judgements: tuple[Judgement, ...]
    failure: Failure | None
    missing: tuple[str, ...]
    other_signature: bool
    outcome: Literal["failed", "fail", "unknown", "pass"]
    is_champion: bool = False

    @property
    def simplicity(self) -> tuple[bool, bool, int, int, str]:
        """Sorts the simplest first: what serves now, then the baseline."""
        stages = len(self.variant.recipe.stages)
        return (
            not self.is_champion,
            not self.is_baseline,
            stages,
            self.variant.artifact.size_bytes,
            self.candidate.name,
        )

    def estimate(self, objective: Objective) -> Estimate:
        """What is known of the objective's metric."""
        return self.metrics[(objective.metric, objective.load)]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What candidates were certainly worse in, and who leads there."""

    goal: Goal
    leader: Standing

    @cached_property
    def leads_with(self) -> tuple[str, ...]:
        """The leader's estimate of each objective, in words."""
        return tuple(numbers.text(self.leader.estimate(objective)) for objective in self.goal)


def goals_of(objectives: Sequence[Objective]) -> tuple[Goal, ...]:
    """The objectives one by one, or all together where they have weights."""
    if len(objectives) > 1 and all(objective.weight is not None for objective in objectives):
        return (tuple(objectives),)
    return tuple((objective,) for objective in objectives)


def contest(
    passing: Sequence[Standing], goals: Sequence[Goal], comparisons: Sequence[Comparison]
) -> tuple[Standing | None, dict[str, Loss]]:
    """The winner, and for each that is certainly worse what it lost by.

    Args:
        passing: the candidates that meet all constraints, simplest first.
        goals: in falling order of importance.
        comparisons: of candidates in interleaved rounds.
    """
    lost: dict[str, Loss] = {}
    remaining = list(passing)
    for goal in goals if remaining else ():
        rounds = [_Rounds(objective, comparisons) for objective in goal]
        leader = max(remaining, key=lambda one: _gain(one, goal))
        beaten = {one.candidate.id for one in remaining if _certainly_better(leader, one, goal, rounds)}
        lost |= dict.fromkeys(beaten, Loss(goal=goal, leader=leader))
        remaining = [one for one in remaining if one.candidate.id not in beaten]
    return (remaining[0] if remaining else None), lost


def beyond(better: Estimate, worse: Estimate, objective: Objective) -> bool:
    """Whether the whole interval of the one is on the better side of the whole interval of the other."""
    if objective.direction == "maximize":
        return better.low is not None and worse.high is not None and better.low > worse.high
    return better.high is not None and worse.low is not None and better.high < worse.low


class _Rounds:
    """The comparisons that speak of one objective."""

    def __init__(self, objective: Objective, comparisons: Iterable[Comparison]) -> None:
        self._of: dict[str, dict[str, Comparison]] = {}
        for one in comparisons:
            if (one.metric, one.load) == (objective.metric, objective.load):
                self._of.setdefault(one.candidate_id, {})[one.baseline_id] = one

    def between(self, one: str, other: str) -> Comparison | None:
        """The one against the other, as it was measured."""
        return self._of.get(one, {}).get(other)

    def in_common(self, one: str, other: str) -> list[tuple[Estimate, Estimate]]:
        """The ratios of both to each baseline that both were measured against."""
        ours, theirs = self._of.get(one, {}), self._of.get(other, {})
        return [(ours[base].ratio, theirs[base].ratio) for base in ours if base in theirs]

    def words(self, one: str, other: str) -> set[str]:
        """What rounds measured in turns say of the one against the other; empty where nothing is decided."""
        turned = {"faster": "slower", "slower": "faster"}
        words: set[str] = set()
        if (ahead := self.between(one, other)) is not None:
            words.add(ahead.word)
        if (behind := self.between(other, one)) is not None:
            words.add(turned.get(behind.word, behind.word))
        return words - {"undecided"}


def _gain(one: Standing, goal: Goal) -> float:
    """How good the candidate is by point values; more is better."""
    if len(goal) == 1:
        return _sign(goal[0]) * one.estimate(goal[0]).value
    return sum(_weight(objective) * _sign(objective) * math.log(one.estimate(objective).value) for objective in goal)


def _certainly_better(leader: Standing, other: Standing, goal: Goal, rounds: Sequence[_Rounds]) -> bool:
    if leader is other:
        return False
    if len(goal) == 1:
        return _better_in_one(leader, other, goal[0], rounds[0])
    parts = zip(goal, rounds, strict=True)
    return sum(_weight(objective) * _least_gain(leader, other, objective, found) for objective, found in parts) > 0


def _better_in_one(leader: Standing, other: Standing, objective: Objective, rounds: _Rounds) -> bool:
    ids = leader.candidate.id, other.candidate.id
    words = rounds.words(*ids)
    if words & {"faster", "slower", "equivalent"}:
        return words == {"faster"}
    return beyond(leader.estimate(objective), other.estimate(objective), objective) or any(
        beyond(ours, theirs, objective) for ours, theirs in rounds.in_common(*ids)
    )


def _least_gain(leader: Standing, other: Standing, objective: Objective, rounds: _Rounds) -> float:
    """The lower end of the log-ratio by which the leader is better in one objective; minus infinity if not known.

    Rounds of the two say it best; else the better of what ratios to a common baseline say, and the two intervals.
    """
    ids = leader.candidate.id, other.candidate.id
    ahead, behind = rounds.between(*ids), rounds.between(*reversed(ids))
    direct = [(ahead.ratio, _UNITY)] if ahead else []
    direct += [(_UNITY, behind.ratio)] if behind else []
    known = direct or [*rounds.in_common(*ids), (leader.estimate(objective), other.estimate(objective))]
    return max(_least_log_ratio(better, worse, objective) for better, worse in known)


def _least_log_ratio(better: Estimate, worse: Estimate, objective: Objective) -> float:
    if objective.direction == "maximize":
        above, below = better.low, worse.high
    else:
        above, below = worse.low, better.high
    if above is None or below is None or above <= 0 or below <= 0:
        return -math.inf
    return math.log(above / below)


def _sign(objective: Objective) -> float:
    return 1.0 if objective.direction == "maximize" else -1.0


def _weight(objective: Objective) -> float:
    return 1.0 if objective.weight is None else objective.weight
