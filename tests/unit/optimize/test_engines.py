"""Cores, and the engine of this machine."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from optimize.engines.choosing import choose_engine, engine_named, engine_on_demand
from optimize.engines.cores import alone_on, cores_alone, pinned, reserve_cores, usable_cores
from optimize.engines.local import ChildFailure
from optimize.engines.pool import LocalEngine
from optimize.engines.port import Engine, Resources, Task
from optimize.engines.scratch import scratch_folder
from registry.errors import InputError
from registry.shared_store import SharedStore
from registry.store import FolderStore
from tests.doubles.busy import LONG_S, until

ROOT = Path(__file__).parents[3]
STEPS = "tests.doubles.steps"


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    return tmp_path / "locks"


def engine_in(tmp_path: Path, workers: int = 1) -> LocalEngine:
    return LocalEngine(FolderStore(tmp_path / "work"), scratch=tmp_path, workers=workers, locks=tmp_path / "locks")


def task(name: str, step: str, resources: Resources | None = None, **arguments: Any) -> Task:
    return Task(name=name, step=f"{STEPS}:{step}", arguments=arguments, resources=resources or Resources())


# --- cores ---------------------------------------------------------------------------------------------------------


def test_who_needs_a_core_alone_has_it_alone(locks: Path):
    using: dict[int, int] = dict.fromkeys(range(3), 0)
    worst: list[int] = []
    guard = threading.Lock()

    def use() -> None:
        with reserve_cores(2, alone=True, among=range(3), folder=locks) as cores:
            with guard:
                for core in cores:
                    using[core] += 1
                worst.append(max(using.values()))
            time.sleep(0.02)
            with guard:
                for core in cores:
                    using[core] -= 1

    threads = [threading.Thread(target=use) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1] * 5


def test_others_share_cores_take_free_ones_first_and_keep_off_those_taken_alone(locks: Path):
    def reserve(count: int, *, alone: bool = False):
        return reserve_cores(count, alone=alone, among=range(3), folder=locks)

    with reserve(1, alone=True) as measured, reserve(1) as first, reserve(1) as second, reserve(2) as third:
        assert {*measured, *first, *second} == {0, 1, 2}
        assert set(third) == {*first, *second}
    with reserve(3, alone=True) as all_of_them:
        assert all_of_them == (0, 1, 2)


def test_more_cores_than_there_are_is_said(locks: Path):
    with (
        pytest.raises(InputError, match="4 cores were asked for, and 3 can be used here"),
        reserve_cores(4, alone=False, among=range(3), folder=locks),
    ):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from optimize.engines.cores import reserve_cores
with reserve_cores(2, alone=True, among=range(2), folder=Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_cores_of_a_killed_process_are_free(locks: Path):
    command = [sys.executable, "-c", HOLDER, str(locks)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
    with reserve_cores(2, alone=True, among=range(2), folder=locks) as cores:
        assert cores == (0, 1)


def test_who_has_to_wait_is_told_once(locks: Path):
    told: list[str] = []

    def wait() -> None:
        with reserve_cores(1, alone=True, among=range(1), folder=locks, waiting=lambda: told.append("waits")):
            pass

    waiting = threading.Thread(target=wait)
    with reserve_cores(1, alone=True, among=range(1), folder=locks):
        waiting.start()
        until(lambda: told)
    waiting.join()
    assert told == ["waits"]


def test_containers_may_share_the_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BURNISH_CORES", str(tmp_path / "shared"))
    with reserve_cores(1, alone=True):
        assert (tmp_path / "shared" / "turn").is_file()


def test_a_folder_of_locks_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BURNISH_CORES", str(tmp_path / "file" / "cores"))
    with pytest.raises(InputError, match="BURNISH_CORES"), reserve_cores(1, alone=True):
        pass
    locks = tmp_path / "locks"
    (locks / "turn").mkdir(parents=True)
    words = r"cannot be shared by .*turn: Is a directory"
    with pytest.raises(InputError, match=words), reserve_cores(1, alone=True, folder=locks):
        pass


def test_a_process_is_pinned_for_a_while():
    before = usable_cores()
    with pinned(before[:1]):
        assert usable_cores() == before[:1]
        seen = subprocess.check_output([sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"])
    assert seen.decode().strip() == str([before[0]])
    assert usable_cores() == before


# --- the engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_each_task_has_an_outcome(tmp_path: Path, workers: int):
    (tmp_path / "given.txt").write_text("what was given")
    with engine_in(tmp_path, workers) as engine:
        port: Engine = engine
        tasks = [task(f"t{number}", "where", number=number) for number in range(5)]
        reading = Task(name="r", step=f"{STEPS}:read", arguments={}, files={"file": tmp_path / "given.txt"})
        found = {one.task.name: one for one in port.run([*tasks, reading, task("no", "refuse")])}
    assert [found[f"t{number}"].result["number"] for number in range(5)] == list(range(5))
    assert found["r"].result == "what was given"
    error = found["no"].error
    assert isinstance(error, InputError)
    assert (error.message, error.hint) == ("the step says no", "Ask another one.")
    one = found["t0"]
    assert one.result["scratch"]
    assert len(one.cpus) == 1
    assert len({outcome.host for outcome in found.values()}) == 1
    assert not list(tmp_path.glob("step-*"))


def test_a_bug_in_a_step_is_no_outcome(tmp_path: Path):
    with engine_in(tmp_path) as engine, pytest.raises(ZeroDivisionError):
        list(engine.run([task("bug", "fail")]))


def test_a_limit_of_time_is_kept_and_told(tmp_path: Path):
    with engine_in(tmp_path) as engine:
        (outcome,) = engine.run([task("slow", "in_child", seconds=60, timeout_s=0.5)])
    assert isinstance(outcome.error, ChildFailure)
    assert outcome.error.kind == "timeout"


def test_two_measurements_never_have_the_same_core(tmp_path: Path):
    alone = Resources(cores=len(usable_cores()), alone=True)
    names = ["a", "b", "c"]
    with engine_in(tmp_path, 3) as engine:
        tasks = [task(name, "begin_and_wait", alone, folder=str(tmp_path), mark=name, wait_s=0.05) for name in names]
        outcomes = list(engine.run(tasks))
    spans = []
    for mark in tmp_path.glob("*.done"):
        begin = int(mark.name.split(".")[2])
        spans.append((begin, begin + 50_000_000))
    spans.sort()
    assert len(spans) == len(outcomes) == 3
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_a_step_that_needs_its_cores_alone_is_pinned_to_them(tmp_path: Path):
    with engine_in(tmp_path) as engine:
        alone = Resources(cores=1, alone=True)
        found = {one.task.name: one for one in engine.run([task("shared", "usable"), task("alone", "usable", alone)])}
    assert found["alone"].result == list(found["alone"].cpus) == list(usable_cores()[:1])
    assert found["shared"].result == list(usable_cores())
    if len(usable_cores()) > 1:
        assert found["alone"].host != found["shared"].host


def test_steps_within_a_step_run_on_its_cores_and_wait_for_none(tmp_path: Path):
    with reserve_cores(None, alone=True, folder=tmp_path / "locks") as cores, engine_in(tmp_path) as engine:
        with alone_on(cores):
            assert cores_alone() == cores
            inner = [task("a", "where", Resources(cores=None)), task("b", "where", Resources(cores=1, alone=True))]
            found = list(engine.run(inner))
            assert [one.cpus for one in found] == [cores, cores[:1]]
            with pytest.raises(InputError, match="and this machine has 1"), alone_on(cores[:1]):
                list(engine.run([task("c", "where", Resources(cores=len(cores) + 1))]))
        assert cores_alone() == ()


def test_who_stops_asking_ends_what_runs(tmp_path: Path):
    with engine_in(tmp_path, 2) as engine:
        slow = [task(f"s{number}", "in_child", seconds=120, timeout_s=120) for number in range(4)]
        outcomes = engine.run([task("first", "where"), *slow])
        assert next(outcomes).task.name == "first"
        outcomes.close()  # a minute and more, if it waited for them
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("burnish-step")]


def test_who_waits_for_cores_of_others_stops_waiting_when_nobody_asks(tmp_path: Path):
    waits, ended = threading.Event(), list[BaseException]()
    store, locks = FolderStore(tmp_path / "work"), tmp_path / "locks"
    engine = LocalEngine(store, scratch=tmp_path, workers=2, locks=locks, waiting=waits.set)

    def ask() -> None:
        try:
            list(engine.run([task("a", "where"), task("b", "where")]))
        except InterruptedError as error:
            ended.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    with reserve_cores(None, alone=True, folder=locks):
        asking.start()
        assert waits.wait(LONG_S)
        engine.__exit__()
        asking.join(LONG_S)
        assert ended


def test_who_waits_for_what_another_makes_stops_waiting_when_nobody_asks(tmp_path: Path):
    another, ours = (SharedStore(str(tmp_path / "mount"), FolderStore(tmp_path / name)) for name in ("another", "ours"))
    unit = {"number": 7, "wait_s": 0.0, "size_bytes": 8, "log": str(tmp_path / "log")}
    with another.leased("unit7"), LocalEngine(ours, scratch=tmp_path, workers=2, locks=tmp_path / "locks") as engine:
        outcomes = engine.run([task("first", "where"), task("waits", "make_once", **unit)])
        assert next(outcomes).task.name == "first"
        ending = threading.Thread(target=outcomes.close, daemon=True)
        ending.start()
        ending.join(LONG_S)
        assert not ending.is_alive()


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (Resources(cores=10_000), "10000 cores, and this machine has"),
        (Resources(memory_mb=1e9), "MB of memory, and this machine has"),
        (Resources(gpus=64), "64 GPUs, and this machine has"),
        (Resources(labels={"shelf": "1"}), "which only a cluster tells apart"),
    ],
)
def test_what_this_machine_lacks_is_said_before_any_work_begins(tmp_path: Path, resources: Resources, words: str):
    tasks = [
        task("fits", "begin_and_wait", folder=str(tmp_path), mark="x", wait_s=0.0),
        task("does-not", "where", resources),
    ]
    with engine_in(tmp_path) as engine, pytest.raises(InputError, match=f"does-not needs .*{words}"):
        list(engine.run(tasks))
    assert not list(tmp_path.glob("x.*"))


# --- scratch folders -----------------------------------------------------------------------------------------------

LEFT = """
import os, signal, sys
from pathlib import Path
from optimize.engines.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "left").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_step_left_is_removed_and_nothing_else(tmp_path: Path):
    root = tmp_path / "scratch"
    subprocess.run([sys.executable, "-c", LEFT, str(root)], cwd=ROOT, check=False)
    assert list(root.rglob("left"))
    with scratch_folder(root) as first, scratch_folder(root) as second:
        assert not list(root.rglob("left"))
        assert first.is_dir()
        assert second.is_dir()
    assert not list(root.iterdir())


# --- which one -----------------------------------------------------------------------------------------------------


def test_the_environment_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(tmp_path)
    for variable in ("BURNISH_ENGINE", "BURNISH_WORKERS", "BURNISH_STORE"):
        monkeypatch.delenv(variable, raising=False)
    assert isinstance(choose_engine(store, scratch=tmp_path), LocalEngine)
    monkeypatch.setenv("BURNISH_WORKERS", "none")
    with pytest.raises(InputError, match="'none', which is no number of workers"):
        choose_engine(store, scratch=tmp_path)
    monkeypatch.setenv("BURNISH_ENGINE", "ray")
    with pytest.raises(InputError, match="a store that they share") as raised:
        choose_engine(store, scratch=tmp_path)
    assert "BURNISH_STORE" in str(raised.value)
    monkeypatch.setenv("BURNISH_ENGINE", "slurm")
    with pytest.raises(InputError, match="'slurm', and the engines are local and ray"):
        choose_engine(store, scratch=tmp_path)


def test_a_name_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BURNISH_ENGINE", "ray")
    assert engine_named() == "ray"
    assert engine_named("local") == "local"
    assert isinstance(choose_engine(FolderStore(tmp_path), scratch=tmp_path, name="local"), LocalEngine)
    with pytest.raises(InputError, match="--engine is 'slurm', and the engines are local and ray"):
        engine_named("slurm")


def test_an_engine_is_opened_once_and_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BURNISH_ENGINE", "ray")  # which cannot be had without a shared store
    with engine_on_demand(FolderStore(tmp_path), scratch=tmp_path):
        pass
    with engine_on_demand(FolderStore(tmp_path), scratch=tmp_path, name="local") as engine:
        assert engine() is engine()


def test_a_step_runs_in_this_process(tmp_path: Path):
    with engine_in(tmp_path) as engine:
        (outcome,) = engine.run([task("here", "where")])
    assert outcome.result["pid"] == os.getpid()
