"""Which engine a campaign runs on: this machine where nothing is said, or what the environment names."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from optimize.engines.pool import LocalEngine
from optimize.engines.port import Engine
from registry.errors import InputError
from registry.ports import Store
from registry.shared_store import VARIABLE, SharedStore

ENGINE = "BURNISH_ENGINE"
"""The environment variable with ``local`` or ``ray``."""
ADDRESS = "RAY_ADDRESS"
"""Ray's own environment variable with the address of a cluster; without it one is started here."""
WORKERS = "BURNISH_WORKERS"
"""The environment variable with how many steps run at the same time on this machine."""


def engine_named(name: str | None = None) -> Literal["local", "ray"]:
    """The engine of this name, or the one that the environment names.

    Raises:
        InputError: there is no such engine.
    """
    given = name or os.environ.get(ENGINE) or "local"
    if given == "local":
        return "local"
    if given == "ray":
        return "ray"
    what = "--engine" if name else ENGINE
    raise InputError(f"{what} is {given!r}, and the engines are local and ray")


def choose_engine(
    store: Store, *, scratch: Path, name: str | None = None, waiting: Callable[[], None] = lambda: None
) -> Engine:
    """The engine of a name, or the one that the environment names; nothing is started yet.

    Args:
        store: the campaign's.
        scratch: where local steps have their scratch folders.
        name: ``local`` or ``ray``; None for what the environment says.
        waiting: told once, where a local step waits for cores.

    Raises:
        InputError: there is no such engine, or it needs a shared store and has none.
    """
    if engine_named(name) == "local":
        workers = os.environ.get(WORKERS) or "1"
        if not workers.isdigit() or int(workers) < 1:
            raise InputError(f"{WORKERS} is {workers!r}, which is no number of workers")
        return LocalEngine(store, scratch=scratch, workers=int(workers), waiting=waiting)
    from optimize.engines.ray_engine import RayEngine

    if not isinstance(store, SharedStore):
        raise InputError(
            "workers on a Ray cluster need a store that they share with this machine",
            hint=f"Set {VARIABLE} to s3://bucket/prefix, or to a folder that all of them mount; or give --store.",
        )
    return RayEngine(store, address=os.environ.get(ADDRESS) or None)


@contextmanager
def engine_on_demand(
    store: Store, *, scratch: Path, name: str | None = None, waiting: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], Engine]]:
    """What gives the engine, which is opened when it is asked for first, and ended with the block.

    Args:
        store: as for `choose_engine`.
        scratch: likewise.
        name: likewise.
        waiting: likewise.
    """
    with ExitStack() as opened:
        engines: list[Engine] = []

        def engine() -> Engine:
            if not engines:
                chosen = choose_engine(store, scratch=scratch, name=name, waiting=waiting)
                engines.append(opened.enter_context(chosen))
            return engines[0]

        yield engine
