"""Ports of servers on this machine's loopback."""

import contextlib
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from registry.errors import InputError, UnreachableError

LOOPBACK = "127.0.0.1"
_PROBE_S = 2.0
_MOST = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The three ports of one server."""

    http: int
    grpc: int
    metrics: int


def choose_ports(fixed: Mapping[str, int | None]) -> Ports:
    """The fixed ports, and free ones for the rest.

    Args:
        fixed: ``http``, ``grpc`` or ``metrics`` -> the port that the user chose, or None.

    Raises:
        InputError: a fixed one is no port.
        UnreachableError: it is in use.
    """
    for port in fixed.values():
        check_port(port)
    with contextlib.ExitStack() as held:
        # All are held until all are known, so that they differ.
        chosen = {name: held.enter_context(_bound(fixed.get(name) or 0)) for name in ("http", "grpc", "metrics")}
        return Ports(**chosen)


def check_port(port: int | None) -> None:
    """Returns where it is a port, or None, which is any.

    Raises:
        InputError: it is none.
    """
    if port is not None and not 0 < port <= _MOST:
        raise InputError(f"there is no port {port}", hint=f"Ports are 1 to {_MOST}.")


def is_open(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        probe.settimeout(_PROBE_S)
        return probe.connect_ex((LOOPBACK, port)) == 0


@contextlib.contextmanager
def _bound(port: int) -> Iterator[int]:
    with socket.socket() as listener:
        # As servers do, so that connections of an ended server that linger on do not count. A listener still does,
        # even one that shares its port (SO_REUSEPORT, as gRPC does, so that two servers would answer in turn).
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
            listener.listen(1)
        except OSError as error:
            raise UnreachableError(
                f"the port {port} cannot be had on {LOOPBACK}: {error.strerror}",
                hint="End the process that uses it, or choose another port.",
            ) from error
        yield listener.getsockname()[1]
