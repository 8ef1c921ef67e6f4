"""Candidates served through doubles of Core 2's scheduler and agent, by a real MLServer, and asked through the mesh."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from profiles.deploy.core2_candidates import Core2Options
from profiles.deploy.scheduler import SchedulerClient
from profiles.deploy.scheduler_cluster import Core2SchedulerCluster
from profiles.load.payloads import encode_payloads
from profiles.load.transports import Reply, Status, make_transport
from registry.errors import UnreachableError
from registry.records import Artifact, Target, TensorSpec
from registry.store import FolderStore
from tests.doubles.candidates import candidate
from tests.doubles.core2 import LOOPBACK, SchedulerDouble, ServerDouble
from tests.doubles.core2_agent import AgentDouble
from tests.doubles.models import CLASSES, FEATURES, mlp

pytestmark = pytest.mark.slow

WAIT_S = 60.0
SAMPLE = np.ones((2, FEATURES), np.float32)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SchedulerDouble]:
    folder = tmp_path_factory.mktemp("agent")
    with AgentDouble(folder, MLSERVER_PARALLEL_WORKERS="0") as agent, SchedulerDouble() as double:
        double.servers = {"bench": ServerDouble(frozenset({"mlserver", "burnish"}), agent=agent)}
        yield double


@pytest.fixture
def cluster(scheduler: SchedulerDouble, tmp_path: Path) -> Iterator[Core2SchedulerCluster]:
    def place(artifact: Artifact, files: Path) -> str:
        return str(shutil.copytree(files, tmp_path / "shelf" / artifact.digest))

    with (
        SchedulerClient(LOOPBACK, scheduler.port) as client,
        Core2SchedulerCluster(client, Core2Options(mesh=scheduler.mesh, place=place, owner="camp")) as opened,
    ):
        yield opened


def stored(folder: Path, content: bytes) -> tuple[Artifact, Path]:
    made = folder / "made"
    made.mkdir()
    (made / "model.onnx").write_bytes(content)
    inputs = (TensorSpec(name="x", dtype="float32", shape=("batch", FEATURES)),)
    outputs = (TensorSpec(name="logits", dtype="float32", shape=("batch", CLASSES)),)
    store = FolderStore(folder / "store")
    artifact = store.add(made, format="onnx", entry="model.onnx", inputs=inputs, outputs=outputs)
    return artifact, store.path(artifact)


def ask(target: Target) -> Reply:
    async def one() -> Reply:
        transport = make_transport(target, connections=1)
        try:
            await transport.open(WAIT_S)
            return await transport.infer(encode_payloads({"x": SAMPLE}, target=target)[0], WAIT_S)
        finally:
            await transport.close()

    return asyncio.run(one())


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_candidate_answers_through_the_mesh_until_it_is_taken_away(
    scheduler: SchedulerDouble, cluster: Core2SchedulerCluster, tmp_path: Path, protocol: str
) -> None:
    served = candidate(protocol=protocol, max_batch_size=4, max_batch_delay_ms=1.0)
    deployment = cluster.deploy(served, *stored(tmp_path, mlp().SerializeToString()), timeout_s=WAIT_S)
    assert deployment.server == "bench"
    reply = ask(deployment.target)
    assert reply.status == Status.OK, reply.message
    assert f"{deployment.target.model}_{deployment.version}".encode() in reply.body
    deployment.undeploy()
    assert ask(deployment.target).status != Status.OK
    assert scheduler.loaded() == []


def test_the_reason_is_that_of_the_server(
    scheduler: SchedulerDouble, cluster: Core2SchedulerCluster, tmp_path: Path
) -> None:
    model = mlp()  # as no ONNX Runtime knows it
    model.graph.node[0].op_type = "Nonsense"
    with pytest.raises(UnreachableError, match=r"could not load \S+ on bench: rpc error: .*Nonsense") as caught:
        cluster.deploy(candidate(), *stored(tmp_path, model.SerializeToString()), timeout_s=WAIT_S)
    assert "\n" not in caught.value.message
    assert scheduler.loaded() == []


def test_a_folder_that_is_not_where_it_should_be(scheduler: SchedulerDouble, tmp_path: Path) -> None:
    with SchedulerClient(LOOPBACK, scheduler.port) as client:
        options = Core2Options(mesh=scheduler.mesh, place=lambda *_: str(tmp_path / "no"), owner="camp")
        lost = Core2SchedulerCluster(client, options)
        with pytest.raises(UnreachableError, match=r"could not load .*: directory not found") as caught:
            lost.deploy(candidate(), *stored(tmp_path, mlp().SerializeToString()), timeout_s=WAIT_S)
        assert str(tmp_path / "no") in (caught.value.hint or "")
    assert scheduler.loaded() == []
