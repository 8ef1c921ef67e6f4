"""For tests on a machine that others use, too: any process of it may stand still for seconds, or be slow throughout."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LONG_S = 60.0
"""Longest wait for what comes about: so long that only what never comes is missed."""


def until(condition: Callable[[], object], *, limit_s: float = LONG_S) -> None:
    """Returns once the condition holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def undisturbed(attempt: Callable[[], T], seen: Callable[[T], object], *, tries: int = 6) -> T:
    """The outcome of the first attempt in which something is seen; of the last where it is in none.

    A window of a fraction of a second may be over before a process that stands still has done anything in it.
    """
    outcome = attempt()
    for _ in range(tries - 1):
        if seen(outcome):
            break
        outcome = attempt()
    return outcome
