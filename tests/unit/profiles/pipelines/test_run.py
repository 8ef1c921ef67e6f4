"""Requests through the graph in one process, and what the local endpoint speaks."""

import asyncio

import numpy as np
import pytest

from profiles.load.payloads import decode_outputs, encode_rows
from profiles.pipelines.documents import SpecPart, read_spec
from profiles.pipelines.gateway import core2_target, decode_request, encode_answer
from profiles.pipelines.graph import Pipeline
from profiles.pipelines.run import run_graph, run_samples
from registry.errors import UnreachableError
from registry.records import Target


def pipeline(nodes: list[dict], **output) -> Pipeline:
    return read_spec("p", SpecPart.model_validate({"steps": nodes, "output": output}))


def parity(inputs):
    """Says whether its input is even by the tensor that it answers with."""
    x = inputs["x"]
    return {"even" if int(x[0, 0]) % 2 == 0 else "odd": x}


MODELS = {
    "parity": parity,
    "half": lambda inputs: {"y": inputs["x"] // 2},
    "triple": lambda inputs: {"y": inputs["x"] * 3 + 1},
}
STEPS = [
    {"name": "parity"},
    {"name": "half", "inputs": ["parity.outputs.even"], "tensorMap": {"parity.outputs.even": "x"}},
    {"name": "triple", "inputs": ["parity.outputs.odd"], "tensorMap": {"parity.outputs.odd": "x"}},
]
NUMBERS = {"x": np.arange(1, 7, dtype=np.int64).reshape(6, 1)}


def test_a_request_goes_where_its_step_chooses():
    names = {"half.outputs.y": "next", "triple.outputs.y": "next"}
    choosing = pipeline(STEPS, steps=["half", "triple"], stepsJoin="any", tensorMap=names)
    outputs, seen = run_samples(choosing, MODELS, NUMBERS)
    assert outputs["next"].ravel().tolist() == [4, 1, 10, 2, 16, 3]
    assert seen["half"]["x"].ravel().tolist() == [2, 4, 6]
    assert seen["triple"]["x"].ravel().tolist() == [1, 3, 5]


def test_what_never_comes_is_no_answer():
    with pytest.raises(UnreachableError, match="no output was reached"):
        run_samples(pipeline(STEPS, steps=["half", "triple"]), MODELS, NUMBERS)


def test_joins_put_tensors_together_and_triggers_give_none():
    steps = [
        {"name": "a"},
        {"name": "b", "inputs": ["a.inputs"]},
        {"name": "sum", "inputs": ["a.outputs.y", "b.outputs.y"], "triggers": ["b"],
         "tensorMap": {"a.outputs.y": "left", "b.outputs.y": "right"}},
    ]  # fmt: skip
    models = {
        "a": lambda inputs: {"y": inputs["x"] + 1},
        "b": lambda inputs: {"y": inputs["x"] * 10},
        "sum": lambda inputs: {"total": inputs["left"] + inputs["right"], "count": np.array([len(inputs)])},
    }
    outputs, _ = run_samples(pipeline(steps, steps=["sum"]), models, {"x": np.array([[1], [2]])})
    assert outputs["total"].ravel().tolist() == [12, 23]
    assert outputs["count"].tolist() == [2, 2]


def test_an_outer_join_goes_on_with_what_came_when_its_window_ends():
    def joined(window_ms: int) -> Pipeline:
        both = {"name": "both", "inputs": ["parity.inputs.x", "half.outputs.y"], "inputsJoinType": "outer",
                "joinWindowMs": window_ms}  # fmt: skip
        return pipeline([*STEPS[:2], both], steps=["both"])

    models = {**MODELS, "both": lambda inputs: {"names": np.array([[len(inputs)]])}}

    async def call(step, inputs):
        return models[step](inputs)

    async def ask(number: int, window_ms: int) -> int:
        outputs, _ = await run_graph(joined(window_ms), call, {"x": np.array([[number]])})
        return int(outputs["names"][0, 0])

    # A window that all come in does not last to its end.
    assert [asyncio.run(ask(4, 60_000)), asyncio.run(ask(3, 30))] == [2, 1]


def test_a_step_that_fails_fails_the_request():
    async def call(step, inputs):
        raise UnreachableError(f"step {step!r} is down")

    with pytest.raises(UnreachableError, match="'parity' is down"):
        asyncio.run(run_graph(pipeline(STEPS, steps=["half"]), call, NUMBERS))


def test_the_endpoint_reads_and_writes_what_the_load_generator_speaks():
    target = Target(url="h:1", protocol="grpc", model="p.pipeline")
    inputs = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "words": np.array(["a", "bc"], dtype=object)}
    name, _, arrays = decode_request(encode_rows(inputs, [0, 1], target).body)
    assert name == "p.pipeline"
    assert np.array_equal(arrays["x"], inputs["x"])
    assert arrays["words"].tolist() == [b"a", b"bc"]
    answered = decode_outputs(encode_answer(name, "1", arrays), {}, target)
    assert np.array_equal(answered["x"], inputs["x"])
    assert answered["words"].tolist() == [b"a", b"bc"]


@pytest.mark.parametrize("body", [b"\xff\xff", b""])
def test_what_is_no_request_is_refused_or_empty(body: bytes):
    if body:
        with pytest.raises(ValueError, match="no V2 request"):
            decode_request(body)
    else:
        assert decode_request(body)[2] == {}


def test_on_core_2_a_pipeline_answers_by_its_header():
    target = core2_target(pipeline(STEPS, steps=["half"]), "mesh:80")
    assert target.headers == {"seldon-model": "p.pipeline"}
