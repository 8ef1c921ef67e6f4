"""The load generator as the rest of burnish sees it: a child process that offers windows of load."""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from profiles.deploy.cluster import Usage
from profiles.load.answerer import answerer_of, find_stranger
from profiles.load.payloads import Expected, Likeness, Payload, count_wrong, decode_outputs
from profiles.load.recording import Recording, load_arrays
from profiles.load.summary import summarize
from registry.codec import file_sha256, to_jsonable
from registry.errors import BurnishError, GeneratorLostError, StorageError, UnreachableError
from registry.records import LoadProfile, RunRecord, Target

logger = logging.getLogger(__name__)

START_S = 30.0
# Connecting, the first answer, writing the arrays: all that a window needs beside itself.
BESIDE_WINDOW_S = 60.0
REPLIES_KEPT = 64
PAYLOADS, REPLIES = "payloads.bin", "replies.bin"


class LoadGenerator:
    """Offers windows of load from a process of its own, so that no work of ours disturbs the timing.

    Used as a context manager; the process ends with it, and also when this process dies.

    Args:
        cpus: the CPUs the process is pinned to, or None for all that this one may use.
        work: folder for its log and for payloads on their way to it; one generator uses it at a time.
    """

    def __init__(self, cpus: Sequence[int] | None, work: Path) -> None:
        self._cpus = sorted(cpus or ())
        self._work = work
        self._process: subprocess.Popen[str] | None = None
        self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._handed: tuple[tuple[Payload, ...], dict[str, Any]] | None = None

    def __enter__(self) -> Self:
        self._work.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        for passing in (PAYLOADS, REPLIES):
            (self._work / passing).unlink(missing_ok=True)

    def run(
        self,
        target: Target,
        payloads: tuple[Payload, ...],
        profile: LoadProfile,
        *,
        raw_path: Path,
        raw_root: Path | None = None,
        usage: Callable[[], Usage | None] | None = None,
        expected: Expected | None = None,
    ) -> RunRecord:
        """Offers one window of load and returns what came of it; takes a bounded time.

        A window in which another model answered than the one asked, or two versions of it, is invalid: the first reply
        of each connection says who it was, and so do replies sampled under load.

        Args:
            target: any V2 endpoint.
            payloads: encoded for it.
            profile: what to offer.
            raw_path: where the arrays are written, whole or not at all.
            raw_root: the record names ``raw_path`` relative to it; None for its name alone.
            usage: read at both ends of the window, for ``cpu_s_per_1k`` and ``rss_mb``; these are left out where it
                gives None.
            expected: the reference's answers; replies sampled under load are compared with them after the window.

        Raises:
            UnreachableError: the first request failed (with the server's message), or the server or the generator's
                process stopped answering.
            ServerDiedError: ``usage`` found the server dead.
            GeneratorLostError: the generator's process ended, and so did the one that took its place.
            StorageError: payloads or arrays could not be written.
        """
        replies = self._work / REPLIES
        job = {
            "target": to_jsonable(target),
            "profile": to_jsonable(profile),
            "payloads": self._hand_over(payloads),
            "raw": str(raw_path),
            "replies": str(replies),
            "keep": REPLIES_KEPT,
        }
        try:
            answer, spent = self._perform(job, profile, usage)
        except GeneratorLostError as error:
            logger.warning("%s; the window is offered once more, by a new one", error.message)
            answer, spent = self._perform(job, profile, usage)
        arrays = load_arrays(raw_path)
        recording = Recording(**arrays, **_tuples(answer["recording"]))  # type: ignore[arg-type]
        if recording.first_error:
            logger.info("%s: a request failed: %s", profile.name, recording.first_error)
        content = replies.read_bytes()
        replies.unlink()
        checked, wrong = _check(answer["replies"], content, target, expected)
        stranger = _stranger([*answer["firsts"], *answer["replies"]], content, target)
        raw = raw_path.name if raw_root is None else raw_path.relative_to(raw_root).as_posix()
        sha256 = file_sha256(raw_path)
        return summarize(
            recording,
            profile,
            raw=raw,
            raw_sha256=sha256,
            usage=spent,
            checked=checked,
            wrong=wrong,
            stranger=stranger,
        )

    def close(self) -> None:
        """Ends the process; the next `run` starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    # --- the process ---

    def _perform(
        self, job: dict[str, Any], profile: LoadProfile, usage: Callable[[], Usage | None] | None
    ) -> tuple[dict[str, Any], tuple[float, float] | None]:
        """Sends the job and reads its events; returns the answer, and (CPU seconds, resident MB) of the server."""
        try:
            return self._converse(job, profile, usage)
        except BaseException:
            # Whatever broke, the process is in the middle of something: the next window gets a new one.
            self.close()
            raise

    def _converse(
        self, job: dict[str, Any], profile: LoadProfile, usage: Callable[[], Usage | None] | None
    ) -> tuple[dict[str, Any], tuple[float, float] | None]:
        self._send(job)
        deadline = time.monotonic() + profile.warmup_s + profile.duration_s + 2 * profile.timeout_s + BESIDE_WINDOW_S
        marks: list[Usage | None] = []
        while True:
            event = self._next_event(deadline)
            if event["event"] in {"begin", "end"} and usage is not None:
                marks.append(usage())
            elif event["event"] == "failed":
                if usage is not None:
                    usage()  # raises where the server died, which says more
                kind = StorageError if event["kind"] == StorageError.kind else UnreachableError
                raise kind(event["message"], hint=event["hint"])
            elif event["event"] == "done":
                return event, _spent(marks)

    def _send(self, job: dict[str, Any]) -> None:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._lost() from error

    def _start(self) -> None:
        self.close()
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        with (self._work / "generator.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "profiles.load.worker", *map(str, self._cpus)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        # A queue of its own, so that nothing of an earlier process is taken for this one's.
        self._events = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._events), daemon=True).start()
        self._next_event(time.monotonic() + START_S, late=GeneratorLostError)

    def _next_event(self, deadline: float, late: type[UnreachableError] = UnreachableError) -> dict[str, Any]:
        """The next event; where it does not come in time, the error ``late``."""
        try:
            line = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            # Within a window the server may be the one that brought the machine to a stand.
            raise late("the load generator did not answer in time", hint="Is the machine overloaded?") from None
        if line is None:
            raise self._lost()
        event: dict[str, Any] = json.loads(line)
        return event

    def _lost(self) -> BurnishError:
        log = self._work / "generator.log"
        tail = log.read_bytes()[-2000:].decode(errors="replace") if log.exists() else ""
        return GeneratorLostError(f"the load generator's process ended unasked:\n{tail}", hint=f"Its log is {log}.")

    def _hand_over(self, payloads: tuple[Payload, ...]) -> dict[str, Any]:
        """The payloads in a file that the process reads; written anew only for another set."""
        if self._handed is not None and self._handed[0] is payloads:
            return self._handed[1]
        path = self._work / PAYLOADS
        try:
            path.write_bytes(b"".join(payload.body for payload in payloads))
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}", hint="Check free space there.") from error
        entries, start = [], 0
        for payload in payloads:
            entries.append([start, len(payload.body), dict(payload.headers)])
            start += len(payload.body)
        self._handed = (payloads, {"path": str(path), "entries": entries})
        return self._handed[1]


def _forward(stdout: Any, events: "queue.SimpleQueue[str | None]") -> None:
    try:
        for line in stdout:
            events.put(line)
    except ValueError:
        pass  # closed while it was read
    events.put(None)


def _spent(marks: list[Usage | None]) -> tuple[float, float] | None:
    """(CPU seconds, resident MB) of the server in the window, from its usage at both ends; None where unknown."""
    begin, end = marks if len(marks) == 2 else (None, None)
    return None if begin is None or end is None else (end.cpu_s - begin.cpu_s, end.rss_mb)


def _tuples(scalars: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in scalars.items()}


def _stranger(entries: list[list[Any]], content: bytes, target: Target) -> str | None:
    """What is wrong where a reply was not made by the model that was asked."""
    answerers = {answerer_of(content[start : start + size], headers, target) for _, start, size, headers in entries}
    return find_stranger(answerers, target)


def _check(entries: list[list[Any]], content: bytes, target: Target, expected: Expected | None) -> tuple[int, int]:
    """(replies compared, those that a broken server gave); one that cannot be decoded is wrong."""
    if expected is None:
        return 0, 0
    found: list[tuple[int, Likeness]] = []
    for payload, start, size, headers in entries:
        try:
            answer = decode_outputs(content[start : start + size], headers, target)
            found.append((payload, expected.compare(payload, answer)))
        except UnreachableError:
            found.append((payload, "wrong"))
    return len(entries), count_wrong(found)
