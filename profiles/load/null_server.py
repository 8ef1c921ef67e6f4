"""A V2 server that does nothing: ``python -m profiles.load.null_server [CPU ...]``, pinned to the CPUs given.

It answers every inference at once with the same small tensor, over REST and gRPC. What the load generator has of it is
the generator's own ceiling: nearer to that, a measurement says more of the client than of the server. It prints its
ports (REST, gRPC) as one JSON line and ends when stdin closes.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable

from profiles.load import http2
from profiles.load.http2 import Http2Error, Kind, Setting

REPLY = {"model_name": "null", "outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [0.0]}]}
_BODY = json.dumps(REPLY).encode()
# The same as a serialized ModelInferResponse, its tensor raw: written out, for a start without the libraries of V2.
GRPC_REPLY = b"\n\x04null*\x0c\n\x01y\x12\x04FP32\x1a\x01\x012\x04\0\0\0\0"
_LOOPBACK = "127.0.0.1"
_END_OF_HEAD = b"\r\n\r\n"
_GRPC_HEADERS = http2.encode_headers([(":status", "200"), ("content-type", "application/grpc")])
_GRPC_TRAILERS = http2.encode_headers([("grpc-status", "0")])
_REFILL = 1 << 24
_FRAME_BYTES = 1 << 20
READ_BYTES = 1 << 18
_buffer = memoryview(bytearray(READ_BYTES))  # of all connections: what has come is taken out of it at once


class _Buffered(asyncio.BufferedProtocol):
    """Takes what comes without fresh memory for it."""

    def get_buffer(self, sizehint: int) -> memoryview:
        return _buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(_buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Takes this."""
        raise NotImplementedError


class Rest(_Buffered):
    """HTTP/1.1 as load generators speak it: kept alive, with a Content-Length."""

    def __init__(self, answer: Callable[[bytes], bytes] = lambda request: _BODY) -> None:
        """Answers each request by its first line."""
        self._answer_to = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._head = b""
        self._answer = b""
        self._left = 0

    def data_received(self, data: bytes) -> None:
        """Answers the requests that are complete."""
        while data:
            if self._left:
                taken = min(self._left, len(data))
                self._left, data = self._left - taken, data[taken:]
            else:
                head, found, rest = (self._head + data).partition(_END_OF_HEAD)
                if not found:
                    self._head = head
                    return
                self._head, data = b"", rest
                self._left = _content_length(head)
                self._answer = _http(self._answer_to(head.partition(b"\r\n")[0]))
            if not self._left:
                self._transport.write(self._answer)


class Grpc(_Buffered):
    """Calls of gRPC, each of one message, on HTTP/2."""

    def __init__(self, answer: Callable[[str], bytes | None] = lambda method: GRPC_REPLY) -> None:
        """Answers each call by its method; where that is None, it only begins to."""
        self._answer_to = answer
        self._frames = http2.Frames(_FRAME_BYTES)
        self._headers = http2.HeaderBlocks()
        self._answers: dict[int, bytes | None] = {}
        self._begun = b""
        self._received = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        mine = {
            Setting.HEADER_TABLE_SIZE: 0,
            Setting.INITIAL_WINDOW_SIZE: http2.MOST_WINDOW,
            Setting.MAX_FRAME_SIZE: _FRAME_BYTES,
        }
        more = http2.MOST_WINDOW - http2.FIRST_WINDOW
        transport.write(http2.settings(mine) + http2.window_update(0, more))

    def data_received(self, data: bytes) -> None:
        """Answers the calls that are complete."""
        if len(self._begun) < len(http2.PREFACE):
            data, self._begun = self._begun + data, (self._begun + data)[: len(http2.PREFACE)]
            data = data[len(http2.PREFACE) :]
        out: list[bytes] = []
        try:
            for kind, flags, stream, content in self._frames.split(data):
                self._take(kind, flags, stream, content, out)
        except Http2Error:
            self._transport.abort()
            return
        if out:
            self._transport.write(b"".join(out))

    def _take(self, kind: int, flags: int, stream: int, content: bytes, out: list[bytes]) -> None:
        if kind == Kind.HEADERS:
            method = self._headers.decode(http2.unpadded(content, flags)).get(":path", "")
            self._answers[stream] = self._answer_to(method)
        elif kind == Kind.DATA:
            self._received += len(content)
            if self._received > _REFILL:
                out.append(http2.window_update(0, self._received))
                self._received = 0
        elif kind == Kind.SETTINGS and not flags & http2.ACK:
            out.append(http2.frame(Kind.SETTINGS, http2.ACK, 0))
        elif kind == Kind.PING and not flags & http2.ACK:
            out.append(http2.frame(Kind.PING, http2.ACK, 0, content))
        elif kind == Kind.RST_STREAM:
            self._answers.pop(stream, None)
        if kind in (Kind.HEADERS, Kind.DATA) and flags & http2.END_STREAM and stream in self._answers:
            message = self._answers.pop(stream)
            out.append(http2.frame(Kind.HEADERS, http2.END_HEADERS, stream, _GRPC_HEADERS))
            if message is None:
                return
            out += (
                http2.frame(Kind.DATA, 0, stream, b"\0" + len(message).to_bytes(4, "big") + message),
                http2.frame(Kind.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, _GRPC_TRAILERS),
            )


def main() -> None:
    """Serves until stdin closes."""
    if sys.argv[1:]:
        os.sched_setaffinity(0, map(int, sys.argv[1:]))
    asyncio.run(serve(Rest, Grpc))


async def serve(rest: Callable[[], asyncio.BaseProtocol], grpc: Callable[[], asyncio.BaseProtocol]) -> None:
    """Serves both protocols on ports of their own, says which they are, and ends the process when stdin closes."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(protocol, _LOOPBACK, 0) for protocol in (rest, grpc)]
    sys.stdout.write(json.dumps([server.sockets[0].getsockname()[1] for server in servers]) + "\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    os._exit(0)


def _http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


if __name__ == "__main__":
    main()
