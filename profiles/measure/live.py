"""What callers of champion and challenger see while traffic is split: requests of our own, at a low rate.

Each second request goes where callers ask, and the header ``x-seldon-route`` of its reply says who answered; the others
go to the challenger itself, so that it answers enough of them at any share of the traffic. Latency counts from when a
request was to be sent.
"""

import asyncio
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from profiles.load.payloads import Payload, encode_payloads
from profiles.load.transports import ROUTE, Reply, Status, Transport, make_transport
from profiles.measure.percentiles import EARNED_IN_RUN, estimate_percentile
from registry.errors import UnreachableError
from registry.promotion import FAILED_SHARE, UNNAMED
from registry.records import Estimate, Metrics, Observation, PromotionStep, Target, TensorSpec

PERCENTILES: Final = (50, 90, 95, 99)
RATE_RPS: Final = 25.0
RUNS = 5
"""Into as many parts in a row a watch is divided, for an interval over them."""
CONFIDENCE = 0.95
BESIDE: Final = frozenset({"mirror", "weights"})
"""The steps in which the challenger is asked beside the champion."""
FOR_ONE_PERCENT = 299
"""Requests of which none failed that show, at that confidence, that no more than 1 % do."""
LOST_SHARE = 0.1
"""Where certainly more of the challenger's requests fail, watching ends early."""
_LEAST_FAILED = 5
_LOOK_EVERY = 10
_CONNECTIONS = 4
_CONNECT_S = 10.0
_LEAD_S = 0.02
_MOST_TOLD = 3
_PIPELINE = ".pipeline"

Fidelity = Callable[[Target], Metrics]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """One request: when it was to be sent (s from the start), how long until its reply (ms), and who made that.

    Attributes:
        latency_ms: infinite where it failed.
        who: ``challenger``, ``champion``, ``others``, or empty where the reply does not say.
        direct: whether the challenger itself was asked.
        problem: why it failed; empty where it did not.
    """

    at_s: float
    latency_ms: float
    who: str
    direct: bool
    problem: str = ""


@dataclass
class RequestProbe:
    """Implements `registry.ports.Probe` by requests of its own.

    Attributes:
        production: name of the Model that callers ask.
        challenger: name of the Model beside it.
        target_of: gives the way to a model by its name.
        inputs: samples to send, input -> (samples, ...) array.
        rate_rps: requests a second, half of them to the challenger itself.
        timeout_s: of each request.
        fidelity: what the answers of a target are worth; None where that cannot be judged.
        judged: the metrics that ``fidelity`` gives.
        only: models that one of two pipelines has -> ``champion`` or ``challenger``; for a Core 2 whose replies name
            the models on the way, and not the pipeline.
        seed: of arrivals and payloads.
    """

    production: str
    challenger: str
    target_of: Callable[[str], Target]
    inputs: Mapping[str, NDArray[Any]]
    rate_rps: float = RATE_RPS
    timeout_s: float = 30.0
    fidelity: Fidelity | None = None
    judged: frozenset[str] = frozenset()
    only: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    _steps: int = field(default=0, init=False)

    def sees(self, metric: str) -> bool:
        """Whether it can tell of a metric: latency percentiles, failures, and fidelity where that can be judged."""
        return metric in {*(f"latency_p{one}_ms" for one in PERCENTILES), FAILED_SHARE} | self.judged

    def watch(self, step: PromotionStep) -> Observation:
        """Sends requests for as long as the step is watched; see `registry.ports.Probe`."""
        self._steps += 1
        beside = step.action in BESIDE
        asked = self.target_of(self.production)
        own = self.target_of(self.challenger) if beside else asked
        answers = asyncio.run(self._offer(asked, own, step))
        if all(one.problem for one in answers):
            raise UnreachableError(f"nothing at {asked.url} answers for {self.production}: {_problems(answers)}")
        if not beside:
            # The production Model is the challenger by now, and all were sent where callers ask.
            answers = [_in_its_place(one) for one in answers]
        challenger = {**_latencies(_of_challenger(answers, step), step), FAILED_SHARE: _failed(answers, step)}
        if self.fidelity is not None:
            challenger |= self.fidelity(own)
        split = Counter(one.who or UNNAMED for one in answers if not one.direct and not one.problem)
        return Observation(
            watched_s=step.watch_s,
            challenger=challenger,
            champion=_latencies([one for one in answers if one.who == "champion"], step),
            answered=dict(split),
            notes=_notes(answers),
        )

    async def _offer(self, asked: Target, own: Target, step: PromotionStep) -> list[_Answer]:
        """The answers to requests at random times, in turn to where callers ask and to the challenger itself."""
        rng = np.random.default_rng([self.seed, self._steps])
        count = max(2, math.ceil(self.rate_rps * step.watch_s))
        times = np.sort(rng.uniform(0, step.watch_s, count))
        ways = [
            (make_transport(target, _CONNECTIONS), encode_payloads(self.inputs, target=target))
            for target in (asked, own)
        ]
        loop = asyncio.get_running_loop()
        try:
            for transport, _ in ways:
                await transport.open(_CONNECT_S)
            start, tasks = loop.time() + _LEAD_S, []
            for number, at_s in enumerate(times):
                await asyncio.sleep(max(0.0, start + at_s - loop.time()))
                transport, payloads = ways[number % 2]
                payload = payloads[number // 2 % len(payloads)]
                tasks.append(
                    asyncio.create_task(self._ask(transport, payload, float(at_s), start, direct=number % 2 == 1))
                )
                if number % _LOOK_EVERY == 0 and _is_lost([one.result() for one in tasks if one.done()], step):
                    # Callers need not bear with it until the end.
                    break
            return list(await asyncio.gather(*tasks))
        finally:
            for transport, _ in ways:
                await transport.close()

    async def _ask(self, transport: Transport, payload: Payload, at_s: float, start: float, *, direct: bool) -> _Answer:
        reply = await transport.infer(payload, self.timeout_s)
        latency_ms = (asyncio.get_running_loop().time() - start - at_s) * 1000
        if reply.status != Status.OK:
            problem = reply.message or reply.status.name
            return _Answer(at_s=at_s, latency_ms=math.inf, who="", direct=direct, problem=problem)
        return _Answer(at_s=at_s, latency_ms=latency_ms, who=self._who(reply), direct=direct)

    def _who(self, reply: Reply) -> str:
        names = named_by(reply.headers.get(ROUTE, ""))
        if not names:
            return ""
        known = {self.only[name] for name in names if name in self.only}
        if len(known) == 1:
            return known.pop()
        if names == {self.challenger}:
            return "challenger"
        return "champion" if names == {self.production} else "others"


def named_by(route: str) -> set[str]:
    """Who answered, by a reply's route: ``:<model>_<version>:``, which grows with each model on the way.

    A pipeline's has ``:<name>.pipeline:``, too; then the models are its own.
    """
    parts = [part for part in re.split(r"[:,\s]+", route) if part]
    pipelines = {part.removesuffix(_PIPELINE) for part in parts if part.endswith(_PIPELINE)}
    return pipelines or {part.rpartition("_")[0] for part in parts}


def requests_watched(rate_rps: float, watch_s: float) -> int:
    """How many requests the challenger answers at least while a step is watched."""
    return math.floor(rate_rps * watch_s / 2)


def requests_needed(metric: str) -> int:
    """How many requests of the challenger it takes to decide on a limit of the metric; 0 where that is not known.

    They are divided into parts by chance, each of which has to say something of its own.
    """
    if metric == FAILED_SHARE:
        return FOR_ONE_PERCENT
    needed = {f"latency_p{percentile}_ms": RUNS * count for percentile, count in EARNED_IN_RUN.items()}
    return math.ceil(1.2 * needed.get(metric, 0))


def made_up(inputs: Sequence[TensorSpec], *, count: int = 8, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Samples that fit a model's inputs, where there are none: numbers of chance, and 1 for each size that is free."""
    rng = np.random.default_rng(seed)
    made: dict[str, NDArray[Any]] = {}
    for one in inputs:
        shape = (count, *(size if isinstance(size, int) else 1 for size in one.shape[1:]))
        kind = np.dtype(one.dtype)
        values = rng.normal(size=shape) if kind.kind == "f" else rng.integers(0, 2, size=shape)
        made[one.name] = values.astype(kind)
    return made


def share(events: int, count: int) -> Estimate:
    """A share with its exact interval (Clopper and Pearson, 1934); of no events in n the upper end is 3/n."""
    from scipy import stats

    tail = 1 - CONFIDENCE if events in {0, count} else (1 - CONFIDENCE) / 2
    low = 0.0 if events == 0 else float(stats.beta.ppf(tail, events, count - events + 1))
    high = 1.0 if events == count else float(stats.beta.ppf(1 - tail, events + 1, count - events))
    return Estimate(value=events / count, low=low, high=high, runs=count, method="Clopper-Pearson", unit="fraction")


def _in_its_place(answer: _Answer) -> _Answer:
    return replace(answer, direct=False, who="challenger" if answer.who == "champion" else answer.who)


def _of_challenger(answers: Sequence[_Answer], step: PromotionStep) -> list[_Answer]:
    """Its own; what failed where callers ask counts as its, where it has a share of that.

    Once it is in production's place, all are.
    """
    if step.action not in BESIDE:
        return list(answers)
    shared = step.action != "mirror"
    return [one for one in answers if one.direct or one.who == "challenger" or (shared and one.problem)]


def _latencies(answers: Sequence[_Answer], step: PromotionStep) -> dict[str, Estimate]:
    part_s = step.watch_s / RUNS
    runs = [
        np.array([one.latency_ms for one in answers if min(int(one.at_s / part_s), RUNS - 1) == number])
        for number in range(RUNS)
    ]
    found = {f"latency_p{one}_ms": estimate_percentile(runs, one) for one in PERCENTILES}
    return {name: one for name, one in found.items() if one is not None}


def _failed(answers: Sequence[_Answer], step: PromotionStep) -> Estimate:
    own = _of_challenger(answers, step)
    return share(sum(bool(one.problem) for one in own), len(own))


def _is_lost(answers: Sequence[_Answer], step: PromotionStep) -> bool:
    """Whether the challenger fails far more of its requests than it may, beyond doubt."""
    own = _of_challenger(answers, step)
    failed = sum(bool(one.problem) for one in own)
    return failed >= _LEAST_FAILED and (share(failed, len(own)).low or 0.0) > LOST_SHARE


def _problems(answers: Sequence[_Answer]) -> str:
    counted = Counter(one.problem for one in answers if one.problem)
    return "; ".join(f"{problem} ({count} times)" for problem, count in counted.most_common(_MOST_TOLD))


def _notes(answers: Sequence[_Answer]) -> tuple[str, ...]:
    told = []
    if problems := _problems(answers):
        told.append(f"failed: {problems}")
    if any(not one.who and not one.problem for one in answers):
        told.append(f"replies carry no {ROUTE}, so that it is not known who answered")
    return tuple(told)
