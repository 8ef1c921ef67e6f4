"""The null server with what perf_analyzer asks a Triton before it begins: ``python null_triton.py [CPU ...]``."""

import asyncio
import json
import os
import sys
from typing import Any

from google.protobuf.json_format import Parse
from tritonclient.grpc import service_pb2

from profiles.load.null_server import GRPC_REPLY, REPLY, Grpc, Rest, serve

MODEL = "null"
WIDTH = 64
_PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
SERVER = {
    "name": "triton", "version": "2.51.0",
    "extensions": ["binary_tensor_data", "statistics", "model_configuration"],
}  # fmt: skip
METADATA = {
    "name": MODEL, "versions": ["1"], "platform": "python",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, WIDTH]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}],
}  # fmt: skip
CONFIG = {
    "name": MODEL, "backend": "python", "max_batch_size": 0,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [1, WIDTH]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [1]}],
}  # fmt: skip
_answered = [0]


def statistics() -> dict[str, Any]:
    """What perf_analyzer asks before and after: it wants to see that its requests came."""
    counted = {"count": _answered[0], "ns": _answered[0]}
    model = {
        "name": MODEL, "version": "1", "last_inference": 0, "inference_count": _answered[0],
        "execution_count": _answered[0], "inference_stats": dict.fromkeys(_PARTS, counted), "batch_stats": [],
    }  # fmt: skip
    return {"model_stats": [model]}


_REST = {"/v2": SERVER, "/v2/models/null": METADATA, "/v2/models/null/config": CONFIG}
_ANSWERS = {path.encode(): json.dumps(answer).encode() for path, answer in _REST.items()}
_INFERENCE = json.dumps(REPLY).encode()
_CALLS = {
    "ServerMetadata": Parse(json.dumps(SERVER), service_pb2.ServerMetadataResponse()).SerializeToString(),
    "ModelMetadata": Parse(json.dumps(METADATA), service_pb2.ModelMetadataResponse()).SerializeToString(),
    "ModelConfig": Parse(json.dumps({"config": CONFIG}), service_pb2.ModelConfigResponse()).SerializeToString(),
    "ServerLive": b"\x08\x01", "ServerReady": b"\x08\x01", "ModelReady": b"\x08\x01",
}  # fmt: skip


def answer(request: bytes) -> bytes:
    """What a request is answered with, by its first line."""
    path = request.split(b" ")[1].replace(b"/versions/1", b"")
    if path.endswith(b"/stats"):
        return json.dumps(statistics()).encode()
    if path.endswith(b"/infer"):
        _answered[0] += 1
    return _ANSWERS.get(path, _INFERENCE)


def reply(method: str) -> bytes:
    """What a call is answered with, by its method."""
    name = method.rpartition("/")[2]
    if name == "ModelStatistics":
        message = Parse(json.dumps(statistics()), service_pb2.ModelStatisticsResponse())
        return bytes(message.SerializeToString())
    if name == "ModelInfer":
        _answered[0] += 1
    return bytes(_CALLS.get(name, GRPC_REPLY))


if __name__ == "__main__":
    if sys.argv[1:]:
        os.sched_setaffinity(0, map(int, sys.argv[1:]))
    asyncio.run(serve(lambda: Rest(answer), lambda: Grpc(reply)))
