"""The process that `optimize.engines.local` starts: one function, once, with what it was given and no more.

Started as ``python -P -m optimize.engines.child <folder>``. The folder holds ``request.json``; ``result.json``
appears in it, whole or not at all. Libraries may print what they like: standard output and error are a log.
"""

import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from registry import errors
from registry.errors import BurnishError, InputError
from registry.full_disk import FULL, full_disk_error

REQUEST = "request.json"
RESULT = "result.json"
NO_ROOM = os.EX_IOERR
"""The exit code of a child whose outcome could not be written, as the disk is full."""

_PR_SET_PDEATHSIG = 1  # prctl(2)


def resolve(reference: str) -> Any:
    """The object that ``package.module:name`` names, its module imported.

    Raises:
        InputError: it is not written so, the module cannot be found or fails to import, or has no such name.
    """
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise InputError(f"{reference!r} does not name a function", hint="Write it as package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        hint = "Put it beside the campaign file, or install it." if missing in module_name else None
        raise InputError(f"{reference!r}: no module named {missing!r}", hint=hint) from error
    except Exception as error:  # whatever a user's module raises while it is imported
        traceback.print_exc()
        raise InputError(f"{reference!r}: importing it raised {type(error).__name__}: {error}") from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise InputError(f"{reference!r}: the module has no {name!r}") from error


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, and ends it now if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _outcome(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": resolve(request["function"])(**request["arguments"])}
    except MemoryError:
        traceback.print_exc()
        return {"failure": "memory", "message": "no memory was left"}
    except Exception as error:  # whatever it is, it is reported, with the traceback in the log
        traceback.print_exc()
        if (full := full_disk_error(error)) is not None:
            return {"error": describe(full)}
        if isinstance(error, BurnishError):
            return {"error": describe(error)}
        return {"failure": "error", "message": f"{type(error).__name__}: {error}"}


def describe(error: BurnishError) -> dict[str, Any]:
    """The error as JSON, under the name of the nearest class that the parent knows."""
    name = next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))
    plain = {key: value for key, value in vars(error).items() if isinstance(value, bool | int | float | str | None)}
    return {"class": name, "attributes": plain}


def main(folder: Path) -> int:
    """Runs the request in the folder and leaves its outcome there.

    Returns:
        The exit code: 0 where an outcome was written, be it an error or not, and `NO_ROOM` where there was no room.
    """
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    die_with_parent(request["parent"])
    if request["cpus"] is not None:
        os.sched_setaffinity(0, request["cpus"])
    if request["python_path"] is not None:
        sys.path.append(request["python_path"])
    logging.basicConfig(level=logging.INFO)
    outcome = _outcome(request)
    try:
        text = json.dumps(outcome, allow_nan=False)
    except (TypeError, ValueError) as error:
        text = json.dumps({"failure": "error", "message": f"its result is not JSON: {error}"})
    partial = folder / f"{RESULT}.partial"
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / RESULT)
    except OSError as error:
        if error.errno not in FULL:
            raise
        return NO_ROOM
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # The outcome is written: threads and destructors of the engines have nothing to add, and some hang at exit.
    os._exit(code)
