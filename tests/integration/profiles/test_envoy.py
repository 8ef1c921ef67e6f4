"""A real Envoy before two real MLServers, each of which answers so that one knows which it was."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2, service_pb2_grpc

from profiles.deploy import local
from profiles.deploy.core2_messages import Experiment
from profiles.deploy.envoy import EnvoyFront, ModelRoute, route_to
from profiles.deploy.local import LocalCluster, LocalDeployment
from profiles.load.answerer import Answerer, answerer_of, find_stranger
from profiles.load.payloads import encode_payloads
from profiles.load.transports import GRPC_METHOD, Reply, Status, make_transport
from registry.errors import InputError, ServerDiedError, UnreachableError
from registry.records import Target
from tests.doubles.busy import until
from tests.doubles.candidates import candidate
from tests.doubles.models import write_onnx

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("envoy")]

pytest.importorskip("envoy")
WIDTH = 4
LIMIT_S = 60.0


def summing(offset: float) -> onnx.ModelProto:
    """``x`` (batch, any) -> ``sum`` (batch, 1), and the offset on top, which tells who answered."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["x", "axes"], ["total"], keepdims=1),
            helper.make_node("Add", ["total", "offset"], ["sum"]),
        ],
        "summing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "width"])],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", 1])],
        [
            numpy_helper.from_array(np.array([1]), "axes"),
            numpy_helper.from_array(np.array([[offset]], np.float32), "offset"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@dataclass(frozen=True)
class Served:
    """A model and what it adds to every sum."""

    deployment: LocalDeployment
    route: ModelRoute
    offset: float

    @property
    def name(self) -> str:
        return self.route.name

    def requests(self) -> int:
        """How many its server has answered, by its own count."""
        connection = http.client.HTTPConnection(f"127.0.0.1:{self.deployment.ports.metrics}", timeout=LIMIT_S)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        counts = (line for line in lines if line.startswith("model_infer_request_success_total{"))
        return sum(int(float(line.rpartition(" ")[2])) for line in counts if f'model="{self.name}_1"' in line)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    if local.available_servers()["mlserver"].version is None:
        pytest.skip("MLServer is not installed")
    both = []
    with LocalCluster(tmp_path_factory.mktemp("servers")) as cluster:
        for offset in (1000.0, 2000.0):
            files = tmp_path_factory.mktemp("files")
            artifact = write_onnx(summing(offset), files)
            told = candidate(variant=f"sums-{offset:.0f}")
            deployment = cluster.deploy(told, artifact, files, timeout_s=LIMIT_S)
            both.append(Served(deployment, route_to(deployment), offset))
        yield both[0], both[1]


@pytest.fixture(scope="module")
def envoy(served: tuple[Served, Served], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnvoyFront]:
    routes = [one.route for one in served]
    with EnvoyFront(tmp_path_factory.mktemp("front"), routes, retries=0, timeout_s=LIMIT_S) as front:
        yield front


@pytest.fixture
def front(envoy: EnvoyFront, served: tuple[Served, Served]) -> EnvoyFront:
    """The one Envoy of these tests, which leads to both servers and splits nothing, whatever ran before."""
    envoy.update(models=[one.route for one in served], experiments=[])
    return envoy


@dataclass(frozen=True)
class Answer:
    """What came back: the sum less what was sent, the route, and the model's name in the reply."""

    offset: float
    route: str
    model: str


class Client:
    """Asks a target for sums on one connection, with whatever name and headers a test wants."""

    def __init__(self, target: Target) -> None:
        self.target = target
        if target.protocol == "grpc":
            self._channel = grpc.insecure_channel(
                target.url, options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
            )
            self._call = self._channel.unary_unary(GRPC_METHOD, response_deserializer=None)
        else:
            self._connection = http.client.HTTPConnection(target.url, timeout=LIMIT_S)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        (self._channel if self.target.protocol == "grpc" else self._connection).close()

    def ask(self, x: np.ndarray | None = None, *, model: str | None = None, **headers: str) -> Answer:
        x = np.arange(WIDTH, dtype=np.float32).reshape(1, WIDTH) if x is None else x
        named = {**self.target.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        ask = self._ask_grpc if self.target.protocol == "grpc" else self._ask_rest
        total, route, name = ask(x, model or self.target.model, named)
        return Answer(offset=total - float(x.sum(dtype=np.float64)), route=route, model=name)

    def _ask_grpc(self, x: np.ndarray, model: str, headers: dict[str, str]) -> tuple[float, str, str]:
        tensor = service_pb2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=x.shape)
        request = service_pb2.ModelInferRequest(
            model_name=model, model_version="9", inputs=[tensor], raw_input_contents=[x.tobytes()]
        )
        body, call = self._call.with_call(request.SerializeToString(), metadata=tuple(headers.items()), timeout=LIMIT_S)
        reply = service_pb2.ModelInferResponse.FromString(body)
        (total,) = np.frombuffer(reply.raw_output_contents[0], np.float32)
        return float(total), dict(call.initial_metadata()).get("x-seldon-route", ""), reply.model_name

    def _ask_rest(self, x: np.ndarray, model: str, headers: dict[str, str]) -> tuple[float, str, str]:
        tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
        body = json.dumps({"inputs": [tensor]})
        self._connection.request(
            "POST", f"/v2/models/{model}/versions/9/infer", body, {"Content-Type": "application/json", **headers}
        )
        response = self._connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        reply = json.loads(text)
        return reply["outputs"][0]["data"][0], response.headers["x-seldon-route"], reply["model_name"]


def experiment(weights: dict[str, int], **more: Any) -> Experiment:
    return Experiment(name="canary", weights=weights, **more)


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_each_model_is_reached_by_its_header_whatever_name_the_caller_writes(
    front: EnvoyFront, served: tuple[Served, Served], protocol: str
) -> None:
    for one in served:
        target = front.target(one.name, protocol)
        assert target.headers == {"seldon-model": one.name}
        with Client(target) as client:
            expected = Answer(offset=one.offset, route=f":{one.name}_1:", model=f"{one.name}_1")
            for named in (one.name, "x", "a-much-longer-name-than-the-server-has-for-it-0123456789"):
                assert client.ask(model=named) == expected
                assert client.ask(model=named, seldon_internal_model="somebody_7") == expected


@pytest.mark.parametrize("size", [1, 20_000, 800_000])
def test_messages_of_any_size_pass(front: EnvoyFront, served: tuple[Served, Served], size: int) -> None:
    x = np.ones((1, size), np.float32)
    with Client(front.target(served[0].name, "grpc")) as client:
        assert client.ask(x, model="other").offset == pytest.approx(served[0].offset, rel=1e-3)


def test_what_a_model_says_of_itself(front: EnvoyFront, served: tuple[Served, Served]) -> None:
    one = served[0]
    with grpc.insecure_channel(front.url) as channel:
        ask = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        headers = (("seldon-model", one.name),)
        metadata = ask.ModelMetadata(service_pb2.ModelMetadataRequest(name="x", version="3"), metadata=headers)
        assert metadata.name == one.route.served_as
        assert ask.ModelReady(service_pb2.ModelReadyRequest(name="x"), metadata=headers).ready
        tensor = service_pb2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 1])
        request = service_pb2.ModelInferRequest(inputs=[tensor], raw_input_contents=[bytes(4)])
        with pytest.raises(grpc.RpcError) as caught:
            ask.ModelInfer(request, metadata=headers, compression=grpc.Compression.Gzip)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "compressed messages cannot be routed here" in caught.value.details()
    with urllib.request.urlopen(f"http://{front.url}/v2/models/{one.name}", timeout=LIMIT_S) as reply:
        assert json.load(reply)["name"] == one.route.served_as


def test_over_rest_the_path_alone_names_the_model(front: EnvoyFront, served: tuple[Served, Served]) -> None:
    target = Target(url=front.url, protocol="rest", model=served[1].name)
    with Client(target) as client:
        assert client.ask().offset == served[1].offset


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_an_experiment_splits_by_its_weights_and_says_who_answered(
    front: EnvoyFront, served: tuple[Served, Served], protocol: str
) -> None:
    one, two = served
    front.update(experiments=[experiment({one.name: 80, two.name: 20})])
    offsets = {f":{each.name}_1:": each.offset for each in served}
    with Client(front.target("canary", protocol)) as client:
        answers = [client.ask() for _ in range(400)]
    assert all(answer.offset == offsets[answer.route] for answer in answers)
    # Outside of these bounds 400 draws of probability 0.2 fall once in 10^9 times (binomial: mean 80, sigma 8).
    assert 33 <= sum(answer.offset == two.offset for answer in answers) <= 133


def test_weights_change_while_requests_flow(front: EnvoyFront, served: tuple[Served, Served]) -> None:
    one, two = served
    target, done = front.target(one.name, "grpc"), threading.Event()

    def flow(answers: set[float]) -> None:
        with Client(target) as client:
            while not done.is_set():
                answers.add(client.ask().offset)

    seen: list[set[float]] = [set(), set()]
    with ThreadPoolExecutor(2) as pool, Client(target) as client:
        flows = [pool.submit(flow, answers) for answers in seen]
        try:
            until(lambda: all(seen) or any(each.done() for each in flows))
            for weights, only in (({one.name: 1, two.name: 0}, one), ({one.name: 0, two.name: 1}, two)) * 5:
                front.update(experiments=[experiment(weights, default=one.name)])
                # What Envoy was told it does at once.
                assert {client.ask().offset for _ in range(10)} == {only.offset}
                until(lambda only=only: all(only.offset in answers for answers in seen))
            front.update(experiments=[])
            assert client.ask().offset == one.offset
        finally:
            done.set()
        for each in flows:
            each.result()
        assert seen == [{one.offset, two.offset}] * 2


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_mirror_gets_copies_and_its_answers_reach_nobody(
    front: EnvoyFront, served: tuple[Served, Served], protocol: str
) -> None:
    one, two = served
    front.update(experiments=[experiment({one.name: 1}, mirror=(two.name, 100))])
    before = two.requests()
    with Client(front.target("canary", protocol)) as client:
        answers = Counter(client.ask() for _ in range(50))
    assert answers == {Answer(offset=one.offset, route=f":{one.name}_1:", model=f"{one.name}_1"): 50}
    until(lambda: two.requests() == before + 50)


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_who_sends_a_route_back_stays_there(front: EnvoyFront, served: tuple[Served, Served], protocol: str) -> None:
    weights = {each.name: 1 for each in served}
    front.update(experiments=[experiment(weights)])
    with Client(front.target("canary", protocol)) as client:
        for each in served:
            stays = {client.ask(x_seldon_route=f":{each.name}_1:") for _ in range(20)}
            assert stays == {Answer(offset=each.offset, route=f":{each.name}_1:", model=f"{each.name}_1")}


def through_transport(target: Target, count: int) -> list[Reply]:
    """The replies to as many requests, as the load generator sends them."""

    async def ask() -> list[Reply]:
        payloads = encode_payloads({"x": np.ones((1, WIDTH), np.float32)}, target=target, count=1)
        transport = make_transport(target, 8)
        await transport.open(LIMIT_S)
        try:
            return [await transport.infer(payloads[0], LIMIT_S) for _ in range(count)]
        finally:
            await transport.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_answers_are_proved_through_it(front: EnvoyFront, served: tuple[Served, Served], protocol: str) -> None:
    one, two = served
    target = front.target(one.name, protocol)

    def answerers() -> list[Answerer]:
        replies = through_transport(target, 16)
        assert {reply.status for reply in replies} == {Status.OK}
        return [answerer_of(reply.body, reply.headers, target) for reply in replies]

    found = answerers()
    assert find_stranger(found, target) is None
    assert f":{one.name}_1:" in {answerer.route for answerer in found}
    # The same target while an experiment splits its model: strangers answer, and are named.
    front.update(experiments=[experiment({one.name: 1, two.name: 3}, default=one.name)])
    assert two.name in (find_stranger(answerers(), target) or "")


def test_what_is_not_there(front: EnvoyFront, served: tuple[Served, Served]) -> None:
    with pytest.raises(InputError, match="routes to no 'nobody'"):
        front.target("nobody", "rest")
    before = front.experiments
    with pytest.raises(InputError, match="needs the model nobody"):
        front.update(experiments=[experiment({"nobody": 1})])
    assert front.experiments == before
    with Client(Target(url=front.url, protocol="rest", model="nobody")) as client, pytest.raises(AssertionError):
        client.ask()


def test_a_dead_server_is_a_clear_error_and_an_update_leads_elsewhere(
    front: EnvoyFront, served: tuple[Served, Served]
) -> None:
    before = front.models
    # Nobody listens at a port that somebody holds, and nobody else can have it.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        front.update(models=[*before, ModelRoute(name="gone", http=port, grpc=port)], experiments=[])
        (rest,) = through_transport(front.target("gone", "rest"), 1)
        assert rest.status == Status.STATUS
        assert rest.message.startswith("HTTP 503: upstream connect error")
        (over_grpc,) = through_transport(front.target("gone", "grpc"), 1)
        assert over_grpc.status == Status.CONNECTION
        assert over_grpc.message.startswith("UNAVAILABLE: upstream connect error")
    there = served[0].route
    front.update(
        models=[
            *before,
            ModelRoute(name="gone", version=2, http=there.http, grpc=there.grpc, served_as=there.served_as),
        ]
    )
    with Client(front.target("gone", "grpc")) as client:
        assert client.ask() == Answer(offset=served[0].offset, route=":gone_2:", model=there.served_as)


def test_it_listens_on_loopback_alone_and_takes_no_orders(front: EnvoyFront) -> None:
    (child,) = psutil.Process(front._child.supervisor).children()
    listening = {one.laddr for one in child.net_connections() if one.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert len(listening) == 3
    (admin,) = {address.port for address in listening} - set(front._ports.values())
    connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=LIMIT_S)
    connection.request("POST", "/quitquitquit")
    assert connection.getresponse().status == http.client.FORBIDDEN
    connection.close()
    front.check()


def test_a_port_that_is_taken(front: EnvoyFront, tmp_path: Path) -> None:
    port = int(front.url.rpartition(":")[2])
    with pytest.raises(UnreachableError, match=f"the port {port} cannot be had"):
        EnvoyFront(tmp_path, [], port=port)


def test_what_envoy_refuses_is_told_by_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelRoute(name="m", http=1, grpc=2)
    with EnvoyFront(tmp_path, [model], timeout_s=LIMIT_S) as front:
        monkeypatch.setattr("profiles.deploy.envoy.check_routes", lambda *_: None)
        with pytest.raises(UnreachableError, match=r"(?s)Envoy refused its routes: .*weight.*Its log ends:"):
            front.update(experiments=[experiment({"m": 0}, mirror=("m", 1))])
        assert front.experiments == ()
        left = json.loads((tmp_path / "servers/envoy/mirror-routes.json").read_text())["resources"]
        assert left[0]["virtual_hosts"][0]["routes"] == []
        monkeypatch.undo()
        front.update(experiments=[experiment({"m": 1})])
        (child,) = psutil.Process(front._child.supervisor).children()
        os.kill(child.pid, signal.SIGKILL)
        child.wait(LIMIT_S)
        until(lambda: front._child.status is not None)
        for work in (front.check, front.update):
            with pytest.raises(ServerDiedError, match="with status 137"):
                work()


PARENT = """
import sys
from pathlib import Path
from profiles.deploy.envoy import EnvoyFront, ModelRoute

front = EnvoyFront(Path(sys.argv[1]), [ModelRoute(name="m", http=1, grpc=2)], timeout_s=60.0)
print("routes", flush=True)
sys.stdin.read(1)
"""


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_it_does_not_outlive_its_parent(tmp_path: Path, way: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
    ) as parent:
        assert parent.stdout.readline() == "routes\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) == 2
        parent.send_signal(way)
    _, alive = psutil.wait_procs(family, LIMIT_S)
    assert not alive
    assert not list((tmp_path / "servers").glob("*.json"))
