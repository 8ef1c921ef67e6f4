"""Rollouts through the scheduler and through Kubernetes, each against its double on real connections."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.deploy import rollout_kubernetes, scheduler_channel
from profiles.deploy.core2_candidates import Mesh
from profiles.deploy.kubernetes_client import KubernetesClient
from profiles.deploy.rollout import Applier, ManifestRollout, owned
from profiles.deploy.rollout_kubernetes import KubernetesApplier
from profiles.deploy.rollout_scheduler import SchedulerApplier
from profiles.deploy.scheduler import SchedulerClient
from profiles.serving.core2.manifests import Manifest, as_yaml
from registry.errors import InputError, UnreachableError
from tests.doubles.core2 import LOOPBACK, SchedulerDouble
from tests.doubles.kubernetes_api import KubernetesDouble

pytestmark = pytest.mark.slow

WAIT_S = 30.0
"""Longest wait for what comes about."""
OLD, NEW = "s3://models/old", "s3://models/new"


def manifest(name: str, uri: str, **spec: Any) -> Manifest:
    return {
        "apiVersion": "mlops.seldon.io/v1alpha1",
        "kind": "Model",
        "metadata": {"name": name, "labels": owned("digits")},
        "spec": {"storageUri": uri, "requirements": ["mlserver"], **spec},
    }


@dataclass
class World:
    """A Core 2 with a champion in production, and what is seen of it from outside."""

    applier: Applier
    folder: Path
    models: Callable[[], dict[str, str]]
    split: Callable[[], tuple[dict[str, int], str | None] | None]
    fail: Callable[[str, str], None]

    def rollout(self) -> ManifestRollout:
        def render(name: str) -> Manifest:
            parameters = [{"name": "threads", "value": "2"}]
            return manifest(name, NEW, memory="64Mi", replicas=1, parameters=parameters)

        return ManifestRollout(self.applier, production="digits", folder=self.folder, render=render)

    def begin(self) -> None:
        self.applier.apply(manifest("digits", OLD, memory="8Mi", replicas=2))


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[World, SchedulerDouble]]:
    monkeypatch.setattr(scheduler_channel, "RETRY_PAUSE_S", 0.15)
    with SchedulerDouble() as double, SchedulerClient(LOOPBACK, double.port, timeout_s=WAIT_S) as client:
        mesh = Mesh(double.mesh, tls=False, hint="")

        def split() -> tuple[dict[str, int], str | None] | None:
            started = double._experiments.get("digits-promotion")
            if started is None:
                return None
            weights = {one.name: one.weight for one in started.candidates}
            return weights, started.mirror.name if started.HasField("mirror") else None

        def fail(uri: str, why: str) -> None:
            double.failures[uri] = why

        yield (
            World(
                applier=SchedulerApplier(client, mesh, location="Core 2", timeout_s=WAIT_S),
                folder=tmp_path / "manifests",
                models=lambda: {name: double._models[name][-1].model.modelSpec.uri for name in double.loaded()},
                split=split,
                fail=fail,
            ),
            double,
        )


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[World, KubernetesDouble]]:
    monkeypatch.setattr(rollout_kubernetes, "SETTLE_S", 0.05)
    monkeypatch.setattr(rollout_kubernetes, "_POLL_S", 0.02)
    with KubernetesDouble() as double:  # noqa: SIM117  the client needs the double to have begun
        with KubernetesClient(kubeconfig=double.kubeconfig(tmp_path), timeout_s=WAIT_S) as client:
            mesh = Mesh(double.mesh, tls=False, hint="")

            def split() -> tuple[dict[str, int], str | None] | None:
                if double.names("experiments") != ["digits-promotion"]:
                    return None
                spec = double.get("digits-promotion", "experiments")["spec"]
                weights = {one["name"]: one["weight"] for one in spec["candidates"]}
                return weights, spec.get("mirror", {}).get("name")

            def fail(uri: str, why: str) -> None:
                double.failures[uri] = why

            yield (
                World(
                    applier=KubernetesApplier(client, mesh, location="Core 2", timeout_s=WAIT_S),
                    folder=tmp_path / "manifests",
                    models=lambda: {name: double.get(name)["spec"]["storageUri"] for name in double.names()},
                    split=split,
                    fail=fail,
                ),
                double,
            )


@pytest.fixture(params=["scheduler", "kubernetes"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)[0]
    found.begin()
    return found


def test_from_champion_to_challenger_and_back_byte_for_byte(world: World):
    text = f"# ours\n{as_yaml(manifest('digits', OLD, memory='8Mi', replicas=2))}"
    world.folder.mkdir()
    (world.folder / "Model-digits.yaml").write_text(text)
    rollout = world.rollout()
    snapshot = rollout.snapshot()
    assert snapshot.manifests == {"Model/digits": text}
    live = world.applier.read("Model", "digits")
    rollout.load(snapshot)
    assert world.models() == {"digits": OLD, "digits-challenger": NEW}
    rollout.mirror(50)
    assert world.split() == ({"digits": 100}, "digits-challenger")
    for percent in (10, 100):
        rollout.weights(percent)
        assert world.split() == ({"digits": 100 - percent, "digits-challenger": percent}, None)
    rollout.swap(snapshot)
    assert world.models()["digits"] == NEW
    assert rollout.serving() == rollout.planned(snapshot) != snapshot.serving
    rollout.unload()
    assert (world.models(), world.split()) == ({"digits": NEW}, None)
    spec = (world.applier.read("Model", "digits") or {})["spec"]
    assert (spec["replicas"], spec["parameters"]) == (2, [{"name": "threads", "value": "2"}])
    rollout.restore(snapshot)
    assert world.applier.read("Model", "digits") == live
    assert {path.name: path.read_text() for path in world.folder.iterdir()} == {"Model-digits.yaml": text}


@pytest.mark.parametrize("reached", ["load", "mirror", "weights", "swap", "unload"])
def test_every_state_leads_back_and_every_call_may_be_repeated(world: World, reached: str):
    rollout = world.rollout()
    snapshot = rollout.snapshot()
    steps: dict[str, Callable[[], None]] = {
        "load": lambda: rollout.load(snapshot),
        "mirror": lambda: rollout.mirror(100),
        "weights": lambda: rollout.weights(50),
        "swap": lambda: rollout.swap(snapshot),
        "unload": rollout.unload,
    }
    for name, step in steps.items():
        step()
        step()
        if name == reached:
            break
    # Somebody else goes on from the journal.
    again = world.rollout()
    again.restore(snapshot)
    again.restore(snapshot)
    assert (world.models(), world.split()) == ({"digits": OLD}, None)
    assert again.serving() == snapshot.serving


def test_the_first_one_goes_away_again(world: World):
    world.applier.delete("Model", "digits")
    rollout = world.rollout()
    snapshot = rollout.snapshot()
    assert (snapshot.serving, snapshot.manifests) == ("", {})
    rollout.swap(snapshot)
    assert world.models() == {"digits": NEW}
    rollout.restore(snapshot)
    assert world.models() == {}


def test_a_challenger_that_does_not_load_is_named(world: World):
    world.fail(NEW, "out of memory")
    rollout = world.rollout()
    snapshot = rollout.snapshot()
    with pytest.raises(UnreachableError, match="out of memory"):
        rollout.load(snapshot)
    rollout.restore(snapshot)
    assert world.models() == {"digits": OLD}


def test_what_stands_in_the_way(world: World):
    world.applier.apply(manifest("digits-challenger", NEW, replicas=1))
    with pytest.raises(InputError, match="there is a Model digits-challenger at Core 2 already"):
        world.rollout().snapshot()


def test_what_does_not_come_back_is_told(world: World, monkeypatch: pytest.MonkeyPatch):
    rollout = world.rollout()
    snapshot = rollout.snapshot()
    rollout.swap(snapshot)
    monkeypatch.setattr(type(world.applier), "apply", lambda *_: None)
    with pytest.raises(UnreachableError, match="the Model digits was applied as it was"):
        rollout.restore(snapshot)


# --- the scheduler alone -------------------------------------------------------------------------------------------


def test_a_model_that_somebody_else_loaded_is_restored_as_it_was(scheduler: tuple[World, SchedulerDouble]):
    world, double = scheduler
    double.load("digits", OLD, colour="blue")
    before = double._models["digits"][-1].model.modelSpec
    rollout = world.rollout()
    snapshot = rollout.snapshot()
    rollout.swap(snapshot)
    rollout.restore(snapshot)
    assert double._models["digits"][-1].model.modelSpec == before
    assert "colour" in snapshot.manifests["Model/digits"]


def test_what_could_not_be_restored_is_not_touched(scheduler: tuple[World, SchedulerDouble]):
    world, double = scheduler
    spec = pb.ModelSpec(uri=OLD, requirements=["mlserver"])
    spec.storageConfig.storageRcloneConfig = '{"type": "s3"}'
    deployment = pb.DeploymentSpec(replicas=1)
    double._store(pb.Model(meta=pb.MetaData(name="digits"), modelSpec=spec, deploymentSpec=deployment))
    with pytest.raises(InputError, match="settings at the scheduler that burnish could not restore"):
        world.rollout().snapshot()
    double.forget("digits")
    double.definitions = False
    double.load("digits", OLD)
    with pytest.raises(InputError, match="does not tell what digits was loaded with"):
        world.rollout().snapshot()


def test_an_experiment_of_others_on_the_same_model_is_refused(scheduler: tuple[World, SchedulerDouble]):
    world, double = scheduler
    world.begin()
    double._experiments["theirs"] = pb.Experiment(name="theirs", default="digits")
    rollout = world.rollout()
    snapshot = rollout.snapshot()
    rollout.load(snapshot)
    with pytest.raises(InputError, match="already in use by experiment theirs"):
        rollout.weights(10)
    rollout.restore(snapshot)
    assert world.models() == {"digits": OLD}


def test_a_scheduler_that_goes_away(scheduler: tuple[World, SchedulerDouble]):
    world, double = scheduler
    world.begin()
    rollout = world.rollout()
    double.refusals["LoadModel"] = (grpc.StatusCode.UNAVAILABLE, "no quorum")
    with pytest.raises(UnreachableError, match="no quorum"):
        rollout.load(rollout.snapshot())


# --- Kubernetes alone ----------------------------------------------------------------------------------------------


def test_a_model_that_is_not_given_over_is_left_alone(kubernetes: tuple[World, KubernetesDouble]):
    world, double = kubernetes
    double.put("models", "digits", {"storageUri": OLD, "requirements": ["mlserver"], "replicas": 1})
    with pytest.raises(InputError, match="not one that burnish promotes") as caught:
        world.rollout().snapshot()
    assert "kubectl label --overwrite model digits burnish.campaign=production-digits" in str(caught.value)


def test_an_experiment_of_others_is_found_before_anything_is_done(kubernetes: tuple[World, KubernetesDouble]):
    world, double = kubernetes
    world.begin()
    double.put("experiments", "theirs", {"candidates": [{"name": "digits", "weight": 1}]})
    with pytest.raises(InputError, match="the Experiment theirs shares out the requests to digits"):
        world.rollout().snapshot()


def test_a_changed_model_that_stays_ready_all_the_time(kubernetes: tuple[World, KubernetesDouble]):
    world, double = kubernetes
    world.begin()
    double.rolling = True
    rollout = world.rollout()
    snapshot = rollout.snapshot()
    rollout.load(snapshot)
    rollout.weights(100)
    rollout.swap(snapshot)
    assert world.models()["digits"] == NEW


def test_how_many_replicas_there_are_is_left_to_an_autoscaler(kubernetes: tuple[World, KubernetesDouble]):
    world, double = kubernetes
    world.begin()
    target = {"apiVersion": "mlops.seldon.io/v1alpha1", "kind": "Model", "name": "digits"}
    double.put("horizontalpodautoscalers", "digits", {"scaleTargetRef": target, "maxReplicas": 9, "metrics": []})

    def scale(replicas: int) -> None:
        # The field is its own from then on, and nobody else may say otherwise.
        double.put("models", "digits", {**double.get("digits")["spec"], "replicas": replicas}, manager="autoscaler")

    scale(5)
    rollout = world.rollout()
    snapshot = rollout.snapshot()
    rollout.load(snapshot)
    assert double.get("digits-challenger")["spec"]["replicas"] == 5
    rollout.weights(100)
    rollout.swap(snapshot)
    assert (world.models()["digits"], double.get("digits")["spec"]["replicas"]) == (NEW, 5)
    scale(7)
    rollout.restore(snapshot)
    assert (world.models(), double.get("digits")["spec"]["replicas"]) == ({"digits": OLD}, 7)


class Hijacked(BaseHTTPRequestHandler):
    """A mesh whose experiment leads all requests to the challenger, but those who stay with version 3."""

    def do_GET(self) -> None:
        sent = self.headers.get("x-seldon-route")
        self.send_response(200)
        self.send_header("x-seldon-route", sent if sent == ":digits_3:" else ":digits-challenger_1:")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_the_version_of_a_model_whose_requests_go_elsewhere():
    with ThreadingHTTPServer((LOOPBACK, 0), Hijacked) as mesh:
        thread = threading.Thread(target=mesh.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        target = Mesh(f"{LOOPBACK}:{mesh.server_port}", tls=False, hint="").target_of("digits", "rest")
        try:
            assert rollout_kubernetes.version_in_mesh(target, most=4) == 3
            assert rollout_kubernetes.version_in_mesh(target, most=2) is None
        finally:
            mesh.shutdown()
            thread.join()
    assert rollout_kubernetes.version_in_mesh(target, most=4) is None
