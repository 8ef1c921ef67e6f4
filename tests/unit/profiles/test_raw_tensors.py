import json
import subprocess
import sys
from typing import Any

import pytest

# In a process of its own: MLServer and tritonclient.grpc both register the V2 protocol's messages.
CHECKS = '''
import asyncio, importlib.util, json, logging, sys
from types import SimpleNamespace
import mlserver, numpy as np
from mlserver.batching import hooks
from mlserver.errors import ModelNotFound
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc.interceptors import PromServerInterceptor
from mlserver.settings import ModelSettings
from mlserver.context import model_context
from profiles.serving import raw_tensors as raw

found = {}


def message(count=2):
    request = pb.ModelInferRequest(model_name="m", id="7", raw_input_contents=[bytes([n]) * 200 for n in range(count)])
    request.parameters["p"].int64_param = 3
    for n in range(count):
        request.inputs.add(name=f"x{n}", datatype="UINT8", shape=[200])
    return request


def error(call, *arguments):
    try:
        call(*arguments)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


request = message()
head, contents = raw.split_raw(request.SerializeToString())
whole = pb.ModelInferRequest.FromString(head)
whole.raw_input_contents.extend(bytes(content) for content in contents)
found["split"] = whole == request
none = message(0).SerializeToString()
found["no raw contents"] = raw.split_raw(none) == (none, [])
# Fields may come in any order, and unknown ones of any type between them.
odd = b"\\x3a\\x01A" + b"\\xf8\\x01\\xac\\x02" + b"\\xfd\\x01abcd" + b"\\x0a\\x01m" + b"\\x3a\\x00"
head, contents = raw.split_raw(odd)
name = pb.ModelInferRequest.FromString(head).model_name
found["any order"] = [name, [bytes(content).decode() for content in contents]]
found["cut off"] = error(raw.split_raw, request.SerializeToString()[:-1])
found["endless"] = error(raw.split_raw, b"\\xff" * 20)
found["group"] = error(raw.split_raw, b"\\x0b")

bad = []
for datatype, dtype in raw.DTYPES.items():
    for shape in ((2, 3), (0, 4), ()):
        array = np.ones(shape, dtype)
        tensor = raw.RawTensor.of("x", datatype, array)
        shifted = tensor._replace(content=memoryview(b"-" + tensor.content)[1:])
        again = shifted.to_array()
        if not (np.array_equal(again, array) and again.dtype == array.dtype and again.flags.aligned):
            bad.append([datatype, shape])
found["wrong dtypes"] = bad
found["true"] = raw.RawTensor("x", "BOOL", (3,), bytes([0, 1, 2])).to_array().astype(int).tolist()
found["length"] = error(raw.RawTensor("x", "FP32", (2, 3), bytes(23)).to_array)
found["negative"] = error(raw.RawTensor("x", "FP32", (-1, -6), bytes(24)).to_array)

big = raw.RawTensor("y", "UINT8", (70000,), bytes(70000))
head = pb.ModelInferResponse(model_name="m", id="7", outputs=[dict(name="y"), dict(name="y")]).SerializeToString()
reply = pb.ModelInferResponse.FromString(raw._to_wire(head, (big, big._replace(shape=(0,), content=b""))))
found["reply"] = [reply.model_name, reply.id, [len(content) for content in reply.raw_output_contents]]

requests = [message() for _ in range(3)]
requests[1].raw_input_contents[0] = b"other"
requests[2].id = "8" * 5000
heads = [raw.split_raw(request.SerializeToString()) for request in requests]
infer = raw._RawInfer(SimpleNamespace(_data_plane=None), None)
found["same head"] = [infer._kept_head(heads[0][0]) is infer._kept_head(head) for head, _ in heads[:2]]
again = [infer._kept_head(head).with_contents(contents) for head, contents in heads[:2]]
found["own contents"] = [[bytes(tensor.content).decode() for tensor in one.inputs] for one in again]
found["head"] = infer._kept_head(heads[0][0])
found["missing"] = error(infer._kept_head(heads[0][0]).with_contents, heads[0][1][:1])
typed = message()
typed.inputs[1].contents.uint_contents.append(1)
found["typed"] = raw._RequestHead.of(typed).has_typed
outputs = (("y", "FP32", (2, 3)),)
reply = pb.ModelInferResponse.FromString(infer._reply_head("m", "1", "7", outputs))
found["reply head"] = [reply.model_name, reply.model_version, reply.id, list(reply.outputs[0].shape)]


async def unknown(name, version):
    raise ModelNotFound(name)


async def stock(request, context):
    return request.id


async def unknown_model():
    registry = SimpleNamespace(get_model=unknown)
    plane = SimpleNamespace(_get_response_cache=lambda: None, _model_registry=registry)
    handler = SimpleNamespace(
        unary_unary=stock, request_deserializer=pb.ModelInferRequest.FromString, response_serializer=str.encode
    )
    infer = raw._RawInfer(SimpleNamespace(_data_plane=plane), handler)
    replies = [await infer(request.SerializeToString(), None) for request in requests]
    return [len(reply) for reply in replies], infer._kept_head.cache_info().currsize


found["long heads"] = asyncio.run(unknown_model())

mlserver.__version__, version = "9.9", mlserver.__version__
stock = PromServerInterceptor.intercept_service
logging.basicConfig(stream=sys.stderr)
found["other version"] = [raw.install(), raw.install(), PromServerInterceptor.intercept_service is stock]
mlserver.__version__ = version
delattr(mlserver, raw._INSTALLED)
found["installed"] = raw.install()
changed = PromServerInterceptor.intercept_service
found["installed twice"] = [raw.install(), changed is not stock, PromServerInterceptor.intercept_service is changed]

# Another copy, as a self-contained model brings one.
spec = importlib.util.spec_from_file_location("another", raw.__file__)
another = importlib.util.module_from_spec(spec)
spec.loader.exec_module(another)
found["copy installed"] = [another.install(), PromServerInterceptor.intercept_service is changed]
ours = raw.RawRequest((raw.RawTensor("x", "UINT8", (2,), memoryview(b"ab")),), ("y",))
plain = ours.portable()
found["plain"] = [plain == ((("x", "UINT8", (2,), b"ab"),), ("y",)), type(plain) is tuple, type(plain[0][0]) is tuple]
made = [another.RawRequest.of(request) for request in (ours, plain)]
found["made its own"] = [type(one) is another.RawRequest and type(one.inputs[0]) is another.RawTensor for one in made]
found["kept its own"] = raw.RawRequest.of(ours) is ours
copied = raw._to_wire(b"", (another.RawTensor("y", "UINT8", (1,), b"z"),))
reply = pb.ModelInferResponse.FromString(copied)
found["copy's reply"] = reply.raw_output_contents[0].decode()
another.CONTRACT = 2
found["other contract"] = [another.install(), raw.install(), PromServerInterceptor.intercept_service is changed]


class Counting(mlserver.MLModel):
    """Answers each request with the number of those it came with; fails "bad"."""

    async def predict_many(self, requests):
        await asyncio.sleep(0.01)
        if "worst" in requests:
            raise ValueError("all of it")
        return [ValueError("one of it") if request == "bad" else len(requests) for request in requests]


class Held(Counting):
    """Answers nobody before it is told to; ``given`` is how many requests it was given each time."""

    def __init__(self, settings):
        super().__init__(settings)
        self.given, self.done = [], asyncio.Event()

    async def predict_many(self, requests):
        self.given.append(len(requests))
        await self.done.wait()
        return [0] * len(requests)


async def batches():
    settings = ModelSettings(name="m", implementation=Counting, max_batch_size=4, max_batch_time=0.05)
    stock, ours = mlserver.MLModel(settings), Counting(settings)
    setattr(ours, raw.TAKES_RAW, raw.CONTRACT)
    found["batchers"] = [type(hooks.AdaptiveBatcher(model)).__name__ for model in (stock, ours)]
    with model_context(settings):
        batcher = hooks.AdaptiveBatcher(ours)

        async def ask(*requests):
            answers = await asyncio.gather(*map(batcher.predict, requests), return_exceptions=True)
            return [answer if isinstance(answer, int) else str(answer) for answer in answers]

        found["alone"] = await ask("a")
        found["full"] = await ask(*"abcdefgh")
        found["one bad"] = await ask("a", "bad", "c")
        found["all bad"] = await ask("a", "worst")
        gone = asyncio.create_task(batcher.predict("gone"))
        await asyncio.sleep(0)
        gone.cancel()
        found["one gone"] = await ask("a", "b")
        for count in (6, 14):
            held = Held(settings)
            setattr(held, raw.TAKES_RAW, raw.CONTRACT)
            asked = asyncio.gather(*map(hooks.AdaptiveBatcher(held).predict, range(count)))
            await asyncio.sleep(0.1)
            found[f"{count} meet a busy model"] = list(held.given)
            held.done.set()
            await asked
            found[f"{count} in all"] = held.given


asyncio.run(batches())
print(json.dumps(found))
'''


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the checks saw, and under ``log`` what was logged."""
    done = subprocess.run([sys.executable, "-c", CHECKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return {**seen, "log": done.stderr}


def test_a_request_is_split_into_its_head_and_its_raw_contents(found: dict[str, Any]) -> None:
    assert found["split"] is True
    assert found["no raw contents"] is True
    assert found["any order"] == ["m", ["A", ""]]


def test_requests_that_differ_in_their_contents_share_what_is_remembered(found: dict[str, Any]) -> None:
    assert found["same head"] == [True, True]
    assert found["own contents"] == [["\0" * 200, "\1" * 200], ["other", "\1" * 200]]
    assert found["head"] == ["m", "", "7", [["x0", "UINT8", [200]], ["x1", "UINT8", [200]]], [], False]
    assert found["typed"] is True
    assert found["reply head"] == ["m", "1", "7", [2, 3]]


def test_a_missing_content_is_named(found: dict[str, Any]) -> None:
    assert found["missing"] == "InferenceError: the request has 2 inputs and 1 raw contents"


def test_a_long_head_is_not_remembered(found: dict[str, Any]) -> None:
    assert found["long heads"] == [[1, 1, 5000], 1]


def test_a_broken_message_is_refused(found: dict[str, Any]) -> None:
    assert found["cut off"] == "ValueError: the request ends within a field"
    assert found["endless"] == "ValueError: the request ends within a field"
    assert found["group"] == "ValueError: the request has a field of the unknown wire type 3"


def test_tensors_of_every_type_survive(found: dict[str, Any]) -> None:
    assert found["wrong dtypes"] == []
    assert found["true"] == [0, 1, 1]
    assert found["reply"] == ["m", "7", [70000, 0]]


def test_a_wrong_number_of_bytes_is_named(found: dict[str, Any]) -> None:
    assert found["length"].endswith("the input 'x' is FP32 of shape [2, 3], which takes 24 bytes; it has 23")
    assert "shape [-1, -6]" in found["negative"]


def test_another_mlserver_is_left_as_it_is(found: dict[str, Any]) -> None:
    assert found["other version"] == [False, False, True]
    assert found["log"].count("This is MLServer 9.9, not 1.7.1") == 1


def test_it_is_installed_once(found: dict[str, Any]) -> None:
    assert found["installed"] is True
    assert found["installed twice"] == [True, True, True]


def test_two_copies_share_one_change_and_no_types(found: dict[str, Any]) -> None:
    assert found["copy installed"] == [True, True]
    assert found["plain"] == [True, True, True]
    assert found["made its own"] == [True, True]
    assert found["kept its own"] is True
    assert found["copy's reply"] == "z"


def test_a_copy_of_another_contract_keeps_apart(found: dict[str, Any]) -> None:
    assert found["other contract"] == [False, True, True]
    assert found["log"].count("by contract 1, not 2: raw tensors pass through Python lists") == 1


def test_requests_are_handed_over_together(found: dict[str, Any]) -> None:
    assert found["batchers"] == ["AdaptiveBatcher", "RequestBatcher"]
    assert found["alone"] == [1]
    assert found["full"] == [4] * 8


def test_a_busy_model_is_sent_one_full_batch_ahead(found: dict[str, Any]) -> None:
    assert found["6 meet a busy model"] == [4]
    assert found["6 in all"] == [4, 2]
    assert found["14 meet a busy model"] == [4, 4]
    assert found["14 in all"] == [4, 4, 4, 2]


def test_an_error_reaches_those_it_concerns(found: dict[str, Any]) -> None:
    assert found["one bad"] == [3, "one of it", 3]
    assert found["all bad"] == ["all of it"] * 2
    assert found["one gone"] == [2, 2]
