"""The search for serving profiles in a campaign, over servers that are not there, in virtual time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from optimize import judging, serving_search
from optimize.campaign import run_campaign
from optimize.config import CampaignConfig, SamplesConfig, SearchConfig, ServingSearchConfig, SourceConfig
from optimize.judging import Judged
from optimize.plan import Observer, Plan, Workspace
from optimize.samples import Samples
from optimize.serving_search import Found, clients_of, find_profiles, rate_of, space_of
from profiles.deploy.cluster import Usage
from profiles.load.summary import summarize
from profiles.measure.levels import find_level
from profiles.testing import Queue, simulate
from registry.codec import digest, to_jsonable
from registry.errors import CheckFailedError, GeneratorLostError, InputError, StageError, UnreachableError
from registry.ledger import Ledger
from registry.policy import parse_policy
from registry.records import (
    Artifact,
    Candidate,
    EngineSpec,
    Estimate,
    Fidelity,
    GateFinding,
    Host,
    LoadProfile,
    Recipe,
    RunRecord,
    Screening,
    ServingProfile,
    Target,
    Variant,
)
from registry.store import FolderStore
from tests.doubles.models import mlp, write_onnx
from tests.doubles.surfaces import SERVERS, MadeUpServer

LEVEL = replace(find_level("quick"), ladder_s=0.2, warmup_s=0.05)
SAMPLES = Samples(inputs={"x": np.zeros((4, 2), "f4")}, labels=None, digest="samples")
FIRST = ServingProfile(server="mlserver", backend="burnish", max_batch_size=2, max_batch_delay_ms=1.0)
BUDGET = ServingSearchConfig(points=10, batch_sizes=(1, 2, 4, 8, 16), delays_ms=(1, 2, 5))
FAST, SLOW = SERVERS["batching pays"], replace(SERVERS["batching pays"], call=40.0, row=4.0)
HOST = Host(fingerprint="h", cpu_model="c", cores=2, memory_mb=1, instruction_sets=(), gpus=(), kernel="k", pinning="p")


def judged(name: str, *, sizes: Sequence[int] = (2,), batch_dependent: bool = False) -> Judged:
    engine = EngineSpec(name="onnxruntime")
    variant = Variant(
        id=name,
        name=name,
        source="model",
        source_digest="s",
        recipe=Recipe(name=name, stages=(), engines=(engine,)),
        calibration_digest=None,
        seed=0,
        tool_versions={},
        artifact=Artifact(digest=name, format="onnx", entry="model.onnx", files=(), inputs=(), outputs=()),
        batch_dependent=batch_dependent,
    )
    fidelities = {
        size: Fidelity(
            variant_id=name,
            engine=engine,
            engine_version="1",
            instruction_set="none",
            batch_size=size,
            samples_digest="samples",
            samples=4,
            task_metric="accuracy",
            metrics={},
        )
        for size in sizes
    }
    return Judged(name=name, variant=variant, engine=engine, fidelities=fidelities, answers={})


def candidate_of(one: Judged, profile: ServingProfile) -> Candidate:
    return Candidate(
        id=digest([one.name, to_jsonable(profile)]),
        name=f"{one.name} @ {profile.key}",
        variant_id=one.variant.id,
        variant_name=one.name,
        engine=one.engine,
        engine_version="1",
        serving=profile,
        server_version="1",
    )


@dataclass
class Servers:
    """A cluster and a load generator in one: what is deployed answers as its law says."""

    laws: dict[str, MadeUpServer]
    deployed: dict[str, Candidate] = field(default_factory=dict)
    windows: list[tuple[str, LoadProfile]] = field(default_factory=list)
    checked: set[bool] = field(default_factory=set)
    refuses: int | None = None
    lost_at: int | None = None

    def __call__(self, **_: Any) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        self.deployed.clear()

    def deploy(self, candidate: Candidate, artifact: Artifact, files: Path, *, timeout_s: float) -> Any:
        if candidate.serving.parallel_workers == self.refuses:
            raise UnreachableError("the worker does not start\nits log")
        self.deployed[candidate.id] = candidate
        return Deployment(self, candidate)

    def run(self, target: Target, payloads: Any, profile: LoadProfile, **given: Any) -> RunRecord:
        if self.lost_at is not None and len(self.windows) >= self.lost_at:
            raise GeneratorLostError("gone")
        candidate = self.deployed[target.model]
        self.windows.append((candidate.name, profile))
        self.checked.add(given["expected"] is not None)
        rps = self.laws[candidate.variant_name].rps(candidate.serving)
        return summarize(simulate(Queue(1 / rps), profile), profile, raw="r")


@dataclass
class Deployment:
    servers: Servers
    candidate: Candidate

    @property
    def target(self) -> Target:
        return Target(url="127.0.0.1:1", protocol="grpc", model=self.candidate.id)

    def usage(self) -> Usage:
        return Usage(cpu_s=0.0, rss_mb=1.0)

    def undeploy(self) -> None:
        self.servers.deployed.pop(self.candidate.id, None)


class Told(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def phase(self, name: str, total: int) -> None:
        self.lines.append(name)

    def done(self, subject: str, outcome: str) -> None:
        self.lines.append(f"{subject}: {outcome}")

    def note(self, text: str) -> None:
        self.lines.append(text)


class Shelf(FolderStore):
    """A store of models that nobody opens."""

    def path(self, artifact: Artifact) -> Path:
        return self.root


@contextmanager
def workspace_in(
    work: Path, budget: ServingSearchConfig | None, profiles: tuple[ServingProfile, ...] = (FIRST,)
) -> Iterator[Workspace]:
    plan = Plan(
        config=CampaignConfig(
            name="c",
            sources=(SourceConfig(onnx="m.onnx"),),
            samples=SamplesConfig(evaluation="x.npz"),
            search=SearchConfig(serving=budget),
        ),
        base=work,
        work=work,
        policy=parse_policy((), ("maximize max_throughput_rps",)),
        level=LEVEL,
        recipes=(),
        profiles=profiles,
        host=HOST,
        server_cpus=(0, 1),
        client_cpus=(1,),
    )
    with Ledger.open(work / "ledger.jsonl") as ledger:
        yield Workspace(plan=plan, store=Shelf(work), ledger=ledger, observer=Told())


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    servers = Servers({"fp32": SLOW, "int8": FAST})

    def screen_variant(variant_id: str, entry: Path, engine: EngineSpec, **given: Any) -> Screening:
        law = servers.laws[variant_id]
        metrics = {
            f"inprocess_ms.batch_{size}": Estimate(
                value=law.session_ms(size, given["threads"]), low=None, high=None, runs=1, method="law", unit="ms"
            )
            for size in given["batch_sizes"]
        }
        return Screening(variant_id=variant_id, engine=engine, threads=given["threads"], metrics=metrics)

    monkeypatch.setattr(serving_search, "LoadGenerator", servers)
    monkeypatch.setattr(judging, "screen_variant", screen_variant)
    return servers


def find(work: Path, servers: Servers, *served: Judged, budget: ServingSearchConfig | None = BUDGET) -> Found:
    with workspace_in(work, budget) as workspace:
        return find_profiles(workspace, served, servers, SAMPLES, candidate_of)  # type: ignore[arg-type]


def test_nothing_is_searched_where_the_campaign_does_not_ask(tmp_path: Path, servers: Servers) -> None:
    found = find(tmp_path, servers, judged("fp32"), judged("int8"), budget=None)
    assert found.workspace.plan.profiles == (FIRST,)
    assert found.searches == ()
    assert servers.windows == []


def test_a_profile_that_is_found_joins_those_that_are_named(tmp_path: Path, servers: Servers) -> None:
    found = find(tmp_path, servers, judged("fp32"), judged("int8"))
    named, new = found.workspace.plan.profiles
    assert named == FIRST
    with workspace_in(tmp_path, BUDGET) as workspace:
        most = max(FAST.rps(profile) for profile in space_of(workspace.plan, BUDGET))
    assert FAST.rps(new) > 0.9 * most
    assert FAST.rps(new) > 2 * FAST.rps(FIRST)
    assert found.searches[0].variant_name == "int8"
    assert found.searches[0].points[0].profile == FIRST
    assert servers.deployed == {}


def test_a_variant_that_is_too_slow_in_process_is_never_served(tmp_path: Path, servers: Servers) -> None:
    found = find(tmp_path, servers, judged("fp32"), judged("int8"))
    assert [search.variant_name for search in found.searches] == ["int8"]
    assert not any(name.startswith("fp32") for name, _ in servers.windows)
    told = found.workspace.observer
    assert isinstance(told, Told)
    assert any(line.startswith("fp32 is not searched") for line in told.lines)


def test_a_baseline_with_a_chance_is_searched_too(tmp_path: Path, servers: Servers) -> None:
    servers.laws["fp32"] = replace(FAST, row=0.6)
    found = find(tmp_path, servers, judged("fp32"), judged("int8"))
    assert [search.variant_name for search in found.searches] == ["int8", "fp32"]


def test_a_variant_that_cannot_be_timed_is_searched_without_a_bound(
    tmp_path: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def screen_variant(*_: Any, **__: Any) -> Screening:
        raise StageError("it takes batches of 1 alone")

    monkeypatch.setattr(judging, "screen_variant", screen_variant)
    found = find(tmp_path, servers, judged("fp32"), judged("int8"))
    assert [search.variant_name for search in found.searches] == ["int8", "fp32"]
    assert found.searches[0].bounded_out == 0
    told = found.workspace.observer
    assert isinstance(told, Told)
    assert any("batches of 1 alone" in line for line in told.lines)


def test_a_search_that_was_killed_goes_on_where_it_stopped(tmp_path: Path, servers: Servers) -> None:
    whole = find(tmp_path / "whole", servers, judged("fp32"), judged("int8"))
    asked = len(servers.windows)
    servers.windows.clear()
    servers.lost_at = 3
    with pytest.raises(GeneratorLostError):
        find(tmp_path / "killed", servers, judged("fp32"), judged("int8"))
    servers.lost_at = None
    resumed = find(tmp_path / "killed", servers, judged("fp32"), judged("int8"))
    assert resumed.searches == whole.searches
    assert len(servers.windows) == asked
    find(tmp_path / "killed", servers, judged("fp32"), judged("int8"))
    assert len(servers.windows) == asked


def test_a_profile_that_is_not_served_is_a_point_that_failed(tmp_path: Path, servers: Servers) -> None:
    servers.refuses = 2
    found = find(tmp_path, servers, judged("fp32"), judged("int8"))
    failed = [point for point in found.searches[0].points if point.score is None]
    assert failed
    assert {point.failure for point in failed} == {"the worker does not start"}
    assert found.searches[0].best is not None
    assert found.searches[0].best.profile.parallel_workers != 2


@pytest.mark.parametrize("depends", [True, False])
def test_replies_at_every_point_are_held_against_the_variants_answers(
    tmp_path: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch, depends: bool
) -> None:
    monkeypatch.setattr(serving_search, "judge_one", lambda *_: judged("int8", batch_dependent=depends))
    np.savez(tmp_path / "answers.npz", y=np.zeros((4, 2), "f4"))
    one = replace(judged("int8", batch_dependent=depends), answers={2: tmp_path / "answers.npz"})
    find(tmp_path, servers, judged("fp32"), one)
    assert servers.checked == {not depends}  # what depends on the neighbours cannot be foretold


def test_all_points_have_the_same_clients(tmp_path: Path, servers: Servers) -> None:
    find(tmp_path, servers, judged("fp32"), judged("int8"))
    assert len({profile.load for _, profile in servers.windows}) == 1
    with workspace_in(tmp_path / "w", BUDGET) as workspace:
        assert clients_of(space_of(workspace.plan, BUDGET)) == 32


def test_what_the_cluster_cannot_serve_is_not_in_the_space(tmp_path: Path) -> None:
    own = ServingProfile(server="triton", backend="onnxruntime")
    with workspace_in(tmp_path, BUDGET, (FIRST, own)) as workspace:
        assert {profile.server for profile in space_of(workspace.plan, BUDGET)} == {"mlserver"}


def test_more_threads_than_cpus_leave_nothing(tmp_path: Path) -> None:
    with workspace_in(tmp_path, BUDGET) as workspace, pytest.raises(InputError, match="cores"):
        space_of(workspace.plan, BUDGET.model_copy(update={"threads": (8,)}))


def test_a_cluster_that_serves_none_of_the_space_is_told(tmp_path: Path) -> None:
    own = ServingProfile(server="triton", backend="onnxruntime")
    with workspace_in(tmp_path, BUDGET, (own,)) as workspace, pytest.raises(InputError, match="not on this machine"):
        space_of(workspace.plan, BUDGET)


def test_a_campaign_with_nothing_to_search_ends_before_it_begins(tmp_path: Path) -> None:
    write_onnx(mlp(), tmp_path)
    np.savez(tmp_path / "evaluation.npz", x=np.zeros((4, 4), "f4"), labels=np.zeros(4))
    config = CampaignConfig(
        name="c",
        sources=(SourceConfig(onnx="model.onnx"),),
        samples=SamplesConfig(evaluation="evaluation.npz"),
        search=SearchConfig(serving=ServingSearchConfig(threads=(200,))),
    )
    with pytest.raises(InputError, match="no serving profile"):
        run_campaign(config, base=tmp_path, work=tmp_path / "work", observer=Told())
    assert not (tmp_path / "work").exists()


def test_variants_whose_answers_depend_on_the_batch_are_judged_at_the_new_size(
    tmp_path: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, int]] = []

    def judge_one(workspace: Workspace, variant: Variant, _: Any, __: Samples, baseline: Judged | None) -> Judged:
        sizes = sorted({profile.max_batch_size for profile in workspace.plan.profiles})
        asked.append((variant.name, baseline and baseline.name, len(sizes)))
        return judged(variant.name, sizes=sizes, batch_dependent=True)

    monkeypatch.setattr(serving_search, "judge_one", judge_one)
    found = find(tmp_path, servers, judged("fp32"), judged("int8", batch_dependent=True))
    assert asked == [("int8", "fp32", 2)]
    assert sorted(found.served[1].fidelities) == sorted({2, found.workspace.plan.profiles[1].max_batch_size})
    assert found.served[0] == judged("fp32")


# --- one window ------------------------------------------------------------------------------------------------


def window(*gates: str, rate: float = 100.0) -> RunRecord:
    findings = tuple(GateFinding(gate=gate, observed="much", limit="little") for gate in gates)
    load = LoadProfile(name="search", load=serving_search.ClosedLoop(concurrency=1), warmup_s=0, duration_s=1)
    return RunRecord(
        load=load,
        scheduled=1,
        ok=1,
        errors={},
        window_s=1,
        metrics={"throughput_rps": rate},
        findings=findings,
        raw="r",
    )


def test_a_valid_window_gives_its_rate() -> None:
    assert rate_of(window()).value == 100
    assert rate_of(window()).low is None


def test_a_disturbed_window_is_unsure() -> None:
    found = rate_of(window("client_cpu"))
    assert found.low is not None
    assert found.low < 90
    assert "client_cpu" in found.method


@pytest.mark.parametrize("gate", ["errors", "mismatch", "answered_by", "restarted"])
def test_a_window_that_is_no_measure_fails_the_point(gate: str) -> None:
    with pytest.raises(CheckFailedError, match=gate):
        rate_of(window("steal", gate))


def test_a_window_without_answers_fails_the_point() -> None:
    with pytest.raises(CheckFailedError, match="no answers"):
        rate_of(window(rate=0.0))
