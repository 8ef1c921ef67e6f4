"""Which engine a campaign runs on: this machine where nothing is said, or what the environment names."""

import os
from pathlib import Path

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


def choose_engine(store: Store, *, scratch: Path) -> Engine:
    """The engine that the environment names; nothing is started yet.

    Args:
        store: the campaign's.
        scratch: where local steps have their scratch folders.

    Raises:
        InputError: the environment names no engine, or one that needs a shared store without one.
    """
    name = os.environ.get(ENGINE) or "local"
    if name == "local":
        workers = os.environ.get(WORKERS) or "1"
        if not workers.isdigit() or int(workers) < 1:
            raise InputError(f"{WORKERS} is {workers!r}, which is no number of workers")
        return LocalEngine(store, scratch=scratch, workers=int(workers))
    if name == "ray":
        from optimize.engines.ray_engine import RayEngine

        if not isinstance(store, SharedStore):
            raise InputError(
                "workers on a Ray cluster need a store that they share with this machine",
                hint=f"Set {VARIABLE} to s3://bucket/prefix, or to a folder that all of them mount.",
            )
        return RayEngine(store, address=os.environ.get(ADDRESS) or None)
    raise InputError(f"{ENGINE} is {name!r}, and the engines are local and ray")
