"""How Core 2's data plane is sized for pipelines, by the formulas of its documentation, and the patches that say so.

Sources: the pages "Core 2 configuration" and "Scalability of pipelines" of Seldon Core 2's documentation (2.10):

- ``maxShardCountMultiplier`` (M here) is at most the partitions of a topic; above that requests are dropped;
- replicas in use: dataflow engine ``min(asked, pipelines * M)``; model gateway
  ``min(asked, min(models, consumers) * M)``; pipeline gateway ``min(asked, min(pipelines, consumers) * M)``; 1 of each
  where there is nothing to do;
- for high rates pipeline gateway and dataflow engine have as many replicas as topics have partitions;
- first ``MODELGATEWAY_NUM_WORKERS`` (8) is raised, then ``MODELGATEWAY_MAX_NUM_CONSUMERS`` (100), with the pod's
  resources.

How many workers there have to be is Little's law (J. D. C. Little, "A Proof for the Queuing Formula: L = lambda W",
1961): a worker holds a request until its model has answered.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.pipelines.graph import WINDOW_MS, Pipeline
from profiles.serving.core2.schema import MLOPS, NEWEST, VERSIONS, Metadata, Text
from profiles.serving.naming import check_core2_name
from registry.errors import InputError

NUM_WORKERS = 8
MAX_NUM_CONSUMERS = 100
MOST_WORKERS = 64
MESSAGE_MAX_BYTES = 1_000_000_000
# Brokers take no larger messages unless they are told to.
BROKER_MAX_BYTES = 1_048_588
HEADROOM = 1.25
WINDOW_SHARE = 0.5

DATAFLOW, MODEL_GATEWAY, PIPELINE_GATEWAY = "seldon-dataflow-engine", "seldon-modelgateway", "seldon-pipelinegateway"
_CONTAINERS = {MODEL_GATEWAY: "modelgateway"}


# --- the formulas ----------------------------------------------------------------------------------------------


def replicas_in_use(asked: int, units: int, multiplier: int) -> int:
    """Replicas of a service that have something to do: of ``asked``, with so many pipelines, or models, to share.

    Args:
        asked: ``replicas`` of the SeldonRuntime.
        units: pipelines for dataflow engine and pipeline gateway, models for the model gateway; of gateways at most
            the number of consumers.
        multiplier: ``maxShardCountMultiplier``.

    Raises:
        InputError: a number is none of replicas.
    """
    if asked < 1 or units < 0 or multiplier < 1:
        raise InputError(f"{asked} replicas for {units} units at a multiplier of {multiplier} cannot be")
    return min(asked, units * multiplier) if units else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The data plane for some pipelines.

    Attributes:
        partitions: of every topic.
        multiplier: ``maxShardCountMultiplier``.
        replicas: service -> as many as are asked for; all have something to do.
        num_workers: ``MODELGATEWAY_NUM_WORKERS``.
        max_num_consumers: ``MODELGATEWAY_MAX_NUM_CONSUMERS``.
        warnings: what the documentation warns of.
    """

    partitions: int
    multiplier: int
    replicas: Mapping[str, int]
    num_workers: int
    max_num_consumers: int
    warnings: tuple[str, ...]


def size_core2(
    pipeline: Pipeline,
    *,
    rate_rps: float,
    latency_ms: Mapping[str, float],
    visits: Mapping[str, float],
    pipelines: int = 1,
    models: int | None = None,
    partitions: int | None = None,
    multiplier: int | None = None,
    asked: Mapping[str, int] | None = None,
    payload_bytes: Mapping[str, int] | None = None,
    most_workers: int = MOST_WORKERS,
) -> Sizing:
    """Partitions, replicas and workers for a rate.

    Args:
        pipeline: whose joins are looked at.
        rate_rps: requests a second.
        latency_ms: step -> how long a request to its model takes, a high percentile of it.
        visits: step -> messages a request.
        pipelines: on this Core 2, this one among them.
        models: the same; this pipeline's where not given.
        partitions: of the topics, where they are given; else as many as replicas are wanted.
        multiplier: ``maxShardCountMultiplier``, where it is given; else the partitions, as by default.
        asked: service -> replicas, where they are given.
        payload_bytes: topic, in words -> bytes of a message.
        most_workers: to how many workers one gateway goes before there are more gateways.

    Raises:
        InputError: a number cannot be.
    """
    models = len(pipeline.names) if models is None else models
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise InputError(f"a rate of {rate_rps} requests a second", hint="It is above 0.")
    for name, count in (("pipelines", pipelines), ("models", models), ("partitions", partitions or 1),
                        ("multiplier", multiplier or 1), ("workers", most_workers)):  # fmt: skip
        if count < 1:
            raise InputError(f"{count} {name} cannot be", hint="It is at least 1.")
    in_hand = max(rate_rps * visits[name] * latency_ms[name] / 1000 for name in pipeline.names) * HEADROOM
    workers = min(most_workers, max(NUM_WORKERS, math.ceil(in_hand)))
    gateways = max(1, math.ceil(in_hand / workers))
    partitions = gateways if partitions is None else partitions
    multiplier = partitions if multiplier is None else multiplier
    consumers = max(MAX_NUM_CONSUMERS, models)
    usable = min(multiplier, partitions)
    own = dict(asked or {})
    wanted = {
        DATAFLOW: own.get(DATAFLOW, partitions),
        MODEL_GATEWAY: own.get(MODEL_GATEWAY, gateways),
        PIPELINE_GATEWAY: own.get(PIPELINE_GATEWAY, partitions),
    }
    units = {DATAFLOW: pipelines, MODEL_GATEWAY: min(models, consumers), PIPELINE_GATEWAY: min(pipelines, consumers)}
    in_use = {name: replicas_in_use(count, units[name], usable) for name, count in wanted.items()}
    found = list(_warn_partitions(multiplier, partitions, gateways, wanted, in_use))
    found += _warn_joins(pipeline, latency_ms)
    found += _warn_payloads(payload_bytes or {})
    return Sizing(
        partitions=partitions,
        multiplier=multiplier,
        replicas=in_use,
        num_workers=workers,
        max_num_consumers=consumers,
        warnings=tuple(found),
    )


def _warn_partitions(
    multiplier: int, partitions: int, gateways: int, wanted: Mapping[str, int], in_use: Mapping[str, int]
) -> Iterator[str]:
    if multiplier > partitions:
        yield (
            f"maxShardCountMultiplier {multiplier} is above the {partitions} partitions of a topic: requests would be "
            f"dropped; set it to {partitions}, or have more partitions"
        )
    for name, count in wanted.items():
        if in_use[name] < count:
            yield f"of {count} replicas of {name} only {in_use[name]} would have anything to do"
    if gateways > in_use[MODEL_GATEWAY]:
        yield (
            f"the rate needs {gateways} model gateways, and {in_use[MODEL_GATEWAY]} can be used: have more "
            "partitions, or more workers in each"
        )
    if partitions > 1:
        yield (
            "a change of maxShardCountMultiplier takes about a minute and rebalances consumers; "
            "partition.assignment.strategy: cooperative-sticky keeps the others at work meanwhile"
        )


def _warn_joins(pipeline: Pipeline, latency_ms: Mapping[str, float]) -> Iterator[str]:
    gatherings = [(step.name, one) for step in pipeline.steps for one in (step.inputs, step.triggers) if one]
    gatherings += [("output", pipeline.output)] if pipeline.output else []
    total = sum(latency_ms.values())
    for name, gathering in gatherings:
        if len(gathering.sources) < 2 or gathering.join == "any":
            continue
        if total > WINDOW_SHARE * gathering.window_ms:
            yield (
                f"the join of {name} waits {gathering.window_ms:g} ms, and its sources may be {total:.4g} ms apart: "
                "what comes later is not joined; raise joinWindowMs"
            )
        if gathering.join == "outer":
            default = " (Core 2's own)" if gathering.window_ms == WINDOW_MS else ""
            yield (
                f"the outer join of {name} waits {gathering.window_ms:g} ms{default} for a source that does not come: "
                "requests then take at least as long; set joinWindowMs"
            )


def _warn_payloads(payload_bytes: Mapping[str, int]) -> Iterator[str]:
    for topic, size in payload_bytes.items():
        if size > MESSAGE_MAX_BYTES:
            yield f"a message of {topic} has {size:,} bytes, and Core 2 takes {MESSAGE_MAX_BYTES:,} at most"
        elif size > BROKER_MAX_BYTES:
            yield (
                f"a message of {topic} has {size:,} bytes, and Kafka's brokers take {BROKER_MAX_BYTES:,} unless told "
                "otherwise: raise message.max.bytes there, or send less"
            )


# --- the patches -----------------------------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Count = Annotated[int, Field(ge=1)]


class PipelinesScaling(_Part):
    """``scalingConfig.pipelines``."""

    maxShardCountMultiplier: Count


class ScalingConfig(_Part):
    """``scalingConfig`` of a SeldonConfig, since 2.10."""

    pipelines: PipelinesScaling


class Topics(_Part):
    """``kafkaConfig.topics``."""

    numPartitions: Count
    replicationFactor: Count | None = None


class KafkaConfig(_Part):
    """What is changed of ``kafkaConfig``."""

    topics: Topics
    consumer: dict[Text, str] = {}


class Config(_Part):
    """What is changed of a SeldonConfig's ``config``."""

    kafkaConfig: KafkaConfig
    scalingConfig: ScalingConfig | None = None


class ConfigSpec(_Part):
    """``spec`` of the patch."""

    config: Config


class SeldonConfigPatch(_Part):
    """A SeldonConfig with only what is changed."""

    apiVersion: Literal["mlops.seldon.io/v1alpha1"]
    kind: Literal["SeldonConfig"]
    metadata: Metadata
    spec: ConfigSpec


class Variable(_Part):
    """One environment variable."""

    name: Literal["MODELGATEWAY_NUM_WORKERS", "MODELGATEWAY_MAX_NUM_CONSUMERS"]
    value: Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]


class GatewayContainer(_Part):
    """The model gateway's container."""

    name: Literal["modelgateway"]
    env: Annotated[list[Variable], Field(min_length=1)]


class GatewayPod(_Part):
    """What is changed of its pods."""

    containers: Annotated[list[GatewayContainer], Field(min_length=1)]


class Override(_Part):
    """One of a SeldonRuntime's ``overrides``."""

    name: Literal["seldon-dataflow-engine", "seldon-modelgateway", "seldon-pipelinegateway"]
    replicas: Count
    podSpec: GatewayPod | None = None


class RuntimeSpec(_Part):
    """``spec`` of the patch."""

    seldonConfig: Text
    overrides: Annotated[list[Override], Field(min_length=1)]


class SeldonRuntimePatch(_Part):
    """A SeldonRuntime with only what is changed."""

    apiVersion: Literal["mlops.seldon.io/v1alpha1"]
    kind: Literal["SeldonRuntime"]
    metadata: Metadata
    spec: RuntimeSpec


def render_config(sizing: Sizing, *, name: str = "default", version: str = NEWEST) -> dict[str, Any]:
    """The patch of a SeldonConfig, for ``kubectl patch --type merge``.

    Raises:
        InputError: the name is none, the multiplier is above the partitions, or the release has no such field.
    """
    check_core2_name(name, "SeldonConfig")
    _check_version(version)
    if sizing.multiplier > sizing.partitions:
        raise InputError(
            f"maxShardCountMultiplier {sizing.multiplier} is above the {sizing.partitions} partitions: Core 2 "
            "would drop requests",
            hint=f"Take at most {sizing.partitions}, or more partitions.",
        )
    config: dict[str, Any] = {"kafkaConfig": {"topics": {"numPartitions": sizing.partitions}}}
    if sizing.partitions > 1:
        config["kafkaConfig"]["consumer"] = {"partition.assignment.strategy": "cooperative-sticky"}
    if version == NEWEST:
        config["scalingConfig"] = {"pipelines": {"maxShardCountMultiplier": sizing.multiplier}}
    elif sizing.multiplier > 1:
        raise InputError(
            f"scalingConfig.pipelines.maxShardCountMultiplier came after Core 2 {version}",
            hint=f"Take a multiplier of 1, or render for --core2-version {NEWEST}.",
        )
    manifest = {"apiVersion": MLOPS, "kind": "SeldonConfig", "metadata": {"name": name}, "spec": {"config": config}}
    return _checked(SeldonConfigPatch, manifest)


def render_runtime(
    sizing: Sizing, *, name: str = "seldon", config: str = "default", version: str = NEWEST
) -> dict[str, Any]:
    """The patch of a SeldonRuntime.

    ``overrides`` is a list, which a merge patch replaces whole: keep what yours has of other services.

    Raises:
        InputError: a name is none, or the release has no such field.
    """
    check_core2_name(name, "SeldonRuntime")
    _check_version(version)
    usual = sizing.num_workers == NUM_WORKERS and sizing.max_num_consumers == MAX_NUM_CONSUMERS
    if version != NEWEST and not usual:
        raise InputError(
            f"overrides.podSpec came after Core 2 {version}, and the model gateway needs {sizing.num_workers} workers",
            hint=f"Set MODELGATEWAY_NUM_WORKERS in the SeldonConfig's component {MODEL_GATEWAY}, or size for fewer.",
        )
    overrides = []
    for service, count in sizing.replicas.items():
        override: dict[str, Any] = {"name": service, "replicas": count}
        if service == MODEL_GATEWAY and version == NEWEST:
            env = [
                {"name": "MODELGATEWAY_NUM_WORKERS", "value": str(sizing.num_workers)},
                {"name": "MODELGATEWAY_MAX_NUM_CONSUMERS", "value": str(sizing.max_num_consumers)},
            ]
            override["podSpec"] = {"containers": [{"name": _CONTAINERS[service], "env": env}]}
        overrides.append(override)
    spec = {"seldonConfig": config, "overrides": overrides}
    manifest = {"apiVersion": MLOPS, "kind": "SeldonRuntime", "metadata": {"name": name}, "spec": spec}
    return _checked(SeldonRuntimePatch, manifest)


def _check_version(version: str) -> None:
    if version not in VERSIONS:
        raise InputError(f"nothing is known of Core 2 {version!r}", hint=f"It is {' or '.join(VERSIONS)}.")


def _checked(model: type[BaseModel], manifest: dict[str, Any]) -> dict[str, Any]:
    try:
        model.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{manifest['kind']}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return manifest
