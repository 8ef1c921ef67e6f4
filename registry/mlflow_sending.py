"""Who sends a campaign to MLflow: one at a time from a working folder, and none takes another's half away.

The same campaign may be in two folders, of two machines even, that know nothing of each other. So whatever is begun in
MLflow carries tags of who began it and when, and what another folder has begun and not ended is left alone for a while.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from registry.codec import digest
from registry.errors import StorageError

_log = logging.getLogger(__name__)

SENDER: Final = "burnish.sender"
SENT_AT: Final = "burnish.sent_at"
GONE_AFTER_S: Final = 3600.0
"""What was begun so long ago and has no end is left of a process that was killed. Clocks of machines differ by less."""
_LOCK = "tracking.lock"


def sender_of(work: Path) -> str:
    """Tells the working folder from others, of other machines too."""
    return digest([socket.gethostname(), str(work.resolve())])


def sender_tags(work: Path) -> dict[str, str]:
    """The tags of what is begun now."""
    return {SENDER: sender_of(work), SENT_AT: f"{time.time():.0f}"}


def is_anothers(tags: Mapping[str, str], sender: str) -> bool:
    """Whether it was begun from another folder."""
    return tags.get(SENDER, sender) != sender


def may_be_sending(tags: Mapping[str, str], sender: str) -> bool:
    """Whether another folder may still be writing what carries these tags, and has no end."""
    try:
        age_s = time.time() - float(tags.get(SENT_AT, "-inf"))
    except ValueError:
        return False
    return is_anothers(tags, sender) and age_s < GONE_AFTER_S


@contextmanager
def one_at_a_time(work: Path) -> Iterator[None]:
    """Waits until nobody else sends from the working folder, and then is the one who does.

    The kernel lets go of the lock when a process ends, however it ends.

    Raises:
        StorageError: the folder cannot be written.
    """
    path = work / _LOCK
    try:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}",
            hint="Check free space and permissions of its folder.",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("another burnish is sending the results of %s to MLflow; waiting for it to end", work)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
