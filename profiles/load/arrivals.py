"""When requests are due: absolute schedules, computed before the first one is sent.

A schedule of relative sleeps falls behind by the lateness of each sleep; an absolute one does not.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray


def schedule_ns(
    rate_rps: float, duration_s: float, *, arrivals: Literal["poisson", "constant"] = "poisson", seed: int = 0
) -> NDArray[np.int64]:
    """Due times in ns from the start, rising, all before ``duration_s``.

    The same seed at another rate gives the same arrivals, stretched: candidates that are compared see common
    random numbers.

    Args:
        rate_rps: mean arrivals a second.
        duration_s: length of the schedule.
        arrivals: exponential gaps, or equal ones.
        seed: of the exponential gaps.

    Raises:
        ValueError: rate or duration is not positive.
    """
    if rate_rps <= 0 or duration_s <= 0:
        raise ValueError(f"a schedule needs a positive rate and duration, not {rate_rps} and {duration_s}")
    mean = rate_rps * duration_s
    if arrivals == "constant":
        due_s = np.arange(int(np.ceil(mean))) / rate_rps
    else:
        # Ten sigma more than the mean, so that the last gap falls beyond the end.
        count = int(mean + 10 * np.sqrt(mean) + 10)
        due_s = np.random.default_rng(seed).exponential(1.0, count).cumsum() / rate_rps
    return (due_s[due_s < duration_s] * 1e9).astype(np.int64)
