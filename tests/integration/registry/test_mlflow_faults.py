"""A tracking server that is slow, refuses, fails, is full or goes away: a proxy before a real one."""

import dataclasses
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from optimize import reporting
from registry import mlflow_sending
from registry.errors import UnreachableError
from registry.mlflow_sending import sender_of
from registry.mlflow_store import each
from registry.mlflow_tracking import MlflowTracker
from registry.ports import Published
from registry.records import Campaign
from registry.tracking import embedded_uri
from tests.doubles import campaigns, searches
from tests.doubles.busy import LONG_S
from tests.doubles.tracking_proxy import GONE, LOST, Answer, proxied

pytestmark = [
    pytest.mark.slow,
    # MLflow's own libraries, not our use of them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TOKEN = "token-of-the-test-4711"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is tried once more, at once, as a connection that was kept may be closed; a user's own settings."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


@pytest.fixture
def searched(own_name: Campaign) -> Campaign:
    """A campaign with a search and two variants."""
    served = (campaigns.BASELINE, campaigns.STATIC_TRITON)
    variants = tuple(one for one in own_name.variants if one.id in {each.variant_id for each in served})
    return dataclasses.replace(own_name, candidates=served, variants=variants, serving_searches=(searches.search(),))


def assert_whole_and_once(server: str, campaign: Campaign, published: Published) -> None:
    """The store has each run and each model of the campaign once, and nothing else."""
    client = MlflowClient(tracking_uri=server, registry_uri=server)
    experiment = client.get_experiment_by_name(f"burnish/{campaign.model_name}")
    runs = client.search_runs([experiment.experiment_id])
    kinds = sorted(run.data.tags["burnish.kind"] for run in runs)
    assert kinds == ["campaign", *["candidate"] * len(campaign.candidates), "search"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert set(published.runs.values()) < {run.info.run_id for run in runs}
    models = list(client.search_logged_models([experiment.experiment_id]))
    assert sorted(one.tags["burnish.variant_id"] for one in models) == sorted(one.id for one in campaign.variants)
    assert {str(one.status) for one in models} == {"READY"}
    assert [str(one.version) for one in client.search_model_versions(f"name = '{campaign.model_name}'")] == ["1"]


def gone_after(requests: int) -> Callable[[str, str, int], Answer]:
    """A rule by which the server goes away after so many requests."""
    return lambda method, path, number: GONE if number >= requests else None


@pytest.mark.parametrize("after", [4, 14, 26, 40])
def test_a_server_that_goes_away_in_the_middle_gets_the_rest_later(
    mlflow_server: str, searched: Campaign, report: Path, tmp_path: Path, after: int
) -> None:
    with (
        proxied(mlflow_server, rule=gone_after(after)) as proxy,
        pytest.raises(UnreachableError, match="cannot be used") as raised,
    ):
        MlflowTracker(proxy.url, tmp_path).publish(searched, files={"report.html": report})
    assert raised.value.exit_code == 4
    published = MlflowTracker(mlflow_server, tmp_path).publish(searched, files={"report.html": report})
    assert_whole_and_once(mlflow_server, searched, published)
    assert MlflowTracker(mlflow_server, tmp_path).publish(searched, files={"report.html": report}) == published


def test_an_outage_leaves_what_was_recorded_before(mlflow_server: str, searched: Campaign, tmp_path: Path) -> None:
    first = MlflowTracker(mlflow_server, tmp_path).publish(searched, files={})
    anew = dataclasses.replace(searched, task_metric="f1")
    with proxied(mlflow_server, rule=gone_after(12)) as proxy, pytest.raises(UnreachableError):
        MlflowTracker(proxy.url, tmp_path).publish(anew, files={})
    client = MlflowClient(tracking_uri=mlflow_server)
    assert {client.get_run(run_id).info.lifecycle_stage for run_id in first.runs.values()} == {"active"}
    published = MlflowTracker(mlflow_server, tmp_path).publish(anew, files={})
    assert set(published.runs.values()).isdisjoint(first.runs.values())
    assert_whole_and_once(mlflow_server, anew, published)


def test_a_run_that_was_begun_twice_since_an_answer_was_lost_is_there_once(
    mlflow_server: str, searched: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    lost = iter([LOST])

    def rule(method: str, path: str, number: int) -> Answer:
        return next(lost, None) if "runs/create" in path else None

    with proxied(mlflow_server, rule=rule) as proxy:
        published = MlflowTracker(proxy.url, tmp_path).publish(searched, files={})
    assert next(lost, None) is None
    assert_whole_and_once(mlflow_server, searched, published)


@pytest.mark.parametrize(("after", "same"), [(6, True), (30, False)])
def test_two_folders_that_send_the_same_campaign_at_once_leave_one(
    mlflow_server: str, searched: Campaign, tmp_path: Path, after: int, same: bool
) -> None:
    """The second sends all of it while the first is in the middle; neither takes away what the other writes."""
    theirs = searched if same else dataclasses.replace(searched, task_metric="f1")
    found: list[Published] = []
    once = iter([None])
    lock = threading.Lock()

    def meanwhile(method: str, path: str, number: int) -> Answer:
        with lock:
            if number >= after and next(once, "done") is None:
                found.append(MlflowTracker(mlflow_server, tmp_path / "b").publish(theirs, files={}))
        return None

    with proxied(mlflow_server, rule=meanwhile) as proxy:
        published = MlflowTracker(proxy.url, tmp_path / "a").publish(searched, files={})
    assert_whole_and_once(mlflow_server, searched, published)
    # Of two that say the same the first that was done counts, else the last.
    assert (published.runs == found[0].runs) is same
    assert MlflowTracker(mlflow_server, tmp_path / "a").publish(searched, files={}).runs == published.runs


def test_what_another_folder_left_half_sent_goes_once_it_is_old(
    mlflow_server: str, searched: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxied(mlflow_server, rule=gone_after(26)) as proxy, pytest.raises(UnreachableError):
        MlflowTracker(proxy.url, tmp_path / "a").publish(searched, files={})
    ours = MlflowTracker(mlflow_server, tmp_path / "b")
    published = ours.publish(searched, files={})
    client = MlflowClient(tracking_uri=mlflow_server)
    experiment = client.get_experiment_by_name(f"burnish/{searched.model_name}")
    left = client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
    assert {run.data.tags["burnish.sender"] for run in left} == {sender_of(tmp_path / "a")}
    monkeypatch.setattr(mlflow_sending, "GONE_AFTER_S", -1.0)
    assert ours.publish(searched, files={}) == published
    assert_whole_and_once(mlflow_server, searched, published)


def answering(status: int, text: str, part: str) -> Callable[[str, str, int], Answer]:
    """A rule that answers requests whose path has a part in it."""
    return lambda method, path, number: (status, text) if part in path else None


@pytest.mark.parametrize(
    ("rule", "said", "hint"),
    [
        (answering(401, "You are not authenticated.", "experiments"), r"does not know who asks \(401\)", "TOKEN"),
        (answering(403, "Permission denied", "experiments"), r"refuses these credentials \(403\)", "right to write"),
        (
            answering(403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "log-batch"),
            r"refuses these credentials \(403\): PERMISSION_DENIED: no",
            "right to write",
        ),
        (answering(403, "Forbidden", "mlflow-artifacts"), r"\(403\): 403 Client Error", "right to write"),
        (answering(500, "Internal Server Error", "mlflow-artifacts"), r"fails \(500\): http\S+: Resp", "full disk"),
        (
            answering(503, '{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "disk is full"}', "log-batch"),
            r"fails \(503\)",
            "full disk",
        ),
        (
            answering(400, '{"error_code": "BAD_REQUEST", "message": "could not extend: No space left on device"}',
                      "log-batch"),
            "no space is left: BAD_REQUEST",
            "room",
        ),
        (answering(413, "Too Large", "mlflow-artifacts"), r"it refuses \(413\): 413 Client Error", "Whoever runs it"),
    ],
)  # fmt: skip
def test_what_a_server_answers_is_said_with_its_cause(
    mlflow_server: str, searched: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, rule: Callable[[str, str, int], Answer], said: str, hint: str,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    with proxied(mlflow_server, rule=rule) as proxy:
        with pytest.raises(UnreachableError, match=said) as raised:
            MlflowTracker(proxy.url, tmp_path).publish(searched, files={})
        assert TOKEN in proxy.headers["Authorization"]
    assert "\n" not in raised.value.message
    assert len(raised.value.message) < 600
    assert hint in str(raised.value.hint)
    assert TOKEN not in str(raised.value) + caplog.text


def test_a_token_reaches_the_server_and_nothing_else(
    mlflow_server: str, searched: Campaign, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    with proxied(mlflow_server) as proxy:
        published = MlflowTracker(proxy.url, tmp_path).publish(searched, files={"report.html": report})
        assert proxy.headers["Authorization"] == f"Bearer {TOKEN}"
        # What a slow server would have to answer, one by one: a few requests a candidate, and those of its files.
        assert len(proxy.asked) < 75
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    client = MlflowClient(tracking_uri=mlflow_server)
    told = [str(client.get_run(run_id).to_dictionary()) for run_id in published.runs.values()]
    local = client.download_artifacts(published.runs[searched.id], "", str(tmp_path))
    told += [path.read_text(errors="ignore") for path in Path(local).rglob("*") if path.is_file()]
    assert all(TOKEN not in text for text in (*told, caplog.text, published.location))


def test_several_requests_are_under_way_at_a_time(mlflow_server: str, searched: Campaign, tmp_path: Path) -> None:
    """So that a server far away costs a share of its delays."""
    busy, most, begun, lock = 0, 0, 0, threading.Lock()

    def count(method: str, path: str, number: int) -> Answer:
        nonlocal busy, most, begun
        with lock:
            busy += 1
            most = max(most, busy)
            begun += "runs/create" in path
            first_of_a_candidate = "runs/create" in path and begun > 1
            if busy > 1:
                together.set()
        time.sleep(0.05)
        # There is another candidate, however long a busy machine takes to send the first request of that.
        if first_of_a_candidate:
            together.wait(LONG_S)
        with lock:
            busy -= 1
        return None

    together = threading.Event()
    with proxied(mlflow_server, rule=count) as proxy:
        MlflowTracker(proxy.url, tmp_path).publish(searched, files={})
    assert 1 < most <= 8


def test_after_a_failure_nothing_more_is_begun() -> None:
    """What is under way ends; what waits is not begun."""
    begun: list[int] = []
    failed = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            failed.set()
            raise ValueError(item)
        if item > 1:
            time.sleep(0.5)  # so long as nobody has heard of it
        assert failed.wait(60)
        return item

    with pytest.raises(ValueError, match="1"):
        each(work, range(100), at_once=2)
    assert len(begun) < 10
    assert each(lambda item: -item, range(5), at_once=3) == [0, -1, -2, -3, -4]
    assert each(lambda item: -item, range(3), at_once=1) == [0, -1, -2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, check=False, capture_output=True)
    if mounted.returncode:
        pytest.xfail(f"no file system may be mounted here: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        # MLflow keeps its connection to a database.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_campaign_recorded_when_there_is_room(
    small_disk: Path, empty_store: Path, searched: Campaign
) -> None:
    (small_disk / "mlflow.db").write_bytes(empty_store.read_bytes())
    ballast = small_disk / "ballast"
    room = 4 * 2**20 - empty_store.stat().st_size
    ballast.write_bytes(bytes(room - 120_000))
    with pytest.raises(UnreachableError, match="no space is left") as raised:
        MlflowTracker(embedded_uri(small_disk), small_disk).publish(searched, files={})
    assert raised.value.exit_code == 4
    ballast.unlink()
    published = MlflowTracker(embedded_uri(small_disk), small_disk).publish(searched, files={})
    assert_whole_and_once(embedded_uri(small_disk), searched, published)


def test_a_campaign_that_met_an_outage_is_sent_from_its_folder(
    mlflow_server: str, searched: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    reporting.write_campaign(searched, tmp_path)
    reporting.write_report(searched, tmp_path)
    with proxied(mlflow_server, rule=gone_after(10)) as proxy:
        reporting.use_tracker(proxy.url, tmp_path)
        with pytest.raises(UnreachableError) as raised:
            reporting.publish(searched, tmp_path)
        assert f"`burnish report {tmp_path} --sync` sends it later" in str(raised.value.hint)
        proxy.rule = None
        published = reporting.publish(reporting.read_campaign(tmp_path), tmp_path)
    client = MlflowClient(tracking_uri=mlflow_server)
    assert "report.html" in {one.path for one in client.list_artifacts(published.runs[searched.id])}
    pictures = {one.path for one in client.list_artifacts(published.runs[searched.id], "pictures")}
    assert {"pictures/latency.png", "pictures/pareto.png"} <= pictures
    assert_whole_and_once(mlflow_server, searched, published)
