import socket

import pytest

from profiles.deploy.local_ports import choose_ports
from registry.errors import InputError, UnreachableError


@pytest.mark.parametrize("port", [70_000, -1, 0])
def test_what_is_no_port_is_the_users_input(port: int) -> None:
    with pytest.raises(InputError, match=f"there is no port {port}"):
        choose_ports({"http": None, "grpc": port})


def test_ports_differ_and_one_that_is_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnreachableError, match=f"the port {port} cannot be had"):
            choose_ports({"http": port})
    chosen = choose_ports({"http": None})
    assert len({chosen.http, chosen.grpc, chosen.metrics}) == 3
