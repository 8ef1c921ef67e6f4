"""The MLflow adapter of the Tracker port, and the only module of this room that imports mlflow.

A campaign is a parent run in the experiment ``burnish/<model>``, a candidate a child run, a variant that was served a
logged model, and the selected candidate's a version of the registered model ``<model>``. The parent run is finished
last, so a run that is not finished is what is left of an interrupted try, and is replaced.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

# Read by MLflow while it is imported: nothing phones home, and nothing but the command's answer goes to stdout.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

with warnings.catch_warnings():
    # Of MLflow's own type hints, while it is imported.
    warnings.filterwarnings("ignore", message=".*Any type hint is inferred", category=UserWarning)
    import mlflow
    import mlflow.onnx
    import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
)
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema
from mlflow.types import TensorSpec as MlflowTensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from registry import codec, tracked
from registry.errors import InputError, UnreachableError
from registry.ports import Published
from registry.records import Campaign, Candidate, TensorSpec, Variant
from registry.report.markdown import render_markdown
from registry.tracking import embedded_uri, redact, without_secrets

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 5
# MLflow's own limits on one log_batch.
MOST_METRICS = 1000
# An example is written as JSON, so a large one would outweigh the model.
LARGEST_EXAMPLE = 200_000
# Where a database listens if its URI names no port.
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# MLflow takes 36; all of it is in the parameters.
_DATASET_DIGEST_CHARS = 16
_MODEL_NAME = re.compile(r"[\w .-]+")
_NOT_IN_A_LOGGED_NAME = re.compile(r"[^A-Za-z0-9_-]+")
_PACKAGES = {"onnx": ("mlflow", "onnx", "onnxruntime", "numpy"), "openvino": ("mlflow", "openvino", "numpy")}


class MlflowTracker:
    """Records campaigns in MLflow; implements `registry.ports.Tracker`.

    Args:
        uri: of the tracking store: a server, or a database.
        work: folder that takes the artifacts where ``uri`` is a database.
    """

    def __init__(self, uri: str, work: Path) -> None:
        self._uri = uri
        self._work = work
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def check(self) -> None:
        """Returns when the tracking store answers; the embedded store is made where it is missing.

        Raises:
            InputError: the URI's port is no number that a port may be.
            UnreachableError: it does not answer within seconds, or refuses.
        """
        with self._named_failures(), _impatient():
            if self._embedded:
                self._work.mkdir(parents=True, exist_ok=True)
                if self._uri == embedded_uri(self._work):
                    _make_database(Path(self._uri.removeprefix("sqlite:///")))
            elif not self._served:
                _knock(self._uri)
            self._client.search_experiments(max_results=1)

    def publish(self, campaign: Campaign, *, files: Mapping[str, Path]) -> Published:
        """Records the whole campaign; see `registry.ports.Tracker.publish`.

        A campaign of the same id and content that was recorded before is left as it is; one of the same id and other
        content takes the place of the earlier. What failures logged is no part of the content. A candidate that the
        same campaign selects again stays one version of the registered model. A variant whose folder is not in
        ``campaign.artifacts`` gets no logged model.

        Raises:
            InputError: the model's name is not one that a registered model may have, or a rendered file's path leads
                out of its folder.
            UnreachableError: the tracking store does not answer or refuses.
        """
        if not _MODEL_NAME.fullmatch(campaign.model_name):
            raise InputError(
                f"{campaign.model_name!r} cannot name a registered model",
                hint="Use letters, digits, blanks, '_', '-' and '.'.",
            )
        for name, path in files.items():
            if not path.is_file():
                raise InputError(f"the file {str(path)!r}, to be kept as {name!r}, does not exist")
        self.check()
        with self._named_failures():
            content = _content(campaign)
            experiment_id = self._experiment(f"burnish/{campaign.model_name}")
            earlier = self._runs(experiment_id, campaign.id)
            if not _complete(earlier, content):
                for run in earlier:
                    self._client.delete_run(run.info.run_id)
                self._record(campaign, experiment_id, content, files)
                earlier = self._runs(experiment_id, campaign.id)
            return self._published(campaign, experiment_id, earlier, content)

    def artifact_location(self, uri: str) -> str:
        """Where MLflow keeps an artifact; see `registry.tracking.artifact_location`.

        Raises:
            InputError: the URI names no run or model, or one that is not there.
            UnreachableError: the tracking store does not answer.
        """
        scheme, _, rest = uri.partition(":")
        first, _, path = rest.strip("/").partition("/")
        if scheme not in {"runs", "models"} or not first:
            raise InputError(
                f"{uri!r} is no artifact of MLflow's", hint="It is runs:/<run id>/<path> or models:/<name>/<version>."
            )
        self.check()
        with self._named_failures():
            try:
                location = self._run_location(first, path) if scheme == "runs" else self._model_location(first, path)
            except MlflowException as error:
                if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                    raise
                raise InputError(f"{uri}: {error.message}", hint="Look it up in MLflow's pages.") from None
        return unquote(urlsplit(location).path) if location.startswith("file:") else location

    def _run_location(self, run_id: str, path: str) -> str:
        run = self._client.get_run(run_id)
        # What a run logged as a model since MLflow 3 is not among its files, and is found by its name.
        for output in run.outputs.model_outputs if run.outputs and path else ():
            model = self._client.get_logged_model(output.model_id)
            if path in {model.name, model.model_id}:
                return str(model.artifact_location)
        return "/".join(part for part in (str(run.info.artifact_uri).rstrip("/"), path) if part)

    def _model_location(self, name: str, version: str) -> str:
        name, at, alias = name.partition("@")
        if at:
            version = str(self._client.get_model_version_by_alias(name, alias).version)
        if not version:
            return str(self._client.get_logged_model(name).artifact_location)
        source = str(self._client.get_model_version_download_uri(name, version))
        return self.artifact_location(source) if source.startswith(("runs:", "models:")) else source

    @property
    def _embedded(self) -> bool:
        return self._uri.startswith("sqlite:")

    @property
    def _served(self) -> bool:
        """Whether a tracking server stands between us and the database, and keeps the artifacts."""
        return urlsplit(self._uri).scheme in {"http", "https", "databricks", ""}

    @cached_property
    def _client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Turns what MLflow and its libraries raise into an `UnreachableError`: it names the store, not its secrets."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:  # what requests raises is an OSError
            first_line = without_secrets(str(error), self._uri).strip().partition("\n")[0]
            raise UnreachableError(
                f"the tracking store {redact(self._uri)} cannot be used: {first_line}",
                hint="Start it or correct MLFLOW_TRACKING_URI, then record the campaign again; nothing measured is "
                "lost. Without MLFLOW_TRACKING_URI a store in the working folder is used.",
            ) from None  # the cause holds the URI with its password

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # A server knows where artifacts go; without one MLflow would put them under the current folder.
            place = None if self._served else (self._work.resolve() / "mlartifacts").as_uri()
            return str(self._client.create_experiment(name, artifact_location=place))
        if found.lifecycle_stage != "active":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _runs(self, experiment_id: str, campaign_id: str) -> list[Run]:
        """All runs of a campaign, its own and those of its candidates."""
        query = f"tags.`burnish.campaign_id` = '{campaign_id}'"
        return list(_pages(lambda token: self._client.search_runs([experiment_id], query, page_token=token)))

    def _record(self, campaign: Campaign, experiment_id: str, content: str, files: Mapping[str, Path]) -> None:
        parent_id = self._start(
            campaign,
            experiment_id,
            campaign.name,
            {**tracked.campaign_tags(campaign), "burnish.content": content, **_shown_tags(campaign)},
        )
        self._log(parent_id, params=tracked.campaign_parameters(campaign))
        self._client.log_inputs(parent_id, datasets=[_samples(campaign)])
        with _folder() as folder:
            _write_campaign(campaign, files, folder)
            self._client.log_artifacts(parent_id, str(folder))
        models = self._log_models(campaign, experiment_id, parent_id)
        for candidate in campaign.candidates:
            self._record_candidate(campaign, candidate, experiment_id, parent_id, models.get(_model_key(candidate)))
        self._client.set_terminated(parent_id)

    def _record_candidate(
        self, campaign: Campaign, candidate: Candidate, experiment_id: str, parent_id: str, model_id: str | None
    ) -> None:
        linked = {} if model_id is None else {"burnish.logged_model": model_id}
        run_id = self._start(
            campaign,
            experiment_id,
            candidate.name,
            {**tracked.tags(campaign, candidate), "mlflow.parentRunId": parent_id, **linked},
        )
        points = [(name, 0, value) for name, value in tracked.metrics(campaign, candidate).items()]
        self._log(
            run_id,
            params=tracked.parameters(campaign, candidate),
            points=[*points, *tracked.curves(campaign, candidate)],
            at_ms=_started_ms(campaign),
        )
        if model_id is not None:
            self._client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
        rendered = campaign.rendered.get(candidate.id, {})
        if rendered:
            with _folder() as folder:
                _write_texts({f"rendered/{path}": text for path, text in rendered.items()}, folder)
                self._client.log_artifacts(run_id, str(folder))
        self._client.set_terminated(run_id)

    def _start(self, campaign: Campaign, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
        given = {"mlflow.source.name": "burnish", "mlflow.source.type": "LOCAL", **tags}
        run = self._client.create_run(experiment_id, start_time=_started_ms(campaign), tags=given, run_name=name)
        return str(run.info.run_id)

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, str],
        points: Sequence[tuple[str, int, float]] = (),
        at_ms: int = 0,
    ) -> None:
        """Parameters and metrics in as few calls as MLflow's limits allow."""
        metrics = [Metric(key=name, value=value, timestamp=at_ms, step=step) for name, step, value in points]
        given = [Param(name, value) for name, value in params.items()]
        room = MOST_METRICS - len(given)
        self._client.log_batch(run_id, params=given, metrics=metrics[:room])
        for start in range(room, len(metrics), MOST_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + MOST_METRICS])

    def _log_models(self, campaign: Campaign, experiment_id: str, parent_id: str) -> dict[tuple[str, str], str]:
        """One logged model for each variant and precision that was served, made or found: their key -> model id."""
        variants = {variant.id: variant for variant in campaign.variants}
        models: dict[tuple[str, str], str] = {}
        for key, candidate in {_model_key(candidate): candidate for candidate in campaign.candidates}.items():
            variant, place = variants.get(candidate.variant_id), campaign.artifacts.get(candidate.variant_id)
            if variant is None or place is None or not Path(place).is_dir():
                name = candidate.variant_name
                logger.warning("The files of %s are not on this machine, so no model is logged.", name)
                continue
            models[key] = self._logged(experiment_id, variant, candidate.engine.precision) or self._log_model(
                campaign, variant, candidate, experiment_id=experiment_id, parent_id=parent_id
            )
        if models:
            outputs = [LoggedModelOutput(model_id, step=0) for model_id in models.values()]
            self._client.log_outputs(parent_id, outputs)
        return models

    def _logged(self, experiment_id: str, variant: Variant, precision: str) -> str | None:
        """The variant's model where an earlier try or campaign logged it; half-logged ones are removed."""
        query = f"tags.`burnish.variant_id` = '{variant.id}'"
        ready: str | None = None
        for model in _pages(lambda token: self._client.search_logged_models([experiment_id], query, page_token=token)):
            known = (model.tags.get("burnish.artifact_digest"), model.tags.get("burnish.precision"))
            if known != (variant.artifact.digest, precision):
                continue
            if str(model.status) == "READY":
                ready = str(model.model_id)
            else:
                self._client.delete_logged_model(model.model_id)
        return ready

    def _log_model(
        self, campaign: Campaign, variant: Variant, candidate: Candidate, *, experiment_id: str, parent_id: str
    ) -> str:
        precision = candidate.engine.precision
        stages = " | ".join(tracked.stage_words(stage) for stage in variant.recipe.stages)
        made = self._client.create_logged_model(
            experiment_id,
            name=_NOT_IN_A_LOGGED_NAME.sub("-", candidate.variant_name),
            source_run_id=parent_id,
            tags={
                "burnish.variant_id": variant.id,
                "burnish.artifact_digest": variant.artifact.digest,
                "burnish.precision": precision,
            },
            params={
                "recipe": stages or "none",
                "format": variant.artifact.format,
                "precision": precision,
                "size_bytes": str(variant.artifact.size_bytes),
                "source_digest": variant.source_digest,
                "seed": str(variant.seed),
            },
        )
        with _folder() as folder:
            described = Model(
                artifact_path=made.artifact_location, model_uuid=made.model_id, model_id=made.model_id, run_id=parent_id
            )
            _save_model(campaign, variant, described, folder / "model", precision=precision)
            self._client.log_model_artifacts(made.model_id, str(folder / "model"))
        self._client.finalize_logged_model(made.model_id, "READY")
        return str(made.model_id)

    def _published(self, campaign: Campaign, experiment_id: str, runs: Iterable[Run], content: str) -> Published:
        ids: dict[str, str] = {}
        winner: Run | None = None
        for run in runs:
            candidate_id = run.data.tags.get("burnish.candidate_id")
            ids[candidate_id or campaign.id] = run.info.run_id
            if candidate_id is not None and candidate_id == campaign.verdict.selected:
                winner = run
        return Published(
            location=self._location(experiment_id, ids[campaign.id]),
            runs=ids,
            model_version=None if winner is None else self._register(campaign, winner, content),
        )

    def _location(self, experiment_id: str, run_id: str) -> str:
        shown = redact(self._uri)
        if urlsplit(self._uri).scheme in {"http", "https"}:
            return f"{shown.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
        return shown

    def _register(self, campaign: Campaign, winner: Run, content: str) -> str | None:
        """The version of the registered model that the winner is, made where it is not there; no alias is set.

        A version is of a campaign, a candidate and the candidate's files. What else is said of it follows the last
        verdict; its ``burnish.run_id`` too, as MLflow keeps the run that a version was made with.
        """
        name, model_id = campaign.model_name, winner.data.tags.get("burnish.logged_model")
        if model_id is None:
            return None
        source = f"models:/{model_id}"
        same = {"burnish.campaign_id": campaign.id, "burnish.candidate_id": str(campaign.verdict.selected)}
        tags = {
            **same,
            "burnish.content": content,
            "burnish.run_id": winner.info.run_id,
            "burnish.provisional": "true" if campaign.verdict.provisional else "false",
        }
        self._registered_model(name)
        query = f"name = '{name}'"
        for made in _pages(lambda token: self._client.search_model_versions(query, page_token=token)):
            if made.source == source and all(made.tags.get(key) == value for key, value in same.items()):
                self._bring_up_to_date(made, tags, campaign.verdict.sentence)
                return str(made.version)
        with _default_store(self._uri, needed=not self._served):
            created = self._client.create_model_version(
                name,
                source=source,
                run_id=winner.info.run_id,
                tags=tags,
                description=campaign.verdict.sentence,
                model_id=model_id,
            )
        return str(created.version)

    def _bring_up_to_date(self, made: ModelVersion, tags: Mapping[str, str], description: str) -> None:
        for key, value in tags.items():
            if made.tags.get(key) != value:
                self._client.set_model_version_tag(made.name, made.version, key, value)
        if made.description != description:
            self._client.update_model_version(made.name, made.version, description)

    def _registered_model(self, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _complete(runs: Sequence[Run], content: str) -> bool:
    parents = [run for run in runs if run.data.tags.get("burnish.kind") == "campaign"]
    return (
        len(parents) == 1
        and parents[0].info.status == "FINISHED"
        and parents[0].data.tags.get("burnish.content") == content
    )


def _content(campaign: Campaign) -> str:
    """SHA-256 (hex) of what the campaign found.

    What failures logged is left out: a failure that is tried again logs other times and process ids.
    """
    failures = tuple(replace(failure, detail="") for failure in campaign.failures)
    return hashlib.sha256(codec.dumps(replace(campaign, failures=failures)).encode()).hexdigest()


def _started_ms(campaign: Campaign) -> int:
    return int(datetime.fromisoformat(campaign.started_at).timestamp() * 1000)


def _samples(campaign: Campaign) -> DatasetInput:
    """The evaluation samples as MLflow knows a dataset; the samples themselves stay where they are."""
    name = campaign.samples_name or "evaluation samples"
    rows = max((one.samples for one in campaign.fidelities), default=None)
    dataset = Dataset(
        name=name,
        digest=campaign.samples_digest[:_DATASET_DIGEST_CHARS],
        source_type="local",
        source=json.dumps({"uri": name}),
        profile=None if rows is None else json.dumps({"num_rows": rows}),
    )
    return DatasetInput(dataset, tags=[InputTag(MLFLOW_DATASET_CONTEXT, "evaluation")])


def _shown_tags(campaign: Campaign) -> dict[str, str]:
    """What MLflow's own pages show of the campaign: a description, and the failures as a table."""
    description = render_markdown(campaign)
    return {
        "mlflow.note.content": description if len(description) <= tracked.MOST_TAG_CHARS else campaign.verdict.sentence,
        "mlflow.loggedArtifacts": json.dumps([{"path": "failures.json", "type": "table"}]),
    }


# --- files -----------------------------------------------------------------------------------------------------


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="burnish-") as name:
        yield Path(name)


def _write_campaign(campaign: Campaign, files: Mapping[str, Path], folder: Path) -> None:
    texts = {
        "campaign.json": codec.dumps(campaign) + "\n",
        "host.json": codec.canonical({"host": codec.to_jsonable(campaign.host), "versions": dict(campaign.versions)}),
        "failures.json": json.dumps(tracked.failures_table(campaign)),
    }
    _write_texts(texts, folder)
    for name, path in files.items():
        shutil.copyfile(path, _inside(folder, name))


def _write_texts(texts: Mapping[str, str], folder: Path) -> None:
    for name, text in texts.items():
        _inside(folder, name).write_text(text, encoding="utf-8")


def _inside(folder: Path, name: str) -> Path:
    """The path of a file in the folder, its parents made.

    Raises:
        InputError: the name leads out of the folder.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise InputError(f"the file {name!r} would be written outside its folder")
    path = folder / parts
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# --- models ----------------------------------------------------------------------------------------------------


def _model_key(candidate: Candidate) -> tuple[str, str]:
    """What two candidates of one logged model have in common: the variant's id, and the precision it computes in."""
    return candidate.variant_id, candidate.engine.precision


def _save_model(campaign: Campaign, variant: Variant, described: Model, path: Path, *, precision: str) -> None:
    """Writes the variant as an MLflow model: its own bytes, signature, input example and requirements."""
    place = Path(campaign.artifacts[variant.id])
    given: dict[str, Any] = {
        "mlflow_model": described,
        "signature": _signature(variant),
        "input_example": _example(variant.artifact.inputs),
        "pip_requirements": _requirements(campaign, variant.artifact.format),
    }
    if variant.artifact.format == "onnx":
        _save_onnx(variant, place, path, gpu=bool(campaign.host.gpus), given=given)
    else:
        code = Path(__file__).with_name("openvino_pyfunc.py")
        mlflow.pyfunc.save_model(
            path,
            loader_module="openvino_pyfunc",
            data_path=str(place),
            code_paths=[str(code)],
            model_config={"precision": precision},
            **given,
        )


def _save_onnx(variant: Variant, place: Path, path: Path, *, gpu: bool, given: Mapping[str, Any]) -> None:
    import onnx

    entry = variant.artifact.entry
    # The weights of external files need not be read: the files themselves are put in place below.
    proto = onnx.load(place / entry, load_external_data=False)
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if gpu else ["CPUExecutionProvider"]
    mlflow.onnx.save_model(proto, path, onnx_execution_providers=providers, save_as_external_data=False, **given)
    # MLflow wrote the graph anew; what was measured is these bytes. It loads the entry as model.onnx.
    for file in variant.artifact.files:
        target = _inside(path, "model.onnx" if file.path == entry else file.path)
        shutil.copyfile(_inside(place, file.path), target)


def _signature(variant: Variant) -> ModelSignature | None:
    inputs, outputs = _schema(variant.artifact.inputs), _schema(variant.artifact.outputs)
    return None if inputs is None or outputs is None else ModelSignature(inputs=inputs, outputs=outputs)


def _schema(specs: Sequence[TensorSpec]) -> Schema | None:
    """The tensors' schema, -1 for each size that is free; None where numpy lacks a type (bfloat16)."""
    try:
        return Schema(
            [
                MlflowTensorSpec(
                    np.dtype(spec.dtype), tuple(size if isinstance(size, int) else -1 for size in spec.shape), spec.name
                )
                for spec in specs
            ]
        )
    except TypeError:
        return None


def _example(specs: Sequence[TensorSpec]) -> dict[str, Any] | None:
    """Zeros for each input, 1 for each size that is free; None where it would be large, or numpy lacks a type."""
    shapes = [tuple(size if isinstance(size, int) else 1 for size in spec.shape) for spec in specs]
    if sum(int(np.prod(shape)) for shape in shapes) > LARGEST_EXAMPLE or _schema(specs) is None:
        return None
    return {spec.name: np.zeros(shape, np.dtype(spec.dtype)) for spec, shape in zip(specs, shapes, strict=True)}


def _requirements(campaign: Campaign, format: str) -> list[str]:
    """Exact versions of what loads the model; given, so that MLflow does not run a child process to find them."""
    found = []
    for package in _PACKAGES[format]:
        try:
            known = campaign.versions.get(package) or version(package)
        except PackageNotFoundError:
            continue
        found.append(f"{package}=={known.partition('+')[0]}")
    return found


# --- MLflow's ways ---------------------------------------------------------------------------------------------


def _pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """All items of a search that answers in pages."""
    token: str | None = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def _impatient() -> Iterator[None]:
    """MLflow's requests give up within seconds, not minutes; its settings are as before afterwards."""
    hurried = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(CHECK_TIMEOUT_S),
    }
    with _environment(hurried):
        yield


@contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _default_store(uri: str, *, needed: bool) -> Iterator[None]:
    """MLflow's default store is ``uri``, and what it was before afterwards.

    Without a server, MLflow looks a ``models:/`` source up in its default store, whatever the client's own is.
    """
    if not needed:
        yield
        return
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _make_database(path: Path) -> None:
    """Makes the embedded store whole or not at all: MLflow takes seconds to lay out its tables, and reads no half."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
    partial.replace(path)


def _knock(uri: str) -> None:
    """Connects to the database's port once, because MLflow would try for minutes.

    Raises:
        InputError: the port is no number that a port may be.
        OSError: nothing listens there.
    """
    parts = urlsplit(uri)
    try:
        port = parts.port or _DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    except ValueError:
        # The URI is not shown: what stands in the port's place may be half of a password.
        raise InputError(
            f"the port in the {parts.scheme} URI of the tracking store is no number",
            hint="In a password, '/', ':' and '@' are written %2F, %3A and %40.",
        ) from None
    if parts.hostname and port:
        socket.create_connection((parts.hostname, port), timeout=CHECK_TIMEOUT_S).close()
