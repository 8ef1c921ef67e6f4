"""Load on an endpoint that somebody else serves: independent runs, reduced as a campaign reduces its rounds."""

import http.client
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Payload
from profiles.measure.asking import ask, what_is_wrong
from profiles.measure.capacity import find_capacity
from profiles.measure.levels import Level, find_level
from profiles.measure.rounds import CLOSED, reduce_rounds, run_until_valid, window_profile
from registry.errors import UnreachableError
from registry.records import Capacity, LoadProfile, Measurement, Round, RunRecord, Target

DEFAULT_LOADS = (CLOSED, "0.8 saturation")
_ID = "bench"
_PROBE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a bench found.

    Attributes:
        capacity: where the endpoint saturates, or None where that was not asked.
        measurements: one for each load.
        rounds: the runs behind them; each round has one run a load.
    """

    capacity: Capacity | None
    measurements: tuple[Measurement, ...]
    rounds: tuple[Round, ...]


def bench_target(
    generator: LoadGenerator,
    target: Target,
    payloads: tuple[Payload, ...],
    *,
    loads: Sequence[str],
    duration_s: float,
    runs: int,
    seed: int,
    raw_root: Path,
    exact: bool = False,
    on_run: Callable[[int, RunRecord], None] = lambda number, record: None,
) -> Bench:
    """Measures an endpoint at each load.

    Args:
        generator: offers the load.
        target: the endpoint.
        payloads: encoded for it.
        loads: ``concurrency 4``, ``100 rps``; empty to find where it saturates, and measure at `DEFAULT_LOADS`.
        duration_s: length of one run, at least; slow endpoints get longer ones, to earn their percentiles.
        runs: independent runs of each load.
        seed: of arrivals and of the order of payloads.
        raw_root: folder for the raw arrays.
        exact: whether a run is never longer than ``duration_s``.
        on_run: told of each window that counts, with the number of its round, as soon as it is there.

    Raises:
        UnreachableError: the endpoint refused, or stopped answering.
        InputError: a load's name is not one.
    """
    standard = find_level("standard")
    longest_s = duration_s if exact else standard.longest_s
    level = replace(standard, closed_s=duration_s, open_s=duration_s, longest_s=longest_s)

    def run(profile: LoadProfile, path: Path) -> RunRecord:
        return generator.run(target, payloads, profile, raw_path=path, raw_root=raw_root)

    def measure(profile: LoadProfile, path: Path, number: int) -> RunRecord:
        record = run_until_valid(run, profile, path, level)
        on_run(number, record)
        return record

    capacity = None
    if not loads:
        scratch = raw_root / "capacity.npz"
        try:
            capacity = find_capacity(lambda profile: run(profile, scratch), level, candidate_id=_ID, seed=seed)
        finally:
            scratch.unlink(missing_ok=True)
    known = capacity or Capacity(candidate_id=_ID, concurrency=1, ladder=(), stages=(), saturation_rps=None)
    rounds = tuple(
        Round(
            candidate_id=_ID,
            number=number,
            position=0,
            runs=_runs(measure, loads, known, level, number=number, seed=seed, raw_root=raw_root),
        )
        for number in range(runs)
    )
    measurements = reduce_rounds(_ID, rounds, known, raw_root=raw_root, level=level)
    return Bench(capacity=capacity, measurements=tuple(m for m in measurements if m.metrics), rounds=rounds)


def _runs(
    measure: Callable[[LoadProfile, Path, int], RunRecord],
    loads: Sequence[str],
    capacity: Capacity,
    level: Level,
    *,
    number: int,
    seed: int,
    raw_root: Path,
) -> tuple[RunRecord, ...]:
    made = []
    for place, name in enumerate(loads or DEFAULT_LOADS):
        profile = window_profile(name, capacity, level, seed=seed * 1_000_003 + number * 101 + place)
        if profile is not None:
            path = raw_root / f"round-{number}-{place}.npz"
            made.append(measure(profile, path, number))
    return tuple(made)


def takes_binary(target: Target) -> bool:
    """Whether a REST endpoint says that it takes binary tensors (Triton does, MLServer does not).

    One that refuses to say, as a gateway may that knows nothing but models, is taken not to.

    Raises:
        UnreachableError: it does not answer as a V2 endpoint.
    """
    try:
        status, body = ask(target.url, "/v2", timeout_s=_PROBE_S, tls=target.tls, headers=target.headers)
        if status != http.client.OK:
            return False
        return "binary_tensor_data" in json.loads(body).get("extensions", [])
    except (OSError, http.client.HTTPException, ValueError, AttributeError, TypeError) as error:
        raise UnreachableError(
            f"no V2 endpoint answers at {target.url}: {what_is_wrong(error)}",
            hint="Give host:port of a REST endpoint, or take --protocol grpc.",
        ) from error
