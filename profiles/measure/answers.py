"""What a server answers to samples, asked for one by one, whoever they are batched with there."""

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.load.payloads import decode_outputs, encode_rows, sample_count
from profiles.load.transports import Status, make_transport
from registry.errors import InputError, UnreachableError
from registry.records import Target

CONCURRENCY = 8
_CONNECT_S = 10.0
_TIMEOUT_S = 30.0


def answers_of(
    target: Target, inputs: Mapping[str, NDArray[Any]], *, timeout_s: float = _TIMEOUT_S, limit_s: float | None = None
) -> dict[str, NDArray[Any]]:
    """Every sample's answer: output -> (samples, ...) array, in the samples' order.

    Args:
        target: any V2 endpoint.
        inputs: input -> (samples, ...) array.
        timeout_s: of each request.
        limit_s: of all of them together; None for none.

    Raises:
        UnreachableError: the server cannot be reached, or does not answer a sample, or not all in time.
        InputError: an answer does not have one row for the one sample that was sent.
    """
    return asyncio.run(_ask_within(target, inputs, timeout_s, limit_s))


async def _ask_within(
    target: Target, inputs: Mapping[str, NDArray[Any]], timeout_s: float, limit_s: float | None
) -> dict[str, NDArray[Any]]:
    if limit_s is None:
        return await _ask(target, inputs, timeout_s)
    try:
        async with asyncio.timeout(limit_s):
            return await _ask(target, inputs, timeout_s)
    except TimeoutError:
        raise UnreachableError(
            f"{target.model} at {target.url} did not answer {sample_count(inputs)} samples within {limit_s:g} s"
        ) from None


async def _ask(target: Target, inputs: Mapping[str, NDArray[Any]], timeout_s: float) -> dict[str, NDArray[Any]]:
    count = sample_count(inputs)
    answers: list[dict[str, NDArray[Any]]] = [{}] * count
    waiting = iter(range(count))
    transport = make_transport(target, CONCURRENCY)

    async def ask_next() -> None:
        for row in waiting:
            reply = await transport.infer(encode_rows(inputs, [row], target), timeout_s)
            if reply.status != Status.OK:
                raise UnreachableError(f"{target.model} at {target.url} does not answer sample {row}: {reply.message}")
            answers[row] = decode_outputs(reply.body, reply.headers, target)

    try:
        await transport.open(_CONNECT_S)
        await asyncio.gather(*(ask_next() for _ in range(CONCURRENCY)))
    finally:
        await transport.close()
    return {name: _stacked(name, [answer.get(name) for answer in answers]) for name in answers[0]}


def _stacked(name: str, answers: list[NDArray[Any] | None]) -> NDArray[Any]:
    known = [answer for answer in answers if answer is not None]
    shapes = {answer.shape for answer in known}
    if len(known) < len(answers) or len(shapes) > 1 or known[0].shape[:1] != (1,):
        raise InputError(
            f"single samples are answered with the output {name!r} in the shapes {sorted(shapes)}, not one row each"
        )
    return np.concatenate(known)
