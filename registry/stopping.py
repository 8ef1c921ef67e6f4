"""Work that nobody waits for any more: how its thread hears of it, and waits so that it does.

Ctrl-C and SIGTERM arrive in the main thread alone. Whoever waits in another one waits by `pause`.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


@contextmanager
def stopped_by(event: threading.Event) -> Iterator[None]:
    """What this thread waits for in the block it waits for until the event is set, at most."""
    token = _stop.set(event)
    try:
        yield
    finally:
        _stop.reset(token)


def is_stopped() -> bool:
    """Whether the event of a block of `stopped_by` that this thread is in is set."""
    event = _stop.get()
    return event is not None and event.is_set()


def pause(seconds: float) -> None:
    """Returns after so many seconds.

    Raises:
        InterruptedError: nobody waits any more for what this thread is at.
    """
    event = _stop.get()
    if event is None:
        time.sleep(seconds)
    elif event.wait(seconds):
        raise InterruptedError("nobody waits for this any more")
