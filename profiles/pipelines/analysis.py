"""Where a pipeline saturates, what decides its latency, and what a better variant of one step would buy.

Throughput: a step that gets ``v`` messages a request saturates the pipeline at ``capacity / v`` requests a second; the
least of these is the pipeline's. Servers that share one machine's CPUs are limited together besides. Source: the pages
on testing pipelines of Seldon Core 2's guide to performance tuning, extended to steps that not every request visits.

Latency: percentiles do not add up, so requests are followed through the graph by a sampled path: Poisson arrivals,
service times drawn from those measured, queues by the recursions of `profiles.pipelines.queueing`, joins by the latest
or the first of what they wait for. Steps after a fork see correlated arrivals, as they do in truth.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from profiles.pipelines.graph import Gathering, Pipeline, Routing, Source, comes, find_cycle, in_order, routings, visits
from profiles.pipelines.measured import Measured, Station, StepNumbers, station_of
from profiles.pipelines.queueing import Times, departures
from registry.errors import InputError
from registry.records import Estimate

REQUESTS = 100_000
WARMUP_SHARE = 0.1
BATCHES = 20
PERCENTILES = (50, 90, 99)
# Student's t for 19 degrees of freedom, 95 %, two-sided.
_T = 2.093
MOST_ROUTINGS = 64
_BISECTIONS = 50
HOST = "the CPUs that all servers share"


# --- throughput ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What one step, or the shared machine, lets through.

    Attributes:
        what: the step, or `HOST`.
        rate_rps: requests a second to the pipeline at which it saturates; infinite where no request comes by.
        visits: messages it gets for a request.
    """

    what: str
    rate_rps: float
    visits: float


def limits(
    pipeline: Pipeline,
    capacities: Mapping[str, float],
    *,
    cpu_ms: Mapping[str, float] | None = None,
    shared_cpus: float | None = None,
) -> tuple[Limit, ...]:
    """What each step lets through, the least first.

    Args:
        pipeline: the graph.
        capacities: step -> messages a second that all its replicas sustain together.
        cpu_ms: step -> CPU time of one message, where servers share CPUs.
        shared_cpus: how many CPUs these are.
    """
    counts = visits(pipeline)
    found = [
        Limit(what=name, rate_rps=capacities[name] / counts[name] if counts[name] else math.inf, visits=counts[name])
        for name in pipeline.names
    ]
    if shared_cpus is not None and cpu_ms:
        used = sum(counts[name] * cpu_ms.get(name, 0.0) for name in pipeline.names)
        if used > 0:
            found.append(Limit(what=HOST, rate_rps=1000 * shared_cpus / used, visits=1.0))
    return tuple(sorted(found, key=lambda one: one.rate_rps))


# --- one walk through the graph --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """One request's way through the graph, each step taking a given time.

    Attributes:
        ready_ms: step -> when it has what it waits for; steps that never do are missing.
        finish_ms: step -> when it has answered.
        end_ms: when the pipeline has answered; infinite where it does not.
        path: the steps that decided when, first to last.
    """

    ready_ms: Mapping[str, float]
    finish_ms: Mapping[str, float]
    end_ms: float
    path: tuple[str, ...]


def walk(pipeline: Pipeline, durations_ms: Mapping[str, float], routing: Routing, order: Sequence[str] = ()) -> Walk:
    """A request's way when the choosing steps answer so; `order` where it is known spares finding it."""
    ready: dict[str, float] = {}
    finish: dict[str, float] = {}
    via: dict[str, Source] = {}

    def gather(gathering: Gathering) -> tuple[float, Source | None]:
        came: list[tuple[float, Source]] = []
        for source in gathering.sources:
            if comes(source, finish.keys(), routing, pipeline):  # type: ignore[arg-type]
                times = ready if source.side == "inputs" else finish
                came.append((0.0 if source.step is None else times[source.step], source))
        return _joined(gathering, came)

    for name in order or in_order(pipeline):
        step = pipeline.step(name)
        when, source = gather(step.inputs)
        if step.triggers is not None:
            after, trigger = gather(step.triggers)
            when, source = (after, trigger) if after > when or trigger is None else (when, source)
        if source is not None and math.isfinite(when):
            ready[name], via[name] = when, source
            finish[name] = when + durations_ms[name]
    end, source = gather(pipeline.ending)
    path: list[str] = []
    while source is not None and source.step is not None:
        path += [source.step] if source.side == "outputs" else []
        source = via[source.step]
    return Walk(ready_ms=ready, finish_ms=finish, end_ms=end, path=tuple(reversed(path)))


def _joined(gathering: Gathering, came: list[tuple[float, Source]]) -> tuple[float, Source | None]:
    """When a join fires, and by which source; (infinite, None) where it does not."""
    if not came or (gathering.join == "inner" and len(came) < len(gathering.sources)):
        return math.inf, None
    first = min(came, key=lambda one: one[0])
    last = max(came, key=lambda one: one[0])
    if gathering.join == "any":
        return first
    if gathering.join == "inner":
        return last
    closes = first[0] + gathering.window_ms
    return last if len(came) == len(gathering.sources) and last[0] <= closes else (closes, first[1])


def slowest_walk(pipeline: Pipeline, durations_ms: Mapping[str, float]) -> Walk:
    """The way of those requests that take longest, over all that the choosing steps can answer.

    Raises:
        InputError: the pipeline goes round, or never answers.
    """
    order = in_order(pipeline)
    walks = (walk(pipeline, durations_ms, routing, order) for routing, _ in routings(pipeline))
    answered = [one for one in walks if math.isfinite(one.end_ms)]
    if not answered:
        raise InputError(f"the pipeline {pipeline.name!r} never answers", hint="See burnish pipeline check.")
    return max(answered, key=lambda one: one.end_ms)


def path_through(pipeline: Pipeline, durations_ms: Mapping[str, float], step: str) -> tuple[str, ...]:
    """The path from input to output that holds this step and takes longest; where nobody waits for it, it ends there.

    Raises:
        InputError: the pipeline goes round.
    """
    order = in_order(pipeline)
    after: dict[str, list[str]] = {name: [] for name in order}
    for before, name in pipeline.edges:
        after[before].append(name)
    nothing: tuple[float, tuple[str, ...]] = (0.0, ())
    to: dict[str, tuple[float, tuple[str, ...]]] = {}
    onward: dict[str, tuple[float, tuple[str, ...]]] = {}
    for name in order:
        length, path = max((to[before] for before in pipeline.before(name)), default=nothing)
        to[name] = (length + durations_ms[name], (*path, name))
    for name in reversed(order):
        ways = [onward[following] for following in after[name] if following in onward]
        if ways or name in pipeline.last:
            length, path = max(ways, default=nothing)
            onward[name] = (length + durations_ms[name], (name, *path))
    return (*to[step][1], *onward[step][1][1:]) if step in onward else to[step][1]


def slacks(pipeline: Pipeline, durations_ms: Mapping[str, float]) -> dict[str, float]:
    """Step -> by how many ms it may become slower before any request does; infinite where none ever would.

    The largest addition to the step's time, all others kept, that leaves every way through the choices as long as it
    is; of at most `MOST_ROUTINGS` ways.
    """
    order = in_order(pipeline)
    ways = [routing for routing, _ in islice(routings(pipeline), MOST_ROUTINGS)]
    before = [walk(pipeline, durations_ms, routing, order).end_ms for routing in ways]
    far = 1e3 * (1 + sum(durations_ms.values()))

    def later(name: str, added: float) -> bool:
        changed = {**durations_ms, name: durations_ms[name] + added}
        ends = (walk(pipeline, changed, routing, order).end_ms for routing in ways)
        return any(end > was * (1 + 1e-12) + 1e-9 for end, was in zip(ends, before, strict=True) if math.isfinite(was))

    found = {}
    for name in pipeline.names:
        low, high = 0.0, far
        if not later(name, far):
            found[name] = math.inf
            continue
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if later(name, middle) else (middle, high)
        found[name] = 0.0 if high < 1e-6 else low
    return found


# --- many requests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLatency:
    """One step at an offered rate.

    Attributes:
        utilisation: share of time that its servers are held.
        wait_ms: mean wait before service.
        sojourn_ms: mean of wait, service and what it takes beside.
        decides: share of requests whose latency it is a part of.
        queue: mean number of messages that wait.
    """

    utilisation: float
    wait_ms: float
    sojourn_ms: float
    decides: float
    queue: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """The pipeline's latency at an offered rate.

    Attributes:
        rate_rps: requests a second.
        percentiles: 50, 90, 99 -> ms, with an interval over `BATCHES` parts of the sampled path.
        mean_ms: of all answered requests.
        steps: step -> what it contributes.
        paths: (path, share of requests whose latency it decided), the most frequent first.
        answered: share of requests that are answered at all.
    """

    rate_rps: float
    percentiles: Mapping[int, Estimate]
    mean_ms: Estimate
    steps: Mapping[str, StepLatency]
    paths: tuple[tuple[tuple[str, ...], float], ...]
    answered: float


def predict_latency(
    pipeline: Pipeline,
    stations: Mapping[str, Station],
    rate_rps: float,
    *,
    requests: int = REQUESTS,
    seed: int = 0,
    overhead_ms: float = 0.0,
) -> Latency:
    """The latency of requests that arrive at random (Poisson) at a rate.

    Args:
        pipeline: without cycles.
        stations: step -> its queue.
        rate_rps: offered to the pipeline, below its saturation.
        requests: in the sampled path; the first tenth is left out.
        seed: equal seeds meet equal arrivals and choices, so that variants can be compared.
        overhead_ms: added at each step: what moving its data takes.

    Raises:
        InputError: the pipeline goes round, or the rate is not below what a step can do.
    """
    order = in_order(pipeline)
    _check_rate(pipeline, stations, rate_rps)
    chance = np.random.default_rng(seed)
    arrivals = np.cumsum(chance.exponential(1000 / rate_rps, requests))
    choices = _choices(pipeline, requests, chance)
    sampled = _Sampled(pipeline, arrivals, choices)
    for name in order:
        own = np.random.default_rng((seed, pipeline.names.index(name)))
        sampled.serve(name, stations[name], own, overhead_ms)
    return sampled.summary(rate_rps, stations, order)


def _check_rate(pipeline: Pipeline, stations: Mapping[str, Station], rate_rps: float) -> None:
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise InputError(f"a rate of {rate_rps} requests a second", hint="It is above 0.")
    if missing := [name for name in pipeline.names if name not in stations]:
        raise InputError(f"step {missing[0]!r} is unknown: it was not measured", hint="See burnish pipeline measure.")
    first = limits(pipeline, {name: station.capacity_rps for name, station in stations.items()})[0]
    if rate_rps >= first.rate_rps:
        raise InputError(
            f"at {rate_rps:g} requests a second {first.what!r} is beyond its saturation ({first.rate_rps:.4g}): "
            "the queue before it grows without end",
            hint="Ask for a lower rate, or balance: burnish pipeline balance --rate RATE.",
        )


def _choices(pipeline: Pipeline, requests: int, chance: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """Step -> number of the tensor that each request's answer has; beyond the last for none of them."""
    found = {}
    for step, shares in pipeline.routes.items():
        found[step] = np.searchsorted(np.cumsum(list(shares.values())), chance.random(requests), side="right")
    return found


class _Sampled:
    """Arrays over requests, filled step by step; infinite where something never comes."""

    def __init__(self, pipeline: Pipeline, arrivals: Times, choices: Mapping[str, NDArray[np.int64]]) -> None:
        self._pipeline = pipeline
        self._arrivals = arrivals
        self._choices = choices
        self._ready: dict[str, Times] = {}
        self._finish: dict[str, Times] = {}
        self._via: dict[str, tuple[tuple[Source, ...], NDArray[np.int64]]] = {}
        self._wait: dict[str, float] = {}
        self._sojourn: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def serve(self, name: str, station: Station, chance: np.random.Generator, overhead_ms: float) -> None:
        step = self._pipeline.step(name)
        ready, by = self._gather(step.inputs)
        sources = step.inputs.sources
        if step.triggers is not None:
            after, trigger = self._gather(step.triggers)
            by = np.where(after > ready, trigger + len(sources), by)
            ready, sources = np.maximum(ready, after), sources + step.triggers.sources
        comes_here = np.flatnonzero(np.isfinite(ready))
        comes_here = comes_here[np.argsort(ready[comes_here], kind="stable")]
        # Drawn for all requests, so that one meets the same luck whatever the others do.
        services = station.services_ms[chance.integers(0, len(station.services_ms), len(ready))][comes_here]
        left = departures(ready[comes_here], services, station.servers)
        finish = np.full(len(ready), np.inf)
        finish[comes_here] = left + station.delay_ms + overhead_ms
        self._ready[name], self._finish[name], self._via[name] = ready, finish, (sources, by)
        kept = comes_here[comes_here >= WARMUP_SHARE * len(ready)]
        self._count[name] = len(kept)
        self._sojourn[name] = float((finish[kept] - ready[kept]).mean()) if len(kept) else 0.0
        self._wait[name] = float((left - ready[comes_here] - services).mean()) if len(comes_here) else 0.0

    def _time(self, source: Source) -> Times:
        if source.step is None:
            return self._arrivals
        if source.side == "inputs":
            return self._ready[source.step]
        shares = self._pipeline.routes.get(source.step, {})
        if source.tensor not in shares:
            return self._finish[source.step]
        chosen = self._choices[source.step] == list(shares).index(source.tensor or "")
        return np.where(chosen, self._finish[source.step], np.inf)

    def _gather(self, gathering: Gathering) -> tuple[Times, NDArray[np.int64]]:
        """When the join fires for each request, and by which source."""
        times = np.stack([self._time(source) for source in gathering.sources])
        first, last = times.min(axis=0), times.max(axis=0)
        if gathering.join == "any":
            return first, times.argmin(axis=0)
        if gathering.join == "inner":
            return last, times.argmax(axis=0)
        closes = first + gathering.window_ms
        return np.minimum(last, closes), np.where(last <= closes, times.argmax(axis=0), times.argmin(axis=0))

    def summary(self, rate_rps: float, stations: Mapping[str, Station], order: Sequence[str]) -> Latency:
        end, by = self._gather(self._pipeline.ending)
        begin = int(WARMUP_SHARE * len(end))
        latencies = (end - self._arrivals)[begin:]
        answered = np.isfinite(latencies)
        if not answered.any():
            raise InputError(f"the pipeline {self._pipeline.name!r} never answers", hint="See burnish pipeline check.")
        on_path = self._on_path(by, np.isfinite(end), order)
        decided = {name: float(mask[begin:][answered].mean()) for name, mask in on_path.items()}
        span_ms = float(self._arrivals[-1] - self._arrivals[begin])
        steps = {}
        for name in self._pipeline.names:
            rate_ms = self._count[name] / span_ms
            steps[name] = StepLatency(
                utilisation=rate_ms * stations[name].mean_ms / stations[name].servers,
                wait_ms=self._wait[name],
                sojourn_ms=self._sojourn[name],
                decides=decided[name],
                queue=rate_ms * self._wait[name],
            )
        kept = latencies[answered]
        return Latency(
            rate_rps=rate_rps,
            percentiles={one: _estimate(kept, one) for one in PERCENTILES},
            mean_ms=_estimate(kept, None),
            steps=steps,
            paths=tuple(self._paths(on_path, begin, answered)),
            answered=float(answered.mean()),
        )

    def _on_path(
        self, by: NDArray[np.int64], ends: NDArray[np.bool_], order: Sequence[str]
    ) -> dict[str, NDArray[np.bool_]]:
        """Step -> whether it is a part of each request's latency, found from the end back."""
        on = {name: np.zeros(len(ends), dtype=bool) for name in order}
        # A step whose inputs are what was waited for is passed by, not through.
        passed = {name: np.zeros(len(ends), dtype=bool) for name in order}

        def mark(sources: tuple[Source, ...], chosen: NDArray[np.int64], which: NDArray[np.bool_]) -> None:
            for place, source in enumerate(sources):
                if source.step is not None:
                    marked = on if source.side == "outputs" else passed
                    marked[source.step] |= which & (chosen == place)

        mark(self._pipeline.ending.sources, by, ends)
        for name in reversed(order):
            mark(*self._via[name], on[name] | passed[name])
        return on

    def _paths(
        self, on_path: Mapping[str, NDArray[np.bool_]], begin: int, answered: NDArray[np.bool_]
    ) -> Iterator[tuple[tuple[str, ...], float]]:
        names = list(on_path)
        table = np.packbits(np.stack([on_path[name][begin:][answered] for name in names], axis=1), axis=1)
        found, counts = np.unique(table, axis=0, return_counts=True)
        for place in np.argsort(-counts)[:10].tolist():
            bits = np.unpackbits(found[place], count=len(names)).astype(bool)
            path = tuple(name for name, bit in zip(names, bits, strict=True) if bit)
            yield path, float(counts[place] / counts.sum())


def _estimate(latencies: Times, percentile: int | None) -> Estimate:
    """A percentile, or the mean, with an interval by the method of batch means."""

    def of(part: Times) -> float:
        return float(part.mean() if percentile is None else np.percentile(part, percentile))

    value = of(latencies)
    if len(latencies) < BATCHES * 10:
        return Estimate(value=value, low=None, high=None, runs=1, method="sampled path", unit="ms")
    parts = np.array([of(part) for part in np.array_split(latencies, BATCHES)])
    half = _T * float(parts.std(ddof=1)) / math.sqrt(BATCHES)
    return Estimate(
        value=value, low=max(0.0, value - half), high=value + half, runs=BATCHES, method="batch means", unit="ms"
    )


# --- the whole -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What is known of a pipeline from its steps.

    Attributes:
        limits: what each step lets through, the least first.
        throughput_path: the path that holds the step that saturates first.
        latency: at the rate that was asked.
        latency_path: the path of the requests that take longest, on mean times.
        slack_ms: step -> by how much it may become slower; infinite where nobody waits for it.
        notes: what the prediction leaves out.
    """

    limits: tuple[Limit, ...]
    throughput_path: tuple[str, ...]
    latency: Latency
    latency_path: tuple[str, ...]
    slack_ms: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def bottleneck(self) -> Limit:
        """What saturates first."""
        return self.limits[0]


def stations_of(
    pipeline: Pipeline,
    measured: Measured,
    *,
    variants: Mapping[str, str] | None = None,
    replicas: Mapping[str, int] | None = None,
) -> dict[str, Station]:
    """Step -> its queue, from what was measured.

    Raises:
        InputError: a step was not measured; the message says which command measures it.
    """
    chosen, copies = variants or {}, replicas or {}
    return {name: station_of(measured.of(name, chosen.get(name)), copies.get(name, 1)) for name in pipeline.names}


def pipeline_limits(
    pipeline: Pipeline,
    measured: Measured,
    *,
    variants: Mapping[str, str] | None = None,
    replicas: Mapping[str, int] | None = None,
) -> tuple[Limit, ...]:
    """`limits`, from what was measured.

    Where all servers share one CPU, a step alone at its saturation shows how much of it that step can use. The whole
    uses as much as its steps do, by the CPU time that each takes. Of several CPUs one step need not have used all, and
    they count in full.
    """
    chosen, copies = variants or {}, replicas or {}
    numbers = {name: measured.of(name, chosen.get(name)) for name in pipeline.names}
    cpu_ms = {name: one.cpu_ms for name, one in numbers.items() if one.cpu_ms is not None}
    usable = measured.shared_cpus
    if usable == 1:
        usable = _usable(visits(pipeline), cpu_ms, numbers)
    return limits(
        pipeline,
        {name: one.saturation_rps * copies.get(name, 1) for name, one in numbers.items()},
        cpu_ms=cpu_ms,
        shared_cpus=usable,
    )


def _usable(counts: Mapping[str, float], cpu_ms: Mapping[str, float], numbers: Mapping[str, StepNumbers]) -> float:
    """The share of one CPU that the steps can use between them; all of it where nothing is known of that."""
    takes = {name: counts[name] * cpu for name, cpu in cpu_ms.items() if numbers[name].busy_cpus is not None}
    used = sum(cpu * min(1.0, numbers[name].busy_cpus or 1.0) for name, cpu in takes.items())
    total = sum(takes.values())
    return used / total if total else 1.0


def analyse(
    pipeline: Pipeline,
    measured: Measured,
    *,
    rate_rps: float | None = None,
    variants: Mapping[str, str] | None = None,
    replicas: Mapping[str, int] | None = None,
    requests: int = REQUESTS,
    seed: int = 0,
    overhead_ms: float = 0.0,
) -> Analysis:
    """What is known of a pipeline from its steps, measured alone.

    Args:
        pipeline: without cycles.
        measured: of the steps.
        rate_rps: requests a second; None for half of what the pipeline saturates at.
        variants: step -> variant, where it is not the first.
        replicas: step -> how many, where it is more than one.
        requests: of the sampled path.
        seed: of the sampled path.
        overhead_ms: added at each step.

    Raises:
        InputError: the pipeline goes round, a step was not measured, or the rate is not below saturation.
    """
    stations = stations_of(pipeline, measured, variants=variants, replicas=replicas)
    found = pipeline_limits(pipeline, measured, variants=variants, replicas=replicas)
    if (cycle := find_cycle(pipeline)) is not None:
        raise InputError(
            f"the pipeline {pipeline.name!r} goes round ({' -> '.join(cycle)}): its latency is not predicted",
            hint=f"Measure it on a Core 2. With the most visits it saturates at {found[0].rate_rps:.4g} requests a "
            f"second, at {found[0].what}.",
        )
    rate = 0.5 * found[0].rate_rps if rate_rps is None else rate_rps
    latency = predict_latency(pipeline, stations, rate, requests=requests, seed=seed, overhead_ms=overhead_ms)
    sojourns = {name: step.sojourn_ms for name, step in latency.steps.items()}
    first = next(one.what for one in found if one.what != HOST)
    return Analysis(
        limits=found,
        throughput_path=path_through(pipeline, sojourns, first),
        latency=latency,
        latency_path=slowest_walk(pipeline, sojourns).path,
        slack_ms=slacks(pipeline, sojourns),
        notes=tuple(_notes(pipeline, measured, rate, found)),
    )


def _notes(pipeline: Pipeline, measured: Measured, rate: float, found: Sequence[Limit]) -> Iterator[str]:
    host = next((one for one in found if one.what == HOST), None)
    if host is not None:
        yield (
            f"{HOST} are busy to {rate / host.rate_rps:.0%} at this rate; latency is predicted as if each server had "
            "its own"
        )
    for step in pipeline.steps:
        if step.batch_size:
            yield f"{step.name} collects {step.batch_size} rows first; that wait is not predicted"
    if measured.whole is None or not measured.whole.without:
        yield "Kafka's and the gateways' share is not in numbers of steps measured alone"
    else:
        yield measured.whole.without


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What another variant of one step buys at the pipeline.

    Attributes:
        step: whose variant it is.
        variant: the other one.
        saturation_rps: of the pipeline, before and after.
        percentiles: 50, 90, 99 -> (before, after) at the same rate; empty where either is beyond saturation.
        word: ``nothing`` where neither changes by more than what is not known of it.
        sentence: for the user.
    """

    step: str
    variant: str
    saturation_rps: tuple[float, float]
    percentiles: Mapping[int, tuple[Estimate, Estimate]]
    word: Literal["nothing", "gains", "loses", "mixed"]
    sentence: str


NOTICED = 0.02
"""A change by a smaller share than this is none."""


def gain_of(
    pipeline: Pipeline,
    measured: Measured,
    step: str,
    variant: str,
    *,
    rate_rps: float,
    variants: Mapping[str, str] | None = None,
    replicas: Mapping[str, int] | None = None,
    requests: int = REQUESTS,
    seed: int = 0,
) -> Gain:
    """What putting this variant in its step's place buys, the other steps and all replicas kept.

    Both are followed through the same arrivals, choices and luck, so that what differs is the variant's doing.

    Args:
        pipeline: without cycles.
        measured: of its steps.
        step: whose variant it is.
        variant: the other one.
        rate_rps: requests a second to the pipeline, at which latency is compared.
        variants: step -> variant that there is now, where it is not the first.
        replicas: step -> how many, where it is more than one.
        requests: of the sampled paths.
        seed: of them.

    Raises:
        InputError: a step was not measured.
    """
    before = dict(variants or {})
    own = {**before, step: variant}
    first = pipeline_limits(pipeline, measured, variants=before, replicas=replicas)[0]
    after = pipeline_limits(pipeline, measured, variants=own, replicas=replicas)[0]
    alone = measured.of(step, variant).saturation_rps / measured.of(step, before.get(step)).saturation_rps
    pairs: dict[int, tuple[Estimate, Estimate]] = {}
    try:
        had, has = (
            predict_latency(
                pipeline,
                stations_of(pipeline, measured, variants=chosen, replicas=replicas),
                rate_rps,
                requests=requests,
                seed=seed,
            ).percentiles
            for chosen in (before, own)
        )
        pairs = {one: (had[one], has[one]) for one in PERCENTILES}
    except InputError:
        pairs = {}
    changes = [
        (after.rate_rps / first.rate_rps, True),
        *((new.value / old.value, False) for old, new in pairs.values()),
    ]
    better = any(ratio > 1 + NOTICED if up else ratio < 1 - NOTICED for ratio, up in changes)
    worse = any(ratio < 1 - NOTICED if up else ratio > 1 + NOTICED for ratio, up in changes)
    word: Literal["nothing", "gains", "loses", "mixed"] = (
        "mixed" if better and worse else "gains" if better else "loses" if worse else "nothing"
    )
    return Gain(
        step=step,
        variant=variant,
        saturation_rps=(first.rate_rps, after.rate_rps),
        percentiles=pairs,
        word=word,
        sentence=_gain_words(step=step, variant=variant, alone=alone, first=first, after=after, pairs=pairs, word=word),
    )


def _gain_words(
    *,
    step: str,
    variant: str,
    alone: float,
    first: Limit,
    after: Limit,
    pairs: Mapping[int, tuple[Estimate, Estimate]],
    word: str,
) -> str:
    begin = f"{step}: {variant} alone does {alone:.2f} times the rate"
    if word == "nothing":
        return f"{begin}; the pipeline gains nothing: {first.what} saturates first, and latency stays"
    p99 = f", p99 {pairs[99][0].value:.3g} -> {pairs[99][1].value:.3g} ms" if pairs else ""
    return f"{begin}; the pipeline saturates at {first.rate_rps:.4g} -> {after.rate_rps:.4g} a second{p99}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What a pipeline takes that its steps alone do not.

    Attributes:
        measured_ms: mean of single requests, end to end.
        predicted_ms: the same from the steps, each alone.
        per_stage_ms: the difference over the stages of the path that decides latency; below 0 where the prediction
            was too slow.
    """

    measured_ms: float
    predicted_ms: float
    per_stage_ms: float


def overhead_of(pipeline: Pipeline, measured: Measured) -> Overhead | None:
    """Per-stage overhead: the whole as measured without other load against its steps alone; None where it was not."""
    if measured.whole is None:
        return None
    alone = {
        name: float(np.mean(measured.of(name, measured.whole.variants.get(name)).latency_ms)) for name in pipeline.names
    }
    slowest = slowest_walk(pipeline, alone)
    shares = [(walk(pipeline, alone, routing), share) for routing, share in routings(pipeline)]
    answered = [(one, share) for one, share in shares if math.isfinite(one.end_ms)]
    predicted = sum(one.end_ms * share for one, share in answered) / sum(share for _, share in answered)
    whole = float(np.mean(measured.whole.latency_ms))
    return Overhead(
        measured_ms=whole, predicted_ms=predicted, per_stage_ms=(whole - predicted) / max(1, len(slowest.path))
    )
