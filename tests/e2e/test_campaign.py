"""A whole campaign through the command line: real servers, a real tracking store, kills, and what a user does wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from optimize.status import read_status
from tests.doubles.busy import LONG_S, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BURNISH = str(Path(sys.executable).with_name("burnish"))


def burnish(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BURNISH, *arguments], cwd=cwd, check=False, capture_output=True, text=True, timeout=500)


def ledger(work: Path) -> list[dict]:
    path = work / "ledger.jsonl"
    # The last line may be being written.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def servers_of(work: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if any(str(work) in word for word in words):
            found.append(" ".join(words))
    return found


def wait_for_no_servers(work: Path) -> list[str]:
    deadline = time.monotonic() + LONG_S
    while (left := servers_of(work)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


# MLflow's own queries use an option of SQLAlchemy that is on its way out.
@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")
def test_from_a_model_to_a_verdict_and_again(tiny: Path):
    work = tiny / "burnish-work"
    # From nothing, the tracking store is made as well.
    shutil.rmtree(work)
    first = burnish("run", "campaign.yaml", "--json", cwd=tiny)
    # With so small a model the machine's noise decides who wins, or that nobody does; both come with a report.
    assert first.returncode in (0, 3), first.stderr
    told = json.loads(first.stdout)
    assert told["provisional"]
    assert Path(told["report"]).read_text().startswith("<!")
    entries = ledger(work)
    assert {"Source", "Variant", "Fidelity", "Screening", "Equivalence", "Capacity", "Round", "Deployed"} == {
        entry["kind"] for entry in entries
    }
    assert not wait_for_no_servers(work)

    served = {entry["subject"].partition(" @ ")[2] for entry in entries if entry["kind"] == "Round"}
    assert served == {"mlserver-grpc-b4-d1", "triton-rest-b4-d1"}

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=told["mlflow"]["location"])
    parent = client.get_run(told["mlflow"]["runs"][told["campaign_id"]])
    children = client.search_runs(
        [parent.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    candidates = {entry["components"]["candidate"] for entry in entries if entry["kind"] == "Round"}
    assert len(children) == len(candidates)
    assert not any("environ" in name.lower() for child in children for name in child.data.params)

    again = burnish("run", "campaign.yaml", "--json", cwd=tiny)
    assert again.returncode == first.returncode
    assert json.loads(again.stdout)["sentence"] == told["sentence"]
    assert ledger(work) == entries
    assert json.loads(again.stdout)["mlflow"]["runs"] == told["mlflow"]["runs"]

    shown = burnish("report", str(work), cwd=tiny)
    assert shown.returncode == 0
    assert "float32" in shown.stdout


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_no_server_and_goes_on(tiny: Path, ending: signal.Signals):
    work, file = tiny / "burnish-work", tiny / "campaign.yaml"
    # The baseline on both servers is all that it takes.
    file.write_text(file.read_text().replace("[float32, int8-dynamic, int8-static]", "[float32]"))
    with subprocess.Popen(
        [BURNISH, "run", "campaign.yaml"], cwd=tiny, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 200
        while not any(entry["kind"] == "Capacity" for entry in ledger(work)) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(ending)
        said = process.communicate(timeout=2 * LONG_S)[1]
    codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
    assert process.returncode == codes[ending], said
    assert "Traceback" not in said
    assert not wait_for_no_servers(work)
    left = read_status(work)
    assert left["state"] == ("killed" if ending == signal.SIGKILL else "interrupted")
    assert left["resumable"]
    assert left["phase"]["name"] in {"Finding capacities", "Measuring"}
    before = (work / "ledger.jsonl").read_bytes()
    before = before[: before.rfind(b"\n") + 1]

    again = burnish("run", "campaign.yaml", cwd=tiny)
    assert again.returncode in (0, 3), again.stderr
    after = (work / "ledger.jsonl").read_bytes()
    assert after.startswith(before)
    keys = [(entry["kind"], entry["key"]) for entry in ledger(work)]
    assert len(keys) == len(set(keys))


def test_two_runs_on_one_folder_are_refused(tiny: Path):
    with subprocess.Popen([BURNISH, "run", "campaign.yaml"], cwd=tiny, stderr=subprocess.DEVNULL) as first:
        lock = tiny / "burnish-work" / "ledger.jsonl.lock"
        until(lambda: lock.exists() and lock.read_text())
        second = burnish("run", "campaign.yaml", cwd=tiny)
        first.kill()
    assert second.returncode == 2
    assert str(first.pid) in second.stderr


def test_a_tracking_store_that_is_down_costs_no_work(tiny: Path):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://user:secret@127.0.0.1:9"}
    begin = time.monotonic()
    done = subprocess.run(
        [BURNISH, "run", "campaign.yaml", "--json"],
        cwd=tiny,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert "127.0.0.1:9" in error["message"]
    assert "secret" not in done.stdout + done.stderr
    assert time.monotonic() - begin < 200
    assert not ledger(tiny / "burnish-work")


def test_samples_that_do_not_fit_are_refused_before_the_work(tiny: Path):
    import numpy as np

    labels = np.zeros(900, np.int64)
    np.savez(tiny / "evaluation.npz", wrong=np.zeros((900, 8), np.float32), labels=labels)
    done = burnish("run", "campaign.yaml", cwd=tiny)
    assert done.returncode == 2
    assert "'wrong'" in done.stderr
    assert "'x'" in done.stderr


def test_a_metric_that_the_samples_cannot_give(tiny: Path):
    import numpy as np

    np.savez(tiny / "evaluation.npz", x=np.zeros((900, 8), np.float32))
    done = burnish("run", "campaign.yaml", cwd=tiny)
    assert done.returncode == 2
    assert "labels" in done.stderr
    assert "Traceback" not in done.stderr


def test_make_makes_variants_and_nothing_else(tiny: Path):
    done = burnish("make", "model.onnx", "--variant", "int8-dynamic", "--out", "made", "--json", cwd=tiny)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)["variants"]
    assert [entry["name"] for entry in made] == ["float32", "int8-dynamic"]
    assert all((tiny / entry["path"]).is_file() for entry in made)
    assert not (tiny / "burnish-work" / "servers").exists()
