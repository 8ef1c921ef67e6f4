"""Estimates as people read them: as many figures as the interval earns, and plain words where nothing is known."""

import math

from registry.records import Estimate

NOT_KNOWN = "not known"
# Two figures of the interval's half width tell how far to trust the value; more would be noise.
INTERVAL_FIGURES = 2
MOST_FIGURES = 4
# For a value that nothing says the spread of.
DEFAULT_FIGURES = 3
# A ratio is read as "so many times"; a third decimal has never changed a decision.
RATIO_DECIMALS = 2
_UNIT_WORDS = {"1/s": "/s", "fraction": "", "1": ""}
# No host here measures finer, and log10 of less than this would ask for needless decimals.
_SMALLEST_WIDTH = 1e-9
_MOST_DECIMALS = 6


def number(estimate: Estimate | None) -> str:
    """The value alone, without its unit: ``1,237``, ``0.9844``, ``not known``."""
    return NOT_KNOWN if estimate is None else _fixed(estimate.value, _value_decimals(estimate))


def interval(estimate: Estimate | None) -> str:
    """The interval alone: ``[1,222, 1,252]``; empty where there is none, or where the value was counted."""
    return "" if estimate is None else _interval(estimate, decimals(estimate))


def text(estimate: Estimate | None) -> str:
    """Value, interval and unit: ``33.1 [32.0, 34.2] ms``, ``1.118 MB``, ``not known``."""
    if estimate is None:
        return NOT_KNOWN
    unit = _UNIT_WORDS.get(estimate.unit)
    places = decimals(estimate)
    ends = _interval(estimate, places)
    value = _fixed(estimate.value, _at_least_whole(places, estimate))
    return f"{value}{' ' if ends else ''}{ends}{f' {estimate.unit}' if unit is None else unit}"


def short(estimate: Estimate | None) -> str:
    """Value and unit, for a narrow place: ``33.1 ms``, ``1,237/s``, ``not known``."""
    if estimate is None:
        return NOT_KNOWN
    return number(estimate) + _UNIT_WORDS.get(estimate.unit, f" {estimate.unit}")


def times(estimate: Estimate | None) -> str:
    """A ratio: ``2.72×``; ``not known`` where there is none."""
    if estimate is None:
        return NOT_KNOWN
    return f"{_fixed(estimate.value, min(RATIO_DECIMALS, _value_decimals(estimate)))}×"


def times_interval(estimate: Estimate | None) -> str:
    """A ratio's interval: ``[2.66, 2.78]``; empty where there is none."""
    return "" if estimate is None else _interval(estimate, min(RATIO_DECIMALS, decimals(estimate)))


def plain(value: float, figures: int = DEFAULT_FIGURES) -> str:
    """A number that is no estimate (a limit, a rate that was set), with at most so many figures: ``50``, ``329.6``."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    places = max(1, min(_MOST_DECIMALS, figures - 1 - _magnitude(value)))
    return _fixed(value, places).rstrip("0").rstrip(".")


def decimals(estimate: Estimate) -> int:
    """Decimal places that the interval earns; negative means tens, hundreds and so on.

    So many that the half width of the interval shows `INTERVAL_FIGURES`, but the largest number in it no more than
    `MOST_FIGURES`. What was counted shows whole, or `DEFAULT_FIGURES` of a fraction.
    """
    low, value, high = estimate.low, estimate.value, estimate.high
    counted = estimate.method == "exact"
    if counted and float(value).is_integer():
        return 0
    width = half_width(estimate)
    if counted or width is None:
        return min(_MOST_DECIMALS, DEFAULT_FIGURES - 1 - _magnitude(value))
    largest = max(abs(value), abs(value if low is None else low), abs(value if high is None else high))
    most = MOST_FIGURES - 1 - _magnitude(largest)
    earned = INTERVAL_FIGURES - 1 - _magnitude(width) if width > _SMALLEST_WIDTH else most
    return min(_MOST_DECIMALS, earned, most)


def _value_decimals(estimate: Estimate) -> int:
    """As `decimals`, but an interval far wider than the value does not round the value's whole part away."""
    return _at_least_whole(decimals(estimate), estimate)


def _at_least_whole(places: int, estimate: Estimate) -> int:
    return places if places >= 0 else max(places, min(0, INTERVAL_FIGURES - 1 - _magnitude(estimate.value)))


def half_width(estimate: Estimate) -> float | None:
    """How far the interval reaches from the value, on its longer side; None where no end is known."""
    low, high = estimate.low, estimate.high
    below = None if low is None else abs(low - estimate.value)
    above = None if high is None else abs(high - estimate.value)
    if below is None or above is None:
        return above if below is None else below
    return max(below, above)


def _interval(estimate: Estimate, places: int) -> str:
    if estimate.method == "exact" or (estimate.low is None and estimate.high is None):
        return ""
    low = "…" if estimate.low is None else _fixed(estimate.low, places)
    high = "…" if estimate.high is None else _fixed(estimate.high, places)
    return f"[{low}, {high}]"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _fixed(value: float, places: int) -> str:
    rounded = round(value, places)
    if rounded == 0:
        rounded = 0.0  # never "-0.00"
    return f"{rounded:,.{max(places, 0)}f}"
