"""Questions to servers that answer as they like."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from profiles.measure import asking
from profiles.measure.asking import ask
from profiles.measure.bench import takes_binary
from profiles.testing import FakeV2Server
from registry.errors import UnreachableError
from registry.records import Target
from tests.doubles.busy import LONG_S


@contextmanager
def talker(*parts: bytes, drip: bytes = b"") -> Iterator[str]:
    """Somebody who says this to whoever connects, and then goes on, byte by byte, or hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def talk() -> None:
            try:
                client, _ = listener.accept()
                with client:
                    client.recv(4096)
                    for part in parts:
                        client.sendall(part)
                    while drip and not over.is_set():
                        client.sendall(drip)
                        time.sleep(0.01)
            except OSError:
                pass  # the client has gone

        thread = threading.Thread(target=talk)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        listener.close()
        thread.join(LONG_S)


def test_an_answer_comes_whole_with_its_status() -> None:
    with FakeV2Server() as server:
        url = server.target("rest").url
        assert ask(url, "/v2", timeout_s=LONG_S)[0] == 200
        assert ask(f"{url}/below/", "/v2", timeout_s=LONG_S)[0] in (200, 404)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
    ],
)
def test_a_server_that_drips_is_given_up_in_time(head: bytes) -> None:
    with talker(head, drip=b"H") as url, pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        ask(url, "/v2", timeout_s=0.2)


def test_time_that_is_up_as_soon_as_somebody_is_there_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, end, up = http.client.HTTPConnection.connect, asking._Deadline._end, threading.Event()

    def ended(deadline: asking._Deadline) -> None:
        end(deadline)
        up.set()

    def late(connection: http.client.HTTPConnection) -> None:
        assert up.wait(LONG_S)
        connect(connection)

    monkeypatch.setattr(asking._Deadline, "_end", ended)
    monkeypatch.setattr(http.client.HTTPConnection, "connect", late)
    with talker(b"HTTP/1.1 200 OK\r\n\r\n", drip=b"H") as url, pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        ask(url, "/v2", timeout_s=0.2)


def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MOST_BYTES", 1000)
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    with talker(head, drip=b"x" * 4096) as url, pytest.raises(ValueError, match="more than 1000 bytes"):
        ask(url, "/v2", timeout_s=LONG_S)


def test_what_is_no_answer() -> None:
    with talker(b"SSH-2.0-server\r\n") as url, pytest.raises(http.client.HTTPException):
        ask(url, "/v2", timeout_s=LONG_S)
    with talker() as url, pytest.raises(OSError, match="without response"):
        ask(url, "/v2", timeout_s=LONG_S)
    with pytest.raises(http.client.InvalidURL):
        ask("host:port", "/v2", timeout_s=LONG_S)


@pytest.mark.parametrize("tls", [False, True])
def test_a_port_that_is_none_is_not_taken_for_another(tls: bool) -> None:
    with FakeV2Server() as server:
        host, _, port = server.target("rest").url.partition(":")
        beyond = f"{host}:{int(port) + 65_536}"  # which the system would cut to the same 16 bits
        with pytest.raises(UnreachableError, match=f"there is no port {int(port) + 65_536}"):
            takes_binary(Target(url=beyond, protocol="rest", model="m", tls=tls))


def answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d Said\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def test_only_who_says_so_takes_binary_tensors() -> None:
    for said, takes in (
        (answer(200, b'{"extensions": ["binary_tensor_data"]}'), True),
        (answer(200, b'{"extensions": []}'), False),
        (answer(404, b"not found"), False),  # a gateway that knows nothing but the models
    ):
        with talker(said) as url:
            assert takes_binary(Target(url=url, protocol="rest", model="m")) == takes
    for said, problem in (
        (answer(200, b"<html>It works!</html>"), "no JSON"),
        (answer(200, b"[1]"), "none of V2"),
        (b"\x00\x00\x12\x04SETTINGS\r\n", "none of HTTP"),
    ):
        with talker(said) as url, pytest.raises(UnreachableError, match=f"no V2 endpoint answers at .*{problem}"):
            takes_binary(Target(url=url, protocol="rest", model="m"))
