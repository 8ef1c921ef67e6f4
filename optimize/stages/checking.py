"""Models run on example inputs, to see that a stage's model answers as the source does."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.stages.base import StageInput, StageResult, first_line
from registry.errors import NotApplicableError
from registry.records import TensorSpec

Arrays = Mapping[str, NDArray[Any]]

# Sizes tried for dimensions that are free: graphs differ in the smallest that they take.
_FREE_SIZES = (8, 32, 224)
# Other kernels add in another order; the rest of float32 is well below this share of the largest value.
_TOLERANCE = 1e-3


def example_feeds(inputs: Sequence[TensorSpec], *, count: int, free: int = 8, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs to try a model with: normal numbers for floats, 0 or 1 for all others.

    Args:
        inputs: the model's.
        count: the size of a first dimension that is free.
        free: the size of other free dimensions.
        seed: of the numbers.
    """
    random = np.random.default_rng(seed)
    feeds = {}
    for spec in inputs:
        sizes = [count if axis == 0 else free for axis in range(len(spec.shape))]
        shape = tuple(dim if isinstance(dim, int) else size for dim, size in zip(spec.shape, sizes, strict=True))
        values = random.standard_normal(shape) if spec.dtype.startswith("float") else random.integers(0, 2, shape)
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds


class Runner:
    """An ONNX model in a session of ONNX Runtime that keeps to the plain graph."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Opens the session.

        Raises:
            NotApplicableError: ONNX Runtime cannot load the model.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the exceptions of ONNX Runtime share no class of their own
            raise NotApplicableError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
        self.outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, feeds: Arrays) -> list[NDArray[Any]]:
        """The outputs, in the graph's order.

        Raises:
            NotApplicableError: the model cannot be run on these.
        """
        try:
            return list(self._session.run(None, dict(feeds)))
        except Exception as error:  # the exceptions of ONNX Runtime share no class of their own
            raise NotApplicableError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error


def runs_on(runner: Runner, inputs: Sequence[TensorSpec], *, count: int = 1, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Example inputs that the model can be run on.

    Raises:
        NotApplicableError: none of those tried can.
    """
    for free in _FREE_SIZES:
        feeds = example_feeds(inputs, count=count, free=free, seed=seed)
        try:
            runner(feeds)
        except NotApplicableError:
            if free == _FREE_SIZES[-1] or all(isinstance(dim, int) for spec in inputs for dim in spec.shape[1:]):
                raise
            continue
        return feeds
    raise AssertionError("unreachable")


def with_same_answers(stage: str, source: StageInput, made: StageResult, *, threads: int = 1) -> StageResult:
    """The result, when both models give the same answers to an example that both take.

    A source that ONNX Runtime here cannot run is no fault of the stage: a note then says that nothing was compared.

    Raises:
        NotApplicableError: they do not, or the new one cannot be run.
    """
    try:
        before = Runner(source.path, threads=threads)
        feeds = runs_on(before, made.inputs)
        expected = before(feeds)
    except NotApplicableError as error:
        return replace(made, notes=(*made.notes, f"answers were not compared with the source's: {error.message}"))
    try:
        after = Runner(made.folder / made.entry, threads=threads)(feeds)
    except NotApplicableError as error:
        raise NotApplicableError(f"{stage}: the new model does not work; {error.message}") from error
    for name, wanted, got in zip(before.outputs, expected, after, strict=True):
        if not alike(wanted, got):
            raise NotApplicableError(f"{stage}: the new model answers otherwise in its output {name!r}")
    return made


def alike(wanted: NDArray[Any], got: NDArray[Any]) -> bool:
    """Whether two arrays are equal: whole numbers exactly, floats up to a thousandth of the largest value."""
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    if wanted.dtype.kind != "f":
        return bool((wanted == got).all())
    finite = np.abs(wanted[np.isfinite(wanted)])
    largest = float(finite.max()) if finite.size else 0.0
    return bool(np.allclose(got, wanted, rtol=0.0, atol=_TOLERANCE * max(largest, 1e-6), equal_nan=True))
