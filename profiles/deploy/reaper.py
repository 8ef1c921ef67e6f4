"""Ends servers that a killed run left behind."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from profiles.deploy.supervise import MARK, kill_all, remove_shared_memory, start_ticks

logger = logging.getLogger(__name__)

RECORDS = "servers"
"""Folder of the records, inside the folder a cluster works in."""

WAIT_S = 5.0


def reap(work: Path) -> list[str]:
    """Ends every server under `work` whose parent is gone, and removes the shared memory it left.

    A process is ended only if its pid and start time are those on record, or if it carries the record's mark in its
    environment; a pid that somebody else has since is left alone. Servers of a living parent are left alone too.

    Returns:
        A sentence for each server that was found, for the log.
    """
    told = []
    for path in sorted((work / RECORDS).glob("*.json")):
        record = _read(path)
        if record is None:
            path.unlink(missing_ok=True)
        elif not _lives(record["parent"]):
            told.append(_reap_one(path, record))
    return told


def end_server(path: Path) -> None:
    """Ends whatever is left of the server that the record names, whoever its parent is; nothing where there is none."""
    if path.exists() and (record := _read(path)) is not None:
        _end(record)
        path.unlink(missing_ok=True)


def _reap_one(path: Path, record: dict[str, Any]) -> str:
    ended = sorted(_survivors(record))
    if _lives(record["supervisor"]):
        # It sees by itself that its parent is gone; killing it in the middle of that would leave the work to us.
        _wait_until_gone([record["supervisor"][0]], WAIT_S)
    regions = _end(record)
    path.unlink(missing_ok=True)
    sentence = f"ended {len(ended)} processes and removed {len(regions)} shared memory regions of {path.stem}"
    logger.warning("A run that was killed left a server: %s", sentence)
    return sentence


def _end(record: dict[str, Any]) -> list[str]:
    kill_all(lambda: _survivors(record), limit_s=WAIT_S)
    return remove_shared_memory(record["shm_prefix"])


def _survivors(record: dict[str, Any]) -> set[int]:
    named = {process[0] for process in (record["supervisor"], record["server"]) if _lives(process)}
    return named | set(_marked(record["mark"]))


def _marked(mark: str) -> Iterator[int]:
    """Every other process of ours whose environment carries the mark."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir() if mark else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def _lives(process: list[int | None]) -> bool:
    pid, ticks = process
    return pid is not None and ticks is not None and start_ticks(pid) == ticks


def _wait_until_gone(pids: list[int] | set[int], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while any(start_ticks(pid) is not None for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)


def _read(path: Path) -> dict[str, Any] | None:
    """The record, or None where the file is none (it is written whole, so it is not ours)."""
    try:
        record = json.loads(path.read_text())
        texts = [record["mark"], record["shm_prefix"]]
        processes = [record["server"], record["supervisor"], record["parent"]]
    except (OSError, ValueError, TypeError, LookupError):
        return None
    sound = all(isinstance(text, str) for text in texts) and all(
        isinstance(process, list) and len(process) == 2 for process in processes
    )
    return record if sound else None
