"""Intervals over few independent values: Student's, of a mean and of the ratio of pairs."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from registry.records import Estimate

CONFIDENCE = 0.95


def t_half_width(points: NDArray[np.float64], confidence: float = CONFIDENCE) -> float:
    """Half the width of Student's interval for the mean of at least two points."""
    from scipy import stats

    spread = float(points.std(ddof=1)) / math.sqrt(len(points))
    return float(stats.t.ppf((1 + confidence) / 2, len(points) - 1)) * spread


def paired_ratio(pairs: Sequence[tuple[float, float]], confidence: float = CONFIDENCE) -> Estimate:
    """How many times the second of a pair the first is: the geometric mean, with Student's interval over the pairs.

    Args:
        pairs: at least one, both values positive and in the same unit.
        confidence: of the interval; a single pair has none.
    """
    logs = np.log([one / other for one, other in pairs])
    centre = float(logs.mean())
    if len(logs) == 1:
        return Estimate(value=math.exp(centre), low=None, high=None, runs=1, method="single pair", unit="1")
    half = t_half_width(logs, confidence)
    low, high = math.exp(centre - half), math.exp(centre + half)
    return Estimate(value=math.exp(centre), low=low, high=high, runs=len(logs), method="t over paired rounds", unit="1")
