"""Rounds with their arrays, made up."""

from pathlib import Path

import numpy as np

from registry.codec import file_sha256
from registry.records import ClosedLoop, LoadProfile, Round, RunRecord


def measured(folder: Path, value: float = 1.0, *, number: int = 0) -> Round:
    """A round of one run, whose arrays are written below the folder."""
    raw = f"raw/c/round-{number}/closed.npz"
    path = folder / raw
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=np.full(4, value))
    run = RunRecord(
        load=LoadProfile(name="closed", load=ClosedLoop(concurrency=1), warmup_s=0.1, duration_s=1.0),
        scheduled=4,
        ok=4,
        errors={},
        window_s=1.0,
        metrics={"throughput_rps": value},
        findings=(),
        raw=raw,
        raw_sha256=file_sha256(path),
    )
    return Round(candidate_id="c", number=number, position=0, runs=(run,))
