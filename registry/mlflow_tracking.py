"""The MLflow adapter of the Tracker port.

A campaign is a parent run in the experiment ``burnish/<model>``, a candidate a child run, a search for a serving
profile another, a variant a logged model, and the selected candidate's a version of the registered model ``<model>``.
The parent run is finished last, so a run that is not finished is what is left of an interrupted try, and is replaced.
"""

# First, as it sets how MLflow is imported.
from registry.mlflow_store import (
    AT_ONCE,
    default_store,
    each,
    impatient,
    is_server,
    knock,
    make_database,
    named_failures,
    pages,
    patient,
    quieten,
)  # isort: split

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from registry import codec
from registry.errors import InputError, UnreachableError
from registry.mlflow_models import drop_half_logged
from registry.mlflow_runs import Recorded, record, recorded
from registry.mlflow_sending import one_at_a_time, sender_of, sender_tags
from registry.ports import Published
from registry.records import Campaign
from registry.tracking import embedded_uri, redact

# Raised when runs come to hold something else, so that a campaign that is sent again is recorded again.
LAYOUT = 2
# By it MLflow opens an experiment on the pages for models, not on those for agents.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_MODEL_NAME = re.compile(r"[\w .-]+")


class MlflowTracker:
    """Records campaigns in MLflow; implements `registry.ports.Tracker`.

    Args:
        uri: of the tracking store: a server, or a database.
        work: folder that takes the artifacts where ``uri`` is a database.
    """

    def __init__(self, uri: str, work: Path) -> None:
        self._uri = uri
        self._work = work
        quieten()

    def check(self) -> None:
        """Returns when the tracking store answers; the embedded store is made where it is missing.

        Raises:
            InputError: the URI's port is no number that a port may be.
            UnreachableError: it does not answer within seconds, or refuses.
        """
        with named_failures(self._uri), impatient():
            if self._embedded:
                self._work.mkdir(parents=True, exist_ok=True)
                if self._uri == embedded_uri(self._work):
                    make_database(Path(self._uri.removeprefix("sqlite:///")))
            elif not is_server(self._uri):
                knock(self._uri)
            self._client.search_experiments(max_results=1)

    def publish(self, campaign: Campaign, *, files: Mapping[str, Path]) -> Published:
        """Records the whole campaign; see `registry.ports.Tracker.publish`.

        A campaign of the same id and content that was recorded before is left as it is; one of the same id and other
        content takes the place of the earlier, and what is left of interrupted tries goes. What failures logged is no
        part of the content. A candidate that the same campaign selects again stays one version of the registered model.
        A variant whose folder is not in ``campaign.artifacts`` gets no logged model.

        Raises:
            InputError: the model's name is not one that a registered model may have, or a rendered file's path leads
                out of its folder.
            UnreachableError: the tracking store does not answer, refuses or is full; the same call later completes it.
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
        with one_at_a_time(self._work), named_failures(self._uri), patient():
            content, sender = _content(campaign), sender_tags(self._work)
            experiment_id = self.experiment(f"burnish/{campaign.model_name}")
            found, others = self._recorded(campaign, experiment_id, content)
            if found is None:
                record(
                    self._client,
                    campaign,
                    experiment_id=experiment_id,
                    content=content,
                    files=files,
                    at_once=self._at_once,
                    sender=sender,
                )
                # Looked up, as a request that was sent again, since its answer was lost, begins a run twice, and as
                # another folder may have sent the same meanwhile.
                found, others = self._recorded(campaign, experiment_id, content)
            if found is None:
                raise UnreachableError(
                    f"what was written of {campaign.name} into {redact(self._uri)} was taken away meanwhile",
                    hint="Somebody else sends this campaign, or clears runs away.",
                )
            # Only now: until all is written, the earlier is better than nothing.
            each(self._client.delete_run, others, at_once=self._at_once)
            drop_half_logged(self._client, experiment_id, others)
            return Published(
                location=self._location(experiment_id, found.parent),
                runs={campaign.id: found.parent, **found.candidates},
                model_version=self._register(campaign, found, content),
            )

    def experiment(self, name: str) -> str:
        """The id of an experiment, made where there is none; one that somebody deleted is taken back.

        Raises:
            MlflowException: the store does not answer, or refuses; see `registry.mlflow_store.named_failures`.
        """
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # A server knows where artifacts go; without one MLflow would put them under the current folder.
            place = None if is_server(self._uri) else (self._work.resolve() / "mlartifacts").as_uri()
            try:
                return str(self._client.create_experiment(name, artifact_location=place, tags=_KIND))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)  # another campaign of the model came first
        if found.lifecycle_stage != "active":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

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
        with named_failures(self._uri):
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
    def _at_once(self) -> int:
        """How many calls are under way at a time: SQLite takes one writer."""
        return 1 if self._embedded else AT_ONCE

    @cached_property
    def _client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def _recorded(self, campaign: Campaign, experiment_id: str, content: str) -> tuple[Recorded | None, list[str]]:
        """Of all runs of a campaign, its own and those of its candidates; see `registry.mlflow_runs.recorded`."""
        query = f"tags.`burnish.campaign_id` = '{campaign.id}'"
        runs: list[Run] = list(pages(lambda token: self._client.search_runs([experiment_id], query, page_token=token)))
        return recorded(campaign, runs, content, sender=sender_of(self._work))

    def _location(self, experiment_id: str, run_id: str) -> str:
        shown = redact(self._uri)
        if urlsplit(self._uri).scheme in {"http", "https"}:
            return f"{shown.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
        return shown

    def _register(self, campaign: Campaign, found: Recorded, content: str) -> str | None:
        """The version of the registered model that the winner is, made where it is not there; no alias is set.

        A version is of a campaign, a candidate and the candidate's files. What else is said of it follows the last
        verdict; its ``burnish.run_id`` too, as MLflow keeps the run that a version was made with.
        """
        name, selected = campaign.model_name, campaign.verdict.selected
        model_id = None if selected is None else found.models.get(selected)
        if selected is None or model_id is None:
            return None
        source = f"models:/{model_id}"
        same = {"burnish.campaign_id": campaign.id, "burnish.candidate_id": selected}
        tags = {
            **same,
            "burnish.content": content,
            "burnish.run_id": found.candidates[selected],
            "burnish.provisional": "true" if campaign.verdict.provisional else "false",
        }
        self._registered_model(name)
        query = f"name = '{name}'"

        def there() -> list[ModelVersion]:
            """That very version, made by us or from another folder at the same time; the first one counts."""
            made = pages(lambda token: self._client.search_model_versions(query, page_token=token))
            alike = [one for one in made if one.source == source and same.items() <= dict(one.tags).items()]
            return sorted(alike, key=lambda one: int(one.version))

        if alike := there():
            self._bring_up_to_date(alike[0], tags, campaign.verdict.sentence)
            return str(alike[0].version)
        with default_store(self._uri, needed=not is_server(self._uri)):
            created = self._client.create_model_version(
                name,
                source=source,
                run_id=found.candidates[selected],
                tags=tags,
                description=campaign.verdict.sentence,
                model_id=model_id,
            )
        first = (there() or [created])[0].version
        if str(first) != str(created.version):
            self._client.delete_model_version(name, str(created.version))
        return str(first)

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


def _content(campaign: Campaign) -> str:
    """SHA-256 (hex) of what the campaign found, and of the way it is recorded.

    What failures logged is left out: a failure that is tried again logs other times and process ids.
    """
    failures = tuple(replace(failure, detail="") for failure in campaign.failures)
    return hashlib.sha256(f"{LAYOUT}\n{codec.dumps(replace(campaign, failures=failures))}".encode()).hexdigest()
