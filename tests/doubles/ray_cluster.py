"""A real Ray cluster of several nodes on this machine, on loopback, in a process of its own.

As a program it starts the cluster, prints its address, adds a node for each line of its standard input, and ends all of
it when that is closed.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NODES_S = 180.0
"""How long nodes have to join; Ray's own 30 s are not enough for any machine that others use, too."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that runs: its address, and the process that all of its processes descend from."""

    address: str
    process: "subprocess.Popen[str]"

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def add_node(self) -> None:
        """Returns when there is one node more."""
        assert self.process.stdin is not None
        self.process.stdin.write("node\n")
        self.process.stdin.flush()
        assert _told(self.process, "node") is not None, "the cluster has ended"


@contextmanager
def ray_cluster(
    nodes: int, folder: Path, *, cores: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """A cluster of ``nodes`` nodes, the head among them.

    Args:
        nodes: how many.
        cores: how many each of them says it has.
        folder: an empty one, for Ray's own files and the nodes' cache. Its path must be short: Ray's sockets are in it.
        environment: variables of the nodes.
    """
    command = [sys.executable, "-m", "tests.doubles.ray_cluster", str(nodes), str(cores)]
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
        address = _told(cluster, "address")
        assert address is not None, log.read_text()
        yield Cluster(address, cluster)
    finally:
        cluster.stdin.close()
        try:
            cluster.wait(timeout=90)
        finally:
            cluster.kill()
            cluster.wait()
            cluster.stdout.close()


def _told(cluster: "subprocess.Popen[str]", word: str) -> str | None:
    """What follows the word on the line that begins with it; None where the cluster ends before."""
    assert cluster.stdout is not None
    while line := cluster.stdout.readline():
        if line.split()[:1] == [word]:
            return line.partition(" ")[2].strip()
    return None


def main(nodes: int, cores: int) -> None:
    from ray import cluster_utils

    common = {"node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000, "include_dashboard": False}
    each = {**common, "num_cpus": cores, "memory": 1_000_000_000}
    head = {**each, "labels": {"shelf": "0"}}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    for number in range(1, nodes):
        cluster.add_node(wait=False, **each, labels={"shelf": str(number)})
    cluster.wait_for_nodes(NODES_S)
    print("address", cluster.address, flush=True)
    for number, _ in enumerate(sys.stdin, start=nodes):
        cluster.add_node(**each, labels={"shelf": str(number)})
        print("node", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
