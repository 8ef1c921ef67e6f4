import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ResourceType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL: _ClassVar[ResourceType]
    PIPELINE: _ClassVar[ResourceType]

class JoinOp(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INNER: _ClassVar[JoinOp]
    OUTER: _ClassVar[JoinOp]
    ANY: _ClassVar[JoinOp]
MODEL: ResourceType
PIPELINE: ResourceType
INNER: JoinOp
OUTER: JoinOp
ANY: JoinOp

class Model(_message.Message):
    __slots__ = ("meta", "modelSpec", "deploymentSpec")
    META_FIELD_NUMBER: _ClassVar[int]
    MODELSPEC_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTSPEC_FIELD_NUMBER: _ClassVar[int]
    meta: MetaData
    modelSpec: ModelSpec
    deploymentSpec: DeploymentSpec
    def __init__(self, meta: _Optional[_Union[MetaData, _Mapping]] = ..., modelSpec: _Optional[_Union[ModelSpec, _Mapping]] = ..., deploymentSpec: _Optional[_Union[DeploymentSpec, _Mapping]] = ...) -> None: ...

class MetaData(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ModelSpec(_message.Message):
    __slots__ = ("uri", "artifactVersion", "storageConfig", "requirements", "memoryBytes", "server", "parameters")
    URI_FIELD_NUMBER: _ClassVar[int]
    ARTIFACTVERSION_FIELD_NUMBER: _ClassVar[int]
    STORAGECONFIG_FIELD_NUMBER: _ClassVar[int]
    REQUIREMENTS_FIELD_NUMBER: _ClassVar[int]
    MEMORYBYTES_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    uri: str
    artifactVersion: int
    storageConfig: StorageConfig
    requirements: _containers.RepeatedScalarFieldContainer[str]
    memoryBytes: int
    server: str
    parameters: _containers.RepeatedCompositeFieldContainer[ParameterSpec]
    def __init__(self, uri: _Optional[str] = ..., artifactVersion: _Optional[int] = ..., storageConfig: _Optional[_Union[StorageConfig, _Mapping]] = ..., requirements: _Optional[_Iterable[str]] = ..., memoryBytes: _Optional[int] = ..., server: _Optional[str] = ..., parameters: _Optional[_Iterable[_Union[ParameterSpec, _Mapping]]] = ...) -> None: ...

class StorageConfig(_message.Message):
    __slots__ = ("storageSecretName", "storageRcloneConfig")
    STORAGESECRETNAME_FIELD_NUMBER: _ClassVar[int]
    STORAGERCLONECONFIG_FIELD_NUMBER: _ClassVar[int]
    storageSecretName: str
    storageRcloneConfig: str
    def __init__(self, storageSecretName: _Optional[str] = ..., storageRcloneConfig: _Optional[str] = ...) -> None: ...

class ParameterSpec(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class DeploymentSpec(_message.Message):
    __slots__ = ("replicas", "minReplicas", "maxReplicas", "logPayloads")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MINREPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAXREPLICAS_FIELD_NUMBER: _ClassVar[int]
    LOGPAYLOADS_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    minReplicas: int
    maxReplicas: int
    logPayloads: bool
    def __init__(self, replicas: _Optional[int] = ..., minReplicas: _Optional[int] = ..., maxReplicas: _Optional[int] = ..., logPayloads: bool = ...) -> None: ...

class ModelReference(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelReference
    def __init__(self, model: _Optional[_Union[ModelReference, _Mapping]] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelStatusRequest(_message.Message):
    __slots__ = ("subscriberName", "model", "allVersions")
    SUBSCRIBERNAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ALLVERSIONS_FIELD_NUMBER: _ClassVar[int]
    subscriberName: str
    model: ModelReference
    allVersions: bool
    def __init__(self, subscriberName: _Optional[str] = ..., model: _Optional[_Union[ModelReference, _Mapping]] = ..., allVersions: bool = ...) -> None: ...

class ModelStatusResponse(_message.Message):
    __slots__ = ("modelName", "versions")
    MODELNAME_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    modelName: str
    versions: _containers.RepeatedCompositeFieldContainer[ModelVersionStatus]
    def __init__(self, modelName: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[ModelVersionStatus, _Mapping]]] = ...) -> None: ...

class ModelVersionStatus(_message.Message):
    __slots__ = ("version", "serverName", "modelReplicaState", "state", "modelDefn")
    class ModelReplicaStateEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: ModelReplicaStatus
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[ModelReplicaStatus, _Mapping]] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVERNAME_FIELD_NUMBER: _ClassVar[int]
    MODELREPLICASTATE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODELDEFN_FIELD_NUMBER: _ClassVar[int]
    version: int
    serverName: str
    modelReplicaState: _containers.MessageMap[int, ModelReplicaStatus]
    state: ModelStatus
    modelDefn: Model
    def __init__(self, version: _Optional[int] = ..., serverName: _Optional[str] = ..., modelReplicaState: _Optional[_Mapping[int, ModelReplicaStatus]] = ..., state: _Optional[_Union[ModelStatus, _Mapping]] = ..., modelDefn: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("state", "reason", "availableReplicas", "unavailableReplicas", "lastChangeTimestamp")
    class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ModelStateUnknown: _ClassVar[ModelStatus.ModelState]
        ModelProgressing: _ClassVar[ModelStatus.ModelState]
        ModelAvailable: _ClassVar[ModelStatus.ModelState]
        ModelFailed: _ClassVar[ModelStatus.ModelState]
        ModelTerminating: _ClassVar[ModelStatus.ModelState]
        ModelTerminated: _ClassVar[ModelStatus.ModelState]
        ModelTerminateFailed: _ClassVar[ModelStatus.ModelState]
        ScheduleFailed: _ClassVar[ModelStatus.ModelState]
        ModelScaledDown: _ClassVar[ModelStatus.ModelState]
        ModelCreate: _ClassVar[ModelStatus.ModelState]
        ModelTerminate: _ClassVar[ModelStatus.ModelState]
    ModelStateUnknown: ModelStatus.ModelState
    ModelProgressing: ModelStatus.ModelState
    ModelAvailable: ModelStatus.ModelState
    ModelFailed: ModelStatus.ModelState
    ModelTerminating: ModelStatus.ModelState
    ModelTerminated: ModelStatus.ModelState
    ModelTerminateFailed: ModelStatus.ModelState
    ScheduleFailed: ModelStatus.ModelState
    ModelScaledDown: ModelStatus.ModelState
    ModelCreate: ModelStatus.ModelState
    ModelTerminate: ModelStatus.ModelState
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    AVAILABLEREPLICAS_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLEREPLICAS_FIELD_NUMBER: _ClassVar[int]
    LASTCHANGETIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    state: ModelStatus.ModelState
    reason: str
    availableReplicas: int
    unavailableReplicas: int
    lastChangeTimestamp: _timestamp_pb2.Timestamp
    def __init__(self, state: _Optional[_Union[ModelStatus.ModelState, str]] = ..., reason: _Optional[str] = ..., availableReplicas: _Optional[int] = ..., unavailableReplicas: _Optional[int] = ..., lastChangeTimestamp: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ModelReplicaStatus(_message.Message):
    __slots__ = ("state", "reason")
    class ModelReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ModelReplicaStateUnknown: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        LoadRequested: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        Loading: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        Loaded: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        LoadFailed: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        UnloadRequested: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        Unloading: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        Unloaded: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        UnloadFailed: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        Available: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        LoadedUnavailable: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        UnloadEnvoyRequested: _ClassVar[ModelReplicaStatus.ModelReplicaState]
        Draining: _ClassVar[ModelReplicaStatus.ModelReplicaState]
    ModelReplicaStateUnknown: ModelReplicaStatus.ModelReplicaState
    LoadRequested: ModelReplicaStatus.ModelReplicaState
    Loading: ModelReplicaStatus.ModelReplicaState
    Loaded: ModelReplicaStatus.ModelReplicaState
    LoadFailed: ModelReplicaStatus.ModelReplicaState
    UnloadRequested: ModelReplicaStatus.ModelReplicaState
    Unloading: ModelReplicaStatus.ModelReplicaState
    Unloaded: ModelReplicaStatus.ModelReplicaState
    UnloadFailed: ModelReplicaStatus.ModelReplicaState
    Available: ModelReplicaStatus.ModelReplicaState
    LoadedUnavailable: ModelReplicaStatus.ModelReplicaState
    UnloadEnvoyRequested: ModelReplicaStatus.ModelReplicaState
    Draining: ModelReplicaStatus.ModelReplicaState
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    state: ModelReplicaStatus.ModelReplicaState
    reason: str
    def __init__(self, state: _Optional[_Union[ModelReplicaStatus.ModelReplicaState, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class ServerStatusRequest(_message.Message):
    __slots__ = ("subscriberName", "name")
    SUBSCRIBERNAME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    subscriberName: str
    name: str
    def __init__(self, subscriberName: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ServerStatusResponse(_message.Message):
    __slots__ = ("serverName", "resources", "expectedReplicas", "availableReplicas", "numLoadedModelReplicas")
    SERVERNAME_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    EXPECTEDREPLICAS_FIELD_NUMBER: _ClassVar[int]
    AVAILABLEREPLICAS_FIELD_NUMBER: _ClassVar[int]
    NUMLOADEDMODELREPLICAS_FIELD_NUMBER: _ClassVar[int]
    serverName: str
    resources: _containers.RepeatedCompositeFieldContainer[ServerReplicaResources]
    expectedReplicas: int
    availableReplicas: int
    numLoadedModelReplicas: int
    def __init__(self, serverName: _Optional[str] = ..., resources: _Optional[_Iterable[_Union[ServerReplicaResources, _Mapping]]] = ..., expectedReplicas: _Optional[int] = ..., availableReplicas: _Optional[int] = ..., numLoadedModelReplicas: _Optional[int] = ...) -> None: ...

class ServerReplicaResources(_message.Message):
    __slots__ = ("replicaIdx", "totalMemoryBytes", "availableMemoryBytes", "numLoadedModels", "overCommitPercentage")
    REPLICAIDX_FIELD_NUMBER: _ClassVar[int]
    TOTALMEMORYBYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLEMEMORYBYTES_FIELD_NUMBER: _ClassVar[int]
    NUMLOADEDMODELS_FIELD_NUMBER: _ClassVar[int]
    OVERCOMMITPERCENTAGE_FIELD_NUMBER: _ClassVar[int]
    replicaIdx: int
    totalMemoryBytes: int
    availableMemoryBytes: int
    numLoadedModels: int
    overCommitPercentage: int
    def __init__(self, replicaIdx: _Optional[int] = ..., totalMemoryBytes: _Optional[int] = ..., availableMemoryBytes: _Optional[int] = ..., numLoadedModels: _Optional[int] = ..., overCommitPercentage: _Optional[int] = ...) -> None: ...

class Experiment(_message.Message):
    __slots__ = ("name", "default", "candidates", "mirror", "config", "resourceType")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MIRROR_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    RESOURCETYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    default: str
    candidates: _containers.RepeatedCompositeFieldContainer[ExperimentCandidate]
    mirror: ExperimentMirror
    config: ExperimentConfig
    resourceType: ResourceType
    def __init__(self, name: _Optional[str] = ..., default: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[ExperimentCandidate, _Mapping]]] = ..., mirror: _Optional[_Union[ExperimentMirror, _Mapping]] = ..., config: _Optional[_Union[ExperimentConfig, _Mapping]] = ..., resourceType: _Optional[_Union[ResourceType, str]] = ...) -> None: ...

class ExperimentCandidate(_message.Message):
    __slots__ = ("name", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: int
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class ExperimentMirror(_message.Message):
    __slots__ = ("name", "percent")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    percent: int
    def __init__(self, name: _Optional[str] = ..., percent: _Optional[int] = ...) -> None: ...

class ExperimentConfig(_message.Message):
    __slots__ = ("stickySessions",)
    STICKYSESSIONS_FIELD_NUMBER: _ClassVar[int]
    stickySessions: bool
    def __init__(self, stickySessions: bool = ...) -> None: ...

class StartExperimentRequest(_message.Message):
    __slots__ = ("experiment",)
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    experiment: Experiment
    def __init__(self, experiment: _Optional[_Union[Experiment, _Mapping]] = ...) -> None: ...

class StartExperimentResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopExperimentRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class StopExperimentResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExperimentStatusRequest(_message.Message):
    __slots__ = ("subscriberName", "name")
    SUBSCRIBERNAME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    subscriberName: str
    name: str
    def __init__(self, subscriberName: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ExperimentStatusResponse(_message.Message):
    __slots__ = ("experimentName", "active", "candidatesReady", "mirrorReady", "statusDescription")
    EXPERIMENTNAME_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATESREADY_FIELD_NUMBER: _ClassVar[int]
    MIRRORREADY_FIELD_NUMBER: _ClassVar[int]
    STATUSDESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    experimentName: str
    active: bool
    candidatesReady: bool
    mirrorReady: bool
    statusDescription: str
    def __init__(self, experimentName: _Optional[str] = ..., active: bool = ..., candidatesReady: bool = ..., mirrorReady: bool = ..., statusDescription: _Optional[str] = ...) -> None: ...

class Pipeline(_message.Message):
    __slots__ = ("name", "steps", "output", "input")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    name: str
    steps: _containers.RepeatedCompositeFieldContainer[PipelineStep]
    output: PipelineOutput
    input: PipelineInput
    def __init__(self, name: _Optional[str] = ..., steps: _Optional[_Iterable[_Union[PipelineStep, _Mapping]]] = ..., output: _Optional[_Union[PipelineOutput, _Mapping]] = ..., input: _Optional[_Union[PipelineInput, _Mapping]] = ...) -> None: ...

class PipelineStep(_message.Message):
    __slots__ = ("name", "inputs", "joinWindowMs", "tensorMap", "inputsJoin", "triggers", "triggersJoin", "batch")
    class TensorMapEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    JOINWINDOWMS_FIELD_NUMBER: _ClassVar[int]
    TENSORMAP_FIELD_NUMBER: _ClassVar[int]
    INPUTSJOIN_FIELD_NUMBER: _ClassVar[int]
    TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    TRIGGERSJOIN_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    name: str
    inputs: _containers.RepeatedScalarFieldContainer[str]
    joinWindowMs: int
    tensorMap: _containers.ScalarMap[str, str]
    inputsJoin: JoinOp
    triggers: _containers.RepeatedScalarFieldContainer[str]
    triggersJoin: JoinOp
    batch: Batch
    def __init__(self, name: _Optional[str] = ..., inputs: _Optional[_Iterable[str]] = ..., joinWindowMs: _Optional[int] = ..., tensorMap: _Optional[_Mapping[str, str]] = ..., inputsJoin: _Optional[_Union[JoinOp, str]] = ..., triggers: _Optional[_Iterable[str]] = ..., triggersJoin: _Optional[_Union[JoinOp, str]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("size", "windowMs")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    WINDOWMS_FIELD_NUMBER: _ClassVar[int]
    size: int
    windowMs: int
    def __init__(self, size: _Optional[int] = ..., windowMs: _Optional[int] = ...) -> None: ...

class PipelineInput(_message.Message):
    __slots__ = ("externalInputs", "externalTriggers", "joinWindowMs", "joinType", "triggersJoin", "tensorMap")
    class TensorMapEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EXTERNALINPUTS_FIELD_NUMBER: _ClassVar[int]
    EXTERNALTRIGGERS_FIELD_NUMBER: _ClassVar[int]
    JOINWINDOWMS_FIELD_NUMBER: _ClassVar[int]
    JOINTYPE_FIELD_NUMBER: _ClassVar[int]
    TRIGGERSJOIN_FIELD_NUMBER: _ClassVar[int]
    TENSORMAP_FIELD_NUMBER: _ClassVar[int]
    externalInputs: _containers.RepeatedScalarFieldContainer[str]
    externalTriggers: _containers.RepeatedScalarFieldContainer[str]
    joinWindowMs: int
    joinType: JoinOp
    triggersJoin: JoinOp
    tensorMap: _containers.ScalarMap[str, str]
    def __init__(self, externalInputs: _Optional[_Iterable[str]] = ..., externalTriggers: _Optional[_Iterable[str]] = ..., joinWindowMs: _Optional[int] = ..., joinType: _Optional[_Union[JoinOp, str]] = ..., triggersJoin: _Optional[_Union[JoinOp, str]] = ..., tensorMap: _Optional[_Mapping[str, str]] = ...) -> None: ...

class PipelineOutput(_message.Message):
    __slots__ = ("steps", "joinWindowMs", "stepsJoin", "tensorMap")
    class TensorMapEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    STEPS_FIELD_NUMBER: _ClassVar[int]
    JOINWINDOWMS_FIELD_NUMBER: _ClassVar[int]
    STEPSJOIN_FIELD_NUMBER: _ClassVar[int]
    TENSORMAP_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedScalarFieldContainer[str]
    joinWindowMs: int
    stepsJoin: JoinOp
    tensorMap: _containers.ScalarMap[str, str]
    def __init__(self, steps: _Optional[_Iterable[str]] = ..., joinWindowMs: _Optional[int] = ..., stepsJoin: _Optional[_Union[JoinOp, str]] = ..., tensorMap: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LoadPipelineRequest(_message.Message):
    __slots__ = ("pipeline",)
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    pipeline: Pipeline
    def __init__(self, pipeline: _Optional[_Union[Pipeline, _Mapping]] = ...) -> None: ...

class LoadPipelineResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnloadPipelineRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadPipelineResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PipelineStatusRequest(_message.Message):
    __slots__ = ("subscriberName", "name", "allVersions")
    SUBSCRIBERNAME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALLVERSIONS_FIELD_NUMBER: _ClassVar[int]
    subscriberName: str
    name: str
    allVersions: bool
    def __init__(self, subscriberName: _Optional[str] = ..., name: _Optional[str] = ..., allVersions: bool = ...) -> None: ...

class PipelineStatusResponse(_message.Message):
    __slots__ = ("pipelineName", "versions")
    PIPELINENAME_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    pipelineName: str
    versions: _containers.RepeatedCompositeFieldContainer[PipelineWithState]
    def __init__(self, pipelineName: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[PipelineWithState, _Mapping]]] = ...) -> None: ...

class PipelineWithState(_message.Message):
    __slots__ = ("pipeline", "state")
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    pipeline: Pipeline
    state: PipelineVersionState
    def __init__(self, pipeline: _Optional[_Union[Pipeline, _Mapping]] = ..., state: _Optional[_Union[PipelineVersionState, _Mapping]] = ...) -> None: ...

class PipelineVersionState(_message.Message):
    __slots__ = ("pipelineVersion", "status", "reason", "modelsReady")
    class PipelineStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PipelineStatusUnknown: _ClassVar[PipelineVersionState.PipelineStatus]
        PipelineCreate: _ClassVar[PipelineVersionState.PipelineStatus]
        PipelineCreating: _ClassVar[PipelineVersionState.PipelineStatus]
        PipelineReady: _ClassVar[PipelineVersionState.PipelineStatus]
        PipelineFailed: _ClassVar[PipelineVersionState.PipelineStatus]
        PipelineTerminate: _ClassVar[PipelineVersionState.PipelineStatus]
        PipelineTerminating: _ClassVar[PipelineVersionState.PipelineStatus]
        PipelineTerminated: _ClassVar[PipelineVersionState.PipelineStatus]
        PipelineRebalancing: _ClassVar[PipelineVersionState.PipelineStatus]
        PipelineFailedTerminating: _ClassVar[PipelineVersionState.PipelineStatus]
    PipelineStatusUnknown: PipelineVersionState.PipelineStatus
    PipelineCreate: PipelineVersionState.PipelineStatus
    PipelineCreating: PipelineVersionState.PipelineStatus
    PipelineReady: PipelineVersionState.PipelineStatus
    PipelineFailed: PipelineVersionState.PipelineStatus
    PipelineTerminate: PipelineVersionState.PipelineStatus
    PipelineTerminating: PipelineVersionState.PipelineStatus
    PipelineTerminated: PipelineVersionState.PipelineStatus
    PipelineRebalancing: PipelineVersionState.PipelineStatus
    PipelineFailedTerminating: PipelineVersionState.PipelineStatus
    PIPELINEVERSION_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODELSREADY_FIELD_NUMBER: _ClassVar[int]
    pipelineVersion: int
    status: PipelineVersionState.PipelineStatus
    reason: str
    modelsReady: bool
    def __init__(self, pipelineVersion: _Optional[int] = ..., status: _Optional[_Union[PipelineVersionState.PipelineStatus, str]] = ..., reason: _Optional[str] = ..., modelsReady: bool = ...) -> None: ...
