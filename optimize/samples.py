"""The user's samples: what calibrates, judges and loads a model."""

import contextlib
import functools
import hashlib
import lzma
import math
import sys
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import InputError
from registry.records import TensorSpec

LABELS = "labels"
SLICES = "slices"
_BESIDE = (LABELS, SLICES)
_HINT = "Give one array per input, samples along its first axis."
_CHUNK_BYTES = 1 << 20

Batch = dict[str, NDArray[Any]]

# What numpy and zipfile raise for files that are damaged, or no archives at all.
_UNREADABLE = (
    ValueError, OSError, EOFError, AttributeError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError, tokenize.TokenError, OverflowError, KeyError,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples of one task, all inputs with the same first dimension.

    Attributes:
        inputs: input name -> array of shape (samples, ...).
        labels: array of shape (samples, ...) that the task metric understands, or None.
        digest: SHA-256 (hex) of names, types, shapes and bytes.
        slices: the group that each sample belongs to, whole numbers or text of shape (samples,), or None.
    """

    inputs: Mapping[str, NDArray[Any]]
    labels: NDArray[Any] | None
    digest: str
    slices: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def batches(self, size: int, *, order: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """The inputs in batches of ``size`` (the last may be smaller), in ``order`` if one is given."""
        indices = np.arange(len(self)) if order is None else order
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            yield {name: array[chosen] for name, array in self.inputs.items()}

    def take(self, count: int) -> "Samples":
        """The first ``count`` samples."""
        inputs = {name: array[:count] for name, array in self.inputs.items()}
        labels, slices = (None if array is None else array[:count] for array in (self.labels, self.slices))
        return from_arrays(inputs, labels, slices)


def from_arrays(
    inputs: Mapping[str, NDArray[Any]], labels: NDArray[Any] | None = None, slices: NDArray[Any] | None = None
) -> Samples:
    """Samples of arrays in memory.

    Raises:
        InputError: there are none, one is a single number, their numbers differ, a float holds NaN or an infinity, or
            the slices are no whole numbers or text, one a sample.
    """
    beside = {name: array for name, array in ((LABELS, labels), (SLICES, slices)) if array is not None}
    named = {**inputs, **beside}
    _check_shapes(inputs, named)
    for name, array in inputs.items():
        _check_finite(name, array)
    return Samples(inputs=dict(inputs), labels=labels, digest=_digest(named), slices=slices)


def load_samples(path: Path, expected: tuple[TensorSpec, ...] | None = None) -> Samples:
    """Samples of an ``.npz`` file: one array per input, and ``labels`` and ``slices`` where there are any.

    Args:
        path: the file; it is read without pickle.
        expected: the inputs the samples must fit, or None to take them as they are.

    Raises:
        InputError: the file is missing or not an ``.npz``, holds objects or more than there is memory for, or does not
            fit ``expected``.
    """
    open_samples(path, expected)  # numpy takes memory for what a header declares before it looks for it
    # The file is opened here: numpy leaves it open where it is no archive.
    with _told(path), path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    labels, slices = arrays.pop(LABELS, None), arrays.pop(SLICES, None)
    with _told(path):
        return from_arrays(arrays, labels, slices)


def array_names(path: Path) -> frozenset[str]:
    """The names of the arrays in an ``.npz`` file, without reading them; none where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except _UNREADABLE:
        return frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayHeader:
    """What a ``.npy`` file says of its array before the values.

    Attributes:
        dtype: of each value.
        shape: first the number of samples.
        fortran_order: whether the first axis is the one that changes fastest.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size_bytes(self) -> int:
        """Of all values."""
        return self.dtype.itemsize * math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


_Described = Mapping[str, NDArray[Any]] | Mapping[str, ArrayHeader]


class StreamedSamples(Mapping[str, NDArray[Any]], ABC):
    """Inputs of samples that are read batch by batch: only one batch is in memory.

    As a mapping, it is input name -> array of shape (samples, ...), for whoever wants all of one array; it is read anew
    each time.
    """

    @property
    @abstractmethod
    def headers(self) -> Mapping[str, ArrayHeader]:
        """Input name -> type and shape."""

    @abstractmethod
    def batches(self, size: int) -> Iterator[Batch]:
        """The inputs in batches of ``size`` (the last may be smaller), in order, from the first each time.

        Raises:
            InputError: a value cannot be read, or a float is NaN or infinite.
        """

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(next(iter(self.headers.values())))

    def through(self, convert: Callable[[Batch], Batch]) -> "StreamedSamples":
        """The samples after a function of one batch that takes each sample by itself and keeps their number."""
        return _Converted(self, convert)

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.headers:
            raise KeyError(name)
        return next(self.batches(self.count))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


class _Converted(StreamedSamples):
    def __init__(self, samples: StreamedSamples, convert: Callable[[Batch], Batch]) -> None:
        self._samples = samples
        self._convert = convert

    @functools.cached_property
    def headers(self) -> Mapping[str, ArrayHeader]:
        first = self._convert(next(self._samples.batches(1)))
        count = self._samples.count
        return {
            name: ArrayHeader(dtype=array.dtype, shape=(count, *array.shape[1:]), fortran_order=False)
            for name, array in first.items()
        }

    def batches(self, size: int) -> Iterator[Batch]:
        return map(self._convert, self._samples.batches(size))


class SampleFile(StreamedSamples):
    """The inputs of an ``.npz`` file, read batch by batch; see `open_samples`.

    An array that was saved in Fortran order has no samples next to each other in the file, and is read as a whole.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, arrays: Mapping[str, ArrayHeader]) -> None:
        """The arrays of ``path`` with the headers that were found there, those of labels and slices among them."""
        self.path = path
        self._arrays = dict(arrays)

    @functools.cached_property
    def headers(self) -> Mapping[str, ArrayHeader]:
        """Input name -> type and shape."""
        return {name: header for name, header in self._arrays.items() if name not in _BESIDE}

    @functools.cached_property
    def digest(self) -> str:
        """The digest that `Samples` of the same file have; all values are read and checked for it, in pieces.

        Raises:
            InputError: the file is damaged, or a float of an input holds NaN or an infinity.
        """
        total = hashlib.sha256()
        for name in sorted(self._arrays):
            header = self._arrays[name]
            total.update(_digest_line(name, header))
            row_bytes = header.dtype.itemsize * math.prod(header.shape[1:])
            rows = max(1, _CHUNK_BYTES // max(1, row_bytes))
            for chunk in self._read([name], rows):
                total.update(_bytes_of(chunk[name]))
        return total.hexdigest()

    def checked(self) -> "SampleFile":
        """The same, after all values were read once.

        Raises:
            InputError: the file is damaged, or a float of an input holds NaN or an infinity.
        """
        _ = self.digest
        return self

    def batches(self, size: int) -> Iterator[Batch]:
        """The inputs in batches of ``size`` (the last may be smaller), in the file's order, from the first each time.

        Raises:
            InputError: the file is damaged or was changed, or a float holds NaN or an infinity.
        """
        return self._read(list(self.headers), size)

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.headers:
            raise KeyError(name)
        return next(self._read([name], self.count))[name]

    def _read(self, names: list[str], size: int) -> Iterator[Batch]:
        """Batches of the named arrays in step."""
        with _told(self.path), contextlib.ExitStack() as opened:
            archive = opened.enter_context(zipfile.ZipFile(self.path))
            readers = {}
            for name in names:
                file = opened.enter_context(archive.open(f"{name}.npy"))
                readers[name] = _batches_of_member(file, self._arrays[name], size)
            for start in range(0, self.count, size):
                batch = {name: next(reader) for name, reader in readers.items()}
                for name, array in batch.items():
                    if name not in _BESIDE:
                        _check_finite(name, array, start=start)
                yield batch


def open_samples(path: Path, expected: tuple[TensorSpec, ...] | None = None) -> SampleFile:
    """The inputs of an ``.npz`` file, to be read batch by batch.

    What `load_samples` refuses is refused here, too, values that are not finite or damaged when they are read.

    Args:
        path: the file; it is read without pickle.
        expected: the inputs the samples must fit, or None to take them as they are.

    Raises:
        InputError: the file is missing or not an ``.npz``, holds objects, or does not fit ``expected``.
    """
    _check_there(path)
    with _told(path), zipfile.ZipFile(path) as archive:
        headers = {}
        for member in archive.infolist():
            name, dot, suffix = member.filename.rpartition(".")
            if (dot, suffix) != (".", "npy"):
                raise ValueError(f"{member.filename!r} in it is not an .npy file")
            with archive.open(member) as file:
                headers[name] = header = _read_header(file)
                if file.tell() + header.size_bytes > member.file_size:
                    raise ValueError(f"{member.filename!r} in it ends before the last sample")
    found = SampleFile(path, headers)
    if expected is not None:
        check_fit(found, expected, where=str(path))
    with _told(path):
        _check_shapes(found.headers, headers)
    return found


def batches_of(samples: Mapping[str, NDArray[Any]], size: int) -> Iterator[Batch]:
    """Arrays or `StreamedSamples` in batches of ``size`` (the last may be smaller)."""
    if isinstance(samples, StreamedSamples):
        yield from samples.batches(size)
        return
    for start in range(0, len(next(iter(samples.values()))), size):
        yield {name: np.ascontiguousarray(array[start : start + size]) for name, array in samples.items()}


def check_fit(arrays: _Described, expected: tuple[TensorSpec, ...], *, where: str) -> None:
    """Returns when the arrays fit the inputs: names, types, and every dimension after the first.

    `StreamedSamples` are judged by their headers.

    Raises:
        InputError: names, a type, or a shape does not fit.
    """
    arrays = arrays.headers if isinstance(arrays, StreamedSamples) else arrays
    names, wanted = sorted(arrays), sorted(spec.name for spec in expected)
    if names != wanted:
        raise InputError(
            f"{where} has arrays {names}, but the model's inputs are {wanted}",
            hint=f"Save one array per input under its name, and labels under {LABELS!r}.",
        )
    for spec in expected:
        array = arrays[spec.name]
        # By name: numpy has no type for some that models have (bfloat16), and one for each length of text.
        # The name does not say in which order the bytes of a number are, which engines take for this machine's.
        if ("str" if array.dtype.kind in "US" else array.dtype.name) != spec.dtype or not array.dtype.isnative:
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


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"no samples at {path}", hint="Write one array per input with numpy.savez(path, **arrays).")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns what numpy and zipfile raise for a file that is no ``.npz`` into one message; all name the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error.message}", hint=error.hint) from error
    except MemoryError as error:
        raise InputError(f"{path} holds more than there is memory for: {error}", hint="Give fewer samples.") from error
    except _UNREADABLE as error:
        raise InputError(f"{path} is not an .npz file of plain arrays: {error}") from error


def _read_header(file: IO[bytes]) -> ArrayHeader:
    npy: Any = np.lib.format  # without types of its own
    version = npy.read_magic(file)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format is for arrays with named fields")
    shape, fortran_order, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which only pickle could read")
    if not all(0 <= length <= sys.maxsize for length in shape):
        raise ValueError(f"{shape} is not the shape of an array")
    return ArrayHeader(dtype=dtype, shape=shape, fortran_order=fortran_order)


def _batches_of_member(file: IO[bytes], known: ArrayHeader, size: int) -> Iterator[NDArray[Any]]:
    if _read_header(file) != known:
        raise ValueError("it was changed while it was in use")
    count = len(known)
    if known.fortran_order:
        whole = _values(file, known.dtype, known.shape[::-1]).T
    for start in range(0, count, size):
        rows = min(size, count - start)
        if known.fortran_order:
            yield np.ascontiguousarray(whole[start : start + rows])
        else:
            yield _values(file, known.dtype, (rows, *known.shape[1:]))


def _values(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    wanted = dtype.itemsize * math.prod(shape)
    content = bytearray(file.read(wanted))
    if len(content) < wanted:
        raise ValueError("it ends before the last sample")
    return np.ndarray(shape, dtype, buffer=content)


def _check_shapes(inputs: _Described, named: _Described) -> None:
    """Returns when all arrays, labels and slices among them, have one entry a sample."""
    if single := [name for name, array in named.items() if not array.ndim]:
        raise InputError(f"the array {single[0]!r} of the samples is a single value, not one a sample", hint=_HINT)
    lengths = {name: len(array) for name, array in named.items()}
    if not inputs or not lengths[next(iter(inputs))]:
        raise InputError("the samples are empty", hint=_HINT)
    if len(set(lengths.values())) > 1:
        raise InputError(f"the arrays of the samples have different lengths: {lengths}")

    if (slices := named.get(SLICES)) is not None and (slices.ndim != 1 or slices.dtype.kind not in "iuUS"):
        raise InputError(
            f"the array {SLICES!r} of the samples has shape {list(slices.shape)} and type {slices.dtype}",
            hint="It names the group of each sample: whole numbers or text, one a sample.",
        )


def _check_finite(name: str, array: NDArray[Any], *, start: int = 0) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = np.argwhere(~np.isfinite(array))[:, 0].min() + start
        raise InputError(f"input {name!r} of the samples holds NaN or an infinity, first in sample {row}")


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(_digest_line(name, array))
        total.update(_bytes_of(array))
    return total.hexdigest()


def _digest_line(name: str, array: NDArray[Any] | ArrayHeader) -> bytes:
    return f"{name} {array.dtype.str} {array.shape}\n".encode()


def _bytes_of(array: NDArray[Any]) -> bytes | memoryview:
    """The bytes of an array in C order, without a copy where numpy can."""
    return array.tobytes() if array.dtype.kind in "US" else array.view(np.uint8).reshape(-1).data
