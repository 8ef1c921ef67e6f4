"""For tests: a fake of a whole V2 server with a latency law, the same laws in virtual time, and contract suites.

A law is a plain object that says, at each arrival, how long the answer takes. `FakeV2Server` sleeps that long;
`simulate` only computes with it, so that a minute of load takes milliseconds.
"""

import asyncio
import heapq
import json
import math
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from profiles.load.arrivals import schedule_blocks
from profiles.load.http2 import Http2Error
from profiles.load.null_server import GRPC_REPLY, Grpc
from profiles.load.payloads import HEADER_LENGTH, encode_payloads
from profiles.load.recording import NS_PER_S, Recording, Trace
from profiles.load.transports import Status, Transport, make_transport
from registry.errors import UnreachableError
from registry.records import ClosedLoop, LoadProfile, Target

T = TypeVar("T")

INPUT = {"name": "x", "datatype": "FP32", "shape": [-1, 16]}
"""The input of the fake server, as its metadata has it; in truth it sums rows of any shape."""
BATCH_S = 0.004
"""How long the fake server waits for company, where it answers in batches."""

# --- latency laws ------------------------------------------------------------------------------------------------


class Law(Protocol):
    """How long answers take."""

    def delay_s(self, at_s: float) -> float:
        """From an arrival at ``at_s`` (rising from call to call) to its answer."""


@dataclass(slots=True)
class Fixed:
    """Every answer takes the same time, however many are asked for."""

    latency_s: float

    def delay_s(self, at_s: float) -> float:
        """The same each time."""
        return self.latency_s


@dataclass(slots=True)
class Exponential:
    """Answers take exponential times, independent of each other and of the load."""

    mean_s: float
    seed: int = 0
    _chance: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._chance = np.random.default_rng(self.seed)

    def delay_s(self, at_s: float) -> float:
        """An exponential time."""
        return float(self._chance.exponential(self.mean_s))


@dataclass(slots=True)
class Bimodal:
    """Most answers take one time, some another: a cache that misses, or two kinds of requests.

    Attributes:
        usual_s: of most.
        rare_s: of the others.
        rare_share: how many those are, 0 to 1.
        seed: of chance.
    """

    usual_s: float
    rare_s: float
    rare_share: float
    seed: int = 0
    _chance: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._chance = np.random.default_rng(self.seed)

    def delay_s(self, at_s: float) -> float:
        """One of the two, by chance."""
        return self.rare_s if self._chance.random() < self.rare_share else self.usual_s


@dataclass(slots=True)
class Batches:
    """A server that takes all that wait, at most so many, and works on them together.

    A batch of b takes ``fixed_s + b * each_s``. It starts when the server is free and something waits, after
    ``delay_s`` or with a full batch, whichever comes first. Since a law has to answer at each arrival, a request that
    joins a batch is told when that would end if nobody else came: those before it in the batch finish a little earlier
    than in truth.

    Attributes:
        fixed_s: of each batch.
        each_s: of each request in it.
        most: requests in a batch.
        wait_s: how long a free server waits for company.
    """

    fixed_s: float
    each_s: float
    most: int
    wait_s: float = 0.0
    _starts_s: float = field(init=False, default=-math.inf)
    _held: int = field(init=False, default=0)

    def delay_s(self, at_s: float) -> float:
        """Waiting for the batch to start, and the batch."""
        if at_s >= self._starts_s or self._held >= self.most:
            free_s = self._starts_s + self.fixed_s + self._held * self.each_s if self._held else at_s
            self._starts_s, self._held = max(free_s, at_s + self.wait_s), 0
        self._held += 1
        return self._starts_s + self.fixed_s + self._held * self.each_s - at_s


@dataclass(slots=True)
class Queue:
    """Workers that take requests in their order of arrival: M/M/n or M/D/n under Poisson arrivals.

    Attributes:
        service_s: mean time of service.
        workers: how many serve at once; capacity is ``workers / service_s``.
        service: whether the times of service are all equal, or exponential.
        seed: of the exponential times.
    """

    service_s: float
    workers: int = 1
    service: Literal["fixed", "exponential"] = "fixed"
    seed: int = 0
    _free_at: list[float] = field(init=False)
    _chance: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._free_at = [0.0] * self.workers
        self._chance = np.random.default_rng(self.seed)

    def delay_s(self, at_s: float) -> float:
        """Waiting and service together."""
        took = self.service_s if self.service == "fixed" else float(self._chance.exponential(self.service_s))
        done = max(at_s, heapq.heappop(self._free_at)) + took
        heapq.heappush(self._free_at, done)
        return done - at_s


@dataclass(slots=True)
class Stall:
    """Another law, frozen once: what arrives in the freeze waits until it ends.

    Attributes:
        law: what holds otherwise.
        from_s: when the freeze begins.
        for_s: how long it lasts.
    """

    law: Law
    from_s: float
    for_s: float

    def delay_s(self, at_s: float) -> float:
        """As the law has it, after the freeze."""
        end_s = self.from_s + self.for_s
        start_s = end_s if self.from_s <= at_s < end_s else at_s
        return start_s - at_s + self.law.delay_s(start_s)


def simulate(law: Law, profile: LoadProfile) -> Recording:
    """What a perfect client would record of a server with this law, computed in virtual time."""
    length_s = profile.warmup_s + profile.duration_s
    if isinstance(profile.load, ClosedLoop):
        sent, done = _simulate_closed(law, profile.load.concurrency, length_s)
    else:
        load = profile.load
        blocks = schedule_blocks(load, profile.warmup_s, profile.duration_s, seed=profile.seed)
        sent = np.concatenate([np.empty(0, np.int64), *blocks]) / NS_PER_S
        done = np.array([at + law.delay_s(at) for at in sent.tolist()])
    late = done - sent > profile.timeout_s
    trace = Trace(
        intended_ns=_ns(sent),
        sent_ns=_ns(sent),
        done_ns=_ns(np.where(late, sent + profile.timeout_s, done)),
        status=np.where(late, Status.TIMEOUT, Status.OK).astype(np.int8),
        payload=np.zeros(len(sent), dtype=np.int32),
    )
    return trace.window(int(profile.warmup_s * NS_PER_S), int(length_s * NS_PER_S))


def _simulate_closed(law: Law, concurrency: int, length_s: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    sent, done = [], []
    free = [0.0] * concurrency
    while free[0] < length_s:
        at_s = heapq.heappop(free)
        sent.append(at_s)
        done.append(at_s + law.delay_s(at_s))
        heapq.heappush(free, done[-1])
    return np.array(sent), np.array(done)


def _ns(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    whole: NDArray[np.int64] = np.round(seconds * NS_PER_S).astype(np.int64)
    return whole


# --- the fake server ---------------------------------------------------------------------------------------------


class FakeV2Server:
    """A V2 server on loopback, REST and gRPC, that sums each row of its first input into the output ``sum``.

    Used as a context manager; the law's clock starts with the first inference. It answers liveness,
    readiness, metadata and inference of one model, over REST as JSON and with binary tensors.

    Args:
        law: how long answers take.
        model: the model's name; any other is not found.
        fail_every: each so many-th inference is answered with an error of the server; 0 for none.
        wrong_every: each so many-th inference is answered with a wrong sum; 0 for none.
        binary: whether REST takes binary tensors, as Triton's does.
        tls: PEM files of certificate and key, to speak TLS only; None for plain connections.
        split: has requests that come together answered together: given the right answers of one batch, one array of
            sums a request, in their order of arrival, it says what each request is answered with.
        answerer: (model, version) that the so many-th reply says it is of, counted from 1; None for the model's name
            and no version.
        route: the header ``x-seldon-route`` of each reply, or empty for none.
    """

    def __init__(
        self,
        law: Law | None = None,
        *,
        model: str = "m",
        fail_every: int = 0,
        wrong_every: int = 0,
        binary: bool = True,
        tls: tuple[Path, Path] | None = None,
        split: Callable[[list[NDArray[np.float32]]], list[NDArray[np.float32]]] | None = None,
        answerer: Callable[[int], tuple[str, str]] | None = None,
        route: str = "",
    ) -> None:
        self.law = law or Fixed(0.0)
        self.model = model
        self.asked = 0
        self.last_headers: dict[str, str] = {}
        self._fail_every = fail_every
        self._wrong_every = wrong_every
        self._binary = binary
        self._tls = tls
        self._split = split
        self._answerer = answerer or (lambda count: (model, ""))
        self._route = route
        self._batch: list[tuple[NDArray[np.float32], asyncio.Future[NDArray[np.float32]]]] = []
        self._first_s = 0.0
        self._ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        _on_server_loop(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends it at once, as a crash would; a second call does nothing."""
        if self._ports:
            self._ports = {}
            _on_server_loop(self._stop())

    def target(self, protocol: Literal["grpc", "rest"]) -> Target:
        """Where it listens."""
        binary = self._binary and protocol == "rest"
        url = f"127.0.0.1:{self._ports[protocol]}"
        return Target(url=url, protocol=protocol, model=self.model, tls=self._tls is not None, binary=binary)

    # --- its life ---

    async def _start(self) -> None:
        import grpc
        from aiohttp import web

        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/{path:.*}", self._rest_get)
        app.router.add_post("/v2/models/{model}/infer", self._rest_infer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0, handler_cancellation=True)
        await self._runner.setup()
        secured = None
        if self._tls:
            secured = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            secured.load_cert_chain(*self._tls)
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=secured)
        await site.start()
        self._grpc = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(method)
            for name, method in {
                "ModelInfer": self._grpc_infer,
                "ModelReady": self._grpc_ready,
                "ModelMetadata": self._grpc_metadata,
                "ServerReady": self._grpc_ready,
                "ServerLive": self._grpc_ready,
            }.items()
        }
        generic = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)
        self._grpc.add_generic_rpc_handlers((generic,))
        if self._tls:
            certificate, key = (path.read_bytes() for path in self._tls)
            secret = grpc.ssl_server_credentials([(key, certificate)])
            grpc_port = self._grpc.add_secure_port("127.0.0.1:0", secret)
        else:
            grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        await self._grpc.start()
        self._ports = {"rest": self._runner.addresses[0][1], "grpc": grpc_port}

    async def _stop(self) -> None:
        await self._grpc.stop(grace=0)
        await self._runner.cleanup()

    # --- its answers ---

    async def _answer(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The sum of each row, after the law's delay.

        Raises:
            UnreachableError: it is this request's turn to fail.
        """
        self.asked += 1
        count = self.asked
        now_s = time.perf_counter()
        self._first_s = self._first_s or now_s
        delay_s = self.law.delay_s(now_s - self._first_s)
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        if self._fail_every and count % self._fail_every == 0:
            raise UnreachableError("the model fell over")
        first = next(iter(arrays.values()))
        sums = first.reshape(len(first), -1).sum(axis=1, dtype=np.float32, keepdims=True)
        wrong = self._wrong_every and count % self._wrong_every == 0
        answer = np.asarray(sums + 1000 if wrong else sums, dtype=np.float32)
        return answer if self._split is None else await self._in_batch(answer)

    async def _in_batch(self, answer: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the batch that this answer falls into is split to for it."""
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[NDArray[np.float32]] = loop.create_future()
        self._batch.append((answer, mine))
        if len(self._batch) == 1:
            loop.call_later(BATCH_S, self._answer_batch)
        return await mine

    def _answer_batch(self) -> None:
        batch, self._batch = self._batch, []
        split = self._split or list
        for (_, waiting), answer in zip(batch, split([answer for answer, _ in batch]), strict=True):
            if not waiting.done():  # its client may have gone
                waiting.set_result(answer)

    async def _rest_get(self, request: Any) -> Any:
        from aiohttp import web

        path = f"/{request.match_info['path']}"
        about_model = path.startswith("/v2/models/")
        if path not in {"/v2", "/v2/health/live", "/v2/health/ready"} and not (
            about_model and path.split("/")[3] == self.model
        ):
            return web.json_response({"error": f"no such thing: {path}"}, status=404)
        described: dict[str, Any] = {"name": self.model, "inputs": [INPUT]} if about_model else {"name": "fake"}
        return web.json_response({**described, "extensions": ["binary_tensor_data"] if self._binary else []})

    async def _rest_infer(self, request: Any) -> Any:
        from aiohttp import web

        body = await request.read()
        self.last_headers = {name.lower(): value for name, value in request.headers.items()}
        length = request.headers.get(HEADER_LENGTH)
        if request.match_info["model"] != self.model:
            return web.json_response({"error": f"unknown model {request.match_info['model']!r}"}, status=404)
        if length is not None and not self._binary:
            return web.json_response({"error": "binary tensors are not supported"}, status=400)
        try:
            sums = await self._answer(_rest_arrays(body, len(body) if length is None else int(length)))
        except UnreachableError as error:
            return web.json_response({"error": str(error)}, status=500)
        model, version = self._answerer(self.asked)
        said = {"model_name": model, **({"model_version": version} if version else {})}
        headers = {"x-seldon-route": self._route} if self._route else {}
        tensor: dict[str, Any] = {"name": "sum", "datatype": "FP32", "shape": list(sums.shape)}
        if length is None:
            tensor["data"] = sums.ravel().tolist()
            return web.json_response({**said, "outputs": [tensor]}, headers=headers)
        tensor["parameters"] = {"binary_data_size": sums.nbytes}
        head = json.dumps({**said, "outputs": [tensor]}).encode()
        return web.Response(body=head + sums.tobytes(), headers={HEADER_LENGTH: str(len(head)), **headers})

    async def _grpc_infer(self, body: bytes, context: Any) -> bytes:
        import grpc
        from tritonclient.grpc import service_pb2

        self.last_headers = {name: str(value) for name, value in context.invocation_metadata()}
        request = service_pb2.ModelInferRequest.FromString(body)
        if request.model_name != self.model:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.model_name!r}")
        arrays = _grpc_arrays(request)
        try:
            sums = await self._answer(arrays)
        except UnreachableError as error:
            await context.abort(grpc.StatusCode.INTERNAL, str(error))
        if self._route:
            await context.send_initial_metadata((("x-seldon-route", self._route),))
        model, version = self._answerer(self.asked)
        response = service_pb2.ModelInferResponse(
            model_name=model, model_version=version, raw_output_contents=[sums.tobytes()]
        )
        response.outputs.add(name="sum", datatype="FP32", shape=sums.shape)
        return bytes(response.SerializeToString())

    async def _grpc_metadata(self, body: bytes, context: Any) -> bytes:
        from tritonclient.grpc import service_pb2

        response = service_pb2.ModelMetadataResponse(name=self.model)
        response.inputs.add(**INPUT)
        return bytes(response.SerializeToString())

    async def _grpc_ready(self, body: bytes, context: Any) -> bytes:
        # Field 1, true: the three messages of readiness and liveness look alike.
        return b"\x08\x01"


def _grpc_arrays(request: Any) -> dict[str, NDArray[Any]]:
    """The tensors of a request: raw, or packed."""
    if request.raw_input_contents:
        return {
            tensor.name: np.frombuffer(raw, dtype=_numpy_type(tensor.datatype)).reshape(tensor.shape)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
    arrays = {}
    for tensor in request.inputs:
        said = {name: value.string_param for name, value in tensor.parameters.items()}
        packed = np.frombuffer(tensor.contents.bytes_contents[0], dtype=_numpy_type(said["datatype"]))
        arrays[tensor.name] = packed.reshape(json.loads(said["shape"]))
    return arrays


def _rest_arrays(body: bytes, header_length: int) -> dict[str, NDArray[Any]]:
    arrays, start = {}, header_length
    for tensor in json.loads(body[:header_length])["inputs"]:
        kind, shape = _numpy_type(tensor["datatype"]), tensor["shape"]
        if "data" in tensor:
            arrays[tensor["name"]] = np.array(tensor["data"], dtype=kind).reshape(shape)
            continue
        array = np.frombuffer(body, dtype=kind, count=math.prod(shape), offset=start).reshape(shape)
        arrays[tensor["name"]] = array
        start += array.nbytes
    return arrays


def _numpy_type(datatype: str) -> Any:
    from tritonclient.utils import triton_to_np_dtype

    return triton_to_np_dtype(datatype)


@cache
def _server_loop() -> asyncio.AbstractEventLoop:
    """One event loop in one thread for all fake servers: gRPC's asyncio side wants no second one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fake-v2-servers", daemon=True).start()
    return loop


def _on_server_loop(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, _server_loop()).result(timeout=20)


class RudeServer:
    """Something on loopback that takes requests and does not answer them as it should; a context manager.

    Args:
        manner: what it does with each request: ``rubbish`` answers at once, as if all were well, with no V2 reply;
            ``drip`` answers a byte at a time (over gRPC: begins to) and never comes to an end; ``reset`` breaks the
            connection off.
        good: so many requests are answered well first.
        protocol: what it speaks.
    """

    def __init__(
        self,
        manner: Literal["rubbish", "drip", "reset"],
        *,
        good: int = 0,
        protocol: Literal["grpc", "rest"] = "rest",
    ) -> None:
        self._manner = manner
        self._good = good
        self._protocol = protocol

    def __enter__(self) -> Self:
        self._server = _on_server_loop(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _on_server_loop(self._stop())

    @property
    def target(self) -> Target:
        """Where it listens."""
        url = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return Target(url=url, protocol=self._protocol, model="m")

    async def _start(self) -> asyncio.Server:
        self._talks: set[asyncio.Task[None]] = set()
        if self._protocol == "grpc":
            return await asyncio.get_running_loop().create_server(lambda: Grpc(self._answer_call), "127.0.0.1", 0)
        return await asyncio.start_server(self._talk, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()
        for talk in self._talks:
            talk.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
                self._good -= 1
                if self._good >= 0:
                    _answer_http(
                        writer, b'{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[0]}]}'
                    )
                else:
                    await self._be_rude(writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            self._talks.discard(task)
            writer.transport.abort()

    def _answer_call(self, method: str) -> bytes | None:
        self._good -= 1
        if self._good >= 0:
            return GRPC_REPLY.replace(b"\n\x04null", b"\n\x01m")
        if self._manner == "reset":
            raise Http2Error("it has had enough")
        return b"\xff\xff rubbish" if self._manner == "rubbish" else None

    async def _be_rude(self, writer: asyncio.StreamWriter) -> None:
        if self._manner == "rubbish":
            _answer_http(writer, b"<html>It works!</html>")
        elif self._manner == "reset":
            raise ConnectionResetError
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while True:
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(0.05)


def _answer_http(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


# --- contracts ---------------------------------------------------------------------------------------------------


class TransportContract(ABC):
    """What every transport keeps; inherit, and say which protocol the transport under test speaks."""

    @property
    @abstractmethod
    def protocol(self) -> Literal["grpc", "rest"]:
        """The protocol under test."""

    def transport(self, target: Target) -> Transport:
        """The transport under test, not yet open."""
        return make_transport(target, connections=2)

    def ask(self, target: Target, *, timeout_s: float = 60.0) -> tuple[Any, int]:
        """One request, sent and answered: its reply, and the requests in flight after it."""

        async def one() -> tuple[Any, int]:
            transport = self.transport(target)
            try:
                await transport.open(60.0)
                reply = await transport.infer(
                    encode_payloads({"x": np.ones((1, 3), "f4")}, target=target)[0], timeout_s
                )
                return reply, transport.in_flight
            finally:
                await transport.close()

        return asyncio.run(one())

    def test_brings_an_answer_back(self) -> None:
        """The bytes of a good answer arrive."""
        with FakeV2Server() as server:
            reply, in_flight = self.ask(server.target(self.protocol))
        assert reply.status == Status.OK
        assert reply.body
        assert in_flight == 0

    def test_says_what_the_server_said(self) -> None:
        """An error of the server is a status with its message, and no exception."""
        with FakeV2Server(fail_every=1) as server:
            reply, in_flight = self.ask(server.target(self.protocol))
        assert reply.status == Status.STATUS
        assert "the model fell over" in reply.message
        assert in_flight == 0

    def test_gives_up_in_time(self) -> None:
        """A slow answer is a timeout, and no exception."""
        with FakeV2Server(Fixed(200.0)) as server:
            began = time.perf_counter()
            reply, in_flight = self.ask(server.target(self.protocol), timeout_s=0.2)
        assert reply.status == Status.TIMEOUT
        assert time.perf_counter() - began < 60
        assert in_flight == 0

    def test_refused_connection(self) -> None:
        """Where nobody listens it is a connection error, or `UnreachableError` from opening."""
        with FakeV2Server() as server:
            target = server.target(self.protocol)
        with pytest.raises(UnreachableError):
            self._ask_or_raise(target)

    def _ask_or_raise(self, target: Target) -> None:
        reply, _ = self.ask(target)
        if reply.status == Status.CONNECTION:
            raise UnreachableError(reply.message)
