"""burnish promote, rollback and history: real MLServers behind a real Envoy, a real MLflow, and a real Prometheus."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize import promoting
from optimize.cli import main
from optimize.production import Place
from optimize.promoting import Options, Promoting, find_subject, open_registry
from profiles.deploy import local
from profiles.measure.answers import answers_of
from registry.errors import CheckFailedError, InputError
from registry.ledger import Ledger
from registry.promotion import Journal
from registry.records import PromotionEvent
from tests.doubles.promotions import chosen_campaign

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("promote"),
    # MLflow's own, of the libraries that it uses.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]

pytest.importorskip("envoy")
QUICK = Options(watch_s=0.8, rate_rps=800.0, weights=(30, 100))


@pytest.fixture(scope="module")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store of MLflow's, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_registry(folder).check()
    return folder / "mlflow.db"


@pytest.fixture
def work(tmp_path: Path, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copy(mlflow_store, folder / "mlflow.db")
    return folder


def promoting_of(work: Path, options: Options = QUICK) -> tuple[Promoting, list[str]]:
    told: list[str] = []
    subject = find_subject(work, work=None, cluster=None, options=options)
    return Promoting(subject, options, open_registry(work), told.append), told


def events_of(work: Path) -> tuple[PromotionEvent, ...]:
    journal = Journal(Ledger.read(work / promoting.JOURNAL), lambda: "")
    return journal.events(journal.promotions[-1])


def answer(place: Place) -> float:
    (total,) = answers_of(place.target_of("sums"), {"x": np.ones((1, 4), np.float32)})["sum"].ravel()
    return float(total) - 4


@contextmanager
def prometheus_of(folder: Path, targets: Path) -> Iterator[str]:
    """A Prometheus that scrapes whatever the file names, four times a second."""
    binary = shutil.which("prometheus")
    if binary is None:
        message = "there is no prometheus (apt-get install prometheus)"
        pytest.fail(message) if os.environ.get("BURNISH_REQUIRE_ALL") else pytest.skip(message)
    folder.mkdir()
    config = {
        "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"},
        "scrape_configs": [
            {
                "job_name": "envoy",
                "metrics_path": "/stats/prometheus",
                "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "200ms"}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@contextmanager
def telling_of_envoy(work: Path, targets: Path) -> Iterator[None]:
    """Names Envoy to Prometheus as soon as it is there."""
    address, done = work / "production" / "servers" / "envoy" / "admin-address", threading.Event()
    # That of the Envoy before.
    address.unlink(missing_ok=True)

    def tell() -> None:
        while not done.wait(0.02):
            if address.is_file() and (named := address.read_text()):
                draft = targets.with_suffix(".draft")
                draft.write_text(json.dumps([{"targets": [named]}]))
                draft.replace(targets)
                return

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_from_the_first_champion_to_the_next_and_back(work: Path, tmp_path: Path):
    if local.available_servers()["mlserver"].version is None:
        pytest.skip("MLServer is not installed")
    served: list[float] = []
    chosen_campaign(work, 1000)
    first, _ = promoting_of(work)
    planned = first.plan()
    assert [step.name for step in planned.promotion.steps] == ["register", "swap", "champion", "unload"]
    assert planned.short == ""
    assert open_registry(work).aliases("sums") == {}
    assert first.apply(hold=lambda place: served.append(answer(place))).state == "completed"
    before = {path.name: path.read_bytes() for path in (work / "production/manifests").iterdir()}

    chosen_campaign(work, 2000)
    targets = tmp_path / "targets.json"
    targets.write_text("[]")
    with prometheus_of(tmp_path / "prometheus", targets) as url, telling_of_envoy(work, targets):
        second, told = promoting_of(work, replace(QUICK, prometheus=url, scrape_s=0.3))
        _wait_for(url)
        assert second.apply(hold=lambda place: served.append(answer(place))).state == "completed"
    # The same again has nothing to do.
    assert promoting_of(work)[0].plan().state == "completed"
    assert served == [1000, 2000]
    assert open_registry(work).aliases("sums") == {"champion": "2"}
    watched = {one.step: one.observation for one in events_of(work) if one.observation is not None}
    assert set(watched) == {"mirror", "weights-30", "weights-100"}
    counts = {step: one.answered for step, one in watched.items()}
    assert counts["mirror"] == {"champion": 320}
    assert counts["weights-100"] == {"challenger": 320}
    # Outside of these bounds 320 draws of probability 0.3 fall once in 10^9 times.
    assert 50 <= counts["weights-30"]["challenger"] <= 147
    # Envoy counts the copies, too: all of its half, and our own.
    mirrored = watched["mirror"].challenger["latency_p50_ms"]
    assert mirrored.method == "Envoy's histogram"
    assert 320 < mirrored.runs <= 640

    undone = promoting.roll_back(work, cluster=None, campaign_file=None, reason="it was worse", told=told.append)
    assert undone.champion == "1"
    assert {path.name: path.read_bytes() for path in (work / "production/manifests").iterdir()} == before
    assert open_registry(work).aliases("sums") == {"champion": "1"}
    reigns, word = promoting.history("sums", work)
    assert [(one.version, one.how, one.candidate.partition(" ")[0]) for one in reigns] == [
        ("1", "promoted", "adds-1000"), ("2", "promoted", "adds-2000"), ("1", "rolled back", "adds-1000"),
    ]  # fmt: skip
    assert (reigns[2].reason, word) == ("it was worse", "")


def _wait_for(url: str) -> None:
    from profiles.measure.prometheus import Prometheus
    from registry.errors import UnreachableError

    for _ in range(200):
        try:
            Prometheus(url).query("vector(1)")
        except UnreachableError:
            time.sleep(0.05)
        else:
            return
    pytest.fail("Prometheus did not begin")


# --- the command, where nothing is served ----------------------------------------------------------------------------


def burnish(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Exit code and the one JSON document of a command."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["burnish", *arguments, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out)


def test_the_plan_by_the_command_changes_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    chosen_campaign(work, 1000)
    code, told = burnish(capsys, "promote", str(work), "--watch", "1", "--rate", "50")
    assert code == 0
    assert told["version"] == "(not registered yet)"
    assert "watch for" in told["too_short"]
    assert [step["name"] for step in told["steps"]] == ["register", "swap", "champion", "unload"]
    assert not (work / "production").exists()
    code, told = burnish(capsys, "promote", str(work), "--watch", "1", "--rate", "50", "--apply")
    assert (code, told["error"]["kind"]) == (2, "input")
    assert "requests, and the limits take" in told["error"]["message"]
    assert open_registry(work).aliases("sums") == {}
    code, told = burnish(capsys, "promote", str(work), "--weights", "ten")
    assert (code, told["error"]["message"]) == (2, "the weights are 'ten'")
    code, told = burnish(capsys, "history", "sums", "--work", str(work))
    assert (code, told["error"]["kind"]) == (2, "input")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, told = burnish(capsys, "promote", str(work))
    assert (code, told["error"]["kind"]) == (4, "unreachable")


def test_what_may_not_be_promoted(work: Path, tmp_path: Path):
    chosen_campaign(work, 1000, level="quick")
    with pytest.raises(InputError, match="is provisional"):
        promoting_of(work)
    with pytest.raises(InputError, match="no finished campaign"):
        promoting_of(tmp_path / "nowhere")
    campaign = chosen_campaign(work, 1000)
    stored = Path(campaign.artifacts[campaign.variants[0].id]) / "model.onnx"
    stored.chmod(0o644)
    stored.write_bytes(stored.read_bytes() + b"\0")
    with pytest.raises(InputError, match="artifact"):
        promoting_of(work)


def test_a_passport_is_asked_for_its_signature(work: Path, tmp_path: Path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from optimize.passports import issue_passport

    keys = []
    for name in ("ours", "theirs"):
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (tmp_path / f"{name}.pem").write_bytes(private)
        (tmp_path / f"{name}.pub.pem").write_bytes(public)
        keys.append(tmp_path / f"{name}.pem")
    campaign = chosen_campaign(work, 1000)
    issue_passport(campaign, "adds-1000", work, key=keys[0])
    subject = find_subject(work, work=None, cluster=None, options=replace(QUICK, public_key=tmp_path / "ours.pub.pem"))
    assert "is genuine" in subject.notes[0]
    with pytest.raises(CheckFailedError, match="it is signed by") as caught:
        find_subject(work, work=None, cluster=None, options=replace(QUICK, public_key=tmp_path / "theirs.pub.pem"))
    assert caught.value.exit_code == 5
    with pytest.raises(InputError, match="proves nothing without a key"):
        find_subject(work, work=None, cluster=None, options=replace(QUICK, passport=tmp_path / "x"))
    # That of another variant proves nothing of this one.
    chosen_campaign(work, 2000)
    other = replace(QUICK, public_key=tmp_path / "ours.pub.pem", passport=work / "passports/adds-1000.passport.json")
    with pytest.raises(CheckFailedError, match="it is not the passport of adds-2000"):
        find_subject(work, work=None, cluster=None, options=other)


def test_nothing_to_take_back(work: Path):
    with pytest.raises(InputError, match="nothing was promoted from"):
        promoting.roll_back(work, cluster=None, campaign_file=None, reason="", told=lambda _: None)
    with pytest.raises(InputError, match="has no model 'sums'"):
        promoting.history("sums", work)
    with pytest.raises(InputError, match="no tracking store"):
        promoting.history("sums", work / "nowhere")
