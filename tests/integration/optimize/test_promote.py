"""burnish promote, rollback and history: real MLServers behind a real Envoy, a real MLflow, and a real Prometheus."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from optimize import model_promoting, rollback
from optimize.cli import main
from optimize.live_fidelity import JUDGED, LiveFidelity
from optimize.model_promoting import Promoting, find_subject
from optimize.production import Place
from optimize.promoting import Options, Planned
from optimize.rollback import open_registry
from optimize.samples import load_samples
from profiles.deploy import local, rollout_kubernetes
from profiles.deploy.rollout import ManifestRollout
from profiles.measure.answers import answers_of
from registry.errors import CheckFailedError, InputError, UnreachableError
from registry.ledger import Ledger
from registry.policy import parse_policy
from registry.promotion import Journal
from registry.records import Campaign, PromotionEvent
from registry.store import FolderStore
from tests.doubles.busy import until
from tests.doubles.core2 import SchedulerDouble
from tests.doubles.kubernetes_api import KubernetesDouble
from tests.doubles.ports import free_ports
from tests.doubles.promotions import chosen_campaign

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("promote"),
    # MLflow's own, of the libraries that it uses.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]

pytest.importorskip("envoy")
QUICK = Options(watch_s=0.8, rate_rps=800.0, weights=(30, 100))


@pytest.fixture
def work(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def promoting_of(work: Path, options: Options = QUICK) -> tuple[Promoting, list[str]]:
    told: list[str] = []
    subject = find_subject(work, work=None, cluster=None, options=options)
    return Promoting(subject, options, open_registry(work), told.append), told


def events_of(work: Path) -> tuple[PromotionEvent, ...]:
    journal = Journal(Ledger.read(work / rollback.JOURNAL), lambda: "")
    return journal.events(journal.promotions[-1])


def answer(place: Place) -> float:
    (total,) = answers_of(place.target_of("sums"), {"x": np.ones((1, 4), np.float32)})["sum"].ravel()
    return float(total) - 4


@contextmanager
def prometheus_of(folder: Path, targets: Path) -> Iterator[str]:
    """A Prometheus that scrapes whatever the file names, twice a second; who takes longer than that is gone for it."""
    binary = shutil.which("prometheus")
    if binary is None:
        message = "there is no prometheus (apt-get install prometheus)"
        pytest.fail(message) if os.environ.get("BURNISH_REQUIRE_ALL") else pytest.skip(message)
    folder.mkdir()
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "scrape_configs": [
            {
                "job_name": "envoy",
                "metrics_path": "/stats/prometheus",
                "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "100ms"}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    [port] = free_ports(1)
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


def test_from_the_first_champion_to_the_next_and_back(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if local.available_servers()["mlserver"].version is None:
        pytest.skip("MLServer is not installed")
    served: list[float] = []
    campaign = chosen_campaign(work, 1000)
    first, _ = promoting_of(work)
    planned = first.plan()
    assert [step.name for step in planned.promotion.steps] == ["register", "swap", "champion", "unload"]
    assert planned.short == ""
    assert open_registry(work).aliases("sums") == {}
    judged: dict[str, Any] = {}

    def look(place: Place) -> None:
        served.append(answer(place))
        judged.update(judge(work, campaign, tmp_path, place))

    assert first.apply(hold=look).state == "completed"
    assert judged["accuracy_drop"].value == pytest.approx(0, abs=1e-6)
    assert set(judged) <= JUDGED
    before = {path.name: path.read_bytes() for path in (work / "production/manifests").iterdir()}

    chosen_campaign(work, 2000)
    targets = tmp_path / "targets.json"
    targets.write_text("[]")
    with prometheus_of(tmp_path / "prometheus", targets) as url, telling_of_envoy(work, targets):
        second, told = promoting_of(work, replace(QUICK, prometheus=url, scrape_s=0.2))
        monkeypatch.setattr(model_promoting, "time", SimpleNamespace(sleep=partial(_until_scraped, url)))
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

    undone = rollback.roll_back(work, cluster=None, campaign_file=None, reason="it was worse", told=told.append)
    assert undone.champion == "1"
    assert {path.name: path.read_bytes() for path in (work / "production/manifests").iterdir()} == before
    assert open_registry(work).aliases("sums") == {"champion": "1"}
    reigns, word = rollback.history("sums", work)
    assert [(one.version, one.how, one.candidate.partition(" ")[0]) for one in reigns] == [
        ("1", "promoted", "adds-1000"), ("2", "promoted", "adds-2000"), ("1", "rolled back", "adds-1000"),
    ]  # fmt: skip
    assert (reigns[2].reason, word) == ("it was worse", "")


def judge(work: Path, campaign: Campaign, folder: Path, place: Place) -> dict[str, Any]:
    """What live answers are worth, by samples whose sums are known."""
    samples, x = folder / "samples.npz", np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.savez(samples, x=x, labels=x.sum(1, keepdims=True) + np.float32(1000))
    loaded, store = load_samples(samples), FolderStore(work)
    candidate, told = campaign.candidates[0], {"samples": samples, "loaded": loaded, "store": store, "base": folder}
    with pytest.raises(InputError, match="does not hold the samples that the campaign"):
        LiveFidelity(campaign, candidate, **told)
    fidelity = LiveFidelity(replace(campaign, samples_digest=loaded.digest, task_metric="mse"), candidate, **told)
    try:
        return dict(fidelity(place.target_of("sums")))
    finally:
        fidelity.close()


def _wait_for(url: str) -> None:
    from profiles.measure.prometheus import Prometheus

    def answers() -> bool:
        with suppress(UnreachableError):
            return bool(Prometheus(url).query("vector(1)"))
        return False

    until(answers)


def _until_scraped(url: str, seconds: float) -> None:
    """As long as is planned for it, and until it has happened: on a busy machine some scrapes are late, or fail."""
    from profiles.measure.prometheus import Prometheus

    time.sleep(seconds)
    now_s, newest = time.time(), "max(timestamp(envoy_cluster_upstream_rq_time_bucket))"
    until(lambda: any(at_s > now_s for _, at_s in Prometheus(url).query(newest)))


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
    assert "and the limits take 299 to decide on: watch for 6 s" in told["error"]["message"]
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
    subject = find_subject(work, work=None, cluster=None, options=replace(QUICK, signer=tmp_path / "ours.pub.pem"))
    assert "is genuine" in subject.notes[0]
    with pytest.raises(CheckFailedError, match="it is signed by") as caught:
        find_subject(work, work=None, cluster=None, options=replace(QUICK, signer=tmp_path / "theirs.pub.pem"))
    assert caught.value.exit_code == 5
    with pytest.raises(InputError, match="proves nothing without a key"):
        find_subject(work, work=None, cluster=None, options=replace(QUICK, passport=tmp_path / "x"))
    # That of another variant proves nothing of this one.
    chosen_campaign(work, 2000)
    other = replace(QUICK, signer=tmp_path / "ours.pub.pem", passport=work / "passports/adds-1000.passport.json")
    with pytest.raises(CheckFailedError, match="it is not the passport of adds-2000"):
        find_subject(work, work=None, cluster=None, options=other)


def test_a_passport_is_asked_for_its_identity(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from optimize.passports import issue_passport
    from registry.keyless import TOKEN_VARIABLE, SignerIdentity
    from tests.doubles.sigstore_services import IDENTITY, ISSUER, serve_sigstore, token

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(TOKEN_VARIABLE, token())
    with serve_sigstore(tmp_path) as (_, trust):
        issue_passport(chosen_campaign(work, 1000), "adds-1000", work, keyless=True, trust_config=trust)
    ours = SignerIdentity(identity=IDENTITY, issuer=ISSUER, trust_config=trust)
    subject = find_subject(work, work=None, cluster=None, options=replace(QUICK, signer=ours))
    assert "adds-1000.passport.sigstore.json is genuine" in subject.notes[0]
    for theirs in (replace(ours, identity="me@example.org"), replace(ours, issuer="https://accounts.google.com")):
        with pytest.raises(CheckFailedError, match="is not shown to have signed it"):
            find_subject(work, work=None, cluster=None, options=replace(QUICK, signer=theirs))


def test_nothing_to_take_back(work: Path):
    with pytest.raises(InputError, match="nothing was promoted from"):
        rollback.roll_back(work, cluster=None, campaign_file=None, reason="", told=lambda _: None)
    with pytest.raises(InputError, match="has no model 'sums'"):
        rollback.history("sums", work)
    with pytest.raises(InputError, match="no tracking store"):
        rollback.history("sums", work / "nowhere")


# --- on a Core 2 -----------------------------------------------------------------------------------------------


@contextmanager
def core2(kind: str, folder: Path) -> Iterator[tuple[Path, SchedulerDouble | KubernetesDouble]]:
    """A double of Core 2, and the file that names it."""
    storage = {"storage": str(folder / "models"), "storage_uri": "/mnt/models", "servers": {"mlserver": "mlserver"}}
    needed = {"burnish": ["mlserver", "python"]}
    with ExitStack() as stack:
        double: SchedulerDouble | KubernetesDouble
        if kind == "scheduler":
            double = stack.enter_context(SchedulerDouble())
            where = {"kind": "scheduler", "address": f"127.0.0.1:{double.port}"}
        else:
            double = stack.enter_context(KubernetesDouble())
            where = {"kind": "kubernetes", "kubeconfig": str(double.kubeconfig(folder)), "namespace": "seldon"}
        file = folder / "cluster.yaml"
        file.write_text(json.dumps({"cluster": {**where, **storage, "mesh": double.mesh, "requirements": needed}}))
        yield file, double


def promote_on(work: Path, cluster: Path, **options: Any) -> Planned:
    chosen = replace(Options(watch_s=0.0, weights=(100,)), **options)
    subject = find_subject(work, work=None, cluster=cluster, options=chosen)
    return Promoting(subject, chosen, open_registry(work), lambda _: None).apply()


@pytest.mark.parametrize("kind", ["scheduler", "kubernetes"])
def test_a_core2_gets_the_next_champion_by_its_uri(
    kind: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rollout_kubernetes, "SETTLE_S", 0.05)
    with core2(kind, tmp_path) as (cluster, double):

        def uri() -> str:
            if isinstance(double, SchedulerDouble):
                return str(double._models["production"][-1].model.modelSpec.uri)
            return str(double.get("production")["spec"]["storageUri"])

        chosen_campaign(work, 1000)
        if isinstance(double, SchedulerDouble):
            double.load("taken", "s3://somebody/else")
            with pytest.raises(InputError, match=r"taken serves something at Core 2 .*, and no version of sums is"):
                promote_on(work, cluster, production="taken")
        first = promote_on(work, cluster, production="production")
        assert [step.name for step in first.promotion.steps] == ["register", "swap", "champion", "unload"]
        old = uri()
        assert old.startswith("/mnt/models/adds-1000-")
        assert (tmp_path / "models" / old.removeprefix("/mnt/models/") / "model.onnx").is_file()
        # A model that answers otherwise is refused, and where the policy lets it, takes the place at once.
        chosen_campaign(work, 2000, output="total")
        with pytest.raises(InputError, match="takes or gives other tensors than the champion"):
            promote_on(work, cluster, production="production")
        against = ["latency_p90_ms <= 110% rel vs champion"]
        changing = parse_policy(against, "maximize max_throughput_rps", signature="may_change")
        chosen_campaign(work, 2000, output="total", policy=changing)
        # Beside nobody, nothing can be held against the champion: the plan says so, and no step will end by it.
        watching = Options(production="production")
        subject = find_subject(work, work=None, cluster=cluster, options=watching)
        planned = Promoting(subject, watching, open_registry(work), lambda _: None).plan()
        assert (
            f"`{against[0]}` cannot be watched: the champion does not answer beside it" in planned.promotion.notes[-1]
        )
        assert planned.promotion.watching is not None
        assert planned.promotion.watching.metrics == ("failed_share",)
        other = promote_on(work, cluster, production="production")
        assert "weights-100" not in [step.name for step in other.promotion.steps]
        assert any("never by weights" in note for note in other.promotion.notes)
        assert uri().startswith("/mnt/models/adds-2000-")
        assert open_registry(work).aliases("sums")["champion"] == other.promotion.version
        with pytest.raises(InputError, match=r"was promoted at Core 2 .* not at this machine"):
            rollback.roll_back(work, cluster=None, campaign_file=None, reason="", told=lambda _: None)
        rollback.roll_back(work, cluster=cluster, campaign_file=None, reason="", told=lambda _: None)
        assert uri() == old
        # The same inputs and outputs go by weights.
        chosen_campaign(work, 3000)
        assert "weights-100" in [
            step.name for step in promote_on(work, cluster, production="production").promotion.steps
        ]
        assert uri().startswith("/mnt/models/adds-3000-")


def test_another_promotion_under_way_is_in_the_way(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with core2("scheduler", tmp_path) as (cluster, double):
        assert isinstance(double, SchedulerDouble)
        chosen_campaign(work, 1000)
        promote_on(work, cluster)
        chosen_campaign(work, 2000)
        with monkeypatch.context() as patch:
            # Killed before the weights, and before anything could be undone.
            patch.setattr(ManifestRollout, "weights", _killed)
            patch.setattr(ManifestRollout, "restore", _killed)
            with pytest.raises(KeyboardInterrupt):
                promote_on(work, cluster)
        journal = work / rollback.JOURNAL
        rolling_back, journal_of_a_kill = journal.read_text(), _without_rollback(work)
        journal.write_text(journal_of_a_kill)
        campaign = chosen_campaign(work, 3000)
        with pytest.raises(InputError, match=r"the promotion of adds-2000 .* is under way"):
            promote_on(work, cluster)
        chosen_campaign(work, 2000)
        assert promote_on(work, cluster, mirror=0).state == "completed"
        assert double.loaded() == ["sums"]
        assert campaign.model_name == "sums"
        # Killed while it went back: that is completed before anything else is begun.
        rollback.roll_back(work, cluster=cluster, campaign_file=None, reason="", told=lambda _: None)
        journal.write_text(rolling_back)
        chosen_campaign(work, 3000)
        assert promote_on(work, cluster).state == "completed"
        assert [one.step for one in events_of(work)][-1] == "promotion"


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def _without_rollback(work: Path) -> str:
    """The journal up to where a process was killed, which journals no failure of its own."""
    lines = (work / rollback.JOURNAL).read_text().splitlines(keepends=True)
    return "".join(line for line in lines if '"subject":"rollback' not in line and " failed" not in line)
