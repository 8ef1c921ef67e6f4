"""Candidate to MLServer's files."""

import json
from typing import Any

from profiles.serving.naming import check_batching, session_settings
from profiles.serving.self_contained import Bundle
from registry.errors import InputError
from registry.records import Artifact, Candidate

IMPLEMENTATION = "profiles.serving.runtime.SessionRuntime"
GRPC_MAX_MESSAGE_BYTES = 2**31 - 1
"""gRPC's own largest; MLServer's default is 4 MiB, which two images exceed."""
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "GRPC_EXPERIMENTS": "-event_engine_listener",
}
"""What MLServer does with the memory and the sockets of requests, which no setting of its own says.

glibc keeps the memory of one request's tensors for the next (see mallopt(3)). By default it maps blocks of 128 KiB and
more anew and gives them back, so that every image costs page faults; for small requests nothing changes. The server
holds up to some 300 MB that it no longer uses.

gRPC reads requests in the thread that hands them to Python. In late versions of its Python package several threads of
its own ("EventEngine") read them, which wake each other again and again for one image. Older versions, which know
nothing of that, or have it switched off, go on as they are.
"""


def render_mlserver(
    candidate: Candidate,
    artifact: Artifact,
    *,
    model_name: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    bundle: Bundle | None = None,
    environment: str | None = None,
) -> dict[str, str]:
    """``settings.json`` and ``<model_name>/model-settings.json``; the artifact's files belong beside the second.

    Batching stands in ``parameters.extra``, where our runtime reads it, since Core 2 drops MLServer's own keys.
    ``max_batch_size`` counts requests in MLServer, not rows.

    Args:
        candidate: what is served, and how.
        artifact: its model.
        model_name: its name on the server.
        http_port: of the server, as are ``grpc_port`` and ``metrics_port``.
        grpc_port: see there.
        metrics_port: see there.
        bundle: our runtime as a file, which is written beside the model; None for the one that the server has.
        environment: the file name of the tarball beside the model that a worker of its own runs in.

    Raises:
        InputError: the candidate is not one for our MLServer runtime, its batches cannot be had, or its batching would
            have no effect.
    """
    serving = candidate.serving
    if (serving.server, serving.backend) != ("mlserver", "burnish"):
        raise InputError(
            f"{candidate.name!r} is for {serving.server} with {serving.backend}, not for our MLServer runtime"
        )
    if serving.instances != 1:
        raise InputError(
            f"{candidate.name!r} asks for {serving.instances} instances, which MLServer does not have",
            hint="Set parallel_workers instead.",
        )
    check_batching(candidate, artifact)
    settings = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "grpc_max_message_length": GRPC_MAX_MESSAGE_BYTES,
        "parallel_workers": serving.parallel_workers,
    }
    parameters: dict[str, Any] = {
        "uri": f"./{artifact.entry}",
        "extra": {**session_settings(candidate), **_batching(candidate)},
    }
    if environment is not None:
        parameters["environment_tarball"] = f"./{environment}"
    model = {
        "name": model_name,
        "implementation": IMPLEMENTATION if bundle is None else bundle.implementation,
        "parameters": parameters,
    }
    files = {"settings.json": _json(settings), f"{model_name}/model-settings.json": _json(model)}
    return files if bundle is None else {**files, f"{model_name}/{bundle.file}": bundle.text}


def _batching(candidate: Candidate) -> dict[str, str]:
    serving = candidate.serving
    if serving.max_batch_size == 1:
        return {}
    if serving.max_batch_delay_ms <= 0:
        raise InputError(
            f"{candidate.name!r} asks for batches of {serving.max_batch_size} with no delay",
            hint="MLServer batches only where it may wait: give it a max_batch_delay_ms above 0.",
        )
    return {
        "max_batch_size": str(serving.max_batch_size),
        "max_batch_time": f"{serving.max_batch_delay_ms / 1000:g}",
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
