import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from registry import store as store_module
from registry.errors import InputError, StorageError
from registry.ports import Store
from registry.records import TensorSpec
from registry.store import FolderStore

SPEC = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "model.onnx").write_bytes(b"model")
    (made / "sub" / "weights.bin").write_bytes(b"weights")
    return made


def add(store, folder, *, entry="model.onnx", model_format="onnx", inputs=(SPEC,)):
    return store.add(folder, format=model_format, entry=entry, inputs=inputs, outputs=(SPEC,))


def test_an_artifact_is_addressed_by_its_content(store, folder):
    port: Store = store
    artifact = add(port, folder)
    lines = sorted(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        for name, content in {"model.onnx": b"model", "sub/weights.bin": b"weights"}.items()
    )
    assert artifact.digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert artifact.size_bytes == 12
    assert [file.path for file in artifact.files] == ["model.onnx", "sub/weights.bin"]
    assert artifact.digest in store
    assert store.get(artifact.digest) == artifact
    path = store.path(artifact)
    assert path == store.root / "artifacts" / artifact.digest
    assert (path / "sub" / "weights.bin").read_bytes() == b"weights"
    assert (path / "sub" / "weights.bin").stat().st_mode & 0o777 == 0o444
    assert not list((store.root / "artifacts" / ".incoming").iterdir())


def test_the_copy_does_not_follow_the_original(store, folder):
    artifact = add(store, folder)
    (folder / "model.onnx").write_bytes(b"other")
    assert (store.path(artifact) / "model.onnx").read_bytes() == b"model"


def test_the_same_bytes_twice_are_one(store, folder):
    first = add(store, folder)
    assert add(store, folder) == first
    assert len(list((store.root / "artifacts").glob("[!.]*"))) == 2


def test_the_same_bytes_as_something_else_are_refused(store, folder):
    add(store, folder)
    with pytest.raises(InputError, match="stored already as onnx"):
        add(store, folder, model_format="openvino")


def test_an_entry_must_be_there(store, folder):
    with pytest.raises(InputError, match=r"(?s)no file 'm\.xml'.*model\.onnx, sub/weights\.bin"):
        add(store, folder, entry="m.xml")
    with pytest.raises(InputError, match="is not a folder"):
        add(store, folder / "nothing")
    assert not list((store.root / "artifacts").glob("[!.]*"))


@pytest.mark.parametrize("name", ["model.data", "folder"])
def test_links_that_lead_out_are_refused(store, folder, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (folder / name).symlink_to(outside / "secret" if name == "model.data" else outside)
    with pytest.raises(InputError, match=rf"{name} is a link that leads out of its folder"):
        add(store, folder)
    assert not list((store.root / "artifacts").glob("[!.]*"))
    assert not list((store.root / "artifacts" / ".incoming").iterdir())


def test_links_inside_become_files_and_broken_ones_are_refused(store, folder):
    (folder / "again.onnx").symlink_to("model.onnx")
    artifact = add(store, folder)
    copied = store.path(artifact) / "again.onnx"
    assert copied.read_bytes() == b"model"
    assert not copied.is_symlink()
    (folder / "broken").symlink_to("nowhere")
    with pytest.raises(InputError, match="broken is not a file"):
        add(store, folder)


def test_pipes_folders_behind_links_and_odd_names_are_refused(store, folder):
    (folder / "loop").symlink_to(folder / "sub")
    with pytest.raises(InputError, match="loop is not a file"):
        add(store, folder)
    (folder / "loop").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError, match="pipe is not a file"):
        add(store, folder)
    (folder / "pipe").unlink()
    (folder / "a\nb").write_text("")
    with pytest.raises(InputError, match="cannot be stored"):
        add(store, folder)


def damage_change(path: Path) -> None:
    before_ns = path.stat().st_mtime_ns
    path.chmod(0o644)
    path.write_bytes(b"mod3l")
    # A quick machine is done with all this before the clock of files has gone on.
    os.utime(path, ns=(before_ns, before_ns + 1_000_000))


def damage_remove(path: Path) -> None:
    path.unlink()


def damage_add(path: Path) -> None:
    (path.parent / "extra.so").write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_change, damage_remove, damage_add])
@pytest.mark.parametrize("looked_at_before", [False, True])
def test_damage_is_named_with_its_file(store, folder, damage, looked_at_before):
    artifact = add(store, folder)
    if damage is damage_add or not looked_at_before:
        store = FolderStore(store.root)
    if looked_at_before and damage is not damage_add:
        store.path(artifact)
    damage(store.root / "artifacts" / artifact.digest / "model.onnx")
    with pytest.raises(InputError, match=r"(?s)is damaged: .*(model\.onnx|extra\.so).*Remove .*make it again"):
        store.path(artifact)


def test_bytes_are_hashed_once_a_process(store, folder, monkeypatch):
    artifact = add(store, folder)
    store = FolderStore(store.root)
    hashed = []
    monkeypatch.setattr(store_module.codec, "file_sha256", lambda path: hashed.append(path) or _real_sha256(path))
    store.path(artifact)
    store.path(artifact)
    assert len(hashed) == 2


_real_sha256 = store_module.codec.file_sha256


def test_what_is_not_there_is_said(store, folder):
    artifact = add(store, folder)
    other = FolderStore(store.root.parent / "other")
    with pytest.raises(InputError, match="is not in the store"):
        other.path(artifact)
    with pytest.raises(InputError, match="is not in the store"):
        other.get("../../etc/passwd")
    assert 3 not in store
    assert "../store" not in store


def test_a_damaged_record_is_named(store, folder):
    artifact = add(store, folder)
    record = store.root / "artifacts" / f"{artifact.digest}.json"
    record.chmod(0o644)
    good = record.read_text()
    record.write_text(good[:-10])
    with pytest.raises(InputError, match="is damaged"):
        store.get(artifact.digest)
    record.write_text(good.replace(artifact.files[0].sha256, "0" * 64))
    with pytest.raises(InputError, match="record of something else"):
        store.get(artifact.digest)


def test_a_run_killed_between_folder_and_record_is_completed(store, folder):
    artifact = add(store, folder)
    (store.root / "artifacts" / f"{artifact.digest}.json").unlink()
    assert artifact.digest not in store
    assert add(store, folder) == artifact
    assert store.path(artifact).is_dir()


def test_leftovers_of_killed_processes_go_and_those_of_live_ones_stay(tmp_path):
    root = tmp_path / "store"
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from registry.store import FolderStore, _workplace
        store = FolderStore(Path(sys.argv[1]))
        with _workplace(store.root / "artifacts" / ".incoming") as place:
            (place / "half").write_text("x")
            print("there", flush=True)
            sys.stdin.readline()
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with child:
        try:
            assert child.stdout.readline() == "there\n"
            FolderStore(root)
            assert len(list((root / "artifacts" / ".incoming").iterdir())) == 1
        finally:
            child.kill()
    FolderStore(root)
    assert not list((root / "artifacts" / ".incoming").iterdir())


def test_processes_that_add_the_same_bytes_at_once_all_succeed(tmp_path, folder):
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from registry.store import FolderStore
        sys.stdin.readline()
        for _ in range(20):
            store = FolderStore(Path(sys.argv[1]))
            artifact = store.add(Path(sys.argv[2]), format="onnx", entry="model.onnx", inputs=(), outputs=())
            store.path(artifact)
        print(artifact.digest)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store"), str(folder)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)
    ]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    digests = {child.communicate()[0] for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(digests) == 1
    assert not list((tmp_path / "store" / "artifacts" / ".incoming").iterdir())


def test_a_store_that_cannot_be_written_is_unreachable(tmp_path, store, folder, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="refused"):
        FolderStore(tmp_path / "file")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        add(store, folder)
    assert not list((store.root / "artifacts" / ".incoming").iterdir())
    assert not list((store.root / "artifacts").glob("[!.]*"))
