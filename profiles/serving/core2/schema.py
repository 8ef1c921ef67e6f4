"""The custom resources of Seldon Core 2, as far as burnish writes them: nothing else gets through.

The API server prunes fields it does not know without a word, so a check has to be strict. Field names are the API's.
A field or kind that came after 2.6 says since when it is there.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.config import JsonDict

from profiles.serving.naming import CORE2_NAME, MAX_NAME
from registry.errors import InputError

Core2Version = Literal["2.6", "2.10"]
"""The releases that are told apart: the last under the Apache licence, and the last that was looked at."""
VERSIONS: tuple[Core2Version, ...] = get_args(Core2Version)
NEWEST: Core2Version = "2.10"
_SINCE: JsonDict = {"since": "2.10"}

MLOPS = "mlops.seldon.io/v1alpha1"
AUTOSCALING = "autoscaling/v2"

Name = Annotated[str, Field(pattern=f"^{CORE2_NAME}$", max_length=MAX_NAME)]
# A label's value, by the API conventions of Kubernetes.
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Count = Annotated[int, Field(ge=1)]
Percent = Annotated[int, Field(ge=0, le=100)]
Text = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Metadata(_Part):
    """Of any resource."""

    name: Name
    labels: dict[str, LabelValue] = {}


# --- Model -----------------------------------------------------------------------------------------------------


class Parameter(_Part):
    """What MLServer finds in ``parameters.extra``, always as text."""

    name: Text
    value: str


class Dataflow(_Part):
    """What becomes of a model's or pipeline's Kafka topics."""

    cleanTopicsOnDelete: bool


class ModelSpec(_Part):
    """Without ``dedicated``, ``preloaded`` and ``schemaUri``, which no code of Core 2 reads."""

    storageUri: Text
    artifactVersion: Count | None = None
    requirements: Annotated[list[Text], Field(min_length=1)]
    memory: Quantity | None = None
    server: Name | None = None
    replicas: Count
    minReplicas: Count | None = None
    maxReplicas: Count | None = None
    parameters: list[Parameter] = []
    secretName: Text | None = None
    dataflow: Annotated[Dataflow | None, Field(json_schema_extra=_SINCE)] = None

    @model_validator(mode="after")
    def _in_bounds(self) -> "ModelSpec":
        _check_bounds(self.replicas, self.minReplicas, self.maxReplicas)
        return self


class Model(_Part):
    """A model that is to be served."""

    apiVersion: Literal["mlops.seldon.io/v1alpha1"]
    kind: Literal["Model"]
    metadata: Metadata
    spec: ModelSpec


# --- Server and ServerConfig -----------------------------------------------------------------------------------


class EnvVar(_Part):
    """One variable of a container."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str


class Resources(_Part):
    """What a container is promised, and what it may not exceed."""

    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity] = {}
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity] = {}


class Container(_Part):
    """What a Server changes of a container of its ServerConfig."""

    name: Literal["mlserver", "triton", "agent"]
    image: Text | None = None
    env: list[EnvVar] = []
    resources: Resources | None = None


class Toleration(_Part):
    """A taint that the pods may be placed beside."""

    key: Text | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class PodSpec(_Part):
    """What a Server changes of the pods of its ServerConfig."""

    containers: Annotated[list[Container], Field(min_length=1)]
    nodeSelector: dict[Text, LabelValue] = {}
    tolerations: list[Toleration] = []


class ClaimRetention(_Part):
    """What becomes of the volumes of a Server's pods."""

    whenDeleted: Literal["Retain", "Delete"]
    whenScaled: Literal["Retain", "Delete"]


class ServerSpec(_Part):
    """Without ``imageOverrides``, which no code of Core 2 reads, and ``extraCapabilities``, which is deprecated."""

    serverConfig: Text
    capabilities: Annotated[list[Text], Field(min_length=1)]
    replicas: Count
    minReplicas: Count | None = None
    maxReplicas: Count | None = None
    podSpec: PodSpec
    statefulSetPersistentVolumeClaimRetentionPolicy: Annotated[
        ClaimRetention | None, Field(json_schema_extra=_SINCE)
    ] = None

    @model_validator(mode="after")
    def _in_bounds(self) -> "ServerSpec":
        _check_bounds(self.replicas, self.minReplicas, self.maxReplicas)
        return self


class Server(_Part):
    """A server that models are scheduled to."""

    apiVersion: Literal["mlops.seldon.io/v1alpha1"]
    kind: Literal["Server"]
    metadata: Metadata
    spec: ServerSpec


class ServerConfigSpec(_Part):
    """The pods themselves, as the cluster's own ServerConfig has them: their fields are Kubernetes' business."""

    podSpec: dict[str, Any]
    volumeClaimTemplates: list[dict[str, Any]]


class ServerConfig(_Part):
    """What the pods of Servers are made from."""

    apiVersion: Literal["mlops.seldon.io/v1alpha1"]
    kind: Literal["ServerConfig"]
    metadata: Metadata
    spec: ServerConfigSpec


# --- Experiment ------------------------------------------------------------------------------------------------


class Weighted(_Part):
    """A candidate of an experiment; its share is its weight over the sum of all."""

    name: Name
    weight: Annotated[int, Field(ge=0)]


class Mirror(_Part):
    """Who gets a copy of the requests, and whose answers nobody sees."""

    name: Name
    percent: Percent


class ExperimentSpec(_Part):
    """The traffic split."""

    default: Name | None = None
    candidates: Annotated[list[Weighted], Field(min_length=1)]
    mirror: Mirror | None = None
    resourceType: Literal["model", "pipeline"] = "model"

    @model_validator(mode="after")
    def _consistent(self) -> "ExperimentSpec":
        names = [candidate.name for candidate in self.candidates]
        everyone = [*names, *([self.mirror.name] if self.mirror else [])]
        if twice := sorted({name for name in everyone if everyone.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is named twice; a mirror is no candidate")
        if self.default is not None and self.default not in names:
            raise ValueError(f"the default {self.default!r} is none of the candidates: {', '.join(names)}")
        if not any(candidate.weight for candidate in self.candidates):
            raise ValueError("the weights are all 0")
        return self


class Experiment(_Part):
    """A weighted or mirrored experiment."""

    apiVersion: Literal["mlops.seldon.io/v1alpha1"]
    kind: Literal["Experiment"]
    metadata: Metadata
    spec: ExperimentSpec


# --- Pipeline --------------------------------------------------------------------------------------------------


class Step(_Part):
    """One model of a pipeline; its name is the model's."""

    name: Name
    inputs: list[Text] = []


class Output(_Part):
    """Whose answers are the pipeline's."""

    steps: Annotated[list[Text], Field(min_length=1)]


class PipelineSpec(_Part):
    """The steps."""

    steps: Annotated[list[Step], Field(min_length=1)]
    output: Output
    dataflow: Annotated[Dataflow | None, Field(json_schema_extra=_SINCE)] = None

    @model_validator(mode="after")
    def _known_outputs(self) -> "PipelineSpec":
        names = {step.name for step in self.steps}
        if unknown := sorted(name for name in self.output.steps if name.partition(".")[0] not in names):
            raise ValueError(f"the output {unknown[0]!r} is none of the steps: {', '.join(sorted(names))}")
        return self


class Pipeline(_Part):
    """Models joined by Kafka topics."""

    apiVersion: Literal["mlops.seldon.io/v1alpha1"]
    kind: Literal["Pipeline"]
    metadata: Metadata
    spec: PipelineSpec


# --- HorizontalPodAutoscaler -----------------------------------------------------------------------------------


class Reference(_Part):
    """A Model, by name."""

    apiVersion: Literal["mlops.seldon.io/v1alpha1"]
    kind: Literal["Model"]
    name: Name


class MetricName(_Part):
    """A metric that the cluster's metrics adapter serves."""

    name: Text


class MetricTarget(_Part):
    """How much of the metric one replica is to have."""

    type: Literal["AverageValue"]
    averageValue: Quantity


class ObjectMetric(_Part):
    """A metric of one Model."""

    metric: MetricName
    describedObject: Reference
    target: MetricTarget


class Metric(_Part):
    """What replicas are counted by."""

    type: Literal["Object"]
    object: ObjectMetric


class AutoscalerSpec(_Part):
    """How many replicas, by which metric."""

    scaleTargetRef: Reference
    minReplicas: Count
    maxReplicas: Count
    metrics: Annotated[list[Metric], Field(min_length=1)]

    @model_validator(mode="after")
    def _in_bounds(self) -> "AutoscalerSpec":
        _check_bounds(self.minReplicas, self.minReplicas, self.maxReplicas)
        return self


class HorizontalPodAutoscaler(_Part):
    """Kubernetes' own autoscaler on a Model. It needs the selector that Models' scale has since 2.10."""

    model_config = ConfigDict(json_schema_extra=_SINCE)

    apiVersion: Literal["autoscaling/v2"]
    kind: Literal["HorizontalPodAutoscaler"]
    metadata: Metadata
    spec: AutoscalerSpec


Resource = Annotated[
    Model | Server | ServerConfig | Experiment | Pipeline | HorizontalPodAutoscaler, Field(discriminator="kind")
]
_RESOURCE: TypeAdapter[Any] = TypeAdapter(Resource)


def check_manifest(manifest: Mapping[str, Any], version: Core2Version = NEWEST) -> None:
    """Returns when a manifest is one that this release of Core 2 takes whole.

    Raises:
        InputError: a field is unknown, missing, wrong, or younger than the release; the message names the first.
    """
    try:
        resource = _RESOURCE.validate_python(dict(manifest))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        message = f"{_title(manifest)}: {where}: {first['msg']}"
        raise InputError(message, hint=f"It was given {first['input']!r}."[:200]) from error
    if version != NEWEST and (younger := next(_younger(resource, ""), None)):
        raise InputError(
            f"{_title(manifest)}: {younger} came after Core 2 {version}",
            hint=f"Leave it out, or render for --core2-version {NEWEST}.",
        )


def _title(manifest: Mapping[str, Any]) -> str:
    metadata = manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{manifest.get('kind', 'a manifest without kind')} {name or ''}".rstrip()


def _younger(part: BaseModel, path: str) -> Iterator[str]:
    """Paths of fields that are set, and of kinds, that are not in the older release."""
    if isinstance(part.model_config.get("json_schema_extra"), dict):
        yield path or f"the kind {type(part).__name__}"
    for name in part.model_fields_set:
        value, extra = getattr(part, name), type(part).model_fields[name].json_schema_extra
        below = f"{path}.{name}".lstrip(".")
        if extra == _SINCE and value is not None:
            yield below
        if isinstance(value, BaseModel):
            yield from _younger(value, below)


def _check_bounds(replicas: int, least: int | None, most: int | None) -> None:
    if least is not None and replicas < least:
        raise ValueError(f"replicas {replicas} is below minReplicas {least}")
    if most is not None and replicas > most:
        raise ValueError(f"replicas {replicas} is above maxReplicas {most}")
