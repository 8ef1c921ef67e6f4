"""How bytes travel to a V2 endpoint and back: one thin transport a protocol, nothing decoded on the way.

A transport never raises for what a server does; it says so in the `Reply`. Certificates are verified where the
target says TLS; an authority of your own is named by ``SSL_CERT_FILE`` (REST) or
``GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`` (gRPC).
"""

import asyncio
import json
import warnings
from collections.abc import Mapping
from enum import IntEnum
from itertools import cycle
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from profiles.load.payloads import HEADER_LENGTH, Payload
from registry.errors import UnreachableError
from registry.records import Target

if TYPE_CHECKING:
    import aiohttp

GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"
# uvicorn, under MLServer, closes an idle connection after 5 s; one that we close before cannot be lost in between.
KEEP_ALIVE_S = 4.0
# Seldon Core 2 says with it which version of which model answered.
ROUTE = "x-seldon-route"
# gRPC hands over a reply's headers only when they are asked for, and that takes time: so each so many-th is looked at.
LOOK_EVERY = 64
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Status(IntEnum):
    """What became of a request; the numbers are those of the stored arrays."""

    OK = 0
    TIMEOUT = 1
    DROPPED = 2
    STATUS = 3
    CONNECTION = 4


class Reply(NamedTuple):
    """What came back: bytes where it is OK, else the server's own message.

    Attributes:
        headers: those that `decode_outputs` and `profiles.load.answerer` need, where they were looked at.
        first: whether it is the first reply on its connection.
    """

    status: Status
    body: bytes = b""
    headers: Mapping[str, str] = NO_HEADERS
    message: str = ""
    first: bool = False


class Transport(Protocol):
    """Sends encoded requests to one target.

    Attributes:
        in_flight: requests handed to the network and not yet answered.
    """

    in_flight: int

    async def open(self, timeout_s: float) -> None:
        """Prepares the connections.

        Raises:
            UnreachableError: the endpoint does not take one in time.
        """

    async def infer(self, payload: Payload, timeout_s: float) -> Reply:
        """Sends one request and waits for its reply, at most ``timeout_s``."""

    async def close(self) -> None:
        """Closes all connections."""


def make_transport(target: Target, connections: int) -> Transport:
    """The transport that the target's protocol asks for.

    Args:
        target: where to.
        connections: distinct connections of gRPC; REST opens one for each request in flight and keeps it.
    """
    return GrpcTransport(target, connections) if target.protocol == "grpc" else RestTransport(target)


class GrpcTransport:
    """V2 over gRPC, on connections of its own; messages pass as bytes, untouched."""

    def __init__(self, target: Target, connections: int) -> None:
        self.in_flight = 0
        self._target = target
        self._connections = connections
        self._metadata = tuple((name.lower(), value) for name, value in target.headers.items())
        self._channels: list[Any] = []
        self._sent = 0

    async def open(self, timeout_s: float) -> None:
        """Connects every channel; see `Transport`."""
        import grpc

        self._error = grpc.aio.AioRpcError
        self._codes = {
            grpc.StatusCode.DEADLINE_EXCEEDED: Status.TIMEOUT,
            grpc.StatusCode.UNAVAILABLE: Status.CONNECTION,
        }
        self._channels = [self._connect() for _ in range(self._connections)]
        calls = [
            channel.unary_unary(GRPC_METHOD, request_serializer=None, response_deserializer=None)
            for channel in self._channels
        ]
        self._calls = cycle(calls)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(self._ready(channel) for channel in self._channels))
        except TimeoutError as error:
            raise self._no_connection(f"no answer within {timeout_s:g} s") from error

    async def _ready(self, channel: Any) -> None:
        """Returns when the channel is connected; a refusal is not waited out."""
        import grpc

        while (state := channel.get_state(try_to_connect=True)) != grpc.ChannelConnectivity.READY:
            if state == grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise self._no_connection("refused, or not a gRPC server")
            await channel.wait_for_state_change(state)

    def _no_connection(self, why: str) -> UnreachableError:
        return UnreachableError(
            f"no gRPC connection to {self._target.url}: {why}",
            hint="Check the address, that the server runs, and whether it wants TLS.",
        )

    def _connect(self) -> Any:
        import grpc

        options = (
            # Equal channels would share one connection, and its limit of streams.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # A hidden retry would be booked as a slow answer.
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        )
        if self._target.tls:
            return grpc.aio.secure_channel(self._target.url, grpc.ssl_channel_credentials(), options=options)
        return grpc.aio.insecure_channel(self._target.url, options=options)

    async def infer(self, payload: Payload, timeout_s: float) -> Reply:
        """Sends one request; see `Transport`."""
        self.in_flight += 1
        # Connections are taken in turn.
        first = self._sent < self._connections
        look = first or self._sent % LOOK_EVERY == 0
        self._sent += 1
        try:
            call = next(self._calls)(payload.body, timeout=timeout_s, metadata=self._metadata)
            body = await call
            return Reply(Status.OK, body, await _route(call) if look else NO_HEADERS, first=first)
        except self._error as error:
            code = error.code()
            return Reply(self._codes.get(code, Status.STATUS), message=f"{code.name}: {error.details()}")
        finally:
            self.in_flight -= 1

    async def close(self) -> None:
        """Closes every channel."""
        await asyncio.gather(*(channel.close() for channel in self._channels))


class RestTransport:
    """V2 over REST with kept-alive connections, as many as there are requests in flight."""

    def __init__(self, target: Target) -> None:
        self.in_flight = 0
        self._most_in_flight = 0
        scheme = "https" if target.tls else "http"
        self._target = target
        self._url = f"{scheme}://{target.url}/v2/models/{target.model}/infer"
        self._session: aiohttp.ClientSession | None = None

    async def open(self, timeout_s: float) -> None:
        """Makes the session; the first request connects. See `Transport`."""
        import aiohttp

        self._aiohttp = aiohttp
        # A pool with a limit would queue in the client, and the queue would count as the server's latency.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(
            connector=connector,
            # MLServer compresses otherwise, and that would be measured.
            headers={"Accept-Encoding": "identity", **self._target.headers},
            skip_auto_headers=("User-Agent",),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )
        # aiohttp advises against large bodies in one piece; here they are encoded before the window.
        warnings.filterwarnings("ignore", message="Sending a large body", category=ResourceWarning)

    async def infer(self, payload: Payload, timeout_s: float) -> Reply:
        """Sends one request; see `Transport`."""
        assert self._session is not None, "open() comes first"
        self.in_flight += 1
        # The pool connects where all its connections are busy.
        first = self.in_flight > self._most_in_flight
        self._most_in_flight = max(self.in_flight, self._most_in_flight)
        try:
            timeout = self._aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.post(
                self._url, data=payload.body, headers=payload.headers, timeout=timeout, allow_redirects=False
            ) as response:
                body = await response.read()
                if response.status == 200:
                    return Reply(Status.OK, body, _kept_headers(response.headers), first=first)
                return Reply(Status.STATUS, message=f"HTTP {response.status}: {_server_message(body)}")
        except TimeoutError:
            return Reply(Status.TIMEOUT, message=f"no answer within {timeout_s:.3g} s")
        except (self._aiohttp.ClientError, OSError) as error:
            return Reply(Status.CONNECTION, message=f"{type(error).__name__}: {error}")
        finally:
            self.in_flight -= 1

    async def close(self) -> None:
        """Closes the session and its connections."""
        if self._session is not None:
            await self._session.close()


def _kept_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    kept = {name: value for name in (HEADER_LENGTH, ROUTE) if (value := headers.get(name)) is not None}
    return kept or NO_HEADERS


async def _route(call: Any) -> Mapping[str, str]:
    """The header that says who answered a call of gRPC that has ended well."""
    return {name: str(value) for name, value in await call.initial_metadata() if name == ROUTE} or NO_HEADERS


def _server_message(body: bytes) -> str:
    """What the server says of the error: V2's ``error`` field where there is one."""
    text = body[:2000].decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text[:300]
