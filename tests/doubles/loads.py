"""A load generator that offers nothing: each model answers as fast as it was told to, with a little noise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from registry.codec import file_sha256
from registry.records import ClosedLoop, GateFinding, LoadProfile, RunRecord, Target

COUNT = 1200
"""Requests in each window, enough for a p99."""


class StatedGenerator:
    """Makes up a record, and the arrays behind it, for each window.

    Args:
        rates: model -> requests a second that it can answer; an open loop beyond that is not kept up with.
        noise: relative spread of rates and latencies from window to window.
    """

    def __init__(self, rates: Mapping[str, float], noise: float = 0.001) -> None:
        self.rates = rates
        self.noise = noise
        self.windows: list[tuple[str, LoadProfile]] = []
        self.findings: tuple[GateFinding, ...] = ()

    def __call__(self, **_: Any) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(
        self, target: Target, payloads: Any, profile: LoadProfile, *, raw_path: Path, raw_root: Path, **_: Any
    ) -> RunRecord:
        """The record of a window of `COUNT` requests."""
        self.windows.append((target.model, profile))
        chance = np.random.default_rng(len(self.windows))
        rate_rps = self.rates[target.model] * float(np.exp(chance.normal(0, self.noise)))
        offered = rate_rps if isinstance(profile.load, ClosedLoop) else profile.load.rate_rps
        times_ns = np.round(1e9 / rate_rps * (1 + chance.exponential(0.5, COUNT))).astype(np.int64)
        raw_path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            raw_path,
            intended_ns=np.zeros(COUNT, dtype=np.int64),
            sent_ns=np.zeros(COUNT, dtype=np.int64),
            done_ns=times_ns,
            status=np.zeros(COUNT, dtype=np.int8),
            payload=np.zeros(COUNT, dtype=np.int32),
        )
        behind = max(0.0, offered - rate_rps) / offered * COUNT
        metrics = {"throughput_rps": min(offered, rate_rps), "in_flight_start": 0.0, "in_flight_end": behind}
        return RunRecord(
            load=profile,
            scheduled=COUNT,
            ok=COUNT,
            errors={},
            window_s=profile.duration_s,
            metrics=metrics,
            findings=self.findings,
            raw=raw_path.relative_to(raw_root).as_posix(),
            raw_sha256=file_sha256(raw_path),
        )
