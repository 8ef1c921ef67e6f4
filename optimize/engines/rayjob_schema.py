"""KubeRay's RayJob as far as burnish writes it, and nothing else: a schema of our own, since no library has one.

Names of fields are those of the API ``ray.io/v1`` (https://ray-project.github.io/kuberay/reference/api/). Templates
of pods are checked as Pods, by Kubernetes' own schema (see `kubernetes_job.check_manifest`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Label = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
# KubeRay makes names of pods and services from it.
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Metadata(_Part):
    """Of the RayJob."""

    name: Name
    labels: dict[str, Label] = {}


class Template(_Part):
    """Of pods."""

    metadata: dict[Literal["labels"], dict[str, Label]] = {}
    spec: dict[str, Any]


class HeadGroup(_Part):
    """The pod that Ray's head and the campaign's driver run in."""

    rayStartParams: dict[Text, str]
    template: Template


class WorkerGroup(_Part):
    """Pods that tasks run in."""

    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[Text, str]
    template: Template

    @model_validator(mode="after")
    def _in_bounds(self) -> "WorkerGroup":
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("replicas is not between minReplicas and maxReplicas")
        return self


class ClusterSpec(_Part):
    """The Ray cluster."""

    rayVersion: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")]
    headGroupSpec: HeadGroup
    workerGroupSpecs: Annotated[list[WorkerGroup], Field(min_length=1)]


class RayJobSpec(_Part):
    """What runs on it."""

    entrypoint: Text
    submissionMode: Literal["K8sJobMode", "HTTPMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    activeDeadlineSeconds: Annotated[int, Field(ge=1)] | None = None
    backoffLimit: Count
    rayClusterSpec: ClusterSpec

    @model_validator(mode="after")
    def _ends(self) -> "RayJobSpec":
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        return self


class RayJob(_Part):
    """A Ray cluster that is started for one command, and ended after it."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec
