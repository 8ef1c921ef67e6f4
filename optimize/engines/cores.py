"""Cores of this machine, given to the processes of all campaigns on it: alone, or beside others.

A core is a file that is locked while it is used: exclusively by who needs it alone, together with others else. The
kernel lets go of the lock when its process ends, however it ends. Whoever waits for cores keeps those behind it waiting
too, so that a measurement that needs many is not overtaken for ever.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from registry.errors import InputError

_POLL_S = 0.05
_TURN = "turn"


def usable_cores() -> tuple[int, ...]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


@contextmanager
def reserve_cores(
    count: int | None,
    *,
    alone: bool,
    among: Sequence[int] | None = None,
    folder: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, ...]]:
    """Cores for the time of a block; waits until there are enough.

    Args:
        count: how many; None for all.
        alone: whether no other block may have any of them. Else free ones come first.
        among: the CPUs to take them from; None for all that this process may use.
        folder: where the locks are; None for the one that all campaigns of this user share.
        stopped: whether nobody wants them any more; asked while it waits.

    Raises:
        InputError: there are not so many.
        InterruptedError: nobody wants them any more.
    """
    cores = tuple(usable_cores() if among is None else among)
    wanted = len(cores) if count is None else count
    if wanted > len(cores):
        raise InputError(f"{wanted} cores were asked for, and {len(cores)} can be used here")
    place = folder or Path(tempfile.gettempdir(), f"burnish-cores-{os.getuid()}")
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as held:
        with _locked(place / _TURN, stopped):
            while True:
                taken = _take(place, cores, wanted, alone=alone)
                if len(taken) == wanted:
                    break
                _release(taken.values())
                _wait(stopped)
        held.callback(_release, taken.values())
        yield tuple(sorted(taken))


def _take(place: Path, cores: Sequence[int], wanted: int, *, alone: bool) -> dict[int, int]:
    """Core -> descriptor of its lock, for as many as can be had now."""
    taken: dict[int, int] = {}
    modes = [fcntl.LOCK_EX] if alone else [fcntl.LOCK_EX, fcntl.LOCK_SH]
    for mode in modes:
        for core in cores:
            if len(taken) < wanted and core not in taken:
                descriptor = _lock(place / f"core-{core}", mode | fcntl.LOCK_NB)
                if descriptor is None:
                    continue
                if not alone:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may come beside us
                taken[core] = descriptor
    return taken


@contextmanager
def _locked(path: Path, stopped: Callable[[], bool]) -> Iterator[None]:
    # Asked for again and again, as a thread that the kernel has wait cannot be stopped.
    while (descriptor := _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
        _wait(stopped)
    try:
        yield
    finally:
        os.close(descriptor)


def _wait(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise InterruptedError("nobody wants these cores any more")
    time.sleep(_POLL_S)


def _lock(path: Path, mode: int) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, mode)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _release(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
