"""Candidates on a real MLServer and a real Triton server."""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from profiles.deploy import local, local_process
from profiles.deploy.cluster import Usage
from profiles.deploy.local import LocalCluster, LocalDeployment, Ports
from profiles.deploy.local_process import ServerProcess
from profiles.deploy.model_control import ModelControl
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads
from profiles.serving.container import container_environment
from profiles.serving.core2.folder import model_folder, write_folder
from profiles.serving.naming import model_name_of
from profiles.serving.roundtrip import agent_rewrite
from registry.errors import BurnishError, InputError, ServerDiedError, UnreachableError
from registry.records import Artifact, ArtifactFile, ClosedLoop, EngineSpec, LoadProfile
from tests.doubles.busy import undisturbed, until
from tests.doubles.candidates import candidate
from tests.doubles.models import mlp, mlp_answer, two_inputs, write_onnx, write_openvino

pytestmark = pytest.mark.slow

SERVERS = ["mlserver", "triton"]
FLOAT = EngineSpec(name="openvino", precision="float32")
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def _installed() -> None:
    for server, here in local.available_servers().items():
        if here.version is None:
            pytest.skip(f"{server}: {here.reason}")


@pytest.fixture
def cluster(_installed: None, tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "work") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared(_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("shared"), shared=True) as cluster:
        yield cluster


@pytest.fixture
def deploy(
    shared: LocalCluster, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., LocalDeployment]]:
    """Serves a model beside those of other tests, on a server that may run already, and takes it away at the end."""
    with contextlib.ExitStack() as stack:

        def served(artifact: Artifact, **how: Any) -> LocalDeployment:
            told = candidate(variant=request.node.name, **how)
            deployment = shared.deploy(told, artifact, tmp_path / "files", timeout_s=LIMIT_S)
            stack.callback(deployment.undeploy)
            return deployment

        yield served


def ask(
    deployment: LocalDeployment, protocol: str, inputs: dict[str, np.ndarray], outputs: list[str] | None = None
) -> dict[str, np.ndarray]:
    """One request through tritonclient: raw tensors over gRPC, binary or JSON over REST as the server takes it."""
    binary = deployment.candidate.serving.server == "triton"
    if protocol == "grpc":
        client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{deployment.ports.grpc}")
    else:
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{deployment.ports.http}")
    kind = tritonclient.grpc if protocol == "grpc" else tritonclient.http
    with client:
        sent = []
        for name, array in inputs.items():
            tensor = kind.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            if protocol == "grpc":
                tensor.set_data_from_numpy(array)
            else:
                tensor.set_data_from_numpy(array, binary_data=binary)
            sent.append(tensor)
        options = {} if protocol == "grpc" else {"binary_data": binary}
        wanted = [kind.InferRequestedOutput(name, **options) for name in outputs] if outputs else None
        result = client.infer(deployment.target.model, sent, outputs=wanted)
        reply = result.get_response()
        named = [o.name for o in reply.outputs] if protocol == "grpc" else [o["name"] for o in reply["outputs"]]
        return {name: result.as_numpy(name) for name in named}


def control_of(deployment: LocalDeployment) -> ModelControl:
    return ModelControl(f"127.0.0.1:{deployment.ports.http}")


def repository_of(deployment: LocalDeployment) -> dict[str, bytes]:
    """Path -> content of all that the server has in its repository, but for what Python put there."""
    folder = deployment.log.parent / "repository"
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def processes_of(deployment: LocalDeployment) -> list[psutil.Process]:
    return psutil.Process(deployment._process._child.supervisor).children(recursive=True)


def executions(deployment: LocalDeployment) -> tuple[int, int]:
    """Requests and batches that a Triton model has seen."""
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{deployment.ports.grpc}") as client:
        stats = client.get_inference_statistics(deployment.target.model).model_stats[0]
        return stats.inference_stats.success.count, stats.execution_count


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_concurrent_requests_of_mixed_sizes_each_get_their_own_answer(
    deploy: Callable[..., LocalDeployment], tmp_path: Path, server: str, format: str
) -> None:
    write, engine = (write_onnx, None) if format == "onnx" else (write_openvino, FLOAT)
    artifact = write(mlp(), tmp_path / "files")
    deployment = deploy(artifact, server=server, engine=engine, max_batch_size=8, max_batch_delay_ms=5.0)
    assert 0 < deployment.load_time_s < LIMIT_S
    if server == "triton":
        # It counts the rows of its own warm-up too: one, and as many as a batch holds; each after its answer.
        until(lambda: executions(deployment) == (1 + 8, 2))

    def one(number: int) -> None:
        rng = np.random.default_rng(number)
        x = rng.normal(size=(1 + number % 4, 8)).astype(np.float32)
        got = ask(deployment, "grpc" if number % 2 else "rest", {"x": x})
        np.testing.assert_allclose(got["logits"], mlp_answer(x), rtol=1e-4, atol=1e-4)

    def crowd() -> int:
        """How many of 64 requests at once had company."""
        before = executions(deployment) if server == "triton" else (0, 0)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(one, range(64)))
        if server != "triton":
            return 0
        until(lambda: executions(deployment)[0] == before[0] + 64)
        return 64 - (executions(deployment)[1] - before[1])

    # Where the machine is busy, each request of a crowd may come too late for the one before it.
    alike = undisturbed(crowd, lambda found: found or server != "triton")
    assert alike > 0 or server != "triton"


@pytest.mark.parametrize("server", SERVERS)
def test_the_server_gets_what_core_2_would_give_it(cluster: LocalCluster, tmp_path: Path, server: str) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    served = candidate(server=server, max_batch_size=4, max_batch_delay_ms=1.0)
    name = model_name_of(served)
    folder = model_folder(served, artifact, model_name=name)
    write_folder(folder, tmp_path / "files", tmp_path / "fetched")
    agent_rewrite(tmp_path / "fetched", server, name=name).lay_out(tmp_path / "expected")
    expected = [path for path in (tmp_path / "expected").rglob("*") if path.is_file()]

    deployment = cluster.deploy(served, artifact, tmp_path / "files", timeout_s=LIMIT_S)
    assert repository_of(deployment) == {
        path.relative_to(tmp_path / "expected").as_posix(): path.read_bytes() for path in expected
    }
    assert deployment.rendered == dict(folder.rendered)
    assert deployment.target.model == f"{name}_1"
    assert control_of(deployment).index() == {f"{name}_1": "READY"}
    for process in processes_of(deployment):
        assert container_environment(served.serving).items() <= process.environ().items()
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{deployment.ports.grpc}") as client:
        assert client.get_model_metadata(f"{name}_1").versions in (["1"], [])


def test_what_core_2_would_not_serve_starts_no_server(cluster: LocalCluster, tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    (tmp_path / "files/assets/2024").mkdir(parents=True)
    (tmp_path / "files/assets/2024/words").write_text("a b")
    beside = ArtifactFile(path="assets/2024/words", sha256="0" * 64, size_bytes=3)
    more = dataclasses.replace(artifact, files=(*artifact.files, beside))
    with pytest.raises(InputError, match=r"Core 2 would not serve .*: 1/assets/2024: .* highest number") as caught:
        cluster.deploy(candidate(server="triton"), more, tmp_path / "files", timeout_s=LIMIT_S)
    assert caught.value.hint
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]


@pytest.mark.parametrize("server", SERVERS)
def test_candidates_share_a_server_of_the_same_settings(tmp_path: Path, server: str) -> None:
    if (reason := local.available_servers()[server].reason) is not None:
        pytest.skip(reason)
    x = np.ones((2, 8), np.float32)
    artifact = write_onnx(mlp(), tmp_path / "files")
    one, two = (candidate(server=server, variant=name) for name in ("one", "two"))
    with LocalCluster(tmp_path / "work", shared=True) as cluster:
        first, second = (
            cluster.deploy(served, artifact, tmp_path / "files", timeout_s=LIMIT_S) for served in (one, two)
        )
        assert first.ports == second.ports
        assert first.log == second.log
        assert set(control_of(first).index().values()) == {"READY"}
        # One that cannot be loaded leaves the others as they are.
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad/model.onnx").write_bytes(b"garbage")
        with pytest.raises(UnreachableError, match=r"onnxruntime cannot open model\.onnx"):
            cluster.deploy(candidate(server=server, variant="bad"), artifact, tmp_path / "bad", timeout_s=LIMIT_S)
        for deployment in (first, second):
            np.testing.assert_allclose(ask(deployment, "grpc", {"x": x})["logits"], mlp_answer(x), rtol=1e-4)
        first.undeploy()
        with pytest.raises(InferenceServerException):
            ask(first, "grpc", {"x": x})
        np.testing.assert_allclose(ask(second, "grpc", {"x": x})["logits"], mlp_answer(x), rtol=1e-4)
        assert {path.partition("/")[0] for path in repository_of(second)} == {second.target.model}
        again = cluster.deploy(one, artifact, tmp_path / "files", timeout_s=LIMIT_S)
        assert again.ports == second.ports
        log = second.log
    assert log.stat().st_size > 0
    assert not list((tmp_path / "work/servers").glob("*/repository"))


def test_a_server_is_shared_neither_twice_by_a_model_nor_by_other_settings(tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    served = (candidate(), candidate(), candidate(threads=2))
    with LocalCluster(tmp_path / "work", shared=True) as cluster:
        ports = [cluster.deploy(one, artifact, tmp_path / "files", timeout_s=LIMIT_S).ports for one in served]
    assert len(set(ports)) == 3


def test_mlserver_batches_by_what_core_2_keeps(cluster: LocalCluster, tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    served = candidate(max_batch_size=4, max_batch_delay_ms=1500.0)
    deployment = cluster.deploy(served, artifact, tmp_path / "files", timeout_s=LIMIT_S)

    def seconds(_: int) -> float:
        began = time.monotonic()
        ask(deployment, "grpc", {"x": np.ones((1, 8), np.float32)})
        return time.monotonic() - began

    assert seconds(0) > 1.4
    # Four fill the batch, so none of them waits for more company; but a busy machine may be late with one.
    with ThreadPoolExecutor(4) as pool:
        assert undisturbed(lambda: max(pool.map(seconds, range(4))), lambda longest_s: longest_s < 1.2) < 1.2


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_model_of_two_integer_inputs(
    deploy: Callable[..., LocalDeployment], tmp_path: Path, server: str, protocol: str
) -> None:
    deployment = deploy(write_onnx(two_inputs(), tmp_path / "files"), server=server)
    ids = np.array([[1, 2, 2**40], [4, 5, 6]])
    mask = np.array([[1, 0, 1], [1, 0, 0]])
    got = ask(deployment, protocol, {"ids": ids, "mask": mask})
    assert sorted(got) == ["present", "total"]
    assert got["total"].tolist() == [1 + 2**40, 4]
    assert got["present"].tolist() == mask.astype(bool).tolist()
    assert sorted(ask(deployment, protocol, {"ids": ids, "mask": mask}, outputs=["total"])) == ["total"]


@pytest.mark.parametrize("server", SERVERS)
def test_metadata_a_fixed_batch_and_float16(
    deploy: Callable[..., LocalDeployment], tmp_path: Path, server: str
) -> None:
    artifact = write_onnx(mlp(batch=1, dtype="float16"), tmp_path / "files")
    deployment = deploy(artifact, server=server, max_batch_size=8, max_batch_delay_ms=2.0)
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{deployment.ports.grpc}") as client:
        metadata = client.get_model_metadata(deployment.target.model)
    tensors = [(t.name, t.datatype, list(t.shape)) for t in (*metadata.inputs, *metadata.outputs)]
    assert tensors == [("x", "FP16", [-1, 8]), ("logits", "FP16", [-1, 4])]
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16)
    got = ask(deployment, "grpc", {"x": x})["logits"]
    np.testing.assert_allclose(got, mlp_answer(x.astype(np.float32)), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_request_that_does_not_fit_is_told_why(
    deploy: Callable[..., LocalDeployment], tmp_path: Path, server: str, protocol: str
) -> None:
    deployment = deploy(write_onnx(mlp(), tmp_path / "files"), server=server)
    x = np.ones((2, 8), np.float32)
    for bad in ({"y": x}, {"x": x.astype(np.float64)}, {"x": x[:, :5]}):
        with pytest.raises(InferenceServerException, match=r"x|y"):
            ask(deployment, protocol, bad)
    with pytest.raises(InferenceServerException, match="nothing"):
        ask(deployment, protocol, {"x": x}, outputs=["nothing"])
    np.testing.assert_allclose(ask(deployment, protocol, {"x": x})["logits"], mlp_answer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("serving", [{"server": "mlserver"}, {"server": "triton"}, {"parallel_workers": 1}])
def test_a_model_that_cannot_load_is_told_quickly_and_leaves_nothing(
    cluster: LocalCluster, tmp_path: Path, serving: dict[str, object]
) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    (tmp_path / "files" / "model.onnx").write_bytes(b"garbage")
    before = set(psutil.Process().children(recursive=True))
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"onnxruntime cannot open model\.onnx") as caught:
        cluster.deploy(candidate(**serving), artifact, tmp_path / "files", timeout_s=10 * LIMIT_S)
    assert time.monotonic() - began < 5 * LIMIT_S
    assert "Its log ends:\n" in caught.value.message
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not list((tmp_path / "work" / "servers").glob("*.json"))
    assert not list((tmp_path / "work" / "servers").glob("*/repository"))
    assert not list((tmp_path / "work" / "servers").glob("*/fetched"))


def test_two_deployments_of_one_candidate_and_a_worker_process(cluster: LocalCluster, tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    served = candidate(parallel_workers=1, max_batch_size=4, max_batch_delay_ms=1.0)
    both = [cluster.deploy(served, artifact, tmp_path / "files", timeout_s=LIMIT_S) for _ in range(2)]
    x = np.ones((2, 8), np.float32)
    for deployment in both:
        np.testing.assert_allclose(ask(deployment, "grpc", {"x": x})["logits"], mlp_answer(x), rtol=1e-4)
    assert both[0].target.url != both[1].target.url
    both[0].undeploy()
    both[0].undeploy()
    np.testing.assert_allclose(ask(both[1], "rest", {"x": x})["logits"], mlp_answer(x), rtol=1e-4)


def use_for(deployment: LocalDeployment, seconds: float) -> None:
    """Asks for its usage again and again: a killed process is there until it had a turn to die."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        deployment.usage()


@pytest.mark.parametrize("server", SERVERS)
def test_usage_grows_with_work_and_ends_with_the_server(
    cluster: LocalCluster, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    deployment = cluster.deploy(candidate(server=server), artifact, tmp_path / "files", timeout_s=LIMIT_S)
    before = deployment.usage()

    def work() -> Usage:
        for _ in range(30):
            ask(deployment, "grpc", {"x": np.ones((1, 8), np.float32)})
        return deployment.usage()

    # Linux tells a process's CPU in ticks of 10 ms: a quick server answers many requests in one.
    after = undisturbed(work, lambda found: found.cpu_s > before.cpu_s, tries=100)
    assert after.cpu_s > before.cpu_s > 0
    assert 20 < after.rss_mb < 2000
    monkeypatch.setattr(local_process, "_NOTICE_S", 0.1)
    victim, supervisor = processes_of(deployment)[0], psutil.Process(deployment._process._child.supervisor)
    # As on a busy machine: who ends what is left of the server is late.
    supervisor.suspend()
    victim.kill()
    late = threading.Timer(0.5, supervisor.resume)
    late.start()
    with pytest.raises(ServerDiedError, match=r"has ended with status 137(: .*)?\nIts log ends:\n."):
        use_for(deployment, LIMIT_S)
    late.join()
    deployment.undeploy()
    # A server that comes after it in the same place leaves what it wrote.
    told = deployment.log.read_text()
    cluster.deploy(candidate(server=server), artifact, tmp_path / "files", timeout_s=LIMIT_S).undeploy()
    assert deployment.log.read_text().startswith(told)
    assert len(deployment.log.read_text()) > len(told)


def test_a_server_that_is_killed_under_load_is_told_with_its_log(cluster: LocalCluster, tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    deployment = cluster.deploy(candidate(), artifact, tmp_path / "files", timeout_s=LIMIT_S)
    payloads = encode_payloads({"x": np.ones((4, 8), np.float32)}, target=deployment.target)
    load = LoadProfile(name="closed", load=ClosedLoop(concurrency=2), warmup_s=0.1, duration_s=30.0)
    victims = processes_of(deployment)[:1]

    def usage() -> Usage:
        """Kills the server when the window begins."""
        if not victims:
            use_for(deployment, LIMIT_S)
        before = deployment.usage()
        victims.pop().kill()
        return before

    with LoadGenerator(cpus=tuple(os.sched_getaffinity(0)), work=tmp_path) as generator:
        generator.run(
            deployment.target,
            payloads,
            dataclasses.replace(load, duration_s=0.2),
            raw_path=tmp_path / "raw.npz",
            usage=deployment.usage,
        )
        with pytest.raises(
            ServerDiedError, match=r"(?s)mlserver has ended with status 137\nIts log ends:.*Loaded model"
        ):
            generator.run(deployment.target, payloads, load, raw_path=tmp_path / "raw.npz", usage=usage)


def test_a_server_that_is_killed_while_it_loads(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    servers, load = tmp_path / "work/servers", ServerProcess.load

    def loads(process: ServerProcess, model: str, deadline: float) -> None:
        """Has it load while it stands still, so that it is not done when it is killed."""
        [record] = servers.glob("*.json")
        server = psutil.Process(json.loads(record.read_text())["server"][0])
        server.suspend()
        killer = threading.Timer(0.3, server.kill)
        killer.start()
        try:
            load(process, model, deadline)
        finally:
            killer.join()

    monkeypatch.setattr(ServerProcess, "load", loads)
    with pytest.raises(ServerDiedError, match=r"mlserver ended with status 137 while it loaded .*\nIts log ends:\n."):
        cluster.deploy(candidate(parallel_workers=1), artifact, tmp_path / "files", timeout_s=LIMIT_S)
    assert not list(servers.glob("*.json"))


@pytest.mark.parametrize("server", SERVERS)
def test_servers_run_where_told_and_see_no_secrets(
    cluster: LocalCluster, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    artifact = write_onnx(mlp(), tmp_path / "files")
    cpu = max(os.sched_getaffinity(0))
    with LocalCluster(tmp_path / "pinned", server_cpus=[cpu]) as pinned:
        deployment = pinned.deploy(candidate(server=server), artifact, tmp_path / "files", timeout_s=LIMIT_S)
        assert processes_of(deployment)
        for process in processes_of(deployment):
            assert "AWS_SECRET_ACCESS_KEY" not in process.environ()
            assert process.cpu_affinity() == [cpu]


@pytest.mark.parametrize("server", SERVERS)
def test_a_port_that_was_taken_meanwhile_is_not_the_end(
    cluster: LocalCluster, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    # By a server that answers as ours would.
    other = cluster.deploy(candidate(variant="other"), artifact, tmp_path / "files", timeout_s=LIMIT_S)
    choose, calls = local.choose_ports, []

    def first_a_taken_one(fixed: dict[str, int | None]) -> Ports:
        calls.append(1)
        ports = choose(fixed)
        return ports if len(calls) > 1 else dataclasses.replace(ports, http=other.ports.http)

    monkeypatch.setattr(local, "choose_ports", first_a_taken_one)
    deployment = cluster.deploy(candidate(server=server), artifact, tmp_path / "files", timeout_s=LIMIT_S)
    assert len(calls) == 2
    for one in (deployment, other):
        assert ask(one, "rest", {"x": np.ones((1, 8), np.float32)})


def test_a_fixed_port_in_use_is_named(tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with LocalCluster(tmp_path / "work", grpc_port=port) as cluster, pytest.raises(BurnishError) as caught:
            cluster.deploy(candidate(), artifact, tmp_path / "files", timeout_s=LIMIT_S)
    assert caught.value.exit_code == 4
    assert str(port) in caught.value.message


def test_a_server_that_is_not_ready_in_time_is_ended(cluster: LocalCluster, tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    with pytest.raises(UnreachableError, match=r"mlserver was not ready after \d+ s"):
        cluster.deploy(candidate(), artifact, tmp_path / "files", timeout_s=0.1)
    assert not list((tmp_path / "work" / "servers").glob("*.json"))


def test_a_backend_that_no_package_brings_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    with pytest.raises(InputError, match="onnxruntime backend"):
        cluster.deploy(candidate(server="triton", backend="onnxruntime"), artifact, tmp_path, timeout_s=1)
