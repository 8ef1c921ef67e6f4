"""The engine of this machine: steps one after the other, or a few at the same time on cores of their own."""

import os
import socket
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil

from optimize.engines.cores import usable_cores
from optimize.engines.performing import as_outcome, as_request, perform
from optimize.engines.port import Begun, Outcome, Resources, Task, nobody
from profiles.measure.host import fingerprint_host
from registry.errors import InputError
from registry.ports import Store
from registry.stopping import stopped_by


class LocalEngine:
    """Implements `optimize.engines.port.Engine` on this machine. A context manager.

    Two steps that need their cores alone never get the same core at the same time, in whichever process of this user
    they run (see `cores`).
    """

    def __init__(
        self,
        store: Store,
        *,
        scratch: Path | None = None,
        workers: int = 1,
        locks: Path | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts nothing.

        Args:
            store: the steps'.
            scratch: where their scratch folders are made; None for the machine's temporary folder.
            workers: how many steps run at the same time.
            locks: see `cores.reserve_cores`.
            waiting: likewise.
        """
        self._store = store
        self._scratch = scratch
        self._workers = workers
        self._locks = locks
        self._waiting = waiting
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    @staticmethod
    def check(name: str, resources: Resources) -> None:
        """Returns where this machine has what a step needs; see `optimize.engines.port.Engine`.

        Raises:
            InputError: it has not.
        """
        cores, memory_mb = len(usable_cores()), psutil.virtual_memory().total / 1e6
        lacking: str | None = None
        if (resources.cores or 0) > cores:
            lacking = f"{resources.cores} cores, and this machine has {cores}"
        elif (resources.memory_mb or 0) > memory_mb:
            lacking = f"{resources.memory_mb:g} MB of memory, and this machine has {memory_mb:.0f}"
        elif resources.labels or resources.accelerator:
            lacking = "a machine of certain labels or GPUs, which only a cluster tells apart"
        elif resources.gpus and resources.gpus > _gpus():
            lacking = f"{resources.gpus:g} GPUs, and this machine has {_gpus()}"
        if lacking is not None:
            raise InputError(f"{name} needs {lacking}", hint="Ask for less, or run on a cluster: BURNISH_ENGINE=ray.")

    def run(
        self, tasks: Iterable[Task], *, begun: Begun = nobody, meanwhile: Callable[[], None] | None = None
    ) -> Generator[Outcome, None, None]:
        """The outcome of each task, in the order in which they end; see `optimize.engines.port.Engine`.

        Args:
            tasks: to run.
            begun: told when one begins.
            meanwhile: never called: the steps run in this process.

        Raises:
            InputError: this machine does not have what a task needs; said before any work begins.
        """
        wanted = list(tasks)
        for task in wanted:
            self.check(task.name, task.resources)
        if self._workers == 1:
            # In this thread, where Ctrl-C and SIGTERM arrive.
            for task in wanted:
                yield self._outcome(task, self._perform(task, begun))
            return
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="burnish-step")
        try:
            running = {pool.submit(self._in_thread, task, begun): task for task in wanted}
            for future in as_completed(running):
                yield self._outcome(running[future], future.result())
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            self._stop.clear()

    def _in_thread(self, task: Task, begun: Begun) -> dict[str, Any]:
        with stopped_by(self._stop):
            return self._perform(task, begun)

    def _perform(self, task: Task, begun: Begun) -> dict[str, Any]:
        request = as_request(task)
        request["arguments"] |= {name: str(path) for name, path in task.files.items()}
        return perform(
            request,
            store=self._store,
            scratch=self._scratch,
            locks=self._locks,
            waiting=self._waiting,
            begun=partial(begun, task, ""),
        )

    def _outcome(self, task: Task, told: dict[str, Any]) -> Outcome:
        return as_outcome(task, told, node=socket.gethostname(), host=told["host"])


def _gpus() -> int:
    return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else len(fingerprint_host("").gpus)
