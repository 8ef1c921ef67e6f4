"""The client of the Kubernetes API: Core 2's custom resources applied, waited for and deleted.

Resources are applied server-side by the field manager `MANAGER`, which takes no field from anybody else, and carry the
labels of their campaign and run. One of the same name without the campaign's label is somebody else's: it is neither
taken over nor deleted.
"""

import http.client
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from profiles.deploy.core2_candidates import one_line
from profiles.deploy.kubernetes_refusals import ConflictError, is_absent, refusal, retry_after_s
from profiles.deploy.kubernetes_resources import (
    CAMPAIGN,
    GOING,
    RUN,
    Applied,
    Change,
    ResourceState,
    changes_between,
    conditions_of,
    is_stale,
    labels_on,
    lacking_in,
    read_state,
)
from profiles.serving.core2.manifests import Manifest
from registry.errors import BurnishError, InputError, MissingExtraError, UnreachableError

logger = logging.getLogger(__name__)

MANAGER = "burnish"
"""The field manager that owns what is applied here."""
PLURALS: Mapping[str, str] = {
    "Model": "models",
    "Server": "servers",
    "ServerConfig": "serverconfigs",
    "Experiment": "experiments",
    "Pipeline": "pipelines",
    "HorizontalPodAutoscaler": "horizontalpodautoscalers",
}

_API_VERSIONS = {"HorizontalPodAutoscaler": "autoscaling/v2"}
_MLOPS = "mlops.seldon.io/v1alpha1"
_POLL_S = 0.05
_LAST_POLL_S = 0.5
# The last call of a wait has time for an answer, so that a wait ends with what was seen.
_LEAST_CALL_S = 1.0
_WATCH_S = 300


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
        kind, name, labels = str(manifest["kind"]), str(manifest["metadata"]["name"]), labels_on(manifest)
        if not labels.get(CAMPAIGN) or not labels.get(RUN):
            raise InputError(f"the {kind} {name} has no labels {CAMPAIGN} and {RUN}, which say whose it is")
        found = self.read(kind, name, timeout_s=timeout_s)
        if found is not None and (owner := labels_on(found).get(CAMPAIGN)) != labels[CAMPAIGN]:
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
        except ConflictError as conflict:
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
                if verb in {"get", "delete"} and is_absent(error, about):
                    return None
                pause_s = retry_after_s(error)
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
        return refusal(error, verb, kind, name, host=self.host, path=self._path(kind))

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
        able = sorted(name for name, one in asked.items() if not lacking_in(one, needed))
        if not able:
            return f"No Server has all of these capabilities: {', '.join(needed)}."
        ready = [name for name in able if read_state(servers[name]).ready]
        if not ready:
            return f"None of these Servers is ready: {', '.join(able)}."
        memory = spec.get("memory") or "no memory"
        return f"{', '.join(ready)} can run it; so look for {memory} on each of {spec.get('replicas') or 1} replicas."


def _timed_out(error: Exception) -> bool:
    from urllib3.exceptions import NewConnectionError
    from urllib3.exceptions import TimeoutError as UrllibTimeoutError

    # To urllib3 a connection that is refused is one that came too late.
    return isinstance(error, UrllibTimeoutError) and not isinstance(error, NewConnectionError)


def _cause(error: Exception) -> str:
    # urllib3 puts its own objects before the words.
    return one_line(str(error).rpartition(">: ")[2] or error) or type(error).__name__


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
        known = one_line(error) if isinstance(error, config.ConfigException) else "it is no kubeconfig"
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
