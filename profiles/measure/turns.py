"""Endpoints that somebody else serves, measured in turns, so that they can be compared."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Payload
from profiles.measure.capacity import find_capacity, told_saturation
from profiles.measure.compare import looks_at
from profiles.measure.levels import Level
from profiles.measure.rounds import (
    CLOSED,
    RunWindow,
    Slot,
    compare_rounds,
    load_of,
    offer_in_slot,
    reduce_rounds,
    round_order,
    undecided,
)
from registry.records import Capacity, ClosedLoop, Comparison, LoadProfile, Measurement, Round, RunRecord, Target

DEFAULT_SHARE = 0.8
JUDGED = 90
Wanted = tuple[str, str | None]
"""A metric, and the load it belongs to or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the endpoints.

    Attributes:
        id: short, of letters and digits; it names files.
        payloads: encoded for the target.
    """

    id: str
    target: Target
    payloads: tuple[Payload, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What measuring in turns gave.

    Attributes:
        loads: that were offered in each round.
        capacities: one for each side.
        rounds: of all sides; the first one's second slots are among them.
        measurements: those of each side.
        comparisons: each other side against the first.
    """

    loads: tuple[str, ...]
    capacities: tuple[Capacity, ...]
    rounds: tuple[Round, ...]
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]


def measure_in_turns(
    generator: LoadGenerator,
    sides: Sequence[Side],
    *,
    loads: Sequence[str],
    level: Level,
    seed: int,
    raw_root: Path,
    told: Callable[[str], None] = lambda _: None,
    on_round: Callable[[Round], None] = lambda _: None,
) -> Turns:
    """Measures endpoints in interleaved, randomised rounds; the first has two slots in each, for the noise floor.

    Rounds go on, within the level's bound, while the first load leaves another side undecided: in throughput where that
    is the closed-loop maximum, else in the p90 of latency.

    Args:
        generator: offers the load.
        sides: the first is the one that the others are held against.
        loads: ``concurrency 4``, ``100 rps``; empty to find where each side saturates, and to measure the closed-loop
            maximum of each and latency at 0.8 of the lowest saturation point, the same rate for all.
        level: how many rounds there are, and how long windows.
        seed: of arrivals, payloads and the order in rounds.
        raw_root: folder for the raw arrays.
        told: takes a line on each thing that is done.
        on_round: takes each slot's round as soon as it was measured, so that what was measured stays.

    Raises:
        UnreachableError: an endpoint refused, or stopped answering.
        InputError: a load's name is not one.
    """
    runs = {side.id: _runner(generator, side, raw_root) for side in sides}
    # What is asked for by name needs no search; how long its windows must be is seen at a glance.
    search = replace(level, ladder=_concurrencies(loads), stages=()) if loads else level
    capacities: dict[str, Capacity] = {}
    for side in sides:
        found = _capacity(runs[side.id], side, search, seed=seed, scratch=raw_root / "capacity.npz")
        capacities[side.id] = found
        if not loads:
            told(f"{side.id}: {told_saturation(found)}")
    loads = loads or _common_loads(capacities.values())
    first = sides[0].id
    wanted = _wanted(loads[0], level)
    rounds: list[Round] = []
    playing = [Slot(side.id, again) for side in sides for again in ((False, True) if side is sides[0] else (False,))]
    for played, look in pairwise((0, *looks_at(level.rounds, level.most_rounds))):
        if played:
            left = undecided(first, rounds, [wanted], raw_root=raw_root, level=level)
            playing = [slot for slot in playing if left and slot.candidate_id in {first, *left}]
        if not playing:
            break
        for number in range(played, look):
            for position, slot in enumerate(round_order(seed, number, playing)):
                rounds.append(
                    offer_in_slot(
                        runs[slot.candidate_id],
                        slot,
                        capacities[slot.candidate_id],
                        loads,
                        level=level,
                        number=number,
                        position=position,
                        seed=seed,
                        folder=raw_root / slot.candidate_id / f"round-{number}",
                    )
                )
                on_round(rounds[-1])
            told(f"round {number + 1}")
    measurements = [
        one
        for side in sides
        for one in reduce_rounds(side.id, rounds, capacities[side.id], raw_root=raw_root, level=level)
    ]
    return Turns(
        loads=tuple(loads),
        capacities=tuple(capacities.values()),
        rounds=tuple(rounds),
        measurements=tuple(one for one in measurements if one.metrics),
        comparisons=compare_rounds(first, rounds, raw_root=raw_root, level=level),
    )


def _runner(generator: LoadGenerator, side: Side, raw_root: Path) -> RunWindow:
    def run(profile: LoadProfile, path: Path) -> RunRecord:
        return generator.run(side.target, side.payloads, profile, raw_path=path, raw_root=raw_root)

    return run


def _concurrencies(loads: Iterable[str]) -> tuple[int, ...]:
    """Those of the closed loops among the loads, rising."""
    known = Capacity(candidate_id="", concurrency=1, ladder=(), stages=(), saturation_rps=None)
    found = (load_of(name, known) for name in loads)
    return tuple(sorted({load.concurrency for load in found if isinstance(load, ClosedLoop)}))


def _capacity(run: RunWindow, side: Side, level: Level, *, seed: int, scratch: Path) -> Capacity:
    if not level.ladder:
        return Capacity(candidate_id=side.id, concurrency=1, ladder=(), stages=(), saturation_rps=None)
    try:
        return find_capacity(lambda profile: run(profile, scratch), level, candidate_id=side.id, seed=seed)
    finally:
        scratch.unlink(missing_ok=True)


def _common_loads(capacities: Iterable[Capacity]) -> tuple[str, ...]:
    """The closed loop, and a rate that none of them is saturated by."""
    known = [capacity.saturation_rps for capacity in capacities]
    reached = [rate_rps for rate_rps in known if rate_rps]
    return (CLOSED, f"{DEFAULT_SHARE * min(reached):.4g} rps") if len(reached) == len(known) else (CLOSED,)


def _wanted(load: str, level: Level) -> Wanted:
    if load == CLOSED:
        return "max_throughput_rps", None
    percentile = JUDGED if JUDGED in level.percentiles else max(level.percentiles)
    return f"latency_p{percentile}_ms", load
