"""What the commands say of a promotion: whether its steps are watched long enough, and how things stand."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize import promoting
from optimize.cli.promotion import percentages, told_how_things_stand, way_back
from optimize.cluster_config import LocalConfig
from optimize.production import Place
from optimize.promoting import BasePromoting, Options, Task, _check_watching, _too_short
from optimize.rollback import JOURNAL, after_interruption
from registry.errors import InputError, InterruptedCampaignError
from registry.ledger import Ledger
from registry.policy import parse_policy
from registry.ports import Probe, RegisteredVersion
from registry.promotion import Journal, steps_of
from registry.records import Constraint, Promotion, Watching
from tests.doubles.promotions import MemoryApplier, MemoryRegistry, StatedProbe, production, rollout

POLICY = parse_policy(["latency_p90_ms <= 50", "latency_p90_ms <= 110% rel vs champion"], "maximize max_throughput_rps")
STEPS = steps_of(weights=(10, 50, 100), mirror=100, watch_s=60, beside=True)
WATCHED = tuple(step for step in STEPS if step.watch_s)
PROMOTION = Promotion(
    id="one",
    model="digits",
    production="digits",
    challenger="digits-challenger",
    experiment="digits-promotion",
    location="memory",
    campaign_id="c",
    candidate_id="candidate-2",
    candidate_name="int8",
    version="2",
    fingerprint="f",
    champion="1",
    challenger_before=None,
    policy=POLICY,
    steps=STEPS,
    reason="It is faster.",
    watching=Watching(metrics=("latency_p90_ms",), rate_rps=25),
)
BACK = "burnish rollback work"


def limits(*lines: str) -> list[Constraint]:
    return [replace(one, load=None) for one in parse_policy(list(lines), "maximize max_throughput_rps").constraints]


# --- long enough -------------------------------------------------------------------------------------------------


def test_a_minute_is_enough_for_a_p90():
    assert _too_short(POLICY.constraints, WATCHED, 25) == ""


def test_a_step_in_which_the_champion_answers_too_few_is_told():
    """At 50 % it answers half of half of the requests: 6 s x 68/s / 4 = 102, and a p90 takes 204 of each."""
    short = tuple(replace(step, watch_s=6.0) for step in WATCHED)
    told = _too_short(limits("latency_p90_ms <= 110% rel vs champion"), short, 68)
    assert told == (
        "6 s at 68 requests a second give the champion 102 requests in the step weights-50, and the limits take 204 to "
        "decide on: watch for 12 s, or send more"
    )
    # Nothing is held against it where it answers nobody.
    assert _too_short(limits("latency_p90_ms <= 110% rel vs champion"), short[-1:], 68) == ""


def test_in_the_champions_place_all_requests_are_the_challengers():
    alone = steps_of(weights=(100,), mirror=0, watch_s=10, beside=False)
    watched = tuple(step for step in alone if step.watch_s)
    assert _too_short(limits("latency_p90_ms <= 50"), watched, 20.4) == ""
    assert "watch for 11 s" in _too_short(limits("latency_p90_ms <= 50"), watched, 20.0)


@pytest.mark.parametrize(
    "wrong", [{"rate_rps": 0.0}, {"rate_rps": float("nan")}, {"scrape_s": -1.0}, {"port": 0}, {"port": 65536}]
)
def test_options_that_cannot_be(wrong: dict[str, Any]):
    with pytest.raises(InputError, match=r"--(rate|scrape|port) is"):
        Options(**wrong)


def test_what_was_begun_goes_on_with_as_much():
    begun = replace(PROMOTION, watching=Watching(metrics=(), rate_rps=25, prometheus="http://prometheus:9090"))
    same = Options(prometheus="http://other:9090")
    _check_watching(begun, STEPS, same)
    _check_watching(begun, STEPS, replace(same, rate_rps=50))
    with pytest.raises(InputError, match="begun with --rate 25 and --prometheus http://prometheus:9090") as caught:
        _check_watching(begun, STEPS, Options(rate_rps=5))
    assert "burnish rollback" in str(caught.value)
    # Where nothing is left to be watched, or nothing was, it does not matter.
    _check_watching(begun, (), Options(rate_rps=5))
    _check_watching(replace(begun, watching=None), STEPS, Options(rate_rps=5))


# --- how things stand --------------------------------------------------------------------------------------------


@contextmanager
def journal_of(work: Path) -> Iterator[Journal]:
    with Ledger.open(work / JOURNAL) as ledger:
        yield Journal(ledger, lambda: "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    ("lines", "stands", "hint"),
    [
        ([], "All is as it was before int8: version 1 is the champion.", "begins anew"),
        ([("register", "intent")], "The promotion of int8 stands at register; version 1 is", f"`{BACK}` goes back"),
        ([("register", "done"), ("load", "done")], "stands at mirror", "The same command goes on there"),
        ([("champion", "done")], "is the champion already; digits-promotion and digits-challenger", "does it"),
        ([("promotion", "done")], "int8 is the champion of digits, and nothing is under way.", f"`{BACK}`"),
        ([("rollback", "intent")], "int8 is not taken back whole yet.", f"`{BACK}` completes it"),
        ([("rollback", "done")], "All is as it was before int8", "begins anew"),
    ],
)
def test_an_interrupted_command_says_how_things_stand(
    tmp_path: Path, lines: list[tuple[str, Any]], stands: str, hint: str
):
    assert after_interruption(tmp_path, BACK)[0] == "Nothing was changed."
    with journal_of(tmp_path) as journal:
        journal.begin(PROMOTION)
        for step, phase in lines:
            journal.add(PROMOTION, step, phase)
    found = after_interruption(tmp_path, BACK)
    assert stands in found[0]
    assert hint in found[1]


def test_ctrl_c_is_told_with_the_way_on_and_back(tmp_path: Path):
    with journal_of(tmp_path) as journal:
        journal.begin(PROMOTION)
        journal.add(PROMOTION, "rollback", "done")
    with pytest.raises(InterruptedCampaignError) as caught, told_how_things_stand(tmp_path, BACK):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert caught.value.message == "Interrupted. All is as it was before int8: version 1 is the champion."
    assert caught.value.hint == "The same command begins anew."


def test_theway_back_names_the_cluster():
    work = Path("burnish work")
    assert way_back(work, None, None) == "burnish rollback 'burnish work'"
    assert way_back(work, None, Path("a.yaml")) == "burnish rollback 'burnish work' --campaign a.yaml"
    assert way_back(work, Path("c.yaml"), Path("a.yaml")) == "burnish rollback 'burnish work' --cluster c.yaml"


@pytest.mark.parametrize("wrong", ["ten", "10 50 100", "10,,100", "", "1.5,100", "-1,100"])
def test_weights_that_are_no_whole_numbers(wrong: str):
    assert percentages("10, 50,100") == (10, 50, 100)
    with pytest.raises(InputError, match="the weights are"):
        percentages(wrong)


# --- from plan to champion -----------------------------------------------------------------------------------------


class Registry(MemoryRegistry):
    """One that can be asked whether it is there, too."""

    def check(self) -> None:
        self.aliases("digits")


@dataclass
class World:
    """A working folder, and the world around it, which outlives whoever promotes."""

    work: Path
    registry: Registry
    applier: MemoryApplier

    def promoting(self, **options: Any) -> "InMemory":
        task = Task(
            campaign_id="c",
            candidate_id="candidate-2",
            production="digits",
            work=self.work,
            cluster=LocalConfig(kind="local"),
            base=self.work,
            samples=self.work / "samples.npz",
        )
        return InMemory(task, Options(**{"rate_rps": 100.0, **options}), self)

    @contextmanager
    def place(self) -> Iterator[Place]:
        yield Place(rollout=rollout(self.applier, self.work / "manifests"), target_of=lambda name: None)

    def states(self) -> list[str]:
        journal = Journal(Ledger.read(self.work / JOURNAL), lambda: "")
        return [journal.state(one) for one in journal.promotions]


class InMemory(BasePromoting):
    """The promotion of version 2 of ``digits``, over ports in memory."""

    def __init__(self, task: Task, options: Options, world: World) -> None:
        self.told: list[str] = []
        super().__init__(task, options, world.registry, self.told.append)
        self._world = world

    def _place(self, *, serve: bool) -> Any:
        return self._world.place()

    def _registered(self) -> RegisteredVersion | None:
        return self._registry.find("digits", campaign_id="c", candidate_id="candidate-2")

    def _register(self) -> RegisteredVersion:
        raise AssertionError

    def _new(self, journal: Journal | None, place: Place, registered: RegisteredVersion | None) -> Promotion:
        # As it is for models: whoever is the champion needs no promotion.
        if registered is not None and self._registry.aliases("digits").get("champion") == registered.version:
            raise InputError("it is the champion already")
        return self._drafted(
            journal, place, registered,
            model="digits", candidate_name="int8 2", policy=POLICY, beside=True, reason="It is faster.", notes=(),
            resource="model",
        )  # fmt: skip

    def _own_probe(self, place: Place, stack: ExitStack) -> Probe:
        assert self._samples is not None
        return StatedProbe()

    def _by_prometheus(self, own: Probe, place: Place, prometheus: Any) -> Probe:
        raise AssertionError


@pytest.fixture
def world(tmp_path: Path) -> World:
    applier = MemoryApplier()
    production(applier, tmp_path / "manifests")
    np.savez(tmp_path / "samples.npz", x=np.zeros((2, 3), np.float32))
    return World(tmp_path, Registry(), applier)


def test_from_the_plan_to_the_champion_the_samples_are_read_once(world: World, monkeypatch: pytest.MonkeyPatch):
    from optimize import samples

    read, load = [], samples.load_samples
    monkeypatch.setattr(samples, "load_samples", lambda path: read.append(path) or load(path))
    planned = world.promoting().plan()
    assert (planned.state, planned.short, world.registry.named) == ("new", "", {"champion": "1"})
    read.clear()
    assert world.promoting().apply().state == "completed"
    assert world.registry.named == {"champion": "2"}
    assert read == [world.work / "samples.npz"]
    again = world.promoting()
    assert again.apply().state == "completed"
    assert again.told == ["it is the champion already; nothing is to be done"]


def test_the_champion_of_another_place_is_not_taken_for_that_of_this_one(world: World):
    """The alias has moved to it elsewhere, and here the old one goes on serving."""
    world.promoting().apply()
    world.applier = MemoryApplier(location="another cluster")
    production(world.applier, world.work / "manifests")
    for promoted in (world.promoting().plan, world.promoting().apply):
        with pytest.raises(InputError, match="became the champion at memory, not at another cluster") as caught:
            promoted()
        assert "burnish rollback" in str(caught.value)


def test_a_way_back_that_was_cut_short_is_completed_before_anything_is_planned(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(promoting, "place_of", lambda *_, **__: world.place())
    world.promoting().apply()
    with Ledger.open(world.work / JOURNAL) as ledger:
        journal = Journal(ledger, lambda: "2026-01-01T00:00:00+00:00")
        journal.add(journal.promotions[0], "rollback", "intent", "it was worse")
    with pytest.raises(InputError, match="int8 2 is not taken back whole yet") as caught:
        world.promoting().plan()
    assert "--apply does so first" in str(caught.value)
    resumed = world.promoting()
    assert resumed.apply().state == "completed"
    assert resumed.told[0] == "the rollback of int8 2 is completed first"
    assert world.states() == ["rolled back", "completed"]
    assert [one.how for one in world.registry.reigns("digits")] == ["promoted", "rolled back", "promoted"]
