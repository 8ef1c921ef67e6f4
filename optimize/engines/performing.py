"""One task, performed where this process is: its cores, its scratch folder, its outcome as plain JSON values."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from optimize.engines.child import describe, resolve
from optimize.engines.cores import alone_on, cores_alone, reserve_cores, usable_cores
from optimize.engines.local import ChildFailure, rebuilt
from optimize.engines.port import Outcome, Place, Task
from optimize.engines.scratch import scratch_folder
from profiles.measure.host import fingerprint_host, split_cpus
from registry.errors import BudgetUsedUpError, BurnishError
from registry.full_disk import full_disk_told
from registry.ports import Store


def perform(
    task: Mapping[str, Any],
    *,
    store: Store,
    scratch: Path | None,
    among: Sequence[int] | None = None,
    locks: Path | None = None,
    waiting: Callable[[], None] = lambda: None,
    begun: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs a task here.

    A step that needs its cores alone is pinned to them, and so is all that it starts. Steps of a thread that has cores
    alone run on these.

    Args:
        task: its fields, as `as_request` gives them, with the paths of its files among the arguments.
        store: the step's.
        scratch: where its scratch folder is made; see `scratch.scratch_folder`.
        among: the CPUs that it may get; None for all that this process may use.
        locks: see `reserve_cores`.
        waiting: likewise.
        begun: told when it has its cores and begins.

    Returns:
        ``result`` or ``error``, with ``cpus``, ``host`` and ``seconds``.

    Raises:
        StorageError: there is no room for the scratch folder.
        InterruptedError: nobody waits for the task any more.
    """
    path = None if task["python_path"] is None else Path(task["python_path"])
    with _cores(task["resources"], among=among, folder=locks, waiting=waiting) as cpus:
        begin = time.monotonic()
        told: dict[str, Any] = {"cpus": list(cpus), "host": fingerprint_of(usable_cores())}
        begin_by = task.get("begin_by")
        if begin_by is not None and time.time() > begin_by:
            late = BudgetUsedUpError("the time to begin it was over")
            return told | {"error": describe_failure(late), "seconds": 0.0}
        if begun is not None:
            begun()
        with full_disk_told(), scratch_folder(scratch) as folder:
            place = Place(store=store, scratch=folder, cpus=cpus, python_path=path)
            try:
                with full_disk_told(place.scratch):
                    told["result"] = resolve(task["step"])(place, **task["arguments"])
            except BurnishError as error:
                told["error"] = describe_failure(error)
        return told | {"seconds": time.monotonic() - begin}


@contextmanager
def _cores(resources: Mapping[str, Any], **how: Any) -> Iterator[tuple[int, ...]]:
    """The cores of a step."""
    if held := cores_alone():
        yield held[: resources["cores"]]
        return
    with reserve_cores(resources["cores"], alone=resources["alone"], **how) as cpus:
        if not resources["alone"]:
            yield cpus
            return
        with alone_on(cpus):
            yield cpus


@cache
def fingerprint_of(usable: tuple[int, ...]) -> str:
    """The fingerprint of this machine, where these CPUs are the ones that this thread may use."""
    return fingerprint_host(split_cpus()[2]).fingerprint


def as_request(task: Task) -> dict[str, Any]:
    """The fields of a task that `perform` needs, as JSON has them."""
    return {
        "step": task.step,
        "arguments": dict(task.arguments),
        "python_path": None if task.python_path is None else str(task.python_path),
        "begin_by": task.begin_by,
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
