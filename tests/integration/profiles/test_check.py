"""`burnish check` as a user calls it: on servers that are wrong on demand, a real one, and a broken runtime."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from optimize.checking import describe_inputs, random_inputs
from optimize.cli import main
from optimize.in_process import answer_in_process
from optimize.reporting import write_campaign
from profiles.deploy.local_ports import Ports
from profiles.testing import FakeV2Server
from registry.errors import InputError, StageError
from registry.records import EngineSpec, TensorSpec
from registry.store import FolderStore
from tests.doubles.campaigns import campaign
from tests.doubles.candidates import candidate
from tests.doubles.models import mlp, mlp_answer, write_onnx
from tests.doubles.ports import free_ports

SPEC = TensorSpec(name="x", dtype="float32", shape=(None, 16))
ORT = EngineSpec(name="onnxruntime")

RUNTIME = '''"""Sums rows, and gives each row of a batch the sum of the next one where it is told to."""

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Summing(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        rows = np.asarray(payload.inputs[0].data.root, "f4").reshape(payload.inputs[0].shape)
        sums = np.roll(rows.sum(axis=1, keepdims=True), -self.settings.parameters.extra["offset"], axis=0)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("sum", sums)])
'''


def burnish(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the document on stdout."""
    monkeypatch.setattr(sys, "argv", ["burnish", "check", *arguments, "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_an_endpoint_is_checked_with_samples_of_chance(monkeypatch, capsys, protocol):
    with FakeV2Server() as server:
        url = server.target(protocol).url
        code, told = burnish(monkeypatch, capsys, url, "--model", "m", "--protocol", protocol, "--requests", "16")
    assert code == 0
    assert told["passed"]
    assert told["requests"] == 16
    assert told["target"] == {"url": url, "protocol": protocol, "model": "m"}


def test_a_broken_batcher_is_exit_5(monkeypatch, capsys):
    with FakeV2Server(split=lambda answers: answers[::-1]) as server:
        code, told = burnish(monkeypatch, capsys, server.target("grpc").url, "--model", "m")
    assert code == 5
    assert not told["passed"]
    assert "the answer of another" in told["reason"]
    assert told["swapped"]


def test_people_are_told_what_was_done(monkeypatch, capsys):
    with FakeV2Server(answerer=lambda count: ("other", "")) as server:
        monkeypatch.setattr(sys, "argv", ["burnish", "check", server.target("grpc").url, "--model", "m"])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 5
    told = capsys.readouterr().out
    assert "64 concurrent requests" in told
    assert "FAILED: answered by 'other', not 'm'" in told


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["127.0.0.1:1"], 2, "--model"),
        (["127.0.0.1:1", "--model", "m"], 4, "127.0.0.1:1"),
        (["127.0.0.1:1", "--model", "m", "--concurrency", "1"], 2, "--concurrency is 2 or more, not 1"),
        (["127.0.0.1:1", "--model", "m", "--tolerance", "0"], 2, "--tolerance"),
        (["127.0.0.1:1", "--model", "m", "--protocol", "soap"], 2, "soap"),
        (["127.0.0.1:1", "--model", "m", "--samples", "none.npz"], 2, "none.npz"),
        (["127.0.0.1:1", "--model", "m", "--reference", "none.onnx"], 2, "none.onnx"),
        (["any", "--work", "nowhere"], 2, "nowhere"),
        (["any", "--work", "nowhere", "--model", "m"], 2, "--model"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, code, said):
    got, told = burnish(monkeypatch, capsys, *arguments)
    assert got == code
    assert said in told["error"]["message"]


def test_a_model_that_is_not_there(monkeypatch, capsys):
    with FakeV2Server() as server:
        for protocol in ("grpc", "rest"):
            url = server.target(protocol).url
            code, told = burnish(monkeypatch, capsys, url, "--model", "other", "--protocol", protocol)
            assert code == 4
            assert "'other'" in told["error"]["message"]


def test_inputs_are_described_alike_over_both_protocols():
    with FakeV2Server() as server:
        assert describe_inputs(server.target("grpc")) == describe_inputs(server.target("rest")) == (SPEC,)


def test_samples_of_chance_fit_their_inputs():
    kinds = {"float16": 16, "int64": 2, "uint8": 256, "bool": 2}
    specs = [TensorSpec(name=kind, dtype=kind, shape=("batch", "length", 3)) for kind in kinds]
    for kind, array in random_inputs(specs, 8).items():
        assert array.dtype == kind
        assert array.shape == (8, 16, 3)
        assert len(np.unique(array)) > 1
        assert array.min() >= (0 if kind != "float16" else -100)
    for spec in (replace(SPEC, dtype="str"), replace(SPEC, shape=(8, 3)), replace(SPEC, shape=())):
        with pytest.raises(InputError, match="input 'x'"):
            random_inputs([spec], 8)


@pytest.mark.slow
def test_what_neighbours_move_is_found_in_process(tmp_path: Path):
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("f4")
    artifact = write_onnx(mlp(), tmp_path)
    exact = answer_in_process(tmp_path / artifact.entry, ORT, {"x": x}, batch_size=8)
    assert exact.allowance == {}
    np.testing.assert_allclose(exact.outputs["logits"], mlp_answer(x), rtol=1e-4, atol=1e-3)
    onnx.save(scaled_by_the_batch(), tmp_path / "dependent.onnx")
    positive = {"x": np.abs(x)}
    moved, alone = (answer_in_process(tmp_path / "dependent.onnx", ORT, positive, batch_size=size) for size in (8, 1))
    # By itself each row's largest value is 1, beside others it may be near 0; and there is room for as much again.
    assert 1 < moved.allowance["y"] < 2
    assert alone.allowance == {}
    np.testing.assert_array_equal(moved.outputs["y"], alone.outputs["y"])
    with pytest.raises(StageError, match="the input 'x' has the shape"):
        answer_in_process(tmp_path / artifact.entry, ORT, {"x": x[:, :3]}, batch_size=8)


def scaled_by_the_batch() -> onnx.ModelProto:
    """Each value as a share of the largest in the whole batch."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Div", ["x", "largest"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in "xy")
    graph = helper.make_graph(nodes, "scaled", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.slow
def test_a_candidate_is_served_and_checked(monkeypatch, capsys, tmp_path: Path):
    served = candidate(max_batch_size=8, max_batch_delay_ms=5.0)
    described = write_onnx(mlp(), tmp_path / "model")
    artifact = FolderStore(tmp_path).add(
        tmp_path / "model",
        format="onnx",
        entry=described.entry,
        inputs=described.inputs,
        outputs=described.outputs,
    )
    known = campaign()
    variant = replace(known.variants[0], id=served.variant_id, artifact=artifact, adaptation=())
    write_campaign(replace(known, variants=(variant,), candidates=(served,)), tmp_path)
    code, told = burnish(monkeypatch, capsys, served.name, "--work", str(tmp_path))
    assert told["passed"], told["reason"]
    assert code == 0
    assert told["candidate"] == served.name
    assert told["rows"] > told["requests"] == 64
    assert told["told_apart"] > 0.8 * told["rows"]
    assert told["worst"] < 1e-5


@pytest.mark.slow
def test_a_runtime_that_splits_off_by_one_is_caught_on_a_real_server(monkeypatch, capsys, tmp_path: Path):
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=np.random.default_rng(0).normal(size=(64, 4)).astype("f4"))
    with runtimes(tmp_path, right=0, broken=1) as (http, grpc):
        for protocol, port in (("grpc", grpc), ("rest", http)):
            for model, right in (("right", True), ("broken", False)):
                options = ["--model", model, "--samples", str(samples), "--protocol", protocol, "--concurrency", "8"]
                code, told = burnish(monkeypatch, capsys, f"127.0.0.1:{port}", *options)
                assert told["passed"] == right, told["reason"]
                assert code == (0 if right else 5)
                assert right or "does not split its batches rightly" in told["reason"]


@contextlib.contextmanager
def runtimes(folder: Path, **offsets: int) -> Iterator[tuple[int, int]]:
    """REST and gRPC port of a real MLServer that batches, with one summing model for each offset."""
    ports = Ports(**dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True)))
    for name, offset in offsets.items():
        place = folder / "models" / name
        place.mkdir(parents=True)
        (place / "summing.py").write_text(RUNTIME)
        settings = {
            "name": name,
            "implementation": "summing.Summing",
            "max_batch_size": 8,
            "max_batch_time": 0.02,
            "parameters": {"extra": {"offset": offset}},
        }
        (place / "model-settings.json").write_text(json.dumps(settings))
    environment = {
        **os.environ,
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_HTTP_PORT": str(ports.http),
        "MLSERVER_GRPC_PORT": str(ports.grpc),
        "MLSERVER_METRICS_PORT": str(ports.metrics),
        "MLSERVER_METRICS_DIR": str(folder / "metrics"),
        "MLSERVER_PARALLEL_WORKERS": "0",
    }
    command = [str(Path(sysconfig.get_path("scripts")) / "mlserver"), "start", str(folder / "models")]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        for name in offsets:
            wait_until_ready(f"http://127.0.0.1:{ports.http}/v2/models/{name}/ready", server, folder)
        yield ports.http, ports.grpc
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_ready(url: str, server: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.05)
    raise AssertionError((folder / "server.log").read_text(errors="replace")[-3000:])
