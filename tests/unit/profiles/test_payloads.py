import json
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tritonclient.grpc import service_pb2
from tritonclient.utils import triton_to_np_dtype

from profiles.load.payloads import (
    HEADER_LENGTH,
    count_wrong,
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
    sums = X.sum(1, keepdims=True)
    expected = expected_answers(payloads, {"sum": sums}, share=0.001)
    right = sums[list(payloads[3].rows)]
    allowed = 0.001 * sums.max()
    assert expected.compare(3, {"sum": right + 0.9 * allowed, "more": right}) == "same"
    assert expected.compare(3, {"sum": right + 1.1 * allowed}) == "wrong"
    assert expected.compare(4, {"sum": right}) == "wrong"
    assert expected.compare(3, {"sum": right.ravel()}) == "wrong"
    assert expected.compare(3, {}) == "wrong"


def test_each_output_has_a_tolerance_of_its_own() -> None:
    payloads = encode_payloads({"x": X}, target=GRPC)
    score, logit = np.full((100, 1), 0.5), np.full((100, 1), 1000.0)
    score[0], logit[1] = np.nan, np.inf
    expected = expected_answers(payloads, {"score": score, "logit": logit})
    assert expected.absolute == {"score": pytest.approx(0.025), "logit": pytest.approx(50)}
    for index, payload in enumerate(payloads):
        answer = {"score": score[list(payload.rows)], "logit": logit[list(payload.rows)]}
        assert expected.compare(index, answer) == "same"
        assert expected.compare(index, {**answer, "score": answer["score"] + 1}) == (
            "same" if 0 in payload.rows else "wrong"
        )


def test_labels_that_differ_are_flipped() -> None:
    payloads = encode_payloads({"x": X}, target=GRPC)
    outputs = {"label": np.arange(100), "tokens": np.arange(4000).reshape(100, 40), "word": np.full(100, "a")}
    expected = expected_answers(payloads, {**outputs, "score": np.ones(100)})
    rows = list(payloads[0].rows)
    right = {name: array[rows] for name, array in outputs.items()} | {"score": np.ones(1)}
    assert expected.compare(0, right) == "same"
    assert expected.compare(0, {**right, "word": np.full(1, b"a", "O")}) == "same"
    assert expected.compare(0, {**right, "score": np.full(1, b"1", "O")}) == "wrong"
    assert expected.compare(0, {**right, "label": right["label"] + 1}) == "flipped"
    assert expected.compare(0, {**right, "word": np.full(1, b"b", "O")}) == "flipped"
    assert expected.compare(0, {**right, "label": right["label"] + 1, "score": np.zeros(1)}) == "wrong"
    for changed, likeness in ((2, "same"), (3, "flipped")):  # of 40
        tokens = right["tokens"].copy()
        tokens[0, :changed] += 1
        assert expected.compare(0, {**right, "tokens": tokens}) == likeness


@pytest.mark.parametrize(
    ("likenesses", "wrong"),
    [
        ([], 0),
        ([(n % 32, "same") for n in range(64)], 0),
        # One sample on the edge between two labels flips each time it is sent.
        ([(n % 32, "flipped" if n % 32 == 7 else "same") for n in range(64)], 0),
        ([(n % 32, "flipped" if n % 32 in {7, 8} else "same") for n in range(64)], 4),
        ([(n, "flipped" if n < 3 else "same") for n in range(60)], 0),
        ([(n, "flipped" if n < 4 else "same") for n in range(60)], 4),
        ([(n % 32, "wrong" if n == 5 else "same") for n in range(64)], 1),
        ([(0, "flipped"), (1, "wrong")], 1),
    ],
)
def test_a_broken_server_is_told_from_a_sample_on_the_edge(likenesses: list[tuple[int, Any]], wrong: int) -> None:
    assert count_wrong(likenesses) == wrong


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-1, 2]),
        ("INT64", "int64_contents", [-1, 2]),
        ("UINT16", "uint_contents", [1, 2]),
        ("UINT64", "uint64_contents", [1, 2]),
        ("FP32", "fp32_contents", [0.5, -2.0]),
        ("FP64", "fp64_contents", [0.5, -2.0]),
        ("BYTES", "bytes_contents", [b"a", b"\xff"]),
    ],
)
def test_typed_outputs_over_grpc(datatype: str, field: str, values: list[Any]) -> None:
    """As MLServer gives them where the request was typed or packed."""
    response = service_pb2.ModelInferResponse(model_name="m")
    output = response.outputs.add(name="y", datatype=datatype, shape=[2, 1])
    getattr(output.contents, field).extend(values)
    array = decode_outputs(response.SerializeToString(), {}, Target(url="h:1", protocol="grpc", model="m"))["y"]
    assert array.shape == (2, 1)
    assert array.ravel().tolist() == values
    assert array.dtype == triton_to_np_dtype(datatype)


@pytest.mark.parametrize("raw", [True, False])
def test_packed_outputs(raw: bool) -> None:
    array = np.arange(6, dtype="f4").reshape(2, 3)
    response = service_pb2.ModelInferResponse(model_name="m")
    output = response.outputs.add(name="y", datatype="BYTES", shape=[1])
    output.parameters["datatype"].string_param, output.parameters["shape"].string_param = "FP32", "[2, 3]"
    if raw:
        response.raw_output_contents.append(len(array.tobytes()).to_bytes(4, "little") + array.tobytes())
    else:
        output.contents.bytes_contents.append(array.tobytes())
    found = decode_outputs(response.SerializeToString(), {}, Target(url="h:1", protocol="grpc", model="m"))
    assert np.array_equal(found["y"], array)


def test_an_output_of_a_type_that_is_none_is_no_reply() -> None:
    response = service_pb2.ModelInferResponse(model_name="m", raw_output_contents=[b"1234"])
    response.outputs.add(name="y", datatype="FP33", shape=[1])
    with pytest.raises(UnreachableError, match="no V2 reply"):
        decode_outputs(response.SerializeToString(), {}, Target(url="h:1", protocol="grpc", model="m"))
