"""One engine session: a model opened in ONNX Runtime or OpenVINO, numpy arrays in and out.

A server's image needs this file and an engine, nothing else of burnish.
"""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

ENGINES = ("onnxruntime", "openvino")

# ONNX Runtime's names of tensor types that numpy names otherwise.
_ORT_DTYPES = {"float": "float32", "double": "float64"}
# OpenVINO's, which abbreviates.
_OPENVINO_DTYPES = {
    "f16": "float16", "f32": "float32", "f64": "float64", "boolean": "bool",
    "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64",
    "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64",
}  # fmt: skip
_NUMBERS = {*_OPENVINO_DTYPES.values()}
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
GRAPH_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_ORT_FATAL = 4


class SessionError(ValueError):
    """A model cannot be opened, or arrays do not fit it; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One input or output of a session.

    Attributes:
        name: its name in the model.
        dtype: numpy's type.
        shape: one entry a dimension; None where any size is taken. A batch that the model fixes is None too where
            the session cuts and pads larger and smaller batches to fit.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class _Engine(Protocol):
    """What the two engines have in common."""

    version: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def run(self, inputs: Mapping[str, Array]) -> Arrays: ...


class Session:
    """A model that is open in an engine. One run at a time is what its thread setting means.

    Attributes:
        engine: the engine's name.
        engine_version: the engine's version.
        inputs: what `run` takes, in the model's order.
        outputs: what `run` gives, in the model's order.
    """

    def __init__(self, engine_name: str, engine: _Engine) -> None:
        self.engine = engine_name
        self.engine_version = engine.version
        self._engine = engine
        self._batch = _fixed_batch((*engine.inputs, *engine.outputs))
        self.inputs = tuple(map(self._port, engine.inputs))
        self.outputs = tuple(map(self._port, engine.outputs))
        self._names = {port.name for port in self.inputs}

    def _port(self, port: Port) -> Port:
        return port if self._batch is None else replace(port, shape=(None, *port.shape[1:]))

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        """The model's outputs for one batch, by name.

        Where the model fixes its batch at b, the rows are run b at a time, the last batch filled up with copies of
        its last row.

        Raises:
            SessionError: an input is missing, unknown, or of the wrong type or shape; or the engine failed.
        """
        self.check(inputs)
        try:
            if self._batch is None:
                return self._engine.run(inputs)
            return self._run_in_chunks(inputs, self._batch)
        except SessionError:
            raise
        except Exception as error:
            shapes = {name: array.shape for name, array in inputs.items()}
            raise SessionError(f"{self.engine} failed on inputs of shapes {shapes}: {error}") from error

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Returns when the arrays fit the model's inputs by name, type and shape.

        Raises:
            SessionError: one does not.
        """
        if inputs.keys() != self._names:
            names = ", ".join(port.name for port in self.inputs)
            if unknown := sorted(inputs.keys() - self._names):
                raise SessionError(f"the model has no input {unknown[0]!r}; it takes {names}")
            missing = next(port.name for port in self.inputs if port.name not in inputs)
            raise SessionError(f"the input {missing!r} is missing; the model takes {names}")
        for port in self.inputs:
            _check_array(port, inputs[port.name])
        if self._batch is not None and len({len(array) for array in inputs.values()}) > 1:
            rows = {port.name: len(inputs[port.name]) for port in self.inputs}
            raise SessionError(f"the inputs have different numbers of rows: {rows}")

    def _run_in_chunks(self, inputs: Mapping[str, Array], batch: int) -> Arrays:
        rows = len(next(iter(inputs.values())))
        if rows == batch:
            return self._engine.run(inputs)
        if rows == 0:
            return {port.name: np.empty((0, *(d or 0 for d in port.shape[1:])), port.dtype) for port in self.outputs}
        parts = [self._engine.run(chunk) for chunk in _chunks(inputs, rows, batch)]
        return {port.name: np.concatenate([part[port.name] for part in parts])[:rows] for port in self.outputs}


def open_session(
    entry: Path | str,
    *,
    engine: str,
    precision: str = "default",
    graph_level: str = "all",
    threads: int = 1,
    providers: Sequence[str] | None = None,
) -> Session:
    """The model of a file, open in an engine and ready to run.

    Args:
        entry: ``.onnx`` file (both engines) or OpenVINO ``.xml`` file.
        engine: ``onnxruntime`` or ``openvino``.
        precision: ``default`` leaves it to the engine (OpenVINO takes bfloat16 where the CPU has it); ``float32``
            holds it to float32. ONNX Runtime always computes in the types of the graph.
        graph_level: ONNX Runtime's graph optimization: ``disable``, ``basic``, ``extended`` or ``all``.
        threads: that work on one run, 1 or more.
        providers: of ONNX Runtime, best first: ``cpu``, ``cuda``, ``tensorrt``; ``cpu`` where none are given. One
            that is asked for and not there is an error, never a silent fall back to the CPU. ``tensorrt:/folder``
            keeps the engines that TensorRT builds in that folder, so that only the first start takes minutes.

    Raises:
        SessionError: a setting is unknown, the engine or a provider is not installed, the file cannot be opened, or
            a tensor is no tensor of numbers.
    """
    if engine not in ENGINES:
        raise SessionError(f"no engine {engine!r}; there are {', '.join(ENGINES)}")
    if precision not in {"default", "float32"}:
        raise SessionError(f"no precision {precision!r}; there are default and float32")
    if graph_level not in GRAPH_LEVELS:
        raise SessionError(f"no graph level {graph_level!r}; there are {', '.join(GRAPH_LEVELS)}")
    if threads < 1:
        raise SessionError(f"threads is 1 or more, not {threads}")
    if not Path(entry).is_file():
        raise SessionError(f"there is no model file {entry}")
    opened: _Engine
    if engine == "openvino":
        if providers and [*providers] != ["cpu"]:
            raise SessionError(f"openvino runs on the CPU here and takes no providers {', '.join(providers)}")
        opened = _OpenVino(entry, precision=precision, threads=threads)
    else:
        opened = _OnnxRuntime(entry, graph_level=graph_level, threads=threads, providers=providers)
    return Session(engine, opened)


class Runs(Protocol):
    """What runs a batch: a `Session`, or something around one."""

    def run(self, inputs: Mapping[str, Array], /) -> Arrays:
        """See `Session.run`."""


def run_merged(session: Runs, requests: Sequence[Mapping[str, Array]]) -> list[Arrays]:
    """Each request's answer from one run of the session over all their rows.

    Args:
        session: whose every tensor has the batch as its first dimension.
        requests: the inputs of each, by name; rows may differ in number between requests.

    Raises:
        SessionError: the merged batch does not fit the model, or the engine failed.
        ValueError: the requests do not fit together.
    """
    names = list(requests[0])
    answer = session.run({name: np.concatenate([request[name] for request in requests]) for name in names})
    ends = np.cumsum([len(request[names[0]]) for request in requests])
    wrong = {name: array.shape for name, array in answer.items() if array.shape[:1] != (ends[-1],)}
    if wrong:
        raise SessionError(f"{ends[-1]} rows went in, and outputs of other lengths came out: {wrong}")
    parts = {name: np.split(array, ends[:-1]) for name, array in answer.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(requests))]


class _OnnxRuntime:
    """An ONNX Runtime session, one operator after the other."""

    def __init__(
        self,
        entry: Path | str,
        *,
        graph_level: str,
        threads: int,
        providers: Sequence[str] | None,
    ) -> None:
        ort = _engine_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, GRAPH_LEVELS[graph_level])
        # A spinning pool burns its cores between two requests: on a server that shares them with its own network
        # threads, and with other sessions, that costs more than the wake-ups it saves. One thread has no pool.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # What fails is raised, with the same text; the log would say it a second time.
        options.log_severity_level = _ORT_FATAL
        chosen = _ort_providers(providers, ort.get_available_providers())
        try:
            self._session = ort.InferenceSession(str(entry), options, providers=chosen)
        except Exception as error:
            raise SessionError(f"onnxruntime cannot open {Path(entry).name}: {error}") from error
        self.version: str = ort.__version__
        self.inputs = tuple(map(_ort_port, self._session.get_inputs()))
        self.outputs = tuple(map(_ort_port, self._session.get_outputs()))
        self._names = [port.name for port in self.outputs]

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))


class _OpenVino:
    """An OpenVINO model compiled for one stream on the CPU."""

    def __init__(self, entry: Path | str, *, precision: str, threads: int) -> None:
        ov = _engine_module("openvino")
        settings: dict[str, Any] = {
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            # OpenVINO would pin its threads to cores of its own choice; the server's affinity decides.
            "ENABLE_CPU_PINNING": False,
        }
        if precision == "float32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            model = ov.Core().read_model(str(entry))
            self._model = model
            self._request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        except Exception as error:
            raise SessionError(f"openvino cannot open {Path(entry).name}: {error}") from error
        self.version: str = ov.__version__.split("-", 1)[0]
        self.inputs = tuple(_openvino_port(port, f"input_{i}") for i, port in enumerate(model.inputs))
        self.outputs = tuple(_openvino_port(port, f"output_{i}") for i, port in enumerate(model.outputs))

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        # By position: tensors of a model need not have names. The request owns its output memory, hence the copies.
        fed = {i: np.ascontiguousarray(inputs[port.name]) for i, port in enumerate(self.inputs)}
        self._request.infer(fed, share_inputs=True)
        outputs = {port.name: self._request.get_output_tensor(i).data.copy() for i, port in enumerate(self.outputs)}
        if all(not array.size for array in outputs.values()) and all(array.size for array in fed.values()):
            self._check_emptiness(fed)
        return outputs

    def _check_emptiness(self, fed: Mapping[int, Array]) -> None:
        """Returns when the model may answer with nothing at all.

        With one thread OpenVINO (2026.4) swallows the error of inputs whose sizes do not fit each other and gives empty
        outputs instead. Its shape inference on a model of these sizes tells.
        """
        sized = self._model.clone()
        sized.reshape({i: list(array.shape) for i, array in fed.items()})
        for port in sized.outputs:
            shape = port.get_partial_shape()
            if shape.is_static and all(dim.get_length() for dim in shape):
                raise SessionError("openvino gave no output and no reason")


def import_engine(name: str) -> Any:
    """The package, imported without its telemetry: OpenVINO and nncf report their use over the network at import.

    Raises:
        ImportError: it is not installed.
    """
    wanted = {"CI": "true", "NNCF_CI": "1"}  # the words by which they know that they are not to
    before = {variable: os.environ.get(variable) for variable in wanted}
    os.environ.update(wanted)
    try:
        return importlib.import_module(name)
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


def _engine_module(name: str) -> Any:
    try:
        return import_engine(name)
    except ImportError as error:
        raise SessionError(f"the engine {name} is not installed here: {error}") from error


def _ort_providers(asked: Sequence[str] | None, available: Sequence[str]) -> list[str | tuple[str, dict[str, str]]]:
    """ONNX Runtime's names of the providers, TensorRT's with the folder that its engines are kept in.

    Source: ONNX Runtime, "TensorRT Execution Provider": an engine is kept for each model, shape profile and GPU.
    """
    chosen: list[str | tuple[str, dict[str, str]]] = []
    for entry in asked or ("cpu",):
        name, colon, folder = entry.partition(":")
        if name not in _PROVIDERS:
            raise SessionError(f"no provider {name!r}; there are {', '.join(_PROVIDERS)}")
        provider = _PROVIDERS[name]
        if provider not in available:
            raise SessionError(f"this onnxruntime has no {provider}; it has {', '.join(available)}")
        if not colon:
            chosen.append(provider)
        elif name == "tensorrt" and folder.startswith("/"):
            kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
            chosen.append((provider, {**kept, "trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}))
        else:
            raise SessionError(f"{entry!r} is no provider: only tensorrt takes a folder, and that begins with /")
    return chosen


def _ort_port(node: Any) -> Port:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(dim if isinstance(dim, int) else None for dim in node.shape)
    return _port(node.name, _ORT_DTYPES.get(kind, kind), shape)


def _openvino_port(port: Any, unnamed: str) -> Port:
    kind = port.get_element_type().get_type_name()
    shape = tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape())
    name = port.get_any_name() if port.get_names() else unnamed
    return _port(name, _OPENVINO_DTYPES.get(kind, kind), shape)


def _port(name: str, dtype: str, shape: tuple[int | None, ...]) -> Port:
    if dtype not in _NUMBERS:
        raise SessionError(f"the tensor {name!r} is of type {dtype}; a session takes {', '.join(sorted(_NUMBERS))}")
    return Port(name=name, dtype=np.dtype(dtype), shape=shape)


def _fixed_batch(ports: Sequence[Port]) -> int | None:
    """The first dimension, where every tensor has the same fixed one; None where the model takes any batch."""
    first = {port.shape[0] if port.shape else None for port in ports}
    return next(iter(first)) if len(first) == 1 else None


def _check_array(port: Port, array: Array) -> None:
    if array.dtype != port.dtype:
        raise SessionError(f"the input {port.name!r} is {port.dtype}, not {array.dtype}")
    fits = len(array.shape) == len(port.shape) and all(
        want is None or want == got for want, got in zip(port.shape, array.shape, strict=True)
    )
    if not fits:
        want = "x".join("?" if dim is None else str(dim) for dim in port.shape) or "a scalar"
        got = "x".join(map(str, array.shape)) or "a scalar"
        raise SessionError(f"the input {port.name!r} has the shape {want}, not {got}")


def _chunks(inputs: Mapping[str, Array], rows: int, batch: int) -> Iterator[Arrays]:
    for start in range(0, rows, batch):
        # Rows past the end repeat the last one, which is valid input whatever the model is.
        take = np.minimum(np.arange(start, start + batch), rows - 1)
        yield {name: np.ascontiguousarray(array[take]) for name, array in inputs.items()}
