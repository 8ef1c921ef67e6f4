"""Manifests of production, applied to a Kubernetes cluster with Core 2."""

import time

from profiles.deploy.core2_candidates import Mesh
from profiles.deploy.kubernetes_client import KubernetesClient
from profiles.deploy.kubernetes_resources import CAMPAIGN, RUN, labels_on
from profiles.deploy.rollout import PRODUCTION, owned
from profiles.serving.core2.manifests import Manifest
from registry.errors import InputError

TIMEOUT_S = 300.0


class KubernetesApplier:
    """Implements `profiles.deploy.rollout.Applier` in one namespace."""

    def __init__(
        self,
        client: KubernetesClient,
        mesh: Mesh,
        *,
        location: str,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Connects to nothing yet.

        Args:
            client: of Kubernetes; the caller closes it.
            mesh: where requests go.
            location: which Core 2 it is, for people.
            timeout_s: longest wait for one resource.
        """
        self._client = client
        self._mesh = mesh
        self._location = location
        self._timeout_s = timeout_s

    @property
    def location(self) -> str:
        """Which Core 2 it is."""
        return self._location

    def read(self, kind: str, name: str) -> Manifest | None:
        """What is in force; a resource that is being deleted is, until it is gone.

        Raises:
            InputError: it is not burnish's.
            UnreachableError: the API server did not answer, or refused.
        """
        found = self._client.read(kind, name)
        if found is None:
            return None
        labels = dict(labels_on(found))
        if labels.get(RUN) != PRODUCTION:
            wanted = " ".join(f"{key}={value}" for key, value in owned(name).items())
            raise InputError(
                f"the {kind} {name} in {self._client.namespace} is not one that burnish promotes",
                hint="Give it over with `kubectl label --overwrite "
                f"{kind.lower()} {name} {wanted}`, and its fields with `kubectl apply --server-side "
                "--field-manager=burnish --force-conflicts -f FILE`.",
            )
        return {
            "apiVersion": found["apiVersion"],
            "kind": kind,
            "metadata": {"name": name, "labels": labels},
            "spec": found["spec"],
        }

    def apply(self, manifest: Manifest) -> None:
        """Applies a resource, and returns when Core 2 says that it is in force."""
        started = time.monotonic()
        name = str(manifest["metadata"]["name"])
        applied = self._client.apply(manifest, timeout_s=self._timeout_s)
        self._client.wait(applied, timeout_s=self._timeout_s, since=started)
        if manifest["kind"] == "Model":
            self._mesh.wait_for(self._mesh.target_of(name, "rest"), started + self._timeout_s)

    def delete(self, kind: str, name: str) -> None:
        """Deletes a resource that is burnish's, and returns when it is gone."""
        found = self._client.read(kind, name)
        if found is None or not labels_on(found).get(CAMPAIGN, "").startswith(f"{PRODUCTION}-"):
            return
        metadata = found["metadata"]
        if not metadata.get("deletionTimestamp"):
            self._client.delete({**found, "kind": kind})
        self._client.wait_until_deleted(kind, name, metadata["uid"], timeout_s=self._timeout_s)

    def splits(self, model: str) -> tuple[str, ...]:
        """The Experiments of the namespace that have the model for a candidate or mirror."""
        named = []
        for one in self._client.list_all("Experiment"):
            spec = one.get("spec") or {}
            asked = {str(candidate.get("name")) for candidate in spec.get("candidates") or []}
            if model in asked | {str((spec.get("mirror") or {}).get("name")), str(spec.get("default"))}:
                named.append(str(one["metadata"]["name"]))
        return tuple(sorted(named))
