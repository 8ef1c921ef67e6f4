"""A campaign whose candidates are served and measured on a node of a real Ray cluster."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("ray")

from registry.codec import file_sha256
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx
from tests.doubles.ray_cluster import Cluster, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

CAMPAIGN = """
name: tiny
sources: [{name: mlp, onnx: model.onnx}]
samples: {evaluation: evaluation.npz}
variants: [float32]
serving: [{server: mlserver, max_batch_size: 4, max_batch_delay_ms: 1}]
level: brief
levels: levels.yaml
policy: {constraints: [accuracy_drop <= 0.5]}
resources: {labels: {shelf: '0'}}
"""
LEVELS = """
levels:
  - {name: brief, provisional: true, screen_s: 0.1, served: 1, rounds: 2, reruns: 0, a_a: true, warmup_s: 0.1,
     closed_s: 0.2, open_s: 0.2, longest_s: 0.3, requests: 20, percentiles: [50, 90], ladder: [1, 4], ladder_s: 0.1,
     stages: [0.4, 0.7, 0.9], stage_s: 0.2, timeout_s: 5.0}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray's sockets are in the folder, and a path of a socket is short.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        ray_cluster(1, Path(folder), cores=2) as started,
    ):
        yield started


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    write_onnx(mlp(), tmp_path)
    x = np.random.default_rng(1).normal(size=(200, FEATURES)).astype(np.float32)
    np.savez(tmp_path / "evaluation.npz", x=x, labels=mlp_answer(x).argmax(axis=1))
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    (tmp_path / "levels.yaml").write_text(LEVELS)
    return tmp_path


def burnish_run(folder: Path, address: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-m", "optimize", "run", "campaign.yaml", "--json"]
    command += ["--engine", "ray", "--store", str(folder / "mount")]
    environment = {**os.environ, "RAY_ADDRESS": address}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kept(folder: Path) -> dict[str, tuple[str, int]]:
    """Name -> (type, time of writing) of each result that is in the store."""
    found = {}
    for path in (folder / "mount" / "records").glob("found-*.json"):
        found[path.name] = (json.loads(path.read_text())["type"], path.stat().st_mtime_ns)
    return found


def measuring_worker(cluster: Cluster) -> psutil.Process:
    """The process of the node that measures: the load generator's parent."""
    for process in psutil.Process(cluster.pid).children(recursive=True):
        try:
            if "profiles.load.worker" in process.cmdline():
                parent = process.parent()
                assert parent is not None
                return parent
        except psutil.Error:
            continue
    raise AssertionError("nobody measures")


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "burnish-work" / "ledger.jsonl").read_text().splitlines()]


def test_a_campaign_is_measured_on_a_node_though_its_worker_is_killed_at_it(cluster: Cluster, campaign: Path):
    with burnish_run(campaign, cluster.address) as running:
        before: dict[str, tuple[str, int]] = {}
        while not any(kind == "Round" for kind, _ in before.values()):
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
            before = kept(campaign)
        servers = measuring_worker(cluster).children(recursive=True)
        measuring_worker(cluster).kill()
        told, log = running.communicate(timeout=120)
    assert running.returncode in (0, 3), log
    assert "The measuring begins on" in log
    assert not [process for process in servers if process.is_running()]

    # Nothing was lost, and nothing done twice.
    after = kept(campaign)
    assert {name: after[name] for name in before} == before
    entries = ledger(campaign)
    assert len({entry["key"] for entry in entries}) == len(entries)
    rounds = [entry["record"]["record"] for entry in entries if entry["kind"] == "Round"]
    assert len(rounds) == 4  # of one candidate, twice in each of two rounds
    assert sum(kind == "Round" for kind, _ in after.values()) == 4

    # All of it is here.
    work = campaign / "burnish-work"
    document = json.loads((work / "campaign.json").read_text())["record"]
    assert document["host"]["fingerprint"] == entries[-1]["components"]["host"]
    assert len(document["rounds"]) == 4
    for run in (run for one in rounds for run in one["runs"]):
        assert file_sha256(work / run["raw"]) == run["raw_sha256"]
    assert not (work / "servers").exists()
    assert not [path for path in (campaign / "mount" / "leases").rglob("*") if path.is_file()]
    assert not list((campaign / "mount" / "progress").glob("*"))

    # And no node is asked for it again.
    with burnish_run(campaign, "127.0.0.1:1") as again:
        told_again, log = again.communicate(timeout=60)
    assert again.returncode == running.returncode, log
    assert json.loads(told_again)["sentence"] == json.loads(told)["sentence"]
    assert ledger(campaign) == entries


def test_what_no_node_has_is_said_before_any_work(cluster: Cluster, campaign: Path):
    text = (campaign / "campaign.yaml").read_text().replace("shelf: '0'", "shelf: '9'")
    (campaign / "campaign.yaml").write_text(text)
    with burnish_run(campaign, cluster.address) as running:
        told, _ = running.communicate(timeout=60)
    assert running.returncode == 2
    assert (
        "no node of the Ray cluster has what the measuring needs: 1 cores, shelf=9"
        in json.loads(told)["error"]["message"]
    )
    assert not list((campaign / "burnish-work").rglob("*.onnx"))
