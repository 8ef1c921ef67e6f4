"""Where candidates are served: from the section ``cluster:`` of a campaign file to an adapter of the port."""

import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from optimize.cluster_config import (
    ClusterConfig,
    Core2Config,
    KubernetesConfig,
    LocalConfig,
    SchedulerConfig,
    load_cluster,
)
from profiles.deploy.cluster import Cluster
from profiles.deploy.core2_candidates import Core2Options
from profiles.deploy.placement import check_destination, place
from profiles.deploy.storage_uris import fetched_as
from registry.filesystems import local_path
from registry.records import Artifact, ServingProfile

if TYPE_CHECKING:
    from profiles.deploy.kubernetes import KubernetesClient
    from profiles.deploy.scheduler import SchedulerClient

OWNER = "owner"
"""File of the working folder: the name that its models carry on a Core 2, the same in each run and nobody else's."""


class Core2Cluster(Cluster, Protocol):
    """What both adapters of Core 2 can do beside serving candidates."""

    def check_ready(self, profiles: Collection[ServingProfile] = ()) -> None:
        """Returns where candidates could be deployed; raises as `deploy` would."""

    def remove_leftovers(self) -> tuple[str, ...]:
        """Takes away what a killed run of the same owner left, and returns its names."""

    def server_version(self, server: str) -> str:
        """What is known of the version of ``mlserver`` or ``triton``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An open cluster, and what it says of itself.

    Attributes:
        cluster: where candidates are deployed; closed with the site.
        location: which Core 2 it is, for people; empty for this machine.
        served_by: ``mlserver`` or ``triton`` -> the server there that is used, for people and for the journal, since
            what one gave is not taken for another's; empty for this machine.
        server_version: ``mlserver`` or ``triton`` -> what is known of its version.
        check: returns where candidates with these serving profiles could be deployed, and raises why not.
        clear: takes away what a killed run left there, and returns its names.
    """

    cluster: Cluster
    location: str
    served_by: Callable[[str], str]
    server_version: Callable[[str], str]
    check: Callable[[Collection[ServingProfile]], None]
    clear: Callable[[], tuple[str, ...]]


@contextmanager
def open_site(config: ClusterConfig, *, base: Path, work: Path, owner: str, **local: Any) -> Iterator[Site]:
    """The cluster of a configuration, for the time of a block; what was deployed there ends with it.

    Args:
        config: which, and how.
        base: the folder that paths of the configuration are relative to.
        work: the working folder; servers of this machine work there.
        owner: who owns what is deployed, see `owner_of`.
        local: for this machine, what `LocalCluster` takes beside the working folder.

    Raises:
        InputError: the configuration cannot be used: a file is missing, or no cluster is named.
        MissingExtraError: the client of Kubernetes is not installed.
    """
    match config:
        case SchedulerConfig():
            opened = _by_scheduler(config, base, owner)
        case KubernetesConfig():
            opened = _by_kubernetes(config, base, owner)
        case LocalConfig():
            opened = _on_this_machine(work, local)
    with opened as site:
        yield site


def owner_of(work: Path) -> str:
    """The name that what a working folder's campaign deploys carries; made at the first call."""
    path = work / OWNER
    if not path.is_file():
        path.write_text(f"burnish-{secrets.token_hex(6)}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def open_file(file: Path | None, *, work: Path, purpose: str, **local: Any) -> Iterator[Site]:
    """The cluster that a file names, or this machine without one, for a single candidate; see `open_site`.

    Args:
        file: see `optimize.cluster_config.ClusterFile`.
        work: a folder of its own.
        purpose: begins the name that what is deployed carries on a Core 2.
        local: as for `open_site`.

    Raises:
        DocumentError: the file does not fit.
        InputError: as `open_site`.
    """
    base = work if file is None else file.resolve().parent
    owner = f"{purpose}-{secrets.token_hex(6)}"
    with open_site(load_cluster(file), base=base, work=work, owner=owner, **local) as site:
        yield site


@contextmanager
def _on_this_machine(work: Path, local: dict[str, Any]) -> Iterator[Site]:
    from profiles.deploy.local import LocalCluster, server_version

    with LocalCluster(work, **local) as cluster:
        yield Site(
            cluster=cluster,
            location="",
            served_by=lambda _: "",
            server_version=server_version,
            check=lambda _: None,
            clear=tuple,
        )


def scheduler_client(config: SchedulerConfig, base: Path) -> "SchedulerClient":
    """The client of a configuration's scheduler, not connected yet.

    Raises:
        InputError: a file of TLS is missing, or is not what it should be.
    """
    from profiles.deploy.scheduler import SchedulerClient
    from profiles.deploy.scheduler_channel import TlsSettings

    host, port = config.host_and_port
    tls = None
    if config.tls is not None:
        tls = TlsSettings(
            ca=_file(config.tls.ca, base),
            certificate=_file(config.tls.certificate, base),
            key=_file(config.tls.key, base),
            server_name=config.tls.server_name,
        )
    return SchedulerClient(host, port, tls=tls)


def kubernetes_client(config: KubernetesConfig, base: Path) -> "KubernetesClient":
    """The client of a configuration's Kubernetes, not connected yet.

    Raises:
        MissingExtraError: the client of Kubernetes is not installed.
        InputError: there is no kubeconfig, or it cannot be used.
    """
    from profiles.deploy.kubernetes import KubernetesClient

    kubeconfig = _file(config.kubeconfig, base)
    return KubernetesClient(namespace=config.namespace, context=config.context, kubeconfig=kubeconfig)


@contextmanager
def _by_scheduler(config: SchedulerConfig, base: Path, owner: str) -> Iterator[Site]:
    from profiles.deploy.scheduler_cluster import Core2SchedulerCluster

    with (
        scheduler_client(config, base) as client,
        Core2SchedulerCluster(client, core2_options(config, base, owner)) as cluster,
    ):
        yield _site(cluster, f"Core 2 at {config.address}", config, base)


@contextmanager
def _by_kubernetes(config: KubernetesConfig, base: Path, owner: str) -> Iterator[Site]:
    from profiles.deploy.kubernetes import KubernetesCluster

    run = secrets.token_hex(4)
    with (
        kubernetes_client(config, base) as client,
        KubernetesCluster(client, core2_options(config, base, owner), run=run, version=config.core2_version) as cluster,
    ):
        location = location_of(config, client)
        yield _site(cluster, location, config, base)


def location_of(config: KubernetesConfig, client: "KubernetesClient") -> str:
    """Which Core 2 it is, for people."""
    return f"Core 2 {config.core2_version} in the namespace {client.namespace} of {client.host}"


def _site(cluster: Core2Cluster, location: str, config: Core2Config, base: Path) -> Site:
    def check(profiles: Collection[ServingProfile]) -> None:
        cluster.check_ready(profiles)
        check_destination(config.storage_in(base))

    return Site(
        cluster=cluster,
        location=location,
        served_by=lambda server: f"{getattr(config.servers, server)} of {location}",
        server_version=cluster.server_version,
        check=check,
        clear=cluster.remove_leftovers,
    )


def core2_options(config: Core2Config, base: Path, owner: str) -> Core2Options:
    """How candidates are served on the Core 2 of a configuration; ``owner`` as for `open_site`."""
    destination = config.storage_in(base)
    remotes, mounts = fetched_as(destination, config.storage_uri)

    def put(_: Artifact, folder: Path) -> str:
        return place(folder, destination, name=folder.name, remotes=remotes, mounts=mounts).rclone_uri

    return Core2Options(
        mesh=config.mesh,
        place=put,
        owner=owner,
        mesh_tls=config.mesh_tls,
        servers=config.servers.model_dump(exclude_none=True),
        requirements={str(backend): needed for backend, needed in config.requirements.items()},
        memory_bytes=config.memory_of,
        workers=config.workers,
        secret=config.secret,
    )


def _file(given: str | None, base: Path) -> Path | None:
    return None if given is None else local_path(given, base).resolve()
