"""The section ``cluster:``: what it takes, and what it says of the rest, all in one message and without secrets."""

import re
from pathlib import Path
from typing import Any

import pytest

from optimize.cluster_config import KubernetesConfig, LocalConfig, SchedulerConfig, load_cluster
from optimize.clusters import owner_of
from optimize.config import CampaignConfig
from registry.documents import parse_document
from registry.errors import DocumentError
from tests.doubles.campaigns import artifact
from tests.doubles.candidates import candidate

REST = """
name: tiny
sources: [{onnx: model.onnx}]
samples: {evaluation: evaluation.npz}
"""
SCHEDULER = "kind: scheduler, address: 'core2:9004', mesh: 'core2:9000', servers: {mlserver: bench, triton: gpu}"
KUBERNETES = "kind: kubernetes, namespace: models, mesh: 'mesh:80', servers: {mlserver: bench, triton: gpu}"


def parsed(cluster: str, serving: str = "[{server: mlserver}]") -> CampaignConfig:
    text = f"{REST}serving: {serving}\ncluster: {{{cluster}}}\n"
    return parse_document(text, CampaignConfig, name="campaign.yaml")


def refused(cluster: str, serving: str = "[{server: mlserver}]") -> str:
    with pytest.raises(DocumentError) as caught:
        parsed(cluster, serving)
    return caught.value.message


def test_this_machine_is_the_default() -> None:
    assert parse_document(REST, CampaignConfig, name="c").cluster == LocalConfig()
    assert parsed("kind: local").cluster == LocalConfig()


def test_a_scheduler_and_kubernetes_are_read() -> None:
    more = "storage: 's3://models/tiny', storage_uri: 'minio://models/tiny', memory_mb: 512"
    found = parsed(f"{SCHEDULER}, {more}, tls: {{ca: ca.crt, certificate: us.crt, key: us.key}}").cluster
    assert isinstance(found, SchedulerConfig)
    assert found.host_and_port == ("core2", 9004)
    assert found.memory_of(candidate(), artifact("x", 10)) == 512_000_000
    found = parsed(f"{KUBERNETES}, storage: shelf, storage_uri: /mnt/models, secret: rclone, context: staging").cluster
    assert isinstance(found, KubernetesConfig)
    assert found.storage_in(Path("/campaigns")) == "/campaigns/shelf"
    assert found.storage_in(Path("/elsewhere")) == "/elsewhere/shelf"
    assert found.memory_of(candidate(), artifact("x", 10)) == 10


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ("kind: core2", "must be one of 'local', 'scheduler', 'kubernetes'"),
        ("address: 'core2:9004'", "the key 'kind' is missing"),
        ("kind: local, mesh: 'core2:9000'", "unknown key 'mesh'; the keys here are: kind"),
        (f"{SCHEDULER}, storage: shelf, adress: x", "unknown key 'adress'; did you mean 'address'?"),
        (SCHEDULER, "cluster.storage: the key is missing; add it"),
        (f"{SCHEDULER}, storage: 's3://models'", "give storage_uri, NAME://bucket/prefix"),
        (f"{SCHEDULER}, storage: 's3://models/a', storage_uri: 'x://models/b'", "is not where s3://models/a is"),
        (f"{SCHEDULER}, storage: 'ftp://models'", "there is no way to place anything at ftp:"),
        (f"{SCHEDULER}, storage: shelf, tls: {{key: us.key}}", "certificate and key go together"),
        (f"{SCHEDULER}, storage: shelf, workers: -1", "cluster.workers: -1: must be greater than or equal to 0"),
        (f"{KUBERNETES.replace('models', 'My_Models')}, storage: shelf", "cluster.namespace: 'My_Models'"),
        (f"{KUBERNETES}, storage: shelf, core2_version: '2.9'", "core2_version: '2.9': must be '2.6' or '2.10'"),
        (f"{KUBERNETES}, storage: shelf, secret: my_secret", "cluster.secret: 'my_secret': Names have small letters"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(cluster: str, words: str) -> None:
    message = refused(cluster)
    assert words in message
    assert message.startswith("campaign.yaml:")
    assert "\n" not in message


@pytest.mark.parametrize(
    "address", ["core2", "http://core2:9004", "core2:0", "core2:70000", "core 2:9004", ":9004", ""]
)
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    told = SCHEDULER.replace("address: 'core2:9004'", f"address: '{address}'")
    assert "is not host:port" in refused(f"{told}, storage: shelf")


@pytest.mark.parametrize("key", ["address", "mesh", "storage", "storage_uri"])
def test_a_password_is_refused_and_not_shown(key: str) -> None:
    fields = {"address": "core2:9004", "mesh": "core2:9000", "storage": "s3://models", "storage_uri": "x://models"}
    fields[key] = f"s3://me:hush@{fields[key].removeprefix('s3://')}"
    message = refused(f"kind: scheduler, {', '.join(f'{name}: {value!r}' for name, value in fields.items())}")
    assert "a user or password does not belong into a file" in message
    assert "hush" not in message


def test_an_at_in_the_name_of_a_folder_is_none() -> None:
    found = parsed(f"{SCHEDULER}, storage: /srv/models@2").cluster
    assert isinstance(found, SchedulerConfig)
    assert found.storage_in(Path("/campaigns")) == "/srv/models@2"


def test_a_password_of_the_tracking_store_is_not_shown() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_document(f"{REST}registry: {{tracking_uri: 'https://me:hush@mlflow'}}\n", CampaignConfig, name="c")
    assert "a password does not belong into a file" in caught.value.message
    assert "hush" not in caught.value.message


@pytest.mark.parametrize(
    ("cluster", "serving", "words"),
    [
        ("kind: local", "[{server: triton, backend: onnxruntime}]", "has the python backend alone"),
        (SCHEDULER, "[{server: mlserver, backend: python}]", "mlserver has the backend burnish, not python"),
        (SCHEDULER, "[{server: triton, backend: burnish}]", "triton has the backend python, onnxruntime and openvino"),
        (SCHEDULER, "[{server: triton, backend: tensorrt}]", "must be 'burnish', 'python', 'onnxruntime' or"),
        (SCHEDULER, "[{server: triton, backend: openvino}]", "the first of serving is the baseline's"),
        (SCHEDULER, "[{server: mlserver, parallel_workers: 1}]", "the cluster's MLServer has 0 (cluster.workers)"),
        (SCHEDULER.replace("mlserver: bench, ", ""), "[{server: mlserver}]", "cluster.servers.mlserver"),
    ],
)  # fmt: skip
def test_what_is_served_fits_who_serves_it(cluster: str, serving: str, words: str) -> None:
    message = refused(cluster + ("" if cluster == "kind: local" else ", storage: shelf"), serving)
    assert words in message
    assert "\n" not in message


def test_triton_has_its_own_backends_on_a_core_2() -> None:
    serving = "[{server: triton}, {server: triton, backend: onnxruntime}, {server: triton, backend: openvino}]"
    found = [entry.profile() for entry in parsed(f"{SCHEDULER}, storage: shelf", serving).serving]
    assert [one.backend for one in found] == ["python", "onnxruntime", "openvino"]
    assert [one.of_server for one in found] == [False, True, True]
    assert len({one.key for one in found}) == 3


def test_a_file_with_nothing_but_a_cluster(tmp_path: Path) -> None:
    assert load_cluster(None) == LocalConfig()
    path = tmp_path / "cluster.yaml"
    path.write_text(f"cluster: {{{KUBERNETES}, storage: shelf}}\n")
    assert isinstance(load_cluster(path), KubernetesConfig)
    path.write_text(f"{REST}cluster: {{kind: local}}\n")
    with pytest.raises(DocumentError, match="unknown key 'name'"):
        load_cluster(path)


def test_an_owner_stays_and_is_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = owner_of(tmp_path)
    assert owner_of(tmp_path) == first
    assert owner_of(tmp_path / "other") != first


def test_what_was_written_before_is_still_read() -> None:
    fields: dict[str, Any] = {"server": "triton", "protocol": "rest"}
    config = CampaignConfig.model_validate(
        {"name": "a", "sources": [{"onnx": "m"}], "samples": {"evaluation": "e"}, "serving": [fields]}
    )
    assert config.serving[0].profile().backend == "python"


HOWTO = Path(__file__).parents[3] / "docs" / "howto" / "run-on-core2.md"


def test_the_examples_of_the_page_are_campaigns() -> None:
    whole, section = re.findall(r"```yaml\n(.*?)```", HOWTO.read_text(), re.DOTALL)
    config = parse_document(whole, CampaignConfig, name="whole")
    assert isinstance(config.cluster, SchedulerConfig)
    rest = re.sub(r"^(cluster|serving):\n(?:[ #].*\n|\n)*", "", whole, flags=re.MULTILINE)
    config = parse_document(rest + section, CampaignConfig, name="section")
    assert isinstance(config.cluster, KubernetesConfig)
    assert [entry.profile().backend for entry in config.serving] == ["burnish", "onnxruntime"]
