"""Pipelines as messages of the scheduler, and back."""

from typing import Any

import pytest

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.deploy.core2_messages import PipelineState
from profiles.deploy.core2_pipelines import pipeline_message, pipeline_spec, plain
from profiles.pipelines.rollout import plain_spec
from registry.errors import InputError

SPEC: dict[str, Any] = {
    "steps": [
        {"name": "a", "inputs": ["p.inputs.x"], "tensorMap": {"p.inputs.x": "raw"}, "joinWindowMs": 50},
        {
            "name": "b",
            "inputs": ["a"],
            "inputsJoinType": "any",
            "triggers": ["a.outputs.y"],
            "triggersJoinType": "outer",
        },
        {"name": "c", "inputs": ["b", "a"], "batch": {"size": 8, "windowMs": 20}},
    ],
    "input": {"externalInputs": ["q.outputs"], "joinType": "any"},
    "output": {"steps": ["b", "c"], "stepsJoin": "any", "tensorMap": {"b.outputs.z": "answer"}},
}


def manifest(spec: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "spec": spec}


def state(told: pb.Pipeline | None) -> PipelineState:
    return PipelineState(version=1, state="PipelineReady", reason="", models_ready=True, definition=told)


def test_a_pipeline_goes_to_the_scheduler_and_comes_back():
    message = pipeline_message(manifest(SPEC))
    assert (message.name, message.steps[1].inputsJoin, message.output.stepsJoin) == ("p", pb.ANY, pb.ANY)
    assert plain_spec(pipeline_spec("p", state(message)), "p") == plain_spec(SPEC, "p")
    # What Core 2 adds for itself is not the pipeline's: an id, a version, metadata.
    told = pb.Pipeline.FromString(message.SerializeToString() + b"\x12\x02id\x18\x03")
    assert told != message
    assert plain(told) == message
    assert plain_spec(pipeline_spec("p", state(told)), "p") == plain_spec(SPEC, "p")


def test_what_could_not_be_restored_is_refused():
    with pytest.raises(InputError, match="does not tell what the pipeline p was loaded with"):
        pipeline_spec("p", state(None))
    # A field that came later, of which nothing is known here.
    told = pb.Pipeline.FromString(pipeline_message(manifest(SPEC)).SerializeToString() + b"\x48\x01")
    with pytest.raises(InputError, match="settings at the scheduler that burnish could not restore"):
        pipeline_spec("p", state(told))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({**SPEC, "allowCycles": True}, "has allowCycles, which burnish cannot tell a scheduler"),
        ({"steps": [{"name": "a", "colour": "blue"}]}, "step 'a' of the Pipeline p has the unknown field colour"),
    ],
)
def test_what_the_scheduler_cannot_be_told(spec: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        pipeline_message(manifest(spec))


def test_defaults_that_are_said_are_no_difference():
    message = pipeline_message(manifest({**SPEC, "allowCycles": False, "maxStepRevisits": None}))
    assert message == pipeline_message(manifest(SPEC))
