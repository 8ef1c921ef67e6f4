"""The language of constraints and objectives.

::

    constraint = metric ("<=" | ">=" | "<" | ">") number ["%"] ["rel" ["vs" ("baseline" | "champion")]] ["at" load]
    objective  = ("maximize" | "minimize") metric ["at" load] ["weight" number]
    load       = number ["%"] "saturation" | number "rps" | "concurrency" whole number

``accuracy_drop <= 0.01`` is in the metric's unit, ``accuracy_drop <= 1% rel`` a fraction of the baseline's accuracy; so
it is with ``slice_drop_max``, the drop of the slice of samples that lost most. A latency has a load (0.8 of saturation
where none is written), and nothing else has one. Several objectives count in their order, or by their weights where
each has one. The whole language is described in ``docs/reference/policy.md``.
"""

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Final, Literal, NoReturn, cast

from registry.errors import PolicyError
from registry.records import Constraint, Objective, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What the policy knows of a metric.

    Attributes:
        unit: as in `Estimate`.
        needs_load: whether its value belongs to a load.
        larger_is_better: which way is better.
        label: what people read.
    """

    unit: str
    needs_load: bool
    larger_is_better: bool
    label: str


def _metric(unit: str, label: str, *, needs_load: bool = False, larger_is_better: bool = False) -> Metric:
    return Metric(unit=unit, needs_load=needs_load, larger_is_better=larger_is_better, label=label)


METRICS: Final[dict[str, Metric]] = {
    "accuracy": _metric("fraction", "accuracy", larger_is_better=True),
    "accuracy_drop": _metric("fraction", "accuracy drop"),
    "slice_drop_max": _metric("fraction", "largest drop of a slice"),
    "flip_rate": _metric("fraction", "flip rate"),
    "cosine": _metric("1", "cosine", larger_is_better=True),
    "worst_cosine": _metric("1", "lowest cosine", larger_is_better=True),
    "snr_db": _metric("dB", "signal-to-noise ratio", larger_is_better=True),
    "p99_error": _metric("1", "p99 of the error, over the spread"),
    "mismatch_share": _metric("fraction", "share of values out of tolerance"),
    "max_abs_error": _metric("1", "largest error"),
    "batch_dependence": _metric("1", "move with other neighbours, over the spread"),
    "batch_flip_rate": _metric("fraction", "flip rate with other neighbours"),
    "max_throughput_rps": _metric("1/s", "maximum throughput", larger_is_better=True),
    "saturation_rps": _metric("1/s", "saturation", larger_is_better=True),
    "slo_max_rps": _metric("1/s", "highest rate within the latency limit", larger_is_better=True),
    "rss_mb": _metric("MB", "resident memory"),
    "peak_rss_mb": _metric("MB", "peak of resident memory"),
    "load_time_s": _metric("s", "load time"),
    "first_request_ms": _metric("ms", "first request"),
    "cpu_s_per_1k": _metric("s", "CPU time per 1,000 requests"),
    "cost_per_million": _metric("price", "cost per million requests"),
    "cpu_joules_per_1k": _metric("J", "energy of the CPU per 1,000 requests"),
    "gpu_joules_per_1k": _metric("J", "energy of the GPU per 1,000 requests"),
    "gpu_memory_mb": _metric("MB", "GPU memory"),
    "size_mb": _metric("MB", "size"),
    "latency_p50_ms": _metric("ms", "p50", needs_load=True),
    "latency_p90_ms": _metric("ms", "p90", needs_load=True),
    "latency_p95_ms": _metric("ms", "p95", needs_load=True),
    "latency_p99_ms": _metric("ms", "p99", needs_load=True),
    "service_p50_ms": _metric("ms", "service time p50", needs_load=True),
}

DEFAULT_LOAD: Final = "0.8 saturation"

# Of a model with several outputs these are known for each, too: cosine.logits.
_EACH_OUTPUT: Final = frozenset({"cosine", "worst_cosine", "snr_db", "p99_error", "mismatch_share", "max_abs_error"})
# A drop is counted from the baseline; its part is of an accuracy, not of a drop.
DROPS: Final = ("accuracy_drop", "slice_drop_max")
# Values in these units may be zero or less, so that no ratio of two of them says anything; accuracy is the exception.
_NO_RATIO_UNITS: Final = frozenset({"fraction", "1", "dB"})
_OPERATORS = ("<=", ">=", "<", ">")
_BETTER = {True: "maximize", False: "minimize"}
_TOKEN = re.compile(
    r"(?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)|(?P<percent>%)|(?P<operator>[<>=!≤≥]+)"
    r"|(?P<word>[^\W\d][\w.@/-]*)|(?P<other>\S)"
)


def parse_policy(
    constraints: Sequence[str],
    objective: str | Sequence[str],
    *,
    signature: Literal["same", "may_change"] = "same",
) -> Policy:
    """The policy that the lines say.

    Args:
        constraints: one line each, such as ``latency_p90_ms <= 50 at 0.8 saturation``.
        objective: one line, such as ``maximize max_throughput_rps``, or several: in the order they count, or each with
            a weight.
        signature: whether a candidate's inputs and outputs may differ from the baseline's.

    Raises:
        PolicyError: a line is not understood, or two of them contradict each other; the message shows the lines with a
            mark under the wrong word.
    """
    lines = [objective] if isinstance(objective, str) else list(objective)
    if not lines:
        raise PolicyError(
            "the policy has no objective", hint="Say what to make best, for example: maximize max_throughput_rps"
        )
    limits = [_constraint(_Line(line)) for line in constraints]
    _check_together(limits)
    return Policy(
        constraints=tuple(one.constraint for one in limits),
        objectives=_weighed([_Line(line) for line in lines]),
        signature=signature,
    )


def metric_of(name: str) -> Metric | None:
    """What the policy knows of a metric, or of ``<metric>.<output>``; None of an unknown one."""
    whole, dot, output = name.partition(".")
    if not dot:
        return METRICS.get(name)
    if whole not in _EACH_OUTPUT or not output:
        return None
    return replace(METRICS[whole], label=f"{METRICS[whole].label} of {output}")


def loads_named(policy: Policy) -> tuple[str, ...]:
    """The loads that the policy's metrics must be measured at, each once, in the order they are named."""
    named = [constraint.load for constraint in policy.constraints] + [objective.load for objective in policy.objectives]
    return tuple(dict.fromkeys(load for load in named if load is not None))


def slo_limit(policy: Policy) -> Constraint | None:
    """The limit that ``slo_max_rps`` keeps: the policy's first absolute upper limit on a percentile of latency.

    Returns:
        None where the policy does not name that metric.

    Raises:
        PolicyError: it does, and has no such limit.
    """
    named = [one.metric for one in policy.constraints] + [one.metric for one in policy.objectives]
    if "slo_max_rps" not in named:
        return None
    for one in policy.constraints:
        if one.metric.startswith("latency_p") and one.op in {"<=", "<"} and not one.relative:
            return one
    raise PolicyError(
        "slo_max_rps is the highest rate that keeps a latency limit, and the policy has none",
        hint="Add a constraint such as: latency_p99_ms <= 25",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


class _Line:
    """The words of a line, taken one by one; knows where each stands, to point at it."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        self._tokens = [
            _Token(kind=found.lastgroup or "other", text=found.group(), start=found.start(), end=found.end())
            for found in _TOKEN.finditer(self.text)
        ]
        self._next = 0

    @property
    def token(self) -> _Token:
        """The next word; past the end an empty one of kind ``end``."""
        if self._next < len(self._tokens):
            return self._tokens[self._next]
        return _Token(kind="end", text="", start=len(self.text), end=len(self.text) + 1)

    def take(self, kind: str, text: str | None = None) -> _Token | None:
        """The next word if it is of this kind (and text), and goes past it."""
        token = self.token
        if token.kind != kind or text not in {None, token.text}:
            return None
        self._next += 1
        return token

    def expect_end(self, problem: str) -> None:
        """Refuses what is left over."""
        token = self.token
        if token.kind != "end":
            self.refuse(f"{problem}, but {token.text!r} follows", token)

    def refuse(self, problem: str, token: _Token, *, hint: str | None = None) -> NoReturn:
        """Raises a PolicyError that shows the line and marks the word."""
        raise PolicyError(f"{problem}\n{self.marked(token)}", hint=hint)

    def marked(self, token: _Token) -> str:
        """The line, and below it a mark under the word."""
        return f"  {self.text}\n  {' ' * token.start}{'^' * (token.end - token.start)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limit:
    """A constraint, and where its number stands."""

    constraint: Constraint
    line: _Line
    number: _Token


def _constraint(line: _Line) -> _Limit:
    name, metric = _known_metric(line)
    operator = line.take("operator")
    if operator is None or operator.text not in _OPERATORS:
        wrong = operator or line.token
        near = {"≤": "<=", "≥": ">=", "=<": "<=", "=>": ">="}.get(wrong.text)
        line.refuse("expected <=, >=, < or > after the metric", wrong, hint=f"Did you mean {near}?" if near else None)
    number = line.token
    limit, relative = _limit(line, metric)
    reference = _reference(line, name, relative=relative)
    load = _load_of(line, name, metric)
    _end_of(line, metric)
    constraint = Constraint(
        text=line.text,
        metric=name,
        op=cast(Literal["<=", ">=", "<", ">"], operator.text),
        limit=limit,
        relative=relative,
        load=load,
        reference=reference,
    )
    return _Limit(constraint=constraint, line=line, number=number)


def _check_together(limits: Sequence[_Limit]) -> None:
    """Refuses an upper and a lower limit on the same thing that nothing lies between.

    Raises:
        PolicyError: both lines, with a mark under each number.
    """
    for one, other in itertools.combinations(limits, 2):
        if _same_scale(one.constraint, other.constraint) and _exclude_each_other(one.constraint, other.constraint):
            shown = f"{one.line.marked(one.number)}\n{other.line.marked(other.number)}"
            raise PolicyError(
                f"no value of {one.constraint.metric} meets both of these limits\n{shown}",
                hint="Leave one of them out, or move it.",
            )


def _same_scale(one: Constraint, other: Constraint) -> bool:
    fields = ("metric", "load", "relative", "reference")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def _exclude_each_other(one: Constraint, other: Constraint) -> bool:
    upper, lower = (one, other) if one.op in {"<=", "<"} else (other, one)
    if upper.op not in {"<=", "<"} or lower.op not in {">=", ">"}:
        return False
    touching = lower.limit == upper.limit and (lower.op, upper.op) == (">=", "<=")
    return lower.limit >= upper.limit and not touching


def _weighed(lines: Sequence[_Line]) -> tuple[Objective, ...]:
    """The objectives of the lines; each of them has a weight, or none has."""
    objectives = tuple(_objective(line) for line in lines)
    weighed = [objective.weight is not None for objective in objectives]
    if any(weighed) and not all(weighed):
        line = lines[weighed.index(False)]
        line.refuse(
            "other objectives have a weight, and this one has none",
            line.token,
            hint="Give each objective a weight, or none, so that they count in their order.",
        )
    return objectives


def _objective(line: _Line) -> Objective:
    token = line.token
    direction = line.take("word", "maximize") or line.take("word", "minimize")
    if direction is None:
        near = _nearest(token.text, _BETTER.values())
        line.refuse("an objective begins with maximize or minimize", token, hint=_did_you_mean(near))
    name, metric = _known_metric(line)
    better = _BETTER[metric.larger_is_better]
    if direction.text != better:
        line.refuse(f"{name} is better the other way", direction, hint=f"Write: {better} {name}")
    load = _load_of(line, name, metric)
    weight = _weight(line, name, metric)
    _end_of(line, metric)
    return Objective(
        text=line.text,
        direction=cast(Literal["maximize", "minimize"], direction.text),
        metric=name,
        load=load,
        weight=weight,
    )


def _weight(line: _Line, name: str, metric: Metric) -> float | None:
    word = line.take("word", "weight")
    if word is None:
        return None
    if metric.unit in _NO_RATIO_UNITS and name != "accuracy":
        line.refuse(
            f"weights weigh ratios, and {name} may be zero, which has none",
            word,
            hint="Put a limit on it instead, or leave out all weights, so that the objectives count in their order.",
        )
    number = line.token
    value = _value(line, number) if line.take("number") else 0.0
    if not value > 0:
        line.refuse("a weight is a number above 0", number)
    return value


def _known_metric(line: _Line) -> tuple[str, Metric]:
    token = line.token
    name = line.take("word")
    if name is None:
        line.refuse("expected a metric", token, hint=f"The metrics are: {', '.join(METRICS)}.")
    metric = metric_of(name.text)
    if metric is None:
        near = _nearest(name.text, METRICS)
        hint = _did_you_mean(near) or f"The metrics are: {', '.join(METRICS)}."
        line.refuse(f"unknown metric {name.text!r}", name, hint=hint)
    return name.text, metric


def _limit(line: _Line, metric: Metric) -> tuple[float, bool]:
    token = line.token
    number = line.take("number")
    if number is None:
        line.refuse("expected a number", token)
    percent = line.take("percent")
    relative = line.take("word", "rel") is not None
    if percent and not relative and metric.unit != "fraction":
        line.refuse(
            f"a limit in percent needs something to be a part of; this metric is in {metric.unit}",
            percent,
            hint=f"Write {number.text}% rel for a part of the baseline's value.",
        )
    return _value(line, number, percent=percent is not None), relative


def _reference(line: _Line, name: str, *, relative: bool) -> Literal["baseline", "champion"]:
    against = line.take("word", "vs")
    if against is None:
        return "baseline"
    if not relative:
        line.refuse(
            "only a limit that is a part of something is held against something",
            against,
            hint="Write it with rel, for example: 105% rel vs champion",
        )
    token = line.token
    if line.take("word", "baseline"):
        return "baseline"
    if line.take("word", "champion") is None:
        near = _nearest(token.text, ["baseline", "champion"])
        line.refuse("expected baseline or champion after vs", token, hint=_did_you_mean(near))
    if name in DROPS:
        line.refuse(
            f"{name} is counted from the baseline, not from the champion",
            token,
            hint="Hold the accuracy itself against the champion's: accuracy >= 99% rel vs champion",
        )
    return "champion"


def _value(line: _Line, number: _Token, *, percent: bool = False) -> float:
    """The number; a percentage is divided in decimals, so that 2.3% is exactly what 0.023 is."""
    try:
        value = float(Decimal(number.text) / 100 if percent else Decimal(number.text))
    except ArithmeticError:  # an exponent beyond what decimals have
        value = math.inf
    if math.isinf(value):
        line.refuse("the number is too large", number)
    return value


def _load_of(line: _Line, name: str, metric: Metric) -> str | None:
    at = line.take("word", "at")
    if at is None:
        return DEFAULT_LOAD if metric.needs_load else None
    if not metric.needs_load:
        line.refuse(f"{name} belongs to no load", at, hint="Leave out what follows from here.")
    return _load(line)


def _load(line: _Line) -> str:
    """The load in its one written form: ``0.8 saturation``, ``100 rps`` or ``concurrency 1``."""
    token = line.token
    if line.take("word", "concurrency"):
        return _concurrency(line)
    number = line.take("number")
    if number is None:
        line.refuse("expected a load", token, hint="A load is like: 0.8 saturation, 100 rps or concurrency 1.")
    percent = line.take("percent") is not None
    value = _value(line, number, percent=percent)
    unit = line.token
    if line.take("word", "saturation"):
        if not 0 < value <= 1:
            line.refuse("a share of saturation is above 0 and at most 1", number)
        return f"{value:g} saturation"
    if line.take("word", "rps") and not percent:
        if not value > 0:
            line.refuse("a rate is above 0", number)
        return f"{value:g} rps"
    near = _nearest(unit.text, ["saturation", "rps"])
    return line.refuse("expected saturation or rps after the number", unit, hint=_did_you_mean(near))


def _concurrency(line: _Line) -> str:
    token = line.token
    number = line.take("number")
    if number is None or not number.text.isdecimal() or int(number.text) < 1:
        line.refuse("a concurrency is a whole number from 1 on", token)
    return f"concurrency {int(number.text)}"


def _end_of(line: _Line, metric: Metric) -> None:
    token = line.token
    if token.kind == "word" and token.text.lower() in {metric.unit.lower(), "ms", "s", "mb", "rps"}:
        line.refuse(f"a limit is in {metric.unit}, as the metric's name says", token, hint="Leave out the unit.")
    for word in ("rel", "weight"):
        if token.kind == "word" and token.text.lower().startswith(word):
            line.refuse(f"unexpected {token.text!r}", token, hint=_did_you_mean(word))
    line.expect_end("the line should end here")


def _nearest(word: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(names), n=1)), None)


def _did_you_mean(near: str | None) -> str | None:
    return f"Did you mean {near}?" if near else None
