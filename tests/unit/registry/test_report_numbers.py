"""Estimates as text: figures that the interval earns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.records import Estimate, exact
from registry.report import numbers


def estimate(value: float, low: float | None, high: float | None, unit: str = "ms") -> Estimate:
    return Estimate(value=value, low=low, high=high, runs=3, method="t over runs", unit=unit)


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (1236.94, 1222.1, 1251.7, "1,237 [1,222, 1,252] ms"),
        (1236.94, 1090.0, 1390.0, "1,240 [1,090, 1,390] ms"),
        (17.3142, 16.21, 18.41, "17.3 [16.2, 18.4] ms"),
        (0.0011, -0.0022, 0.0044, "0.0011 [-0.0022, 0.0044] ms"),
        (0.0, 0.0, 0.0033, "0.0000 [0.0000, 0.0033] ms"),
        (455.3123, 455.31, 455.32, "455.3 [455.3, 455.3] ms"),
        (3.0, -500.0, 500.0, "3 [-500, 500] ms"),
        (31.2, 0.003, 351_234.0, "31 [0, 350,000] ms"),
        (-1234.0, -351_234.0, 3.0, "-1,200 [-350,000, 0] ms"),
        (12.345678, None, None, "12.3 ms"),
        (12.345678, None, 13.5, "12.3 […, 13.5] ms"),
        (0.0, None, None, "0.00 ms"),
    ],
)
def test_text_shows_as_many_figures_as_the_interval_earns(
    value: float, low: float | None, high: float | None, shown: str
) -> None:
    assert numbers.text(estimate(value, low, high)) == shown


def test_what_was_counted_has_no_interval() -> None:
    assert numbers.text(exact(1.118, "MB")) == "1.12 MB"
    assert numbers.text(exact(1_118_004, "bytes")) == "1,118,004 bytes"


def test_what_is_missing_is_said_so() -> None:
    assert numbers.text(None) == numbers.short(None) == numbers.times(None) == numbers.number(None) == "not known"
    assert numbers.interval(None) == ""


def test_units_are_written_as_read() -> None:
    assert numbers.short(estimate(1236.94, 1222.1, 1251.7, "1/s")) == "1,237/s"
    assert numbers.short(estimate(0.98442, 0.9773, 0.9915, "fraction")) == "0.9844"
    assert numbers.times(estimate(2.7167, 2.6567, 2.7767, "1")) == "2.72×"
    assert numbers.times(estimate(2.7167, 0.001, 7380.0, "1")) == "3×"


@pytest.mark.parametrize(
    ("value", "shown"), [(50.0, "50"), (0.01, "0.01"), (329.6, "329.6"), (29.64, "29.6"), (0.0, "0"), (12000, "12,000")]
)
def test_plain_numbers_lose_no_meaning(value: float, shown: str) -> None:
    assert numbers.plain(value) == shown


def test_a_rounded_zero_has_no_sign() -> None:
    assert numbers.number(estimate(-0.00001, -0.4, 0.4)) == "0.00"
    assert numbers.number(exact(-0.0, "ms")) == "0"


@given(
    value=st.floats(-1e9, 1e9, allow_subnormal=False),
    width=st.floats(1e-6, 1e9, allow_subnormal=False),
)
def test_a_shown_value_stays_inside_its_interval_or_near_it(value: float, width: float) -> None:
    made = estimate(value, value - width, value + width)
    shown = float(numbers.number(made).replace(",", ""))
    assert abs(shown - value) <= max(width, abs(value) * 0.001) * 0.51 or abs(value) < 1e-5
