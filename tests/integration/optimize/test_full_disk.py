"""A disk without room, a real one of 4 MB: it is said, nothing half-written counts, and afterwards work goes on."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize.engines.local import run_in_child
from optimize.engines.pool import LocalEngine
from optimize.engines.port import Task
from optimize.fidelity import load_outputs, save_outputs
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads
from profiles.load.recording import load_arrays
from profiles.testing import FakeV2Server, Fixed
from registry.errors import InputError, StorageError
from registry.full_disk import full_disk_told
from registry.ledger import Ledger, write_durably
from registry.records import Artifact, ClosedLoop, LoadProfile, TensorSpec
from registry.shared_store import SharedStore
from registry.store import FolderStore
from tests.doubles.small_disk import fill, free_again, small_disk

SPEC = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
LARGE = 1_000_000
ROOT = Path(__file__).parents[3]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size_mb=4) as folder:
        yield folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(os.urandom(LARGE))
    (folder / "beside.bin").write_bytes(b"small")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "ballast")


def add(store: FolderStore | SharedStore, folder: Path) -> Artifact:
    return store.add(folder, format="onnx", entry="model.onnx", inputs=(SPEC,), outputs=(SPEC,))


@pytest.mark.parametrize("room", [0, 9_000])
def test_a_journal_stays_as_it_was(disk: Path, room: int) -> None:
    path = disk / "ledger.jsonl"
    long = TensorSpec(name="x" * 100_000, dtype="float32", shape=())
    with Ledger.open(path) as ledger:
        ledger.commit("TensorSpec", "first", {"n": 1}, SPEC)
        before = path.read_bytes()
        fill(disk, but_bytes=room)
        with pytest.raises(StorageError, match="could not be written: No space left"):
            ledger.commit("TensorSpec", "second", {"n": 2}, long)
        assert path.read_bytes() == before
        assert ledger.find("TensorSpec", {"n": 2}) is None
        free_again(disk)
        assert ledger.commit("TensorSpec", "second", {"n": 2}, long) == long
    assert len(Ledger.read(path).entries("TensorSpec")) == 2


def test_a_journal_that_cannot_even_be_begun(disk: Path) -> None:
    fill(disk)
    with pytest.raises(StorageError, match="could not be written: No space left"), Ledger.open(disk / "w" / "l.jsonl"):
        pass
    free_again(disk)
    with Ledger.open(disk / "w" / "l.jsonl") as ledger:
        ledger.commit("TensorSpec", "first", {"n": 1}, SPEC)


@pytest.mark.parametrize("room", [0, 500_000, 1_006_000])
def test_a_store_keeps_no_half_artifact(disk: Path, made: Path, room: int) -> None:
    store = FolderStore(disk / "store")
    fill(disk, but_bytes=room)
    with pytest.raises(StorageError, match="refused: No space left"):
        add(store, made)
    assert files(disk) == []
    free_again(disk)
    artifact = add(store, made)
    assert (store.path(artifact) / "model.onnx").read_bytes() == (made / "model.onnx").read_bytes()


@pytest.mark.parametrize("room", [0, 500_000])
def test_a_shared_folder_holds_no_half_artifact(disk: Path, made: Path, tmp_path: Path, room: int) -> None:
    store = SharedStore(str(disk / "mount"), FolderStore(tmp_path / "a"))
    store.check()
    fill(disk, but_bytes=room)
    with pytest.raises(StorageError, match="no space is left there"):
        add(store, made)
    with pytest.raises(StorageError, match="no space is left there"):
        SharedStore(str(disk / "mount"), FolderStore(tmp_path / "b")).share_file(made / "model.onnx")
    assert "model.onnx" not in files(disk)
    free_again(disk)
    artifact = add(store, made)
    there = SharedStore(str(disk / "mount"), FolderStore(tmp_path / "c"))
    assert (there.path(artifact) / "model.onnx").read_bytes() == (made / "model.onnx").read_bytes()


def test_what_is_fetched_onto_a_full_disk_is_not_kept(disk: Path, made: Path, tmp_path: Path) -> None:
    artifact = add(SharedStore(str(tmp_path / "mount"), FolderStore(tmp_path / "a")), made)
    there = SharedStore(str(tmp_path / "mount"), FolderStore(disk / "b"))
    fill(disk, but_bytes=500_000)
    with pytest.raises(StorageError, match="refused: No space left"):
        there.path(artifact)
    assert files(disk) == []
    free_again(disk)
    assert (there.path(artifact) / "beside.bin").read_bytes() == b"small"


def test_small_files_and_answers_stay_as_they_were(disk: Path) -> None:
    write_durably(disk / "kept.json", "before")
    save_outputs(disk / "answers.npz", {"y": np.zeros(10)})
    fill(disk)
    with pytest.raises(StorageError, match=r"kept\.json could not be written: No space left"):
        write_durably(disk / "kept.json", "after" * 10_000)
    with pytest.raises(StorageError, match="no space is left on the disk"), full_disk_told():
        save_outputs(disk / "answers.npz", {"y": np.ones(100_000)})
    assert files(disk) == ["answers.npz", "kept.json"]
    assert (disk / "kept.json").read_text() == "before"
    assert load_outputs(disk / "answers.npz")["y"].sum() == 0
    free_again(disk)
    write_durably(disk / "kept.json", "after")
    save_outputs(disk / "answers.npz", {"y": np.ones(100_000)})
    assert load_outputs(disk / "answers.npz")["y"].sum() == 100_000


@pytest.mark.slow
def test_the_times_of_a_window_are_whole_or_absent(disk: Path, tmp_path: Path) -> None:
    wanted = LoadProfile(name="t", load=ClosedLoop(concurrency=4), warmup_s=0.1, duration_s=0.3)
    raw = disk / "raw" / "w.npz"
    with FakeV2Server(Fixed(0.002)) as server, LoadGenerator(None, tmp_path / "generator") as generator:
        payloads = encode_payloads({"x": np.zeros((4, 4), np.float32)}, target=server.target("grpc"))
        fill(disk)
        with pytest.raises(StorageError, match="the times of a window could not be written"):
            generator.run(server.target("grpc"), payloads, wanted, raw_path=raw)
        assert files(disk) == []
        free_again(disk)
        record = generator.run(server.target("grpc"), payloads, wanted, raw_path=raw)
    assert len(load_arrays(raw, record.raw_sha256)["status"]) == record.scheduled


# --- steps and children --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("library", [False, True])
def test_a_step_that_meets_a_full_disk_says_so(disk: Path, tmp_path: Path, library: bool) -> None:
    task = Task(name="t", step="tests.doubles.steps:overfill", arguments={"library": library})
    with LocalEngine(FolderStore(tmp_path / "s"), scratch=disk, locks=tmp_path / "locks") as engine:
        (outcome,) = engine.run([task])
    assert isinstance(outcome.error, StorageError)
    assert "no space is left on the disk" in str(outcome.error)


@pytest.mark.slow
def test_a_child_whose_outcome_has_no_room_is_no_dead_child(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    fill(disk)
    with pytest.raises(StorageError, match="no space is left on the disk"):
        run_in_child("json:dumps", {"obj": 1})
    free_again(disk)
    assert run_in_child("json:dumps", {"obj": 1}) == "1"
    with pytest.raises(StorageError, match="no space is left on the disk"):
        run_in_child("tests.doubles.steps:fill_and_answer", {"disk": str(disk)}, python_path=ROOT)


# --- a campaign ----------------------------------------------------------------------------------------------------


def write_model(path: Path) -> None:
    """Half a megabyte of weights."""
    weights = np.random.default_rng(0).normal(size=(2, 256, 256)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w1"], ["y"]),
        ],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 256])],
        [numpy_helper.from_array(weights[0], "w0"), numpy_helper.from_array(weights[1], "w1")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def burnish_make(disk: Path, model: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "optimize", "make", str(model), "--json", "--work", str(disk / "work")]
    command += ["--out", str(out), "--variant", "float32", "--variant", "ort-optimized"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)  # campaigns wait for each other's cores
def test_a_campaign_ends_and_goes_on(disk: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    write_model(model)
    fill(disk, but_bytes=1_200_000)  # room for the source and the baseline, and not for one variant more
    ended = burnish_make(disk, model, tmp_path / "out")
    assert ended.returncode == 4, ended.stdout + ended.stderr
    told = json.loads(ended.stdout)["error"]
    assert told["kind"] == "storage"
    assert "No space left on device" in told["message"]
    assert "Traceback" not in ended.stderr
    journal = disk / "work" / "ledger.jsonl"
    before = journal.read_bytes()
    assert before.count(b"\n") == 2
    free_again(disk)
    done = burnish_make(disk, model, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert journal.read_bytes().startswith(before)
    assert all(Path(one["path"]).is_file() for one in json.loads(done.stdout)["variants"])


def test_other_errors_are_left_alone() -> None:
    for error in (InputError("bad"), FileNotFoundError("none"), StorageError("said already")):
        with pytest.raises(type(error), match=str(error)), full_disk_told(Path()):
            raise error
