"""A pipeline as a graph: steps that are models, what feeds them, and which joins can ever fire.

Plain values; documents become them in `profiles.pipelines.documents`.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from registry.errors import InputError

Join = Literal["inner", "outer", "any"]
Side = Literal["inputs", "outputs"]
Routing = Mapping[str, str | None]
"""Step that chooses -> the tensor it answers with; None where it answers with none of those it chooses among."""

WINDOW_MS = 60_000.0
"""How long a join of Core 2 waits where the manifest does not say."""
MOST_OUTCOMES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a step's data, or its trigger, comes from.

    Attributes:
        step: whose topic it is; None for the pipeline's own input.
        side: what goes into that step, or what comes out of it.
        tensor: the one tensor that is taken, or None for all.
        external: the other pipeline that it comes from, which is taken for the pipeline's own input; or None.
        text: as it was written.
    """

    step: str | None
    side: Side = "outputs"
    tensor: str | None = None
    external: str | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """Sources that are joined.

    Attributes:
        sources: at least one.
        join: ``inner`` fires when all have come within the window; ``outer`` when all have, or with those that have
            when it ends; ``any`` with the first.
        window_ms: how long it waits.
    """

    sources: tuple[Source, ...]
    join: Join = "inner"
    window_ms: float = WINDOW_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One model of a pipeline.

    Attributes:
        name: of the step, which is the model's.
        inputs: whose data it gets.
        triggers: what it waits for besides, without its data; None where there is nothing.
        tensor_map: source's tensor as written (``before.outputs.y``) -> name of the model's input.
        batch_size: rows that are collected before it is sent anything; None where it does not wait.
        batch_window_ms: how long it collects.
    """

    name: str
    inputs: Gathering
    triggers: Gathering | None = None
    tensor_map: Mapping[str, str] = field(default_factory=dict)
    batch_size: int | None = None
    batch_window_ms: float | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """All that it waits for."""
        return self.inputs.sources + (self.triggers.sources if self.triggers else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Models joined by topics.

    Attributes:
        name: of the pipeline.
        steps: in the manifest's order.
        output: whose answers are the pipeline's; None where nothing is answered.
        output_map: tensor as written -> name in the answer.
        external: names of the pipelines that feed it.
        routes: step -> tensor -> share of its answers that have this tensor and none of the others named here; what
            is left of 1 has none of them. A manifest cannot say it: it is known from data, or by the user.
        max_revisits: how often a message may come back to a step; None where there are no cycles.
    """

    name: str
    steps: tuple[Step, ...]
    output: Gathering | None
    output_map: Mapping[str, str] = field(default_factory=dict)
    external: tuple[str, ...] = ()
    routes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    max_revisits: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The steps' names."""
        return tuple(step.name for step in self.steps)

    def step(self, name: str) -> Step:
        """The step of this name.

        Raises:
            InputError: there is none.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise InputError(
            f"the pipeline {self.name!r} has no step {name!r}", hint=f"Its steps are: {', '.join(self.names)}."
        )

    def before(self, name: str) -> tuple[str, ...]:
        """Steps that this one waits for, each once."""
        found = (source.step for source in self.step(name).sources)
        return tuple(dict.fromkeys(step for step in found if step is not None))

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """(from, to) for each step that waits for another."""
        return tuple((before, step.name) for step in self.steps for before in self.before(step.name))

    @property
    def last(self) -> tuple[str, ...]:
        """The steps whose answers are the pipeline's; all that nobody waits for where it answers nothing."""
        if self.output is not None:
            return tuple(dict.fromkeys(source.step for source in self.output.sources if source.step is not None))
        waited = {before for before, _ in self.edges}
        return tuple(name for name in self.names if name not in waited)

    @property
    def ending(self) -> Gathering:
        """What ends a request: the output, or all steps that nobody waits for."""
        if self.output is not None:
            return self.output
        return Gathering(sources=tuple(Source(step=name, text=name) for name in self.last))


def in_order(pipeline: Pipeline) -> tuple[str, ...]:
    """The steps so that each comes after all it waits for.

    Raises:
        InputError: there is a cycle; the message names it.
    """
    left = {name: set(pipeline.before(name)) for name in pipeline.names}
    found: list[str] = []
    while left:
        ready = [name for name in pipeline.names if name in left and not left[name] - set(found)]
        if not ready:
            raise InputError(
                f"the pipeline {pipeline.name!r} goes round: {' -> '.join(find_cycle(pipeline) or ())}",
                hint="What a pipeline with cycles takes is measured, not predicted.",
            )
        found += ready
        for name in ready:
            del left[name]
    return tuple(found)


def find_cycle(pipeline: Pipeline) -> tuple[str, ...] | None:
    """The steps of a cycle, the first once more at its end; None where there is none."""
    state: dict[str, int] = {}
    trail: list[str] = []

    def visit(name: str) -> tuple[str, ...] | None:
        state[name] = 1
        trail.append(name)
        for before in pipeline.before(name):
            if state.get(before) == 1:
                back = trail[trail.index(before) :]
                return (*reversed(back), back[-1])
            if before not in state and (found := visit(before)):
                return found
        trail.pop()
        state[name] = 2
        return None

    for name in pipeline.names:
        if name not in state and (found := visit(name)):
            return found
    return None


# --- what fires ------------------------------------------------------------------------------------------------


def routings(pipeline: Pipeline) -> Iterator[tuple[Routing, float]]:
    """Every way that the choosing steps can answer, with its share, taking their choices as independent.

    Raises:
        InputError: there are more than `MOST_OUTCOMES`.
    """
    choices: list[list[tuple[str | None, float]]] = []
    count = 1
    for shares in pipeline.routes.values():
        none = max(0.0, 1.0 - sum(shares.values()))
        found: list[tuple[str | None, float]] = [(tensor, share) for tensor, share in shares.items() if share > 0]
        choices.append([*found, (None, none)] if none > 1e-9 else found)
        count *= len(choices[-1])
    if count > MOST_OUTCOMES:
        raise InputError(
            f"the pipeline {pipeline.name!r} has {count} ways through its choices, and {MOST_OUTCOMES} are looked at",
            hint="Tell of fewer steps under routes.",
        )
    for combination in itertools.product(*choices):
        share = 1.0
        for _, part in combination:
            share *= part
        yield dict(zip(pipeline.routes, (tensor for tensor, _ in combination), strict=True)), share


def fired(pipeline: Pipeline, routing: Routing) -> frozenset[str]:
    """The steps that a message reaches when the choosing steps answer so.

    An ``outer`` join needs one of its sources: it goes on with what has come when its window ends.
    """
    done: set[str] = set()
    while True:
        more = {
            step.name
            for step in pipeline.steps
            if step.name not in done
            and _fires(step.inputs, done, routing, pipeline)
            and (step.triggers is None or _fires(step.triggers, done, routing, pipeline))
        }
        if not more:
            return frozenset(done)
        done |= more


def comes(source: Source, done: set[str] | frozenset[str], routing: Routing, pipeline: Pipeline) -> bool:
    """Whether a source has data once these steps have answered."""
    if source.step is None:
        return True
    if source.side == "inputs":
        return source.step in done
    chosen_among = pipeline.routes.get(source.step, {})
    if source.tensor in chosen_among and routing.get(source.step) != source.tensor:
        return False
    return source.step in done


def answers(pipeline: Pipeline, done: frozenset[str], routing: Routing) -> bool:
    """Whether the pipeline answers, once these steps have."""
    return _fires(pipeline.ending, set(done), routing, pipeline)


def _fires(gathering: Gathering, done: set[str], routing: Routing, pipeline: Pipeline) -> bool:
    came = [comes(source, done, routing, pipeline) for source in gathering.sources]
    return all(came) if gathering.join == "inner" else any(came)


def visits(pipeline: Pipeline) -> dict[str, float]:
    """Step -> messages it gets for each request, on average; the most that are possible where it is in a cycle.

    Raises:
        InputError: there are too many ways through its choices.
    """
    found = dict.fromkeys(pipeline.names, 0.0)
    for routing, share in routings(pipeline):
        for name in fired(pipeline, routing):
            found[name] += share
    if pipeline.max_revisits is not None:
        for name in _round(pipeline):
            found[name] *= 1 + pipeline.max_revisits
    return found


def _round(pipeline: Pipeline) -> set[str]:
    """The steps that a message can come back to, and those after them."""
    after: dict[str, set[str]] = {name: set() for name in pipeline.names}
    for before, name in pipeline.edges:
        after[before].add(name)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        open_ = [start]
        while open_:
            for following in after[open_.pop()] - found:
                found.add(following)
                open_.append(following)
        return found

    in_cycle = {name for name in pipeline.names if name in reached(name)}
    return in_cycle.union(*(reached(name) for name in in_cycle)) if in_cycle else set()
