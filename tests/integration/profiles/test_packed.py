"""What real servers make of packed tensors: models that know of them take them, others refuse in words we tell."""

import json
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from profiles.deploy import local
from profiles.deploy.local import LocalCluster
from profiles.deploy.local_ports import LOOPBACK, Ports
from profiles.deploy.local_process import ServerProcess
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads, expected_answers
from profiles.serving.container import container_environment
from registry.errors import UnreachableError
from registry.records import ClosedLoop, LoadProfile, ServingProfile, Target
from tests.doubles.busy import undisturbed
from tests.doubles.candidates import candidate
from tests.doubles.models import FEATURES, mlp, write_onnx
from tests.doubles.ports import free_ports

pytestmark = pytest.mark.slow

Server = Literal["mlserver", "triton"]
X = np.random.default_rng(0).normal(size=(32, 16)).astype("f4")
START_S = 60.0
WINDOW = LoadProfile(name="test", load=ClosedLoop(concurrency=2), warmup_s=0.1, duration_s=0.5)

RUNTIME = '''
import json
import numpy as np
from mlserver import MLModel
from mlserver.types import InferenceResponse, ResponseOutput

class Summing(MLModel):
    """A runtime of one's own that takes packed tensors."""

    async def load(self):
        return True

    async def predict(self, payload):
        tensor = payload.inputs[0]
        said = tensor.parameters.model_dump()
        (content,) = tensor.data
        assert said["datatype"] == "FP32", said
        x = np.frombuffer(content, np.float32).reshape(json.loads(said["shape"]))
        sums = x.sum(axis=1, keepdims=True)
        output = ResponseOutput(name="sum", shape=list(sums.shape), datatype="FP32", data=sums.ravel().tolist())
        return InferenceResponse(model_name=self.name, outputs=[output])
'''

# Triton gives no parameters of tensors to a model; one that takes packed tensors has to know type and shape.
MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            (content,) = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            sums = np.frombuffer(content, np.float32).reshape(-1, 16).sum(axis=1, keepdims=True)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("sum", sums)]))
        return answers
"""

CONFIG = """
backend: "python"
max_batch_size: 0
input [{ name: "x" data_type: TYPE_STRING dims: [1] }]
output [{ name: "sum" data_type: TYPE_FP32 dims: [-1, 1] }]
instance_group [{ kind: KIND_CPU }]
"""


@pytest.fixture(scope="module", params=["mlserver", "triton"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A model that takes packed tensors, on a real server."""
    server: Server = request.param
    here = local.available_servers()[server]
    if here.version is None:
        pytest.skip(f"{server}: {here.reason}")
    profile = ServingProfile(server=server, backend="burnish" if server == "mlserver" else "python")
    process = ServerProcess(
        tmp_path_factory.mktemp(server) / "server",
        server=server,
        settings=container_environment(profile),
        ports=Ports(**dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))),
        cpus=(),
        grace_s=None,
    )
    try:
        model = process.repository / "packed"
        model.mkdir()
        if server == "mlserver":
            (model / "packed_sums.py").write_text(textwrap.dedent(RUNTIME), encoding="utf-8")
            settings = {"name": "packed", "implementation": "packed_sums.Summing"}
            (model / "model-settings.json").write_text(json.dumps(settings), encoding="utf-8")
        else:
            (model / "1").mkdir()
            (model / "1" / "model.py").write_text(textwrap.dedent(MODEL), encoding="utf-8")
            (model / "config.pbtxt").write_text(CONFIG, encoding="utf-8")
        deadline = time.monotonic() + START_S
        process.wait_live(deadline)
        process.load("packed", deadline)
        yield Target(
            url=f"{LOOPBACK}:{process.ports.grpc}",
            protocol="grpc",
            model="packed",
            packed=True,
            headers={"x-server": server},
        )
    finally:
        process.end()


def test_a_model_that_knows_of_packed_tensors_answers_them_rightly(served: Target, tmp_path: Path) -> None:
    payloads = encode_payloads({"x": X}, target=served, rows=2)
    expected = expected_answers(payloads, {"sum": X.sum(axis=1, keepdims=True)})
    with LoadGenerator(None, tmp_path) as generator:
        offer = partial(generator.run, served, payloads, WINDOW, raw_path=tmp_path / "w.npz", expected=expected)
        record = undisturbed(offer, lambda record: record.scheduled > 10)
    assert record.ok == record.scheduled > 10
    assert not {"mismatch", "errors"} & {finding.gate for finding in record.findings}


def test_raw_tensors_for_it_are_refused_in_the_servers_words(served: Target, tmp_path: Path) -> None:
    raw = Target(url=served.url, protocol="grpc", model="packed")
    with LoadGenerator(None, tmp_path) as generator, pytest.raises(UnreachableError) as refused:
        generator.run(raw, encode_payloads({"x": X}, target=raw), WINDOW, raw_path=tmp_path / "w.npz")
    said = {"mlserver": "INTERNAL: ", "triton": "data-type is 'FP32', but model 'packed' expects 'BYTES'"}
    assert said[served.headers["x-server"]] in refused.value.message


@pytest.mark.parametrize("server", ["mlserver", "triton"])
def test_a_model_as_burnish_serves_it_refuses_packed_tensors(server: Server, tmp_path: Path) -> None:
    here = local.available_servers()[server]
    if here.version is None:
        pytest.skip(f"{server}: {here.reason}")
    artifact = write_onnx(mlp(), tmp_path / "files")
    with LocalCluster(tmp_path) as cluster, LoadGenerator(None, tmp_path / "generator") as generator:
        deployed = cluster.deploy(candidate(server=server), artifact, tmp_path / "files", timeout_s=START_S)
        target = replace(deployed.target, packed=True)
        samples = {"x": np.ones((4, FEATURES), np.float32)}
        with pytest.raises(UnreachableError, match=r"'x'.*BYTES|BYTES.*'x'"):
            generator.run(target, encode_payloads(samples, target=target), WINDOW, raw_path=tmp_path / "w.npz")
