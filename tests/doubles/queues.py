"""Response times of a single queue in virtual time, many runs at once."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

WARMUP = 0.25
"""Share of a run that is sent first and not recorded, so that the queue is not empty when the window begins."""


def response_times(
    utilisation: float,
    runs: int,
    requests: int,
    chance: np.random.Generator,
    *,
    service: Literal["exponential", "fixed"] = "exponential",
) -> NDArray[np.float64]:
    """(runs, requests) response times under Poisson arrivals, in times of service: M/M/1 or M/D/1.

    By Lindley's recursion, whose solution is a running sum less its running minimum.
    """
    count = requests + round(WARMUP * requests)
    work = np.ones((runs, count)) if service == "fixed" else chance.exponential(1, (runs, count))
    gaps = chance.exponential(1 / utilisation, (runs, count - 1))
    walk = np.concatenate([np.zeros((runs, 1)), np.cumsum(work[:, :-1] - gaps, axis=1)], axis=1)
    times: NDArray[np.float64] = walk - np.minimum.accumulate(walk, axis=1) + work
    return times[:, -requests:]


def quantile(utilisation: float, percentile: float) -> float:
    """The percentile of an M/M/1 queue's response time, which is exponential, in times of service."""
    return float(-np.log(1 - percentile / 100) / (1 - utilisation))
