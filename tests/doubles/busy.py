"""For tests on a machine that others use, too: any process of it may stand still for seconds, or be slow throughout."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from registry.errors import UnreachableError

T = TypeVar("T")

LONG_S = 60.0
"""Longest wait for what comes about: so long that only what never comes is missed."""


def until(condition: Callable[[], object], *, limit_s: float = LONG_S) -> None:
    """Returns once the condition holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def ends_in_vain(wait: Callable[[float], object], words: str, *, first_s: float = 0.15) -> UnreachableError:
    """The error that waits for so many seconds end with, for what does not come about.

    Args:
        wait: what is done within so many seconds.
        words: a pattern of the error's message, in which ``{limit}`` stands for these seconds.
        first_s: of the first wait. Longer ones follow where a busy machine saw nothing to speak of in it.
    """
    for limit_s in (first_s, 2.0, 20.0):
        with pytest.raises(UnreachableError) as caught:
            wait(limit_s)
        if re.search(words.replace("{limit}", re.escape(f"{limit_s:g}")), caught.value.message):
            return caught.value
    raise AssertionError(caught.value.message)


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
