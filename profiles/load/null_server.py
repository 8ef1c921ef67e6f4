"""A V2 server that does nothing: ``python -m profiles.load.null_server [CPU ...]``, pinned to the CPUs given.

It answers every inference at once with the same small tensor, over REST and gRPC. What the load generator has of it is
the generator's own ceiling: nearer to that, a measurement says more of the client than of the server. It prints its
ports (REST, gRPC) as one JSON line and ends when stdin closes.
"""

import asyncio
import json
import os
import sys
from typing import Any

REPLY = {"model_name": "null", "outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [0.0]}]}
_BODY = json.dumps(REPLY).encode()
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
# The same as a serialized ModelInferResponse, its tensor raw: written out, for a start without the libraries of V2.
GRPC_REPLY = b"\n\x04null*\x0c\n\x01y\x12\x04FP32\x1a\x01\x012\x04\0\0\0\0"
_LOOPBACK = "127.0.0.1"
_END_OF_HEAD = b"\r\n\r\n"


class _Rest(asyncio.Protocol):
    """HTTP/1.1 as the load generator speaks it: kept alive, with a Content-Length."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._head = b""
        self._left = 0

    def data_received(self, data: bytes) -> None:
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
            if not self._left:
                self._transport.write(_ANSWER)


def main() -> None:
    """Serves until stdin closes."""
    if sys.argv[1:]:
        os.sched_setaffinity(0, map(int, sys.argv[1:]))
    asyncio.run(_serve())


async def _serve() -> None:
    import grpc

    loop = asyncio.get_running_loop()
    rest = await loop.create_server(_Rest, _LOOPBACK, 0)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])

    async def infer(body: bytes, context: Any) -> bytes:
        return GRPC_REPLY

    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    grpc_port = server.add_insecure_port(f"{_LOOPBACK}:0")
    await server.start()
    sys.stdout.write(json.dumps([rest.sockets[0].getsockname()[1], grpc_port]) + "\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    os._exit(0)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


if __name__ == "__main__":
    main()
