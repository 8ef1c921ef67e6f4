"""burnish pipeline promote: from a plan with variants to a Core 2, watched, and back; against its doubles."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.cli import main
from optimize.rollback import JOURNAL, open_registry
from profiles.deploy import rollout_kubernetes
from profiles.deploy.core2_candidates import Mesh
from profiles.deploy.kubernetes_client import KubernetesClient
from profiles.deploy.rollout import Applier
from profiles.deploy.rollout_kubernetes import KubernetesApplier
from profiles.deploy.rollout_scheduler import SchedulerApplier
from profiles.deploy.scheduler import SchedulerClient
from profiles.pipelines.gateway import decode_request, encode_answer
from registry.ledger import Ledger
from registry.promotion import Journal
from tests.doubles.busy import LONG_S
from tests.doubles.core2 import LOOPBACK, SchedulerDouble
from tests.doubles.kubernetes_api import KubernetesDouble
from tests.doubles.models import mlp, mlp_answer, write_onnx
from tests.doubles.promotions import chosen_campaign, model_manifest, owned

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("promote"),
    # MLflow's own, of the libraries that it uses.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]

PIPELINE = """
apiVersion: mlops.seldon.io/v1alpha1
kind: Pipeline
metadata: {name: both}
spec:
  steps:
  - {name: left}
  - {name: right}
  output:
    steps: [left, right]
    tensorMap: {left.outputs.logits: first, right.outputs.logits: second}
"""
PLAN = """
manifest: pipeline.yaml
models:
  left: {variants: {one: one/model.onnx, two: two/model.onnx}}
  right: {variants: {two: two/model.onnx}}
samples: samples.npz
answer: first
"""


@dataclass
class World:
    """A Core 2 with the pipeline in production, a folder with its plan, and the command."""

    folder: Path
    double: SchedulerDouble | KubernetesDouble
    applier: Applier
    capsys: pytest.CaptureFixture[str]

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def burnish(self, *arguments: str) -> tuple[int, Any]:
        """Exit code and the one JSON document of a command."""
        self.capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["burnish", *arguments, "--json"])
            with pytest.raises(SystemExit) as ended:
                main()
        return int(ended.value.code or 0), json.loads(self.capsys.readouterr().out)

    def promote(self, *arguments: str) -> tuple[int, Any]:
        where = ("--cluster", str(self.folder / "cluster.yaml"), "--work", str(self.work))
        return self.burnish("pipeline", "promote", str(self.folder / "plan.yaml"), *where, *arguments)

    def rollback(self) -> tuple[int, Any]:
        return self.burnish("rollback", str(self.work), "--cluster", str(self.folder / "cluster.yaml"))

    def steps(self) -> dict[str, list[str]]:
        """The pipelines that are there, with their steps."""
        if isinstance(self.double, SchedulerDouble):
            return self.double.pipelines()
        names = self.double.names("pipelines")
        return {name: [step["name"] for step in self.double.get(name, "pipelines")["spec"]["steps"]] for name in names}

    def models(self) -> list[str]:
        return self.double.loaded() if isinstance(self.double, SchedulerDouble) else self.double.names()


@contextmanager
def core2(kind: str, folder: Path) -> Iterator[tuple[SchedulerDouble | KubernetesDouble, Applier]]:
    """A double of Core 2, with the file that names it, and who applies manifests there."""
    storage = {"storage": str(folder / "models"), "storage_uri": "/mnt/models", "servers": {"mlserver": "mlserver"}}
    needed = {"burnish": ["mlserver", "python"]}
    with ExitStack() as stack:
        double: SchedulerDouble | KubernetesDouble
        applier: Applier
        if kind == "scheduler":
            double = stack.enter_context(SchedulerDouble())
            where = {"kind": "scheduler", "address": f"127.0.0.1:{double.port}"}
            scheduler = stack.enter_context(SchedulerClient(LOOPBACK, double.port))
            applier = SchedulerApplier(scheduler, Mesh(double.mesh, tls=False, hint=""), location="x", timeout_s=LONG_S)
        else:
            double = stack.enter_context(KubernetesDouble())
            where = {"kind": "kubernetes", "kubeconfig": str(double.kubeconfig(folder)), "namespace": "seldon"}
            client = stack.enter_context(KubernetesClient(kubeconfig=double.kubeconfig(folder)))
            applier = KubernetesApplier(client, Mesh(double.mesh, tls=False, hint=""), location="x", timeout_s=LONG_S)
        file = folder / "cluster.yaml"
        file.write_text(json.dumps({"cluster": {**where, **storage, "mesh": double.mesh, "requirements": needed}}))
        yield double, applier


@pytest.fixture
def world(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[World]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(rollout_kubernetes, "SETTLE_S", 0.05)
    monkeypatch.setattr(rollout_kubernetes, "_POLL_S", 0.02)
    for seed, name in enumerate(("one", "two")):
        write_onnx(mlp(seed=seed), tmp_path / name)
    features = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=features, labels=mlp_answer(features, seed=0).argmax(axis=1))
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "work").mkdir()
    shutil.copy(empty_store, tmp_path / "work" / "mlflow.db")
    with core2(getattr(request, "param", "scheduler"), tmp_path) as (double, applier):
        for name in ("left", "right"):
            model = model_manifest(name, f"/mnt/{name}", requirements=["mlserver"], replicas=2)
            # The Models of a pipeline that is promoted are whoever's.
            theirs = {"burnish.campaign": "theirs", "burnish.run": "theirs"}
            applier.apply({**model, "metadata": {"name": name, "labels": theirs}})
        steps = {
            "steps": [{"name": "left"}, {"name": "right"}],
            "output": {
                "steps": ["left", "right"],
                "tensorMap": {"left.outputs.logits": "first", "right.outputs.logits": "second"},
            },
        }
        made = {"name": "both", "labels": owned("both")}
        applier.apply({"apiVersion": "mlops.seldon.io/v1alpha1", "kind": "Pipeline", "metadata": made, "spec": steps})
        yield World(tmp_path, double, applier, capsys)


CHOSEN = "{pipeline: both, variants: {left: two, right: two}, limits: ['rss_mb <= 9'], reason: It is new.}"


def test_a_plan_changes_nothing_and_says_what_can_be_watched(world: World):
    before, live = world.models(), world.applier.read("Pipeline", "both")
    chosen = world.folder / "chosen.yaml"
    chosen.write_text(CHOSEN)
    code, told = world.promote("--chosen", str(chosen), "--watch", "30")
    assert code == 0
    assert [step["name"] for step in told["steps"]] == [
        "register", "load", "mirror", "weights-10", "weights-50", "weights-100", "swap", "champion", "unload",
    ]  # fmt: skip
    notes = " ".join(told["notes"])
    for said in (
        "is brought for left: its variant two",
        "is no version of both.pipeline",
        "Both pipelines have right",
        "(left) stay served",
        "end to end: Kafka and the gateways are in it",
        "`rss_mb <= 9` cannot be watched",
        "`failed_share <= 1%`.",
    ):
        assert said in notes
    assert (told["reason"], told["resource"], told["version"]) == ("It is new.", "pipeline", "(not registered yet)")
    assert (world.models(), world.applier.read("Pipeline", "both")) == (before, live)
    assert not (world.work / "production").exists()


@pytest.mark.parametrize("world", ["scheduler", "kubernetes"], indirect=True)
def test_a_promotion_by_the_command_and_all_the_way_back(world: World):
    before, live = world.models(), world.applier.read("Pipeline", "both")
    chosen = world.folder / "chosen.yaml"
    chosen.write_text(CHOSEN)
    code, told = world.promote("--chosen", str(chosen), "--watch", "0", "--weights", "50,100", "--apply")
    assert (code, told["state"], told["champion"]) == (0, "completed", None)
    new = told["candidate_name"].removeprefix("left=")
    assert new.startswith("left-two-")
    assert world.steps() == {"both": [new, "right"]}
    spec = (world.applier.read("Model", new) or {})["spec"]
    assert spec["replicas"] == 2
    assert spec["storageUri"].startswith("/mnt/models/")
    assert open_registry(world.work).aliases("both.pipeline") == {"champion": told["version"]}
    if isinstance(world.double, SchedulerDouble):
        # The same again has nothing to do.
        assert world.promote("--chosen", str(chosen), "--watch", "0", "--apply")[1]["state"] == "completed"

    code, told = world.rollback()
    assert (code, told["model"], told["champion"]) == (0, "both.pipeline", None)
    assert (world.models(), world.applier.read("Pipeline", "both")) == (before, live)
    assert [path.name for path in (world.work / "production/manifests").iterdir()] == ["Pipeline-both.yaml"]
    code, told = world.burnish("history", "both.pipeline", "--work", str(world.work))
    assert [(one["how"], one["reason"]) for one in told["champions"]] == [
        ("promoted", "It is new."), ("rolled back", "rolled back by hand"),
    ]  # fmt: skip


def test_a_limit_that_is_missed_on_live_traffic_leaves_the_pipeline_as_it_was(world: World):
    assert isinstance(world.double, SchedulerDouble)

    def answer(steps: list[str], body: bytes) -> bytes:
        name, identity, inputs = decode_request(body)
        logits = [mlp_answer(inputs["x"], seed=int(step != "left")) for step in steps]
        return encode_answer(name, identity, {"first": logits[0], "second": logits[1]})

    world.double.answers = answer
    before = (world.models(), world.steps())
    # What the variant loses, labels being what the first one answers, is more than nothing.
    watched = ("--watch", "1.6", "--rate", "400", "--mirror", "0", "--weights", "30,100")
    limits = ("--limit", "latency_p50_ms <= 60000", "--limit", "accuracy_drop <= 0.001")
    code, told = world.promote("--variant", "left=two", *limits, *watched, "--apply")
    assert (code, told["error"]["kind"]) == (5, "check_failed")
    assert "accuracy drop" in told["error"]["message"]
    assert (world.models(), world.steps()) == before
    journal = Journal(Ledger.read(world.work / JOURNAL), lambda: "")
    (failed,) = [one for one in journal.events(journal.promotions[0]) if one.phase == "failed"]
    assert failed.step == "weights-30"
    assert failed.observation is not None
    # Outside of these bounds 320 draws of probability 0.3 fall once in 10^9 times.
    assert 50 <= failed.observation.answered["challenger"] <= 147
    assert sum(failed.observation.answered.values()) == 320
    assert {"latency_p50_ms", "accuracy_drop", "flip_rate", "failed_share"} <= set(failed.observation.challenger)


def test_what_may_not_be_promoted(world: World, tmp_path: Path):
    for arguments, says in (
        (("--model", "left=elsewhere"), "there is no Model 'elsewhere' for the step 'left'"),
        (("--step", f"left={tmp_path}"), "no finished campaign"),
    ):
        code, told = world.promote(*arguments, "--watch", "0")
        assert (code, told["error"]["message"].partition(says)[1]) == (2, says)
    # What a campaign chose has another signature than the step; and a Pipeline of other steps is in production.
    chosen_campaign(tmp_path / "campaign", 1000)
    code, told = world.promote("--step", f"left={tmp_path / 'campaign'}", "--watch", "0")
    assert (code, "takes or gives other tensors than left" in told["error"]["message"]) == (2, True)
    (tmp_path / "plan.yaml").write_text(PIPELINE.replace("{name: right}", "{name: right, triggers: [left]}"))
    code, told = world.promote("--step", f"left={tmp_path / 'campaign'}", "--watch", "0")
    assert (code, "is not that of" in told["error"]["message"]) == (2, True)
