"""Random pipelines, exhaustive search over their ways, and a discrete-event simulation that knows nothing of ours."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import simpy

from profiles.pipelines.graph import Gathering, Join, Pipeline, Source, Step
from profiles.pipelines.measured import Measured, StepNumbers

JOINS: tuple[Join, ...] = ("inner", "inner", "any", "outer")


def random_pipeline(
    chance: np.random.Generator, *, steps: int, choices: bool = True, joins: tuple[Join, ...] = JOINS
) -> Pipeline:
    """A graph without cycles: each step takes the input, or one to three of the steps before it."""
    made: list[Step] = []
    routes: dict[str, dict[str, float]] = {}
    for n in range(steps):
        name = f"s{n}"
        fed = [int(m) for m in chance.permutation(n)[: chance.integers(0 if n < 2 else 1, 4)]]
        sources = []
        for m in fed:
            if choices and chance.random() < 0.25:
                share = float(chance.uniform(0.2, 0.8))
                shares = routes.setdefault(f"s{m}", {"yes": share, "no": 1 - share})
                tensor = str(chance.choice(list(shares)))
                sources.append(Source(step=f"s{m}", tensor=tensor, text=f"s{m}.outputs.{tensor}"))
            else:
                sources.append(Source(step=f"s{m}", text=f"s{m}"))
        if not fed:
            sources = [Source(step=None, side="inputs", text="random.inputs")]
        join = joins[int(chance.integers(len(joins)))]
        made.append(Step(name=name, inputs=Gathering(sources=tuple(sources), join=join, window_ms=1e7)))
    waited = {source.step for step in made for source in step.inputs.sources}
    last = tuple(Source(step=step.name, text=step.name) for step in made if step.name not in waited)
    output = Gathering(sources=last, join="any" if choices else "inner", window_ms=1e7)
    return Pipeline(name="random", steps=tuple(made), output=output, routes=routes)


def numbers(mean_ms: float, *, spread: float = 0.0, workers: int = 1, seed: int = 0, **more) -> StepNumbers:
    """A step that is held for gamma times of this mean and coefficient of variation, and saturates accordingly."""
    if spread:
        from scipy.stats import gamma

        shape = 1 / spread**2
        latencies = gamma.ppf((np.arange(400) + 0.5) / 400, shape, scale=mean_ms / shape)
        latencies *= mean_ms / latencies.mean()
    else:
        latencies = np.array([mean_ms])
    return StepNumbers(
        latency_ms=tuple(latencies.tolist()), saturation_rps=1000 * workers / mean_ms, workers=workers, **more
    )


def measured_of(pipeline: Pipeline, chance: np.random.Generator, **more) -> Measured:
    """Random service times of every step."""
    return Measured(
        steps={
            name: {"a": numbers(float(chance.uniform(2, 20)), spread=float(chance.uniform(0.1, 1.0)), **more)}
            for name in pipeline.names
        }
    )


# --- exhaustive search -----------------------------------------------------------------------------------------


def ways(pipeline: Pipeline) -> Iterator[tuple[dict[str, str | None], float]]:
    """Every way that the choosing steps can answer, with its share."""
    for chosen in itertools.product(*(shares.items() for shares in pipeline.routes.values())):
        yield (
            {step: one[0] for step, one in zip(pipeline.routes, chosen, strict=True)},
            math.prod(one[1] for one in chosen),
        )


def _trails(pipeline: Pipeline, gathering: Gathering, way: dict, times: dict) -> tuple[float, tuple[str, ...]] | None:
    """The time and the deciding path of a join, by looking at every path below it; None where it does not fire."""
    found = []
    for source in gathering.sources:
        if source.step is None:
            found.append((0.0, ()))
            continue
        shares = pipeline.routes.get(source.step, {})
        closed = source.tensor in shares and way[source.step] != source.tensor
        below = None if closed else _trails(pipeline, pipeline.step(source.step).inputs, way, times)
        found.append(None if below is None else (below[0] + times[source.step], (*below[1], source.step)))
    came = [one for one in found if one is not None]
    if not came or (gathering.join == "inner" and len(came) < len(found)):
        return None
    closes = min(came)[0] + gathering.window_ms
    if gathering.join == "outer" and (len(came) < len(found) or max(came)[0] > closes):
        return closes, min(came)[1]
    return min(came) if gathering.join == "any" else max(came)


def slowest_by_search(pipeline: Pipeline, times: dict[str, float]) -> tuple[float, tuple[str, ...]] | None:
    """The slowest answered way and its path; None where nothing is ever answered."""
    ends = [_trails(pipeline, pipeline.ending, way, times) for way, _ in ways(pipeline)]
    return max((end for end in ends if end is not None), default=None)


def visits_by_search(pipeline: Pipeline) -> dict[str, float]:
    """Messages a request, each step and way looked at by itself."""
    never = dict.fromkeys(pipeline.names, 0.0)
    return {
        name: sum(
            share
            for way, share in ways(pipeline)
            if _trails(pipeline, pipeline.step(name).inputs, way, never) is not None
        )
        for name in pipeline.names
    }


def all_paths(pipeline: Pipeline) -> Iterator[tuple[str, ...]]:
    """Every sequence of steps in which each waits for the one before it, from the input to the output."""
    for length in range(1, len(pipeline.names) + 1):
        for trail in itertools.combinations(pipeline.names, length):  # steps are numbered in their order
            linked = all(before in pipeline.before(name) for before, name in itertools.pairwise(trail))
            starts = any(source.step is None for source in pipeline.step(trail[0]).sources)
            if linked and starts and trail[-1] in pipeline.last:
                yield trail


# --- simulation ------------------------------------------------------------------------------------------------


def simulate(  # noqa: C901
    pipeline: Pipeline,
    services: dict[str, list[float]],
    servers: dict[str, int],
    rate_rps: float,
    *,
    requests: int,
    seed: int,
) -> np.ndarray:
    """Latency in ms of each answered request, after the first tenth: events in simpy, one after the other.

    Every step is a `simpy.Resource` that serves in the order of arrival.
    """
    env = simpy.Environment()
    chance = np.random.default_rng(seed)
    stations = {name: simpy.Resource(env, servers[name]) for name in pipeline.names}
    drawn = {name: iter(chance.choice(np.asarray(services[name]), requests + 1).tolist()) for name in pipeline.names}
    gaps = chance.exponential(1000 / rate_rps, requests).tolist()
    followers: dict[str, list[str]] = {name: [] for name in pipeline.names}
    for before, name in pipeline.edges:
        followers[before].append(name)
    latencies: list[float] = []

    class Request:
        def __init__(self, number: int) -> None:
            self.number, self.born = number, env.now
            self.done: set[str] = set()
            self.started: set[str] = set()
            self.answered = False
            self.way = {
                step: list(shares)[min(int(np.searchsorted(np.cumsum(list(shares.values())), draw)), len(shares) - 1)]
                for (step, shares), draw in zip(
                    pipeline.routes.items(), chance.random(len(pipeline.routes)), strict=True
                )
            }
            for step in pipeline.steps:
                if any(source.step is None for source in step.inputs.sources):
                    self.look(step.name)

        def came(self, gathering: Gathering) -> bool:
            here = [
                source.step is None
                or (
                    source.step in self.done
                    and (
                        source.tensor not in pipeline.routes.get(source.step, {})
                        or self.way[source.step] == source.tensor
                    )
                )
                for source in gathering.sources
            ]
            return any(here) if gathering.join == "any" else all(here)

        def look(self, name: str) -> None:
            if name not in self.started and self.came(pipeline.step(name).inputs):
                self.started.add(name)
                env.process(self.serve(name))

        def serve(self, name: str):
            with stations[name].request() as turn:
                yield turn
                yield env.timeout(next(drawn[name]))
            self.done.add(name)
            for following in followers[name]:
                self.look(following)
            if not self.answered and self.came(pipeline.ending):
                self.answered = True
                if self.number >= requests // 10:
                    latencies.append(env.now - self.born)

    def arrive():
        for number, gap in enumerate(gaps):
            yield env.timeout(gap)
            Request(number)

    env.process(arrive())
    env.run()
    return np.array(latencies)
