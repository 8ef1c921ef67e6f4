"""Work that several machines want at the same moment; threads with a store of their own stand for them."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from registry.records import TensorSpec
from registry.shared_store import SharedStore

SPEC = TensorSpec(name="x", dtype="float32", shape=("batch", 3))


def wanted_by_three(
    machine: Callable[[str, float], SharedStore],
    *,
    ttl_s: float,
    takes_s: float,
    while_making: Callable[[], object] = lambda: None,
) -> tuple[list[str], list[str]]:
    """What three machines do that ask for the same work at once.

    Args:
        machine: name and time to live of a lease -> the machine's store.
        ttl_s: the time to live.
        takes_s: how long the work takes.
        while_making: called when the work has begun.

    Returns:
        Names of the machines that did the work, and for each machine the name of the one whose result it got.
    """
    made: list[str] = []
    results: list[str] = []

    def make(name: str) -> TensorSpec:
        made.append(name)
        while_making()
        time.sleep(takes_s)
        return replace(SPEC, name=name)

    def work(name: str) -> None:
        results.append(machine(name, ttl_s).once("k", lambda: make(name)).name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made, results
