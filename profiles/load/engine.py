"""The load generator as the rest of burnish sees it: child processes that offer windows of load."""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from profiles.deploy.cluster import Usage
from profiles.load.answerer import answerer_of, find_stranger
from profiles.load.payloads import Expected, Likeness, Payload, count_wrong, decode_outputs
from profiles.load.recording import Recording, StoredColumns, merge_parts, save_columns
from profiles.load.summary import summarize
from registry.codec import file_sha256, to_jsonable
from registry.errors import BurnishError, GeneratorLostError, InputError, StorageError, UnreachableError
from registry.records import ClosedLoop, LoadProfile, RunRecord, Target

logger = logging.getLogger(__name__)

START_S = 30.0
# Connecting, the first answer, writing the arrays: all that a window needs beside itself.
BESIDE_WINDOW_S = 60.0
# Between the word to begin and the first request, so that it reaches every process in time.
LEAD_NS = 20_000_000
REPLIES_KEPT = 64
PAYLOADS = "payloads.bin"
# Of what a process tells that it could not go on for; whatever else it is, is the server's.
_FAILURES: dict[str, type[BurnishError]] = {error.kind: error for error in (StorageError, InputError)}


class CeilingOf(Protocol):
    """Says what a generator can offer at most; `profiles.load.ceiling.Ceilings` is one."""

    def __call__(
        self, generator: "LoadGenerator", target: Target, payloads: tuple[Payload, ...], *, doubted: bool = False
    ) -> float | None:
        """Requests a second of windows like this one, measured anew where they are doubted; None where unknown."""


class LoadGenerator:
    """Offers windows of load from processes of its own, so that no work of ours disturbs the timing.

    Used as a context manager; the processes end with it, and also when this process dies.

    Args:
        cpus: the CPUs that the processes are pinned to, or None for all that this one may use.
        work: folder for their logs and for payloads on their way to them; one generator uses it at a time.
        workers: how many processes share the load. One event loop uses one core, so that more only help where the
            client has more cores. Each gets a CPU of its own, in turn, where there are several.
        ceiling: gives the requests a second that this generator has of a server that does nothing, for a window like
            this one; None not to ask.
    """

    def __init__(
        self,
        cpus: Sequence[int] | None,
        work: Path,
        *,
        workers: int = 1,
        ceiling: CeilingOf | None = None,
    ) -> None:
        cpus = sorted(cpus or ())
        self._work = work
        self._ceiling = ceiling
        self._workers = [
            _Worker(
                cpus if workers == 1 else cpus[lane % len(cpus) :][:1] if cpus else (), work / f"generator-{lane}.log"
            )
            for lane in range(workers)
        ]
        self._handed: tuple[tuple[Payload, ...], dict[str, Any]] | None = None

    @property
    def workers(self) -> int:
        """How many processes share the load."""
        return len(self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """Ids of the processes that run now."""
        return tuple(pid for worker in self._workers if (pid := worker.pid) is not None)

    def __enter__(self) -> Self:
        self._work.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        for passing in (self._work / PAYLOADS, *self._work.glob("lane-*.*")):
            passing.unlink(missing_ok=True)

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
        against_ceiling: bool = True,
    ) -> RunRecord:
        """Offers one window of load and returns what came of it; takes a bounded time.

        A window in which another model answered than the one asked, or two versions of it, is invalid: the first reply
        of each connection says who it was, and so do replies sampled under load.

        Several processes offer shares of one schedule; their times are put together as if one had sent them all.

        Args:
            target: any V2 endpoint.
            payloads: encoded for it.
            profile: what to offer.
            raw_path: where the arrays are written, whole or not at all.
            raw_root: the record names ``raw_path`` relative to it; None for its name alone.
            usage: read at both ends of the window, for ``cpu_s_per_1k`` and ``rss_mb``; these are left out where it
                gives None. A server that is another one at the end makes the window invalid.
            expected: the reference's answers; replies sampled under load are compared with them after the window.
                Without them, they still have to be replies of V2.
            against_ceiling: whether a rate near to what this generator can offer at most makes the window invalid.

        Raises:
            UnreachableError: the first request failed (with the server's message), or the server or the generator's
                process stopped answering.
            ServerDiedError: ``usage`` found the server dead.
            GeneratorLostError: the generator's process ended, and so did the one that took its place.
            StorageError: payloads or arrays could not be written.
        """
        ceiling = self._ceiling if against_ceiling else None
        ceiling_rps = None if ceiling is None else ceiling(self, target, payloads)
        shares = _shares(profile, len(self._workers))
        try:
            answers, marks = self._perform(target, payloads, shares, raw_path=raw_path, usage=usage)
        except GeneratorLostError as error:
            logger.warning("%s; the window is offered once more, by a new one", error.message)
            answers, marks = self._perform(target, payloads, shares, raw_path=raw_path, usage=usage)
        if len(shares) > 1:
            self._merge(raw_path, len(shares))
        recording = Recording(columns=StoredColumns(raw_path), **_added([answer["recording"] for answer in answers]))
        if recording.first_error:
            logger.info("%s: a request failed: %s", profile.name, recording.first_error)
        checked, wrong, stranger = self._look(answers, target, expected)
        raw = raw_path.name if raw_root is None else raw_path.relative_to(raw_root).as_posix()
        reduced = partial(
            summarize,
            recording,
            profile,
            raw=raw,
            raw_sha256=file_sha256(raw_path),
            usage=_spent(marks),
            checked=checked,
            wrong=wrong,
            stranger=stranger,
            instances=_instances(marks),
        )
        record = reduced(ceiling_rps=ceiling_rps)
        if ceiling is not None and any(finding.gate == "ceiling" for finding in record.findings):
            # It may have been measured while the machine was busy.
            higher_rps = ceiling(self, target, payloads, doubted=True)
            return record if higher_rps == ceiling_rps else reduced(ceiling_rps=higher_rps)
        return record

    def close(self) -> None:
        """Ends the processes; the next `run` starts others."""
        for worker in self._workers:
            worker.close()

    # --- one window ---

    def _perform(
        self,
        target: Target,
        payloads: tuple[Payload, ...],
        shares: Sequence[LoadProfile],
        *,
        raw_path: Path,
        usage: Callable[[], Usage | None] | None,
    ) -> tuple[list[dict[str, Any]], list[Usage | None]]:
        """Has every process offer its share; returns their answers, and the server's usage at both ends."""
        workers = self._workers[: len(shares)]
        window_s = shares[0].warmup_s + shares[0].duration_s + 2 * shares[0].timeout_s
        deadline = time.monotonic() + window_s + BESIDE_WINDOW_S

        def await_all(name: str) -> list[dict[str, Any]]:
            return [worker.await_event(name, deadline) for worker in workers]

        try:
            handed = self._hand_over(payloads)
            for lane, (worker, share) in enumerate(zip(workers, shares, strict=True)):
                worker.send(
                    {
                        "target": to_jsonable(target),
                        "profile": to_jsonable(share),
                        "payloads": handed,
                        "raw": str(raw_path if len(shares) == 1 else self._part(lane)),
                        "replies": str(self._replies(lane)),
                        "keep": max(1, REPLIES_KEPT // len(shares)),
                        "lane": lane,
                        "lanes": len(shares),
                    }
                )
            await_all("prepared")
            begin_ns = time.perf_counter_ns() + LEAD_NS
            for worker in workers:
                worker.send({"begin_ns": begin_ns})
            marks: list[Usage | None] = []
            for name in ("begin", "end"):
                await_all(name)
                if usage is not None:
                    marks.append(usage())
            return await_all("done"), marks
        except BaseException as error:
            # Whatever broke, the processes are in the middle of something: the next window gets new ones.
            self.close()
            if usage is not None and isinstance(error, UnreachableError) and not isinstance(error, GeneratorLostError):
                usage()  # raises where the server died, which says more
            raise

    def _merge(self, raw_path: Path, lanes: int) -> None:
        parts = [self._part(lane) for lane in range(lanes)]
        try:
            columns, count = merge_parts(parts)
            save_columns(raw_path, columns, count)
        except OSError as error:
            raise StorageError(
                f"the times of a window could not be written to {raw_path}: {error.strerror}",
                hint="Check free space and permissions of the folder.",
            ) from error
        for part in parts:
            part.unlink()

    def _look(
        self, answers: Sequence[dict[str, Any]], target: Target, expected: Expected | None
    ) -> tuple[int, int, str | None]:
        """(replies compared, those that a broken server gave, what is wrong with who answered)."""
        answerers, found = set(), []
        for lane, answer in enumerate(answers):
            content = self._replies(lane).read_bytes()
            self._replies(lane).unlink()
            for payload, start, size, headers in answer["replies"]:
                body = content[start : start + size]
                answerers.add(answerer_of(body, headers, target))
                found.append((payload, _liken(payload, body, headers, target, expected)))
            for _, start, size, headers in answer["firsts"]:
                answerers.add(answerer_of(content[start : start + size], headers, target))
        return len(found), count_wrong(found), find_stranger(answerers, target)

    def _part(self, lane: int) -> Path:
        return self._work / f"lane-{lane}.npz"

    def _replies(self, lane: int) -> Path:
        return self._work / f"lane-{lane}.replies"

    def _hand_over(self, payloads: tuple[Payload, ...]) -> dict[str, Any]:
        """The payloads in a file that the processes read; written anew only for another set."""
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


class _Worker:
    """One process of the generator, started when it is first needed.

    Args:
        cpus: it is pinned to these; empty for all that this process may use.
        log: what it says besides its events.
    """

    def __init__(self, cpus: Sequence[int], log: Path) -> None:
        self._cpus = cpus
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    @property
    def pid(self) -> int | None:
        """The process's id, or None where none runs."""
        return None if self._process is None else self._process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Gives it one line of work; see `profiles.load.worker`."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._lost() from error

    def start(self) -> "subprocess.Popen[str]":
        """Starts the process anew and returns when it is ready."""
        self.close()
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        with self._log.open("ab") as log:
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
        return self._process

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def await_event(self, name: str, deadline: float) -> dict[str, Any]:
        """The event of this name.

        Raises:
            UnreachableError: the server failed, or the event did not come in time.
            StorageError: the process could not write what it should.
            InputError: the target has headers that are none.
            GeneratorLostError: the process has ended.
        """
        while (event := self._next_event(deadline))["event"] != name:
            if event["event"] == "failed":
                raise _FAILURES.get(event["kind"], UnreachableError)(event["message"], hint=event["hint"])
        return event

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
        log = self._log
        tail = log.read_bytes()[-2000:].decode(errors="replace") if log.exists() else ""
        return GeneratorLostError(f"the load generator's process ended unasked:\n{tail}", hint=f"Its log is {log}.")


def _forward(stdout: Any, events: "queue.SimpleQueue[str | None]") -> None:
    try:
        for line in stdout:
            events.put(line)
    except ValueError:
        pass  # closed while it was read
    events.put(None)


def _shares(profile: LoadProfile, workers: int) -> list[LoadProfile]:
    """The profile of each process that takes part: its share of what is outstanding."""
    load = profile.load
    most = load.concurrency if isinstance(load, ClosedLoop) else profile.max_in_flight
    lanes = max(1, min(workers, most))
    each = [most // lanes + (lane < most % lanes) for lane in range(lanes)]
    if isinstance(load, ClosedLoop):
        return [replace(profile, load=replace(load, concurrency=share)) for share in each]
    return [replace(profile, max_in_flight=share) for share in each]


def _added(recordings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several processes counted, as one; where they saw the same machine, what the one saw that saw most."""
    sums = ("answered", "answered_share", "in_flight_start", "in_flight_end")
    mosts = ("window_s", "client_cpu", "steal", "throttled")
    return {
        **{name: sum(one[name] for one in recordings) for name in sums},
        **{name: max(one[name] for one in recordings) for name in mosts},
        # Each process counted at instants of its own: pairs stay pairs.
        **{name: tuple(n for one in recordings for n in one[name]) for name in ("sampled", "recorded")},
        "first_error": next((one["first_error"] for one in recordings if one["first_error"]), ""),
    }


def _spent(marks: Sequence[Usage | None]) -> tuple[float, float] | None:
    """(CPU seconds, resident MB) of the server in the window, from its usage at both ends; None where unknown."""
    begin, end = marks if len(marks) == 2 else (None, None)
    if begin is None or end is None or begin.cpu_s is None or end.cpu_s is None or end.rss_mb is None:
        return None
    return end.cpu_s - begin.cpu_s, end.rss_mb


def _instances(marks: Sequence[Usage | None]) -> tuple[str, str] | None:
    """Which server it was at both ends; None where that is not known."""
    begin, end = marks if len(marks) == 2 else (None, None)
    return None if begin is None or end is None else (_life(begin), _life(end))


def _life(usage: Usage) -> str:
    """What tells this life of a server from the next: a worker that it started anew makes it another, too."""
    return usage.instance or (f"processes {', '.join(map(str, sorted(usage.pids)))}" if usage.pids else "")


def _liken(payload: int, body: bytes, headers: dict[str, str], target: Target, expected: Expected | None) -> Likeness:
    """How a reply stands to the reference's; without one, all that are replies of V2 are right."""
    try:
        outputs = decode_outputs(body, headers, target)
        return "same" if expected is None else expected.compare(payload, outputs)
    except UnreachableError:
        return "wrong"
