"""A store that machines share over a real S3 server, rclone's."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from registry.errors import InputError, StorageError
from registry.filesystems import destination_of
from registry.remote_folder import RemoteFolder
from registry.shared_store import SharedStore, open_store
from registry.store import FolderStore
from tests.doubles.busy import LONG_S
from tests.doubles.rclone import KEY, SECRET
from tests.doubles.shared_work import SPEC, wanted_by_three

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


@pytest.fixture
def prefix(s3_prefix: Path) -> Path:
    """The folder behind what the test has of the bucket."""
    return s3_prefix


@pytest.fixture
def machine(prefix: Path, tmp_path: Path) -> Callable[[str], SharedStore]:
    def store(name: str, ttl_s: float = 60.0) -> SharedStore:
        return SharedStore(f"s3://models/{prefix.name}", FolderStore(tmp_path / name), lease_ttl_s=ttl_s)

    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "model.onnx").write_bytes(os.urandom(4_000_000))
    (made / "sub" / "empty.bin").write_bytes(b"")
    return made


def add(store: SharedStore, folder: Path):
    return store.add(folder, format="onnx", entry="model.onnx", inputs=(SPEC,), outputs=(SPEC,))


def remove(prefix: Path, *names: str) -> None:
    """Somebody else takes objects away."""
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    for name in names:
        system.rm_file(f"models/{prefix.name}/{name}")


def test_what_one_machine_adds_another_fetches(machine, folder, prefix):
    first = machine("a")
    first.check()
    artifact = add(first, folder)
    there = machine("b")
    assert artifact.digest in there
    path = there.path(artifact)
    assert (path / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert (path / "sub" / "empty.bin").read_bytes() == b""
    assert not (prefix / "leases").exists() or not list((prefix / "leases").iterdir())
    for stored in prefix.rglob("*.json"):
        assert SECRET not in stored.read_text()
        assert KEY not in stored.read_text()


def test_half_an_upload_does_not_count_and_is_completed(machine, folder, prefix):
    artifact = add(machine("a"), folder)
    remove(prefix, f"artifacts/{artifact.digest}.json", f"artifacts/{artifact.digest}/model.onnx")
    there = machine("b")
    assert artifact.digest not in there
    with pytest.raises(InputError, match="is not in the store"):
        there.path(artifact)
    assert add(there, folder) == artifact
    assert artifact.digest in machine("c")


def test_a_file_that_is_gone_or_changed_is_never_taken_for_the_artifact(machine, folder, prefix):
    artifact = add(machine("a"), folder)
    model = prefix / "artifacts" / artifact.digest / "model.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size, so that the server sees no change
    with pytest.raises(InputError, match="arrived with 4000000 bytes of another digest"):
        machine("b").path(artifact)
    remove(prefix, f"artifacts/{artifact.digest}/model.onnx")
    with pytest.raises((InputError, StorageError), match="s3://"):
        machine("b").path(artifact)
    assert artifact.digest not in machine("b").local


def test_a_missing_bucket_is_no_empty_store(prefix):
    folder = RemoteFolder(destination_of(f"s3://nowhere/{prefix.name}"))
    with pytest.raises(InputError, match="there is no such bucket"):
        folder.read("records/k.json")
    assert RemoteFolder(destination_of(f"s3://models/{prefix.name}")).read("records/k.json") is None


def test_work_that_three_want_is_done_once(machine):
    made, results = wanted_by_three(machine, ttl_s=LONG_S, takes_s=0.5)
    assert len(made) == 1
    assert results == made * 3
    assert machine("d").once("k", lambda: pytest.fail("it was done")).name == made[0]


UPLOADER = """
import os, signal, sys, threading
from pathlib import Path
from registry.records import TensorSpec
from registry.remote_folder import RemoteFolder
from registry.shared_store import SharedStore
from registry.store import FolderStore
put, begun = RemoteFolder.put, []

def last(folder, path, source):
    begun.append(path)
    if len(begun) == 8:
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGKILL)).start()
    put(folder, path, source)

RemoteFolder.put = last
store = SharedStore(sys.argv[1], FolderStore(Path(sys.argv[2])))
spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
store.add(Path(sys.argv[3]), format="onnx", entry="model.onnx", inputs=(spec,), outputs=(spec,))
"""


def test_an_upload_that_is_killed_leaves_nothing_that_counts(machine, tmp_path, prefix):
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"model")
    for number in range(60):
        (folder / f"part-{number:02}").write_bytes(os.urandom(200_000))
    command = [sys.executable, "-c", UPLOADER, f"s3://models/{prefix.name}", str(tmp_path / "killed"), str(folder)]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=200).returncode == -signal.SIGKILL
    assert list(prefix.rglob("part-*"))
    assert not list(prefix.rglob("*.json"))
    artifact = add(machine("a"), folder)
    path = machine("b").path(artifact)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("bucket", "change", "error", "words"),
    [
        ("nowhere", {}, InputError, "there is no such bucket"),
        ("models", {"AWS_SECRET_ACCESS_KEY": "wrong-hunter2"}, StorageError, "access denied"),
        ("models", {"AWS_ENDPOINT_URL": "http://user:hunter2@127.0.0.1:9"}, StorageError, "does not answer"),
    ],
)
def test_a_store_that_cannot_be_used_is_said_when_it_is_opened(
    prefix, tmp_path, monkeypatch, bucket, change, error, words
):
    for variable, value in change.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=words) as caught:
        open_store(tmp_path / "work", f"s3://{bucket}/{prefix.name}")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in caught.value.message
