"""The MLServer runtime around a session: what ``implementation`` names in a ``model-settings.json``.

All of its settings are read from ``parameters.extra``, which Seldon Core 2 keeps (and turns into strings) while it
drops ``max_batch_size`` and ``max_batch_time`` beside it.
"""

import asyncio
import contextlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from mlserver import MLModel, ModelSettings
from mlserver.errors import InferenceError
from mlserver.types import (
    InferenceRequest,
    InferenceResponse,
    MetadataTensor,
    RequestInput,
    ResponseOutput,
    TensorData,
)
from mlserver.utils import get_model_uri

from profiles.serving.session import Port, Session, SessionError, open_session

DATATYPES = {
    "bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
}  # fmt: skip
"""numpy's name of a type -> the V2 protocol's."""


class SessionRuntime(MLModel):  # type: ignore[misc]  # mlserver is not followed, so its class is Any here
    """Serves one ONNX or OpenVINO file with MLServer.

    Keys of ``parameters.extra``: ``engine``, ``precision``, ``graph_level``, ``threads``, ``providers`` (joined by
    commas), and ``max_batch_size`` (requests) with ``max_batch_time`` (seconds) for adaptive batching.
    """

    def __init__(self, settings: ModelSettings) -> None:
        """Takes the settings of batching from ``parameters.extra``.

        Raises:
            ValueError: one of them is no number.
        """
        extra = _extra(settings)
        # MLServer reads these two when it has loaded the model, so now is early enough for batching to work.
        if "max_batch_size" in extra:
            settings.max_batch_size = int(_number(extra, "max_batch_size", whole=True))
        if "max_batch_time" in extra:
            settings.max_batch_time = _number(extra, "max_batch_time")
        super().__init__(settings)
        self._session: Session | None = None
        # The model computes in one thread of its own: the event loop goes on reading requests, answering health
        # checks and filling the next batch meanwhile, and the session runs one batch at a time. It costs about 35 us of
        # CPU a call, of the millisecond that MLServer takes for a request.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="burnish-session")

    async def load(self) -> bool:
        """Opens the session, publishes its tensors' names, types and shapes, and runs it once.

        Raises:
            SessionError: the model cannot be opened or run.
            ValueError: a key of ``parameters.extra`` cannot be read.
        """
        entry = await get_model_uri(self.settings)
        loop = asyncio.get_running_loop()
        self._session = await loop.run_in_executor(self._worker, _open, entry, _extra(self.settings))
        self.inputs = [_metadata(port) for port in self._session.inputs]
        self.outputs = [_metadata(port) for port in self._session.outputs]
        await loop.run_in_executor(self._worker, _warm_up, self._session)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The session's answer to one request, or to one batch of requests that MLServer has merged.

        Raises:
            InferenceError: an input or a requested output does not fit the model, or the engine failed.
        """
        if self._session is None:
            raise InferenceError(f"the model {self.name!r} is not loaded")
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._answer, self._session, payload)

    async def unload(self) -> bool:
        """Lets go of the session and its thread."""
        self._worker.shutdown(wait=False)
        self._session = None
        return True

    def _answer(self, session: Session, payload: InferenceRequest) -> InferenceResponse:
        wanted = _wanted(session, payload)
        ports = {port.name: port for port in session.inputs}
        try:
            arrays = session.run({tensor.name: _decode(ports, tensor) for tensor in payload.inputs})
        except SessionError as error:
            raise InferenceError(str(error)) from error
        return InferenceResponse.model_construct(
            model_name=self.name,
            model_version=self.version,
            id=payload.id,
            parameters=None,
            outputs=[_encode(name, arrays[name]) for name in wanted],
        )


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


def _wanted(session: Session, payload: InferenceRequest) -> list[str]:
    names = [port.name for port in session.outputs]
    if not payload.outputs:
        return names
    asked = [output.name for output in payload.outputs]
    if unknown := sorted(set(asked) - set(names)):
        raise InferenceError(f"the model has no output {unknown[0]!r}; it gives {', '.join(names)}")
    return asked


def _decode(ports: Mapping[str, Port], tensor: RequestInput) -> npt.NDArray[Any]:
    """The tensor as an array of its declared type and shape. MLServer holds it as a list, nested or flat."""
    port = ports.get(tensor.name)
    if port is None:
        raise InferenceError(f"the model has no input {tensor.name!r}; it takes {', '.join(ports)}")
    want = DATATYPES[port.dtype.name]
    if _datatype(tensor) != want:
        raise InferenceError(f"the input {tensor.name!r} is {want}, not {_datatype(tensor)}")
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


def _datatype(tensor: RequestInput) -> str:
    return str(getattr(tensor.datatype, "value", tensor.datatype))


def _encode(name: str, array: npt.NDArray[Any]) -> ResponseOutput:
    # Unvalidated on purpose: what numpy lists is of the declared type, and validation walks over every element.
    return ResponseOutput.model_construct(
        name=name,
        datatype=DATATYPES[array.dtype.name],
        shape=list(array.shape),
        parameters=None,
        data=TensorData.model_construct(root=array.ravel().tolist()),
    )


def _metadata(port: Port) -> MetadataTensor:
    shape = [-1 if dim is None else dim for dim in port.shape]
    return MetadataTensor(name=port.name, datatype=DATATYPES[port.dtype.name], shape=shape)
