"""What an agent leaves of a folder, loaded by a real MLServer as Core 2 starts it, and by a real Triton."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from profiles.deploy import local
from profiles.deploy.local_installation import server_command, server_environment
from profiles.serving.mlserver import render_mlserver
from profiles.serving.roundtrip import agent_rewrite
from profiles.serving.triton import render_triton
from registry.records import Artifact, TensorSpec
from tests.doubles.busy import undisturbed
from tests.doubles.candidates import candidate
from tests.doubles.ports import free_ports

pytestmark = pytest.mark.slow

LIMIT_S = 60.0
REQUESTS = 16
BATCH = 8

BAD = {"max_batch_size": "eight"}

RUNTIME = '''"""A runtime as users write them: it says how many rows came together."""

from mlserver import MLModel
from mlserver.types import InferenceResponse, ResponseOutput


class Counting(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        rows = payload.inputs[0].shape[0]
        output = ResponseOutput(name="rows", shape=[rows, 1], datatype="INT64", data=[rows] * rows)
        return InferenceResponse(model_name=self.name, outputs=[output])
'''


def counting_model() -> onnx.ModelProto:
    """A model whose every row of output is the number of rows that it was run on."""
    nodes = [
        helper.make_node("Shape", ["x"], ["count"], start=0, end=1),
        helper.make_node("Concat", ["count", "one"], ["shape"], axis=0),
        helper.make_node("Expand", ["count", "shape"], ["rows"]),
    ]
    graph = helper.make_graph(
        nodes,
        "counting",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("rows", TensorProto.INT64, ["batch", 1])],
        [helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


ARTIFACT = Artifact(
    digest="0" * 64,
    format="onnx",
    entry="model.onnx",
    files=(),
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 2)),),
    outputs=(TensorSpec(name="rows", dtype="int64", shape=("batch", 1)),),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours and a stock one as the agent leaves them, and the stock one as it was."""
    folder = tmp_path_factory.mktemp("roundtrip")
    batched = candidate(max_batch_size=BATCH, max_batch_delay_ms=5000.0)
    for name, served in {"ours": batched, "single": candidate()}.items():
        rendered = render_mlserver(served, ARTIFACT, model_name=name, http_port=1, grpc_port=2, metrics_port=3)
        (folder / name).mkdir()
        (folder / name / "model-settings.json").write_text(rendered[f"{name}/model-settings.json"])
        onnx.save(counting_model(), folder / name / "model.onnx")
    stock = folder / "stock"
    stock.mkdir()
    settings = {"name": "stock", "implementation": "counting.Counting", "max_batch_size": BATCH, "max_batch_time": 5.0}
    (stock / "model-settings.json").write_text(json.dumps(settings))
    (stock / "counting.py").write_text(RUNTIME)
    models = folder / "models"
    for name in ("ours", "single", "stock"):
        agent_rewrite(folder / name, "mlserver", name=name).lay_out(models)
    for version, parameters in {2: {"max_batch_size": f"{BATCH}", "max_batch_time": "5"}, 3: BAD}.items():
        rewritten = agent_rewrite(folder / "single", "mlserver", name="single", version=version, parameters=parameters)
        rewritten.lay_out(models)
    (models / "as-it-was").mkdir()
    (models / "as-it-was/counting.py").write_text(RUNTIME)
    (models / "as-it-was/model-settings.json").write_text(json.dumps({**settings, "name": "as-it-was"}))
    return models


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """A client of an MLServer that was started as in Core 2's container, with nothing loaded."""
    http, grpc, metrics = free_ports(3)
    environment = {
        **os.environ,
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_HTTP_PORT": str(http),
        "MLSERVER_GRPC_PORT": str(grpc),
        "MLSERVER_METRICS_PORT": str(metrics),
        "MLSERVER_METRICS_DIR": str(repository.parent / "metrics"),
        "MLSERVER_PARALLEL_WORKERS": "1",
        "MLSERVER_LOAD_MODELS_AT_STARTUP": "false",
        "MLSERVER_DEBUG": "false",
    }
    command = [str(Path(sysconfig.get_path("scripts")) / "mlserver"), "start", str(repository)]
    with started(command, environment, repository.parent, grpc) as client:
        yield client


@contextlib.contextmanager
def started(
    command: list[str], environment: dict[str, str], folder: Path, grpc: int
) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """A client of a server that was just started; it ends with the context."""
    log = folder / "server.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=stream, cwd=folder, start_new_session=True
        )
    try:
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
            wait_until_live(client, server, log)
            yield client
    finally:
        # Asked first, so that it removes its semaphores and shared memory; then what is left of its group is ended.
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_live(
    client: tritonclient.grpc.InferenceServerClient, server: subprocess.Popen[bytes], log: Path
) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(InferenceServerException):
            if client.is_server_live():
                return
        time.sleep(0.05)
    pytest.fail(f"the server did not start:\n{log.read_text()[-2000:]}")


def rows_together(client: tritonclient.grpc.InferenceServerClient, model: str) -> list[int]:
    """How many rows each of the concurrent requests of one row was run with."""

    def one(_: int) -> int:
        tensor = tritonclient.grpc.InferInput("x", [1, 2], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 2), np.float32))
        rows = client.infer(model, [tensor]).as_numpy("rows")
        assert rows.shape == (1, 1)
        return int(rows[0, 0])

    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(one, range(REQUESTS)))


@pytest.mark.parametrize(
    ("model", "rows"),
    [("ours_1", BATCH), ("single_1", 1), ("single_2", BATCH), ("stock_1", 1), ("as-it-was", BATCH)],
    ids=["ours batches", "ours does not", "ours by the Model's parameters", "stock has lost it", "stock did before"],
)
def test_batching_behind_an_agent(client: tritonclient.grpc.InferenceServerClient, model: str, rows: int) -> None:
    client.load_model(model)
    # On a machine that stands still for longer than a batch waits, some of them come too late for it.
    assert undisturbed(lambda: set(rows_together(client, model)), lambda seen: seen == {rows}) == {rows}
    client.unload_model(model)


def test_batching_on_triton_behind_an_agent(tmp_path: Path) -> None:
    if (reason := local.available_servers()["triton"].reason) is not None:
        pytest.skip(reason)
    served = candidate(server="triton", max_batch_size=BATCH, max_batch_delay_ms=5000.0)
    for path, text in render_triton(served, ARTIFACT, model_name="artifact").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    onnx.save(counting_model(), tmp_path / "artifact/1/model.onnx")
    repository = tmp_path / "server/repository"
    rewritten = agent_rewrite(tmp_path / "artifact", "triton", name="ours", version=7)
    rewritten.lay_out(repository)
    ports = local.Ports(**dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True)))
    command = server_command("triton", repository, ports, name=f"roundtrip-{os.getpid()}-", work=tmp_path)
    with started(command, server_environment("triton"), tmp_path, ports.grpc) as client:
        client.load_model(rewritten.model)
        assert undisturbed(lambda: set(rows_together(client, "ours_7")), lambda seen: seen == {BATCH}) == {BATCH}
        client.unload_model("ours_7", unload_dependents=False)


def test_a_parameter_that_is_no_number_is_named(client: tritonclient.grpc.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match=r"parameters\.extra\.max_batch_size is 'eight'"):
        client.load_model("single_3")


# In a process of its own: MLServer and tritonclient.grpc both register the V2 protocol's messages.
READ = """
import json, sys
from mlserver import ModelSettings
from mlserver.settings import ModelParameters
from profiles.serving.runtime import SessionRuntime

for extra in json.load(sys.stdin):
    settings = ModelSettings(name="m", implementation=SessionRuntime, parameters=ModelParameters(extra=extra))
    try:
        SessionRuntime(settings)
        print(json.dumps([settings.max_batch_size, settings.max_batch_time]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""
READ_AS = [
    ({"max_batch_size": "8", "max_batch_time": "0.5"}, [8, 0.5]),
    ({"max_batch_size": 8, "max_batch_time": 0.5}, [8, 0.5]),
    ({"max_batch_size": 8.0, "max_batch_time": 1}, [8, 1.0]),
    ({"max_batch_size": "0"}, [0, 0.0]),
    ({}, [0, 0.0]),
]
NO_SIZES = ["eight", "8.5", -1, None, True, "inf", [], ""]
NO_TIMES = ["5ms", "nan", "-0.1", False, {}]


def test_batching_is_read_from_texts_and_numbers_and_from_nothing_else() -> None:
    refused = [("max_batch_size", value) for value in NO_SIZES] + [("max_batch_time", value) for value in NO_TIMES]
    given = [extra for extra, _ in READ_AS] + [{key: value} for key, value in refused]
    done = subprocess.run(
        [sys.executable, "-c", READ], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    read = [json.loads(line) for line in done.stdout.splitlines()]
    assert read[: len(READ_AS)] == [expected for _, expected in READ_AS]
    for (key, value), said in zip(refused, read[len(READ_AS) :], strict=True):
        wanted = "a whole number" if key == "max_batch_size" else "a number"
        assert said == f"parameters.extra.{key} is {value!r}; it takes {wanted} from 0 on"
