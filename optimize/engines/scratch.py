"""Folders of steps, which go with them; those of killed processes go when the next step comes.

Beside each folder is a file that its process holds locked. The kernel lets go of the lock when the process ends, so a
folder whose file can be locked is nobody's.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from profiles.deploy.reaper import reap

_PREFIX = "step-"
_LOCK = ".lock"


@contextmanager
def scratch_folder(root: Path | None) -> Iterator[Path]:
    """An empty folder for the time of a block.

    Args:
        root: where it is made. What killed steps left there is removed, their servers ended. None for the machine's
            temporary folder, which is left as it is.
    """
    if root is None:
        with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
            yield Path(name)
        return
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_LOCK, dir=root)
    lock = Path(name)
    folder = lock.with_suffix("")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _sweep(root: Path) -> None:
    """Removes what is nobody's."""
    for lock in root.glob(f"{_PREFIX}*{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            left = lock.with_suffix("")
            if left.is_dir():
                reap(left)
                shutil.rmtree(left, ignore_errors=True)
                lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
