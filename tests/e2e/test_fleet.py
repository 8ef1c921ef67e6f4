"""A fleet through the command line, with real campaigns: one wins or loses, one fails, one has no time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BURNISH = str(Path(sys.executable).with_name("burnish"))
FLEET = """
name: small
parallel: 2
defaults:
  samples: {evaluation: evaluation.npz}
  variants: [float32]
  serving: [{server: mlserver, max_batch_size: 4, max_batch_delay_ms: 1}]
  level: brief
  levels: levels.yaml
  policy: {constraints: [accuracy_drop <= 0.9], objective: maximize max_throughput_rps}
models:
  - {name: whole, group: ours, variants: [int8-dynamic], sources: [{onnx: model.onnx}]}
  - {name: broken, group: ours, sources: [{onnx: broken.onnx}]}
  - {name: hasty, group: theirs, sources: [{onnx: model.onnx}], minutes: 0.001}
"""
ALL = ("run", "--fleet", "fleet.yaml", "--json")


@pytest.fixture
def fleet(tiny: Path) -> Path:
    (tiny / "broken.onnx").write_bytes(b"no model")
    store = f"registry: {{tracking_uri: 'sqlite:///{tiny}/burnish-work/mlflow.db'}}"
    (tiny / "fleet.yaml").write_text(FLEET.replace("models:", f"  {store}\nmodels:"))
    return tiny


def burnish(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BURNISH, *arguments], cwd=cwd, check=False, capture_output=True, text=True, timeout=500)


def test_a_fleet_is_run_to_its_end_and_then_does_nothing_again(fleet: Path):
    done = burnish(*ALL, cwd=fleet)
    told = json.loads(done.stdout)
    models = {model["name"]: model for model in told["models"]}
    # With so small a model the machine's noise decides who wins, or that nobody does.
    assert models["whole"]["state"] in {"won", "no_winner"}, done.stderr
    assert Path(models["whole"]["report"]).is_file()
    assert models["broken"]["state"] == "failed"
    assert models["broken"]["kind"] in {"input", "untrusted_model"}
    assert "broken.onnx" in models["broken"]["reason"]
    assert models["hasty"]["state"] == "no_winner"
    assert models["hasty"]["cut"]
    assert "The budget of 0.001 minutes was used up" in models["hasty"]["reason"]
    assert done.returncode == told["exit_code"] == 2
    page = Path(told["report"]).read_text()
    assert all(f">{name}</a>" in page for name in models)
    work = Path(told["report"]).parent
    journals = {name: (work / "models" / name / "ledger.jsonl").read_bytes() for name in models}

    again = burnish(*ALL, cwd=fleet)
    assert again.returncode == 2
    assert again.stderr.count("(known)") == 2
    assert {name: (work / "models" / name / "ledger.jsonl").read_bytes() for name in models} == journals
    assert {model["name"]: model["state"] for model in json.loads(again.stdout)["models"]} == {
        name: model["state"] for name, model in models.items()
    }

    shown = burnish("report", str(work), "--markdown", cwd=fleet)
    assert shown.returncode == 0
    assert "# small: what was won" in shown.stdout


def test_a_fleet_that_is_wrong_begins_nothing(fleet: Path):
    (fleet / "fleet.yaml").write_text(FLEET.replace("level: brief", "levl: brief"))
    done = burnish("run", "--fleet", "fleet.yaml", cwd=fleet)
    assert done.returncode == 2
    assert "fleet.yaml:8: levl: unknown key 'levl'; did you mean 'level'?" in done.stderr
    assert not (fleet / "burnish-work" / "fleets").exists()
    assert burnish("run", cwd=fleet).returncode == 2
    assert burnish("run", "campaign.yaml", "--fleet", "fleet.yaml", cwd=fleet).returncode == 2
