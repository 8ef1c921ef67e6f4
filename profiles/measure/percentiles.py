"""Percentiles when the sample earns them, and intervals over independent runs.

One definition everywhere: nearest rank, ``sorted[ceil(n p) - 1]`` (numpy's ``inverted_cdf``), so that every printed
percentile is a value that was measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from profiles.measure.early_stopping import requests_needed, upper_bound
from registry.intervals import CONFIDENCE, t_half_width
from registry.records import Estimate

# Ten values beyond the percentile: p99 is printed from 1,000 requests on, p90 from 100 on. The p50 asks for ten on
# either side of it. Convention of the house (rule 3 of the design).
EARNED: Mapping[int, int] = {50: 20, 90: 100, 95: 200, 99: 1000}
# One run of several says something of its own from a third of that on (three values beyond the percentile).
EARNED_IN_RUN: Mapping[int, int] = {percentile: math.ceil(count / 3) for percentile, count in EARNED.items()}
# Above this share of saturation a tail has no upper end: waits reach over whole windows, and so over runs, of which
# even long ones then seldom show the tail (at 0.9 of an M/M/1 queue five runs of 2,000 requests miss the p99 in one
# interval of four). A tail begins above the median.
MOST_UTILISATION = 0.85
_MISSES = "runs with the percentile among their misses"


def nearest_rank(values: NDArray[np.float64] | Sequence[float], percentile: float) -> float:
    """The smallest measured value that at least ``percentile`` per cent of the values do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if len(values) == 0:
        raise ValueError("a percentile of no values")
    return float(np.percentile(np.asarray(values), percentile, method="inverted_cdf"))


def is_earned(percentile: int, count: int, *, in_run: bool = False) -> bool:
    """Whether ``count`` requests suffice to print the percentile.

    Args:
        percentile: one of 50, 90, 95, 99; any other is never earned.
        count: requests behind it.
        in_run: whether it is one of several runs that are to be pooled, for which a third suffices.
    """
    needed = EARNED_IN_RUN if in_run else EARNED
    return percentile in needed and count >= needed[percentile]


def estimate_percentile(
    runs_ms: Sequence[NDArray[np.float64]], percentile: int, *, utilisation: float | None = None
) -> Estimate | None:
    """The percentile of what runs have in common, in ms, with an upper end that limits may be held against.

    The value is that of all requests together, the interval Student's over the runs. Its upper end is no lower than
    what that many requests can tell at all (`profiles.measure.early_stopping`), and is not known above
    `MOST_UTILISATION`. From as many requests as decide on a limit, but do not earn the percentile, only the upper end
    is told, as value and end at once.

    Args:
        runs_ms: the latencies of each run, infinite where a request was missed; a run that is too short for the
            percentile is left out.
        percentile: one of those in `EARNED`.
        utilisation: the rate as a share of the saturation point, where that is known.

    Returns:
        None where there are fewer requests than decide on a limit, or where so many were missed that the percentile is
        among them.
    """
    counted = [values for values in runs_ms if is_earned(percentile, len(values), in_run=True)]
    requests = sum(map(len, counted))
    if not counted or requests < min(EARNED[percentile], requests_needed(percentile, 1)):
        return None
    pooled = np.concatenate(counted)
    value = nearest_rank(pooled, percentile)
    each = [nearest_rank(values, percentile) for values in counted]
    earned = is_earned(percentile, requests)
    if not math.isfinite(max(value, *each)):
        if not (earned and math.isfinite(value)):
            return None
        return Estimate(value=value, low=None, high=None, runs=len(each), method=_MISSES, unit="ms")
    found = estimate_over_runs(each, value, "ms")
    if percentile > 50 and utilisation is not None and round(utilisation, 6) > MOST_UTILISATION:
        method = f"{found.method}, no upper end near saturation"
        return replace(found, high=None, method=method) if earned else None
    bound = upper_bound(pooled, percentile)
    if found.high is None or bound is None:
        return found if earned else None
    high = max(found.high, bound)
    if not math.isfinite(high):
        return replace(found, high=None, method=f"{found.method}, no upper end for misses") if earned else None
    if earned:
        return replace(found, high=high)
    return replace(found, value=high, low=None, high=high, method=f"upper end, {found.method}")


def estimate_over_runs(
    values: Sequence[float], pooled: float | None, unit: str, *, log: bool = True, confidence: float = CONFIDENCE
) -> Estimate:
    """An estimate whose interval is a t-interval over independent runs, the unit of replication.

    Requests inside a run depend on each other, so an interval over requests is too narrow by a factor; runs do not.
    The interval is centred on the pooled value, since the mean of percentiles of short runs is biased low.

    Args:
        values: one value a run, in ``unit``.
        pooled: the value over all runs together, or None for the mean (geometric where ``log``).
        unit: the unit of all of them.
        log: whether the spread is that of the logarithms, as fits latencies and rates; where a value is not
            positive the spread is taken as it stands.
        confidence: of the two-sided interval.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an estimate over no runs")
    log = log and min(values) > 0 and (pooled is None or pooled > 0)
    points = np.log(values) if log else np.asarray(values, dtype=np.float64)
    centre = float(points.mean()) if pooled is None else (math.log(pooled) if log else pooled)
    back = math.exp if log else float
    runs = len(values)
    if runs == 1:
        return Estimate(value=back(centre), low=None, high=None, runs=1, method="single run", unit=unit)
    half = t_half_width(points, confidence)
    low, value, high = back(centre - half), back(centre), back(centre + half)
    return Estimate(value=value, low=low, high=high, runs=runs, method="t over runs", unit=unit)
