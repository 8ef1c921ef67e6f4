"""Waking an event loop at an exact time."""

import asyncio
import ctypes
import os
import sys
import time

NS_PER_S = 1_000_000_000
_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC if sys.platform == "linux" else 0


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """Wakes one coroutine at absolute times of ``time.perf_counter_ns``, without spinning.

    The timers of asyncio are late by up to a millisecond, since epoll waits whole milliseconds. On Linux a timerfd
    in the same epoll is exact to tens of microseconds and costs no CPU, which on two cores belongs to the server
    (timerfd_create(2), through ctypes until Python 3.13 has it). Elsewhere asyncio's timer serves; the lateness
    gate then says whether it was good enough.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._wake: asyncio.Future[None] | None = None
        self._fd = -1
        self._spec = _Itimerspec()
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if self._fd >= 0:
            loop.add_reader(self._fd, self._ring)

    async def until(self, when_ns: int) -> None:
        """Returns at ``when_ns``, at once if that is past."""
        ahead_ns = when_ns - time.perf_counter_ns()
        if ahead_ns <= 0:
            return
        if self._fd < 0:
            await asyncio.sleep(ahead_ns / NS_PER_S)
            return
        self._spec.value.seconds, self._spec.value.nanoseconds = divmod(when_ns, NS_PER_S)
        self._wake = self._loop.create_future()
        self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None)
        await self._wake

    def close(self) -> None:
        """Gives the timer back."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _ring(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
