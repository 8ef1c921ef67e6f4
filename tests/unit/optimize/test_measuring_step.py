"""What a node is asked for and what comes back, over an engine of this process and findings that are made up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize import measuring_step, reporting
from optimize.budget import UNLIMITED, Budget
from optimize.campaign import run_campaign
from optimize.config import CampaignConfig
from optimize.engines import choosing
from optimize.engines.local import ChildFailure
from optimize.engines.pool import LocalEngine
from optimize.engines.port import Outcome
from optimize.finding import Findings, Made
from optimize.judging import Judged
from optimize.measuring import Measured
from optimize.measuring_step import FOUND, find_on_node, was_found
from optimize.plan import Workspace, plan
from optimize.recipes import recipe
from optimize.samples import load_samples
from profiles.measure.resources import PackageEnergy
from registry.errors import BudgetUsedUpError, InputError, PolicyError, ServerDiedError, UnreachableError
from registry.ledger import Ledger
from registry.records import Failure, Host, Round, Source, Variant
from registry.shared_store import SharedStore
from registry.store import FolderStore
from tests.doubles.models import FEATURES, mlp, write_onnx
from tests.doubles.rounds import measured

HOST = Host(
    fingerprint="node",
    cpu_model="c",
    cores=4,
    memory_mb=8,
    instruction_sets=("avx2",),
    gpus=(),
    kernel="k",
    pinning="p",
)


@dataclass
class Told:
    """An observer that keeps what it is told."""

    events: list[tuple[Any, ...]] = field(default_factory=list)

    def phase(self, name: str, total: int) -> None:
        self.events.append(("phase", name, total))

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        self.events.append(("begun", kind, subject))

    def ended(self, kind: str, subject: str) -> None:
        self.events.append(("ended", kind, subject))

    def done(self, subject: str, outcome: str) -> None:
        self.events.append(("done", subject, outcome))

    def note(self, text: str) -> None:
        self.events.append(("note", text))


@dataclass
class Node:
    """Stands for what a node finds: so many rounds, each remembered; a test may put something in the way."""

    rounds: int = 3
    made: list[int] = field(default_factory=list)
    seen: list[Workspace] = field(default_factory=list)
    before: Callable[[int], None] = lambda number: None
    failures: tuple[Failure, ...] = ()

    def find(self, workspace: Workspace, made: Made, preparing: Budget) -> Findings:
        self.seen.append(workspace)
        workspace.observer.phase("Measuring", self.rounds)
        rounds = []
        for number in range(self.rounds):

            def run(number: int = number) -> Round:
                self.before(number)
                self.made.append(number)
                return measured(workspace.plan.work, float(number), number=number)

            components = {"round": number, "host": HOST.fingerprint}
            rounds.append(workspace.remember("Round", f"round {number}", components, run)[0])
            workspace.observer.done(f"round {number}", "measured")
        variant = made.variants[0]
        judged = Judged(
            name="float32", variant=variant, engine=variant.recipe.engines[0], fidelities={}, answers={8: Path("x.npz")}
        )
        return Findings(
            host=HOST,
            server_cpus=(0, 1, 2),
            versions={"burnish": "1"},
            profiles=workspace.plan.profiles,
            variants=made.variants,
            judged=(judged,),
            contender=None,
            candidates=(),
            champion_id=None,
            measured=Measured(deployed=(), capacities=(), rounds=tuple(rounds), failures=()),
            searches=(),
            failures=self.failures,
        )


class Asked(LocalEngine):
    """The engine of this machine, which counts what it is asked for."""

    tasks = 0

    def run(self, tasks: Any, **how: Any) -> Any:
        type(self).tasks += 1
        return super().run(tasks, **how)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node()
    monkeypatch.setattr(measuring_step, "find", node.find)
    monkeypatch.setattr(Asked, "tasks", 0)
    return node


@contextmanager
def campaign_in(folder: Path, observer: Told | None = None, **fields: Any) -> Iterator[tuple[Workspace, Made]]:
    """A campaign whose one variant is made, in a store that is shared."""
    work = folder / "work"
    artifact = write_onnx(mlp(), folder)
    np.savez(folder / "samples.npz", x=np.ones((3, FEATURES), np.float32), labels=np.zeros(3, np.int64))
    given = {
        "name": "tiny",
        "sources": [{"onnx": "model.onnx"}],
        "samples": {"evaluation": "samples.npz", "calibration": "samples.npz"},
        "variants": ["float32", {"name": "mine", "stages": [{"name": "quantize.static", "ops": "matmul"}]}],
        "level": "quick",
    }
    planned = plan(CampaignConfig.model_validate(given | fields), base=folder, work=work, engine="ray")
    store = SharedStore(str(folder / "mount"), FolderStore(work))
    artifact = store.local.add(
        _alone(folder), format="onnx", entry="model.onnx", inputs=artifact.inputs, outputs=artifact.outputs
    )
    variant = Variant(
        id="v",
        name="float32",
        source="model",
        source_digest="s",
        recipe=recipe("openvino", instruction_sets=()),
        calibration_digest=None,
        seed=0,
        tool_versions={},
        artifact=artifact,
        batch_dependent=False,
        made_in_s=0.1,
    )
    source = Source(name="model", kind="onnx", location="model.onnx", digest="s", artifact=artifact)
    made = Made(
        evaluation=load_samples(folder / "samples.npz"), calibration=None, sources=(source,), variants=(variant,)
    )
    engine = Asked(store, scratch=folder, locks=folder / "locks")
    with Ledger.open(work / "ledger.jsonl") as ledger:
        yield (
            Workspace(plan=planned, store=store, ledger=ledger, observer=observer or Told(), engine=lambda: engine),
            made,
        )


def _alone(folder: Path) -> Path:
    """A folder with the model and nothing else."""
    place = folder / "model"
    place.mkdir(exist_ok=True)
    (place / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    return place


def test_all_that_a_node_found_is_here_afterwards_and_nothing_is_asked_again(tmp_path: Path, node: Node):
    told = Told()
    with campaign_in(tmp_path, told) as (workspace, made):
        assert workspace.plan.elsewhere
        assert not was_found(workspace.plan.work)
        found = find_on_node(workspace, made, UNLIMITED)
        assert found.host == HOST
        assert [one.number for one in found.measured.rounds] == [0, 1, 2]
        assert all((workspace.plan.work / run.raw).is_file() for one in found.measured.rounds for run in one.runs)
        assert [entry.subject for entry in workspace.ledger.entries("Round")] == ["round 0", "round 1", "round 2"]
        assert not [one for one in found.judged if one.answers]  # files that are on the node alone
        assert not list((tmp_path / "mount" / "progress").glob("*"))
    assert [event for event in told.events if event[0] in {"phase", "done"}] == [
        ("phase", "Measuring", 3),
        *(("done", f"round {number}", "measured") for number in range(3)),
    ]
    with campaign_in(tmp_path) as (workspace, made):
        assert was_found(workspace.plan.work)
        assert find_on_node(workspace, made, UNLIMITED) == found
    assert (Asked.tasks, node.made) == (1, [0, 1, 2])


def test_the_node_measures_as_it_is_with_all_that_the_campaign_says(tmp_path: Path, node: Node):
    with campaign_in(tmp_path, resources={"cores": 1}, limits={"minutes": 30, "deployed": "one"}) as (asked, made):
        find_on_node(asked, made, UNLIMITED)
    [there] = node.seen
    for name in ("policy", "level", "profiles", "champion"):
        assert getattr(there.plan, name) == getattr(asked.plan, name)
    assert [one.stages for one in there.plan.recipes] == [one.stages for one in asked.plan.recipes]
    assert there.plan.config.variants == asked.plan.config.variants
    assert there.plan.config.limits == asked.plan.config.limits
    assert there.plan.host.cores == 1  # those that it has alone
    assert set(there.plan.server_cpus) == set(there.plan.client_cpus)
    assert there.plan.host.fingerprint != asked.plan.host.fingerprint or asked.plan.host.cores == 1
    assert Path(there.plan.config.samples.evaluation).is_file()
    assert there.plan.work != asked.plan.work


def test_what_was_found_before_a_kill_is_taken_up_by_whoever_goes_on(tmp_path: Path, node: Node):
    def die(number: int) -> None:
        if number == 2:
            raise ServerDiedError("the worker is gone")

    node.before = die
    with campaign_in(tmp_path) as (workspace, made):
        with pytest.raises(ServerDiedError, match="the worker is gone"):
            find_on_node(workspace, made, UNLIMITED)
        assert not workspace.ledger.entries("Round")
    node.before = lambda number: None
    with campaign_in(tmp_path) as (workspace, made):
        found = find_on_node(workspace, made, UNLIMITED)
        assert len(workspace.ledger.entries("Round")) == 3
    assert len(found.measured.rounds) == 3
    assert node.made == [0, 1, 2]


def test_a_failure_that_may_pass_is_tried_again(tmp_path: Path, node: Node):
    node.failures = (Failure(subject="c", phase="deploy", kind="screened_out", reason="too slow"),)
    for _ in range(2):
        with campaign_in(tmp_path) as (workspace, made):
            find_on_node(workspace, made, UNLIMITED)
    assert Asked.tasks == 1
    (tmp_path / "work" / FOUND).unlink()
    node.failures = (Failure(subject="c", phase="deploy", kind="died", reason="its server ended"),)
    for _ in range(2):
        with campaign_in(tmp_path) as (workspace, made):
            find_on_node(workspace, made, UNLIMITED)
    assert Asked.tasks == 3
    assert node.made == [0, 1, 2]


@pytest.mark.parametrize("fields", [{"seed": 7}, {"resources": {"cores": 1}}, {"level": "standard"}])
def test_another_campaign_is_asked_for_again(tmp_path: Path, node: Node, fields: dict[str, Any]):
    for given in ({}, fields):
        with campaign_in(tmp_path, **given) as (workspace, made):
            find_on_node(workspace, made, UNLIMITED)
    assert Asked.tasks == 2


def test_findings_whose_arrays_are_gone_are_asked_for_again(tmp_path: Path, node: Node):
    for _ in range(2):
        with campaign_in(tmp_path) as (workspace, made):
            [run, *_] = find_on_node(workspace, made, UNLIMITED).measured.rounds[0].runs
            (workspace.plan.work / run.raw).unlink()
    assert Asked.tasks == 2


def test_a_worker_that_dies_each_time_can_be_run_again(tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch):
    def run(self: Any, tasks: Any, **how: Any) -> Any:
        for task in tasks:
            yield Outcome(
                task=task,
                result=None,
                error=ChildFailure("begun 4 times", kind="died", log="SIGKILL"),
                node="",
                host="",
                cpus=(),
                seconds=0.0,
            )

    monkeypatch.setattr(Asked, "run", run)
    with (
        pytest.raises(UnreachableError, match=r"begun 4 times \(SIGKILL\)"),
        campaign_in(tmp_path) as (workspace, made),
    ):
        find_on_node(workspace, made, UNLIMITED)


def test_a_node_says_what_it_cannot_tell_of(tmp_path: Path, node: Node):
    policy = {"constraints": ["cpu_joules_per_1k <= 100"]}
    if PackageEnergy().read():
        pytest.skip("this machine can tell of its energy")
    with (
        pytest.raises(PolicyError, match="the energy of the CPU cannot be read here"),
        campaign_in(tmp_path, policy=policy) as (workspace, made),
    ):
        find_on_node(workspace, made, UNLIMITED)
    assert not node.made


def test_a_machine_that_lacks_what_is_asked_for_is_said_before_it_begins(tmp_path: Path, node: Node):
    with (
        pytest.raises(InputError, match="the measuring needs 64 GPUs"),
        campaign_in(tmp_path, resources={"gpus": 64}) as (workspace, made),
    ):
        find_on_node(workspace, made, UNLIMITED)
    assert not node.made


def test_no_node_that_is_free_before_the_time_is_used_up_is_said(tmp_path: Path, node: Node):
    with campaign_in(tmp_path) as (workspace, made):
        late = replace(workspace, budget=Budget(minutes=7.0, deadline=0.0))
        with pytest.raises(BudgetUsedUpError, match="the budget of 7 minutes was used up"):
            find_on_node(late, made, UNLIMITED)
    assert not node.made


def test_a_policy_that_names_gpus_has_to_ask_for_one(tmp_path: Path):
    with (
        pytest.raises(PolicyError, match="no GPU is asked for"),
        campaign_in(tmp_path, policy={"constraints": ["gpu_memory_mb <= 100"]}),
    ):
        pass


def test_what_a_node_says_is_told_here_once_and_anew_after_a_kill(tmp_path: Path):
    store = SharedStore(str(tmp_path / "mount"), FolderStore(tmp_path / "work"))
    told = Told()
    here = measuring_step._Relay(store, "key", told)
    here.forward()
    there = measuring_step._Told(store, "key")
    there.phase("Measuring", 2)
    there.begun("Round", "round 1")
    here.forward()
    here.forward()
    there.done("round 1", "measured")  # too soon for a word
    assert told.events == [("phase", "Measuring", 2), ("begun", "Round", "round 1")]
    after = measuring_step._Told(store, "key")
    after.phase("Measuring", 2)
    here.forward()
    after.done("round 1", "measured (known)")
    here.end(after.run, after.events)
    assert told.events[2:] == [("phase", "Measuring", 2), ("done", "round 1", "measured (known)")]
    assert store.told("key") is None


def test_what_no_machine_has_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Small(Asked):
        @staticmethod
        def check(name: str, resources: Any) -> None:
            raise InputError(f"no node has what {name} needs: {resources.cores} cores")

    def choose(store: Any, **_: Any) -> Small:
        return Small(store)

    monkeypatch.setattr(choosing, "choose_engine", choose)
    monkeypatch.setattr(reporting, "use_tracker", lambda uri, work: None)
    with campaign_in(tmp_path, resources={"cores": 64}) as (workspace, _):
        config, work = workspace.plan.config, tmp_path / "another"
    how: dict[str, Any] = {"observer": Told(), "engine": "ray", "store": str(tmp_path / "mount")}
    with pytest.raises(InputError, match="no node has what the measuring needs: 64 cores"):
        run_campaign(config, base=tmp_path, work=work, **how)
    assert not list(work.rglob("*.onnx"))


def test_on_this_machine_a_campaign_has_the_cores_that_it_asks_for_or_says_so(tmp_path: Path):
    with campaign_in(tmp_path, resources={"cores": 10_000}) as (workspace, _):
        config = workspace.plan.config
    with pytest.raises(InputError, match="the measuring needs 10000 cores, and this machine has"):
        run_campaign(config, base=tmp_path, work=tmp_path / "another", observer=Told(), engine="local")
    assert not (tmp_path / "another").exists()


def test_a_store_of_one_machine_is_not_enough(tmp_path: Path):
    with campaign_in(tmp_path) as (workspace, made):
        alone = replace(workspace, store=FolderStore(workspace.plan.work))
        with pytest.raises(InputError, match="a store that both share"):
            find_on_node(alone, made, UNLIMITED)
