"""What a window of load leaves behind: the time of every request, and what the client saw of itself.

A long window is millions of requests, so nothing here holds more than it must: counts are taken block by block, files
are written and read column by column.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.load.transports import Status
from registry.errors import InputError

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
BLOCK = 1 << 13
# The columns of a stored window, and their types.
COLUMNS: Mapping[str, Any] = {
    "intended_ns": np.int64,
    "sent_ns": np.int64,
    "done_ns": np.int64,
    "status": np.int8,
    "payload": np.int32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One window, one entry a request that was due (closed loop: sent) in it.

    Attributes:
        columns: `COLUMNS` by name, times in ns from the window's start: ``intended_ns``, when each was due;
            ``sent_ns``, when it was sent (of a dropped one, when it was due); ``done_ns``, when its fate was known;
            ``status``, see `Status`; ``payload``, which payload it carried.
        window_s: length of the window.
        answered: answers without error that came inside the window, whenever their requests were sent.
        answered_share: the same, each request counted by the share of its own time that lies in the window.
        in_flight_start: requests in flight when the window began.
        in_flight_end: requests in flight when it ended.
        sampled: in flight at instants of chance, as the transport counts.
        recorded: in flight at the same instants, by the recorded times.
        client_cpu: CPU time of the client over the window, as a share of one core; of the busiest of its processes.
        steal: share of the machine's CPU time that the hypervisor took away.
        throttled: periods of the window in which the control group's CPU limit held its processes up.
        first_error: what the server said to the first request that failed, or empty.
    """

    columns: Mapping[str, NDArray[Any]]
    window_s: float
    answered: int
    answered_share: float
    in_flight_start: int
    in_flight_end: int
    sampled: tuple[int, ...] = ()
    recorded: tuple[int, ...] = ()
    client_cpu: float = 0.0
    steal: float = 0.0
    throttled: int = 0
    first_error: str = ""

    @property
    def done_ns(self) -> NDArray[np.int64]:
        """When the fate of each was known."""
        return self.columns["done_ns"]

    @property
    def status(self) -> NDArray[np.int8]:
        """What became of each, see `Status`."""
        return self.columns["status"]

    @property
    def scheduled(self) -> int:
        """Requests that were due in the window."""
        return len(self.status)

    @property
    def sent(self) -> int:
        """Requests that were sent."""
        return int(np.count_nonzero(self.status != Status.DROPPED))

    @property
    def ok(self) -> int:
        """Requests that were answered in time and without error."""
        return int(np.count_nonzero(self.status == Status.OK))

    @property
    def errors(self) -> dict[str, int]:
        """How many met each class of error; only those that occurred."""
        found = self.status
        counts = {status.name.lower(): int(np.count_nonzero(found == status)) for status in Status if status}
        return {name: count for name, count in counts.items() if count}

    @property
    def lateness_ms(self) -> NDArray[np.float64]:
        """(sent - intended) of those that were sent."""
        return _to_ms(self._between("intended_ns", "sent_ns")[self.status != Status.DROPPED])

    @property
    def service_ms(self) -> NDArray[np.float64]:
        """(done - sent) of those that were answered."""
        return _to_ms(self._between("sent_ns", "done_ns")[self.status == Status.OK])

    @property
    def latency_ms(self) -> NDArray[np.float64]:
        """Latency of every request due, from its intended time, in ms; see `latency_ms`."""
        return _to_ms(self._between("intended_ns", "done_ns"), self.status == Status.OK)

    def _between(self, begin: str, end: str) -> NDArray[np.int64]:
        span: NDArray[np.int64] = self.columns[end].copy() if isinstance(self.columns, dict) else self.columns[end]
        span -= self.columns[begin]
        return span


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All requests of a load, the warm-up's among them; times in ns on one clock, those intended rising.

    A request that was never answered has ``done_ns`` at the time it was given up.
    """

    intended_ns: NDArray[np.int64]
    sent_ns: NDArray[np.int64]
    done_ns: NDArray[np.int64]
    status: NDArray[np.int8]
    payload: NDArray[np.integer[Any]]

    def window(
        self, start_ns: int, end_ns: int, *, samples: tuple[tuple[int, int], ...] = (), **seen: Any
    ) -> Recording:
        """The part of the load that counts.

        Args:
            start_ns: where the window begins.
            end_ns: where it ends.
            samples: (time, requests in flight by the transport's count), at instants of chance.
            seen: `Recording`'s ``client_cpu``, ``steal``, ``throttled`` and ``first_error``.
        """
        columns = {
            name: np.concatenate([np.empty(0, COLUMNS[name]), *blocks])
            for name, blocks in self.inside(start_ns, end_ns)
        }
        return Recording(columns=columns, **self.counts(start_ns, end_ns, samples), **seen)

    def inside(self, start_ns: int, end_ns: int) -> Iterator[tuple[str, Iterator[NDArray[Any]]]]:
        """The columns of a window, each in blocks: the requests due in it, times from its start."""
        first, beyond = np.searchsorted(self.intended_ns, [start_ns, end_ns])
        for name, kind in COLUMNS.items():
            shift = start_ns if name.endswith("_ns") else 0
            yield name, (block.astype(kind) - kind(shift) for block in _blocks(getattr(self, name)[first:beyond]))

    def counts(self, start_ns: int, end_ns: int, samples: tuple[tuple[int, int], ...] = ()) -> dict[str, Any]:
        """What of a `Recording` is counted over the whole load; arguments as in `window`."""
        within = [(at, count) for at, count in samples if start_ns <= at < end_ns]
        answered, answered_share = self._answered(start_ns, end_ns)
        return {
            "window_s": (end_ns - start_ns) / NS_PER_S,
            "answered": answered,
            "answered_share": answered_share,
            "in_flight_start": self.in_flight(start_ns),
            "in_flight_end": self.in_flight(end_ns),
            "sampled": tuple(count for _, count in within),
            "recorded": tuple(self.in_flight(at) for at, _ in within),
        }

    def in_flight(self, at_ns: int) -> int:
        """Requests sent and not done at a time."""
        return sum(
            int(np.count_nonzero((status != Status.DROPPED) & (sent <= at_ns) & (done > at_ns)))
            for sent, done, status in self._rows()
        )

    def _answered(self, start_ns: int, end_ns: int) -> tuple[int, float]:
        """(whole answers in the window, answers counted by the share of their time in it).

        Whole answers would make a short window's throughput jump by one answer, or by one batch of them; in a
        closed loop at rest the share has the same mean and no such jumps.
        """
        answered, shares = 0, 0.0
        for every_sent, every_done, status in self._rows():
            ok = status == Status.OK
            sent, done = every_sent[ok], every_done[ok]
            answered += int(np.count_nonzero((done >= start_ns) & (done < end_ns)))
            overlap = np.minimum(done, end_ns) - np.maximum(sent, start_ns)
            shares += float((np.clip(overlap, 0, None) / np.maximum(done - sent, 1)).sum())
        return answered, shares

    def _rows(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]]:
        return zip(_blocks(self.sent_ns), _blocks(self.done_ns), _blocks(self.status), strict=True)


class StoredColumns(Mapping[str, NDArray[Any]]):
    """The columns of a stored window, each read anew when it is asked for, and held by nobody."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getitem__(self, name: str) -> NDArray[Any]:
        return load_arrays(self._path, names=(name,))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COLUMNS)

    def __len__(self) -> int:
        return len(COLUMNS)


def latency_ms(
    intended_ns: NDArray[np.int64], done_ns: NDArray[np.int64], status: NDArray[np.int8]
) -> NDArray[np.float64]:
    """Latency of every request, from its intended time, in ms.

    One that was not answered in time, was refused, or was never sent is a miss: its latency is infinite, since nobody
    knows how much longer than the timeout its answer would have taken.
    """
    return _to_ms(done_ns - intended_ns, status == Status.OK)


def save_arrays(path: Path, recording: Recording) -> None:
    """Writes the columns of a recording; see `save_columns`."""
    save_columns(path, ((name, [column]) for name, column in recording.columns.items()), recording.scheduled)


def save_columns(path: Path, columns: Iterable[tuple[str, Iterable[NDArray[Any]]]], count: int) -> None:
    """Writes the columns of a window, compressed; the file is complete or absent, whatever happens.

    It is an ``.npz`` file as numpy's ``load`` reads it, written in blocks.

    Args:
        path: of the file.
        columns: name and blocks of each of `COLUMNS`, as `Trace.inside` gives them.
        count: requests in the window.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, blocks in columns:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        described = np.dtype(COLUMNS[name]).str
                        header = {"descr": described, "fortran_order": False, "shape": (count,)}
                        np.lib.format.write_array_header_1_0(member, header)  # type: ignore[no-untyped-call]
                        for block in blocks:
                            member.write(block.tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_arrays(path: Path, sha256: str = "", *, names: Sequence[str] = tuple(COLUMNS)) -> dict[str, NDArray[Any]]:
    """The arrays that `save_columns` wrote, by name.

    Args:
        path: of the file.
        sha256: the SHA-256 (hex) that the file must have; empty where that is not known.
        names: which of `COLUMNS`.

    Raises:
        InputError: the file is missing or damaged, or is not the one of this digest.
    """
    try:
        with path.open("rb") as file:
            if sha256 and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise _unusable(path, "it is not the file that was written when the window was measured")
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unusable(path, str(error)) from error


def merge_parts(parts: Sequence[Path]) -> tuple[Iterator[tuple[str, Iterator[NDArray[Any]]]], int]:
    """The columns of windows that were recorded side by side as those of one window, and its number of requests.

    Requests stand in the order in which they were due. Times and statuses are put together, never percentiles.

    Raises:
        InputError: a part is missing or damaged.
    """
    stored = [StoredColumns(path) for path in parts]
    order = np.argsort(np.concatenate([one["intended_ns"] for one in stored]), kind="stable")
    return ((name, _blocks(np.concatenate([one[name] for one in stored])[order])) for name in COLUMNS), len(order)


def _to_ms(span_ns: NDArray[np.int64], known: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """The same in ms, where the span is known; elsewhere without end. The span's own memory is used again."""
    span_ms = span_ns.view(np.float64)
    np.divide(span_ns, NS_PER_MS, out=span_ms)
    if known is not None:
        span_ms[~known] = np.inf
    return span_ms


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (array[start : start + BLOCK] for start in range(0, len(array), BLOCK))


def _unusable(path: Path, reason: str) -> InputError:
    return InputError(
        f"the times of a measured window in {path} cannot be used: {reason}",
        hint="Restore the file, or remove the working folder to have everything measured anew.",
    )
