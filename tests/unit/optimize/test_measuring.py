"""Rounds of a campaign over servers that are not there, in virtual time."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest

from optimize import budget as budgets
from optimize import measuring
from optimize.budget import UNLIMITED, Budget
from optimize.config import CampaignConfig, LimitsConfig, SamplesConfig, SourceConfig
from optimize.measuring import Measured, Serving, measure
from optimize.plan import Observer, Plan, Workspace
from profiles.deploy.cluster import Usage
from profiles.load.recording import save_arrays
from profiles.load.summary import summarize
from profiles.measure.equivalence import Reference
from profiles.measure.levels import find_level
from profiles.measure.rounds import AGAIN, compare_rounds, reduce_rounds
from profiles.testing import Queue, simulate
from registry.codec import file_sha256
from registry.errors import BurnishError, GeneratorLostError, ServerDiedError, StorageError, UnreachableError
from registry.ledger import Ledger
from registry.policy import parse_policy
from registry.records import (
    Adaptation,
    Artifact,
    Candidate,
    EngineSpec,
    Equivalence,
    Host,
    LoadProfile,
    Policy,
    RunRecord,
    ServingProfile,
    Target,
)
from registry.store import FolderStore

X = {"x": np.arange(12, dtype="f4").reshape(6, 2)}
QUICK = find_level("quick")
STANDARD = replace(find_level("standard"), closed_s=1.0, open_s=1.0, warmup_s=0.1, ladder_s=0.3, stage_s=0.3)
PASSED = Equivalence(requests=32, rows=32, failed=0, wrong=0, swapped=(), told_apart=32, worst=0.0)
ARTIFACT = Artifact(digest="d", format="onnx", entry="model.onnx", files=(), inputs=(), outputs=())


@dataclass
class FakeDeployment:
    candidate: Candidate
    load_time_s: float
    rendered: dict[str, str] = field(default_factory=lambda: {"settings.json": "{}"})
    ended: bool = False
    statistics: None = None

    @property
    def target(self) -> Target:
        return Target(url="127.0.0.1:1", protocol="grpc", model=self.candidate.id)

    def usage(self) -> Usage:
        return Usage(cpu_s=0.0, rss_mb=1.0)

    def undeploy(self) -> None:
        self.ended = True


class FakeCluster:
    """Deploys in no time; the load time tells which deployment of all it was."""

    def __init__(self) -> None:
        self.deployments: list[FakeDeployment] = []

    def deploy(self, candidate: Candidate, artifact: Artifact, files: Path, *, timeout_s: float) -> FakeDeployment:
        self.deployments.append(FakeDeployment(candidate, load_time_s=len(self.deployments) + 1.0))
        return self.deployments[-1]

    def close(self) -> None:
        for deployment in self.deployments:
            deployment.undeploy()


class SimulatedGenerator:
    """Offers windows in virtual time; a test may put something in the way of each."""

    def __init__(self) -> None:
        self.windows: list[tuple[str, LoadProfile]] = []
        self.before: Callable[[str, LoadProfile], None] = lambda model, profile: None

    def __call__(self, **_: Any) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(
        self,
        target: Target,
        payloads: Any,
        profile: LoadProfile,
        *,
        raw_path: Path,
        raw_root: Path | None = None,
        **_: Any,
    ) -> RunRecord:
        self.before(target.model, profile)
        self.windows.append((target.model, profile))
        recording = simulate(Queue(0.004, service="exponential", seed=len(self.windows)), profile)
        save_arrays(raw_path, recording)
        name = raw_path.name if raw_root is None else raw_path.relative_to(raw_root).as_posix()
        return summarize(recording, profile, raw=name, raw_sha256=file_sha256(raw_path))


class Told(Observer):
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.total = 0
        self.lines: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def phase(self, name: str, total: int) -> None:
        self.total += total

    def done(self, subject: str, outcome: str) -> None:
        self.lines.append((subject, outcome))

    def note(self, text: str) -> None:
        self.notes.append(text)


def serving(name: str, baseline: bool = False) -> Serving:
    candidate = Candidate(
        id=name,
        name=f"{name} @ fake",
        variant_id=name,
        variant_name=name,
        engine=EngineSpec(name="onnxruntime"),
        engine_version="1",
        serving=ServingProfile(server="mlserver", backend="burnish"),
        server_version="1",
    )
    return Serving(candidate=candidate, artifact=ARTIFACT, files=Path(), answers=None, baseline=baseline)


BASE, FAST = serving("base", baseline=True), serving("fast")


MOST = parse_policy((), ("maximize max_throughput_rps",))


@dataclass
class Session:
    """One run of a campaign's measuring; several of them share a working folder, as the same command again does."""

    work: Path
    generator: SimulatedGenerator
    told: Told = field(default_factory=Told)
    cluster: FakeCluster = field(default_factory=FakeCluster)

    def measure(
        self,
        *servings: Serving,
        level: Any = QUICK,
        deployed: Any = "all",
        policy: Policy = MOST,
        budget: Budget = UNLIMITED,
    ) -> Measured:
        plan = Plan(
            config=CampaignConfig(
                name="c",
                sources=(SourceConfig(onnx="m.onnx"),),
                samples=SamplesConfig(evaluation="x.npz"),
                limits=LimitsConfig(deployed=deployed),
            ),
            base=self.work,
            work=self.work,
            policy=policy,
            level=level,
            recipes=(),
            profiles=(BASE.candidate.serving,),
            host=Host(
                fingerprint="h",
                cpu_model="c",
                cores=2,
                memory_mb=1,
                instruction_sets=(),
                gpus=(),
                kernel="k",
                pinning="p",
            ),
            server_cpus=(0,),
            client_cpus=(1,),
        )
        with ExitStack() as stack:
            ledger = stack.enter_context(Ledger.open(self.work / "ledger.jsonl"))
            store = FolderStore(self.work)
            workspace = Workspace(plan=plan, store=store, ledger=ledger, observer=self.told, budget=budget)
            return measure(workspace, self.cluster, servings, X, "samples")


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> SimulatedGenerator:
    generator = SimulatedGenerator()
    monkeypatch.setattr(measuring, "LoadGenerator", generator)
    monkeypatch.setattr(measuring, "check_equivalence", lambda target, inputs, **how: PASSED)
    monkeypatch.setattr(measuring, "first_request_ms", lambda *args, **how: 5.0)
    monkeypatch.setattr(measuring, "answer_in_process", lambda *args, **how: Reference(outputs={}))
    return generator


def reduced(work: Path, found: Measured, level: Any = QUICK) -> list[Any]:
    return [
        reduce_rounds(capacity.candidate_id, found.rounds, capacity, raw_root=work, level=level)
        for capacity in found.capacities
    ] + list(compare_rounds("base", found.rounds, raw_root=work, level=level))


def test_a_candidate_is_sent_samples_as_it_takes_them(
    tmp_path: Path, generator: SimulatedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}
    run = generator.run

    def keep(target: Target, payloads: Any, profile: LoadProfile, **given: Any) -> RunRecord:
        sent[target.model] = payloads
        return run(target, payloads, profile, **given)

    monkeypatch.setattr(generator, "run", keep)
    half = replace(FAST, adaptation=(Adaptation(input="x", way="cast", dtype="float16"),))
    assert not Session(tmp_path, generator).measure(BASE, half).failures
    rows = {model: {payload.rows for payload in payloads} for model, payloads in sent.items()}
    assert rows["base"] == rows["fast"]
    assert b"FP32" in sent["base"][0].body
    assert b"FP16" in sent["fast"][0].body


def test_every_candidate_is_measured_and_the_baseline_twice(tmp_path: Path, generator: SimulatedGenerator) -> None:
    session = Session(tmp_path, generator)
    found = session.measure(BASE, FAST)
    assert not found.failures
    assert [one.candidate_id for one in found.deployed] == ["base", "fast"]
    assert len(session.told.lines) == session.told.total == 2 + QUICK.rounds * 3
    for number in range(QUICK.rounds):
        of_round = [one for one in found.rounds if one.number == number]
        assert [one.position for one in of_round] == [0, 1, 2]
        assert sorted(one.candidate_id for one in of_round) == ["base", "base", "fast"]
        again = [one for one in of_round if one.runs[0].load.name.endswith(AGAIN)]
        assert [one.candidate_id for one in again] == ["base"]
    # Nothing of the first round is said to be "done again" in the second.
    assert session.told.notes == []
    assert reduced(tmp_path, found)


def test_the_highest_rate_is_looked_for_where_the_policy_names_it(
    tmp_path: Path, generator: SimulatedGenerator
) -> None:
    policy = parse_policy(["latency_p90_ms <= 30"], "maximize slo_max_rps")
    found = Session(tmp_path, generator).measure(BASE, policy=policy)
    [capacity] = found.capacities
    assert capacity.slo_max is not None
    assert 0.4 * 250 < capacity.slo_max.value < 250  # of a queue that serves 250 a second
    [whole, *_] = reduce_rounds("base", found.rounds, capacity, raw_root=tmp_path, level=QUICK)
    assert whole.metrics["slo_max_rps"] == capacity.slo_max
    # Another policy asks for other capacities.
    [other] = Session(tmp_path, generator).measure(BASE).capacities
    assert other.slo_max is None


def rates(generator: SimulatedGenerator, monkeypatch: pytest.MonkeyPatch, **of: list[float]) -> None:
    """Has each model answer at these rates, one after the other, in closed loops of rounds."""
    run, left = generator.run, {model: itertools.cycle(rps) for model, rps in of.items()}

    def at_its_rate(target: Target, payloads: Any, profile: LoadProfile, **given: Any) -> RunRecord:
        record = run(target, payloads, profile, **given)
        if not profile.name.startswith("closed"):
            return record
        return replace(record, metrics={**record.metrics, "throughput_rps": next(left[target.model])})

    monkeypatch.setattr(generator, "run", at_its_rate)


def test_only_what_is_undecided_goes_on_for_more_rounds(
    tmp_path: Path, generator: SimulatedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(generator, monkeypatch, base=[100.0], fast=[300.0], same=[100.0], wavers=[90.0, 115.0])
    session, level = Session(tmp_path, generator), replace(QUICK, rounds=3, most_rounds=6)
    found = session.measure(BASE, FAST, serving("same"), serving("wavers"), level=level)
    slots = [one.candidate_id for one in found.rounds]
    assert {name: slots.count(name) for name in slots} == {"base": 12, "fast": 3, "same": 3, "wavers": 6}
    words = {
        one.candidate_id: (one.word, one.ratio.runs)
        for one in compare_rounds("base", found.rounds, raw_root=tmp_path, level=level)
        if one.metric == "max_throughput_rps"
    }
    assert words == {"fast": ("faster", 3), "same": ("equivalent", 3), "wavers": ("undecided", 6)}
    # What was measured is known, and so is what was undecided of it.
    generator.windows.clear()
    assert Session(tmp_path, generator).measure(BASE, FAST, serving("same"), serving("wavers"), level=level) == found
    assert generator.windows == []


def test_rounds_end_where_a_failure_leaves_nothing_undecided(
    tmp_path: Path, generator: SimulatedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(generator, monkeypatch, base=[100.0], wavers=[90.0, 115.0])

    def die(model: str, profile: LoadProfile) -> None:
        if model == "wavers" and len(generator.windows) > 30:
            raise ServerDiedError("gone")

    generator.before = die
    found = Session(tmp_path, generator).measure(
        BASE, serving("wavers"), level=replace(QUICK, rounds=6, most_rounds=12)
    )
    assert [failure.subject for failure in found.failures] == ["wavers @ fake"]
    assert max(one.number for one in found.rounds) == 5


def test_the_baselines_two_slots_do_not_always_touch(tmp_path: Path, generator: SimulatedGenerator) -> None:
    others = [serving(f"v{n}") for n in range(4)]
    found = Session(tmp_path, generator).measure(BASE, *others, level=replace(QUICK, rounds=8))
    gaps = {
        abs(one.position - other.position)
        for one, other in itertools.combinations(found.rounds, 2)
        if one.number == other.number and one.candidate_id == other.candidate_id
    }
    assert max(gaps) > 1


def test_the_same_again_measures_nothing(tmp_path: Path, generator: SimulatedGenerator) -> None:
    first = Session(tmp_path, generator).measure(BASE, FAST)
    generator.windows.clear()
    session = Session(tmp_path, generator)
    assert session.measure(BASE, FAST) == first
    assert generator.windows == []
    assert session.cluster.deployments == []


def test_levels_that_share_a_folder_keep_their_own_arrays(tmp_path: Path, generator: SimulatedGenerator) -> None:
    quick = Session(tmp_path, generator).measure(BASE, FAST)
    before = reduced(tmp_path, quick)
    standard = Session(tmp_path, generator).measure(BASE, FAST, level=STANDARD)
    generator.windows.clear()
    assert Session(tmp_path, generator).measure(BASE, FAST) == quick
    assert generator.windows == []
    assert reduced(tmp_path, quick) == before
    assert reduced(tmp_path, standard, STANDARD)


def test_a_new_candidate_is_measured_in_rounds_of_its_own(tmp_path: Path, generator: SimulatedGenerator) -> None:
    Session(tmp_path, generator).measure(BASE, FAST)
    generator.windows.clear()
    session = Session(tmp_path, generator)
    session.measure(BASE, FAST, serving("late"))
    assert {model for model, profile in generator.windows if profile.name == "capacity"} == {"late"}
    in_rounds = [model for model, profile in generator.windows if profile.name.startswith("closed")]
    assert {model: in_rounds.count(model) for model in in_rounds} == {
        "base": 2 * QUICK.rounds,
        "fast": QUICK.rounds,
        "late": QUICK.rounds,
    }
    assert any("candidates was" in note for note in session.told.notes)


@pytest.mark.parametrize("kept", [1, 2, 3, 5, 8, 10, 12])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, generator: SimulatedGenerator, kept: int) -> None:
    whole = Session(tmp_path, generator).measure(BASE, FAST)
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 6 + 3 * QUICK.rounds
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines[:kept]))
    session = Session(tmp_path, generator)
    again = session.measure(BASE, FAST)
    assert [(one.candidate_id, one.number, one.position) for one in again.rounds] == [
        (one.candidate_id, one.number, one.position) for one in whole.rounds
    ]
    assert reduced(tmp_path, again)
    # What was seen when a candidate was deployed first stays, though it is deployed again for what is missing.
    assert again.deployed[0].load_time_s == 1.0
    assert again.deployed[0].first_request_ms == 5.0
    assert len(session.cluster.deployments) <= 2
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(b"".join(lines[:kept]))


def test_a_candidate_that_mixes_answers_up_is_not_measured(
    tmp_path: Path, generator: SimulatedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def check(target: Target, inputs: Any, *, reference: Reference, most_rows: int, **how: Any) -> Equivalence:
        asked.append((target.model, sorted(reference.outputs)))
        assert most_rows == 1
        return replace(PASSED, swapped=((1, 2), (2, 1)), reason="mixed up") if target.model == "fast" else PASSED

    monkeypatch.setattr(measuring, "check_equivalence", check)
    known = replace(BASE, answers={"y": X["x"]})
    session = Session(tmp_path, generator)
    found = session.measure(known, FAST)
    [failure] = found.failures
    assert (failure.subject, failure.phase, failure.kind) == ("fast @ fake", "measure", "error")
    assert failure.reason == "its answers cannot be trusted: mixed up"
    # The answers foretold where there are, those of the model in process where neighbours count.
    assert asked == [("base", ["y"]), ("fast", [])]
    assert {model for model, _ in generator.windows} == {"base"}
    assert {one.candidate.id: one.ended for one in session.cluster.deployments} == {"base": False, "fast": True}

    again = Session(tmp_path, generator)
    assert again.measure(known, FAST).failures == found.failures
    assert again.cluster.deployments == []
    assert len(asked) == 2


def test_a_candidate_that_dies_is_left_out_and_changes_no_round(tmp_path: Path, generator: SimulatedGenerator) -> None:
    def die(model: str, profile: LoadProfile) -> None:
        if model == "fast" and profile.name.startswith("closed"):
            raise ServerDiedError("it ended with signal 9\nits log")

    generator.before = die
    session = Session(tmp_path, generator)
    found = session.measure(BASE, FAST)
    assert [(one.subject, one.phase, one.kind) for one in found.failures] == [("fast @ fake", "measure", "died")]
    assert {one.candidate_id for one in found.rounds} == {"base"}
    assert len(session.told.lines) == session.told.total
    # It is taken away; the rest is left for whoever deployed it, who ends all at once.
    assert {one.candidate.id: one.ended for one in session.cluster.deployments} == {"base": False, "fast": True}

    generator.before = lambda model, profile: None
    generator.windows.clear()
    again = Session(tmp_path, generator)
    assert not again.measure(BASE, FAST).failures
    assert {model for model, _ in generator.windows} == {"fast"}
    assert [one.candidate.id for one in again.cluster.deployments] == ["fast"]


def test_a_server_that_died_is_told_where_it_only_stopped_answering(
    tmp_path: Path, generator: SimulatedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(target: Target, inputs: Any, **how: Any) -> Equivalence:
        raise UnreachableError("connection refused")

    def died(self: FakeDeployment) -> Usage:
        raise ServerDiedError("it ended with signal 9\nits log")

    monkeypatch.setattr(measuring, "check_equivalence", check)
    [lives] = Session(tmp_path, generator).measure(BASE).failures
    assert (lives.kind, lives.reason) == ("error", "connection refused")
    monkeypatch.setattr(FakeDeployment, "usage", died)
    [dead] = Session(tmp_path, generator).measure(BASE).failures
    assert (dead.kind, dead.reason, dead.detail) == ("died", "it ended with signal 9", "its log")


def test_one_candidate_at_a_time(tmp_path: Path, generator: SimulatedGenerator) -> None:
    session = Session(tmp_path, generator)
    living: list[list[str]] = []
    generator.before = lambda *_: living.append(
        [one.candidate.id for one in session.cluster.deployments if not one.ended]
    )
    found = session.measure(BASE, FAST, deployed="one")
    assert not found.failures
    assert {len(names) for names in living} == {1}
    # For its capacity, and for each of its slots.
    assert len(session.cluster.deployments) == 2 + 3 * QUICK.rounds
    assert [one.load_time_s for one in found.deployed] == [1.0, 2.0]
    assert reduced(tmp_path, found)
    # Numbers beside idle neighbours are not taken for those.
    generator.windows.clear()
    Session(tmp_path, generator).measure(BASE, FAST)
    assert generator.windows


def test_a_candidate_that_cannot_be_deployed_is_left_out(tmp_path: Path, generator: SimulatedGenerator) -> None:
    session = Session(tmp_path, generator)
    deploy = session.cluster.deploy

    def refuse(candidate: Candidate, *args: Any, **more: Any) -> FakeDeployment:
        if candidate.id == "fast":
            raise UnreachableError("the server refused the model")
        return deploy(candidate, *args, **more)

    session.cluster.deploy = refuse  # type: ignore[method-assign]
    found = session.measure(BASE, FAST)
    assert [(one.subject, one.phase, one.kind) for one in found.failures] == [("fast @ fake", "deploy", "error")]


@pytest.mark.parametrize("error", [StorageError("no space left"), GeneratorLostError("it ended unasked")])
@pytest.mark.parametrize("where", ["capacity", "closed"])
def test_what_is_no_candidates_fault_ends_the_campaign(
    tmp_path: Path, generator: SimulatedGenerator, error: BurnishError, where: str
) -> None:
    def fail(model: str, profile: LoadProfile) -> None:
        if profile.name.startswith(where):
            raise error

    generator.before = fail
    with pytest.raises(type(error)) as caught:
        Session(tmp_path, generator).measure(BASE, FAST)
    assert caught.value.exit_code == 4


def test_a_ledger_that_cannot_be_written_ends_the_campaign(
    tmp_path: Path, generator: SimulatedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError("the journal could not be written")

    monkeypatch.setattr(Ledger, "commit", refuse)
    with pytest.raises(StorageError):
        Session(tmp_path, generator).measure(BASE, FAST)


def test_a_limit_on_the_load_time_has_each_candidate_loaded_as_often_as_the_level_says(
    tmp_path: Path, generator: SimulatedGenerator
) -> None:
    limited = parse_policy(("load_time_s <= 20",), ("maximize max_throughput_rps",))
    session = Session(tmp_path, generator)
    living: list[set[str]] = []
    generator.before = lambda *_: living.append(
        {one.candidate.id for one in session.cluster.deployments if not one.ended}
    )
    found = session.measure(BASE, FAST, policy=limited)
    assert QUICK.loads == 2
    assert [(one.load_time_s, one.reload_times_s) for one in found.deployed] == [(1.0, (2.0,)), (3.0, (4.0,))]
    # What was deployed before is gone when anything is offered; the last deployment stays through all rounds.
    assert len(session.cluster.deployments) == 4
    assert living[-1] == {"base", "fast"}
    assert [one.ended for one in session.cluster.deployments[::2]] == [True, True]
    [capacity, _] = found.capacities
    times = (found.deployed[0].load_time_s, *found.deployed[0].reload_times_s)
    [whole, *_] = reduce_rounds("base", found.rounds, capacity, raw_root=tmp_path, level=QUICK, load_time_s=times)
    assert whole.metrics["load_time_s"].high is not None
    # Without such a limit the same folder's single load is no answer to it, and the other way round.
    assert [one.reload_times_s for one in session.measure(BASE, FAST).deployed] == [(), ()]


def test_a_champion_is_compared_with_all_in_the_same_rounds(tmp_path: Path, generator: SimulatedGenerator) -> None:
    from optimize.campaign import _against_champion

    other = replace(serving("late"), champion=True)
    other = replace(other, candidate=replace(other.candidate, serving=replace(other.candidate.serving, threads=2)))
    session = Session(tmp_path, generator)
    found = session.measure(BASE, FAST, other)
    plan = SimpleNamespace(work=tmp_path, level=QUICK)
    told = _against_champion(plan, BASE.candidate, other.candidate, found)
    assert {(one.candidate_id, one.baseline_id) for one in told} == {("base", "late"), ("fast", "late")}
    of_base = next(one for one in told if (one.candidate_id, one.metric) == ("base", "max_throughput_rps"))
    [direct] = [
        one
        for one in compare_rounds("base", found.rounds, raw_root=tmp_path, level=QUICK)
        if (one.candidate_id, one.metric) == ("late", "max_throughput_rps")
    ]
    assert of_base.ratio.value == pytest.approx(1 / direct.ratio.value)
    assert of_base.ratio.low == pytest.approx(1 / direct.ratio.high)
    # Who is the baseline and the champion at once is compared as the baseline is.
    assert {one.baseline_id for one in _against_champion(plan, BASE.candidate, BASE.candidate, found)} == {"base"}
    assert _against_champion(plan, BASE.candidate, None, found) == []


def test_more_rounds_are_played_while_a_candidate_is_not_told_from_the_champion(
    tmp_path: Path, generator: SimulatedGenerator
) -> None:
    """Both are served another way than the baseline, which so says nothing of the two."""
    apart = replace(BASE.candidate.serving, threads=2)
    champion, other = (replace(one, candidate=replace(one.candidate, serving=apart)) for one in (serving("late"), FAST))
    level = replace(QUICK, rounds=2, most_rounds=4)

    def played(folder: str, *servings: Serving) -> dict[str, int]:
        (tmp_path / folder).mkdir()
        found = Session(tmp_path / folder, generator).measure(*servings, level=level)
        numbers: dict[str, set[int]] = {}
        for one in found.rounds:
            numbers.setdefault(one.candidate_id, set()).add(one.number)
        return {identity: len(seen) for identity, seen in numbers.items()}

    assert played("without", BASE, other, champion) == {"base": 2, "fast": 2, "late": 2}
    assert played("with", BASE, other, replace(champion, champion=True)) == {"base": 4, "fast": 4, "late": 4}


# --- a budget of time --------------------------------------------------------------------------------------------


@pytest.fixture
def timed(generator: SimulatedGenerator, monkeypatch: pytest.MonkeyPatch) -> SimulatedGenerator:
    """A generator whose windows take as long as they say, by the clock of budgets."""
    now = [0.0]

    def pass_by(model: str, profile: LoadProfile) -> None:
        now[0] += profile.warmup_s + profile.duration_s

    generator.before = pass_by
    monkeypatch.setattr(budgets, "monotonic", lambda: now[0])
    monkeypatch.setattr(measuring, "monotonic", lambda: now[0])
    return generator


def seconds(length_s: float) -> Budget:
    return Budget.from_now(length_s / 60)


def slots_of(found: Measured) -> dict[str, int]:
    names = [one.candidate_id for one in found.rounds]
    return {name: names.count(name) for name in names}


def test_rounds_that_there_is_no_time_for_are_not_begun_and_the_next_run_plays_them(
    tmp_path: Path, timed: SimulatedGenerator
) -> None:
    level = replace(QUICK, rounds=6, most_rounds=6)
    session = Session(tmp_path, timed)
    # For two capacities of some 5 s each, and some of the 18 slots of some 2 s each.
    found = session.measure(BASE, FAST, level=level, budget=seconds(28))
    assert (found.cut, found.short, found.failures) == (True, True, ())
    assert len(found.capacities) == 2
    assert min(slots_of(found).values()) >= 2
    assert max(one.number for one in found.rounds) < 5
    [note] = [note for note in session.told.notes if note.startswith("No further round is begun")]
    assert "was used up" in note
    timed.windows.clear()
    whole = Session(tmp_path, timed).measure(BASE, FAST, level=level, budget=seconds(1e6))
    assert (whole.cut, whole.short) == (False, False)
    assert slots_of(whole) == {"base": 12, "fast": 6}
    assert whole.rounds[: len(found.rounds)] == found.rounds
    assert "capacity" not in {profile.name for _, profile in timed.windows}


def test_what_is_known_counts_when_no_time_is_left(tmp_path: Path, timed: SimulatedGenerator) -> None:
    whole = Session(tmp_path, timed).measure(BASE, FAST)
    timed.windows.clear()
    assert Session(tmp_path, timed).measure(BASE, FAST, budget=seconds(0.0)) == whole
    assert timed.windows == []


def test_a_candidate_with_too_few_rounds_is_unknown(tmp_path: Path, timed: SimulatedGenerator) -> None:
    Session(tmp_path, timed).measure(BASE, FAST)
    ledger = tmp_path / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[: 6 + 3]))  # what is found before the rounds, and one round
    found = Session(tmp_path, timed).measure(BASE, FAST, budget=seconds(0.0))
    told = [(one.subject, one.phase, one.kind, one.reason) for one in found.failures]
    assert told == [
        (f"{name} @ fake", "measure", "budget", "the budget of 0 minutes was used up after 1 of 3 rounds")
        for name in ("base", "fast")
    ]
    assert (found.cut, found.short) == (True, False)


def test_others_are_only_begun_where_the_rounds_of_all_still_fit(tmp_path: Path, timed: SimulatedGenerator) -> None:
    others = [serving(f"v{number}") for number in range(8)]
    found = Session(tmp_path, timed).measure(BASE, *others, budget=seconds(75))
    begun = [one.candidate_id for one in found.capacities]
    assert begun[:2] == ["base", "v0"]
    assert 2 < len(begun) < 9
    left = {one.subject for one in found.failures}
    assert left == {f"v{number} @ fake" for number in range(8)} - {f"{name} @ fake" for name in begun}
    assert {(one.phase, one.kind) for one in found.failures} == {("measure", "budget")}
    assert "what is kept for the rounds of others" in found.failures[0].reason
    # Those that were begun got all of their rounds.
    assert (found.cut, found.short) == (False, False)
    assert slots_of(found) == {name: QUICK.rounds * (2 if name == "base" else 1) for name in begun}


def test_without_any_time_nothing_is_deployed_and_all_is_unknown(tmp_path: Path, timed: SimulatedGenerator) -> None:
    session = Session(tmp_path, timed)
    found = session.measure(BASE, FAST, budget=seconds(0.0))
    assert session.cluster.deployments == []
    assert [(one.subject, one.kind) for one in found.failures] == [("base @ fake", "budget"), ("fast @ fake", "budget")]
    assert (found.cut, found.short, found.rounds) == (False, False, ())
    assert not Session(tmp_path, timed).measure(BASE, FAST).failures
