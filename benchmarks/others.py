"""What others do on the machine while a benchmark times something: it is shared, and what they do is no result."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psutil

Found = TypeVar("Found")

MOST_CORES = 0.1
"""Cores that others may use while something is timed."""
PATIENCE = 100


def undisturbed(measure: Callable[[], Found]) -> Found:
    """What is measured while others leave the machine alone; measured again where they did not."""
    for _ in range(PATIENCE):
        begin, before = time.monotonic(), cpu_of_others()
        found = measure()
        if (cpu_of_others() - before) / (time.monotonic() - begin) <= MOST_CORES:
            return found
        time.sleep(1)
    sys.exit(f"others used the machine each of {PATIENCE} times; once more when it is quiet")


def cpu_of_others() -> float:
    """CPU seconds since the start of all that is not this process, a child of it, or one that has ended."""
    times, own = psutil.cpu_times(), 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            own += sum(process.cpu_times()[:4])
    return float(times.user + times.nice + times.system) - own
