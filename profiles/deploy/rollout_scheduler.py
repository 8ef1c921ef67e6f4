"""Manifests of production, applied through Core 2's scheduler where nobody else commands it."""

import time

from profiles.deploy import core2_scheduler_pb2 as pb
from profiles.deploy.core2_messages import (
    GOING,
    Core2Model,
    Experiment,
    LoadingPipeline,
    ModelVersion,
    PipelineState,
    model_message,
)
from profiles.deploy.core2_pipelines import pipeline_message, pipeline_spec, plain
from profiles.deploy.rollout_core2 import Core2Applier
from profiles.deploy.scheduler import SchedulerClient
from profiles.deploy.scheduler_channel import SchedulerRefusedError
from profiles.serving.core2.manifests import Manifest
from profiles.serving.core2.schema import MLOPS
from profiles.serving.core2.sizing import quantity_bytes
from registry.errors import InputError

# States of a pipeline that is as it was loaded, or will be.
_HOPEFUL = frozenset({"PipelineCreate", "PipelineCreating", "PipelineReady", "PipelineRebalancing"})


class SchedulerApplier(Core2Applier[SchedulerClient]):
    """Implements `profiles.deploy.rollout.Applier`.

    The scheduler keeps no labels, and does not tell what an experiment is of. One that was stopped stays known to it
    for a while, and is inactive: for what is in force it is gone.
    """

    def read(self, kind: str, name: str) -> Manifest | None:
        """What is in force; see `profiles.deploy.rollout.Applier`.

        Raises:
            InputError: it has settings that burnish could not restore, or the scheduler does not tell what it is.
            UnreachableError: the scheduler did not answer.
        """
        if kind == "Experiment":
            split = self._client.experiment(name)
            return None if split is None or not split.active else _resource(kind, name, {})
        if kind == "Pipeline":
            state = self._client.pipeline(name)
            return None if state is None or not state.live else _resource(kind, name, pipeline_spec(name, state))
        found = self._client.model(name)
        if found is None or not found.live:
            return None
        return _resource(kind, name, _spec_of(name, found))

    def apply(self, manifest: Manifest) -> None:
        """Has a model or a pipeline loaded, or an experiment started, and returns when it is in force."""
        name, deadline = str(manifest["metadata"]["name"]), time.monotonic() + self._timeout_s
        if manifest["kind"] == "Experiment":
            experiment = experiment_of(manifest)
            try:
                self._client.start_experiment(experiment)
            except SchedulerRefusedError as error:
                # That it is somebody else's is known only here: the scheduler does not tell what experiments are of.
                raise InputError(error.message, hint="End the other experiment first.") from error
            self._client.wait_for_experiment(experiment, timeout_s=self._timeout_s)
            return
        if manifest["kind"] == "Pipeline":
            self._apply_pipeline(manifest)
            return
        found = self._client.model(name)
        if found is not None and found.state in GOING:
            self._client.wait_until_unloaded(name, timeout_s=self._timeout_s)
        self._client.wait_for_model(self._client.load_model(_model_of(manifest)), timeout_s=self._timeout_s)
        self._mesh.wait_for(self._mesh.target_of(name, "rest"), deadline)

    def delete(self, kind: str, name: str) -> None:
        """Has a model or a pipeline unloaded, or an experiment stopped, and returns when it is gone."""
        if kind == "Experiment":
            self._client.stop_experiment(name)
            return
        if kind == "Pipeline":
            state = self._client.pipeline(name)
            if state is not None and state.live:
                self._client.unload_pipeline(name, timeout_s=self._timeout_s)
            return
        found = self._client.model(name)
        if found is not None and found.live:
            self._client.unload_model(name)
            self._client.wait_until_unloaded(name, timeout_s=self._timeout_s)

    def exists(self, kind: str, name: str) -> bool:
        """Whether the scheduler knows one of this name."""
        if kind == "Model":
            found = self._client.model(name)
            return found is not None and found.live
        return self.read(kind, name) is not None

    def splits(self, name: str) -> tuple[str, ...]:
        """Nothing: the scheduler does not tell, and refuses a second experiment with the same default."""
        return ()

    def used_by(self, model: str) -> tuple[str, ...]:
        """The pipelines with a model, of which the scheduler tells the steps."""
        return tuple(sorted(name for name, one in self._client.pipelines().items() if one.live and model in one.steps))

    def replicas(self, model: str) -> int:
        """As many as were asked for; 1 where the scheduler does not say."""
        found = self._client.model(model)
        asked = None if found is None or not found.live else found.deployment
        return 1 if asked is None else max(1, asked.replicas)

    def is_scaled(self, model: str) -> bool:
        """No: without Kubernetes nobody else says how many replicas there are."""
        return False

    def _apply_pipeline(self, manifest: Manifest) -> None:
        """Each load makes a version of its own, so what is there as it should be is waited for, not loaded again."""
        wanted = pipeline_message(manifest)
        if _is_loaded(self._client.pipeline(wanted.name), wanted):
            loading = LoadingPipeline(name=wanted.name, before=None)
        else:
            loading = self._client.load_pipeline(wanted)
        self._client.wait_for_pipeline(loading, timeout_s=self._timeout_s)


def experiment_of(manifest: Manifest) -> Experiment:
    """What the scheduler is told of an Experiment."""
    spec = manifest["spec"]
    mirror = spec.get("mirror")
    return Experiment(
        name=str(manifest["metadata"]["name"]),
        weights={str(one["name"]): int(one["weight"]) for one in spec["candidates"]},
        default=spec.get("default"),
        mirror=None if mirror is None else (str(mirror["name"]), int(mirror["percent"])),
        resource=spec.get("resourceType", "model"),
    )


def _is_loaded(found: PipelineState | None, wanted: pb.Pipeline) -> bool:
    if found is None or found.definition is None or found.state not in _HOPEFUL:
        return False
    return plain(found.definition) == wanted


def _model_of(manifest: Manifest) -> Core2Model:
    spec = manifest["spec"]
    memory = spec.get("memory")
    return Core2Model(
        name=str(manifest["metadata"]["name"]),
        uri=spec["storageUri"],
        requirements=tuple(spec["requirements"]),
        memory_bytes=None if memory is None else round(quantity_bytes(memory)),
        server=spec.get("server"),
        parameters={one["name"]: one["value"] for one in spec.get("parameters", [])},
        replicas=spec.get("replicas", 1),
        min_replicas=spec.get("minReplicas"),
        max_replicas=spec.get("maxReplicas"),
        artifact_version=spec.get("artifactVersion"),
        secret_name=spec.get("secretName"),
    )


def _spec_of(name: str, found: ModelVersion) -> Manifest:
    told, deployed = found.definition, found.deployment
    if told is None or deployed is None:
        raise InputError(
            f"the scheduler does not tell what {name} was loaded with, so that it could not be restored",
            hint="Use a Core 2 whose scheduler tells the definitions of its models.",
        )
    spec = {
        "storageUri": told.uri,
        "artifactVersion": told.artifactVersion if told.HasField("artifactVersion") else None,
        "requirements": list(told.requirements),
        "memory": str(told.memoryBytes) if told.HasField("memoryBytes") else None,
        "server": told.server if told.HasField("server") else None,
        "replicas": deployed.replicas,
        "minReplicas": deployed.minReplicas or None,
        "maxReplicas": deployed.maxReplicas or None,
        "parameters": [{"name": one.name, "value": one.value} for one in told.parameters] or None,
        "secretName": told.storageConfig.storageSecretName or None,
    }
    spec = {key: value for key, value in spec.items() if value is not None}
    if model_message(_model_of(_resource("Model", name, spec))).modelSpec != told or deployed.replicas < 1:
        raise InputError(
            f"{name} has settings at the scheduler that burnish could not restore",
            hint="Load it with a URI, requirements, memory, server, parameters and replicas alone.",
        )
    return spec


def _resource(kind: str, name: str, spec: Manifest) -> Manifest:
    return {"apiVersion": MLOPS, "kind": kind, "metadata": {"name": name}, "spec": spec}
