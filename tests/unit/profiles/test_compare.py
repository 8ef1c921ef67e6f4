import math

import numpy as np
import pytest
from scipy import stats

from profiles.measure.compare import (
    BLOCK_FLOOR,
    compare_blocks,
    compare_pairs,
    looks_at,
    noise_floor,
    sign_flip_p,
    spent_at,
)
from registry.intervals import CONFIDENCE
from registry.records import Comparison


def compare(
    pairs: list[tuple[float, float]],
    metric: str = "max_throughput_rps",
    floor: float = 0.02,
    confidence: float = CONFIDENCE,
) -> Comparison:
    return compare_pairs(
        pairs,
        candidate_id="c",
        baseline_id="b",
        metric=metric,
        load=None,
        noise_floor=floor,
        confidence=confidence,
    )


TWICE = [(200.0, 100.0), (210.0, 104.0), (195.0, 98.0)]
SAME = [(100.0, 100.1), (104.0, 103.9), (98.0, 98.1)]


def test_words_for_a_rate() -> None:
    assert compare(TWICE).word == "faster"
    assert compare([(base, mine) for mine, base in TWICE]).word == "slower"
    assert compare(SAME).word == "equivalent"


def test_more_of_a_latency_is_slower() -> None:
    assert compare(TWICE, "latency_p90_ms").word == "slower"
    assert compare([(base, mine) for mine, base in TWICE], "latency_p90_ms").word == "faster"


def test_the_ratio_is_the_mean_of_logs() -> None:
    comparison = compare([(100.0, 50.0), (100.0, 200.0)])
    assert comparison.ratio.value == pytest.approx(1.0)
    assert comparison.word == "undecided"


def test_one_pair_decides_nothing() -> None:
    assert compare([(900.0, 1.0)]).word == "undecided"


def test_a_difference_within_the_noise_floor_is_none() -> None:
    five_percent = [(105.0, 100.0), (105.1, 100.0), (104.9, 100.0)]
    assert compare(five_percent).word == "faster"
    assert compare(five_percent, floor=0.08).word == "equivalent"


def test_nothing_is_equivalent_on_a_machine_that_cannot_tell() -> None:
    assert compare([(150.0, 100.0)] * 3, floor=0.8).word == "undecided"


def test_the_noise_floor_is_the_largest_a_a_difference_and_at_least_two_percent() -> None:
    assert noise_floor([]) == 0.02
    assert noise_floor([(100, 99.9)]) == 0.02
    assert noise_floor([(100, 110), (100, 99)]) == pytest.approx(0.1)
    assert noise_floor([(110, 100), (0, 5)]) == pytest.approx(0.1)


def test_sign_flips_are_exact() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_p([1.0] * 6) == 2 / 64
    assert sign_flip_p([1.0, -1.0]) == 1.0


def test_sign_flips_can_take_a_verdict_back() -> None:
    # One round of six goes a little the other way: the t-interval is clear of the floor, the permutation test is not.
    logs = [0.5, 0.5, 0.5, 0.5, 0.5, -0.01]
    assert sign_flip_p(logs) == 4 / 64
    comparison = compare([(math.exp(log), 1.0) for log in logs])
    assert comparison.ratio.low is not None
    assert comparison.ratio.low > 1.02
    assert comparison.word == "undecided"
    assert compare([(math.exp(log), 1.0) for log in [*logs[:5], 0.01]]).word == "faster"


@pytest.mark.parametrize("most", range(4, 16))
def test_a_difference_without_doubt_is_seen_at_every_look(most: int) -> None:
    first = most // 2
    for rounds in looks_at(first, most):
        pairs = [(200.0 + number % 2, 100.0) for number in range(rounds)]
        assert compare(pairs, confidence=1 - spent_at(rounds, first, most)).word == "faster", rounds


def test_no_rounds_and_no_rates_are_errors() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        compare([])
    with pytest.raises(ValueError, match="positive"):
        compare([(1.0, 0.0)])


def test_a_a_campaigns_declare_a_difference_in_at_most_five_percent() -> None:
    # Machine drift of 1 % a run and noise of 2 % a run, as a shared host has them; pairs in an order of chance.
    chance = np.random.default_rng(11)
    declared = 0
    for _ in range(200):
        drift = chance.normal(0, 0.01, 20).cumsum()
        times = np.exp(drift + chance.normal(0, 0.02, 20)).reshape(10, 2)
        pairs = [tuple(chance.permutation(pair)) for pair in times]
        declared += compare([(a, b) for a, b in pairs]).word in {"faster", "slower"}
    assert declared <= 10


def test_interleaved_pairs_find_a_real_difference_under_drift() -> None:
    chance = np.random.default_rng(12)
    found = 0
    for _ in range(100):
        drift = chance.normal(0, 0.01, 20).cumsum()
        times = np.exp(drift + chance.normal(0, 0.02, 20)).reshape(10, 2)
        found += compare([(1.15 * a, b) for a, b in times]).word == "faster"
    assert found >= 95


def test_looks_are_few_and_share_out_the_chance_to_err() -> None:
    assert looks_at(5, 10) == (5, 8, 10)
    assert looks_at(3, 3) == (3,)
    assert looks_at(5, 6) == (5, 6)
    assert spent_at(3, 3, 3) == pytest.approx(0.05)
    spent = [spent_at(rounds, 5, 10) for rounds in (5, 8, 10)]
    assert spent == pytest.approx([0.025, 0.015, 0.010])
    assert spent_at(2, 5, 10) == spent_at(6, 5, 10) == spent[0]  # rounds between looks are looked at as before


def campaigns(chance: np.random.Generator, count: int, variants: int, rho: float) -> np.ndarray:
    """(campaigns, 10 rounds, baseline twice and the variants) values of the same thing on a machine that drifts.

    With ``rho`` 1 the drift is a random walk of 1 % a slot; else it comes back, as an autoregressive process. Each run
    has 2 % of noise besides, and slots are in an order of chance.
    """
    slots = 2 + variants
    steps = chance.normal(0, 0.01, (count, 10 * slots))
    drift = np.zeros_like(steps)
    for place in range(1, 10 * slots):
        drift[:, place] = rho * drift[:, place - 1] + steps[:, place]
    values = np.exp(drift + chance.normal(0, 0.02, steps.shape)).reshape(count, 10, slots)
    return chance.permuted(values, axis=2)


def look_by_look(values: np.ndarray, variant: int, *, a_a: bool) -> str:
    """The word for one variant, with more rounds only while it is undecided."""
    word = "undecided"
    for rounds in looks_at(5, 10):
        base, again, mine = values[:rounds, 0], values[:rounds, 1], values[:rounds, 2 + variant]
        word = compare_pairs(
            list(zip(mine, base, strict=True)),
            candidate_id="c", baseline_id="b", metric="max_throughput_rps", load=None,
            noise_floor=noise_floor(list(zip(again, base, strict=True))) if a_a else 0.0,
            confidence=1 - spent_at(rounds, 5, 10),
        ).word  # fmt: skip
        if word != "undecided":
            break
    return word


@pytest.mark.parametrize("rho", [1.0, 0.9])
@pytest.mark.parametrize("a_a", [True, False])
def test_a_a_with_more_rounds_while_undecided_declares_a_difference_in_at_most_five_percent(
    rho: float, a_a: bool
) -> None:
    # Without a noise floor the shares alone have to hold the errors down.
    values = campaigns(np.random.default_rng(21), 200, 1, rho)
    words = [look_by_look(one, 0, a_a=a_a) for one in values]
    assert sum(word in {"faster", "slower"} for word in words) <= 10


def test_looking_again_at_the_full_chance_would_err_too_often() -> None:
    values = campaigns(np.random.default_rng(22), 600, 1, 1.0)
    logs = np.log(values[:, :, 2] / values[:, :, 0])

    def declared(rounds: int, alpha: float) -> np.ndarray:
        part = logs[:, :rounds]
        spread = part.std(axis=1, ddof=1) / math.sqrt(rounds)
        return np.abs(part.mean(axis=1)) > stats.t.ppf(1 - alpha / 2, rounds - 1) * spread

    at_once = np.any([declared(rounds, 0.05) for rounds in looks_at(5, 10)], axis=0).mean()
    shared = np.any([declared(rounds, spent_at(rounds, 5, 10)) for rounds in looks_at(5, 10)], axis=0).mean()
    assert shared <= 0.05 < at_once


def test_a_campaign_of_four_like_variants_declares_any_difference_in_at_most_five_percent() -> None:
    values = campaigns(np.random.default_rng(23), 200, 4, 1.0)
    declared = sum(
        any(look_by_look(one, variant, a_a=True) in {"faster", "slower"} for variant in range(4)) for one in values
    )
    assert declared <= 10


def test_more_rounds_find_what_fewer_leave_open() -> None:
    values = campaigns(np.random.default_rng(24), 100, 1, 1.0)
    values[:, :, 2] *= 1.12
    at_first = sum(
        compare_pairs(
            list(zip(one[:5, 2], one[:5, 0], strict=True)),
            candidate_id="c", baseline_id="b", metric="max_throughput_rps", load=None,
            noise_floor=noise_floor(list(zip(one[:5, 1], one[:5, 0], strict=True))),
            confidence=1 - spent_at(5, 5, 10),
        ).word == "faster"
        for one in values
    )  # fmt: skip
    assert sum(look_by_look(one, 0, a_a=True) == "faster" for one in values) > at_first


def blocks(values: list[float], baseline: list[float], metric: str = "max_throughput_rps") -> Comparison:
    return compare_blocks(values, baseline, candidate_id="c", baseline_id="b", metric=metric, load=None)


def test_runs_that_were_not_in_turns_show_only_large_differences() -> None:
    base = [100.0, 101.0, 99.0, 100.5]
    assert blocks([130.0, 131.0, 129.0], base).word == "undecided"
    assert blocks(base, base).word == "undecided"  # not even equivalent
    assert blocks([300.0, 310.0, 290.0], base).word == "faster"
    assert blocks([300.0, 310.0, 290.0], base, "latency_p90_ms").word == "slower"
    assert blocks([30.0, 31.0, 29.0], base).word == "slower"
    assert blocks([300.0], base).word == "undecided"
    same = blocks([200.0, 200.0], [100.0, 100.0])
    assert (same.ratio.low, same.ratio.high, same.word) == (pytest.approx(2), pytest.approx(2), "faster")
    with pytest.raises(ValueError, match="positive"):
        blocks([], base)


def test_blocks_of_like_runs_are_seldom_told_apart_though_their_intervals_are() -> None:
    # Ten runs of one, then ten of the other, on a machine whose drift is a random walk of 1 % a run.
    chance = np.random.default_rng(41)
    told = apart = 0
    for _ in range(200):
        times = np.exp(chance.normal(0, 0.01, 20).cumsum() + chance.normal(0, 0.02, 20))
        found = blocks(times[:10].tolist(), times[10:].tolist())
        told += found.word != "undecided"
        assert found.ratio.low is not None
        assert found.ratio.high is not None
        apart += not found.ratio.low <= 1 <= found.ratio.high
    assert told == 0
    assert apart > 0.25 * 200
    assert BLOCK_FLOOR > 0.38
