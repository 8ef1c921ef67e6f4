"""A real file system of a few MB, to be filled."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BALLAST = "ballast"


@contextmanager
def small_disk(folder: Path, *, size_mb: int) -> Iterator[Path]:
    """The folder, made, as a file system of its own; xfails where none may be mounted."""
    import pytest

    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, check=False, capture_output=True)
    if mounted.returncode:
        pytest.xfail(f"no file system may be mounted here: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        # Some libraries keep files open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, but_bytes: int = 0) -> None:
    """Leaves so much room on a disk, rounded down to its blocks."""
    free = _free_bytes(disk)
    with (disk / _BALLAST).open("ab", buffering=0) as file:
        file.write(bytes(max(0, free - but_bytes)))


def free_again(disk: Path) -> None:
    """Takes away what `fill` left."""
    (disk / _BALLAST).unlink()


def _free_bytes(disk: Path) -> int:
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize
