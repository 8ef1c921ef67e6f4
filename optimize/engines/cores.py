"""Cores of this machine, given to the processes of all campaigns on it: alone, or beside others.

A core is a file that is locked while it is used: exclusively by who needs it alone, together with others else. The
kernel lets go of the lock when its process ends, however it ends. Whoever waits for cores keeps those behind it waiting
too, so that a measurement that needs many is not overtaken for ever.

The locks are in a folder of the machine's temporary one. Containers that share cores share them by a folder that all of
them mount, which ``BURNISH_CORES`` names.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

from registry.errors import InputError
from registry.stopping import pause

FOLDER = "BURNISH_CORES"
"""The environment variable with the folder of the locks."""
_POLL_S = 0.05
_TOLD_AFTER = 10  # what others hold for a moment is not worth a word
_TURN = "turn"
_alone_on: ContextVar[tuple[int, ...]] = ContextVar("alone_on", default=())


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
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, ...]]:
    """Cores for the time of a block; waits until there are enough.

    Args:
        count: how many; None for all.
        alone: whether no other block may have any of them. Else free ones come first.
        among: the CPUs to take them from; None for all that this process may use.
        folder: where the locks are; None for the one that all campaigns of this user share.
        waiting: told once, where it has to wait.

    Raises:
        InputError: there are not so many, or the folder of the locks cannot be written.
        InterruptedError: nobody wants them any more (`registry.stopping`).
    """
    cores = tuple(usable_cores() if among is None else among)
    wanted = len(cores) if count is None else count
    if wanted > len(cores):
        raise InputError(f"{wanted} cores were asked for, and {len(cores)} can be used here")
    place = folder or _usual_folder()
    with _refusals(place):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    wait = _Waiting(waiting)
    with ExitStack() as held:
        with _locked(place / _TURN, wait):
            while True:
                taken = _take(place, cores, wanted, alone=alone)
                if len(taken) == wanted:
                    break
                _release(taken.values())
                wait()
        held.callback(_release, taken.values())
        yield tuple(sorted(taken))


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """This thread, and the processes that it starts, run on these CPUs only, for the time of a block.

    What this machine is (`profiles.measure.host`) is told of these alone. Nothing happens where there is no affinity.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def alone_on(cores: Sequence[int]) -> Iterator[None]:
    """Pinned to cores that this thread has alone: its steps in the block run on them, and wait for none."""
    token = _alone_on.set(tuple(cores))
    try:
        with pinned(cores):
            yield
    finally:
        _alone_on.reset(token)


def cores_alone() -> tuple[int, ...]:
    """The cores that this thread has alone, by `alone_on`; none where it has not."""
    return _alone_on.get()


def _usual_folder() -> Path:
    named = os.environ.get(FOLDER)
    return Path(named) if named else Path(tempfile.gettempdir(), f"burnish-cores-{os.getuid()}")


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
def _locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    # Asked for again and again, as a thread that the kernel has wait cannot be stopped.
    while (descriptor := _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
        wait()
    try:
        yield
    finally:
        os.close(descriptor)


class _Waiting:
    """Waits a moment each time it is called, unless nobody wants the cores any more."""

    def __init__(self, told: Callable[[], None]) -> None:
        self._told, self._calls = told, 0

    def __call__(self) -> None:
        self._calls += 1
        if self._calls == _TOLD_AFTER:
            self._told()
        pause(_POLL_S)


def _lock(path: Path, mode: int) -> int | None:
    with _refusals(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, mode)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cores cannot be shared by {path}: {error.strerror}",
            hint=f"Name a folder with {FOLDER} that whoever shares the cores can write.",
        ) from error


def _release(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
