"""Whether so many requests decide on a percentile: MLPerf's early stopping.

A limit on a percentile is kept when few enough requests are over it. With ``t`` of ``n`` requests over the limit it is
kept at confidence ``c`` if a server that is exactly at the limit would show as few with probability at most ``1 - c``:
``P(Binomial(n, 1 - p) <= t) <= 1 - c``. Source: MLCommons, "MLPerf Inference Rules", appendix on early stopping, and
``loadgen/early_stopping.cc`` (confidence 0.99, tolerance 0). The rule for "missed" is its mirror image, and ours.

The binomial takes requests for independent, which those of one run are not: it says when the sample is too small to
decide, and the interval over runs (`profiles.measure.percentiles`) has to agree. Neither alone suffices: at 0.7 of the
capacity of an M/M/1 queue the binomial bound alone is below the true p99 in two of five campaigns.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Decision = Literal["kept", "missed", "undecided"]

CONFIDENCE = 0.99


def requests_needed(percentile: float, over: int, confidence: float = CONFIDENCE) -> int:
    """The fewest requests of which so many may be over the limit, and the percentile still be within it.

    With one over, so that a value can be named, this is 662 for p99 and 64 for p90.

    Args:
        percentile: above 0 and below 100.
        over: requests over the limit.
        confidence: that the limit is kept.
    """
    from scipy import stats

    # How many requests it takes until one more is over: its quantile is negative binomial.
    return int(stats.nbinom.ppf(confidence, over + 1, 1 - percentile / 100)) + over + 1


def most_over(percentile: float, requests: int, confidence: float = CONFIDENCE) -> int | None:
    """How many of so many requests may be over a limit that is kept; None where the requests are too few for any."""
    from scipy import stats

    share = 1 - percentile / 100
    most = int(stats.binom.ppf(1 - confidence, requests, share)) - 1
    return most if most >= 0 else None


def decide(percentile: float, over: int, requests: int, confidence: float = CONFIDENCE) -> Decision:
    """Whether the percentile keeps a limit that ``over`` of ``requests`` exceed, as far as so many can tell.

    Raises:
        ValueError: more are over than there are.
    """
    from scipy import stats

    if not 0 <= over <= requests:
        raise ValueError(f"{over} of {requests} requests cannot be over a limit")
    share = 1 - percentile / 100
    if stats.binom.cdf(over, requests, share) <= 1 - confidence:
        return "kept"
    return "missed" if stats.binom.sf(over - 1, requests, share) <= 1 - confidence else "undecided"


def upper_bound(
    values: NDArray[np.float64] | Sequence[float], percentile: float, confidence: float = CONFIDENCE
) -> float | None:
    """The smallest measured value that the percentile does not exceed, as far as so many values can tell.

    It is the value after the highest ``t - 1`` where ``t`` is `most_over`, LoadGen's estimate of the percentile.

    Returns:
        None for fewer values than `requests_needed` asks for with one over.
    """
    most = most_over(percentile, len(values), confidence)
    if not most:
        return None
    place = len(values) - most
    return float(np.partition(np.asarray(values, dtype=np.float64), place)[place])


def requests_to_estimate(percentile: float, confidence: float = CONFIDENCE) -> int:
    """How many requests estimate the share within a limit, to a twentieth of the share beyond the percentile.

    ``z^2 p (1 - p) / m^2`` with the margin ``m = (1 - p) / 20``: MLPerf's table of query counts for its scenarios (its
    rules, "Benchmarks"). Far more than deciding takes.
    """
    from scipy import stats

    share = percentile / 100
    z = float(stats.norm.ppf((1 + confidence) / 2))
    return round(z**2 * share * (1 - share) / ((1 - share) / 20) ** 2)
