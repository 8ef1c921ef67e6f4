from pathlib import Path

import pytest

from profiles.measure.levels import LIBRARY, find_level, load_levels
from profiles.measure.percentiles import is_earned
from registry.errors import DocumentError, InputError


def cost_s(name: str) -> tuple[float, float]:
    """(capacity, one round) of a fast candidate at one load, without what connecting takes."""
    level = find_level(name)
    rungs = len(level.ladder) * 1.3 * level.ladder_s
    stages = len(level.stages) * 1.3 * level.stage_s
    return rungs + stages, 2 * level.warmup_s + level.closed_s + level.open_s


def test_levels_cost_what_they_say() -> None:
    capacity_s, round_s = cost_s("quick")
    assert 10 <= capacity_s + find_level("quick").rounds * round_s <= 15
    capacity_s, round_s = cost_s("standard")
    assert 20 <= capacity_s <= 30
    assert find_level("standard").rounds * round_s <= 60


def test_quick_is_provisional_and_goes_no_further_than_p90() -> None:
    quick, standard = find_level("quick"), find_level("standard")
    assert quick.provisional
    assert max(quick.percentiles) == 90
    assert not standard.provisional
    assert (quick.rounds, standard.rounds) == (3, 5)
    for level in (quick, standard, find_level("proof")):
        assert list(level.ladder) == sorted(level.ladder)
        assert list(level.stages) == sorted(level.stages)


def test_proof_is_the_method_in_full() -> None:
    proof = find_level("proof")
    capacity_s, round_s = cost_s("proof")
    assert capacity_s < 130
    assert round_s == 30
    assert not proof.provisional
    assert proof.served is None
    # At least 5 s of warm-up, 10 s of window, 8 rounds, and a p99 of every run.
    assert min(proof.warmup_s / 5, proof.closed_s / 10, proof.open_s / 10, proof.rounds / 8) >= 1
    assert all(is_earned(percentile, proof.requests) for percentile in proof.percentiles)
    assert proof.window_s(proof.open_s, 20) * 20 >= 1000


def test_windows_grow_for_slow_servers_within_bounds() -> None:
    quick = find_level("quick")
    assert quick.window_s(1.0, 1000) == 1.0
    assert quick.window_s(1.0, 50) == 2.0
    assert quick.window_s(1.0, 1) == quick.longest_s
    assert quick.window_s(1.0, 0) == quick.longest_s


def test_an_unknown_level_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="'prof'") as error:
        find_level("prof")
    assert "quick, standard, proof" in str(error.value)


def test_a_file_that_is_not_levels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "levels.yaml"
    shipped = LIBRARY.read_text(encoding="utf-8")
    path.write_text(shipped.replace("ladder_s: 0.4", "laddder_s: 0.4"), encoding="utf-8")
    with pytest.raises(DocumentError, match="laddder_s"):
        load_levels(path)


def test_a_level_with_fewer_rounds_at_most_than_at_first_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "levels.yaml"
    path.write_text(LIBRARY.read_text(encoding="utf-8").replace("most_rounds: 10", "most_rounds: 4"), encoding="utf-8")
    with pytest.raises(DocumentError, match="5 rounds and at most 4"):
        load_levels(path)


def test_a_level_without_a_bound_plays_its_rounds(tmp_path: Path) -> None:
    path = tmp_path / "levels.yaml"
    path.write_text(LIBRARY.read_text(encoding="utf-8").replace("    most_rounds: 10\n", ""), encoding="utf-8")
    assert load_levels(path)["standard"].most_rounds == load_levels(path)["standard"].rounds
