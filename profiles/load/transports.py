"""How bytes travel to a V2 endpoint and back: one thin transport a protocol, nothing decoded on the way.

A transport never raises for what a server does; it says so in the `Reply`. Certificates are verified where the
target says TLS; an authority of your own is named by ``SSL_CERT_FILE`` (REST) or
``GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`` (gRPC).
"""

import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple, Protocol

from profiles.load.payloads import Payload
from registry.errors import InputError
from registry.records import Target

GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"
# uvicorn, under MLServer, closes an idle connection after 5 s; one that we close before cannot be lost in between.
KEEP_ALIVE_S = 4.0
# Seldon Core 2 says with it which version of which model answered.
ROUTE = "x-seldon-route"
# RFC 9110, "HTTP Semantics", section 5.1 and 5.5.
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t -~]*")
# How a message ends that says that something did not come in time; see `with_limit`.
IN_TIME = " in time"
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
        headers: those that `decode_outputs` and `profiles.load.answerer` need.
        first: whether it is the first reply on its connection.
    """

    status: Status
    body: bytes = b""
    headers: Mapping[str, str] = NO_HEADERS
    message: str = ""
    first: bool = False


def with_limit(reply: Reply, limit_s: float, since: str = "") -> Reply:
    """The reply; where it did not come in time, with the limit that its sender had.

    A transport knows only what was left of it by then.

    Args:
        reply: what a transport gave.
        limit_s: of whoever sent the request.
        since: from when on it is, where that is not the request itself: `` of when it was due``.
    """
    if reply.status != Status.TIMEOUT or not reply.message.endswith(IN_TIME):
        return reply
    return reply._replace(message=f"{reply.message.removesuffix(IN_TIME)} within {limit_s:g} s{since}")


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
            InputError: the target's address or one of its headers is none.
        """

    def send(self, payload: Payload, timeout_s: float, then: Callable[[Reply], None]) -> None:
        """Sends one request, at once where a connection is free.

        Args:
            payload: what is sent.
            timeout_s: when it is given up.
            then: called once with the reply, by the event loop and never before this returns, in the same turn in which
                the reply was read: a task that waited for it would be late.
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
    from profiles.load.grpc_calls import GrpcTransport
    from profiles.load.rest import RestTransport

    return GrpcTransport(target, connections) if target.protocol == "grpc" else RestTransport(target)


def check_headers(target: Target) -> None:
    """Returns where the target's headers can be sent.

    Raises:
        InputError: a name or a value has characters that no header may have.
    """
    for name, value in target.headers.items():
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            # The value may be a credential.
            what = f"the value of the header {name!r}" if _NAME.fullmatch(name) else f"the name of the header {name!r}"
            raise InputError(
                f"{what} has characters that none may have",
                hint="Give NAME=VALUE, both of ASCII, without control characters, and without spaces in the name.",
            )
