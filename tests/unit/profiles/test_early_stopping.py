import numpy as np
import pytest

from profiles.measure.early_stopping import decide, most_over, requests_needed, requests_to_estimate, upper_bound
from profiles.measure.percentiles import EARNED


@pytest.mark.parametrize(
    ("percentile", "confidence", "needed"),
    [
        (90, 0.95, (29, 46, 61, 103, 167, 627)),
        (95, 0.95, (59, 93, 124, 208, 336, 1260)),
        (99, 0.95, (299, 473, 628, 1049, 1693, 6323)),
        (99, 0.99, (459, 662, 838, 1307, 2010, 6898)),
        (99.9, 0.95, (2995, 4742, 6294, 10511, 16959, 63281)),
    ],
)
def test_requests_needed_are_those_of_the_binomial(percentile: float, confidence: float, needed: tuple[int]) -> None:
    assert tuple(requests_needed(percentile, over, confidence) for over in (0, 1, 2, 5, 10, 50)) == needed


def test_the_fewest_requests_are_loadgens() -> None:
    assert requests_needed(99, 1) == 662
    assert requests_needed(90, 1) == 64


@pytest.mark.parametrize(("percentile", "count"), [(90, 23_886), (95, 50_425), (97, 85_811), (99, 262_742)])
def test_requests_to_estimate_are_mlperfs_table(percentile: float, count: int) -> None:
    assert requests_to_estimate(percentile) == count


@pytest.mark.parametrize(("requests", "discarded"), [(2048, 172), (4_776_846, 476_158)])
def test_so_many_are_discarded_as_loadgen_prints(requests: int, discarded: int) -> None:
    assert most_over(90, requests) == discarded + 1


@pytest.mark.parametrize("percentile", [50, 90, 95, 99])
@pytest.mark.parametrize("over", [0, 1, 7])
def test_one_request_fewer_decides_nothing(percentile: int, over: int) -> None:
    needed = requests_needed(percentile, over)
    assert decide(percentile, over, needed) == "kept"
    assert decide(percentile, over, needed - 1) != "kept"
    assert most_over(percentile, needed) == over
    assert most_over(percentile, needed - 1) == (over - 1 if over else None)


def test_a_limit_is_missed_by_too_many() -> None:
    assert decide(99, 10, 1000) == "undecided"
    assert decide(99, 30, 1000) == "missed"
    assert decide(99, 1, 1) == "missed"  # one in a hundred servers at the limit shows that
    assert decide(90, 1, 1) == "undecided"
    with pytest.raises(ValueError, match="cannot be over"):
        decide(99, 11, 10)


def test_the_bound_is_a_value_that_was_measured() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, 663.0))
    assert upper_bound(values, 99) == 662
    assert upper_bound(values[1:], 99) is None
    assert upper_bound(np.arange(1.0, 2049.0), 90) == 2048 - 172


def test_what_decides_is_never_more_than_what_is_printed() -> None:
    assert all(requests_needed(percentile, 1) <= count for percentile, count in EARNED.items())


def test_the_bound_holds_as_often_as_it_says_where_requests_are_independent() -> None:
    drawn = np.random.default_rng(3).exponential(1, (1000, 700))
    true = -np.log(0.01)
    assert np.mean([upper_bound(values, 99) < true for values in drawn]) <= 0.017  # 1 % and three deviations


def test_limits_are_wrongly_kept_or_missed_as_seldom_as_it_says() -> None:
    over = np.random.default_rng(4).binomial(2000, 0.01, 1000)
    found = [decide(99, int(count), 2000) for count in over]
    assert found.count("kept") <= 17
    assert found.count("missed") <= 17
