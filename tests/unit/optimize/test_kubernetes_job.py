"""A job's file to manifests, and what is refused before anything is sent."""

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from optimize.engines.kubernetes_job import as_yaml, check_manifest, render_file
from registry.errors import InputError

CAMPAIGN = """
name: {name}
sources: [{{onnx: /models/{name}.onnx}}]
samples: {{evaluation: held-out.npz}}
variants: [float32, int8-dynamic]
"""
JOB: dict[str, Any] = {
    "name": "nightly",
    "image": "registry.example/burnish-job-gpu:1",
    "campaigns": ["digits.yaml", "letters.yaml"],
    "files": ["held-out.npz"],
    "parallelism": 1,
    "cpu": "8",
    "memory": "16Gi",
    "gpus": 1,
    "node_selector": {"nvidia.com/gpu.product": "NVIDIA-L4"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "store": "s3://models/burnish",
    "mlflow": "http://mlflow.mlflow:5000",
    "secrets": ["s3-credentials"],
    "environment": {"AWS_DEFAULT_REGION": "eu-west-1"},
    "volumes": [{"claim": "models", "path": "/models"}],
    "work": "burnish-work",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("digits", "letters"):
        (tmp_path / f"{name}.yaml").write_text(CAMPAIGN.format(name=name))
    (tmp_path / "held-out.npz").write_bytes(b"PK\x03\x04\xff\xfe")
    return tmp_path


def render(folder: Path, **changes: Any):
    content = {key: value for key, value in {**JOB, **changes}.items() if value is not None}
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    return render_file(folder / "job.yaml")


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


def test_a_job_has_an_index_for_each_campaign(folder: Path) -> None:
    rendered = render(folder)
    config, job = rendered.manifests
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 1)
    assert spec["backoffLimitPerIndex"] == 2
    assert spec["ttlSecondsAfterFinished"] == 7 * 86_400
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == [
        "run", "/etc/burnish/campaign-$(BURNISH_INDEX).yaml", "--work", "/var/lib/burnish/nightly/$(BURNISH_INDEX)",
    ]  # fmt: skip
    known = environment(container)
    assert "job-completion-index" in known["BURNISH_INDEX"]["fieldRef"]["fieldPath"]
    assert known["MLFLOW_TRACKING_URI"] == "http://mlflow.mlflow:5000"
    assert known["BURNISH_STORE"] == "s3://models/burnish"
    assert container["envFrom"] == [{"secretRef": {"name": "s3-credentials"}}]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "16Gi", "nvidia.com/gpu": 1}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert pod["nodeSelector"] == JOB["node_selector"]
    assert pod["tolerations"] == JOB["tolerations"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 60
    assert pod["automountServiceAccountToken"] is False
    assert {"name": "work", "persistentVolumeClaim": {"claimName": "burnish-work"}} in pod["volumes"]
    # A verdict without a winner is no reason to begin again; a node that is drained is.
    ignored, final = spec["podFailurePolicy"]["rules"]
    assert (final["action"], final["onExitCodes"]["values"]) == ("FailIndex", [1, 2, 3, 5])
    assert ignored["onPodConditions"][0]["type"] == "DisruptionTarget"

    assert config["data"].keys() == {"campaign-0.yaml", "campaign-1.yaml"}
    assert "letters.onnx" in config["data"]["campaign-1.yaml"]
    assert base64.b64decode(config["binaryData"]["held-out.npz"]) == b"PK\x03\x04\xff\xfe"
    assert config["immutable"] is True
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in pod["volumes"]
    assert rendered.warnings == ()
    assert list(yaml.safe_load_all(as_yaml(rendered.manifests))) == [config, job]


def test_other_content_is_another_config_map_and_the_same_is_the_same(folder: Path) -> None:
    first, again = render(folder), render(folder)
    assert first == again
    (folder / "digits.yaml").write_text(CAMPAIGN.format(name="digits") + "seed: 7\n")
    changed = render(folder)
    assert changed.config["metadata"]["name"] != first.config["metadata"]["name"]
    assert changed.jobs[0]["metadata"]["labels"] != first.jobs[0]["metadata"]["labels"]


def test_a_rayjob_is_made_for_each_campaign_with_a_cluster_of_its_own(folder: Path) -> None:
    ray = {"version": "2.60.0", "workers": 3, "worker": {"cpu": "2", "gpus": 1}}
    rendered = render(folder, kind="rayjob", ray=ray, gpus=0, level="quick")
    assert [job["metadata"]["name"] for job in rendered.jobs] == ["nightly-0", "nightly-1"]
    spec = rendered.jobs[1]["spec"]
    assert (
        spec["entrypoint"] == "burnish run /etc/burnish/campaign-1.yaml --work /var/lib/burnish/nightly/1 --level quick"
    )
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == "2.60.0"
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert environment(head)["BURNISH_ENGINE"] == "ray"
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    worker = group["template"]["spec"]["containers"][0]
    assert worker["resources"]["limits"] == {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": 1}
    assert environment(worker)["BURNISH_STORE"] == "s3://models/burnish"
    assert spec["shutdownAfterJobFinishes"] is True
    (one,) = render(folder, kind="rayjob", campaigns=["digits.yaml"]).jobs
    assert one["metadata"]["name"] == "nightly"


def test_what_may_not_be_meant_is_said(folder: Path) -> None:
    rendered = render(folder, work=None, image="registry.example/burnish-job-cpu:1")
    assert rendered.warnings[0].startswith("no `work:` claim is named")
    assert "looks like the one for CPUs" in rendered.warnings[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "hunter2"}}, "looks like a secret"),
        ({"environment": {"API_TOKEN": "hunter2"}}, "looks like a secret"),
        ({"environment": {"BURNISH_STORE": "/x"}}, "set by burnish itself"),
        ({"mlflow": "http://user:hunter2@mlflow:5000"}, "without credentials"),
        ({"mlflow": None}, "one tracking server"),
        ({"mlflow_secret": {"name": "mlflow", "key": "uri"}}, "one tracking server"),
        ({"store": "s3://user:hunter2@bucket/x"}, "as one with credentials has"),
        ({"store": "ftp://x"}, "no way to place anything at ftp"),
        ({"grace_s": 5}, "too short for servers to be ended"),
        ({"memory": "much"}, "memory"),
        ({"gpus": -1}, "gpus"),
        ({"volumes": [{"claim": "m", "path": "models"}]}, "no absolute path"),
        ({"kind": "rayjob", "store": None}, "share what they make"),
        ({"ray": {"workers": 4}}, "`ray:` is for `kind: rayjob`"),
        ({"campaigns": ["digits.yaml", "digits.yaml"]}, "digits.yaml is given twice"),
        ({"nodeselector": {}}, "node_selector"),
        ({"campaigns": ["missing.yaml"]}, "missing.yaml"),
        ({"volumes": []}, "no container has '/models/digits.onnx'"),
        ({"files": []}, "no container has 'held-out.npz'"),
        ({"files": ["held-out.npz", "gone.py"]}, "nothing at .*gone.py"),
        ({"files": ["held-out.npz", "other/campaign-1.yaml"]}, "cannot hold 'campaign-1.yaml' beside the campaigns"),
        ({"files": ["held-out.npz", "my notes.txt"]}, "cannot hold 'my notes.txt'"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_it_is_sent(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        render(folder, **changes)
    assert "hunter2" not in str(raised.value)


def test_a_campaign_with_a_tracking_store_of_its_own_is_refused(folder: Path) -> None:
    (folder / "digits.yaml").write_text(CAMPAIGN.format(name="digits") + "registry: {tracking_uri: 'sqlite:///x.db'}\n")
    with pytest.raises(InputError, match="stands in the way of the job's own tracking server"):
        render(folder)


@pytest.mark.parametrize("champion", ["../earlier", "{work: /elsewhere, candidate: int8}"])
def test_a_champion_that_no_container_has_is_refused(folder: Path, champion: str) -> None:
    campaign = CAMPAIGN.format(name="digits")
    (folder / "digits.yaml").write_text(f"{campaign}champion: {champion}\n")
    with pytest.raises(InputError, match=r"no container has '(\.\./earlier|/elsewhere)'"):
        render(folder)
    for there in ("models:/digits@champion", "/models/earlier", "/var/lib/burnish/weekly/0"):
        (folder / "digits.yaml").write_text(f"{campaign}champion: {there}\n")
        render(folder)


def test_files_that_no_config_map_holds_are_refused(folder: Path) -> None:
    (folder / "held-out.npz").write_bytes(bytes(900_000))
    with pytest.raises(InputError, match=r"have 1\.2 MB together"):
        render(folder)


# --- the schemas ---------------------------------------------------------------------------------------------------


def test_kubernetes_own_schema_finds_what_is_wrong_with_a_job(folder: Path) -> None:
    job = render(folder).jobs[0]
    check_manifest(job)
    wrong = copy.deepcopy(job)
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(InputError, match=r"Job is not what Kubernetes takes: spec\.template\.spec: .*terminationGrace"):
        check_manifest(wrong)
    wrong = copy.deepcopy(job)
    wrong["spec"]["completions"] = "2"
    with pytest.raises(InputError, match=r"spec\.completions"):
        check_manifest(wrong)
    with pytest.raises(InputError, match="there is no schema for batch/v9 Job"):
        check_manifest({**job, "apiVersion": "batch/v9"})


def test_our_schema_finds_what_is_wrong_with_a_rayjob(folder: Path) -> None:
    job = render(folder, kind="rayjob").jobs[0]
    for change, words in (
        (lambda spec: spec.update(entryPoint="x"), r"entryPoint"),
        (lambda spec: spec.pop("rayClusterSpec"), r"rayClusterSpec"),
        (lambda spec: spec.update(shutdownAfterJobFinishes=False), r"needs shutdownAfterJobFinishes"),
        (lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplicas=1), r"not between"),
        (lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(a=1), r"rayStartParams"),
    ):
        wrong = json.loads(json.dumps(job))
        change(wrong["spec"])
        with pytest.raises(InputError, match=f"by burnish's own schema.*{words}"):
            check_manifest(wrong)
    wrong = json.loads(json.dumps(job))
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["contianers"] = []
    with pytest.raises(InputError, match="the Pod is not what Kubernetes takes"):
        check_manifest(wrong)
