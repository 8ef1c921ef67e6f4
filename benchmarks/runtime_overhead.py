"""What our MLServer runtime costs over the session alone, and beside Triton: one image a request, plain raw contents.

A model that sums its 1x3x224x224 float32 input (602 kB), so that nearly all of the time is the server's. MLServer, with
the model in its own process and with it in a worker, and Triton with its Python backend stand side by side, started as
burnish starts them. Each round measures each of them, in an order of chance: latency at 1 client, rate at 8.

It is done twice. Apart, servers have one CPU and the load has the other, so that the load cannot disturb latency.
Together, both may use both, as in a pod with more than one CPU: gRPC's thread and the event loop, which take turns on
one CPU, then run side by side. Limits on latency hold apart, and ratios of rates together.
"""

import hashlib
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from figures import figure, finish, say
from numpy.typing import NDArray
from onnx import TensorProto, helper

from profiles.deploy.local import LocalCluster
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Payload, encode_payloads
from profiles.serving.session import Session, open_session
from registry.codec import digest
from registry.records import (
    Artifact,
    ArtifactFile,
    Candidate,
    ClosedLoop,
    EngineSpec,
    LoadProfile,
    RunRecord,
    ServingProfile,
    Target,
    TensorSpec,
)

ROUNDS = 7
WINDOW_S = 3.0
CLIENTS = 8
PIXELS = (3, 224, 224)
START_S = 60.0
SERVED = {
    "workers0": ServingProfile(server="mlserver", backend="burnish"),
    "workers1": ServingProfile(server="mlserver", backend="burnish", parallel_workers=1),
    "triton": ServingProfile(server="triton", backend="python"),
}


def summing_model(folder: Path) -> Artifact:
    """``image`` (batch, 3, 224, 224) -> ``total`` (batch,), written to the folder."""
    batch = "batch"
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["image", "axes"], ["total"], keepdims=0)],
        "summing",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, *PIXELS])],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, [batch])],
        [helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return artifact_of(
        folder / "model.onnx",
        inputs=(TensorSpec(name="image", dtype="float32", shape=(batch, *PIXELS)),),
        outputs=(TensorSpec(name="total", dtype="float32", shape=(batch,)),),
    )


def artifact_of(file: Path, *, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Artifact:
    """The record of a model that is one ONNX file."""
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    files = (ArtifactFile(path=file.name, size_bytes=file.stat().st_size, sha256=sha256),)
    return Artifact(digest=sha256, format="onnx", entry=file.name, files=files, inputs=inputs, outputs=outputs)


def candidate_of(name: str, serving: ServingProfile) -> Candidate:
    """What is served, with ONNX Runtime."""
    return Candidate(
        id=digest([name]),
        name=name,
        variant_id="0" * 16,
        variant_name=name,
        engine=EngineSpec(name="onnxruntime"),
        engine_version="",
        serving=serving,
        server_version="",
    )


def offer(
    generator: LoadGenerator, target: Target, payloads: tuple[Payload, ...], *, clients: int, work: Path
) -> RunRecord:
    """One window of so many clients, each of which waits for its answer."""
    load = LoadProfile(name="closed", load=ClosedLoop(concurrency=clients), warmup_s=1.0, duration_s=WINDOW_S)
    record = generator.run(target, payloads, load, raw_path=work / "window.npz")
    if record.errors:
        say(f"errors: {dict(record.errors)}")
    return record


def in_process_ms(session: Session, inputs: Mapping[str, NDArray[np.float32]], *, calls: int = 500) -> float:
    """Median time of a run of the session alone."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        session.run(inputs)
        times.append(time.perf_counter() - begin)
    return 1000 * median(times)


@contextmanager
def on_cpus(cpus: tuple[int, ...]) -> Iterator[None]:
    """This thread runs on these CPUs within."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


Found = dict[str, list[float]]


def measured(server_cpus: tuple[int, ...], client_cpus: tuple[int, ...]) -> Found:
    """Milliseconds over the session alone, rates, and their ratios to Triton's, of each server in each round."""
    order = random.Random(0)
    found: Found = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix="burnish-work-") as folder:
        work = Path(folder)
        artifact = summing_model(work)
        images = np.random.default_rng(0).random((8, *PIXELS), np.float32)
        session = open_session(work / artifact.entry, engine="onnxruntime")
        with LocalCluster(work, server_cpus=server_cpus) as cluster, LoadGenerator(client_cpus, work) as generator:
            deployed = {
                name: cluster.deploy(candidate_of(name, serving), artifact, work, timeout_s=START_S)
                for name, serving in SERVED.items()
            }
            payloads = {
                name: encode_payloads({"image": images}, target=deployment.target)
                for name, deployment in deployed.items()
            }
            for number in range(ROUNDS):
                names = list(deployed)
                order.shuffle(names)
                with on_cpus(server_cpus):
                    alone = in_process_ms(session, {"image": images[:1]})
                rates = {}
                for name in names:
                    target = deployed[name].target
                    one = offer(generator, target, payloads[name], clients=1, work=work)
                    many = offer(generator, target, payloads[name], clients=CLIENTS, work=work)
                    found[f"{name}_ms"].append(one.metrics["latency_p50_ms"] - alone)
                    rates[name] = many.metrics["throughput_rps"]
                for name, rate in rates.items():
                    found[f"{name}_rps"].append(rate)
                    found[f"{name}_ratio"].append(rate / rates["triton"])
                say(
                    f"round {number + 1}: in process {alone:.2f} ms; "
                    + "; ".join(f"{n} +{found[f'{n}_ms'][-1]:.2f} ms, {rates[n]:.0f}/s" for n in deployed)
                    + f"; load average {os.getloadavg()[0]:.2f}"
                )
    say("medians: " + ", ".join(f"{name} {median(values):.4g}" for name, values in found.items()))
    return found


def main() -> None:
    one, other = sorted(os.sched_getaffinity(0))[:2]
    say(f"load average at the start: {os.getloadavg()[0]:.2f}")
    say(f"apart: servers on CPU {one}, the load on CPU {other}")
    apart = measured((one,), (other,))
    say(f"together: servers and the load on CPUs {one} and {other}")
    together = measured((one, other), (one, other))
    finish(
        figure("runtime_overhead_ms_workers0", median(apart["workers0_ms"]), "<= 3.0"),
        figure("runtime_rate_ratio_workers0", median(together["workers0_ratio"]), ">= 1.0"),
        figure("runtime_overhead_ms_workers1", median(apart["workers1_ms"]), "<= 6.0"),
        figure("runtime_rate_ratio_workers1", median(together["workers1_ratio"]), ">= 0.25"),
    )


if __name__ == "__main__":
    sys.exit(main())
