"""The messages of Core 2's scheduler, as they are on the wire."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.deploy.core2_messages import (
    Core2Model,
    Experiment,
    ModelVersion,
    check_experiment,
    check_model,
    experiment_message,
    model_message,
    model_version,
    pipeline_state,
    server_state,
)
from registry.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
WIRE = ROOT / "../shared/wire/scheduler.json"
PROTO = ROOT / "profiles" / "deploy" / "core2_scheduler.proto"

needs_wire = pytest.mark.skipif(not WIRE.exists(), reason="the recorded messages are not here")


def recorded() -> list[Any]:
    messages = json.loads(WIRE.read_text())["messages"] if WIRE.exists() else []
    return [pytest.param(one, id=f"{n}-{one['message'].rpartition('.')[2]}") for n, one in enumerate(messages)]


def kind_of(record: dict[str, Any]) -> Any:
    return getattr(pb, record["message"].removeprefix("seldon.mlops.scheduler."))


def on_wire(message: Any) -> str:
    return message.SerializeToString(deterministic=True).hex()


@needs_wire
@pytest.mark.parametrize("record", recorded())
def test_messages_are_encoded_and_decoded_as_recorded(record: dict[str, Any]) -> None:
    kind = kind_of(record)
    assert on_wire(json_format.ParseDict(record["fields"], kind())) == record["hex"]
    decoded = kind.FromString(bytes.fromhex(record["hex"]))
    assert json_format.ParseDict(json_format.MessageToDict(decoded), kind()) == json_format.ParseDict(
        record["fields"], kind()
    )


def bytes_of(kind: str, number: int = 0) -> str:
    found = [one["hex"] for one in json.loads(WIRE.read_text())["messages"] if one["message"].endswith(f".{kind}")]
    return found[number]


@needs_wire
def test_a_model_is_asked_for_in_these_bytes() -> None:
    model = Core2Model(
        name="digits-int8",
        uri="s3://models/digits/3fa9c1",
        requirements=("onnx-mlserver",),
        memory_bytes=100 * 1024**2,
        parameters={"max_batch_size": "8", "max_batch_time": "0.005"},
        min_replicas=1,
        max_replicas=2,
    )
    assert on_wire(pb.LoadModelRequest(model=model_message(model))) == bytes_of("LoadModelRequest")


@needs_wire
def test_a_model_with_a_remote_of_its_own_is_asked_for_in_these_bytes() -> None:
    model = Core2Model(
        name="m",
        uri="/mnt/models/m",
        requirements=("onnx",),
        artifact_version=2,
        server="triton-bench",
        rclone_config='{"type":"s3","name":"s3","parameters":{}}',
    )
    assert on_wire(pb.LoadModelRequest(model=model_message(model))) == bytes_of("LoadModelRequest", 1)


@needs_wire
@pytest.mark.parametrize(
    ("number", "experiment"),
    [
        (0, Experiment(name="digits-promote", default="digits", weights={"digits": 90, "digits-int8": 10})),
        (
            1,
            Experiment(
                name="digits-shadow",
                default="digits",
                weights={"digits": 100},
                mirror=("digits-int8", 100),
                sticky=True,
            ),
        ),
        (2, Experiment(name="p-promote", default="p1", weights={"p1": 50, "p2": 50}, resource="pipeline")),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_experiments_are_asked_for_in_these_bytes(number: int, experiment: Experiment) -> None:
    request = pb.StartExperimentRequest(experiment=experiment_message(experiment))
    assert on_wire(request) == bytes_of("StartExperimentRequest", number)


def status(number: int) -> ModelVersion:
    answer = pb.ModelStatusResponse.FromString(bytes.fromhex(bytes_of("ModelStatusResponse", number)))
    return model_version(answer.versions[0])


@needs_wire
def test_an_available_model_is_read() -> None:
    found = status(0)
    assert (found.version, found.state, found.server, found.available_replicas) == (
        1,
        "ModelAvailable",
        "mlserver-onnx",
        1,
    )
    assert found.parameters is None


@needs_wire
def test_the_reasons_of_failures_are_read() -> None:
    failed, unscheduled = status(1), status(2)
    assert (failed.state, failed.reason) == ("ModelFailed", "rpc error: code = Internal desc = invalid graph")
    assert unscheduled.state == "ScheduleFailed"
    assert unscheduled.reason.startswith("Failed to schedule model as no matching server")


@needs_wire
def test_the_memory_of_a_server_is_read() -> None:
    found = server_state(pb.ServerStatusResponse.FromString(bytes.fromhex(bytes_of("ServerStatusResponse"))))
    assert (found.name, found.free_bytes, found.available_replicas) == ("mlserver-onnx", 7_900_000_000, 1)
    assert found.replicas[0].total_bytes == 8_000_000_000


def test_the_reason_of_a_replica_stands_in_where_the_model_has_none() -> None:
    answer = pb.ModelVersionStatus(version=1)
    for index in (0, 1):
        answer.modelReplicaState[index].reason = "no such file"
    assert model_version(answer).reason == "no such file"


def test_what_core_2_adds_to_a_definition_does_not_make_it_another() -> None:
    model = Core2Model(name="m", uri="/m", requirements=("mlserver",))
    message = model_message(model)
    # Field 9 of the model's specification: what a newer Core 2 knows of the runtime.
    message.modelSpec.MergeFromString(bytes.fromhex("4a020801"))
    answer = pb.ModelVersionStatus(version=1, modelDefn=message)
    assert answer.modelDefn.modelSpec != model_message(model).modelSpec
    assert model_version(answer).definition == model_message(model).modelSpec


def test_states_of_a_newer_core_2_are_shown_by_number() -> None:
    # ModelVersionStatus.state = 6, a message whose field 1 is the state.
    assert model_version(pb.ModelVersionStatus.FromString(bytes.fromhex("320208 2a"))).state == "state 42"
    newer = pb.PipelineWithState()
    newer.state.MergeFromString(bytes.fromhex("102a"))
    assert pipeline_state(newer).state == "state 42"


def test_credentials_of_a_remote_are_never_shown() -> None:
    model = Core2Model(name="m", uri="s3://m", requirements=(), rclone_config='{"secret_access_key": "hush"}')
    found = model_version(pb.ModelVersionStatus(version=1, modelDefn=model_message(model)))
    assert "hush" not in repr(model)
    assert "hush" not in repr(found)


@pytest.mark.parametrize("name", ["Digits", "digits_int8", "digits.int8", "-digits", "digits-", "", "digits\n"])
def test_names_that_core_2_refuses_are_refused_before(name: str) -> None:
    with pytest.raises(InputError, match="takes no model named"):
        check_model(Core2Model(name=name, uri="/m", requirements=()))


@pytest.mark.parametrize(
    "changes",
    [
        {"replicas": 0},
        {"replicas": 1, "min_replicas": 2},
        {"replicas": 3, "max_replicas": 2},
        {"secret_name": "s", "rclone_config": "{}"},
    ],
)
def test_models_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        check_model(Core2Model(name="m", uri="/m", requirements=(), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {}},
        {"weights": {"a": 1}, "default": "b"},
        {"weights": {"a": 1}, "mirror": ("a", 10)},
        {"weights": {"a": 1}, "mirror": ("b", 0)},
        {"weights": {"a": 1}, "mirror": ("b", 101)},
        {"weights": {"a": 0, "b": 0}},
        {"weights": {"a": -1, "b": 2}},
    ],
)
def test_experiments_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="experiment x"):
        check_experiment(Experiment(name="x", **changes))


def test_the_generated_module_is_that_of_the_proto_file() -> None:
    text = re.sub(r"//.*", "", PROTO.read_text())
    written = {
        (name, field, int(number))
        for name, body in re.findall(r"message (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}", text)
        for field, number in re.findall(r"(\w+) = (\d+);", re.sub(r"enum \w+ \{[^{}]*\}", "", body))
    }
    generated = {
        (message.name, field.name, field.number)
        for message in pb.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
    }
    assert written == generated
    assert len(generated) > 80
