"""What a window of load leaves behind: the time of every request, and what the client saw of itself."""

import hashlib
import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from profiles.load.transports import Status
from registry.errors import InputError

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One window, one entry a request that was due (closed loop: sent) in it.

    Attributes:
        intended_ns: when each was due, int64, from the window's start.
        sent_ns: when it was sent; of a dropped one, when it was due.
        done_ns: when its fate was known.
        status: int8, see `Status`.
        payload: int32, which payload it carried.
        window_s: length of the window.
        answered: answers without error that came inside the window, whenever their requests were sent.
        answered_share: the same, each request counted by the share of its own time that lies in the window.
        in_flight_start: requests in flight when the window began.
        in_flight_end: requests in flight when it ended.
        sampled: in flight at instants of chance, as the transport counts.
        recorded: in flight at the same instants, by the recorded times.
        client_cpu: CPU time of the client over the window, as a share of one core.
        steal: share of the machine's CPU time that the hypervisor took away.
        first_error: what the server said to the first request that failed, or empty.
    """

    intended_ns: NDArray[np.int64]
    sent_ns: NDArray[np.int64]
    done_ns: NDArray[np.int64]
    status: NDArray[np.int8]
    payload: NDArray[np.int32]
    window_s: float
    answered: int
    answered_share: float
    in_flight_start: int
    in_flight_end: int
    sampled: tuple[int, ...] = ()
    recorded: tuple[int, ...] = ()
    client_cpu: float = 0.0
    steal: float = 0.0
    first_error: str = ""

    @property
    def scheduled(self) -> int:
        """Requests that were due in the window."""
        return len(self.intended_ns)

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
        counts = {status.name.lower(): int(np.count_nonzero(self.status == status)) for status in Status if status}
        return {name: count for name, count in counts.items() if count}

    @property
    def lateness_ms(self) -> NDArray[np.float64]:
        """(sent - intended) of those that were sent."""
        sent = self.status != Status.DROPPED
        lateness: NDArray[np.float64] = (self.sent_ns - self.intended_ns)[sent] / NS_PER_MS
        return lateness

    @property
    def service_ms(self) -> NDArray[np.float64]:
        """(done - sent) of those that were answered."""
        ok = self.status == Status.OK
        service: NDArray[np.float64] = (self.done_ns - self.sent_ns)[ok] / NS_PER_MS
        return service

    def latency_ms(self, timeout_s: float) -> NDArray[np.float64]:
        """Latency of every request due, from its intended time, in ms; one that failed counts at least the timeout."""
        return latency_ms(self.intended_ns, self.done_ns, self.status, timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All requests of a load, the warm-up's among them; times in ns on one clock.

    A request that was never answered has ``done_ns`` at the time it was given up.
    """

    intended_ns: NDArray[np.int64]
    sent_ns: NDArray[np.int64]
    done_ns: NDArray[np.int64]
    status: NDArray[np.int8]
    payload: NDArray[np.int32]

    def window(
        self, start_ns: int, end_ns: int, *, samples: tuple[tuple[int, int], ...] = (), **seen: float | str
    ) -> Recording:
        """The part of the load that counts.

        Args:
            start_ns: where the window begins.
            end_ns: where it ends.
            samples: (time, requests in flight by the transport's count), at instants of chance.
            seen: `Recording`'s ``client_cpu``, ``steal`` and ``first_error``.
        """
        inside = (self.intended_ns >= start_ns) & (self.intended_ns < end_ns)
        ok = self.status == Status.OK
        answered = ok & (self.done_ns >= start_ns) & (self.done_ns < end_ns)
        within = [(at, count) for at, count in samples if start_ns <= at < end_ns]
        return Recording(
            intended_ns=self.intended_ns[inside] - start_ns,
            sent_ns=self.sent_ns[inside] - start_ns,
            done_ns=self.done_ns[inside] - start_ns,
            status=self.status[inside],
            payload=self.payload[inside],
            window_s=(end_ns - start_ns) / NS_PER_S,
            answered=int(np.count_nonzero(answered)),
            answered_share=self._answered_share(start_ns, end_ns),
            in_flight_start=self.in_flight(start_ns),
            in_flight_end=self.in_flight(end_ns),
            sampled=tuple(count for _, count in within),
            recorded=tuple(self.in_flight(at) for at, _ in within),
            **seen,  # type: ignore[arg-type]
        )

    def in_flight(self, at_ns: int) -> int:
        """Requests sent and not done at a time."""
        sent = (self.status != Status.DROPPED) & (self.sent_ns <= at_ns) & (self.done_ns > at_ns)
        return int(np.count_nonzero(sent))

    def _answered_share(self, start_ns: int, end_ns: int) -> float:
        """Answers counted by the share of their time in the window.

        Whole answers would make a short window's throughput jump by one answer, or by one batch of them; in a
        closed loop at rest this has the same mean and no such jumps.
        """
        ok = self.status == Status.OK
        sent, done = self.sent_ns[ok], self.done_ns[ok]
        overlap = np.minimum(done, end_ns) - np.maximum(sent, start_ns)
        return float((np.clip(overlap, 0, None) / np.maximum(done - sent, 1)).sum())


def latency_ms(
    intended_ns: NDArray[np.int64], done_ns: NDArray[np.int64], status: NDArray[np.int8], timeout_s: float
) -> NDArray[np.float64]:
    """Latency of every request, from its intended time, in ms; one that failed counts at least the timeout."""
    latency = (done_ns - intended_ns) / NS_PER_MS
    missed = np.maximum(latency, timeout_s * 1000)
    return np.where(status == Status.OK, latency, missed)


def save_arrays(path: Path, recording: Recording) -> None:
    """Writes the arrays of a recording, compressed; the file is complete or absent, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                intended_ns=recording.intended_ns,
                sent_ns=recording.sent_ns,
                done_ns=recording.done_ns,
                status=recording.status,
                payload=recording.payload,
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_arrays(path: Path, sha256: str = "") -> dict[str, NDArray[np.int64]]:
    """The arrays that `save_arrays` wrote: ``intended_ns``, ``sent_ns``, ``done_ns``, ``status``, ``payload``.

    Args:
        path: of the file.
        sha256: the SHA-256 (hex) that the file must have; empty where that is not known.

    Raises:
        InputError: the file is missing or damaged, or is not the one of this digest.
    """
    try:
        content = path.read_bytes()
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise _unusable(path, "it is not the file that was written when the window was measured")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unusable(path, str(error)) from error


def _unusable(path: Path, reason: str) -> InputError:
    return InputError(
        f"the times of a measured window in {path} cannot be used: {reason}",
        hint="Restore the file, or remove the working folder to have everything measured anew.",
    )
