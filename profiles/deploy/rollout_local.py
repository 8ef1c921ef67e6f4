"""Manifests of production on this machine: servers, and a real Envoy before them that splits as Core 2 does.

A file holds what is applied; the servers that it asks for are started from it, by whoever opens it. So a promotion that
was killed leaves what it had applied, and no server.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from profiles.deploy.core2_messages import Experiment
from profiles.deploy.envoy import EnvoyFront, route_to
from profiles.deploy.envoy_config import RETRIES, ModelRoute
from profiles.deploy.local import LocalCluster, LocalDeployment
from profiles.deploy.rollout_scheduler import experiment_of
from profiles.serving.core2.manifests import Manifest
from registry import codec
from registry.errors import InputError
from registry.ledger import write_durably
from registry.ports import Store
from registry.records import Artifact, Candidate, Target

CANDIDATE = "burnish.candidate"
TIMEOUT_S = 120.0


class LocalProduction:
    """What this machine serves in production. A context manager that ends all of its servers.

    Implements `profiles.deploy.rollout.Applier`. Outside of the block what is applied is kept, and nothing served.

    Attributes:
        front: the Envoy, once something is served.
    """

    def __init__(
        self,
        work: Path,
        store: Store,
        *,
        port: int | None = None,
        server_cpus: Sequence[int] = (),
        retries: int = RETRIES,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Starts nothing yet.

        Args:
            work: the working folder; what is applied is kept under ``production``.
            store: has the artifacts.
            port: of Envoy; None for a free one.
            server_cpus: the CPUs that servers may use; all where none are given.
            retries: how often Envoy sends a failed request again.
            timeout_s: longest wait for one server.
        """
        self.front: EnvoyFront | None = None
        self._work = work
        self._store = store
        self._folder = work / "production"
        self._port = port
        self._cpus = tuple(server_cpus)
        self._retries = retries
        self._timeout_s = timeout_s
        self._deployed: dict[str, LocalDeployment] = {}
        self._serving = False

    def __enter__(self) -> Self:
        """Serves what is applied.

        Raises:
            InputError: what is applied names what is not in the store any more.
            UnreachableError: a server did not come about.
        """
        self._stack = ExitStack()
        try:
            self._cluster = self._stack.enter_context(LocalCluster(self._folder, server_cpus=self._cpus))
            self._bring_about(self._applied())
        except BaseException:
            self._stack.close()
            raise
        self._serving = True
        return self

    def __exit__(self, *_: object) -> None:
        self.front, self._serving = None, False
        self._deployed.clear()
        self._stack.close()

    @property
    def location(self) -> str:
        """Says that it is this machine."""
        return "this machine"

    def know(self, candidate: Candidate, artifact: Artifact) -> None:
        """Keeps what a Model that carries the candidate's id serves."""
        told = {"candidate": codec.to_jsonable(candidate), "artifact": codec.to_jsonable(artifact)}
        write_durably(self._folder / "candidates" / f"{candidate.id}.json", codec.canonical(told))

    def read(self, kind: str, name: str) -> Manifest | None:
        """What is applied."""
        return self._applied().get(f"{kind}/{name}")

    def apply(self, manifest: Manifest) -> None:
        """Serves or splits as the manifest says, inside of the block, and then keeps it as applied.

        Raises:
            InputError: an experiment is of a Model that is not applied, or a Model of no candidate that is known.
            UnreachableError: a server did not come about, or what is applied could not be written; all is served as
                before.
        """
        self._change({**self._applied(), f"{manifest['kind']}/{manifest['metadata']['name']}": manifest})

    def delete(self, kind: str, name: str) -> None:
        """Takes a resource away; of one that is not there, there is nothing to do."""
        applied = self._applied()
        if applied.pop(f"{kind}/{name}", None) is not None:
            self._change(applied)

    def exists(self, kind: str, name: str) -> bool:
        """Whether it is applied."""
        return self.read(kind, name) is not None

    def used_by(self, model: str) -> tuple[str, ...]:
        """None: this machine has no pipelines in production."""
        return ()

    def splits(self, name: str) -> tuple[str, ...]:
        """The experiments that have a model for a candidate or mirror."""
        experiments = [experiment_of(one) for one in self._applied().values() if one["kind"] == "Experiment"]
        return tuple(sorted(one.name for one in experiments if name in one.weights or (one.mirror or ("",))[0] == name))

    def replicas(self, model: str) -> int:
        """One: there is one server for each Model here."""
        return 1

    def is_scaled(self, model: str) -> bool:
        """No: nothing scales here."""
        return False

    def target(self, name: str, protocol: Literal["grpc", "rest"]) -> Target:
        """Where a model or an experiment is asked; see `EnvoyFront.target`.

        Raises:
            InputError: nothing is served.
        """
        if self.front is None:
            raise InputError("nothing is in production on this machine")
        return self.front.target(name, protocol)

    # --- parts of it ---

    def _change(self, applied: Mapping[str, Manifest]) -> None:
        before = self._applied()
        try:
            if self._serving:
                self._bring_about(applied)
            kept = {"applied": dict(applied), "versions": self._versions(applied)}
            write_durably(self._folder / "applied.json", json.dumps(kept, indent=1))
        except BaseException:
            if self._serving:
                self._bring_about(before)
            raise
        self._end_unused(applied)

    def _bring_about(self, applied: Mapping[str, Manifest]) -> None:
        models = {str(one["metadata"]["name"]): one for one in applied.values() if one["kind"] == "Model"}
        experiments = [experiment_of(one) for one in applied.values() if one["kind"] == "Experiment"]
        versions = self._versions(applied)
        routes = [self._route(name, one, versions[f"Model/{name}"][1]) for name, one in models.items()]
        if self.front is not None:
            self.front.update(models=routes, experiments=experiments)
        elif routes:
            self.front = self._stack.enter_context(self._envoy(routes, experiments))

    def _envoy(self, routes: Sequence[ModelRoute], experiments: Sequence[Experiment]) -> EnvoyFront:
        return EnvoyFront(self._folder, routes, experiments, port=self._port, retries=self._retries, cpus=self._cpus)

    def _route(self, name: str, manifest: Manifest, version: int) -> ModelRoute:
        """The way to a Model's server, which is started where it is not there; one server does for two Models."""
        candidate_id = str(manifest["metadata"].get("labels", {}).get(CANDIDATE))
        if candidate_id not in self._deployed:
            candidate, artifact = self._known(candidate_id, name)
            files = self._store.path(artifact)
            self._deployed[candidate_id] = self._cluster.deploy(candidate, artifact, files, timeout_s=self._timeout_s)
        deployment = self._deployed[candidate_id]
        there = route_to(deployment)
        return replace(there, name=name, version=version, served_as=there.served_as or deployment.target.model)

    def _known(self, candidate_id: str, name: str) -> tuple[Candidate, Artifact]:
        path = self._folder / "candidates" / f"{candidate_id}.json"
        if not path.is_file():
            raise InputError(f"the Model {name} is of a candidate {candidate_id!r} that is not known in {self._work}")
        told = json.loads(path.read_text(encoding="utf-8"))
        return (
            codec.from_jsonable(Candidate, told["candidate"]),
            codec.from_jsonable(Artifact, told["artifact"]),
        )

    def _end_unused(self, applied: Mapping[str, Manifest]) -> None:
        used = {str(one["metadata"].get("labels", {}).get(CANDIDATE)) for one in applied.values()}
        for candidate_id in sorted(self._deployed.keys() - used):
            self._deployed.pop(candidate_id).undeploy()

    def _state(self) -> dict[str, Any]:
        path = self._folder / "applied.json"
        if not path.is_file():
            return {"applied": {}, "versions": {}}
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return state

    def _applied(self) -> dict[str, Manifest]:
        return dict(self._state()["applied"])

    def _versions(self, applied: Mapping[str, Manifest]) -> dict[str, tuple[str, int]]:
        """Model -> digest of what it serves, and Core 2's count of its versions."""
        before = self._state()["versions"]
        versions = {}
        for key, manifest in applied.items():
            if manifest["kind"] == "Model":
                spec = {name: value for name, value in manifest["spec"].items() if "eplicas" not in name}
                now = codec.digest(spec)
                known, number = before.get(key, ("", 0))
                versions[key] = (now, number if known == now else number + 1)
        return versions
