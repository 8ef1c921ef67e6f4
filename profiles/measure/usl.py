"""What a ladder of concurrencies says: where more of it brings nothing, and why, as far as a simple law explains it.

The Universal Scalability Law (N. J. Gunther, "Guerrilla Capacity Planning", 2007) has throughput at N requests
outstanding as ``X(N) = gamma N / (1 + sigma (N - 1) + kappa N (N - 1))``: ``sigma`` is the share of the work that
cannot be done side by side, ``kappa`` what each pair costs by getting in each other's way. A server that batches
whatever waits, in ``a + c b`` ms for a batch of ``b``, follows it with ``kappa = 0`` and ``sigma = c / (a + c)``: what
one more sample costs, as a share of a batch of one.

A plateau with a sharp edge, as a largest batch size or a fixed number of workers gives, is no such law. Then nothing is
said of its parameters; the knee is read from the ladder all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from registry.records import Estimate

FEWEST_POINTS = 6
LARGEST_RESIDUAL = 0.05
KNEE_SHARE = 0.05
_RESAMPLES = 400
_CONFIDENCE = 0.95
_PARAMETERS = 3
# From this share on it is all of the work, as a server with one worker has it.
_ALL_OF_IT = 0.995
_NOT_THE_LAW = "the Universal Scalability Law does not fit"

Ladder = Sequence[tuple[int, float]]
"""(requests outstanding, throughput a second), in any order; a concurrency may stand in it more than once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UslFit:
    """The law with the parameters of a ladder.

    Attributes:
        gamma: throughput of one request at a time.
        sigma: share of the work that cannot be done side by side.
        kappa: cost of each pair.
        worst: the largest relative distance of a point from the law.
        peak: the concurrency of the highest throughput; None where the law has no peak (``kappa`` 0).
    """

    gamma: Estimate
    sigma: Estimate
    kappa: Estimate
    worst: float
    peak: float | None


def find_knee(ladder: Ladder) -> int | None:
    """The smallest concurrency whose throughput is within 5 % of the highest; None for an empty ladder.

    The rule of the plateau: beyond it more requests outstanding only wait longer.
    """
    rates = _means(ladder)
    highest = max(rates.values(), default=0.0)
    return min((n for n, rps in rates.items() if rps >= (1 - KNEE_SHARE) * highest), default=None) if highest else None


def fit_usl(ladder: Ladder, *, seed: int = 0) -> UslFit | str:
    """The law that the ladder follows, or why it does not.

    ``N / X`` is linear in ``1``, ``N - 1`` and ``N (N - 1)`` with coefficients that are not negative, so the fit is
    scipy's ``nnls`` on relative errors: it has one answer, and needs no first guess. Intervals are percentiles of a
    bootstrap over residuals, enlarged for the parameters that were fitted.

    Args:
        ladder: at least `FEWEST_POINTS` concurrencies.
        seed: of the bootstrap.

    Returns:
        A sentence for the user where the points are too few, or one is more than `LARGEST_RESIDUAL` off the law.
    """
    points = sorted((n, rps) for n, rps in ladder if rps > 0)
    known = len({n for n, _ in points})
    if known < FEWEST_POINTS:
        return f"no law is fitted: {known} concurrencies were tried, it takes {FEWEST_POINTS}"
    n, rps = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    found = _fit(n, rps)
    if found is None:
        return f"{_NOT_THE_LAW}: throughput falls faster than requests that get in each other's way explain"
    law = _law(n, found)
    residuals = rps / law - 1
    worst = float(np.abs(residuals).max())
    if worst > LARGEST_RESIDUAL:
        place = int(np.abs(residuals).argmax())
        return (
            f"{_NOT_THE_LAW}: it is {worst:.0%} off at concurrency {n[place]:.0f}, "
            "as it is where a batch size or workers set a sharp limit"
        )
    _, sigma, kappa = found
    low, high = _ends(n, law, residuals, seed)
    estimates = [
        Estimate(
            value=value,
            low=min(value, float(below)),
            high=max(value, float(above)),
            runs=len(points),
            method="bootstrap over residuals",
            unit=unit,
        )
        for value, below, above, unit in zip(found, low, high, ("1/s", "1", "1"), strict=True)
    ]
    return UslFit(
        gamma=estimates[0],
        sigma=estimates[1],
        kappa=estimates[2],
        worst=worst,
        peak=float(np.sqrt((1 - sigma) / kappa)) if kappa > 0 and sigma < 1 else None,
    )


def explain_fit(fit: UslFit) -> str:
    """What the law says, in one sentence."""
    sigma, kappa = fit.sigma, fit.kappa
    if sigma.value >= _ALL_OF_IT:
        parts = ["none of the work can be done side by side: more requests at a time bring nothing"]
    else:
        # Concurrency can gain no more than this, however far it is driven.
        most = f" (at most {1 / sigma.value:.3g} times the rate of one request at a time)" if sigma.value > 0 else ""
        parts = [f"{sigma.value:.0%} of the work cannot be done side by side{most}"]
    if kappa.low is not None and kappa.low > 0 and fit.peak is not None:
        parts.append(f"requests get in each other's way: throughput falls beyond {fit.peak:.0f} outstanding")
    return "; ".join(parts)


def _means(ladder: Ladder) -> dict[int, float]:
    at: dict[int, list[float]] = {}
    for n, rps in ladder:
        at.setdefault(n, []).append(rps)
    return {n: float(np.mean(rates)) for n, rates in at.items()}


def _fit(n: NDArray[np.float64], rps: NDArray[np.float64]) -> tuple[float, float, float] | None:
    """(gamma, sigma, kappa) that are nearest by relative error; None where that leaves no rate of one request."""
    from scipy.optimize import nnls

    time = n / rps
    terms = np.stack([np.ones_like(n), n - 1, n * (n - 1)], axis=1) / time[:, np.newaxis]
    (one, serial, pairs), _ = nnls(terms, np.ones_like(n))
    return (1 / one, serial / one, pairs / one) if one > 0 else None


def _law(n: NDArray[np.float64], found: tuple[float, float, float]) -> NDArray[np.float64]:
    gamma, sigma, kappa = found
    throughput: NDArray[np.float64] = gamma * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))
    return throughput


def _ends(
    n: NDArray[np.float64], law: NDArray[np.float64], residuals: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends of the three parameters."""
    chance = np.random.default_rng(seed)
    scaled = residuals * np.sqrt(len(n) / max(1, len(n) - _PARAMETERS))
    drawn = chance.choice(scaled, (_RESAMPLES, len(n)))
    fits = np.array([fit for errors in drawn if (fit := _fit(n, law * (1 + errors))) is not None])
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(fits, [tail, 100 - tail], axis=0)
    return low, high
