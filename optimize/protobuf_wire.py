"""A walk over the bytes of a protobuf message, which parses nothing and so needs no memory for what it passes.

Source: Protocol Buffers documentation, "Encoding".
"""

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

Span = tuple[int, int]
"""The first byte of something in a file, and the byte after its last."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def length_fields(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Each field with a length (messages, strings, bytes, packed numbers) of the message that takes these bytes.

    Args:
        data: the file.
        begin: the message's first byte.
        end: the byte after its last.

    Yields:
        The field's number, its content's first byte, and the byte after its last.

    Raises:
        ValueError: the bytes do not follow the wire format.
    """
    for key, _, start, place in _fields(data, begin, end):
        if key & 7 == _LENGTH:
            yield key >> 3, start, place


def without(data: mmap.mmap, message: Span, *numbers: int) -> bytes:
    """The bytes of a message without its fields of these numbers, which are not looked at.

    Raises:
        ValueError: the bytes do not follow the wire format.
    """
    kept = (data[first:place] for key, first, _, place in _fields(data, *message) if key >> 3 not in numbers)
    return b"".join(kept)


def _fields(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Key, first byte, content's first byte and the byte after the last of each field of a message."""
    place = begin
    while place < end:
        first = place
        key, start = _varint(data, place, end)
        kind, place = key & 7, start
        if kind == _VARINT:
            _, place = _varint(data, start, end)
        elif kind == _LENGTH:
            length, start = _varint(data, start, end)
            place = start + length
        elif kind in {_FIXED64, _FIXED32}:
            place = start + (8 if kind == _FIXED64 else 4)
        else:
            place = end + 1
        if place > end:
            raise ValueError("it does not follow protobuf's wire format")
        yield key, first, start, place


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes, read as they are looked at.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def contents(data: mmap.mmap, message: Span, *numbers: int) -> Iterator[Span]:
    """Where the contents of a message's fields of these numbers are.

    Raises:
        ValueError: the bytes do not follow the wire format.
    """
    return ((begin, end) for number, begin, end in length_fields(data, *message) if number in numbers)


def _varint(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """The number of variable length at a place, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number in it does not end")
