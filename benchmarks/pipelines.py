"""What burnish says of pipelines, held against exhaustive search, a discrete-event simulation and real servers.

1. On 500 random graphs of up to 8 steps: the path of the slowest requests, what saturates first, and its path.
2. p50 and p99 below 80 % load, against simpy, on graphs with joins, branches and several servers a step.
3. Variants: against enumeration on small graphs; on graphs of 50 steps against the bound that branch and bound makes of
   linear relaxations. How far the single relaxation of the whole lies from it is told beside: that much a mixture of
   variants could have, and no combination.
4. ``examples/pipeline`` on real servers of this machine: its saturation against what its steps alone predict.
"""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from figures import figure, finish, say

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the simulation and the searches are the tests' own

from profiles.measure.levels import find_level  # noqa: E402
from profiles.pipelines.analysis import (  # noqa: E402
    limits,
    path_through,
    pipeline_limits,
    predict_latency,
    slowest_walk,
    stations_of,
)
from profiles.pipelines.choice import Budget, Option, Quantity, shortlist, surrogate_of  # noqa: E402
from profiles.pipelines.documents import load_plan  # noqa: E402
from profiles.pipelines.graph import Pipeline  # noqa: E402
from profiles.pipelines.measured import Measured  # noqa: E402
from registry.errors import InputError  # noqa: E402
from tests.doubles.pipelines import (  # noqa: E402
    all_paths,
    numbers,
    random_pipeline,
    simulate,
    slowest_by_search,
    visits_by_search,
)

GRAPHS, MOST_STEPS = 500, 8
SIMULATED, SIMULATED_REQUESTS, SAMPLED_REQUESTS = 14, 100_000, 400_000
ENUMERATED, LARGE, LARGE_STEPS = 60, 8, 50
ROUNDS = 5
EXAMPLE = HERE.parent / "examples" / "pipeline"


def paths() -> list[bool]:
    """Graphs on which burnish and exhaustive search say otherwise."""
    wrong_path = wrong_first = 0
    for seed in range(GRAPHS):
        chance = np.random.default_rng(seed)
        pipeline = random_pipeline(chance, steps=int(chance.integers(1, MOST_STEPS + 1)))
        times = {name: float(chance.uniform(1, 20)) for name in pipeline.names}
        visits = visits_by_search(pipeline)
        rates = {name: 1000 / times[name] / visits[name] for name in pipeline.names if visits[name]}
        first = limits(pipeline, {name: 1000 / spent for name, spent in times.items()})[0]
        wrong_first += first.what != min(rates, key=rates.__getitem__)
        holding = [path for path in all_paths(pipeline) if first.what in path]
        longest = max(holding, key=lambda path: sum(times[one] for one in path))
        wrong_path += path_through(pipeline, times, first.what) != longest
        slowest = slowest_by_search(pipeline, times)
        try:
            found = slowest_walk(pipeline, times)
            wrong_path += slowest is None or found.path != slowest[1] or abs(found.end_ms - slowest[0]) > 1e-6
        except InputError:
            wrong_path += slowest is not None
    say(f"{GRAPHS} graphs of up to {MOST_STEPS} steps")
    return [
        figure("pipeline_paths_wrong", wrong_path, "<= 0"),
        figure("pipeline_bottlenecks_wrong", wrong_first, "<= 0"),
    ]


def latency() -> list[bool]:
    """The largest error of p50 and of p99."""
    errors: dict[int, list[float]] = {50: [], 99: []}
    seed = 0
    while len(errors[50]) < SIMULATED:
        seed += 1
        chance = np.random.default_rng(10_000 + seed)
        pipeline = random_pipeline(chance, steps=int(chance.integers(2, 9)), joins=("inner", "inner", "any"))
        measured = Measured(
            steps={
                name: {
                    "a": numbers(
                        float(chance.uniform(2, 20)),
                        spread=float(chance.uniform(0.1, 1)),
                        workers=int(chance.integers(1, 4)),
                    )
                }
                for name in pipeline.names
            }
        )
        load = float(chance.uniform(0.2, 0.79))
        rate = load * pipeline_limits(pipeline, measured)[0].rate_rps
        stations = stations_of(pipeline, measured)
        try:
            found = predict_latency(pipeline, stations, rate, requests=SAMPLED_REQUESTS)
        except InputError:  # a graph that never answers
            continue
        simulated = simulate(
            pipeline,
            {name: station.services_ms.tolist() for name, station in stations.items()},
            {name: station.servers for name, station in stations.items()},
            rate,
            requests=SIMULATED_REQUESTS,
            seed=seed,
        )
        for percentile, seen in errors.items():
            seen.append(abs(found.percentiles[percentile].value / float(np.percentile(simulated, percentile)) - 1))
        say(f"{len(pipeline.names)} steps at {load:.0%}: p50 off by {errors[50][-1]:.1%}, p99 by {errors[99][-1]:.1%}")
    return [
        figure("pipeline_p50_error", max(errors[50]), "<= 0.10"),
        figure("pipeline_p99_error", max(errors[99]), "<= 0.10"),
    ]


def options(pipeline: Pipeline, chance: np.random.Generator, variants: int = 4) -> list[Option]:
    """Variants that trade accuracy for time, memory and cost."""
    found = []
    for name in pipeline.names:
        slow_ms, memory_mb, cost = (float(chance.uniform(*ends)) for ends in ((5, 20), (100, 400), (0.1, 0.5)))
        for n, share in enumerate([1.0, *np.sort(chance.uniform(0.25, 1, variants - 1))[::-1].tolist()]):
            found.append(
                Option(
                    step=name,
                    variant=f"v{n}",
                    latency_ms=slow_ms * share,
                    accuracy_drop=(1 - share) * float(chance.uniform(0.002, 0.02)),
                    memory_mb=memory_mb * float(chance.uniform(0.3, 1.0)) if n else memory_mb,
                    cost=cost * float(chance.uniform(0.4, 1.1)) if n else cost,
                )
            )
    return found


def budgets(pipeline: Pipeline, made: list[Option], variants: int = 4) -> list[tuple[Quantity, Budget]]:
    """An objective each with budgets half way between the slowest and the fastest variants."""
    slow, fast = (
        surrogate_of(pipeline, {one.step: one for one in made if one.variant == name})
        for name in ("v0", f"v{variants - 1}")
    )
    latency_ms = (slow["latency_ms"] + fast["latency_ms"]) / 2
    drop, memory_mb = 0.5 * fast["accuracy_drop"], 0.8 * slow["memory_mb"]
    return [
        ("accuracy_drop", Budget(latency_ms=latency_ms, memory_mb=memory_mb)),
        ("latency_ms", Budget(accuracy_drop=drop, memory_mb=memory_mb)),
        ("cost", Budget(latency_ms=latency_ms, accuracy_drop=drop, memory_mb=memory_mb)),
    ]


def choices() -> list[bool]:
    """How often the program misses the best, and how far it is from the bound on large graphs."""
    wrong = asked = 0
    for seed in range(ENUMERATED):
        chance = np.random.default_rng(seed)
        pipeline = random_pipeline(chance, steps=int(chance.integers(1, 7)), choices=False)
        made = options(pipeline, chance)
        for objective, budget in budgets(pipeline, made):
            every = shortlist(pipeline, made, objective=objective, budget=budget, enumerated=10**6)
            solved = shortlist(pipeline, made, objective=objective, budget=budget, enumerated=0)
            asked += 1
            have, has = ([one.surrogate[objective] for one in found.combinations] for found in (every, solved))
            wrong += len(have) != len(has) or not np.allclose(have, has, rtol=1e-5, atol=1e-9)
    say(f"{asked} shortlists by enumeration and by the program")
    gaps, relaxed, took = [], [], []
    for seed in range(LARGE):
        chance = np.random.default_rng(seed)
        pipeline = random_pipeline(chance, steps=LARGE_STEPS, choices=False)
        made = options(pipeline, chance)
        for objective, budget in budgets(pipeline, made):
            begin = time.perf_counter()
            found = shortlist(pipeline, made, objective=objective, budget=budget)
            took.append(time.perf_counter() - begin)
            best = found.combinations[0].surrogate[objective]
            gaps.append(best / (found.bound or np.nan) - 1)
            relaxed.append(best / (found.relaxed or np.nan) - 1)
    say(f"{LARGE_STEPS} steps: above the single relaxation by {np.median(relaxed):.2%}, at most {max(relaxed):.2%}")
    return [
        figure("pipeline_shortlists_not_best", wrong, "<= 0"),
        figure("pipeline_shortlist_above_bound", max(gaps), "<= 0.01"),
        figure("pipeline_shortlist_50_steps_s", max(took), "<= 10"),
    ]


def example() -> list[bool]:
    """The predicted saturation of the example against the measured one, the median of some rounds."""
    from optimize.pipelines import measure_plan, quicker

    if not (EXAMPLE / "data" / "evaluation.npz").is_file():
        subprocess.run([sys.executable, str(EXAMPLE / "prepare.py")], check=True)
    plan = load_plan(EXAMPLE / "plan.yaml")
    ratios = []
    for number in range(ROUNDS):
        # Steps and the whole in turn: what a machine does beside changes slowly.
        with TemporaryDirectory(prefix="burnish-pipelines-") as work:
            level = quicker(find_level("quick"))
            measured = measure_plan(plan, level=level, work=Path(work), metric=None, variants=False, seed=number)
        first = pipeline_limits(plan.pipeline, measured)[0]
        seen = np.nan if measured.whole is None else measured.whole.saturation_rps or np.nan
        ratios.append(first.rate_rps / seen)
        alone = ", ".join(f"{name} {measured.of(name).saturation_rps:.4g}" for name in plan.pipeline.names)
        say(f"{alone} a second alone; predicted {first.rate_rps:.4g}, by {first.what}; measured {seen:.4g}")
    return [figure("pipeline_saturation_error", abs(float(np.median(ratios)) - 1), "<= 0.15")]


def main() -> None:
    """All four."""
    finish(*paths(), *latency(), *choices(), *example())


if __name__ == "__main__":
    main()
