"""A pipeline's analysis in MLflow's embedded store."""

import math
from pathlib import Path

import pytest
from mlflow import MlflowClient

from registry.errors import InputError
from registry.mlflow_pipelines import record_pipeline
from registry.report.pipeline import PipelineView, StepView

# MLflow and its libraries warn of themselves.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def view() -> PipelineView:
    known = {"variant": "float", "limit_rps": 80.0, "utilisation": 0.5, "sojourn_ms": 9.0, "decides": 1.0}
    return PipelineView(
        name="p",
        steps=(
            StepView(name="a", layer=0, slack_ms=0.0, **known),
            StepView(name="b", layer=1, slack_ms=math.inf, **known),
        ),
        edges=(("a", "b"),),
        throughput_path=("a", "b"),
        latency_path=("a", "b"),
        bottleneck="a",
        saturation_rps=80.0,
        rate_rps=40.0,
        latency_ms={"p50": 18.0, "p99": 40.0},
    )


def test_an_analysis_is_a_run_with_its_numbers_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    picture = tmp_path / "p.svg"
    picture.write_text("<svg/>")
    ids = [record_pipeline(view(), files={"pictures": picture}, work=tmp_path / "work") for _ in range(2)]
    uri = f"sqlite:///{next((tmp_path / 'work').glob('*.db'))}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    first, second = (client.get_run(one) for one in ids)
    assert first.info.experiment_id == second.info.experiment_id
    assert first.data.metrics["p99_ms"] == 40.0
    assert first.data.metrics["slack_ms.a"] == 0.0
    assert "slack_ms.b" not in first.data.metrics
    assert first.data.params["latency_path"] == "a b"
    assert first.info.status == "FINISHED"
    assert [one.path for one in client.list_artifacts(ids[0], "pictures")] == ["pictures/p.svg"]
    # What somebody deleted is taken back, as it is for campaigns.
    client.delete_experiment(first.info.experiment_id)
    third = client.get_run(record_pipeline(view(), files={}, work=tmp_path / "work"))
    assert third.info.experiment_id == first.info.experiment_id
    with pytest.raises(InputError, match="does not exist"):
        record_pipeline(view(), files={"x": tmp_path / "none"}, work=tmp_path / "work")
