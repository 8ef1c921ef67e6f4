"""The latencies of a load percentile by percentile, as far as their number earns them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from profiles.load.recording import latency_ms, load_arrays
from profiles.measure.percentiles import nearest_rank
from registry.records import Round, Spectrum

# As of every percentile of the house: so many values beyond it.
_BEYOND = 10
_PERCENTILES = (
    *range(5, 50, 5), 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 97, 98, 99, 99.5, 99.7, 99.8, 99.9, 99.95, 99.98, 99.99,
)  # fmt: skip
_DECIMALS = 4


def spectra_of(rounds: Sequence[Round], *, raw_root: Path, loads: Iterable[str]) -> tuple[Spectrum, ...]:
    """The spectrum of each candidate at each load, its valid runs together; left out where they earn no median.

    A percentile that falls among the misses, which have no latency, ends a spectrum.

    Args:
        rounds: of any candidates.
        raw_root: the folder that their arrays are named in.
        loads: names of loads.

    Raises:
        InputError: arrays of a run are missing or damaged, or are not those that were measured.
    """
    wanted = tuple(loads)
    candidates = dict.fromkeys(one.candidate_id for one in rounds)
    found = (_spectrum(rounds, candidate_id, load, raw_root) for candidate_id in candidates for load in wanted)
    return tuple(one for one in found if one is not None)


def _spectrum(rounds: Sequence[Round], candidate_id: str, load: str, raw_root: Path) -> Spectrum | None:
    arrays = [
        load_arrays(raw_root / run.raw, run.raw_sha256)
        for one in rounds
        if one.candidate_id == candidate_id
        for run in one.runs
        if run.valid and run.load.name == load
    ]
    if not arrays:
        return None
    latencies = np.sort(
        np.concatenate(
            [latency_ms(one["intended_ns"], one["done_ns"], one["status"].astype(np.int8)) for one in arrays]
        )
    )
    earned = [one for one in _PERCENTILES if _beyond(one, len(latencies)) >= _BEYOND]
    points = [(float(one), nearest_rank(latencies, one)) for one in earned]
    known = tuple((one, round(value, _DECIMALS)) for one, value in points if np.isfinite(value))
    if not known or known[-1][0] < 50:
        return None
    return Spectrum(candidate_id=candidate_id, load=load, requests=len(latencies), points=known)


def _beyond(percentile: float, count: int) -> float:
    # As people reckon it: 1 - 0.9 is a little less than 0.1.
    return round((100 - percentile) * count / 100, 6)
