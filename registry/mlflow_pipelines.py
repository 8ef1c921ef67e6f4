"""Pipelines in MLflow: an analysis as a run, and a pipeline that is promoted as a version of a registered model."""

import math
from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from registry.errors import InputError
from registry.mlflow_store import default_store, is_server, named_failures, patient
from registry.mlflow_tracking import MlflowTracker
from registry.report.pipeline import PipelineView
from registry.tracking import store_uri

_FOLDER = "pipeline"


def record_pipeline(view: PipelineView, *, files: Mapping[str, Path], work: Path, uri: str | None = None) -> str:
    """Records an analysis; returns the run's id.

    Metrics are ``saturation_rps``, ``p50_ms`` and the like at ``rate_rps``, and of each step ``limit_rps``,
    ``utilisation``, ``sojourn_ms`` and ``decides``, and ``slack_ms`` where it is finite, as ``<name>.<step>``.

    Args:
        view: the analysis.
        files: name -> file to keep with it.
        work: folder of the embedded store, where no other is named.
        uri: of the tracking store; None for ``MLFLOW_TRACKING_URI``, else the embedded one.

    Raises:
        InputError: a file does not exist.
        UnreachableError: the tracking store does not answer, or refuses.
    """
    if missing := [path for path in files.values() if not path.is_file()]:
        raise InputError(f"the file {missing[0]} does not exist")
    store = store_uri(uri, work)
    tracker = MlflowTracker(store, work)
    tracker.check()
    with named_failures(store), patient():
        client = MlflowClient(tracking_uri=store, registry_uri=store)
        run = client.create_run(tracker.experiment(f"burnish/pipelines/{view.name}"), run_name=view.name)
        client.log_batch(
            run.info.run_id,
            metrics=[Metric(name, value, run.info.start_time, 0) for name, value in _metrics(view).items()],
            params=[Param(name, value) for name, value in _params(view).items()],
            tags=[RunTag("mlflow.note.content", view.headline), RunTag("burnish.kind", "pipeline")],
        )
        for name, path in files.items():
            client.log_artifact(run.info.run_id, str(path), artifact_path=name)
        client.set_terminated(run.info.run_id)
        return str(run.info.run_id)


def registered_name(pipeline: str) -> str:
    """The registered model of a pipeline; with Core 2's own ending, since a model may have the pipeline's name."""
    return f"{pipeline}.pipeline"


def register_pipeline(
    pipeline: str,
    manifest: str,
    *,
    campaign_id: str,
    candidate_id: str,
    candidate: str,
    models: Mapping[str, str],
    reason: str,
    work: Path,
    uri: str | None = None,
) -> str:
    """Makes a pipeline a version of its registered model, and returns the version; no alias is set.

    Its artifact is the manifest, in a run of its own. `registry.mlflow_registry` finds it by its tags.

    Args:
        pipeline: its name.
        manifest: its text.
        campaign_id: digest of what it is made of.
        candidate_id: digest of what it is.
        candidate: that in words.
        models: step -> Model.
        reason: why it is promoted.
        work: folder of the embedded store, where no other is named.
        uri: of the tracking store; None for ``MLFLOW_TRACKING_URI``, else the embedded one.

    Raises:
        UnreachableError: the tracking store does not answer, or refuses.
    """
    store, name = store_uri(uri, work), registered_name(pipeline)
    tracker = MlflowTracker(store, work)
    tracker.check()
    with named_failures(store), patient():
        client = MlflowClient(tracking_uri=store, registry_uri=store)
        run = client.create_run(tracker.experiment(f"burnish/pipelines/{pipeline}"), run_name=candidate)
        run_id = str(run.info.run_id)
        client.log_batch(
            run_id,
            params=[Param(f"model.{step}", model) for step, model in models.items()],
            tags=[RunTag("mlflow.note.content", reason), RunTag("burnish.kind", "pipeline")],
        )
        client.log_text(run_id, manifest, f"{_FOLDER}/Pipeline-{pipeline}.yaml")
        client.set_terminated(run_id)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {
            "burnish.kind": "pipeline",
            "burnish.campaign_id": campaign_id,
            "burnish.candidate_id": candidate_id,
            "burnish.candidate": candidate,
            "burnish.run_id": run_id,
        }
        with default_store(store, needed=not is_server(store)):
            made = client.create_model_version(
                name, source=f"runs:/{run_id}/{_FOLDER}", run_id=run_id, tags=tags, description=reason
            )
        return str(made.version)


def _metrics(view: PipelineView) -> dict[str, float]:
    found = {"saturation_rps": view.saturation_rps, "rate_rps": view.rate_rps}
    found |= {f"{name}_ms": value for name, value in view.latency_ms.items()}
    for step in view.steps:
        for name in ("limit_rps", "utilisation", "sojourn_ms", "slack_ms", "decides"):
            found[f"{name}.{step.name}"] = float(getattr(step, name))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _params(view: PipelineView) -> dict[str, str]:
    return {
        "bottleneck": view.bottleneck,
        "throughput_path": " ".join(view.throughput_path),
        "latency_path": " ".join(view.latency_path),
        **{f"variant.{step.name}": step.variant for step in view.steps},
    }
