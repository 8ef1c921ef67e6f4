"""Core 2 by its scheduler: load and unload models, wait for them, run experiments and pipelines, over gRPC.

The scheduler takes what it is told and answers at once; whether it came about is asked for afterwards. So each of the
``load`` and ``start`` methods here has a ``wait`` method, which tells a state of what was asked for from one that was
there before, and a failure from a state that is on its way.

Inside Kubernetes the operator owns the models and overwrites what this client does: there the custom resources are the
way.
"""

import time
from collections.abc import Iterator
from typing import Self

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.deploy.core2_candidates import one_line
from profiles.deploy.core2_messages import (
    AVAILABLE,
    GOING,
    GONE,
    TERMINATED,
    Core2Model,
    Experiment,
    ExperimentState,
    Loading,
    LoadingPipeline,
    ModelVersion,
    PipelineState,
    ServerState,
    check_experiment,
    check_model,
    experiment_message,
    experiment_state,
    model_message,
    model_version,
    pipeline_state,
    server_state,
)
from profiles.deploy.scheduler_channel import PORT, SchedulerChannel, SchedulerRefusedError, TlsSettings
from profiles.serving.naming import check_core2_name
from registry.errors import BurnishError, UnreachableError

SUBSCRIBER = "burnish"
"""The name that the scheduler writes into its log."""

_FIRST_POLL_S = 0.02
_LAST_POLL_S = 0.5
# The last look of a wait has time for an answer, so that a wait ends with what was seen.
_LEAST_CALL_S = 1.0


class SchedulerClient:
    """A connection to one scheduler. A context manager; opened by the first call.

    A call whose connection is lost is made once more where the second does no harm, and no more than that.
    """

    def __init__(self, host: str, port: int = PORT, *, tls: TlsSettings | None = None, timeout_s: float = 10.0) -> None:
        """Reads the files of ``tls``; connects to nothing yet.

        Args:
            host: name or address of the scheduler.
            port: `PORT` for plaintext, `TLS_PORT` for mutual TLS, unless the installation has others.
            tls: None for plaintext.
            timeout_s: longest that one call may take; waiting has limits of its own.

        Raises:
            InputError: a file of ``tls`` is missing, or is not what it should be.
        """
        self._channel = SchedulerChannel(host, port, tls=tls, timeout_s=timeout_s)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    # --- models ---

    def load_model(self, model: Core2Model) -> Loading:
        """Tells the scheduler to load a model, and returns when it has taken that; `wait_for_model` waits for more.

        The same definition again changes nothing, even where other bytes stand at its URI.

        Raises:
            InputError: Core 2 takes no such name, or no such number of replicas.
            SchedulerRefusedError: the scheduler refused: a model of this name is being deleted, say.
            UnreachableError: the scheduler did not answer.
        """
        check_model(model)
        before = self.model(model.name)
        request = pb.LoadModelRequest(model=model_message(model))
        self._channel.ask("LoadModel", request, pb.LoadModelResponse, about=model.name)
        return Loading(model=model, before=before)

    def model(self, name: str, *, timeout_s: float | None = None) -> ModelVersion | None:
        """The newest version of a model, or None where the scheduler knows no such model.

        Args:
            name: of the model.
            timeout_s: longest that this call may take; None for the client's own.

        Raises:
            UnreachableError: the scheduler did not answer.
        """
        request = pb.ModelStatusRequest(subscriberName=SUBSCRIBER, model=pb.ModelReference(name=name))
        answer = self._channel.look("ModelStatus", request, pb.ModelStatusResponse, about=name, timeout_s=timeout_s)
        if answer is None or not answer.versions:
            return None
        return model_version(max(answer.versions, key=lambda one: one.version))

    def models(self) -> dict[str, ModelVersion]:
        """The newest version of each model that the scheduler knows, by name; those that are gone may be among them.

        Raises:
            UnreachableError: the scheduler did not answer.
        """
        request = pb.ModelStatusRequest(subscriberName=SUBSCRIBER)
        answers = self._channel.ask_all("ModelStatus", request, pb.ModelStatusResponse, about="all models")
        return {
            answer.modelName: model_version(max(answer.versions, key=lambda one: one.version))
            for answer in answers
            if answer.versions
        }

    def wait_for_model(self, loading: Loading, *, timeout_s: float) -> ModelVersion:
        """Returns when all replicas of what was loaded are available.

        Args:
            loading: what `load_model` returned; a version that was there before it does not count.
            timeout_s: longest wait.

        Raises:
            UnreachableError: it could not be scheduled or loaded (with Core 2's reason), somebody took it away, or time
                is up; or the scheduler did not answer.
        """
        model, seen = loading.model, None
        for left_s in _polls(timeout_s):
            found = self.model(model.name, timeout_s=self._limit(left_s))
            if found is None or _is_old(found, loading):
                continue
            seen = found
            if found.definition is not None and found.definition.uri != model.uri:
                raise UnreachableError(
                    f"somebody else has loaded another model as {model.name}, from {found.definition.uri}"
                )
            if found.state == AVAILABLE and found.available_replicas >= model.replicas:
                return found
            self._check_failed(model, found)
        late = f"{model.name} is not available on Core 2 after {timeout_s:g} s"
        if seen is not None and seen.state == AVAILABLE:
            raise UnreachableError(f"{late}: {seen.available_replicas} of its {model.replicas} replicas are")
        raise _too_late(late, seen)

    def unload_model(self, name: str, *, version: int | None = None) -> None:
        """Tells the scheduler to unload a model; of one that it does not know, there is nothing to do.

        Raises:
            UnreachableError: the scheduler did not answer.
        """
        request = pb.UnloadModelRequest(model=pb.ModelReference(name=name, version=version))
        try:
            self._channel.ask("UnloadModel", request, pb.UnloadModelResponse, about=name)
        except SchedulerRefusedError as error:
            found = self.model(name)
            if found is not None and found.live and found.state not in GOING:
                raise UnreachableError(error.message, hint=error.hint) from error

    def wait_until_unloaded(self, name: str, *, timeout_s: float) -> None:
        """Returns when a model that was unloaded is gone, and its memory free.

        Raises:
            UnreachableError: a server could not unload it, or time is up; or the scheduler did not answer.
        """
        found = None
        for left_s in _polls(timeout_s):
            found = self.model(name, timeout_s=self._limit(left_s))
            if found is None or found.state in GONE:
                return
            if found.state == "ModelTerminateFailed":
                raise UnreachableError(f"Core 2 could not unload {name}: {one_line(found.reason)}")
        raise _too_late(f"{name} is not unloaded from Core 2 after {timeout_s:g} s", found)

    def _limit(self, left_s: float) -> float:
        """How long a call may take in a wait of which so much is left."""
        return min(self._timeout_s, max(left_s, _LEAST_CALL_S))

    def _check_failed(self, model: Core2Model, found: ModelVersion) -> None:
        reason = one_line(found.reason)
        if found.state == "ScheduleFailed":
            raise UnreachableError(f"Core 2 cannot schedule {model.name}: {reason}", hint=self._room(model))
        if found.state == "ModelFailed":
            where = f" on {found.server}" if found.server else ""
            raise UnreachableError(
                f"Core 2 could not load {model.name}{where}: {reason}",
                hint=f"Its files are looked for at {model.uri}; the logs of rclone and of the server say more.",
            )
        if found.state in GOING | {TERMINATED, "ModelTerminateFailed", "ModelScaledDown"}:
            raise UnreachableError(f"{model.name} was taken away while it loaded: {found.state} {reason}".rstrip())

    def _room(self, model: Core2Model) -> str:
        """What can be said of why no server takes a model: the scheduler's reason is the same for all causes."""
        try:
            servers = {server.name: server for server in self.server_status()}
        except BurnishError:
            return f"It needs a server with {', '.join(model.requirements) or 'no capability'}."
        if model.server is not None and model.server not in servers:
            return f"There is no server {model.server!r}; there are: {', '.join(sorted(servers)) or 'none'}."
        asked = [servers[model.server]] if model.server is not None else list(servers.values())
        connected = [server for server in asked if server.available_replicas > 0]
        if not connected:
            return f"None of these servers is connected: {', '.join(sorted(s.name for s in asked)) or 'there is none'}."
        roomiest = max(connected, key=lambda server: server.free_bytes)
        if roomiest.free_bytes < (model.memory_bytes or 0):
            return (
                f"It asks for {_mb(model.memory_bytes or 0)}, and the most that is free is {_mb(roomiest.free_bytes)},"
                f" on {roomiest.name}."
            )
        return (
            f"There is memory on {', '.join(sorted(server.name for server in connected))}; so look for a server with "
            f"all of these capabilities: {', '.join(model.requirements) or '(none)'}, "
            f"and with {model.replicas} replicas."
        )

    # --- servers ---

    def server_status(self, name: str | None = None) -> tuple[ServerState, ...]:
        """The servers that are connected, or the one of this name.

        Raises:
            SchedulerRefusedError: there is no server of this name.
            UnreachableError: the scheduler did not answer.
        """
        request = pb.ServerStatusRequest(subscriberName=SUBSCRIBER, name=name)
        answers = self._channel.ask_all("ServerStatus", request, pb.ServerStatusResponse, about=name or "all servers")
        return tuple(server_state(answer) for answer in answers)

    # --- experiments ---

    def start_experiment(self, experiment: Experiment) -> None:
        """Tells the scheduler to start an experiment, or to change the one of its name.

        Raises:
            InputError: it has no candidate, or a mirror or default that does not fit them.
            SchedulerRefusedError: the scheduler refused it.
            UnreachableError: the scheduler did not answer.
        """
        check_experiment(experiment)
        request = pb.StartExperimentRequest(experiment=experiment_message(experiment))
        self._channel.ask("StartExperiment", request, pb.StartExperimentResponse, about=experiment.name)

    def experiment(self, name: str, *, timeout_s: float | None = None) -> ExperimentState | None:
        """The state of an experiment, or None where the scheduler knows none of this name.

        Raises:
            UnreachableError: the scheduler did not answer.
        """
        request = pb.ExperimentStatusRequest(subscriberName=SUBSCRIBER, name=name)
        answer = self._channel.look(
            "ExperimentStatus", request, pb.ExperimentStatusResponse, about=name, timeout_s=timeout_s
        )
        return None if answer is None else experiment_state(answer)

    def wait_for_experiment(self, experiment: Experiment, *, timeout_s: float) -> ExperimentState:
        """Returns when an experiment is active with all its candidates, and its mirror where it has one.

        A status carries no version: of an experiment that was changed, it may be that of before the change.

        Raises:
            UnreachableError: time is up (with Core 2's words on it), or the scheduler did not answer.
        """
        found = None
        for left_s in _polls(timeout_s):
            found = self.experiment(experiment.name, timeout_s=self._limit(left_s))
            mirrored = experiment.mirror is None or (found is not None and found.mirror_ready)
            if found is not None and found.active and found.candidates_ready and mirrored:
                return found
        said = "the scheduler does not know it" if found is None else one_line(found.description)
        raise UnreachableError(f"the experiment {experiment.name} is not active after {timeout_s:g} s: {said}")

    def stop_experiment(self, name: str) -> None:
        """Tells the scheduler to stop an experiment; of one that it does not know, there is nothing to do.

        Raises:
            UnreachableError: the scheduler did not answer.
        """
        try:
            self._channel.ask(
                "StopExperiment", pb.StopExperimentRequest(name=name), pb.StopExperimentResponse, about=name
            )
        except SchedulerRefusedError as error:
            found = self.experiment(name)
            if found is not None and found.active:
                raise UnreachableError(error.message, hint=error.hint) from error

    # --- pipelines ---

    def load_pipeline(self, pipeline: pb.Pipeline) -> LoadingPipeline:
        """Tells the scheduler to load a pipeline; `wait_for_pipeline` waits for it.

        A lost connection is not tried again: each time makes a version of its own.

        Raises:
            InputError: Core 2 takes no such name.
            SchedulerRefusedError: the scheduler refused it.
            UnreachableError: the scheduler did not answer; it may have taken the pipeline nonetheless.
        """
        check_core2_name(pipeline.name, "pipeline")
        before = self.pipeline(pipeline.name)
        request = pb.LoadPipelineRequest(pipeline=pipeline)
        self._channel.ask("LoadPipeline", request, pb.LoadPipelineResponse, about=pipeline.name, again=False)
        return LoadingPipeline(name=pipeline.name, before=before)

    def pipeline(self, name: str, *, timeout_s: float | None = None) -> PipelineState | None:
        """The newest version of a pipeline, or None where the scheduler knows none of this name.

        Raises:
            UnreachableError: the scheduler did not answer.
        """
        request = pb.PipelineStatusRequest(subscriberName=SUBSCRIBER, name=name)
        answer = self._channel.look(
            "PipelineStatus", request, pb.PipelineStatusResponse, about=name, timeout_s=timeout_s
        )
        if answer is None or not answer.versions:
            return None
        return pipeline_state(max(answer.versions, key=lambda one: one.state.pipelineVersion))

    def pipelines(self) -> dict[str, PipelineState]:
        """The newest version of each pipeline that the scheduler knows, by name; those that are gone may be among them.

        Raises:
            UnreachableError: the scheduler did not answer.
        """
        request = pb.PipelineStatusRequest(subscriberName=SUBSCRIBER)
        answers = self._channel.ask_all("PipelineStatus", request, pb.PipelineStatusResponse, about="all pipelines")
        return {
            answer.pipelineName: pipeline_state(max(answer.versions, key=lambda one: one.state.pipelineVersion))
            for answer in answers
            if answer.versions
        }

    def wait_for_pipeline(self, loading: LoadingPipeline, *, timeout_s: float) -> PipelineState:
        """Returns when what was loaded is ready, with its models.

        Raises:
            UnreachableError: it failed (with Core 2's reason), or time is up; or the scheduler did not answer.
        """
        name, before, seen = loading.name, loading.before, None
        for left_s in _polls(timeout_s):
            found = self.pipeline(name, timeout_s=self._limit(left_s))
            if found is None or (before is not None and _is_old_pipeline(found, before)):
                continue
            seen = found
            if found.state == "PipelineReady" and found.models_ready:
                return found
            if found.state in {"PipelineFailed", "PipelineTerminating", "PipelineTerminated"}:
                raise UnreachableError(
                    f"Core 2 could not make the pipeline {name}: {found.state} {one_line(found.reason)}"
                )
        late = f"the pipeline {name} is not ready after {timeout_s:g} s"
        if seen is not None and seen.state == "PipelineReady":
            raise UnreachableError(f"{late}: not all of its models are")
        raise _too_late(late, seen)

    def unload_pipeline(self, name: str, *, timeout_s: float) -> None:
        """Unloads a pipeline and returns when it is gone; of one that the scheduler does not know, at once.

        Raises:
            UnreachableError: it could not be unloaded, time is up, or the scheduler did not answer.
        """
        request = pb.UnloadPipelineRequest(name=name)
        try:
            self._channel.ask("UnloadPipeline", request, pb.UnloadPipelineResponse, about=name)
        except SchedulerRefusedError as error:
            state = self.pipeline(name)
            if state is not None and state.state not in {"PipelineTerminating", "PipelineTerminated"}:
                raise UnreachableError(error.message, hint=error.hint) from error
        found = None
        for left_s in _polls(timeout_s):
            found = self.pipeline(name, timeout_s=self._limit(left_s))
            if found is None or found.state == "PipelineTerminated":
                return
            if found.state == "PipelineFailedTerminating":
                raise UnreachableError(f"Core 2 could not unload the pipeline {name}: {one_line(found.reason)}")
        raise _too_late(f"the pipeline {name} is not unloaded after {timeout_s:g} s", found)


def _is_old(found: ModelVersion, loading: Loading) -> bool:
    """Whether a version is the one from before the load, and so says nothing of what was loaded."""
    before = loading.before
    if before is None:
        return False
    if not before.live:
        # Numbers start again after a model is gone, so only its last state tells.
        return not found.live and found.version == before.version
    return found.version <= before.version and found.definition != model_message(loading.model).modelSpec


def _is_old_pipeline(found: PipelineState, before: PipelineState) -> bool:
    if before.state == "PipelineTerminated":
        return found == before
    return found.version <= before.version


def _polls(timeout_s: float) -> Iterator[float]:
    """The seconds that are left, at each time to look; begins at once, and looks less and less often."""
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_POLL_S
    while (left_s := deadline - time.monotonic()) > 0:
        yield left_s
        time.sleep(max(0.0, min(pause_s, deadline - time.monotonic())))
        pause_s = min(pause_s * 1.5, _LAST_POLL_S)


def _too_late(what: str, found: ModelVersion | PipelineState | None) -> UnreachableError:
    if found is None:
        return UnreachableError(f"{what}: the scheduler shows nothing of it yet")
    reason = f" ({one_line(found.reason)})" if found.reason else ""
    return UnreachableError(f"{what}: it is in the state {found.state}{reason}")


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"
