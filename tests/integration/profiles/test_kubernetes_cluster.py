"""Core 2's resources, and candidates served by them, against a double of the Kubernetes API on real connections."""

import datetime
import ipaddress
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from profiles.deploy import kubernetes_client
from profiles.deploy.core2_candidates import Core2Options
from profiles.deploy.kubernetes import KubernetesCluster
from profiles.deploy.kubernetes_client import MANAGER, KubernetesClient
from profiles.deploy.kubernetes_resources import CAMPAIGN, RUN, FieldChange, read_state
from profiles.serving.core2.manifests import render_autoscaler, render_experiment, render_server
from profiles.serving.naming import model_name_of
from registry.errors import BurnishError, InputError, ServerDiedError, UnreachableError
from registry.records import Artifact, ServingProfile, TensorSpec
from registry.store import FolderStore
from tests.doubles.busy import ends_in_vain, until
from tests.doubles.candidates import candidate
from tests.doubles.kubernetes_api import LOOPBACK, KubernetesDouble, RefusalError

pytestmark = pytest.mark.slow

TOKEN = "hush-hush"
WAIT_S = 30.0
"""Longest wait for what comes about."""
NEVER_S = 0.2
"""First wait for what does not."""
MARKS = {CAMPAIGN: "camp", RUN: "one"}
SPEC = {"storageUri": "s3://models/digits", "requirements": ["mlserver"], "replicas": 1}


@pytest.fixture
def double() -> Iterator[KubernetesDouble]:
    with KubernetesDouble() as api:
        api.token = TOKEN
        yield api


@pytest.fixture
def client(double: KubernetesDouble, tmp_path: Path) -> Iterator[KubernetesClient]:
    with KubernetesClient(kubeconfig=double.kubeconfig(tmp_path, token=TOKEN), timeout_s=WAIT_S) as opened:
        yield opened


def model(name: str = "digits", labels: dict[str, str] = MARKS, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "mlops.seldon.io/v1alpha1",
        "kind": "Model",
        "metadata": {"name": name, "labels": labels},
        "spec": {**SPEC, **spec},
    }


def in_vain(client: KubernetesClient, manifest: dict[str, Any], words: str) -> None:
    """Applies a model that does not get ready, and waits until that is said in these words."""
    applied = client.apply(manifest)
    ends_in_vain(lambda limit_s: client.wait(applied, timeout_s=limit_s), words, first_s=NEVER_S)


def serve(client: KubernetesClient, manifest: dict[str, Any], timeout_s: float = WAIT_S) -> Any:
    return client.wait(client.apply(manifest), timeout_s=timeout_s)


# --- resources -------------------------------------------------------------------------------------------------------


def test_a_model_is_applied_waited_for_and_deleted(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.load_s = double.unload_s = 0.1
    found = serve(client, model())
    assert (found.state, found.server, found.available_replicas) == ("ModelAvailable", "mlserver", 1)
    assert "watch" in double.verbs()
    (patch,) = [query for verb, *_, query in double.asked if verb == "patch"]
    assert (patch["fieldManager"], patch["fieldValidation"], patch.get("force")) == (MANAGER, "Strict", None)
    stored = client.read("Model", "digits")
    assert stored is not None
    client.delete(stored)
    client.wait_until_deleted("Model", "digits", stored["metadata"]["uid"], timeout_s=WAIT_S)
    assert double.names() == []
    client.delete(stored)


def test_a_stale_ready_of_a_changed_model_is_no_success(double: KubernetesDouble, client: KubernetesClient) -> None:
    serve(client, model())
    double.stale_s = double.load_s = 0.1
    applied = client.apply(model(storageUri="s3://models/other"))
    assert applied.generation == 2
    client.wait(applied, timeout_s=WAIT_S)
    changed = [event[3] for event in double._events if event[3]["metadata"]["generation"] == 2]
    states = [resource["status"]["conditions"][0]["message"] for resource in changed]
    assert states == ["ModelAvailable", "ModelProgressing", "ModelAvailable"]
    assert read_state(changed[0]).ready


def test_a_status_that_never_changes_after_a_change_is_no_success(
    double: KubernetesDouble, client: KubernetesClient
) -> None:
    serve(client, model())
    double.rolling = True
    words = "not ready after {limit} s: its status is of before the change"
    in_vain(client, model(storageUri="s3://models/other"), words)


def test_the_same_manifest_again_is_ready_at_once(double: KubernetesDouble, client: KubernetesClient) -> None:
    serve(client, model())
    double.rolling = True
    assert serve(client, model()).ready
    assert double.get("digits")["metadata"]["generation"] == 1


def test_a_partly_available_model_is_waited_for(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.available = 1
    in_vain(client, model(replicas=2), "in the state ModelAvailable, with 1 of 2 replicas")
    double.counts_available = False
    assert serve(client, model("older", replicas=2)).available_replicas is None


def test_a_model_that_takes_too_long_is_told_with_its_state(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.load_s = 600
    in_vain(client, model(), "Model digits is not ready .* in the state ModelProgressing")


def test_a_model_that_does_not_load_says_why(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.failures[SPEC["storageUri"]] = "rclone: directory not found\n  at s3"
    with pytest.raises(UnreachableError) as caught:
        serve(client, model())
    assert caught.value.message == "Core 2 could not load digits on mlserver: rclone: directory not found at s3"
    assert caught.value.exit_code == 4
    assert SPEC["storageUri"] in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ({"requirements": ["onnx", "gpu"]}, "No Server has all of these capabilities: onnx, gpu."),
        ({"memory": "90Gi"}, "mlserver can run it; so look for 90Gi on each of 1 replicas."),
        ({"server": "gone"}, "There is no Server 'gone'; there are: mlserver."),
    ],
)
def test_a_model_that_no_server_takes(
    double: KubernetesDouble, client: KubernetesClient, spec: dict[str, Any], hint: str
) -> None:
    double.put("servers", "mlserver", {"serverConfig": "mlserver", "replicas": 1})
    double.capabilities = set()
    client.read("Server", "mlserver")
    with pytest.raises(UnreachableError, match="cannot schedule digits: Failed to schedule model") as caught:
        serve(client, model(**spec))
    assert caught.value.hint == hint


def test_servers_that_are_not_ready_are_named(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.capabilities = set()
    with pytest.raises(UnreachableError) as caught:
        serve(client, model())
    assert caught.value.hint == "No Server has all of these capabilities: mlserver."
    double.load_s = 600
    double.put("servers", "mine", {"serverConfig": "own", "capabilities": ["mlserver"], "replicas": 1})
    double.load_s = 0
    with pytest.raises(UnreachableError) as caught:
        serve(client, model("second"))
    assert caught.value.hint == "None of these Servers is ready: mine."
    double.refuse("list", RefusalError(403, "Forbidden", "no"))
    with pytest.raises(UnreachableError) as caught:
        serve(client, model("third"))
    assert caught.value.hint == "It needs a Server with mlserver."


def test_a_model_that_somebody_deletes_or_replaces_while_it_loads(
    double: KubernetesDouble, client: KubernetesClient
) -> None:
    double.load_s = 600
    applied = client.apply(model())
    double.remove("digits")
    with pytest.raises(UnreachableError, match="somebody deleted the Model digits in seldon"):
        client.wait(applied, timeout_s=WAIT_S)
    applied = client.apply(model())
    double.remove("digits")
    double.put("models", "digits", SPEC)
    double.expired = 1
    with pytest.raises(UnreachableError, match="somebody replaced the Model digits in seldon"):
        client.wait(applied, timeout_s=WAIT_S)


def test_a_delete_is_of_what_was_read_and_nothing_else(double: KubernetesDouble, client: KubernetesClient) -> None:
    client.apply(model())
    read = client.read("Model", "digits")
    double.remove("digits")
    double.put("models", "digits", SPEC)
    with pytest.raises(UnreachableError, match="somebody else changed it at the time of delete Model digits"):
        client.delete(read or {})
    assert double.names() == ["digits"]


def test_a_model_that_is_not_gone_in_time(double: KubernetesDouble, client: KubernetesClient) -> None:
    applied = client.apply(model())
    double.unload_s = 600
    client.delete(applied.resource)
    told = ends_in_vain(
        lambda limit_s: client.wait_until_deleted("Model", "digits", applied.uid, timeout_s=limit_s),
        "Model digits is not deleted after {limit} s",
    )
    assert "finalizer" in (told.hint or "")


# --- watches ---------------------------------------------------------------------------------------------------------


@contextmanager
def loaded_once(double: KubernetesDouble, seen: Callable[[], object]) -> Iterator[None]:
    """A Model that is applied in the block is loaded as soon as this was seen, and not before."""

    def finish() -> None:
        until(seen)
        double.hurry()

    double.load_s = 600
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(finish)
        yield
        finished.result()


@pytest.mark.parametrize("how", ["event", "status"])
def test_a_version_that_is_forgotten_is_listed_again(
    double: KubernetesDouble, client: KubernetesClient, how: str
) -> None:
    if how == "event":
        double.expired = 2
    else:
        double.refuse("watch", RefusalError(410, "Expired", "too old resource version"), times=2)
    with loaded_once(double, lambda: double.verbs().count("list") >= 2):
        assert serve(client, model()).ready


def test_a_watch_that_ends_early_is_begun_again(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.watch_s, began = 0.01, time.monotonic()
    with loaded_once(double, lambda: double.verbs().count("watch") >= 5):
        assert serve(client, model()).ready
    # Not at once: there is a pause before each.
    assert double.verbs().count("watch") <= 2 + (time.monotonic() - began) / kubernetes_client._POLL_S


def test_a_watch_that_fails_is_begun_again(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.load_s = 0.1
    double.refuse("watch", RefusalError(500, "InternalError", "etcd"))
    assert serve(client, model()).ready


def test_a_watch_that_is_refused_is_told(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.load_s = 600
    double.refuse("watch", RefusalError(403, "Forbidden", "models is forbidden"))
    with pytest.raises(UnreachableError, match=r"may not watch models\.mlops\.seldon\.io in the namespace seldon"):
        serve(client, model())


# --- refusals --------------------------------------------------------------------------------------------------------

FORBIDDEN = 'models.mlops.seldon.io "digits" is forbidden: User "us" cannot patch resource'
REFUSALS: dict[str, tuple[RefusalError, str, int]] = {
    "forbidden": (
        RefusalError(403, "Forbidden", FORBIDDEN),
        r"may not patch models\.mlops\.seldon\.io in the namespace seldon \(403\): .* is forbidden",
        4,
    ),
    "invalid": (
        RefusalError(422, "Invalid", "spec.x: wrong\nvalue"),
        r"refused the Model digits \(422\): spec\.x: wr",
        2,
    ),
    "unknown": (
        RefusalError(400, "BadRequest", "unknown field"),
        r"refused the Model digits \(400\): unknown field",
        2,
    ),
    "busy": (RefusalError(429, "TooMany", "later", retry_after=60), r"has no time for patch Model digits \(429\)", 4),
    "down": (
        RefusalError(503, "Down", "", text="no healthy upstream"),
        r"has no time for patch Model digits \(503\)",
        4,
    ),
    "broken": (RefusalError(500, "InternalError", "etcd"), r"failed at patch Model digits \(500\): etcd", 4),
    "html": (RefusalError(502, "", "", text="<html>"), r"failed at patch Model digits \(502\): Bad Gateway", 4),
    "list": (RefusalError(500, "", "", text="[1]"), r"failed at patch Model digits \(500\): Internal Server Error", 4),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_told_in_one_line(double: KubernetesDouble, client: KubernetesClient, name: str) -> None:
    refusal, words, code = REFUSALS[name]
    double.refuse("patch", refusal)
    with pytest.raises(BurnishError, match=words) as caught:
        client.apply(model())
    assert caught.value.exit_code == code
    assert "\n" not in caught.value.message
    assert double.names() == []


def test_a_server_that_is_busy_is_asked_again(double: KubernetesDouble, client: KubernetesClient) -> None:
    for verb in ("get", "patch", "watch"):
        double.refuse(verb, RefusalError(429, "TooManyRequests", "later", retry_after=0))
    double.load_s = 0.1
    assert serve(client, model()).ready


def test_an_expired_token(double: KubernetesDouble, client: KubernetesClient, caplog: pytest.LogCaptureFixture) -> None:
    double.token = "another"
    with caplog.at_level(logging.DEBUG), pytest.raises(UnreachableError, match=r"\(401\)") as caught:
        client.apply(model())
    assert "log in again" in (caught.value.hint or "")
    assert TOKEN not in str(caught.value) + caplog.text + repr(client)


def test_core_2_is_not_installed(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.installed = set()
    with pytest.raises(UnreachableError, match=r"has no resource models\.mlops\.seldon\.io/v1alpha1") as caught:
        client.apply(model())
    assert "Install Core 2" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["digits", "nowhere"])
def test_a_namespace_that_is_not_there(double: KubernetesDouble, tmp_path: Path, name: str) -> None:
    path = double.kubeconfig(tmp_path, token=TOKEN)
    with (
        KubernetesClient(kubeconfig=path, context="elsewhere") as client,
        pytest.raises(InputError, match="there is no namespace nowhere"),
    ):
        client.apply(model(name))


def test_core_2s_own_checks_of_a_manifest(double: KubernetesDouble, client: KubernetesClient) -> None:
    with pytest.raises(InputError, match=r"\(400\): strict decoding error: unknown field \"spec\.batching\""):
        client.apply(model(batching=8))
    with pytest.raises(InputError, match=r"\(422\): .* spec\.storageUri: Required value"):
        client.apply({**model(), "spec": {"replicas": 1}})


# --- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["get", "patch"])
def test_a_connection_lost_once_is_made_good_and_twice_is_the_end(
    double: KubernetesDouble, client: KubernetesClient, verb: str
) -> None:
    double.put("models", "other", SPEC)
    double.lost[verb] = 1
    client.apply(model()) if verb == "patch" else client.read("Model", "other")
    double.lost[verb] = 2
    with pytest.raises(
        UnreachableError, match=r"Kubernetes API at http://127\.0\.0\.1:\d+ cannot be reached"
    ) as caught:
        client.apply(model()) if verb == "patch" else client.read("Model", "other")
    assert "\n" not in caught.value.message
    assert double.lost[verb] == 0


def test_a_call_that_is_not_answered_in_time(double: KubernetesDouble, tmp_path: Path) -> None:
    double.late_s["get"] = 600
    path = double.kubeconfig(tmp_path, token=TOKEN)

    def ask(timeout_s: float) -> None:
        with KubernetesClient(kubeconfig=path, timeout_s=timeout_s) as hasty:
            hasty.read("Model", "digits")

    ends_in_vain(ask, r"did not answer get Model digits within (0\.05|1\.\d+|2|19\.\d+|20) s", first_s=0.05)


def test_nobody_listens(double: KubernetesDouble, tmp_path: Path) -> None:
    path = double.kubeconfig(tmp_path)
    path.write_text(path.read_text().replace(double.url, "http://127.0.0.1:1"))
    with KubernetesClient(kubeconfig=path) as client, pytest.raises(UnreachableError, match="refused") as caught:
        client.read("Model", "digits")
    assert "object at" not in caught.value.message


def certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) that is its own authority, for loopback."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))]), critical=False)
        .add_extension(x509.BasicConstraints(True, None), critical=True)
    )
    public, private = folder / "tls.crt", folder / "tls.key"
    public.write_bytes(built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    return public, private


def test_tls_is_verified(tmp_path: Path) -> None:
    public, private = certificate(tmp_path)
    with KubernetesDouble(certificate=(public, private)) as double:
        double.token = TOKEN
        trusted = {"certificate-authority": str(public)}
        with KubernetesClient(kubeconfig=double.kubeconfig(tmp_path, token=TOKEN, **trusted)) as client:
            assert client.read("Model", "digits") is None
        asked = len(double.asked)
        with (
            KubernetesClient(kubeconfig=double.kubeconfig(tmp_path, token=TOKEN)) as client,
            pytest.raises(UnreachableError, match=r"cannot be trusted: .*certificate verify failed"),
        ):
            client.read("Model", "digits")
        assert len(double.asked) == asked


# --- whose a resource is ---------------------------------------------------------------------------------------------


def test_a_resource_of_somebody_else_is_not_taken_over(double: KubernetesDouble, client: KubernetesClient) -> None:
    double.put("models", "digits", SPEC)
    double.put("models", "other", SPEC, **{CAMPAIGN: "theirs"})
    with pytest.raises(InputError, match="is a Model digits in seldon already, which is not of burnish's making"):
        client.apply(model())
    with pytest.raises(InputError, match="which the campaign theirs made"):
        client.dry_run(model("other"))
    with pytest.raises(InputError, match="has no labels"):
        client.apply(model("new", labels={}))
    assert "patch" not in double.verbs()


def test_a_field_that_somebody_else_set_is_theirs(double: KubernetesDouble, client: KubernetesClient) -> None:
    client.apply(model())
    double.put("models", "digits", {**SPEC, "replicas": 5}, manager="kubectl-edit")
    with pytest.raises(InputError, match=r"\(409\): kubectl-edit has set \.spec\.replicas") as caught:
        client.apply(model(replicas=2))
    assert caught.value.exit_code == 2
    assert double.get("digits")["spec"]["replicas"] == 5
    # What is left out is left alone.
    spec = {key: value for key, value in model()["spec"].items() if key != "replicas"}
    client.apply({**model(), "spec": {**spec, "storageUri": "s3://models/new"}})
    assert double.get("digits")["spec"]["replicas"] == 5


def test_a_field_that_burnish_set_in_another_way_is_its_own(double: KubernetesDouble, client: KubernetesClient) -> None:
    client.apply(model())
    double.give("models", "digits", MANAGER)
    client.apply(model(replicas=2))
    assert double.get("digits")["spec"]["replicas"] == 2
    assert [query.get("force") for verb, *_, query in double.asked if verb == "patch"] == [None, None, "true"]


def test_a_dry_run_says_what_would_change_and_changes_nothing(
    double: KubernetesDouble, client: KubernetesClient
) -> None:
    made = client.dry_run(model())
    assert (made.action, made.kind, made.name) == ("create", "Model", "digits")
    assert FieldChange(path="spec.replicas", before=None, after=1) in made.fields
    assert double.names() == []
    client.apply(model())
    changed = client.dry_run(model(replicas=2))
    assert changed.action == "change"
    assert changed.fields == (FieldChange(path="spec.replicas", before=1, after=2),)
    assert client.dry_run(model()).action == "none"
    assert double.get("digits")["metadata"]["generation"] == 1


# --- candidates ------------------------------------------------------------------------------------------------------

TENSOR = TensorSpec(name="x", dtype="float32", shape=("n", 4))
Artifacts = tuple[Artifact, Path]


@pytest.fixture
def artifact(tmp_path: Path) -> Artifacts:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights" * 1000)
    store = FolderStore(tmp_path / "store")
    found = store.add(folder, format="onnx", entry="model.onnx", inputs=(TENSOR,), outputs=(TENSOR,))
    return found, store.path(found)


def cluster_of(double: KubernetesDouble, client: KubernetesClient, **fields: Any) -> KubernetesCluster:
    def place(artifact: Artifact, files: Path) -> str:
        assert sorted(file.path for file in artifact.files) == ["model-settings.json", "model.onnx"]
        assert all((files / file.path).stat().st_size == file.size_bytes for file in artifact.files)
        return f"s3://models/{artifact.digest}"

    run = fields.pop("run", "one")
    told = {"mesh": double.mesh, "place": place, "owner": "camp", "unload_s": WAIT_S}
    return KubernetesCluster(client, Core2Options(**{**told, **fields}), run=run)


def test_a_candidate_is_served_and_taken_away(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts
) -> None:
    double.put("models", "theirs", SPEC)
    double.load_s = double.unload_s = 0.05
    one, two = candidate(), candidate(variant="mlp/int8", max_batch_size=8, max_batch_delay_ms=2.0, protocol="rest")
    with cluster_of(double, client, servers={"mlserver": "mlserver"}) as cluster:
        first = cluster.deploy(one, *artifact, timeout_s=WAIT_S)
        second = cluster.deploy(two, *artifact, timeout_s=WAIT_S)
        assert double.names() == sorted(["theirs", model_name_of(one), model_name_of(two)])
        assert first.target.url == double.mesh
        assert first.target.headers == {"seldon-model": first.target.model}
        assert second.target.protocol == "rest"
        assert first.load_time_s >= 0.05
        assert first.usage() == first.usage()
        assert first.usage().cpu_s is None
        stored = double.get(second.target.model)
        first.undeploy()
        first.undeploy()
        assert double.names() == sorted(["theirs", model_name_of(two)])
        with pytest.raises(ServerDiedError, match="its Model is gone"):
            first.usage()
    assert double.names() == ["theirs"]
    assert stored["metadata"]["labels"] == {
        CAMPAIGN: "camp",
        RUN: "one",
        "burnish.candidate": two.id,
        "burnish.variant": two.variant_id,
    }
    assert stored["spec"]["storageUri"] == second.uri
    assert stored["spec"]["requirements"] == ["mlserver", "burnish"]
    assert stored["spec"]["server"] == "mlserver"
    assert {"name": "max_batch_size", "value": "8"} in stored["spec"]["parameters"]


def test_a_model_of_somebody_else_is_neither_taken_over_nor_deleted(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts
) -> None:
    name = model_name_of(candidate())
    for labels, words in (({}, "which somebody else made"), ({CAMPAIGN: "other"}, "which the campaign other made")):
        double.put("models", name, SPEC, **labels)
        with cluster_of(double, client) as cluster, pytest.raises(InputError, match=words):
            cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
    assert double.get(name)["spec"] == SPEC
    assert not {"patch", "delete"} & set(double.verbs())


def test_what_a_killed_run_left_is_made_anew(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts
) -> None:
    cluster_of(double, client, run="zero").deploy(candidate(), *artifact, timeout_s=WAIT_S)
    before = double.get(model_name_of(candidate()))["metadata"]["uid"]
    double.unload_s = 0.05
    with cluster_of(double, client) as cluster:
        deployment = cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        assert deployment.applied.uid != before
    assert double.names() == []


@pytest.mark.parametrize("failure", ["schedule", "load", "time", "mesh", "lost", "refused"])
def test_a_candidate_that_does_not_come_about_leaves_nothing(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts, failure: str
) -> None:
    double.put("models", "theirs", SPEC)
    with cluster_of(double, client) as cluster:
        kept = cluster.deploy(candidate(variant="kept"), *artifact, timeout_s=WAIT_S)
        words, quick = "cannot schedule", failure in {"time", "mesh"}
        if failure == "schedule":
            double.capabilities = set()
        elif failure == "load":
            words = "could not load .*: broken graph"
            first = cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
            first.undeploy()
            double.failures[first.uri] = "broken graph"
        elif failure == "time":
            words, double.load_s = "is not ready after {limit} s", 600
        elif failure == "mesh":
            words, double.mesh_ready = "the mesh at .* does not: status 404", False
        elif failure == "lost":
            words, double.lost["patch"] = "cannot be reached", 2
        else:
            words = r"\(422\)"
            double.refuse("patch", RefusalError(422, "Invalid", "no"))
        if quick:
            deploy = partial(cluster.deploy, candidate(), *artifact)
            ends_in_vain(lambda limit_s: deploy(timeout_s=limit_s), words, first_s=NEVER_S)
        else:
            with pytest.raises(BurnishError, match=words):
                cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        assert double.names() == sorted(["theirs", kept.target.model])


def test_ctrl_c_while_it_loads_leaves_nothing(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "wait", interrupted)
    with cluster_of(double, client) as cluster, pytest.raises(KeyboardInterrupt):
        cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
    assert "patch" in double.verbs()
    assert double.names() == []


def test_a_model_that_somebody_changed_or_replaced_is_told_and_a_replaced_one_left(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts, caplog: pytest.LogCaptureFixture
) -> None:
    with cluster_of(double, client) as cluster:
        changed = cluster.deploy(candidate(variant="changed"), *artifact, timeout_s=WAIT_S)
        replaced = cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        double.put("models", changed.target.model, {**SPEC, "storageUri": "s3://theirs"})
        double.remove(replaced.target.model)
        double.put("models", replaced.target.model, SPEC)
        for deployment in (changed, replaced):
            with pytest.raises(ServerDiedError, match="somebody changed or replaced the Model"):
                deployment.usage()
    assert double.names() == [replaced.target.model]
    assert f"the Model {replaced.target.model} is somebody else's by now" in caplog.text


def test_a_model_that_was_not_ready_in_between_is_another_life(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts
) -> None:
    with cluster_of(double, client) as cluster:
        deployment = cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        before = deployment.usage()
        status = double.get(deployment.target.model)["status"]
        conditions = [{**one, "lastTransitionTime": "2031-01-01T00:00:00Z"} for one in status["conditions"]]
        double.set_status(deployment.target.model, {**status, "conditions": conditions})
        after = deployment.usage()
        assert before is not None
        assert after is not None
        assert after.instance != before.instance
        assert after.instance.endswith("ready since 2031-01-01T00:00:00Z")
        double.set_status(deployment.target.model, {**status, "conditions": []})
        with pytest.raises(ServerDiedError):
            deployment.usage()


def test_a_model_that_fails_later_is_told(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts
) -> None:
    with cluster_of(double, client) as cluster:
        deployment = cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        words = {"status": "False", "message": "ModelFailed", "reason": "out of memory"}
        double.set_status(deployment.target.model, {"conditions": [{"type": "ModelReady", **words}]})
        with pytest.raises(ServerDiedError, match="not available on Core 2 any more: ModelFailed out of memory"):
            deployment.usage()


def test_an_api_that_is_gone_ends_nothing_and_what_stays_is_named(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = cluster_of(double, client)
    deployment = cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
    double.token = "another"
    assert deployment.usage() is None
    cluster.close()
    name = deployment.target.model
    assert f"Whether {name} is still served as it was is not known" in caplog.text
    assert f"the Model {name} may still be there: the Kubernetes API" in caplog.text
    double.token = TOKEN
    cluster.close()
    assert double.names() == []


def test_a_mesh_that_is_not_there_is_told_before_anything_is_applied(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts
) -> None:
    for mesh, words in ((f"{LOOPBACK}:1", "cannot be reached at"), ("mesh:x", "is not host:port")):
        with pytest.raises(BurnishError, match=words):
            cluster_of(double, client, mesh=mesh).deploy(candidate(), *artifact, timeout_s=WAIT_S)
    with pytest.raises(InputError, match="asks for 2 parallel workers"):
        cluster_of(double, client).deploy(candidate(parallel_workers=2), *artifact, timeout_s=WAIT_S)
    assert double.asked == []


# --- servers and experiments -----------------------------------------------------------------------------------------


def test_servers_and_experiments_are_applied_waited_for_and_deleted(
    double: KubernetesDouble, client: KubernetesClient, artifact: Artifacts
) -> None:
    double.load_s = 0.05
    serving = ServingProfile(server="mlserver", backend="burnish")
    server = render_server("burnish-mlserver", serving, labels={}, image="registry.example/serve:1")
    with cluster_of(double, client) as cluster:
        assert [change.action for change in cluster.dry_run(server)] == ["create"]
        assert cluster.apply(server, timeout_s=WAIT_S).ready
        deployment = cluster.deploy(candidate(), *artifact, timeout_s=WAIT_S)
        name = deployment.target.model
        split = render_experiment("split", {name: 90, "second": 10}, labels={}, default=name)
        words = "Experiment split is not ready .*CandidatesReady False.*: second"
        ends_in_vain(lambda limit_s: cluster.apply(split, timeout_s=limit_s), words, first_s=NEVER_S)
        assert double.names("experiments") == []
        double.put("models", "second", SPEC)
        assert cluster.apply(split, timeout_s=WAIT_S).ready
        assert double.get("split", "experiments")["metadata"]["labels"] == MARKS
        with pytest.raises(InputError, match="the weights are all 0"):
            cluster.apply({**split, "spec": {"candidates": [{"name": name, "weight": 0}]}}, timeout_s=WAIT_S)
    deleted = [(plural, name) for verb, plural, name, _ in double.asked if verb == "delete"]
    assert set(deleted[:-3]) == {("experiments", "split")}
    assert deleted[-3:] == [("experiments", "split"), ("models", name), ("servers", "burnish-mlserver")]
    assert double.names() == ["second"]


def test_an_autoscaler_is_of_kubernetes_own_group(double: KubernetesDouble, client: KubernetesClient) -> None:
    scaler = render_autoscaler("digits", rate_rps=100, min_replicas=1, max_replicas=3, labels={})
    with cluster_of(double, client) as cluster:
        assert cluster.apply(scaler, timeout_s=WAIT_S).ready
        assert double.get("digits", "horizontalpodautoscalers")["apiVersion"] == "autoscaling/v2"
        double.refuse("get", RefusalError(403, "Forbidden", "no"))
        with pytest.raises(UnreachableError, match=r"may not get horizontalpodautoscalers\.autoscaling in"):
            client.read("HorizontalPodAutoscaler", "digits")
    assert double.names("horizontalpodautoscalers") == []
