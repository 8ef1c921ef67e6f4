"""The transports against servers that say just what a test has them say, byte by byte."""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Literal

import hpack
import pytest

from profiles.load import http2
from profiles.load.grpc_calls import WRITE_BYTES
from profiles.load.http2 import Frames, HeaderBlocks, Http2Error, Kind, Setting
from profiles.load.payloads import Payload
from profiles.load.transports import ROUTE, Reply, Status, make_transport, with_limit
from registry.errors import InputError, UnreachableError
from registry.records import Target
from tests.doubles.busy import LONG_S

BODY = Payload(body=b"question", headers={"Content-Type": "application/json"})
Protocol = Literal["grpc", "rest"]
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def asked(
    script: Script,
    *,
    protocol: Protocol,
    payload: Payload = BODY,
    times: int = 1,
    together: bool = False,
    path: str = "",
    limit_s: float = LONG_S,
    **target: Any,
) -> list[Reply]:
    """The replies to so many requests on one connection, one after the other or together."""

    async def main() -> list[Reply]:
        talks: set[asyncio.Task[None]] = set()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            talks.add(task)
            try:
                await script(reader, writer)
            except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
                pass  # the client has gone, or the test is over
            finally:
                writer.transport.abort()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        transport = make_transport(
            Target(url=f"127.0.0.1:{port}{path}", protocol=protocol, model="m", **target), connections=1
        )
        try:
            await transport.open(LONG_S)
            if together:
                replies = await asyncio.gather(*(transport.infer(payload, limit_s) for _ in range(times)))
            else:
                replies = [await transport.infer(payload, limit_s) for _ in range(times)]
            assert transport.in_flight == 0
            return list(replies)
        finally:
            await transport.close()
            server.close()
            for one in talks:
                one.cancel()
            await asyncio.gather(*talks, return_exceptions=True)

    return asyncio.run(main())


# --- REST --------------------------------------------------------------------------------------------------------


def says(*answers: bytes, pieces: int = 0) -> Script:
    """Answers each request with the next of these, whole or in pieces of so many bytes; then it closes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            for start in range(0, len(answer), pieces or len(answer)):
                writer.write(answer[start : start + (pieces or len(answer))])
                await writer.drain()
                if pieces:
                    await asyncio.sleep(0.001)

    return script


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX-Seldon-Route: :m_1:\r\n\r\ngood"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;a=b\r\ngo\r\n2\r\nod\r\n0\r\ntrailer: x\r\n\r\n"
TO_ITS_END = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ngood"
AFTER_ANOTHER = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + PLAIN


@pytest.mark.parametrize("pieces", [0, 1, 7])
@pytest.mark.parametrize("answer", [PLAIN, CHUNKED, TO_ITS_END, AFTER_ANOTHER], ids=["plain", "chunked", "end", "103"])
def test_answers_of_http_come_whole_however_they_are_cut(answer: bytes, pieces: int) -> None:
    (reply,) = asked(says(answer, pieces=pieces), protocol="rest")
    assert (reply.status, reply.body, reply.first) == (Status.OK, b"good", True)


def test_any_number_of_interim_answers_may_come_before() -> None:
    (reply,) = asked(says(b"HTTP/1.1 100 Continue\r\n\r\n" * 5000 + PLAIN), protocol="rest")
    assert (reply.status, reply.body) == (Status.OK, b"good")


def test_a_connection_is_kept_and_its_first_answer_is_told_from_the_next() -> None:
    replies = asked(says(PLAIN, CHUNKED, PLAIN), protocol="rest", times=3)
    assert [reply.body for reply in replies] == [b"good"] * 3
    assert [reply.first for reply in replies] == [True, False, False]
    assert replies[0].headers == {ROUTE: ":m_1:"}


def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    replies = asked(says(TO_ITS_END), protocol="rest", times=3)
    assert [(reply.status, reply.first) for reply in replies] == [(Status.OK, True)] * 3


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\ngood",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfour\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nmore",
        b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\ngood",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    ],
    ids=["ssh", "negative", "too long", "no size", "after the end", "cut off", "endless head"],
)
def test_what_is_no_answer_of_http_is_a_broken_connection(answer: bytes) -> None:
    (reply,) = asked(says(answer), protocol="rest")
    assert reply.status == Status.CONNECTION


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'HTTP/1.1 404 Not Found\r\nContent-Length: 20\r\n\r\n{"error": "no such"}', "HTTP 404: no such"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "HTTP 503: "),
        (b"HTTP/1.1 204 None\r\n\r\n", "HTTP 204: "),
    ],
)
def test_another_status_is_told(answer: bytes, message: str) -> None:
    (reply,) = asked(says(answer), protocol="rest")
    assert (reply.status, reply.message) == (Status.STATUS, message)


def test_a_large_request_arrives_whole() -> None:
    large = Payload(body=bytes(range(256)) * 8000)
    seen = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append(await reader.readexactly(len(large.body)))
        writer.write(PLAIN)
        await writer.drain()

    asked(script, protocol="rest", payload=large)
    assert seen == [large.body]


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
@pytest.mark.parametrize(
    ("name", "value"), [("bad name", "secret"), ("x", "secret\r\nInjected: 1"), ("x", "secreté"), ("", "secret")]
)
def test_headers_that_are_none_are_refused_and_their_values_not_shown(
    protocol: Protocol, name: str, value: str
) -> None:
    with pytest.raises(InputError, match=f"of the header {name!r}") as caught:
        asked(says(PLAIN), protocol=protocol, headers={name: value})
    assert "secret" not in f"{caught.value.message}{caught.value.hint}"


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_what_does_not_answer_in_time_is_told_with_the_limit_that_was_given(protocol: Protocol) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if protocol == "grpc":
            writer.write(http2.settings({}))
            await writer.drain()
        await reader.read(-1)

    (reply,) = asked(silent, protocol=protocol, limit_s=0.2)
    assert reply.status == Status.TIMEOUT
    # Where the machine is so busy that not even the connection was there by then, that is what is told.
    assert re.fullmatch(r"(DEADLINE_EXCEEDED: )?no (answer|connection) within 0\.2 s", reply.message)


def test_a_servers_own_words_on_time_stay_as_they_are() -> None:
    own = Reply(Status.TIMEOUT, message="DEADLINE_EXCEEDED: the batch was not full in time, and more")
    assert with_limit(own, 0.5) == own
    done = Reply(Status.OK, b"x", message="in time")
    assert with_limit(done, 0.5) == done
    late = Reply(Status.TIMEOUT, message="no answer in time")
    assert with_limit(late, 10.0, " of when it was due").message == "no answer within 10 s of when it was due"


# --- gRPC --------------------------------------------------------------------------------------------------------

HEADERS = [(":status", "200"), ("content-type", "application/grpc"), (ROUTE, ":m_1:")]
GOOD = [("grpc-status", "0")]


class H2:
    """The server's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = Frames()
        self._waiting: list[tuple[int, int, int, bytes]] = []
        self.encoder = hpack.Encoder()
        self.encoder.header_table_size = 0

    async def begin(self, **settings: int) -> None:
        assert await self._reader.readexactly(len(http2.PREFACE)) == http2.PREFACE
        self.send(http2.settings({Setting[name]: value for name, value in settings.items()}))

    def send(self, *frames: bytes) -> None:
        self._writer.write(b"".join(frames))

    async def next(self, *kinds: Kind) -> tuple[int, int, int, bytes]:
        """The next frame of one of these kinds."""
        while True:
            while self._waiting:
                found = self._waiting.pop(0)
                if found[0] in kinds:
                    return found
            data = await self._reader.read(100_000)
            if not data:
                raise ConnectionResetError
            self._waiting += self._frames.split(data)

    def block(self, headers: list[tuple[str, str]]) -> bytes:
        return bytes(self.encoder.encode(headers))  # strings by Huffman's code, as Envoy has them

    def answer(self, stream: int, *parts: bytes, trailers: list[tuple[str, str]] | None = None) -> None:
        message = b"".join(parts)
        content = b"\0" + len(message).to_bytes(4, "big") + message
        self.send(
            http2.frame(Kind.HEADERS, http2.END_HEADERS, stream, self.block(HEADERS)),
            http2.frame(Kind.DATA, 0, stream, content[:3]),
            http2.frame(Kind.DATA, http2.PADDED, stream, b"\x02" + content[3:] + b"\0\0"),
            http2.frame(Kind.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, self.block(trailers or GOOD)),
        )


def serves(each: Callable[[H2, int, bytes], None], **settings: int) -> Script:
    """Gives each call, once its message is whole, to a function that answers it."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = H2(reader, writer)
        held: dict[int, bytes] = {}
        await side.begin(**settings)
        while True:
            kind, flags, stream, content = await side.next(Kind.HEADERS, Kind.DATA, Kind.PING)
            held[stream] = held.get(stream, b"") + (content if kind == Kind.DATA else b"")
            if kind == Kind.DATA and flags & http2.END_STREAM:
                each(side, stream, held.pop(stream))

    return script


def test_calls_are_answered_by_headers_data_and_trailers() -> None:
    replies = asked(serves(lambda side, stream, sent: side.answer(stream, sent[5:])), protocol="grpc", times=2)
    assert [(reply.status, reply.body, reply.first) for reply in replies] == [
        (Status.OK, b"question", True),
        (Status.OK, b"question", False),
    ]
    assert replies[1].headers == {ROUTE: ":m_1:"}


def test_headers_may_go_on_in_other_frames_and_come_with_padding() -> None:
    def each(side: H2, stream: int, sent: bytes) -> None:
        block = side.block([*HEADERS, *GOOD])
        padded = b"\x03" + b"\0" * 5 + block[:4] + b"\0\0\0"
        begun = http2.PADDED | http2.PRIORITY | http2.END_STREAM
        side.send(
            http2.frame(Kind.HEADERS, begun, stream, padded),
            http2.frame(Kind.CONTINUATION, 0, stream, block[4:6]),
            http2.frame(Kind.CONTINUATION, http2.END_HEADERS, stream, block[6:]),
        )

    (reply,) = asked(serves(each), protocol="grpc")
    assert (reply.status, reply.message) == (Status.STATUS, "INTERNAL: not one message, or a compressed one")


@pytest.mark.parametrize(
    ("trailers", "status", "message"),
    [
        ([("grpc-status", "5"), ("grpc-message", "no model%20%C3%A9")], Status.STATUS, "NOT_FOUND: no model é"),
        ([("grpc-status", "14"), ("grpc-message", "down")], Status.CONNECTION, "UNAVAILABLE: down"),
        ([("grpc-status", "4")], Status.TIMEOUT, "DEADLINE_EXCEEDED: "),
        ([("grpc-status", "77")], Status.STATUS, "code 77: "),
        ([("x", "y")], Status.STATUS, "no answer of gRPC, but HTTP status 200"),
    ],
)
def test_the_servers_status_is_told(trailers: list[tuple[str, str]], status: Status, message: str) -> None:
    (reply,) = asked(serves(lambda side, stream, sent: side.answer(stream, trailers=trailers)), protocol="grpc")
    assert (reply.status, reply.message) == (status, message)


@pytest.mark.parametrize(("http", "status"), [("404", Status.STATUS), ("503", Status.CONNECTION)])
def test_a_proxy_that_answers_itself_is_told(http: str, status: Status) -> None:
    def each(side: H2, stream: int, sent: bytes) -> None:
        block = side.block([(":status", http)])
        side.send(http2.frame(Kind.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, block))

    (reply,) = asked(serves(each), protocol="grpc")
    assert (reply.status, reply.message) == (status, f"no answer of gRPC, but HTTP status {http}")


@pytest.mark.parametrize(("code", "status"), [(http2.REFUSED_STREAM, Status.CONNECTION), (2, Status.STATUS)])
def test_a_call_may_be_reset(code: int, status: Status) -> None:
    def each(side: H2, stream: int, sent: bytes) -> None:
        side.send(http2.reset(stream, code))

    (reply,) = asked(serves(each), protocol="grpc")
    assert reply.status == status
    assert f"HTTP/2 error {code}" in reply.message


def test_large_messages_wait_for_their_windows() -> None:
    """The server lets 10,000 bytes of each call pass, then as many as come; and no frame is longer than it allows."""
    seen: list[int] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = H2(reader, writer)
        held: dict[int, bytes] = {}
        await side.begin(INITIAL_WINDOW_SIZE=10_000)
        while True:
            _, flags, stream, content = await side.next(Kind.DATA)
            seen.append(len(content))
            held[stream] = held.get(stream, b"") + content
            if flags & http2.END_STREAM:
                side.answer(stream, held.pop(stream)[5:][-10:])
            elif content:
                side.send(http2.window_update(stream, len(content)))
            side.send(http2.window_update(0, len(content)))

    large = Payload(body=bytes(range(250)) * 1200)
    replies = asked(script, protocol="grpc", payload=large, times=3, together=True)
    assert [reply.body for reply in replies] == [large.body[-10:]] * 3
    assert sum(seen) == 3 * (len(large.body) + 5)
    assert max(seen) <= 10_000


def test_no_more_calls_are_made_at_once_than_the_server_takes() -> None:
    """It answers when two have come whole, and the last by itself."""
    begun: list[int] = []
    whole: list[int] = []
    most = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = H2(reader, writer)
        await side.begin(MAX_CONCURRENT_STREAMS=2)
        answered = 0
        while True:
            kind, _, stream, _ = await side.next(Kind.HEADERS, Kind.DATA)
            (begun if kind == Kind.HEADERS else whole).append(stream)
            most.append(len(begun))
            if len(whole) == min(2, 5 - answered):
                answered += len(whole)
                for one in whole:
                    side.answer(one)
                begun.clear()
                whole.clear()

    replies = asked(script, protocol="grpc", times=5, together=True)
    assert [reply.status for reply in replies] == [Status.OK] * 5
    assert max(most) == 2


def test_who_goes_away_is_asked_again_on_another_connection() -> None:
    def each(side: H2, stream: int, sent: bytes) -> None:
        side.answer(stream, b"last")
        side.send(http2.frame(Kind.GOAWAY, 0, 0, stream.to_bytes(4, "big") + bytes(4)))

    replies = asked(serves(each), protocol="grpc", times=3)
    assert [(reply.status, reply.first) for reply in replies] == [(Status.OK, True)] * 3


def test_calls_that_were_not_begun_when_the_server_went_are_lost() -> None:
    def each(side: H2, stream: int, sent: bytes) -> None:
        side.send(http2.frame(Kind.GOAWAY, 0, 0, bytes(8)))

    (reply,) = asked(serves(each), protocol="grpc")
    assert (reply.status, reply.message) == (Status.CONNECTION, "UNAVAILABLE: the server is going away")


def test_pings_are_answered_and_settings_may_change() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = H2(reader, writer)
        await side.begin(INITIAL_WINDOW_SIZE=0)
        _, _, stream, _ = await side.next(Kind.HEADERS)
        side.send(http2.frame(Kind.PING, 0, 0, b"12345678"))
        assert await side.next(Kind.PING) == (Kind.PING, http2.ACK, 0, b"12345678")
        side.send(http2.settings({Setting.INITIAL_WINDOW_SIZE: 100}))
        await side.next(Kind.DATA)
        side.answer(stream, b"good")
        await side.next(Kind.PING)

    (reply,) = asked(script, protocol="grpc")
    assert (reply.status, reply.body) == (Status.OK, b"good")


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        http2.frame(Kind.PING, 0, 0, bytes(8)),
        http2.frame(Kind.SETTINGS, 0, 0, b"12345"),
        b"",
    ],
    ids=["http/1", "no settings", "half a setting", "nothing"],
)
def test_what_does_not_speak_http2_is_told_when_connecting(greeting: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()
        if greeting:
            await reader.read()
            await reader.read()

    with pytest.raises(UnreachableError, match=r"no gRPC connection to 127\.0\.0\.1:\d+"):
        asked(script, protocol="grpc")


@pytest.mark.parametrize(
    "frames",
    [
        http2.frame(Kind.PUSH_PROMISE, http2.END_HEADERS, 1, bytes(4)),
        http2.frame(Kind.CONTINUATION, 0, 1, b""),
        http2.frame(Kind.HEADERS, 0, 1, b"") + http2.frame(Kind.DATA, 0, 1, b""),
        http2.frame(Kind.HEADERS, http2.END_HEADERS, 1, b"\xbf\xff\xff"),
        http2.frame(Kind.HEADERS, http2.END_HEADERS | http2.PADDED, 1, b"\x09x"),
        http2.frame(Kind.WINDOW_UPDATE, 0, 0, b"\0"),
        b"\xff\xff\xff" + bytes(6),
    ],
    ids=["push", "continuation", "not continued", "bad block", "padding", "cut off", "too long"],
)
def test_what_breaks_the_protocol_ends_the_connection(frames: bytes) -> None:
    (reply,) = asked(serves(lambda side, stream, sent: side.send(frames)), protocol="grpc")
    assert reply.status == Status.CONNECTION
    assert "does not speak HTTP/2" in reply.message


def test_headers_are_written_as_others_read_them() -> None:
    headers = [(":method", "POST"), ("x", ""), ("long", "v" * 5000), ("edge", "v" * 127)]
    decoder = hpack.Decoder(max_header_list_size=1 << 20)
    assert [(str(name), str(value)) for name, value in decoder.decode(http2.encode_headers(headers))] == headers
    assert HeaderBlocks().decode(http2.encode_headers(headers)) == dict(headers)


def test_a_block_that_would_be_remembered_is_refused() -> None:
    """The other side was told not to; what it means would depend on what came before."""
    with pytest.raises(Http2Error, match="cannot be read"):
        HeaderBlocks().decode(b"\xbe")  # the newest entry of a table that has none


def test_a_target_without_a_port_has_that_of_its_scheme() -> None:
    # Nobody listens there, but that is what is tried.
    target = Target(url="127.0.0.1", protocol="rest", model="m")

    async def main(one: Target) -> str:
        transport = make_transport(one, connections=1)
        await transport.open(LONG_S)
        try:
            return (await transport.infer(BODY, LONG_S)).message
        finally:
            await transport.close()

    assert "80" in asyncio.run(main(target))
    assert "443" in asyncio.run(main(replace(target, tls=True)))


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
@pytest.mark.parametrize("url", ["", "host:port", ":8000", "http://host:1", f"{'a' * 70}.b:1", "host:99999", "a@b:1"])
def test_what_is_no_address_is_refused(protocol: Protocol, url: str) -> None:
    async def main() -> None:
        await make_transport(Target(url=url, protocol=protocol, model="m"), connections=1).open(1.0)

    with pytest.raises(InputError, match="is no address of a server"):
        asyncio.run(main())


def test_a_path_before_v2_is_kept() -> None:
    seen = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n")).decode())
        writer.write(PLAIN)
        await writer.drain()

    asked(script, protocol="rest", path="/seldon/")
    assert seen == ["POST /seldon/v2/models/m/infer HTTP/1.1\r\n"]


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_whoever_waits_when_the_transport_closes_is_told(protocol: Protocol) -> None:
    async def main() -> list[Reply]:
        writers: list[asyncio.StreamWriter] = []
        listening = await asyncio.start_server(lambda reader, writer: writers.append(writer), "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        transport = make_transport(Target(url=f"127.0.0.1:{port}", protocol=protocol, model="m"), connections=1)
        if protocol == "rest":
            await transport.open(LONG_S)
        else:
            with pytest.raises(UnreachableError):
                await transport.open(0.1)  # it never says a word
        waiting = [asyncio.create_task(transport.infer(BODY, LONG_S)) for _ in range(2)]
        await asyncio.sleep(0.05)
        await transport.close()
        replies = await asyncio.wait_for(asyncio.gather(*waiting), LONG_S / 2)
        listening.close()
        for writer in writers:
            writer.transport.abort()
        assert transport.in_flight == 0
        return replies

    assert [reply.status for reply in asyncio.run(main())] == [Status.CONNECTION] * 2


def test_a_call_that_is_answered_before_it_was_heard_is_given_up() -> None:
    seen = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = H2(reader, writer)
        await side.begin(INITIAL_WINDOW_SIZE=100)
        _, _, stream, _ = await side.next(Kind.DATA)
        side.answer(stream, trailers=[("grpc-status", "8"), ("grpc-message", "too large")])
        seen.append(await side.next(Kind.RST_STREAM))
        _, _, stream, _ = await side.next(Kind.DATA)
        side.answer(stream)
        await side.next(Kind.RST_STREAM)

    large = Payload(body=bytes(100_000))
    replies = asked(script, protocol="grpc", payload=large, times=2)
    assert [reply.message for reply in replies] == ["RESOURCE_EXHAUSTED: too large", ""]
    assert [(frame[0], frame[2]) for frame in seen] == [(Kind.RST_STREAM, 1)]


@pytest.mark.parametrize("window", [20_000, 300_001, 1 << 24])
def test_a_large_message_comes_as_it_is_whatever_the_windows(window: int) -> None:
    large = Payload(body=hashlib.shake_256(b"large").digest(3 * WRITE_BYTES + 7))

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side, held = H2(reader, writer), b""
        await side.begin(INITIAL_WINDOW_SIZE=window)
        flags = 0
        while not flags & http2.END_STREAM:
            _, flags, stream, content = await side.next(Kind.DATA)
            held += content
            side.send(http2.window_update(0, len(content)) + http2.window_update(stream, len(content)))
        assert held[:5] == b"\0" + len(large.body).to_bytes(4, "big")
        side.answer(stream, hashlib.sha256(held[5:]).digest())

    (reply,) = asked(script, protocol="grpc", payload=large)
    assert (reply.status, reply.body) == (Status.OK, hashlib.sha256(large.body).digest())


@pytest.mark.parametrize("window", [1, 3, 10])
def test_small_messages_wait_for_their_windows_too(window: int) -> None:
    """Whoever held a message back until it fits as a whole would wait for ever: the window grows by what has come."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side, held = H2(reader, writer), b""
        await side.begin(INITIAL_WINDOW_SIZE=window)
        while True:
            _, flags, stream, content = await side.next(Kind.DATA)
            assert len(content) <= window
            held += content
            if flags & http2.END_STREAM:
                side.answer(stream, held[5:])
            else:
                side.send(http2.window_update(stream, len(content)))

    (reply,) = asked(script, protocol="grpc")
    assert (reply.status, reply.body) == (Status.OK, BODY.body)


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_FRAME_SIZE", 0), ("MAX_FRAME_SIZE", 16_383), ("MAX_FRAME_SIZE", 1 << 24), ("INITIAL_WINDOW_SIZE", 1 << 31)],
)
def test_settings_that_may_not_be_are_refused(name: str, value: int) -> None:
    with pytest.raises(UnreachableError, match=f"{name} of {value}"):
        asked(serves(lambda side, stream, sent: None, **{name: value}), protocol="grpc", payload=Payload(body=bytes(9)))


def test_calls_that_wait_begin_as_soon_as_the_server_takes_more() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = H2(reader, writer)
        await side.begin(MAX_CONCURRENT_STREAMS=0)
        await side.next(Kind.SETTINGS)  # its own
        await side.next(Kind.SETTINGS)  # that it has read ours
        await asyncio.sleep(0.05)
        side.send(http2.settings({Setting.MAX_CONCURRENT_STREAMS: 2}))
        while True:
            _, _, stream, _ = await side.next(Kind.DATA)
            side.answer(stream, b"good")

    replies = asked(script, protocol="grpc", times=3, together=True)
    assert [(reply.status, reply.body) for reply in replies] == [(Status.OK, b"good")] * 3


def test_calls_that_wait_when_the_server_goes_are_not_begun_there() -> None:
    def each(side: H2, stream: int, sent: bytes) -> None:
        if stream == 1:
            side.send(http2.frame(Kind.GOAWAY, 0, 0, bytes(8)))

    replies = asked(serves(each, MAX_CONCURRENT_STREAMS=1), protocol="grpc", times=3, together=True)
    assert [(reply.status, reply.message) for reply in replies] == [
        (Status.CONNECTION, "UNAVAILABLE: the server is going away")
    ] * 3


def test_headers_that_never_end_end_the_connection() -> None:
    def each(side: H2, stream: int, sent: bytes) -> None:
        more = [http2.frame(Kind.CONTINUATION, 0, stream, bytes(http2.FIRST_FRAME_SIZE))] * 20
        side.send(http2.frame(Kind.HEADERS, 0, stream, b""), *more)

    (reply,) = asked(serves(each), protocol="grpc")
    assert reply.status == Status.CONNECTION
    assert "headers of more than" in reply.message


@pytest.mark.parametrize(("http", "status"), [("404", Status.STATUS), ("502", Status.CONNECTION)])
def test_a_proxy_that_answers_itself_with_a_page_is_told(http: str, status: Status) -> None:
    def each(side: H2, stream: int, sent: bytes) -> None:
        block = side.block([(":status", http), ("content-type", "text/html")])
        side.send(
            http2.frame(Kind.HEADERS, http2.END_HEADERS, stream, block),
            http2.frame(Kind.DATA, http2.END_STREAM, stream, b"<html>"),
        )

    (reply,) = asked(serves(each), protocol="grpc")
    assert (reply.status, reply.message) == (status, f"no answer of gRPC, but HTTP status {http}")


def test_whoever_waits_for_a_server_that_goes_is_told_when_the_transport_closes() -> None:
    """The lane has another connection by then."""

    async def main() -> list[Reply]:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            side = H2(reader, writer)
            with contextlib.suppress(ConnectionError):
                await side.begin()
                _, _, stream, _ = await side.next(Kind.DATA)
                side.send(http2.frame(Kind.GOAWAY, 0, 0, stream.to_bytes(4, "big") + bytes(4)))
                await side.next(Kind.DATA)
            writer.transport.abort()

        listening = await asyncio.start_server(script, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        transport = make_transport(Target(url=f"127.0.0.1:{port}", protocol="grpc", model="m"), connections=1)
        await transport.open(LONG_S)
        waiting = []
        for _ in range(2):
            waiting.append(asyncio.create_task(transport.infer(BODY, LONG_S)))
            await asyncio.sleep(0.05)
        await transport.close()
        replies = await asyncio.wait_for(asyncio.gather(*waiting), LONG_S / 2)
        listening.close()
        await asyncio.sleep(0.01)
        return replies

    assert [reply.status for reply in asyncio.run(main())] == [Status.CONNECTION] * 2


def test_a_file_of_authorities_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "no/such.pem")
    with pytest.raises(InputError, match=r"no/such\.pem"):
        asked(serves(lambda side, stream, sent: None), protocol="grpc", tls=True)


@pytest.mark.parametrize("name", ["Host", "host"])
def test_a_host_of_the_targets_own_takes_the_place_of_its_address(name: str) -> None:
    seen = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(PLAIN)
        await writer.drain()

    asked(script, protocol="rest", headers={name: "models.example"})
    assert [line for line in seen[0].split("\r\n") if line.lower().startswith("host:")] == [f"{name}: models.example"]
