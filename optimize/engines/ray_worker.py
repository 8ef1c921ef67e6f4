"""The worker's side of `optimize.engines.ray_engine`: what Ray calls on a node. Nothing here imports Ray."""

import asyncio
import json
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from optimize.engines.cores import usable_cores
from optimize.engines.performing import describe_failure, fingerprint_of, perform
from optimize.packages import version
from registry.codec import digest
from registry.errors import BurnishError
from registry.shared_store import SharedStore
from registry.store import FolderStore

CACHE = "BURNISH_CACHE"
"""The environment variable with the folder where a node keeps what it fetched."""


def work(request: str) -> str:
    """Runs one task on this node; request and answer are JSON (see `performing.perform`)."""
    task = json.loads(request)
    begin: dict[str, Any] = {"cpus": [], "seconds": 0.0, "node": socket.gethostname(), "host": ""}
    try:
        store = _store(task["store"])
        task["arguments"] |= {name: str(store.fetch_file(sha256)) for name, sha256 in task["files"].items()}
        with _usual_event_loop():
            told = perform(_fitted(task), store=store, scratch=store.local.root / "scratch")
    except BurnishError as error:
        told = {"error": describe_failure(error)}
    return json.dumps({**begin, **told})


@contextmanager
def _usual_event_loop() -> Iterator[None]:
    """Asyncio's own event loop: Ray installs uvloop where it is, which reads in another way than transports expect."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(None)
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def _fitted(task: dict[str, Any]) -> dict[str, Any]:
    """The task with no more cores than there are: Ray believes what a node was started with."""
    resources = task["resources"]
    if resources["alone"] and not task.get("whole"):
        return task
    return {**task, "resources": {**resources, "cores": min(resources["cores"], len(usable_cores()))}}


def look(uri: str, mark: str) -> str:
    """What this node is, as JSON, and why it cannot use the shared store, if it cannot.

    Args:
        uri: of the store.
        mark: key of the word that the machine that asks has left in it.
    """
    about = {
        "node": socket.gethostname(),
        "host": fingerprint_of(usable_cores()),
        "burnish": version("burnish"),
        "python": platform.python_version(),
    }
    try:
        store = _store(uri)
        store.check()
        if store.told(mark) is None:
            about["error"] = (
                f"{uri} is another place there, without what this machine has written to it (a folder has to be "
                "mounted on all nodes, and AWS_ENDPOINT_URL to be the same)"
            )
    except BurnishError as error:
        about["error"] = str(error)
    return json.dumps(about)


@cache
def _store(uri: str) -> SharedStore:
    """The shared store, with a local one that all workers of this node have."""
    given = os.environ.get(CACHE)
    root = Path(given) if given else Path.home() / ".cache" / "burnish"
    return SharedStore(uri, FolderStore(root / digest(uri)))
