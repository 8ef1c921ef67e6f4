"""Fifty parts of a Ray cluster at work killed with SIGKILL: drivers, workers, whole nodes, the S3 server.

Four nodes on this machine, each a process with one core, on loopback; the shared store is a real S3 server, rclone's. A
batch has 100 units; each takes a second, commits an artifact of 200 kB, and tells of it some time after. The driver of
a batch is started again until all of it is done, and the next batch follows. Who is killed at which moment comes of a
fixed seed: four of five some seconds after a unit has begun, the others some seconds after the kill before, when a
driver may be starting. In the place of a node that was killed another one comes; the server is started again after some
seconds.

Each making of a unit is noted in a file, at its begin and once its commit has returned. Work is done twice where a unit
is begun that was committed; it is lost where a unit of a finished batch is not in the driver's journal, or where the
store does not give the bytes of its artifact.

``--kills N`` for fewer. Fifty take ten minutes.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import end_on_sigterm, figure, finish, say

from tests.doubles.kills import Batch, Siege, random_kills
from tests.doubles.ray_cluster import ray_cluster
from tests.doubles.rclone import FOREIGN, S3Server, settings

SEED, NODES, LONGEST_S = 8, 4, 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    end_on_sigterm()
    for variable in FOREIGN:
        os.environ.pop(variable, None)
    with contextlib.ExitStack() as stack:
        # Sockets of Ray are in it: a short path.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True)))
        (folder / "buckets" / "models").mkdir(parents=True)
        (folder / "config").mkdir()
        server = stack.enter_context(S3Server(folder / "buckets", folder / "config"))
        os.environ |= settings(server.url)
        cluster = stack.enter_context(ray_cluster(NODES, folder))
        batch = Batch(folder, folder / "makings", first=0, count=100, wait_s=1.0, size_bytes=200_000)
        siege = stack.enter_context(Siege(cluster, server, folder / "batches", seed=given.seed, of=batch))
        begin = time.monotonic()
        siege.endure(random_kills(given.seed, given.kills, longest_s=LONGEST_S), say)
        lost, twice = siege.lost(), siege.done_twice()
        units = sum(one.count for one in siege.batches)
        begun, committed = siege.makings()
        say(
            f"{given.kills} kills in {time.monotonic() - begin:.0f} s: {units} units in {len(siege.batches)} batches, "
            f"{siege.runs} drivers; {begun} makings begun, {committed} committed; lost: {lost}, done twice: {twice}"
        )
        finish(figure("kills_lost", len(lost), "<= 0"), figure("kills_done_twice", len(twice), "<= 0"))


if __name__ == "__main__":
    main()
