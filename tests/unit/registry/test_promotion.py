"""Promotions over ports in memory: the plan, the journal, and every way in which one may end."""

import errno
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from profiles.deploy.rollout import ManifestRollout
from registry.errors import CheckFailedError, InputError, NoVariantError, StorageError, UnreachableError
from registry.ledger import Ledger
from registry.policy import parse_policy
from registry.promotion import (
    UNREGISTERED,
    Journal,
    Promoter,
    at_once,
    chosen,
    history,
    identity,
    in_words,
    judge_watch,
    limits_watched,
    steps_of,
)
from registry.records import Champion, Observation, Promotion, PromotionStep, Watching
from tests.doubles.campaigns import campaign, no_winner
from tests.doubles.promotions import (
    MemoryApplier,
    MemoryRegistry,
    StatedProbe,
    pipeline_production,
    pipeline_rollout,
    production,
    rollout,
    version,
)

POLICY = parse_policy(["latency_p90_ms <= 50", "accuracy_drop <= 0.01"], "maximize max_throughput_rps")
STEPS = steps_of(weights=(10, 50, 100), mirror=100, watch_s=60, beside=True)


class KilledError(BaseException):
    """The process is gone."""


@dataclass
class House:
    """A working folder, and the world around it, which outlives whoever promotes."""

    work: Path
    registry: MemoryRegistry
    applier: MemoryApplier
    probe: StatedProbe
    text: str
    key = "Model/digits"

    @property
    def folder(self) -> Path:
        return self.work / "manifests"

    def rollout(self) -> ManifestRollout:
        return rollout(self.applier, self.folder)

    def promotion(self, journal: Journal, **changed: Any) -> Promotion:
        begun = sum(journal.state(one) in {"completed", "rolled back"} for one in journal.promotions)
        made = Promotion(
            id=identity("c", "candidate-2", production="digits", location="memory", version="2", begun_before=begun),
            model="digits",
            production="digits",
            challenger="digits-challenger",
            experiment="digits-promotion",
            location="memory",
            campaign_id="c",
            candidate_id="candidate-2",
            candidate_name="int8 2",
            version="2",
            fingerprint="fingerprint-2",
            champion=self.registry.named.get("champion"),
            challenger_before=self.registry.named.get("challenger"),
            policy=POLICY,
            steps=STEPS,
            reason="It is faster.",
        )
        return replace(made, **changed)

    def promote(self, watch: Callable[[Promoter], None] = lambda _: None, **changed: Any) -> Promotion:
        """What the command does: goes on with what is unfinished, or begins anew."""
        ticks = itertools.count()
        with Ledger.open(self.work / "promotions.jsonl") as ledger:
            journal = Journal(ledger, lambda: f"2026-01-01T00:00:{next(ticks):02}+00:00")
            promoter = Promoter(
                registry=self.registry,
                rollout=self.rollout(),
                probe=self.probe,
                journal=journal,
                told=lambda _: None,
            )
            watch(promoter)
            unfinished = journal.unfinished()
            if unfinished is not None and journal.state(unfinished) == "rolling back":
                promoter.roll_back(unfinished, reason="as begun")
                unfinished = None
            wanted = unfinished or self.promotion(journal, **changed)
            promoter.carry_out(wanted)
            return wanted

    def roll_back(self, watch: Callable[[Promoter], None] = lambda _: None) -> None:
        ticks = itertools.count()
        with Ledger.open(self.work / "promotions.jsonl") as ledger:
            journal = Journal(ledger, lambda: f"2026-01-02T00:00:{next(ticks):02}+00:00")
            promoter = Promoter(
                registry=self.registry,
                rollout=self.rollout(),
                probe=None,
                journal=journal,
                told=lambda _: None,
            )
            watch(promoter)
            last = journal.undoable()
            assert last is not None
            promoter.roll_back(last, reason="It was worse.")

    def states(self) -> list[str]:
        journal = Journal(Ledger.read(self.work / "promotions.jsonl"), lambda: "")
        return [journal.state(one) for one in journal.promotions]

    def is_as_before(self) -> bool:
        files = {path.name: path.read_text() for path in self.folder.iterdir()}
        uri = self.applier.resources["Model/digits"]["spec"]["storageUri"]
        return (
            files == {"Model-digits.yaml": self.text}
            and set(self.applier.resources) == {"Model/digits"}
            and (uri, self.applier.resources["Model/digits"]["spec"]["replicas"]) == ("gs://models/old", 3)
            and self.registry.named == {"champion": "1"}
        )

    def is_promoted(self) -> bool:
        spec = self.applier.resources["Model/digits"]["spec"]
        return (
            set(self.applier.resources) == {"Model/digits"}
            and (spec["storageUri"], spec["replicas"], spec["memory"]) == ("gs://models/new", 3, "64Mi")
            and [path.name for path in self.folder.iterdir()] == ["Model-digits.yaml"]
            and self.registry.named == {"champion": "2"}
        )


class PipelineHouse(House):
    """The same of a pipeline, of which one step becomes another Model that is brought."""

    key = "Pipeline/p"

    def rollout(self) -> ManifestRollout:
        return pipeline_rollout(self.applier, self.folder)

    def promotion(self, journal: Journal, **changed: Any) -> Promotion:
        names = {"production": "p", "challenger": "p-challenger", "experiment": "p-promotion"}
        return super().promotion(journal, **{**names, "resource": "pipeline", **changed})

    def is_as_before(self) -> bool:
        return (
            {path.name: path.read_text() for path in self.folder.iterdir()} == {"Pipeline-p.yaml": self.text}
            and set(self.applier.resources) == {"Pipeline/p", "Model/tokens", "Model/encoder"}
            and self._steps() == ["tokens", "encoder"]
            and self.registry.named == {"champion": "1"}
        )

    def is_promoted(self) -> bool:
        models = {"Model/tokens", "Model/encoder", "Model/encoder-int8"}
        return (
            set(self.applier.resources) == {"Pipeline/p"} | models
            and self._steps() == ["tokens", "encoder-int8"]
            and self.applier.resources["Model/encoder-int8"]["spec"]["replicas"] == 3
            and {path.name for path in self.folder.iterdir()} == {"Pipeline-p.yaml", "Model-encoder-int8.yaml"}
            and self.registry.named == {"champion": "2"}
        )

    def _steps(self) -> list[str]:
        return [step["name"] for step in self.applier.resources["Pipeline/p"]["spec"]["steps"]]


@pytest.fixture
def house(tmp_path: Path, request: pytest.FixtureRequest) -> House:
    applier, folder = MemoryApplier(), tmp_path / "manifests"
    if getattr(request, "param", "model") == "pipeline":
        text = pipeline_production(applier, folder)
        return PipelineHouse(tmp_path, MemoryRegistry(), applier, StatedProbe(), text)
    return House(tmp_path, MemoryRegistry(), applier, StatedProbe(), production(applier, folder))


of_both = pytest.mark.parametrize("house", ["model", "pipeline"], indirect=True)


# --- the plan ------------------------------------------------------------------------------------------------------


def test_the_steps_of_a_promotion():
    assert [step.name for step in STEPS] == [
        "register", "load", "mirror", "weights-10", "weights-50", "weights-100", "swap", "champion", "unload",
    ]  # fmt: skip
    assert {step.name: step.watch_s for step in STEPS if step.watch_s} == {
        "mirror": 60, "weights-10": 60, "weights-50": 60, "weights-100": 60,
    }  # fmt: skip
    alone = steps_of(weights=(100,), mirror=100, watch_s=5, beside=False)
    assert [(step.name, step.watch_s) for step in alone] == [
        ("register", 0), ("swap", 5), ("champion", 0), ("unload", 0),
    ]  # fmt: skip
    assert "mirror" not in [step.name for step in steps_of(weights=(100,), mirror=0, watch_s=5, beside=True)]


@pytest.mark.parametrize(
    "wrong",
    [{"weights": ()}, {"weights": (50, 10, 100)}, {"weights": (10, 50)}, {"weights": (0, 100)}, {"weights": (10, 101)},
     {"mirror": 101}, {"watch_s": -1.0}, {"watch_s": float("nan")}],
)  # fmt: skip
def test_steps_that_cannot_be(wrong: dict[str, Any]):
    with pytest.raises(InputError):
        steps_of(**{"weights": (10, 100), "mirror": 100, "watch_s": 1.0, "beside": True, **wrong})


def test_what_may_be_promoted():
    assert chosen(campaign(level="standard")).id == campaign().verdict.selected
    with pytest.raises(InputError, match="provisional"):
        chosen(campaign(level="quick"))
    selected = campaign().verdict.selected
    incumbent = replace(campaign(level="standard"), champion=Champion(named="digits@champion", candidate_id=selected))
    with pytest.raises(InputError, match="found nothing better than the champion"):
        chosen(incumbent)
    with pytest.raises(NoVariantError, match="selected nothing"):
        chosen(replace(campaign(level="standard"), verdict=no_winner()))


def test_other_tensors_never_share_requests():
    other = version("2", signature='[["z"],["y"]]')
    assert not at_once(POLICY, version("2"), version("1"))
    assert not at_once(POLICY, other, None)
    with pytest.raises(InputError, match="other tensors"):
        at_once(POLICY, other, version("1"))
    assert at_once(replace(POLICY, signature="may_change"), other, version("1"))
    for unknown in ((version("2", signature=None), version("1")), (version("2"), version("1", signature=None))):
        with pytest.raises(InputError, match="no signature of version"):
            at_once(replace(POLICY, signature="may_change"), *unknown)


def test_each_step_is_told_in_words(house: House, tmp_path: Path):
    with Ledger.open(tmp_path / "x.jsonl") as ledger:
        promotion = house.promotion(Journal(ledger, lambda: ""))
    told = [in_words(step, promotion) for step in STEPS]
    assert told[0] == "version 2 of digits gets the alias challenger"
    assert told[3] == "digits-challenger answers 10 % of the requests to digits; watched for 60 s"
    assert told[7] == "the alias champion goes from version 1 to version 2"
    assert told[8] == "the split digits-promotion ends, and digits-challenger is unloaded"
    alone = steps_of(weights=(100,), mirror=0, watch_s=5, beside=False)
    planned = replace(promotion, steps=alone, version=UNREGISTERED, champion=None)
    assert [in_words(step, planned) for step in alone] == [
        "a new version of digits gets the alias challenger",
        "digits serves int8 2; watched for 5 s",
        "the alias champion goes to a new version",
        "nothing is left beside digits",
    ]


def test_what_cannot_be_watched_is_said():
    policy = parse_policy(
        ["latency_p90_ms <= 50", "latency_p90_ms <= 120% rel", "latency_p90_ms <= 110% rel vs champion", "rss_mb <= 9"],
        "maximize max_throughput_rps",
    )
    watched, told = limits_watched(policy, StatedProbe())
    assert [one.text for one in watched] == [
        "latency_p90_ms <= 50", "latency_p90_ms <= 110% rel vs champion", "failed_share <= 1%",
    ]  # fmt: skip
    assert "relative to the baseline" in told[0]
    assert "`rss_mb <= 9` cannot be watched" in told[1]
    assert limits_watched(policy, None)[0] == ()


def test_against_a_champion_that_does_not_answer_beside_it_nothing_is_watched():
    """It takes the champion's place at once, say: the plan tells it, and no step ends by it."""
    policy = parse_policy(
        ["latency_p90_ms <= 110% rel vs champion", "accuracy >= 99% rel vs champion"], "maximize max_throughput_rps"
    )
    probe = StatedProbe(more=frozenset({"accuracy"}))
    assert [one.text for one in limits_watched(policy, probe, compared=False)[0]] == ["failed_share <= 1%"]
    told = limits_watched(policy, probe, compared=False)[1]
    assert "`latency_p90_ms <= 110% rel vs champion` cannot be watched: the champion does not answer" in told[0]
    assert "a limit with a number of its own would be watched" in told[0]
    # Of the champion no answers are judged.
    watched, told = limits_watched(policy, probe)
    assert [one.metric for one in watched] == ["latency_p90_ms", "failed_share"]
    assert "`accuracy >= 99% rel vs champion` cannot be watched: of the champion only latency is seen" in told[0]


@pytest.mark.parametrize(
    ("step", "held"),
    [("mirror", True), ("weights-10", True), ("weights-50", True), ("weights-100", False), ("swap", False)],
)
def test_a_limit_against_the_champion_holds_where_the_champion_answers_enough(step: str, held: bool):
    policy = parse_policy(["latency_p90_ms <= 110% rel vs champion"], "maximize max_throughput_rps")
    (which,) = [one for one in STEPS if one.name == step]
    probe = StatedProbe(p90_ms=20.0)
    found = judge_watch(policy, probe, which, probe.watch(which))
    assert bool(found) is held
    # Nobody asks it any more.
    assert judge_watch(policy, probe, which, replace(probe.watch(which), champion={})) == (
        ("unknown: p90 has a limit relative to the champion, of which that value is not known",) if held else ()
    )


# --- all goes well -------------------------------------------------------------------------------------------------


def test_a_promotion_from_end_to_end(house: House):
    seen: list[tuple[str, Any, Any]] = []

    def look(step: PromotionStep) -> None:
        spec = house.applier.resources["Experiment/digits-promotion"]["spec"]
        weights = {one["name"]: one["weight"] for one in spec["candidates"]}
        seen.append((step.name, weights, spec.get("mirror")))
        assert house.applier.resources["Model/digits"]["spec"]["storageUri"] == "gs://models/old"
        assert house.applier.resources["Model/digits-challenger"]["spec"]["replicas"] == 3
        assert house.registry.named == {"champion": "1", "challenger": "2"}

    house.probe.meanwhile = look
    house.promote()
    assert seen == [
        ("mirror", {"digits": 100}, {"name": "digits-challenger", "percent": 100}),
        ("weights-10", {"digits": 90, "digits-challenger": 10}, None),
        ("weights-50", {"digits": 50, "digits-challenger": 50}, None),
        ("weights-100", {"digits": 0, "digits-challenger": 100}, None),
    ]
    assert house.is_promoted()
    assert house.states() == ["completed"]
    (reign,), word = history("digits", house.registry)
    assert (reign.version, reign.how, reign.reason, reign.candidate) == ("2", "promoted", "It is faster.", "int8 2")
    assert word == ""


def test_back_byte_for_byte(house: House):
    house.promote()
    house.roll_back()
    assert house.is_as_before()
    assert house.states() == ["rolled back"]
    reigns, word = history("digits", house.registry)
    assert [(one.version, one.how) for one in reigns] == [("2", "promoted"), ("1", "rolled back")]
    assert (reigns[1].reason, word) == ("It was worse.", "")
    # And once more forth, which is another promotion.
    house.promote()
    assert house.is_promoted()
    assert house.states() == ["rolled back", "completed"]


def test_the_first_champion(house: House):
    house.applier.resources.clear()
    (house.folder / "Model-digits.yaml").unlink()
    house.registry.named.clear()
    house.promote(steps=steps_of(weights=(100,), mirror=0, watch_s=0, beside=False))
    assert house.applier.resources["Model/digits"]["spec"]["replicas"] == 1
    assert house.registry.named == {"champion": "2"}
    house.roll_back()
    assert house.applier.resources == {}
    assert house.registry.named == {}
    assert list(house.folder.iterdir()) == []


# --- killed --------------------------------------------------------------------------------------------------------


def die_after(entries: int) -> Callable[[Promoter], None]:
    """Nothing is done any more once so many lines are in the journal."""

    def arm(promoter: Promoter) -> None:
        left = itertools.count(entries, -1)
        add = promoter.journal.add

        def dying(*args: Any, **more: Any) -> None:
            if next(left) <= 0:
                die()
            add(*args, **more)

        def die(*_: Any, **__: Any) -> None:
            raise KilledError

        object.__setattr__(promoter.journal, "add", dying)
        promoter.rollout.restore = die  # type: ignore[method-assign]

    return arm


def die_before(entries: int) -> Callable[[Promoter], None]:
    """As `die_after`, with the line written: what it announces is not done."""

    def arm(promoter: Promoter) -> None:
        left = itertools.count(entries, -1)
        add = promoter.journal.add

        def dying(*args: Any, **more: Any) -> None:
            number = next(left)
            if number >= 1:
                add(*args, **more)
            if number <= 1:
                raise KilledError

        object.__setattr__(promoter.journal, "add", dying)
        promoter.rollout.restore = lambda *_: (_ for _ in ()).throw(KilledError())  # type: ignore[method-assign]

    return arm


LINES = 2 * len(STEPS) + 1


@of_both
@pytest.mark.parametrize("arm", [die_after, die_before])
@pytest.mark.parametrize("entries", range(1, LINES))
def test_killed_between_any_two_lines_the_next_try_gets_there(
    house: House, entries: int, arm: Callable[[int], Callable[[Promoter], None]]
):
    with pytest.raises(KilledError):
        house.promote(arm(entries))
    # Somebody answers at any time.
    assert house.key in house.applier.resources
    if "swap" not in str(house.states()):
        assert house.states() in (["under way"], ["new"])
    house.promote()
    assert house.is_promoted()
    assert house.states() == ["completed"]
    # What was done is not done again.
    journal = Journal(Ledger.read(house.work / "promotions.jsonl"), lambda: "")
    done = [one.step for one in journal.events(journal.promotions[0]) if one.phase == "done"]
    assert done == [*(step.name for step in STEPS), "promotion"]
    house.roll_back()
    assert house.is_as_before()


@of_both
@pytest.mark.parametrize("entries", range(1, LINES, 2))
def test_killed_at_any_line_it_can_be_rolled_back(house: House, entries: int):
    with pytest.raises(KilledError):
        house.promote(die_before(entries))
    house.roll_back()
    assert house.is_as_before()
    assert house.states() == ["rolled back"]


@of_both
@pytest.mark.parametrize("entries", [1, 2])
def test_a_rollback_that_is_killed_is_completed_by_the_next(house: House, entries: int):
    house.promote()
    with pytest.raises(KilledError):
        house.roll_back(die_after(entries) if entries == 1 else die_before(1))
    house.roll_back()
    assert house.is_as_before()


@of_both
def test_half_rolled_back_the_next_promotion_begins_anew(house: House):
    house.promote()
    with pytest.raises(KilledError):
        house.roll_back(die_before(1))
    house.promote()
    assert house.states() == ["rolled back", "completed"]
    assert house.is_promoted()


# --- failures ------------------------------------------------------------------------------------------------------


@of_both
@pytest.mark.parametrize("step", ["mirror", "weights-10", "weights-50", "weights-100"])
def test_a_limit_that_is_missed_leaves_the_old_champion_serving(house: House, step: str):
    def slow(now: PromotionStep) -> None:
        house.probe.p90_ms = 51.0 if now.name == step else 10.0

    house.probe.meanwhile = slow
    with pytest.raises(CheckFailedError, match=r"int8 2 is not promoted: p90 51\.00 .* ms > 50 ms"):
        house.promote()
    assert house.is_as_before()
    assert house.states() == ["rolled back"]
    house.probe.meanwhile = lambda _: None
    house.probe.p90_ms = 10.0
    house.promote()
    assert house.is_promoted()


def test_what_is_kept_of_a_failure(house: House):
    house.probe.failed = 0.2
    with pytest.raises(CheckFailedError, match="failed_share"):
        house.promote()
    journal = Journal(Ledger.read(house.work / "promotions.jsonl"), lambda: "")
    (failed,) = [one for one in journal.events(journal.promotions[0]) if one.phase == "failed"]
    assert failed.step == "mirror"
    assert failed.observation is not None
    assert failed.observation.challenger["failed_share"].value == 0.2


@pytest.mark.parametrize("uri_fails_at", ["load", "swap"])
def test_a_challenger_that_does_not_load(house: House, uri_fails_at: str):
    def fail() -> None:
        house.applier.failures["gs://models/new"] = "out of memory"

    if uri_fails_at == "load":
        fail()
    else:
        house.probe.meanwhile = lambda step: fail() if step.name == "weights-100" else None
    with pytest.raises(UnreachableError, match="out of memory"):
        house.promote()
    assert house.is_as_before()


@of_both
def test_ctrl_c_leaves_the_old_champion_serving(house: House):
    def interrupt(step: PromotionStep) -> None:
        if step.name == "weights-50":
            raise KeyboardInterrupt

    house.probe.meanwhile = interrupt
    with pytest.raises(KeyboardInterrupt):
        house.promote()
    assert house.is_as_before()


def test_a_registry_that_goes_away_promotes_nothing(house: House):
    def gone(step: PromotionStep) -> None:
        house.registry.down = step.name == "weights-100"

    house.probe.meanwhile = gone
    with pytest.raises(UnreachableError, match=r"(?s)registry is down.*could not be undone") as caught:
        house.promote()
    assert "burnish rollback" in str(caught.value)
    assert house.applier.resources["Model/digits"]["spec"]["storageUri"] == "gs://models/old"
    assert set(house.applier.resources) == {"Model/digits"}
    house.registry.down = False
    house.roll_back()
    assert house.is_as_before()


def test_an_alias_that_never_moved_is_no_reign(house: House, monkeypatch: pytest.MonkeyPatch):
    """The registry refuses the alias champion: nobody was the champion meanwhile, and nobody came back."""
    given = MemoryRegistry.set_alias

    def refuse(self: MemoryRegistry, model: str, alias: str, version: str | None) -> None:
        if (alias, version) == ("champion", "2"):
            raise UnreachableError("no right to do that")
        given(self, model, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryRegistry, "set_alias", refuse)
        with pytest.raises(UnreachableError, match="no right"):
            house.promote()
    assert house.is_as_before()
    assert house.registry.reigns("digits") == ()
    house.promote()
    assert [one.how for one in house.registry.reigns("digits")] == ["promoted"]


def test_a_reign_that_ended_is_kept_though_its_rollback_was_killed(house: House, monkeypatch: pytest.MonkeyPatch):
    house.promote()

    def die(self: MemoryRegistry, reign: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(MemoryRegistry, "crown", die)
        with pytest.raises(KilledError):
            house.roll_back()
    assert house.registry.named == {"champion": "1"}
    house.roll_back()
    assert [one.how for one in house.registry.reigns("digits")] == ["promoted", "rolled back"]


def test_a_cluster_that_goes_away(house: House):
    def gone(step: PromotionStep) -> None:
        house.applier.down = step.name == "weights-50"

    house.probe.meanwhile = gone
    with pytest.raises(UnreachableError, match=r"(?s)cluster is down.*could not be undone"):
        house.promote()
    house.applier.down = False
    house.probe.meanwhile = lambda _: None
    house.promote()
    assert house.states() == ["rolled back", "completed"]
    assert house.is_promoted()


def test_after_the_champion_has_changed_only_cleaning_up_is_left(house: House, monkeypatch: pytest.MonkeyPatch):
    def stuck(self: MemoryApplier, kind: str, name: str) -> None:
        raise UnreachableError("it does not go")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryApplier, "delete", stuck)
        with pytest.raises(UnreachableError, match="it does not go"):
            house.promote()
    assert house.registry.named == {"champion": "2"}
    assert house.states() == ["under way"]
    house.promote()
    assert house.is_promoted()


def fill_the_disk_after(lines: int) -> Callable[[Promoter], None]:
    """Once so many lines are in the journal, there is no room for more."""

    def arm(promoter: Promoter) -> None:
        left = itertools.count(lines, -1)
        add = promoter.journal.add

        def full(*args: Any, **more: Any) -> None:
            if next(left) <= 0:
                raise StorageError("no space left")
            add(*args, **more)

        object.__setattr__(promoter.journal, "add", full)

    return arm


@pytest.mark.parametrize("lines", range(2 * len(STEPS) - 2))
def test_a_full_disk_leaves_the_old_champion_serving(house: House, lines: int):
    """Until it is written that the alias champion has moved, which is the last line but three."""
    with pytest.raises(StorageError, match="no space left"):
        house.promote(fill_the_disk_after(lines))
    assert house.is_as_before()
    # What was undone is not in the journal, so that it is undone once more.
    house.roll_back()
    assert house.is_as_before()
    assert house.states() == ["rolled back"]
    house.promote()
    assert house.is_promoted()


def test_a_full_disk_after_the_champion_has_changed_undoes_nothing(house: House):
    with pytest.raises(StorageError, match="no space left"):
        house.promote(fill_the_disk_after(2 * len(STEPS) - 2))
    assert house.registry.named == {"champion": "2"}
    house.promote()
    assert house.is_promoted()


def test_a_disk_too_full_for_a_manifest_stops_nothing_from_going_back(house: House, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(step: PromotionStep) -> None:
        if step.name == "weights-50":
            monkeypatch.setattr(Path, "replace", full)

    house.probe.meanwhile = fill
    with pytest.raises(StorageError, match=r"Experiment-digits-promotion\.yaml.*No space left"):
        house.promote()
    monkeypatch.undo()
    assert house.is_as_before()
    assert house.states() == ["rolled back"]


def test_what_was_to_be_watched_is_not_finished_unwatched(house: House):
    with pytest.raises(KilledError):
        house.promote(die_after(5))
    probe, house.probe = house.probe, None  # type: ignore[assignment]
    with pytest.raises(InputError, match="mirror is to be watched for 60 s"):
        house.promote()
    assert house.states() == ["under way"]
    assert house.registry.named["champion"] == "1"
    house.probe = probe
    house.promote()
    assert house.is_promoted()


def test_what_was_watched_before_a_kill_is_watched_after_it(house: House, monkeypatch: pytest.MonkeyPatch):
    """Named by its folder, a promotion that was begun by its campaign file has no samples to judge answers by, say."""
    with pytest.raises(KilledError):
        house.promote(die_after(6))
    with monkeypatch.context() as patch:
        patch.setattr(house.probe, "sees", lambda metric: metric == "failed_share")
        with pytest.raises(InputError, match="begun with `latency_p90_ms <= 50` watched, and it cannot be now"):
            house.promote()
    assert house.states() == ["under way"]
    house.promote()
    assert house.is_promoted()


@pytest.mark.parametrize("entries", [0, 1, 3])
def test_killed_before_its_first_watched_step_it_is_watched_as_it_was_to_be(
    house: House, monkeypatch: pytest.MonkeyPatch, entries: int
):
    watching = Watching(metrics=("failed_share", "latency_p90_ms"), rate_rps=25)
    with pytest.raises(KilledError):
        house.promote(die_after(entries), watching=watching)
    with monkeypatch.context() as patch:
        patch.setattr(house.probe, "sees", lambda metric: metric == "failed_share")
        with pytest.raises(InputError, match="begun with `latency_p90_ms <= 50` watched") as caught:
            house.promote()
    assert "--samples" in str(caught.value)
    assert house.probe.watched == []
    house.promote()
    assert house.is_promoted()


# --- others --------------------------------------------------------------------------------------------------------


def test_an_alias_that_somebody_moved_is_left_there(house: House):
    house.registry.versions["3"] = version("3")

    def move(step: PromotionStep) -> None:
        if step.name == "weights-50":
            house.registry.named["champion"] = "3"

    house.probe.meanwhile = move
    with pytest.raises(InputError, match="moved the alias champion of digits: version 3 has it, and version 1 should"):
        house.promote()
    assert house.registry.named == {"champion": "3"}
    assert set(house.applier.resources) == {"Model/digits"}
    assert house.applier.resources["Model/digits"]["spec"]["storageUri"] == "gs://models/old"


def test_the_alias_challenger_given_to_another(house: House):
    house.probe.meanwhile = lambda step: house.registry.named.update(challenger="1")
    with pytest.raises(InputError, match="moved the alias challenger"):
        house.promote()
    assert house.registry.named == {"champion": "1", "challenger": "1"}


@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_a_version_that_somebody_changed(house: House, how: str):
    def change(step: PromotionStep) -> None:
        if how == "deleted":
            house.registry.versions.pop("2", None)
        else:
            house.registry.versions["2"] = version("2", fingerprint="other")

    house.probe.meanwhile = change
    with pytest.raises(InputError, match=f"somebody has {how} version 2"):
        house.promote()
    assert house.is_as_before()


def test_a_production_model_that_somebody_changed_is_left_to_them(house: House):
    def change(step: PromotionStep) -> None:
        manifest = house.applier.resources["Model/digits"]
        theirs = {**manifest, "spec": {**manifest["spec"], "storageUri": "gs://models/theirs"}}
        house.applier.resources["Model/digits"] = theirs

    house.probe.meanwhile = change
    with pytest.raises(InputError, match="somebody has changed what digits serves"):
        house.promote()
    assert house.applier.resources["Model/digits"]["spec"]["storageUri"] == "gs://models/theirs"
    assert set(house.applier.resources) == {"Model/digits"}
    assert house.registry.named == {"champion": "1"}


def test_no_way_back_over_what_others_did(house: House):
    house.promote()
    house.registry.versions["3"] = version("3")
    house.registry.named["champion"] = "3"
    with pytest.raises(InputError, match="moved the alias champion"):
        house.roll_back()
    house.registry.named["champion"] = "2"
    manifest = house.applier.resources["Model/digits"]
    house.applier.resources["Model/digits"] = {**manifest, "spec": {**manifest["spec"], "storageUri": "gs://x/y"}}
    with pytest.raises(InputError, match="somebody has changed what digits serves"):
        house.roll_back()
    assert house.states() == ["completed"]


def test_the_way_back_to_versions_that_somebody_deleted(house: House):
    """The Model is as it was; an alias of no version goes."""
    house.registry.versions["3"] = version("3")
    house.registry.named["challenger"] = "3"
    house.promote()
    del house.registry.versions["1"], house.registry.versions["3"]
    house.roll_back()
    assert house.applier.resources["Model/digits"]["spec"]["storageUri"] == "gs://models/old"
    assert house.registry.named == {}
    assert house.states() == ["rolled back"]
    assert house.registry.reigns("digits")[-1].version is None


def test_what_others_put_in_the_way(house: House):
    house.applier.resources["Model/digits-challenger"] = {"kind": "Model", "metadata": {"name": "x"}, "spec": {}}
    with pytest.raises(InputError, match="there is a Model digits-challenger"):
        house.promote()
    del house.applier.resources["Model/digits-challenger"]
    theirs = {"kind": "Experiment", "metadata": {"name": "theirs"}, "spec": {"default": "digits"}}
    house.applier.resources["Experiment/theirs"] = theirs
    with pytest.raises(InputError, match="the Experiment theirs shares out"):
        house.promote()
    assert house.registry.named == {"champion": "1"}


def test_an_alias_that_was_moved_after_all_is_told_by_history(house: House):
    house.promote()
    house.registry.named["champion"] = "1"
    assert history("digits", house.registry)[1] == "Now version 1 has the alias champion; burnish did not do that."


# --- what was seen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "answered", "problem"),
    [
        ("weights-10", {"challenger": 100, "champion": 900}, None),
        ("weights-10", {"challenger": 0, "champion": 1000}, "answered 0 of 1000 requests, which is not 10 %"),
        ("weights-10", {"challenger": 900, "champion": 100}, "answered 900 of 1000 requests"),
        ("weights-100", {"challenger": 999, "champion": 1}, "answered 999 of 1000 requests, which is not 100 %"),
        ("mirror", {"challenger": 1, "champion": 999}, "answered 1 of 1000 requests, which is not 0 %"),
        ("mirror", {"champion": 999, "others": 1}, "1 of 1000 requests were answered by neither"),
        ("mirror", {}, "no request was answered where callers ask"),
        ("weights-10", {}, "no request was answered where callers ask"),
        ("weights-10", {"unnamed": 1000}, "1000 of 1000 replies do not say who answered"),
        ("weights-10", {"challenger": 100, "champion": 890, "unnamed": 10}, "10 of 1000 replies do not say"),
        ("mirror", {"champion": 990, "unnamed": 10}, "10 of 1000 replies do not say who answered"),
        ("swap", {"unnamed": 1000}, None),
        ("swap", {"challenger": 990, "others": 10}, "10 of 1000 requests were answered by neither"),
    ],
)
def test_who_answered_has_to_fit_the_split(step: str, answered: dict[str, int], problem: str | None):
    probe = StatedProbe(answered=answered)
    (which,) = [one for one in STEPS if one.name == step]
    found = judge_watch(POLICY, probe, which, probe.watch(which))
    assert (found == ()) if problem is None else problem in found[0]


def test_unknown_never_wins():
    probe = StatedProbe()
    seen = Observation(watched_s=1, challenger={}, champion={}, answered={"champion": 100})
    found = judge_watch(POLICY, probe, STEPS[2], seen)
    assert found == ("unknown: p90 is not known", "unknown: failed_share is not known")
