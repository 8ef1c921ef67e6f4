import json
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from profiles.load.payloads import (
    HEADER_LENGTH,
    decode_outputs,
    encode_payloads,
    expected_answers,
)
from registry.errors import InputError, UnreachableError
from registry.records import Target

GRPC = Target(url="127.0.0.1:1", protocol="grpc", model="m")
JSON = Target(url="127.0.0.1:1", protocol="rest", model="m")
BINARY = Target(url="127.0.0.1:1", protocol="rest", model="m", binary=True)
X = np.arange(300, dtype="f4").reshape(100, 3)


def grpc_request(body: bytes) -> Any:
    from tritonclient.grpc import service_pb2

    return service_pb2.ModelInferRequest.FromString(body)


def test_grpc_holds_raw_tensors() -> None:
    payload = encode_payloads({"x": X}, target=GRPC, rows=2)[0]
    request = grpc_request(payload.body)
    assert request.model_name == "m"
    assert (request.inputs[0].name, request.inputs[0].datatype, list(request.inputs[0].shape)) == ("x", "FP32", [2, 3])
    assert request.raw_input_contents[0] == X[list(payload.rows)].tobytes()


def test_rest_json() -> None:
    payload = encode_payloads({"x": X, "y": X.astype("i8")}, target=JSON)[0]
    assert payload.headers == {"Content-Type": "application/json"}
    first, second = json.loads(payload.body)["inputs"]
    assert first == {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": X[payload.rows[0]].tolist()}
    assert (second["datatype"], second["data"]) == ("INT64", X[payload.rows[0]].astype(int).tolist())


def test_rest_binary() -> None:
    payload = encode_payloads({"x": X}, target=BINARY)[0]
    length = int(payload.headers[HEADER_LENGTH])
    head = json.loads(payload.body[:length])
    assert head["inputs"][0]["parameters"]["binary_data_size"] == 12
    assert payload.body[length:] == X[payload.rows[0]].tobytes()


@pytest.mark.parametrize("target", [GRPC, JSON, BINARY])
def test_32_distinct_payloads_each_from_its_own_samples(target: Target) -> None:
    payloads = encode_payloads({"x": X}, target=target, rows=3, seed=4)
    assert len(payloads) == 32
    assert len({payload.body for payload in payloads}) == 32
    assert len({row for payload in payloads for row in payload.rows}) == 96
    assert payloads == encode_payloads({"x": X}, target=target, rows=3, seed=4)
    assert payloads != encode_payloads({"x": X}, target=target, rows=3, seed=5)


def test_fewer_samples_give_fewer_payloads() -> None:
    assert len(encode_payloads({"x": X[:5]}, target=GRPC)) == 5
    few = encode_payloads({"x": X[:2]}, target=GRPC, rows=8)
    assert len(few) == 1
    assert len(few[0].rows) == 8


def test_strings_travel() -> None:
    words = np.array([["a"], ["bc"]])
    request = grpc_request(encode_payloads({"t": words}, target=GRPC, rows=2, seed=0)[0].body)
    assert request.inputs[0].datatype == "BYTES"
    body = json.loads(encode_payloads({"t": words}, target=JSON, rows=2, seed=0)[0].body)
    assert sorted(body["inputs"][0]["data"]) == ["a", "bc"]


@pytest.mark.parametrize(
    ("inputs", "target", "match"),
    [
        ({}, GRPC, "no samples"),
        ({"x": X[:0]}, GRPC, "no samples"),
        ({"x": X, "y": X[:3]}, GRPC, "unequal"),
        ({"x": X.astype("c8")}, GRPC, "complex64"),
        ({"x": X * np.float32("nan")}, JSON, "NaN"),
    ],
)
def test_bad_samples_are_refused(inputs: dict[str, Any], target: Target, match: str) -> None:
    with pytest.raises(InputError, match=match):
        encode_payloads(inputs, target=target)


@settings(max_examples=30, deadline=None)
@given(
    arrays(
        st.sampled_from(["f4", "i8", "u1", "f8"]),
        st.tuples(st.integers(1, 3), st.integers(1, 4)),
        elements=st.integers(0, 9),
    ),
    st.sampled_from(["grpc", "rest"]),
)
def test_outputs_come_back_as_they_were(array: np.ndarray[Any, Any], protocol: Literal["grpc", "rest"]) -> None:
    from tritonclient.utils import np_to_triton_dtype

    kind = np_to_triton_dtype(array.dtype)
    if protocol == "grpc":
        from tritonclient.grpc import service_pb2

        response = service_pb2.ModelInferResponse(raw_output_contents=[array.tobytes()])
        response.outputs.add(name="y", datatype=kind, shape=array.shape)
        body = response.SerializeToString()
    else:
        tensor = {"name": "y", "datatype": kind, "shape": array.shape, "data": array.ravel().tolist()}
        body = json.dumps({"outputs": [tensor]}).encode()
    target = GRPC if protocol == "grpc" else JSON
    decoded = decode_outputs(body, {}, target)
    assert list(decoded) == ["y"]
    assert np.array_equal(decoded["y"], array)
    assert decoded["y"].dtype == array.dtype


def test_binary_outputs() -> None:
    array = np.arange(6, dtype="f4").reshape(2, 3)
    tensor = {"name": "y", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": 24}}
    head = json.dumps({"outputs": [tensor]}).encode()
    decoded = decode_outputs(head + array.tobytes(), {HEADER_LENGTH.lower(): str(len(head))}, BINARY)
    assert np.array_equal(decoded["y"], array)


@pytest.mark.parametrize("target", [GRPC, JSON])
def test_rubbish_is_no_reply(target: Target) -> None:
    with pytest.raises(UnreachableError, match="no V2 reply"):
        decode_outputs(b"<html>hello</html>", {}, target)


def test_expected_answers_follow_the_rows() -> None:
    payloads = encode_payloads({"x": X}, target=GRPC, rows=2)
    expected = expected_answers(payloads, {"sum": X.sum(1, keepdims=True)}, absolute=0.01, relative=0.0)
    right = X[list(payloads[3].rows)].sum(1, keepdims=True)
    assert expected.matches(3, {"sum": right + 0.009, "more": right})
    assert not expected.matches(3, {"sum": right + 0.02})
    assert not expected.matches(4, {"sum": right})
    assert not expected.matches(3, {"sum": right.ravel()})
    assert not expected.matches(3, {})


def test_expected_labels_must_be_equal() -> None:
    payloads = encode_payloads({"x": X}, target=GRPC)
    labels = np.arange(100)
    expected = expected_answers(payloads, {"label": labels}, absolute=5.0)
    assert expected.matches(0, {"label": labels[list(payloads[0].rows)]})
    assert not expected.matches(0, {"label": labels[list(payloads[0].rows)] + 1})
