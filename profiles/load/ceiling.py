"""What the load generator can offer at most here, found once against a server that does nothing, and remembered.

MLPerf and perf_analyzer take the client's word for it; a client of one Python process is soon what was measured, so
every window is held against its ceiling (`profiles.load.gates.ceiling`).
"""

import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Payload, encoding_of
from registry.codec import digest
from registry.errors import UnreachableError
from registry.records import ClosedLoop, LoadProfile, Target

logger = logging.getLogger(__name__)

FILE = "ceilings.json"
# Enough to keep the client's core busy, over connections that each carry few streams.
CONCURRENCY = 16
WARMUP_S, WINDOW_S = 0.2, 0.4
TRIES = 2
START_S = 30.0
DOUBT_S = 30.0
# Counted up where the generator or the null server come to do much more, or less.
MEASURED_BY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The most that was seen, and on which day (UTC)."""

    rate_rps: float
    date: str


class Ceilings:
    """The generator's ceiling for each protocol, encoding and size of request, kept in a file.

    What was measured while the machine was busy is too low. So it is measured again where it would spoil a window, and
    the highest that was ever seen counts: whatever else the machine does only lowers what the client has.

    Args:
        folder: where `FILE` is kept. It may be shared: what was measured under other conditions has another key.
        server_cpus: the CPUs that the null server is pinned to, those of the server under test; empty for all.
        host: fingerprint of the machine and of how its CPUs are shared.
    """

    def __init__(self, folder: Path, server_cpus: Sequence[int], host: str) -> None:
        self._file = folder / FILE
        self._cpus = server_cpus
        self._host = host
        self._known = _read(self._file)
        self._taken_s: dict[str, float] = {}

    def __call__(
        self, generator: LoadGenerator, target: Target, payloads: tuple[Payload, ...], *, doubted: bool = False
    ) -> float | None:
        """Requests a second of windows like this one; measured where they are not known. None where that fails.

        Args:
            generator: whose ceiling it is.
            target: says protocol and encoding.
            payloads: say how large requests are.
            doubted: whether a window was found to be too near to it: then it is measured again, at most once in
                `DOUBT_S`.
        """
        key = digest([MEASURED_BY, self._host, generator.workers, encoding_of(target), size_class(payloads)])
        known = self._known.get(key)
        again = doubted and time.monotonic() - self._taken_s.get(key, -math.inf) >= DOUBT_S
        if known is not None and not again:
            return known.rate_rps
        try:
            found = Ceiling(rate_rps=self._measure(generator, target, payloads), date=_today())
        except UnreachableError as error:
            logger.warning("the load generator's ceiling could not be measured: %s", error.message)
            return None if known is None else known.rate_rps
        self._taken_s[key] = time.monotonic()
        if known is None or found.rate_rps > known.rate_rps:
            # Another process may have seen more of it, and of others.
            self._known = {**self._known, **_read(self._file)}
            self._known[key] = max(found, self._known.get(key, found), key=lambda one: one.rate_rps)
            self._remember()
        return self._known[key].rate_rps

    def _remember(self) -> None:
        temporary = self._file.with_name(f".{FILE}.{os.getpid()}.tmp")
        try:
            known = {key: asdict(ceiling) for key, ceiling in self._known.items()}
            temporary.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
            temporary.replace(self._file)
        except OSError as error:
            logger.warning("the load generator's ceiling cannot be kept in %s: %s", self._file, error.strerror)

    def _measure(self, generator: LoadGenerator, target: Target, payloads: tuple[Payload, ...]) -> float:
        raw = self._file.with_suffix(".npz")
        load = ClosedLoop(concurrency=CONCURRENCY)
        profile = LoadProfile(name="ceiling", load=load, warmup_s=WARMUP_S, duration_s=WINDOW_S)
        try:
            with null_server(self._cpus) as ports:
                null = Target(url=ports[target.protocol], protocol=target.protocol, model="null", binary=target.binary)
                tries = [
                    generator.run(null, payloads, profile, raw_path=raw, against_ceiling=False) for _ in range(TRIES)
                ]
        finally:
            raw.unlink(missing_ok=True)
        return max(record.metrics["throughput_rps"] for record in tries)


def size_class(payloads: Sequence[Payload]) -> int:
    """The largest request's size in powers of two, rounded up."""
    return max(len(payload.body) for payload in payloads).bit_length()


@contextmanager
def null_server(cpus: Sequence[int] = ()) -> Iterator[dict[str, str]]:
    """A null server in a process of its own: protocol -> ``host:port``.

    Args:
        cpus: it is pinned to these; empty for all.

    Raises:
        UnreachableError: it did not start.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "profiles.load.null_server", *map(str, cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        too_late = threading.Timer(START_S, process.kill)
        too_late.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            too_late.cancel()
            if not line:
                raise UnreachableError("the null server did not start")
            rest, grpc = json.loads(line)
            yield {"rest": f"127.0.0.1:{rest}", "grpc": f"127.0.0.1:{grpc}"}
        finally:
            too_late.cancel()
            process.kill()


def _read(file: Path) -> dict[str, Ceiling]:
    """What is remembered; nothing where there is none, or where it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): Ceiling(rate_rps=float(one["rate_rps"]), date=str(one["date"])) for key, one in found.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
