"""Raw tensors as arrays, from gRPC to our runtime and back, inside MLServer.

MLServer turns raw contents into Python lists before any runtime sees them, and merges the lists of a batch. For inputs
as large as images that takes ten times as long as all else. For models whose runtime says that it takes arrays, and for
no others, `install` puts two things in the way: a handler of ``ModelInfer`` that keeps the bytes, and a batcher that
hands requests over as they came. The rest of MLServer (metrics, headers, cache, REST, other models) goes on as it was.

This reaches into MLServer's inside, so it is done only in the one version that it was written for.

One server may hold several copies of this module: an installed one, and those beside self-contained models. The first
to be loaded changes MLServer, for itself and for all others of the same `CONTRACT`. So what passes from it to a runtime
and back is plain tuples to both, and every runtime decodes and encodes with its own code.
"""

import asyncio
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import mlserver
import numpy as np
import numpy.typing as npt
from mlserver.errors import InferenceError, MLServerError, ModelNotReady
from mlserver.types import InferenceRequest, InferenceResponse

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
PlainTensor = tuple[str, str, tuple[int, ...], bytes]
"""The fields of a `RawTensor`. It can go to another process, whatever that has imported, and to another copy."""
TensorHead = tuple[str, str, tuple[int, ...]]
"""The fields of a `PlainTensor` but for its content."""
RawReply = tuple[PlainTensor, ...]

KNOWN_VERSION = "1.7.1"
TAKES_RAW = "burnish_takes_raw"
"""A runtime whose attribute of this name is `CONTRACT` has a coroutine method ``predict_many``: requests, each an
``InferenceRequest`` or a tuple for `RawRequest.of`, to as many replies of the same kind, or errors. A reply to a tuple
is a `RawReply`."""
CONTRACT = 1
"""The number of what is said in `TAKES_RAW`. It changes with that, and with the fields of `RawRequest` and `RawTensor`:
copies of one number work together, and those of another leave their tensors to MLServer's own way."""

DTYPES = {
    "BOOL": "?", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT8": "i1", "INT16": "<i2", "INT32": "<i4",
    "INT64": "<i8", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
}  # fmt: skip
"""The V2 protocol's names of types -> numpy's, in the protocol's byte order."""

KEPT_HEADS = 256
"""Requests that are remembered but for their contents, and replies; of requests those of at most `KEPT_HEAD_BYTES`."""
KEPT_HEAD_BYTES = 2**12

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_INSTALLED = "_burnish_raw_tensors"
"""An attribute of ``mlserver``: the `CONTRACT` of the copy that changed it; 0 where none could."""
# Field numbers of ModelInferRequest.raw_input_contents and ModelInferResponse.raw_output_contents.
_RAW_INPUT, _RAW_OUTPUT = 7, 6
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_RAW_OUTPUT_TAG = bytes([_RAW_OUTPUT << 3 | _LENGTH])


class RawTensor(NamedTuple):
    """A tensor as it is on the wire: its elements in row-major order, little-endian."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: Any  # bytes, or a view of some

    def to_array(self) -> Array:
        """The tensor as an array of its type and shape, aligned in memory.

        Raises:
            InferenceError: it has more or fewer bytes than its shape and type take.
        """
        dtype = np.dtype(DTYPES[self.datatype])
        wanted = math.prod(self.shape) * dtype.itemsize
        if min(self.shape, default=0) < 0 or len(self.content) != wanted:
            raise InferenceError(
                f"the input {self.name!r} is {self.datatype} of shape {[*self.shape]}, which takes {wanted} bytes; "
                f"it has {len(self.content)}"
            )
        if dtype.kind == "b":
            # Any byte but 0 is true, but a numpy bool that is neither 0 nor 1 would be no valid one.
            array: Array = np.frombuffer(self.content, np.uint8) != 0
        else:
            array = np.frombuffer(self.content, dtype)
            if not array.flags.aligned:
                # A view into a message starts anywhere; engines compute on aligned memory.
                array = array.copy()
        return array.reshape(self.shape)

    def plain(self) -> PlainTensor:
        """The tensor with bytes in place of a view."""
        return self.name, self.datatype, self.shape, bytes(self.content)

    @classmethod
    def of(cls, name: str, datatype: str, array: Array) -> "RawTensor":
        """An array as a tensor."""
        return cls(name, datatype, array.shape, np.asarray(array, array.dtype.newbyteorder("<")).tobytes())


class RawRequest(NamedTuple):
    """An inference request, and the names of the outputs that it asks for; none of them means all."""

    inputs: tuple[RawTensor, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, request: Any) -> "RawRequest":
        """A request of any copy of this module, or of `portable`, as one of this copy."""
        if type(request) is cls:
            return request
        inputs, outputs = request
        return cls(tuple(RawTensor(*tensor) for tensor in inputs), outputs)

    def portable(self) -> tuple[tuple[PlainTensor, ...], tuple[str, ...]]:
        """The request for another process."""
        return tuple(tensor.plain() for tensor in self.inputs), self.outputs


def install() -> bool:
    """Makes MLServer hand arrays to runtimes that take them; whether it does. A second call changes nothing."""
    installed: int | None = getattr(mlserver, _INSTALLED, None)
    if installed is None:
        installed = CONTRACT if mlserver.__version__ == KNOWN_VERSION else 0
        setattr(mlserver, _INSTALLED, installed)
        if installed:
            _change_mlserver()
        else:
            _warn(f"This is MLServer {mlserver.__version__}, not {KNOWN_VERSION}")
    elif installed not in {0, CONTRACT}:
        _warn(f"A model of this server keeps raw tensors by contract {installed}, not {CONTRACT}")
    return installed == CONTRACT


def _warn(cause: str) -> None:
    logger.warning("%s: raw tensors pass through Python lists here, which is slow for large ones", cause)


def _change_mlserver() -> None:
    from mlserver.batching import AdaptiveBatcher, hooks
    from mlserver.grpc.interceptors import LoggingInterceptor, PromServerInterceptor
    from opentelemetry.instrumentation.grpc import aio_server_interceptor

    # The server's handlers are bound before a model is loaded, but its interceptors are asked at every call. Any one
    # of them will do; which there are depends on the settings.
    tracing = type(aio_server_interceptor())  # type: ignore[no-untyped-call]
    for interceptor in (LoggingInterceptor, PromServerInterceptor, tracing):
        steady = interceptor is PromServerInterceptor
        interceptor.intercept_service = _intercepting(interceptor.intercept_service, steady=steady)

    def make_batcher(model: Any) -> Any:
        return RequestBatcher(model) if takes_raw(model) else AdaptiveBatcher(model)

    hooks.AdaptiveBatcher = make_batcher


def takes_raw(model: Any) -> bool:
    """Whether this model, here or in a worker, has a runtime that takes arrays."""
    return getattr(getattr(model, "_model", model), TAKES_RAW, None) == CONTRACT


# --- gRPC ---


def split_raw(message: bytes) -> tuple[bytes, list[memoryview]]:
    """A ``ModelInferRequest`` without its raw contents, and these as views into it.

    The wire format is that of "Encoding" in the documentation of Protocol Buffers: fields with a tag each, and where
    the tag says so a length.

    Raises:
        ValueError: the message ends within a field.
    """
    view = memoryview(message)
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    at, kept = 0, 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        kind = tag & 7
        size = 0
        if kind == _LENGTH:
            size, at = _varint(message, at)
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in {_FIXED32, _FIXED64}:
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"the request has a field of the unknown wire type {kind}")
        if at + size > len(message):
            raise ValueError("the request ends within a field")
        if tag == _RAW_INPUT << 3 | _LENGTH:
            rest.append(view[kept:start])
            raw.append(view[at : at + size])
            kept = at + size
        at += size
    if not raw:
        return message, []
    return b"".join([*rest, view[kept:]]), raw


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("the request ends within a field")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _intercepting(stock: Callable[..., Awaitable[Any]], *, steady: bool) -> Callable[..., Awaitable[Any]]:
    """An interceptor's method with our handler at the end.

    Args:
        stock: the method.
        steady: whether it wraps a handler the same way at every call, so that once is enough.
    """

    @functools.wraps(stock)
    async def intercept_service(self: Any, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if details.method != _METHOD:
            return await stock(self, continuation, details)
        bound = await continuation(details)
        handler, wrapped = self.__dict__.get(_INSTALLED, (None, None))
        if handler is bound and wrapped is not None:
            return wrapped

        async def ours(_: Any) -> Any:
            return _handler(bound)

        wrapped = await stock(self, ours, details)
        if steady:
            self.__dict__[_INSTALLED] = (bound, wrapped)
            for metric in self._interceptor._metrics.values():
                # It would look for the few same children at every call.
                metric.labels = functools.cache(metric.labels)
        return wrapped

    return intercept_service


def _handler(stock: Any) -> Any:
    """The handler that keeps the bytes, in place of MLServer's own; any other as it is."""
    from mlserver.grpc.servicers import InferenceServicer

    servicer = getattr(getattr(stock, "unary_unary", None), "__self__", None)
    if not isinstance(servicer, InferenceServicer):
        return stock
    infer = _RawInfer(servicer, stock)
    return stock._replace(unary_unary=infer, request_deserializer=None, response_serializer=None)


class _RawInfer:
    """``ModelInfer`` of one server, from bytes to bytes."""

    def __init__(self, servicer: Any, stock: Any) -> None:
        # All that is of MLServer's inside is imported here: within the methods it would be looked up at every request.
        from mlserver.batching.hooks import _AdaptiveBatchingAttr
        from mlserver.context import model_context
        from mlserver.grpc import dataplane_pb2
        from mlserver.grpc.utils import handle_mlserver_error, to_metadata
        from mlserver.parallel.model import ParallelModel
        from mlserver.utils import extract_headers

        self._to_metadata, self._extract_headers = to_metadata, extract_headers
        self._pb, self._in_context = dataplane_pb2, model_context
        self._batcher_attribute, self._remote_kind = _AdaptiveBatchingAttr, ParallelModel
        self._plane = servicer._data_plane
        self._stock = stock
        # It turns errors into statuses as for any other model.
        self._answer_raw = functools.partial(handle_mlserver_error(_RawInfer._answer), self)
        self._metrics = functools.cache(self._metrics_of)
        # Requests differ in their contents, and mostly in nothing else.
        self._kept_head = functools.lru_cache(KEPT_HEADS)(self._request_head)
        self._kept_reply_head = functools.lru_cache(KEPT_HEADS)(self._reply_head)
        self._headers: dict[str, tuple[tuple[str, str], ...]] = {}

    async def __call__(self, message: bytes, context: Any) -> bytes:
        """The reply to a request, both as they are on the wire."""
        head, raw = split_raw(message)
        if raw:
            request = self._kept_head(head) if len(head) <= KEPT_HEAD_BYTES else self._request_head(head)
            model = await self._model_of(request)
            if model is not None:
                reply: bytes = await self._answer_raw((model, request, raw), context)
                return reply
        response = await self._stock.unary_unary(self._stock.request_deserializer(message), context)
        return bytes(self._stock.response_serializer(response))

    async def _model_of(self, request: "_RequestHead") -> Any:
        """The model, where it takes the request raw; else None."""
        # The cache's key is the request as JSON. Where only some contents are raw, MLServer knows which are which.
        if request.has_typed or self._plane._get_response_cache() is not None:
            return None
        try:
            model = await self._plane._model_registry.get_model(request.model_name, request.model_version)
        except MLServerError:  # there is no such model, which the stock handler says
            return None
        return model if takes_raw(model) else None

    async def _answer(self, message: "tuple[Any, _RequestHead, Sequence[memoryview]]", context: Any) -> bytes:
        """What MLServer's servicer and data plane do for a request, but for the tensors."""
        model, request, raw = message
        success, failure, duration = self._metrics(request.model_name, request.model_version)
        began = time.perf_counter()
        try:
            _check_ready(model, request)
            with self._in_context(model.settings):
                reply = await self._predict(model, request.with_contents(raw))
        except Exception:
            failure.inc()
            raise
        finally:
            duration.observe(time.perf_counter() - began)
        success.inc()
        context.set_trailing_metadata(self._trailers(model, request.id))
        # Where requests have ids, no two replies are the same.
        head_of = self._reply_head if request.id else self._kept_reply_head
        head = head_of(model.name, model.version or "", request.id, tuple([tensor[:3] for tensor in reply]))
        return _to_wire(head, reply)

    def _request_head(self, head: bytes) -> "_RequestHead":
        return _RequestHead.of(self._pb.ModelInferRequest.FromString(head))

    def _reply_head(
        self, model_name: str, model_version: str, request_id: str, outputs: tuple[TensorHead, ...]
    ) -> bytes:
        """A ``ModelInferResponse`` without contents."""
        head = self._pb.ModelInferResponse(model_name=model_name, model_version=model_version, id=request_id)
        for name, datatype, shape in outputs:
            head.outputs.add(name=name, datatype=datatype, shape=shape)
        return bytes(head.SerializeToString())

    async def _predict(self, model: Any, request: RawRequest) -> RawReply:
        answer: Any
        if batcher := getattr(model, self._batcher_attribute, None):
            return await batcher.predict(request)  # type: ignore[no-any-return]
        if isinstance(model, self._remote_kind):
            (answer,) = await model._send("predict_many", [request.portable()])
        else:
            (answer,) = await model.predict_many([request])
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    def _metrics_of(self, name: str, version: str) -> tuple[Any, Any, Any]:
        plane = self._plane
        kept = (plane._ModelInferRequestSuccess, plane._ModelInferRequestFailure, plane._ModelInferRequestDuration)
        success, failure, duration = (metric.labels(model=name, version=version) for metric in kept)
        return success, failure, duration

    def _trailers(self, model: Any, request_id: str) -> tuple[tuple[str, str], ...]:
        """The headers that MLServer's middlewares give a response."""
        if not request_id and model.name in self._headers:
            return self._headers[model.name]
        response = InferenceResponse(model_name=model.name, id=request_id, outputs=[])
        self._plane._inference_middleware.response_middleware(response, model.settings)
        trailers: tuple[tuple[str, str], ...] = self._to_metadata(self._extract_headers(response) or {})
        if not request_id:
            self._headers[model.name] = trailers
        return trailers


def _check_ready(model: Any, request: "_RequestHead") -> None:
    if not model.ready:
        raise ModelNotReady(request.model_name, request.model_version)


class _RequestHead(NamedTuple):
    """A request but for its raw contents."""

    model_name: str
    model_version: str
    id: str
    inputs: tuple[TensorHead, ...]
    outputs: tuple[str, ...]
    has_typed: bool
    """Whether some input has contents that are not raw."""

    @classmethod
    def of(cls, request: Any) -> "_RequestHead":
        """Of a ``ModelInferRequest``."""
        return cls(
            request.model_name,
            request.model_version,
            request.id,
            tuple((tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in request.inputs),
            tuple(output.name for output in request.outputs),
            any(tensor.HasField("contents") for tensor in request.inputs),
        )

    def with_contents(self, raw: Sequence[memoryview]) -> RawRequest:
        """The whole request.

        Raises:
            InferenceError: it has another number of raw contents than of inputs.
        """
        if len(raw) != len(self.inputs):
            raise InferenceError(f"the request has {len(self.inputs)} inputs and {len(raw)} raw contents")
        inputs = zip(self.inputs, raw, strict=True)
        return RawRequest(tuple([RawTensor(*tensor, content) for tensor, content in inputs]), self.outputs)


def _to_wire(head: bytes, reply: RawReply) -> bytes:
    """A ``ModelInferResponse`` with the contents of a reply, raw; ``head`` is one without them."""
    parts = [head]
    for *_, content in reply:
        parts += (_RAW_OUTPUT_TAG, _to_varint(len(content)), content)
    return b"".join(parts)


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# --- batches ---


class _Waiting(NamedTuple):
    """A request, when it came (seconds of the event loop), and where its answer goes."""

    request: RawRequest | InferenceRequest
    since: float
    answer: "asyncio.Future[Any]"


class RequestBatcher:
    """Hands a model several requests at once, each as it came: the runtime knows which of them fit together.

    A batch is open until it is full or its first request has waited ``max_batch_time``, and after that for as long as
    the model is busy, since it would only wait in another queue. A full one goes while the model is busy, too, so that
    the model's thread finds it there and goes on at once.
    """

    def __init__(self, model: Any) -> None:
        """Takes the limits from the model's settings.

        Args:
            model: the runtime, or what stands for it where it runs in workers.
        """
        from mlserver.parallel.model import ParallelModel

        self._model = model
        self._size = model.settings.max_batch_size
        self._wait_s = model.settings.max_batch_time
        self._remote = isinstance(model, ParallelModel)
        # Batches that run at once. Only where a single thread takes them in turn is one sent ahead: of several workers
        # it might be the last to be free.
        self._places = max(1, len(model._dispatcher._workers)) if self._remote else 1
        self._ahead = 0 if self._remote else 1
        self._running = 0
        self._may_go = asyncio.Event()
        self._waiting: deque[_Waiting] = deque()
        self._is_full = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._forming: asyncio.Task[None] | None = None
        # MLServer's own metric of its own batcher.
        queued = mlserver.register("batch_request_queue", "counter of request queue batch size")
        self._queued = queued.labels(model_name=model.settings.name, model_version=model.settings.version or "")

    async def predict(self, request: RawRequest | InferenceRequest) -> Any:
        """The answer to this request, of its own kind, from whatever batch it ran in.

        Raises:
            InferenceError: this request, and no other of its batch, does not fit the model.
        """
        loop = asyncio.get_running_loop()
        self._queued.observe(len(self._waiting))
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting.append(_Waiting(request, loop.time(), answer))
        if len(self._waiting) >= self._size:
            self._is_full.set()
            self._may_go.set()
        if self._forming is None or self._forming.done():
            self._forming = loop.create_task(self._form())
        return await answer

    async def _form(self) -> None:
        while self._waiting:
            await self._fill()
            await self._place()
            self._running += 1
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            task = asyncio.create_task(self._answer([item for item in batch if not item.answer.done()]))
            # The event loop alone would not keep it alive.
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _fill(self) -> None:
        """Returns when the batch is full, or its first request has waited long enough."""
        if len(self._waiting) < self._size:
            self._is_full.clear()
            # Not asyncio.timeout: MLServer's own image has Python 3.10, and self-contained models run there.
            loop = asyncio.get_running_loop()
            closing = loop.call_at(self._waiting[0].since + self._wait_s, self._is_full.set)
            try:
                await self._is_full.wait()
            finally:
                closing.cancel()

    async def _place(self) -> None:
        """Returns when the batch, as it is then, may go to the model."""
        while self._running >= self._places + (self._ahead if len(self._waiting) >= self._size else 0):
            self._may_go.clear()
            await self._may_go.wait()

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        requests = [item.request for item in batch]
        answers: Sequence[Any]
        try:
            if self._remote:
                sent = [item.portable() if isinstance(item, RawRequest) else item for item in requests]
                answers = await self._model._send("predict_many", sent)
            else:
                answers = await self._model.predict_many(requests)
        except Exception as error:  # whatever it was, all who wait must hear of it
            answers = [error] * len(batch)
        finally:
            self._running -= 1
            self._may_go.set()
        for item, answer in zip(batch, answers, strict=True):
            if item.answer.done():
                continue  # its client has gone
            if isinstance(answer, Exception):
                item.answer.set_exception(answer)
            else:
                item.answer.set_result(answer)
