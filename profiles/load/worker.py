"""The load generator's own process: ``python -m profiles.load.worker [CPU ...]``, pinned to the CPUs given.

Jobs come as JSON lines on stdin, events go as JSON lines to stdout; arrays go to the path the job names. When stdin
closes, because the parent closed it or died, the process ends, whatever it is doing.

A job goes through these events: ``prepared`` (connected, and answered once), then the parent says when to begin (one
time for all workers, on the machine's monotonic clock), ``begin`` and ``end`` of the window, ``done``; or ``failed``.
"""

import asyncio
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from profiles.load.payloads import Payload
from profiles.load.priority import go_first
from profiles.load.recording import save_columns
from profiles.load.transports import Reply, Status, Transport, make_transport
from profiles.load.window import Kept, Offered, Window
from registry.codec import from_jsonable
from registry.errors import BurnishError, StorageError, UnreachableError
from registry.records import ClosedLoop, LoadProfile, OpenLoop, Replay, Target

FIRST_ANSWER_S = 30.0
CONNECT_S = 10.0


def main() -> None:
    """Serves jobs until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    if sys.argv[1:]:
        # Before any other thread is there: only threads started from now on inherit it.
        os.sched_setaffinity(0, map(int, sys.argv[1:]))
    # A client that waits for its CPU is late. It needs little of it, so that the server loses none where they share.
    go_first()  # where it is not permitted, the lateness gate judges all the same
    events = _events()
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    _say(events, {"event": "ready"})
    while True:
        job = json.loads(jobs.get())
        try:
            _say(events, {"event": "done", **asyncio.run(_serve(job, jobs, events))})
        except BurnishError as error:
            _say(events, {"event": "failed", "kind": error.kind, "message": error.message, "hint": error.hint})


def _events() -> TextIO:
    """The real stdout; whatever a library prints goes to stderr instead."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


def _say(events: TextIO, event: dict[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


def _read_jobs(jobs: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


async def _serve(job: dict[str, Any], jobs: "queue.SimpleQueue[str]", events: TextIO) -> dict[str, Any]:
    target = from_jsonable(Target, job["target"])
    profile = from_jsonable(LoadProfile, job["profile"])
    payloads = _read_payloads(job["payloads"])
    transport = make_transport(target, _connections(profile.load))
    witness = _Witness(events)
    try:
        await transport.open(CONNECT_S)
        first = await _first_answer(transport, payloads, target, max(FIRST_ANSWER_S, profile.timeout_s))
        window = Window(
            transport,
            payloads,
            profile,
            lane=job["lane"],
            lanes=job["lanes"],
            keep=job["keep"],
            on_begin=witness.begin,
            on_end=witness.end,
        )
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            _say(events, {"event": "prepared"})
            begin = json.loads(await asyncio.to_thread(jobs.get))
            offered = await window.run(begin["begin_ns"])
        finally:
            gc.enable()
            gc.unfreeze()
    finally:
        await transport.close()
    return _report(job, offered, (Kept(payload=0, reply=first), *offered.firsts), witness)


def _connections(load: ClosedLoop | OpenLoop | Replay) -> int:
    """Connections of gRPC: one a loop up to 16, eight for an open loop, so that none carries many streams."""
    return min(load.concurrency, 16) if isinstance(load, ClosedLoop) else 8


async def _first_answer(transport: Transport, payloads: tuple[Payload, ...], target: Target, timeout_s: float) -> Reply:
    """The first good answer on the wire.

    Raises:
        UnreachableError: with the server's own message.
    """
    reply = await transport.infer(payloads[0], timeout_s)
    if reply.status != Status.OK:
        raise UnreachableError(
            f"{target.protocol} request for model {target.model!r} at {target.url} failed: {reply.message}",
            hint="Check the address, the model's name, and that inputs have the model's names, shapes and types.",
        )
    return reply


class _Witness:
    """Sees what the client and the machine spent between the window's ends, and tells the parent of both."""

    def __init__(self, events: TextIO) -> None:
        self._events = events
        self.client_cpu = 0.0
        self.steal = 0.0
        self.throttled = 0
        self._at: tuple[int, int, tuple[int, int], int] | None = None

    def begin(self) -> None:
        self._at = (time.perf_counter_ns(), time.process_time_ns(), machine_ticks(), throttled_periods())
        _say(self._events, {"event": "begin"})

    def end(self) -> None:
        assert self._at is not None
        wall_ns, cpu_ns, (stolen, total), throttled = self._at
        self.client_cpu = (time.process_time_ns() - cpu_ns) / max(1, time.perf_counter_ns() - wall_ns)
        stolen_now, total_now = machine_ticks()
        self.steal = (stolen_now - stolen) / max(1, total_now - total)
        self.throttled = throttled_periods() - throttled
        _say(self._events, {"event": "end"})


def machine_ticks() -> tuple[int, int]:
    """(stolen, all) clock ticks of the machine's CPUs so far, from /proc/stat; zeros where there is none."""
    try:
        with Path("/proc/stat").open(encoding="ascii") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return 0, 0
    return ticks[7], sum(ticks)


def throttled_periods(root: Path = Path("/sys/fs/cgroup")) -> int:
    """In how many periods so far the CPU limit of this process's control group held it up; 0 where there is none.

    Args:
        root: where control groups are mounted: those of version 2, or of version 1 with its ``cpu`` controller.
    """
    for path in (root / "cpu.stat", root / "cpu,cpuacct" / "cpu.stat", root / "cpu" / "cpu.stat"):
        try:
            stat = dict(line.split()[:2] for line in path.read_text(encoding="ascii").splitlines())
            return int(stat["nr_throttled"])
        except (OSError, ValueError, KeyError):
            continue
    return 0


def _read_payloads(job: dict[str, Any]) -> tuple[Payload, ...]:
    content = Path(job["path"]).read_bytes()
    return tuple(
        Payload(body=content[start : start + size], headers=headers) for start, size, headers in job["entries"]
    )


def _report(job: dict[str, Any], offered: Offered, firsts: tuple[Kept, ...], witness: _Witness) -> dict[str, Any]:
    trace, window = offered.trace, (offered.start_ns, offered.end_ns)
    first, beyond = np.searchsorted(trace.intended_ns, window)
    try:
        save_columns(Path(job["raw"]), trace.inside(*window), int(beyond - first))
        replies = _write_replies(Path(job["replies"]), (*offered.kept, *firsts))
    except OSError as error:
        raise StorageError(
            f"the times of a window could not be written to {job['raw']}: {error.strerror}",
            hint="Check free space and permissions of the folder.",
        ) from error
    return {
        "replies": replies[: len(offered.kept)],
        "firsts": replies[len(offered.kept) :],
        "recording": {
            **trace.counts(*window, offered.samples),
            "client_cpu": witness.client_cpu,
            "steal": witness.steal,
            "throttled": witness.throttled,
            "first_error": offered.first_error,
        },
    }


def _write_replies(path: Path, kept: tuple[Kept, ...]) -> list[list[Any]]:
    """Writes the kept replies one after the other; returns (payload, start, size, headers) of each."""
    entries: list[list[Any]] = []
    start = 0
    with path.open("wb") as file:
        for one in kept:
            file.write(one.reply.body)
            entries.append([one.payload, start, len(one.reply.body), dict(one.reply.headers)])
            start += len(one.reply.body)
    return entries


if __name__ == "__main__":
    main()
