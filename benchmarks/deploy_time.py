"""What deploying takes on the local cluster over what it takes by hand: a variant of 90 MB on MLServer and on Triton.

By hand means: copy the model's folder into the server's repository, take the digest of what was copied, and make the
V2 load call, which returns when the model is loaded. `LocalCluster.deploy` renders the folder, does to it what a Core 2
agent does, puts it into the repository (as links where the file system has them), makes the load call, and waits until
the model is ready. The server runs already in both, one and the same, as it does on Core 2, and is pinned to one CPU;
the file is in the page cache. Each round does both, in an order of chance, and the ratio is that of its two times.

What a server of its own takes, as each candidate of a campaign has one, is told beside it: it is the server's start.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from figures import figure, finish, say
from onnx import TensorProto, helper, numpy_helper
from runtime_overhead import START_S, artifact_of, candidate_of, on_cpus

from profiles.deploy.local import LocalCluster, LocalDeployment
from profiles.deploy.model_control import ModelControl
from registry.codec import file_sha256
from registry.records import Artifact, Candidate, ServingProfile, TensorSpec

ROUNDS = 9
WIDTH = 1024
LAYERS = 22
SERVED = {
    "mlserver": ServingProfile(server="mlserver", backend="burnish"),
    "triton": ServingProfile(server="triton", backend="python"),
}


def wide_model(folder: Path) -> Artifact:
    """``x`` (batch, 1024) -> ``y`` of the same shape, through 22 matrices of 4 MiB, written to the folder."""
    chance = np.random.default_rng(0)
    names = ["x", *(f"h{layer}" for layer in range(1, LAYERS)), "y"]
    weights = [
        numpy_helper.from_array(chance.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5, f"w{layer}")
        for layer in range(LAYERS)
    ]
    nodes = [
        helper.make_node("MatMul", [names[layer], f"w{layer}"], [names[layer + 1]], name=f"layer{layer}")
        for layer in range(LAYERS)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return artifact_of(
        folder / "model.onnx",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", WIDTH)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", WIDTH)),),
    )


def written_by_hand(deployment: LocalDeployment, folder: Path) -> str:
    """A copy of what a deployment has in its repository, and the model's name: what somebody would write once."""
    model = deployment.target.model
    shutil.copytree(deployment.log.parent / "repository" / model, folder / model)
    return model


def by_hand_s(control: ModelControl, source: Path, repository: Path) -> float:
    """Seconds to copy a model's folder, take its digest, and have it loaded; it is unloaded after that."""
    place = repository / source.name
    began = time.perf_counter()
    shutil.copytree(source, place)
    for path in place.rglob("*"):
        if path.is_file():
            file_sha256(path)
    control.load(source.name, timeout_s=START_S)
    took_s = time.perf_counter() - began
    control.unload(source.name, timeout_s=START_S)
    shutil.rmtree(place)
    return took_s


def deployed_s(cluster: LocalCluster, candidate: Candidate, artifact: Artifact, files: Path) -> float:
    """Seconds from `deploy` to ready; it is taken away after that."""
    began = time.perf_counter()
    deployment = cluster.deploy(candidate, artifact, files, timeout_s=START_S)
    took_s = time.perf_counter() - began
    deployment.undeploy()
    return took_s


def measured(server: str, artifact: Artifact, files: Path, *, cpu: int, order: random.Random) -> float:
    """The median ratio of deploying to doing it by hand."""
    candidate = candidate_of(f"wide-{server}", SERVED[server])
    ratios, times = [], []
    with LocalCluster(files / server, server_cpus=(cpu,), shared=True) as cluster:
        # The first one starts the server, and shows what is to be written by hand.
        began = time.perf_counter()
        first = cluster.deploy(candidate, artifact, files, timeout_s=START_S)
        started_s = time.perf_counter() - began
        source = files / "by-hand" / written_by_hand(first, files / "by-hand")
        control, repository = ModelControl(f"127.0.0.1:{first.ports.http}"), first.log.parent / "repository"
        first.undeploy()
        for number in range(-1, ROUNDS):
            took = {}
            for way in order.sample(("deploy", "by hand"), 2):
                if way == "deploy":
                    took[way] = deployed_s(cluster, candidate, artifact, files)
                else:
                    took[way] = by_hand_s(control, source, repository)
            if number < 0:
                continue  # a server's first loads are slower
            ratios.append(took["deploy"] / took["by hand"])
            times.append((took["deploy"], took["by hand"]))
            say(f"{server}, round {number + 1}: deploy {took['deploy']:.3f} s, by hand {took['by hand']:.3f} s")
    ours, theirs = (median(column) for column in zip(*times, strict=True))
    say(f"{server}: deploy {ours:.3f} s, by hand {theirs:.3f} s; with a server of its own {started_s:.2f} s")
    return median(ratios)


def main() -> None:
    server_cpu, client_cpu = sorted(os.sched_getaffinity(0))[:2]
    order = random.Random(0)
    say(f"load average at the start: {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix="burnish-work-") as folder:
        files = Path(folder)
        artifact = wide_model(files)
        say(f"a variant of {artifact.size_bytes / 1e6:.0f} MB")
        with on_cpus((client_cpu,)):
            ratios = {one: measured(one, artifact, files, cpu=server_cpu, order=order) for one in SERVED}
    say(f"load average at the end: {os.getloadavg()[0]:.2f}")
    finish(
        figure("deploy_time_ratio", ratios["mlserver"], "<= 1.5"),
        figure("deploy_time_ratio_triton", ratios["triton"], "<= 1.5"),
    )


if __name__ == "__main__":
    sys.exit(main())
