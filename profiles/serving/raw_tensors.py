"""Raw tensors as arrays, from gRPC to our runtime and back, inside MLServer.

MLServer turns raw contents into Python lists before any runtime sees them, and merges the lists of a batch. For inputs
as large as images that takes ten times as long as all else. For models whose runtime says that it takes arrays, and for
no others, `install` puts two things in the way: a handler of ``ModelInfer`` that keeps the bytes, and a batcher that
hands requests over as they came. The rest of MLServer (metrics, headers, cache, REST, other models) goes on as it was.

This reaches into MLServer's inside, so it is done only in the one version that it was written for.
"""

import asyncio
import contextlib
import functools
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import mlserver
import numpy as np
import numpy.typing as npt
from mlserver.errors import InferenceError, MLServerError
from mlserver.types import InferenceRequest, InferenceResponse, TensorData

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

KNOWN_VERSION = "1.7.1"
TAKES_ARRAYS = "burnish_takes_arrays"
"""A runtime whose attribute of this name is `CONTRACT` takes arrays for data, and has ``predict_many``."""
CONTRACT = 1
"""A number, so that two copies of this module in one server agree or keep apart."""

DTYPES = {
    "BOOL": "?", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT8": "i1", "INT16": "<i2", "INT32": "<i4",
    "INT64": "<i8", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
}  # fmt: skip
"""The V2 protocol's names of types -> numpy's, in the protocol's byte order."""

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_INSTALLED = "_burnish_raw_tensors"
# Field numbers of ModelInferRequest.raw_input_contents and ModelInferResponse.raw_output_contents.
_RAW_INPUT, _RAW_OUTPUT = 7, 6
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def install() -> bool:
    """Makes MLServer hand arrays to runtimes that take them; whether it does. A second call changes nothing."""
    done: bool | None = getattr(mlserver, _INSTALLED, None)
    if done is not None:
        return done
    known = bool(mlserver.__version__ == KNOWN_VERSION)
    setattr(mlserver, _INSTALLED, known)
    if known:
        _change_mlserver()
    else:
        logger.warning(
            "This is MLServer %s, not %s: raw tensors pass through Python lists here, which is slow for large ones",
            mlserver.__version__,
            KNOWN_VERSION,
        )
    return known


def _change_mlserver() -> None:
    from mlserver.batching import AdaptiveBatcher, hooks
    from mlserver.grpc.interceptors import LoggingInterceptor, PromServerInterceptor
    from opentelemetry.instrumentation.grpc import aio_server_interceptor

    # The server's handlers are bound before a model is loaded, but its interceptors are asked at every call. Any one
    # of them will do; which there are depends on the settings.
    tracing = type(aio_server_interceptor())  # type: ignore[no-untyped-call]
    for interceptor in (LoggingInterceptor, PromServerInterceptor, tracing):
        interceptor.intercept_service = _intercepting(interceptor.intercept_service)

    def make_batcher(model: Any) -> Any:
        return RequestBatcher(model) if takes_arrays(model) else AdaptiveBatcher(model)

    hooks.AdaptiveBatcher = make_batcher


def takes_arrays(model: Any) -> bool:
    """Whether this model, here or in a worker, has a runtime that takes arrays."""
    return getattr(getattr(model, "_model", model), TAKES_ARRAYS, None) == CONTRACT


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


def to_array(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> Array:
    """A raw tensor as an array of its type and shape; it may lie unaligned in the message it came in.

    Raises:
        InferenceError: there are more or fewer bytes than the shape and the type take.
    """
    dtype = np.dtype(DTYPES[datatype])
    wanted = math.prod(shape) * dtype.itemsize
    if any(dim < 0 for dim in shape) or len(raw) != wanted:
        raise InferenceError(
            f"the input {name!r} is {datatype} of shape {[*shape]}, which takes {wanted} bytes; it has {len(raw)}"
        )
    if datatype == "BOOL":
        # Any byte but 0 is true; a numpy bool that is neither 0 nor 1 would be no valid one.
        raw = memoryview(np.frombuffer(raw, np.uint8) != 0)
    array: Array = np.frombuffer(raw, dtype)
    return array.reshape(shape)


def _intercepting(stock: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(stock)
    async def intercept_service(self: Any, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if details.method != _METHOD:
            return await stock(self, continuation, details)

        async def with_arrays(details: Any) -> Any:
            return _handler(await continuation(details))

        return await stock(self, with_arrays, details)

    return intercept_service


def _handler(stock: Any) -> Any:
    """The handler that keeps the bytes, in place of MLServer's own; any other as it is."""
    from mlserver.grpc.servicers import InferenceServicer

    servicer = getattr(getattr(stock, "unary_unary", None), "__self__", None)
    if not isinstance(servicer, InferenceServicer):
        return stock
    infer = functools.partial(_infer, servicer, stock)
    return stock._replace(unary_unary=infer, request_deserializer=None, response_serializer=None)


async def _infer(servicer: Any, stock: Any, message: bytes, context: Any) -> bytes:
    """The reply to a request, both as they are on the wire."""
    from mlserver.grpc import dataplane_pb2 as pb
    from mlserver.grpc.utils import handle_mlserver_error

    head, raw = split_raw(message)
    request = pb.ModelInferRequest.FromString(head)
    if raw and await _goes_by_arrays(servicer._data_plane, request):
        reply: bytes = await handle_mlserver_error(_infer_arrays)(servicer, (request, raw), context)
        return reply
    whole = stock.request_deserializer(message) if raw else request
    response = await stock.unary_unary(whole, context)
    return bytes(stock.response_serializer(response))


async def _goes_by_arrays(plane: Any, request: Any) -> bool:
    # The cache's key is the request as JSON; and where only some contents are raw, MLServer knows which are which.
    if plane._get_response_cache() is not None or any(tensor.HasField("contents") for tensor in request.inputs):
        return False
    with contextlib.suppress(MLServerError):  # there is no such model, which the stock handler says
        return takes_arrays(await plane._model_registry.get_model(request.model_name, request.model_version))
    return False


async def _infer_arrays(servicer: Any, message: tuple[Any, Sequence[memoryview]], context: Any) -> bytes:
    """What `InferenceServicer.ModelInfer` does, but for the tensors."""
    from mlserver.grpc.converters import ModelInferRequestConverter
    from mlserver.grpc.utils import to_headers
    from mlserver.utils import insert_headers

    request, raw = message
    if len(raw) != len(request.inputs):
        raise InferenceError(f"the request has {len(request.inputs)} inputs and {len(raw)} raw contents")
    payload = ModelInferRequestConverter.to_types(request)
    for tensor, content in zip(payload.inputs, raw, strict=True):
        if tensor.datatype in DTYPES:  # the runtime refuses the others by name
            array = to_array(tensor.name, tensor.datatype, tensor.shape, content)
            tensor.data = TensorData.model_construct(root=array)
    insert_headers(payload, to_headers(context))
    result = await servicer._data_plane.infer(payload=payload, name=request.model_name, version=request.model_version)
    servicer._SetTrailingMetadata(result, context)
    return _to_wire(result)


def _to_wire(result: InferenceResponse) -> bytes:
    """A ``ModelInferResponse`` whose outputs, arrays all, are raw contents."""
    from mlserver.grpc.converters import ModelInferResponseConverter

    arrays = [output.data.root for output in result.outputs]
    for output in result.outputs:
        output.data = TensorData.model_construct(root=[])
    parts: list[Any] = [ModelInferResponseConverter.from_types(result).SerializeToString()]
    for array in arrays:
        content = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        parts += [bytes([_RAW_OUTPUT << 3 | _LENGTH]), _to_varint(content.size), content.data]
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

    request: InferenceRequest
    since: float
    answer: "asyncio.Future[InferenceResponse]"


class RequestBatcher:
    """Hands a model several requests at once, each as it came: the runtime knows which of them fit together.

    A batch is open until it is full or its first request has waited ``max_batch_time``, and after that for as long as
    the model is busy, since it would only wait in another queue.
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
        self._free = asyncio.Semaphore(max(1, len(model._dispatcher._workers)) if self._remote else 1)
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._forming: asyncio.Task[None] | None = None
        mlserver.register("batch_request_queue", "counter of request queue batch size")

    async def predict(self, request: InferenceRequest) -> InferenceResponse:
        """The answer to this request, from whatever batch it ran in.

        Raises:
            InferenceError: this request, and no other of its batch, does not fit the model.
        """
        loop = asyncio.get_running_loop()
        # MLServer's own metric of its own batcher.
        mlserver.log(batch_request_queue=len(self._waiting))
        answer: asyncio.Future[InferenceResponse] = loop.create_future()
        self._waiting.append(_Waiting(request, loop.time(), answer))
        self._arrived.set()
        if self._forming is None or self._forming.done():
            self._forming = loop.create_task(self._form())
        return await answer

    async def _form(self) -> None:
        while self._waiting:
            await self._fill()
            await self._free.acquire()
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            task = asyncio.create_task(self._answer([item for item in batch if not item.answer.done()]))
            # The event loop alone would not keep it alive.
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _fill(self) -> None:
        """Returns when the batch is full, or its first request has waited long enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._waiting[0].since + self._wait_s):
                while len(self._waiting) < self._size:
                    self._arrived.clear()
                    await self._arrived.wait()

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        requests = [item.request for item in batch]
        answers: Sequence[InferenceResponse | Exception]
        try:
            if self._remote:
                answers = await self._model._send("predict_many", requests)
            else:
                answers = await self._model.predict_many(requests)
        except Exception as error:  # whatever it was, all who wait must hear of it
            answers = [error] * len(batch)
        finally:
            self._free.release()
        for item, answer in zip(batch, answers, strict=True):
            if item.answer.done():
                continue  # its client has gone
            if isinstance(answer, Exception):
                item.answer.set_exception(answer)
            else:
                item.answer.set_result(answer)
