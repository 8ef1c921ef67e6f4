"""A double of Core 2's scheduler: a real gRPC server on loopback that behaves as the published facts say.

It is no Core 2. It schedules by capability and memory, counts versions, takes time, forgets to say so for a while, and
fails with the reasons that Core 2 gives; what it is to do wrong is set on it. Models answer to nothing but readiness,
unless their server has an agent (`core2_agent.AgentDouble`): then they are loaded by it, and the mesh leads to them.
"""

import contextlib
import http.client
import math
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, Self

import grpc

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.deploy.scheduler_channel import SERVICE

LOOPBACK = "127.0.0.1"
V2 = "inference.GRPCInferenceService"
NO_SERVER = "Failed to schedule model as no matching server had enough suitable replicas"
NAME = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
State = pb.ModelStatus
Status = pb.PipelineVersionState


class Agent(Protocol):
    """What loads models on a server.

    Attributes:
        http: REST port of the server behind it.
        grpc: gRPC port of that.
    """

    http: int
    grpc: int

    def load(self, model: pb.Model, version: int) -> str:
        """Loads a version; returns why it could not, or nothing."""

    def unload(self, model: pb.Model, version: int) -> None:
        """Unloads a version."""


@dataclass
class ServerDouble:
    """A server with one replica.

    Attributes:
        capabilities: what it can run.
        memory_bytes: of its replica.
        connected: whether it is there.
        agent: what really loads models on it; None where they are only said to be loaded.
    """

    capabilities: frozenset[str]
    memory_bytes: int = 8_000_000_000
    connected: bool = True
    agent: Agent | None = None


@dataclass
class _Version:
    """One version of a model, whose state follows from the time."""

    number: int
    model: pb.Model
    server: str = ""
    ready_at: float = 0.0
    gone_at: float | None = None
    failure: str = ""

    def state(self) -> pb.ModelVersionStatus:
        now = time.monotonic()
        answer = pb.ModelVersionStatus(version=self.number, serverName=self.server)
        replicas = self.model.deploymentSpec.replicas
        if self.gone_at is not None:
            answer.state.state = State.ModelTerminated if now >= self.gone_at else State.ModelTerminating
        elif replicas == 0:
            answer.state.state = State.ModelScaledDown
        elif not self.server:
            answer.state.state, answer.state.reason = State.ScheduleFailed, NO_SERVER
        elif now < self.ready_at:
            answer.state.state = State.ModelProgressing
            answer.modelReplicaState[0].state = pb.ModelReplicaStatus.Loading
        elif self.failure:
            answer.state.state, answer.state.reason = State.ModelFailed, self.failure
            answer.state.unavailableReplicas = replicas
            answer.modelReplicaState[0].state = pb.ModelReplicaStatus.LoadFailed
            answer.modelReplicaState[0].reason = self.failure
        else:
            answer.state.state, answer.state.availableReplicas = State.ModelAvailable, replicas
            answer.modelReplicaState[0].state = pb.ModelReplicaStatus.Available
            # Since this machine was started, where Core 2 counts from 1970.
            answer.state.lastChangeTimestamp.FromNanoseconds(int(1e9 * self.ready_at))
        return answer

    @property
    def gone(self) -> bool:
        return self.gone_at is not None and time.monotonic() >= self.gone_at


@dataclass
class _Pipeline:
    number: int
    told: pb.Pipeline
    ready_at: float
    gone_at: float | None = None

    @property
    def steps(self) -> list[str]:
        return [step.name for step in self.told.steps]


class SchedulerDouble:
    """The scheduler, with a mesh that says which models are ready. A context manager.

    Attributes:
        servers: name -> server.
        load_s: from a load to its outcome.
        unload_s: from an unload to its end.
        stale_answers: how many answers after a load still show what was before.
        definitions: whether a status says what a model or pipeline was loaded with.
        failures: URI -> why a model from there does not load.
        unload_failures: names of the models that no server can unload.
        refusals: method -> (code, words) for every call of it.
        lost: method -> how many calls of it lose their connection, after the work was done.
        late_s: method -> how long each call of it takes, unless the double ends before.
        most_replicas: how many replicas of a model come up.
        mesh_ready: whether the mesh has heard of the models.
        answers: what a pipeline of these steps answers to a request, over gRPC; None where pipelines answer nothing.
        asked: every call, in order: method and request.
    """

    def __init__(self, *, credentials: Any = None) -> None:
        self.servers = {"mlserver": ServerDouble(frozenset({"mlserver", "python", "sklearn"}))}
        self.load_s = self.unload_s = 0.0
        self.stale_answers = 0
        self.definitions = True
        self.failures: dict[str, str] = {}
        self.unload_failures: set[str] = set()
        self.refusals: dict[str, tuple[grpc.StatusCode, str]] = {}
        self.lost: Counter[str] = Counter()
        self.late_s: dict[str, float] = {}
        self.most_replicas = 100
        self.mesh_ready = True
        self.answers: Callable[[list[str], bytes], bytes] | None = None
        self.asked: list[tuple[str, Any]] = []
        self._credentials = credentials
        self._lock = threading.RLock()
        self._models: dict[str, list[_Version]] = {}
        self._stale: dict[str, list[pb.ModelStatusResponse | None]] = {}
        self._experiments: dict[str, pb.Experiment] = {}
        self._stopped: set[str] = set()
        self._chance = random.Random(0)
        self._over = threading.Event()
        self._pipelines: dict[str, _Pipeline] = {}

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="scheduler-double")
        self._server = grpc.server(self._pool)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers()),))
        if self._credentials is None:
            inner = self._server.add_insecure_port(f"{LOOPBACK}:0")
        else:
            inner = self._server.add_secure_port(f"{LOOPBACK}:0", self._credentials)
        self._server.start()
        self._line = _Line(lambda _: inner)
        self._mesh = _Mesh(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._mesh.close()
        self._line.close()
        self._server.stop(None).wait()
        self._pool.shutdown()

    @property
    def port(self) -> int:
        """Where the scheduler listens."""
        return self._line.port

    @property
    def mesh(self) -> str:
        """``host:port`` of the mesh."""
        return f"{LOOPBACK}:{self._mesh.port}"

    def hang_up(self) -> None:
        """Takes no connection any more, and ends those that are."""
        self._line.hang_up()

    def be_far(self, late_s: float) -> None:
        """Every connection takes so long to come about."""
        self._line.late_s = late_s

    def loaded(self) -> list[str]:
        """The names of the models that are there."""
        with self._lock:
            return sorted(name for name, versions in self._models.items() if not versions[-1].gone)

    def available(self, name: str) -> bool:
        """Whether the newest version of a model is available."""
        with self._lock:
            versions = self._models.get(name)
            return bool(versions) and versions[-1].state().state.state == State.ModelAvailable

    def pipelines(self) -> dict[str, list[str]]:
        """The pipelines that are there, with their steps."""
        with self._lock:
            return {name: one.steps for name, one in sorted(self._pipelines.items()) if one.gone_at is None}

    def restart(self, name: str) -> None:
        """Has the server of a model load it anew, as after a crash; it is ready at once."""
        with self._lock:
            version = self._models[name][-1]
            # Clients tell times apart that are a millisecond apart.
            while (now := time.monotonic()) < version.ready_at + 0.002:
                time.sleep(0.001)
            version.ready_at = now

    def hurry(self, name: str) -> None:
        """What is under way with a model, to load or to unload it, is done."""
        with self._lock:
            version, now = self._models[name][-1], time.monotonic()
            version.ready_at = min(version.ready_at, now)
            version.gone_at = None if version.gone_at is None else min(version.gone_at, now)

    def route(self, name: str) -> tuple[Agent | None, str] | None:
        """(agent, internal name) of an available model, or None."""
        with self._lock:
            if not self.available(name):
                return None
            version = self._models[name][-1]
            return self.servers[version.server].agent, f"{name}_{version.number}"

    def led_to(self, pipeline: str) -> str:
        """The pipeline that answers a request to one, which an experiment may have taken over."""
        with self._lock:
            for one in self._experiments.values():
                if one.default == pipeline and one.resourceType == pb.PIPELINE:
                    weights = [candidate.weight for candidate in one.candidates]
                    return str(self._chance.choices([each.name for each in one.candidates], weights)[0])
        return pipeline

    def methods(self) -> list[str]:
        """The methods that were called, in order."""
        return [method for method, _ in self.asked]

    def calls(self, method: str) -> list[Any]:
        """The requests of one method, in order."""
        return [request for name, request in self.asked if name == method]

    def load(self, name: str, uri: str, **parameters: str) -> None:
        """Loads a model as somebody else would."""
        spec = pb.ModelSpec(uri=uri, requirements=["mlserver"])
        for key, value in parameters.items():
            spec.parameters.add(name=key, value=value)
        deployment = pb.DeploymentSpec(replicas=1)
        self._store(pb.Model(meta=pb.MetaData(name=name), modelSpec=spec, deploymentSpec=deployment))

    def forget(self, name: str) -> None:
        """A model is gone, as if it had never been there."""
        with self._lock:
            self._models.pop(name, None)

    # --- calls ---

    def _handlers(self) -> dict[str, Any]:
        single: list[tuple[str, type, Callable[..., Any]]] = [
            ("LoadModel", pb.LoadModelRequest, self._load_model),
            ("UnloadModel", pb.UnloadModelRequest, self._unload_model),
            ("StartExperiment", pb.StartExperimentRequest, self._start_experiment),
            ("StopExperiment", pb.StopExperimentRequest, self._stop_experiment),
            ("LoadPipeline", pb.LoadPipelineRequest, self._load_pipeline),
            ("UnloadPipeline", pb.UnloadPipelineRequest, self._unload_pipeline),
        ]
        streams: list[tuple[str, type, Callable[..., Any]]] = [
            ("ModelStatus", pb.ModelStatusRequest, self._model_status),
            ("ServerStatus", pb.ServerStatusRequest, self._server_status),
            ("ExperimentStatus", pb.ExperimentStatusRequest, self._experiment_status),
            ("PipelineStatus", pb.PipelineStatusRequest, self._pipeline_status),
        ]
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._taken(name, work), request.FromString, lambda answer: answer.SerializeToString()
            )
            for name, request, work in single
        }
        handlers |= {
            name: grpc.unary_stream_rpc_method_handler(
                self._streamed(name, work), request.FromString, lambda answer: answer.SerializeToString()
            )
            for name, request, work in streams
        }
        return handlers

    def _taken(self, method: str, work: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        def answer(request: Any, context: Any) -> Any:
            self._begin(method, request, context)
            try:
                with self._lock:
                    return work(request, context)
            finally:
                self._end(method)

        return answer

    def _streamed(self, method: str, work: Callable[..., Any]) -> Callable[[Any, Any], Iterator[Any]]:
        def answer(request: Any, context: Any) -> Iterator[Any]:
            self._begin(method, request, context)
            try:
                with self._lock:
                    answers = list(work(request, context))
            finally:
                self._end(method)
            yield from answers

        return answer

    def _begin(self, method: str, request: Any, context: Any) -> None:
        with self._lock:
            self.asked.append((method, request))
        if method in self.late_s:
            self._over.wait(self.late_s[method])
        if method in self.refusals:
            context.abort(*self.refusals[method])

    def _end(self, method: str) -> None:
        if self.lost[method] > 0:
            self.lost[method] -= 1
            self._line.cut()

    # --- models ---

    def _load_model(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        name = request.model.meta.name
        if not NAME.match(name):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"Model {name} does not have a valid name")
        versions = self._models.get(name)
        if versions and versions[-1].gone_at is not None and not versions[-1].gone:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"Model {name} is in process of deletion")
        self._stale[name] = [self._picture(name)] * self.stale_answers
        self._store(request.model)
        return pb.LoadModelResponse()

    def _store(self, model: pb.Model) -> None:
        name = model.meta.name
        versions = self._models.get(name)
        if versions is None or versions[-1].gone:
            versions = self._models[name] = []
        if versions and versions[-1].model.modelSpec == model.modelSpec:
            versions[-1].model = model
            return
        version = _Version(number=len(versions) + 1, model=model)
        versions.append(version)
        self._schedule(version)

    def _schedule(self, version: _Version) -> None:
        spec = version.model.modelSpec
        for name, server in self.servers.items():
            fits = set(spec.requirements) <= server.capabilities and spec.memoryBytes <= self._free(name)
            if server.connected and fits and spec.server in ("", name):
                version.server = name
                version.ready_at = time.monotonic() + self.load_s
                version.failure = self.failures.get(spec.uri, "")
                if server.agent is not None:
                    version.ready_at = math.inf
                    self._pool.submit(self._load_by, server.agent, version)
                return

    def _load_by(self, agent: Agent, version: _Version) -> None:
        failure = agent.load(version.model, version.number)
        with self._lock:
            version.failure = failure
            version.ready_at = time.monotonic() + self.load_s

    def _unload_by(self, agent: Agent, version: _Version) -> None:
        agent.unload(version.model, version.number)
        with self._lock:
            version.gone_at = time.monotonic() + self.unload_s

    def _unload_model(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        versions = self._models.get(request.model.name)
        if versions is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"Failed to find model {request.model.name}")
        assert versions is not None
        if request.model.name not in self.unload_failures and versions[-1].gone_at is None:
            versions[-1].gone_at = time.monotonic() + self.unload_s
            server = self.servers.get(versions[-1].server)
            if server is not None and server.agent is not None:
                versions[-1].gone_at = math.inf
                self._pool.submit(self._unload_by, server.agent, versions[-1])
        return pb.UnloadModelResponse()

    def _free(self, server: str) -> int:
        return self.servers[server].memory_bytes - sum(
            version.model.modelSpec.memoryBytes for version in self._on(server)
        )

    def _on(self, server: str) -> list[_Version]:
        newest = [versions[-1] for versions in self._models.values()]
        return [version for version in newest if version.server == server and not version.gone]

    def _picture(self, name: str) -> pb.ModelStatusResponse | None:
        versions = self._models.get(name)
        if versions is None:
            return None
        for version in versions:
            if not version.server and version.gone_at is None:
                # As Core 2 does when servers join or models leave.
                self._schedule(version)
        status = versions[-1].state()
        status.state.availableReplicas = min(status.state.availableReplicas, self.most_replicas)
        if name in self.unload_failures and "UnloadModel" in self.methods():
            status.state.state, status.state.reason = State.ModelTerminateFailed, "the server does not answer"
        if self.definitions:
            status.modelDefn.CopyFrom(versions[-1].model)
        return pb.ModelStatusResponse(modelName=name, versions=[status])

    def _model_status(self, request: pb.ModelStatusRequest, context: Any) -> Iterator[pb.ModelStatusResponse]:
        if not request.HasField("model"):
            yield from (picture for name in self._models if (picture := self._picture(name)) is not None)
            return
        name = request.model.name
        stale = self._stale.get(name)
        picture = stale.pop() if stale else self._picture(name)
        if picture is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"Failed to find model {name}")
        else:
            yield picture

    # --- servers ---

    def _server_status(self, request: pb.ServerStatusRequest, context: Any) -> Iterator[pb.ServerStatusResponse]:
        if request.name and request.name not in self.servers:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"Failed to find server {request.name}")
        for name, server in self.servers.items():
            if request.name in ("", name):
                status = pb.ServerStatusResponse(serverName=name, expectedReplicas=-1)
                if server.connected:
                    models = len(self._on(name))
                    status.availableReplicas = 1
                    status.numLoadedModelReplicas = models
                    status.resources.add(
                        totalMemoryBytes=server.memory_bytes,
                        availableMemoryBytes=self._free(name),
                        numLoadedModels=models,
                    )
                yield status

    # --- experiments ---

    def _start_experiment(self, request: pb.StartExperimentRequest, context: Any) -> pb.StartExperimentResponse:
        asked = request.experiment
        for other in self._experiments.values():
            if asked.default and other.default == asked.default and other.name != asked.name:
                words = f"default {other.default} is already in use by experiment {other.name}"
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, words)
        self._experiments[asked.name] = asked
        self._stopped.discard(asked.name)
        return pb.StartExperimentResponse()

    def _stop_experiment(self, request: pb.StopExperimentRequest, context: Any) -> pb.StopExperimentResponse:
        if self._experiments.pop(request.name, None) is None and request.name not in self._stopped:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"Experiment not found {request.name}")
        self._stopped.add(request.name)
        return pb.StopExperimentResponse()

    def _experiment_status(
        self, request: pb.ExperimentStatusRequest, context: Any
    ) -> Iterator[pb.ExperimentStatusResponse]:
        experiment = self._experiments.get(request.name)
        if experiment is None and request.name in self._stopped:
            # Core 2's store keeps what was stopped, and tells of it.
            yield pb.ExperimentStatusResponse(experimentName=request.name, active=False)
            return
        if experiment is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"Experiment not found {request.name}")
        assert experiment is not None
        there = self.pipelines().__contains__ if experiment.resourceType == pb.PIPELINE else self.available
        missing = [one.name for one in experiment.candidates if not there(one.name)]
        mirrored = not experiment.HasField("mirror") or there(experiment.mirror.name)
        yield pb.ExperimentStatusResponse(
            experimentName=experiment.name,
            active=not missing,
            candidatesReady=not missing,
            mirrorReady=mirrored,
            statusDescription=f"candidates not ready: {', '.join(missing)}" if missing else "experiment active",
        )

    # --- pipelines ---

    def _load_pipeline(self, request: pb.LoadPipelineRequest, context: Any) -> pb.LoadPipelineResponse:
        name = request.pipeline.name
        old = self._pipelines.get(name)
        number = 1 if old is None or old.gone_at is not None else old.number + 1
        self._pipelines[name] = _Pipeline(number, _at_length(request.pipeline), time.monotonic() + self.load_s)
        return pb.LoadPipelineResponse()

    def _unload_pipeline(self, request: pb.UnloadPipelineRequest, context: Any) -> pb.UnloadPipelineResponse:
        pipeline = self._pipelines.get(request.name)
        if pipeline is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"pipeline {request.name} not found")
        assert pipeline is not None
        if pipeline.gone_at is None:
            pipeline.gone_at = time.monotonic() + self.unload_s
        return pb.UnloadPipelineResponse()

    def _pipeline_status(self, request: pb.PipelineStatusRequest, context: Any) -> Iterator[pb.PipelineStatusResponse]:
        if not request.HasField("name"):
            yield from map(self._pipeline_picture, self._pipelines)
        elif request.name not in self._pipelines:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"pipeline {request.name} not found")
        else:
            yield self._pipeline_picture(request.name)

    def _pipeline_picture(self, name: str) -> pb.PipelineStatusResponse:
        pipeline, now = self._pipelines[name], time.monotonic()
        state = Status(pipelineVersion=pipeline.number, modelsReady=all(map(self.available, pipeline.steps)))
        if pipeline.gone_at is not None:
            state.status = Status.PipelineTerminated if now >= pipeline.gone_at else Status.PipelineTerminating
        elif now < pipeline.ready_at:
            state.status = Status.PipelineCreating
        elif name in self.failures:
            state.status, state.reason = Status.PipelineFailed, self.failures[name]
        else:
            state.status = Status.PipelineReady
        told = pipeline.told if self.definitions else None
        return pb.PipelineStatusResponse(pipelineName=name, versions=[pb.PipelineWithState(pipeline=told, state=state)])


# --- what is around it -----------------------------------------------------------------------------------------------


def _at_length(pipeline: pb.Pipeline) -> pb.Pipeline:
    """As Core 2 tells a pipeline afterwards: all of a step's outputs are said so, and it has an id of its own."""
    # Field 2, a string, which our messages do not have.
    told = pb.Pipeline.FromString(pipeline.SerializeToString() + b"\x12\x02id")
    for part in (*told.steps, told.output):
        sources = part.steps if isinstance(part, pb.PipelineOutput) else part.inputs
        sources[:] = [one if "." in one else f"{one}.outputs" for one in sources]
    if not pipeline.HasField("output"):
        told.ClearField("output")
    return told


class _Line:
    """A wire to a port, which can be cut: connections on it end, in the middle of whatever they carry."""

    def __init__(self, inner: Callable[[socket.socket], int]) -> None:
        self._open = True
        self.late_s = 0.0
        self._inner = inner
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def cut(self) -> None:
        """Ends every connection."""
        with self._lock:
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Ends every connection, and lets in no other."""
        with self._lock:
            self._open = False
        self.cut()

    def close(self) -> None:
        """Ends every connection, and the line."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        for thread in self._threads:
            thread.join()
        for end in (*self._ends, self._listener):
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                outside, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                # Whoever comes while the line is closed is either cut with the others, or not let in.
                let_in = self._open
                if let_in:
                    self._ends.append(outside)
            if let_in:
                self._start(self._lead, outside)
            else:
                outside.close()

    def _lead(self, outside: socket.socket) -> None:
        time.sleep(self.late_s)
        try:
            inside = socket.create_connection((LOOPBACK, self._inner(outside)))
        except OSError:
            return
        with self._lock:
            self._ends.append(inside)
        for end in (outside, inside):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._start(self._pump, inside, outside)
        self._pump(outside, inside)

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while sent := source.recv(1 << 16):
                sink.sendall(sent)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _Mesh:
    """The data plane: REST and gRPC on one port, led to a model by the header that names it.

    Without an agent it only tells whether a model is ready. Replies carry the route that they took.
    """

    def __init__(self, double: SchedulerDouble) -> None:
        self._double = double
        self._channels: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._rest = ThreadingHTTPServer((LOOPBACK, 0), _handler(double))
        threading.Thread(target=self._rest.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="mesh-double")
        self._grpc = grpc.server(self._pool)
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(self._passed(method, request))
            for method, request in (("ModelInfer", "model_name"), ("ModelMetadata", "name"))
        }
        generic = grpc.method_handlers_generic_handler(V2, handlers)
        self._grpc.add_generic_rpc_handlers((generic,))
        self._grpc_port = self._grpc.add_insecure_port(f"{LOOPBACK}:0")
        self._grpc.start()
        self._line = _Line(self._choose)
        self.port = self._line.port

    def close(self) -> None:
        """Ends it."""
        self._line.close()
        self._grpc.stop(None).wait()
        self._pool.shutdown()
        for channel in self._channels.values():
            channel.close()
        self._rest.shutdown()
        self._rest.server_close()

    def _channel(self, port: int) -> Any:
        with self._lock:
            if port not in self._channels:
                options = [("grpc.enable_http_proxy", 0)]
                self._channels[port] = grpc.insecure_channel(f"{LOOPBACK}:{port}", options=options)
            return self._channels[port]

    def _choose(self, outside: socket.socket) -> int:
        # What every connection of HTTP/2 begins with.
        speaks_grpc = outside.recv(3, socket.MSG_PEEK) == b"PRI"
        return self._grpc_port if speaks_grpc else self._rest.server_address[1]

    def _passed(self, method: str, field: str) -> Callable[[bytes, Any], bytes]:
        """A call that is passed on, with the internal name in the field that names the model."""
        return lambda body, context: self._pass_on(method, field, body, context)

    def _pass_on(self, method: str, field: str, body: bytes, context: Any) -> bytes:
        from tritonclient.grpc import service_pb2

        headers = dict(context.invocation_metadata())
        asked = str(headers.get("seldon-model", ""))
        if asked.endswith(".pipeline") and self._double.answers is not None:
            name = self._double.led_to(asked.removesuffix(".pipeline"))
            steps = self._double.pipelines()[name]
            # The models on the way first, and then the pipeline, in a header of its own.
            models = "".join(f":{step}_1:" for step in steps)
            context.send_initial_metadata((("x-seldon-route", models), ("x-seldon-route", f":{name}.pipeline:")))
            return self._double.answers(steps, body)
        route = self._double.route(asked)
        if route is None or route[0] is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no route")
        assert route is not None
        agent, internal = route
        assert agent is not None
        request = getattr(service_pb2, f"{method}Request").FromString(body)
        setattr(request, field, internal)
        context.send_initial_metadata((("x-seldon-route", f":{internal}:"),))
        try:
            return bytes(self._channel(agent.grpc).unary_unary(f"/{V2}/{method}")(request.SerializeToString()))
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())
        raise AssertionError("unreachable: one of the two has returned or raised")


def _handler(double: SchedulerDouble) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            model = self.headers.get("seldon-model", "")
            if self.path in {"/v2", f"/v2/models/{model}"}:
                self.pass_on("GET", None)
                return
            ready = double.mesh_ready and double.available(model) and self.path == f"/v2/models/{model}/ready"
            self.answer(200 if ready else 404, b"", {})

        def do_POST(self) -> None:
            self.pass_on("POST", self.rfile.read(int(self.headers["Content-Length"])))

        def pass_on(self, method: str, body: bytes | None) -> None:
            name = self.headers.get("seldon-model", "")
            route = double.route(name)
            if route is None or route[0] is None:
                self.answer(404, b"no route", {})
                return
            agent, internal = route
            path = re.sub(rf"/models/{re.escape(name)}\b", f"/models/{internal}", self.path)
            with contextlib.closing(http.client.HTTPConnection(LOOPBACK, agent.http)) as connection:
                connection.request(method, path, body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                self.answer(reply.status, reply.read(), {"x-seldon-route": f":{internal}:"})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
