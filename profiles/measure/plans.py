"""A load profile carried out on an endpoint: every window it asks for, run until valid, reduced over runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from profiles.load.arrivals import read_arrivals, replay_s
from profiles.load.engine import LoadGenerator
from profiles.load.library import ClosedPlan, LoadPlan, OpenPlan, ReplayPlan, SloPlan, StagedPlan, SweepPlan
from profiles.load.payloads import Payload
from profiles.measure.bench import Bench
from profiles.measure.capacity import SPOILING, find_capacity, keeps_up
from profiles.measure.levels import Level, find_level
from profiles.measure.rounds import reduce_rounds, run_until_valid
from profiles.measure.slo import LatencyLimit, SloSearch, measure_slo_max
from registry.records import (
    Capacity,
    ClosedLoop,
    LoadProfile,
    Measurement,
    OpenLoop,
    RateStage,
    Replay,
    Round,
    RunRecord,
    Target,
)

_ID = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Bench):
    """What carrying a load profile out has found.

    Attributes:
        slo: the search for the highest rate that keeps a limit, where that was asked.
    """

    slo: SloSearch | None = None


def run_plan(
    generator: LoadGenerator,
    target: Target,
    payloads: tuple[Payload, ...],
    plan: LoadPlan,
    *,
    seed: int,
    raw_root: Path,
    on_run: Callable[[int, RunRecord], None] = lambda number, record: None,
) -> Planned:
    """Carries a load profile out.

    Args:
        generator: offers the load.
        target: the endpoint.
        payloads: encoded for it.
        plan: what to offer.
        seed: of arrivals and of the order of payloads; another for each run.
        raw_root: folder for the raw arrays.
        on_run: told of each window that counts, with the number of its round, as soon as it is there.

    Raises:
        UnreachableError: the endpoint refused, or stopped answering.
        InputError: recorded arrivals cannot be read, or a limit is not below the timeout.
    """
    return _Bench(generator, target, payloads, plan, seed=seed, raw_root=raw_root, on_run=on_run).run()


class _Bench:
    def __init__(
        self,
        generator: LoadGenerator,
        target: Target,
        payloads: tuple[Payload, ...],
        plan: LoadPlan,
        *,
        seed: int,
        raw_root: Path,
        on_run: Callable[[int, RunRecord], None],
    ) -> None:
        self._generator = generator
        self._target = target
        self._payloads = payloads
        self._plan = plan
        self._seed = seed
        self._raw_root = raw_root
        self._on_run = on_run
        self._level = level_of(plan)

    def run(self) -> Planned:
        load = self._plan.load
        if isinstance(load, ClosedPlan):
            return self._windows([(f"concurrency {n}", ClosedLoop(concurrency=n)) for n in load.concurrency])
        if isinstance(load, ReplayPlan):
            recorded = read_arrivals(Path(str(load.file)), speed=load.speed)
            return self._windows([(f"replay of {Path(recorded.file).name}", recorded)])
        if isinstance(load, OpenPlan):
            return self._open(load)
        if isinstance(load, SweepPlan):
            return self._sweep(load)
        if isinstance(load, StagedPlan):
            return self._staged(load)
        return self._slo(load)

    # --- the kinds ---

    def _open(self, load: OpenPlan) -> Planned:
        even = ", evenly spaced" if load.arrivals == "constant" else ""
        if load.rates_rps:
            return self._windows([(f"{rate:g} rps{even}", _open(rate, load.arrivals)) for rate in load.rates_rps])
        capacity = self._capacity(self._level)
        if capacity.saturation_rps is None:
            return Planned(capacity=capacity, measurements=(), rounds=())
        most_rps = capacity.saturation_rps
        loads = [(f"{share:g} saturation{even}", _open(share * most_rps, load.arrivals)) for share in load.shares]
        return self._windows(loads, capacity)

    def _sweep(self, load: SweepPlan) -> Planned:
        closed = self._offered([(f"concurrency {n}", ClosedLoop(concurrency=n)) for n in load.concurrency])
        most_rps = max((_throughput(run) for one in closed for run in one.runs if run.valid), default=0.0)
        if most_rps <= 0:
            return self._reduced(closed, None)
        rates = [share * most_rps for share in load.shares]
        opened = self._offered([(f"{rate:.4g} rps", _open(rate)) for rate in rates], first=len(load.concurrency))
        # Saturation, which was not looked for, is no higher: a tail that is too near to this is too near to that.
        most = Capacity(candidate_id=_ID, concurrency=1, ladder=(), stages=(), saturation_rps=most_rps)
        found = self._reduced([*closed, *opened], most)
        return replace(found, capacity=None, measurements=_without(found.measurements, "saturation_rps"))

    def _staged(self, load: StagedPlan) -> Planned:
        concurrency, rates = 1, load.rates_rps
        ladder: tuple[tuple[int, float], ...] = ()
        if load.shares:
            found = self._capacity(replace(self._level, stages=()))
            concurrency, ladder = found.concurrency, found.ladder
            most_rps = max((rps for _, rps in ladder), default=0.0)
            rates = tuple(share * most_rps for share in load.shares) if most_rps > 0 else ()
        rounds, seen = [], dict[float, list[RunRecord]]()
        for number in range(self._plan.runs):
            runs: list[RunRecord] = []
            for place, rate in enumerate(rates):
                before = rates[place - 1] if place else 0.0
                opened = OpenLoop(rate_rps=rate, arrivals=load.arrivals, ramp_from_rps=before)
                profile = replace(self._profile(f"{rate:.4g} rps", opened, number, place), warmup_s=load.ramp_s)
                runs.append(self._measure(profile, number, place))
                seen.setdefault(rate, []).append(runs[-1])
                if len(runs) > 1 and not any(_sustained(run, concurrency) for run in runs[-2:]):
                    break
            rounds.append(Round(candidate_id=_ID, number=number, position=0, runs=tuple(runs)))
        # A rate that a run ended before was not sustained in all of them.
        stages = tuple(_stage(rate, records, concurrency, runs=self._plan.runs) for rate, records in seen.items())
        capacity = Capacity(
            candidate_id=_ID,
            concurrency=concurrency,
            ladder=ladder,
            stages=stages,
            saturation_rps=max((stage.offered_rps for stage in stages if stage.sustained), default=None),
        )
        return self._reduced(rounds, capacity)

    def _slo(self, load: SloPlan) -> Planned:
        limit = LatencyLimit(percentile=load.percentile, latency_ms=load.limit_ms)
        capacity = self._capacity(replace(self._level, stages=()))
        raw = self._raw_root / "slo.npz"
        search = measure_slo_max(self._offer, limit, capacity, level=self._level, seed=self._seed, raw=raw)
        return Planned(capacity=capacity, measurements=(), rounds=(), slo=search)

    # --- windows ---

    def _capacity(self, level: Level) -> Capacity:
        scratch = self._raw_root / "capacity.npz"
        try:
            return find_capacity(
                lambda profile: self._offer(profile, scratch), level, candidate_id=_ID, seed=self._seed
            )
        finally:
            scratch.unlink(missing_ok=True)

    def _windows(
        self, loads: Sequence[tuple[str, ClosedLoop | OpenLoop | Replay]], capacity: Capacity | None = None
    ) -> Planned:
        """What every load says, offered once in each run."""
        return self._reduced(self._offered(loads), capacity)

    def _offered(self, loads: Sequence[tuple[str, ClosedLoop | OpenLoop | Replay]], *, first: int = 0) -> list[Round]:
        """Every load once in each run, the first of them in this place of its round."""
        rounds = []
        for number in range(self._plan.runs):
            runs = [
                self._measure(self._profile(name, load, number, place), number, place)
                for place, (name, load) in enumerate(loads, first)
            ]
            rounds.append(Round(candidate_id=_ID, number=number, position=0, runs=tuple(runs)))
        return rounds

    def _profile(self, name: str, load: ClosedLoop | OpenLoop | Replay, number: int, place: int) -> LoadProfile:
        return LoadProfile(
            name=name,
            load=load,
            warmup_s=self._plan.warmup_s,
            duration_s=replay_s(load) if isinstance(load, Replay) else self._plan.duration_s,
            timeout_s=self._plan.timeout_s,
            max_in_flight=self._plan.max_in_flight,
            seed=self._seed * 1_000_003 + number * 101 + place,
        )

    def _measure(self, profile: LoadProfile, number: int, place: int) -> RunRecord:
        path = self._raw_root / f"round-{number}-{place}.npz"
        record = run_until_valid(self._offer, profile, path, self._level)
        self._on_run(number, record)
        return record

    def _offer(self, profile: LoadProfile, path: Path) -> RunRecord:
        return self._generator.run(self._target, self._payloads, profile, raw_path=path, raw_root=self._raw_root)

    def _reduced(self, rounds: Sequence[Round], capacity: Capacity | None) -> Planned:
        known = capacity or Capacity(candidate_id=_ID, concurrency=1, ladder=(), stages=(), saturation_rps=None)
        measured = reduce_rounds(_ID, rounds, known, raw_root=self._raw_root, level=self._level)
        order = {name: place for place, name in enumerate(run.load.name for one in rounds for run in one.runs)}
        measured = tuple(sorted(measured, key=lambda one: order.get(one.load or "", -1)))
        return Planned(
            capacity=capacity, measurements=tuple(one for one in measured if one.metrics), rounds=tuple(rounds)
        )


def curves_of(rounds: Sequence[Round]) -> Capacity:
    """Windows at several rates and concurrencies as a ladder and stages, to draw; no saturation point is looked for.

    A concurrency's throughput is the mean of its valid windows, a rate's numbers are medians over its windows.
    """
    closed, opened = dict[int, list[float]](), dict[float, list[RunRecord]]()
    for run in (run for one in rounds for run in one.runs):
        if isinstance(run.load.load, ClosedLoop):
            closed.setdefault(run.load.load.concurrency, []).extend([_throughput(run)] if run.valid else [])
        elif isinstance(run.load.load, OpenLoop):
            opened.setdefault(run.load.load.rate_rps, []).append(run)
    ladder = tuple((n, fmean(rates)) for n, rates in sorted(closed.items()) if rates)
    concurrency = max(ladder, key=lambda rung: rung[1], default=(1, 0.0))[0]
    stages = tuple(_stage(rate, runs, concurrency, runs=len(runs)) for rate, runs in sorted(opened.items()))
    return Capacity(candidate_id=_ID, concurrency=concurrency, ladder=ladder, stages=stages, saturation_rps=None)


def level_of(plan: LoadPlan) -> Level:
    """The level ``standard`` with the plan's own lengths."""
    return replace(
        find_level("standard"),
        warmup_s=plan.warmup_s,
        closed_s=plan.duration_s,
        open_s=plan.duration_s,
        timeout_s=plan.timeout_s,
        reruns=plan.reruns,
    )


def _without(measurements: Sequence[Measurement], metric: str) -> tuple[Measurement, ...]:
    """The measurements without this metric of no load; one that had nothing else is left out."""
    told = [
        replace(one, metrics={name: value for name, value in one.metrics.items() if one.load or name != metric})
        for one in measurements
    ]
    return tuple(one for one in told if one.metrics)


def _open(rate_rps: float, arrivals: str = "poisson") -> OpenLoop:
    return OpenLoop(rate_rps=rate_rps, arrivals="constant" if arrivals == "constant" else "poisson")


def _throughput(run: RunRecord) -> float:
    return run.metrics["throughput_rps"]


def _sustained(run: RunRecord, concurrency: int) -> bool:
    spoiled = any(finding.gate in SPOILING for finding in run.findings)
    return not spoiled and keeps_up(run, concurrency)


def _stage(rate_rps: float, records: Sequence[RunRecord], concurrency: int, *, runs: int) -> RateStage:
    """One target over its records; it is sustained where it is in all of so many runs."""

    def middle(name: str) -> float | None:
        values = [record.metrics[name] for record in records if name in record.metrics]
        return median(values) if values else None

    return RateStage(
        offered_rps=rate_rps,
        achieved_rps=median(map(_throughput, records)),
        latency_p50_ms=middle("latency_p50_ms"),
        latency_p90_ms=middle("latency_p90_ms"),
        sustained=len(records) >= runs and all(_sustained(record, concurrency) for record in records),
        findings=tuple(finding for record in records for finding in record.findings),
    )
