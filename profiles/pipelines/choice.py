"""Which variant each step should have, under one budget for the whole pipeline.

Accuracy does not compose: what two variants lose together is not known from what each loses alone. So a shortlist is
made by a surrogate, stated below, and the best few combinations are then run end to end on labelled samples, where the
truth is. Both are reported.

The surrogate of a combination:

- latency: the longest way from input to output on mean times at the rate (service, and the mean wait by Allen and
  Cunneen's formula), every join taken to wait for all its sources: no less than a join by ``any`` takes;
- accuracy_drop: the sum of what each variant loses alone. If answers change independently or less often than that, it
  is no less than the truth; nothing guarantees it;
- memory_mb and cost: sums over steps.

It is linear in which variant is chosen, and times of steps, so the best combination is that of a mixed-integer linear
program, solved to optimality by HiGHS (scipy.optimize.milp; Q. Huangfu and J. A. J. Hall, "Parallelizing the dual
revised simplex method", 2018); the next best by the same program without those found. Few combinations are enumerated
instead, which gives the same. Two bounds are told, of which no combination has less: that of the relaxation in which
variants may be mixed, and the tighter one that branch and bound makes of the relaxations of all cases left open.
"""

import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from profiles.pipelines.graph import Pipeline, in_order, visits
from profiles.pipelines.measured import Measured, station_of
from profiles.pipelines.queueing import mean_wait
from registry.errors import InputError

Quantity = Literal["latency_ms", "accuracy_drop", "memory_mb", "cost"]
QUANTITIES: tuple[Quantity, ...] = ("latency_ms", "accuracy_drop", "memory_mb", "cost")
ENUMERATED = 20_000
TIME_LIMIT_S = 8.0
_TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One variant of a step, as the surrogate has it; None where it was not measured."""

    step: str
    variant: str
    latency_ms: float | None
    accuracy_drop: float | None = None
    memory_mb: float | None = None
    cost: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the whole pipeline may take at most; None where it does not matter.

    Attributes:
        latency_ms: mean, end to end.
        accuracy_drop: absolute, in points of the metric.
        memory_mb: of all servers.
        cost: of all replicas, an hour.
    """

    latency_ms: float | None = None
    accuracy_drop: float | None = None
    memory_mb: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        """Refuses what is no number.

        Raises:
            InputError: a limit is NaN or infinite.
        """
        for name, limit in self.limits().items():
            if not math.isfinite(limit):
                raise InputError(f"a limit of {limit:g} on {name}", hint="It is a number; leave it out for no limit.")

    def limits(self) -> dict[Quantity, float]:
        """Those that are set."""
        return {name: limit for name in QUANTITIES if (limit := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """A variant for each step, and what the surrogate says of it.

    Attributes:
        variants: step -> variant.
        surrogate: quantity -> value; those that are not known of all steps are missing.
    """

    variants: Mapping[str, str]
    surrogate: Mapping[Quantity, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """By how much the closest combination misses one budget."""

    quantity: Quantity
    limit: float
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortlist:
    """The best combinations by the surrogate.

    Attributes:
        objective: what is least in the first.
        combinations: the best first; empty where no combination meets the budget.
        bound: no combination that meets the budget has less of the objective, by branch and bound; None where none
            meets it.
        relaxed: the same by the relaxation alone: what a mixture of variants could have.
        exact: whether the first is proved best.
        closest: where the budget cannot be met, the combination that misses it by least, in shares of each limit.
        misses: by how much.
    """

    objective: Quantity
    combinations: tuple[Combination, ...]
    bound: float | None
    relaxed: float | None
    exact: bool
    closest: Combination | None = None
    misses: tuple[Miss, ...] = ()


# --- what the surrogate is made of -----------------------------------------------------------------------------


def options_of(
    pipeline: Pipeline, measured: Measured, *, rate_rps: float, replicas: Mapping[str, int] | None = None
) -> tuple[Option, ...]:
    """Every measured variant of every step; those that do not sustain the rate have no latency, and are never chosen.

    Args:
        pipeline: the graph.
        measured: of its steps; ``accuracy_drop`` of a step's first variant is 0.
        rate_rps: requests a second to the pipeline, at which steps wait.
        replicas: step -> how many, where it is more than one; memory and cost are of all.

    Raises:
        InputError: a step was not measured, or the rate is none.
    """
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise InputError(f"a rate of {rate_rps:g} requests a second", hint="It is above 0.")
    counts = visits(pipeline)
    found = []
    for step in pipeline.names:
        measured.of(step)
        copies = (replicas or {}).get(step, 1)
        for place, (variant, numbers) in enumerate(measured.steps[step].items()):
            station = station_of(numbers, copies)
            wait = mean_wait(
                rate_rps * counts[step] / 1000,
                servers=station.servers,
                service=station.mean_ms,
                variability=station.variability,
            )
            latency = station.mean_ms + station.delay_ms + wait
            drop = 0.0 if place == 0 and numbers.accuracy_drop is None else numbers.accuracy_drop
            found.append(
                Option(
                    step=step,
                    variant=variant,
                    latency_ms=latency if math.isfinite(latency) else None,
                    accuracy_drop=drop,
                    memory_mb=None if numbers.memory_mb is None else copies * numbers.memory_mb,
                    cost=None if numbers.price_per_hour is None else copies * numbers.price_per_hour,
                )
            )
    return tuple(found)


def surrogate_of(pipeline: Pipeline, chosen: Mapping[str, Option]) -> dict[Quantity, float]:
    """What the surrogate says of one variant a step."""
    found: dict[Quantity, float] = {}
    for quantity in QUANTITIES:
        values = {step: getattr(option, quantity) for step, option in chosen.items()}
        if any(value is None for value in values.values()):
            continue
        found[quantity] = _longest(pipeline, values) if quantity == "latency_ms" else math.fsum(values.values())
    return found


def _longest(pipeline: Pipeline, times: Mapping[str, float]) -> float:
    done: dict[str, float] = {}
    for name in in_order(pipeline):
        done[name] = times[name] + max((done[before] for before in pipeline.before(name)), default=0.0)
    return max(done[name] for name in pipeline.last)


# --- the choice ------------------------------------------------------------------------------------------------


def shortlist(
    pipeline: Pipeline,
    options: Sequence[Option],
    *,
    objective: Quantity,
    budget: Budget,
    best: int = 3,
    enumerated: int = ENUMERATED,
    time_limit_s: float = TIME_LIMIT_S,
) -> Shortlist:
    """The combinations that meet the budget and have least of the objective.

    Args:
        pipeline: without cycles.
        options: at least one a step.
        objective: what is to be least.
        budget: of the whole.
        best: how many combinations.
        enumerated: up to how many combinations all are looked at, instead of the program.
        time_limit_s: for the program's first answer.

    Raises:
        InputError: the pipeline goes round; a step has no option; what the budget or objective speaks of is unknown
            of all options of a step; or the program ended without an answer.
    """
    usable = _usable(pipeline, options, {objective, *budget.limits()})
    program = _Program(pipeline, usable, objective, budget)
    if math.prod(len(ones) for ones in usable.values()) <= enumerated:
        found = _enumerate(pipeline, usable, objective, budget, best)
        exact, bound = True, found[0].surrogate[objective] if found else None
    else:
        found, exact, bound = program.best(best, time_limit_s)
    if not found:
        closest = program.closest(time_limit_s)
        return Shortlist(
            objective=objective,
            combinations=(),
            bound=None,
            relaxed=None,
            exact=exact,
            closest=closest,
            misses=tuple(_misses(closest, budget)) if closest else (),
        )
    return Shortlist(
        objective=objective, combinations=tuple(found), bound=bound, relaxed=program.relaxed(), exact=exact
    )


def _usable(pipeline: Pipeline, options: Sequence[Option], needed: set[Quantity]) -> dict[str, list[Option]]:
    found: dict[str, list[Option]] = {}
    for step in pipeline.names:
        own = [option for option in options if option.step == step]
        known = [one for one in own if all(getattr(one, quantity) is not None for quantity in needed)]
        if not known:
            missing = sorted(q for q in needed if all(getattr(one, q) is None for one in own)) or sorted(needed)
            raise InputError(
                f"of step {step!r} {', '.join(missing)} is unknown of every variant"
                + (", or none sustains the rate" if "latency_ms" in missing and own else ""),
                hint="Measure it: burnish pipeline measure PLAN --out MEASURED.yaml; or leave it out of the budget.",
            )
        found[step] = known
    return found


def _enumerate(
    pipeline: Pipeline, usable: Mapping[str, Sequence[Option]], objective: Quantity, budget: Budget, best: int
) -> list[Combination]:
    limits = budget.limits()
    found = []
    for chosen in itertools.product(*usable.values()):
        by_step = {one.step: one for one in chosen}
        surrogate = surrogate_of(pipeline, by_step)
        if all(surrogate[name] <= limit * (1 + _TINY) + _TINY for name, limit in limits.items()):
            found.append(Combination(variants={s: one.variant for s, one in by_step.items()}, surrogate=surrogate))
    found.sort(key=lambda one: one.surrogate[objective])
    return found[:best]


def _misses(closest: Combination, budget: Budget) -> Iterator[Miss]:
    for name, limit in budget.limits().items():
        value = closest.surrogate[name]
        if value > limit * (1 + _TINY) + _TINY:
            yield Miss(quantity=name, limit=limit, value=value)


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps what the solver's own code prints off stdout, which belongs to the command's one document."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123  a descriptor is wanted
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class _Program:
    """The mixed-integer linear program: a 0/1 variable an option, the finishing time of each step, and of the whole.

    Columns: options, then steps' finishing times, then the pipeline's, then what each limit is exceeded by.
    """

    def __init__(
        self, pipeline: Pipeline, usable: Mapping[str, Sequence[Option]], objective: Quantity, budget: Budget
    ) -> None:
        self._pipeline = pipeline
        self._objective = objective
        self._limits = budget.limits()
        self._options = [option for ones in usable.values() for option in ones]
        self._steps = list(in_order(pipeline))
        self._timed = "latency_ms" in {objective, *self._limits}
        self._width = len(self._options) + len(self._steps) + 1 + len(self._limits)
        self._end = len(self._options) + len(self._steps)
        # Times in units of the longest, so that all coefficients are of one size.
        self._unit = max((one.latency_ms or 0.0 for one in self._options), default=1.0) or 1.0
        self._rows: list[tuple[dict[int, float], float, float]] = [*self._choose(), *self._times()]

    def best(self, count: int, time_limit_s: float) -> tuple[list[Combination], bool, float | None]:
        """(the best combinations, each found without those before it; whether the first is proved best; its bound)."""
        rows = [*self._rows, *self._bounds(elastic=False)]
        found: list[Combination] = []
        exact, bound = True, None
        for _ in range(count):
            result = self._solve(self._goal(), rows, time_limit_s, whole=True)
            if result.x is None:
                exact = exact and (bool(found) or result.status == 2)
                if result.status not in {1, 2} and not found:
                    raise InputError(f"the program was not solved: {result.message}", hint="Ask for less, or loosen.")
                break
            if not found:
                exact, bound = result.status == 0, self._unscaled(result.mip_dual_bound)
            taken = self._taken(result.x)
            found.append(self._combination(taken))
            rows.append((dict.fromkeys(taken, 1.0), -np.inf, len(taken) - 1.0))
        return found, exact, bound

    def relaxed(self) -> float | None:
        """The objective of the best mixture of variants that meets the budget: no combination has less."""
        rows = [*self._rows, *self._bounds(elastic=False)]
        result = self._solve(self._goal(), rows, TIME_LIMIT_S, whole=False)
        if result.x is None:
            return None
        return self._unscaled(result.fun)

    def closest(self, time_limit_s: float) -> Combination | None:
        """The combination that exceeds the limits by least, each in shares of itself."""
        rows = [*self._rows, *self._bounds(elastic=True)]
        goal = np.zeros(self._width)
        for place, (name, limit) in enumerate(self._limits.items()):
            goal[self._end + 1 + place] = 1 / max(abs(self._scaled(name, limit)), _TINY)
        result = self._solve(goal, rows, time_limit_s, whole=True)
        return None if result.x is None else self._combination(self._taken(result.x))

    # --- parts ---

    def _goal(self) -> Any:
        goal = np.zeros(self._width)
        if self._objective == "latency_ms":
            goal[self._end] = 1.0
        else:
            for column, option in enumerate(self._options):
                goal[column] = getattr(option, self._objective)
        return goal

    def _unscaled(self, value: float) -> float:
        return float(value) * (self._unit if self._objective == "latency_ms" else 1.0)

    def _scaled(self, name: Quantity, value: float) -> float:
        return value / self._unit if name == "latency_ms" else value

    def _choose(self) -> Iterator[tuple[dict[int, float], float, float]]:
        for step in self._steps:
            yield {n: 1.0 for n, option in enumerate(self._options) if option.step == step}, 1.0, 1.0

    def _times(self) -> Iterator[tuple[dict[int, float], float, float]]:
        """A step ends no earlier than all before it, and its own time later; the pipeline no earlier than its last."""
        if not self._timed:
            return
        first = len(self._options)
        column = {step: first + n for n, step in enumerate(self._steps)}
        for step in self._steps:
            own = {n: -(one.latency_ms or 0.0) / self._unit for n, one in enumerate(self._options) if one.step == step}
            for before in self._pipeline.before(step) or (None,):
                row = {column[step]: 1.0, **own}
                if before is not None:
                    row[column[before]] = -1.0
                yield row, 0.0, np.inf
        for step in self._pipeline.last:
            yield {self._end: 1.0, column[step]: -1.0}, 0.0, np.inf

    def _bounds(self, *, elastic: bool) -> Iterator[tuple[dict[int, float], float, float]]:
        for place, (name, limit) in enumerate(self._limits.items()):
            if name == "latency_ms":
                row = {self._end: 1.0}
            else:
                row = {n: getattr(option, name) for n, option in enumerate(self._options)}
            if elastic:
                row[self._end + 1 + place] = -1.0
            yield row, -np.inf, self._scaled(name, limit)

    def _solve(
        self, goal: Any, rows: Sequence[tuple[dict[int, float], float, float]], time_limit_s: float, *, whole: bool
    ) -> Any:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import lil_array

        matrix = lil_array((len(rows), self._width))
        for number, (row, _, _) in enumerate(rows):
            for column, value in row.items():
                matrix[number, column] = value
        integral = np.zeros(self._width)
        upper = np.full(self._width, np.inf)
        upper[: len(self._options)] = 1.0
        if whole:
            integral[: len(self._options)] = 1
        with _silence():
            return milp(
                goal,
                integrality=integral,
                bounds=Bounds(np.zeros(self._width), upper),
                constraints=LinearConstraint(matrix.tocsr(), [row[1] for row in rows], [row[2] for row in rows]),
                options={"time_limit": time_limit_s, "mip_rel_gap": 1e-6},
            )

    def _taken(self, solution: Any) -> list[int]:
        return [n for n in range(len(self._options)) if solution[n] > 0.5]

    def _combination(self, taken: Sequence[int]) -> Combination:
        chosen = {self._options[n].step: self._options[n] for n in taken}
        ordered = {step: chosen[step] for step in self._pipeline.names}
        return Combination(
            variants={step: option.variant for step, option in ordered.items()},
            surrogate=surrogate_of(self._pipeline, ordered),
        )
