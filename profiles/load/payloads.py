"""Requests encoded once, before the load: the hot loop only writes bytes.

Four encodings, chosen by the target: V2 gRPC with raw tensors, V2 gRPC with packed tensors, V2 REST with binary tensors
(Triton), V2 REST as plain JSON (MLServer's REST takes nothing else). MLServer answers over gRPC with raw tensors where
the request had them, and otherwise with typed ones.

A packed tensor is one BYTES element with all its values, as an MLServer runtime of one's own may take it to spare the
lists that typed tensors become. V2 has no word for it: what it is stands in its parameters ``datatype`` and ``shape``
(JSON). MLServer hands these to the runtime; Triton keeps them to itself, so that a model there has to know type and
shape. burnish's own runtime takes raw tensors, which are as fast, and refuses packed ones. Answers may be packed, too.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from registry.errors import InputError, UnreachableError
from registry.records import Target

HEADER_LENGTH = "Inference-Header-Content-Length"
Arrays = Mapping[str, NDArray[Any]]
Likeness = Literal["same", "flipped", "wrong"]
Encoding = Literal["raw", "packed", "binary", "json"]

# Of a reply with many labels (one a token, say), so many may differ before it counts as flipped.
FLIPPED_VALUES = 0.05
FLIPPED_PAYLOADS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """One encoded request.

    Attributes:
        body: what is written.
        headers: those of its encoding (REST); the target's own are not among them.
        rows: which samples it holds, in their order.
    """

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The reference's answers, for checking replies while under load: for broken servers, not for fidelity.

    Attributes:
        outputs: one mapping (output -> array) a payload, in the payloads' order.
        absolute: output -> largest difference allowed in it; outputs of floats only.
    """

    outputs: tuple[Arrays, ...]
    absolute: Mapping[str, float]

    def compare(self, index: int, answer: Arrays) -> Likeness:
        """How an answer to payload ``index`` stands to the expected one, over every expected output.

        Returns:
            ``wrong`` where an output is missing, of another shape, or of floats that differ too much; ``flipped``
            where only outputs of whole numbers, labels or words differ, in more than `FLIPPED_VALUES` of an output's
            values; else ``same``.
        """
        likenesses = {self._compare(name, array, answer.get(name)) for name, array in self.outputs[index].items()}
        return "wrong" if "wrong" in likenesses else "flipped" if "flipped" in likenesses else "same"

    def _compare(self, name: str, expected: NDArray[Any], answer: NDArray[Any] | None) -> Likeness:
        if answer is None or answer.shape != expected.shape or _is_text(answer) != _is_text(expected):
            return "wrong"
        if name in self.absolute:
            near = np.allclose(answer, expected, rtol=0.0, atol=self.absolute[name], equal_nan=True)
            return "same" if near else "wrong"
        if _is_text(expected):
            answer, expected = _as_text(answer), _as_text(expected)
        differ = np.count_nonzero(answer != expected)
        return "flipped" if differ > FLIPPED_VALUES * expected.size else "same"


def expected_answers(payloads: Sequence[Payload], outputs: Arrays, *, share: float = 0.05) -> Expected:
    """What each payload's answer should be, from the reference's answers to all samples.

    Args:
        payloads: as `encode_payloads` gave them.
        outputs: output -> (samples, ...) array of the reference.
        share: largest difference allowed in an output of floats, as a share of the largest absolute value that this
            output has over all samples. Kernels of low precision round differently at another batch size.
    """
    each = tuple({name: array[list(payload.rows)] for name, array in outputs.items()} for payload in payloads)
    absolute = {name: share * _largest(array) for name, array in outputs.items() if array.dtype.kind in "fc"}
    return Expected(outputs=each, absolute=absolute)


def count_wrong(likenesses: Iterable[tuple[int, Likeness]]) -> int:
    """How many of the checked replies a broken server must have given.

    A sample that stands on the edge between two labels falls to either side as the batch has it, and does so each
    time it is sent. So the flipped replies of one payload in twenty, and of one in any case, are forgiven; a broken
    server flips more of them. No reply that is wrong is forgiven.

    Args:
        likenesses: of each checked reply: its payload, and what `Expected.compare` says.
    """
    checked = list(likenesses)
    payloads = {payload for payload, _ in checked}
    flipped = [payload for payload, likeness in checked if likeness == "flipped"]
    wrong = sum(likeness == "wrong" for _, likeness in checked)
    forgiven = len(set(flipped)) <= max(1.0, FLIPPED_PAYLOADS * len(payloads))
    return wrong + (0 if forgiven else len(flipped))


def encode_payloads(
    inputs: Arrays, *, target: Target, count: int = 32, rows: int = 1, seed: int = 0
) -> tuple[Payload, ...]:
    """Distinct requests from the user's samples, in an order of chance, encoded for the target.

    Args:
        inputs: input -> (samples, ...) array; all with the same number of samples.
        target: says model, protocol and encoding.
        count: how many (32 defeat a response cache); fewer where there are fewer samples.
        rows: samples in each request.
        seed: of the choice of samples.

    Raises:
        InputError: no samples, unequal numbers of them, a type that V2 does not know, or (JSON) a value that is not
            finite.
    """
    samples = sample_count(inputs)
    order = np.random.default_rng(seed).permutation(samples)
    distinct = max(1, min(count, samples // rows))
    starts = range(0, distinct * rows, rows)
    return tuple(encode_rows(inputs, order[np.arange(start, start + rows) % samples], target) for start in starts)


def encode_rows(inputs: Arrays, rows: Sequence[int] | NDArray[np.int64], target: Target) -> Payload:
    """One request with these samples, in this order; see `encode_payloads`."""
    chosen = np.asarray(rows, dtype=np.int64)
    encode = _ENCODERS[encoding_of(target)]
    body, headers = encode({name: _native(name, array[chosen]) for name, array in inputs.items()}, target.model)
    return Payload(body=body, headers=headers, rows=tuple(int(row) for row in chosen))


def encoding_of(target: Target) -> Encoding:
    """How tensors travel to the target."""
    if target.protocol == "grpc":
        return "packed" if target.packed else "raw"
    return "binary" if target.binary else "json"


def decode_outputs(body: bytes, headers: Mapping[str, str], target: Target) -> dict[str, NDArray[Any]]:
    """The tensors of a reply, by name.

    Args:
        body: the reply as it came.
        headers: the reply's; `HEADER_LENGTH` among them says that tensors are binary.
        target: says the protocol.

    Raises:
        UnreachableError: the reply is not one of V2.
    """
    try:
        outputs = _grpc_outputs(body) if target.protocol == "grpc" else _rest_outputs(body, headers)
    except Exception as error:
        # Foreign bytes can break a foreign parser in any way.
        raise UnreachableError(
            f"the server at {target.url} answered with something that is no V2 reply: {body[:80]!r} ({error})",
            hint="Check that the address is that of a V2 (Open Inference Protocol) endpoint.",
        ) from error
    if not outputs:
        raise UnreachableError(
            f"the server at {target.url} answered without any output: {body[:80]!r}",
            hint="Check that the address is that of a V2 (Open Inference Protocol) endpoint.",
        )
    return outputs


def _largest(array: NDArray[Any]) -> float:
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))


def _is_text(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "OSU"


def _as_text(array: NDArray[Any]) -> NDArray[Any]:
    """Words as one type: V2 carries bytes, files of answers hold str."""
    return np.array([_json_scalar(value) for value in array.ravel().tolist()])


def sample_count(inputs: Arrays) -> int:
    """How many samples there are.

    Raises:
        InputError: none, or unequal numbers of them.
    """
    counts = {name: len(array) for name, array in inputs.items()}
    if not counts or min(counts.values()) == 0:
        raise InputError(f"there are no samples to send: {counts}", hint="Give at least one sample for each input.")
    if len(set(counts.values())) > 1:
        raise InputError(f"inputs have unequal numbers of samples: {counts}")
    return next(iter(counts.values()))


def _native(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """The array as V2 has it: contiguous, strings as objects, of a type V2 knows."""
    from tritonclient.utils import np_to_triton_dtype

    if array.dtype.kind in "US":
        array = array.astype(object)
    if np_to_triton_dtype(array.dtype) is None:
        raise InputError(f"input {name!r} has the type {array.dtype}, which the V2 protocol does not know")
    return np.ascontiguousarray(array)


def _encode_grpc(arrays: Arrays, model: str) -> tuple[bytes, dict[str, str]]:
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

    request = service_pb2.ModelInferRequest(model_name=model)
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        raw = serialize_byte_tensor(array).item() if array.dtype.kind == "O" else array.tobytes()
        request.raw_input_contents.append(raw)
    return request.SerializeToString(), {}


def _encode_grpc_packed(arrays: Arrays, model: str) -> tuple[bytes, dict[str, str]]:
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import np_to_triton_dtype

    request = service_pb2.ModelInferRequest(model_name=model)
    for name, array in arrays.items():
        if array.dtype.kind == "O":  # words are BYTES as they are
            tensor = request.inputs.add(name=name, datatype="BYTES", shape=array.shape)
            tensor.contents.bytes_contents.extend(_as_bytes(value) for value in array.ravel().tolist())
            continue
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(array.tobytes())
        tensor.parameters["datatype"].string_param = np_to_triton_dtype(array.dtype)
        tensor.parameters["shape"].string_param = json.dumps(array.shape)
    return request.SerializeToString(), {}


def _encode_rest_binary(arrays: Arrays, model: str) -> tuple[bytes, dict[str, str]]:
    from tritonclient.http import InferenceServerClient, InferInput
    from tritonclient.utils import np_to_triton_dtype

    tensors = []
    for name, array in arrays.items():
        tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, binary_data=True)
        tensors.append(tensor)
    body, header_length = InferenceServerClient.generate_request_body(tensors)
    return bytes(body), {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(header_length)}


def _encode_rest_json(arrays: Arrays, model: str) -> tuple[bytes, dict[str, str]]:
    from tritonclient.utils import np_to_triton_dtype

    tensors = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": np_to_triton_dtype(array.dtype),
            "data": [_json_scalar(value) for value in array.ravel().tolist()]
            if array.dtype.kind == "O"
            else array.ravel().tolist(),
        }
        for name, array in arrays.items()
    ]
    try:
        text = json.dumps({"inputs": tensors}, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise InputError(
            f"samples hold NaN or infinite values, which JSON cannot carry ({error})",
            hint="Use gRPC, or binary tensors, or clean the samples.",
        ) from error
    return text.encode(), {"Content-Type": "application/json"}


def _as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _json_scalar(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


_ENCODERS: Mapping[Encoding, Callable[[Arrays, str], tuple[bytes, dict[str, str]]]] = {
    "raw": _encode_grpc,
    "packed": _encode_grpc_packed,
    "binary": _encode_rest_binary,
    "json": _encode_rest_json,
}


# Where V2 has the values of typed tensors over gRPC; half precision has none.
_TYPED: Mapping[str, str] = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def _grpc_outputs(body: bytes) -> dict[str, NDArray[Any]]:
    """Raw, typed or packed; tritonclient 2.73 takes typed ones of numbers for empty."""
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import deserialize_bytes_tensor

    response = service_pb2.ModelInferResponse.FromString(body)
    outputs = {}
    for index, output in enumerate(response.outputs):
        words, shape = output.datatype == "BYTES", list(output.shape)
        if index < len(response.raw_output_contents):
            raw = response.raw_output_contents[index]
            array = deserialize_bytes_tensor(raw) if words else np.frombuffer(raw, _numpy_type(output.datatype))
        else:
            values = list(getattr(output.contents, _TYPED[output.datatype]))
            array = np.array(values, dtype=object if words else _numpy_type(output.datatype))
        if words and array.size == 1 and {"datatype", "shape"} <= set(output.parameters):
            datatype, shape = (output.parameters[name].string_param for name in ("datatype", "shape"))
            array, shape = np.frombuffer(array.item(), _numpy_type(datatype)), json.loads(shape)
        outputs[output.name] = array.reshape(shape)
    return outputs


def _rest_outputs(body: bytes, headers: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    from tritonclient.http import InferResult

    length = {name.lower(): value for name, value in headers.items()}.get(HEADER_LENGTH.lower())
    result = InferResult.from_response_body(body, False, None if length is None else int(length))
    return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


def _numpy_type(datatype: str) -> Any:
    from tritonclient.utils import triton_to_np_dtype

    kind = triton_to_np_dtype(datatype)
    if kind is None:
        raise ValueError(f"V2 has no type {datatype!r}")
    return kind
