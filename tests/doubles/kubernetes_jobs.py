"""A double of the Kubernetes API for Jobs: a real HTTP server on loopback, written from published facts.

It is no Kubernetes: it runs nothing. It keeps Jobs, RayJobs, ConfigMaps and pods, makes a pending pod for each index of
a Job, refuses to change what cannot be changed, and takes away what belongs to what is deleted. What becomes of pods is
set on it.
"""

import copy
import json
import threading
import uuid
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from tests.doubles.kubernetes_api import ApiHandler, RefusalError

Json = dict[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"
_OWNER = "batch.kubernetes.io/job-name"


class JobsDouble:
    """The API server and the controller of Jobs. A context manager.

    Attributes:
        plurals: kinds that there are; without ``rayjobs`` it is a cluster that has no KubeRay.
        resources: (plural, name) -> the resource.
        logs: pod -> what it printed.
        refusals: (verb, plural) -> the refusal of its next call.
        asked: every call: method, path and query.
    """

    def __init__(self) -> None:
        self.plurals = {"jobs": "Job", "rayjobs": "RayJob", "configmaps": "ConfigMap", "pods": "Pod"}
        self.resources: dict[tuple[str, str], Json] = {}
        self.logs: dict[str, str] = {}
        self.refusals: dict[tuple[str, str], RefusalError] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self._lock = threading.Lock()
        self._version = 1

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"double": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def kubeconfig(self, folder: Path) -> Path:
        """A kubeconfig that leads here, with the namespace ``models``."""
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "double",
            "clusters": [{"name": "double", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}],
            "contexts": [{"name": "double", "context": {"cluster": "double", "user": "us", "namespace": "models"}}],
            "users": [{"name": "us", "user": {}}],
        }
        path = folder / "kubeconfig"
        path.write_text(json.dumps(content))
        return path

    def names(self, plural: str) -> list[str]:
        return sorted(name for kind, name in self.resources if kind == plural)

    def ends(self, job: str, index: int, code: int | None, log: str = "", *, reason: str = "Error") -> None:
        """A pod of a Job runs (no code), or has ended."""
        name = f"{job}-{index}-x"
        pod = self.resources["pods", name]
        self.logs[name] = log
        if code is None:
            pod["status"] = {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}
            return
        state = {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else reason}}
        pod["status"] = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [{"state": state}]}

    def answer(self, method: str, path: str, query: dict[str, str], body: Json | None) -> Json | str:
        parts = path.strip("/").split("/")
        # api/v1/namespaces/N/configmaps/x, apis/batch/v1/namespaces/N/jobs/x
        group, parts = ("", parts[1:]) if parts[0] == "api" else (parts[1], parts[2:])
        version, _, namespace, plural, *rest = parts
        self.asked.append((method, path, query))
        if plural not in self.plurals:
            raise RefusalError(404, "NotFound", "", text="404 page not found\n")
        if (refused := self.refusals.pop((method, plural), None)) is not None:
            raise refused
        if namespace != "models":
            message = f'namespaces "{namespace}" not found'
            raise RefusalError(404, "NotFound", message, kind="namespaces", name=namespace)
        if not rest:
            return self._list(plural, query)
        if method == "PATCH":
            api_version = f"{group}/{version}" if group else version
            return self._apply(plural, rest[0], body or {}, api_version, dry="dryRun" in query)
        if (plural, rest[0]) not in self.resources:
            raise RefusalError(404, "NotFound", f'{plural} "{rest[0]}" not found', name=rest[0], kind=plural)
        if rest[1:] == ["log"]:
            return self._log(rest[0], query)
        if method == "DELETE":
            return self._delete(plural, rest[0], body or {})
        return copy.deepcopy(self.resources[plural, rest[0]])

    def _list(self, plural: str, query: dict[str, str]) -> Json:
        def fits(resource: Json) -> bool:
            label, _, value = query.get("labelSelector", "").partition("=")
            name = query.get("fieldSelector", "").removeprefix("metadata.name=")
            metadata = resource["metadata"]
            return (not label or metadata.get("labels", {}).get(label) == value) and name in {"", metadata["name"]}

        items = [copy.deepcopy(one) for (kind, _), one in self.resources.items() if kind == plural and fits(one)]
        return {"metadata": {"resourceVersion": str(self._version)}, "items": items}

    def _apply(self, plural: str, name: str, body: Json, api_version: str, *, dry: bool) -> Json:
        if body["apiVersion"] != api_version or body["kind"] != self.plurals[plural]:
            raise RefusalError(400, "BadRequest", f"the body is a {body['apiVersion']} {body['kind']}")
        old = self.resources.get((plural, name))
        if old is not None and old.get("spec") != body.get("spec"):
            message = f'{body["kind"]} "{name}" is invalid: spec.template: Invalid value: field is immutable'
            raise RefusalError(422, "Invalid", message, name=name, kind=body["kind"])
        self._version += 1
        made = copy.deepcopy(body)
        made["metadata"] |= {"uid": str(uuid.uuid4()), "resourceVersion": str(self._version)}
        if not dry:
            self.resources[plural, name] = made
            if plural == "jobs":
                self._make_pods(made)
        return copy.deepcopy(made)

    def _make_pods(self, job: Json) -> None:
        name = job["metadata"]["name"]
        for index in range(job["spec"]["completions"]):
            labels = {**job["spec"]["template"]["metadata"]["labels"], _OWNER: name, INDEX: str(index)}
            owner = {"kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
            metadata = {"name": f"{name}-{index}-x", "labels": labels, "ownerReferences": [owner]}
            self.resources["pods", metadata["name"]] = {"metadata": metadata, "status": {"phase": "Pending"}}

    def _log(self, pod: str, query: dict[str, str]) -> str:
        lines = self.logs.get(pod, "").splitlines(keepends=True)
        return "".join(lines[-int(query["tailLines"]) :] if "tailLines" in query else lines)

    def _delete(self, plural: str, name: str, body: Json) -> Json:
        resource = self.resources.pop((plural, name))
        uid = resource["metadata"]["uid"]
        assert (body.get("preconditions") or {}).get("uid") == uid
        there = {other["metadata"].get("uid") for other in self.resources.values()}
        for key, other in list(self.resources.items()):
            owners = {owner["uid"] for owner in other["metadata"].get("ownerReferences", [])}
            if uid in owners and not owners & there:  # the garbage collector waits for the last of several
                del self.resources[key]
        return resource


class _Handler(ApiHandler):
    double: JobsDouble

    def handle_call(self, method: str, path: str, query: dict[str, str], body: Json | None) -> None:
        try:
            with self.double._lock:
                answer = self.double.answer(method, path, query, body)
        except RefusalError as refusal:
            self.send(refusal.code, refusal.body)
            return
        self.send(200, answer if isinstance(answer, str) else json.dumps(answer))
