"""V2 over gRPC, on HTTP/2 connections of its own; messages pass as bytes, untouched.

A client library's time counts as the server's latency, and its CPU is lost to a server that shares it: grpcio took two
to six times what this does for a call. Source: gRPC's "gRPC over HTTP2" (PROTOCOL-HTTP2.md), and the table of
"HTTP to gRPC Status Code Mapping".
"""

import asyncio
import math
import os
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from urllib.parse import unquote

from profiles.load import http2
from profiles.load.connecting import ConnectingTransport, Then
from profiles.load.http2 import Http2Error, Kind, Setting
from profiles.load.payloads import Payload
from profiles.load.transports import GRPC_METHOD, IN_TIME, NO_HEADERS, ROUTE, Reply, Status
from registry.errors import InputError, UnreachableError
from registry.records import Target

# Names a PEM file of the authorities to trust, as it does for gRPC's own libraries.
ROOTS = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
# A message so small is written in one piece with its headers.
SMALL_BYTES = http2.FIRST_FRAME_SIZE
_PREFIX_BYTES = 5
_CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_STATUSES = {"DEADLINE_EXCEEDED": Status.TIMEOUT, "UNAVAILABLE": Status.CONNECTION}
_UNAVAILABLE_HTTP = frozenset({"429", "502", "503", "504"})
_REFILL = 1 << 24
MOST_BLOCKS = 1024
# A large message is written in pieces of this. Each wakes the server, which on the same CPU has to be waited for; but a
# piece is a copy, and what the socket does not take of it is copied once more.
WRITE_BYTES = 1 << 18


class GrpcTransport(ConnectingTransport["_Connection"]):
    """V2 over gRPC; requests take the connections in turn."""

    def __init__(self, target: Target, connections: int) -> None:
        """Connects to nothing yet."""
        super().__init__(target)
        self.headers = http2.HeaderBlocks()
        self._lanes = [_Lane() for _ in range(connections)]
        self._turn = 0
        self._blocks: dict[int, bytes] = {}

    async def open(self, timeout_s: float) -> None:
        """Connects; see `Transport`."""
        await super().open(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                connecting = (self._connect(lane) for lane in self._lanes)
                found = await asyncio.gather(*connecting, return_exceptions=True)
            for problem in found:
                if isinstance(problem, BaseException):
                    raise problem
        except OSError as error:
            # TimeoutError is an OSError, too.
            why = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else f"{error}"
            raise UnreachableError(
                f"no gRPC connection to {self._target.url}: {why or 'refused, or not a gRPC server'}",
                hint="Check that the server runs, whether it wants TLS, and that this is its gRPC port (REST: http://).",
            ) from error

    def settle(self, then: Then, reply: Reply) -> None:
        """For the connections: a call is answered."""
        self._settle(then, reply)

    # --- parts of it ---

    def _tls_context(self) -> ssl.SSLContext:
        file = os.environ.get(ROOTS)
        try:
            context = ssl.create_default_context(cafile=file)
        except OSError as error:
            raise InputError(
                f"{file} holds no certificates of authorities: {error.strerror or error}",
                hint=f"The environment variable {ROOTS} names a PEM file.",
            ) from error
        context.set_alpn_protocols(["h2"])
        return context

    def _find(self) -> "tuple[_Connection | None, Callable[[], Awaitable[_Connection]]]":
        lane = self._lanes[self._turn]
        self._turn = (self._turn + 1) % len(self._lanes)
        usable = lane.connection is not None and lane.connection.usable
        return lane.connection if usable else None, partial(self._connect, lane)

    async def _connect(self, lane: "_Lane") -> "_Connection":
        """The lane's connection, made anew by whoever comes first."""
        async with lane.lock:
            if lane.connection is not None and lane.connection.usable:
                return lane.connection
            connection = await self._dial(lambda: _Connection(self))
            try:
                await connection.ready
            except BaseException:
                connection.abort("given up")
                raise
            lane.connection = connection
            return connection

    def _ask(self, connection: "_Connection", payload: Payload, timeout_s: float, then: Then) -> None:
        connection.ask(self._block(timeout_s), *self._message(payload), timeout_s, then)

    def _block(self, timeout_s: float) -> bytes:
        """The headers of a call with this deadline, of which the server is told in ms, rounded up."""
        milliseconds = math.ceil(timeout_s * 1000)
        block = self._blocks.get(milliseconds)
        if block is None:
            own = {
                ":method": "POST",
                ":scheme": "https" if self._tls else "http",
                ":path": GRPC_METHOD,
                ":authority": self._address.netloc,
                "te": "trailers",
                "content-type": "application/grpc",
                # At most eight digits (of ms: about a day).
                "grpc-timeout": f"{min(milliseconds, 99_999_999)}m",
                "user-agent": "burnish",
            }
            block = http2.encode_headers(
                (*own.items(), *((name.lower(), value) for name, value in self._target.headers.items()))
            )
            if len(self._blocks) >= MOST_BLOCKS:
                self._blocks.clear()
            self._blocks[milliseconds] = block
        return block

    def _message(self, payload: Payload) -> tuple[bytes, bytes]:
        """(the message's prefix, with a small message behind it; the message, where it is large)."""
        prefix = b"\0" + len(payload.body).to_bytes(4, "big")
        if len(payload.body) + _PREFIX_BYTES > SMALL_BYTES:
            return prefix, payload.body
        return prefix + payload.body, b""


class _Lane:
    """A place for one connection, and who makes it anew."""

    def __init__(self) -> None:
        self.connection: _Connection | None = None
        self.lock = asyncio.Lock()


class _Call:
    """One call that is not answered."""

    __slots__ = ("body", "data", "first", "headers", "id", "left", "prefix", "then", "timer", "window")

    def __init__(self, then: Then) -> None:
        self.then: Then | None = then  # None where it is answered
        self.timer: asyncio.TimerHandle | None = None
        self.id = 0
        self.window = 0
        self.prefix = b""
        self.body = memoryview(b"")
        self.left = 0  # of both, to be sent
        self.data: list[bytes] = []
        self.headers: Mapping[str, str] = {}
        self.first = False

    def frames(self, size: int, most: int) -> list[bytes | memoryview]:
        """The next so many bytes of the message, in frames with at most so many each."""
        parts: list[bytes | memoryview] = []
        whole = http2.head(most, Kind.DATA, 0, self.id)
        while size:
            length = min(most, size)
            size -= length
            self.left -= length
            if length == most and self.left:
                parts.append(whole)
            else:
                parts.append(http2.head(length, Kind.DATA, 0 if self.left else http2.END_STREAM, self.id))
            if self.prefix:
                parts.append(self.prefix[:length])
                self.prefix, length = self.prefix[length:], max(0, length - len(self.prefix))
            parts.append(self.body[:length])
            self.body = self.body[length:]
        return parts


class _Connection(asyncio.BufferedProtocol):
    """One connection, and the calls on it."""

    def __init__(self, owner: GrpcTransport) -> None:
        self._owner = owner
        self._loop = owner.loop
        self._buffer = owner.buffer
        self._blocks = owner.headers
        self._frames = http2.Frames()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        self._leaving = False
        self._answered = False
        self._calls: dict[int, _Call] = {}
        self._next_id = 1
        # Those that wait: to be begun, for there are too many; or to send more, for a window is full.
        self._waiting: deque[tuple[_Call, bytes, bytes, bytes]] = deque()
        self._unsent: deque[_Call] = deque()
        self._most_calls = math.inf
        self._window = http2.FIRST_WINDOW
        self._first_window = http2.FIRST_WINDOW
        self._frame_size = http2.FIRST_FRAME_SIZE
        self._received = 0
        self._full = False
        self._open_block: tuple[int, int, bytes] | None = None

    # --- for the transport ---

    @property
    def usable(self) -> bool:
        """Whether calls may be made on it."""
        return not (self._closed or self._leaving)

    def ask(self, block: bytes, prefix: bytes, body: bytes, timeout_s: float, then: Then) -> None:
        """Makes a call; ``then`` gets its answer."""
        call = _Call(then)
        call.timer = self._loop.call_later(timeout_s, self._give_up, call)
        if self._closed:  # between connecting and asking
            gone = Reply(Status.CONNECTION, message="UNAVAILABLE: the server closed the connection")
            self._loop.call_soon(self._settle, call, gone)
            return
        if len(self._calls) < self._most_calls:
            self._begin(call, block, prefix, body)
        else:
            self._waiting.append((call, block, prefix, body))

    def abort(self, why: str) -> None:
        """Ends it at once, and all calls on it."""
        if not self._closed:
            self._closed = True
            self._transport.abort()
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(why))
            self.ready.exception()  # where nobody waits for it any more, nobody misses it
        lost = [*self._calls.values(), *(one[0] for one in self._waiting)]
        self._calls.clear()
        self._waiting.clear()
        for call in lost:
            self._settle(call, Reply(Status.CONNECTION, message=f"UNAVAILABLE: {why}"))

    # --- for the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._owner.opened(self)
        mine = http2.settings(
            {
                Setting.HEADER_TABLE_SIZE: 0,
                Setting.ENABLE_PUSH: 0,
                Setting.INITIAL_WINDOW_SIZE: http2.MOST_WINDOW,
            }
        )
        transport.write(http2.PREFACE + mine + http2.window_update(0, http2.MOST_WINDOW - http2.FIRST_WINDOW))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for kind, flags, stream, content in self._frames.split(bytes(self._buffer[:nbytes])):
                self._take(kind, flags, stream, content)
        except Http2Error as error:
            self.abort(f"not a gRPC server, or it does not speak HTTP/2 as it should: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._owner.lost(self)
        self.abort("the server closed the connection" if exc is None else f"{type(exc).__name__}: {exc}")

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._send_more()

    # --- what is sent ---

    def _begin(self, call: _Call, block: bytes, prefix: bytes, body: bytes) -> None:
        call.id, self._next_id = self._next_id, self._next_id + 2
        call.window = self._first_window
        call.first, self._answered = not self._answered, True
        self._calls[call.id] = call
        begun = http2.head(len(block), Kind.HEADERS, http2.END_HEADERS, call.id) + block
        size = len(prefix)
        if not body and size <= self._window and size <= call.window and not self._unsent and not self._full:
            self._window -= size
            self._transport.write(begun + http2.head(size, Kind.DATA, http2.END_STREAM, call.id) + prefix)
            return
        call.prefix, call.body, call.left = prefix, memoryview(body), size + len(body)
        if self._unsent or self._full or self._window <= 0 or call.window <= 0:
            self._transport.write(begun)
            self._unsent.append(call)
            self._send_more()
        else:
            self._send_of(call, begun)
            if call.left:
                self._unsent.append(call)

    def _send_more(self) -> None:
        """Sends what the windows allow, calls in their order; one whose own window is full is passed over."""
        held: deque[_Call] = deque()
        while self._unsent and self._window > 0 and not self._full:
            call = self._unsent.popleft()
            if call.then is None:
                continue
            self._send_of(call)
            if call.left:
                held.append(call)
        held.extend(self._unsent)
        self._unsent = held

    def _send_of(self, call: _Call, begun: bytes = b"") -> None:
        """Sends frames with as much of a call's message as may be sent now, the first of them behind its headers."""
        allowed = max(0, min(self._window, call.window, call.left))
        while allowed and not self._full:
            size = min(allowed, WRITE_BYTES)
            allowed -= size
            self._window -= size
            call.window -= size
            self._transport.write(b"".join([begun, *call.frames(size, self._frame_size)]))
            begun = b""

    # --- what comes ---

    def _take(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        if not self.ready.done() and kind != Kind.SETTINGS:
            raise Http2Error("it does not begin with settings")
        if self._open_block is not None and kind != Kind.CONTINUATION:
            raise Http2Error("headers that do not go on")
        if kind == Kind.DATA:
            self._take_data(flags, stream, content)
        elif kind == Kind.HEADERS:
            self._take_headers(flags, stream, http2.unpadded(content, flags))
        elif kind == Kind.WINDOW_UPDATE:
            self._widen(stream, http2.number(content))
        else:
            self._take_rare(kind, flags, stream, content)

    def _take_data(self, flags: int, stream: int, content: bytes) -> None:
        self._received += len(content)
        if self._received > _REFILL:
            self._transport.write(http2.window_update(0, self._received))
            self._received = 0
        call = self._calls.get(stream)
        if call is None:
            return
        call.data.append(http2.unpadded(content, flags & http2.PADDED))
        if flags & http2.END_STREAM:
            self._end(call, _reply(call, call.headers))

    def _take_headers(self, flags: int, stream: int, block: bytes) -> None:
        if not flags & http2.END_HEADERS:
            if len(block) > http2.MOST_HEADER_BYTES:
                raise Http2Error(f"headers of more than {http2.MOST_HEADER_BYTES} bytes")
            self._open_block = (flags, stream, block)
            return
        headers = self._blocks.decode(block)
        call = self._calls.get(stream)
        if call is None:
            return
        if flags & http2.END_STREAM:
            self._end(call, _reply(call, {**call.headers, **headers}))
        else:
            call.headers = headers

    def _take_rare(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        if kind == Kind.SETTINGS:
            if not flags & http2.ACK:
                self._obey(content)
        elif kind == Kind.PING:
            if not flags & http2.ACK:
                self._transport.write(http2.frame(Kind.PING, http2.ACK, 0, content))
        elif kind == Kind.RST_STREAM:
            call, code = self._calls.get(stream), http2.number(content)
            if call is not None:
                status = Status.CONNECTION if code == http2.REFUSED_STREAM else Status.STATUS
                self._end(call, Reply(status, message=f"the server reset the call (HTTP/2 error {code})"))
        elif kind == Kind.GOAWAY:
            self._leave(http2.number(content))
        elif kind == Kind.CONTINUATION:
            if self._open_block is None or self._open_block[1] != stream:
                raise Http2Error("headers that go on and were not begun")
            (begun, _, block), self._open_block = self._open_block, None
            self._take_headers(begun | flags & http2.END_HEADERS, stream, block + content)
        elif kind == Kind.PUSH_PROMISE:
            raise Http2Error("it pushes")

    def _obey(self, content: bytes) -> None:
        for name, value in http2.read_settings(content):
            if name == Setting.MAX_CONCURRENT_STREAMS:
                self._most_calls = value
            elif name == Setting.INITIAL_WINDOW_SIZE:
                for call in self._calls.values():
                    call.window += value - self._first_window
                self._first_window = value
            elif name == Setting.MAX_FRAME_SIZE:
                self._frame_size = min(value, WRITE_BYTES)
        self._transport.write(http2.frame(Kind.SETTINGS, http2.ACK, 0))
        if not self.ready.done():
            self.ready.set_result(None)
        self._send_more()
        self._go_on()

    def _widen(self, stream: int, more: int) -> None:
        if stream == 0:
            self._window += more
        elif (call := self._calls.get(stream)) is not None:
            call.window += more
        if self._unsent:
            self._send_more()

    def _leave(self, last: int) -> None:
        """The server takes no more calls, and has not begun those after the last."""
        self._leaving = True
        why = "UNAVAILABLE: the server is going away"
        while self._waiting:  # first, as each call that ends makes room for one that waits
            self._settle(self._waiting.popleft()[0], Reply(Status.CONNECTION, message=why))
        for call in [call for number, call in self._calls.items() if number > last]:
            self._end(call, Reply(Status.CONNECTION, message=why))
        if not self._calls:
            self.abort("the server is going away")

    # --- the end of a call ---

    def _give_up(self, call: _Call) -> None:
        if self._calls.pop(call.id, None) is not None:
            self._transport.write(http2.reset(call.id, http2.CANCEL))
        self._settle(call, Reply(Status.TIMEOUT, message=f"DEADLINE_EXCEEDED: no answer{IN_TIME}"))
        self._go_on()

    def _end(self, call: _Call, reply: Reply) -> None:
        del self._calls[call.id]
        if call.left:  # it was answered before it was heard
            self._transport.write(http2.reset(call.id, http2.CANCEL))
        self._settle(call, reply)
        self._go_on()

    def _settle(self, call: _Call, reply: Reply) -> None:
        then, call.then = call.then, None
        if then is None:
            return
        assert call.timer is not None
        call.timer.cancel()
        self._owner.settle(then, reply)

    def _go_on(self) -> None:
        """Begins a call that waits; ends where the server wants to and nothing is left."""
        while self._waiting and len(self._calls) < self._most_calls:
            call, block, prefix, body = self._waiting.popleft()
            if call.then is not None:
                self._begin(call, block, prefix, body)
        if self._leaving and not self._calls:
            self.abort("the server is going away")


def _reply(call: _Call, headers: Mapping[str, str]) -> Reply:
    """What a call that has ended came to, by all its headers."""
    code = headers.get("grpc-status")
    if code is None:
        http = headers.get(":status", "none")
        status = Status.CONNECTION if http in _UNAVAILABLE_HTTP else Status.STATUS
        return Reply(status, message=f"no answer of gRPC, but HTTP status {http}")
    if code == "0":
        data = call.data[0] if len(call.data) == 1 else b"".join(call.data)
        if len(data) < _PREFIX_BYTES or data[0] or int.from_bytes(data[1:5], "big") != len(data) - _PREFIX_BYTES:
            return Reply(Status.STATUS, message="INTERNAL: not one message, or a compressed one")
        route = headers.get(ROUTE)
        return Reply(Status.OK, data[5:], NO_HEADERS if route is None else {ROUTE: route}, first=call.first)
    name = _CODES[int(code)] if code.isdecimal() and int(code) < len(_CODES) else f"code {code}"
    said = unquote(headers.get("grpc-message", ""))
    return Reply(_STATUSES.get(name, Status.STATUS), message=f"{name}: {said}")
