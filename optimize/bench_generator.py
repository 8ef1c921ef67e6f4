"""The load generator of ``burnish bench``: it looks at the server, checks replies, and keeps what searches offer."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from profiles.deploy.cluster import Usage
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Expected
from profiles.measure.breakdown import WatchingGenerator
from profiles.measure.resources import NvmlProbe, PackageEnergy, ResourceMeter
from registry.errors import StorageError
from registry.records import ClosedLoop, Round, RunRecord

# Windows by which a load is found; they belong to no round.
SEARCHES = ("capacity", "slo")


class BenchGenerator(WatchingGenerator):
    """A load generator whose windows are also held against a reference and told of what the server took.

    Args:
        args: those of a `LoadGenerator`.
        expected: the reference's answers, or None to ask only for replies of V2.
        usage: of the server, where it is on this machine; None where nobody can look.
        on_search: takes each window of a search and the file of its times, which the next one overwrites.
        rest: those of a `WatchingGenerator`.
    """

    def __init__(
        self,
        *args: Any,
        expected: Expected | None,
        usage: Callable[[], Usage] | None,
        on_search: Callable[[RunRecord, Path], None],
        **rest: Any,
    ) -> None:
        super().__init__(*args, **rest)
        self._expected = expected
        self._usage = usage
        self._gpus = None if usage is None else NvmlProbe.open()
        self._package = None if usage is None else PackageEnergy()
        self._on_search = on_search

    def run(
        self, *args: Any, raw_path: Path, raw_root: Path | None = None, against_ceiling: bool = True, **rest: Any
    ) -> RunRecord:
        """See `LoadGenerator.run`."""
        if not against_ceiling:  # that is how the ceiling itself is measured, on a server of its own
            return LoadGenerator.run(self, *args, raw_path=raw_path, raw_root=raw_root, against_ceiling=False, **rest)
        meter = None if self._usage is None else ResourceMeter(self._usage, gpus=self._gpus, package=self._package)
        if meter is not None:
            rest["usage"] = meter.read
        record = super().run(*args, raw_path=raw_path, raw_root=raw_root, expected=self._expected, **rest)
        if meter is not None:
            record = meter.completed(record)
        if record.load.name in SEARCHES:
            self._on_search(record, raw_path)
        return record


class Journal:
    """What was measured so far, told line by line; what searches offered is kept in a folder where there is one.

    Args:
        told: takes a line for each window.
        folder: where the times of searches' windows are to stay, or None.
    """

    def __init__(self, told: Callable[[str], None], folder: Path | None) -> None:
        self._told = told
        self._folder = folder
        self._runs: dict[int, list[RunRecord]] = {}
        self.searched: list[RunRecord] = []

    def keep(self, number: int, record: RunRecord) -> None:
        """A window of a round has been measured."""
        self._runs.setdefault(number, []).append(record)
        self._told(f"run {number + 1}, {record.load.name}: {_outcome(record)}")

    def keep_search(self, record: RunRecord, raw: Path) -> None:
        """A window of a search has been measured."""
        load = record.load.load
        offered = f"concurrency {load.concurrency}" if isinstance(load, ClosedLoop) else f"{load.rate_rps:.4g} rps"
        self._told(f"search, {offered}: {_outcome(record)}")
        if self._folder is None:
            return
        kept = self._folder / f"search-{len(self.searched)}.npz"
        try:
            shutil.copyfile(raw, kept)
        except OSError as error:
            raise StorageError(f"{kept} cannot be written: {error.strerror}", hint="Check free space there.") from error
        self.searched.append(replace(record, raw=kept.name))

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The windows by the number of their round."""
        made = sorted(self._runs.items())
        return tuple(Round(candidate_id="bench", number=n, position=0, runs=tuple(runs)) for n, runs in made)


def _outcome(record: RunRecord) -> str:
    gates = ", ".join(f"{finding.gate} {finding.observed}" for finding in record.findings)
    if gates:
        return f"invalid: {gates}"
    median_ms = record.metrics.get("latency_p50_ms")
    latency = "" if median_ms is None else f", p50 {median_ms:.2f} ms"
    return f"{record.metrics['throughput_rps']:.1f} requests a second{latency}"
