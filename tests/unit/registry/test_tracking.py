"""Where campaigns are recorded, and as what: no MLflow in here."""

import dataclasses
from pathlib import Path

import pytest

from registry import tracked
from registry.records import StageCall
from registry.tracking import embedded_uri, holds_secret, redact, without_secrets
from tests.doubles import campaigns


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://ann:s3cret@host:5000/path", "http://***@host:5000/path"),
        ("https://token@host", "https://***@host"),
        ("postgresql://ann:p%40ss@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("postgresql://db/mlflow?user=ann&password=s3cret&x=1", "postgresql://db/mlflow?user=ann&password=***&x=1"),
        ("postgresql://ann:1/s3cret@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("postgresql://ann:s3?cr#et@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("sqlite:////tmp/a b/mlflow.db", "sqlite:////tmp/a b/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
        ("http://[::1", "***"),
    ],
)
def test_a_uri_is_shown_without_its_secrets(uri: str, shown: str) -> None:
    assert redact(uri) == shown


def test_a_message_is_shown_without_the_secrets_of_the_uri() -> None:
    uri = "postgresql://ann:s3cret@db:5432/mlflow"
    message = without_secrets(f"could not connect to {uri} as ann with s3cret", uri)
    assert "s3cret" not in message
    assert "ann" not in message
    assert "db:5432" in message


def test_a_password_that_urls_would_not_have_but_databases_take_is_hidden() -> None:
    """SQLAlchemy ends it at the '@' alone."""
    uri = "postgresql://ann:1/s3cret@db:5432/mlflow"
    assert "s3cret" not in without_secrets("no password 1/s3cret for ann", uri)
    assert holds_secret(uri)


def test_the_embedded_store_is_in_the_working_folder(tmp_path: Path) -> None:
    assert embedded_uri(tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"


@pytest.mark.parametrize(
    ("name", "value"),
    [("MLFLOW_TRACKING_TOKEN", "tok-123"), ("PGPASSWORD", "pg-123"), ("AWS_SECRET_ACCESS_KEY", "aws-123")],
)
def test_a_message_is_shown_without_the_secrets_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert without_secrets(f"the proxy saw {value}", "http://host:5000") == "the proxy saw ***"


def test_a_password_is_hidden_as_it_is_meant_too() -> None:
    assert without_secrets("bad password: p@ss", "postgresql://ann:p%40ss@db/mlflow") == "bad password: ***"


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        ("http://ann:s3cret@host", True),
        ("https://token@host", True),
        ("postgresql://ann@db/mlflow", False),
        ("postgresql://db/mlflow?user=ann&password=s3cret", True),
        ("http://host:5000", False),
        ("sqlite:////tmp/mlflow.db", False),
        ("http://[::1", False),
    ],
)
def test_a_uri_with_a_secret_is_known(uri: str, secret: bool) -> None:
    assert holds_secret(uri) == secret


def test_parameters_are_flat_texts() -> None:
    made = campaigns.campaign()
    params = tracked.parameters(made, campaigns.STATIC_TRITON)
    assert params["recipe"] == "simplify | quantize(per_channel=true, scheme=static)"
    assert params["max_batch_delay_ms"] == "2"
    assert all(isinstance(value, str) for value in (params | tracked.campaign_parameters(made)).values())
    assert len(tracked.campaign_parameters(made)) <= 100


def test_a_stage_is_one_line() -> None:
    assert tracked.stage_words(StageCall(name="simplify")) == "simplify"
    excepting = StageCall(name="quantize", params={"float_nodes": ("head", "Conv_1"), "per_channel": True})
    assert tracked.stage_words(excepting) == "quantize(float_nodes=[head, Conv_1], per_channel=true)"


def test_failures_are_counted_by_kind_and_kept_whole() -> None:
    made = campaigns.campaign()
    tags = tracked.campaign_tags(made)
    assert (tags["burnish.failures"], tags["burnish.failures.screened_out"]) == ("4", "2")
    table = tracked.failures_table(made)
    assert len(table["data"]) == 4
    assert table["columns"][0] == "subject"


def test_what_a_tracker_would_refuse_as_too_long_is_cut() -> None:
    made = campaigns.campaign()
    nodes = tuple(f"/encoder/layer.{number}/attention/MatMul" for number in range(400))
    recipe = dataclasses.replace(
        campaigns.STATIC.recipe, stages=(StageCall(name="quantize", params={"float_nodes": nodes}),)
    )
    long = dataclasses.replace(campaigns.STATIC, recipe=recipe)
    params = tracked.parameters(dataclasses.replace(made, variants=(long,)), campaigns.STATIC_TRITON)
    assert len(params["recipe"]) == tracked.MOST_PARAM_CHARS
    assert params["recipe"].endswith(" ...")
    assert tracked.model_parameters(long, "default")["recipe"] == params["recipe"]
    assert tracked.shortened("short", 100) == "short"
