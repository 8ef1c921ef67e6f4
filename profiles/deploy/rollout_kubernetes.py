"""Manifests of production, applied to a Kubernetes cluster with Core 2."""

import http.client
import logging
import time

from profiles.deploy.kubernetes_client import KubernetesClient
from profiles.deploy.kubernetes_resources import CAMPAIGN, RUN, Applied, is_stale, labels_on, read_state
from profiles.deploy.rollout import PRODUCTION, owned
from profiles.deploy.rollout_core2 import Core2Applier
from profiles.load.transports import ROUTE
from profiles.serving.core2.manifests import Manifest
from registry.errors import BurnishError, InputError
from registry.records import Target

logger = logging.getLogger(__name__)

SETTLE_S = 2.0
"""How long a changed Experiment is given where its status does not say that it is in force."""
_POLL_S = 0.1
_LEAST_WAIT_S = 1.0
_MESH_TIMEOUT_S = 5.0


class KubernetesApplier(Core2Applier[KubernetesClient]):
    """Implements `profiles.deploy.rollout.Applier` in one namespace."""

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
        """Applies a resource, and returns when it is in force.

        Core 2's operator does not say which change a status is of. A Model that was changed and stays ready all the
        time is in force once the mesh tells another version of it; an Experiment is given `SETTLE_S`, and who watches
        it sees who answers.
        """
        started = time.monotonic()
        name = str(manifest["metadata"]["name"])
        is_model = manifest["kind"] == "Model"
        version = self._version(name) if is_model else None
        applied = self._client.apply(manifest, timeout_s=self._timeout_s)
        if applied.before is None:
            self._client.wait(applied, timeout_s=self._timeout_s, since=started)
        else:
            self._wait_for_change(applied, version, started)
        if is_model:
            self._mesh.wait_for(self._mesh.target_of(name, "rest"), started + self._timeout_s)

    def _wait_for_change(self, applied: Applied, version: int | None, started: float) -> None:
        deadline = started + self._timeout_s
        while (now := time.monotonic()) < deadline:
            found = self._client.read(applied.kind, applied.name)
            if found is None or not is_stale(found, applied):
                break
            if read_state({**found, "kind": applied.kind}).ready and self._in_force(applied, version, now - started):
                return
            time.sleep(_POLL_S)
        self._client.wait(applied, timeout_s=max(deadline - time.monotonic(), _LEAST_WAIT_S))

    def _in_force(self, applied: Applied, version: int | None, waited_s: float) -> bool:
        """Whether a change is in force of which the status says nothing."""
        if applied.kind != "Model":
            return waited_s > SETTLE_S
        found = self._version(applied.name)
        return None not in (version, found) and found != version

    def _version(self, name: str) -> int | None:
        """The version of a Model that the mesh leads to; None where it does not say."""
        found = self._client.read("Model", name)
        if found is None:
            return None
        target = self._mesh.target_of(name, "rest")
        return version_in_mesh(target, most=int(found["metadata"].get("generation") or 1) + 1)

    def delete(self, kind: str, name: str) -> None:
        """Deletes a resource that is burnish's, and returns when it is gone."""
        found = self._client.read(kind, name)
        if found is None or not labels_on(found).get(CAMPAIGN, "").startswith(f"{PRODUCTION}-"):
            return
        metadata = found["metadata"]
        if not metadata.get("deletionTimestamp"):
            self._client.delete({**found, "kind": kind})
        self._client.wait_until_deleted(kind, name, metadata["uid"], timeout_s=self._timeout_s)

    def exists(self, kind: str, name: str) -> bool:
        """Whether the namespace has one of this name, whoever made it."""
        return self._client.read(kind, name) is not None

    def splits(self, name: str) -> tuple[str, ...]:
        """The Experiments of the namespace that have a model or pipeline for a candidate or mirror."""
        named = []
        for one in self._client.list_all("Experiment"):
            spec = one.get("spec") or {}
            asked = {str(candidate.get("name")) for candidate in spec.get("candidates") or []}
            if name in asked | {str((spec.get("mirror") or {}).get("name")), str(spec.get("default"))}:
                named.append(str(one["metadata"]["name"]))
        return tuple(sorted(named))

    def used_by(self, model: str) -> tuple[str, ...]:
        """The Pipelines of the namespace with a step of this name."""
        found = self._client.list_all("Pipeline")
        steps = {str(one["metadata"]["name"]): [step.get("name") for step in one["spec"]["steps"]] for one in found}
        return tuple(sorted(name for name, names in steps.items() if model in names))

    def replicas(self, model: str) -> int:
        """As many as the Model's spec has, whoever made it; 1 where it has none, which is Core 2's default."""
        found = self._client.read("Model", model)
        return 1 if found is None else int(found["spec"].get("replicas") or 1)

    def is_scaled(self, model: str) -> bool:
        """Whether an autoscaler of the namespace has the Model for its target, as far as this account may see."""
        try:
            listed = self._client.list_all("HorizontalPodAutoscaler")
        except BurnishError as error:
            logger.debug("autoscalers cannot be listed: %s", error.message)
            return False
        targets = [(one.get("spec") or {}).get("scaleTargetRef") or {} for one in listed]
        return any((one.get("kind"), one.get("name")) == ("Model", model) for one in targets)


def version_in_mesh(target: Target, *, most: int) -> int | None:
    """The version of a model that a mesh leads to; None where it does not say, or has none up to ``most``.

    An experiment may lead requests to the model elsewhere. Then whoever sends back the route of a version stays with
    that version, where there is one.
    """
    for sent in ("", *(f":{target.model}_{number}:" for number in range(most, 0, -1))):
        route = _route_of(target, sent)
        name, _, number = route.strip(":").rpartition("_")
        if name == target.model and number.isdecimal() and sent in {"", route}:
            return int(number)
        if not route:
            return None
    return None


def _route_of(target: Target, sent: str) -> str:
    kind = http.client.HTTPSConnection if target.tls else http.client.HTTPConnection
    connection = kind(target.url, timeout=_MESH_TIMEOUT_S)
    headers = {**target.headers, **({ROUTE: sent} if sent else {})}
    try:
        connection.request("GET", f"/v2/models/{target.model}/ready", headers=headers)
        answer = connection.getresponse()
        answer.read()
        return answer.headers.get(ROUTE) or ""
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
