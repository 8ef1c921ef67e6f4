"""Candidates served on Core 2 in a Kubernetes cluster, each by custom resources of its own."""

import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from profiles.deploy.cluster import Usage
from profiles.deploy.core2_candidates import UNKNOWN_VERSION, Core2Options, Mesh, look_again, place_folder
from profiles.deploy.kubernetes_client import KubernetesClient
from profiles.deploy.kubernetes_resources import (
    CAMPAIGN,
    RUN,
    Applied,
    Change,
    ResourceState,
    conditions_of,
    image_of,
    labels_on,
    lacking_in,
    read_state,
)
from profiles.serving.core2.manifests import Manifest, labels_of, render_model
from profiles.serving.core2.schema import MLOPS, NEWEST, Core2Version, check_manifest
from registry.errors import BurnishError, InputError, ServerDiedError
from registry.records import Artifact, Candidate, ServingProfile, Target

# The client is here too: who serves on Kubernetes needs both.
__all__ = ["KubernetesClient", "KubernetesCluster", "KubernetesDeployment"]

logger = logging.getLogger(__name__)


class KubernetesDeployment:
    """One candidate served on Core 2; made by `KubernetesCluster.deploy`.

    Attributes:
        candidate: what is served.
        target: the mesh, with the header that leads to it.
        load_time_s: from applying its Model until the mesh answers for it, its download to the server included.
        rendered: path -> text of the files that were rendered for it.
        uri: where Core 2 fetched it.
        server: the Server that it is on; empty where Core 2 does not say.
        applied: its Model.
    """

    def __init__(
        self,
        cluster: "KubernetesCluster",
        candidate: Candidate,
        *,
        target: Target,
        rendered: dict[str, str],
        uri: str,
        server: str,
        applied: Applied,
        load_time_s: float,
    ) -> None:
        self.candidate = candidate
        self.target = target
        self.rendered = rendered
        self.uri = uri
        self.server = server
        self.applied = applied
        self.load_time_s = load_time_s
        self._cluster = cluster

    @property
    def statistics(self) -> None:
        """Nothing: the mesh leads to the model alone, not to what its server tells of itself."""

    def usage(self) -> Usage | None:
        """Which life of its server this is; what it uses, its Model does not say.

        A Model whose server was restarted, or that had to be loaded again, was not ready in between, and its condition
        says since when it is. An API server that does not answer is no reason to end a measurement: the mesh serves
        without it.

        Raises:
            ServerDiedError: it is not available any more, or somebody changed or replaced its Model.
        """
        instance = look_again(self.target.model, lambda: self._cluster.check(self))
        return Usage(instance=instance) if instance else None

    def undeploy(self) -> None:
        """Deletes its Model and returns when that is gone; a second call does nothing.

        Raises:
            UnreachableError: it could not be deleted; `KubernetesCluster.close` tries again.
        """
        self._cluster.take_away("Model", self.target.model)


class KubernetesCluster:
    """Serves candidates on Core 2 in one namespace, each as a Model of its own. A context manager that deletes them.

    A Model carries the name of its candidate and the labels of its campaign and run. One of the same name without the
    campaign's label is somebody else's, and is neither taken over nor deleted. One with it is what a killed run left:
    it is deleted and made anew, since a status does not say what it is of.
    """

    def __init__(
        self, client: KubernetesClient, options: Core2Options, *, run: str, version: Core2Version = NEWEST
    ) -> None:
        """Connects to nothing yet.

        Args:
            client: of Kubernetes; the caller closes it, after this.
            options: how candidates are served; the owner becomes a label.
            run: the run's name; a label. Only what carries it is deleted.
            version: of Core 2.
        """
        self._client = client
        self._options = options
        self._mesh = Mesh(options.mesh, tls=options.mesh_tls, hint="It is at port 80 of the service seldon-mesh.")
        self._run = run
        self._version = version
        self._ours: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def deploy(
        self, candidate: Candidate, artifact: Artifact, files: Path, *, timeout_s: float
    ) -> KubernetesDeployment:
        """Serves the candidate and returns when the mesh answers for its Model.

        What it has applied it deletes again where the Model does not come about.

        Args:
            candidate: what to serve, and how.
            artifact: its model.
            files: folder with the artifact's files, which are copied.
            timeout_s: longest wait from applying its Model; its upload is not in that.

        Raises:
            InputError: the candidate cannot be served as it asks to be, its Model is refused, or one of its name is
                somebody else's.
            UnreachableError: it could not be scheduled or loaded (with Core 2's reason), was not ready in time, or the
                API server or the mesh did not answer.
        """
        name, folder = self._options.folder_of(candidate, artifact)
        self._mesh.check()
        self._clear(name)
        uri = place_folder(name, folder, artifact, files, self._options.place)
        manifest = self._model(name, candidate, artifact, uri, folder.extra)
        started = time.monotonic()
        try:
            applied = self._apply(manifest, timeout_s)
            found = self._client.wait(applied, timeout_s=timeout_s, since=started)
            target = self._mesh.target(candidate, name)
            self._mesh.wait_for(target, started + timeout_s)
        except BaseException:
            # Ctrl-C too: nothing half-loaded is left.
            self._clean_up("Model", name)
            raise
        took_s = time.monotonic() - started
        return KubernetesDeployment(
            self,
            candidate,
            target=target,
            rendered=dict(folder.rendered),
            uri=uri,
            server=found.server,
            applied=applied,
            load_time_s=took_s,
        )

    def apply(self, manifest: Mapping[str, Any], *, timeout_s: float) -> ResourceState:
        """Applies a resource of any kind (a Server, an Experiment) with this run's labels, and waits until it is ready.

        What this run had not applied before is deleted again where it does not come about.

        Args:
            manifest: as `profiles.serving.core2.manifests` renders it.
            timeout_s: longest wait, from applying on.

        Raises:
            InputError: it is no manifest for this release, is refused, or is somebody else's.
            UnreachableError: it is not ready in time (with Core 2's reason), or the API server did not answer.
        """
        marked, started = self._marked(manifest), time.monotonic()
        known = (str(marked["kind"]), str(marked["metadata"]["name"])) in self._ours
        try:
            applied = self._apply(marked, timeout_s)
            return self._client.wait(applied, timeout_s=timeout_s, since=started)
        except BaseException:
            if not known:
                self._clean_up(str(marked["kind"]), str(marked["metadata"]["name"]))
            raise

    def dry_run(self, *manifests: Mapping[str, Any]) -> tuple[Change, ...]:
        """What the API server says that `apply` would do to each; nothing is changed.

        Raises:
            InputError: one is refused, or is somebody else's.
            UnreachableError: the API server did not answer, or refused.
        """
        return tuple(self._client.dry_run(self._marked(manifest)) for manifest in manifests)

    def check_ready(self, profiles: Collection[ServingProfile] = ()) -> None:
        """Returns where candidates could be deployed: what is told here costs nothing yet, and changes nothing.

        Args:
            profiles: how candidates will be served, to see whether the Servers can.

        Raises:
            InputError: there is no such namespace, no Server of a name that the options give, it is known not to have
                a capability, or a Model is refused.
            UnreachableError: the API server or the mesh does not answer, or this account may not do it.
        """
        self._mesh.check()
        for server, name in self._options.servers.items():
            found = self._client.read("Server", name)
            if found is None:
                known = ", ".join(sorted(str(one["metadata"]["name"]) for one in self._client.list_all("Server")))
                raise InputError(
                    f"there is no Server {name!r} in {self._client.namespace}", hint=f"There are: {known or 'none'}."
                )
            for backend in sorted({profile.backend for profile in profiles if profile.server == server}):
                if lacking := lacking_in(found, self._options.needed_by(backend)):
                    raise InputError(
                        f"the Server {name} has no capability {', '.join(lacking)}, which the backend {backend} needs",
                        hint="`burnish render --with-server IMAGE` writes a Server that has it; or say in requirements "
                        "what this one calls it.",
                    )
            self.server_version(server)
        probe: Manifest = {
            "apiVersion": MLOPS,
            "kind": "Model",
            "metadata": {"name": f"burnish-probe-{self._run}"},
            "spec": {"storageUri": "gs://burnish/probe", "requirements": ["none"], "replicas": 1},
        }
        self.dry_run(probe)

    def remove_leftovers(self) -> tuple[str, ...]:
        """Deletes the Models that a killed run of the same owner left, and returns their names.

        Raises:
            UnreachableError: the API server did not answer, or refused, or a Model does not go.
        """
        left = [one for one in self._client.list_all("Model") if labels_on(one).get(CAMPAIGN) == self._options.owner]
        # A list does not say the kind of what is in it.
        left = [{**one, "kind": "Model"} for one in left if labels_on(one).get(RUN) != self._run]
        for one in left:
            self._delete(one)
        return tuple(sorted(str(one["metadata"]["name"]) for one in left))

    def server_version(self, server: str) -> str:
        """The image of the Server that runs ``mlserver`` or ``triton`` candidates, as far as Kubernetes shows it.

        Raises:
            UnreachableError: the API server did not answer.
        """
        name = self._options.servers.get(server, server)
        found = self._client.read("Server", name)
        if found is None:
            return UNKNOWN_VERSION
        config = self._client.read("ServerConfig", str(found["spec"].get("serverConfig")))
        images = [image for one in (found, config) if (image := image_of(one, server)) is not None]
        return images[0] if images else UNKNOWN_VERSION

    def close(self) -> None:
        """Deletes all that was applied here and is still there, the last first; what stays is named in the log."""
        for kind, name in reversed(self._ours.copy()):
            self._clean_up(kind, name)

    def check(self, deployment: KubernetesDeployment) -> str:
        """What tells this life of a deployment from the next, where it is still served as it was; empty where unknown.

        Raises:
            ServerDiedError: it is not available any more, or somebody changed or replaced its Model.
            UnreachableError: the API server did not answer, or refused.
        """
        name, applied = deployment.target.model, deployment.applied
        found = self._client.read("Model", name)
        if found is None:
            raise ServerDiedError(f"{name} is not available on Core 2 any more: its Model is gone")
        metadata = found["metadata"]
        if (
            metadata["uid"] != applied.uid
            or metadata.get("generation") != applied.generation
            or not self._is_ours(found)
        ):
            raise ServerDiedError(f"somebody changed or replaced the Model {name} since it was deployed")
        state = read_state(found)
        if not state.ready:
            raise ServerDiedError(f"{name} is not available on Core 2 any more: {state.state} {state.reason}".rstrip())
        since = conditions_of(found).get("Ready", {}).get("lastTransitionTime")
        return f"{state.server or 'its server'}, ready since {since}" if since else ""

    def take_away(self, kind: str, name: str) -> None:
        """Deletes what was applied here and returns when it is gone; what somebody has put in its place is left.

        Raises:
            UnreachableError: it could not be deleted, or the API server did not answer, or refused.
        """
        if (kind, name) not in self._ours:
            return
        found = self._client.read(kind, name)
        if found is not None and not self._is_ours(found):
            logger.warning("the %s %s is somebody else's by now, and is left there", kind, name)
        elif found is not None:
            self._delete(found)
        self._ours.remove((kind, name))

    # --- parts of it ---

    def _clean_up(self, kind: str, name: str) -> None:
        try:
            self.take_away(kind, name)
        except BurnishError as error:
            logger.warning("the %s %s may still be there: %s", kind, name, error.message)

    def _apply(self, manifest: Manifest, timeout_s: float) -> Applied:
        key = (str(manifest["kind"]), str(manifest["metadata"]["name"]))
        added = key not in self._ours
        if added:
            # Before the call: where its answer is lost, the resource is there all the same. Labels tell whose it is.
            self._ours.append(key)
        try:
            return self._client.apply(manifest, timeout_s=timeout_s)
        except InputError:
            if added:
                self._ours.remove(key)
            raise

    def _delete(self, found: Manifest) -> None:
        kind, metadata = str(found["kind"]), found["metadata"]
        if not metadata.get("deletionTimestamp"):
            self._client.delete(found)
        self._client.wait_until_deleted(kind, metadata["name"], metadata["uid"], timeout_s=self._options.unload_s)

    def _clear(self, name: str) -> None:
        """Returns when the name of a Model is free; what an earlier run of the same campaign left is deleted.

        Raises:
            InputError: it is somebody else's.
            UnreachableError: it is being deleted, and does not end.
        """
        found = self._client.read("Model", name)
        if found is None:
            return
        owner = labels_on(found).get(CAMPAIGN)
        if owner != self._options.owner and not found["metadata"].get("deletionTimestamp"):
            whose = f"the campaign {owner}" if owner else "somebody else"
            raise InputError(
                f"Core 2 has a Model {name} already, which {whose} made",
                hint="Delete it, or let the other campaign end.",
            )
        self._delete(found)

    def _marked(self, manifest: Mapping[str, Any]) -> Manifest:
        metadata = dict(manifest["metadata"])
        metadata["labels"] = {**metadata.get("labels", {}), CAMPAIGN: self._options.owner, RUN: self._run}
        marked = {**manifest, "metadata": metadata}
        check_manifest(marked, self._version)
        return marked

    def _is_ours(self, found: Manifest) -> bool:
        labels = labels_on(found)
        return labels.get(CAMPAIGN) == self._options.owner and labels.get(RUN) == self._run

    def _model(
        self, name: str, candidate: Candidate, artifact: Artifact, uri: str, extra: Mapping[str, str]
    ) -> Manifest:
        options = self._options
        manifest = render_model(
            name,
            candidate,
            storage_uri=uri,
            labels={**labels_of(candidate, options.owner), RUN: self._run},
            extra=extra,
            memory_bytes=options.memory_bytes(candidate, artifact),
            server=options.servers.get(candidate.serving.server),
            secret_name=options.secret,
            version=self._version,
        )
        manifest["spec"]["requirements"] = list(options.needed_by(candidate.serving.backend))
        return manifest
