"""Windows of load on a real MLServer and a real Triton server, over gRPC and REST."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from profiles.deploy import local
from profiles.deploy.local import LocalCluster
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads, expected_answers
from profiles.measure.capacity import find_capacity
from profiles.measure.host import split_cpus
from profiles.measure.levels import find_level
from profiles.measure.rounds import compare_rounds, measure_in_round, reduce_rounds
from registry.records import ClosedLoop, LoadProfile, OpenLoop
from tests.doubles.busy import undisturbed
from tests.doubles.candidates import candidate
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx

pytestmark = pytest.mark.slow

X = np.random.default_rng(1).normal(size=(64, FEATURES)).astype(np.float32)
# What no busy machine can upset: the server answered, rightly, and the books agree.
OF_THE_SERVER = {"errors", "mismatch", "in_flight"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    for server, here in local.available_servers().items():
        if here.version is None:
            pytest.skip(f"{server}: {here.reason}")
    with LocalCluster(tmp_path_factory.mktemp("cluster"), server_cpus=split_cpus()[0]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadGenerator]:
    with LoadGenerator(split_cpus()[1], tmp_path_factory.mktemp("generator")) as generator:
        yield generator


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
@pytest.mark.parametrize("server", ["mlserver", "triton"])
def test_closed_and_open_windows(
    cluster: LocalCluster, generator: LoadGenerator, tmp_path: Path, server: str, protocol: str
) -> None:
    artifact = write_onnx(mlp(), tmp_path / "files")
    served = candidate(server=server, protocol=protocol)
    deployment = cluster.deploy(served, artifact, tmp_path / "files", timeout_s=100)
    try:
        payloads = encode_payloads({"x": X}, target=deployment.target)
        expected = expected_answers(payloads, {"logits": mlp_answer(X)})
        for load in (ClosedLoop(concurrency=4), OpenLoop(rate_rps=100)):
            profile = LoadProfile(name="test", load=load, warmup_s=0.3, duration_s=1.0)
            offer = partial(
                generator.run,
                deployment.target,
                payloads,
                profile,
                raw_path=tmp_path / "w.npz",
                usage=deployment.usage,
                expected=expected,
            )
            record = undisturbed(offer, lambda record: record.scheduled > 50 and record.metrics.get("cpu_s_per_1k"))
            assert not {finding.gate for finding in record.findings} & OF_THE_SERVER, record.findings
            assert record.ok == record.scheduled > 50
            assert record.metrics["cpu_s_per_1k"] > 0
            assert record.metrics["rss_mb"] > 20
            assert record.metrics["latency_p50_ms"] >= record.metrics["service_p50_ms"] > 0
    finally:
        deployment.undeploy()


def test_a_candidate_from_capacity_to_comparison(
    cluster: LocalCluster, generator: LoadGenerator, tmp_path: Path
) -> None:
    # Short, and once: what is tested is the way through, not the numbers.
    level = replace(
        find_level("quick"), warmup_s=0.1, closed_s=0.4, open_s=0.4, longest_s=1.0, reruns=0, ladder=(1, 4),
        ladder_s=0.3, stages=(0.5, 1.1), stage_s=0.3,
    )  # fmt: skip
    artifact = write_onnx(mlp(), tmp_path / "files")
    deployments = [
        cluster.deploy(candidate(server=server), artifact, tmp_path / "files", timeout_s=100)
        for server in ("mlserver", "triton")
    ]
    capacities, rounds = {}, []
    for deployment in deployments:
        payloads = encode_payloads({"x": X}, target=deployment.target)
        identity = deployment.candidate.id

        def run(profile, deployment=deployment, payloads=payloads):
            return generator.run(
                deployment.target, payloads, profile, raw_path=tmp_path / "c.npz", usage=deployment.usage
            )

        capacities[identity] = undisturbed(
            partial(find_capacity, run, level, candidate_id=identity), lambda found: found.ladder[-1][1] > 50
        )
        assert capacities[identity].ladder[-1][1] > 50
    for number in range(2):
        for position, deployment in enumerate((*deployments, deployments[0])):
            one = measure_in_round(
                generator,
                deployment,
                encode_payloads({"x": X}, target=deployment.target),
                capacities[deployment.candidate.id],
                ("50 rps",),
                level=level,
                number=number,
                position=position,
                seed=1,
                raw_root=tmp_path,
                folder=tmp_path / "raw" / deployment.candidate.id / f"{number}",
                again=position == len(deployments),
            )
            rounds.append(one)
    assert [len(one.runs) for one in rounds] == [2] * 6
    for deployment in deployments:
        identity = deployment.candidate.id
        found = reduce_rounds(identity, rounds, capacities[identity], raw_root=tmp_path, level=level)
        assert [one.load for one in found] == [None, "50 rps"]
        runs = sum(len(one.runs) for one in rounds if one.candidate_id == identity)
        assert sum(one.invalid_runs for one in found) <= runs
    for comparison in compare_rounds(deployments[0].candidate.id, rounds, raw_root=tmp_path, level=level):
        assert comparison.candidate_id == deployments[1].candidate.id
