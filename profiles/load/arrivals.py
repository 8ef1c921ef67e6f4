"""When requests are due: absolute schedules, reckoned in blocks while the load runs.

A schedule of relative sleeps falls behind by the lateness of each sleep; an absolute one does not. Blocks keep a long
load's memory flat.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from registry.errors import InputError
from registry.records import OpenLoop, Replay

NS_PER_S = 1_000_000_000
BLOCK = 4096
# A file of arrivals is read whole: more than this is no recording of a load test.
MOST_ARRIVALS_BYTES = 200_000_000
# No run is meant to be longer than a day. Times in ms or ns that are taken for seconds soon are.
LONGEST_S = 86_400.0


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
    load = OpenLoop(rate_rps=rate_rps, arrivals=arrivals)
    return np.concatenate([np.empty(0, np.int64), *schedule_blocks(load, 0.0, duration_s, seed=seed)])


def schedule_blocks(
    load: OpenLoop | Replay, warmup_s: float, duration_s: float, *, seed: int = 0, lane: int = 0, lanes: int = 1
) -> Iterator[NDArray[np.int64]]:
    """The due times of a load in blocks, in ns from the start of its warm-up, rising over all blocks.

    Args:
        load: what is offered.
        warmup_s: comes before the window, and belongs to the schedule.
        duration_s: the window.
        seed: of exponential gaps.
        lane: which share of the arrivals this is, from 0. Lanes take arrivals in turn, so that together they offer
            the same schedule however many they are.
        lanes: how many shares there are.

    Raises:
        ValueError: rate or duration is not positive.
        InputError: the file of a replay cannot be read, or is not the one that was meant.
    """
    if load.rate_rps <= 0 or duration_s <= 0:
        raise ValueError(f"a schedule needs a positive rate and duration, not {load.rate_rps} and {duration_s}")
    number = 0
    for due_s in _replayed(load, warmup_s) if isinstance(load, Replay) else _generated(load, warmup_s, seed):
        inside = due_s[due_s < warmup_s + duration_s]
        yield (inside[(lane - number) % lanes :: lanes] * NS_PER_S).astype(np.int64)
        number += len(inside)
        if len(inside) < len(due_s):
            return


def read_arrivals(file: Path, *, speed: float = 1.0) -> Replay:
    """The load that replays a file of arrivals.

    Args:
        file: one time in seconds a line, in any order and from any origin; empty lines and ``#`` comments are skipped.
        speed: how many times faster than recorded.

    Raises:
        InputError: the file cannot be read, holds fewer than two different times, or lasts longer than any run.
    """
    times = _times(file)
    span_s = float(times[-1] - times[0]) if len(times) else 0.0
    if span_s <= 0:
        raise InputError(
            f"{file} holds {len(times)} arrivals over {span_s:g} s",
            hint="Give a file with one time in seconds a line, of at least two different times.",
        )
    if span_s / speed > LONGEST_S:
        raise InputError(
            f"to replay {file} would take {span_s / speed:,.0f} s, and a run is {LONGEST_S:,.0f} s at most",
            hint="Are its times in seconds? A load profile's speed replays them faster.",
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Replay(file=str(file.resolve()), sha256=digest, count=len(times), span_s=span_s, speed=speed)


def replay_s(load: Replay) -> float:
    """How long a replay lasts: just past its last arrival."""
    return load.span_s / load.speed + 1e-6


def _generated(load: OpenLoop, warmup_s: float, seed: int) -> Iterator[NDArray[np.float64]]:
    """Arrivals without end: those of a unit rate, bent by the rate's integral over time."""
    chance, last = np.random.default_rng(seed), 0.0
    ramp_s = warmup_s if load.ramp_from_rps is not None else 0.0
    start_rps = load.ramp_from_rps or 0.0
    while True:
        if load.arrivals == "constant":
            units = last + np.arange(BLOCK, dtype=np.float64)
            last += BLOCK
        else:
            units = last + chance.exponential(1.0, BLOCK).cumsum()
            last = float(units[-1])
        yield _bend(units, start_rps, load.rate_rps, ramp_s)


def _bend(units: NDArray[np.float64], start_rps: float, rate_rps: float, ramp_s: float) -> NDArray[np.float64]:
    """When so many arrivals are due, where the rate rises linearly for ``ramp_s`` and then stays."""
    if ramp_s <= 0:
        return units / rate_rps
    risen = (start_rps + rate_rps) / 2 * ramp_s
    slope = (rate_rps - start_rps) / ramp_s
    early = np.minimum(units, risen)
    if math.isclose(start_rps, rate_rps):
        rising = early / rate_rps
    else:
        rising = (np.sqrt(np.maximum(start_rps**2 + 2 * slope * early, 0.0)) - start_rps) / slope
    bent: NDArray[np.float64] = np.where(units < risen, rising, ramp_s + (units - risen) / rate_rps)
    return bent


def _replayed(load: Replay, warmup_s: float) -> Iterator[NDArray[np.float64]]:
    file = Path(load.file)
    times = _times(file)
    if hashlib.sha256(file.read_bytes()).hexdigest() != load.sha256:
        raise InputError(f"{file} has changed since the load was planned", hint="Start again.")
    yield np.arange(int(warmup_s * load.rate_rps)) / load.rate_rps
    yield warmup_s + (times - times[0]) / load.speed


def _times(file: Path) -> NDArray[np.float64]:
    """The times of a file, sorted."""
    try:
        if file.stat().st_size > MOST_ARRIVALS_BYTES:
            raise InputError(f"{file} is larger than {MOST_ARRIVALS_BYTES} bytes; is it the right file?")
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", hint="Check its path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text", hint="Give one time in seconds a line.") from error
    times = []
    for number, line in enumerate(lines, 1):
        said = line.partition("#")[0].strip()
        if not said:
            continue
        try:
            times.append(float(said))
        except ValueError:
            times.append(math.nan)
        if not math.isfinite(times[-1]):
            raise InputError(f"{file}:{number}: {said!r} is no time in seconds", hint="Give one number a line.")
    return np.sort(np.array(times, dtype=np.float64))
