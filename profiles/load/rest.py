"""V2 over REST, by as much of HTTP/1.1 as that takes, on connections that are kept alive.

A client library's time counts as the server's latency, and its CPU is lost to a server that shares it: aiohttp took two
to three times what this does for a request. So requests are written as they were encoded, and of an answer only its
status, its few headers and its body are read. Source: RFC 9112, "HTTP/1.1", sections 6 and 7.
"""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote

from profiles.load.connecting import ConnectingTransport, Then
from profiles.load.payloads import HEADER_LENGTH, Payload
from profiles.load.transports import IN_TIME, KEEP_ALIVE_S, NO_HEADERS, ROUTE, Reply, Status
from registry.records import Target

# A message so small is written in one piece with its head.
SMALL_BYTES = 1 << 16
MOST_HEADS = 1024
MOST_HEAD_BYTES = 1 << 16
_END_OF_HEAD = b"\r\n\r\n"
_KEPT = {HEADER_LENGTH.lower().encode(): HEADER_LENGTH, ROUTE.encode(): ROUTE}
_WITHOUT_BODY = frozenset({204, 304})


class RestTransport(ConnectingTransport["_Connection"]):
    """V2 over REST, on as many connections as there are requests in flight."""

    def __init__(self, target: Target) -> None:
        """Connects to nothing yet."""
        super().__init__(target)
        self._heads: dict[tuple[tuple[str, str], ...], bytes] = {}
        self._idle: list[_Connection] = []

    async def open(self, timeout_s: float) -> None:
        """Gets ready to connect, which the requests themselves do; see `Transport`."""
        await super().open(timeout_s)
        path = quote(f"{self._address.path.rstrip('/')}/v2/models/{self._target.model}/infer", safe="/%")
        # MLServer compresses unless it is told not to, and that would be measured.
        own = {"Host": self._address.netloc, "Accept": "*/*", "Accept-Encoding": "identity"}
        named = {name.lower() for name in self._target.headers}
        sent = {name: value for name, value in own.items() if name.lower() not in named} | dict(self._target.headers)
        self._head = f"POST {path} HTTP/1.1\r\n{_lines(sent)}"

    # --- for the connections ---

    def answered(self, connection: "_Connection", then: Then, reply: Reply, *, keep: bool) -> None:
        """A connection is done with its request, and may have another or is closed."""
        if keep:
            self._idle.append(connection)
        self._settle(then, reply)

    # --- parts of it ---

    def _tls_context(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def _find(self) -> "tuple[_Connection | None, Callable[[], Awaitable[_Connection]]]":
        """The last that was used and is idle."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable(self.loop.time() - KEEP_ALIVE_S):
                return connection, self._connect
            connection.abort("idle")
        return None, self._connect

    async def _connect(self) -> "_Connection":
        return await self._dial(lambda: _Connection(self))

    def _ask(self, connection: "_Connection", payload: Payload, timeout_s: float, then: Then) -> None:
        connection.ask(self._message(payload), timeout_s, then)

    def _message(self, payload: Payload) -> tuple[bytes, ...]:
        """What is written: one piece, or of a large message its head and its body, which is not copied."""
        kind = tuple(payload.headers.items())
        head = self._heads.get(kind)
        if head is None:
            if len(self._heads) >= MOST_HEADS:
                self._heads.clear()
            head = self._heads[kind] = f"{self._head}{_lines(payload.headers)}Content-Length: ".encode("latin-1")
        body = payload.body
        head = b"%s%d\r\n\r\n" % (head, len(body))
        return (head + body,) if len(body) <= SMALL_BYTES else (head, body)


class _Connection(asyncio.BufferedProtocol):
    """One connection, one request at a time."""

    def __init__(self, owner: RestTransport) -> None:
        self._owner = owner
        self._loop = owner.loop
        self._used = False
        self._closed = False
        self._since_s = 0.0
        self._then: Then | None = None
        self._timer: asyncio.TimerHandle | None = None

    # --- for the transport ---

    def usable(self, since_s: float) -> bool:
        """Whether a request may be sent on it, which it may where it was used since then."""
        return not self._closed and self._since_s >= since_s

    def ask(self, message: tuple[bytes, ...], timeout_s: float, then: Then) -> None:
        """Sends a request; ``then`` gets its answer."""
        self._then = then
        self._received, self._status, self._headers = b"", 0, NO_HEADERS
        self._body: list[bytes] = []
        self._left: int | None = None
        self._chunks: _Chunks | None = None
        self._timer = self._loop.call_later(timeout_s, self._give_up)
        if self._closed:  # between connecting and asking
            self._loop.call_soon(self._lose, "the server closed the connection")
            return
        for part in message:
            self._transport.write(part)

    def abort(self, why: str) -> None:
        """Ends it at once; see `Connection`."""
        self._closed = True
        self._transport.abort()
        self._lose(why)

    # --- for the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._owner.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._owner.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._then is None:
            self.abort("an answer that nobody asked for")
            return
        try:
            self._read(bytes(self._owner.buffer[:nbytes]))
        except ValueError as error:
            self._end(Reply(Status.CONNECTION, message=f"no answer by HTTP: {error}"), keep=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._owner.lost(self)
        if self._then is None:
            return
        if exc is None and self._status and self._left is None and self._chunks is None:
            self._finish(keep=False)  # its end is the answer's
            return
        self._lose("the server closed the connection" if exc is None else f"{type(exc).__name__}: {exc}")

    # --- an answer ---

    def _read(self, data: bytes) -> None:
        if not self._status:
            rest = self._read_heads(self._received + data)
            if rest is None:
                return
            data = rest
        if self._chunks is not None:
            if self._chunks.read(data, self._body):
                self._finish(keep=self._keep)
            return
        if data:
            self._body.append(data)
        if self._left is None:
            return
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("more bytes than it says")
        if self._left == 0:
            self._finish(keep=self._keep)

    def _read_heads(self, data: bytes) -> bytes | None:
        """What comes after the answer's head, and those of interim answers before it; None where that is not there."""
        at = 0
        while True:
            end = data.find(_END_OF_HEAD, at)
            if end < 0:
                self._received = data[at:]
                if len(self._received) > MOST_HEAD_BYTES:
                    raise ValueError(f"no end of headers within {MOST_HEAD_BYTES} bytes")
                return None
            self._read_head(data[at:end])
            at = end + len(_END_OF_HEAD)
            if self._status:
                return data[at:]

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        version, _, rest = first.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise ValueError(f"it begins with {first[:40]!r}")
        status = int(rest[:3])
        if status < 200:
            return
        self._keep, self._left, chunked = version == b"HTTP/1.1", None, False
        kept = {}
        for line in lines:
            name, _, value = line.partition(b":")
            name, value = name.lower(), value.strip()
            if name == b"content-length":
                self._left = _whole(value)
            elif name == b"transfer-encoding":
                chunked = value.lower().endswith(b"chunked")
            elif name == b"connection":
                self._keep = b"close" not in value.lower()
            elif name in _KEPT:
                kept[_KEPT[name]] = value.decode("latin-1")
        self._status, self._headers = status, kept or NO_HEADERS
        if chunked:
            self._chunks, self._left = _Chunks(), None
        elif status in _WITHOUT_BODY:
            self._left = 0

    def _finish(self, *, keep: bool) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        first, self._used = not self._used, True
        if self._status == 200:
            self._end(Reply(Status.OK, body, self._headers, first=first), keep=keep)
        else:
            self._end(Reply(Status.STATUS, message=f"HTTP {self._status}: {_server_message(body)}"), keep=keep)

    def _give_up(self) -> None:
        self._end(Reply(Status.TIMEOUT, message=f"no answer{IN_TIME}"), keep=False)

    def _lose(self, why: str) -> None:
        if self._then is not None:
            self._end(Reply(Status.CONNECTION, message=why), keep=False)

    def _end(self, reply: Reply, *, keep: bool) -> None:
        then, self._then = self._then, None
        assert then is not None
        assert self._timer is not None
        self._timer.cancel()
        if keep:
            self._since_s = self._loop.time()
        else:
            self.abort("done")
        self._owner.answered(self, then, reply, keep=keep)


class _Chunks:
    """The body of one answer that comes in chunks."""

    def __init__(self) -> None:
        self._left = 0  # of the chunk that is read, its end of line among it
        self._line = b""
        self._trailer = False

    def read(self, data: bytes, body: list[bytes]) -> bool:
        """Puts what belongs to the body into it; whether it is complete."""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                taken = min(self._left, end - at)
                held = min(taken, self._left - 2)
                if held > 0:
                    body.append(data[at : at + held])
                self._left -= taken
                at += taken
                continue
            found = data.find(b"\n", at)
            if found < 0:
                self._line += data[at:]
                if len(self._line) > MOST_HEAD_BYTES:
                    raise ValueError("a chunk without a size")
                return False
            line = (self._line + data[at:found]).strip()
            self._line, at = b"", found + 1
            if self._trailer:
                if not line:
                    if at < end:
                        raise ValueError("more bytes than it says")
                    return True
                continue
            size = _whole(line.partition(b";")[0].strip(), 16)
            self._trailer, self._left = size == 0, size + 2 if size else 0
        return False


def _whole(digits: bytes, base: int = 10) -> int:
    """A size; unlike ``int``, of digits alone."""
    if not digits.isalnum():
        raise ValueError(f"a length of {digits[:20]!r}")
    return int(digits, base)


def _lines(headers: Mapping[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def _server_message(body: bytes) -> str:
    """What the server says of the error: V2's ``error`` field where there is one."""
    text = body[:2000].decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text[:300]
