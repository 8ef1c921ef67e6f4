"""A full disk, whichever library says so: no fault of what was worked on, and no bug."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.errors import BurnishError, InputError, StorageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The numbers of errors by which a file system says that there is no room for more."""
_LEAST_BYTES = 1_000_000


def full_disk_error(error: BaseException) -> StorageError | None:
    """What to tell of an error that comes of a full disk; None where it comes of something else, or says so itself."""
    if isinstance(error, StorageError):
        return None
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, OSError) and found.errno in FULL:
            return _told(Path(found.filename) if isinstance(found.filename, str) else None)
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return None


@contextmanager
def full_disk_told(folder: Path | None = None) -> Iterator[None]:
    """Turns what is raised in the block because a disk is full into a `StorageError`.

    Args:
        folder: where something was to be written: where it has no room left when the block fails, that is why, as some
            libraries do not say it.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, BurnishError) as error:
        told = full_disk_error(error)
        if told is None and folder is not None and not isinstance(error, StorageError) and _is_full(folder):
            told = _told(folder)
        if told is None:
            raise
        raise told from error


def _told(path: Path | None) -> StorageError:
    where = f"for {path}" if path is not None else f"in the working folder, or in {tempfile.gettempdir()}"
    return StorageError(
        f"no space is left on the disk {where}",
        hint="Make room there, or name another place by --work or TMPDIR; the same command goes on where it stopped.",
    )


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _LEAST_BYTES
    except OSError:
        return False
