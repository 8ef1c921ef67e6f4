"""The in-process time of a variant in one engine: a first look, in a process of its own, before anything is served."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimize.adaptation import adapt_samples, as_jsonable, from_jsonable
from optimize.engines.local import Limits, run_in_child
from optimize.fidelity import thread_limits
from optimize.samples import Samples, load_samples
from registry.errors import InputError, StageError
from registry.records import Adaptation, EngineSpec, Estimate, Screening

if TYPE_CHECKING:
    from profiles.serving.session import Session

BUDGET_S = 1.5
_WARM_UP_SHARE = 0.2
_BLOCKS = 15
_FEWEST_RUNS = 3


def screen(
    *,
    entry: str,
    engine: Mapping[str, str],
    samples: str,
    batch_sizes: Sequence[int],
    threads: int,
    budget_s: float = BUDGET_S,
    adaptation: Sequence[Any] = (),
) -> dict[str, Any]:
    """Times a model in this process; the child's side of `screen_variant`.

    Returns:
        ``metrics``: ``inprocess_ms.batch_<n>`` -> fields of an `Estimate`, for each batch size.

    Raises:
        StageError: the model cannot be opened or run here.
        InputError: a batch size is below 1.
    """
    from profiles.serving.session import SessionError, open_session

    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"batch sizes are 1 or more, not {list(batch_sizes)}")
    held_out = adapt_samples(load_samples(Path(samples)), from_jsonable(adaptation))
    metrics = {}
    try:
        session = open_session(entry, engine=engine["name"], precision=engine["precision"],
                               graph_level=engine["graph_level"], threads=threads)  # fmt: skip
        for size in batch_sizes:
            metrics[f"inprocess_ms.batch_{size}"] = asdict(_time_batches(session, _batches(held_out, size), budget_s))
    except SessionError as error:
        raise StageError(str(error)) from error
    return {"metrics": metrics}


def _time_batches(session: "Session", batches: Sequence[dict[str, Any]], budget_s: float) -> Estimate:
    return time_runs(lambda number: session.run(batches[number % len(batches)]), budget_s)


def _batches(samples: Samples, size: int, *, most: int = 16) -> list[dict[str, Any]]:
    """Some full batches of the samples, which start again from the first where there are too few."""
    order = np.arange(min(most, max(1, len(samples) // size)) * size) % len(samples)
    return list(samples.batches(size, order=order))


def time_runs(run: Callable[[int], object], budget_s: float = BUDGET_S) -> Estimate:
    """The median time of a run in ms, from blocks of runs that together take about ``budget_s``.

    After a warm-up the runs go into blocks; the value is the median of the blocks' medians, and the interval that of
    a median by order statistics (David and Nagaraja, "Order Statistics", 2003, section 7.1), at 95 % or more. Where
    time allows fewer than six blocks there is none.

    Args:
        run: takes the number of the run.
        budget_s: wall time, warm-up included. Three runs are made at least, however long they take.
    """
    one_s = _warm_up(run, budget_s * _WARM_UP_SHARE)
    left_s = budget_s * (1 - _WARM_UP_SHARE)
    runs = max(_FEWEST_RUNS, int(left_s / one_s))
    blocks = np.array_split(np.arange(runs), min(_BLOCKS, runs))
    deadline = time.perf_counter() + 2 * left_s
    medians = []
    for block in blocks:
        medians.append(float(np.median([_timed_ms(run, int(i)) for i in block])))
        if len(medians) >= _FEWEST_RUNS and time.perf_counter() > deadline:
            break
    low, high = median_interval(medians)
    return Estimate(
        value=float(np.median(medians)), low=low, high=high, runs=len(medians),
        method="order statistics of block medians", unit="ms",
    )  # fmt: skip


def _warm_up(run: Callable[[int], object], budget_s: float) -> float:
    """Seconds that one run takes once warm."""
    started, last_s, count = time.perf_counter(), 0.0, 0
    while count < 2 or time.perf_counter() - started < budget_s:
        last_s = _timed_ms(run, count) / 1e3
        count += 1
        if count >= 2 and last_s > budget_s:
            break
    return max(last_s, 1e-7)


def _timed_ms(run: Callable[[int], object], number: int) -> float:
    started = time.perf_counter_ns()
    run(number)
    return (time.perf_counter_ns() - started) / 1e6


def median_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The tightest pair of order statistics that holds the median at 95 % or more, or None twice if none does."""
    ordered, count = sorted(values), len(values)
    best = None
    for cut in range(1, count // 2 + 1):
        if 2 * _binomial_tail(cut - 1, count) <= 0.05:
            best = ordered[cut - 1], ordered[count - cut]
    return best or (None, None)


def _binomial_tail(most: int, count: int) -> float:
    """The chance that at most this many of ``count`` values lie below the median."""
    return float(sum(math.comb(count, k) for k in range(most + 1)) / 2**count)


def screen_variant(
    variant_id: str,
    entry: Path,
    engine: EngineSpec,
    *,
    samples: Path,
    batch_sizes: Sequence[int],
    threads: int = 1,
    budget_s: float = BUDGET_S,
    adaptation: Sequence[Adaptation] = (),
    limits: Limits | None = None,
    cpus: Sequence[int] | None = None,
) -> Screening:
    """The in-process time of a variant in an engine, taken in a child process.

    Args:
        variant_id: of the variant.
        entry: its model file.
        engine: the engine, and how it is set.
        samples: the ``.npz`` that batches are made of.
        batch_sizes: the batches to time, each with ``budget_s``.
        threads: of the session.
        budget_s: wall time for each batch size.
        adaptation: how the variant's inputs come from the samples.
        limits: of the child.
        cpus: the child may run on, or None for all.

    Raises:
        StageError: the model cannot be opened or run in this engine.
        ChildFailure: the child was stopped by a limit, or died.
    """
    found = run_in_child(
        "optimize.screening:screen",
        {
            "entry": str(entry.resolve()),
            "engine": {"name": engine.name, "precision": engine.precision, "graph_level": engine.graph_level},
            "samples": str(samples.resolve()),
            "batch_sizes": list(batch_sizes),
            "threads": threads,
            "budget_s": budget_s,
            "adaptation": as_jsonable(adaptation),
        },
        limits=limits,
        cpus=cpus,
        environment=thread_limits(threads),
    )
    metrics = {name: Estimate(**fields) for name, fields in found["metrics"].items()}
    return Screening(variant_id=variant_id, engine=engine, threads=threads, metrics=metrics)
