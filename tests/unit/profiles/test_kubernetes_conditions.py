"""What is read from a resource's status: swapped words, stale conditions, changed fields. No server is asked."""

import sys
from pathlib import Path
from typing import Any

import pytest

from profiles.deploy.kubernetes_client import KubernetesClient
from profiles.deploy.kubernetes_resources import Applied, FieldChange, changes_between, is_stale, read_state
from registry.errors import InputError, MissingExtraError

MADE = "2026-03-01T12:00:00Z"
LATER = "2026-03-01T12:00:05Z"


def condition(kind: str, truth: str, *, at: str = LATER, **words: str) -> dict[str, str]:
    return {"type": kind, "status": truth, "lastTransitionTime": at, **words}


def model(*conditions: dict[str, str], replicas: int = 1, **status: Any) -> dict[str, Any]:
    return {
        "kind": "Model",
        "metadata": {"name": "digits", "uid": "u", "generation": 1, "creationTimestamp": MADE},
        "spec": {"replicas": replicas},
        "status": {"conditions": list(conditions), **status},
    }


def said(truth: str, state: str, reason: str = "", **status: Any) -> dict[str, Any]:
    words = {"message": state, "reason": reason}
    return model(condition("ModelReady", truth, **words), condition("Ready", truth, **words), **status)


def applied(before: dict[str, str] | None = None, generation: int = 1) -> Applied:
    return Applied(kind="Model", name="digits", uid="u", generation=generation, before=before, resource={})


# --- states ----------------------------------------------------------------------------------------------------------


def test_the_state_is_the_message_and_the_words_are_the_reason() -> None:
    found = read_state(said("False", "ModelFailed", "no such\n  file", selector="server=mlserver"))
    assert (found.state, found.reason, found.server, found.ready) == ("ModelFailed", "no such file", "mlserver", False)


def test_a_model_is_ready_with_all_its_replicas() -> None:
    assert read_state(said("True", "ModelAvailable")).ready
    assert read_state(said("True", "ModelAvailable", replicas=2, availableReplicas=2)).ready
    assert not read_state(said("True", "ModelAvailable", replicas=2, availableReplicas=1)).ready
    assert not read_state(said("False", "ModelProgressing")).ready


def test_a_ready_condition_beside_another_state_is_none() -> None:
    assert not read_state(said("True", "ModelTerminating")).ready


@pytest.mark.parametrize("status", [{}, {"conditions": []}, {"conditions": None}, None])
def test_a_resource_without_a_status_is_not_ready(status: Any) -> None:
    found = read_state({**model(), "status": status})
    assert (found.ready, found.state, found.available_replicas, found.server) == (False, "", None, "")


def test_of_other_kinds_every_condition_has_to_hold() -> None:
    waiting = condition("CandidatesReady", "False", message="candidates not ready: b")
    split = {**model(condition("Ready", "True"), waiting), "kind": "Experiment"}
    found = read_state(split)
    assert (found.ready, found.state) == (False, "CandidatesReady False")
    assert found.reason == "candidates not ready: b"
    assert read_state({**model(condition("Ready", "True"), condition("x", "True")), "kind": "Server"}).ready
    assert read_state({**model(), "kind": "ServerConfig"}).ready


# --- stale states ----------------------------------------------------------------------------------------------------


def test_a_status_of_what_was_made_anew_counts() -> None:
    assert not is_stale(said("True", "ModelAvailable"), applied())


def test_a_condition_that_is_as_it_was_before_a_change_is_stale() -> None:
    resource = said("True", "ModelAvailable")
    before = resource["status"]["conditions"][1]
    assert is_stale(resource, applied(before, generation=2))
    assert not is_stale(said("False", "ModelProgressing"), applied(before, generation=2))
    again = model(condition("Ready", "True", at="2026-03-01T12:00:09Z", message="ModelAvailable", reason=""))
    assert not is_stale(again, applied(before, generation=2))


def test_a_condition_older_than_its_resource_is_stale() -> None:
    assert is_stale(model(condition("Ready", "True", at="2026-02-28T12:00:00Z")), applied())


def test_an_operator_that_names_the_generation_is_believed() -> None:
    before = condition("Ready", "True", message="ModelAvailable", reason="")
    assert is_stale(said("True", "ModelAvailable", observedGeneration=1), applied(generation=2))
    assert not is_stale(said("True", "ModelAvailable", observedGeneration=2), applied(before, generation=2))


# --- changes ---------------------------------------------------------------------------------------------------------


def test_changes_are_of_labels_and_spec_by_their_paths() -> None:
    old = {"metadata": {"labels": {"a": "1"}}, "spec": {"replicas": 1, "deep": {"x": 1, "y": 2}}, "status": {"n": 1}}
    new = {"metadata": {"labels": {"a": "2"}}, "spec": {"replicas": 1, "deep": {"x": 1, "z": [3]}}, "status": {"n": 2}}
    assert changes_between(old, new) == (
        FieldChange(path="metadata.labels[a]", before="1", after="2"),
        FieldChange(path="spec.deep.y", before=2, after=None),
        FieldChange(path="spec.deep.z", before=None, after=[3]),
    )
    assert changes_between(new, new) == ()
    assert [change.path for change in changes_between(None, old)] == [
        "metadata.labels[a]",
        "spec.deep.x",
        "spec.deep.y",
        "spec.replicas",
    ]


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without a kubeconfig, on no cluster's node."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return tmp_path


def written(folder: Path, server: str = "https://cluster.example", user: str = "{}", **cluster: str) -> Path:
    path = folder / "config"
    more = "".join(f", {name.replace('_', '-')}: {value}" for name, value in cluster.items())
    path.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
        f"clusters: [{{name: k, cluster: {{server: '{server}'{more}}}}}]\n"
        f"users: [{{name: u, user: {user}}}]\n"
        "contexts:\n"
        "  - {name: c, context: {cluster: k, user: u, namespace: models}}\n"
        "  - {name: d, context: {cluster: k, user: u}}\n"
    )
    return path


def test_no_configuration_at_all(nowhere: Path) -> None:
    with pytest.raises(InputError, match=r"there is no kubeconfig at .*\.kube/config") as caught:
        KubernetesClient()
    assert caught.value.exit_code == 2


def test_the_usual_places_of_a_configuration(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(nowhere)
    monkeypatch.setenv("KUBECONFIG", f"/none:{path}")
    with KubernetesClient() as client:
        assert (client.host, client.namespace) == ("https://cluster.example", "models")
    with KubernetesClient(context="d") as client:
        assert client.namespace == "default"
    with KubernetesClient(context="d", namespace="mine") as client:
        assert client.namespace == "mine"


def test_the_account_of_a_pod(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    for name, content in {"token": "hush", "ca.crt": "pem", "namespace": "models\n"}.items():
        (nowhere / name).write_text(content)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(nowhere / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(nowhere / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(InputError, match="there is no kubeconfig at /none"):
        KubernetesClient(kubeconfig=Path("/none"))
    with KubernetesClient() as client:
        assert (client.host, client.namespace) == ("https://10.0.0.1:443", "models")
    (nowhere / "ca.crt").write_text("")
    with pytest.raises(InputError, match=r"cannot be used \(of the pod\): Cert file exists but empty"):
        KubernetesClient()


@pytest.mark.parametrize("content", ["", "[]", "{}", "a: [", "clusters: 3", "current-context: gone", "token: hush"])
def test_a_file_that_is_no_kubeconfig(nowhere: Path, content: str) -> None:
    path = nowhere / "config"
    path.write_text(content)
    with pytest.raises(InputError, match="configuration of Kubernetes cannot be used") as caught:
        KubernetesClient(kubeconfig=path)
    assert "\n" not in caught.value.message
    assert "hush" not in str(caught.value)


def test_a_context_that_is_not_there(nowhere: Path) -> None:
    with pytest.raises(InputError, match="name gone in"):
        KubernetesClient(kubeconfig=written(nowhere), context="gone")


def test_who_is_asked_is_verified(nowhere: Path) -> None:
    with pytest.raises(InputError, match=r"not to verify who cluster\.example is"):
        KubernetesClient(kubeconfig=written(nowhere, insecure_skip_tls_verify="true"))


def test_a_token_is_not_sent_without_tls(nowhere: Path) -> None:
    user = "{token: hush}"
    with pytest.raises(InputError, match=r"a token would be sent to cluster\.example without TLS") as caught:
        KubernetesClient(kubeconfig=written(nowhere, server="http://cluster.example", user=user))
    assert "hush" not in str(caught.value)
    KubernetesClient(kubeconfig=written(nowhere, server="http://127.0.0.1:8001", user=user)).close()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(MissingExtraError, match="Deploying to Kubernetes needs the extra 'kubernetes'"):
        KubernetesClient()
