"""Which process of which machine wrote something, so that others can tell whether it is still there."""

import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil


def this_process() -> dict[str, Any]:
    """What tells this process from all others, as JSON has it: ``machine``, ``host``, ``pid`` and ``started``."""
    process = psutil.Process()
    return {
        "machine": _machine(),
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
    }


def is_alive(about: Mapping[str, Any]) -> bool | None:
    """Whether a process is still there; None where that cannot be seen from here.

    Args:
        about: what `this_process` said of it.
    """
    try:
        if about["machine"] != _machine():
            return None
        process = psutil.Process(int(about["pid"]))
        same = abs(process.create_time() - float(about["started"])) <= 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (ValueError, KeyError, TypeError, psutil.Error):
        return None


@cache
def _machine() -> str:
    """What tells processes that see each other from all others: containers of one machine do not."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.is_file():
        parts.append(boot.read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return "/".join(parts)
