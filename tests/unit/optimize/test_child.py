import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optimize.engines.child import resolve
from optimize.engines.local import ChildFailure, Limits, child_environment, run_in_child
from profiles.deploy.supervise import start_ticks
from registry.errors import InputError, MissingExtraError
from tests.doubles.busy import LONG_S, until

HERE = Path(__file__).parent


def call(name, arguments=None, **options):
    options.setdefault("limits", Limits(timeout_s=LONG_S))
    return run_in_child(f"child_functions:{name}", arguments or {}, python_path=HERE, **options)


def gone(pid):
    return start_ticks(pid) is None


def test_result_comes_back_and_prints_do_not():
    assert call("echo", {"a": [1, None, "x"]}) == {"a": [1, None, "x"]}


def test_secrets_stay_with_the_parent(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    seen = call("environment", environment={"OMP_NUM_THREADS": "1"})
    assert "AWS_SECRET_ACCESS_KEY" not in seen
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert "AWS_SECRET_ACCESS_KEY" not in child_environment()


SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_KEY", "GITHUB_TOKEN", "DB_PASSWORD", "KUBECONFIG", "NETRC",
    "SSH_AUTH_SOCK", "HTTPS_PROXY", "BURNISH_SIGNING_KEY", "PYTHONSTARTUP", "LD_PRELOAD",
)  # fmt: skip


def test_only_what_is_listed_is_inherited(monkeypatch):
    for name in (*SECRETS, "ANYTHING_ELSE"):
        monkeypatch.setenv(name, "hush")
    assert not {*SECRETS, "ANYTHING_ELSE"} & set(child_environment())
    assert "hush" not in child_environment().values()
    assert {"PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} <= set(child_environment())


def test_users_folder_is_appended_and_the_working_directory_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')")
    paths = call("search_path")
    assert paths[-1] == str(HERE)
    assert str(tmp_path) not in paths
    assert "" not in paths


def test_affinity_is_set():
    cpu = min(os.sched_getaffinity(0))
    assert call("affinity", cpus=[cpu]) == [cpu]


def test_an_error_of_ours_comes_back_as_itself():
    with pytest.raises(InputError) as caught:
        call("refuse")
    assert (caught.value.message, caught.value.hint) == ("the value 7 is refused", "give 8")
    assert type(caught.value) is InputError


def test_an_error_with_fields_of_its_own_comes_back_whole():
    with pytest.raises(MissingExtraError) as caught:
        call("miss_extra")
    assert caught.value.extra == "pictures"


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("fail", "error", "ZeroDivisionError: by nothing"),
        ("vanish", "died", "SIGKILL"),
        ("not_json", "error", "not JSON"),
    ],
)
def test_failures_have_a_kind_and_a_message(name, kind, text):
    with pytest.raises(ChildFailure) as caught:
        call(name)
    assert caught.value.kind == kind
    assert text in caught.value.message


def test_the_log_holds_the_traceback():
    with pytest.raises(ChildFailure) as caught:
        call("fail")
    assert 'raise ZeroDivisionError("by nothing")' in caught.value.log


def test_timeout_ends_the_whole_group(tmp_path):
    pids = tmp_path / "pids"
    # A busy machine takes longer than that to start the child and its own.
    for timeout_s in (1.0, 5.0, 25.0, LONG_S):
        with pytest.raises(ChildFailure) as caught:
            call("sleep", {"pid_file": str(pids)}, limits=Limits(timeout_s=timeout_s))
        assert caught.value.kind == "timeout"
        if pids.exists():
            break
    for pid in map(int, pids.read_text().split()):
        until(lambda pid=pid: gone(pid))


def test_memory_limit():
    with pytest.raises(ChildFailure) as caught:
        call("eat", limits=Limits(timeout_s=LONG_S, memory_mb=300))
    assert caught.value.kind == "memory"


def test_child_dies_with_its_parent(tmp_path):
    pids = tmp_path / "pids"
    program = (
        "import sys; from pathlib import Path; from optimize.engines.local import run_in_child;"
        "run_in_child('child_functions:sleep', {'pid_file': sys.argv[1]}, python_path=Path(sys.argv[2]))"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", program, str(pids), str(HERE)])
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    child, grandchild = map(int, pids.read_text().split())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: gone(child))
    # The kernel's promise holds for the child only; the test ends what the child had started.
    os.kill(grandchild, signal.SIGKILL)


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("child_functions", "does not name a function"),
        ("no_such_module_here:f", "no module named 'no_such_module_here'"),
        ("json:no_such_name", "no 'no_such_name'"),
    ],
)
def test_references_that_lead_nowhere(reference, text):
    with pytest.raises(InputError, match=text):
        resolve(reference)


def test_a_missing_module_is_looked_for_where_the_campaign_file_is():
    with pytest.raises(InputError) as caught:
        resolve("no_such_module_here:f")
    assert caught.value.hint == "Put it beside the campaign file, or install it."
