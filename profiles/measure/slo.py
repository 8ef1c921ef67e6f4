"""The highest rate at which a latency limit is kept, confirmed by fresh runs.

Bisection alone is optimistic: one lucky run moves its lower end for good, and short runs show too little of the tail.
So what bisection finds is only where confirmation begins: at a rate that is reported, several fresh runs have all kept
the limit, and so has the upper end of their percentile. On an M/M/1 queue, from runs of 1,000 requests, at most one
search in ten ends above the true rate; half of them end within nine per cent below it.

The shape is that of MLPerf LoadGen's search for peak performance (bounds first, then bisection, and a lower rate where
the final run fails); the confirmation is burnish's own.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from profiles.load.recording import latency_ms, load_arrays
from profiles.measure.early_stopping import decide, requests_needed
from profiles.measure.levels import Level
from profiles.measure.percentiles import EARNED, estimate_percentile
from registry.errors import InputError
from registry.records import Capacity, Estimate, LoadProfile, OpenLoop, RunRecord

Phase = Literal["bracket", "bisect", "confirm"]
Probe = Callable[[float, int], "NDArray[np.float64] | None"]
"""(rate, number of the run) -> latency in ms of each request due; None where the window was invalid."""

FIRST_SHARE = 0.3
WIDER = 1.5
MOST_UP, MOST_DOWN = 12, 6
CLOSE = 1.05
PROBE_RUNS, CONFIRM_RUNS = 2, 5
# A run by itself is held against less than all runs together are: there are several of them.
RUN_CONFIDENCE = 0.95
LOWER = 0.95
MOST_LOWERINGS = 10
RUN_REQUESTS = 1000
_LONGEST_S = 60.0
# Gates whose failing makes a limit only harder to keep, so that a run that keeps it all the same counts; after others
# nothing is known of the server.
_HARDER = frozenset({"errors", "offered", "lateness", "steal"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyLimit:
    """A percentile of latency, and what it must not exceed.

    Raises:
        InputError: burnish does not know the percentile, or the limit is not above 0.
    """

    percentile: int
    latency_ms: float

    def __post_init__(self) -> None:
        if self.percentile not in EARNED:
            known = ", ".join(f"p{percentile}" for percentile in EARNED)
            raise InputError(f"there is no limit on p{self.percentile}", hint=f"Percentiles are {known}.")
        if not (math.isfinite(self.latency_ms) and self.latency_ms > 0):
            raise InputError(f"a latency limit is above 0 ms, not {self.latency_ms:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SloRun:
    """One run of a search.

    Attributes:
        rate_rps: offered.
        requests: that were due in its window.
        over: those of them over the limit; failed ones are.
        kept: whether so few are over that the limit is kept; never where the window was invalid (no requests), or had
            fewer requests than can tell.
    """

    phase: Phase
    rate_rps: float
    requests: int
    over: int
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSearch:
    """What came of a search.

    Attributes:
        rate_rps: the highest rate that was confirmed, or None.
        failing_rps: the lowest rate above it that did not keep the limit, as far as its requests could tell; None where
            none was tried.
        runs: all of them, in their order.
        reason: one sentence for the user.
    """

    limit: LatencyLimit
    rate_rps: float | None
    failing_rps: float | None
    runs: tuple[SloRun, ...]
    reason: str

    @property
    def estimate(self) -> Estimate | None:
        """The confirmed rate, which is also the lower end; None where there is none."""
        if self.rate_rps is None:
            return None
        low, high = self.rate_rps, self.failing_rps
        return Estimate(value=low, low=low, high=high, runs=CONFIRM_RUNS, method="confirmed runs", unit="1/s")


def find_slo_max(probe: Probe, limit: LatencyLimit, *, most_rps: float) -> SloSearch:
    """The highest rate that keeps the limit.

    Bracket: from `FIRST_SHARE` of the maximum in steps of `WIDER` until a rate fails (or, downwards, one passes).
    Bisect: by geometric means until both ends are within `CLOSE`; a rate passes when `PROBE_RUNS` runs keep the limit.
    Confirm: `CONFIRM_RUNS` fresh runs must all keep it, and the upper end of their percentile too; else the rate is
    lowered by `LOWER`, at most `MOST_LOWERINGS` times.

    Args:
        probe: offers one run; each number asks for other arrivals.
        limit: what is to be kept.
        most_rps: the closed-loop maximum, where the search takes its measure from.
    """
    search = _Search(probe, limit)
    low, high = _bracket(search, FIRST_SHARE * most_rps)
    if low is None:
        return search.found(None)
    while high is not None and high / low > CLOSE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if search.passes("bisect", middle) else (low, middle)
    for _ in range(MOST_LOWERINGS + 1):
        if search.is_confirmed(low):
            return search.found(low)
        low *= LOWER
    return search.found(None)


def measure_slo_max(
    run: Callable[[LoadProfile, Path], RunRecord],
    limit: LatencyLimit,
    capacity: Capacity,
    *,
    level: Level,
    seed: int,
    raw: Path,
) -> SloSearch:
    """The highest rate at which a server keeps the limit; see `find_slo_max`.

    Args:
        run: offers a profile, and writes its arrays to a path.
        limit: what is to be kept.
        capacity: of the server.
        level: how long the warm-up is, and how late an answer may come.
        seed: of arrivals; variants that are searched with the same one meet the same arrivals.
        raw: a file for the arrays of a run, overwritten by the next one and removed at the end.

    Raises:
        UnreachableError: the server refused, or stopped answering.
        InputError: the limit is not below the time after which an answer is a miss.
    """
    if limit.latency_ms >= level.timeout_s * 1000:
        raise InputError(
            f"a limit of {limit.latency_ms:g} ms is not below the {level.timeout_s:g} s after which requests are misses"
        )
    most_rps = max((rps for _, rps in capacity.ladder), default=0.0)
    if most_rps <= 0:
        reason = "The server answered nothing in a closed loop."
        return SloSearch(limit=limit, rate_rps=None, failing_rps=None, runs=(), reason=reason)
    longest_s = max(level.open_s, _LONGEST_S)

    def probe(rate_rps: float, number: int) -> NDArray[np.float64] | None:
        wanted_s = max(level.open_s, max(RUN_REQUESTS, EARNED[limit.percentile]) / rate_rps)
        profile = LoadProfile(
            name="slo",
            load=OpenLoop(rate_rps=rate_rps),
            warmup_s=level.warmup_s,
            duration_s=min(wanted_s, longest_s),
            timeout_s=level.timeout_s,
            seed=seed + number,
        )
        record = run(profile, raw)
        if {finding.gate for finding in record.findings} - _HARDER:
            return None
        stored = load_arrays(raw, record.raw_sha256)
        return latency_ms(stored["intended_ns"], stored["done_ns"], stored["status"])

    try:
        return find_slo_max(probe, limit, most_rps=most_rps)
    finally:
        raw.unlink(missing_ok=True)


@dataclass(slots=True)
class _Search:
    """The runs of a search."""

    probe: Probe
    limit: LatencyLimit
    runs: list[SloRun] = field(default_factory=list)

    def passes(self, phase: Phase, rate_rps: float) -> bool:
        """Whether each of a few runs keeps the limit; the first that does not ends it."""
        return all(self._run(phase, rate_rps)[0] for _ in range(PROBE_RUNS))

    def is_confirmed(self, rate_rps: float) -> bool:
        """Whether fresh runs keep the limit, each of them and all together."""
        runs: list[NDArray[np.float64]] = []
        for _ in range(CONFIRM_RUNS):
            kept, latencies = self._run("confirm", rate_rps)
            if not kept:
                return False
            runs.append(latencies)
        told = estimate_percentile(runs, self.limit.percentile)
        return told is not None and told.high is not None and told.high <= self.limit.latency_ms

    @property
    def fewest(self) -> int:
        """So many requests a run takes to show that the limit is kept."""
        return requests_needed(self.limit.percentile, 0, RUN_CONFIDENCE)

    def has_too_few(self, run: SloRun) -> bool:
        """Whether a run was valid, and its requests are too few to tell anything."""
        if not 0 < run.requests < self.fewest:
            return False
        return decide(self.limit.percentile, run.over, run.requests, RUN_CONFIDENCE) == "undecided"

    def found(self, rate_rps: float | None) -> SloSearch:
        failed = [one.rate_rps for one in self.runs if one.requests and not (one.kept or self.has_too_few(one))]
        failing = min((rate for rate in failed if rate_rps is None or rate > rate_rps), default=None)
        return SloSearch(
            limit=self.limit,
            rate_rps=rate_rps,
            failing_rps=failing,
            runs=tuple(self.runs),
            reason=self._reason(rate_rps, failing),
        )

    def _run(self, phase: Phase, rate_rps: float) -> tuple[bool, NDArray[np.float64]]:
        latencies = self.probe(rate_rps, len(self.runs))
        seen = np.empty(0) if latencies is None else latencies
        over = int(np.count_nonzero(seen > self.limit.latency_ms))
        kept = len(seen) > 0 and decide(self.limit.percentile, over, len(seen), RUN_CONFIDENCE) == "kept"
        self.runs.append(SloRun(phase=phase, rate_rps=rate_rps, requests=len(seen), over=over, kept=kept))
        return kept, seen

    def _reason(self, rate_rps: float | None, failing_rps: float | None) -> str:
        return " ".join(part for part in (self._outcome(rate_rps, failing_rps), *self._doubts(rate_rps)) if part)

    def _outcome(self, rate_rps: float | None, failing_rps: float | None) -> str:
        if rate_rps is not None:
            requests = sum(one.requests for one in self.runs if one.phase == "confirm" and one.rate_rps == rate_rps)
            return f"{CONFIRM_RUNS} of {CONFIRM_RUNS} fresh runs keep the limit ({requests:,} requests)."
        if any(one.phase == "confirm" for one in self.runs):
            return f"No rate was confirmed in {MOST_LOWERINGS + 1} attempts."
        if failing_rps is not None:
            return f"Not even {failing_rps:.3g} requests a second keep the limit."
        return "No window told whether the limit is kept."

    def _doubts(self, rate_rps: float | None) -> Iterator[str]:
        """What else there is to know of the outcome."""
        if rate_rps is not None:
            yield self._disorder()
        if invalid := sum(not one.requests for one in self.runs):
            yield f"{_windows(invalid)} invalid, which counts as failing."
        if few := sum(map(self.has_too_few, self.runs)):
            yield (
                f"{_windows(few)} too short to tell, at so low a rate: a p{self.limit.percentile} takes {self.fewest} "
                "requests (a load profile's duration_s makes windows longer)."
            )

    def _disorder(self) -> str:
        """That a lower rate failed where a higher one passed, which a queue does not do."""
        passed: dict[float, bool] = {}
        for one in self.runs:
            if one.phase != "confirm":
                passed[one.rate_rps] = passed.get(one.rate_rps, True) and one.kept
        highest = max((rate for rate, kept in passed.items() if kept), default=0.0)
        lowest = min((rate for rate, kept in passed.items() if not kept), default=math.inf)
        return (
            f"{lowest:.3g}/s failed where {highest:.3g}/s passed: the machine was not steady."
            if lowest < highest
            else ""
        )


def _bracket(search: _Search, rate_rps: float) -> tuple[float | None, float | None]:
    """(a rate that passes or None, a higher one that does not or None)."""
    if search.passes("bracket", rate_rps):
        low = rate_rps
        for _ in range(MOST_UP):
            if not search.passes("bracket", low * WIDER):
                return low, low * WIDER
            low *= WIDER
        return low, None
    high = rate_rps
    for _ in range(MOST_DOWN):
        if search.has_too_few(search.runs[-1]):  # and lower rates have fewer
            break
        if search.passes("bracket", high / WIDER):
            return high / WIDER, high
        high /= WIDER
    return None, high


def _windows(count: int) -> str:
    return "1 window was" if count == 1 else f"{count} windows were"
