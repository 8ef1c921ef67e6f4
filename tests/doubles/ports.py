"""Ports for servers that are told where to listen, and take seconds until they do."""

import contextlib
import random
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """So many ports of loopback on which nobody listens.

    They are below those that the kernel gives to whoever asks for any, as tests beside this one do all the time.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    # Tests that run beside each other have the same seed.
    chance = random.SystemRandom()
    found: set[int] = set()
    while len(found) < count:
        port = chance.randrange(max(1024, lowest // 2), lowest)
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As servers do, so that connections of an ended server that linger on do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
            probe.listen(1)
            found.add(port)
    return list(found)
