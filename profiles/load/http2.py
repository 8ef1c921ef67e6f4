"""As much of HTTP/2 as calls of gRPC take, with the work of each request kept small.

Neither side's encoder of headers remembers anything here: a block of headers always means the same, so that one that
came before need not be decoded again. Source: RFC 9113, "HTTP/2"; RFC 7541, "HPACK".
"""

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_BYTES = 9
MOST_WINDOW = (1 << 31) - 1
FIRST_WINDOW = (1 << 16) - 1
FIRST_FRAME_SIZE = 1 << 14
# A foreign header block longer than this is not kept for the next time, nor are more of them than this.
MOST_BLOCK_BYTES, MOST_BLOCKS = 4096, 1024
# A header block in several frames is no longer than this.
MOST_HEADER_BYTES = 1 << 18

END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
CANCEL, REFUSED_STREAM = 0x8, 0x7

_HEAD = struct.Struct(">HBBBI")
_SETTING = struct.Struct(">HI")
_NUMBER = struct.Struct(">I")


class Kind(IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Setting(IntEnum):
    """Settings that matter here."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5


# RFC 9113, section 6.5.2.
_ALLOWED = {
    Setting.INITIAL_WINDOW_SIZE: range(MOST_WINDOW + 1),
    Setting.MAX_FRAME_SIZE: range(FIRST_FRAME_SIZE, 1 << 24),
}


class Http2Error(ValueError):
    """The other side does not speak HTTP/2 as it should."""


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    """One frame."""
    return head(len(content), kind, flags, stream) + content


def head(length: int, kind: int, flags: int, stream: int) -> bytes:
    """The head of a frame with so many bytes of content."""
    return _HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream)


def settings(values: dict[Setting, int]) -> bytes:
    """A frame of settings."""
    return frame(Kind.SETTINGS, 0, 0, b"".join(_SETTING.pack(name, value) for name, value in values.items()))


def read_settings(content: bytes) -> Iterator[tuple[int, int]]:
    """(name, value) of each of a frame's settings.

    Raises:
        Http2Error: one is cut off, or has a value that it may not have.
    """
    if len(content) % _SETTING.size:
        raise Http2Error("settings that are cut off")
    for name, value in _SETTING.iter_unpack(content):
        if name in _ALLOWED and value not in _ALLOWED[name]:
            raise Http2Error(f"{Setting(name).name} of {value}")
        yield name, value


def window_update(stream: int, more: int) -> bytes:
    """A frame that lets the other side send more; stream 0 is the whole connection."""
    return frame(Kind.WINDOW_UPDATE, 0, stream, _NUMBER.pack(more))


def reset(stream: int, code: int) -> bytes:
    """A frame that gives a stream up."""
    return frame(Kind.RST_STREAM, 0, stream, _NUMBER.pack(code))


def number(content: bytes, start: int = 0) -> int:
    """The number of 31 bits that stands there."""
    if len(content) < start + _NUMBER.size:
        raise Http2Error("a frame that is cut off")
    found: int = _NUMBER.unpack_from(content, start)[0] & MOST_WINDOW
    return found


def unpadded(content: bytes, flags: int) -> bytes:
    """What a frame of data or headers holds beside its padding and priority."""
    if not flags & (PADDED | PRIORITY):
        return content
    start, end = 0, len(content)
    if flags & PADDED:
        start, end = 1, end - content[0] if content else -1
    if flags & PRIORITY:
        start += 5
    if start > end:
        raise Http2Error("more padding than content")
    return content[start:end]


class Frames:
    """Splits what comes into frames.

    Args:
        most: the longest that the other side may send, in bytes.
    """

    def __init__(self, most: int = FIRST_FRAME_SIZE) -> None:
        self._rest = b""
        self._most = most

    def split(self, data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """(type, flags, stream, content) of each frame that is complete; the rest is kept for the next time.

        Raises:
            Http2Error: a frame is longer than any that was asked for.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        start, most = 0, len(data)
        while most - start >= FRAME_BYTES:
            high, low, kind, flags, stream = _HEAD.unpack_from(data, start)
            length = high << 8 | low
            if length > self._most:
                raise Http2Error(f"a frame of {length} bytes")
            end = start + FRAME_BYTES + length
            if end > most:
                break
            yield kind, flags, stream & MOST_WINDOW, data[start + FRAME_BYTES : end]
            start = end
        self._rest = data[start:]


def encode_headers(headers: Iterable[tuple[str, str]]) -> bytes:
    """A block of headers, each written out: names in small letters, pseudo-headers first."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)


class HeaderBlocks:
    """Decodes blocks of headers, each distinct one once."""

    def __init__(self) -> None:
        import hpack

        self._decoder = hpack.Decoder()
        self._decoder.max_allowed_table_size = self._decoder.header_table_size = 0
        self._error = hpack.HPACKError
        self._known: dict[bytes, dict[str, str]] = {}

    def decode(self, block: bytes) -> dict[str, str]:
        """Name -> value; of a name that is there twice, the last.

        Raises:
            Http2Error: it is no block of headers.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        try:
            pairs = self._decoder.decode(block, raw=True)
        except (self._error, UnicodeDecodeError) as error:
            raise Http2Error(f"headers that cannot be read: {error}") from error
        found = {bytes(name).decode("latin-1"): bytes(value).decode("latin-1") for name, value in pairs}
        if len(block) <= MOST_BLOCK_BYTES and len(self._known) < MOST_BLOCKS:
            self._known[block] = found
        return found


def _string(text: str) -> bytes:
    """A string of HPACK, not compressed."""
    content = text.encode("latin-1")
    length = len(content)
    if length < 127:
        return bytes((length,)) + content
    prefix, length = bytearray((127,)), length - 127
    while length >= 128:
        prefix.append(length & 127 | 128)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + content
