"""Samples of the source turned into samples of a variant that takes smaller inputs.

A stage of the family ``reduce`` says with `registry.records.Adaptation` how its model's inputs come from the source's.
The same steps then stand between the user's samples and the model wherever it is run: calibration of later stages,
fidelity, screening, and the requests of the load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.samples import Samples, StreamedSamples
from registry import codec
from registry.errors import InputError
from registry.records import Adaptation

Arrays = Mapping[str, NDArray[Any]]


def adapt(inputs: Arrays, steps: Sequence[Adaptation]) -> dict[str, NDArray[Any]]:
    """The samples as the variant takes them; without steps the samples themselves.

    Args:
        inputs: input name -> array (samples, ...) of the source.
        steps: what is done to which input, in order.

    Raises:
        InputError: an input is missing, too small for the step, or holds what the narrower type cannot.
    """
    adapted = dict(inputs)
    for step in steps:
        if step.input not in adapted:
            raise InputError(f"the samples have no input {step.input!r}, which the variant takes in another form")
        adapted[step.input] = _WAYS[step.way](adapted[step.input], step)
    return adapted


def adapt_samples(samples: Samples, steps: Sequence[Adaptation]) -> Samples:
    """The samples with adapted inputs; labels, slices and the digest are those of the samples that they come from."""
    return replace(samples, inputs=adapt(samples.inputs, steps)) if steps else samples


def adapt_calibration(samples: Arrays | None, steps: Sequence[Adaptation]) -> Arrays | None:
    """Calibration samples for the next stage; samples that are streamed are adapted batch by batch."""
    if samples is None or not steps:
        return samples
    if isinstance(samples, StreamedSamples):
        return samples.through(lambda batch: adapt(batch, steps))
    return adapt(samples, steps)


def as_jsonable(steps: Sequence[Adaptation]) -> list[Any]:
    """The steps as a child process is given them."""
    return [codec.to_jsonable(step) for step in steps]


def from_jsonable(steps: Sequence[Any]) -> tuple[Adaptation, ...]:
    """The steps that `as_jsonable` wrote."""
    return tuple(codec.from_jsonable(Adaptation, step) for step in steps)


def describe(step: Adaptation) -> str:
    """The step in a few words for people."""
    if step.way == "cast":
        linear = "" if (step.scale, step.offset) == (1.0, 0.0) else f" of (value - {step.offset:g}) / {step.scale:g}"
        return f"{step.input}: sent as {step.dtype}{linear}"
    sizes = "x".join(map(str, step.sizes))
    return f"{step.input}: {'first' if step.way == 'truncate' else 'resized to'} {sizes}"


def _cast(array: NDArray[Any], step: Adaptation) -> NDArray[Any]:
    target = np.dtype(step.dtype)
    if target.kind not in "iu":
        return array.astype(target)
    bounds = np.iinfo(target)
    if array.dtype.kind in "iu":
        if array.size and (array.min() < bounds.min or array.max() > bounds.max):
            raise InputError(f"the input {step.input!r} of the samples holds values that {target} cannot")
        return array.astype(target)
    whole = np.rint((array.astype(np.float64) - step.offset) / step.scale)
    clipped: NDArray[Any] = np.clip(whole, bounds.min, bounds.max).astype(target)
    return clipped


def _truncate(array: NDArray[Any], step: Adaptation) -> NDArray[Any]:
    for axis, size in zip(step.axes, step.sizes, strict=True):
        _check_size(array, step, axis, size)
        array = np.take(array, np.arange(size), axis=axis)
    return array


def _resize(array: NDArray[Any], step: Adaptation) -> NDArray[Any]:
    resized: NDArray[Any] = array.astype(np.float32)
    for axis, size in zip(step.axes, step.sizes, strict=True):
        _check_size(array, step, axis, size)
        weights = _triangle_weights(array.shape[axis], size)
        resized = np.moveaxis(np.tensordot(resized, weights, axes=(axis, 1)), -1, axis)
    if array.dtype.kind in "iu":
        resized = np.rint(resized)
    return np.ascontiguousarray(resized.astype(array.dtype))


def _triangle_weights(before: int, after: int) -> NDArray[np.float32]:
    """Matrix (after, before) that shrinks an axis: a triangle around each new pixel, as wide as the ratio on each side.

    It is what Pillow and torchvision call bilinear with antialiasing: each old pixel counts.
    """
    ratio = before / after
    centers = (np.arange(after) + 0.5) * ratio - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(before)[None, :] - centers[:, None]) / ratio)
    shares: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def _check_size(array: NDArray[Any], step: Adaptation, axis: int, size: int) -> None:
    if axis >= array.ndim or array.shape[axis] < size:
        raise InputError(
            f"the input {step.input!r} of the samples has shape {list(array.shape)}, and the variant takes {size} "
            f"along axis {axis}",
            hint="Ask the stage for a size below that of the samples.",
        )


_WAYS = {"cast": _cast, "truncate": _truncate, "resize": _resize}
