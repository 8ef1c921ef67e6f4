"""A campaign whose candidates are served and measured on a node of a real Ray cluster."""

import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("ray")

from optimize import reporting
from optimize.campaign import run_campaign
from optimize.config import load_campaign
from registry.codec import file_sha256
from registry.ports import Published
from registry.records import Campaign
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx
from tests.doubles.ray_cluster import Cluster, ray_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # campaigns wait for each other's cores
    pytest.mark.xdist_group("ray"),
    # Ray leaves sockets and files to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

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
  - {name: brief, provisional: true, screen_s: 0.1, served: 1, rounds: 3, reruns: 0, a_a: true, warmup_s: 0.1,
     closed_s: 0.2, open_s: 0.2, longest_s: 0.3, requests: 20, percentiles: [50, 90], ladder: [1, 4], ladder_s: 0.1,
     stages: [0.4, 0.7, 0.9], stage_s: 0.2, timeout_s: 5.0}
"""


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def phase(self, name: str, total: int) -> None: ...

    def begun(self, kind: str, subject: str, where: str = "") -> None: ...

    def ended(self, kind: str, subject: str) -> None: ...

    def done(self, subject: str, outcome: str) -> None:
        self.lines.append(f"{subject}: {outcome}")

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray's sockets are in the folder, and a path of a socket is short.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        ray_cluster(1, Path(folder), cores=2) as started,
    ):
        yield started


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a campaign file; nothing is recorded in MLflow, and what Ray is told is put back."""
    write_onnx(mlp(), tmp_path)
    x = np.random.default_rng(1).normal(size=(200, FEATURES)).astype(np.float32)
    np.savez(tmp_path / "evaluation.npz", x=x, labels=mlp_answer(x).argmax(axis=1))
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    (tmp_path / "levels.yaml").write_text(LEVELS)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr(reporting, "use_tracker", lambda uri, work: None)
    nowhere = Published(location="nowhere", runs={}, model_version=None)
    monkeypatch.setattr(reporting, "publish", lambda campaign, work: nowhere)
    return tmp_path


def run(folder: Path) -> tuple[Campaign, list[str]]:
    told = Told()
    work, store = folder / "burnish-work", str(folder / "mount")
    config = load_campaign(folder / "campaign.yaml")
    found, _, _ = run_campaign(config, base=folder, work=work, observer=told, engine="ray", store=store)
    return found, told.lines


def kept(folder: Path) -> dict[str, tuple[str, int]]:
    """Name -> (type, time of writing) of each result that is in the store."""
    found = {}
    for path in (folder / "mount" / "records").glob("found-*.json"):
        found[path.name] = (json.loads(path.read_text())["type"], path.stat().st_mtime_ns)
    return found


def measuring_worker(cluster: Cluster) -> psutil.Process | None:
    """The process of the node that measures just now: the load generator's parent."""
    there = psutil.Process(cluster.pid).children(recursive=True)
    for process in there:
        with suppress(psutil.NoSuchProcess):
            if "profiles.load.worker" in process.cmdline() and (parent := process.parent()) in there:
                return parent
    return None


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Killer(threading.Thread):
    """Kills the worker that measures once a round is in the store, and keeps what was there before."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        super().__init__(name="killer", daemon=True)
        self.before: dict[str, tuple[str, int]] = {}
        self.servers: list[psutil.Process] = []
        self.over = threading.Event()
        self._cluster, self._folder = cluster, folder

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.before = kept(self._folder)
            if not any(kind == "Round" for kind, _ in self.before.values()):
                continue
            # Between two windows there may be no load generator, and whoever was seen may have ended since.
            with suppress(psutil.NoSuchProcess):
                if (worker := measuring_worker(self._cluster)) is not None:
                    self.servers = worker.children(recursive=True)
                    worker.kill()
                    return


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "burnish-work" / "ledger.jsonl").read_text().splitlines()]


def test_a_campaign_is_measured_on_a_node_though_its_worker_is_killed_at_it(
    cluster: Cluster, campaign: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    killer = Killer(cluster, campaign)
    killer.start()
    try:
        found, told = run(campaign)
    finally:
        killer.over.set()
        killer.join()
    assert sum(line.startswith("The measuring begins on") for line in told) in (
        1,
        2,
    )  # a second look may miss the first
    assert not found.failures
    assert killer.servers
    assert not [process for process in killer.servers if lives(process)]

    # Nothing was lost, and nothing done twice.
    after = kept(campaign)
    assert {name: after[name] for name in killer.before} == killer.before
    entries = ledger(campaign)
    assert len({entry["key"] for entry in entries}) == len(entries)
    rounds = [entry for entry in entries if entry["kind"] == "Round"]
    assert len(rounds) == 6  # of one candidate, twice in each of three rounds
    assert sum(kind == "Round" for kind, _ in after.values()) == 6

    # All of it is here.
    work = campaign / "burnish-work"
    assert {entry["components"]["host"] for entry in rounds} == {found.host.fingerprint}
    assert len(found.rounds) == 6
    for one in (one for played in found.rounds for one in played.runs):
        assert file_sha256(work / one.raw) == one.raw_sha256
    assert (work / "report.html").is_file()
    assert not (work / "servers").exists()
    assert not [path for path in (campaign / "mount" / "leases").rglob("*") if path.is_file()]
    assert not list((campaign / "mount" / "progress").glob("*"))

    # And no node is asked for it again.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    again, _ = run(campaign)
    assert again == found
    assert ledger(campaign) == entries
