"""Campaigns in which something goes wrong, and campaigns of other kinds than one ONNX file."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from registry import codec
from registry.records import Campaign
from tests.e2e.conftest import LEVELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BURNISH = str(Path(sys.executable).with_name("burnish"))

FACTORIES = """
import torch
from torch import nn


def _network(hidden):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 4)).eval()


class Named(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.layers = _network(hidden)

    def forward(self, x):
        return self.layers(x)


def wide():
    return Named(64)


def narrow():
    return Named(16)


def broken():
    raise RuntimeError("no weights today")
"""


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [BURNISH, "run", "campaign.yaml", *arguments],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )


def read(folder: Path) -> Campaign:
    return codec.loads((folder / "burnish-work" / "campaign.json").read_text())


def committed(work: Path) -> list[dict]:
    path = work / "ledger.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def server_of(work: Path, word: str) -> psutil.Process | None:
    """The one that runs longest."""
    found = []
    for process in psutil.process_iter(["cmdline", "name", "create_time"]):
        words = " ".join(process.info["cmdline"] or [])
        if process.info["name"] == word and str(work) in words:
            found.append(process)
    return min(found, key=lambda process: process.info["create_time"], default=None)


def test_a_server_that_dies_is_a_failed_candidate_and_the_rest_goes_on(tiny: Path):
    work = tiny / "burnish-work"
    with subprocess.Popen(
        [BURNISH, "run", "campaign.yaml"], cwd=tiny, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            found = [entry for entry in committed(work) if entry["kind"] == "Capacity" and "triton" in entry["subject"]]
            victim = server_of(work, "tritonserver")
            if found and victim is not None:
                victim.kill()
                break
            time.sleep(0.1)
        said = process.communicate(timeout=400)[1]
    assert process.returncode in (0, 3), said
    campaign = read(tiny)
    died = [failure for failure in campaign.failures if failure.phase == "measure"]
    assert len(died) == 1, campaign.failures
    assert "triton" in died[0].subject
    assert died[0].kind == "died"
    assert died[0].reason.startswith("triton has ended with status 137")
    assert died[0].detail.startswith("Its log ends:\n")
    measured = {measurement.candidate_id for measurement in campaign.measurements}
    assert any("mlserver" in one.name and one.id in measured for one in campaign.candidates)


def test_a_server_that_is_never_ready_is_a_failed_candidate_and_exit_3(tiny: Path):
    file = tiny / "campaign.yaml"
    file.write_text(file.read_text() + "limits: {load_timeout_s: 0.05}\n")
    done = run(tiny, "--json")
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert told["selected"] is None
    failures = read(tiny).failures
    assert {failure.phase for failure in failures if failure.kind != "not_applicable"} <= {"deploy", "screen"}
    assert any("ready" in failure.reason for failure in failures)


@pytest.fixture
def torch_folder(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "burnish-work").mkdir()
    shutil.copyfile(empty_store, tmp_path / "burnish-work" / "mlflow.db")
    (tmp_path / "tiny_networks.py").write_text(FACTORIES)
    (tmp_path / "levels.yaml").write_text(LEVELS)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(900, 8)).astype(np.float32)
    np.savez(tmp_path / "evaluation.npz", x=x, labels=rng.integers(0, 4, 900))
    np.savez(tmp_path / "calibration.npz", x=x[:64], labels=np.zeros(64, np.int64))
    (tmp_path / "campaign.yaml").write_text(
        "name: two\n"
        "sources:\n"
        "  - {name: wide, torch: 'tiny_networks:wide'}\n"
        "  - {name: narrow, torch: 'tiny_networks:narrow'}\n"
        "  - {name: broken, torch: 'tiny_networks:broken'}\n"
        "samples: {evaluation: evaluation.npz, calibration: calibration.npz}\n"
        "variants: [float32, openvino]\n"
        "serving: [{server: mlserver}]\n"
        "level: brief\n"
        "levels: levels.yaml\n"
        "policy: {constraints: [accuracy_drop <= 0.9], objective: maximize max_throughput_rps}\n"
    )
    return tmp_path


def test_several_torch_sources_are_judged_on_the_same_samples(torch_folder: Path):
    done = run(torch_folder, "--json")
    assert done.returncode in (0, 3), done.stderr
    campaign = read(torch_folder)
    assert [source.name for source in campaign.sources] == ["wide", "narrow"]
    assert {variant.name for variant in campaign.variants} >= {"wide/float32", "narrow/float32", "wide/openvino"}
    assert any(failure.subject == "broken" and "no weights today" in failure.reason for failure in campaign.failures)
    engines = {candidate.engine.name for candidate in campaign.candidates}
    assert engines <= {"onnxruntime", "openvino"}
    assert len({fidelity.samples_digest for fidelity in campaign.fidelities}) == 1
    assert campaign.candidates[0].variant_name == "wide/float32"


def test_a_baseline_that_cannot_be_had_is_the_users_error(torch_folder: Path):
    file = torch_folder / "campaign.yaml"
    file.write_text(
        file.read_text().replace(
            "{name: wide, torch: 'tiny_networks:wide'}", "{name: first, torch: 'tiny_networks:broken'}"
        )
    )
    done = run(torch_folder, "--json")
    assert done.returncode == 2, done.stderr
    assert "no weights today" in json.loads(done.stdout)["error"]["message"]
    assert not (torch_folder / "burnish-work" / "campaign.json").exists()
