"""The search for a serving profile: which of many to serve and measure, until the next one cannot pay.

What the session does in process bounds what serving can give: a profile never answers more rows a second than its
lanes (workers or instances) times what one session does in batches that large. Whatever cannot come above the best
that was measured is never served.

Among the rest a model of the surface picks. It is a Gaussian process on the logarithm of the score (Rasmussen and
Williams, "Gaussian Processes for Machine Learning", 2006, algorithm 2.1): a share of the in-process bound, effects of
each axis that multiply, and effects of axes together (additive kernels: Duvenaud, Nickisch and Rasmussen, NIPS 2011).
As some points are too few to fit its scales to, several are kept and weighted by how likely they make what was seen.
The point with the largest expected improvement is next (Jones, Schonlau and Welch, "Efficient Global Optimization",
1998). The search is over when the upper end of what any other point is expected to give would not pay.

Nothing here serves or measures; `optimize.serving_search` does, and the benchmark that replays recorded surfaces.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from registry.errors import BudgetUsedUpError, BurnishError, GeneratorLostError, InputError, StorageError
from registry.records import Estimate, Screening, ServingPoint, ServingProfile, ServingSearch

Floats = NDArray[np.float64]
Measure = Callable[[ServingProfile], Estimate]

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
DELAYS_MS = (0.0, 0.5, 1.0, 2.0, 5.0)
# A gain below this share of the best is not worth another point.
PAYS = 0.02
# One-sided 95 % of a normal distribution.
UPPER_END = 1.645
# What a window of load repeats itself to, at best, and what is taken for a measure that says nothing of its interval.
LEAST_NOISE, USUAL_NOISE = 0.003, 0.03
# In-process times are medians with an interval; a server's hour may be a better one.
BOUND_MARGIN = 1.2
FEWEST = 4


# --- the space -------------------------------------------------------------------------------------------------


def lanes(profile: ServingProfile) -> int:
    """How many requests or batches are computed at the same time: Triton's instances, MLServer's workers."""
    return profile.instances if profile.server == "triton" else max(1, profile.parallel_workers)


def search_space(
    *,
    cores: int,
    servers: Sequence[Literal["mlserver", "triton"]] = ("mlserver", "triton"),
    protocols: Sequence[Literal["grpc", "rest"]] = ("grpc", "rest"),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    delays_ms: Sequence[float] = DELAYS_MS,
    lane_counts: Sequence[int] = (),
    threads: Sequence[int] = (),
) -> tuple[ServingProfile, ...]:
    """All profiles of the axes that can be served and differ.

    Lanes times threads are never more than the cores. A delay is only where there is batching, and MLServer batches
    only with one.

    Args:
        cores: that the server may use.
        servers: to choose from, each with our backend.
        protocols: to choose from.
        batch_sizes: largest batches; 1 is without batching.
        delays_ms: longest waits for company.
        lane_counts: MLServer's workers and Triton's instances; 0, which only MLServer knows, is the model in the server
            process. Those up to the number of cores where none are given.
        threads: of each session; 1, 2, 4, ... up to the cores where none are given.

    Raises:
        InputError: an axis has a value that no profile takes, or nothing can be served on so few cores.
    """
    if cores < 1 or min((*batch_sizes, *threads, 1)) < 1 or min((*delays_ms, *lane_counts, 0)) < 0:
        raise InputError(
            "cores, batch sizes and threads are 1 or more, and delays and lanes 0 or more, not "
            f"{cores}, {list(batch_sizes)}, {list(threads)}, {list(delays_ms)} and {list(lane_counts)}"
        )
    powers = tuple(2**power for power in range(cores.bit_length()))
    found: dict[str, ServingProfile] = {}
    for server, protocol, most, delay, lane, thread in product(
        servers, protocols, batch_sizes, delays_ms, lane_counts or (0, *powers), threads or powers
    ):
        batches = most > 1
        if max(1, lane) * thread > cores or (server == "triton" and lane == 0):
            continue
        if batches and server == "mlserver" and delay == 0:
            continue
        profile = ServingProfile(
            server=server,
            backend="burnish" if server == "mlserver" else "python",
            protocol=protocol,
            max_batch_size=most,
            max_batch_delay_ms=delay if batches else 0.0,
            instances=lane if server == "triton" else 1,
            parallel_workers=lane if server == "mlserver" else 0,
            threads=thread,
        )
        found.setdefault(profile.key, profile)
    if not found:
        raise InputError(
            f"no serving profile is left to search where servers have {cores} cores",
            hint="Lanes times threads must not be more than the cores, and MLServer batches only with a delay.",
        )
    return tuple(found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class InProcessCurve:
    """What one session does in process.

    Attributes:
        rows_per_s: (batch size, threads) -> rows a second.
    """

    rows_per_s: Mapping[tuple[int, int], float]

    def rate(self, profile: ServingProfile) -> float | None:
        """Rows a second of the profile's lanes in process, in the best batches up to its largest; None where unknown.

        A batch size that was not timed is taken for the next larger one that was.
        """
        sizes = sorted(size for size, threads in self.rows_per_s if threads == profile.threads)
        if not sizes:
            return None
        reach = next((size for size in sizes if size >= profile.max_batch_size), sizes[-1])
        return lanes(profile) * max(self.rows_per_s[size, profile.threads] for size in sizes if size <= reach)

    def bound(self, profile: ServingProfile) -> float:
        """What serving by the profile cannot exceed; infinite where that is not known, as of a server's own engine."""
        rate = None if profile.of_server else self.rate(profile)
        return math.inf if rate is None else BOUND_MARGIN * rate


def curve_of(screenings: Iterable[Screening]) -> InProcessCurve:
    """The curve that the screenings of a variant in one engine are, one for each number of threads.

    Each time counts by the lower end of its interval: the curve is there to bound.
    """
    rates = {}
    for screening in screenings:
        for name, estimate in screening.metrics.items():
            size = int(name.rpartition("_")[2])
            milliseconds = estimate.value if estimate.low is None else estimate.low
            rates[size, screening.threads] = 1000 * size / milliseconds
    return InProcessCurve(rows_per_s=rates)


def highest_bound(space: Sequence[ServingProfile], curve: InProcessCurve) -> float:
    """What no profile of the space can exceed: a variant for which it is below another's score is never served."""
    return max(curve.bound(profile) for profile in space)


# --- the model of the surface ----------------------------------------------------------------------------------

# Standard deviations, in log units, of an axis' effect and of the axes together, and how many steps of an axis are
# alike. All combinations are kept, and weighted.
_EFFECTS = (0.03, 0.1, 0.25, 0.5)
_TOGETHER = (0.01, 0.05, 0.15)
_STEPS = (1.0, 2.5)
# How much of a factor in the in-process bound is expected to show in the score: 0 is nothing of it, 1 all of it.
_SHARE, _SHARE_SD = 0.5, 0.4
_LEVEL_SD = 3.0


class Surface:
    """What the scores seen so far say of all profiles of a space.

    Args:
        space: the profiles.
        curve: of the session in process, or None where the bound says nothing of the score.
    """

    def __init__(self, space: Sequence[ServingProfile], curve: InProcessCurve | None) -> None:
        self._axes = np.array([_axes(profile) for profile in space])
        rates = [None if curve is None else curve.rate(profile) for profile in space]
        known = [rate for rate in rates if rate is not None]
        middle = float(np.median(known)) if known else 1.0
        self._bound = np.log(np.array([middle if rate is None else rate for rate in rates]) / middle)

    def predict(self, seen: Mapping[int, tuple[float, float]]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the logarithm of each profile's score.

        Args:
            seen: place in the space -> logarithm of the score, and the standard deviation of its noise.
        """
        places = list(seen)
        prior, own = _SHARE * self._bound, self._variances()
        if not places:
            return prior, np.sqrt(own.mean(axis=0))
        values = np.array([value for value, _ in seen.values()])
        center = float(values.mean())
        across = self._covariances(places)
        among = across[:, places, :] + np.diag(np.square([noise for _, noise in seen.values()]))
        residual = values - center - prior[places]
        # All sets of scales at once: the first column is the residual's, the others the profiles'.
        right = np.broadcast_to(residual[:, None], (*among.shape[:2], 1))
        solved = np.linalg.solve(among, np.concatenate([right, across.transpose(0, 2, 1)], axis=2))
        means = prior + (across @ solved[:, :, :1])[:, :, 0]
        variances = own - np.einsum("snk,skn->sn", across, solved[:, :, 1:])
        evidence = -0.5 * (solved[:, :, 0] @ residual + np.linalg.slogdet(among)[1])
        weights = np.exp(evidence - evidence.max())
        weights /= weights.sum()
        mean = weights @ means
        variance = weights @ (np.maximum(variances, 1e-9) + (means - mean) ** 2)
        return mean + center, np.sqrt(variance)

    def _covariances(self, places: list[int]) -> Floats:
        """(set of scales, profile, place): of each profile with those at the places."""
        apart = (self._axes[:, None, :] - self._axes[places]) ** 2
        slope = _LEVEL_SD**2 + _SHARE_SD**2 * np.outer(self._bound, self._bound[places])
        found = []
        for steps in _STEPS:
            each = np.exp(-0.5 * apart / steps**2).sum(axis=2)
            all_axes = np.exp(-0.5 * apart.sum(axis=2) / steps**2)
            found += [slope + effect**2 * each + both**2 * all_axes for effect, both in product(_EFFECTS, _TOGETHER)]
        return np.array(found)

    def _variances(self) -> Floats:
        """(set of scales, profile): of each profile before anything was seen."""
        of_scales = [self._axes.shape[1] * effect**2 + both**2 for effect, both in product(_EFFECTS, _TOGETHER)]
        return np.add.outer(np.array(of_scales * len(_STEPS)), _LEVEL_SD**2 + _SHARE_SD**2 * self._bound**2)


def _axes(profile: ServingProfile) -> list[float]:
    """The profile as a point; a step of 1 is a doubling, and names are far apart."""
    return [
        5.0 * (profile.server == "triton"),
        5.0 * profile.of_server,
        5.0 * (profile.protocol == "rest"),
        5.0 * (profile.server == "mlserver" and profile.parallel_workers == 0),
        math.log2(lanes(profile)) * 1.5,
        math.log2(profile.threads) * 1.5,
        math.log2(profile.max_batch_size),
        math.log2(1 + 2 * profile.max_batch_delay_ms),
    ]


def _kinds(profile: ServingProfile) -> tuple[str, ...]:
    """What no other profile's score can stand in for, so that a search looks at each once."""
    apart = profile.server == "mlserver" and profile.parallel_workers == 0
    return (
        profile.server,
        profile.protocol,
        "the server process" if apart else f"workers or instances {lanes(profile)}",
        f"threads {profile.threads}",
        "batches" if profile.max_batch_size > 1 else "no batches",
    )


def expected_improvement(mean: Floats, sd: Floats, best: float) -> Floats:
    """By how much each is expected to come above ``best``, where what comes below counts 0."""
    from scipy.stats import norm

    above = mean - best
    gain: Floats = above * norm.cdf(above / sd) + sd * norm.pdf(above / sd)
    return gain


# --- the search ------------------------------------------------------------------------------------------------


def search_serving(
    space: Sequence[ServingProfile],
    measure: Measure,
    *,
    curve: InProcessCurve | None = None,
    points: int,
    again: int = 0,
    start: Sequence[ServingProfile] = (),
    pays: float = PAYS,
    seed: int = 0,
    out_of_time: Callable[[], bool] = lambda: False,
) -> ServingSearch:
    """Looks for the profile with the highest score, and says at which it looked and why it stopped.

    The same answers give the same search, so that one whose answers are remembered goes on where it was stopped.

    Args:
        space: the profiles to choose from.
        measure: serves a profile and returns its score, above 0, larger being better. A `BurnishError` is a point that
            failed; others, `StorageError` and `GeneratorLostError` end the search.
        curve: of the session in process, where the score is rows a second at most: it bounds what is worth a look.
        points: most points to look at.
        again: most further measures of points that were looked at, to tell the best from the luckiest (LUCB:
            Kalyanakrishnan and others, ICML 2012).
        start: profiles to look at first (those that are served already, say); those outside of the space are left out.
        pays: a gain below this share is not worth another point.
        seed: decides between points that promise the same.
        out_of_time: asked before each point.

    Raises:
        InputError: the space is empty, or not even one point may be looked at.
        ValueError: a score is not above 0.
    """
    if not space or points < 1:
        raise InputError(f"a search needs a space and one point or more, not {len(space)} profiles and {points} points")
    walk = _Walk(space, curve, pays=pays, seed=seed)
    stopped: Literal["nothing_pays", "points", "minutes", "exhausted"] = "points"
    while len(walk.looked) < points:
        if out_of_time():
            stopped = "minutes"
            break
        step = walk.next(start)
        if step is None:
            stopped = "exhausted" if len(walk.looked) == len(space) else "nothing_pays"
            break
        place, reason = step
        walk.look(place, reason, measure)
    for _ in range(again):
        rival = walk.rival()
        if rival is None or out_of_time():
            break
        walk.look_again(rival, measure)
    return walk.outcome(stopped)


class _Walk:
    """A search under way."""

    def __init__(
        self, space: Sequence[ServingProfile], curve: InProcessCurve | None, *, pays: float, seed: int
    ) -> None:
        self.looked: dict[int, ServingPoint] = {}
        self._times: dict[int, int] = {}
        self._space = space
        self._surface = Surface(space, curve)
        self._bounds = np.log([math.inf if curve is None else curve.bound(profile) for profile in space])
        self._pays = math.log1p(pays)
        self._turn = np.random.default_rng(seed).permutation(len(space))

    def look(self, place: int, reason: str, measure: Measure) -> None:
        """Measures a profile for the first time."""
        profile = self._space[place]
        score, failure = self._measured(profile, measure)
        self.looked[place] = ServingPoint(profile=profile, score=score, reason=reason, failure=failure)

    def look_again(self, place: int, measure: Measure) -> None:
        """Measures a profile once more; where it fails now, what it had stays."""
        point = self.looked[place]
        score, _ = self._measured(point.profile, measure)
        self._times[place] = self._times.get(place, 1) + 1
        if score is not None and point.score is not None:
            self.looked[place] = replace(point, score=_together(point.score, score))

    def rival(self) -> int | None:
        """The less often measured of the best and the one that may yet be better; None where none may."""
        mean, sd = self._surface.predict(self._seen())
        good = [place for place, point in self.looked.items() if point.score is not None]
        if len(good) < 2:
            return None
        best = max(good, key=lambda place: mean[place])
        other = max((place for place in good if place != best), key=lambda place: mean[place] + sd[place])
        if mean[other] + UPPER_END * sd[other] <= mean[best]:
            return None
        return min((best, other), key=lambda place: self._times.get(place, 1))

    @staticmethod
    def _measured(profile: ServingProfile, measure: Measure) -> tuple[Estimate | None, str]:
        try:
            score = measure(profile)
        except (StorageError, GeneratorLostError, BudgetUsedUpError):
            raise  # no fault of the profile
        except BurnishError as error:
            return None, error.message
        if score.value <= 0:
            raise ValueError(f"a score is above 0, not {score.value} ({profile.key})")
        return score, ""

    def next(self, start: Sequence[ServingProfile]) -> tuple[int, str] | None:
        """The place to look at next, and why; None where none pays."""
        for profile in start:
            if profile in self._space and self._space.index(profile) not in self.looked:
                return self._space.index(profile), "it was named"
        mean, sd = self._surface.predict(self._seen())
        best = self._best(mean)
        rest = [place for place in range(len(self._space)) if place not in self.looked]
        alive = [place for place in rest if self._bounds[place] > best + self._pays]
        if (first := self._uncovered(alive, mean) or self._uncounted(rest, mean)) is not None:
            return first
        if not alive:
            return None
        capped = np.minimum(mean, self._bounds)
        gain = expected_improvement(capped, sd, best)
        place = self._largest(alive, gain)
        upper = np.minimum(mean + UPPER_END * sd, self._bounds)
        if len(self.looked) >= FEWEST and max(upper[alive]) <= best + self._pays:
            return None
        return place, f"expected {math.exp(capped[place]):.4g}, at most {math.exp(upper[place]):.4g}"

    def _uncovered(self, alive: Sequence[int], mean: Floats) -> tuple[int, str] | None:
        """The place that is first of most kinds, the most promising of them; None where each kind was looked at."""
        known = {kind for place in self.looked for kind in _kinds(self._space[place])}
        news = {place: [kind for kind in _kinds(self._space[place]) if kind not in known] for place in alive}
        most = max(map(len, news.values()), default=0)
        if most == 0:
            return None
        place = self._largest([place for place, new in news.items() if len(new) == most], mean)
        return place, f"the first with {', '.join(news[place])}"

    def _uncounted(self, rest: Sequence[int], mean: Floats) -> tuple[int, str] | None:
        """The most promising with as many lanes as none looked at has: the guide asks for its rate, pay or not."""
        counted = {lanes(self._space[place]) for place in self.looked}
        others = [place for place in rest if lanes(self._space[place]) not in counted]
        if not others:
            return None
        place = self._largest(others, mean)
        return place, f"the first with workers or instances {lanes(self._space[place])}"

    def outcome(self, stopped: Literal["nothing_pays", "points", "minutes", "exhausted"]) -> ServingSearch:
        """What came of it; the best is the one that the model, with all that was seen, has for the best."""
        mean, _ = self._surface.predict(self._seen())
        good = [place for place, point in self.looked.items() if point.score is not None]
        best = self._looked_at(max(good, key=lambda place: mean[place], default=None))
        below = self._best(mean) + self._pays
        bounded = sum(
            bool(self._bounds[place] <= below) for place in range(len(self._space)) if place not in self.looked
        )
        maxima = {}
        for count in sorted({lanes(self._space[place]) for place in good}):
            alike = [place for place in good if lanes(self._space[place]) == count]
            maxima[count] = self.looked[max(alike, key=lambda place: mean[place])]
        return ServingSearch(
            space=len(self._space),
            points=tuple(self.looked.values()),
            best=best,
            maxima={str(count): point for count, point in maxima.items()},
            bounded_out=bounded,
            stopped=stopped,
            sentence=_told(len(self._space), tuple(self.looked.values()), best, bounded, stopped),
        )

    def _looked_at(self, place: int | None) -> ServingPoint | None:
        return None if place is None else self.looked[place]

    def _seen(self) -> dict[int, tuple[float, float]]:
        """Logarithms and noise; a point that failed counts as half of the worst, so that its like are passed over."""
        seen = {place: _logarithm(point.score) for place, point in self.looked.items() if point.score is not None}
        worst = min((value for value, _ in seen.values()), default=0.0)
        failed = {place: (worst - math.log(2), 0.3) for place, point in self.looked.items() if point.score is None}
        return seen | (failed if seen else {})

    def _best(self, mean: Floats) -> float:
        good = [mean[place] for place, point in self.looked.items() if point.score is not None]
        return float(max(good, default=-math.inf))

    def _largest(self, places: Sequence[int], of: Floats) -> int:
        """The place with the largest value; chance decides between equals."""
        return max(places, key=lambda place: (round(float(of[place]), 9), int(self._turn[place])))


def _logarithm(score: Estimate) -> tuple[float, float]:
    if score.low is None or score.high is None or score.low <= 0:
        return math.log(score.value), USUAL_NOISE
    return math.log(score.value), max(LEAST_NOISE, math.log(score.high / score.low) / (2 * 1.96))


def _together(one: Estimate, other: Estimate) -> Estimate:
    """Two measures of the same, each weighted by how sure it is."""
    (first, first_sd), (second, second_sd) = _logarithm(one), _logarithm(other)
    weights = first_sd**-2, second_sd**-2
    mean, sd = (weights[0] * first + weights[1] * second) / sum(weights), sum(weights) ** -0.5
    low, value, high = (math.exp(mean + width * sd) for width in (-1.96, 0, 1.96))
    runs = one.runs + other.runs
    return Estimate(value=value, low=low, high=high, runs=runs, method="several looks", unit=one.unit)


_STOPPED = {
    "nothing_pays": "no other is expected to pay",
    "points": "which is the budget",
    "minutes": "in the minutes of the budget",
    "exhausted": "which are all",
}


def _told(space: int, looked: Sequence[ServingPoint], best: ServingPoint | None, bounded: int, stopped: str) -> str:
    share = f"looked at {len(looked)} of {space} serving profiles ({100 * len(looked) / space:.0f} %)"
    never = f"; {bounded} were never served, since in process they are too slow" if bounded else ""
    if best is None or best.score is None:
        return f"no profile could be served: {share}, {_STOPPED[stopped]}{never}"
    return f"{best.profile.key} with {best.score.value:.4g} {best.score.unit}: {share}, {_STOPPED[stopped]}{never}"
