import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiles.deploy.reaper import end_server, reap
from profiles.deploy.supervise import MARK, start_ticks
from tests.doubles.busy import LONG_S, until

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(200)"]
KEYS = ("mark", "shm_prefix", "server", "supervisor", "parent")
GONE = [2**22 - 1, 1]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    mark = f"reaper-test-{os.getpid()}"
    with subprocess.Popen(SLEEP, env={MARK: mark}) as process:
        # The kernel shows a program's environment a moment after it has begun.
        until(lambda: mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes())
        yield process
        process.kill()


def record(work: Path, **fields: object) -> Path:
    path = work / "servers" / "abc.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"mark": "", "shm_prefix": "", "server": GONE, "supervisor": GONE, "parent": GONE, **fields}
    path.write_text(json.dumps(whole))
    return path


def named(process: subprocess.Popen[bytes]) -> list[int | None]:
    return [process.pid, start_ticks(process.pid)]


def test_nothing_to_do_where_nothing_was(tmp_path: Path) -> None:
    assert reap(tmp_path) == []


def test_ends_the_server_of_a_parent_that_is_gone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path = record(tmp_path, server=named(sleeper))
    (told,) = reap(tmp_path)
    assert "1 processes" in told
    assert sleeper.wait(LONG_S) == -9
    assert not path.exists()


def test_leaves_the_server_of_a_living_parent(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path = record(tmp_path, server=named(sleeper), parent=[os.getpid(), start_ticks(os.getpid())])
    assert reap(tmp_path) == []
    assert sleeper.poll() is None
    assert path.exists()


def test_leaves_a_pid_that_somebody_else_has_since(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    pid, ticks = named(sleeper)
    path = record(tmp_path, server=[pid, ticks - 1])
    reap(tmp_path)
    assert sleeper.poll() is None
    assert not path.exists()


def test_a_parents_pid_in_other_hands_is_no_parent(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    record(tmp_path, server=named(sleeper), parent=[os.getpid(), start_ticks(os.getpid()) - 1])
    reap(tmp_path)
    assert sleeper.wait(LONG_S) == -9


def test_finds_descendants_by_their_mark(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    record(tmp_path, mark=f"reaper-test-{os.getpid()}")
    reap(tmp_path)
    assert sleeper.wait(LONG_S) == -9


def test_removes_leaked_shared_memory(tmp_path: Path) -> None:
    prefix = f"burnish-reaper-{os.getpid()}"
    region = Path(f"/dev/shm/{prefix}-1")
    region.touch()
    record(tmp_path, shm_prefix=prefix)
    (told,) = reap(tmp_path)
    assert "1 shared memory regions" in told
    assert not region.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"server": 1}', json.dumps(dict.fromkeys(KEYS, 1))])
def test_a_file_that_is_no_record_is_removed(tmp_path: Path, text: str) -> None:
    path = record(tmp_path)
    path.write_text(text)
    assert reap(tmp_path) == []
    assert not path.exists()


def test_end_server_asks_for_no_parent(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path = record(tmp_path, server=named(sleeper), parent=[os.getpid(), start_ticks(os.getpid())])
    end_server(path)
    assert sleeper.wait(LONG_S) == -9
    assert not path.exists()
    end_server(path)
