"""Core 2 on Kubernetes: its custom resources applied, waited for and deleted, and candidates served through them.

Resources are applied server-side by the field manager `MANAGER`, which takes no field from anybody else, and carry the
labels of their campaign and run. One of the same name without the campaign's label is somebody else's: it is neither
taken over nor deleted.

Core 2's operator writes a Model's state where others write prose, and the other way round: ``message`` is the name of
the state, ``reason`` the free text. It also never says which generation a status is of, so that the status of a
resource that was changed may be of before the change; see `is_stale`.
"""

import hashlib
import http.client
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from profiles.serving.core2.folder import ModelFolder, model_folder, write_folder
from profiles.serving.core2.manifests import REQUIREMENTS, STOCK_CAPABILITIES, Manifest, labels_of, render_model
from profiles.serving.core2.schema import NEWEST, Core2Version, check_manifest
from profiles.serving.naming import model_name_of
from registry.errors import BurnishError, InputError, MissingExtraError, ServerDiedError, UnreachableError
from registry.records import Artifact, ArtifactFile, Candidate, Target

logger = logging.getLogger(__name__)

Place = Callable[[Artifact, Path], str]
"""Puts the files of a folder where Core 2 can fetch them, under their digest, and returns the rclone URI of that.

The folder has the model's name; the artifact is the folder's, with the rendered files and the digest over all.
"""

MANAGER = "burnish"
"""The field manager that owns what is applied here."""
CAMPAIGN = "burnish.campaign"
RUN = "burnish.run"
UNLOAD_S = 60.0
"""Longest that a resource may take to be gone: its finalizer waits until Core 2 has unloaded the model."""
PLURALS: Mapping[str, str] = {
    "Model": "models",
    "Server": "servers",
    "ServerConfig": "serverconfigs",
    "Experiment": "experiments",
    "Pipeline": "pipelines",
    "HorizontalPodAutoscaler": "horizontalpodautoscalers",
}
WITHOUT_READINESS = frozenset({"ServerConfig", "HorizontalPodAutoscaler"})
"""Kinds that are in force once they are applied: nothing writes a ``Ready`` condition on them."""
AVAILABLE = "ModelAvailable"
GOING = frozenset({"ModelTerminating", "ModelTerminate", "ModelTerminated", "ModelTerminateFailed", "ModelScaledDown"})

_API_VERSIONS = {"HorizontalPodAutoscaler": "autoscaling/v2"}
_MLOPS = "mlops.seldon.io/v1alpha1"
_POLL_S = 0.05
_LAST_POLL_S = 0.5
# The last call of a wait has time for an answer, so that a wait ends with what was seen.
_LEAST_CALL_S = 1.0
_RETRY_AFTER_S = 1.0
_MESH_TIMEOUT_S = 5.0
_WATCH_S = 300
_TEXT_LENGTH = 500


# --- what a resource says of itself ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceState:
    """A resource of Core 2, as its status has it.

    Attributes:
        kind: ``Model``, ``Server``, ...
        name: its name.
        ready: whether it is in force, with all replicas that it asks for.
        state: Core 2's name of a Model's state; for other kinds the conditions that do not hold, or empty.
        reason: why it is not ready; free text.
        replicas: how many it asks for.
        available_replicas: how many there are; None where the status does not say.
        server: the Server that a Model is on; empty where it is on none.
    """

    kind: str
    name: str
    ready: bool
    state: str
    reason: str
    replicas: int
    available_replicas: int | None
    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What was applied, and the status that stood there before.

    Attributes:
        kind: ``Model``, ``Server``, ...
        name: its name.
        uid: Kubernetes' own name of it; another one of the same name has another.
        generation: counts the changes of its spec.
        before: its ``Ready`` condition from before the change; None where nothing was there or nothing has changed.
        resource: the whole of it, as the API server answered.
    """

    kind: str
    name: str
    uid: str
    generation: int
    before: Mapping[str, Any] | None
    resource: Manifest = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldChange:
    """One field that would change: its path, and its values; None is for a field that is not there."""

    path: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the API server says that applying a manifest would do.

    Attributes:
        kind: ``Model``, ``Server``, ...
        name: of the resource.
        action: ``create``, ``change`` or ``none``.
        fields: of labels and spec, in order of their paths; server-side defaults are among them.
    """

    kind: str
    name: str
    action: str
    fields: tuple[FieldChange, ...]


def conditions_of(resource: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Type -> condition."""
    listed = (resource.get("status") or {}).get("conditions") or []
    return {str(one.get("type")): one for one in listed}


def read_state(resource: Mapping[str, Any]) -> ResourceState:
    """What a resource's status says, with message and reason where they belong."""
    kind, status = str(resource.get("kind")), resource.get("status") or {}
    conditions = conditions_of(resource)
    replicas = int((resource.get("spec") or {}).get("replicas") or 1)
    available = status.get("availableReplicas")
    holds = conditions.get("Ready", {}).get("status") == "True"
    if kind == "Model":
        own = conditions.get("ModelReady") or conditions.get("Ready") or {}
        state, reason = _text(own.get("message")), _text(own.get("reason"))
        holds = holds and state in {AVAILABLE, ""}
    else:
        failing = [one for one in conditions.values() if one.get("status") != "True" and one.get("type") != "Ready"]
        state = ", ".join(f"{one.get('type')} {one.get('status')}" for one in failing)
        words = [_text(one.get(key)) for one in failing for key in ("reason", "message")]
        reason = "; ".join(dict.fromkeys(word for word in words if word))
        holds = holds and not failing
    return ResourceState(
        kind=kind,
        name=str(resource["metadata"]["name"]),
        ready=kind in WITHOUT_READINESS or (holds and (available is None or int(available) >= replicas)),
        state=state,
        reason=reason,
        replicas=replicas,
        available_replicas=None if available is None else int(available),
        server=_server_of(status),
    )


def is_stale(resource: Mapping[str, Any], applied: Applied) -> bool:
    """Whether a status may be of before what was applied.

    An operator that sets ``observedGeneration`` says so itself. Core 2's does not: its status counts where the resource
    was made anew (and the condition is no older than it is), and after a change once the ``Ready`` condition is
    another than it was.
    """
    observed = (resource.get("status") or {}).get("observedGeneration") or 0
    if observed:
        return int(observed) < applied.generation
    ready = conditions_of(resource).get("Ready", {})
    # Kubernetes writes all times in UTC and in the same form, so they sort as text.
    since, made = ready.get("lastTransitionTime"), resource["metadata"].get("creationTimestamp")
    if since and made and since < made:
        return True
    return applied.before is not None and ready == applied.before


def changes_between(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    """The fields of labels and spec that differ, in order of their paths."""

    def told(resource: Mapping[str, Any] | None) -> dict[str, Any]:
        known = resource or {}
        labels = {f"metadata.labels[{key}]": text for key, text in _labels(known).items()}
        return {**labels, **dict(_leaves("spec", known.get("spec") or {}))}

    old, new = told(before), told(after)
    paths = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return tuple(FieldChange(path=path, before=old.get(path), after=new.get(path)) for path in paths)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    # Lists are compared whole: an entry that moved is a change of all after it.
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(f"{path}.{key}", below)
    else:
        yield path, value


def _server_of(status: Mapping[str, Any]) -> str:
    # The operator writes where a model has landed as the selector of its pods.
    selector = dict(part.partition("=")[::2] for part in str(status.get("selector") or "").split(","))
    return selector.get("server", "")


def _labels(resource: Mapping[str, Any]) -> Mapping[str, str]:
    return (resource.get("metadata") or {}).get("labels") or {}


def _text(value: Any) -> str:
    """Text of others on one line, and not too long."""
    line = " ".join(str(value or "").split())
    return line if len(line) <= _TEXT_LENGTH else f"{line[:_TEXT_LENGTH]}..."


# --- the API -----------------------------------------------------------------------------------------------------


class KubernetesClient:
    """Resources of Core 2 in one namespace. A context manager.

    A call whose connection is lost is made once more, and one that is to come again later waits as long as it is told,
    where there is time; each does the same the second time.
    """

    def __init__(
        self,
        *,
        namespace: str | None = None,
        context: str | None = None,
        kubeconfig: Path | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        """Reads the configuration; connects to nothing yet.

        Without ``kubeconfig`` it is that of ``$KUBECONFIG``, else ``~/.kube/config``, else the pod's own account.

        Args:
            namespace: of the resources; None for the context's, or the pod's.
            context: of the kubeconfig; None for its current one.
            kubeconfig: the file to read in place of the usual one.
            timeout_s: longest that one call may take; waiting has limits of its own.

        Raises:
            MissingExtraError: the client of Kubernetes is not installed.
            InputError: there is no configuration, it cannot be read, or it would send credentials unprotected.
        """
        try:
            import kubernetes
        except ImportError as error:
            raise MissingExtraError("Deploying to Kubernetes", extra="kubernetes") from error
        configuration = kubernetes.client.Configuration()
        found = _configure(configuration, context, kubeconfig)
        # Its own would wait for as long as it is told, and beyond every deadline.
        configuration.retries = False
        _check_protected(configuration)
        self.namespace = namespace or found or "default"
        self.host = str(configuration.host)
        self._timeout_s = timeout_s
        self._client = kubernetes.client.ApiClient(configuration)
        self._api = kubernetes.client.CustomObjectsApi(self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def read(self, kind: str, name: str, *, timeout_s: float | None = None) -> Manifest | None:
        """A resource as it stands, or None where there is none of this name.

        Raises:
            UnreachableError: the API server did not answer, or refused.
        """
        found = self._ask("get", kind, name, self._api.get_namespaced_custom_object, name=name, timeout_s=timeout_s)
        return None if found is None else dict(found)

    def list_all(self, kind: str) -> list[Manifest]:
        """All resources of a kind in the namespace.

        Raises:
            UnreachableError: the API server did not answer, or refused.
        """
        return list(self._ask("list", kind, "", self._api.list_namespaced_custom_object)["items"])

    def apply(self, manifest: Mapping[str, Any], *, timeout_s: float | None = None) -> Applied:
        """Creates a resource, or changes the one of its name where that is of the same campaign.

        Fields that others have set are theirs: the manifest must not say otherwise.

        Args:
            manifest: with the labels `CAMPAIGN` and `RUN`.
            timeout_s: longest that it may take, retries included; None for the client's own.

        Raises:
            InputError: it has no such label, is invalid, is somebody else's, or somebody else has set a field of it.
            UnreachableError: the API server did not answer, or refused.
        """
        before = self._check_ours(manifest, timeout_s)
        after = self._apply(manifest, timeout_s)
        made = after["metadata"]
        changed = before is not None and before["metadata"].get("generation") != made.get("generation")
        return Applied(
            kind=str(manifest["kind"]),
            name=str(made["name"]),
            uid=str(made["uid"]),
            generation=int(made.get("generation") or 1),
            before=conditions_of(before).get("Ready", {}) if before is not None and changed else None,
            resource=after,
        )

    def dry_run(self, manifest: Mapping[str, Any]) -> Change:
        """What `apply` would do, as the API server has it, which then forgets it.

        Raises:
            InputError: as `apply`.
            UnreachableError: the same.
        """
        before = self._check_ours(manifest, None)
        fields = changes_between(before, self._apply(manifest, None, dry_run="All"))
        action = "create" if before is None else "change" if fields else "none"
        return Change(kind=str(manifest["kind"]), name=str(manifest["metadata"]["name"]), action=action, fields=fields)

    def wait(self, applied: Applied, *, timeout_s: float, since: float | None = None) -> ResourceState:
        """Returns when what was applied is ready.

        Args:
            applied: what `apply` returned; a status from before it does not count.
            timeout_s: longest wait.
            since: from when on that counts, by the monotonic clock; None for now.

        Raises:
            UnreachableError: it could not be scheduled or loaded (with Core 2's reason), somebody deleted or replaced
                it, or time is up; or the API server did not answer, or refused.
        """
        seen, stale, what = None, True, f"{applied.kind} {applied.name}"
        deadline = (time.monotonic() if since is None else since) + timeout_s
        with closing(self._states(applied.kind, applied.name, deadline, applied.resource)) as states:
            for resource in states:
                if resource is None or resource["metadata"].get("deletionTimestamp"):
                    raise UnreachableError(f"somebody deleted the {what} in {self.namespace} while it was waited for")
                if resource["metadata"]["uid"] != applied.uid:
                    raise UnreachableError(f"somebody replaced the {what} in {self.namespace} while it was waited for")
                # Times have whole seconds: a condition that was another for a while may look as it did before.
                seen, stale = read_state(resource), stale and is_stale(resource, applied)
                if stale:
                    continue
                if seen.ready:
                    return seen
                self._check_failed(seen, resource)
        raise _too_late(f"the {what} is not ready after {timeout_s:g} s", seen, stale=stale)

    def delete(self, resource: Mapping[str, Any]) -> None:
        """Begins to delete a resource as it was read, and no other of its name; one that is gone is no error.

        Raises:
            UnreachableError: somebody has replaced it, or the API server did not answer, or refused.
        """
        import kubernetes

        kind, metadata = str(resource["kind"]), resource["metadata"]
        options = kubernetes.client.V1DeleteOptions(
            preconditions=kubernetes.client.V1Preconditions(uid=metadata["uid"]), propagation_policy="Foreground"
        )
        name = metadata["name"]
        self._ask("delete", kind, name, self._api.delete_namespaced_custom_object, name=name, body=options)

    def wait_until_deleted(self, kind: str, name: str, uid: str, *, timeout_s: float) -> None:
        """Returns when the resource of this ``uid`` is gone.

        Raises:
            UnreachableError: time is up, or the API server did not answer, or refused.
        """
        seen = None
        with closing(self._states(kind, name, time.monotonic() + timeout_s)) as states:
            for resource in states:
                if resource is None or resource["metadata"]["uid"] != uid:
                    return
                seen = read_state(resource)
        late = _too_late(f"the {kind} {name} is not deleted after {timeout_s:g} s", seen)
        raise UnreachableError(
            late.message, hint="Its finalizer waits until the scheduler and the model gateway have let it go."
        )

    # --- parts of it ---

    def _check_ours(self, manifest: Mapping[str, Any], timeout_s: float | None) -> Manifest | None:
        """What is there of a manifest's name, where it is of the manifest's campaign."""
        kind, name, labels = str(manifest["kind"]), str(manifest["metadata"]["name"]), _labels(manifest)
        if not labels.get(CAMPAIGN) or not labels.get(RUN):
            raise InputError(f"the {kind} {name} has no labels {CAMPAIGN} and {RUN}, which say whose it is")
        found = self.read(kind, name, timeout_s=timeout_s)
        if found is not None and (owner := _labels(found).get(CAMPAIGN)) != labels[CAMPAIGN]:
            whose = f"which the campaign {owner} made" if owner else "which is not of burnish's making"
            raise InputError(
                f"there is a {kind} {name} in {self.namespace} already, {whose}",
                hint="Delete it, or let the other campaign end.",
            )
        return found

    def _apply(self, manifest: Mapping[str, Any], timeout_s: float | None, **options: Any) -> Manifest:
        kind, name = str(manifest["kind"]), str(manifest["metadata"]["name"])

        def send(**more: Any) -> Any:
            return self._ask(
                "patch",
                kind,
                name,
                self._api.patch_namespaced_custom_object,
                name=name,
                body=dict(manifest),
                field_manager=MANAGER,
                field_validation="Strict",
                _content_type="application/apply-patch+yaml",
                timeout_s=timeout_s,
                **options,
                **more,
            )

        try:
            return dict(send())
        except _ConflictError as conflict:
            # A field that burnish itself has once set in another way than by applying.
            if conflict.managers != {MANAGER}:
                raise
            return dict(send(force=True))

    def _states(
        self, kind: str, name: str, deadline: float, known: Manifest | None = None
    ) -> Generator[Manifest | None, None, None]:
        """A resource as it is and at each of its changes, None where it is not there; ends when time is up.

        Begins with what is ``known`` of it, so that no change since then is missed.
        """
        pause_s = _POLL_S
        while (left_s := deadline - time.monotonic()) > 0:
            started = time.monotonic()
            if known is None:
                selector = f"metadata.name={name}"
                call = self._api.list_namespaced_custom_object
                listed = self._ask("list", kind, name, call, timeout_s=left_s, field_selector=selector)
                found, version = listed["items"], listed["metadata"]["resourceVersion"]
            else:
                found, version, known = [known], known["metadata"]["resourceVersion"], None
            yield dict(found[0]) if found else None
            yield from self._watch(kind, name, str(version), deadline)
            # A watch that ends at once is not begun again at once.
            if time.monotonic() - started < pause_s:
                time.sleep(max(0.0, min(pause_s, deadline - time.monotonic())))
                pause_s = min(pause_s * 1.5, _LAST_POLL_S)

    def _watch(self, kind: str, name: str, version: str, deadline: float) -> Iterator[Manifest | None]:
        """The changes since a version, until the server ends the watch or no longer knows the version."""
        import kubernetes
        import urllib3

        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return
        events = kubernetes.watch.Watch().stream(
            self._api.list_namespaced_custom_object,
            **self._path(kind),
            field_selector=f"metadata.name={name}",
            resource_version=version,
            timeout_seconds=min(_WATCH_S, math.ceil(left_s)),
            _request_timeout=(min(self._timeout_s, max(left_s, _LEAST_CALL_S)), left_s),
        )
        try:
            with closing(events):
                for event in events:
                    if event is not None and event["type"] in {"ADDED", "MODIFIED", "DELETED"}:
                        yield None if event["type"] == "DELETED" else dict(event["raw_object"])
                    if time.monotonic() >= deadline:
                        return
        except kubernetes.client.ApiException as error:
            # A version that is forgotten is listed again, and a server that is busy or failing is met by that list.
            if error.status < 500 and error.status not in {http.client.GONE, http.client.TOO_MANY_REQUESTS}:
                raise self._refused(error, "watch", kind, name) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            logger.debug("the watch of %s %s ended: %s", kind, name, error)

    def _path(self, kind: str) -> dict[str, str]:
        group, _, version = _API_VERSIONS.get(kind, _MLOPS).partition("/")
        return {"group": group, "version": version, "namespace": self.namespace, "plural": PLURALS[kind]}

    def _ask(
        self,
        verb: str,
        kind: str,
        about: str,
        call: Callable[..., Any],
        *,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Any:
        """What a call answers; None where there is no resource of the name that it is about."""
        import kubernetes
        import urllib3

        deadline, lost = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s), False
        while True:
            limit_s = min(self._timeout_s, max(deadline - time.monotonic(), _LEAST_CALL_S))
            try:
                return call(**self._path(kind), **fields, _request_timeout=limit_s)
            except kubernetes.client.ApiException as error:
                if verb in {"get", "delete"} and _is_absent(error, about):
                    return None
                pause_s = _pause_s(error)
                if pause_s is None or pause_s > deadline - time.monotonic():
                    raise self._refused(error, verb, kind, about) from error
                logger.debug("the Kubernetes API wants %s s of rest before %s of %s", pause_s, verb, kind)
                time.sleep(pause_s)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if _timed_out(error):
                    asked = f"{verb} {kind} {about}".rstrip()
                    raise UnreachableError(
                        f"the Kubernetes API at {self.host} did not answer {asked} within {limit_s:g} s"
                    ) from error
                if lost:
                    raise self._unreachable(error) from error
                lost = True

    def _unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"the Kubernetes API at {self.host} cannot be reached: {_cause(error)}",
            hint="Check the address in the kubeconfig, and that it can be reached from here.",
        )

    def _refused(self, error: Any, verb: str, kind: str, name: str) -> BurnishError:
        """The error for an answer that is a refusal."""
        path = self._path(kind)
        resource, where = f"{path['plural']}.{path['group']}", f"in the namespace {self.namespace}"
        asked, (status, said) = f"{verb} {kind} {name}".rstrip(), _said(error)
        made: BurnishError
        match error.status:
            case 401:
                made = UnreachableError(
                    f"the Kubernetes API at {self.host} does not know who we are at {asked} (401): {said}",
                    hint="The token has expired or is wrong: log in again, or renew the account's token.",
                )
            case 403:
                made = UnreachableError(
                    f"this account may not {verb} {resource} {where} (403): {said}",
                    hint=f"It needs a Role with the verb {verb} on {resource}.",
                )
            case 404 if (status.get("details") or {}).get("kind") == "namespaces":
                made = InputError(f"there is no namespace {self.namespace}", hint="Name one that is there.")
            case 404:
                made = UnreachableError(
                    f"the cluster at {self.host} has no resource {resource}/{path['version']}",
                    hint="Install Core 2 there, with its custom resources, or name another context.",
                )
            case 409:
                made = _conflict(status, said, asked, self.namespace)
            case 400 | 422:
                made = InputError(f"the Kubernetes API refused the {kind} {name} ({error.status}): {said}")
            case 429 | 503:
                made = UnreachableError(f"the Kubernetes API has no time for {asked} ({error.status}): {said}")
            case 0:
                made = UnreachableError(
                    f"the Kubernetes API at {self.host} cannot be trusted: {said}",
                    hint="The kubeconfig's certificate-authority has to have signed the server's certificate.",
                )
            case _:
                made = UnreachableError(f"the Kubernetes API failed at {asked} ({error.status}): {said}")
        return made

    def _check_failed(self, seen: ResourceState, resource: Mapping[str, Any]) -> None:
        if seen.kind != "Model":
            return
        spec = resource.get("spec") or {}
        if seen.state == "ScheduleFailed":
            raise UnreachableError(f"Core 2 cannot schedule {seen.name}: {seen.reason}", hint=self._room(spec))
        if seen.state == "ModelFailed":
            where = f" on {seen.server}" if seen.server else ""
            raise UnreachableError(
                f"Core 2 could not load {seen.name}{where}: {seen.reason}",
                hint=f"Its files are looked for at {spec.get('storageUri')}; the logs of rclone and of the server say "
                "more.",
            )
        if seen.state in GOING:
            raise UnreachableError(f"{seen.name} was taken away while it loaded: {seen.state} {seen.reason}".rstrip())

    def _room(self, spec: Mapping[str, Any]) -> str:
        """What can be said of why no Server takes a Model: Core 2's reason is the same for all causes."""
        needed = [str(one) for one in spec.get("requirements") or []]
        try:
            servers = {str(one["metadata"]["name"]): one for one in self.list_all("Server")}
        except BurnishError:
            return f"It needs a Server with {', '.join(needed) or 'no capability'}."
        wanted = spec.get("server")
        if wanted and wanted not in servers:
            return f"There is no Server {wanted!r}; there are: {', '.join(sorted(servers)) or 'none'}."
        asked = {name: one for name, one in servers.items() if not wanted or name == wanted}
        able = sorted(name for name, one in asked.items() if set(needed) <= _capabilities(one))
        if not able:
            return f"No Server has all of these capabilities: {', '.join(needed)}."
        ready = [name for name in able if read_state(servers[name]).ready]
        if not ready:
            return f"None of these Servers is ready: {', '.join(able)}."
        memory = spec.get("memory") or "no memory"
        return f"{', '.join(ready)} can run it; so look for {memory} on each of {spec.get('replicas') or 1} replicas."


class _ConflictError(InputError):
    """Somebody else has set a field.

    Attributes:
        managers: who has.
    """

    def __init__(self, message: str, *, managers: set[str], hint: str) -> None:
        super().__init__(message, hint=hint)
        self.managers = managers


def _conflict(status: Mapping[str, Any], said: str, asked: str, namespace: str) -> BurnishError:
    causes = (status.get("details") or {}).get("causes") or []
    # A cause reads: conflict with "<manager>" [with subresource "status"] using <version>[ at <time>]
    taken = [(_text(one.get("field")), str(one.get("message")).split('"')) for one in causes if one.get("field")]
    fields = {field: parts[1] for field, parts in taken if len(parts) > 1}
    if not fields:
        return UnreachableError(f"somebody else changed it at the time of {asked} in {namespace} (409): {said}")
    told = ", ".join(f"{manager} has set {field}" for field, manager in fields.items())
    return _ConflictError(
        f"somebody else changed what {asked} in {namespace} is to set (409): {told}",
        managers=set(fields.values()),
        hint="Give the field back (kubectl apply without it), or delete the resource.",
    )


def _said(error: Any) -> tuple[Mapping[str, Any], str]:
    """(the Status object of an answer, or nothing, and its words on one line)."""
    try:
        status = json.loads(error.body or "")
    except (TypeError, ValueError):
        status = {}
    if not isinstance(status, dict):
        status = {}
    return status, _text(status.get("message") or error.reason or "no reason given")


def _is_absent(error: Any, name: str) -> bool:
    """Whether it is this resource that is not there, and not its kind or namespace."""
    details = _said(error)[0].get("details") or {}
    known = details.get("name") == name and details.get("kind") != "namespaces"
    return error.status == http.client.NOT_FOUND and known


def _pause_s(error: Any) -> float | None:
    """How long the server wants to be left alone; None where a second call is no use."""
    asked = (error.headers or {}).get("Retry-After")
    if error.status not in {http.client.TOO_MANY_REQUESTS, http.client.SERVICE_UNAVAILABLE}:
        return None
    if asked is None or not str(asked).isdigit():
        return _RETRY_AFTER_S if error.status == http.client.TOO_MANY_REQUESTS else None
    return max(_POLL_S, float(asked))


def _timed_out(error: Exception) -> bool:
    from urllib3.exceptions import NewConnectionError
    from urllib3.exceptions import TimeoutError as UrllibTimeoutError

    # To urllib3 a connection that is refused is one that came too late.
    return isinstance(error, UrllibTimeoutError) and not isinstance(error, NewConnectionError)


def _cause(error: Exception) -> str:
    # urllib3 puts its own objects before the words.
    return _text(str(error).rpartition(">: ")[2] or error) or type(error).__name__


def _capabilities(server: Mapping[str, Any]) -> set[str]:
    spec = server.get("spec") or {}
    own = spec.get("capabilities")
    stock = STOCK_CAPABILITIES.get(str(spec.get("serverConfig")), frozenset())
    return set(own) if own else set(stock) | set(spec.get("extraCapabilities") or [])


def _too_late(what: str, seen: ResourceState | None, *, stale: bool = False) -> UnreachableError:
    if seen is None:
        return UnreachableError(f"{what}: Kubernetes shows nothing of it yet")
    if stale:
        return UnreachableError(f"{what}: its status is of before the change")
    state = f"it is in the state {seen.state}" if seen.state else "nothing has been said of it yet"
    counted = ""
    if seen.available_replicas is not None and seen.available_replicas < seen.replicas:
        counted = f", with {seen.available_replicas} of {seen.replicas} replicas"
    return UnreachableError(f"{what}: {state}{counted}" + (f" ({seen.reason})" if seen.reason else ""))


# --- configuration -----------------------------------------------------------------------------------------------


def _configure(configuration: Any, context: str | None, kubeconfig: Path | None) -> str | None:
    """Fills the configuration, and returns the namespace that goes with it."""
    import yaml
    from kubernetes import config

    usual = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    # $KUBECONFIG may name several files, of which some are not there.
    files = [str(kubeconfig)] if kubeconfig is not None else usual.split(os.pathsep)
    present = os.pathsep.join(file for file in files if Path(file).is_file())
    try:
        if present:
            config.load_kube_config(present, context=context, client_configuration=configuration, persist_config=False)
            listed, current = config.list_kube_config_contexts(present)
            chosen = next((one for one in listed if one["name"] == context), current)
            return (chosen.get("context") or {}).get("namespace")
        if kubeconfig is not None or context is not None or "KUBERNETES_SERVICE_HOST" not in os.environ:
            raise InputError(
                f"there is no kubeconfig at {', '.join(files)}",
                hint="Name one, or set KUBECONFIG; in a pod, the pod's own account is used where there is none.",
            )
        config.load_incluster_config(client_configuration=configuration)
        return _own_namespace(Path(config.incluster_config.SERVICE_TOKEN_FILENAME).with_name("namespace"))
    except (config.ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        # A file of any content may fail in any way; its content may be secret, so that only our client's words go on.
        known = _text(error) if isinstance(error, config.ConfigException) else "it is no kubeconfig"
        raise InputError(
            f"the configuration of Kubernetes cannot be used ({present or 'of the pod'}): {known}"
        ) from None


def _own_namespace(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None


def _check_protected(configuration: Any) -> None:
    """Returns where no credential goes to somebody who is not known."""
    address = urlsplit(str(configuration.host))
    if not configuration.verify_ssl:
        raise InputError(
            f"the kubeconfig says not to verify who {address.netloc} is",
            hint="Take out insecure-skip-tls-verify, and name the cluster's certificate-authority.",
        )
    if (
        address.scheme != "https"
        and configuration.api_key
        and address.hostname not in {"localhost", "127.0.0.1", "::1"}
    ):
        raise InputError(
            f"a token would be sent to {address.netloc} without TLS", hint="Use its https address in the kubeconfig."
        )


# --- candidates --------------------------------------------------------------------------------------------------


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

    def usage(self) -> None:
        """Returns where it is still served as it was; what it uses, its Model does not say.

        An API server that does not answer is no reason to end a measurement: the mesh serves without it.

        Raises:
            ServerDiedError: it is not available any more, or somebody changed or replaced its Model.
        """
        try:
            self._cluster.check(self)
        except ServerDiedError:
            raise
        except UnreachableError as error:
            logger.warning("Whether %s is still served as it was is not known: %s", self.target.model, error.message)

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
        self,
        client: KubernetesClient,
        *,
        mesh: str,
        place: Place,
        owner: str,
        run: str,
        mesh_tls: bool = False,
        servers: Mapping[str, str] | None = None,
        requirements: Mapping[str, tuple[str, ...]] | None = None,
        memory_bytes: Callable[[Candidate, Artifact], int] | None = None,
        workers: int = 0,
        unload_s: float = UNLOAD_S,
        version: Core2Version = NEWEST,
    ) -> None:
        """Connects to nothing yet.

        Args:
            client: of Kubernetes; the caller closes it, after this.
            mesh: ``host:port`` of the data plane, where REST and gRPC are both answered.
            place: puts a candidate's folder where Core 2 fetches it.
            owner: the campaign's name for itself, the same in each of its runs and no other campaign's; a label.
            run: the run's; a label. Only what carries it is deleted.
            mesh_tls: whether the mesh speaks TLS.
            servers: ``mlserver`` or ``triton`` -> the one Server to use; without one, the scheduler chooses.
            requirements: backend -> capabilities; what is not named here is as in `REQUIREMENTS`.
            memory_bytes: what all copies of a candidate take together; without it, the size of the artifact's files,
                which is less than it will take.
            workers: ``MLSERVER_PARALLEL_WORKERS`` of the MLServer Servers, which no Model can change.
            unload_s: longest that a resource may take to be gone.
            version: of Core 2.
        """
        self._client = client
        self._mesh = mesh
        self._mesh_tls = mesh_tls
        self._place = place
        self._owner = owner
        self._run = run
        self._servers = servers or {}
        self._requirements = {**REQUIREMENTS, **(requirements or {})}
        self._memory_bytes = memory_bytes or _size_of
        self._workers = workers
        self._unload_s = unload_s
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
        name = model_name_of(candidate)
        self._check_workers(candidate)
        self._check_mesh()
        folder = model_folder(candidate, artifact, model_name=name)
        self._clear(name)
        uri = self._put(name, folder, artifact, files)
        manifest = self._model(name, candidate, artifact, uri, folder.extra)
        started = time.monotonic()
        try:
            applied = self._apply(manifest, timeout_s)
            found = self._client.wait(applied, timeout_s=timeout_s, since=started)
            target = self._target(candidate, name)
            self._wait_for_mesh(target, started + timeout_s)
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

    def close(self) -> None:
        """Deletes all that was applied here and is still there, the last first; what stays is named in the log."""
        for kind, name in reversed(self._ours.copy()):
            self._clean_up(kind, name)

    def check(self, deployment: KubernetesDeployment) -> None:
        """Returns where a deployment is still served as it was.

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
        self._client.wait_until_deleted(kind, metadata["name"], metadata["uid"], timeout_s=self._unload_s)

    def _clear(self, name: str) -> None:
        """Returns when the name of a Model is free; what an earlier run of the same campaign left is deleted.

        Raises:
            InputError: it is somebody else's.
            UnreachableError: it is being deleted, and does not end.
        """
        found = self._client.read("Model", name)
        if found is None:
            return
        owner = _labels(found).get(CAMPAIGN)
        if owner != self._owner and not found["metadata"].get("deletionTimestamp"):
            whose = f"the campaign {owner}" if owner else "somebody else"
            raise InputError(
                f"Core 2 has a Model {name} already, which {whose} made",
                hint="Delete it, or let the other campaign end.",
            )
        self._delete(found)

    def _marked(self, manifest: Mapping[str, Any]) -> Manifest:
        metadata = dict(manifest["metadata"])
        metadata["labels"] = {**metadata.get("labels", {}), CAMPAIGN: self._owner, RUN: self._run}
        marked = {**manifest, "metadata": metadata}
        check_manifest(marked, self._version)
        return marked

    def _is_ours(self, found: Manifest) -> bool:
        labels = _labels(found)
        return labels.get(CAMPAIGN) == self._owner and labels.get(RUN) == self._run

    def _check_workers(self, candidate: Candidate) -> None:
        serving = candidate.serving
        if serving.server == "mlserver" and serving.parallel_workers != self._workers:
            raise InputError(
                f"{candidate.name!r} asks for {serving.parallel_workers} parallel workers, and the servers have "
                f"{self._workers}",
                hint="On Core 2 that is the server's setting: MLSERVER_PARALLEL_WORKERS in its environment.",
            )

    def _check_mesh(self) -> None:
        """Returns when somebody listens where the mesh should be: it is only needed at the end of a long way.

        Raises:
            InputError: that is no address.
            UnreachableError: nobody does.
        """
        try:
            connection = http.client.HTTPConnection(self._mesh, timeout=_MESH_TIMEOUT_S)
        except http.client.InvalidURL as error:
            raise InputError(f"the mesh {self._mesh!r} is not host:port ({error})") from error
        try:
            connection.connect()
        except OSError as error:
            raise UnreachableError(
                f"the mesh of Core 2 cannot be reached at {self._mesh}: {error.strerror or error}",
                hint="It is at port 80 of the service seldon-mesh.",
            ) from error
        finally:
            connection.close()

    def _put(self, name: str, folder: ModelFolder, artifact: Artifact, files: Path) -> str:
        own = {file.path: file for file in artifact.files}
        parts = [replace(own[source], path=path) for path, source in folder.files.items()]
        with tempfile.TemporaryDirectory(prefix="burnish-core2-") as scratch:
            place = Path(scratch) / name
            write_folder(folder, files, place)
            parts += [_file(place, path) for path in folder.rendered]
            whole = replace(artifact, digest=folder.digest, files=tuple(sorted(parts, key=lambda part: part.path)))
            return self._place(whole, place)

    def _model(
        self, name: str, candidate: Candidate, artifact: Artifact, uri: str, extra: Mapping[str, str]
    ) -> Manifest:
        serving = candidate.serving
        manifest = render_model(
            name,
            candidate,
            storage_uri=uri,
            labels={**labels_of(candidate, self._owner), RUN: self._run},
            extra=extra,
            memory_bytes=self._memory_bytes(candidate, artifact),
            server=self._servers.get(serving.server),
            version=self._version,
        )
        manifest["spec"]["requirements"] = list(self._requirements[serving.backend])
        return manifest

    def _target(self, candidate: Candidate, name: str) -> Target:
        serving = candidate.serving
        return Target(
            url=self._mesh,
            protocol=serving.protocol,
            model=name,
            headers={"seldon-model": name},
            tls=self._mesh_tls,
            binary=serving.server == "triton" and serving.protocol == "rest",
        )

    def _wait_for_mesh(self, target: Target, deadline: float) -> None:
        """Returns when the mesh has heard of the Model, which is a moment after it is available."""
        while (answer := _readiness(target)) is not None:
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"Core 2 says that {target.model} is available, and the mesh at {target.url} does not: {answer}",
                    hint="Check the address of the mesh, and that its envoy is connected to the scheduler.",
                )
            time.sleep(_POLL_S)


def _readiness(target: Target) -> str | None:
    """None where the mesh answers that the model is ready, else what it answers."""
    kind = http.client.HTTPSConnection if target.tls else http.client.HTTPConnection
    connection = kind(target.url, timeout=_MESH_TIMEOUT_S)
    try:
        connection.request("GET", f"/v2/models/{target.model}/ready", headers=dict(target.headers))
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    return None if answer.status == http.client.OK else f"status {answer.status}"


def _file(folder: Path, path: str) -> ArtifactFile:
    content = (folder / path).read_bytes()
    return ArtifactFile(path=path, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def _size_of(_: Candidate, artifact: Artifact) -> int:
    return artifact.size_bytes
