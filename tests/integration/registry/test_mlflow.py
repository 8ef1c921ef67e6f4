"""Campaigns in a real MLflow: the embedded store and a server."""

import dataclasses
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pytest
from mlflow import MlflowClient

from registry.errors import InputError, UnreachableError
from registry.mlflow_tracking import MlflowTracker
from registry.records import Campaign, Failure, Spectrum, StageCall
from registry.tracking import embedded_uri, open_tracker
from tests.doubles import campaigns, searches
from tests.doubles.busy import LONG_S

pytestmark = [
    pytest.mark.slow,
    # MLflow's own libraries, not our use of them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SAMPLE = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def default_store(uri: str) -> Iterator[None]:
    """MLflow's loaders read from its default store."""
    mlflow.set_tracking_uri(uri)
    yield
    mlflow.set_tracking_uri(None)


def runs_of(client: MlflowClient, campaign: Campaign) -> list[mlflow.entities.Run]:
    experiment = client.get_experiment_by_name(f"burnish/{campaign.model_name}")
    return list(client.search_runs([experiment.experiment_id]))


def artifacts_of(client: MlflowClient, run_id: str, folder: str = "") -> set[str]:
    found: set[str] = set()
    for item in client.list_artifacts(run_id, folder or None):
        found |= artifacts_of(client, run_id, item.path) if item.is_dir else {item.path}
    return found


def test_a_campaign_is_a_parent_run_with_a_child_for_each_candidate(
    uri: str, own_name: Campaign, report: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    published = MlflowTracker(uri, work).publish(own_name, files={"report.html": report})
    assert capfd.readouterr().out == ""

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    runs = {run.info.run_id: run for run in runs_of(client, own_name)}
    assert set(runs) == set(published.runs.values())
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs[published.runs[own_name.id]]
    assert parent.data.tags["burnish.campaign_id"] == own_name.id
    assert parent.data.tags["burnish.failures.not_applicable"] == "1"
    assert parent.data.params["host.fingerprint"] == own_name.host.fingerprint
    files = {"campaign.json", "curves.json", "failures.json", "host.json", "report.html"}
    assert artifacts_of(client, parent.info.run_id) == files

    for candidate in own_name.candidates:
        child = runs[published.runs[candidate.id]]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params["variant"] == candidate.variant_name
        assert child.data.params["server"] == candidate.serving.server
        assert child.data.tags["burnish.kind"] == "candidate"
        rendered = {f"rendered/{path}" for path in own_name.rendered[candidate.id]}
        assert artifacts_of(client, child.info.run_id) == rendered

    winner = runs[published.runs[campaigns.STATIC_TRITON.id]]
    assert winner.data.tags["burnish.verdict"] == "selected"
    assert winner.data.tags["burnish.reason"] == own_name.verdict.sentence
    assert winner.data.metrics["max_throughput_rps"] == 1236.9
    assert winner.data.metrics["max_throughput_rps_low"] == pytest.approx(1222.1)
    assert winner.data.metrics["latency_p90_ms.at_0.8_saturation"] == pytest.approx(17.283)
    curve = client.get_metric_history(winner.info.run_id, "curve/latency_p90_ms")
    assert [point.step for point in sorted(curve, key=lambda point: point.step)] == [245, 491, 736, 981, 1104, 1202]
    unknown = runs[published.runs[campaigns.OPENVINO_TRITON.id]]
    assert unknown.data.tags["burnish.verdict"] == "unknown"
    assert "invalid" in unknown.data.tags["burnish.reason"]


def test_the_samples_are_datasets_of_the_runs_that_used_them(uri: str, own_name: Campaign, work: Path) -> None:
    named = dataclasses.replace(own_name, samples_name="evaluation.npz")
    published = MlflowTracker(uri, work).publish(named, files={})
    client = MlflowClient(tracking_uri=uri)

    def given(key: str) -> dict[str, mlflow.entities.Dataset]:
        inputs = client.get_run(published.runs[key]).inputs.dataset_inputs
        return {tag.value: one.dataset for one in inputs for tag in one.tags if tag.key == "mlflow.data.context"}

    evaluation = given(named.id)["evaluation"]
    assert (evaluation.name, json.loads(evaluation.source)) == ("evaluation.npz", {"uri": "evaluation.npz"})
    assert named.samples_digest.startswith(evaluation.digest)
    assert json.loads(evaluation.profile) == {"num_rows": 899}
    features = json.loads(json.loads(evaluation.schema)["mlflow_tensorspec"]["features"])
    assert [(one["name"], one["tensor-spec"]["shape"]) for one in features] == [("image", [-1, 1, 32, 32])]
    calibrated, plain = given(campaigns.STATIC_TRITON.id), given(campaigns.BASELINE.id)
    assert campaigns.STATIC.calibration_digest.startswith(calibrated["calibration"].digest)
    assert set(plain) == {"evaluation"}
    assert plain["evaluation"].digest == evaluation.digest


def test_what_is_the_models_own_stands_on_the_model_with_its_samples(uri: str, own_name: Campaign, work: Path) -> None:
    published = MlflowTracker(uri, work).publish(own_name, files={})
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(published.runs[campaigns.STATIC_TRITON.id])
    model = client.get_logged_model(run.inputs.model_inputs[0].model_id)
    found = {one.key: one for one in model.metrics}
    assert found["accuracy_drop_high"].value == pytest.approx(0.0044)
    assert own_name.samples_digest.startswith(found["accuracy_drop_high"].dataset_digest)
    assert found["inprocess_ms.batch_1"].value == 0.46
    assert "max_throughput_rps" not in found
    assert model.params["recipe"] == "simplify | quantize(per_channel=true, scheme=static)"


def test_a_search_is_a_run_whose_looks_are_steps(uri: str, own_name: Campaign, work: Path, tmp_path: Path) -> None:
    searched = dataclasses.replace(own_name, serving_searches=(searches.search(),))
    tracker = MlflowTracker(uri, work)
    published = tracker.publish(searched, files={})
    client = MlflowClient(tracking_uri=uri)
    (run,) = [run for run in runs_of(client, own_name) if run.data.tags["burnish.kind"] == "search"]
    assert run.data.tags["mlflow.parentRunId"] == published.runs[own_name.id]
    assert run.data.params["best"] == "mlserver-grpc-b16-d5"
    looks = client.get_metric_history(run.info.run_id, "search/closed_rps")
    assert sorted((one.step, one.value) for one in looks) == [(1, 450.0), (3, 610.0), (4, 580.0)]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "search.json", str(tmp_path))).read_text())
    assert [row[1] for row in table["data"] if row[-1]] == ["mlserver-grpc-b16-d5"]
    assert tracker.publish(searched, files={}) == published


def test_no_environment_variable_reaches_a_run(
    uri: str, own_name: Campaign, report: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNISH_TEST_SECRET", "do-not-record-me")
    published = MlflowTracker(uri, work).publish(own_name, files={"report.html": report})
    client = MlflowClient(tracking_uri=uri)
    for run in runs_of(client, own_name):
        assert "do-not-record-me" not in json.dumps(run.to_dictionary())
    text = Path(client.download_artifacts(published.runs[own_name.id], "host.json", str(tmp_path))).read_text()
    assert "do-not-record-me" not in text
    assert json.loads(text)["host"]["cpu_model"] == own_name.host.cpu_model


@pytest.mark.usefixtures("default_store")
def test_variants_load_back_and_answer_as_their_files_do(
    uri: str, own_name: Campaign, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = MlflowTracker(uri, work).publish(own_name, files={})
    client = MlflowClient(tracking_uri=uri)
    for candidate in own_name.candidates:
        run = client.get_run(published.runs[candidate.id])
        assert run.inputs.model_inputs, "the run links to no model"
        model_id = run.inputs.model_inputs[0].model_id
        model = client.get_logged_model(model_id)
        assert model.tags["burnish.variant_id"] == candidate.variant_id
        place = Path(own_name.artifacts[candidate.variant_id])
        answer = mlflow.pyfunc.load_model(f"models:/{model_id}")
        assert answer.metadata.signature is not None
        assert answer.input_example is not None
        shown = answer.predict({"x": SAMPLE})
        if candidate.engine.name == "onnxruntime":
            session = onnxruntime.InferenceSession(place / "model.onnx", providers=["CPUExecutionProvider"])
            expected = session.run(["y"], {"x": SAMPLE})[0]
            loaded = mlflow.onnx.load_model(f"models:/{model_id}")
            assert [node.op_type for node in loaded.graph.node] == ["MatMul"]
            np.testing.assert_array_equal(shown["y"], expected)
        else:
            import openvino

            expected = openvino.Core().compile_model(str(place / "model.xml"), "CPU")({"x": SAMPLE})[0]
            np.testing.assert_array_equal(shown["y"], expected)


@pytest.mark.usefixtures("default_store")
def test_a_model_held_to_float32_loads_back_held_to_it(uri: str, own_name: Campaign, work: Path) -> None:
    """The same files served in two precisions are two models."""
    openvino = pytest.importorskip("openvino")
    free = campaigns.OPENVINO_TRITON
    held = dataclasses.replace(
        free, id="0" * 16, name="openvino.float32 @ triton", variant_name="openvino.float32",
        engine=dataclasses.replace(free.engine, precision="float32"),
    )  # fmt: skip
    made = dataclasses.replace(own_name, candidates=(campaigns.BASELINE, free, held))
    tracker = MlflowTracker(uri, work)
    client = MlflowClient(tracking_uri=uri)

    def linked(campaign: Campaign) -> list[str]:
        runs = tracker.publish(campaign, files={}).runs
        return [client.get_run(runs[one.id]).inputs.model_inputs[0].model_id for one in (free, held)]

    models = linked(made)
    hints = [
        mlflow.pyfunc.load_model(f"models:/{one}").get_raw_model().get_property("INFERENCE_PRECISION_HINT")
        for one in models
    ]
    entry = Path(made.artifacts[free.variant_id]) / "model.xml"
    chosen = openvino.Core().compile_model(str(entry), "CPU").get_property("INFERENCE_PRECISION_HINT")
    assert hints == [chosen, openvino.Type.f32]
    assert client.get_logged_model(models[1]).name == "openvino-float32"
    assert linked(dataclasses.replace(made, verdict=campaigns.no_winner())) == models


@pytest.mark.usefixtures("default_store")
def test_the_logged_files_are_those_that_were_measured(uri: str, own_name: Campaign, work: Path) -> None:
    published = MlflowTracker(uri, work).publish(own_name, files={})
    assert published.model_version is not None
    local = mlflow.artifacts.download_artifacts(f"models:/{own_name.model_name}/{published.model_version}")
    place = Path(own_name.artifacts[campaigns.STATIC.id])
    for path in place.iterdir():
        assert (Path(local) / path.name).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("default_store")
def test_a_variant_that_was_only_made_is_a_model_too_and_one_for_tensorrt_asks_for_it(
    uri: str, own_name: Campaign, work: Path
) -> None:
    """Where ONNX Runtime has no TensorRT, MLflow falls back to what it has."""
    stage = StageCall(name="tensorrt.prepare", params={"version": 10})
    made = tuple(
        dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, stages=(stage,)))
        if one.id == campaigns.OPTIMIZED.id
        else one
        for one in own_name.variants
    )
    MlflowTracker(uri, work).publish(dataclasses.replace(own_name, variants=made), files={})
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(f"burnish/{own_name.model_name}")
    models = {one.tags["burnish.variant_id"]: one for one in client.search_logged_models([experiment.experiment_id])}
    assert set(models) == {one.id for one in made}
    loaded = mlflow.pyfunc.load_model(f"models:/{models[campaigns.OPTIMIZED.id].model_id}")
    assert loaded.metadata.flavors["onnx"]["providers"] == [
        "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider",
    ]  # fmt: skip
    assert loaded.predict({"x": SAMPLE})["y"].shape == (3, 2)


def test_the_winner_becomes_a_version_without_an_alias(uri: str, own_name: Campaign, work: Path) -> None:
    default_before = mlflow.get_tracking_uri()
    published = MlflowTracker(uri, work).publish(own_name, files={})
    assert mlflow.get_tracking_uri() == default_before
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = client.get_model_version(own_name.model_name, published.model_version)
    assert version.tags["burnish.candidate_id"] == campaigns.STATIC_TRITON.id
    assert version.tags["burnish.provisional"] == "true"
    assert version.run_id == published.runs[campaigns.STATIC_TRITON.id]
    assert version.source.startswith("models:/m-")
    assert list(version.aliases) == []


def test_a_candidate_that_failed_is_a_failed_run_of_a_whole_campaign(own_name: Campaign, work: Path) -> None:
    failure = Failure(
        subject=campaigns.OPENVINO_TRITON.name, phase="deploy", kind="died", reason="the server ended with code 137"
    )
    failed = dataclasses.replace(own_name, failures=(failure,))
    tracker = MlflowTracker(embedded_uri(work), work)
    published = tracker.publish(failed, files={})
    run = MlflowClient(tracking_uri=embedded_uri(work)).get_run(published.runs[campaigns.OPENVINO_TRITON.id])
    assert (run.info.status, run.data.tags["burnish.verdict"]) == ("FAILED", "failed")
    assert run.data.tags["burnish.reason"] == failure.reason
    assert tracker.publish(failed, files={}) == published


def test_more_points_than_one_call_takes_are_all_there(own_name: Campaign, work: Path) -> None:
    points = tuple((percentile / 100, 1.0 + percentile) for percentile in range(2500))
    spectrum = Spectrum(candidate_id=campaigns.BASELINE.id, load="100 rps", requests=10**6, points=points)
    bare = dataclasses.replace(own_name, spectra=(spectrum,), candidates=(campaigns.BASELINE,), variants=())
    published = MlflowTracker(embedded_uri(work), work).publish(bare, files={})
    client = MlflowClient(tracking_uri=embedded_uri(work))
    run_id = published.runs[campaigns.BASELINE.id]
    assert len(client.get_metric_history(run_id, "spectrum/latency_ms.at_100_rps")) == 2500
    assert client.get_run(run_id).data.metrics["max_throughput_rps"] == 455.3


def test_without_a_winner_nothing_is_registered(uri: str, own_name: Campaign, work: Path) -> None:
    nothing = dataclasses.replace(own_name, verdict=campaigns.no_winner())
    assert MlflowTracker(uri, work).publish(nothing, files={}).model_version is None
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert list(client.search_model_versions(f"name = '{own_name.model_name}'")) == []


def test_the_same_campaign_twice_is_one(uri: str, own_name: Campaign, report: Path, work: Path) -> None:
    first = MlflowTracker(uri, work).publish(own_name, files={"report.html": report})
    again = MlflowTracker(uri, work).publish(own_name, files={"report.html": report})
    assert again == first
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert len(runs_of(client, own_name)) == 1 + len(own_name.candidates)
    assert len(list(client.search_model_versions(f"name = '{own_name.model_name}'"))) == 1


@pytest.mark.parametrize("fails_at", ["set_terminated", "log_batch", "finalize_logged_model", "log_artifacts"])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_try_that_was_interrupted_is_replaced(
    own_name: Campaign, work: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str, calls: int
) -> None:
    uri = embedded_uri(work)
    left = iter(range(calls - 1))
    real: Callable[..., object] = getattr(MlflowClient, fails_at)

    def until_killed(self: MlflowClient, *args: object, **kwargs: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, fails_at, until_killed)
        with pytest.raises(KeyboardInterrupt):
            MlflowTracker(uri, work).publish(own_name, files={})

    published = MlflowTracker(uri, work).publish(own_name, files={})
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert {run.info.run_id for run in runs_of(client, own_name)} == set(published.runs.values())
    assert len(published.runs) == 1 + len(own_name.candidates)
    experiment = client.get_experiment_by_name(f"burnish/{own_name.model_name}")
    models = list(client.search_logged_models([experiment.experiment_id]))
    assert sorted(model.tags["burnish.variant_id"] for model in models) == sorted(one.id for one in own_name.variants)
    assert published.model_version == "1"


def test_a_campaign_measured_anew_takes_the_place_of_the_earlier(own_name: Campaign, work: Path) -> None:
    uri = embedded_uri(work)
    tracker = MlflowTracker(uri, work)
    first = tracker.publish(own_name, files={})
    anew = dataclasses.replace(own_name, verdict=campaigns.no_winner())
    second = tracker.publish(anew, files={})
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert set(first.runs.values()).isdisjoint(second.runs.values())
    assert {run.info.run_id for run in runs_of(client, own_name)} == set(second.runs.values())


def test_a_failure_that_logs_something_else_is_no_other_campaign(uri: str, own_name: Campaign, work: Path) -> None:
    """A failure is tried again on each run, and its log holds times and process ids."""
    tracker = MlflowTracker(uri, work)
    failures = tuple(dataclasses.replace(one, detail=f"{one.detail}\n10:31:07 pid 4711") for one in own_name.failures)
    first = tracker.publish(own_name, files={})
    assert tracker.publish(dataclasses.replace(own_name, failures=failures), files={}) == first
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert len(list(client.search_model_versions(f"name = '{own_name.model_name}'"))) == 1


def test_the_same_winner_measured_anew_stays_one_version_that_follows_the_verdict(
    uri: str, own_name: Campaign, work: Path
) -> None:
    tracker = MlflowTracker(uri, work)
    first = tracker.publish(own_name, files={})
    verdict = dataclasses.replace(own_name.verdict, sentence="It serves 1301 requests/s.", provisional=False)
    second = tracker.publish(dataclasses.replace(own_name, verdict=verdict), files={})
    assert second.runs != first.runs
    assert second.model_version == first.model_version == "1"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    (version,) = client.search_model_versions(f"name = '{own_name.model_name}'")
    assert version.description == "It serves 1301 requests/s."
    assert version.tags["burnish.provisional"] == "false"
    assert version.tags["burnish.run_id"] == second.runs[campaigns.STATIC_TRITON.id]


def test_a_variant_that_is_not_on_this_machine_is_recorded_without_a_model(
    own_name: Campaign, work: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Libraries that other tests import set levels for the whole process, and switch loggers off.
    monkeypatch.setattr(logging.getLogger("registry.mlflow_models"), "disabled", False)
    caplog.set_level(logging.WARNING, logger="registry.mlflow_models")
    bare = dataclasses.replace(own_name, artifacts={})
    published = open_tracker(None, work).publish(bare, files={})
    assert published.model_version is None
    assert "not on this machine" in caplog.text


def test_a_dead_server_is_named_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        MlflowTracker("http://ann:s3cret@127.0.0.1:9", tmp_path).check()
    assert time.monotonic() - began < LONG_S
    assert "127.0.0.1:9" in caught.value.message
    assert "s3cret" not in str(caught.value)
    assert caught.value.hint is not None


def test_a_dead_database_is_named_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"postgresql://\*\*\*@127\.0\.0\.1:9/mlflow"):
        MlflowTracker("postgresql://ann:s3cret@127.0.0.1:9/mlflow", tmp_path).check()
    assert time.monotonic() - began < LONG_S


@pytest.mark.parametrize(
    ("scheme", "port"),
    [("postgresql", 5432), ("postgresql+psycopg2", 5432), ("mysql+pymysql", 3306), ("mssql+pyodbc", 1433)],
)
def test_a_database_without_a_port_is_knocked_at_where_it_would_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, port: int
) -> None:
    asked = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        asked.append((address, timeout))
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UnreachableError, match="nobody listens"):
        MlflowTracker(f"{scheme}://ann:s3cret@db.example/mlflow", tmp_path).check()
    assert asked == [(("db.example", port), 5)]


@pytest.mark.parametrize("uri", ["postgresql://ann:pw@db.example:s3cret/mlflow", "postgresql://ann:s3cret/7@db/mlflow"])
def test_a_port_that_is_none_is_refused_without_the_secret(tmp_path: Path, uri: str) -> None:
    with pytest.raises(InputError, match="port") as caught:
        MlflowTracker(uri, tmp_path).check()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "", "it's", "a:b"])
def test_a_name_that_no_registered_model_may_have_is_refused(campaign: Campaign, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="registered model"):
        MlflowTracker(embedded_uri(tmp_path), tmp_path).publish(
            dataclasses.replace(campaign, model_name=name), files={}
        )
    assert not (tmp_path / "mlflow.db").exists()


def test_a_file_that_is_not_there_is_named_and_nothing_is_written(campaign: Campaign, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.html"):
        MlflowTracker(embedded_uri(tmp_path), tmp_path).publish(
            campaign, files={"report.html": tmp_path / "missing.html"}
        )
    assert not (tmp_path / "mlflow.db").exists()


def test_a_rendered_file_outside_its_folder_is_refused(campaign: Campaign, tmp_path: Path) -> None:
    rendered = {campaigns.BASELINE.id: {"../../escaped.json": "{}"}}
    with pytest.raises(InputError, match="outside its folder"):
        MlflowTracker(embedded_uri(tmp_path), tmp_path).publish(
            dataclasses.replace(campaign, rendered=rendered), files={}
        )


def test_a_database_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to be taken for the start of one" * 20)
    with pytest.raises(UnreachableError, match=r"mlflow\.db cannot be used"):
        MlflowTracker(embedded_uri(tmp_path), tmp_path).check()


def test_a_store_that_mlflow_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="cannot be used"):
        MlflowTracker(f"file://{tmp_path}", tmp_path).check()


def test_checking_leaves_mlflows_settings_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with pytest.raises(UnreachableError):
        MlflowTracker("http://127.0.0.1:9", tmp_path).check()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
