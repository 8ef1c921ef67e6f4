"""Campaigns in a tracking server on PostgreSQL with its artifacts in S3, and in both without a server."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import boto3
import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from registry.errors import UnreachableError
from registry.mlflow_tracking import MlflowTracker
from registry.records import Campaign
from tests.doubles import campaigns
from tests.doubles.rclone import KEY, SECRET
from tests.doubles.tracking_servers import (
    POSTGRES_PASSWORD,
    mlflow_server,
    postgres_server,
    s3_server,
    s3_variables,
)

pytestmark = [
    pytest.mark.slow,
    # MLflow's own libraries, not our use of them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SAMPLE = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
SECRETS = (POSTGRES_PASSWORD, "p%40ss%2Fof%3Apostgres", KEY, SECRET)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URI of a PostgreSQL database, with its password."""
    with postgres_server() as uri:
        yield uri


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of an S3 store with the bucket ``mlflow``, and the folder that is the bucket."""
    folder = tmp_path_factory.mktemp("s3")
    with s3_server(folder, "mlflow") as url:
        yield url, folder / "buckets" / "mlflow"


@pytest.fixture(scope="module")
def server(database: str, bucket: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an MLflow server on both; it alone knows their credentials."""
    options = ("--backend-store-uri", database, "--artifacts-destination", "s3://mlflow/served")
    folder = tmp_path_factory.mktemp("mlflow-on-postgres")
    with mlflow_server(folder, *options, variables=s3_variables(bucket[0])) as url:
        yield url


@pytest.fixture
def with_s3(bucket: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own credentials of the S3 store."""
    for name, value in s3_variables(bucket[0]).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def few(own_name: Campaign) -> Campaign:
    """A campaign of two candidates and their variants."""
    served = (campaigns.BASELINE, campaigns.STATIC_TRITON)
    variants = tuple(one for one in own_name.variants if one.id in {each.variant_id for each in served})
    return dataclasses.replace(own_name, candidates=served, variants=variants)


def everything_told(client: MlflowClient, campaign: Campaign) -> str:
    """All that the store says of the campaign's runs."""
    experiment = client.get_experiment_by_name(f"burnish/{campaign.model_name}")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + len(campaign.candidates)
    return json.dumps([run.to_dictionary() for run in runs])


def files_under(folder: Path, **holding: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_no_secret(*texts: str) -> None:
    for secret in SECRETS:
        assert all(secret not in text for text in texts)


def test_a_server_on_postgresql_keeps_a_campaign_with_its_artifacts_in_s3(
    server: str, bucket: tuple[str, Path], few: Campaign, report: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tracker = MlflowTracker(server, tmp_path)
    published = tracker.publish(few, files={"report.html": report})
    assert tracker.publish(few, files={"report.html": report}) == published
    client = MlflowClient(tracking_uri=server, registry_uri=server)
    run = client.get_run(published.runs[campaigns.STATIC_TRITON.id])
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert run.data.metrics["max_throughput_rps_high"] == pytest.approx(1251.7)
    kept = files_under(bucket[1] / "served")
    assert report.read_bytes() in [path.read_bytes() for path in kept if path.name == "report.html"]
    assert published.model_version == "1"
    texts = [path.read_text(errors="ignore") for path in kept]
    assert_no_secret(everything_told(client, few), published.location, caplog.text, *texts)


@pytest.mark.usefixtures("with_s3")
def test_without_a_server_postgresql_and_s3_keep_a_campaign(
    database: str, server: str, bucket: tuple[str, Path], few: Campaign, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The experiment's own artifact location is taken where it was made with one."""
    caplog.set_level(logging.DEBUG, logger="registry")
    client = MlflowClient(tracking_uri=database, registry_uri=database)
    client.create_experiment(f"burnish/{few.model_name}", artifact_location="s3://mlflow/direct")
    published = MlflowTracker(database, tmp_path).publish(few, files={})
    kept = files_under(bucket[1] / "direct")
    assert {"campaign.json", "MLmodel", "weights.bin"} <= {path.name for path in kept}
    texts = [path.read_text(errors="ignore") for path in kept]
    assert_no_secret(everything_told(client, few), published.location, caplog.text, *texts)
    mlflow.set_tracking_uri(database)
    try:
        loaded = mlflow.pyfunc.load_model(f"models:/{few.model_name}/{published.model_version}")
        assert loaded.predict({"x": SAMPLE})["y"].shape == (3, 2)
    finally:
        mlflow.set_tracking_uri(None)


@pytest.mark.usefixtures("with_s3")
def test_an_s3_store_that_refuses_is_named_and_the_campaign_is_completed_later(
    server: str, bucket: tuple[str, Path], few: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=server, registry_uri=server)
    client.create_experiment(f"burnish/{few.model_name}", artifact_location="s3://mlflow/refused")
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong-hunter2")
        # boto3 keeps credentials, and MLflow its client of an endpoint; by this name it is another.
        wrong.setattr(boto3, "DEFAULT_SESSION", None)
        wrong.setenv("MLFLOW_S3_ENDPOINT_URL", bucket[0].replace("127.0.0.1", "localhost"))
        with pytest.raises(UnreachableError, match=r"refuses these credentials \(403\)") as raised:
            MlflowTracker(server, tmp_path).publish(few, files={})
    assert raised.value.exit_code == 4
    assert "hunter2" not in str(raised.value)
    published = MlflowTracker(server, tmp_path).publish(few, files={})
    assert set(published.runs) == {few.id, *(one.id for one in few.candidates)}
    everything_told(client, few)


def test_a_wrong_password_of_the_database_is_said_at_once(database: str, tmp_path: Path) -> None:
    wrong = database.replace("p%40ss", "wrong")
    with pytest.raises(UnreachableError, match=r"it does not know who asks \(401\).*password authentication") as raised:
        MlflowTracker(wrong, tmp_path).check()
    assert "wrong" not in str(raised.value)
    assert "of%3Apostgres" not in str(raised.value)
