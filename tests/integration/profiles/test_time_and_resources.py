"""Where the time goes on a real MLServer and a real Triton, with a model that computes for some milliseconds."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from profiles.deploy import local
from profiles.deploy.local import LocalCluster
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads
from profiles.measure.host import split_cpus
from profiles.measure.levels import find_level
from profiles.measure.resources import first_request_ms
from profiles.measure.rounds import measure_in_round, reduce_rounds
from registry.records import Breakdown, Capacity, Round
from tests.doubles.busy import LONG_S, undisturbed
from tests.doubles.candidates import candidate
from tests.doubles.models import write_onnx

pytestmark = pytest.mark.slow

WIDTH, LAYERS, CROWD = 512, 160, 6
LEVEL = replace(find_level("quick"), warmup_s=0.2, closed_s=0.8, longest_s=0.8, reruns=0)


def chain() -> onnx.ModelProto:
    """``x`` (batch, 512) through 160 products with the same matrix to ``y``: some milliseconds of one thread."""
    weight = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    names = ["x", *(f"h{layer}" for layer in range(1, LAYERS)), "y"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [before, "w"], [after]) for before, after in itertools.pairwise(names)],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    for server, here in local.available_servers().items():
        if here.version is None:
            pytest.skip(f"{server}: {here.reason}")
    with LocalCluster(tmp_path_factory.mktemp("cluster"), server_cpus=split_cpus()[0]) as cluster:
        yield cluster


def waits(crowd: Breakdown | None, alone: Breakdown | None) -> bool:
    """Whether a crowd waits for its turn, and that is what it takes longer for than who comes alone."""
    if crowd is None or alone is None or not (crowd.compute_ms and alone.compute_ms and crowd.queue_ms):
        return False
    return (
        min(crowd.requests, alone.requests) > 5
        # The server's own times are of a few requests before and after the window, too.
        and alone.service_ms > alone.compute_ms
        and crowd.service_ms > crowd.compute_ms
        and crowd.queue_ms > 2 * crowd.compute_ms
        and (alone.queue_ms or 0.0) < crowd.queue_ms / 2
        # Both times grow with what else the machine does; who waits grows by more.
        and 2 * (alone.queue_ms or 0.0) * crowd.compute_ms / alone.compute_ms < crowd.queue_ms
    )


@pytest.mark.parametrize("server", ["mlserver", "triton"])
def test_a_crowd_waits_and_the_model_takes_no_longer(cluster: LocalCluster, tmp_path: Path, server: str) -> None:
    inputs = {"x": np.random.default_rng(1).normal(size=(32, WIDTH)).astype(np.float32)}
    deployment = cluster.deploy(
        candidate(server=server), write_onnx(chain(), tmp_path / "files"), tmp_path / "files", timeout_s=100
    )
    try:
        payloads = encode_payloads(inputs, target=deployment.target)
        first_ms = first_request_ms(deployment.target, payloads[0], timeout_s=LONG_S)
        identity = deployment.candidate.id
        capacity = Capacity(candidate_id=identity, concurrency=CROWD, ladder=(), stages=(), saturation_rps=None)
        with LoadGenerator(split_cpus()[1], tmp_path / "generator") as generator:
            numbers = itertools.count()

            def measure() -> Round:
                number = next(numbers)
                return measure_in_round(
                    generator, deployment, payloads, capacity, ("concurrency 1",), level=LEVEL, number=number,
                    position=0, seed=1, raw_root=tmp_path, folder=tmp_path / f"raw-{number}",
                )  # fmt: skip

            # Where the machine stands still in a round, all who are asked wait alike.
            made = undisturbed(measure, lambda made: waits(*(run.breakdown for run in made.runs)))
    finally:
        deployment.undeploy()
    assert first_ms is not None
    assert first_ms > 0
    crowd, alone = (run.breakdown for run in made.runs)
    assert crowd is not None
    assert alone is not None
    for one in (crowd, alone):
        assert one.requests > 5
        assert one.batch_rows == pytest.approx(1.0)
        assert one.compute_ms is not None
        assert one.compute_ms > 0.2
        assert one.server_ms is not None
        assert one.queue_ms is not None
        assert one.service_ms > one.compute_ms
    # One runs at a time, so that five of six wait: the waiting becomes a multiple of the computing, which stays but for
    # what the machine's other work takes from it.
    assert waits(crowd, alone), (crowd, alone)
    assert crowd.by_difference == (("network_ms", "queue_ms") if server == "mlserver" else ("network_ms",))
    # Windows that a busy machine spoilt say the same of memory.
    whole, *_ = reduce_rounds(
        identity, [made], capacity, raw_root=tmp_path, level=LEVEL, load_time_s=1.0, first_request_ms=first_ms
    )
    assert whole.metrics["peak_rss_mb"].value >= 0.9 * made.runs[0].metrics["rss_mb"] > 20
    assert whole.metrics["first_request_ms"].value == pytest.approx(first_ms)
