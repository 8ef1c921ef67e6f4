"""Whole campaigns on doubles of Core 2, with a real MLServer where anything is measured: how they end, well or not."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pytest

from optimize import reporting
from optimize.campaign import run_campaign
from optimize.checking import check_candidate, check_endpoint
from optimize.clusters import owner_of
from optimize.config import load_campaign
from optimize.diagnosis import diagnose
from optimize.plan import Observer
from optimize.rendering import render_candidate, rendering
from optimize.reporting import read_campaign
from optimize.serving import serve_model, serving_profile
from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.deploy import scheduler_channel
from profiles.deploy.scheduler_cluster import OWNER
from profiles.serving.mlserver import IMPLEMENTATION
from registry.errors import BurnishError, InputError, UnreachableError
from registry.ports import Published
from registry.records import Campaign, Failure
from registry.selection import fidelity_of
from tests.doubles.busy import until
from tests.doubles.core2 import LOOPBACK, SchedulerDouble, ServerDouble
from tests.doubles.core2_agent import AgentDouble
from tests.doubles.kubernetes_api import KubernetesDouble, RefusalError
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # campaigns wait for each other's cores
    pytest.mark.xdist_group("servers"),
]

BURNISH = str(Path(sys.executable).with_name("burnish"))
TOKEN = "hush-hush"
WAIT_S = 240.0
CAPABLE = frozenset({"mlserver", "burnish"})
CAMPAIGN = """
name: tiny
sources: [{name: mlp, onnx: model.onnx}]
samples: {evaluation: evaluation.npz}
variants: [ort-optimized]
serving: [{server: mlserver, max_batch_size: 4, max_batch_delay_ms: 1}]
level: brief
levels: levels.yaml
limits: {load_timeout_s: 60}
policy:
  constraints: [accuracy_drop <= 0.5]
  objective: minimize size_mb
"""
# Short windows: what is tested is the way through, not the numbers.
LEVELS = """
levels:
  - {name: brief, provisional: true, screen_s: 0.05, served: 1, rounds: 1, reruns: 0, a_a: false, warmup_s: 0.1,
     closed_s: 0.5, open_s: 0.3, longest_s: 0.5, requests: 50, percentiles: [50, 90], ladder: [1, 4], ladder_s: 0.2,
     stages: [0.4, 0.7], stage_s: 0.3, timeout_s: 5.0}
"""
Cluster = dict[str, Any]


def write_campaign(folder: Path, cluster: Cluster) -> Path:
    path = folder / "campaign.yaml"
    path.write_text(f"{CAMPAIGN}cluster: {json.dumps(cluster)}\n")  # JSON is YAML, too
    return path


def scheduler_section(double: SchedulerDouble, **fields: Any) -> Cluster:
    section = {"kind": "scheduler", "address": f"{LOOPBACK}:{double.port}", "mesh": double.mesh, "storage": "shelf"}
    return {**section, "servers": {"mlserver": "bench"}, **fields}


def bench(**fields: Any) -> dict[str, ServerDouble]:
    return {"bench": ServerDouble(**{"capabilities": CAPABLE, **fields})}


class Watching(Observer):
    """An observer that remembers what it was told, and may do something about it."""

    def __init__(self, react: Callable[[str], None] = lambda _: None) -> None:
        self.told: list[str] = []
        self._react = react

    def phase(self, name: str, total: int) -> None:
        self.note(name)

    def done(self, subject: str, outcome: str) -> None:
        self.note(f"{subject}: {outcome}")

    def note(self, text: str) -> None:
        self.told.append(text)
        self._react(text)


def burnish(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BURNISH, *arguments], cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def go(folder: Path, observer: Watching | None = None) -> Campaign:
    config = load_campaign(folder / "campaign.yaml")
    return run_campaign(config, base=folder, work=folder / "work", observer=observer or Watching())[0]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentDouble]:
    with AgentDouble(tmp_path_factory.mktemp("agent"), MLSERVER_PARALLEL_WORKERS="0") as started:
        yield started


@pytest.fixture(scope="module")
def core2(agent: AgentDouble) -> Iterator[SchedulerDouble]:
    with SchedulerDouble() as double:
        double.servers = bench(agent=agent)
        yield double


@pytest.fixture(scope="module")
def finished(core2: SchedulerDouble, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Campaign]:
    """A campaign that went well, and is the start of the others: what was made and judged in it is known to them."""
    folder = tmp_path_factory.mktemp("campaign")
    write_onnx(mlp(), folder)
    x = np.random.default_rng(1).normal(size=(120, FEATURES)).astype(np.float32)
    np.savez(folder / "evaluation.npz", x=x, labels=mlp_answer(x).argmax(axis=1))
    (folder / "levels.yaml").write_text(LEVELS)
    write_campaign(folder, scheduler_section(core2))
    done = burnish(folder, "run", "campaign.yaml", "--work", "work", "--json")
    assert done.returncode == 0, done.stderr
    return folder, read_campaign(folder / "work")


@pytest.fixture
def folder(finished: tuple[Path, Campaign], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, for another cluster, for which nothing is measured yet; without MLflow, which takes long."""
    monkeypatch.setattr(scheduler_channel, "RETRY_PAUSE_S", 0.05)
    monkeypatch.setattr(reporting, "use_tracker", lambda *_: None)
    monkeypatch.setattr(reporting, "publish", lambda *_: Published(location="", runs={}, model_version=None))
    return Path(shutil.copytree(finished[0], tmp_path / "campaign"))


@pytest.fixture
def double() -> Iterator[SchedulerDouble]:
    with SchedulerDouble() as scheduler:
        scheduler.servers = bench()
        scheduler.load("theirs", "s3://theirs")
        yield scheduler


# --- from end to end -----------------------------------------------------------------------------------------------


def test_a_campaign_is_served_measured_recorded_and_rendered(
    core2: SchedulerDouble, finished: tuple[Path, Campaign], tmp_path: Path
) -> None:
    folder, campaign = finished
    assert campaign.failures == ()
    assert campaign.verdict.selected is not None
    assert {one.cluster for one in campaign.candidates} == {f"bench of Core 2 at {LOOPBACK}:{core2.port}"}
    assert {one.server_version for one in campaign.candidates} == {"unknown"}
    # On a busy machine runs may be invalid, but there are some, and of the server they know nothing.
    measured = {one.candidate_id: {run.load.name: run for run in one.runs} for one in campaign.rounds}
    assert measured.keys() == {one.id for one in campaign.candidates}
    for runs in measured.values():
        assert not {"rss_mb", "cpu_s_per_1k"} & runs["closed"].metrics.keys()
    # Any single window may be over before a process that stands still has done anything in it.
    climbed = {one.candidate_id: max(rps for _, rps in one.ladder) for one in campaign.capacities}
    assert all(climbed[name] + sum(run.ok for run in runs.values()) > 0 for name, runs in measured.items())
    assert core2.loaded() == []
    with closing(sqlite3.connect(folder / "work" / "mlflow.db")) as database:
        recorded = database.execute("select distinct value from params where key = 'served_by'").fetchall()
    assert recorded == [(f"bench of Core 2 at {LOOPBACK}:{core2.port}",)]
    told = render_candidate(folder / "work", None, tmp_path / "out", rendering(storage_uri="s3://models"))
    assert "manifests/model.yaml" in told["files"]


def test_the_same_command_again_deploys_nothing(
    core2: SchedulerDouble, folder: Path, finished: tuple[Path, Campaign]
) -> None:
    before = core2.methods().count("LoadModel")
    again = go(folder)
    assert again.verdict == finished[1].verdict
    assert core2.methods().count("LoadModel") == before
    # What one server gave is not taken for another's.
    core2.servers["other"] = ServerDouble(frozenset({"sklearn"}))
    write_campaign(folder, scheduler_section(core2, servers={"mlserver": "other"}))
    assert {one.phase for one in go(folder).failures} == {"deploy"}
    assert core2.methods().count("LoadModel") > before
    del core2.servers["other"]


class Held:
    """Stands for an agent that is asked for a model, and begins with it once it may."""

    def __init__(self, agent: AgentDouble) -> None:
        self.http, self.grpc = agent.http, agent.grpc
        self.asked, self.may_begin = threading.Event(), threading.Event()
        self._agent = agent

    def load(self, model: pb.Model, version: int) -> str:
        self.asked.set()
        self.may_begin.wait(2 * WAIT_S)
        return self._agent.load(model, version)

    def unload(self, model: pb.Model, version: int) -> None:
        self._agent.unload(model, version)


def test_what_a_killed_run_left_is_taken_away_by_the_next_and_by_ctrl_c(
    core2: SchedulerDouble, agent: AgentDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core2.load("theirs", "s3://theirs")
    shutil.rmtree(folder / "work" / "raw")
    # Another level, so that nothing is known yet.
    (folder / "levels.yaml").write_text(LEVELS.replace("rounds: 1", "rounds: 50"))

    def run_until_loaded(number: signal.Signals) -> tuple[int, str]:
        held = Held(agent)
        monkeypatch.setattr(core2.servers["bench"], "agent", held)
        command = [BURNISH, "run", "campaign.yaml", "--work", "work"]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
            try:
                until(lambda: held.asked.is_set() or process.poll() is not None, limit_s=WAIT_S)
                # It waits for its first model: neither is it further, nor at its end.
                process.send_signal(number)
                held.may_begin.set()
                said = process.communicate(timeout=WAIT_S)[1]
            finally:
                process.kill()
        assert held.asked.is_set(), said
        return process.returncode, said

    run_until_loaded(signal.SIGKILL)
    (left,) = set(core2.loaded()) - {"theirs"}
    code, said = run_until_loaded(signal.SIGINT)
    assert code == 130, said
    assert f"took away what a killed run left: {left}" in said
    assert core2.loaded() == ["theirs"]
    core2.forget("theirs")


class AsTriton:
    """Stands for an agent whose Triton has an onnxruntime backend of its own: our runtime opens the model instead."""

    def __init__(self, agent: AgentDouble, folder: Path) -> None:
        self.http, self.grpc = agent.http, agent.grpc
        self.configs: list[str] = []
        self._agent = agent
        self._folder = folder

    def load(self, model: pb.Model, version: int) -> str:
        source, folder = Path(model.modelSpec.uri), self._folder / model.meta.name
        self.configs.append((source / "config.pbtxt").read_text())
        shutil.copytree(source / "1", folder)
        parameters = {"uri": "./model.onnx", "extra": {"engine": "onnxruntime"}}
        settings = {"name": model.meta.name, "implementation": IMPLEMENTATION, "parameters": parameters}
        (folder / "model-settings.json").write_text(json.dumps(settings))
        changed = pb.Model()
        changed.CopyFrom(model)
        changed.modelSpec.uri = str(folder)
        return self._agent.load(changed, version)

    def unload(self, model: pb.Model, version: int) -> None:
        self._agent.unload(model, version)


def test_a_backend_of_tritons_own_is_judged_by_what_it_answers(
    folder: Path, double: SchedulerDouble, agent: AgentDouble, tmp_path: Path
) -> None:
    triton = AsTriton(agent, tmp_path / "triton")
    double.servers = bench(agent=agent) | {"gpu": ServerDouble(frozenset({"onnx"}), agent=triton)}
    path = write_campaign(folder, scheduler_section(double, servers={"mlserver": "bench", "triton": "gpu"}))
    own = "{server: triton, backend: onnxruntime, max_batch_size: 4, max_batch_delay_ms: 1}"
    text = path.read_text().replace("max_batch_delay_ms: 1}]", f"max_batch_delay_ms: 1}}, {own}]")
    path.write_text(text.replace("[ort-optimized]", "[float32]"))
    campaign = go(folder)
    assert campaign.failures == ()
    assert all('backend: "onnxruntime"' in config for config in triton.configs)
    served = [one for one in campaign.candidates if one.serving.of_server]
    assert [one.engine_version for one in served] == ["unknown"]
    found = fidelity_of(served[0], campaign.variants, campaign.fidelities)
    assert found is not None
    assert (found.engine_version, found.instruction_set, found.samples) == ("unknown", "unknown", 120)
    assert found.metrics["accuracy_drop"].value == 0
    assert found.metrics["cosine"].value > 0.999
    assert {one.engine_version for one in campaign.fidelities} == {"unknown", onnxruntime.__version__}


# --- single models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster_file(tmp_path: Path, core2: SchedulerDouble) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps({"cluster": scheduler_section(core2)}))
    return path


HOW: dict[str, Any] = {"requests": 8, "concurrency": 2, "tolerance": 0.05, "seed": 0}


def test_a_model_is_served_and_asked_through_the_mesh(
    core2: SchedulerDouble, finished: tuple[Path, Campaign], cluster_file: Path
) -> None:
    folder = finished[0]
    profile = serving_profile(server="mlserver", max_batch_size=4, max_batch_delay_ms=1.0)
    served_by = {"precision": "default", "http_port": None, "grpc_port": None}
    with serve_model(folder / "model.onnx", profile, cluster=cluster_file, **served_by) as served:
        assert core2.loaded() == [served.model]
        assert served.describe()["headers"] == {"seldon-model": served.model}
        asked = {"model": served.model, "headers": [f"seldon-model={served.model}"]}
        for protocol in ("grpc", "rest"):
            told = check_endpoint(served.grpc, samples=None, reference=None, protocol=protocol, **asked, **HOW)
            assert told["passed"], told
    assert core2.loaded() == []


def test_a_candidate_is_checked_there(
    core2: SchedulerDouble, finished: tuple[Path, Campaign], cluster_file: Path
) -> None:
    folder, campaign = finished
    name = campaign.candidates[0].name
    told = check_candidate(name, folder / "work", samples=None, protocol=None, cluster=cluster_file, **HOW)
    assert told["passed"]
    assert told["target"]["url"] == core2.mesh
    assert core2.loaded() == []


def test_the_doctor_says_whether_candidates_could_be_deployed(core2: SchedulerDouble, cluster_file: Path) -> None:
    found = diagnose(cluster_file)["cluster"]
    assert found["where"] == f"Core 2 at {LOOPBACK}:{core2.port}"
    assert found["candidates"] == "can be deployed"
    cluster_file.write_text(json.dumps({"cluster": scheduler_section(core2, servers={"mlserver": "gpu"})}))
    assert diagnose(cluster_file)["cluster"]["candidates"] == "cannot be deployed: Core 2 has no server 'gpu'"


def test_what_does_not_go_together(finished: tuple[Path, Campaign], cluster_file: Path) -> None:
    model = finished[0] / "model.onnx"
    profile = serving_profile(server="triton", backend="onnxruntime")
    for options, words in (
        ({"http_port": 8000, "cluster": cluster_file}, "--http-port and --grpc-port are of this machine"),
        ({"http_port": None, "cluster": cluster_file}, "cluster.servers.triton"),
        ({"http_port": None}, "has the python backend alone"),
    ):
        with (
            pytest.raises(InputError, match=words),
            serve_model(model, profile, precision="default", grpc_port=None, **options),
        ):
            pass


# --- bad input: nothing is made yet --------------------------------------------------------------------------------


def refused(folder: Path, cluster: Cluster) -> BurnishError:
    """The error of a run that ends before anything is made."""
    write_campaign(folder, cluster)
    shutil.rmtree(folder / "work")
    with pytest.raises(BurnishError) as caught:
        go(folder)
    assert not list((folder / "work").glob("artifacts/*.json"))
    assert "\n" not in caught.value.message
    return caught.value


def test_a_scheduler_or_mesh_that_is_not_there(folder: Path, double: SchedulerDouble) -> None:
    error = refused(folder, scheduler_section(double, mesh=f"{LOOPBACK}:1"))
    assert "the mesh of Core 2 cannot be reached" in error.message
    assert error.exit_code == 4
    double.hang_up()
    error = refused(folder, scheduler_section(double))
    assert f"Core 2's scheduler at {LOOPBACK}:{double.port} cannot be reached for ServerStatus" in error.message
    assert error.exit_code == 4


def test_a_server_that_is_not_there(folder: Path, double: SchedulerDouble) -> None:
    error = refused(folder, scheduler_section(double, servers={"mlserver": "gpu"}))
    assert error.message == "Core 2 has no server 'gpu'"
    assert error.hint == "It has: bench."
    assert error.exit_code == 2
    double.servers["bench"].connected = False
    error = refused(folder, scheduler_section(double))
    assert error.message == "no server is connected to Core 2's scheduler"
    assert error.exit_code == 4


def test_files_of_tls_are_beside_the_campaign(folder: Path, double: SchedulerDouble) -> None:
    error = refused(folder, scheduler_section(double, tls={"ca": "gone.crt"}))
    assert str(folder / "gone.crt") in error.message
    assert error.exit_code == 2


def test_a_store_that_is_not_there(folder: Path, double: SchedulerDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    given = {"ENDPOINT_URL": f"http://{LOOPBACK}:1", "ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": TOKEN}
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    error = refused(folder, scheduler_section(double, storage="s3://models", storage_uri="minio://models"))
    assert "s3://models" in error.message
    assert TOKEN not in f"{error.message}{error.hint}"
    assert error.exit_code == 4


def test_the_command_says_it_too(folder: Path) -> None:
    cluster = {"kind": "scheduler", "address": f"{LOOPBACK}:1", "mesh": f"{LOOPBACK}:1", "storage": "shelf"}
    write_campaign(folder, {**cluster, "servers": {"mlserver": "bench"}})
    done = burnish(folder, "run", "campaign.yaml", "--work", "other", "--json")
    assert done.returncode == 4, done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "unreachable"


# --- bad input: of one candidate, which is a recorded failure ------------------------------------------------------


def failures_of(folder: Path, cluster: Cluster, double: SchedulerDouble) -> list[Failure]:
    """What a campaign records, none of whose candidates can be served; nothing of it is left there."""
    write_campaign(folder, cluster)
    campaign = go(folder)
    assert campaign.verdict.selected is None
    assert {one.phase for one in campaign.failures} == {"deploy"}
    assert len(campaign.failures) == len(campaign.candidates) == 2
    assert all("\n" not in one.reason for one in campaign.failures)
    assert double.loaded() == ["theirs"]
    return list(campaign.failures)


def test_no_server_with_the_capability(folder: Path, double: SchedulerDouble) -> None:
    double.servers = bench(capabilities=frozenset({"sklearn"}))
    for failure in failures_of(folder, scheduler_section(double), double):
        assert "Core 2 cannot schedule" in failure.reason
        assert "mlserver, burnish" in failure.detail


def test_not_enough_memory(folder: Path, double: SchedulerDouble) -> None:
    for failure in failures_of(folder, scheduler_section(double, memory_mb=9000), double):
        assert "Core 2 cannot schedule" in failure.reason
        assert "asks for 9000 MB, and the most that is free is 8000 MB, on bench" in failure.detail


def test_a_wrong_uri(folder: Path, double: SchedulerDouble, agent: AgentDouble) -> None:
    double.servers = bench(agent=agent)
    for failure in failures_of(folder, scheduler_section(double, storage_uri="/nowhere"), double):
        assert "directory not found" in failure.reason
        assert "/nowhere" in failure.detail


class Always(dict[str, str]):
    def get(self, key: str, default: Any = None) -> str:
        return "rpc error: code = Internal\n  desc = broken graph"


def test_a_model_that_does_not_load(folder: Path, double: SchedulerDouble) -> None:
    double.failures = Always()
    for failure in failures_of(folder, scheduler_section(double), double):
        assert "on bench: rpc error: code = Internal desc = broken graph" in failure.reason


def test_a_name_that_core_2_refuses(folder: Path, double: SchedulerDouble) -> None:
    double.refusals["LoadModel"] = (grpc.StatusCode.FAILED_PRECONDITION, "Model does not have a valid name")
    for failure in failures_of(folder, scheduler_section(double), double):
        assert "refused LoadModel of" in failure.reason


def test_a_model_of_somebody_else(folder: Path, double: SchedulerDouble) -> None:
    double.failures = Always()
    failures_of(folder, scheduler_section(double), double)
    names = {request.model.meta.name for request in double.calls("LoadModel")}
    for name in names:
        double.load(name, "s3://theirs", **{OWNER: "other"})
    campaign = go(folder)
    assert all("which the campaign other loaded" in one.reason for one in campaign.failures)
    assert set(double.loaded()) == {"theirs", *names}


@pytest.mark.parametrize("method", ["ModelStatus", "LoadModel", "UnloadModel", "ServerStatus"])
def test_a_connection_that_is_lost_in_each_call(folder: Path, double: SchedulerDouble, method: str) -> None:
    write_campaign(folder, scheduler_section(double))

    def lose(text: str) -> None:
        if text == "Finding capacities":
            double.lost[method] = 1000
        elif "left out" in text:
            double.lost.clear()

    if method == "ServerStatus":
        double.lost[method] = 1000
        with pytest.raises(UnreachableError, match="cannot be reached for ServerStatus"):
            go(folder)
    elif method == "ModelStatus":
        # All candidates fail, and then the cluster is asked whether it is why.
        campaign = go(folder, Watching(lose))
        assert all("cannot be reached for ModelStatus" in one.reason for one in campaign.failures)
        assert double.loaded() == ["theirs"]
    else:
        campaign = go(folder, Watching(lose))
        words = "cannot be reached for LoadModel" if method == "LoadModel" else ""
        assert all(words in one.reason for one in campaign.failures)
        assert double.loaded() == ["theirs"]


# --- Kubernetes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def api() -> Iterator[KubernetesDouble]:
    with KubernetesDouble() as double:
        double.token = TOKEN
        double.put("servers", "bench", {"serverConfig": "mlserver", "extraCapabilities": ["burnish"]})
        double.put("servers", "stock", {"serverConfig": "mlserver"})
        double.put("models", "theirs", {"storageUri": "s3://theirs"})
        yield double


def kubernetes_section(double: KubernetesDouble, folder: Path, token: str = TOKEN, **fields: Any) -> Cluster:
    kubeconfig = double.kubeconfig(folder, token=token)
    section = {"kind": "kubernetes", "kubeconfig": kubeconfig.name, "mesh": double.mesh, "storage": "shelf"}
    return {**section, "servers": {"mlserver": "bench"}, **fields}


def test_a_campaign_in_kubernetes_comes_to_a_verdict(folder: Path, api: KubernetesDouble, agent: AgentDouble) -> None:
    api.agent = agent
    path = write_campaign(folder, kubernetes_section(api, folder))
    path.write_text(path.read_text().replace("{server: mlserver,", "{server: mlserver, protocol: rest,"))
    campaign = go(folder)
    assert campaign.failures == ()
    assert campaign.verdict.selected is not None
    assert {one.candidate_id for one in campaign.rounds} == {one.id for one in campaign.candidates}
    assert api.names() == ["theirs"]


def test_an_expired_token_is_told_before_anything_is_made(folder: Path, api: KubernetesDouble) -> None:
    error = refused(folder, kubernetes_section(api, folder, token="old-and-secret"))
    assert "(401)" in error.message
    assert "old-and-secret" not in f"{error.message}{error.hint}"
    assert error.exit_code == 4


@pytest.mark.parametrize(
    ("fields", "refusal", "words", "code"),
    [
        ({}, RefusalError(403, "Forbidden", "no"), "this account may not patch models", 4),
        ({"servers": {"mlserver": "gone"}}, None, "there is no Server 'gone' in seldon", 2),
        ({"servers": {"mlserver": "stock"}}, None, "the Server stock has no capability burnish", 2),
        ({"context": "elsewhere"}, None, "there is no Server 'bench' in nowhere", 2),
        ({"context": "nobody"}, None, "the configuration of Kubernetes cannot be used", 2),
        ({"kubeconfig": "gone.yaml"}, None, "there is no kubeconfig at", 2),
    ],
)
def test_what_kubernetes_refuses_is_told_before_anything_is_made(
    folder: Path, api: KubernetesDouble, fields: Cluster, refusal: RefusalError | None, words: str, code: int
) -> None:
    if refusal is not None:
        api.refuse("patch", refusal)
    error = refused(folder, kubernetes_section(api, folder, **fields))
    assert words in error.message
    assert error.exit_code == code
    assert api.names() == ["theirs"]


def test_a_token_that_expires_on_the_way_ends_the_campaign(folder: Path, api: KubernetesDouble) -> None:
    write_campaign(folder, kubernetes_section(api, folder))

    def expire(text: str) -> None:
        if text == "Finding capacities":
            api.token = "renewed"

    observer = Watching(expire)
    with pytest.raises(UnreachableError, match=r"\(401\)") as caught:
        go(folder, observer)
    assert TOKEN not in f"{caught.value}{observer.told}"
    assert api.names() == ["theirs"]


def test_a_resource_that_somebody_else_changed_is_a_recorded_failure(folder: Path, api: KubernetesDouble) -> None:
    write_campaign(folder, kubernetes_section(api, folder))

    def change(text: str) -> None:
        if text == "Finding capacities":
            api.refuse("patch", RefusalError(409, "Conflict", "the object has been modified"))

    campaign = go(folder, Watching(change))
    first, second = campaign.failures
    assert "somebody else changed it at the time of patch Model" in first.reason
    assert second.phase == "measure"  # it was served, and the double's mesh answers no request
    assert {one.cluster for one in campaign.candidates} == {
        f"bench of Core 2 2.10 in the namespace seldon of {api.url}"
    }
    assert api.names() == ["theirs"]


def test_what_a_killed_run_left_in_kubernetes(folder: Path, api: KubernetesDouble) -> None:
    labels = {"burnish.campaign": owner_of(folder / "work"), "burnish.run": "killed"}
    api.put("models", "left", {"storageUri": "s3://left"}, **labels)
    api.put("models", "others", {"storageUri": "s3://other"}, **{**labels, "burnish.campaign": "other"})
    write_campaign(folder, kubernetes_section(api, folder))
    observer = Watching()
    go(folder, observer)
    assert any("took away what a killed run left: left" in text for text in observer.told)
    assert api.names() == ["others", "theirs"]


def test_an_image_of_a_server_is_its_version(folder: Path, api: KubernetesDouble) -> None:
    containers = [{"name": "rclone", "image": "rclone:1"}, {"name": "mlserver", "image": "registry/serve:7"}]
    api.put("serverconfigs", "mlserver", {"podSpec": {"containers": containers}})
    write_campaign(folder, kubernetes_section(api, folder))
    assert {one.server_version for one in go(folder).candidates} == {"registry/serve:7"}
