"""`burnish job` against a double of the Kubernetes API."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimize.engines.kubernetes_job import render_file
from optimize.engines.kubernetes_jobs_client import JobsClient
from registry.errors import InputError, UnreachableError
from tests.doubles.kubernetes_api import RefusalError
from tests.doubles.kubernetes_jobs import JobsDouble

CAMPAIGN = "name: {name}\nsources: [{{onnx: /models/m.onnx}}]\nsamples: {{evaluation: /models/held-out.npz}}\n"
JOB = """
name: nightly
image: registry.example/burnish-job-cpu:1
campaigns: [digits.yaml, letters.yaml]
mlflow: http://mlflow:5000
store: s3://models/burnish
volumes: [{claim: models, path: /models}]
work: burnish-work
"""


@pytest.fixture
def double() -> Iterator[JobsDouble]:
    with JobsDouble() as running:
        yield running


@pytest.fixture
def client(double: JobsDouble, tmp_path: Path) -> Iterator[JobsClient]:
    with JobsClient(kubeconfig=double.kubeconfig(tmp_path)) as opened:
        yield opened


@pytest.fixture
def job(tmp_path: Path) -> Path:
    for name in ("digits", "letters"):
        (tmp_path / f"{name}.yaml").write_text(CAMPAIGN.format(name=name))
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


def test_a_job_is_sent_once_with_a_config_map_that_goes_with_it(double: JobsDouble, client: JobsClient, job: Path):
    rendered = render_file(job)
    assert client.submit(rendered)
    assert not client.submit(rendered)
    assert double.names("jobs") == ["nightly"]
    (config,) = double.names("configmaps")
    owner = double.resources["configmaps", config]["metadata"]["ownerReferences"][0]
    assert owner["uid"] == double.resources["jobs", "nightly"]["metadata"]["uid"]
    assert sum(method == "PATCH" for method, *_ in double.asked) == 2


def test_a_dry_run_makes_nothing(double: JobsDouble, client: JobsClient, job: Path):
    assert client.submit(render_file(job), dry_run=True)
    assert double.resources == {}


def test_another_job_of_the_name_is_left_alone(double: JobsDouble, client: JobsClient, job: Path):
    client.submit(render_file(job))
    before = double.resources["jobs", "nightly"]
    job.write_text(JOB + "retries: 5\n")
    with pytest.raises(InputError, match="there is another Job nightly in the namespace models") as raised:
        client.submit(render_file(job))
    assert "burnish job cancel nightly" in str(raised.value)
    assert double.resources["jobs", "nightly"] is before


def test_nothing_is_left_of_a_job_whose_config_map_is_refused(double: JobsDouble, client: JobsClient, job: Path):
    double.refusals["PATCH", "configmaps"] = RefusalError(403, "Forbidden", "may not patch configmaps")
    with pytest.raises(UnreachableError, match="this account may not patch configmaps"):
        client.submit(render_file(job))
    assert double.resources == {}


def test_the_state_of_each_campaign_is_told_in_words(double: JobsDouble, client: JobsClient, job: Path):
    client.submit(render_file(job))
    assert [pod.phase for pod in client.states("nightly")[0].pods] == ["Pending", "Pending"]
    double.resources["jobs", "nightly"]["status"] = {"active": 1, "failed": 1}
    double.ends("nightly", 0, 3)
    double.ends("nightly", 1, None)
    (state,) = client.states("nightly")
    assert (state.state, state.reason) == ("running", "1 active, 1 failed")
    assert [(pod.index, pod.phase, pod.exit_code, pod.told) for pod in state.pods] == [
        (0, "Failed", 3, "no variant meets the policy"),
        (1, "Running", None, ""),
    ]
    condition = {"type": "Failed", "status": "True", "reason": "FailedIndexes", "message": "1 of 2"}
    double.resources["jobs", "nightly"]["status"] = {"conditions": [condition]}
    double.ends("nightly", 1, 137, reason="OOMKilled")
    (state,) = client.states("nightly")
    assert (state.state, state.reason) == ("failed", "FailedIndexes: 1 of 2")
    assert state.pods[1].told == "out of memory (OOMKilled): raise `memory:`"


def test_why_a_pod_waits_is_told(double: JobsDouble, client: JobsClient, job: Path):
    client.submit(render_file(job))
    waits = {
        "type": "PodScheduled",
        "status": "False",
        "message": "0/3 nodes: 3 Insufficient nvidia.com/gpu",
    }
    double.resources["pods", "nightly-0-x"]["status"] = {"phase": "Pending", "conditions": [waits]}
    pulls = [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]
    double.resources["pods", "nightly-1-x"]["status"] = {"phase": "Pending", "containerStatuses": pulls}
    first, second = client.states("nightly")[0].pods
    assert "3 Insufficient nvidia.com/gpu" in first.told
    assert second.told == "ImagePullBackOff"


def test_logs_are_those_of_the_campaign_that_is_asked_for(double: JobsDouble, client: JobsClient, job: Path):
    client.submit(render_file(job))
    double.ends("nightly", 0, 0, "one\ntwo\n")
    double.ends("nightly", 1, 0, "three\n")
    assert [text for _, text in client.logs("nightly")] == ["one\ntwo\n", "three\n"]
    assert [text for _, text in client.logs("nightly", index=0, tail=1)] == ["two\n"]
    with pytest.raises(InputError, match="no pods for the index 7"):
        client.logs("nightly", index=7)


def test_a_job_is_taken_away_with_all_that_belongs_to_it(double: JobsDouble, client: JobsClient, job: Path):
    client.submit(render_file(job))
    assert client.cancel("nightly", timeout_s=60) == ["Job nightly"]
    assert double.resources == {}
    with pytest.raises(InputError, match="there is no job nightly"):
        client.cancel("nightly", timeout_s=60)


def test_rayjobs_are_one_job(double: JobsDouble, client: JobsClient, job: Path):
    job.write_text(JOB + "kind: rayjob\n")
    client.submit(render_file(job))
    assert double.names("rayjobs") == ["nightly-0", "nightly-1"]
    status = {"jobStatus": "FAILED", "jobDeploymentStatus": "Complete", "reason": "AppFailed", "message": "exit code 3"}
    double.resources["rayjobs", "nightly-1"]["status"] = status
    (config,) = double.names("configmaps")
    owners = double.resources["configmaps", config]["metadata"]["ownerReferences"]
    assert [owner["name"] for owner in owners] == ["nightly-0", "nightly-1"]  # it is needed until the last has ended
    first, second = client.states("nightly")
    assert (first.state, second.state, second.reason) == ("pending", "failed", "Complete: AppFailed: exit code 3")
    assert client.cancel("nightly", timeout_s=60) == ["RayJob nightly-0", "RayJob nightly-1"]
    assert double.resources == {}


def test_a_cluster_without_kuberay_is_said_and_jobs_do_without(double: JobsDouble, client: JobsClient, job: Path):
    del double.plurals["rayjobs"]
    client.submit(render_file(job))
    assert client.states("nightly")[0].kind == "Job"
    client.cancel("nightly", timeout_s=60)
    job.write_text(JOB + "kind: rayjob\n")
    with pytest.raises(UnreachableError, match=r"has no resource rayjobs\.ray\.io/v1") as raised:
        client.submit(render_file(job))
    assert "Install KubeRay" in str(raised.value)


def burnish(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "optimize", "job", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_the_commands(double: JobsDouble, job: Path, tmp_path: Path):
    kubeconfig = ("--kubeconfig", double.kubeconfig(tmp_path))
    sent = burnish("submit", job, *kubeconfig)
    assert sent.stdout.startswith("Sent ConfigMap nightly-"), sent.stderr
    double.ends("nightly", 0, 0, "the log\n")
    told = json.loads(burnish("status", "nightly", *kubeconfig, "--json").stdout)
    assert told["jobs"][0]["pods"][0]["told"] == "done"
    assert burnish("logs", "nightly", "--index", "0", *kubeconfig).stdout == "the log\n"
    gone = burnish("cancel", "weekly", *kubeconfig, "--json")
    assert gone.returncode == 2
    assert json.loads(gone.stdout)["error"]["message"] == "there is no job weekly in the namespace models"
