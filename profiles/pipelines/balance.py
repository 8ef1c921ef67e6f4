"""How many replicas and workers each step needs for a rate, at the least cost, and where queues would form."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from profiles.pipelines.analysis import Latency, predict_latency
from profiles.pipelines.graph import Pipeline, visits
from profiles.pipelines.measured import Measured, Station, StepNumbers, station_of
from profiles.pipelines.queueing import mean_wait
from profiles.serving.core2.sizing import MARGIN, replicas_for
from registry.errors import InputError, NoVariantError

MOST_REPLICAS = 1000
MOST_ADDED = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBalance:
    """What a step is given.

    Attributes:
        step: whose.
        workers: of each replica.
        replicas: how many.
        rate_rps: messages a second that it gets.
        utilisation: share of what its replicas sustain.
        queue: messages that wait, on average.
        wait_ms: how long each does, on average.
        cost: of all its replicas: the price an hour where all have one, else CPUs (workers).
    """

    step: str
    workers: int
    replicas: int
    rate_rps: float
    utilisation: float
    queue: float
    wait_ms: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Replicas and workers for a rate.

    Attributes:
        steps: in the pipeline's order.
        cost: of all.
        unit: of the cost.
        latency: predicted with them.
        queues: the steps by how many messages wait before them, the most first.
    """

    rate_rps: float
    steps: tuple[StepBalance, ...]
    cost: float
    unit: str
    latency: Latency
    queues: tuple[str, ...]


def balance(
    pipeline: Pipeline,
    measured: Measured,
    rate_rps: float,
    *,
    variants: Mapping[str, str] | None = None,
    margin: float = MARGIN,
    p99_ms: float | None = None,
    requests: int = 50_000,
    seed: int = 0,
) -> Balance:
    """What each step is to have so that the pipeline takes the rate, each kept below its saturation by a margin.

    Steps are independent of each other in throughput, so that the cheapest for each is the cheapest for all. For a
    limit on latency replicas are then added one at a time where they spare most waiting for their cost.

    Args:
        pipeline: without cycles.
        measured: of its steps; ``by_workers`` tells what other numbers of workers do.
        rate_rps: requests a second.
        variants: step -> variant, where it is not the first.
        margin: below saturation, 0.1 to 0.2.
        p99_ms: what the pipeline's p99 is to stay below, or None.
        requests: of the sampled path that predicts latency.
        seed: of it.

    Raises:
        InputError: a step was not measured, or the numbers cannot be.
        NoVariantError: no number of replicas keeps the limit.
    """
    check_p99(p99_ms)
    counts = visits(pipeline)
    chosen = variants or {}
    numbers = {name: measured.of(name, chosen.get(name)) for name in pipeline.names}
    priced = all(one.price_per_hour is not None for one in numbers.values())
    found = {name: _cheapest(numbers[name], rate_rps * counts[name], margin, priced) for name in pipeline.names}
    rates = {name: rate_rps * counts[name] for name in pipeline.names}

    def predicted() -> Latency:
        stations = {name: one.station for name, one in found.items()}
        return predict_latency(pipeline, stations, rate_rps, requests=requests, seed=seed)

    latency = predicted()
    if p99_ms is not None:
        _check_reachable(pipeline, found, p99_ms, requests, seed)
        added = 0
        while latency.percentiles[99].value > p99_ms:
            name = max(found, key=lambda one: found[one].spared(rates[one]) * latency.steps[one].decides)
            found[name] = found[name].more()
            latency = predicted()
            added += 1
            if added > MOST_ADDED:
                raise _unkept(p99_ms, latency)
    steps = tuple(_row(name, found[name], rates[name]) for name in pipeline.names)
    return Balance(
        rate_rps=rate_rps,
        steps=steps,
        cost=sum(step.cost for step in steps),
        unit="an hour" if priced else "CPUs",
        latency=latency,
        queues=tuple(step.step for step in sorted(steps, key=lambda one: -one.queue)),
    )


def check_p99(p99_ms: float | None) -> None:
    """Returns where a limit on p99 can be one.

    Raises:
        InputError: it is no number above 0.
    """
    if p99_ms is not None and not (math.isfinite(p99_ms) and p99_ms > 0):
        raise InputError(f"a p99 of {p99_ms:g} ms cannot be kept", hint="It is a number above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    numbers: StepNumbers
    replicas: int
    each: float

    @property
    def station(self) -> Station:
        return station_of(self.numbers, self.replicas)

    def more(self) -> "_Option":
        return replace(self, replicas=self.replicas + 1)

    def wait(self, rate_rps: float) -> float:
        station = self.station
        return mean_wait(
            rate_rps / 1000, servers=station.servers, service=station.mean_ms, variability=station.variability
        )

    def spared(self, rate_rps: float) -> float:
        """Waiting that one more replica spares, for its cost."""
        return (self.wait(rate_rps) - self.more().wait(rate_rps)) / self.each


def _cheapest(numbers: StepNumbers, rate_rps: float, margin: float, priced: bool) -> _Option:
    known = {**numbers.by_workers, numbers.workers: numbers.saturation_rps}
    options = []
    for workers, saturation in sorted(known.items()):
        replicas = replicas_for(rate_rps, saturation, margin) if rate_rps > 0 else 1
        if replicas > MOST_REPLICAS:
            raise InputError(
                f"{rate_rps:g} messages a second would take {replicas} replicas", hint="Is the rate right?"
            )
        own = numbers.model_copy(update={"workers": workers, "saturation_rps": saturation})
        each = (numbers.price_per_hour or 0.0) if priced else float(workers)
        options.append(_Option(numbers=own, replicas=replicas, each=each))
    return min(options, key=lambda one: (one.replicas * one.each, one.replicas))


def _row(name: str, option: _Option, rate_rps: float) -> StepBalance:
    wait = option.wait(rate_rps)
    return StepBalance(
        step=name,
        workers=option.numbers.workers,
        replicas=option.replicas,
        rate_rps=rate_rps,
        utilisation=rate_rps / (option.replicas * option.numbers.saturation_rps),
        queue=wait * rate_rps / 1000,
        wait_ms=wait,
        cost=option.replicas * option.each,
    )


def _check_reachable(pipeline: Pipeline, found: Mapping[str, _Option], p99_ms: float, requests: int, seed: int) -> None:
    """Whether the limit is kept where nobody ever waits."""
    alone = {name: replace(one, replicas=MOST_REPLICAS).station for name, one in found.items()}
    # So slow that no request meets another.
    lone = predict_latency(pipeline, alone, 1e-3, requests=min(requests, 20_000), seed=seed)
    if lone.percentiles[99].value > p99_ms:
        raise _unkept(p99_ms, lone)


def _unkept(p99_ms: float, latency: Latency) -> NoVariantError:
    return NoVariantError(
        f"no number of replicas keeps p99 at {p99_ms:g} ms: without any waiting it is about "
        f"{latency.percentiles[99].value:.4g} ms",
        hint="Choose faster variants (burnish pipeline choose), or a higher limit.",
    )


def crowded(steps: Sequence[StepBalance], share: float = 0.85) -> Iterator[str]:
    """Warnings for steps so busy that a queue forms before them."""
    for step in steps:
        if step.utilisation > share or not math.isfinite(step.wait_ms):
            yield (
                f"{step.step} is busy to {step.utilisation:.0%}: messages queue before it ({step.queue:.2g} on average)"
            )
