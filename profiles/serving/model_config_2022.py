"""Triton's model configuration as it was in release 22.01, which is what a Core 2 agent reads ``config.pbtxt`` with.

tritonclient carries the schema of today. Fields and enum values are only ever added to it, with numbers above those
there are, so the older schema is the newer one up to the highest number that each message and enum had.

Source: ``protobuf/model_config.proto`` of triton-inference-server/common, branch r22.01.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

HIGHEST_FIELD = {
    "ModelRateLimiter": 2, "ModelRateLimiter.Resource": 3, "ModelInstanceGroup": 9,
    "ModelInstanceGroup.SecondaryDevice": 2, "ModelTensorReshape": 1, "ModelInput": 8, "ModelOutput": 6,
    "BatchInput": 4, "BatchOutput": 3, "ModelVersionPolicy": 3, "ModelVersionPolicy.Latest": 1,
    "ModelVersionPolicy.All": 0, "ModelVersionPolicy.Specific": 1, "ModelOptimizationPolicy": 8,
    "ModelOptimizationPolicy.Graph": 1, "ModelOptimizationPolicy.Cuda": 4,
    "ModelOptimizationPolicy.Cuda.GraphSpec": 3, "ModelOptimizationPolicy.Cuda.GraphSpec.Shape": 1,
    "ModelOptimizationPolicy.Cuda.GraphSpec.LowerBound": 2, "ModelOptimizationPolicy.ExecutionAccelerators": 2,
    "ModelOptimizationPolicy.ExecutionAccelerators.Accelerator": 2, "ModelOptimizationPolicy.PinnedMemoryBuffer": 1,
    "ModelQueuePolicy": 4, "ModelDynamicBatching": 7, "ModelSequenceBatching": 5, "ModelSequenceBatching.Control": 5,
    "ModelSequenceBatching.ControlInput": 2, "ModelSequenceBatching.InitialState": 5,
    "ModelSequenceBatching.State": 5, "ModelSequenceBatching.StrategyDirect": 2,
    "ModelSequenceBatching.StrategyOldest": 3, "ModelEnsembling": 1, "ModelEnsembling.Step": 4, "ModelParameter": 1,
    "ModelWarmup": 3, "ModelWarmup.Input": 5, "ModelOperations": 1, "ModelTransactionPolicy": 1,
    "ModelRepositoryAgents": 1, "ModelRepositoryAgents.Agent": 2, "ModelResponseCache": 1, "ModelConfig": 24,
}  # fmt: skip
"""Message -> the highest number among its fields then. A message that is not here did not exist."""

HIGHEST_VALUE = {
    "DataType": 13, "ModelInstanceGroup.Kind": 3, "ModelInstanceGroup.SecondaryDevice.SecondaryDeviceKind": 0,
    "ModelInput.Format": 2, "BatchInput.Kind": 3, "BatchOutput.Kind": 0,
    "ModelOptimizationPolicy.ModelPriority": 2, "ModelQueuePolicy.TimeoutAction": 1,
    "ModelSequenceBatching.Control.Kind": 3,
}  # fmt: skip
"""Enum -> the highest number among its values then."""


class ConfigError(ValueError):
    """A schema cannot read a configuration; the message is one line, and begins with line and column."""


def parse(text: str) -> Any:
    """The configuration as a message of the older schema.

    Raises:
        ConfigError: the text is malformed, or names a field or value that the older schema lacks.
    """
    return _parsed(text, _older_class()())


def unknown_then(text: str) -> list[tuple[str, str]]:
    """What of a configuration the older schema lacks: the path of each field, and its value where that is an enum's.

    Raises:
        ConfigError: today's schema cannot read the text either.
    """
    from tritonclient.grpc import model_config_pb2

    today = _parsed(text, model_config_pb2.ModelConfig())
    return list(_walk(today, _older_class().DESCRIPTOR, ""))


def _parsed(text: str, message: Any) -> Any:
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, message)
    except text_format.ParseError as error:
        place = f"{error.GetLine()}:{error.GetColumn()}: " if error.GetLine() else ""
        # The library puts the place and the whole line of text before its reason.
        reason = str(error).rpartition("': ")[2].splitlines()[0]
        raise ConfigError(f"{place}{reason}") from error


def _walk(message: Any, older: Any, path: str) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        here = f"{path}{field.name}"
        known = older.fields_by_name.get(field.name)
        if known is None:
            yield here, ""
            continue
        for at, item in _items(field, value, here):
            if field.enum_type is not None and item not in known.enum_type.values_by_number:
                yield at, field.enum_type.values_by_number[item].name
            elif field.message_type is not None and not isinstance(item, (str, bytes, int, float)):
                inner = known.message_type
                if inner.GetOptions().map_entry:
                    inner = inner.fields_by_name["value"].message_type
                if inner is not None:
                    yield from _walk(item, inner, f"{at}.")


def _items(field: Any, value: Any, here: str) -> Iterator[tuple[str, Any]]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        yield from ((f"{here}[{key!r}]", value[key]) for key in value)
    elif field.is_repeated:
        yield from ((f"{here}[{index}]", item) for index, item in enumerate(value))
    else:
        yield here, value


@cache
def _older_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from tritonclient.grpc import model_config_pb2

    schema = descriptor_pb2.FileDescriptorProto()
    model_config_pb2.DESCRIPTOR.CopyToProto(schema)
    schema.name = "model_config_2022.proto"
    _keep(schema.message_type, [message for message in schema.message_type if message.name in HIGHEST_FIELD])
    for message in schema.message_type:
        _prune(message, message.name)
    for enum in schema.enum_type:
        _prune_enum(enum, enum.name)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(schema.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{schema.package}.ModelConfig"))


def _prune(message: Any, name: str) -> None:
    highest = HIGHEST_FIELD[name]
    _keep(message.field, [field for field in message.field if field.number <= highest])
    # The entries of a map are messages too, that the compiler makes: a key and a value.
    nested = [(inner, f"{name}.{inner.name}") for inner in message.nested_type if not inner.options.map_entry]
    _keep(
        message.nested_type,
        [inner for inner in message.nested_type if inner.options.map_entry or f"{name}.{inner.name}" in HIGHEST_FIELD],
    )
    for inner, path in nested:
        if path in HIGHEST_FIELD:
            _prune(next(kept for kept in message.nested_type if kept.name == inner.name), path)
    for enum in message.enum_type:
        _prune_enum(enum, f"{name}.{enum.name}")


def _prune_enum(enum: Any, name: str) -> None:
    _keep(enum.value, [value for value in enum.value if value.number <= HIGHEST_VALUE[name]])


def _keep(field: Any, kept: list[Any]) -> None:
    copies = [type(item).FromString(item.SerializeToString()) for item in kept]
    del field[:]
    field.extend(copies)
