"""A double of the Kubernetes API for Core 2's resources: a real HTTP server on loopback, written from published facts.

It is no Kubernetes. It keeps resources with uid, generation and resourceVersion, applies server-side with the owners of
fields, lists, watches and deletes; a small operator plays Core 2's: message and reason swapped, no observedGeneration,
a status that stays as it was for a while after a change. What is to go wrong is set on it.
"""

import contextlib
import copy
import http.client
import json
import ssl
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from profiles.deploy import core2_scheduler_pb2 as pb
from tests.doubles.core2 import Agent

LOOPBACK = "127.0.0.1"
MLOPS = "mlops.seldon.io/v1alpha1"
KINDS = {
    "models": "Model",
    "servers": "Server",
    "serverconfigs": "ServerConfig",
    "experiments": "Experiment",
    "pipelines": "Pipeline",
    "horizontalpodautoscalers": "HorizontalPodAutoscaler",
}
MODEL_FIELDS = {
    "storageUri", "artifactVersion", "requirements", "memory", "server", "replicas", "minReplicas", "maxReplicas",
    "parameters", "secretName", "dataflow",
}  # fmt: skip
NO_SERVER = "Failed to schedule model as no matching server had enough suitable replicas"

Json = dict[str, Any]
Key = tuple[str, str, str]
Owner = tuple[str, str]
"""A field manager and its operation: the same manager that applies and that updates counts as two."""


class RefusalError(Exception):
    """An answer that is a refusal, with Kubernetes' Status object, or with bare text."""

    def __init__(self, code: int, reason: str, message: str, *, text: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.headers = {"Retry-After": str(details.pop("retry_after"))} if "retry_after" in details else {}
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        self.status = {**status, "reason": reason, "message": message, "details": details}
        self.body = text if text is not None else json.dumps(self.status)


@dataclass
class _Stored:
    resource: Json
    owners: dict[Owner, set[tuple[str, ...]]] = field(default_factory=dict)


class KubernetesDouble:
    """The API server, Core 2's operator and its mesh. A context manager.

    Attributes:
        namespaces: that there are.
        installed: plural names of the custom resources.
        token: what callers must show; None for nothing.
        load_s: from a Model's creation or change to its outcome.
        stale_s: from a change until the operator first writes a status of it.
        unload_s: from a deletion to its end.
        capabilities: what can be scheduled; None for everything.
        failures: storage URI -> why a Model from there does not load.
        available: replicas that a Model gets; None for as many as it asks for.
        counts_available: whether a status has availableReplicas, as from 2.10 on.
        rolling: whether a changed Model stays available all the time, and its status as it is.
        mesh_ready: whether the mesh has heard of the Models.
        refusals: verb -> refusals for its next calls, in order.
        lost: verb -> how many calls of it lose their connection, after the work was done.
        late_s: verb -> how long each call of it takes.
        watch_s: longest that a watch lasts.
        expired: how many watches begin from a version that is forgotten.
        agent: what really loads Models; None where they are only said to be loaded.
        asked: every call, in order: verb, plural, name and query.
    """

    def __init__(self, *, certificate: tuple[Path, Path] | None = None) -> None:
        self.namespaces = {"seldon"}
        self.installed = set(KINDS)
        self.token: str | None = None
        self.load_s = self.stale_s = self.unload_s = 0.0
        self.capabilities: set[str] | None = None
        self.failures: dict[str, str] = {}
        self.available: int | None = None
        self.counts_available = True
        self.rolling = False
        self.mesh_ready = True
        self.refusals: dict[str, list[RefusalError]] = {}
        self.lost: Counter[str] = Counter()
        self.late_s: dict[str, float] = {}
        self.watch_s = 60.0
        self.expired = 0
        self.agent: Agent | None = None
        self.asked: list[tuple[str, str, str, dict[str, str]]] = []
        self._certificate = certificate
        self._version = 100
        self._stored: dict[Key, _Stored] = {}
        self._events: list[tuple[int, Key, str, Json]] = []
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._changed = threading.Condition(threading.RLock())
        self._stopped = False
        self.over = threading.Event()

    def __enter__(self) -> Self:
        self._server = _Server((LOOPBACK, 0), type("Handler", (_Handler,), {"double": self}))
        if self._certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._threads = [
            threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}),
            threading.Thread(target=self._operate),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._server.shutdown()
        for thread in self._threads:
            thread.join()
        self._server.server_close()

    @property
    def mesh(self) -> str:
        return f"{LOOPBACK}:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"{'http' if self._certificate is None else 'https'}://{self.mesh}"

    def kubeconfig(self, folder: Path, *, token: str = "", namespace: str = "seldon", **cluster: Any) -> Path:
        """A kubeconfig that leads here, with a context ``double``."""
        user = {"token": token} if token else {}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "double",
            "clusters": [{"name": "double", "cluster": {"server": self.url, **cluster}}],
            "contexts": [
                {"name": "double", "context": {"cluster": "double", "user": "us", "namespace": namespace}},
                {"name": "elsewhere", "context": {"cluster": "double", "user": "us", "namespace": "nowhere"}},
            ],
            "users": [{"name": "us", "user": user}],
        }
        path = folder / "kubeconfig"
        path.write_text(json.dumps(content))
        return path

    # --- what tests do to it ---

    def refuse(self, verb: str, refusal: RefusalError, *, times: int = 1) -> None:
        self.refusals.setdefault(verb, []).extend([refusal] * times)

    def verbs(self) -> list[str]:
        return [verb for verb, *_ in self.asked]

    def names(self, plural: str = "models") -> list[str]:
        with self._changed:
            return sorted(name for _, kind, name in self._stored if kind == plural)

    def get(self, name: str, plural: str = "models") -> Json:
        with self._changed:
            return copy.deepcopy(self._stored["seldon", plural, name].resource)

    def put(self, plural: str, name: str, spec: Json, *, manager: str = "kubectl", **labels: str) -> None:
        """Somebody else creates or changes a resource, as ``kubectl edit`` would."""
        body = {"metadata": {"name": name, "labels": labels}, "spec": spec}
        with self._changed:
            self._write(("seldon", plural, name), body, (manager, "Update"))

    def give(self, plural: str, name: str, manager: str) -> None:
        """Fields that were applied are as if this manager had set them by an update."""
        with self._changed:
            stored = self._stored["seldon", plural, name]
            stored.owners = {(manager, "Update"): set().union(*stored.owners.values())}

    def remove(self, name: str, plural: str = "models") -> None:
        """Somebody else deletes a resource, and nothing holds it."""
        with self._changed:
            self._drop(("seldon", plural, name))

    def hurry(self) -> None:
        """What the operator is to do later it does at once."""
        with self._changed:
            self._due = [(0.0, work) for _, work in self._due]
            self._changed.notify_all()

    def set_status(self, name: str, status: Json, plural: str = "models") -> None:
        with self._changed:
            key = ("seldon", plural, name)
            self._stored[key].resource["status"] = status
            self._record(key, "MODIFIED")

    # --- the API server ---

    def answer(self, method: str, path: str, query: dict[str, str], body: Json | None) -> Json:
        key, verb = self._parse(method, path, query)
        if verb == "get":
            return copy.deepcopy(self._found(key).resource)
        if verb == "list":
            return self._list(key, query)
        if verb == "delete":
            return self._delete(key, body or {})
        owner = (query["fieldManager"], "Apply")
        return self._write(
            key,
            body or {},
            owner,
            force=query.get("force") == "true",
            dry=query.get("dryRun") == "All",
            strict=query.get("fieldValidation") == "Strict",
        )

    def _parse(self, method: str, path: str, query: dict[str, str]) -> tuple[Key, str]:
        parts = path.strip("/").split("/")
        if len(parts) < 6 or parts[5] not in self.installed:
            raise RefusalError(404, "NotFound", "", text="404 page not found\n")
        namespace, plural, name = parts[4], parts[5], parts[6] if len(parts) > 6 else ""
        verb = {"PATCH": "patch", "DELETE": "delete"}.get(method) or ("get" if name else "list")
        if verb == "list" and query.get("watch") == "true":
            verb = "watch"
        self.asked.append((verb, plural, name, query))
        if verb == "patch" and namespace not in self.namespaces:
            raise RefusalError(
                404, "NotFound", f'namespaces "{namespace}" not found', kind="namespaces", name=namespace
            )
        return (namespace, plural, name), verb

    def _found(self, key: Key) -> _Stored:
        if key not in self._stored:
            message = f'{key[1]}.mlops.seldon.io "{key[2]}" not found'
            raise RefusalError(404, "NotFound", message, name=key[2], group="mlops.seldon.io", kind=key[1])
        return self._stored[key]

    def _list(self, key: Key, query: dict[str, str]) -> Json:
        wanted = query.get("fieldSelector", "").removeprefix("metadata.name=")
        items = [
            copy.deepcopy(stored.resource)
            for (namespace, plural, name), stored in self._stored.items()
            if (namespace, plural) == key[:2] and wanted in {"", name}
        ]
        return {"metadata": {"resourceVersion": str(self._version)}, "items": items}

    def _write(
        self, key: Key, body: Json, owner: Owner, *, force: bool = False, dry: bool = False, strict: bool = False
    ) -> Json:
        old = self._stored.get(key)
        new = copy.deepcopy(old) if old is not None else _Stored(self._blank(key))
        told = dict(_leaves(("metadata", "labels"), body["metadata"].get("labels", {})))
        told |= dict(_leaves(("spec",), body.get("spec", {})))
        self._validate(key, body, strict)
        _check_owners(new, told, owner, force=force)
        if owner[1] == "Apply":
            others = set().union(*(paths for who, paths in new.owners.items() if who != owner), set())
            for path in new.owners.get(owner, set()) - told.keys() - others:
                _unset(new.resource, path)
        # Who applies owns what is applied; who updates owns what that changed.
        differs = {path for path, value in told.items() if _value(new.resource, path) != value}
        for path, value in told.items():
            _set(new.resource, path, copy.deepcopy(value))
        for step in new.resource["spec"].get("steps", []) if key[1] == "pipelines" else []:
            # As the schema has it.
            step.setdefault("inputsJoinType", "inner")
        new.owners[owner] = set(told) if owner[1] == "Apply" else differs | new.owners.get(owner, set())
        metadata = new.resource["metadata"]
        changed = old is None or old.resource["spec"] != new.resource["spec"]
        metadata["generation"] = metadata.get("generation", 0) + (1 if changed else 0)
        metadata["managedFields"] = [{"manager": who, "operation": how} for who, how in new.owners]
        if dry:
            return new.resource
        self._stored[key] = new
        if old is None or old.resource != new.resource:
            self._record(key, "ADDED" if old is None else "MODIFIED")
        if changed:
            self._reconcile(key)
        return copy.deepcopy(new.resource)

    def _blank(self, key: Key) -> Json:
        version = "autoscaling/v2" if key[1] == "horizontalpodautoscalers" else MLOPS
        metadata = {"name": key[2], "namespace": key[0], "uid": str(uuid.uuid4()), "creationTimestamp": _now()}
        return {"apiVersion": version, "kind": KINDS[key[1]], "metadata": {**metadata, "labels": {}}, "spec": {}}

    def _validate(self, key: Key, body: Json, strict: bool) -> None:
        if key[1] != "models":
            return
        unknown = sorted(body.get("spec", {}).keys() - MODEL_FIELDS)
        if unknown and strict:
            raise RefusalError(400, "BadRequest", f'strict decoding error: unknown field "spec.{unknown[0]}"')
        if "storageUri" not in body.get("spec", {}):
            message = f'Model.mlops.seldon.io "{key[2]}" is invalid: spec.storageUri: Required value'
            raise RefusalError(422, "Invalid", message, name=key[2], kind="Model")

    def _delete(self, key: Key, body: Json) -> Json:
        stored = self._found(key)
        metadata, wanted = stored.resource["metadata"], (body.get("preconditions") or {}).get("uid")
        if wanted and wanted != metadata["uid"]:
            message = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {metadata['uid']}"
            raise RefusalError(409, "Conflict", message, name=key[2])
        metadata["deletionTimestamp"] = _now()
        self._record(key, "MODIFIED")
        uid = metadata["uid"]
        self._later(self.unload_s, lambda: self._drop(key, uid))
        return copy.deepcopy(stored.resource)

    def _drop(self, key: Key, uid: str | None = None) -> None:
        stored = self._stored.get(key)
        if stored is None or uid not in {None, stored.resource["metadata"]["uid"]}:
            return
        self._record(key, "DELETED")
        del self._stored[key]
        if self.agent is not None and key[1] == "models":
            self.agent.unload(_message(key[2], stored.resource["spec"]), 1)
        self._review()

    def _record(self, key: Key, event: str) -> None:
        self._version += 1
        resource = self._stored[key].resource
        resource["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, key, event, copy.deepcopy(resource)))
        self._changed.notify_all()

    def watch(self, path: str, query: dict[str, str]) -> Generator[Json, None, None]:
        with self._changed:
            key, _ = self._parse("GET", path, query)
            since = int(query["resourceVersion"])
            if self.expired:
                self.expired -= 1
                gone = RefusalError(410, "Expired", f"too old resource version: {since} ({self._version})")
                yield {"type": "ERROR", "object": gone.status}
                return
        end = time.monotonic() + min(self.watch_s, float(query.get("timeoutSeconds", 60)))
        wanted = query.get("fieldSelector", "").removeprefix("metadata.name=")
        yield {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(since)}}}
        while True:
            with self._changed:
                new = [one for one in self._events if one[0] > since and one[1][:2] == key[:2]]
                if not new:
                    left = end - time.monotonic()
                    if self._stopped or left <= 0:
                        return
                    self._changed.wait(left)
                    continue
            for version, (_, _, name), event, resource in new:
                since = version
                if wanted in {"", name}:
                    yield {"type": event, "object": resource}

    def pass_on(self, name: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """What the server behind the agent answers of a Model, by status and body."""
        if self.agent is None or not self.ready(name):
            return 404, b""
        path = path.replace(f"/models/{name}", f"/models/{name}_1")
        with contextlib.closing(http.client.HTTPConnection(LOOPBACK, self.agent.http)) as connection:
            connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()

    def ready(self, name: str) -> bool:
        """Whether the mesh answers for a model."""
        stored = self._stored.get(("seldon", "models", name))
        return self.mesh_ready and stored is not None and _is_ready(stored.resource)

    def route(self, name: str) -> str:
        """The route of a Model, which counts its changes; empty where the mesh does not lead to it."""
        stored = self._stored.get(("seldon", "models", name))
        return (
            f":{name}_{stored.resource['metadata']['generation']}:" if stored is not None and self.ready(name) else ""
        )

    # --- the operator ---

    def _operate(self) -> None:
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                due = [one for one in self._due if one[0] <= now]
                self._due = [one for one in self._due if one[0] > now]
                for _, work in due:
                    work()
                self._changed.wait(max(0.0, min((at for at, _ in self._due), default=now + 60) - time.monotonic()))

    def _later(self, after_s: float, work: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + after_s, work))
        self._changed.notify_all()

    def _reconcile(self, key: Key) -> None:
        resource = self._stored[key].resource
        mark = (resource["metadata"]["uid"], resource["metadata"]["generation"])
        changed = resource["metadata"]["generation"] > 1

        def still(work: Callable[[Key], None]) -> Callable[[], None]:
            """The work, where nothing has been changed or replaced until then."""

            def guarded() -> None:
                found = self._stored.get(key)
                now = found.resource["metadata"] if found is not None else {}
                if (now.get("uid"), now.get("generation")) == mark:
                    work(key)

            return guarded

        if key[1] == "models" and not (changed and self.rolling):
            before_s = self.stale_s if changed else 0.0
            self._later(before_s, still(lambda key: self._say(key, "ModelProgressing")))
            self._later(before_s + self.load_s, still(self._finish))
        elif key[1] == "servers":
            self._later(self.load_s, still(self._serve))
        elif key[1] in {"experiments", "pipelines"}:
            self._later(0.0, self._review)

    def _finish(self, key: Key) -> None:
        spec = self._stored[key].resource["spec"]
        if self.capabilities is not None and not set(spec.get("requirements", [])) <= self.capabilities:
            self._say(key, "ScheduleFailed", NO_SERVER)
        elif spec["storageUri"] in self.failures:
            self._say(key, "ModelFailed", self.failures[spec["storageUri"]])
        elif self.agent is not None and (failure := self.agent.load(_message(key[2], spec), 1)):
            self._say(key, "ModelFailed", failure)
        else:
            self._say(key, "ModelAvailable")
        self._review()

    def _say(self, key: Key, state: str, reason: str = "") -> None:
        """Writes a Model's status as the operator does: the state as message, the words as reason."""
        resource = self._stored[key].resource
        asked = resource["spec"].get("replicas", 1)
        available = 0 if state != "ModelAvailable" else asked if self.available is None else self.available
        status: Json = {"replicas": asked, "selector": "server=mlserver" if state != "ScheduleFailed" else ""}
        if self.counts_available:
            status["availableReplicas"] = available
        truth = "True" if state == "ModelAvailable" else "False"
        self._condition(key, status, {"ModelReady": truth, "Ready": truth}, message=state, reason=reason)

    def _serve(self, key: Key) -> None:
        self._condition(key, {"replicas": 1}, {"Ready": "True", "StatefulSetOrDeploymentReady": "True"})

    def _review(self) -> None:
        """Pipelines by their models, then experiments by what they are of."""
        for key, lacking in self._lacking("pipelines"):
            truth = "False" if lacking else "True"
            types = {"PipelineReady": "True", "PipelineGwReady": "True", "ModelsReady": truth, "Ready": truth}
            self._condition(key, {}, types)
        for key, lacking in self._lacking("experiments"):
            truth = "False" if lacking else "True"
            words = f"candidates not ready: {', '.join(lacking)}" if lacking else ""
            types = {"ExperimentReady": "True", "CandidatesReady": truth, "Ready": truth}
            self._condition(key, {}, types, message=words)

    def _lacking(self, plural: str) -> list[tuple[Key, list[str]]]:
        """Each resource of a kind that stands on others, with the names of those that are not ready."""
        found = []
        for key, stored in self._stored.items():
            if key[1] == plural:
                spec = stored.resource["spec"]
                of = "pipelines" if spec.get("resourceType") == "pipeline" else "models"
                names = [one["name"] for one in spec.get("steps" if plural == "pipelines" else "candidates", [])]
                there = {name: one.resource for (_, kind, name), one in self._stored.items() if kind == of}
                found.append((key, [name for name in names if not _is_ready(there.get(name, {}))]))
        return found

    def _condition(self, key: Key, status: Json, types: dict[str, str], **words: str) -> None:
        resource = self._stored[key].resource
        old = {one["type"]: one for one in resource.get("status", {}).get("conditions", [])}
        conditions = []
        for kind, truth in types.items():
            said = {"type": kind, "status": truth, **{name: text for name, text in words.items() if text}}
            same = {name: value for name, value in old.get(kind, {}).items() if name != "lastTransitionTime"} == said
            conditions.append({**said, "lastTransitionTime": old[kind]["lastTransitionTime"] if same else _now()})
        resource["status"] = {**status, "conditions": conditions}
        self._record(key, "MODIFIED")


# --- fields --------------------------------------------------------------------------------------------------------


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _leaves((*path, name), below)
    else:
        yield path, value


def _check_owners(stored: _Stored, told: dict[tuple[str, ...], Any], owner: Owner, *, force: bool) -> None:
    """Takes fields over where that is forced (or is no apply), and refuses where it would have to be."""
    causes = []
    for other, paths in stored.owners.items():
        for path in sorted(paths & told.keys()) if other != owner else []:
            if _value(stored.resource, path) == told[path]:
                continue
            if force or owner[1] == "Update":
                paths.discard(path)
                continue
            message = f'conflict with "{other[0]}" using {MLOPS}'
            causes.append({"reason": "FieldManagerConflict", "message": message, "field": f".{'.'.join(path)}"})
    if causes:
        message = f"Apply failed with {len(causes)} conflict: {causes[0]['message']}: {causes[0]['field']}"
        raise RefusalError(409, "Conflict", message, causes=causes)


def _value(resource: Json, path: tuple[str, ...]) -> Any:
    for name in path:
        resource = resource.get(name, {})
    return resource


def _set(resource: Json, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        resource = resource.setdefault(name, {})
    resource[path[-1]] = value


def _unset(resource: Json, path: tuple[str, ...]) -> None:
    for name in path[:-1]:
        resource = resource.get(name, {})
    resource.pop(path[-1], None)


def _message(name: str, spec: Json) -> pb.Model:
    """What the operator would tell the scheduler, as far as an agent looks at it."""
    message = pb.Model(meta=pb.MetaData(name=name))
    message.modelSpec.uri = spec["storageUri"]
    message.modelSpec.requirements.extend(spec.get("requirements", []))
    for parameter in spec.get("parameters", []):
        message.modelSpec.parameters.add(**parameter)
    return message


def _is_ready(resource: Json) -> bool:
    conditions = resource.get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- HTTP ----------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A caller that hangs up is part of the play."""


class ApiHandler(BaseHTTPRequestHandler):
    """Calls to a double of the API, read whole."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._call("GET")

    def do_PATCH(self) -> None:
        self._call("PATCH")

    def do_DELETE(self) -> None:
        self._call("DELETE")

    def _call(self, method: str) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self.handle_call(method, address.path, query, json.loads(self.rfile.read(length)) if length else None)

    def handle_call(self, method: str, path: str, query: dict[str, str], body: Json | None) -> None:
        raise NotImplementedError

    def send(self, code: int, body: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body.encode())))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())


class _Handler(ApiHandler):
    double: KubernetesDouble

    def do_POST(self) -> None:
        # Only the mesh is posted to.
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.headers.get("seldon-model", "")
        status, answer = self.double.pass_on(name, self.path, body)
        self.send(status, answer.decode(), {"x-seldon-route": f":{name}_1:"})

    def handle_call(self, method: str, path: str, query: dict[str, str], body: Json | None) -> None:
        if path.endswith("/ready"):
            name = path.split("/")[3]
            route = self.double.route(name)
            self.send(200 if self.double.ready(name) else 404, "", {"x-seldon-route": route} if route else {})
            return
        verb = {"PATCH": "patch", "DELETE": "delete"}.get(method, "get" if path.count("/") > 6 else "list")
        verb = "watch" if query.get("watch", "").lower() == "true" else verb
        query |= {name: query[name].lower() for name in ("watch", "force") if name in query}
        self.double.over.wait(self.double.late_s.get(verb, 0.0))
        try:
            self.check(verb)
            if verb == "watch":
                self.stream(self.double.watch(path, query))
                return
            with self.double._changed:
                answer = self.double.answer(method, path, query, body)
        except RefusalError as refusal:
            self.send(refusal.code, refusal.body, refusal.headers)
            return
        if self.double.lost[verb]:
            self.double.lost[verb] -= 1
            self.close_connection = True
            return
        self.send(200, json.dumps(answer))

    def check(self, verb: str) -> None:
        if self.double.token is not None and self.headers.get("Authorization") != f"Bearer {self.double.token}":
            raise RefusalError(401, "Unauthorized", "Unauthorized")
        if self.double.refusals.get(verb):
            raise self.double.refusals[verb].pop(0)

    def stream(self, events: Generator[Json, None, None]) -> None:
        first = next(events)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError), contextlib.closing(events):
            self.chunk(first)
            for event in events:
                self.chunk(event)
            self.wfile.write(b"0\r\n\r\n")

    def chunk(self, event: Json) -> None:
        line = json.dumps(event).encode() + b"\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.flush()
