"""Candidates served on Core 2, where its scheduler is spoken to and nobody else commands it."""

import logging
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from profiles.deploy.cluster import Usage
from profiles.deploy.core2_candidates import UNKNOWN_VERSION, Core2Options, Mesh, look_again, place_folder
from profiles.deploy.core2_messages import AVAILABLE, GOING, Core2Model, ModelVersion
from profiles.deploy.scheduler import SchedulerClient
from profiles.serving.core2.sizing import counted_copies
from registry.errors import BurnishError, InputError, ServerDiedError, UnreachableError
from registry.records import Artifact, Candidate, ServingProfile, Target

logger = logging.getLogger(__name__)

OWNER = "burnish_campaign"
"""The parameter that says whose a model is. A model without it, or with another value, is left alone."""


class Core2Deployment:
    """One candidate served on Core 2; made by `Core2SchedulerCluster.deploy`.

    Attributes:
        candidate: what is served.
        target: the mesh, with the header that leads to it.
        load_time_s: from the request to load it until the mesh answers for it, its download to the server included.
        rendered: path -> text of the files that were rendered for it.
        uri: where Core 2 fetched it.
        server: the server that it is on.
        version: Core 2's number of it; replies carry it.
    """

    def __init__(
        self,
        cluster: "Core2SchedulerCluster",
        candidate: Candidate,
        *,
        target: Target,
        rendered: dict[str, str],
        uri: str,
        found: ModelVersion,
        load_time_s: float,
    ) -> None:
        self.candidate = candidate
        self.target = target
        self.rendered = rendered
        self.uri = uri
        self.server = found.server
        self.version = found.version
        self.load_time_s = load_time_s
        self._cluster = cluster

    @property
    def statistics(self) -> None:
        """Nothing: the mesh leads to the model alone, not to what its server tells of itself."""

    def usage(self) -> Usage | None:
        """Which life of its server this is; what it uses, the scheduler does not know.

        A server that was restarted or evicted has to load the model anew, and the scheduler says when a replica's state
        changed last. One that does not answer is no reason to end a measurement: the mesh serves without it.

        Raises:
            ServerDiedError: it is not available any more, or somebody loaded another model under its name.
        """
        found = look_again(self.target.model, lambda: self._cluster.check(self))
        if found is None or not found.changed_ns:
            return None
        since = datetime.fromtimestamp(found.changed_ns / 1e9, UTC).isoformat(timespec="milliseconds")
        return Usage(instance=f"{found.server} with {found.available_replicas} replicas since {since}")

    def undeploy(self) -> None:
        """Unloads it and returns when its memory is free; a second call does nothing.

        Raises:
            UnreachableError: it could not be unloaded; `Core2SchedulerCluster.close` tries again.
        """
        self._cluster.take_away(self.target.model)


class Core2SchedulerCluster:
    """Serves candidates on one Core 2, each as a model of its own. A context manager that unloads them all.

    A model carries the name of its candidate and the mark of its campaign. One of the same name without that mark is
    somebody else's, and is neither taken over nor unloaded. One with the mark is what a killed run left, and is used.
    """

    def __init__(self, client: SchedulerClient, options: Core2Options) -> None:
        """Connects to nothing yet.

        Args:
            client: of the scheduler; the caller closes it, after this.
            options: how candidates are served.
        """
        self._client = client
        self._options = options
        self._mesh = Mesh(
            options.mesh,
            tls=options.mesh_tls,
            hint="In docker compose it is at port 9000, in Kubernetes at port 80 of the service seldon-mesh.",
        )
        self._ours: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def deploy(self, candidate: Candidate, artifact: Artifact, files: Path, *, timeout_s: float) -> Core2Deployment:
        """Serves the candidate and returns when the mesh answers for its model.

        What it has loaded it unloads again where the model does not come about.

        Args:
            candidate: what to serve, and how.
            artifact: its model.
            files: folder with the artifact's files, which are copied.
            timeout_s: longest wait from the request to load it; its upload is not in that.

        Raises:
            InputError: the candidate cannot be served as it asks to be, or a model of its name is somebody else's.
            SchedulerRefusedError: the scheduler does not take it.
            UnreachableError: it could not be scheduled or loaded (with Core 2's reason), was not ready in time, or the
                scheduler or the mesh did not answer.
        """
        name, folder = self._options.folder_of(candidate, artifact)
        self._mesh.check()
        self._check_free(name)
        uri = place_folder(name, folder, artifact, files, self._options.place)
        model = self._model(name, candidate, artifact, uri)
        self._ours.add(name)
        started = time.monotonic()
        try:
            found = self._client.wait_for_model(self._client.load_model(model), timeout_s=timeout_s)
            target = self._mesh.target(candidate, name)
            self._mesh.wait_for(target, started + timeout_s)
        except BaseException:
            # Ctrl-C too: nothing half-loaded is left.
            self._clean_up(name)
            raise
        took_s = time.monotonic() - started
        rendered = dict(folder.rendered)
        return Core2Deployment(
            self, candidate, target=target, rendered=rendered, uri=uri, found=found, load_time_s=took_s
        )

    def check_ready(self, profiles: Collection[ServingProfile] = ()) -> None:
        """Returns where candidates could be deployed: what is told here costs nothing yet.

        Args:
            profiles: how candidates will be served; what servers can, the scheduler does not tell.

        Raises:
            InputError: there is no server of a name that the options give.
            UnreachableError: the scheduler or the mesh does not answer, or no server is connected.
        """
        self._mesh.check()
        connected = {server.name: server.available_replicas > 0 for server in self._client.server_status()}
        if not any(connected.values()):
            raise UnreachableError("no server is connected to Core 2's scheduler")
        for wanted in self._options.servers.values():
            if wanted not in connected:
                raise InputError(f"Core 2 has no server {wanted!r}", hint=f"It has: {', '.join(sorted(connected))}.")
            if not connected[wanted]:
                raise UnreachableError(f"no replica of Core 2's server {wanted!r} is connected to the scheduler")

    def remove_leftovers(self) -> tuple[str, ...]:
        """Unloads what a killed run of the same owner left, and returns its names.

        Raises:
            UnreachableError: the scheduler did not answer, or a model does not go.
        """
        found = self._client.models()
        left = sorted(
            name
            for name, version in found.items()
            if version.live and (version.parameters or {}).get(OWNER) == self._options.owner and name not in self._ours
        )
        self._ours.update(left)
        for name in left:
            self.take_away(name)
        return tuple(left)

    def server_version(self, server: str) -> str:
        """What is known of the version of ``mlserver`` or ``triton``: nothing, since the scheduler says nothing."""
        return UNKNOWN_VERSION

    def close(self) -> None:
        """Unloads all that was deployed here and is still there; what cannot be unloaded is named in the log."""
        for name in sorted(self._ours):
            self._clean_up(name)

    def check(self, deployment: Core2Deployment) -> ModelVersion:
        """What the scheduler says of a deployment that is still served as it was.

        Raises:
            ServerDiedError: it is not available any more, or somebody loaded another model under its name.
            UnreachableError: the scheduler did not answer.
        """
        name = deployment.target.model
        found = self._client.model(name)
        if found is None or found.state != AVAILABLE:
            state = "gone" if found is None else f"{found.state} {found.reason}".rstrip()
            raise ServerDiedError(f"{name} is not available on Core 2 any more: {state}")
        if found.version != deployment.version or not self._is_ours(found):
            raise ServerDiedError(
                f"somebody has loaded another model as {name} on Core 2: it was version {deployment.version}, and is "
                f"version {found.version}"
            )
        return found

    def take_away(self, name: str) -> None:
        """Unloads a model that was deployed here and returns when it is gone; see `Core2Deployment.undeploy`."""
        if name not in self._ours:
            return
        found = self._client.model(name)
        if found is not None and found.live and not self._is_ours(found):
            logger.warning("%s on Core 2 is somebody else's by now, and is left there", name)
        elif found is not None and found.live:
            self._client.unload_model(name)
            self._client.wait_until_unloaded(name, timeout_s=self._options.unload_s)
        self._ours.discard(name)

    # --- parts of it ---

    def _clean_up(self, name: str) -> None:
        try:
            self.take_away(name)
        except BurnishError as error:
            logger.warning("%s may still be loaded on Core 2: %s", name, error.message)

    def _check_free(self, name: str) -> None:
        """Returns when the name is free, or what has it was left by an earlier run of the same campaign.

        Raises:
            InputError: it is somebody else's.
            UnreachableError: it is being unloaded, and does not end.
        """
        found = self._client.model(name)
        if found is not None and found.state in GOING:
            self._client.wait_until_unloaded(name, timeout_s=self._options.unload_s)
            found = self._client.model(name)
        if found is None or not found.live:
            return
        if found.parameters is None or found.parameters.get(OWNER) != self._options.owner:
            whose = (found.parameters or {}).get(OWNER)
            raise InputError(
                f"Core 2 has a model {name} already, which {f'the campaign {whose}' if whose else 'somebody else'} "
                "loaded",
                hint="Unload it, or let the other campaign end.",
            )

    def _is_ours(self, found: ModelVersion) -> bool:
        # A scheduler that does not say what a model was loaded with cannot tell us of another's.
        return found.parameters is None or found.parameters.get(OWNER) == self._options.owner

    def _model(self, name: str, candidate: Candidate, artifact: Artifact, uri: str) -> Core2Model:
        options, serving = self._options, candidate.serving
        return Core2Model(
            name=name,
            uri=uri,
            requirements=options.needed_by(candidate.serving.backend),
            # Core 2 multiplies it by the copies.
            memory_bytes=options.memory_bytes(candidate, artifact) // counted_copies(serving),
            server=options.servers.get(serving.server),
            parameters={OWNER: options.owner},
            secret_name=options.secret,
        )
