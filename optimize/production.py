"""Where a model or pipeline is in production: from the section ``cluster:`` to a rollout, and the ways there."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from optimize.cluster_config import ClusterConfig, Core2Config, KubernetesConfig, LocalConfig, SchedulerConfig
from optimize.clusters import core2_options, kubernetes_client, location_of, scheduler_client
from profiles.deploy.core2_candidates import Mesh, place_folder
from profiles.deploy.rollout import Applier, ManifestRollout, challenger_name, owned
from profiles.pipelines.rollout import PipelineRollout
from profiles.serving.core2.manifests import Manifest, render_model
from profiles.serving.core2.schema import NEWEST
from registry.errors import InputError
from registry.records import Artifact, Candidate, Target
from registry.store import FolderStore

MANIFESTS = "manifests"
"""Folder, below ``production`` in the working folder, of the manifests that are applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a challenger serves.

    Attributes:
        candidate: it, and how it is served.
        artifact: its model.
        files: folder with the artifact's files.
    """

    candidate: Candidate
    artifact: Artifact
    files: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An open place of production.

    Attributes:
        rollout: moves its traffic.
        target_of: gives the way to a model, or to a pipeline, there by its name.
    """

    rollout: ManifestRollout
    target_of: Callable[[str], Target]


def production_name(model: str) -> str:
    """The name of the Model that callers ask, for a registered model: as Core 2 takes names.

    Raises:
        InputError: nothing of the name is left.
    """
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    if not name:
        raise InputError(
            f"{model!r} has no letter or digit that Core 2 takes", hint="Name the Model with --production."
        )
    challenger_name(name)
    return name


@contextmanager
def open_place(
    config: ClusterConfig,
    *,
    base: Path,
    work: Path,
    production: str,
    served: Served | None,
    serve: bool,
    port: int | None = None,
) -> Iterator[Place]:
    """The place of production of a configuration, for the time of a block.

    Args:
        config: which cluster, and how it is reached.
        base: the folder that paths of the configuration are relative to.
        work: the working folder, which keeps the manifests that are applied.
        production: the name of the Model that callers ask.
        served: the challenger; None where all that is to be done is to go back.
        serve: whether something will be changed; if not, nothing is started on this machine.
        port: of this machine's Envoy; None for a free one.

    Raises:
        InputError: the configuration cannot be used.
        MissingExtraError: a client or server is not installed.
        UnreachableError: a server of this machine does not come about.
    """
    if isinstance(config, LocalConfig):
        opened = _on_this_machine(work, production, served, serve, port)
    else:
        opened = _on_core2(config, base, work, production, served)
    with opened as place:
        yield place


@contextmanager
def open_pipeline_place(
    config: ClusterConfig,
    *,
    base: Path,
    work: Path,
    production: str,
    models: Mapping[str, str] | None = None,
    brought: Mapping[str, Served] | None = None,
) -> Iterator[Place]:
    """The place of production of a pipeline, for the time of a block.

    Args:
        config: as for `open_place`; a Core 2.
        base: as for `open_place`.
        work: as for `open_place`.
        production: the name of the Pipeline that callers ask.
        models: step -> Model to take its place; None where all that is to be done is to go back.
        brought: those of these Models that are not served yet.

    Raises:
        InputError: the configuration cannot be used, or names no Core 2.
        MissingExtraError: a client is not installed.
    """
    named = check_core2(config)
    with _core2(named, base) as (applier, mesh):
        rendered = {}
        for name, served in (brought or {}).items():
            render = _rendering(named, base, production, served)
            rendered[name] = partial(render, name)
        rollout = PipelineRollout(
            applier, production=production, folder=_manifests(work), models=models, brought=rendered
        )
        yield Place(rollout=rollout, target_of=lambda name: mesh.target_of(f"{name}.pipeline", "grpc"))


def check_core2(config: ClusterConfig) -> Core2Config:
    """The configuration, where it is one of a Core 2.

    Raises:
        InputError: it is this machine.
    """
    if isinstance(config, LocalConfig):
        raise InputError(
            "a pipeline is promoted on a Core 2, and none is named",
            hint="Name it with --cluster. `burnish pipeline serve` shows a pipeline on this machine, and --out writes "
            "the manifests to apply by hand.",
        )
    return config


@contextmanager
def _core2(config: Core2Config, base: Path) -> Iterator[tuple[Applier, Mesh]]:
    """Who applies manifests on a Core 2, and where its models answer."""
    mesh = Mesh(config.mesh, tls=config.mesh_tls, hint="It is the `mesh` of the section `cluster`.")
    if isinstance(config, SchedulerConfig):
        from profiles.deploy.rollout_scheduler import SchedulerApplier

        with scheduler_client(config, base) as scheduler:
            yield SchedulerApplier(scheduler, mesh, location=f"Core 2 at {config.address}"), mesh
        return
    from profiles.deploy.rollout_kubernetes import KubernetesApplier

    with kubernetes_client(config, base) as client:
        yield KubernetesApplier(client, mesh, location=location_of(config, client)), mesh


@contextmanager
def _on_core2(config: Core2Config, base: Path, work: Path, production: str, served: Served | None) -> Iterator[Place]:
    with _core2(config, base) as (applier, mesh):
        render = None if served is None else _rendering(config, base, production, served)
        rollout = ManifestRollout(applier, production=production, folder=_manifests(work), render=render)
        yield Place(rollout=rollout, target_of=_through(mesh, served))


def _through(mesh: Mesh, served: Served | None) -> Callable[[str], Target]:
    """The way to a model through the mesh, as what is served there speaks."""

    def target_of(name: str) -> Target:
        serving = _known(served).candidate.serving
        binary = serving.server == "triton" and serving.protocol == "rest"
        return mesh.target_of(name, serving.protocol, binary=binary)

    return target_of


def _rendering(config: Core2Config, base: Path, production: str, served: Served) -> Callable[[str], Manifest]:
    """Gives the challenger's Model under any name; its folder is uploaded at the first call."""
    candidate, artifact = served.candidate, served.artifact
    options = core2_options(config, base, f"production-{production}")
    version = config.core2_version if isinstance(config, KubernetesConfig) else NEWEST

    @cache
    def uploaded() -> tuple[str, dict[str, str]]:
        name, folder = options.folder_of(candidate, artifact)
        return place_folder(name, folder, artifact, served.files, options.place), folder.extra

    def render(name: str) -> Manifest:
        uri, extra = uploaded()
        return render_model(
            name,
            candidate,
            storage_uri=uri,
            labels=_labels(production, candidate),
            extra=extra,
            memory_bytes=options.memory_bytes(candidate, artifact),
            server=options.servers.get(candidate.serving.server),
            secret_name=options.secret,
            requirements=options.needed_by(candidate.serving.backend),
            version=version,
        )

    return render


@contextmanager
def _on_this_machine(
    work: Path, production: str, served: Served | None, serve: bool, port: int | None
) -> Iterator[Place]:
    from profiles.deploy.rollout_local import LocalProduction

    local = LocalProduction(work, FolderStore(work), port=port)

    def render(name: str) -> Manifest:
        known = _known(served)
        # On this machine nothing is fetched: the candidate's id leads to the files.
        uri = f"/store/{known.artifact.digest}/{known.candidate.id}"
        return render_model(name, known.candidate, storage_uri=uri, labels=_labels(production, known.candidate))

    def target_of(name: str) -> Target:
        return local.target(name, _known(served).candidate.serving.protocol)

    rollout = ManifestRollout(
        local, production=production, folder=_manifests(work), render=None if served is None else render
    )
    place = Place(rollout=rollout, target_of=target_of)
    if not serve:
        yield place
        return
    if served is not None:
        local.know(served.candidate, served.artifact)
    with local:
        yield place


def _labels(production: str, candidate: Candidate) -> dict[str, str]:
    return owned(production, **{"burnish.candidate": candidate.id, "burnish.variant": candidate.variant_id})


def _manifests(work: Path) -> Path:
    return work / "production" / MANIFESTS


def _known(served: Served | None) -> Served:
    if served is None:
        raise ValueError("no challenger is named")
    return served
