"""What the transports of both protocols do alike: connect, and ask on a connection that is free or on a new one."""

import asyncio
import ssl
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from profiles.load.payloads import Payload
from profiles.load.transports import IN_TIME, Reply, Status, check_headers, with_limit
from registry.errors import InputError
from registry.records import Target

# Read at once, of whatever has come.
READ_BYTES = 1 << 18
Then = Callable[[Reply], None]


class Connection(Protocol):
    """Has requests made on it."""

    def abort(self, why: str) -> None:
        """Ends it at once, and what was asked on it."""


C = TypeVar("C", bound=Connection)
P = TypeVar("P", bound=asyncio.BaseProtocol)


class ConnectingTransport(ABC, Generic[C]):
    """A `profiles.load.transports.Transport` on connections of its own.

    Attributes:
        in_flight: requests that are not answered.
        loop: where the connections live; known once it is open.
        buffer: where all of them read to, as each takes at once what has come.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, target: Target) -> None:
        """Connects to nothing yet."""
        self.in_flight = 0
        self.buffer = memoryview(bytearray(READ_BYTES))
        self._target = target
        self._tls: ssl.SSLContext | None = None
        self._connecting: set[asyncio.Task[None]] = set()
        self._open: set[C] = set()

    async def open(self, timeout_s: float) -> None:
        """Gets ready to connect; see `Transport`."""
        check_headers(self._target)
        self._address = urlsplit(f"//{self._target.url}")
        try:
            self._host, port = self._address.hostname or "", self._address.port
            self._host.encode("idna")
        except ValueError as error:
            raise _no_address(self._target.url) from error
        if not self._host or self._address.username is not None or "://" in self._target.url:
            raise _no_address(self._target.url)
        self._port = port or (443 if self._target.tls else 80)
        self.loop = asyncio.get_running_loop()
        self._tls = self._tls_context() if self._target.tls else None

    def send(self, payload: Payload, timeout_s: float, then: Then) -> None:
        """Sends one request; see `Transport`."""
        self.in_flight += 1
        connection, connect = self._find()
        if connection is not None:
            self._ask(connection, payload, timeout_s, then)
            return
        connecting = self.loop.create_task(self._connect_and_ask(connect, payload, timeout_s, then))
        # The loop itself holds tasks only weakly.
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    async def infer(self, payload: Payload, timeout_s: float) -> Reply:
        """Sends one request and waits; see `Transport`."""
        answer: asyncio.Future[Reply] = self.loop.create_future()

        def settle(reply: Reply) -> None:
            if not answer.done():  # whoever waited for it may have gone
                answer.set_result(reply)

        self.send(payload, timeout_s, settle)
        return with_limit(await answer, timeout_s)

    async def close(self) -> None:
        """Closes all connections."""
        for connecting in self._connecting:
            connecting.cancel()
        for connection in tuple(self._open):
            connection.abort("closed")
        # What a connection has to say of its end is said in the loop's next turns.
        await asyncio.sleep(0)

    # --- for the connections ---

    def opened(self, connection: C) -> None:
        """There is one more."""
        self._open.add(connection)

    def lost(self, connection: C) -> None:
        """It is no more."""
        self._open.discard(connection)

    # --- what each protocol does its own way ---

    @abstractmethod
    def _tls_context(self) -> ssl.SSLContext:
        """How certificates are verified."""

    @abstractmethod
    def _find(self) -> tuple[C | None, Callable[[], Awaitable[C]]]:
        """(a connection that a request may be made on now, or None; what makes one)."""

    @abstractmethod
    def _ask(self, connection: C, payload: Payload, timeout_s: float, then: Then) -> None:
        """Makes a request on a connection."""

    # --- parts of it ---

    async def _dial(self, factory: Callable[[], P]) -> P:
        """A new connection to the target."""
        _, made = await self.loop.create_connection(factory, self._host, self._port, ssl=self._tls)
        return made

    async def _connect_and_ask(
        self, connect: Callable[[], Awaitable[C]], payload: Payload, timeout_s: float, then: Then
    ) -> None:
        began = self.loop.time()
        try:
            async with asyncio.timeout(timeout_s):
                connection = await connect()
        except TimeoutError:
            self._settle(then, Reply(Status.TIMEOUT, message=f"no connection{IN_TIME}"))
        except OSError as error:
            self._settle(then, Reply(Status.CONNECTION, message=f"{type(error).__name__}: {error}"))
        except asyncio.CancelledError:
            self._settle(then, Reply(Status.CONNECTION, message="closed"))
            raise
        else:
            self._ask(connection, payload, max(0.001, timeout_s - (self.loop.time() - began)), then)

    def _settle(self, then: Then, reply: Reply) -> None:
        self.in_flight -= 1
        then(reply)


def _no_address(url: str) -> InputError:
    return InputError(f"{url!r} is no address of a server", hint="Give host:port.")
