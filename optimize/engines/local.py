"""Work in a process of its own on this machine: bounded in time and memory, without the parent's secrets."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from optimize.engines.child import NO_ROOM, REQUEST, RESULT
from registry import errors
from registry.errors import BurnishError
from registry.full_disk import full_disk_told
from registry.stopping import is_stopped

FailureKind = Literal["error", "timeout", "memory", "died"]

# What a child may know of the parent's environment. Everything else, and so every token and password, stays out.
_ENVIRONMENT = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH",
    "VIRTUAL_ENV", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE",
    "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
)  # fmt: skip
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "CI": "true",  # OpenVINO and nncf report their use over the network at import where these two are not set
    "NNCF_CI": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
}
_POLL_S = 0.1
_POLLS_PER_TREE = 10  # a walk over all processes of the machine costs milliseconds, so it is done once a second
_TAIL_BYTES = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a child may take.

    Attributes:
        timeout_s: longest wall time.
        memory_mb: largest resident memory of the child and all its descendants, in MB of 10^6 bytes; None for
            four fifths of this machine's.
    """

    timeout_s: float = 900.0
    memory_mb: float | None = None

    @property
    def memory_bytes(self) -> float:
        """The memory limit in bytes."""
        return psutil.virtual_memory().total * 0.8 if self.memory_mb is None else self.memory_mb * 1e6


class ChildFailure(BurnishError):
    """A child process that gave no result.

    Attributes:
        kind: ``error`` (it raised), ``timeout``, ``memory`` (over the limit, or none left) or ``died``.
        log: the end of what it printed.
    """

    def __init__(self, message: str, *, kind: FailureKind, log: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind: FailureKind = kind
        self.log = log


def run_in_child(
    function: str,
    arguments: Mapping[str, Any],
    *,
    limits: Limits | None = None,
    cpus: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
    python_path: Path | None = None,
) -> Any:
    """What the function returns, called in a process of its own.

    The process leads its own session and dies with this one. It is started with ``-P``, so that nothing in the
    working directory can stand in for a library. It is ended soon after nobody waits for it any more
    (`registry.stopping`).

    Args:
        function: ``package.module:function``.
        arguments: its keyword arguments, as JSON has them.
        limits: its time and memory; the defaults of `Limits` where not given.
        cpus: the CPUs it may run on, or None for all.
        environment: variables to add to those that a child inherits (paths, locale, thread counts).
        python_path: a folder to append to the module search path, for functions that the user named.

    Returns:
        The function's result, as JSON has it.

    Raises:
        BurnishError: the one that the function raised, of the same class, with its message and hint.
        ChildFailure: it raised something else, or was stopped by a limit, or died.
        StorageError: a disk is full.
    """
    limits = limits or Limits()
    with full_disk_told(), tempfile.TemporaryDirectory(prefix="burnish-child-") as name:
        folder = Path(name)
        request = {
            "function": function,
            "arguments": dict(arguments),
            "parent": os.getpid(),
            "cpus": None if cpus is None else list(cpus),
            "python_path": None if python_path is None else str(python_path.resolve()),
        }
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        with (folder / "log").open("wb") as log:
            code, stopped = _run(folder, log.fileno(), limits, child_environment(environment))
        return _result(function, folder, code, None if stopped is None else (stopped, _why(stopped, limits)))


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: an allow-list of this process's, no network for model hubs, and ``extra``."""
    inherited = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return inherited | _OFFLINE | dict(extra or {})


def _run(folder: Path, log: int, limits: Limits, environment: dict[str, str]) -> tuple[int, FailureKind | None]:
    """Exit code of the child, and the limit that stopped it, if one did."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "optimize.engines.child", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
    try:
        stopped = _watch(process, limits)
    finally:
        _kill_group(process)
    return process.returncode, stopped


def _watch(process: "subprocess.Popen[bytes]", limits: Limits) -> FailureKind | None:
    """Returns when the child has ended or broken a limit."""
    deadline = time.monotonic() + limits.timeout_s
    most = limits.memory_bytes
    polls = 0
    while True:
        if is_stopped():
            return "died"
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return "timeout"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(_POLL_S, left_s))
            return None
        if _resident_bytes(process.pid, tree=polls % _POLLS_PER_TREE == 0) > most:
            return "memory"
        polls += 1


def _resident_bytes(pid: int, *, tree: bool) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        total = process.memory_info().rss
        for descendant in process.children(recursive=True) if tree else ():
            with contextlib.suppress(psutil.Error):
                total += descendant.memory_info().rss
    return total


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends whatever is left of the child's process group, and collects the child."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(stopped: FailureKind, limits: Limits) -> str:
    if stopped == "timeout":
        return f"it took longer than its limit of {limits.timeout_s:g} s"
    if stopped == "memory":
        return f"it took more than its limit of {limits.memory_bytes / 1e6:.0f} MB of memory"
    return "nobody waits for it any more"


def _result(function: str, folder: Path, code: int, stopped: tuple[FailureKind, str] | None) -> Any:
    log = _tail(folder / "log")
    if stopped is not None:
        raise ChildFailure(f"{function} was stopped: {stopped[1]}", kind=stopped[0], log=log)
    if code == NO_ROOM:
        raise OSError(errno.ENOSPC, "no room for a child's outcome", str(folder))
    if not (folder / RESULT).exists():
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise ChildFailure(f"{function} {how} and gave no result", kind="died", log=log)
    outcome = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if "error" in outcome:
        raise rebuilt(outcome["error"])
    if "failure" in outcome:
        raise ChildFailure(f"{function} failed: {outcome['message']}", kind=outcome["failure"], log=log)
    return outcome["result"]


def rebuilt(described: Mapping[str, Any]) -> BurnishError:
    """The error that the child raised, of the same class."""
    kind: type[BurnishError] = getattr(errors, described["class"])
    error = kind.__new__(kind)
    attributes = dict(described["attributes"])
    BurnishError.__init__(error, attributes.pop("message"), hint=attributes.pop("hint"))
    vars(error).update(attributes)
    return error


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", "replace").strip()
