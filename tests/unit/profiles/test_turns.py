from pathlib import Path

import pytest

from profiles.measure.levels import find_level
from profiles.measure.rounds import AGAIN
from profiles.measure.turns import Side, Turns, measure_in_turns
from registry.records import Target
from tests.doubles.loads import StatedGenerator

STANDARD = find_level("standard")


def sides(*models: str) -> list[Side]:
    targets = [Target(url="127.0.0.1:1", protocol="grpc", model=model) for model in models]
    return [Side(id=name, target=target, payloads=()) for name, target in zip("ABC", targets, strict=False)]


def measured(root: Path, generator: StatedGenerator, *models: str, loads: tuple[str, ...] = ()) -> Turns:
    return measure_in_turns(
        generator,  # type: ignore[arg-type]
        sides(*models), loads=loads, level=STANDARD, seed=3, raw_root=root,
    )  # fmt: skip


def test_the_faster_side_is_told_after_the_first_rounds(tmp_path: Path) -> None:
    turns = measured(tmp_path, StatedGenerator({"slow": 100, "fast": 150}), "slow", "fast")
    closed, rate = turns.loads
    assert closed == "closed"
    assert 70 < float(rate.removesuffix(" rps")) < 90  # which saturates neither
    words = {(one.metric, one.load): one.word for one in turns.comparisons}
    assert words["max_throughput_rps", None] == "faster"
    assert words["latency_p99_ms", rate] == "faster"
    assert {one.number for one in turns.rounds} == set(range(STANDARD.rounds))
    assert {one.candidate_id for one in turns.comparisons} == {"B"}
    of_round = [(one.candidate_id, one.runs[0].load.name) for one in turns.rounds if one.number == 0]
    assert sorted(of_round) == [("A", "closed"), ("A", "closed" + AGAIN), ("B", "closed")]
    orders = {
        tuple(one.candidate_id for one in turns.rounds if one.number == number) for number in range(STANDARD.rounds)
    }
    assert len(orders) > 1
    assert not (tmp_path / "capacity.npz").exists()


def test_rounds_go_on_while_it_is_undecided_and_only_so_far(tmp_path: Path) -> None:
    turns = measured(tmp_path, StatedGenerator({"one": 100, "other": 104}, noise=0.1), "one", "other")
    assert {one.number for one in turns.rounds} == set(range(STANDARD.most_rounds))
    assert next(one.word for one in turns.comparisons if one.metric == "max_throughput_rps") == "undecided"


def test_like_sides_are_equivalent_and_nothing_is_searched_where_a_load_is_named(tmp_path: Path) -> None:
    generator = StatedGenerator({"one": 100, "other": 100})
    turns = measured(tmp_path, generator, "one", "other", loads=("50 rps",))
    words = {one.metric: one.word for one in turns.comparisons}
    assert words["latency_p50_ms"] == "equivalent"
    assert not {"faster", "slower"} & set(words.values())
    assert {profile.name.removesuffix(AGAIN) for _, profile in generator.windows} == {"50 rps"}
    assert {one.load for one in turns.measurements} == {"50 rps"}


def test_a_side_that_was_decided_leaves_the_rounds(tmp_path: Path) -> None:
    generator = StatedGenerator({"base": 100, "clear": 300, "close": 104}, noise=0.08)
    turns = measured(tmp_path, generator, "base", "clear", "close", loads=("concurrency 4",))
    played = {name: {one.number for one in turns.rounds if one.candidate_id == name} for name in "ABC"}
    assert len(played["B"]) == STANDARD.rounds < len(played["C"]) == len(played["A"])


@pytest.mark.parametrize("rate", [0.001])
def test_sides_that_keep_up_with_nothing_are_compared_in_a_closed_loop_alone(tmp_path: Path, rate: float) -> None:
    generator = StatedGenerator({"one": rate, "other": 100})
    turns = measured(tmp_path, generator, "one", "other")
    assert turns.loads[0] == "closed"
