"""The user's samples: what calibrates, judges and loads a model."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import InputError
from registry.records import TensorSpec

LABELS = "labels"

# What numpy and zipfile raise for files that are damaged, or no archives at all.
_UNREADABLE = (
    ValueError, OSError, EOFError, AttributeError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples of one task, all inputs with the same first dimension.

    Attributes:
        inputs: input name -> array of shape (samples, ...).
        labels: array of shape (samples, ...) that the task metric understands, or None.
        digest: SHA-256 (hex) of names, types, shapes and bytes.
    """

    inputs: Mapping[str, NDArray[Any]]
    labels: NDArray[Any] | None
    digest: str

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def batches(self, size: int, *, order: NDArray[np.int64] | None = None) -> Iterator[dict[str, NDArray[Any]]]:
        """The inputs in batches of ``size`` (the last may be smaller), in ``order`` if one is given."""
        indices = np.arange(len(self)) if order is None else order
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            yield {name: array[chosen] for name, array in self.inputs.items()}

    def take(self, count: int) -> "Samples":
        """The first ``count`` samples."""
        inputs = {name: array[:count] for name, array in self.inputs.items()}
        return from_arrays(inputs, None if self.labels is None else self.labels[:count])


def from_arrays(inputs: Mapping[str, NDArray[Any]], labels: NDArray[Any] | None = None) -> Samples:
    """Samples of arrays in memory.

    Raises:
        InputError: there are none, one is a single number, their numbers differ, or a float holds NaN or an infinity.
    """
    hint = "Give one array per input, samples along its first axis."
    named = dict(inputs) if labels is None else {**inputs, LABELS: labels}
    if single := [name for name, array in named.items() if not array.ndim]:
        raise InputError(f"the array {single[0]!r} of the samples is a single value, not one a sample", hint=hint)
    if not inputs or not len(next(iter(inputs.values()))):
        raise InputError("the samples are empty", hint=hint)
    lengths = {name: len(array) for name, array in named.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"the arrays of the samples have different lengths: {lengths}")
    for name, array in inputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            rows = np.unique(np.argwhere(~np.isfinite(array))[:, 0])
            raise InputError(f"input {name!r} of the samples holds NaN or an infinity, first in sample {rows[0]}")
    return Samples(inputs=dict(inputs), labels=labels, digest=_digest(named))


def load_samples(path: Path, expected: tuple[TensorSpec, ...] | None = None) -> Samples:
    """Samples of an ``.npz`` file: one array per input, and ``labels`` where there are any.

    Args:
        path: the file; it is read without pickle.
        expected: the inputs the samples must fit, or None to take them as they are.

    Raises:
        InputError: the file is missing or not an ``.npz``, holds objects, or does not fit ``expected``.
    """
    if not path.is_file():
        raise InputError(f"no samples at {path}", hint="Write one array per input with numpy.savez(path, **arrays).")
    try:
        # The file is opened here: numpy leaves it open where it is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise InputError(f"{path} is not an .npz file of plain arrays: {error}") from error
    labels = arrays.pop(LABELS, None)
    if expected is not None:
        check_fit(arrays, expected, where=str(path))
    return from_arrays(arrays, labels)


def check_fit(arrays: Mapping[str, NDArray[Any]], expected: tuple[TensorSpec, ...], *, where: str) -> None:
    """Returns when the arrays fit the inputs: names, types, and every dimension after the first.

    Raises:
        InputError: names, a type, or a shape does not fit.
    """
    names, wanted = sorted(arrays), sorted(spec.name for spec in expected)
    if names != wanted:
        raise InputError(
            f"{where} has arrays {names}, but the model's inputs are {wanted}",
            hint=f"Save one array per input under its name, and labels under {LABELS!r}.",
        )
    for spec in expected:
        array = arrays[spec.name]
        # By name: numpy has no type for some that models have (bfloat16), and one for each length of text.
        if ("str" if array.dtype.kind in "US" else array.dtype.name) != spec.dtype:
            raise InputError(
                f"{where}: input {spec.name!r} is {array.dtype}, but the model takes {spec.dtype}",
                hint=f"Convert it with .astype({spec.dtype!r}).",
            )
        pairs = zip(array.shape[1:], spec.shape[1:], strict=False)
        if array.ndim != len(spec.shape) or any(isinstance(want, int) and have != want for have, want in pairs):
            shape = [dim if dim is not None else "?" for dim in spec.shape]
            raise InputError(
                f"{where}: input {spec.name!r} has shape {list(array.shape)}, but the model takes {shape}",
                hint="The first axis counts the samples; the others must be the model's.",
            )


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(array.view(np.uint8).reshape(-1).data if array.dtype.kind not in "US" else array.tobytes())
    return total.hexdigest()
