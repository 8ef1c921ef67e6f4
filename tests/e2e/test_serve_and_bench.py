"""``burnish serve`` on the real servers, and ``burnish bench`` against it, as a user would."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BURNISH = str(Path(sys.executable).with_name("burnish"))


def read_document(process: "subprocess.Popen[str]") -> dict:
    text = ""
    assert process.stdout is not None
    for line in process.stdout:
        text += line
        try:
            return json.loads(text)
        except ValueError:
            continue
    raise AssertionError(f"{text!r} is no JSON document")


@pytest.mark.parametrize("server", ["mlserver", "triton"])
def test_a_served_model_can_be_measured_over_both_protocols(tiny: Path, server: str):
    command = [BURNISH, "serve", str(tiny / "model.onnx"), "--server", server, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serving:
        try:
            served = read_document(serving)
            for protocol in ("grpc", "rest"):
                load = ["--concurrency", "2", "--duration-s", "1", "--runs", "2", "--json"]
                samples = str(tiny / "evaluation.npz")
                options = ["--model", served["model"], "--samples", samples, "--protocol", protocol]
                done = subprocess.run(
                    [BURNISH, "bench", served[protocol], *options, *load],
                    check=False,
                    capture_output=True,
                    text=True,
                    timeout=200,
                )
                found = json.loads(done.stdout)
                assert "error" not in found, found
                # A machine that is too busy leaves no window valid.
                assert done.returncode == (0 if found["valid_windows"] else 5), done.stderr
                assert found["target"]["binary"] == (server == "triton" and protocol == "rest")
                assert found["measurements"] or found["invalid"]
            serving.send_signal(signal.SIGINT)
            assert serving.wait(100) == 130
        finally:
            serving.kill()


def test_a_port_in_use_is_named(tiny: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [BURNISH, "serve", str(tiny / "model.onnx"), "--http-port", port],
            check=False,
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 4
    assert port in done.stderr


def test_a_server_that_cannot_load_its_model_is_exit_4(tiny: Path):
    # An int4 tensor is in the file format, and nothing here computes with it as an input.
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("NonMaxSuppression", ["boxes", "scores"], ["chosen"])],
        "broken",
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT16, [1, 2, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT16, [1, 1, 2]),
        ],
        [helper.make_tensor_value_info("chosen", TensorProto.INT64, [None, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tiny / "broken.onnx")
    done = subprocess.run(
        [BURNISH, "serve", str(tiny / "broken.onnx")], check=False, capture_output=True, text=True, timeout=200
    )
    assert done.returncode in (2, 4), done.stderr
    assert "Traceback" not in done.stderr.partition("Its log ends")[0]


def test_an_endpoint_that_is_not_there(tiny: Path):
    options = ["--model", "m", "--samples", str(tiny / "evaluation.npz"), "--concurrency", "1", "--json"]
    done = subprocess.run(
        [BURNISH, "bench", "127.0.0.1:9", *options], check=False, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 4
    assert "127.0.0.1:9" in json.loads(done.stdout)["error"]["message"]
