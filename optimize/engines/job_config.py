"""The file of a job: which campaigns run where on a Kubernetes cluster. Nothing in it is a credential."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from registry.errors import InputError
from registry.filesystems import destination_of
from registry.tracking import SECRET_NAME

GRACE_S = 60
"""From SIGTERM to SIGKILL, where the file says nothing."""
LEAST_GRACE_S = 30
"""What the command line may need after SIGTERM: to unload models (10 s), end its servers (5 s) and reap them (5 s)."""

_OURS = frozenset({"BURNISH_STORE", "BURNISH_INDEX", "MLFLOW_TRACKING_URI"})

Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=50)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Text = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Toleration(_Part):
    """A taint that the pods may be placed beside."""

    key: Text | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class SecretKey(_Part):
    """One key of a Secret that the cluster has."""

    name: ObjectName
    key: Text


class Volume(_Part):
    """A PersistentVolumeClaim that the cluster has, and where the container sees it."""

    claim: ObjectName
    path: str
    read_only: bool = True

    @field_validator("path")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not value.startswith("/") or ".." in PurePosixPath(value).parts or value == "/":
            raise ValueError("is no absolute path of a folder in the container")
        return value.rstrip("/")


class PodConfig(_Part):
    """What a pod asks of its node. Requests are limits, so that a node's CPU manager can give it its cores alone.

    Attributes:
        cpu: CPUs; a whole number for exclusive ones.
        memory: most memory.
        gpus: of ``nvidia.com/gpu``.
        node_selector: labels that the node must have.
        tolerations: taints that the node may have.
    """

    cpu: Quantity = "4"
    memory: Quantity = "8Gi"
    gpus: Annotated[int, Field(ge=0)] = 0
    node_selector: dict[Text, str] = {}
    tolerations: tuple[Toleration, ...] = ()


class RayConfig(_Part):
    """The cluster that a RayJob starts.

    Attributes:
        version: Ray's in the image; None for the one that burnish is pinned to here.
        workers: how many worker pods.
        worker: what each asks of its node.
    """

    version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")] | None = None
    workers: Annotated[int, Field(ge=1)] = 2
    worker: PodConfig = PodConfig()


class JobConfig(PodConfig):
    """A job: campaigns, each run by a pod of its own.

    Attributes:
        name: the job's, and that of all it makes.
        kind: ``job`` for a batch/v1 Job with one campaign for each index, ``rayjob`` for a RayJob for each campaign.
        image: one with burnish in it, as the targets ``job-cpu`` and ``job-gpu`` of the Dockerfile make it.
        campaigns: campaign files, beside this one; paths in them are those of the container.
        files: what the campaigns read beside themselves (small samples, a Python file); they go into the ConfigMap too.
        level: a level of proof in place of the campaigns' own.
        parallelism: how many run at the same time; None for all.
        retries: how often a campaign is begun again after a kill or a lost server; one with a verdict is not.
        ttl_s: how long the finished job stays.
        deadline_s: longest that it may take, or None.
        grace_s: from SIGTERM to SIGKILL.
        store: the shared store of artifacts, as ``BURNISH_STORE``.
        mlflow: the tracking server, without credentials; or ``mlflow_secret``.
        mlflow_secret: the key of a Secret with the tracking URI.
        secrets: names of Secrets whose keys become environment variables (``AWS_ACCESS_KEY_ID``, say).
        environment: variables that are no secret.
        volumes: claims with models and samples.
        work: a claim for the working folders, or None for a folder that goes with the pod.
        shared_memory: size of /dev/shm; Triton takes 1 MB for each instance.
        service_account: the account of the pods, where campaigns deploy to the cluster; without one they get no token.
        pull_secrets: names of Secrets for the image's registry.
        ray: the Ray cluster of a ``rayjob``.
    """

    name: Name
    kind: Literal["job", "rayjob"] = "job"
    image: Text
    campaigns: Annotated[tuple[Text, ...], Field(min_length=1)]
    files: tuple[Text, ...] = ()
    level: Text | None = None
    parallelism: Annotated[int, Field(ge=1)] | None = None
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    ttl_s: Annotated[int, Field(ge=0)] = 7 * 86_400
    deadline_s: Annotated[int, Field(ge=1)] | None = None
    grace_s: int = GRACE_S
    store: str | None = None
    mlflow: str | None = None
    mlflow_secret: SecretKey | None = None
    secrets: tuple[ObjectName, ...] = ()
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    volumes: tuple[Volume, ...] = ()
    work: ObjectName | None = None
    shared_memory: Quantity = "256Mi"
    service_account: ObjectName | None = None
    pull_secrets: tuple[ObjectName, ...] = ()
    ray: RayConfig = RayConfig()

    @field_validator("grace_s")
    @classmethod
    def _enough(cls, value: int) -> int:
        if value < LEAST_GRACE_S:
            raise ValueError(f"is too short for servers to be ended; give {LEAST_GRACE_S} or more")
        return value

    @field_validator("store")
    @classmethod
    def _reachable(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                destination_of(value)
            except InputError as error:
                raise _unshown(str(error)) from None
        return value

    @field_validator("mlflow")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^@\s?#]+", value):
            raise _unshown("is no http(s) URL of a tracking server without credentials; those belong into a Secret")
        return value

    @field_validator("environment")
    @classmethod
    def _open(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name in _OURS:
                raise ValueError(f"{name} is set by burnish itself, from a key of its own in this file")
            if SECRET_NAME.search(name):
                raise _unshown(f"{name} looks like a secret: put it into a Secret and name that under `secrets:`")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.mlflow is None) == (self.mlflow_secret is None):
            raise ValueError("the results need one tracking server: give either `mlflow:` or `mlflow_secret:`")
        if self.kind == "job" and self.ray != RayConfig():
            raise ValueError("`ray:` is for `kind: rayjob`")
        if self.kind == "rayjob" and self.store is None:
            raise ValueError("workers of Ray share what they make: give a `store:`")
        _check_distinct("campaigns", self.campaigns)
        _check_distinct("files", tuple(PurePosixPath(file).name for file in self.files))
        _check_distinct("volumes", tuple(volume.path for volume in self.volumes))
        return self


def _unshown(words: str) -> PydanticCustomError:
    """What is wrong with a value that a message must not show, since it may be a secret."""
    return PydanticCustomError("secret", "{words}", {"words": words})


def _check_distinct(what: str, values: tuple[Any, ...]) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{what}: {', '.join(map(str, twice))} is given twice")
