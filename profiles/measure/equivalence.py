"""Whether a server that batches gives each request its own answer.

A server merges requests that come together into one batch, runs the model once, and splits what came out. Where it
splits wrongly, it is as fast as before and answers every request, some of them with the answer of another. So distinct
requests are sent in bursts, single rows in one and requests of mixed sizes in the next, and of every reply two things
are asked: that it is the reference's answer within a tolerance, and that no other answer of the burst is nearer. The
second finds a swap even where all answers are so much alike that the tolerance lets it pass.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.load.answerer import Answerer, answerer_of, find_stranger
from profiles.load.payloads import (
    Arrays,
    Expected,
    Likeness,
    Payload,
    count_wrong,
    decode_outputs,
    encode_rows,
    sample_count,
)
from profiles.load.transports import Reply, Status, Transport, make_transport
from registry.errors import InputError, UnreachableError
from registry.records import Equivalence, Target

Features = NDArray[np.float64]

TOLERANCE = 0.05
MOST_ROWS = 4
TIMEOUT_S = 30.0
_CONNECT_S = 10.0
_CONNECTIONS = 16
_SIZES = (1, 3, 2, 4)
_FEWEST_BURSTS = 2
# Samples are chosen among so many, and by so many values of each answer: enough to find distinct ones.
_POOL = 512
_VALUES_TO_CHOOSE_BY = 2048
# Of larger answers, so many values are compared; each of them is still held to the tolerance.
_VALUES_TO_COMPARE = 65536
# A row counts as swapped where another's answer is nearer by this factor ...
_NEARER = 2.0
# ... and the two expected answers are further apart than so many times what rounding moves an answer.
_APART = 4.0
_NOISE_QUANTILE = 0.9
_FLOAT32_NOISE = 1e-6
# Where a model's answers depend on their neighbours, so many rows may seem another's; a broken split moves nearly all.
_FORGIVEN = 0.1
_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What samples should be answered with.

    Attributes:
        outputs: output -> (samples, ...) array, each answer found without neighbours, or where they do not count.
        allowance: output -> by how much a value may differ because of other samples in its batch, in the output's own
            unit; for models whose answers depend on their neighbours (dynamic int8), found in process.
    """

    outputs: Arrays
    allowance: Mapping[str, float] = field(default_factory=dict)


def check_equivalence(
    target: Target,
    inputs: Arrays,
    *,
    reference: Reference | None = None,
    requests: int = 64,
    concurrency: int = 16,
    most_rows: int = MOST_ROWS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    budget_s: float | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Equivalence:
    """Asks a server many things at once, and says whether each request got its own answer.

    Args:
        target: any V2 endpoint.
        inputs: input -> (samples, ...) array; the most distinct of them are sent.
        reference: what each sample should be answered with; None to take what the server itself answers to one sample
            at a time.
        requests: how many are sent.
        concurrency: how many at once; at least the batch size, so that batches form.
        most_rows: most samples in one request, where the server takes more than one.
        tolerance: largest deviation, as a share of the largest absolute value of the output over all samples; see
            `profiles.load.payloads.expected_answers`.
        seed: of the choice and the order of samples.
        budget_s: no further burst begins after so long, once there were two.
        timeout_s: of each request.

    Raises:
        UnreachableError: the server cannot be reached, or refuses a sample by itself.
        InputError: samples or answers do not lend themselves to it; the message says why.
    """
    check = _Check(target, inputs, tolerance=tolerance, timeout_s=timeout_s)
    return asyncio.run(
        check.run(
            reference,
            requests=requests,
            concurrency=concurrency,
            most_rows=most_rows,
            seed=seed,
            deadline=None if budget_s is None else time.monotonic() + budget_s,
        )
    )


@dataclass(slots=True)
class _Tally:
    """What has been found so far."""

    requests: int = 0
    rows: int = 0
    failed: int = 0
    first_error: str = ""
    told_apart: int = 0
    worst: float = 0.0
    likenesses: list[tuple[int, Likeness]] = field(default_factory=list)
    swapped: list[tuple[int, int]] = field(default_factory=list)
    answerers: set[Answerer] = field(default_factory=set)


class _Check:
    """One check of one target."""

    def __init__(self, target: Target, inputs: Arrays, *, tolerance: float, timeout_s: float) -> None:
        self._target = target
        self._inputs = inputs
        self._tolerance = tolerance
        self._timeout_s = timeout_s
        self._tally = _Tally()
        self._scale: dict[str, float] = {}

    async def run(
        self,
        reference: Reference | None,
        *,
        requests: int,
        concurrency: int,
        most_rows: int,
        seed: int,
        deadline: float | None,
    ) -> Equivalence:
        """See `check_equivalence`."""
        chance = np.random.default_rng(seed)
        samples = sample_count(self._inputs)
        pool = chance.permutation(samples)[: min(samples, _POOL if reference else requests)]
        transport = make_transport(self._target, min(concurrency, _CONNECTIONS))
        try:
            await transport.open(_CONNECT_S)
            if reference is None:
                reference = await self._ask_alone(transport, pool)
            else:
                await self._answer(transport, encode_rows(self._inputs, pool[:1], self._target))
            sizes = await self._sizes(transport, pool, most_rows)
            self._scale = {name: _largest(reference.outputs[name]) for name in _float_outputs(reference.outputs)}
            known = {name: array[pool] for name, array in reference.outputs.items()}
            features = _features(known, self._scale, _VALUES_TO_CHOOSE_BY)
            chosen = [int(pool[row]) for row in far_apart(features, requests)]
            for number, burst in enumerate(_bursts(chosen, requests, concurrency, sizes, chance)):
                if deadline is not None and number >= _FEWEST_BURSTS and time.monotonic() > deadline:
                    break
                await self._burst(transport, burst, reference)
        finally:
            await transport.close()
        return self._found(reference)

    async def _sizes(self, transport: Transport, pool: NDArray[np.int64], most_rows: int) -> tuple[int, ...]:
        """Sizes of requests that the server takes: single rows alone where it refuses more than one at a time."""
        sizes = tuple(size for size in _SIZES if size <= min(most_rows, len(pool)))
        if max(sizes) == 1:
            return (1,)
        reply = await transport.infer(
            encode_rows(self._inputs, pool[: max(sizes)], self._target), timeout_s=self._timeout_s
        )
        return sizes if reply.status == Status.OK else (1,)

    # --- asking ---

    async def _ask_alone(self, transport: Transport, pool: NDArray[np.int64]) -> Reference:
        """What the server answers to one sample at a time."""
        alone = [await self._answer(transport, encode_rows(self._inputs, [row], self._target)) for row in pool]
        outputs = {}
        for name, first in alone[0].items():
            shapes = {answer[name].shape if name in answer else None for answer in alone}
            if len(shapes) > 1 or first.shape[:1] != (1,):
                raise InputError(
                    f"the output {name!r} has no row for each sample: single samples are answered with shapes {shapes}",
                    hint="Only models that answer each sample with a row of its own can be batched, and checked so.",
                )
            known = np.zeros((sample_count(self._inputs), *first.shape[1:]), dtype=first.dtype)
            known[pool] = np.concatenate([answer[name] for answer in alone])
            outputs[name] = known
        return Reference(outputs=outputs)

    async def _answer(self, transport: Transport, payload: Payload) -> dict[str, NDArray[Any]]:
        reply = await transport.infer(payload, self._timeout_s)
        if reply.status != Status.OK:
            raise UnreachableError(
                f"{self._target.protocol} request for model {self._target.model!r} at {self._target.url} failed: "
                f"{reply.message}",
                hint="Check the address, the model's name, and that inputs have the model's names, shapes and types.",
            )
        self._tally.answerers.add(answerer_of(reply.body, reply.headers, self._target))
        return decode_outputs(reply.body, reply.headers, self._target)

    async def _burst(self, transport: Transport, burst: Sequence[Sequence[int]], reference: Reference) -> None:
        payloads = [encode_rows(self._inputs, rows, self._target) for rows in burst]
        replies = await asyncio.gather(*(transport.infer(payload, self._timeout_s) for payload in payloads))
        self._judge(payloads, replies, reference)

    # --- judging ---

    def _judge(self, payloads: Sequence[Payload], replies: Sequence[Reply], reference: Reference) -> None:
        tally = self._tally
        expected = Expected(
            outputs=tuple(
                {name: array[list(payload.rows)] for name, array in reference.outputs.items()} for payload in payloads
            ),
            absolute={
                name: self._tolerance * largest + reference.allowance.get(name, 0.0)
                for name, largest in self._scale.items()
            },
        )
        rows: list[int] = []
        answers: list[Arrays] = []
        for index, (payload, reply) in enumerate(zip(payloads, replies, strict=True)):
            tally.requests += 1
            tally.rows += len(payload.rows)
            if reply.status != Status.OK:
                tally.failed += 1
                tally.first_error = tally.first_error or reply.message
                continue
            tally.answerers.add(answerer_of(reply.body, reply.headers, self._target))
            try:
                answer = decode_outputs(reply.body, reply.headers, self._target)
            except UnreachableError:
                tally.likenesses.append((tally.requests, "wrong"))
                continue
            tally.likenesses.append((tally.requests, expected.compare(index, answer)))
            if _fits(answer, expected.outputs[index]):
                tally.worst = max(tally.worst, _deviation(answer, expected.outputs[index], self._scale))
                rows += payload.rows
                answers.append(answer)
        self._look_for_swaps(rows, answers, reference)

    def _look_for_swaps(self, rows: list[int], answers: list[Arrays], reference: Reference) -> None:
        if len(rows) < 2:
            return
        got = {name: np.concatenate([answer[name] for answer in answers]) for name in reference.outputs}
        want = {name: array[rows] for name, array in reference.outputs.items()}
        came, due = (_features(each, self._scale, _VALUES_TO_COMPARE) for each in (got, want))
        swaps, apart = find_swaps(came, due, rows)
        self._tally.told_apart += apart
        moved = _within(got, want, reference.allowance)
        self._tally.swapped += [(rows[one], rows[other]) for one, other in swaps if not moved[one]]

    def _found(self, reference: Reference) -> Equivalence:
        tally = self._tally
        wrong = count_wrong(tally.likenesses)
        return Equivalence(
            requests=tally.requests,
            rows=tally.rows,
            failed=tally.failed,
            wrong=wrong,
            swapped=tuple(tally.swapped),
            told_apart=tally.told_apart,
            worst=tally.worst,
            reason=self._reason(wrong, dependent=any(reference.allowance.values())),
        )

    def _reason(self, wrong: int, *, dependent: bool) -> str:
        tally = self._tally
        stranger = find_stranger(tally.answerers, self._target)
        forgiven = _FORGIVEN if dependent else 0.0
        if stranger is not None:
            return stranger
        if tally.failed:
            return f"{tally.failed} of {tally.requests} concurrent requests failed: {tally.first_error}"
        # One row on the edge of two answers may fall to either side; a swap moves two.
        if len(tally.swapped) > max(1.0, forgiven * tally.rows):
            pairs = ", ".join(f"{one} got that of {other}" for one, other in tally.swapped[:_NAMED])
            more = ", ..." if len(tally.swapped) > _NAMED else ""
            return (
                f"{len(tally.swapped)} of {tally.rows} samples that were asked at once got the answer of another one "
                f"(sample {pairs}{more}): the server does not split its batches rightly"
            )
        if wrong > forgiven * tally.requests:
            return (
                f"{wrong} of {tally.requests} concurrent requests were not answered as the same samples are "
                f"by themselves: values deviate by up to {tally.worst:.1%} of the output's largest "
                f"(tolerance {self._tolerance:.1%}), or have another shape"
            )
        return ""


def far_apart(features: Features, count: int) -> list[int]:
    """Rows in an order in which each is as far from all before it as any can be, at most ``count``.

    The greedy choice of Gonzalez (Clustering to minimize the maximum intercluster distance, 1985): no choice of as many
    has a smallest distance more than twice as large.
    """
    chosen = [0]
    nearest = np.linalg.norm(features - features[0], axis=1)
    while len(chosen) < min(count, len(features)):
        chosen.append(int(np.argmax(np.where(np.isin(np.arange(len(features)), chosen), -1.0, nearest))))
        nearest = np.minimum(nearest, np.linalg.norm(features - features[chosen[-1]], axis=1))
    return chosen


def find_swaps(answers: Features, expected: Features, samples: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """Rows that were answered with what another should have got.

    What rounding moves an answer by is taken from the answers themselves: how far each is from the nearest expected
    one, whichever that is, so that a server that swaps everything does not pass for one that rounds coarsely.

    Args:
        answers: one row a sample.
        expected: what each should be.
        samples: which sample each row is of; one may be there more than once.

    Returns:
        (row, the row whose answer it got) for each such, and how many rows could be told from all other samples.
    """
    center = expected.mean(axis=0)
    answers, expected = answers - center, expected - center
    distance = _distances(answers, expected)
    between = _distances(expected, expected)
    noise = float(np.quantile(distance.min(axis=1), _NOISE_QUANTILE))
    magnitude = float(np.linalg.norm(expected + center, axis=1).max())
    apart = between > _APART * noise + _FLOAT32_NOISE * magnitude
    own = np.diag(distance)
    others = np.where(apart, distance, np.inf)
    best = others.argmin(axis=1)
    swapped = own > _NEARER * others.min(axis=1)
    same = np.equal.outer(samples, samples)
    told_apart = int((apart | same).all(axis=1).sum())
    return [(int(row), int(best[row])) for row in np.flatnonzero(swapped)], told_apart


def _distances(one: Features, other: Features) -> Features:
    """Euclidean distance of each row to each, through one matrix product; rows are centered, so that little cancels."""
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :] - 2 * one @ other.T
    distances: Features = np.sqrt(np.maximum(squares, 0.0))
    return distances


def _bursts(
    chosen: Sequence[int], requests: int, concurrency: int, sizes: Sequence[int], chance: np.random.Generator
) -> list[list[list[int]]]:
    """Bursts of requests, each a list of rows: single rows and mixed sizes in turn, spread over the chosen rows.

    Rows chosen next to each other are far apart, so that a burst takes each so many-th of them.
    """
    stride = max(1, len(chosen) // concurrency)
    order = [row for start in range(stride) for row in chosen[start::stride]]
    bursts: list[list[list[int]]] = []
    place, left = 0, requests
    while left > 0:
        width = min(concurrency, left)
        lengths = [1 if len(bursts) % 2 == 0 else sizes[one % len(sizes)] for one in range(width)]
        rows = [order[(place + one) % len(order)] for one in range(sum(lengths))]
        place += len(rows)
        ends = np.cumsum(lengths)
        burst = [rows[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        bursts.append([burst[one] for one in chance.permutation(width)])
        left -= width
    return bursts


def _float_outputs(outputs: Arrays) -> list[str]:
    return [name for name, array in outputs.items() if array.dtype.kind == "f" and array.size]


def _features(outputs: Arrays, scale: Mapping[str, float], values: int) -> Features:
    """One row a sample: the outputs of floats, each as a share of its ``scale``.

    Of more than about ``values`` values, every so many-th. Where no output is of floats, rows are empty.
    """
    rows = len(next(iter(outputs.values())))
    parts = [np.zeros((rows, 0))]
    for name, largest in scale.items():
        flat = outputs[name].reshape(rows, -1)
        flat = flat[:, :: max(1, flat.shape[1] * len(scale) // values)].astype(np.float64)
        parts.append(np.nan_to_num(flat, posinf=0.0, neginf=0.0) / largest)
    return np.concatenate(parts, axis=1)


def _largest(array: NDArray[Any]) -> float:
    """The largest absolute value; 1 where there is none but 0."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0)) or 1.0


def _within(got: Arrays, want: Arrays, allowance: Mapping[str, float]) -> NDArray[np.bool_]:
    """Of each row, whether it is no farther off than its neighbours in a batch may have moved it."""
    within = np.full(len(next(iter(want.values()))), any(allowance.values()))
    for name, array in want.items():
        if array.dtype.kind == "f":
            with np.errstate(invalid="ignore"):  # of two infinities
                off = np.abs(got[name].astype(np.float64) - array).reshape(len(array), -1)
            within &= np.nan_to_num(off, posinf=np.inf).max(axis=1, initial=0.0) <= allowance.get(name, 0.0)
    return within


def _fits(answer: Arrays, expected: Arrays) -> bool:
    return all(
        name in answer and answer[name].shape == array.shape and answer[name].dtype.kind == array.dtype.kind
        for name, array in expected.items()
    )


def _deviation(answer: Arrays, expected: Arrays, scale: Mapping[str, float]) -> float:
    """The largest difference of a value, as a share of its output's largest."""
    shares = [0.0]
    for name, largest in scale.items():
        with np.errstate(invalid="ignore"):  # of two infinities
            apart = np.abs(answer[name].astype(np.float64) - expected[name])
        shares.append(float(np.nan_to_num(apart, posinf=0.0).max(initial=0)) / largest)
    return max(shares)
