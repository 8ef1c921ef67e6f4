"""The section ``cluster:`` of a campaign file: where candidates are served. Nothing in it is a credential."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from profiles.deploy.storage_uris import fetched_as, rclone_uri
from profiles.serving.naming import check_core2_name
from registry.documents import load_document
from registry.errors import InputError
from registry.filesystems import local_path, scheme_of
from registry.records import Artifact, Candidate, ServingProfile

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?):(?P<port>[0-9]{1,5})")
Backend = Literal["burnish", "python", "onnxruntime", "openvino"]


def _no_secret(value: Any) -> Any:
    if isinstance(value, str) and "@" in value and not value.startswith(("/", ".", "~")):
        # Of this kind a message does not show the value.
        raise PydanticCustomError(
            "secret",
            "a user or password does not belong into a file (it has an '@'): credentials come from the environment, "
            "the kubeconfig, or a secret of the cluster",
        )
    return value


def _address(value: str) -> str:
    found = _ADDRESS.fullmatch(value)
    if found is None or not 0 < int(found["port"]) < 65_536:
        raise ValueError("is not host:port, without a scheme (localhost:9000, say)")
    return value


def _core2_name(value: str) -> str:
    try:
        check_core2_name(value, "name")
    except InputError as error:
        raise ValueError(str(error.hint)) from error
    return value


Address = Annotated[str, BeforeValidator(_no_secret), AfterValidator(_address)]
Core2Name = Annotated[str, AfterValidator(_core2_name)]
Uri = Annotated[str, BeforeValidator(_no_secret)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TlsConfig(_Model):
    """Files of the connection to a scheduler with TLS, all PEM; paths are relative to the file that names them.

    Attributes:
        ca: the authorities that signed the scheduler's certificate; None for those of gRPC.
        certificate: our own certificate, for mutual TLS.
        key: the private key of it, without a password.
        server_name: the name that the scheduler's certificate is for, where it is reached under another one.
    """

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    server_name: str | None = None

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together, and only one of them is given")
        return self


class ServersConfig(_Model):
    """The one server of Core 2 that candidates for MLServer, or for Triton, are to be on; None where there are none."""

    mlserver: Core2Name | None = None
    triton: Core2Name | None = None


class LocalConfig(_Model):
    """This machine: MLServer and Triton are started as child processes."""

    kind: Literal["local"] = "local"

    def why_not(self, serving: ServingProfile) -> str | None:
        """Why no candidate of a serving profile can be served there, or None."""
        if not serving.of_server:
            return None
        return (
            f"Triton's {serving.backend} backend is not on this machine: the Triton that comes with burnish has the "
            "python backend alone; leave backend out, or name a Core 2 under cluster"
        )


class _Core2Config(_Model):
    """What both ways to command a Core 2 have in common.

    Attributes:
        mesh: ``host:port`` of the data plane, where requests go.
        mesh_tls: whether it speaks TLS; its certificate is verified.
        storage: where this machine uploads models to: a folder, ``s3://bucket/prefix`` or ``gs://bucket/prefix``.
        storage_uri: what the cluster's rclone calls the same place: ``NAME://bucket/prefix``, or the path of a volume.
        secret: the Kubernetes secret with the rclone remote; None where the cluster has it already.
        servers: which servers of Core 2 to use.
        requirements: backend -> capabilities that its server has, in place of burnish's own words.
        workers: ``MLSERVER_PARALLEL_WORKERS`` of the cluster's MLServer, which no model can change.
        memory_mb: what each model asks for, in MB of 10^6 bytes; None for the size of its files, which is too little.
    """

    mesh: Address
    mesh_tls: bool = False
    storage: Uri
    storage_uri: Uri | None = None
    secret: Core2Name | None = None
    servers: ServersConfig = ServersConfig()
    requirements: dict[Backend, tuple[str, ...]] = Field(default_factory=dict)
    workers: int = Field(default=0, ge=0, le=64)
    memory_mb: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fetched(self) -> Self:
        try:
            remotes, mounts = fetched_as(self.storage, self.storage_uri)
            rclone_uri(self.storage, remotes=remotes, mounts=mounts)
        except InputError as error:
            if self.storage_uri is None and scheme_of(self.storage) in ("s3", "gs"):
                raise ValueError(
                    f"{error.message}: give storage_uri, NAME://bucket/prefix with the remote's name"
                ) from error
            raise ValueError(f"{error.message}. {error.hint or ''}".strip()) from error
        return self

    def why_not(self, serving: ServingProfile) -> str | None:
        """Why no candidate of a serving profile can be served there, or None."""
        if getattr(self.servers, serving.server) is None:
            return (
                f"name the server that is to serve it: cluster.servers.{serving.server} (Core 2 comes with one named "
                f"{serving.server!r}); candidates are compared, so all are measured on the same"
            )
        if serving.server != "mlserver" or serving.parallel_workers == self.workers:
            return None
        return (
            f"it asks for {serving.parallel_workers} parallel_workers, and the cluster's MLServer has {self.workers} "
            "(cluster.workers): on Core 2 that is the server's setting, MLSERVER_PARALLEL_WORKERS"
        )

    def storage_in(self, base: Path) -> str:
        """The destination of uploads, with a path as seen from ``base``."""
        return self.storage if scheme_of(self.storage) else str(local_path(self.storage, base).resolve())

    def memory_of(self, candidate: Candidate, artifact: Artifact) -> int:
        """Bytes to ask for."""
        return artifact.size_bytes if self.memory_mb is None else round(self.memory_mb * 1e6)


class SchedulerConfig(_Core2Config):
    """A Core 2 that runs without Kubernetes: its scheduler is told what to load.

    Attributes:
        address: ``host:port`` of the scheduler's gRPC.
        tls: None for plaintext.
    """

    kind: Literal["scheduler"]
    address: Address
    tls: TlsConfig | None = None

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The two parts of the scheduler's address."""
        host, _, port = self.address.rpartition(":")
        return host, int(port)


class KubernetesConfig(_Core2Config):
    """A Core 2 in a Kubernetes cluster: its custom resources are applied.

    Attributes:
        namespace: of the Models; None for the context's, or the pod's.
        context: of the kubeconfig; None for its current one.
        kubeconfig: a file in place of the usual one (``$KUBECONFIG``, ``~/.kube/config``, the pod's own account).
        core2_version: the release that manifests are held against.
    """

    kind: Literal["kubernetes"]
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)] | None = None
    context: str | None = None
    kubeconfig: str | None = None
    core2_version: Literal["2.6", "2.10"] = "2.10"


Core2Config = SchedulerConfig | KubernetesConfig
ClusterConfig = Annotated[LocalConfig | SchedulerConfig | KubernetesConfig, Field(discriminator="kind")]


class ClusterFile(_Model):
    """A file with nothing but the section ``cluster:``, for commands that have no campaign."""

    cluster: ClusterConfig


def load_cluster(path: Path | None) -> LocalConfig | Core2Config:
    """The cluster of a file; this machine where there is none.

    Raises:
        DocumentError: it is missing, malformed or does not fit; the message names file, line and key.
    """
    return LocalConfig() if path is None else load_document(path, ClusterFile).cluster
