"""Jobs on a Kubernetes cluster: sent, looked at, read and taken away, through the client of Kubernetes."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from optimize.engines.kubernetes_job import CONTAINER, DIGEST, JOB, Manifest, Rendered
from profiles.deploy.kubernetes_client import MANAGER, KubernetesClient
from registry.errors import BurnishError, InputError, UnreachableError

_API_VERSIONS: Mapping[str, tuple[str, str]] = {
    "Job": ("batch/v1", "jobs"),
    "RayJob": ("ray.io/v1", "rayjobs"),
    "ConfigMap": ("/v1", "configmaps"),
    "Pod": ("/v1", "pods"),
}
_INDEX = "batch.kubernetes.io/job-completion-index"
_RESULTS: Mapping[int, str] = {
    0: "done",
    1: "a fault of burnish",
    2: "its input is wrong",
    3: "no variant meets the policy",
    4: "something could not be reached",
    5: "a check found something",
    137: "killed (SIGKILL, or out of memory)",
    143: "ended (SIGTERM)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PodState:
    """One pod of a job.

    Attributes:
        name: the pod's.
        index: the campaign's, or None for a pod of Ray's.
        phase: as Kubernetes has it: Pending, Running, Succeeded, Failed.
        exit_code: of burnish, once it ended.
        told: what the exit code means, or why the pod waits; empty where there is nothing to say.
    """

    name: str
    index: int | None
    phase: str
    exit_code: int | None
    told: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """How a Job or RayJob is.

    Attributes:
        name: the resource's.
        kind: of the resource.
        state: pending, running, complete or failed.
        reason: Kubernetes' words for it, where there are any.
        pods: newest last; those that are gone are not among them.
    """

    name: str
    kind: str
    state: str
    reason: str
    pods: tuple[PodState, ...]


class JobsClient(KubernetesClient):
    """Jobs in one namespace, with their ConfigMaps and pods. A context manager."""

    def __enter__(self) -> Self:
        return self

    def submit(self, rendered: Rendered, *, dry_run: bool = False) -> bool:
        """Sends a job, unless the same is there, and says whether it did.

        The ConfigMap belongs to the Job (all RayJobs), and goes with it. Nothing is left of a job of which a part
        was refused.

        Args:
            rendered: the job.
            dry_run: the API server says what it thinks, and forgets it.

        Raises:
            InputError: another job has the name, or the API server does not take a manifest.
            UnreachableError: the API server did not answer, or refused.
        """
        if self._is_there(rendered):
            return False
        made: list[Manifest] = []
        try:
            made.extend(self._send(job, dry_run=dry_run) for job in rendered.jobs)
            # Pods wait for it; so it may come after what it belongs to.
            self._send(_owned(rendered.config, made), dry_run=dry_run)
        except BaseException:
            for job in made if not dry_run else ():
                self.delete(job)
            raise
        return True

    def find(self, name: str) -> list[Manifest]:
        """The Jobs and RayJobs of a job by its name.

        Raises:
            InputError: there is none in this namespace.
            UnreachableError: the API server did not answer, or refused.
        """
        found = [
            {"kind": kind, **resource}
            for kind in ("Job", "RayJob")
            for resource in self._labelled(kind, f"{JOB}={name}", needed=kind == "Job")
            # KubeRay gives the Job that submits to its cluster no labels of ours, but may one day.
            if not resource["metadata"].get("ownerReferences")
        ]
        if not found:
            raise InputError(
                f"there is no job {name} in the namespace {self.namespace}",
                hint="`burnish job submit` sends one; a finished one is taken away after its ttl_s.",
            )
        return found

    def states(self, name: str) -> list[JobState]:
        """How a job is.

        Raises:
            InputError: there is no such job.
            UnreachableError: the API server did not answer, or refused.
        """
        return [self._state(resource) for resource in self.find(name)]

    def logs(self, name: str, *, index: int | None = None, tail: int | None = None) -> list[tuple[PodState, str]]:
        """What the pods of a job printed.

        Args:
            name: the job's.
            index: only this campaign's; None for all.
            tail: only so many lines of each.

        Raises:
            InputError: there is no such job, or none of its pods is of this index.
            UnreachableError: the API server did not answer, or refused.
        """
        pods = [pod for state in self.states(name) for pod in state.pods if index in {None, pod.index}]
        if not pods:
            which = "" if index is None else f" for the index {index}"
            raise InputError(f"the job {name} has no pods{which}", hint=f"`burnish job status {name}` says why.")
        return [(pod, self._log(pod, tail)) for pod in pods if pod.phase != "Pending"]

    def cancel(self, name: str, *, timeout_s: float) -> list[str]:
        """Ends a job and takes it away, with its pods and its ConfigMap; what is in stores and in MLflow stays.

        Args:
            name: the job's.
            timeout_s: how long its end is waited for, for each resource.

        Returns:
            What was taken away.

        Raises:
            InputError: there is no such job.
            UnreachableError: the API server did not answer, or refused, or time is up.
        """
        found = self.find(name)
        for resource in found:
            self.delete(resource)
        for resource in found:
            metadata = resource["metadata"]
            self.wait_until_deleted(resource["kind"], metadata["name"], metadata["uid"], timeout_s=timeout_s)
        return [f"{resource['kind']} {resource['metadata']['name']}" for resource in found]

    # --- parts of it ---

    def _is_there(self, rendered: Rendered) -> bool:
        """Whether this very job was sent already."""
        same = 0
        for job in rendered.jobs:
            metadata = job["metadata"]
            found = self.read(job["kind"], metadata["name"])
            if found is None:
                continue
            if (found["metadata"].get("labels") or {}).get(DIGEST) != metadata["labels"][DIGEST]:
                raise InputError(
                    f"there is another {job['kind']} {metadata['name']} in the namespace {self.namespace}",
                    hint=f"Give this one another name, or first: burnish job cancel {metadata['labels'][JOB]}",
                )
            same += 1
        if 0 < same < len(rendered.jobs):
            raise InputError("a part of this job is there already", hint="Cancel it, and send it again.")
        return same > 0

    def _send(self, manifest: Mapping[str, Any], *, dry_run: bool) -> Manifest:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        options: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        is_config = kind == "ConfigMap"
        call = self._core("patch_namespaced_config_map") if is_config else self._api.patch_namespaced_custom_object
        # Applied, and not created: a call whose answer is lost is made again.
        made = self._ask(
            "patch",
            kind,
            name,
            call,
            name=name,
            body=dict(manifest),
            field_manager=MANAGER,
            field_validation="Strict",
            _content_type="application/apply-patch+yaml",
            **options,
        )
        return {**dict(made), "kind": kind}

    def _state(self, resource: Manifest) -> JobState:
        kind, name = resource["kind"], resource["metadata"]["name"]
        status = resource.get("status") or {}
        pods = [_pod_state(pod) for pod in self._pods(resource)]
        pods.sort(key=lambda pod: (pod.index is None, pod.index or 0))
        state, reason = _job_state(status) if kind == "Job" else _rayjob_state(status)
        return JobState(name=name, kind=kind, state=state, reason=reason, pods=tuple(pods))

    def _pods(self, resource: Manifest) -> list[Manifest]:
        # KubeRay sends the command to its cluster by a Job of the same name, whose pod prints what the command prints.
        return self._labelled("Pod", f"batch.kubernetes.io/job-name={resource['metadata']['name']}")

    def _labelled(self, kind: str, selector: str, *, needed: bool = True) -> list[Manifest]:
        """The resources with a label; none of a kind that the cluster does not know, unless it is ``needed``."""
        call = self._core("list_namespaced_pod") if kind == "Pod" else self._api.list_namespaced_custom_object
        try:
            listed = self._ask("list", kind, "", call, label_selector=selector)
        except UnreachableError as error:
            if not needed and "has no resource" in error.message:
                return []
            raise
        return [dict(one) for one in listed["items"]]

    def _log(self, pod: PodState, tail: int | None) -> str:
        options: dict[str, Any] = {} if tail is None else {"tail_lines": tail}
        if pod.index is not None:
            options["container"] = CONTAINER
        read = self._core("read_namespaced_pod_log", text=True)
        found = self._ask("get", "Pod", pod.name, read, name=pod.name, **options)
        return "" if found is None else str(found)

    def _core(self, method: str, *, text: bool = False) -> Callable[..., Any]:
        """A call of the core API that takes what one of the custom resources' takes, and answers plain values."""
        import kubernetes

        bound = getattr(kubernetes.client.CoreV1Api(self._client), method)

        def call(*, group: str, version: str, plural: str, **fields: Any) -> Any:
            content = bound(**fields, _preload_content=False).data
            return content.decode("utf-8", "replace") if text else json.loads(content)

        return call

    def _refused(self, error: Any, verb: str, kind: str, name: str) -> BurnishError:
        refused = super()._refused(error, verb, kind, name)
        if kind == "RayJob" and "has no resource" in refused.message:
            refused.hint = "Install KubeRay there, or use `kind: job`."
        return refused

    def _path(self, kind: str) -> dict[str, str]:
        if kind not in _API_VERSIONS:
            return super()._path(kind)
        api_version, plural = _API_VERSIONS[kind]
        group, _, version = api_version.partition("/")
        return {"group": group, "version": version, "namespace": self.namespace, "plural": plural}


def _owned(config: Manifest, jobs: Iterable[Manifest]) -> Manifest:
    """The ConfigMap as a part of jobs, with the last of which it is deleted."""
    owners = [
        {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "name": job["metadata"]["name"],
            "uid": job["metadata"]["uid"],
        }
        for job in jobs
    ]
    return {**config, "metadata": {**config["metadata"], "ownerReferences": owners}}


def _job_state(status: Mapping[str, Any]) -> tuple[str, str]:
    for condition in status.get("conditions") or []:
        if condition.get("status") == "True" and condition.get("type") in {"Complete", "Failed"}:
            words = [condition.get("reason"), condition.get("message")]
            return condition["type"].lower(), ": ".join(str(word) for word in words if word)
    counted = {name: status.get(name) or 0 for name in ("active", "succeeded", "failed")}
    told = ", ".join(f"{count} {name}" for name, count in counted.items() if count)
    return ("running" if counted["active"] else "pending"), told


def _rayjob_state(status: Mapping[str, Any]) -> tuple[str, str]:
    words = {"SUCCEEDED": "complete", "FAILED": "failed", "STOPPED": "failed", "RUNNING": "running"}
    ray, cluster = str(status.get("jobStatus") or ""), str(status.get("jobDeploymentStatus") or "")
    state = "failed" if cluster == "Failed" else words.get(ray, "pending")
    told = [cluster, str(status.get("reason") or ""), str(status.get("message") or "")]
    return state, ": ".join(word for word in told if word)


def _pod_state(pod: Mapping[str, Any]) -> PodState:
    metadata, status = pod["metadata"], pod.get("status") or {}
    found = (metadata.get("annotations") or {}).get(_INDEX, (metadata.get("labels") or {}).get(_INDEX))
    statuses: Sequence[Mapping[str, Any]] = status.get("containerStatuses") or []
    state = (statuses[0].get("state") or {}) if statuses else {}
    code = (state.get("terminated") or {}).get("exitCode")
    waiting = state.get("waiting") or {}
    reason = (state.get("terminated") or {}).get("reason")
    told = str(waiting.get("reason") or "") if code is None else _RESULTS.get(code, f"exit code {code}")
    if reason == "OOMKilled":
        told = "out of memory (OOMKilled): raise `memory:`"
    if not told and status.get("phase") == "Pending":
        unmet = [one for one in status.get("conditions") or [] if one.get("status") == "False" and one.get("message")]
        told = str(unmet[0]["message"]) if unmet else ""
    return PodState(
        name=metadata["name"],
        index=None if found is None else int(found),
        phase=str(status.get("phase") or "Pending"),
        exit_code=code,
        told=told,
    )
