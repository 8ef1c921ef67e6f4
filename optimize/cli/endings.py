"""How a command ends when somebody ends it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing on the way takes it for a failed variant."""


@contextmanager
def terminable() -> Iterator[None]:
    """Turns SIGTERM into `Terminated`, so that servers are ended and the exit code says so."""

    def on_term(signum: int, frame: Any) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, on_term)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
