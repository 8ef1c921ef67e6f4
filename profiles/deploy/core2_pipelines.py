"""Pipelines as the scheduler of Core 2 is told of them, and as manifests have them."""

from collections.abc import Mapping
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.deploy.core2_messages import PipelineState
from profiles.serving.core2.manifests import Manifest
from registry.errors import InputError

# What Core 2 adds for itself: its own id, the version, and Kubernetes' metadata.
_OF_CORE2 = frozenset({2, 3, 6})
_JOINS: Mapping[str, int] = {"inner": pb.INNER, "outer": pb.OUTER, "any": pb.ANY}
_NAMES: Mapping[int, str] = {number: name for name, number in _JOINS.items()}
_STEP = frozenset(
    {"name", "inputs", "inputsJoinType", "joinWindowMs", "tensorMap", "triggers", "triggersJoinType", "batch"}
)
_SPEC = frozenset({"steps", "input", "output"})


def pipeline_message(manifest: Manifest) -> pb.Pipeline:
    """The message of a Pipeline.

    Raises:
        InputError: it has a field that the scheduler cannot be told.
    """
    name, spec = str(manifest["metadata"]["name"]), manifest["spec"]
    told = {key for key, value in spec.items() if value not in (None, False)}
    if unknown := sorted(told - _SPEC):
        raise InputError(
            f"the Pipeline {name} has {unknown[0]}, which burnish cannot tell a scheduler",
            hint="Promote it in Kubernetes, where manifests are applied whole.",
        )
    message = pb.Pipeline(name=name, steps=[_step(step, name) for step in spec["steps"]])
    if (given := spec.get("input")) is not None:
        message.input.CopyFrom(
            pb.PipelineInput(
                externalInputs=given.get("externalInputs"),
                externalTriggers=given.get("externalTriggers"),
                joinWindowMs=given.get("joinWindowMs"),
                joinType=_join(given.get("joinType")),
                triggersJoin=_join(given.get("triggersJoinType")),
                tensorMap=given.get("tensorMap"),
            )
        )
    if (ending := spec.get("output")) is not None:
        message.output.CopyFrom(
            pb.PipelineOutput(
                steps=ending.get("steps"),
                joinWindowMs=ending.get("joinWindowMs"),
                stepsJoin=_join(ending.get("stepsJoin")),
                tensorMap=ending.get("tensorMap"),
            )
        )
    return message


def pipeline_spec(name: str, state: PipelineState) -> dict[str, Any]:
    """The ``spec`` of a Pipeline that the scheduler has.

    Raises:
        InputError: it does not tell what the pipeline is, or that has settings that could not be restored.
    """
    told = state.definition
    if told is None:
        raise InputError(
            f"the scheduler does not tell what the pipeline {name} was loaded with, so that it could not be restored",
            hint="Use a Core 2 whose scheduler tells the definitions of its pipelines.",
        )
    spec: dict[str, Any] = {"steps": [_spec_of_step(step) for step in told.steps]}
    if told.HasField("input"):
        given = told.input
        spec["input"] = _known(
            externalInputs=list(given.externalInputs),
            externalTriggers=list(given.externalTriggers),
            joinWindowMs=given.joinWindowMs,
            joinType=_NAMES[given.joinType],
            triggersJoinType=_NAMES[given.triggersJoin],
            tensorMap=dict(given.tensorMap),
        )
    if told.HasField("output"):
        ending = told.output
        spec["output"] = _known(
            steps=list(ending.steps),
            joinWindowMs=ending.joinWindowMs,
            stepsJoin=_NAMES[ending.stepsJoin],
            tensorMap=dict(ending.tensorMap),
        )
    unknown = UnknownFieldSet(told)
    foreign = {unknown[number].field_number for number in range(len(unknown))} - _OF_CORE2
    if foreign or pipeline_message({"metadata": {"name": name}, "spec": spec}) != plain(told):
        raise InputError(
            f"the pipeline {name} has settings at the scheduler that burnish could not restore",
            hint="Load it with steps, input and output alone.",
        )
    return spec


def plain(told: pb.Pipeline) -> pb.Pipeline:
    """A definition without what Core 2 adds for itself."""
    own = pb.Pipeline()
    own.CopyFrom(told)
    own.DiscardUnknownFields()
    return own


def _step(step: Mapping[str, Any], pipeline: str) -> pb.PipelineStep:
    if unknown := sorted({key for key, value in step.items() if value is not None} - _STEP):
        raise InputError(f"step {step['name']!r} of the Pipeline {pipeline} has the unknown field {unknown[0]}")
    message = pb.PipelineStep(
        name=step["name"],
        inputs=step.get("inputs"),
        joinWindowMs=step.get("joinWindowMs"),
        tensorMap=step.get("tensorMap"),
        inputsJoin=_join(step.get("inputsJoinType")),
        triggers=step.get("triggers"),
        triggersJoin=_join(step.get("triggersJoinType")),
    )
    if (batch := step.get("batch")) is not None:
        message.batch.CopyFrom(pb.Batch(size=batch.get("size"), windowMs=batch.get("windowMs")))
    return message


def _spec_of_step(step: pb.PipelineStep) -> dict[str, Any]:
    batch = _known(size=step.batch.size, windowMs=step.batch.windowMs) if step.HasField("batch") else None
    return _known(
        name=step.name,
        inputs=list(step.inputs),
        inputsJoinType=_NAMES[step.inputsJoin],
        joinWindowMs=step.joinWindowMs,
        tensorMap=dict(step.tensorMap),
        triggers=list(step.triggers),
        triggersJoinType=_NAMES[step.triggersJoin],
        batch=batch,
    )


def _known(**fields: Any) -> dict[str, Any]:
    """The fields that are set; 0 is none, as on the wire."""
    return {key: value for key, value in fields.items() if value}


def _join(name: str | None) -> Any:
    return _JOINS[name or "inner"]
