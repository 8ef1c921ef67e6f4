"""Where campaigns are recorded, and as what: no MLflow in here."""

import re
from pathlib import Path

import pytest

from registry import tracked
from registry.records import StageCall
from registry.tracking import embedded_uri, redact, without_secrets
from tests.doubles import campaigns


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://ann:s3cret@host:5000/path", "http://***@host:5000/path"),
        ("https://token@host", "https://***@host"),
        ("postgresql://ann:p%40ss@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("postgresql://db/mlflow?user=ann&password=s3cret&x=1", "postgresql://db/mlflow?user=ann&password=***&x=1"),
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


def test_the_embedded_store_is_in_the_working_folder(tmp_path: Path) -> None:
    assert embedded_uri(tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"


def test_names_hold_only_what_a_tracker_takes() -> None:
    made = campaigns.campaign()
    for candidate in made.candidates:
        names = [*tracked.metrics(made, candidate), *(name for name, _, _ in tracked.curves(made, candidate))]
        assert len(names) > 20
        assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", name) for name in names)
    assert tracked.name_of("latency_p90_ms", "0.8 saturation") == "latency_p90_ms.at_0.8_saturation"
    assert tracked.name_of("latency_p99_ms", "100 rps") == "latency_p99_ms.at_100_rps"


def test_an_estimate_is_three_metrics() -> None:
    found = tracked.metrics(campaigns.campaign(), campaigns.STATIC_TRITON)
    assert found["latency_p90_ms.at_0.8_saturation_low"] < found["latency_p90_ms.at_0.8_saturation"]
    assert found["latency_p90_ms.at_0.8_saturation_high"] > found["latency_p90_ms.at_0.8_saturation"]
    assert found["ratio.max_throughput_rps"] == pytest.approx(2.7167, abs=1e-3)
    assert "latency_p90_ms.at_0.8_saturation" not in tracked.metrics(campaigns.campaign(), campaigns.OPENVINO_TRITON)


def test_a_curve_has_a_step_for_each_rate() -> None:
    points = tracked.curves(campaigns.campaign(), campaigns.BASELINE)
    assert len({(name, step) for name, step, _ in points}) == len(points)
    assert {name for name, _, _ in points} == {
        "curve.achieved_rps", "curve.closed_rps", "curve.latency_p50_ms", "curve.latency_p90_ms",
    }  # fmt: skip


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
