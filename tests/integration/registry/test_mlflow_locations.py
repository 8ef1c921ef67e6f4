"""Where MLflow says that an artifact is, asked of a real store that is a SQLite file."""

import pytest
from mlflow import MlflowClient

from profiles.deploy.storage_uris import resolve
from registry.errors import InputError
from registry.tracking import artifact_location, embedded_uri

pytestmark = [
    pytest.mark.slow,
    # MLflow's own libraries, not our use of them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A tracking URI, and what it has: a run in a bucket, one on disk, a logged model, and versions of a model."""
    work = tmp_path_factory.mktemp("mlflow work")
    uri = embedded_uri(work)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    ids = {"work": str(work)}
    places = {"bucket": "s3://mlflow/1", "disk": (work / "art ifacts").as_uri(), "proxy": "mlflow-artifacts:/7"}
    for name, place in places.items():
        experiment = client.create_experiment(name, artifact_location=place)
        ids[name] = client.create_run(experiment).info.run_id
        if name == "bucket":
            ids["model"] = client.create_logged_model(experiment, name="int8", source_run_id=ids[name]).model_id
    client.create_registered_model("digits")
    client.create_model_version("digits", source="s3://mlflow/1/models/x", run_id=ids["bucket"])
    client.create_model_version("digits", source=f"runs:/{ids['bucket']}/model", run_id=ids["bucket"])
    client.set_registered_model_alias("digits", "champion", "1")
    return uri, ids


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("runs:/{bucket}/model/1", "s3://mlflow/1/{bucket}/artifacts/model/1"),
        ("runs:/{bucket}", "s3://mlflow/1/{bucket}/artifacts"),
        ("runs:/{disk}/model", "{work}/art ifacts/{disk}/artifacts/model"),
        ("runs:/{proxy}/model", "mlflow-artifacts:/7/{proxy}/artifacts/model"),
        ("models:/{model}", "s3://mlflow/1/models/{model}/artifacts"),
        ("models:/digits/1", "s3://mlflow/1/models/x"),
        ("models:/digits@champion", "s3://mlflow/1/models/x"),
        ("models:/digits/2", "s3://mlflow/1/{bucket}/artifacts/model"),
    ],
)
def test_where_an_artifact_is(store: tuple[str, dict[str, str]], asked: str, expected: str) -> None:
    uri, ids = store
    assert artifact_location(asked.format(**ids), uri) == expected.format(**ids)


def test_it_is_resolved_to_what_rclone_calls_it(store: tuple[str, dict[str, str]]) -> None:
    uri, ids = store
    found = resolve("models:/digits@champion", tracking_uri=uri, remotes={"s3": "mine"})
    assert found == "mine://mlflow/1/models/x"
    with pytest.raises(InputError, match="is kept where rclone cannot read it: mlflow-artifacts:/7/"):
        resolve(f"runs:/{ids['proxy']}/model", tracking_uri=uri)


@pytest.mark.parametrize("asked", ["runs:/0123456789abcdef", "models:/digits/9", "models:/nothing@champion", "runs:/"])
def test_what_is_not_there_is_said(store: tuple[str, dict[str, str]], asked: str) -> None:
    with pytest.raises(InputError) as raised:
        artifact_location(asked, store[0])
    assert asked in raised.value.message
