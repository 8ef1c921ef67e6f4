"""What each lever bought on the way from the baseline to the selected: artifact, engine, server, batching and so on.

The way leads over candidates that were measured, each of which differs from the one before it in levers that the
selected pulls, and in nothing else. Of all such ways the one with most steps is taken. Levers between which no
candidate was measured stand together in one step; no number is made up for what lies between.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from registry.intervals import paired_ratio
from registry.policy import metric_of
from registry.records import Campaign, Candidate, Estimate, Objective
from registry.report import numbers
from registry.report.resources import Table
from registry.report.table import engine_words
from registry.selection import metric_table

# A metric of a measurement -> what a run calls it, where runs have it; latencies have the same name in both.
_OF_RUNS = {
    "max_throughput_rps": "throughput_rps",
    "rss_mb": "rss_mb",
    "cpu_s_per_1k": "cpu_s_per_1k",
    "cpu_joules_per_1k": "cpu_joules_per_1k",
    "gpu_joules_per_1k": "gpu_joules_per_1k",
}
_CLOSED = "closed"
_LEVERS: Mapping[str, Callable[[Candidate], object]] = {
    "artifact": lambda one: one.variant_id,
    "engine": lambda one: one.engine.key,
    "server": lambda one: (one.serving.server, one.serving.backend, one.cluster),
    "batching": lambda one: (one.serving.max_batch_size, one.serving.max_batch_delay_ms),
    "instances": lambda one: (one.serving.instances, one.serving.parallel_workers),
    "threads": lambda one: one.serving.threads,
    "protocol": lambda one: one.serving.protocol,
}
TITLE = "What each lever bought"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One candidate on the way, and what the levers since the one before it bought.

    Attributes:
        levers: that differ from the candidate before, in the order of the house.
        words: what they are set to now.
        value: of the metric.
        ratio: this candidate's value over the one's before; from rounds in which both were measured, else of the two
            values, without an interval. None where one of these is not above zero.
    """

    candidate: Candidate
    levers: tuple[str, ...]
    words: str
    value: Estimate
    ratio: Estimate | None

    @property
    def name(self) -> str:
        """The levers in words: ``artifact and engine``."""
        return listed(self.levers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """The way from the baseline to the selected.

    Attributes:
        objective: the policy's first, in whose metric the steps are.
        label: the metric in words.
        baseline: where the way begins.
        start: the baseline's value.
        steps: in their order; the last one's candidate is the selected.
        total: the selected's value over the baseline's, as in `Step`.
        notes: what a reader must know of it.
    """

    objective: Objective
    label: str
    baseline: Candidate
    start: Estimate
    steps: tuple[Step, ...]
    total: Estimate | None
    notes: tuple[str, ...]


def waterfall(campaign: Campaign) -> Waterfall | None:
    """The way from the baseline to the selected, in the metric of the policy's first objective.

    Returns:
        None where nothing was selected, the baseline itself was, or one of the two has no such value.
    """
    verdict = campaign.verdict
    named = {one.id: one for one in campaign.candidates}
    first, last = named.get(verdict.baseline or ""), named.get(verdict.selected or "")
    if first is None or last is None or first == last:
        return None
    objective = verdict.policy.objectives[0]
    table = metric_table(campaign.candidates, campaign.measurements, campaign.fidelities, campaign.variants)
    key = (objective.metric, objective.load)
    failed = {failure.subject for failure in campaign.failures}
    values = {one.id: table[one.id][key] for one in named.values() if key in table[one.id] and one.name not in failed}
    if first.id not in values or last.id not in values:
        return None
    way = _way(first, last, [one for one in named.values() if one.id in values])
    steps = tuple(
        Step(
            candidate=after,
            levers=(changed := _differences(before, after)),
            words=", ".join(_words(after, lever) for lever in changed),
            value=values[after.id],
            ratio=_ratio(campaign, objective, before, after, values),
        )
        for before, after in pairwise(way)
    )
    metric = metric_of(objective.metric)
    label = objective.metric if metric is None else metric.label
    return Waterfall(
        objective=objective,
        label=f"{label} at {objective.load}" if objective.load else label,
        baseline=first,
        start=values[first.id],
        steps=steps,
        total=_ratio(campaign, objective, first, last, values),
        notes=_notes(steps),
    )


def waterfall_table(campaign: Campaign) -> Table | None:
    """The same as a table for every report; None where there is no way to show."""
    found = waterfall(campaign)
    if found is None:
        return None
    rows = [("baseline", found.baseline.name, numbers.text(found.start), "")]
    rows += [
        (step.name, f"{step.words} ({step.candidate.name})", numbers.text(step.value), _times(step.ratio))
        for step in found.steps
    ]
    if len(found.steps) > 1:
        rows.append(("together", found.steps[-1].candidate.name, "", _times(found.total)))
    return Table(
        title=TITLE,
        headings=("lever", "set to", found.label, "times the one before"),
        rows=tuple(rows),
        notes=found.notes,
    )


def listed(words: Iterable[str]) -> str:
    """Words as people list them: ``artifact, engine and server``."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _times(ratio: Estimate | None) -> str:
    return " ".join(part for part in (numbers.times(ratio), numbers.times_interval(ratio)) if part)


def _differences(one: Candidate, other: Candidate) -> tuple[str, ...]:
    return tuple(name for name, setting in _LEVERS.items() if setting(one) != setting(other))


def _way(first: Candidate, last: Candidate, measured: Iterable[Candidate]) -> list[Candidate]:
    """The longest way; of several, the one that pulls levers in the order of the house."""
    wanted = _differences(first, last)
    between = {
        frozenset(pulled): one
        for one in measured
        if all(one_of(one, first, last, lever) for lever in _LEVERS)
        and 0 < len(pulled := _differences(first, one)) < len(wanted)
    }
    places = {frozenset[str](): first, **between, frozenset(wanted): last}
    order = tuple(_LEVERS)

    @cache
    def onward(here: frozenset[str]) -> tuple[frozenset[str], ...]:
        """The best way on from a place, without it."""
        ways = [(place, *onward(place)) for place in places if here < place]
        return min(ways, key=lambda way: (-len(way), _order(here, way, order)), default=())

    return [first, *(places[place] for place in onward(frozenset()))]


def one_of(one: Candidate, first: Candidate, last: Candidate, lever: str) -> bool:
    """Whether a candidate has a lever as the first or as the last has it."""
    setting = _LEVERS[lever]
    return setting(one) in {setting(first), setting(last)}


def _order(
    here: frozenset[str], way: tuple[frozenset[str], ...], order: tuple[str, ...]
) -> tuple[tuple[int, ...], ...]:
    """What is pulled at each step, as places in the order of the house."""
    return tuple(
        tuple(sorted(order.index(lever) for lever in after - before)) for before, after in pairwise((here, *way))
    )


def _ratio(
    campaign: Campaign, objective: Objective, before: Candidate, after: Candidate, values: Mapping[str, Estimate]
) -> Estimate | None:
    """As it was compared; else from rounds in which both have a valid run; else of the two values, if they have one."""
    wanted = (after.id, before.id, objective.metric, objective.load)
    for one in campaign.comparisons:
        if (one.candidate_id, one.baseline_id, one.metric, one.load) == wanted:
            return one.ratio
    ones, others = (_by_round(campaign, objective, one.id) for one in (after, before))
    pairs = [(ones[number], others[number]) for number in sorted(ones.keys() & others.keys())]
    if pairs:
        return paired_ratio(pairs)
    was, now = values[before.id].value, values[after.id].value
    if was <= 0 or now <= 0:
        return None
    return Estimate(value=now / was, low=None, high=None, runs=1, method="of two values, not paired", unit="1")


def _by_round(campaign: Campaign, objective: Objective, candidate_id: str) -> dict[int, float]:
    """The metric of each round's valid run; empty where runs do not have it."""
    metric = objective.metric if objective.load else _OF_RUNS.get(objective.metric, "")
    load = objective.load or _CLOSED
    return {
        one.number: run.metrics[metric]
        for one in campaign.rounds
        if one.candidate_id == candidate_id
        for run in one.runs
        if run.valid and run.load.name == load and run.metrics.get(metric, 0.0) > 0
    }


def _words(candidate: Candidate, lever: str) -> str:
    serving = candidate.serving
    if lever == "artifact":
        return candidate.variant_name
    if lever == "engine":
        return engine_words(candidate.engine)
    if lever == "server":
        return f"{serving.server}, {serving.backend} backend"
    if lever == "batching":
        if serving.max_batch_size == 1:
            return "no batching"
        delay = f", delay {serving.max_batch_delay_ms:g} ms" if serving.max_batch_delay_ms else ""
        return f"batch {serving.max_batch_size}{delay}"
    if lever == "instances":
        lanes = serving.parallel_workers or serving.instances
        noun = "worker" if serving.parallel_workers else "instance"
        return f"{lanes} {noun}{'' if lanes == 1 else 's'}"
    if lever == "threads":
        return f"{serving.threads} thread{'' if serving.threads == 1 else 's'}"
    return serving.protocol


def _notes(steps: Iterable[Step]) -> tuple[str, ...]:
    told = [
        f"{step.name[0].upper()}{step.name[1:]} are one step: nothing was measured with only some of them changed."
        for step in steps
        if len(step.levers) > 1
    ]
    if any(step.ratio is None for step in steps):
        told.append("Of values that are not above zero there is no ratio.")
    if any(step.ratio is not None and step.ratio.low is None for step in steps):
        told.append("A ratio without an interval is of two values, not of rounds in which both were measured.")
    told.append(
        "Every step is a candidate that was measured. What a lever buys depends on those that were pulled before it."
    )
    return tuple(told)
