"""What hangs is ended and recorded with the reason, and the rest of a campaign goes on."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from optimize import measuring
from optimize.campaign import judge_campaign
from optimize.config import CampaignConfig, LimitsConfig, SamplesConfig, SourceConfig
from optimize.engines.local import Limits
from optimize.measuring import Serving, measure
from optimize.plan import Observer, Plan, Workspace
from profiles.deploy.cluster import Usage
from profiles.deploy.local import LocalCluster
from profiles.measure.equivalence import check_equivalence
from profiles.measure.levels import find_level
from profiles.testing import FakeV2Server, Fixed
from registry.errors import UnreachableError
from registry.ledger import Ledger
from registry.policy import parse_policy
from registry.records import Artifact, Candidate, Equivalence, Host, Target
from registry.store import FolderStore
from tests.doubles.busy import LONG_S, until
from tests.doubles.candidates import candidate
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores

METRIC = """
import time
from pathlib import Path

import numpy as np


def right(outputs, labels):
    while Path(__file__).with_name("hang").exists():
        time.sleep(0.1)
    return (next(iter(outputs.values())).argmax(axis=1) == labels).astype(np.float64)
"""


class Told(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def done(self, subject: str, outcome: str) -> None:
        self.lines.append(f"{subject}: {outcome}")


def test_a_conversion_and_a_judgement_that_take_too_long_are_failures_of_their_variants(tmp_path: Path):
    write_onnx(mlp(), tmp_path)
    x = np.random.default_rng(0).normal(size=(80, FEATURES)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=x, labels=mlp_answer(x).argmax(axis=1))
    (tmp_path / "own_metric.py").write_text(METRIC)
    base = {
        "name": "tiny",
        "sources": [{"onnx": "model.onnx"}],
        "samples": {"evaluation": "samples.npz", "calibration": "samples.npz"},
        "metric": "own_metric:right",
        "level": "quick",
    }
    work = tmp_path / "work"
    # What the others need is made and judged before, with time enough for a busy machine.
    config = CampaignConfig.model_validate({**base, "variants": ["float32"]})
    judge_campaign(config, base=tmp_path, work=work, observer=Told())
    (tmp_path / "hang").touch()
    variants = ["float32", "ort-optimized", {"name": "late", "stages": [{"name": "quantize.static"}]}]
    told = Told()
    # The conversion does not hang: it has less time than a Python takes to start.
    times_s = iter([900.0, 0.1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimize.making.limits_of", lambda workspace: Limits(timeout_s=next(times_s)))
        patch.setattr("optimize.judging.limits_of", lambda workspace: Limits(timeout_s=1.5))
        hangs = CampaignConfig.model_validate({**base, "variants": variants})
        prepared = judge_campaign(hangs, base=tmp_path, work=work, observer=told)
    assert [one.name for one in prepared.judged] == ["float32"]
    failed = {one.subject: (one.phase, one.kind, one.reason) for one in prepared.failures}
    assert set(failed) == {"late", "ort-optimized"}
    assert failed["late"][:2] == ("make", "timeout")
    assert failed["late"][2].endswith("it took longer than its limit of 0.1 s")
    assert failed["ort-optimized"][:2] == ("fidelity", "timeout")
    assert failed["ort-optimized"][2].endswith("it took longer than its limit of 1.5 s")
    assert any(line.startswith("late: failed: ") for line in told.lines)


# --- servers -------------------------------------------------------------------------------------------------------

HANGS = """
import json, socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(json.dumps(listening.getsockname()[1]), flush=True)
held = []
while True:
    held.append(listening.accept())
"""


@contextmanager
def hung_server() -> Iterator[tuple[int, int]]:
    """(Process id, port) of a process that takes connections and never answers."""
    with subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


@dataclass
class Deployment:
    candidate: Candidate
    target: Target
    pid: int
    load_time_s: float = 0.1
    rendered: dict[str, str] = field(default_factory=dict)
    statistics: None = None
    ended: bool = False

    def usage(self) -> Usage:
        return Usage(cpu_s=0.0, rss_mb=psutil.Process(self.pid).memory_info().rss / 1e6)

    def undeploy(self) -> None:
        if not self.ended and self.pid != os.getpid():
            psutil.Process(self.pid).kill()
        self.ended = True


class Served:
    """A cluster whose servers are there already."""

    def __init__(self, targets: dict[str, tuple[Target, int]]) -> None:
        self._targets = targets
        self.deployments: dict[str, Deployment] = {}

    def deploy(self, candidate: Candidate, artifact: Artifact, files: Path, *, timeout_s: float) -> Deployment:
        target, pid = self._targets[candidate.name]
        self.deployments[candidate.name] = Deployment(candidate, target, pid)
        return self.deployments[candidate.name]

    def close(self) -> None:
        pass


def test_a_server_that_takes_requests_and_never_answers_is_ended_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    x = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    level = replace(
        find_level("quick"), rounds=1, most_rounds=1, a_a=False, warmup_s=0.0, closed_s=0.1, open_s=0.1, longest_s=0.1,
        ladder=(1,), ladder_s=0.1, stages=(0.5,), stage_s=0.1, reruns=0,
    )  # fmt: skip
    artifact = Artifact(digest="d", format="onnx", entry="model.onnx", files=(), inputs=(), outputs=())
    names = ("answers", "hangs")
    servings = [
        Serving(
            candidate=replace(candidate(protocol="rest"), id=name, name=name, variant_id=name, variant_name=name),
            artifact=artifact,
            files=tmp_path,
            answers={"sum": x.sum(axis=1, keepdims=True)},
            baseline=name == "answers",
        )
        for name in names
    ]
    with ExitStack() as stack:
        server = stack.enter_context(FakeV2Server(Fixed(0.001)))
        pid, port = stack.enter_context(hung_server())
        good = server.target("rest")

        def check(target: Target, *arguments: Any, **options: Any) -> Equivalence:
            """Has no patience with the one that hangs."""
            timeout_s = 0.5 if target.url != good.url else LONG_S
            return check_equivalence(target, *arguments, timeout_s=timeout_s, **options)

        monkeypatch.setattr(measuring, "check_equivalence", check)
        cluster = Served({"answers": (good, os.getpid()), "hangs": (replace(good, url=f"127.0.0.1:{port}"), pid)})
        ledger = stack.enter_context(Ledger.open(tmp_path / "ledger.jsonl"))
        plan = Plan(
            config=CampaignConfig(
                name="c",
                sources=(SourceConfig(onnx="m.onnx"),),
                samples=SamplesConfig(evaluation="x.npz"),
                limits=LimitsConfig(load_timeout_s=0.5),
            ),
            base=tmp_path,
            work=tmp_path,
            policy=parse_policy((), ("maximize max_throughput_rps",)),
            level=level,
            recipes=(),
            profiles=(servings[0].candidate.serving,),
            host=Host(
                fingerprint="h", cpu_model="c", cores=2, memory_mb=1, instruction_sets=(), gpus=(), kernel="k",
                pinning="p",
            ),
            server_cpus=(),
            client_cpus=(),
        )  # fmt: skip
        told = Told()
        workspace = Workspace(plan=plan, store=FolderStore(tmp_path), ledger=ledger, observer=told)
        found = measure(workspace, cluster, servings, {"x": x}, "samples")
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)  # `hung_server` waits for it
    [failure] = found.failures
    assert (failure.subject, failure.phase, failure.kind) == ("hangs", "measure", "error")
    # A busy machine may need the half second to notice that it is connected.
    assert re.search(r"no (answer|connection) within 0\.5 s", failure.reason)
    assert {one.candidate_id for one in found.rounds} == {"answers"}
    assert any(line == f"hangs: failed: {failure.reason}" for line in told.lines)


def test_a_server_that_stands_still_while_it_starts_is_ended(tmp_path: Path):
    artifact = write_onnx(mlp(), tmp_path / "files")
    records = tmp_path / "work" / "servers"
    stopped: list[int] = []
    ended = threading.Event()

    def stop() -> None:
        while not stopped and not ended.is_set():
            # One that was waited for in vain may be ending.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for record in records.glob("*.json"):
                    pid = json.loads(record.read_text())["server"][0]
                    os.kill(pid, signal.SIGSTOP)
                    stopped.append(pid)
            time.sleep(0.002)

    stopping = threading.Thread(target=stop)
    with LocalCluster(tmp_path / "work", grace_s=0.2) as cluster:
        stopping.start()
        try:
            # A busy machine may not have begun with the server after a second.
            for timeout_s in (1.0, 10.0, 60.0):
                with pytest.raises(UnreachableError, match=r"mlserver was not ready after \d+ s"):
                    cluster.deploy(candidate(), artifact, tmp_path / "files", timeout_s=timeout_s)
                if stopped:
                    break
        finally:
            ended.set()
            stopping.join()
    [pid] = stopped
    assert not psutil.pid_exists(pid)
    assert not list(records.glob("*.json"))
