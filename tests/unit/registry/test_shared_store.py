"""A shared store in a folder that two "machines" mount; the same over S3 is in tests/integration/registry."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from registry import codec, leases
from registry.errors import InputError, StorageError
from registry.filesystems import destination_of
from registry.records import Artifact, ArtifactFile, TensorSpec, Variant
from registry.remote_folder import RemoteFolder
from registry.shared_store import SharedStore, once, open_store
from registry.store import FolderStore
from tests.doubles.campaigns import FLOAT32
from tests.doubles.shared_work import SPEC, wanted_by_three

ROOT = Path(__file__).parents[3]


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    return tmp_path / "mount"


@pytest.fixture
def machine(tmp_path: Path, mount: Path) -> Callable[[str], SharedStore]:
    def store(name: str, ttl_s: float = 60.0) -> SharedStore:
        return SharedStore(str(mount), FolderStore(tmp_path / name), lease_ttl_s=ttl_s)

    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "model.onnx").write_bytes(b"model")
    (made / "sub" / "weights.bin").write_bytes(b"weights")
    return made


@pytest.fixture(params=[True, False], ids=["links", "no-links"])
def exclusive(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of folders: those that know hard links, and those that do not."""
    if not request.param:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    return bool(request.param)


def add(store: SharedStore | FolderStore, folder: Path, format: str = "onnx") -> Artifact:
    return store.add(folder, format=format, entry="model.onnx", inputs=(SPEC,), outputs=(SPEC,))  # type: ignore[arg-type]


# --- artifacts -----------------------------------------------------------------------------------------------------


def test_what_one_machine_adds_another_fetches_and_keeps(machine, folder, mount):
    artifact = add(machine("a"), folder)
    there = machine("b")
    assert artifact.digest in there
    assert there.get(artifact.digest) == artifact
    path = there.path(artifact)
    assert path.is_relative_to(there.local.root)
    assert (path / "sub" / "weights.bin").read_bytes() == b"weights"
    for file in mount.rglob("*.bin"):
        file.unlink()  # once fetched, the local copy is all that is read
    assert machine("b").path(artifact) == path
    assert not list((mount / ".incoming").iterdir())


def test_the_manifest_is_written_last_and_nothing_counts_without_it(machine, folder, mount, monkeypatch):
    def put(self: RemoteFolder, path: str, source: Path) -> None:
        if path.endswith("weights.bin"):
            raise StorageError("the store went away")
        whole(self, path, source)

    whole = RemoteFolder.put
    monkeypatch.setattr(RemoteFolder, "put", put)
    store = machine("a")
    with pytest.raises(StorageError, match="went away"):
        add(store, folder)
    assert [path.name for path in mount.rglob("*") if path.is_file()] == ["model.onnx"]
    digest = next(path.name for path in (mount / "artifacts").iterdir())
    assert digest not in machine("b")
    with pytest.raises(InputError, match="is not in the store"):
        machine("b").get(digest)
    monkeypatch.setattr(RemoteFolder, "put", whole)
    assert add(store, folder).digest in machine("b")


@pytest.mark.parametrize("content", [b"modem", b"mod", b""])
def test_other_bytes_than_the_digests_are_not_taken_in(machine, folder, mount, content):
    artifact = add(machine("a"), folder)
    (mount / "artifacts" / artifact.digest / "model.onnx").write_bytes(content)
    there = machine("b")
    with pytest.raises(InputError, match=r"\.json is damaged: .*model\.onnx arrived with"):
        there.path(artifact)
    assert artifact.digest not in there.local
    assert not list((there.local.root / "artifacts" / ".incoming").iterdir())


def test_a_manifest_that_was_changed_is_refused(machine, folder, mount):
    artifact = add(machine("a"), folder)
    manifest = mount / "artifacts" / f"{artifact.digest}.json"
    whole = manifest.read_text()
    for damage in (whole[:-5], whole.replace("model.onnx", "../../../../escaped"), codec.dumps(SPEC)):
        manifest.write_text(damage)
        with pytest.raises(InputError, match="is damaged"):
            machine("b").path(artifact)
    assert not list(mount.parent.rglob("escaped"))


def test_a_file_outside_its_folder_is_refused_even_where_the_digest_agrees(tmp_path):
    files = (ArtifactFile(path="../../../escaped", sha256="0" * 64, size_bytes=1),)
    from registry.store import _digest

    artifact = Artifact(
        digest=_digest(files), format="onnx", entry="model.onnx", files=files, inputs=(SPEC,), outputs=(SPEC,)
    )
    with pytest.raises(InputError, match="which is none of its"):
        FolderStore(tmp_path / "s").receive(artifact, lambda file: [b"x"])
    assert not list(tmp_path.rglob("escaped"))


def test_the_same_bytes_as_something_else_are_refused(machine, folder):
    add(machine("a"), folder)
    with pytest.raises(InputError, match="already as onnx"):
        add(machine("b"), folder, format="openvino")


def test_an_artifact_made_before_there_was_a_shared_store_is_put_there(machine, folder, tmp_path):
    artifact = add(FolderStore(tmp_path / "a"), folder)
    store = machine("a")
    assert artifact.digest not in machine("b")
    store.share(artifact)
    assert artifact.digest in machine("b")


# --- once among all ------------------------------------------------------------------------------------------------


def test_work_that_three_want_is_done_once(machine, exclusive, monkeypatch):
    # Who waits looks often, and takes nothing over from a holder whose disk is slow.
    monkeypatch.setattr(leases, "pause", lambda seconds: time.sleep(seconds / 10))
    made, results = wanted_by_three(machine, ttl_s=60.0, takes_s=0.3)
    assert len(made) == 1
    assert results == made * 3
    assert machine("d")._exclusive is exclusive
    # Done is done: nobody makes it again, and no lease is left.
    assert machine("d").once("k", lambda: pytest.fail("it was done")).name == made[0]
    assert machine("d")._folder.names("leases") == []


def test_a_lease_that_is_given_back_is_not_written_anew(mount, monkeypatch):
    """However long the store takes to remove it: what stood there then would be believed until it expires."""
    folder = RemoteFolder(destination_of(str(mount)))
    beaten = threading.Event()
    write, remove = folder.write, folder.remove

    def written(path: str, content: bytes) -> None:
        write(path, content)
        beaten.set()

    def removed(path: str) -> None:
        remove(path)
        beaten.clear()
        beaten.wait(0.2)

    monkeypatch.setattr(folder, "write", written)
    monkeypatch.setattr(folder, "remove", removed)
    with leases.lease(folder, "leases/k", exclusive=True, is_done=lambda: False, ttl_s=0.03) as ours:
        assert ours
    assert folder.names("leases/k") == []


def test_of_those_that_claim_at_the_same_moment_one_gets_the_lease(mount, exclusive):
    folder = RemoteFolder(destination_of(str(mount)))
    together = threading.Barrier(8)
    won: list[str] = []

    def claim(key: str) -> None:
        together.wait()
        claimed = leases._claim(folder, key, 1, exclusive=exclusive)
        if claimed is not None:
            won.append(key)

    for number in range(10):
        threads = [threading.Thread(target=claim, args=(f"leases/k{number}",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(won) == len(set(won))
    # By writing and looking, all may give way, and come again after a while.
    assert not exclusive or len(won) == 10


def test_a_result_whose_artifact_was_taken_away_is_said(machine, folder, mount):
    def make() -> Variant:
        return replace(FLOAT32, artifact=add(machine("a"), folder))

    machine("a").once("k", make)
    assert machine("b").once("k", make).artifact.digest
    for path in (mount / "artifacts").glob("*.json"):
        path.unlink()
    with pytest.raises(InputError, match=r"records/k\.json is damaged: its artifact [0-9a-f]+ is no longer there"):
        machine("b").once("k", make)


def test_work_that_failed_is_free_again(machine, exclusive):
    def fail() -> TensorSpec:
        raise ValueError("no")

    store = machine("a")
    with pytest.raises(ValueError, match="no"):
        store.once("k", fail)
    assert store.once("k", lambda: SPEC) == SPEC


def test_the_first_result_counts(machine, exclusive):
    assert machine("a").keep("k", SPEC) == SPEC
    assert machine("b").keep("k", replace(SPEC, name="late")) == SPEC
    assert machine("c").find("k") == SPEC
    assert machine("c").find("other") is None


HOLDER = """
import sys, time
from pathlib import Path
from registry.shared_store import SharedStore
from registry.store import FolderStore
store = SharedStore(sys.argv[1], FolderStore(Path(sys.argv[2])))
def make():
    print("held", flush=True)
    time.sleep(600)
store.once("k", make)
"""


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_at_once(machine, mount, tmp_path):
    command = [sys.executable, "-c", HOLDER, str(mount), str(tmp_path / "killed")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
    assert machine("a", ttl_s=600.0).once("k", lambda: SPEC) == SPEC


def test_the_lease_of_another_machine_is_taken_once_it_shows_no_life(machine, mount, exclusive, monkeypatch):
    about = {"machine": "elsewhere", "pid": 1, "started": 0.0, "beat": 0}
    lease = mount / "leases" / "k" / "000007"
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps(about))
    now_s, beats_s, taken_s = [0.0], [0.0], []

    def pause(seconds: float) -> None:
        now_s[0] += seconds
        # Six times the time to live: as long as it is written anew, nobody takes it.
        if beats_s[-1] + 15 <= now_s[0] < 360:
            beats_s.append(now_s[0])
            lease.write_text(json.dumps(about | {"beat": len(beats_s)}))

    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    monkeypatch.setattr(leases, "pause", pause)
    machine("a", ttl_s=60.0).once("k", lambda: taken_s.append(now_s[0]) or SPEC)
    assert beats_s[-1] > 300
    assert [taken - beats_s[-1] for taken in taken_s] == [pytest.approx(60, abs=2)]
    assert not lease.exists()


def test_a_lease_that_was_cut_off_expires_too(machine, mount):
    lease = mount / "leases" / "k" / "000001"
    lease.parent.mkdir(parents=True)
    lease.write_text("")
    assert machine("a", ttl_s=0.2).once("k", lambda: SPEC) == SPEC


def test_a_record_that_cannot_be_read_is_said(machine, mount):
    (mount / "records").mkdir(parents=True)
    (mount / "records" / "k.json").write_text('{"schema":1,')
    with pytest.raises(InputError, match=r"records/k\.json is damaged"):
        machine("a").once("k", lambda: SPEC)


# --- opening it ----------------------------------------------------------------------------------------------------


def test_without_a_place_to_share_the_store_is_a_folder_and_work_is_just_done(tmp_path, monkeypatch):
    monkeypatch.delenv("BURNISH_STORE", raising=False)
    store = open_store(tmp_path / "work")
    assert isinstance(store, FolderStore)
    assert once(store, "k", lambda: SPEC) == SPEC


def test_the_environment_names_the_shared_store(tmp_path, mount, monkeypatch):
    monkeypatch.setenv("BURNISH_STORE", f"file://{mount}")
    store = open_store(tmp_path / "work")
    assert isinstance(store, SharedStore)
    assert store.uri == str(mount)
    assert once(store, "k", lambda: SPEC) == SPEC
    assert once(open_store(tmp_path / "other"), "k", lambda: pytest.fail("it was done")) == SPEC


def test_what_killed_writers_left_is_removed_a_day_later(machine, mount):
    store = machine("a")
    store.check()
    incoming = mount / ".incoming"
    left, writing, strange = (incoming / name for name in (".file.a1.part", ".object.b2.part", "notes"))
    for path in (left, writing, strange):
        path.write_bytes(b"half of it")
    for path in (left, strange):
        os.utime(path, (0, writing.stat().st_mtime - 90_000))
    store.check()
    assert sorted(incoming.iterdir()) == [writing, strange]


def test_a_store_that_cannot_be_written_is_said_when_it_is_opened(tmp_path):
    (tmp_path / "in-the-way").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        open_store(tmp_path / "work", str(tmp_path / "in-the-way" / "store"))
    with pytest.raises(InputError, match="no way to place anything at ftp:"):
        open_store(tmp_path / "work", "ftp://host/x")
    with pytest.raises(InputError, match="as one with credentials has") as raised:
        open_store(tmp_path / "work", "s3://user:hunter2@bucket/x")
    assert "hunter2" not in str(raised.value)
