"""Results that outlive the machine they were found on."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from optimize.mirror import StoreMirror
from registry.codec import digest, file_sha256
from registry.records import EngineSpec, Failure, Fidelity
from registry.shared_store import SharedStore
from registry.store import FolderStore
from tests.doubles.rounds import measured

RAW = "raw/c/round-0/closed.npz"
WORK = {"candidate": "c", "round": 0}


def mirror_in(folder: Path, mount: Path, campaign: str = "tiny") -> StoreMirror:
    folder.mkdir(exist_ok=True)
    return StoreMirror(SharedStore(str(mount), FolderStore(folder / "cache")), folder, campaign)


def test_a_round_is_found_with_its_arrays_on_another_machine(tmp_path: Path):
    made = measured(tmp_path / "a")
    mirror_in(tmp_path / "a", tmp_path / "mount").keep("Round", WORK, made)
    there = mirror_in(tmp_path / "b", tmp_path / "mount")
    assert there.find("Round", WORK) == made
    assert file_sha256(tmp_path / "b" / RAW) == made.runs[0].raw_sha256
    assert there.find("Round", {**WORK, "round": 1}) is None
    assert there.find("Capacity", WORK) is None
    assert mirror_in(tmp_path / "c", tmp_path / "mount", "another").find("Round", WORK) is None


def test_workers_of_one_node_do_not_take_files_from_each_other(tmp_path: Path):
    made = measured(tmp_path / "a")
    mirror_in(tmp_path / "a", tmp_path / "mount").keep("Round", WORK, made)
    cache = FolderStore(tmp_path / "cache")

    def found(number: int) -> object:
        folder = tmp_path / f"worker-{number}"
        return StoreMirror(SharedStore(str(tmp_path / "mount"), cache), folder, "tiny").find("Round", WORK)

    with ThreadPoolExecutor(16) as workers:
        assert list(workers.map(found, range(48))) == [made] * 48
    assert not list(cache.root.glob("files/*"))


def test_answers_come_with_what_is_said_of_them(tmp_path: Path):
    judged = Fidelity(
        variant_id="v",
        engine=EngineSpec(name="onnxruntime"),
        engine_version="1",
        instruction_set="avx2",
        batch_size=1,
        samples_digest="s",
        samples=3,
        task_metric="accuracy",
        metrics={},
    )
    components = {"variant": "v"}
    name = f"outputs/{digest(components)}.npz"
    (tmp_path / "a" / "outputs").mkdir(parents=True)
    (tmp_path / "a" / name).write_bytes(b"answers")
    mirror_in(tmp_path / "a", tmp_path / "mount").keep("Fidelity", components, judged)
    assert mirror_in(tmp_path / "b", tmp_path / "mount").find("Fidelity", components) == judged
    assert (tmp_path / "b" / name).read_bytes() == b"answers"


def test_the_first_result_counts_with_its_arrays(tmp_path: Path):
    first, second = measured(tmp_path / "a", 1.0), measured(tmp_path / "b", 2.0)
    mirror_in(tmp_path / "a", tmp_path / "mount").keep("Round", WORK, first)
    assert mirror_in(tmp_path / "b", tmp_path / "mount").keep("Round", WORK, second) == first
    assert file_sha256(tmp_path / "b" / RAW) == first.runs[0].raw_sha256


def test_a_round_whose_arrays_are_lost_counts_as_nothing(tmp_path: Path):
    made = measured(tmp_path / "a")
    mirror_in(tmp_path / "a", tmp_path / "mount").keep("Round", WORK, made)
    (lost,) = (tmp_path / "mount" / "files").rglob("content")
    lost.unlink()
    there = mirror_in(tmp_path / "b", tmp_path / "mount")
    assert there.find("Round", WORK) is None
    again = measured(tmp_path / "b", 3.0)
    assert there.keep("Round", WORK, again) == again


def test_no_record_has_files_written_elsewhere(tmp_path: Path):
    made = measured(tmp_path / "a")
    [run] = made.runs
    astray = replace(made, runs=(replace(run, raw="../astray.npz"),))
    (tmp_path / "astray.npz").write_bytes((tmp_path / "a" / run.raw).read_bytes())
    mirror_in(tmp_path / "a", tmp_path / "mount").keep("Round", WORK, astray)
    (tmp_path / "astray.npz").unlink()
    assert mirror_in(tmp_path / "b", tmp_path / "mount").find("Round", WORK) is None
    assert not (tmp_path / "astray.npz").exists()


@pytest.mark.parametrize("kind", ["Variant", "Screening"])
def test_a_failure_is_a_result_too(tmp_path: Path, kind: str):
    failure = Failure(subject="v", phase="make", kind="not_applicable", reason="no")
    mirror_in(tmp_path / "a", tmp_path / "mount").keep(kind, WORK, failure)
    assert mirror_in(tmp_path / "b", tmp_path / "mount").find(kind, WORK) == failure
