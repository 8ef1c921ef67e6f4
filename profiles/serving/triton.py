"""Candidate to Triton's files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from profiles.serving.naming import check_batching, session_settings, unserved, why_not_batched
from profiles.serving.self_contained import Bundle
from registry.errors import InputError
from registry.records import Artifact, Candidate, TensorSpec

MODEL_PY = '''"""The model that this candidate's config describes."""

from profiles.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_TYPES = {
    "bool": "TYPE_BOOL", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
    "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32", "uint64": "TYPE_UINT64",
}  # fmt: skip
# Triton's onnxruntime backend numbers the levels so; no level is all of them.
_GRAPH_LEVELS = {"disable": 2, "basic": -1, "extended": 1}


def render_triton(
    candidate: Candidate, artifact: Artifact, *, model_name: str, bundle: Bundle | None = None
) -> dict[str, str]:
    """``<model_name>/config.pbtxt`` and, for the Python backend, ``<model_name>/1/model.py``.

    The artifact's files belong into ``<model_name>/1``. ``max_batch_size`` counts rows in Triton, so a request of more
    rows than that is refused. With 1, batching is off: Triton is told of no batch dimension, and a request of any
    number of rows is run as it comes. Before it counts as ready, each instance runs zeros, where all sizes beside the
    batch are known.

    Args:
        candidate: what is served, and how.
        artifact: its model.
        model_name: its name on the server.
        bundle: our model for the Python backend, whole; None for the one that the server's Python has. Triton runs
            each model in a process of its own, so the file needs no name of its own.

    Raises:
        InputError: the candidate is not one for Triton, a tensor or a setting cannot be served by its backend, or its
            batches cannot be had.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    serving = candidate.serving
    _check(candidate)
    check_batching(candidate, artifact)
    batched = serving.max_batch_size > 1
    config = model_config_pb2.ModelConfig(
        name=model_name,
        backend=serving.backend,
        max_batch_size=serving.max_batch_size if batched else 0,
        default_model_filename="" if serving.backend == "python" else artifact.entry,
    )
    free_batch = serving.backend == "python" and why_not_batched(artifact) is None
    for tensors, declared in ((artifact.inputs, config.input), (artifact.outputs, config.output)):
        for tensor in tensors:
            data_type = model_config_pb2.DataType.Value(_type(tensor))
            declared.add(name=tensor.name, data_type=data_type, dims=_dims(tensor, batched=batched, free=free_batch))
    if batched:
        config.dynamic_batching.max_queue_delay_microseconds = round(serving.max_batch_delay_ms * 1000)
        config.dynamic_batching.SetInParent()
    config.instance_group.add(count=serving.instances, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    if (level := _GRAPH_LEVELS.get(candidate.engine.graph_level)) and serving.backend == "onnxruntime":
        config.optimization.graph.level = level
    for key, value in _parameters(candidate, artifact).items():
        config.parameters[key].string_value = value
    _warm_up(config, sorted({1, config.max_batch_size or 1}))
    files = {f"{model_name}/config.pbtxt": text_format.MessageToString(config)}
    if serving.backend == "python":
        files[f"{model_name}/1/model.py"] = MODEL_PY if bundle is None else bundle.text
    return files


def _warm_up(config: Any, batches: Sequence[int]) -> None:
    """Has each instance run zeros before it counts as ready: its first run allocates, and may compile.

    So a model that cannot run is found when it is loaded, and no user's request is the first. Where a size beside the
    batch is free nothing is asked: what would be made up the model may refuse, and would then not load. Each batch is a
    sample of its own, since Core 2 knows no ``count``.

    Args:
        config: the ``ModelConfig``, with its inputs.
        batches: numbers of rows.
    """
    shapes = {tensor.name: list(tensor.dims) for tensor in config.input}
    if not config.max_batch_size:
        # The batch is the first of the dimensions, if it is free.
        shapes = {name: [1 if dims[:1] == [-1] else dims[0], *dims[1:]] for name, dims in shapes.items() if dims}
    if any(size < 0 for dims in shapes.values() for size in dims):
        return
    for rows in batches:
        sample = config.model_warmup.add(name=f"{rows} rows of zeros" if rows > 1 else "zeros", batch_size=rows)
        for tensor in config.input:
            sample.inputs[tensor.name].data_type = tensor.data_type
            sample.inputs[tensor.name].dims.extend(shapes[tensor.name])
            sample.inputs[tensor.name].zero_data = True


def _check(candidate: Candidate) -> None:
    serving, engine = candidate.serving, candidate.engine
    if serving.server != "triton" or serving.backend == "burnish":
        raise InputError(f"{candidate.name!r} is for {serving.server} with {serving.backend}, not for Triton")
    if serving.parallel_workers:
        raise InputError(
            f"{candidate.name!r} asks for {serving.parallel_workers} parallel workers, which Triton does not have",
            hint="Set instances instead.",
        )
    if serving.instances < 1:
        raise InputError(f"{candidate.name!r} asks for {serving.instances} instances; it takes 1 or more")
    if serving.backend not in {"python", engine.name}:
        raise InputError(f"{candidate.name!r} wants the engine {engine.name} from Triton's backend {serving.backend}")
    if serving.backend == "openvino" and engine.precision != "default":
        raise InputError(
            f"{candidate.name!r} holds OpenVINO to {engine.precision}; Triton's openvino backend cannot",
            hint="Serve it with the python backend.",
        )


def _type(tensor: TensorSpec) -> str:
    if tensor.dtype not in _TYPES:
        raise unserved(tensor)
    return _TYPES[tensor.dtype]


def _dims(tensor: TensorSpec, *, batched: bool, free: bool) -> list[int]:
    dims = [dim if isinstance(dim, int) else -1 for dim in tensor.shape]
    if not batched:
        # Our session takes any number of rows, whatever batch the model fixes.
        return [-1, *dims[1:]] if free else dims
    if len(dims) == 1:
        raise InputError(
            f"the tensor {tensor.name!r} has a batch dimension and no other, which Triton cannot batch",
            hint="Serve it on Triton with max_batch_size 1, or on MLServer.",
        )
    return dims[1:]


def _parameters(candidate: Candidate, artifact: Artifact) -> dict[str, str]:
    threads = str(candidate.serving.threads)
    if candidate.serving.backend == "onnxruntime":
        return {"intra_op_thread_count": threads, "inter_op_thread_count": "1"}
    if candidate.serving.backend == "openvino":
        return {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
    return {"entry": artifact.entry, **session_settings(candidate)}


# --- TensorRT: on a GPU ------------------------------------------------------------------------------------------

# What a TensorRT engine gives and takes; double is clamped to float32 by the builder.
_PLAN_TYPES = frozenset({"bool", "float16", "float32", "int8", "int32", "int64", "uint8"})
_PROFILE_ENDS = ("min", "opt", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuServing:
    """How a model is served on a GPU.

    Attributes:
        max_batch_size: most rows in one batch; 1 switches batching off.
        max_batch_delay_ms: how long a request may wait for company.
        instances: of the model on each GPU.
    """

    max_batch_size: int = 1
    max_batch_delay_ms: float = 0.0
    instances: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtProvider:
    """Settings of the TensorRT execution provider in Triton's onnxruntime backend.

    Attributes:
        precision_mode: what the builder may compute in. A model with Q/DQ pairs wants INT8 on TensorRT up to 10, and
            takes no calibration table with it.
        max_workspace_bytes: GPU memory to try kernels with.
        engine_cache_path: a folder on a volume that outlives the server, or None for no cache: each instance then
            builds its engine at each start.
        profile_shapes: ``trt_profile_min_shapes``, ``..._opt_...`` and ``..._max_...`` with all inputs (``x:1x8``), as
            the stage ``tensorrt.prepare`` writes them; empty where all shapes are fixed.
    """

    precision_mode: Literal["FP32", "FP16", "BF16", "INT8"] = "FP32"
    max_workspace_bytes: int = 1 << 30
    engine_cache_path: str | None = "/mnt/trt-cache"
    profile_shapes: Mapping[str, str] = field(default_factory=dict)


def render_triton_plan(artifact: Artifact, *, model_name: str, serving: GpuServing | None = None) -> dict[str, str]:
    """``<model_name>/config.pbtxt`` for a TensorRT engine, which belongs into ``<model_name>/1/model.plan``.

    Args:
        artifact: the ONNX model that the engine was built from: the plan's signature is its.
        model_name: the model's name on the server.
        serving: batching and instances.

    Raises:
        InputError: a tensor cannot be in an engine, or the batches cannot be had.
    """
    for tensor in (*artifact.inputs, *artifact.outputs):
        if tensor.dtype not in _PLAN_TYPES:
            raise InputError(
                f"the tensor {tensor.name!r} is of type {tensor.dtype}, which no TensorRT engine gives or takes",
                hint="Export the model with float32, float16, int32, int64, int8, uint8 or bool at its edges.",
            )
    config = _gpu_config(artifact, model_name, serving or GpuServing())
    config.platform = "tensorrt_plan"
    config.default_model_filename = "model.plan"
    return _as_file(config)


def render_triton_tensorrt(
    artifact: Artifact, *, model_name: str, provider: TensorRtProvider, serving: GpuServing | None = None
) -> dict[str, str]:
    """``<model_name>/config.pbtxt`` for ONNX Runtime with its TensorRT provider, which builds engines as it starts.

    Nodes that TensorRT does not take run on the CUDA provider. Source: the README of Triton's onnxruntime backend.

    Raises:
        InputError: a setting cannot be, an input lacks a profile, or the batches cannot be had.
    """
    _check_provider(artifact, provider)
    config = _gpu_config(artifact, model_name, serving or GpuServing())
    config.backend = "onnxruntime"
    config.default_model_filename = artifact.entry
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    accelerator.parameters["precision_mode"] = provider.precision_mode
    accelerator.parameters["max_workspace_size_bytes"] = str(provider.max_workspace_bytes)
    if provider.engine_cache_path is not None:
        accelerator.parameters["trt_engine_cache_enable"] = "1"
        accelerator.parameters["trt_engine_cache_path"] = provider.engine_cache_path
    for key, shapes in provider.profile_shapes.items():
        accelerator.parameters[key] = shapes
    return _as_file(config)


def _gpu_config(artifact: Artifact, model_name: str, serving: GpuServing) -> Any:
    """Tensors, batching and instances of a model on GPUs, a ``ModelConfig``."""
    from tritonclient.grpc import model_config_pb2

    if serving.max_batch_size < 1 or serving.instances < 1:
        raise InputError(f"max_batch_size {serving.max_batch_size} and instances {serving.instances} must be 1 or more")
    batched = serving.max_batch_size > 1
    if batched:
        _check_free_batch(artifact)
    config = model_config_pb2.ModelConfig(name=model_name, max_batch_size=serving.max_batch_size if batched else 0)
    for tensors, declared in ((artifact.inputs, config.input), (artifact.outputs, config.output)):
        for tensor in tensors:
            data_type = model_config_pb2.DataType.Value(_type(tensor))
            declared.add(name=tensor.name, data_type=data_type, dims=_dims(tensor, batched=batched, free=False))
    if batched:
        config.dynamic_batching.max_queue_delay_microseconds = round(serving.max_batch_delay_ms * 1000)
        config.dynamic_batching.SetInParent()
    config.instance_group.add(count=serving.instances, kind=model_config_pb2.ModelInstanceGroup.KIND_GPU)
    if batched:
        # Fewer rows may be below what the engine's profile begins with.
        _warm_up(config, [serving.max_batch_size])
    return config


def _check_free_batch(artifact: Artifact) -> None:
    for tensor in (*artifact.inputs, *artifact.outputs):
        if not tensor.shape or isinstance(tensor.shape[0], int):
            raise InputError(
                f"the tensor {tensor.name!r} has no free first dimension, so no batches can be made of requests",
                hint="Serve it with max_batch_size 1, or export the model with a dynamic batch dimension.",
            )


def _check_provider(artifact: Artifact, provider: TensorRtProvider) -> None:
    known = [f"trt_profile_{end}_shapes" for end in _PROFILE_ENDS]
    given = provider.profile_shapes
    if given and sorted(given) != sorted(known):
        raise InputError(f"the profile has {', '.join(sorted(given))}; it takes {', '.join(known)}, all three")
    for key, shapes in given.items():
        named = {entry.rpartition(":")[0] for entry in shapes.split(",")}
        missing = [tensor.name for tensor in artifact.inputs if tensor.shape and tensor.name not in named]
        if missing:
            raise InputError(f"{key} lacks the input {missing[0]!r}", hint="A profile names all inputs.")
    if provider.max_workspace_bytes < 1:
        raise InputError(f"max_workspace_bytes is {provider.max_workspace_bytes}", hint="It is a size in bytes.")
    if provider.engine_cache_path is not None and not provider.engine_cache_path.startswith("/"):
        raise InputError(
            f"engine_cache_path {provider.engine_cache_path!r} is not absolute", hint="Name a mounted volume."
        )


def _as_file(config: Any) -> dict[str, str]:
    from google.protobuf import text_format

    return {f"{config.name}/config.pbtxt": text_format.MessageToString(config)}
