"""What a node does with a task, without Ray."""

import json
from pathlib import Path

import pytest

from optimize.engines.cores import usable_cores
from optimize.engines.performing import as_outcome, as_request
from optimize.engines.port import Outcome, Resources, Task
from optimize.engines.ray_worker import look, work
from registry.errors import InputError, StorageError
from registry.shared_store import SharedStore
from registry.store import FolderStore


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


def worked(task: Task, mount: Path, **files: str) -> Outcome:
    told = json.loads(work(json.dumps({**as_request(task), "store": str(mount), "files": files})))
    return as_outcome(task, told, node=told["node"], host=told["host"])


def test_a_task_gets_its_files_from_the_store(tmp_path: Path):
    (tmp_path / "given.txt").write_text("what was given")
    mount = tmp_path / "mount"
    sha256 = SharedStore(str(mount), FolderStore(tmp_path / "driver")).share_file(tmp_path / "given.txt")
    task = Task(name="r", step="tests.doubles.steps:read", arguments={})
    assert worked(task, mount, file=sha256).result == "what was given"
    (mount / "files" / sha256 / "content").write_text("what was givem")
    assert worked(task, mount, file=sha256).result == "what was given"  # it is at the node already
    (kept,) = (tmp_path / "cache").rglob(f"files/{sha256}")
    kept.chmod(0o600)
    kept.write_text("what was givem")
    error = worked(task, mount, file=sha256).error
    assert isinstance(error, InputError)
    assert "arrived with other bytes" in error.message


def test_a_node_that_says_it_has_more_cores_gives_those_it_has(tmp_path: Path):
    task = Task(name="w", step="tests.doubles.steps:where", arguments={}, resources=Resources(cores=10_000))
    assert worked(task, tmp_path / "mount").cpus == usable_cores()
    alone = Task(
        name="w", step="tests.doubles.steps:where", arguments={}, resources=Resources(cores=10_000, alone=True)
    )
    error = worked(alone, tmp_path / "mount").error
    assert isinstance(error, InputError)
    assert "10000 cores were asked for" in error.message


def test_what_keeps_a_task_from_running_is_its_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    missing = Task(name="m", step="no_such_module:step", arguments={})
    error = worked(missing, tmp_path / "mount").error
    assert isinstance(error, InputError)
    assert "no module named 'no_such_module'" in error.message
    task = Task(name="r", step="tests.doubles.steps:read", arguments={})
    assert isinstance(worked(task, tmp_path / "file" / "mount", file="0" * 64).error, StorageError)


def test_a_node_says_what_it_is_and_whether_it_can_use_the_store(tmp_path: Path):
    mount = str(tmp_path / "mount")
    SharedStore(mount, FolderStore(tmp_path / "driver")).tell("look-1", b"seen")
    assert {"node", "host", "burnish", "python"} == json.loads(look(mount, "look-1")).keys()
    (tmp_path / "file").write_text("")
    assert "Not a directory" in json.loads(look(str(tmp_path / "file" / "mount"), "look-1"))["error"]


def test_a_folder_that_is_not_mounted_on_the_node_is_told_from_the_store(tmp_path: Path):
    """An empty folder of the same name can be written, too."""
    assert "is another place there" in json.loads(look(str(tmp_path / "empty"), "look-1"))["error"]
