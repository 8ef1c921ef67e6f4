"""Who is at work on what, among processes of several machines that share a folder.

A lease is an object ``<key>/<number>``, made by a call that refuses what is there (a hard link in a folder,
If-None-Match in a store). Its holder writes it anew every third of its time to live. Whoever waits, and sees the newest
lease unchanged for that time by a clock of its own, takes the next number: clocks of machines are never compared. The
lease of a process of this machine that is gone is taken at once.

A store without that condition (``exclusive=False``) is asked in another way: each caller writes an object of its own
and then looks; whoever sees another one takes its own away again. That needs listings that show what was written
before them, as S3's and rclone's do.

While the store is away nobody can write a lease anew, nor see that it was: that time does not count against its holder,
who writes it as soon as the store is back. A holder that alone was cut off for longer than the time to live looks
whether the lease is another's by now, before it writes it anew.

No result depends on a lease: a holder that was too slow, and the one who took its lease, both do the work, and the
first to commit it is the one who counts.
"""

import json
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from registry.errors import StorageError
from registry.processes import is_alive, this_process
from registry.remote_folder import RemoteFolder
from registry.stopping import pause

_log = logging.getLogger(__name__)

TTL_S = 60.0
"""How long a lease is believed that nobody writes anew."""
_POLL_S = 1.0
_LAST_BEAT_S = 5.0
"""How long a renewal that is under way is waited for; a store that is silent would keep the result back."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """A lease as it stands: its number, its name in the folder, and what is in it (nothing yet, or no longer)."""

    number: int
    name: str
    content: bytes | None


@contextmanager
def lease(
    folder: RemoteFolder,
    key: str,
    *,
    exclusive: bool,
    is_done: Callable[[], bool],
    ttl_s: float = TTL_S,
    poll_s: float = _POLL_S,
) -> Iterator[bool]:
    """Holds the lease of some work for the time of a block, or finds that others have done it meanwhile.

    Args:
        folder: where the leases are; objects go under ``key``.
        key: the work's.
        exclusive: whether `RemoteFolder.create` refuses what is there.
        is_done: whether the work was done; asked before anything is waited for or taken.
        ttl_s: the time to live.
        poll_s: how often another one's lease is looked at.

    Yields:
        True where the work is to be done here, False where it was done.

    Raises:
        StorageError: the folder does not answer, or refuses.
        InterruptedError: nobody waits for the work any more (`registry.stopping`).
    """
    held = None
    while not is_done():
        held = _wait_and_claim(folder, key, exclusive=exclusive, is_done=is_done, ttl_s=ttl_s, poll_s=poll_s)
        if held is None:
            break
        if is_done():  # between the last look and the claim
            _release(folder, key, held)
            held = None
            break
        try:
            with _beating(folder.at_once(), key, held, ttl_s):
                yield True
        finally:  # once nothing writes it anew
            # Asked once: the result is kept by now, and a lease that stays expires.
            _release(folder.at_once(), key, held)
        return
    yield False


def _wait_and_claim(
    folder: RemoteFolder, key: str, *, exclusive: bool, is_done: Callable[[], bool], ttl_s: float, poll_s: float
) -> _Claim | None:
    """Our lease, or None where the work was done before we had one."""
    seen: _Claim | None = None
    unchanged_s, looked = 0.0, time.monotonic()
    told = False
    while True:
        newest = _newest(folder, key)
        now = time.monotonic()
        # Who sees nothing for a while, because the store is away, does not see that others are alive either.
        unchanged_s = unchanged_s + min(now - looked, ttl_s / 6) if newest == seen else 0.0
        seen, looked = newest, now
        if newest is None or _is_dead(newest.content) or unchanged_s >= ttl_s:
            if newest is not None:
                _log.info("taking over the lease of %s, whose holder is gone", key)
            mine = _claim(folder, key, 1 if newest is None else newest.number + 1, exclusive=exclusive)
            if mine is not None:
                return mine
        if is_done():
            return None
        if not told:
            _log.info("waiting for %s, which another process is making", key)
            told = True
        # Two that met and both gave way must not meet again.
        pause(poll_s * random.uniform(0.5, 1.0))  # noqa: S311 (no secret hangs on it)


def _newest(folder: RemoteFolder, key: str) -> _Claim | None:
    names = [name for name in folder.names(key) if name[:6].isdigit()]
    if not names:
        return None
    name = max(names)
    return _Claim(int(name[:6]), name, folder.read(f"{key}/{name}"))


def _claim(folder: RemoteFolder, key: str, number: int, *, exclusive: bool) -> _Claim | None:
    """The lease of this number, if nobody else has it or a later one."""
    content = _holder()
    name = f"{number:06d}" if exclusive else f"{number:06d}-{uuid.uuid4().hex}"
    if exclusive:
        if not folder.create(f"{key}/{name}", content):
            return None
    else:
        folder.write(f"{key}/{name}", content)
    if any(int(other[:6]) >= number for other in folder.names(key) if other != name and other[:6].isdigit()):
        folder.remove(f"{key}/{name}")
        return None
    return _Claim(number, name, content)


def _release(folder: RemoteFolder, key: str, held: _Claim) -> None:
    """Takes our lease away, and those before it, whose holders are gone."""
    try:
        for name in folder.names(key):
            if name == held.name or (name[:6].isdigit() and int(name[:6]) < held.number):
                folder.remove(f"{key}/{name}")
    except StorageError as error:
        # It expires by itself, and what was done under it is done.
        _log.warning("the lease of %s was left to expire: %s", key, error.message)


@contextmanager
def _beating(folder: RemoteFolder, key: str, held: _Claim, ttl_s: float) -> Iterator[None]:
    """Writes our lease anew now and then, from a thread of its own."""
    ended = threading.Event()

    def beat() -> None:
        count, renewed, away = 0, time.monotonic(), False
        while not ended.wait(ttl_s / (30 if away else 3)):
            try:
                if time.monotonic() - renewed >= ttl_s and not _is_ours(folder, key, held):
                    _log.warning("%s is made by another process as well, since our lease of it has expired", key)
                    return
                count += 1
                folder.write(f"{key}/{held.name}", _holder(count))
            except Exception as error:  # whatever it is, it is tried again soon
                if not away:
                    _log.warning("the lease of %s could not be renewed: %s", key, error)
                away = True
            else:
                renewed, away = time.monotonic(), False

    thread = threading.Thread(target=beat, name="burnish-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_LAST_BEAT_S)


def _is_ours(folder: RemoteFolder, key: str, held: _Claim) -> bool:
    newest = _newest(folder, key)
    return newest is not None and newest.name == held.name


# --- who holds it ----------------------------------------------------------------------------------------------


def _holder(beat: int = 0) -> bytes:
    return json.dumps({**this_process(), "beat": beat, "mark": uuid.uuid4().hex}).encode()


def _is_dead(content: bytes | None) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    try:
        return is_alive(json.loads(content or b"")) is False
    except ValueError:
        return False
