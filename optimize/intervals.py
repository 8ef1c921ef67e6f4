"""How sure the numbers of a comparison are: paired bootstrap, and exact bounds where events are rare.

Intervals are 95 %. Their sources:

- *A proportion* (accuracy): Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
- *A rare event* (flips, losses, gains): each end is the one-sided 95 % bound of Clopper and Pearson, "The use of
  confidence or fiducial limits", 1934. For no event in n it is 1 - 0.05^(1/n), about 3/n: the rule of three of Hanley
  and Lippman-Hand, 1983. So no count of zero is ever taken for a rate of zero.
- *The drop of a metric of 0/1 scores*: with b samples that only the baseline has right and c that only the variant
  has right, drop = (b - c)/n. Both counts get the exact bounds above, which are joined by the method of variance
  estimates recovery (Newcombe, "Improved confidence intervals for the difference between binomial proportions based
  on paired data", 1998; Zou and Donner, "Construction of confidence limits about effect measures", 2008)::

      high = (b - c)/n + sqrt((upper(b) - b/n)^2 + (c/n - lower(c))^2)

  and the interval reported is the hull of this one and of the paired bootstrap. The exact part rules where the
  counts are small, the bootstrap where they are large, and nothing jumps between.
- *Everything else*: the percentile bootstrap over samples, drawn in pairs (Efron and Tibshirani, 1993, chapter 13).
- *The worst of several* (slices): each of m intervals is made at 1 - 0.05/m, so that all of them hold together with
  95 % (Bonferroni; Dunn, "Multiple comparisons among means", 1961). Functions take m as ``comparisons``.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.records import Estimate

RESAMPLES = 2000
RARE = 10  # fewer events than this, and a bootstrap has not seen enough of them
FEWEST = 20  # fewer samples than this, and a bootstrap's ends mean nothing
SEED = 20_231
_Z = 1.959964  # of 95 %, two-sided
_ONE_SIDED = 0.05
_TAIL = 0.025
_BEYOND = 10  # draws that must lie beyond an end of a bootstrap for the end to be one

Pair = tuple[float, float]
Ends = tuple[float | None, float | None]
Reduce = Callable[[NDArray[Any]], float]
Resampled = tuple[NDArray[Any], Reduce]


def holding(value: float, ends: Ends, runs: int, method: str, unit: str) -> Estimate:
    """An estimate whose ends hold its value, which rounding and the bootstrap's own noise may leave out by a hair."""
    low, high = (None if ends[0] is None else min(ends[0], value)), (None if ends[1] is None else max(ends[1], value))
    return Estimate(value=value, low=low, high=high, runs=runs, method=method, unit=unit)


# --- counts ----------------------------------------------------------------------------------------------------


def exact_bounds(events: int, count: int, *, comparisons: int = 1) -> Pair:
    """The lowest and the highest rate that this many events in this many samples leave possible, each at 95 %."""
    from scipy.special import betaincinv

    beyond = _ONE_SIDED / comparisons
    low = float(betaincinv(events, count - events + 1, beyond)) if events else 0.0
    high = float(betaincinv(events + 1, count - events, 1 - beyond)) if events < count else 1.0
    return low, high


def rate(events: int, count: int) -> Estimate:
    """The share of events, with exact bounds."""
    return holding(events / count, exact_bounds(events, count), count, "Clopper-Pearson", "fraction")


def wilson(events: int, count: int) -> Pair:
    """Wilson's 95 % interval of a proportion."""
    share, spread = events / count, _Z**2 / count
    half = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def net_bounds(losses: int, gains: int, count: int, *, comparisons: int = 1) -> Pair:
    """Ends of the interval of (losses - gains)/count from exact bounds of both; see the module's docstring."""
    loss, gain = losses / count, gains / count
    loss_low, loss_high = exact_bounds(losses, count, comparisons=comparisons)
    gain_low, gain_high = exact_bounds(gains, count, comparisons=comparisons)
    below = math.hypot(loss - loss_low, gain_high - gain)
    above = math.hypot(loss_high - loss, gain - gain_low)
    return loss - gain - below, loss - gain + above


# --- scores of samples -----------------------------------------------------------------------------------------


def mean_of_scores(scores: NDArray[np.float64], unit: str) -> Estimate:
    """The mean of one score a sample, shape (samples,): Wilson's interval for 0/1 scores, else the bootstrap's."""
    count, mean = len(scores), float(scores.mean())
    if np.isin(scores, (0.0, 1.0)).all():
        return holding(mean, wilson(int(scores.sum()), count), count, "Wilson", unit)
    return holding(mean, bootstrap_mean(scores), count, "bootstrap", unit)


def drop_of_scores(
    before: NDArray[np.float64], after: NDArray[np.float64], unit: str = "fraction", *, comparisons: int = 1
) -> Estimate:
    """The mean of ``before - after`` with the interval that the module's docstring explains.

    Args:
        before: the baseline's score for each sample, shape (samples,), finite.
        after: the variant's, for the same samples.
        unit: of the scores.
        comparisons: how many such intervals are to hold together.
    """
    if np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all():
        losses, gains = int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())
        return _drop_of_counts(losses, gains, len(before), unit, comparisons)
    differences = before - after
    value = float(differences.mean())
    low, high = bootstrap_mean(differences, comparisons=comparisons)
    if low is not None and high is not None and np.count_nonzero(differences) < RARE:
        # So few samples differ that the bootstrap has not seen how many might; each may weigh as the heaviest did.
        weight = float(np.abs(differences).max()) or float(np.ptp(before))
        worse, better = int((differences > 0).sum()), int((differences < 0).sum())
        net_low, net_high = net_bounds(worse, better, len(differences), comparisons=comparisons)
        low, high = min(low, weight * net_low), max(high, weight * net_high)
    return holding(value, (low, high), len(before), "paired bootstrap", unit)


def _drop_of_counts(losses: int, gains: int, count: int, unit: str, comparisons: int) -> Estimate:
    net_low, net_high = net_bounds(losses, gains, count, comparisons=comparisons)
    shares = [losses / count, gains / count, (count - losses - gains) / count]
    drawn = np.random.default_rng(SEED).multinomial(count, shares, _resamples(comparisons))
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, _tails(comparisons))
    ends = min(float(low), net_low), max(float(high), net_high)
    return holding((losses - gains) / count, ends, count, "paired bootstrap, exact bounds", unit)


def bootstrap_mean(values: NDArray[np.float64], *, comparisons: int = 1) -> Ends:
    """Ends of the interval of the mean of ``values``, shape (samples,); open ones for fewer than 20 samples."""
    if len(values) < FEWEST:
        return None, None
    generator, resamples = np.random.default_rng(SEED), _resamples(comparisons)
    at_once = max(1, 4_000_000 // len(values))
    means = [
        values[generator.integers(0, len(values), (min(at_once, resamples - done), len(values)))].mean(axis=1)
        for done in range(0, resamples, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), _tails(comparisons))
    return float(low), float(high)


def resampled_means(columns: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Means of several columns over samples drawn again together: (samples, columns) -> (2000, columns).

    None for fewer than 20 samples.
    """
    count = len(columns)
    if count < FEWEST:
        return None
    generator = np.random.default_rng(SEED)
    at_once = max(1, 4_000_000 // count)
    means = np.empty((RESAMPLES, columns.shape[1]))
    for start in range(0, RESAMPLES, at_once):
        many = min(at_once, RESAMPLES - start)
        drawn = generator.integers(0, count, (many, count)) + count * np.arange(many)[:, None]
        weights = np.bincount(drawn.reshape(-1), minlength=many * count).reshape(many, count)
        means[start : start + many] = weights @ columns / count
    return means


def tail_ends(drawn: NDArray[np.float64]) -> Pair:
    """The middle 95 % of what was drawn, shape (draws,)."""
    low, high = np.quantile(drawn, _tails(1))
    return float(low), float(high)


def _tails(comparisons: int) -> list[float]:
    return [_TAIL / comparisons, 1 - _TAIL / comparisons]


def _resamples(comparisons: int) -> int:
    return max(RESAMPLES, math.ceil(_BEYOND * comparisons / _TAIL))


# --- metrics that are no mean ----------------------------------------------------------------------------------


def drop_of_rows(before: Resampled, after: Resampled, unit: str, *, comparisons: int = 1) -> tuple[Estimate, Estimate]:
    """A metric that is no mean, and its drop, from samples drawn again for both models alike.

    Args:
        before: one row a sample of the baseline's, shape (samples, columns), and what makes the metric of any choice of
            rows.
        after: the variant's, for the same samples.
        unit: of the metric.
        comparisons: how many such intervals are to hold together.
    """
    (was, reduce), (now, reduce_now) = before, after
    count = len(was)
    value, drop = reduce_now(now), reduce(was) - reduce_now(now)
    if count < FEWEST:
        return single(value, count, unit), single(drop, count, unit)
    generator, resamples = np.random.default_rng(SEED), _resamples(comparisons)
    pairs = np.empty((resamples, 2))
    for i in range(resamples):
        drawn = generator.integers(0, count, count)
        pairs[i] = reduce(was[drawn]), reduce_now(now[drawn])
    value_low, value_high = np.quantile(pairs[:, 1], _tails(comparisons))
    low, high = np.quantile(pairs[:, 0] - pairs[:, 1], _tails(comparisons))
    changed = int((was != now).any(axis=1).sum())
    if changed < RARE:
        weight = _weight_of_one_flip(was, reduce)
        unseen = exact_bounds(changed, count, comparisons=comparisons)[1] * count * weight
        low, high = min(low, -unseen), max(high, unseen)
    return (
        holding(value, (float(value_low), float(value_high)), count, "bootstrap", unit),
        holding(drop, (float(low), float(high)), count, "paired bootstrap", unit),
    )


def single(value: float, count: int, unit: str) -> Estimate:
    """A number over so many samples of which no interval can be made."""
    return holding(value, (None, None), count, "one number, no interval", unit)


def _weight_of_one_flip(rows: NDArray[Any], reduce: Reduce) -> float:
    """The most that the metric loses when one sample is decided as another one was; of up to 200 samples tried."""
    generator = np.random.default_rng(SEED)
    whole, most = reduce(rows), 0.0
    for i in generator.permutation(len(rows))[:200]:
        others = np.flatnonzero(rows[:, 0] != rows[i, 0])
        if len(others):
            spoilt = rows.copy()
            spoilt[i, 0] = rows[generator.choice(others), 0]
            most = max(most, whole - reduce(spoilt))
    return float(most)
