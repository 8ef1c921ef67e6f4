from dataclasses import replace

import pytest

from profiles.measure.advice import advise
from profiles.measure.usl import UslFit
from registry.errors import InputError
from registry.records import Capacity

CAPACITY = Capacity(
    candidate_id="c",
    concurrency=8,
    ladder=((1, 100), (2, 180), (4, 300), (8, 400), (16, 405), (32, 403)),
    stages=(),
    saturation_rps=380,
)


def test_what_follows_from_a_capacity() -> None:
    told = advise(CAPACITY, for_rate_rps=1000)
    assert told.knee == 8
    assert told.target_rps == pytest.approx((304, 342))
    assert told.replicas == 4  # 380 less 15 % is 323
    assert isinstance(told.law, str)
    assert "Law does not fit" in told.lines[1]
    assert told.lines == (
        "More than 8 requests at a time only wait longer.",
        told.lines[1],
        "Give one replica 304 to 342 requests a second, 10 to 20 % below saturation.",
        "1000 requests a second take 4 replicas, each kept 15% below saturation.",
    )
    assert advise(CAPACITY, for_rate_rps=300).lines[-1].startswith("300 requests a second take 1 replica,")


def test_a_law_that_fits_is_told() -> None:
    batching = replace(CAPACITY, ladder=tuple((n, 1000 * n / (5 + 0.6 * n)) for n in (1, 2, 4, 8, 16, 32)))
    told = advise(batching)
    assert isinstance(told.law, UslFit)
    assert "11% of the work cannot be done side by side" in told.lines[1]
    assert told.replicas is None


def test_without_a_saturation_point_nothing_is_promised() -> None:
    told = advise(replace(CAPACITY, saturation_rps=None, ladder=()), for_rate_rps=10)
    assert (told.knee, told.target_rps, told.replicas) == (None, None, None)
    assert told.lines == ("No saturation point was found, so that no number of replicas follows.",)


def test_a_rate_that_is_none() -> None:
    with pytest.raises(InputError, match="cannot be served"):
        advise(CAPACITY, for_rate_rps=0)
