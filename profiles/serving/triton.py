"""Candidate to Triton's files."""

from profiles.serving.naming import check_batching, session_settings, unserved, why_not_batched
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


def render_triton(candidate: Candidate, artifact: Artifact, *, model_name: str) -> dict[str, str]:
    """``<model_name>/config.pbtxt`` and, for the Python backend, ``<model_name>/1/model.py``.

    The artifact's files belong into ``<model_name>/1``. ``max_batch_size`` counts rows in Triton, so a request of more
    rows than that is refused. With 1, batching is off: Triton is told of no batch dimension, and a request of any
    number of rows is run as it comes.

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
    files = {f"{model_name}/config.pbtxt": text_format.MessageToString(config)}
    if serving.backend == "python":
        files[f"{model_name}/1/model.py"] = MODEL_PY
    return files


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
