"""Who is at work on what, among processes of several machines that share a folder.

A lease is an object ``<key>/<number>``, made by a call that refuses what is there (a hard link in a folder,
If-None-Match in a store). Its holder writes it anew every third of its time to live. Whoever waits, and sees the newest
lease unchanged for that time by a clock of its own, takes the next number: clocks of machines are never compared. The
lease of a process of this machine that is gone is taken at once.

A store without that condition (``exclusive=False``) is asked in another way: each caller writes an object of its own
and then looks; whoever sees another one takes its own away again. That needs listings that show what was written
before them, as S3's and rclone's do.

No result depends on a lease: a holder that was too slow, and the one who took its lease, both do the work, and the
first to commit it is the one who counts.
"""

import json
import logging
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from registry.errors import StorageError
from registry.filesystems import RemoteFolder

_log = logging.getLogger(__name__)

TTL_S = 60.0
"""How long a lease is believed that nobody writes anew."""
_POLL_S = 1.0


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
            with _beating(folder, f"{key}/{held.name}", ttl_s / 3):
                yield True
        finally:  # once nothing writes it anew
            _release(folder, key, held)
        return
    yield False


def _wait_and_claim(
    folder: RemoteFolder, key: str, *, exclusive: bool, is_done: Callable[[], bool], ttl_s: float, poll_s: float
) -> _Claim | None:
    """Our lease, or None where the work was done before we had one."""
    seen: _Claim | None = None
    since = time.monotonic()
    told = False
    while True:
        newest = _newest(folder, key)
        if newest != seen:
            seen, since = newest, time.monotonic()
        if newest is None or _is_dead(newest.content) or time.monotonic() - since >= ttl_s:
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
        time.sleep(poll_s * random.uniform(0.5, 1.0))  # noqa: S311 (no secret hangs on it)


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
def _beating(folder: RemoteFolder, path: str, every_s: float) -> Iterator[None]:
    """Writes our lease anew now and then, from a thread of its own."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(every_s):
            count += 1
            try:
                folder.write(path, _holder(count))
            except Exception as error:  # whatever it is, the next beat tries again
                _log.warning("a lease could not be renewed: %s", error)

    thread = threading.Thread(target=beat, name="burnish-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# --- who holds it ----------------------------------------------------------------------------------------------


def _holder(beat: int = 0) -> bytes:
    process = psutil.Process()
    about = {
        "machine": _machine(),
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
        "beat": beat,
        "mark": uuid.uuid4().hex,
    }
    return json.dumps(about).encode()


@cache
def _machine() -> str:
    """What tells processes that see each other from all others: containers of one machine do not."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.is_file():
        parts.append(boot.read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return "/".join(parts)


def _is_dead(content: bytes | None) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    try:
        about: Any = json.loads(content or b"")
        if about["machine"] != _machine():
            return False
        process = psutil.Process(int(about["pid"]))
        return abs(process.create_time() - float(about["started"])) > 1 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (ValueError, KeyError, TypeError, psutil.Error):
        return False
