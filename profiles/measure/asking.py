"""A question to a server that somebody else runs, answered in bounded time and memory."""

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import quote

MOST_BYTES = 64_000_000
_MOST_PORT = 65_535
_NONE: Mapping[str, str] = MappingProxyType({})


def ask(
    address: str, path: str, *, timeout_s: float, tls: bool = False, headers: Mapping[str, str] = _NONE
) -> tuple[int, bytes]:
    """Status and body of a GET.

    A socket's own timeout is that of each read, so that a server which sends a byte now and then would never be given
    up. This one is that of the whole answer.

    Args:
        address: ``host:port``, with a path that all others are below or without.
        path: what is asked for.
        timeout_s: for all of it.
        tls: whether to encrypt, and verify the certificate.
        headers: that are sent.

    Raises:
        OSError: nobody answers; `TimeoutError` where the answer is not whole in time.
        http.client.HTTPException: the address is none, or the answer is none of HTTP.
        ValueError: a header cannot be sent, or the answer is longer than `MOST_BYTES`.
    """
    host, _, prefix = address.rstrip("/").partition("/")
    made = http.client.HTTPConnection(host, timeout=timeout_s)
    if tls:
        made = http.client.HTTPSConnection(host, timeout=timeout_s, context=ssl.create_default_context())
    if not 0 < made.port <= _MOST_PORT:
        # The system would take what is left of it in 16 bits, which is another's port.
        raise http.client.InvalidURL(f"there is no port {made.port}")
    with contextlib.closing(made) as connection, _Deadline(connection, timeout_s) as deadline:
        connection.connect()
        deadline.hold(connection.sock)
        connection.request("GET", quote(f"/{prefix}{path}" if prefix else path, safe="/%"), headers=dict(headers))
        response = connection.getresponse()
        body = response.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise ValueError(f"an answer of more than {MOST_BYTES} bytes")
    return response.status, body


def what_is_wrong(error: Exception) -> str:
    """What an error of `ask`, or of reading its answer as a JSON document, says to a user."""
    if isinstance(error, OSError):
        return str(error) or type(error).__name__
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "the answer is no JSON"
    if isinstance(error, http.client.InvalidURL):
        return str(error)
    if isinstance(error, http.client.HTTPException):
        return "the answer is none of HTTP"
    if isinstance(error, AttributeError | KeyError | TypeError):
        return "the answer is none of V2"
    return str(error)


class _Deadline:
    """Breaks a connection off when time is up, and says then that this was why it ended."""

    def __init__(self, connection: http.client.HTTPConnection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._held: socket.socket | None = None
        self._over = False
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True

    def hold(self, sock: socket.socket) -> None:
        """It is this one: a connection that is to be closed after its answer lets go of it before."""
        self._held = sock
        if self._over:  # time was up before there was anything to break off
            self._end()

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._timer.cancel()
        ended = error is None or isinstance(error, OSError | ValueError | http.client.HTTPException)
        # A read of its own that took as long says only that it timed out.
        if isinstance(error, TimeoutError) or (self._over and ended):
            raise TimeoutError(f"no whole answer within {self._timeout_s:g} s") from error

    def _end(self) -> None:
        self._over = True
        sock = self._held or self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
