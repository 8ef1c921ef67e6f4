"""What an engine is: it runs the steps of a campaign somewhere, each with what it needs, and says what became of each.

A step is a function ``package.module:function(place, **arguments)``, with arguments and result as JSON has them. What
it reads and makes goes through the place's store, so that it can run in this process or on another machine.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from registry.errors import BurnishError
from registry.ports import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a step needs of a machine.

    Attributes:
        cores: how many, or None for all that the engine may use on a machine.
        memory_mb: at least so much of the machine's memory is kept for it, in MB of 10^6 bytes; None for any.
        gpus: how many.
        accelerator: type of the GPUs, by Ray's name (``L4``), or None for any.
        labels: labels that the machine must have, with their values.
        alone: whether nobody else may run on its cores meanwhile, as a measurement needs it.
    """

    cores: int | None = 1
    memory_mb: float | None = None
    gpus: float = 0.0
    accelerator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One step to run.

    Attributes:
        name: for people; each task of a run has one of its own.
        step: the function, as ``package.module:function``.
        arguments: its keyword arguments, as JSON has them.
        files: keyword argument -> a local file, that the step gets the path of on its own machine.
        python_path: a folder with code of the user's, which is on this machine alone; or None.
        resources: what it needs.
        begin_by: in seconds since 1970; one that has not begun by then fails with a `BudgetUsedUpError`. None for no
            such time.
    """

    name: str
    step: str
    arguments: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)
    python_path: Path | None = None
    resources: Resources = Resources()
    begin_by: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a task: a result or an error.

    Attributes:
        task: the task.
        result: what the step returned, as JSON has it; None where it failed.
        error: why it failed, or None.
        node: the machine's name.
        host: the fingerprint of the machine (see `profiles.measure.host`); numbers are compared within one only.
        cpus: the CPUs that the step was given.
        seconds: how long the step took.
    """

    task: Task
    result: Any
    error: BurnishError | None
    node: str
    host: str
    cpus: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a step runs.

    Attributes:
        store: of artifacts; what the step adds is there for others too, if the store is shared.
        scratch: an empty folder, removed after the step.
        cpus: the CPUs that the step may use.
        python_path: the task's, or None.
    """

    store: Store
    scratch: Path
    cpus: tuple[int, ...]
    python_path: Path | None = None


Begun = Callable[[Task, str], None]
"""Told that a task begins, and on which other machine (empty for this one); by any thread, and again after a loss."""


def nobody(task: Task, where: str) -> None:
    """Whom nobody wants to tell."""


class Engine(Protocol):
    """Runs tasks. A context manager."""

    def __enter__(self) -> "Engine":
        """Connects, or starts what is needed."""

    def __exit__(self, *ending: object) -> None:
        """Ends what was started, and what still runs."""

    def check(self, name: str, resources: Resources) -> None:
        """Returns where some machine has what a step of this name will need.

        Raises:
            InputError: none has.
        """

    def run(
        self, tasks: Iterable[Task], *, begun: Begun = nobody, meanwhile: Callable[[], None] | None = None
    ) -> Generator[Outcome, None, None]:
        """The outcome of each task, in the order in which they end.

        Whoever stops asking ends the tasks that still run.

        Args:
            tasks: what to run.
            begun: told when one begins.
            meanwhile: called now and then while tasks run elsewhere, by the thread that asks.

        Raises:
            InputError: no machine has what a task needs; said before any work begins.
            UnreachableError: the engine was lost.
        """
