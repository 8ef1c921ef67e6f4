"""One load, from its warm-up to its last answer, on the event loop of this process.

Open loop: every arrival has an absolute due time, is sent then whatever came back so far, and its latency counts
from then. Closed loop: a fixed number of requests is outstanding. Both warm up by the same load that follows.
"""

import asyncio
import contextlib
import itertools
import math
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from profiles.load.alarm import Alarm
from profiles.load.arrivals import schedule_blocks
from profiles.load.payloads import Payload
from profiles.load.recording import NS_PER_S, Trace
from profiles.load.transports import Reply, Status, Transport, with_limit
from registry.errors import UnreachableError
from registry.records import ClosedLoop, LoadProfile, OpenLoop, Replay

# A connection that is refused fails in microseconds; without a pause a closed loop would spin on it.
RETRY_PAUSE_S = 0.02
HOPELESS_ERRORS = 50
HOPELESS_S = 1.0
# A client that is behind its schedule must still read its answers.
SENDS_WITHOUT_READING = 8
# Each wakes the client, which costs as much as a request does.
SAMPLES_A_WINDOW, FEWEST_S_BETWEEN = 100, 0.01
# Of replies that are kept, at most so much: large ones are kept fewer.
MOST_KEPT_BYTES = 64_000_000
UNANSWERED = -1
# No event loop of one process sends more in a closed loop; room is kept for so many a second, up to so many.
MOST_RPS, MOST_ROOM = 50_000.0, 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A reply kept for checking, and the payload it answers."""

    payload: int
    reply: Reply


@dataclass(slots=True, kw_only=True)
class Offered:
    """What a load left behind.

    Attributes:
        trace: every request.
        start_ns: where the window begins, on ``time.perf_counter_ns``.
        end_ns: where it ends.
        samples: (time, in flight) at instants of chance.
        kept: replies spread over the window.
        firsts: the first reply of each connection, those of the warm-up among them.
        first_error: what the server said to the first failed request, or empty.
    """

    trace: Trace
    start_ns: int
    end_ns: int
    samples: tuple[tuple[int, int], ...]
    kept: tuple[Kept, ...]
    firsts: tuple[Kept, ...]
    first_error: str


_Kind = Literal["q", "b", "B", "H"]


class _Log:
    """Times by request in memory of their own: 26 or 27 bytes a request, taken as they are due, and given back at once.

    The allocator would keep what arrays leave behind as they grow: twice as much, from the second window on.

    Args:
        payloads: how many different ones there are.
        requests: how many are expected; with more, all is moved to where there is room for twice as many.
    """

    intended: "memoryview[int]"
    sent: "memoryview[int]"
    done: "memoryview[int]"
    status: "memoryview[int]"
    payload: "memoryview[int]"

    def __init__(self, payloads: int, requests: int) -> None:
        self.count = 0
        self._kinds: tuple[_Kind, ...] = ("q", "q", "q", "b", "B" if payloads <= 1 << 8 else "H")
        self._reserve(max(1, requests))

    def append(self, due_ns: int, payload: int, status: int) -> int:
        """Books a request; returns its index."""
        index = self.count
        if index == self._rows:
            self._reserve(2 * self._rows)
        self.intended[index] = self.sent[index] = self.done[index] = due_ns
        self.status[index] = status
        self.payload[index] = payload
        self.count = index + 1
        return index

    def trace(self) -> Trace:
        """All of it as numpy arrays, which are views."""
        columns = (self.intended, self.sent, self.done, self.status, self.payload)
        intended, sent, done, status, payload = (
            np.frombuffer(column, dtype=kind)[: self.count] for column, kind in zip(columns, self._kinds, strict=True)
        )
        return Trace(intended_ns=intended, sent_ns=sent, done_ns=done, status=status, payload=payload)

    def _reserve(self, rows: int) -> None:
        """Takes address space; memory follows page by page, where it is written to."""
        sizes = [-(-rows * np.dtype(kind).itemsize // mmap.PAGESIZE) * mmap.PAGESIZE for kind in self._kinds]
        room = memoryview(mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        starts = itertools.accumulate(sizes, initial=0)
        columns = [
            room[start : start + size].cast(kind) for start, size, kind in zip(starts, sizes, self._kinds, strict=False)
        ]
        if self.count:
            for old, new in zip((self.intended, self.sent, self.done, self.status, self.payload), columns, strict=True):
                new[: self.count] = old[: self.count]
        self.intended, self.sent, self.done, self.status, self.payload = columns
        self._rows = rows


def _expected_requests(profile: LoadProfile) -> int:
    """How many requests a load may be about to have, in its warm-up and window."""
    length_s = profile.warmup_s + profile.duration_s
    rate_rps = MOST_RPS if isinstance(profile.load, ClosedLoop) else profile.load.rate_rps
    mean = rate_rps * length_s
    return int(min(MOST_ROOM, mean + 10 * math.sqrt(mean)))


class Window:
    """Offers one load through a transport; made for one use.

    Args:
        transport: open, and known to answer.
        payloads: rotated in an order of chance; at most 65,536.
        profile: what to offer.
        lane: which share of an open loop's arrivals this window sends, see `schedule_blocks`.
        lanes: how many shares there are.
        keep: most replies to keep for checking, and most first ones of connections.
        on_begin: called when the window begins.
        on_end: called when it ends, before the last answers.
    """

    def __init__(
        self,
        transport: Transport,
        payloads: tuple[Payload, ...],
        profile: LoadProfile,
        *,
        lane: int = 0,
        lanes: int = 1,
        keep: int = 0,
        on_begin: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._transport = transport
        self._payloads = payloads
        self._profile = profile
        self._lane, self._lanes = lane, lanes
        self._keep = keep
        self._on_begin = on_begin
        self._on_end = on_end
        self._timeout_ns = int(profile.timeout_s * NS_PER_S)
        self._log = _Log(len(payloads), _expected_requests(profile))
        self._rotation = itertools.cycle(
            np.random.default_rng((profile.seed, lane)).permutation(len(payloads)).tolist()
        )
        self._in_flight = 0
        self._answers_call_for_more = False
        self._over = False
        self._all_answered = asyncio.Event()
        self._samples: list[tuple[int, int]] = []
        self._kept: list[Kept] = []
        self._firsts: list[Kept] = []
        self._kept_bytes = 0
        self._first_error = ""
        self._refused = 0
        self._refused_since_ns = 0
        self._bug: BaseException | None = None

    async def run(self, begin_ns: int) -> Offered:
        """Offers the load and waits for its answers, at most the timeout beyond the window's end.

        Args:
            begin_ns: when the warm-up begins, on ``time.perf_counter_ns``.

        Raises:
            UnreachableError: the server is gone: connections fail without one success for a second.
        """
        self._alarm = Alarm(asyncio.get_running_loop())
        self._start_ns = begin_ns + int(self._profile.warmup_s * NS_PER_S)
        self._end_ns = self._start_ns + int(self._profile.duration_s * NS_PER_S)
        self._next_kept_ns = self._start_ns
        marking = asyncio.create_task(self._mark())
        watch = [marking, asyncio.create_task(self._sample())]
        try:
            load = self._profile.load
            await (self._closed(load, begin_ns) if isinstance(load, ClosedLoop) else self._open(load, begin_ns))
            await self._drain()
            self._check_hope()
            await marking  # the last answer may come before the window's end
        finally:
            self._over = True
            for task in watch:
                task.cancel()
            await asyncio.gather(*watch, return_exceptions=True)
            self._alarm.close()
        return Offered(
            trace=self._log.trace(),
            start_ns=self._start_ns,
            end_ns=self._end_ns,
            samples=tuple(self._samples),
            kept=tuple(self._kept),
            firsts=tuple(self._firsts),
            first_error=self._first_error,
        )

    # --- the two loads ---

    async def _open(self, load: OpenLoop | Replay, begin_ns: int) -> None:
        profile, unread = self._profile, 0
        blocks = schedule_blocks(
            load, profile.warmup_s, profile.duration_s, seed=profile.seed, lane=self._lane, lanes=self._lanes
        )
        for due_ns in (due for block in blocks for due in (block + begin_ns).tolist()):
            behind_ns = time.perf_counter_ns() - due_ns
            if behind_ns < 0:
                await self._alarm.until(due_ns)
                unread = 0
            elif (unread := unread + 1) >= SENDS_WITHOUT_READING:
                await asyncio.sleep(0)
                unread = 0
            self._arrive(due_ns, behind_ns)
            self._check_hope()

    def _arrive(self, due_ns: int, behind_ns: int) -> None:
        """Sends what is due, or books it as dropped: it is never delayed in silence, nor sent when it is a miss anyway.

        So a client that is far too weak for the rate is done with it a timeout after the window, at the latest.
        """
        if self._in_flight >= self._profile.max_in_flight or behind_ns > self._timeout_ns:
            self._log.append(due_ns, next(self._rotation), Status.DROPPED)
            return
        self._send(due_ns)

    async def _closed(self, load: ClosedLoop, begin_ns: int) -> None:
        await self._alarm.until(begin_ns)
        self._answers_call_for_more = True
        for _ in range(load.concurrency):
            self._send_again()
        while (left_s := (self._end_ns - time.perf_counter_ns()) / NS_PER_S) > 0:
            await asyncio.sleep(min(0.1, left_s))
            self._check_hope()

    def _send_again(self) -> None:
        if self._over or (now_ns := time.perf_counter_ns()) >= self._end_ns:
            return
        try:
            self._send(now_ns)
        except Exception as error:
            self._bug = error  # nobody else hears of it

    # --- one request ---

    def _send(self, due_ns: int) -> None:
        payload = next(self._rotation)
        index = self._log.append(due_ns, payload, UNANSWERED)
        self._in_flight += 1
        sent_ns = time.perf_counter_ns()
        self._log.sent[index] = sent_ns
        left_s = max(0.001, (due_ns + self._timeout_ns - sent_ns) / NS_PER_S)
        self._transport.send(self._payloads[payload], left_s, partial(self._answered, index, payload, due_ns))

    def _answered(self, index: int, payload: int, due_ns: int, reply: Reply) -> None:
        if self._over:
            return  # it was given up, and its times are booked
        try:
            self._book(index, payload, due_ns, reply)
        except Exception as error:
            # An event loop would take it for an error of the connection.
            self._bug = error

    def _book(self, index: int, payload: int, due_ns: int, reply: Reply) -> None:
        done_ns = time.perf_counter_ns()
        self._in_flight -= 1
        self._log.done[index] = done_ns
        late = done_ns - due_ns > self._timeout_ns
        self._log.status[index] = Status.TIMEOUT if late and reply.status == Status.OK else reply.status
        if reply.status == Status.OK:
            self._refused = 0
            if reply.first and len(self._firsts) < self._keep:
                self._hold(self._firsts, payload, reply)
            if done_ns >= self._next_kept_ns:
                self._keep_reply(payload, reply, done_ns)
        else:
            self._note_failure(reply, done_ns)
        if self._answers_call_for_more:
            if reply.status == Status.CONNECTION:
                asyncio.get_running_loop().call_later(RETRY_PAUSE_S, self._send_again)
            else:
                self._send_again()
        if self._in_flight == 0:
            self._all_answered.set()

    def _keep_reply(self, payload: int, reply: Reply, done_ns: int) -> None:
        if len(self._kept) >= self._keep or done_ns >= self._end_ns:
            return
        self._hold(self._kept, payload, reply)
        self._next_kept_ns = done_ns + (self._end_ns - self._start_ns) // self._keep

    def _hold(self, held: list[Kept], payload: int, reply: Reply) -> None:
        self._kept_bytes += len(reply.body)
        if self._kept_bytes <= MOST_KEPT_BYTES:
            held.append(Kept(payload=payload, reply=reply))

    def _note_failure(self, reply: Reply, done_ns: int) -> None:
        if not self._first_error:
            self._first_error = with_limit(reply, self._profile.timeout_s, " of when it was due").message
        if reply.status == Status.CONNECTION:
            if self._refused == 0:
                self._refused_since_ns = done_ns
            self._refused += 1

    def _check_hope(self) -> None:
        if self._bug is not None:
            raise self._bug
        if self._refused < HOPELESS_ERRORS:
            return
        if time.perf_counter_ns() - self._refused_since_ns > HOPELESS_S * NS_PER_S:
            raise UnreachableError(
                f"the server stopped answering while under load: {self._first_error}",
                hint="Look at the server's log.",
            )

    # --- beside the load ---

    async def _drain(self) -> None:
        """Waits for what is in flight; what is still unanswered a moment after its timeout is given up."""
        self._all_answered.clear()
        if self._in_flight:
            left_s = (self._end_ns + self._timeout_ns - time.perf_counter_ns()) / NS_PER_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_answered.wait(), max(0.0, left_s) + 0.5)
        self._over = True
        now_ns = time.perf_counter_ns()
        for index in range(self._log.count):
            if self._log.status[index] == UNANSWERED:
                self._log.status[index] = Status.TIMEOUT
                self._log.done[index] = now_ns

    async def _mark(self) -> None:
        for when_ns, mark in ((self._start_ns, self._on_begin), (self._end_ns, self._on_end)):
            await asyncio.sleep(max(0.0, (when_ns - time.perf_counter_ns()) / NS_PER_S))
            mark()

    async def _sample(self) -> None:
        """Counts what is in flight at instants of chance, which see averages as time does (PASTA)."""
        await asyncio.sleep(max(0.0, (self._start_ns - time.perf_counter_ns()) / NS_PER_S))
        mean_s = max(FEWEST_S_BETWEEN, self._profile.duration_s / SAMPLES_A_WINDOW)
        chance = np.random.default_rng((self._profile.seed, self._lane))
        while (now_ns := time.perf_counter_ns()) < self._end_ns:
            self._samples.append((now_ns, self._transport.in_flight))
            await asyncio.sleep(chance.exponential(mean_s))
