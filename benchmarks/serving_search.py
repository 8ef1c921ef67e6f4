"""Whether the search for a serving profile finds what looking at all of them finds, at a tenth of the points.

Three surfaces are recorded by ``--record``: a residual network of convolutions and a dense network with wide layers in
MLServer, and the dense one in Triton, all with every profile of a space of more than a hundred, on two cores. Each
point is measured in several passes over the surface, in an order of chance, so that the machine's drift is no effect of
a profile. It takes about three quarters of an hour on a quiet machine, keeps each window as soon as it is measured,
and goes on where it was stopped.

Without arguments the search is then replayed on each surface with many seeds: it is shown one window a point, as chance
has it, and judged by the median of all. What it finds live, on servers of its own, is at last held against the recorded
best, in windows that take turns.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median, pstdev
from typing import Any, Literal

import numpy as np
import onnx
from figures import figure, finish, say
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from others import undisturbed
from runtime_overhead import artifact_of, candidate_of, on_cpus

from optimize.packages import version
from optimize.screening import time_runs
from profiles.deploy.local import LOOPBACK, LocalCluster, LocalDeployment
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads
from profiles.measure.host import fingerprint_host
from profiles.search import InProcessCurve, search_serving, search_space
from profiles.serving.session import open_session
from registry.errors import UnreachableError
from registry.records import Artifact, ClosedLoop, Estimate, LoadProfile, ServingProfile, Target, TensorSpec

HERE = Path(__file__).resolve().parent
SURFACES = HERE / "surfaces"
CORES = 2
CLIENTS = 32
PASSES = 3
WINDOW_S, WARMUP_S = 1.0, 0.3
START_S = 60.0
# A window is measured again after what is no property of the profile. That the client, which shares the cores, is busy
# is one of all profiles.
SPOILING = frozenset({"errors", "answered_by", "restarted", "steal"})
TRIES = 4
TIMED_S = 1.0
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SEEDS = 20
# Further windows of points that were looked at.
AGAIN = 8
LIVE_ROUNDS = 5


# --- models ----------------------------------------------------------------------------------------------------


def residual_network(file: Path) -> Artifact:
    """``image`` (batch, 3, 32, 32) -> ``scores`` (batch, 10): four residual blocks of convolutions."""
    chance, channels = np.random.default_rng(0), 32
    weights: dict[str, NDArray[np.float32]] = {}
    nodes = []

    def convolution(source: str, name: str, inputs: int) -> str:
        weights[f"{name}.w"] = (chance.normal(size=(channels, inputs, 3, 3)) / math.sqrt(9 * inputs)).astype(np.float32)
        nodes.append(helper.make_node("Conv", [source, f"{name}.w"], [name], kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"]))
        return f"{name}.relu"

    last = convolution("image", "stem", 3)
    for block in range(4):
        inner = convolution(last, f"block{block}.a", channels)
        inner = convolution(inner, f"block{block}.b", channels)
        nodes.append(helper.make_node("Add", [last, inner], [f"block{block}"]))
        last = f"block{block}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    weights["head.w"] = chance.normal(size=(channels, 10)).astype(np.float32)
    nodes.append(helper.make_node("MatMul", ["flat", "head.w"], ["scores"]))
    return _written(file, nodes, weights, ("image", (3, 32, 32)), ("scores", (10,)))


def dense_network(file: Path) -> Artifact:
    """``features`` (batch, 256) -> ``scores`` (batch, 16): wide layers, whose weights a batch of one waits for."""
    chance, sizes = np.random.default_rng(0), (256, 2048, 2048, 2048, 16)
    weights: dict[str, NDArray[np.float32]] = {}
    nodes, last = [], "features"
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        weights[f"w{number}"] = (chance.normal(size=(inputs, outputs)) / math.sqrt(inputs)).astype(np.float32)
        name = "scores" if number == len(sizes) - 2 else f"layer{number}"
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [name]))
        if name != "scores":
            nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"]))
        last = f"{name}.relu"
    return _written(file, nodes, weights, ("features", sizes[:1]), ("scores", sizes[-1:]))


def _written(
    file: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, NDArray[np.float32]],
    given: tuple[str, tuple[int, ...]],
    made: tuple[str, tuple[int, ...]],
) -> Artifact:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in (given, made)
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), file.stem, values[:1], values[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    specs = [TensorSpec(name=name, dtype="float32", shape=("batch", *shape)) for name, shape in (given, made)]
    return artifact_of(file, inputs=(specs[0],), outputs=(specs[1],))


@dataclass(frozen=True)
class Subject:
    """What a surface is of."""

    server: Literal["mlserver", "triton"]
    model: Literal["residual", "dense"]

    @property
    def name(self) -> str:
        return f"{self.server}-{self.model}"

    @property
    def space(self) -> tuple[ServingProfile, ...]:
        if self.server == "mlserver":
            return search_space(
                cores=CORES, servers=("mlserver",), batch_sizes=BATCH_SIZES[:-1], delays_ms=(0.5, 2.0, 5.0)
            )
        return search_space(cores=CORES, servers=("triton",), batch_sizes=BATCH_SIZES, delays_ms=(0.0, 0.5, 2.0, 5.0))

    def write(self, file: Path) -> Artifact:
        return residual_network(file) if self.model == "residual" else dense_network(file)


SUBJECTS = (Subject("mlserver", "residual"), Subject("mlserver", "dense"), Subject("triton", "dense"))


# --- measuring -------------------------------------------------------------------------------------------------


class Stand:
    """Servers and a load generator on the same two cores; what differs in the model alone shares a server.

    What differs in the protocol alone shares the model, too, where one is asked for after the other.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        generator: LoadGenerator,
        artifact: Artifact,
        inputs: Mapping[str, NDArray[np.float32]],
        work: Path,
    ) -> None:
        self._cluster, self._generator, self._work = cluster, generator, work
        self._artifact, self._inputs = artifact, inputs
        self._deployed: LocalDeployment | None = None

    def rps(self, profile: ServingProfile) -> float:
        """Requests a second, of one window."""
        target = self._target(profile)
        payloads = encode_payloads(self._inputs, target=target)
        clients = ClosedLoop(concurrency=CLIENTS)
        load = LoadProfile(name="closed", load=clients, warmup_s=WARMUP_S, duration_s=WINDOW_S)
        for _ in range(TRIES):
            record = undisturbed(
                lambda: self._generator.run(target, payloads, load, raw_path=self._work / "window.npz")
            )
            spoiled = [finding for finding in record.findings if finding.gate in SPOILING]
            if not spoiled:
                return record.metrics["throughput_rps"]
            say(f"{profile.key} again: {', '.join(f'{one.gate}, {one.observed}' for one in spoiled)}")
        raise UnreachableError(f"{profile.key} gave no valid window")

    def _target(self, profile: ServingProfile) -> Target:
        over_grpc = replace(profile, protocol="grpc")
        if self._deployed is None or self._deployed.candidate.serving != over_grpc:
            before, self._deployed = self._deployed, None
            if before is not None:
                before.undeploy()
            candidate = candidate_of(over_grpc.key, over_grpc)
            self._deployed = self._cluster.deploy(candidate, self._artifact, self._work, timeout_s=START_S)
        target, ports = self._deployed.target, self._deployed.ports
        if profile.protocol == "grpc":
            return target
        return replace(target, protocol="rest", url=f"{LOOPBACK}:{ports.http}", binary=profile.server == "triton")

    def curve(self) -> list[tuple[int, int, float]]:
        """(batch size, threads, rows a second) of the session in process; of each time the lower end counts."""
        found = []
        for threads in (1, 2):
            session = open_session(self._work / self._artifact.entry, engine="onnxruntime", threads=threads)
            for size in BATCH_SIZES:
                batch = {name: array[:size] for name, array in self._inputs.items()}
                time_ms = time_runs(lambda _, batch=batch, session=session: session.run(batch), TIMED_S)  # type: ignore[misc]
                found.append((size, threads, 1000 * size / (time_ms.low or time_ms.value)))
        return found


@contextmanager
def stand_for(subject: Subject) -> Iterator[Stand]:
    """A stand for a surface's model; all of it runs on the first two CPUs."""
    cpus = tuple(sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory(dir=HERE, prefix="burnish-work-") as folder, on_cpus(cpus):
        work = Path(folder)
        artifact = subject.write(work / "model.onnx")
        shape = tuple(size for size in artifact.inputs[0].shape if isinstance(size, int))
        samples = np.random.default_rng(1).random((max(BATCH_SIZES), *shape), np.float32)
        with LocalCluster(work, server_cpus=cpus, shared=True) as cluster, LoadGenerator(cpus, work) as generator:
            yield Stand(cluster, generator, artifact, {artifact.inputs[0].name: samples}, work)


# --- recording -------------------------------------------------------------------------------------------------


def record(subjects: Iterable[Subject], *, passes: int, points: int | None) -> None:
    """Measures each point of each surface, as often as there are passes; what is there already stays.

    Args:
        subjects: the surfaces.
        passes: over each.
        points: most to measure now, or None for all.
    """
    SURFACES.mkdir(exist_ok=True)
    for subject in subjects:
        file = SURFACES / f"{subject.name}.json"
        host = fingerprint_host(f"servers and client on {CORES} CPUs").fingerprint
        surface = json.loads(file.read_text()) if file.exists() else _new_surface(subject, host)
        if surface["host"]["fingerprint"] != host:
            sys.exit(f"{file} is of another host; remove it to record it here")
        for attempt in range(TRIES):
            left = _left(subject, surface, passes)[:points]
            try:
                _record(subject, surface, left, file)
                break
            except UnreachableError as error:
                if attempt == TRIES - 1:
                    raise
                say(f"{subject.name}: {error.message.partition(chr(10))[0]}; once more with other servers")
        say(f"{subject.name}: {len(_left(subject, surface, passes))} windows are left to record")


def _left(subject: Subject, surface: dict[str, Any], passes: int) -> list[tuple[int, ServingProfile]]:
    """(pass, point) of each window that is not recorded, in their order."""
    return [
        (number, profile)
        for number in range(passes)
        for profile in _order(subject, number)
        if len(surface["points"].get(profile.key, ())) <= number
    ]


def _record(subject: Subject, surface: dict[str, Any], left: Sequence[tuple[int, ServingProfile]], file: Path) -> None:
    if not left:
        return
    begin = time.monotonic()
    with stand_for(subject) as stand:
        surface["curve"] = surface["curve"] or stand.curve()
        for done, (number, profile) in enumerate(left, 1):
            rate = round(stand.rps(profile), 2)
            surface["points"].setdefault(profile.key, []).append(rate)
            _keep(file, surface)
            each_s = (time.monotonic() - begin) / done
            say(
                f"{subject.name}, pass {number + 1}: {profile.key} {rate:.0f}/s "
                f"({done} of {len(left)}, {each_s:.1f} s each, {each_s * (len(left) - done) / 60:.0f} min left)"
            )


def _order(subject: Subject, number: int) -> list[ServingProfile]:
    """All points in the order of one pass: chance, but for those of one model, which differ in the protocol alone."""
    chance = random.Random(f"{subject.name} {number}")
    shuffled = chance.sample(subject.space, len(subject.space))
    turns = {replace(profile, protocol="grpc"): chance.random() for profile in subject.space}
    return sorted(shuffled, key=lambda profile: turns[replace(profile, protocol="grpc")])


def _new_surface(subject: Subject, fingerprint: str) -> dict[str, Any]:
    host = fingerprint_host("")
    packages = ("mlserver", "nvidia-pytriton", "onnxruntime", "numpy")
    return {
        "name": subject.name,
        "recorded": datetime.now(UTC).date().isoformat(),
        "host": {"fingerprint": fingerprint, "cpu_model": host.cpu_model, "cores": CORES},
        "versions": {name: version(name) for name in packages},
        "load": {"closed_loop_clients": CLIENTS, "window_s": WINDOW_S, "rows_a_request": 1},
        "unit": "requests a second, one number a pass",
        "curve": [],
        "points": {},
    }


def _keep(file: Path, surface: dict[str, Any]) -> None:
    """Writes the surface, a point a line, whole or not at all."""
    points = ",\n".join(
        f"    {json.dumps(key)}: {json.dumps(rates)}" for key, rates in sorted(surface["points"].items())
    )
    head = json.dumps({**surface, "points": None}, indent=1)
    text = head.replace('"points": null', '"points": {\n' + points + "\n }") + "\n"
    passing = file.with_suffix(".part")
    passing.write_text(text)
    passing.replace(file)


# --- replaying -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """A surface that was recorded whole."""

    subject: Subject
    windows: Mapping[str, Sequence[float]]
    curve: InProcessCurve
    fingerprint: str

    @property
    def truth(self) -> dict[str, float]:
        return {key: median(rates) for key, rates in self.windows.items()}

    @property
    def noise(self) -> float:
        """Standard deviation of one window, as a share: pooled over the points."""
        spread = [pstdev([math.log(rate) for rate in rates]) for rates in self.windows.values() if len(rates) > 1]
        passes = max(len(rates) for rates in self.windows.values())
        return math.sqrt(sum(one**2 for one in spread) / len(spread) * passes / (passes - 1)) if spread else 0.03


def load_surface(subject: Subject) -> Recorded | None:
    """The surface, or None where not every point of it is recorded."""
    file = SURFACES / f"{subject.name}.json"
    surface = json.loads(file.read_text()) if file.exists() else {"points": {}}
    missing = [profile.key for profile in subject.space if not surface["points"].get(profile.key)]
    if missing:
        say(f"{subject.name}: {len(missing)} of {len(subject.space)} points are not recorded; --record does that")
        return None
    curve = InProcessCurve(rows_per_s={(size, threads): rate for size, threads, rate in surface["curve"]})
    return Recorded(subject, surface["points"], curve, surface["host"]["fingerprint"])


def estimate(rate: float, noise: float) -> Estimate:
    """A window's rate with the interval that its noise gives."""
    width = math.exp(1.96 * noise)
    return Estimate(value=rate, low=rate / width, high=rate * width, runs=1, method="pooled over passes", unit="1/s")


def replay(surface: Recorded) -> tuple[list[float], list[float]]:
    """(rate of what is found over that of the best, share of the points looked at), of each seed.

    Each measure is another of the point's windows, so that none can be looked at more often than it was recorded.
    """
    space, truth, noise = surface.subject.space, surface.truth, surface.noise
    best, ratios, shares, stops = max(truth.values()), [], [], []
    for seed in range(SEEDS):
        chance = random.Random(seed)
        left = {key: chance.sample(rates, len(rates)) for key, rates in surface.windows.items()}

        def window(profile: ServingProfile, left: dict[str, list[float]] = left) -> Estimate:
            if not left[profile.key]:
                raise UnreachableError("not recorded more often")
            return estimate(left[profile.key].pop(), noise)

        found = search_serving(space, window, curve=surface.curve, points=len(space) // 10, again=AGAIN, seed=seed)
        assert found.best is not None
        ratios.append(truth[found.best.profile.key] / best)
        shares.append(found.share)
        stops.append(found.stopped)
    top = max(truth, key=lambda key: truth[key])
    near = sum(rate >= 0.95 * best for rate in truth.values())
    say(
        f"{surface.subject.name}: {len(space)} points, {near} of them within 5 % of {top} "
        f"({best:.0f}/s, a window's noise {100 * noise:.1f} %); found over best: worst {min(ratios):.3f}, median "
        f"{median(ratios):.3f} of {SEEDS} seeds; looked at {100 * max(shares):.1f} % at most; "
        f"{stops.count('nothing_pays')} searches ended before their budget"
    )
    return ratios, shares


def live(surface: Recorded) -> float:
    """The rate of what a search on real servers finds over that of the recorded best, in windows that take turns."""
    truth, by_key = surface.truth, {profile.key: profile for profile in surface.subject.space}
    recorded = by_key[max(truth, key=lambda key: truth[key])]
    with stand_for(surface.subject) as stand:
        found = search_serving(
            surface.subject.space,
            lambda profile: estimate(stand.rps(profile), surface.noise),
            curve=InProcessCurve(rows_per_s={(size, threads): rate for size, threads, rate in stand.curve()}),
            points=len(surface.subject.space) // 10,
            again=AGAIN,
        )
        say(f"{surface.subject.name}, live: {found.sentence}")
        for point in found.points:
            rate = "failed" if point.score is None else f"{point.score.value:.0f}/s"
            say(f"  {point.profile.key}: {rate} ({point.reason})")
        assert found.best is not None
        if found.best.profile == recorded:
            return 1.0
        ratios = [stand.rps(found.best.profile) / stand.rps(recorded) for _ in range(LIVE_ROUNDS)]
    say(f"  {found.best.profile.key} over the recorded {recorded.key}: {', '.join(f'{one:.3f}' for one in ratios)}")
    return median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="measure the points that are not recorded yet")
    parser.add_argument("--surface", choices=[subject.name for subject in SUBJECTS], help="this one alone")
    parser.add_argument("--passes", type=int, default=PASSES, help="windows of each point")
    parser.add_argument("--points", type=int, help="most windows to record now, of each surface")
    parser.add_argument("--replay-only", action="store_true", help="without the servers")
    given = parser.parse_args()
    subjects = [subject for subject in SUBJECTS if given.surface in {None, subject.name}]
    if given.record:
        record(subjects, passes=given.passes, points=given.points)
        return
    surfaces = [surface for subject in subjects if (surface := load_surface(subject)) is not None]
    if len(surfaces) < len(subjects):
        sys.exit("nothing is shown before all surfaces are recorded")
    replayed = [replay(surface) for surface in surfaces]
    met = [
        figure("serving_search_of_best", min(ratio for ratios, _ in replayed for ratio in ratios), ">= 0.95"),
        figure("serving_search_share", max(share for _, shares in replayed for share in shares), "<= 0.1"),
    ]
    if not given.replay_only:
        met.append(figure("serving_search_live_of_best", min(live(surface) for surface in surfaces), ">= 0.95"))
    finish(*met)


if __name__ == "__main__":
    main()
