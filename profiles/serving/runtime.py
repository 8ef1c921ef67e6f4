"""The MLServer runtime around a session: what ``implementation`` names in a ``model-settings.json``.

All of its settings are read from ``parameters.extra``, which Seldon Core 2 keeps (and turns into strings) while it
drops ``max_batch_size`` and ``max_batch_time`` beside it.
"""

import asyncio
import contextlib
import math
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import prometheus_client
from mlserver import MLModel, ModelSettings
from mlserver.errors import InferenceError
from mlserver.metrics import REGISTRY
from mlserver.types import (
    InferenceRequest,
    InferenceResponse,
    MetadataTensor,
    RequestInput,
    ResponseOutput,
    TensorData,
)
from mlserver.utils import get_model_uri

from profiles.serving.raw_tensors import (
    CONTRACT,
    TAKES_RAW,
    RawReply,
    RawRequest,
    RawTensor,
    RequestBatcher,
    install,
)
from profiles.serving.session import Array, Arrays, Port, Session, SessionError, open_session, run_merged

_NAMES = {
    "bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
}  # fmt: skip
DATATYPES = {np.dtype(name): datatype for name, datatype in _NAMES.items()}
"""numpy's type -> the V2 protocol's name of it."""

_Requests = Sequence[RawRequest | InferenceRequest]
_Outputs = Sequence[Arrays | InferenceError]

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_S = 0.0003
"""A run as short as this may hold up the event loop: handing it to a thread takes about as long."""
RUNS_OF_LATE = 50
"""Runs that weigh in the mean time of one (as 1 / `RUNS_OF_LATE` each, and less by and by)."""
MODEL_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
"""Upper ends of the histograms' buckets: rows, and seconds."""


class SessionRuntime(MLModel):  # type: ignore[misc]  # mlserver is not followed, so its class is Any here
    """Serves one ONNX or OpenVINO file with MLServer.

    Keys of ``parameters.extra``: ``engine``, ``precision``, ``graph_level``, ``threads``, ``providers`` (joined by
    commas), and ``max_batch_size`` (requests) with ``max_batch_time`` (seconds) for adaptive batching.

    Of every run of the session two metrics are kept, as Prometheus histograms labelled with the model's name and
    version: ``burnish_batch_size`` (rows) and ``burnish_model_seconds``.
    """

    def __init__(self, settings: ModelSettings) -> None:
        """Takes the settings of batching from ``parameters.extra``.

        Raises:
            ValueError: one of them is no number.
        """
        extra = _extra(settings)
        batched = _is_batched(settings)
        # MLServer reads these two when it has loaded the model, so now is early enough for batching to work.
        if "max_batch_size" in extra:
            settings.max_batch_size = int(_number(extra, "max_batch_size", whole=True))
        if "max_batch_time" in extra:
            settings.max_batch_time = _number(extra, "max_batch_time")
        super().__init__(settings)
        if install():
            setattr(self, TAKES_RAW, CONTRACT)
        # Where the model brings its environment, MLServer's main process knows nothing of it but its settings as they
        # are written: it batches only by those. By ours the worker does.
        apart = not batched and _is_batched(settings) and _is_apart(settings)
        self._batcher = RequestBatcher(self) if apart else None
        self._session: _Metered | None = None
        # The model computes in one thread of its own: the event loop goes on reading requests, answering health
        # checks and filling the next batch meanwhile, and the session runs one batch at a time. A model that takes less
        # than the two changes of threads do is run at once.
        self._running = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="burnish-session")
        # Whoever wakes the event loop loses the interpreter to it, for milliseconds where much is to be read. That is
        # another thread's to do, so that the model's own goes from one batch to the next at once.
        self._teller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="burnish-answers")

    async def load(self) -> bool:
        """Opens the session, publishes its tensors' names, types and shapes, and runs it once.

        Raises:
            SessionError: the model cannot be opened or run.
            ValueError: a key of ``parameters.extra`` cannot be read.
        """
        entry = await get_model_uri(self.settings)
        loop = asyncio.get_running_loop()
        opened = await loop.run_in_executor(self._worker, _open, entry, _extra(self.settings))
        self._session = _Metered(opened, self.settings.name, self.settings.version or "")
        self.inputs = [_metadata(port) for port in opened.inputs]
        self.outputs = [_metadata(port) for port in opened.outputs]
        await loop.run_in_executor(self._worker, _warm_up, opened)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The session's answer to one request, or to one batch of requests that MLServer has merged.

        Raises:
            InferenceError: an input or a requested output does not fit the model, or the engine failed.
        """
        if self._batcher is not None:
            batched: InferenceResponse = await self._batcher.predict(payload)
            return batched
        (answer,) = await self.predict_many([payload])
        if isinstance(answer, InferenceError):
            raise answer
        return answer

    async def predict_many(self, requests: Sequence[Any]) -> list[Any]:
        """The reply to each of several requests, of the request's kind, or the `InferenceError` that says why not.

        Requests whose rows fit together run as one batch. Where that fails each runs alone, so that one bad request
        fails nobody else's.

        Args:
            requests: each as `raw_tensors.TAKES_RAW` has it.

        Raises:
            InferenceError: the model is not loaded.
        """
        session = self._session
        if session is None:
            raise InferenceError(f"the model {self.name!r} is not loaded")
        own = [RawRequest.of(request) if isinstance(request, tuple) else request for request in requests]
        if session.is_quick and not self._running:
            return self._replies(_run_all(session, own), own)
        self._running += 1
        outputs = self._worker.submit(_run_all, session, own)
        try:
            return await asyncio.wrap_future(self._teller.submit(self._replies_once, outputs, own))
        finally:
            outputs.cancel()  # nobody waits for it any more
            self._running -= 1

    async def unload(self) -> bool:
        """Lets go of the session and its threads."""
        self._worker.shutdown(wait=False)
        self._teller.shutdown(wait=False)
        self._session = None
        return True

    def _replies_once(self, outputs: "Future[_Outputs]", requests: _Requests) -> list[Any]:
        return self._replies(outputs.result(), requests)

    def _replies(self, outputs: _Outputs, requests: _Requests) -> list[Any]:
        return [
            found if isinstance(found, InferenceError) else self._reply(request, found)
            for request, found in zip(requests, outputs, strict=True)
        ]

    def _reply(self, request: RawRequest | InferenceRequest, outputs: Arrays) -> RawReply | InferenceResponse:
        names = _asked(request) or outputs
        if isinstance(request, RawRequest):
            return tuple(RawTensor.of(name, DATATYPES[outputs[name].dtype], outputs[name]).plain() for name in names)
        return InferenceResponse.model_construct(
            model_name=self.name,
            model_version=self.version,
            id=request.id,
            parameters=None,
            outputs=[_encode(name, outputs[name]) for name in names],
        )


class _Metered:
    """A session that keeps the metrics of its runs."""

    def __init__(self, session: Session, model: str, version: str) -> None:
        self.inputs = {port.name: port for port in session.inputs}
        self.outputs = [port.name for port in session.outputs]
        self._run = session.run
        labels = {"model_name": model, "model_version": version}
        sizes = _histogram("burnish_batch_size", "rows of each run of the model", BATCH_SIZES)
        seconds = _histogram("burnish_model_seconds", "seconds of each run of the model", MODEL_SECONDS)
        self._sizes, self._seconds = sizes.labels(**labels), seconds.labels(**labels)
        self._mean_s = math.inf

    @property
    def is_quick(self) -> bool:
        """Whether the runs of late took so little time that they need no thread of their own."""
        return self._mean_s < QUICK_S

    def run(self, inputs: Mapping[str, Array], /) -> Arrays:
        """See `Session.run`."""
        began = time.perf_counter()
        outputs = self._run(inputs)
        took = time.perf_counter() - began
        # A mean, since a busy machine makes a quick model wait milliseconds for its CPU now and then: as a slow one it
        # would then take the two threads, and so more of the machine.
        self._mean_s = took if self._mean_s == math.inf else self._mean_s + (took - self._mean_s) / RUNS_OF_LATE
        self._seconds.observe(took)
        self._sizes.observe(max([len(array) for array in inputs.values() if array.ndim], default=1))
        return outputs


def _histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
    if name in REGISTRY:
        # Maybe another version's, which a self-contained model brought: so names and labels stay what they are.
        return REGISTRY[name]
    histogram = prometheus_client.Histogram(
        name, text, ["model_name", "model_version"], buckets=buckets, registry=REGISTRY
    )
    # MLServer shows its own registry only where it has workers, and prometheus_client's where it has none.
    prometheus_client.REGISTRY.register(histogram)
    return histogram


def _is_batched(settings: ModelSettings) -> bool:
    return bool(settings.max_batch_size > 1 and settings.max_batch_time > 0)


def _is_apart(settings: ModelSettings) -> bool:
    """Whether this is a worker in an environment of the model's own."""
    brought = settings.parameters is not None and settings.parameters.environment_tarball is not None
    return brought and multiprocessing.parent_process() is not None


def _extra(settings: ModelSettings) -> Mapping[str, Any]:
    parameters = settings.parameters
    return (parameters.extra or {}) if parameters is not None else {}


def _number(extra: Mapping[str, Any], key: str, *, whole: bool = False) -> float:
    """A number of ``parameters.extra``, not below 0: a text, as Core 2 makes of a Model's parameters, or a number."""
    given = extra[key]
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(given, bool) or not 0 <= number < math.inf or (whole and number != int(number)):
        wanted = "a whole number" if whole else "a number"
        raise ValueError(f"parameters.extra.{key} is {given!r}; it takes {wanted} from 0 on")
    return number


def _open(entry: str, extra: Mapping[str, Any]) -> Session:
    providers = [name.strip() for name in str(extra.get("providers") or "").split(",") if name.strip()]
    return open_session(
        entry,
        engine=str(extra.get("engine", "onnxruntime")),
        precision=str(extra.get("precision", "default")),
        graph_level=str(extra.get("graph_level", "all")),
        threads=int(_number({"threads": 1, **extra}, "threads", whole=True)),
        providers=providers or None,
    )


def _warm_up(session: Session) -> None:
    """Runs once on zeros: the first run allocates, and a model that cannot run is found here, not by a user."""
    zeros = {
        port.name: np.zeros([1 if dim is None else dim for dim in port.shape], port.dtype) for port in session.inputs
    }
    any_size = any(dim is None for port in session.inputs for dim in port.shape[1:])
    # A model of free sizes may refuse a size of 1, and be sound.
    with contextlib.suppress(SessionError) if any_size else contextlib.nullcontext():
        session.run(zeros)


def _asked(request: RawRequest | InferenceRequest) -> Sequence[str]:
    if isinstance(request, RawRequest):
        return request.outputs
    return [output.name for output in request.outputs or ()]


def _arrays(session: _Metered, request: RawRequest | InferenceRequest) -> Arrays:
    """The inputs of a request, all of whose outputs the model has."""
    asked = _asked(request)
    if asked and (unknown := sorted(set(asked) - set(session.outputs))):
        raise InferenceError(f"the model has no output {unknown[0]!r}; it gives {', '.join(session.outputs)}")
    return {tensor.name: _decode(session.inputs, tensor) for tensor in request.inputs}


def _mergeable(arrays: Mapping[int, Arrays]) -> list[list[int]]:
    """The requests in groups whose rows can run as one batch: the same inputs, of the same sizes but for the rows."""
    groups: dict[Any, list[int]] = {}
    for i, inputs in arrays.items():
        rows = {array.shape[0] if array.ndim else None for array in inputs.values()}
        fits = len(rows) == 1 and None not in rows
        sizes = frozenset((name, array.shape[1:]) for name, array in inputs.items())
        groups.setdefault(sizes if fits else i, []).append(i)
    return [*groups.values()]


def _run_all(session: _Metered, requests: _Requests) -> _Outputs:
    """The outputs of each request, or why it has none."""
    outputs: dict[int, Arrays | InferenceError] = {}
    arrays: dict[int, Arrays] = {}
    for i, request in enumerate(requests):
        try:
            arrays[i] = _arrays(session, request)
        except InferenceError as error:
            outputs[i] = error
    if len(arrays) == 1:
        ((i, alone),) = arrays.items()
        outputs[i] = _run_alone(session, alone)
    else:
        for group in _mergeable(arrays):
            outputs |= zip(group, _run(session, [arrays[i] for i in group]), strict=True)
    return [outputs[i] for i in range(len(requests))]


def _run(session: _Metered, requests: Sequence[Arrays]) -> list[Arrays | InferenceError]:
    """The outputs of each request, in one run where that goes."""
    if len(requests) > 1:
        with contextlib.suppress(SessionError):
            return [*run_merged(session, requests)]
    return [_run_alone(session, request) for request in requests]


def _run_alone(session: _Metered, request: Arrays) -> Arrays | InferenceError:
    try:
        return session.run(request)
    except SessionError as error:
        return InferenceError(str(error))


def _decode(ports: Mapping[str, Port], tensor: RawTensor | RequestInput) -> Array:
    """The tensor as an array of its declared type and shape: it comes raw, or as a list, nested or flat."""
    port = ports.get(tensor.name)
    if port is None:
        raise InferenceError(f"the model has no input {tensor.name!r}; it takes {', '.join(ports)}")
    want = DATATYPES[port.dtype]
    if _datatype(tensor) != want:
        raise InferenceError(f"the input {tensor.name!r} is {want}, not {_datatype(tensor)}")
    if isinstance(tensor, RawTensor):
        return tensor.to_array()
    content = getattr(tensor.data, "root", tensor.data)
    try:
        if want == "FP16" and len(content) == 1 and isinstance(content[0], bytes):
            # Typed gRPC contents have no field for FP16: it comes as the bytes of the whole tensor.
            return np.frombuffer(content[0], np.float16).reshape(tensor.shape)
        return np.asarray(content, dtype=port.dtype).reshape(tensor.shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise InferenceError(
            f"the input {tensor.name!r} is not {want} of shape {list(tensor.shape)}: {error}"
        ) from error


def _datatype(tensor: RawTensor | RequestInput) -> str:
    return str(getattr(tensor.datatype, "value", tensor.datatype))


def _encode(name: str, array: Array) -> ResponseOutput:
    # Unvalidated on purpose: what numpy lists is of the declared type, and validation walks over every element.
    return ResponseOutput.model_construct(
        name=name,
        datatype=DATATYPES[array.dtype],
        shape=list(array.shape),
        parameters=None,
        data=TensorData.model_construct(root=array.ravel().tolist()),
    )


def _metadata(port: Port) -> MetadataTensor:
    shape = [-1 if dim is None else dim for dim in port.shape]
    return MetadataTensor(name=port.name, datatype=DATATYPES[port.dtype], shape=shape)
