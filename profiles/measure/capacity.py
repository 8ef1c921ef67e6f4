"""Where a candidate saturates: a closed-loop ladder for its maximum, then open-loop stages around it.

The stages hold constant arrivals, as Seldon's guide to load testing has them: whether a server keeps up with a rate
shows in its backlog, and chance in the arrivals would only hide it in windows this short. Latency under arrivals of
chance is measured later, in the rounds.
"""

from collections.abc import Callable, Iterable

from profiles.measure.levels import Level
from registry.records import Capacity, ClosedLoop, Estimate, GateFinding, LoadProfile, OpenLoop, RateStage, RunRecord

Run = Callable[[LoadProfile], RunRecord]

SMALLEST_GAIN = 0.05
# Gates after which a window says nothing of what the server can do. A late client or stolen CPU time only make it
# harder to keep up, so that what was sustained stands; their findings stay with the stage.
SPOILING = frozenset({"client_cpu", "ceiling", "in_flight", "answered_by", "restarted"})
MOST_RERUNS = 1
# A server keeps up when the backlog grew by less than this share of what arrived, or by no more than the server had
# in hand anyway when it was at its closed-loop maximum.
BACKLOG_SHARE = 0.03
# The same backlog as it shows in the latency of a queue, between the middles of the first and the last third.
LATENCY_SHARE = 0.02
FAILED_SHARE = 0.01
LAST_RESORT = 0.3
LADDER_REQUESTS = 20
STAGE_REQUESTS = 60
LONGER = 3.0
# A rate below this is told with digits behind the point.
SMALL_RPS = 10


def find_capacity(run: Run, level: Level, *, candidate_id: str, seed: int = 0) -> Capacity:
    """Where the candidate saturates.

    Args:
        run: offers one window of load and returns its record.
        level: which concurrencies and rates are tried, and how long.
        candidate_id: whose capacity it is.
        seed: of the order of payloads.

    Returns:
        The ladder with its best concurrency, the stages, and as ``saturation_rps`` the highest rate that was
        sustained before two in a row were not. A stage that the client spoiled is not sustained.
    """
    ladder = _climb(run, level, seed)
    concurrency, most_rps = max(ladder, key=lambda rung: rung[1])
    stages = _stages(run, level, most_rps, concurrency, seed)
    sustained = [stage.offered_rps for stage in stages if stage.sustained]
    return Capacity(
        candidate_id=candidate_id,
        concurrency=concurrency,
        ladder=tuple(ladder),
        stages=tuple(stages),
        saturation_rps=max(sustained, default=None),
    )


def estimate_saturation(capacity: Capacity) -> Estimate | None:
    """The saturation point as an estimate between two stages of the search; None where no stage was sustained.

    The lower end is the highest stage that was sustained, which is also the value, so that nothing is claimed that
    was not seen; the upper end is the first stage above it that the server did not sustain, or None where none was
    tried or the client spoiled them. The interval is as wide as the grid of stages, and knows nothing of chance.
    """
    value = capacity.saturation_rps
    if value is None:
        return None
    beyond = (
        stage.offered_rps
        for stage in capacity.stages
        if not stage.sustained and stage.offered_rps > value and not _spoils(stage.findings)
    )
    high = min(beyond, default=None)
    return Estimate(value=value, low=value, high=high, runs=1, method="stage grid", unit="1/s")


def told_saturation(capacity: Capacity) -> str:
    """Where it saturates, for people: ``saturates at 120 requests a second``."""
    rate_rps = capacity.saturation_rps
    if rate_rps is not None:
        return f"saturates at {rate_rps:{'.0f' if rate_rps >= SMALL_RPS else '.2g'}} requests a second"
    return "keeps up with none of the rates that were tried" if capacity.stages else "answers nothing in a closed loop"


def keeps_up(record: RunRecord, concurrency: int) -> bool:
    """Whether the server kept up with the rate of an open-loop window.

    What came back is held against what did arrive, not against the nominal rate, and what was in flight when the
    window began against what was when it ended: answers to come are no backlog.

    Args:
        record: of the window.
        concurrency: the closed-loop concurrency with the highest throughput, so many may be in hand at any time.
    """
    if record.scheduled == 0 or sum(record.errors.values()) > FAILED_SHARE * record.scheduled:
        return False
    metrics = record.metrics
    backlog = metrics["in_flight_end"] - metrics["in_flight_start"]
    if backlog > max(BACKLOG_SHARE * record.scheduled, concurrency):
        return False
    first_ms, last_ms = metrics.get("latency_first_third_ms"), metrics.get("latency_last_third_ms")
    if first_ms is None or last_ms is None:
        return True
    return last_ms - first_ms <= max(0.5 * first_ms, LATENCY_SHARE * 1000 * record.window_s)


def _climb(run: Run, level: Level, seed: int) -> list[tuple[int, float]]:
    """(concurrency, throughput) until two steps in a row gain less than 5 %, or requests fail."""
    ladder: list[tuple[int, float]] = []
    flat, best_rps = 0, 0.0
    for concurrency in level.ladder:
        length_s = _longer(level.ladder_s, LADDER_REQUESTS, best_rps)
        record = _once_more(run, _profile(level, ClosedLoop(concurrency=concurrency), length_s, seed), level)
        rps = record.metrics["throughput_rps"]
        failed = sum(record.errors.values()) > FAILED_SHARE * record.scheduled
        if failed and ladder:
            break
        ladder.append((concurrency, rps))
        flat = flat + 1 if rps < best_rps * (1 + SMALLEST_GAIN) else 0
        best_rps = max(best_rps, rps)
        if flat == 2 or failed:
            break
    return ladder


def _stages(run: Run, level: Level, most_rps: float, concurrency: int, seed: int) -> list[RateStage]:
    """Rising stages until two in a row are not sustained; a lower one where none was."""
    if most_rps <= 0 or not level.stages:
        return []
    stages = _rise(run, level, [share * most_rps for share in level.stages], concurrency, seed)
    if not any(stage.sustained for stage in stages):
        stages = [*_rise(run, level, [LAST_RESORT * most_rps], concurrency, seed), *stages]
    return stages


def _rise(run: Run, level: Level, rates_rps: Iterable[float], concurrency: int, seed: int) -> list[RateStage]:
    stages: list[RateStage] = []
    for rate_rps in rates_rps:
        length_s = _longer(level.stage_s, STAGE_REQUESTS, rate_rps)
        load = OpenLoop(rate_rps=rate_rps, arrivals="constant")
        record = _once_more(run, _profile(level, load, length_s, seed), level)
        stages.append(_stage(record, rate_rps, concurrency))
        if len(stages) >= 2 and not (stages[-1].sustained or stages[-2].sustained):
            break
    return stages


def _stage(record: RunRecord, rate_rps: float, concurrency: int) -> RateStage:
    return RateStage(
        offered_rps=rate_rps,
        achieved_rps=record.metrics["throughput_rps"],
        latency_p50_ms=record.metrics.get("latency_p50_ms"),
        latency_p90_ms=record.metrics.get("latency_p90_ms"),
        sustained=not _spoils(record.findings) and keeps_up(record, concurrency),
        findings=record.findings,
    )


def _once_more(run: Run, profile: LoadProfile, level: Level) -> RunRecord:
    """The window's record; one that the client spoiled is run again, once where the level allows any reruns.

    One that the server failed is not: to fail is what the search looks for.
    """
    record = run(profile)
    for _ in range(min(level.reruns, MOST_RERUNS)):
        if not _spoils(record.findings):
            break
        record = run(profile)
    return record


def _spoils(findings: Iterable[GateFinding]) -> bool:
    return any(finding.gate in SPOILING for finding in findings)


def _profile(level: Level, load: ClosedLoop | OpenLoop, length_s: float, seed: int) -> LoadProfile:
    return LoadProfile(
        name="capacity",
        load=load,
        # A stage need not reach steady state first: what grows shows, what does not is sustained.
        warmup_s=min(level.warmup_s, 0.3 * length_s),
        duration_s=length_s,
        timeout_s=level.timeout_s,
        seed=seed,
    )


def _longer(shortest_s: float, requests: int, rate_rps: float) -> float:
    """A window for so many requests, at most three times the shortest."""
    if rate_rps <= 0:
        return shortest_s
    return min(max(shortest_s, requests / rate_rps), LONGER * shortest_s)
