"""A real Ray cluster of several nodes on this machine, on loopback, in a process of its own.

As a program it starts the cluster, prints its address, and ends it when its standard input is closed.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Cluster(NamedTuple):
    """A cluster that runs: its address, and the process that all of its processes descend from."""

    address: str
    pid: int


@contextmanager
def ray_cluster(nodes: int, folder: Path, *, environment: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster of ``nodes`` nodes of one core each, the head among them.

    Args:
        nodes: how many.
        folder: an empty one, for Ray's own files and the nodes' cache. Its path must be short: Ray's sockets are in it.
        environment: variables of the nodes.
    """
    command = [sys.executable, "-m", "tests.doubles.ray_cluster", str(nodes), str(folder)]
    variables = {
        **os.environ,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "BURNISH_CACHE": str(folder / "cache"),
        **(environment or {}),
    }
    (folder / "ray").mkdir()  # Ray notes there which cluster runs, and makes no folder for it
    log = folder / "cluster.log"
    with log.open("wb") as stderr:
        cluster = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert cluster.stdout is not None
    assert cluster.stdin is not None
    try:
        address = ""
        while line := cluster.stdout.readline():
            if line.startswith("address "):
                address = line.split()[1]
                break
        assert address, log.read_text()
        yield Cluster(address, cluster.pid)
    finally:
        cluster.stdin.close()
        try:
            cluster.wait(timeout=30)
        finally:
            cluster.kill()
            cluster.wait()
            cluster.stdout.close()


def main(nodes: int, folder: Path) -> None:
    from ray import cluster_utils

    common = {"node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000, "include_dashboard": False}
    each = {**common, "num_cpus": 1, "memory": 1_000_000_000}
    head = {**each, "labels": {"shelf": "0"}}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    for number in range(1, nodes):
        cluster.add_node(wait=False, **each, labels={"shelf": str(number)})
    cluster.wait_for_nodes()
    print("address", cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
