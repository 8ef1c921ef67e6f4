"""Tensors of every kind through our runtime in a real MLServer, in its own process and in a worker."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc
from onnx import helper
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from profiles.deploy.local_installation import server_environment
from profiles.serving.container import container_environment
from profiles.serving.mlserver import render_mlserver
from tests.doubles.candidates import candidate
from tests.doubles.models import mlp, mlp_answer, two_inputs, write_onnx
from tests.doubles.ports import free_ports

pytestmark = pytest.mark.slow

LIMIT_S = 60.0
DTYPES = (
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
)  # fmt: skip

STOCK = '''"""A runtime as users write them, which says what its data is."""

from mlserver import MLModel
from mlserver.types import InferenceResponse, ResponseOutput


class Kind(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        data = payload.inputs[0].data.root
        kind = f"{type(data).__name__} of {type(data[0]).__name__}: {sum(data)}"
        output = ResponseOutput(name="kind", shape=[1], datatype="BYTES", data=[kind])
        return InferenceResponse(model_name=self.name, outputs=[output])
'''


def same_model() -> onnx.ModelProto:
    """A model that gives back an input ``x_<type>`` of every type as ``y_<type>``, of any two sizes."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in DTYPES}
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"x_{name}"], [f"y_{name}"]) for name in kinds],
        "same",
        [helper.make_tensor_value_info(f"x_{name}", kind, ["rows", "columns"]) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(f"y_{name}", kind, ["rows", "columns"]) for name, kind in kinds.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@dataclass(frozen=True)
class Served:
    """A server, and how to ask it."""

    http: int
    metrics: int
    client: tritonclient.grpc.InferenceServerClient
    infer: grpc.UnaryUnaryMultiCallable

    def raw(self, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = []
        for name, array in inputs.items():
            tensor = tritonclient.grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        result = self.client.infer(model, tensors)
        assert len(result.get_response().raw_output_contents) == len(result.get_response().outputs)
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def json(self, model: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
        tensors = [
            {"name": name, "shape": array.shape, "datatype": np_to_triton_dtype(array.dtype), "data": array.tolist()}
            for name, array in inputs.items()
        ]
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http}/v2/models/{model}/infer",
            data=json.dumps({"inputs": tensors}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            return {output["name"]: output["data"] for output in json.load(response)["outputs"]}

    def refused(self, **fields: Any) -> str:
        """The status and the message that a request of plain messages comes back with."""
        inputs = [service_pb2.ModelInferRequest.InferInputTensor(**tensor) for tensor in fields.pop("inputs")]
        with pytest.raises(grpc.RpcError) as caught:
            self.infer(service_pb2.ModelInferRequest(inputs=inputs, **fields))
        return f"{caught.value.code().name}: {caught.value.details()}"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    served = {
        "same": (same_model(), candidate()),
        "fixed": (mlp(batch=4), candidate()),
        "batched": (two_inputs(), candidate(max_batch_size=8, max_batch_delay_ms=200.0)),
    }
    for name, (model, how) in served.items():
        artifact = write_onnx(model, folder / name)
        files = render_mlserver(how, artifact, model_name=name, http_port=1, grpc_port=2, metrics_port=3)
        (folder / name / "model-settings.json").write_text(files[f"{name}/model-settings.json"])
    (folder / "stock").mkdir()
    (folder / "stock/kind.py").write_text(STOCK)
    (folder / "stock/model-settings.json").write_text(json.dumps({"name": "stock", "implementation": "kind.Kind"}))
    return folder


@pytest.fixture(scope="module", params=[0, 1], ids=["in process", "in a worker"])
def served(request: pytest.FixtureRequest, repository: Path) -> Iterator[Served]:
    """An MLServer with all models, each in the server's process or in a worker."""
    http, port, metrics = free_ports(3)
    environment = {
        **server_environment("mlserver", container_environment(candidate().serving)),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_HTTP_PORT": str(http),
        "MLSERVER_GRPC_PORT": str(port),
        "MLSERVER_METRICS_PORT": str(metrics),
        "MLSERVER_METRICS_DIR": str(repository.parent / f"metrics-{request.param}"),
        "MLSERVER_PARALLEL_WORKERS": str(request.param),
    }
    command = [sys.executable, "-P", "-c", "from mlserver.cli import main; main()", "start", str(repository)]
    log = repository.parent / f"server-{request.param}.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=stream, cwd=repository.parent, start_new_session=True
        )
    try:
        with (
            tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port}") as client,
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            wait_until_ready(client, server, log)
            infer = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=service_pb2.ModelInferRequest.SerializeToString,
                response_deserializer=service_pb2.ModelInferResponse.FromString,
            )
            yield Served(http, metrics, client, infer)
    finally:
        # Workers are in the same group; those that outlive the server would hold its files.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_ready(
    client: tritonclient.grpc.InferenceServerClient, server: subprocess.Popen[bytes], log: Path
) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(InferenceServerException):
            if client.is_server_ready() and all(map(client.is_model_ready, ("same", "fixed", "batched", "stock"))):
                return
        time.sleep(0.05)
    pytest.fail(f"MLServer did not start:\n{log.read_text()[-3000:]}")


def every_type(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {f"x_{name}": rng.integers(0, 2 if name == "bool" else 100, (rows, 3)).astype(name) for name in DTYPES}


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_every_type_comes_back_as_it_went(served: Served, rows: int) -> None:
    inputs = every_type(rows)
    outputs = served.raw("same", inputs)
    assert set(outputs) == {f"y_{name}" for name in DTYPES}
    for name, output in outputs.items():
        np.testing.assert_array_equal(output, inputs[name.replace("y_", "x_")], strict=True)


def test_json_and_typed_contents_give_lists(served: Served) -> None:
    inputs = every_type(2)
    outputs = served.json("same", inputs)
    assert all(outputs[f"y_{name}"] == inputs[f"x_{name}"].ravel().tolist() for name in DTYPES)
    ids = {"name": "ids", "datatype": "INT64", "shape": [1, 2], "contents": {"int64_contents": [3, 2**40]}}
    mask = {"name": "mask", "datatype": "INT64", "shape": [1, 2], "contents": {"int64_contents": [0, 1]}}
    reply = served.infer(service_pb2.ModelInferRequest(model_name="batched", id="7", inputs=[ids, mask]))
    assert reply.id == "7"
    assert {output.name: output.contents for output in reply.outputs} == {
        "total": service_pb2.InferTensorContents(int64_contents=[2**40]),
        "present": service_pb2.InferTensorContents(bool_contents=[False, True]),
    }


def test_another_runtime_gets_the_lists_it_had(served: Served) -> None:
    tensor = tritonclient.grpc.InferInput("x", [3], "FP32")
    tensor.set_data_from_numpy(np.array([1, 2, 4], np.float32))
    assert served.client.infer("stock", [tensor]).as_numpy("kind").tolist() == [b"list of float: 7.0"]


def test_a_fixed_batch_takes_any_number_of_rows(served: Served) -> None:
    for rows in (1, 4, 6):
        x = np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32)
        np.testing.assert_allclose(served.raw("fixed", {"x": x})["logits"], mlp_answer(x), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_by_name(served: Served) -> None:
    x = {"name": "x", "datatype": "FP32", "shape": [1, 8]}
    asked = {"model_name": "fixed", "inputs": [x]}
    refused = served.refused(**asked, raw_input_contents=[bytes(31)])
    assert refused.startswith("INVALID_ARGUMENT: ")
    assert refused.endswith("the input 'x' is FP32 of shape [1, 8], which takes 32 bytes; it has 31")
    refused = served.refused(**asked, raw_input_contents=[bytes(32), b""])
    assert refused == "INVALID_ARGUMENT: the request has 1 inputs and 2 raw contents"
    refused = served.refused(model_name="fixed", inputs=[{**x, "datatype": "BYTES"}], raw_input_contents=[bytes(32)])
    assert refused.endswith("the input 'x' is FP32, not BYTES")
    refused = served.refused(model_name="fixed", inputs=[{**x, "name": "y"}], raw_input_contents=[bytes(32)])
    assert refused.endswith("the model has no input 'y'; it takes x")
    assert served.refused(model_name="absent", inputs=[x], raw_input_contents=[bytes(32)]).startswith("NOT_FOUND: ")


def test_a_batch_of_mixed_requests_gives_each_its_own(served: Served) -> None:
    def one(number: int) -> None:
        rng = np.random.default_rng(number)
        shape = (1 + number % 2, 3 + number % 3)
        ids, mask = rng.integers(0, 1000, shape), rng.integers(0, 2, shape)
        total = (ids * mask).sum(axis=1).tolist()
        if number % 8 == 5:  # does not fit, and is nobody else's trouble
            with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"):
                served.raw("batched", {"ids": ids, "mask": mask[:, 1:]})
        elif number % 8 == 6:
            with pytest.raises(urllib.error.HTTPError, match="400"):
                served.json("batched", {"ids": ids.astype(np.float32), "mask": mask})
        elif number % 4 == 0:
            assert served.json("batched", {"ids": ids, "mask": mask})["total"] == total
        else:
            outputs = served.raw("batched", {"ids": ids, "mask": mask})
            assert outputs["total"].tolist() == total
            np.testing.assert_array_equal(outputs["present"], mask == 1)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(32)))


def test_batches_and_time_are_metrics(served: Served) -> None:
    x = np.zeros((3, 8), np.float32)
    served.raw("fixed", {"x": x})
    with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics}/metrics") as response:
        text = response.read().decode()
    ours = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("burnish_")}
    sizes = {name: value for name, value in ours.items() if name.startswith("burnish_batch_size_count")}
    assert any('model_name="fixed"' in name and value >= 1 for name, value in sizes.items()), text
    assert any(name.startswith("burnish_model_seconds_sum") and value > 0 for name, value in ours.items())
