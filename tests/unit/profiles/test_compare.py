import math

import numpy as np
import pytest

from profiles.measure.compare import compare_pairs, noise_floor, sign_flip_p
from registry.records import Comparison


def compare(pairs: list[tuple[float, float]], metric: str = "max_throughput_rps", floor: float = 0.02) -> Comparison:
    return compare_pairs(pairs, candidate_id="c", baseline_id="b", metric=metric, load=None, noise_floor=floor)


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
