"""A fleet on a Ray cluster of four nodes: 200 variants whose work is waiting, 20 MB each through a real S3 server.

The nodes are processes of this machine, each with one core, on loopback; the server is rclone's. A variant's step
waits, and commits an artifact of 20 MB of its own to the shared store. One node's rate is measured by the local engine
with the same step and store. The ideal is four times that.

Then the same command again: every result is in the ledger, and its artifact is looked for in the store.
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import end_on_sigterm, figure, finish, say

from optimize.engines.pool import LocalEngine
from optimize.engines.port import Resources, Task
from optimize.engines.ray_engine import RayEngine
from registry.ledger import Ledger
from registry.records import TensorSpec
from registry.shared_store import SharedStore
from registry.store import FolderStore
from tests.doubles.ray_cluster import ray_cluster
from tests.doubles.rclone import FOREIGN, serve_s3, settings

VARIANTS, NODES, ALONE = 200, 4, 6
WAIT_S = float(os.environ.get("FLEET_WAIT_S", "3"))
SIZE_BYTES = 20_000_000


def tasks(count: int, first: int = 0) -> list[Task]:
    return [
        Task(
            name=f"variant-{number:03}",
            step="tests.doubles.steps:wait_and_store",
            arguments={"number": number, "wait_s": WAIT_S, "size_bytes": SIZE_BYTES},
            resources=Resources(cores=1),
        )
        for number in range(first, first + count)
    ]


def run(folder: Path, store: SharedStore, address: str) -> tuple[int, float, float]:
    """(how many were made now, seconds until then, seconds of these from the first task on) for the whole fleet."""
    begin = time.monotonic()
    made, working = 0, 0.0
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        unknown = []
        for task in tasks(VARIANTS):
            known = ledger.find("TensorSpec", dict(task.arguments))
            if known is None or known.name not in store:
                unknown.append(task)
        if unknown:
            with RayEngine(store, address=address) as engine:
                started = time.monotonic()
                for outcome in engine.run(unknown):
                    assert outcome.error is None, outcome.error
                    # A record of any kind that keeps the digest.
                    record = TensorSpec(name=outcome.result, dtype="float32", shape=())
                    ledger.commit("TensorSpec", outcome.task.name, dict(outcome.task.arguments), record)
                    made += 1
                working = time.monotonic() - started
    return made, time.monotonic() - begin, working


def main() -> None:
    end_on_sigterm()
    for variable in FOREIGN:
        os.environ.pop(variable, None)
    with contextlib.ExitStack() as stack:
        # Sockets of Ray are in it: a short path.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True)))
        (folder / "buckets" / "models").mkdir(parents=True)
        (folder / "config").mkdir()
        os.environ |= settings(stack.enter_context(serve_s3(folder / "buckets", folder / "config")))
        store = SharedStore("s3://models/fleet", FolderStore(folder / "driver"))
        store.check()

        with LocalEngine(SharedStore("s3://models/alone", FolderStore(folder / "alone"))) as engine:
            one = median(outcome.seconds for outcome in engine.run(tasks(ALONE, first=1000)))
        say(f"one node: {one:.2f} s a variant, of which {WAIT_S:g} s are waiting")

        address = stack.enter_context(ray_cluster(NODES, folder)).address
        made, whole, working = run(folder, store, address)
        assert made == VARIANTS
        share = VARIANTS * one / working / NODES
        say(f"{NODES} nodes: {made} variants in {working:.1f} s ({whole:.1f} s with the connection)")
        say(f"speed-up {share * NODES:.2f} of {NODES}")

        made, again, _ = run(folder, store, address)
        assert made == 0
        say(f"the same again: {again:.2f} s, nothing made")
        finish(figure("fleet_share_of_ideal", share, ">= 0.8"), figure("fleet_resume_s", again, "<= 5.0"))


if __name__ == "__main__":
    main()
