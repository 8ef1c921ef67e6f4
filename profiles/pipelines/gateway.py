"""A pipeline behind one V2 gRPC endpoint on this machine: ``python -m profiles.pipelines.gateway SETTINGS.json``.

It runs the graph against the steps' own servers, so that whatever measures a model measures a pipeline too. What Core 2
adds is not in it: no Kafka, no dataflow engine, no gateways of Core 2. It prints its port as one line and ends when
stdin closes.
"""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from profiles.pipelines.documents import SpecPart, as_spec, read_spec
from profiles.pipelines.graph import Pipeline
from profiles.pipelines.run import Arrays, run_graph
from registry.codec import from_jsonable, to_jsonable
from registry.errors import BurnishError, UnreachableError
from registry.records import Target

LOOPBACK = "127.0.0.1"
START_S = 30.0
CONNECTIONS = 4
CALL_S = 60.0
WITHOUT = "measured on one machine: the share of Kafka, dataflow engine and gateways is not in it"


@contextmanager
def local_pipeline(
    pipeline: Pipeline, targets: Mapping[str, Sequence[Target]], work: Path, *, cpus: Sequence[int] = ()
) -> Iterator[Target]:
    """Serves the pipeline from a process of its own while the block runs; gives where.

    Args:
        pipeline: without cycles.
        targets: step -> the servers of its model, which are asked in turn.
        work: folder for its settings and log.
        cpus: it is pinned to these; empty for all.

    Raises:
        UnreachableError: it did not start; the message ends with its log.
    """
    work.mkdir(parents=True, exist_ok=True)
    settings, log = work / "gateway.json", work / "gateway.log"
    document = {
        "name": pipeline.name,
        "spec": as_spec(pipeline),
        "targets": {step: [to_jsonable(target) for target in ones] for step, ones in targets.items()},
        "cpus": list(cpus),
    }
    settings.write_text(json.dumps(document), encoding="utf-8")
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "profiles.pipelines.gateway", str(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        ) as process,
    ):
        too_late = threading.Timer(START_S, process.kill)
        too_late.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            too_late.cancel()
            if not line:
                raise UnreachableError(
                    f"the pipeline {pipeline.name!r} was not served:\n{log.read_text(errors='replace')[-2000:]}"
                )
            yield Target(url=f"{LOOPBACK}:{int(line)}", protocol="grpc", model=f"{pipeline.name}.pipeline")
        finally:
            too_late.cancel()
            process.kill()


def core2_target(pipeline: Pipeline, mesh: str, *, tls: bool = False) -> Target:
    """Where a pipeline answers on a Core 2, whose mesh is at ``host:port``: as ``<name>.pipeline``."""
    model = f"{pipeline.name}.pipeline"
    return Target(url=mesh, protocol="grpc", model=model, headers={"seldon-model": model}, tls=tls)


# --- in the child ----------------------------------------------------------------------------------------------


def main() -> None:
    """Serves until stdin closes."""
    document = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if document["cpus"]:
        os.sched_setaffinity(0, document["cpus"])
    pipeline = read_spec(document["name"], SpecPart.model_validate(document["spec"]))
    targets = {step: [from_jsonable(Target, one) for one in ones] for step, ones in document["targets"].items()}
    asyncio.run(_serve(pipeline, targets))


async def _serve(pipeline: Pipeline, targets: Mapping[str, Sequence[Target]]) -> None:
    import grpc

    models = {step: Model(ones) for step, ones in targets.items()}
    await asyncio.gather(*(model.open() for model in models.values()))

    async def call(step: str, inputs: Arrays) -> Arrays:
        return await models[step](step, inputs)

    async def infer(body: bytes, context: Any) -> bytes:
        try:
            name, identity, inputs = decode_request(body)
            outputs, _ = await run_graph(pipeline, call, inputs)
            return encode_answer(name, identity, outputs)
        except (BurnishError, ValueError) as error:
            await context.abort(grpc.StatusCode.INTERNAL, str(error))
            raise

    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=options)
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


class Model:
    """The servers of one step's model, asked in turn."""

    def __init__(self, targets: Sequence[Target]) -> None:
        from profiles.load.transports import make_transport

        self._servers = [(target, make_transport(target, CONNECTIONS)) for target in targets]
        self._turn = itertools.cycle(self._servers)

    async def open(self) -> None:
        """Connects to all.

        Raises:
            UnreachableError: one does not take a connection.
        """
        await asyncio.gather(*(transport.open(START_S) for _, transport in self._servers))

    async def close(self) -> None:
        """Closes all connections."""
        await asyncio.gather(*(transport.close() for _, transport in self._servers))

    async def __call__(self, step: str, inputs: Arrays) -> Arrays:
        """Its outputs.

        Raises:
            UnreachableError: the server refused, or what it answered is no reply of V2.
        """
        from profiles.load.payloads import decode_outputs, encode_rows
        from profiles.load.transports import Status

        target, transport = next(self._turn)
        rows = np.arange(len(next(iter(inputs.values()))))
        reply = await transport.infer(encode_rows(inputs, rows, target), CALL_S)
        if reply.status != Status.OK:
            raise UnreachableError(f"step {step!r}: {reply.message}")
        return decode_outputs(reply.body, reply.headers, target)


def decode_request(body: bytes) -> tuple[str, str, Arrays]:
    """(model, request's id, input -> array) of a V2 request with raw tensors.

    Raises:
        ValueError: it is none.
    """
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

    try:
        request = service_pb2.ModelInferRequest.FromString(body)
    except Exception as error:  # protobuf's own errors share no base with others
        raise ValueError(f"no V2 request: {error}") from error
    if len(request.raw_input_contents) != len(request.inputs):
        raise ValueError("inputs have to be raw tensors (raw_input_contents)")
    arrays: Arrays = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        dtype = triton_to_np_dtype(tensor.datatype)
        if dtype is None:
            raise ValueError(f"input {tensor.name!r} has the unknown type {tensor.datatype!r}")
        flat = deserialize_bytes_tensor(raw) if tensor.datatype == "BYTES" else np.frombuffer(raw, dtype)
        arrays[tensor.name] = flat.reshape(tuple(tensor.shape))
    return request.model_name, request.id, arrays


def encode_answer(model: str, identity: str, outputs: Arrays) -> bytes:
    """A V2 reply with raw tensors."""
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

    reply = service_pb2.ModelInferResponse(model_name=model, id=identity)
    for name, array in outputs.items():
        reply.outputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        text = array.dtype.kind == "O"
        reply.raw_output_contents.append(serialize_byte_tensor(array).item() if text else array.tobytes())
    return bytes(reply.SerializeToString())


if __name__ == "__main__":
    main()
