"""One task, performed where this process is: its cores, its scratch folder, its outcome as plain JSON values."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optimize.engines.child import describe, resolve
from optimize.engines.cores import reserve_cores
from optimize.engines.local import ChildFailure, is_stopped, rebuilt
from optimize.engines.port import Outcome, Place, Task
from registry.errors import BurnishError
from registry.ports import Store


def perform(
    task: Mapping[str, Any],
    *,
    store: Store,
    scratch: Path | None,
    among: Sequence[int] | None = None,
    locks: Path | None = None,
) -> dict[str, Any]:
    """Runs a task here.

    Args:
        task: its fields, as `as_request` gives them, with the paths of its files among the arguments.
        store: the step's.
        scratch: where its scratch folder is made; None for the machine's temporary folder.
        among: the CPUs that it may get; None for all that this process may use.
        locks: see `reserve_cores`.

    Returns:
        ``result`` or ``error``, with ``cpus`` and ``seconds``.
    """
    resources = task["resources"]
    path = None if task["python_path"] is None else Path(task["python_path"])
    with reserve_cores(
        resources["cores"], alone=resources["alone"], among=among, folder=locks, stopped=is_stopped
    ) as cpus:
        begin = time.monotonic()
        told: dict[str, Any] = {"cpus": list(cpus)}
        with tempfile.TemporaryDirectory(prefix="step-", dir=scratch) as folder:
            place = Place(store=store, scratch=Path(folder), cpus=cpus, python_path=path)
            try:
                told["result"] = resolve(task["step"])(place, **task["arguments"])
            except BurnishError as error:
                told["error"] = describe_failure(error)
        return told | {"seconds": time.monotonic() - begin}


def as_request(task: Task) -> dict[str, Any]:
    """The fields of a task that `perform` needs, as JSON has them."""
    return {
        "step": task.step,
        "arguments": dict(task.arguments),
        "python_path": None if task.python_path is None else str(task.python_path),
        "resources": {**asdict(task.resources), "labels": dict(task.resources.labels)},
    }


def as_outcome(task: Task, told: Mapping[str, Any], *, node: str, host: str) -> Outcome:
    """The outcome of what `perform` returned."""
    return Outcome(
        task=task,
        result=told.get("result"),
        error=None if "error" not in told else restore_failure(told["error"]),
        node=node,
        host=host,
        cpus=tuple(told["cpus"]),
        seconds=float(told["seconds"]),
    )


def describe_failure(error: BurnishError) -> dict[str, Any]:
    """An error as JSON has it."""
    if isinstance(error, ChildFailure):
        return {"child": {"kind": error.kind, "log": error.log}, "message": error.message, "hint": error.hint}
    return describe(error)


def restore_failure(described: Mapping[str, Any]) -> BurnishError:
    """The error that was described, of the same class."""
    if "child" in described:
        return ChildFailure(described["message"], hint=described["hint"], **described["child"])
    return rebuilt(described)
