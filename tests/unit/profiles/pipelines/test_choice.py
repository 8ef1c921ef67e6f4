"""Variants under a budget: the program against enumeration, ties to what is not known, and the closest miss."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from profiles.pipelines.choice import Budget, Option, options_of, shortlist, surrogate_of
from profiles.pipelines.graph import Pipeline
from profiles.pipelines.measured import Measured
from registry.errors import InputError
from tests.doubles.pipelines import numbers, random_pipeline


def random_options(pipeline: Pipeline, chance: np.random.Generator, variants: int = 3) -> list[Option]:
    return [
        Option(
            step=name,
            variant=f"v{n}",
            latency_ms=float(chance.uniform(2, 20)),
            accuracy_drop=float(chance.uniform(0, 0.02)) if n else 0.0,
            memory_mb=float(chance.uniform(50, 400)),
            cost=float(chance.uniform(0.1, 1)),
        )
        for name in pipeline.names
        for n in range(variants)
    ]


def some(seed: int, steps: int = 5) -> tuple[Pipeline, list[Option]]:
    chance = np.random.default_rng(seed)
    pipeline = random_pipeline(chance, steps=steps, choices=False)
    return pipeline, random_options(pipeline, chance)


@pytest.mark.parametrize("objective", ["latency_ms", "accuracy_drop", "memory_mb", "cost"])
@pytest.mark.parametrize("seed", range(4))
def test_the_program_finds_what_enumeration_finds(objective: str, seed: int):
    pipeline, options = some(seed)
    every = [
        surrogate_of(pipeline, {one.step: one for one in chosen})
        for chosen in itertools.product(*([o for o in options if o.step == name] for name in pipeline.names))
    ]
    middle = {name: float(np.median([one[name] for one in every])) for name in every[0]}
    limits = {name: middle[name] for name in ("latency_ms", "accuracy_drop", "memory_mb") if name != objective}
    fitting = sorted(one[objective] for one in every if all(one[name] <= limits[name] for name in limits))
    for enumerated in (0, 10_000):
        found = shortlist(pipeline, options, objective=objective, budget=Budget(**limits), enumerated=enumerated)
        assert found.exact
        assert [one.surrogate[objective] for one in found.combinations] == pytest.approx(fitting[:3], rel=1e-5)
        assert found.bound == pytest.approx(fitting[0], rel=1e-4)
        assert found.relaxed is not None
        assert found.relaxed <= fitting[0] + 1e-6


@pytest.mark.parametrize("enumerated", [0, 10_000])
def test_a_budget_that_cannot_be_met_has_its_closest_miss(enumerated: int):
    pipeline, options = some(1)
    found = shortlist(
        pipeline, options, objective="cost", budget=Budget(memory_mb=10, accuracy_drop=1.0), enumerated=enumerated
    )
    assert found.combinations == ()
    least = sum(min(o.memory_mb or 0 for o in options if o.step == name) for name in pipeline.names)
    assert [(miss.quantity, miss.limit) for miss in found.misses] == [("memory_mb", 10)]
    assert found.misses[0].value == pytest.approx(least)


def test_what_is_not_known_is_never_chosen():
    pipeline, options = some(2, steps=2)
    first = pipeline.names[0]
    hidden = [
        Option(step=o.step, variant=o.variant, latency_ms=o.latency_ms) if o.step == first and o.variant != "v1" else o
        for o in options
    ]
    found = shortlist(pipeline, hidden, objective="memory_mb", budget=Budget())
    assert {one.variants[first] for one in found.combinations} == {"v1"}
    bare = [Option(step=o.step, variant=o.variant, latency_ms=o.latency_ms) if o.step == first else o for o in options]
    with pytest.raises(InputError, match=f"of step '{first}' cost is unknown") as refused:
        shortlist(pipeline, bare, objective="latency_ms", budget=Budget(cost=9))
    assert "burnish pipeline measure" in str(refused.value.hint)


def test_options_wait_at_the_rate_and_those_beyond_it_are_left_out():
    pipeline, _ = some(3, steps=1)
    name = pipeline.names[0]
    known = Measured(steps={name: {"fast": numbers(5.0), "slow": numbers(20.0, accuracy_drop=0.01)}})
    fast, slow = options_of(pipeline, known, rate_rps=100)
    assert (fast.latency_ms, fast.accuracy_drop) == (pytest.approx(7.5), 0.0)  # M/D/1 at half its capacity
    assert slow.latency_ms is None


def test_the_solver_prints_nothing():
    code = (
        "from tests.unit.profiles.pipelines.test_choice import some\n"
        "from profiles.pipelines.choice import *\n"
        "for seed in range(3):\n"
        "    p, o = some(seed, 20)\n"
        "    shortlist(p, o, objective='latency_ms', budget=Budget(memory_mb=3000, accuracy_drop=0.1))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert done.stdout == b""
