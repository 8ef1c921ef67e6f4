"""A promotion that is killed with SIGKILL, while a scheduler goes on serving; the next try gets there."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.deploy.core2_candidates import Mesh
from profiles.deploy.rollout import ManifestRollout
from profiles.deploy.rollout_scheduler import SchedulerApplier
from profiles.deploy.scheduler import SchedulerClient
from profiles.pipelines.rollout import PipelineRollout
from profiles.serving.core2.manifests import Manifest, as_yaml
from registry.ledger import Ledger
from registry.policy import parse_policy
from registry.promotion import Journal, Promoter, steps_of
from registry.records import Promotion
from tests.doubles.busy import LONG_S
from tests.doubles.core2 import LOOPBACK, SchedulerDouble
from tests.doubles.promotions import FileRegistry, StatedProbe, model_manifest, pipeline_manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CHILD = """
import sys
from pathlib import Path
from tests.integration.registry.test_promotion_killed import promote

def told(line):
    print(line, flush=True)
    sys.stdin.readline()

promote(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], told, kind=sys.argv[4])
"""
PROMOTION = Promotion(
    id="one",
    model="digits",
    production="digits",
    challenger="digits-challenger",
    experiment="digits-promotion",
    location="Core 2",
    campaign_id="c",
    candidate_id="candidate-2",
    candidate_name="int8 2",
    version="2",
    fingerprint="fingerprint-2",
    champion="1",
    challenger_before=None,
    policy=parse_policy(["latency_p90_ms <= 50"], "maximize max_throughput_rps"),
    steps=steps_of(weights=(10, 100), mirror=100, watch_s=1, beside=True),
    reason="It is faster.",
)


OF_PIPELINE = replace(
    PROMOTION, resource="pipeline", production="p", challenger="p-challenger", experiment="p-promotion"
)


def served(name: str, uri: str) -> Manifest:
    return model_manifest(name, uri, requirements=["mlserver"])


def promoter(work: Path, client: SchedulerClient, mesh: str, journal: Journal, told: object, kind: str) -> Promoter:
    applier = SchedulerApplier(client, Mesh(mesh, tls=False, hint=""), location="Core 2", timeout_s=LONG_S)
    folder = work / "manifests"
    rollout: ManifestRollout
    if kind == "pipeline":
        brought = {"encoder-int8": lambda: served("encoder-int8", "s3://models/new")}
        models = {"encoder": "encoder-int8"}
        rollout = PipelineRollout(applier, production="p", folder=folder, models=models, brought=brought)
    else:
        rollout = ManifestRollout(
            applier, production="digits", folder=folder, render=lambda name: served(name, "s3://models/new")
        )
    registry = FileRegistry(work / "registry.json")
    return Promoter(registry=registry, rollout=rollout, probe=StatedProbe(), journal=journal, told=told)  # type: ignore[arg-type]


def promote(work: Path, port: int, mesh: str, told: object, *, back: bool = False, kind: str = "model") -> None:
    """Begins, or goes on; also what the child does."""
    promotion = OF_PIPELINE if kind == "pipeline" else PROMOTION
    with Ledger.open(work / "promotions.jsonl") as ledger, SchedulerClient(LOOPBACK, port) as client:
        one = promoter(work, client, mesh, Journal(ledger, lambda: "2026-01-01T00:00:00+00:00"), told, kind)
        if back:
            one.roll_back(promotion, reason="worse")
        else:
            one.carry_out(promotion)


@pytest.fixture
def double() -> Iterator[SchedulerDouble]:
    with SchedulerDouble() as scheduler:
        yield scheduler


def uri(double: SchedulerDouble, name: str = "digits") -> str:
    return str(double._models[name][-1].model.modelSpec.uri)


@pytest.mark.parametrize(
    ("line", "serving", "loaded"),
    [
        ("answers 10 %", "s3://models/old", ["digits", "digits-challenger"]),
        ("digits serves int8 2", "s3://models/old", ["digits", "digits-challenger"]),
        ("the alias champion goes", "s3://models/new", ["digits", "digits-challenger"]),
    ],
)
def test_killed_the_champion_is_served_and_the_next_try_gets_there(
    double: SchedulerDouble, tmp_path: Path, line: str, serving: str, loaded: list[str]
):
    text = as_yaml(model_manifest("digits", "s3://models/old", requirements=["mlserver"]))
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "Model-digits.yaml").write_text(text)
    double.load("digits", "s3://models/old")
    kill_at(line, tmp_path, double, "model")
    assert uri(double) == serving
    assert double.loaded() == loaded
    assert double.available("digits")
    # The lock went with the process.
    promote(tmp_path, double.port, double.mesh, lambda _: None)
    assert (uri(double), double.loaded()) == ("s3://models/new", ["digits"])
    assert FileRegistry(tmp_path / "registry.json").named == {"champion": "2"}
    promote(tmp_path, double.port, double.mesh, lambda _: None, back=True)
    assert (uri(double), double.loaded()) == ("s3://models/old", ["digits"])
    assert FileRegistry(tmp_path / "registry.json").named == {"champion": "1"}
    assert {path.name: path.read_text() for path in (tmp_path / "manifests").iterdir()} == {"Model-digits.yaml": text}


@pytest.mark.parametrize(("line", "steps"), [("answers 10 %", "encoder"), ("the alias champion goes", "encoder-int8")])
def test_killed_the_pipeline_is_served_and_the_next_try_gets_there(
    double: SchedulerDouble, tmp_path: Path, line: str, steps: str
):
    text = f"# ours\n{as_yaml(pipeline_manifest('p', 'tokens', 'encoder'))}"
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "Pipeline-p.yaml").write_text(text)
    with SchedulerClient(LOOPBACK, double.port) as client:
        applier = SchedulerApplier(client, Mesh(double.mesh, tls=False, hint=""), location="Core 2", timeout_s=LONG_S)
        for name in ("tokens", "encoder"):
            applier.apply(served(name, f"s3://models/{name}"))
        applier.apply(pipeline_manifest("p", "tokens", "encoder"))
    kill_at(line, tmp_path, double, "pipeline")
    assert double.pipelines() == {"p": ["tokens", steps], "p-challenger": ["tokens", "encoder-int8"]}
    assert all(map(double.available, ("tokens", "encoder", "encoder-int8")))
    promote(tmp_path, double.port, double.mesh, lambda _: None, kind="pipeline")
    assert double.pipelines() == {"p": ["tokens", "encoder-int8"]}
    assert FileRegistry(tmp_path / "registry.json").named == {"champion": "2"}
    promote(tmp_path, double.port, double.mesh, lambda _: None, back=True, kind="pipeline")
    assert double.pipelines() == {"p": ["tokens", "encoder"]}
    assert double.loaded() == ["encoder", "tokens"]
    assert {path.name: path.read_text() for path in (tmp_path / "manifests").iterdir()} == {"Pipeline-p.yaml": text}


def kill_at(line: str, work: Path, double: SchedulerDouble, kind: str) -> None:
    """Promotes in a process of its own, which is killed once it has told a line."""
    arguments = [sys.executable, "-c", CHILD, str(work), str(double.port), double.mesh, kind]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        limit = threading.Timer(200, child.kill)
        limit.start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            while line not in (told := child.stdout.readline()):
                assert told, "the child ended early"
                child.stdin.write("\n")
                child.stdin.flush()
        finally:
            limit.cancel()
            child.kill()
        assert child.wait() == -9
