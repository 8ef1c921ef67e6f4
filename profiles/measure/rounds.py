"""Interleaved, randomised rounds over candidates, and what they say together.

A campaign drives them: in each round every candidate has a slot, and the baseline a second one, in the order that
chance gave (`round_order`); what came of a slot (`measure_in_round`) is committed before the next begins. After the
last round `reduce_rounds` gives each candidate's measurements and `compare_rounds` its comparisons with the baseline.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiles.deploy.cluster import Deployment
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Expected, Payload
from profiles.load.recording import NS_PER_MS, latency_ms, load_arrays
from profiles.load.transports import Status
from profiles.measure.breakdown import read_counts, times_over_runs, with_breakdown
from profiles.measure.capacity import estimate_saturation
from profiles.measure.compare import UNKNOWN_FLOOR, compare_blocks, compare_pairs, noise_floor, spent_at
from profiles.measure.levels import Level
from profiles.measure.percentiles import estimate_over_runs, estimate_percentile, is_earned, nearest_rank
from profiles.measure.resources import RESOURCES, GpuProbe, PackageEnergy, ResourceMeter, peak_over_runs
from registry.errors import InputError
from registry.records import (
    Capacity,
    ClosedLoop,
    Comparison,
    Estimate,
    LoadProfile,
    Measurement,
    OpenLoop,
    Replay,
    Round,
    RunRecord,
)

CLOSED = "closed"
# The suffix of a load's name in the baseline's second slot of a round.
AGAIN = " (A/A)"
_LOAD = re.compile(r"(?P<kind>concurrency) (?P<n>\d+)|(?P<x>\d+(?:\.\d+)?) (?P<unit>saturation|rps)")
RunWindow = Callable[[LoadProfile, Path], RunRecord]


class Slot(NamedTuple):
    """A place in a round.

    Attributes:
        candidate_id: who is measured in it.
        again: whether it is the second one of the same candidate. The baseline has two, as far apart as chance has
            them, so that its two runs of the same thing see as much of the machine's drift as a pair of candidates.
    """

    candidate_id: str
    again: bool = False


def round_order(seed: int, number: int, slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """The slots in the order of one round: chance by seed and number, the same each time it is asked for."""
    order = np.random.default_rng((seed, number)).permutation(len(slots))
    known = sorted(slots)
    return tuple(known[index] for index in order)


def load_of(name: str, capacity: Capacity) -> ClosedLoop | OpenLoop | None:
    """The load of a name on a candidate of this capacity; None where it has no saturation point to refer to.

    Args:
        name: ``closed``, ``0.8 saturation`` (of the candidate's own saturation point), ``100 rps`` or
            ``concurrency 1``.
        capacity: the candidate's.

    Raises:
        InputError: the name is none of these.
    """
    if name == CLOSED:
        return ClosedLoop(concurrency=capacity.concurrency)
    found = _LOAD.fullmatch(name)
    if found is None or float(found["n"] or found["x"]) <= 0:
        raise InputError(
            f"there is no load {name!r}", hint="A load is '0.8 saturation', '100 rps' or 'concurrency 1', say."
        )
    if found["kind"]:
        return ClosedLoop(concurrency=int(found["n"]))
    if found["unit"] == "rps":
        return OpenLoop(rate_rps=float(found["x"]))
    if capacity.saturation_rps is None:
        return None
    return OpenLoop(rate_rps=float(found["x"]) * capacity.saturation_rps)


def measure_in_round(
    generator: LoadGenerator,
    deployment: Deployment,
    payloads: tuple[Payload, ...],
    capacity: Capacity,
    loads: Sequence[str],
    *,
    level: Level,
    number: int,
    position: int,
    seed: int,
    raw_root: Path,
    folder: Path,
    expected: Expected | None = None,
    again: bool = False,
    gpus: GpuProbe | None = None,
    package: PackageEnergy | None = None,
) -> Round:
    """What one candidate gives in one slot of a round: a closed-loop run at its best concurrency, and one at each load.

    An invalid window is run again, at most ``level.reruns`` times; the last is kept, with its findings. A load that
    refers to a saturation point is left out where the candidate has none. All candidates see the same arrivals in a
    round (stretched to their rates), so that differences are the servers'.

    Args:
        generator: offers the load.
        deployment: the candidate, being served.
        payloads: encoded for its target.
        capacity: of the candidate.
        loads: names, see `load_of`; ``closed`` comes first whether named or not.
        level: how long windows are.
        number: of the round.
        position: of the slot in it.
        seed: of the campaign.
        raw_root: the campaign's folder; records name the files of arrays relative to it.
        folder: where below it the arrays go; no other measurement's, or the last one overwrites the other.
        expected: the reference's answers, to check replies under load.
        again: whether it is the candidate's second slot; its runs are named with `AGAIN`, and give the noise floor
            together with those of the first.
        gpus: reads those that the server uses; None where there are none.
        package: the energy of this machine's CPU; None where it is not asked for.

    Raises:
        UnreachableError: the server refused, or stopped answering.
        ServerDiedError: it ended.
        InputError: a load's name is not one.
    """

    def run(profile: LoadProfile, path: Path) -> RunRecord:
        meter = ResourceMeter(deployment.usage, gpus=gpus, package=package)
        # The server is asked before and after the load, so that no answer to us stands in a window's way.
        before = read_counts(deployment.statistics)
        record = generator.run(
            deployment.target,
            payloads,
            profile,
            raw_path=path,
            raw_root=raw_root,
            usage=meter.read,
            expected=expected,
        )
        after = read_counts(deployment.statistics)
        return with_breakdown(meter.completed(record), before, after, raw_root=raw_root)

    names = (CLOSED, *(name for name in loads if name != CLOSED))
    return offer_in_slot(
        run,
        Slot(deployment.candidate.id, again),
        capacity,
        names,
        level=level,
        number=number,
        position=position,
        seed=seed,
        folder=folder,
    )


def offer_in_slot(
    run: RunWindow,
    slot: Slot,
    capacity: Capacity,
    loads: Sequence[str],
    *,
    level: Level,
    number: int,
    position: int,
    seed: int,
    folder: Path,
) -> Round:
    """The runs of one slot, one a load; see `measure_in_round`.

    Args:
        run: offers a window to the slot's candidate.
        slot: whose it is.
        capacity: of the candidate.
        loads: names, see `load_of`.
        level: how long windows are.
        number: of the round.
        position: of the slot in it.
        seed: of all rounds.
        folder: where the arrays go.

    Raises:
        UnreachableError: the server refused, or stopped answering.
        InputError: a load's name is not one.
    """
    suffix = AGAIN if slot.again else ""
    runs = []
    for name in loads:
        profile = window_profile(name, capacity, level, seed=_window_seed(seed, number, name, slot.again))
        if profile is not None:
            runs.append(run_until_valid(run, profile, folder / f"{_slug(name + suffix)}.npz", level, suffix))
    return Round(candidate_id=slot.candidate_id, number=number, position=position, runs=tuple(runs))


def window_profile(name: str, capacity: Capacity, level: Level, *, seed: int) -> LoadProfile | None:
    """The window of a load at this level; None where the load cannot be offered (see `load_of`)."""
    load = load_of(name, capacity)
    if load is None:
        return None
    if isinstance(load, OpenLoop):
        duration_s = level.window_s(level.open_s, load.rate_rps)
    else:
        duration_s = level.window_s(level.closed_s, _closed_rps(load.concurrency, capacity))
    return LoadProfile(
        name=name,
        load=load,
        warmup_s=level.warmup_s,
        duration_s=duration_s,
        timeout_s=level.timeout_s,
        seed=seed,
    )


def run_until_valid(run: RunWindow, profile: LoadProfile, path: Path, level: Level, suffix: str = "") -> RunRecord:
    """The record of a window, run again while it is invalid and the level allows.

    Args:
        run: offers a profile, and writes its arrays to a path.
        profile: what to offer.
        path: where the arrays go; those of a window that is run again are overwritten.
        level: says how often.
        suffix: added to the load's name.
    """
    profile = replace(profile, name=profile.name + suffix)
    record = run(profile, path)
    for _ in range(level.reruns):
        if record.valid:
            break
        record = run(profile, path)
    return record


def reduce_rounds(
    candidate_id: str,
    rounds: Sequence[Round],
    capacity: Capacity,
    *,
    raw_root: Path,
    level: Level,
    load_time_s: float | Sequence[float] | None = None,
    first_request_ms: float | None = None,
) -> tuple[Measurement, ...]:
    """What the valid runs of one candidate say together.

    Args:
        candidate_id: whose; rounds of others are passed over.
        rounds: of the campaign.
        capacity: of the candidate.
        raw_root: the campaign's folder.
        level: says which percentiles may be reported.
        load_time_s: how long the model took to be ready, at each deployment where there were several.
        first_request_ms: how long it then took for its first request.

    Returns:
        One measurement that belongs to no load (``max_throughput_rps``, ``saturation_rps``, ``load_time_s``,
        ``first_request_ms``, ``peak_rss_mb`` and `RESOURCES` at the closed-loop maximum), and one a load with its
        latencies, where its time went, and its resources. A metric is left out where no valid run has
        it, or too few requests are behind it. Runs of an A/A pair's second half are not among them.

    Raises:
        InputError: arrays of a run are missing or damaged, or are not those that were measured.
    """
    of_load = _runs_by_load(candidate_id, rounds)
    closed = of_load.pop(CLOSED, [])
    valid = [run for run in closed if run.valid]
    metrics = _over_runs(valid, {"throughput_rps": ("max_throughput_rps", "1/s"), **RESOURCES})
    # What spoils a window's times does not spoil this.
    peak = peak_over_runs(run for one in rounds if one.candidate_id == candidate_id for run in one.runs)
    if peak is not None:
        metrics["peak_rss_mb"] = peak
    if (saturation := estimate_saturation(capacity)) is not None:
        metrics["saturation_rps"] = saturation
    if capacity.slo_max is not None:
        metrics["slo_max_rps"] = capacity.slo_max
    times = [load_time_s] if isinstance(load_time_s, int | float) else list(load_time_s or ())
    if times:
        metrics["load_time_s"] = estimate_over_runs(times, None, "s")
    if first_request_ms is not None:
        metrics["first_request_ms"] = estimate_over_runs([first_request_ms], None, "ms")
    whole = Measurement(candidate_id=candidate_id, load=None, metrics=metrics, invalid_runs=len(closed) - len(valid))
    return (
        whole,
        *(
            _at_load(candidate_id, load, runs, capacity, raw_root=raw_root, level=level)
            for load, runs in sorted(of_load.items())
        ),
    )


def compare_rounds(
    baseline_id: str, rounds: Sequence[Round], *, raw_root: Path, level: Level, a_a_id: str | None = None
) -> tuple[Comparison, ...]:
    """Every other candidate against the baseline, in ``max_throughput_rps`` and the latencies at each load.

    Pairs are those of rounds in which both have a valid run with the metric. The noise floor of a metric is the
    largest difference between two runs of the same thing in the same round, at least 2 %, and `UNKNOWN_FLOOR` where the
    level has such pairs and none is valid. Where the level allows more rounds for what is undecided, each look at the
    rounds spends a part of the chance to err (`spent_at`).

    Args:
        baseline_id: the candidate that the others are held against.
        rounds: of the campaign.
        raw_root: the campaign's folder.
        level: says which percentiles count, and when the rounds are looked at.
        a_a_id: the candidate that has two slots in each round, which is not compared itself; the baseline if None.

    Raises:
        InputError: arrays of a run are missing or damaged, or are not those that were measured.
    """
    values = dict(_values(rounds, raw_root, level))
    twice = a_a_id or baseline_id
    numbers = sorted({number for _, number, _ in values})
    others = sorted({identity for identity, _, _ in values} - {baseline_id, twice})
    loads = sorted({load for _, _, load in values if not load.endswith(AGAIN)})
    confidence = {other: 1 - spent_at(_played(other, rounds), level.rounds, level.most_rounds) for other in others}

    def pairs(one: tuple[str, str], other: tuple[str, str], metric: str) -> list[tuple[float, float]]:
        """Values of two (candidate, load) in the rounds that both have part in."""
        each = ([values.get((identity, n, load), {}).get(metric) for identity, load in (one, other)] for n in numbers)
        return [(first, second) for first, second in each if first is not None and second is not None]

    comparisons = []
    for load in loads:
        for metric in _compared(load, level):
            twins = pairs((twice, load + AGAIN), (twice, load), metric)
            floor = noise_floor(twins) if twins or not level.a_a else UNKNOWN_FLOOR
            for other in others:
                found = pairs((other, load), (baseline_id, load), metric)
                if found:
                    comparisons.append(
                        compare_pairs(
                            found,
                            candidate_id=other,
                            baseline_id=baseline_id,
                            metric=metric,
                            load=None if load == CLOSED else load,
                            noise_floor=floor,
                            confidence=confidence[other],
                        )
                    )
    return tuple(comparisons)


def compare_apart(baseline_id: str, rounds: Sequence[Round], *, raw_root: Path, level: Level) -> tuple[Comparison, ...]:
    """As `compare_rounds`, of runs that were not measured in turns: numbers of rounds say nothing, nor does a floor.

    Args:
        baseline_id: the candidate that the others are held against.
        rounds: of several measurements.
        raw_root: the folder that runs name their arrays in.
        level: says which percentiles count.

    Raises:
        InputError: arrays of a run are missing or damaged, or are not those that were measured.
    """
    of: dict[tuple[str, str, str], list[float]] = {}
    for (identity, _, load), metrics in _values(rounds, raw_root, level):
        for metric, value in metrics.items():
            of.setdefault((load, metric, identity), []).append(value)
    return tuple(
        compare_blocks(
            values,
            of[load, metric, baseline_id],
            candidate_id=identity,
            baseline_id=baseline_id,
            metric=metric,
            load=None if load == CLOSED else load,
        )
        for (load, metric, identity), values in sorted(of.items())
        if identity != baseline_id and (load, metric, baseline_id) in of and not load.endswith(AGAIN)
    )


def undecided(
    baseline_id: str,
    rounds: Sequence[Round],
    wanted: Iterable[tuple[str, str | None]],
    *,
    raw_root: Path,
    level: Level,
    a_a_id: str | None = None,
) -> frozenset[str]:
    """Candidates of which these rounds do not say whether they differ from the baseline in what is wanted.

    Args:
        baseline_id: the candidate that the others are held against.
        rounds: so far.
        wanted: (metric, load it belongs to or None) of each comparison that must be decided; those that are no
            comparisons of rounds are passed over.
        raw_root: the campaign's folder.
        level: as for `compare_rounds`.
        a_a_id: likewise.

    Raises:
        InputError: arrays of a run are missing or damaged, or are not those that were measured.
    """
    keys = set(wanted)
    told = compare_rounds(baseline_id, rounds, raw_root=raw_root, level=level, a_a_id=a_a_id)
    return frozenset(one.candidate_id for one in told if (one.metric, one.load) in keys and one.word == "undecided")


# --- names and seeds ---------------------------------------------------------------------------------------------


def _window_seed(seed: int, number: int, name: str, again: bool) -> int:
    """The same for all candidates, another for each round, load and half of an A/A pair."""
    words = [seed, number, int(again), *name.encode()]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _closed_rps(concurrency: int, capacity: Capacity) -> float:
    """The ladder's highest throughput at the concurrencies that were tried and are not higher."""
    return max((rps for tried, rps in capacity.ladder if tried <= concurrency), default=0.0)


def _played(candidate_id: str, rounds: Iterable[Round]) -> int:
    """How many rounds the candidate has had part in."""
    return len({one.number for one in rounds if one.candidate_id == candidate_id})


def _compared(load: str, level: Level) -> list[str]:
    if load == CLOSED:
        return ["max_throughput_rps"]
    return [f"latency_p{percentile}_ms" for percentile in level.percentiles]


# --- from runs to numbers ----------------------------------------------------------------------------------------


def _runs_by_load(candidate_id: str, rounds: Iterable[Round]) -> dict[str, list[RunRecord]]:
    of_load: dict[str, list[RunRecord]] = {}
    for run in (run for one in rounds if one.candidate_id == candidate_id for run in one.runs):
        if not run.load.name.endswith(AGAIN):
            of_load.setdefault(run.load.name, []).append(run)
    return of_load


def _over_runs(runs: Sequence[RunRecord], names: Mapping[str, tuple[str, str]]) -> dict[str, Estimate]:
    estimates = {}
    for source, (name, unit) in names.items():
        values = [run.metrics[source] for run in runs if source in run.metrics]
        if values:
            estimates[name] = estimate_over_runs(values, None, unit)
    return estimates


def _at_load(
    candidate_id: str, load: str, runs: Sequence[RunRecord], capacity: Capacity, *, raw_root: Path, level: Level
) -> Measurement:
    valid = [run for run in runs if run.valid]
    arrays = [load_arrays(raw_root / run.raw, run.raw_sha256) for run in valid]
    latencies = [_latencies(stored) for stored in arrays]
    services = [_services(stored) for stored in arrays]
    utilisation = _utilisation(runs[0].load.load, capacity)
    metrics = {
        f"latency_p{percentile}_ms": estimate
        for percentile in level.percentiles
        if (estimate := estimate_percentile(latencies, percentile, utilisation=utilisation)) is not None
    }
    service = estimate_percentile(services, 50)
    if service is not None:
        metrics["service_p50_ms"] = service
    metrics |= _over_runs(valid, {"throughput_rps": ("throughput_rps", "1/s"), **RESOURCES}) | times_over_runs(valid)
    return Measurement(candidate_id=candidate_id, load=load, metrics=metrics, invalid_runs=len(runs) - len(valid))


def _utilisation(load: ClosedLoop | OpenLoop | Replay, capacity: Capacity) -> float | None:
    """The rate as a share of the saturation point; None where one of the two is not known."""
    if isinstance(load, ClosedLoop) or capacity.saturation_rps is None:
        return None
    return load.rate_rps / capacity.saturation_rps


def _latencies(stored: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    status = stored["status"].astype(np.int8)
    return latency_ms(stored["intended_ns"], stored["done_ns"], status)


def _services(stored: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    service: NDArray[np.float64] = (stored["done_ns"] - stored["sent_ns"])[stored["status"] == Status.OK] / NS_PER_MS
    return service


def _values(
    rounds: Sequence[Round], raw_root: Path, level: Level
) -> Iterator[tuple[tuple[str, int, str], dict[str, float]]]:
    """((candidate, round, load), metrics that may be compared) of each valid run."""
    for one in rounds:
        for run in one.runs:
            if not run.valid:
                continue
            if run.load.name.removesuffix(AGAIN) == CLOSED:
                metrics = {"max_throughput_rps": run.metrics["throughput_rps"]}
            else:
                latencies = _latencies(load_arrays(raw_root / run.raw, run.raw_sha256))
                metrics = {
                    f"latency_p{percentile}_ms": nearest_rank(latencies, percentile)
                    for percentile in level.percentiles
                    if is_earned(percentile, len(latencies), in_run=True)
                }
            # What a ratio can be taken of: a percentile among misses is infinite.
            usable = {name: value for name, value in metrics.items() if 0 < value < math.inf}
            yield (one.candidate_id, one.number, run.load.name), usable
