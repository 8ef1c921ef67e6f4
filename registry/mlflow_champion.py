"""A registered version of MLflow's as the campaign that registered it knows it: its record, and the model's files."""

from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from registry.errors import InputError
from registry.mlflow_store import ABSENT, default_store, named_failures, patient
from registry.mlflow_tracking import MlflowTracker

_RECORD = "campaign.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A version that a campaign registered.

    Attributes:
        version: its number.
        campaign: the text of the campaign's record.
        candidate_id: which of its candidates the version is.
    """

    version: str
    campaign: str
    candidate_id: str


def find_registered(
    uri: str, work: Path, folder: Path, *, name: str, alias: str | None, version: str | None
) -> Registered | None:
    """The campaign and candidate behind a registered version.

    Args:
        uri: of the tracking store.
        work: the working folder.
        folder: takes what is fetched.
        name: of the registered model.
        alias: of the version, or None.
        version: its number, where no alias is given.

    Returns:
        None where there is no such model yet, or nothing has the alias.

    Raises:
        InputError: the version is not one that burnish registered, or there is none of this number.
        UnreachableError: the store does not answer.
    """
    MlflowTracker(uri, work).check()
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    with named_failures(uri), patient():
        found = _version(client, name, alias, version)
        if found is None:
            return None
        tags = dict(found.tags)
        run_id, candidate_id = tags.get("burnish.run_id"), tags.get("burnish.candidate_id")
        if not run_id or not candidate_id:
            raise InputError(
                f"version {found.version} of {name} was not registered by burnish, and nothing tells how it is served",
                hint="Name the working folder of the campaign that chose it.",
            )
        parent = client.get_run(run_id).data.tags.get("mlflow.parentRunId", run_id)
        with default_store(uri, needed=True):
            record = mlflow.artifacts.download_artifacts(
                run_id=parent, artifact_path=_RECORD, dst_path=str(folder), tracking_uri=uri
            )
        text = Path(record).read_text(encoding="utf-8")
    return Registered(version=str(found.version), campaign=text, candidate_id=candidate_id)


def fetch_model(uri: str, folder: Path, *, name: str, version: str) -> Path:
    """Downloads the model of a version, and returns the folder that it is in.

    Raises:
        UnreachableError: the store does not answer, or does not have it.
    """
    with named_failures(uri), patient(), default_store(uri, needed=True):
        place = mlflow.artifacts.download_artifacts(
            artifact_uri=f"models:/{name}/{version}", dst_path=str(folder), tracking_uri=uri
        )
    return Path(place)


def _version(client: MlflowClient, name: str, alias: str | None, version: str | None) -> ModelVersion | None:
    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        if alias is not None:
            return None
        raise InputError(f"{name} has no version {version}", hint="Look it up in MLflow's pages.") from None
