"""A candidate against the baseline, from interleaved pairs: one pair a round, the log-ratio its statistic.

A shared machine drifts; the two of a pair stand close together in time and share the drift, which the ratio cancels.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from registry.intervals import CONFIDENCE, paired_ratio
from registry.records import Comparison, Estimate

Word = Literal["faster", "equivalent", "slower", "undecided"]

SMALLEST_FLOOR = 0.02
# On a machine so noisy that like differs from like by more than this, "equivalent" would say nothing.
LARGEST_FLOOR = 0.10
# Where not one pair of like runs was valid, nobody knows how much like differs from like: more than that, for all that
# is known. Convention of the house.
UNKNOWN_FLOOR = 0.15
# Runs of one after runs of the other: the machine's drift between them is in the ratio, and nobody knows it. Abedi and
# Brecht ("Conducting repeatable experiments in highly variable cloud computing environments", ICPE 2017) found
# identical systems 38 % apart that way.
BLOCK_FLOOR = 0.40
MOST_TO_PERMUTE = 15
"""Rounds up to which it is cheap to go through all flips of signs."""


def looks_at(first: int, most: int) -> tuple[int, ...]:
    """After how many rounds it is looked whether more are needed: the first number, halfway to the last, the last."""
    return tuple(sorted({first, (first + most + 1) // 2, most}))


def spent_at(rounds: int, first: int, most: int, alpha: float = 1 - CONFIDENCE) -> float:
    """The chance to declare a difference that is none which the look after so many rounds may take.

    Who looks again and again, and stops at what he likes, errs more often than each look says. So the chance is shared
    out among the looks in proportion to the rounds that each adds; as shares add up to ``alpha``, so at most do the
    errors, however the looks depend on each other. (Alpha spending with a linear function: Lan and DeMets, "Discrete
    sequential boundaries for clinical trials", 1983; each share tested by itself, after Bonferroni.)

    Args:
        rounds: played so far.
        first: rounds before the first look.
        most: rounds before the last one.
        alpha: the chance over all looks.
    """
    places = looks_at(first, most)
    place = max((index for index, look in enumerate(places) if look <= rounds), default=0)
    before = places[place - 1] if place else 0
    return alpha * (places[place] - before) / places[-1]


def larger_is_better(metric: str) -> bool:
    """Whether more of the metric is faster: true for rates, false for times and costs."""
    return metric.endswith("_rps")


def compare_pairs(
    pairs: Sequence[tuple[float, float]],
    *,
    candidate_id: str,
    baseline_id: str,
    metric: str,
    load: str | None,
    noise_floor: float = SMALLEST_FLOOR,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """The comparison of a candidate with the baseline over rounds in which both have a value.

    Args:
        pairs: (candidate, baseline) of each round, both positive, in the metric's unit.
        candidate_id: who is compared.
        baseline_id: with whom.
        metric: the metric's name; its direction follows from it.
        load: the load it belongs to.
        noise_floor: relative difference below which nothing is called a difference.
        confidence: of the interval.

    Raises:
        ValueError: there are no pairs, or a value is not positive.
    """
    if not pairs:
        raise ValueError("a comparison over no rounds")
    if min(itertools.chain.from_iterable(pairs)) <= 0:
        raise ValueError(f"ratios of {metric} need positive values, not {list(pairs)}")
    logs = np.log([candidate / baseline for candidate, baseline in pairs])
    ratio = paired_ratio(pairs, confidence)
    return Comparison(
        candidate_id=candidate_id,
        baseline_id=baseline_id,
        metric=metric,
        load=load,
        ratio=ratio,
        noise_floor=noise_floor,
        word=_word(ratio, logs, noise_floor, larger_is_better(metric), confidence),
    )


def compare_blocks(
    values: Sequence[float],
    baseline: Sequence[float],
    *,
    candidate_id: str,
    baseline_id: str,
    metric: str,
    load: str | None,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """The comparison of runs that were not measured in turns: Welch's interval, and a floor for unknown drift.

    Nothing is equivalent by it, and only what is beyond `BLOCK_FLOOR` is a difference.

    Args:
        values: of the candidate, one a run, positive.
        baseline: of the baseline.
        candidate_id: who is compared.
        baseline_id: with whom.
        metric: the metric's name; its direction follows from it.
        load: the load it belongs to.
        confidence: of the interval.

    Raises:
        ValueError: one side has no runs, or a value is not positive.
    """
    if not values or not baseline or min(*values, *baseline) <= 0:
        raise ValueError(f"ratios of {metric} need positive values, not {list(values)} and {list(baseline)}")
    ratio = _welch(np.log(values), np.log(baseline), confidence)
    word: Word = "undecided"
    if ratio.low is not None and ratio.high is not None:
        above, below = ratio.low > 1 + BLOCK_FLOOR, ratio.high < 1 / (1 + BLOCK_FLOOR)
        if above or below:
            word = "faster" if above == larger_is_better(metric) else "slower"
    return Comparison(
        candidate_id=candidate_id,
        baseline_id=baseline_id,
        metric=metric,
        load=load,
        ratio=ratio,
        noise_floor=BLOCK_FLOOR,
        word=word,
    )


def turned(one: Comparison) -> Comparison:
    """The same comparison, seen from the other side."""
    words: dict[Word, Word] = {"faster": "slower", "slower": "faster"}
    ratio = one.ratio
    return replace(
        one,
        candidate_id=one.baseline_id,
        baseline_id=one.candidate_id,
        ratio=replace(
            ratio,
            value=1 / ratio.value,
            low=None if ratio.high is None else 1 / ratio.high,
            high=None if ratio.low is None else 1 / ratio.low,
        ),
        word=words.get(one.word, one.word),
    )


def noise_floor(pairs: Sequence[tuple[float, float]]) -> float:
    """The largest relative difference between two runs of the same thing, at least 2 %.

    Args:
        pairs: both values of each A/A pair; those that are not positive are left out.
    """
    logs = [abs(math.log(one / other)) for one, other in pairs if one > 0 and other > 0]
    return max([SMALLEST_FLOOR, *(math.expm1(log) for log in logs)])


def sign_flip_p(logs: Sequence[float]) -> float:
    """The exact two-sided p-value of the hypothesis that the log-ratios are symmetric about zero.

    Enumerates all ``2^n`` sign patterns, so it is meant for at most fifteen values.
    """
    values = np.asarray(logs, dtype=np.float64)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    sums = np.abs(signs @ values)
    observed = abs(float(values.sum()))
    return float(np.mean(sums >= observed * (1 - 1e-12)))


def _welch(
    logs: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    others: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    confidence: float,
) -> Estimate:
    from scipy import stats

    runs, value = min(len(logs), len(others)), math.exp(float(logs.mean() - others.mean()))
    if runs < 2:
        return Estimate(value=value, low=None, high=None, runs=runs, method="single runs, not in turns", unit="1")
    if logs.std() == others.std() == 0:
        low = high = value
    else:
        ends = stats.ttest_ind(logs, others, equal_var=False).confidence_interval(confidence)
        low, high = math.exp(ends.low), math.exp(ends.high)
    return Estimate(value=value, low=low, high=high, runs=runs, method="Welch's t, not in turns", unit="1")


def _word(
    ratio: Estimate,
    logs: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    floor: float,
    larger_better: bool,
    confidence: float,
) -> Word:
    if ratio.low is None or ratio.high is None:
        return "undecided"
    above, below = ratio.low > 1 + floor, ratio.high < 1 / (1 + floor)
    if above or below:
        if not _flips_agree(logs, confidence):
            return "undecided"
        return "faster" if above == larger_better else "slower"
    inside = floor <= LARGEST_FLOOR and ratio.low >= 1 / (1 + floor) and ratio.high <= 1 + floor
    return "equivalent" if inside else "undecided"


def _flips_agree(logs: "np.ndarray[tuple[int], np.dtype[np.float64]]", confidence: float) -> bool:
    """Whether all flips of signs bear a difference out.

    They are not asked where they could not, however far apart the two are: of six rounds the least chance is 2 / 2^6.
    """
    allowed = 1 - confidence
    if 2 / 2 ** len(logs) > allowed or len(logs) > MOST_TO_PERMUTE:
        return True
    return sign_flip_p(logs.tolist()) <= allowed
