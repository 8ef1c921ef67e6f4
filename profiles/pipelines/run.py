"""A request's way through the graph, each step asked in its turn: what Kafka does on Core 2, done in one process."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.pipelines.checks import renamed
from profiles.pipelines.graph import Gathering, Pipeline, Source, in_order
from registry.errors import InputError, UnreachableError

Arrays = dict[str, NDArray[Any]]
Call = Callable[[str, Arrays], Awaitable[Arrays]]
"""(step, its inputs) -> its outputs."""

_Coming = asyncio.Task[Arrays | None]
# The event loop itself holds tasks only weakly.
_LEFT: set[_Coming] = set()


async def run_graph(
    pipeline: Pipeline, call: Call, inputs: Mapping[str, NDArray[Any]], *, wait_windows: bool = True
) -> tuple[Arrays, dict[str, Arrays]]:
    """One request.

    A source that names a tensor which the answer does not have never comes: so steps choose where a message goes. With
    ``any`` the first that comes is taken, and later ones are not looked at.

    Args:
        pipeline: without cycles.
        call: asks a step's model.
        inputs: the pipeline's, by name.
        wait_windows: whether an ``outer`` join waits until its window ends for what will never come, as Core 2 does.

    Returns:
        The pipeline's outputs, and what each step that was reached got.

    Raises:
        InputError: the pipeline goes round.
        UnreachableError: no output ever comes, or a step's server refused.
    """
    run = _Run(pipeline, call, dict(inputs), wait_windows)
    return await run.answer()


class _Run:
    def __init__(self, pipeline: Pipeline, call: Call, inputs: Arrays, wait_windows: bool) -> None:
        self._pipeline = pipeline
        self._call = call
        self._inputs = inputs
        self._wait = wait_windows
        self._ready: dict[str, _Coming] = {}
        self._done: dict[str, _Coming] = {}

    async def answer(self) -> tuple[Arrays, dict[str, Arrays]]:
        answered = False
        try:
            for name in in_order(self._pipeline):
                self._ready[name] = asyncio.create_task(self._gather_step(name))
                self._done[name] = asyncio.create_task(self._ask(name))
            found = await self._gather(self._pipeline.ending, self._pipeline.output_map)
            if found is None:
                raise UnreachableError(
                    f"the pipeline {self._pipeline.name!r} gave no answer: no output was reached",
                    hint="On Core 2 this request would time out.",
                )
            if not self._wait:
                await asyncio.gather(*self._done.values())
            answered = True
            reached = {name: task for name, task in self._ready.items() if task.done()}
            return found, {name: got for name, task in reached.items() if (got := task.result()) is not None}
        finally:
            await self._leave(cancel=not answered)

    async def _leave(self, *, cancel: bool) -> None:
        """Steps beside the output go on, as on Core 2, and nobody waits for them; after an error all end."""
        tasks = (*self._done.values(), *self._ready.values())
        if cancel:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return
        for task in tasks:
            if not task.done():
                _LEFT.add(task)
                task.add_done_callback(_forget)

    async def _ask(self, name: str) -> Arrays | None:
        got = await self._ready[name]
        return None if got is None else await self._call(name, got)

    async def _gather_step(self, name: str) -> Arrays | None:
        step = self._pipeline.step(name)
        if step.triggers is None:
            return await self._gather(step.inputs, step.tensor_map)
        both = await asyncio.gather(self._gather(step.inputs, step.tensor_map), self._gather(step.triggers, {}))
        return None if any(part is None for part in both) else both[0]

    async def _gather(self, gathering: Gathering, names: Mapping[str, str]) -> Arrays | None:
        """The tensors of a join under their names; None where it never fires."""
        coming = [asyncio.ensure_future(self._take(source, names)) for source in gathering.sources]
        if len(coming) == 1:
            return await coming[0]
        if gathering.join == "any":
            return await _first(coming)
        if gathering.join == "inner":
            came = await asyncio.gather(*coming)
            return None if any(one is None for one in came) else _merged(one for one in came if one is not None)
        return await self._outer(coming, gathering.window_ms)

    async def _outer(self, coming: Sequence["asyncio.Future[Arrays | None]"], window_ms: float) -> Arrays | None:
        first = await _first(coming)
        if first is None:
            return None
        opened = asyncio.get_running_loop().time()
        done, _ = await asyncio.wait(coming, timeout=window_ms / 1000)
        came = [one.result() for one in coming if one in done]
        if self._wait and len([one for one in came if one is not None]) < len(coming):
            await asyncio.sleep(max(0.0, opened + window_ms / 1000 - asyncio.get_running_loop().time()))
        return _merged(one for one in came if one is not None)

    async def _take(self, source: Source, names: Mapping[str, str]) -> Arrays | None:
        if source.step is None:
            got: Arrays | None = self._inputs
        else:
            got = await asyncio.shield((self._ready if source.side == "inputs" else self._done)[source.step])
        if got is None or (source.tensor is not None and source.tensor not in got):
            return None
        taken = got if source.tensor is None else {source.tensor: got[source.tensor]}
        return {renamed(names, source, tensor, self._pipeline): array for tensor, array in taken.items()}


def _forget(task: _Coming) -> None:
    _LEFT.discard(task)
    if not task.cancelled():
        task.exception()  # nobody else asks, and asyncio would complain


async def _first(coming: Sequence["asyncio.Future[Arrays | None]"]) -> Arrays | None:
    for one in asyncio.as_completed(coming):
        if (found := await one) is not None:
            return found
    return None


def _merged(parts: Any) -> Arrays:
    return {name: array for part in parts for name, array in part.items()}


def run_samples(
    pipeline: Pipeline,
    models: Mapping[str, Callable[[Arrays], Arrays]],
    inputs: Mapping[str, NDArray[Any]],
    *,
    rows: int = 1,
) -> tuple[Arrays, dict[str, Arrays]]:
    """Every sample through the graph in this process, one after the other.

    Args:
        pipeline: without cycles.
        models: step -> its model: arrays in and out by name.
        inputs: input -> (samples, ...) array.
        rows: samples in one request; 1 where a step chooses by what it gets.

    Returns:
        Output -> (samples, ...) array, and step -> input -> (samples, ...) array of all that reached it.

    Raises:
        InputError: the pipeline goes round, or its answers do not have one row a sample.
        UnreachableError: a sample got no answer.
    """

    async def call(step: str, got: Arrays) -> Arrays:
        return models[step](got)

    async def everything() -> list[tuple[Arrays, dict[str, Arrays]]]:
        count = len(next(iter(inputs.values())))
        chunks = ({name: array[n : n + rows] for name, array in inputs.items()} for n in range(0, count, rows))
        return [await run_graph(pipeline, call, chunk, wait_windows=False) for chunk in chunks]

    made = asyncio.run(everything())
    outputs = _stacked([answer for answer, _ in made])
    if {len(array) for array in outputs.values()} != {len(next(iter(inputs.values())))}:
        raise InputError(f"the answers of {pipeline.name!r} do not have one row a sample")
    seen = {name: _stacked([trace[name] for _, trace in made if name in trace]) for name in pipeline.names}
    return outputs, seen


def _stacked(parts: Sequence[Arrays]) -> Arrays:
    """Rows put together, of the tensors that all parts have."""
    names = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {
        name: np.concatenate([part[name] for part in parts]) for part in parts[:1] for name in part if name in names
    }
