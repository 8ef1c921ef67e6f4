"""Model control against a server that answers whatever a test says; the real servers are asked elsewhere."""

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from profiles.deploy import model_control
from profiles.deploy.model_control import ModelControl, ModelRefusedError
from tests.doubles.busy import LONG_S


class Answers(ThreadingHTTPServer):
    """Answers by method and path; the last of several answers is given again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.known: dict[str, list[tuple[int, Any]]] = {}
        self.asked: list[str] = []

    def says(self, asked: str, *answers: tuple[int, Any]) -> None:
        self.known[asked] = list(answers)


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        assert self.rfile.read(int(self.headers["Content-Length"])) == b"{}"
        self._answer()

    def _answer(self) -> None:
        asked = f"{self.command} {self.path}"
        self.server.asked.append(asked)
        answers = self.server.known.get(asked, [(404, {"error": "no such path"})])
        status, content = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == 0:
            return  # closes the connection without a word
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Answers]:
    with Answers() as answers:
        thread = threading.Thread(target=answers.serve_forever, args=(0.01,))
        thread.start()
        yield answers
        answers.shutdown()
        thread.join()


@pytest.fixture
def control(server: Answers, monkeypatch: pytest.MonkeyPatch) -> ModelControl:
    # This process, and with it the server, may stand still for as long as a probe waits.
    monkeypatch.setattr(model_control, "_PROBE_S", LONG_S)
    monkeypatch.setattr(model_control, "_ANSWER_S", LONG_S)
    return ModelControl(f"127.0.0.1:{server.server_address[1]}")


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ((200, {"name": "mine", "version": "1"}), "mine"),
        ((200, {"version": "1"}), None),
        ((200, ["name"]), None),
        ((200, b"<html>"), None),
        ((503, {"name": "mine"}), None),
        ((0, b""), None),
    ],
)
def test_a_servers_name_is_what_it_says(
    server: Answers, control: ModelControl, answer: tuple[int, Any], name: str | None
) -> None:
    server.says("GET /v2", answer)
    assert control.server_name() == name


def test_nobody_there() -> None:
    control = ModelControl("127.0.0.1:1")
    assert control.server_name() is None
    assert not control.is_ready("m_1")
    for ask in (
        control.index,
        lambda: control.load("m_1", timeout_s=LONG_S),
        lambda: control.unload("m_1", timeout_s=LONG_S),
    ):
        with pytest.raises(ConnectionError):
            ask()


def test_the_states_of_both_servers(server: Answers, control: ModelControl) -> None:
    of_both = [
        {"name": "a", "state": "State.READY"},  # MLServer on Python 3.11
        {"name": "b", "state": "READY", "version": "1"},
        {"name": "c", "state": "UNAVAILABLE", "reason": "unloaded"},
        {"name": "d"},  # Triton, of a model that nobody asked for
    ]
    server.says("POST /v2/repository/index", (200, of_both))
    assert control.index() == {"a": "READY", "b": "READY", "c": "UNAVAILABLE", "d": "UNAVAILABLE"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, {"error": "failed to load 'm_1'"}), "failed to load 'm_1'"),
        ((500, b"Internal Server Error"), "Internal Server Error"),
        ((502, b""), "status 502"),
        ((404, ["?"]), r'\["\?"\]'),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(
    server: Answers, control: ModelControl, answer: tuple[int, Any], reason: str
) -> None:
    server.says("POST /v2/repository/models/m_1/load", answer)
    with pytest.raises(ModelRefusedError, match=f"^{reason}$"):
        control.load("m_1", timeout_s=LONG_S)
    server.says("POST /v2/repository/index", answer)
    with pytest.raises(ModelRefusedError, match=f"^{reason}$"):
        control.index()


def test_a_server_that_goes_away_has_not_refused(server: Answers, control: ModelControl) -> None:
    server.says("POST /v2/repository/models/m_1/load", (0, b""))
    with pytest.raises(ConnectionError):
        control.load("m_1", timeout_s=LONG_S)


def test_unloading_waits_until_the_model_is_gone(server: Answers, control: ModelControl) -> None:
    states = ("READY", "UNLOADING", "UNLOADING", "UNAVAILABLE")
    server.says("POST /v2/repository/index", *((200, [{"name": "m_1", "state": state}]) for state in states))
    server.says("POST /v2/repository/models/m_1/unload", (200, b""))
    control.unload("m_1", timeout_s=LONG_S)
    assert [asked.rpartition("/")[2] for asked in server.asked] == ["index", "unload", "index", "index", "index"]
    # What is not there needs no unloading, which MLServer would refuse.
    control.unload("m_1", timeout_s=LONG_S)
    control.unload("other_1", timeout_s=LONG_S)
    assert [asked.rpartition("/")[2] for asked in server.asked[5:]] == ["index", "index"]


def test_unloading_does_not_wait_for_ever(
    server: Answers, control: ModelControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = itertools.count(step=LONG_S / 4)
    clock = SimpleNamespace(monotonic=lambda: next(now_s), sleep=lambda seconds: None)
    monkeypatch.setattr(model_control, "time", clock)
    server.says("POST /v2/repository/index", (200, [{"name": "m_1", "state": "UNLOADING"}]))
    server.says("POST /v2/repository/models/m_1/unload", (200, b""))
    with pytest.raises(TimeoutError, match="m_1 is still being unloaded"):
        control.unload("m_1", timeout_s=LONG_S)
    assert next(now_s) > LONG_S
