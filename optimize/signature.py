"""The tensor signature of a model file: the names, types and shapes of its inputs and outputs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.protobuf_wire import Span, contents, mapped
from registry import codec
from registry.errors import InputError
from registry.records import TensorSpec

if TYPE_CHECKING:
    import onnx

Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
Described = dict[str, list[dict[str, Any]]]


def read_signature(entry: Path) -> Signature:
    """Inputs and outputs of an ONNX (``.onnx``) or OpenVINO IR (``.xml``) file, in the graph's order.

    Weights are not read. Initializers that old ONNX models repeat among their inputs are left out.

    Raises:
        InputError: the file is neither, or cannot be parsed.
    """
    if entry.suffix == ".xml":
        return _openvino_signature(entry)
    return _onnx_signature(entry)


def describe_signature(signature: Signature) -> Described:
    """The signature as JSON has it, for a child process to hand back: ``inputs`` and ``outputs``."""
    inputs, outputs = signature
    return {"inputs": [asdict(spec) for spec in inputs], "outputs": [asdict(spec) for spec in outputs]}


def signature_of(described: Mapping[str, Sequence[Any]]) -> Signature:
    """The signature that `describe_signature` wrote."""
    inputs, outputs = (
        tuple(codec.from_jsonable(TensorSpec, spec) for spec in described[side]) for side in ("inputs", "outputs")
    )
    return inputs, outputs


# Fields of ModelProto, GraphProto and TensorProto in onnx.proto.
_GRAPH = 7
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12
_TENSOR_NAME = 8


def _onnx_signature(entry: Path) -> Signature:
    from google.protobuf.message import DecodeError

    try:
        inputs, outputs, weights = _onnx_values(entry)
    except (DecodeError, OSError, ValueError) as error:
        raise InputError(f"{entry.name} is not an ONNX model: {error}") from error
    if not outputs:
        raise InputError(f"{entry.name} is not an ONNX model: it has no outputs")
    return tuple(_onnx_spec(value) for value in inputs if value.name not in weights), tuple(map(_onnx_spec, outputs))


def _onnx_values(entry: Path) -> tuple[list["onnx.ValueInfoProto"], list["onnx.ValueInfoProto"], set[str]]:
    """Inputs and outputs of the graph, and the names of its initializers.

    The weights are passed over where they lie: parsed, they would take their size again, and most of the time.
    """
    import onnx

    def values(spans: Iterator[Span]) -> list[onnx.ValueInfoProto]:
        return [onnx.ValueInfoProto.FromString(data[begin:end]) for begin, end in spans]

    inputs: list[onnx.ValueInfoProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    weights: set[str] = set()
    with mapped(entry) as data:
        for graph in contents(data, (0, len(data)), _GRAPH):
            inputs += values(contents(data, graph, _INPUT))
            outputs += values(contents(data, graph, _OUTPUT))
            for weight in contents(data, graph, _INITIALIZER):
                weights |= {str(data[begin:end], "utf-8") for begin, end in contents(data, weight, _TENSOR_NAME)}
    return inputs, outputs, weights


def _onnx_spec(value: "onnx.ValueInfoProto") -> TensorSpec:
    import onnx

    name = value.name
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        raise InputError(f"{name!r} is not a tensor; burnish takes models whose inputs and outputs are tensors")
    known = {number: kind for kind, number in onnx.TensorProto.DataType.items()}
    if tensor.elem_type not in known:
        raise InputError(f"{name!r} has the unknown tensor type {tensor.elem_type}; the file is damaged, or too new")
    dtype = known[tensor.elem_type].lower()
    dtype = {"float": "float32", "double": "float64", "string": "str"}.get(dtype, dtype)
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim)
    return TensorSpec(name=name, dtype=dtype, shape=shape)


# OpenVINO's names of types that numpy names otherwise; the rest agree after the number is spelt out.
_OPENVINO_DTYPES = {
    "f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16", "boolean": "bool", "string": "str",
    "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64",
    "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64",
}  # fmt: skip


def _openvino_signature(entry: Path) -> Signature:
    from profiles.serving.session import import_engine
    from registry.errors import MissingExtraError

    try:
        openvino = import_engine("openvino")
    except ImportError as error:
        raise MissingExtraError("reading an OpenVINO model", extra="openvino") from error
    try:
        model = openvino.Core().read_model(str(entry))
    except RuntimeError as error:
        raise InputError(f"{entry.name} is not an OpenVINO model: {error}") from error

    def spec(port: Any) -> TensorSpec:
        kind = port.get_element_type().get_type_name()
        shape = tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape())
        return TensorSpec(name=port.get_any_name(), dtype=_OPENVINO_DTYPES.get(kind, kind), shape=shape)

    return tuple(map(spec, model.inputs)), tuple(map(spec, model.outputs))
