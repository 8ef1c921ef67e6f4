"""What the scheduler of Core 2 is told and tells, as records, and as the messages that travel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.serving.naming import check_core2_name
from registry.errors import InputError

AVAILABLE = "ModelAvailable"
TERMINATED = "ModelTerminated"
GOING = frozenset({"ModelTerminating", "ModelTerminate"})
"""States of a model that is being unloaded."""
# A failed model that is unloaded may keep the name of its failure for its last state.
GONE = frozenset({TERMINATED, "ModelFailed", "ScheduleFailed", "ModelStateUnknown"})
"""States in which a model that was unloaded takes nothing any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Core2Model:
    """A model as Core 2 is told of it.

    Attributes:
        name: small letters, digits and ``-``.
        uri: where rclone finds its folder.
        requirements: capabilities that its server must have, all of them.
        memory_bytes: what the scheduler sets aside for one instance; None always fits.
        server: the one server it may be on; None leaves that to the scheduler.
        parameters: become ``parameters.extra`` of MLServer's model-settings.json; Triton gets none.
        replicas: how many; at least 1, since over this protocol 0 means scaled down.
        min_replicas: fewest that it may be scaled to, or be scheduled with where there is no room for all.
        max_replicas: most that it may be scaled to.
        artifact_version: the numbered folder below ``uri`` to take; None for the highest.
        secret_name: of a Kubernetes secret with the rclone remote.
        rclone_config: an rclone remote as JSON, in place of a secret; may hold credentials, so it is never shown.
    """

    name: str
    uri: str
    requirements: tuple[str, ...]
    memory_bytes: int | None = None
    server: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    artifact_version: int | None = None
    secret_name: str | None = None
    rclone_config: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One version of a model, as the scheduler sees it.

    Attributes:
        version: 1 for the first; a change of anything but the replicas makes the next.
        state: Core 2's name of it (``ModelAvailable``, ``ScheduleFailed``, ...).
        reason: why, where it failed; the server's own words.
        server: the server it is on; empty where it is on none.
        available_replicas: how many answer.
        changed_ns: when a replica's state changed last, in ns since 1970; 0 where the scheduler does not say.
        parameters: what it was loaded with; None where the scheduler does not say.
        definition: the whole of that; None where the scheduler does not say.
        deployment: how many replicas were asked for; None where the scheduler does not say.
    """

    version: int
    state: str
    reason: str
    server: str
    available_replicas: int
    parameters: Mapping[str, str] | None
    definition: pb.ModelSpec | None = field(default=None, repr=False)
    deployment: pb.DeploymentSpec | None = field(default=None, repr=False)
    changed_ns: int = 0

    @property
    def live(self) -> bool:
        """Whether it holds its name: it is there, on its way, or failed and not unloaded."""
        return self.state != TERMINATED


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """A model that the scheduler has taken, and what was there under its name before."""

    model: Core2Model
    before: ModelVersion | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReplica:
    """Memory of one replica of a server, in bytes, and how many models it holds."""

    index: int
    total_bytes: int
    available_bytes: int
    models: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """A server of Core 2. The scheduler does not tell its capabilities.

    Attributes:
        name: its name.
        expected_replicas: how many there should be; -1 where nobody said (outside of Kubernetes).
        available_replicas: how many are connected.
        replicas: the memory of each.
    """

    name: str
    expected_replicas: int
    available_replicas: int
    replicas: tuple[ServerReplica, ...]

    @property
    def free_bytes(self) -> int:
        """The most that one replica has left."""
        return max((replica.available_bytes for replica in self.replicas), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A split of traffic.

    Attributes:
        name: its name; requests reach it as ``<name>.experiment``.
        weights: candidate -> share of the traffic, by weight over the sum of weights.
        default: the candidate whose own endpoint is split; None for none.
        mirror: (name, percent) of what gets copies of requests, and whose answers nobody sees; None for none.
        resource: whether the candidates are models or pipelines.
        sticky: whether a caller can keep to one candidate by sending the route back.
    """

    name: str
    weights: Mapping[str, int]
    default: str | None = None
    mirror: tuple[str, int] | None = None
    resource: Literal["model", "pipeline"] = "model"
    sticky: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentState:
    """Whether an experiment splits traffic, and the scheduler's words on it."""

    active: bool
    candidates_ready: bool
    mirror_ready: bool
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineState:
    """The newest version of a pipeline.

    Attributes:
        version: 1 for the first; each load makes the next.
        state: Core 2's name of it.
        reason: why, where it failed.
        models_ready: whether its models are there.
        definition: what it was loaded with; None where the scheduler does not say.
    """

    version: int
    state: str
    reason: str
    models_ready: bool
    definition: pb.Pipeline | None = field(default=None, repr=False)

    @property
    def live(self) -> bool:
        """Whether it holds its name: it is there, on its way, or failed and not unloaded."""
        return self.state != "PipelineTerminated"

    @property
    def steps(self) -> tuple[str, ...]:
        """Its models, as far as the scheduler says."""
        return () if self.definition is None else tuple(step.name for step in self.definition.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingPipeline:
    """A pipeline that the scheduler has taken, and what was there under its name before."""

    name: str
    before: PipelineState | None


# --- records <-> messages ------------------------------------------------------------------------------------------


def check_model(model: Core2Model) -> None:
    """Returns where a model can be asked for.

    Raises:
        InputError: its name or its replicas cannot be, or its storage is told twice.
    """
    check_core2_name(model.name, "model")
    low, high = model.min_replicas or 0, model.max_replicas
    if model.replicas < max(1, low) or (high is not None and model.replicas > high):
        raise InputError(
            f"{model.name} asks for {model.replicas} replicas, with at least {max(1, low)} and at most {high}",
            hint="The number of replicas is 1 or more, and between the two.",
        )
    if model.secret_name is not None and model.rclone_config is not None:
        raise InputError(f"{model.name} has a secret and an rclone configuration, and Core 2 takes one of them")


def model_message(model: Core2Model) -> pb.Model:
    """The message of a model."""
    spec = pb.ModelSpec(
        uri=model.uri,
        artifactVersion=model.artifact_version,
        requirements=model.requirements,
        memoryBytes=model.memory_bytes,
        server=model.server,
        parameters=[pb.ParameterSpec(name=name, value=value) for name, value in model.parameters.items()],
    )
    if model.secret_name is not None:
        spec.storageConfig.storageSecretName = model.secret_name
    if model.rclone_config is not None:
        spec.storageConfig.storageRcloneConfig = model.rclone_config
    deployment = pb.DeploymentSpec(
        replicas=model.replicas, minReplicas=model.min_replicas, maxReplicas=model.max_replicas
    )
    return pb.Model(meta=pb.MetaData(name=model.name), modelSpec=spec, deploymentSpec=deployment)


def model_version(status: pb.ModelVersionStatus) -> ModelVersion:
    """The record of a version."""
    spec = None
    if status.HasField("modelDefn") and status.modelDefn.HasField("modelSpec"):
        spec = status.modelDefn.modelSpec
        # What Core 2 adds for itself would make it unlike what was asked for.
        spec.DiscardUnknownFields()
    reasons = [replica.reason for replica in status.modelReplicaState.values() if replica.reason]
    return ModelVersion(
        version=status.version,
        state=_name_of(pb.ModelStatus.ModelState, status.state.state),
        reason=status.state.reason or "; ".join(dict.fromkeys(reasons)),
        server=status.serverName,
        available_replicas=status.state.availableReplicas,
        changed_ns=status.state.lastChangeTimestamp.ToNanoseconds(),
        parameters=None if spec is None else {one.name: one.value for one in spec.parameters},
        definition=spec,
        deployment=None if spec is None else status.modelDefn.deploymentSpec,
    )


def server_state(status: pb.ServerStatusResponse) -> ServerState:
    """The record of a server."""
    return ServerState(
        name=status.serverName,
        expected_replicas=status.expectedReplicas,
        available_replicas=status.availableReplicas,
        replicas=tuple(
            ServerReplica(
                index=one.replicaIdx,
                total_bytes=one.totalMemoryBytes,
                available_bytes=one.availableMemoryBytes,
                models=one.numLoadedModels,
            )
            for one in status.resources
        ),
    )


def check_experiment(experiment: Experiment) -> None:
    """Returns where an experiment can be asked for.

    Raises:
        InputError: it has no candidate, or a default, mirror, weight or percentage that does not fit.
    """
    if not experiment.weights:
        raise InputError(f"the experiment {experiment.name} has no candidate")
    if experiment.default is not None and experiment.default not in experiment.weights:
        raise InputError(f"the default {experiment.default} of the experiment {experiment.name} is no candidate of it")
    if experiment.mirror is not None and experiment.mirror[0] in experiment.weights:
        raise InputError(f"the mirror {experiment.mirror[0]} of the experiment {experiment.name} is a candidate of it")
    if min(experiment.weights.values()) < 0 or sum(experiment.weights.values()) == 0:
        raise InputError(f"the weights of the experiment {experiment.name} are 0 or more, and not all 0")
    if experiment.mirror is not None and not 0 < experiment.mirror[1] <= 100:
        raise InputError(f"the experiment {experiment.name} mirrors {experiment.mirror[1]} %, and not 1 to 100")


def experiment_message(experiment: Experiment) -> pb.Experiment:
    """The message of an experiment."""
    message = pb.Experiment(
        name=experiment.name,
        default=experiment.default,
        candidates=[pb.ExperimentCandidate(name=name, weight=weight) for name, weight in experiment.weights.items()],
        resourceType=pb.PIPELINE if experiment.resource == "pipeline" else pb.MODEL,
    )
    if experiment.mirror is not None:
        name, percent = experiment.mirror
        message.mirror.CopyFrom(pb.ExperimentMirror(name=name, percent=percent))
    if experiment.sticky:
        message.config.stickySessions = True
    return message


def experiment_state(status: pb.ExperimentStatusResponse) -> ExperimentState:
    """The record of an experiment."""
    return ExperimentState(
        active=status.active,
        candidates_ready=status.candidatesReady,
        mirror_ready=status.mirrorReady,
        description=status.statusDescription,
    )


def pipeline_state(status: pb.PipelineWithState) -> PipelineState:
    """The record of a pipeline's version."""
    state = status.state
    return PipelineState(
        version=state.pipelineVersion,
        state=_name_of(pb.PipelineVersionState.PipelineStatus, state.status),
        reason=state.reason,
        models_ready=state.modelsReady,
        definition=status.pipeline if status.HasField("pipeline") else None,
    )


def _name_of(names: Any, number: int) -> str:
    """Core 2's name of a state; a newer Core 2 may have states that have no name here."""
    return str(names.Name(number)) if number in names.values() else f"state {number}"
