"""The engine of this machine: steps one after the other, or a few at the same time on cores of their own."""

import os
import socket
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, Self

import psutil

from optimize.engines.cores import usable_cores
from optimize.engines.local import stopped_by
from optimize.engines.performing import as_outcome, as_request, perform
from optimize.engines.port import Outcome, Resources, Task
from profiles.measure.host import fingerprint_host, split_cpus
from registry.errors import InputError
from registry.ports import Store


class LocalEngine:
    """Implements `optimize.engines.port.Engine` on this machine. A context manager.

    Two steps that need their cores alone never get the same core at the same time, in whichever process of this user
    they run (see `cores`).
    """

    def __init__(
        self, store: Store, *, scratch: Path | None = None, workers: int = 1, locks: Path | None = None
    ) -> None:
        """Starts nothing.

        Args:
            store: the steps'.
            scratch: where their scratch folders are made; None for the machine's temporary folder.
            workers: how many steps run at the same time.
            locks: see `cores.reserve_cores`.
        """
        self._store = store
        self._scratch = scratch
        self._workers = workers
        self._locks = locks
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def run(self, tasks: Iterable[Task]) -> Generator[Outcome, None, None]:
        """The outcome of each task, in the order in which they end; see `optimize.engines.port.Engine`.

        Raises:
            InputError: this machine does not have what a task needs; said before any work begins.
        """
        wanted = list(tasks)
        for task in wanted:
            _check(task.name, task.resources)
        if self._workers == 1:
            # In this thread, where Ctrl-C and SIGTERM arrive.
            for task in wanted:
                yield self._outcome(task, self._perform(task))
            return
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="burnish-step")
        try:
            running = {pool.submit(self._in_thread, task): task for task in wanted}
            for future in as_completed(running):
                yield self._outcome(running[future], future.result())
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            self._stop.clear()

    def _in_thread(self, task: Task) -> dict[str, Any]:
        with stopped_by(self._stop):
            return self._perform(task)

    def _perform(self, task: Task) -> dict[str, Any]:
        request = as_request(task)
        request["arguments"] |= {name: str(path) for name, path in task.files.items()}
        return perform(request, store=self._store, scratch=self._scratch, locks=self._locks)

    def _outcome(self, task: Task, told: dict[str, Any]) -> Outcome:
        return as_outcome(task, told, node=socket.gethostname(), host=_fingerprint())


@cache
def _fingerprint() -> str:
    return fingerprint_host(split_cpus()[2]).fingerprint


def _check(name: str, resources: Resources) -> None:
    """Returns where this machine has what a step needs."""
    cores, memory_mb = len(usable_cores()), psutil.virtual_memory().total / 1e6
    lacking: str | None = None
    if (resources.cores or 0) > cores:
        lacking = f"{resources.cores} cores, and this machine has {cores}"
    elif (resources.memory_mb or 0) > memory_mb:
        lacking = f"{resources.memory_mb:g} MB of memory, and this machine has {memory_mb:.0f}"
    elif resources.labels or resources.accelerator:
        lacking = "a machine of certain labels or GPUs, which only a cluster tells apart"
    elif resources.gpus > _gpus():
        lacking = f"{resources.gpus:g} GPUs, and this machine has {_gpus()}"
    if lacking is not None:
        raise InputError(f"{name} needs {lacking}", hint="Ask for less, or run on a cluster: BURNISH_ENGINE=ray.")


def _gpus() -> int:
    return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else len(fingerprint_host("").gpus)
