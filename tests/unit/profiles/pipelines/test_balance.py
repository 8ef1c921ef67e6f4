"""Replicas and workers for a rate."""

import itertools
import math

import pytest

from profiles.pipelines.balance import balance, crowded
from profiles.pipelines.documents import SpecPart, read_spec
from profiles.pipelines.measured import Measured
from registry.errors import InputError, NoVariantError
from tests.doubles.pipelines import numbers

STEPS = [{"name": "a"}, {"name": "b", "inputs": ["a"]}]
CHAIN = read_spec("p", SpecPart.model_validate({"steps": STEPS, "output": {"steps": ["b"]}}))


def test_each_step_has_the_fewest_replicas_below_its_saturation():
    known = Measured(steps={"a": {"x": numbers(10.0)}, "b": {"x": numbers(50.0)}})
    found = balance(CHAIN, known, 60, requests=5_000)
    assert [(one.step, one.replicas) for one in found.steps] == [("a", 1), ("b", math.ceil(60 / (20 * 0.85)))]
    assert (found.cost, found.unit, found.queues[0]) == (5.0, "CPUs", "b")
    assert all(one.utilisation <= 0.85 for one in found.steps)


def test_workers_and_replicas_are_the_cheapest_of_all():
    by_workers = {1: 20.0, 2: 36.0, 4: 80.0}
    step = numbers(50.0).model_copy(update={"by_workers": by_workers})
    for rate in (10, 25, 33, 70, 150):
        found = balance(CHAIN, Measured(steps={"a": {"x": numbers(1.0)}, "b": {"x": step}}), rate, requests=5_000)
        ways = itertools.product(by_workers, range(1, 20))
        least = min(w * r for w, r in ways if by_workers[w] * r * 0.85 >= rate)
        assert found.steps[1].cost == least


def test_replicas_are_added_for_a_limit_on_latency():
    known = Measured(steps={"a": {"x": numbers(10.0)}, "b": {"x": numbers(12.0, spread=1.0)}})
    loose = balance(CHAIN, known, 65, requests=10_000)
    p99 = loose.latency.percentiles[99].value
    tight = balance(CHAIN, known, 65, p99_ms=0.6 * p99, requests=10_000)
    assert tight.latency.percentiles[99].value <= 0.6 * p99
    assert tight.cost > loose.cost
    with pytest.raises(NoVariantError, match="no number of replicas"):
        balance(CHAIN, known, 65, p99_ms=15, requests=5_000)


def test_prices_count_where_all_have_one():
    known = Measured(
        steps={"a": {"x": numbers(10.0, price_per_hour=0.5)}, "b": {"x": numbers(10.0, price_per_hour=0.25)}}
    )
    found = balance(CHAIN, known, 50, requests=5_000)
    assert (found.cost, found.unit) == (0.75, "an hour")


def test_a_busy_step_is_warned_of_and_an_absurd_rate_refused():
    known = Measured(steps={"a": {"x": numbers(10.0)}, "b": {"x": numbers(10.0)}})
    found = balance(CHAIN, known, 89, margin=0.1, requests=5_000)
    assert len(list(crowded(found.steps))) == 2
    with pytest.raises(InputError, match="replicas"):
        balance(CHAIN, known, 1e9)
