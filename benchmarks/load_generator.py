"""Our load generator beside perf_analyzer on a real Triton, and beside k6 on a real MLServer.

A model of about half a millisecond is served on one CPU, and the generators take turns on the other, in each round in a
new order, each with the same constant arrivals at 30 % or less of what the server can. The peer runs twice a round: how
far it is from itself (the largest ratio over the rounds, as campaigns take their noise floor) is its A/A spread.

What is compared is the service time, from the actual sending to the answer, since that is what the others take. The
distance is the mean of the log-ratios over the rounds, ours over the mean of both of the peer's. CPU a request is taken
in the same windows. The ceiling of one process is what it has of the null server with 16 requests outstanding.
"""

import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Literal

import numpy as np
import onnx
from figures import figure, finish, say
from load_peers import Run, analyze, attack, run_of
from null_triton import MODEL, WIDTH
from onnx import TensorProto, helper, numpy_helper
from runtime_overhead import artifact_of, candidate_of

from profiles.deploy.local import LocalCluster
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Payload, encode_payloads
from profiles.load.recording import load_arrays
from profiles.load.transports import Status
from profiles.measure.compare import noise_floor
from profiles.measure.host import split_cpus
from registry.records import Artifact, ClosedLoop, LoadProfile, OpenLoop, ServingProfile, Target, TensorSpec

HERE = Path(__file__).resolve().parent
ROUNDS = 6
WARMUP_S, WINDOW_S = 1.0, 4.0
SHARE = 0.25
# So many requests show a p99, and that a peer keeps up with easily.
MOST_RPS = 600.0
P50, P99 = 0.05, 0.10
CLIENTS = 8
HIDDEN, LAYERS = 512, 12
START_S = 60.0
CEILING_ROUNDS, CEILING_S, CEILING_CLIENTS = 3, 2.0, 16
Rounds = list[dict[str, Run]]
Measure = Callable[[float], Run]
Protocol = Literal["grpc", "rest"]
PROTOCOLS: tuple[Protocol, ...] = ("grpc", "rest")


def model(folder: Path) -> Artifact:
    """Some dense layers, ``x`` (batch, 64) -> ``y`` (batch, 512), written to the folder."""
    chance, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    for layer in range(LAYERS):
        shape = (HIDDEN if layer else WIDTH, HIDDEN)
        weight = chance.standard_normal(shape, dtype=np.float32) / math.sqrt(shape[0])
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        out = "y" if layer == LAYERS - 1 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [out]))
        last = out
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", HIDDEN])
    graph = helper.make_graph(nodes, "dense", [x], [y], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx"
    )
    return artifact_of(
        folder / "model.onnx",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", WIDTH)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", HIDDEN)),),
    )


@contextmanager
def null_triton(cpus: Sequence[int]) -> Iterator[dict[str, str]]:
    """Protocol -> address of the null server that perf_analyzer takes for a Triton."""
    command = [sys.executable, str(HERE / "null_triton.py"), *map(str, cpus)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rest, grpc = json.loads(process.stdout.readline())
        try:
            yield {"rest": f"127.0.0.1:{rest}", "grpc": f"127.0.0.1:{grpc}"}
        finally:
            process.kill()


class Ours:
    """Our generator, and what it sends."""

    def __init__(self, generator: LoadGenerator, target: Target, folder: Path) -> None:
        self.target = target
        samples = np.random.default_rng(0).standard_normal((64, WIDTH), dtype=np.float32)
        self.payloads: tuple[Payload, ...] = encode_payloads({"x": samples}, target=target)
        self._generator = generator
        self._raw = folder / "window.npz"

    def __call__(self, load: ClosedLoop | OpenLoop, duration_s: float) -> Run:
        profile = LoadProfile(name="ours", load=load, warmup_s=WARMUP_S, duration_s=duration_s)
        record = self._generator.run(self.target, self.payloads, profile, raw_path=self._raw)
        if findings := [f"{one.gate}: {one.observed}" for one in record.findings]:
            say(f"  ours: {'; '.join(findings)}")
        arrays = load_arrays(self._raw)
        ok = arrays["status"] == Status.OK
        rate = record.metrics["throughput_rps"]
        return run_of(
            (arrays["done_ns"] - arrays["sent_ns"])[ok] / 1e6, rate_rps=rate,
            cpu_us=1e6 * record.metrics["client_cpu"] / rate,
        )  # fmt: skip

    def steadily(self, rate_rps: float) -> Run:
        """At constant arrivals."""
        return self(OpenLoop(rate_rps=rate_rps, arrivals="constant"), WINDOW_S)


def in_turns(ours: Measure, theirs: Measure, rate_rps: float, name: str) -> Rounds:
    """Rounds of ours, the peer, and the peer again."""
    chance, rounds = random.Random(0), []
    for number in range(ROUNDS):
        slots = [("ours", ours), ("peer", theirs), ("again", theirs)]
        chance.shuffle(slots)
        rounds.append({slot: measure(rate_rps) for slot, measure in slots})
        found = rounds[-1].items()
        told = (f"{slot} {run.p50_ms:.3f} / {run.p99_ms:.3f} ms, {run.cpu_us:.0f} us" for slot, run in found)
        say(f"{name}, round {number + 1} at {rate_rps:.0f}/s (p50 / p99, CPU a request): {'; '.join(told)}")
    return rounds


def apart(rounds: Rounds, metric: str) -> tuple[float, float]:
    """(how far ours is from the peer, how far the peer is from itself), as shares."""

    def values(slot: str) -> list[float]:
        return [getattr(one[slot], metric) for one in rounds]

    peer = [mean(pair) for pair in zip(values("peer"), values("again"), strict=True)]
    logs = [math.log(mine / other) for mine, other in zip(values("ours"), peer, strict=True)]
    return abs(math.expm1(mean(logs))), noise_floor(list(zip(values("peer"), values("again"), strict=True)))


def agreement(rounds: Rounds, name: str) -> list[bool]:
    """The figures of service times."""
    met = []
    for metric, limit in (("p50_ms", P50), ("p99_ms", P99)):
        distance, spread = apart(rounds, metric)
        say(f"{name}: {metric} {distance:.1%} apart, the peer from itself up to {spread:.1%}")
        goal = f"<= {max(limit, spread):.4g}"
        met.append(figure(f"load_generator.{name}.service_{metric[:3]}_apart", distance, goal))
    return met


def cheapness(rounds: Rounds, name: str) -> bool:
    """The figure of the client's CPU."""
    ratio = median(one["ours"].cpu_us / mean((one["peer"].cpu_us, one["again"].cpu_us)) for one in rounds)
    return figure(f"load_generator.{name}.cpu_a_request_ratio", ratio, "<= 2.0")


def rate_for(ours: Ours) -> float:
    """Whole requests a second that are little enough for this server."""
    most = ours(ClosedLoop(concurrency=CLIENTS), 2.0).rate_rps
    rate = float(math.floor(min(MOST_RPS, SHARE * most)))
    say(f"{ours.target.protocol}: the server can {most:.0f}/s, so it is asked {rate:.0f}/s")
    return rate


def beside_perf_analyzer(
    generator: LoadGenerator, protocol: Protocol, work: Path, cpus: Mapping[str, Sequence[int]]
) -> list[bool]:
    """The figures on Triton over one protocol."""
    name = f"triton_{protocol}"
    serving = ServingProfile(server="triton", backend="python", protocol=protocol)
    with LocalCluster(work, server_cpus=cpus["server"]) as cluster:
        deployed = cluster.deploy(candidate_of(name, serving), model(work), work, timeout_s=START_S)
        ours = Ours(generator, deployed.target, work)

        def theirs(rate_rps: float) -> Run:
            load = [
                "--request-rate-range", f"{rate_rps:.0f}", "--request-distribution", "constant",
                "--warmup-request-count", f"{rate_rps * WARMUP_S:.0f}", "--request-count", f"{rate_rps * WINDOW_S:.0f}",
            ]  # fmt: skip
            target = deployed.target
            return analyze(target.url, protocol, target.model, f"1,{WIDTH}", load, cpus=cpus["client"], folder=work)

        rounds = in_turns(ours.steadily, theirs, rate_for(ours), name)
    return [*agreement(rounds, name), cheapness(rounds, name)]


def beside_k6(generator: LoadGenerator, work: Path, cpus: Mapping[str, Sequence[int]]) -> list[bool]:
    """The figures on MLServer, whose REST takes JSON alone."""
    serving = ServingProfile(server="mlserver", backend="burnish", protocol="rest")
    with LocalCluster(work, server_cpus=cpus["server"]) as cluster:
        deployed = cluster.deploy(candidate_of("mlserver", serving), model(work), work, timeout_s=START_S)
        ours = Ours(generator, deployed.target, work)
        url = f"http://{deployed.target.url}/v2/models/{deployed.target.model}/infer"
        bodies = [payload.body for payload in ours.payloads]

        def theirs(rate_rps: float) -> Run:
            return attack(
                url, bodies, rate_rps=rate_rps, warmup_s=WARMUP_S, duration_s=WINDOW_S, cpus=cpus["client"], folder=work
            )

        rounds = in_turns(ours.steadily, theirs, rate_for(ours), "mlserver_rest")
    return agreement(rounds, "mlserver_rest")


def ceilings(generator: LoadGenerator, work: Path, cpus: Mapping[str, Sequence[int]]) -> list[bool]:
    """The figures of one process on the null server."""
    met = []
    load = [
        "--concurrency-range", str(CEILING_CLIENTS), "--measurement-interval", f"{CEILING_S * 1000 / 3:.0f}",
        "--stability-percentage", "999",
    ]  # fmt: skip
    with null_triton(cpus["server"]) as addresses:
        for protocol in PROTOCOLS:
            url = addresses[protocol]
            target = Target(url=url, protocol=protocol, model=MODEL, binary=protocol == "rest")
            ours, found = Ours(generator, target, work), []
            for _ in range(CEILING_ROUNDS):
                mine = ours(ClosedLoop(concurrency=CEILING_CLIENTS), CEILING_S)
                other = analyze(url, protocol, MODEL, f"1,{WIDTH}", load, cpus=cpus["client"], folder=work)
                say(f"null server, {protocol}: ours {mine.rate_rps:.0f}/s, perf_analyzer {other.rate_rps:.0f}/s")
                found.append(mine.rate_rps / other.rate_rps)
            met.append(figure(f"load_generator.null_{protocol}.ceiling_ratio", median(found), ">= 0.5"))
    return met


def main() -> None:
    server, client, how = split_cpus()
    say(how)
    cpus = {"server": server, "client": client}
    met = []
    with tempfile.TemporaryDirectory(dir=HERE, prefix="burnish-work-") as folder:
        work = Path(folder)
        with LoadGenerator(client, work / "generator") as generator:
            for protocol in PROTOCOLS:
                met += beside_perf_analyzer(generator, protocol, work, cpus)
            met += beside_k6(generator, work, cpus)
            met += ceilings(generator, work, cpus)
    finish(*met)


if __name__ == "__main__":
    main()
