import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from profiles.deploy import supervise
from profiles.deploy.supervise import MARK, descendants, remove_shared_memory, start_ticks
from tests.doubles.busy import LONG_S, until

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(200)"]
# Ignores SIGTERM, and starts a child in a session of its own that does so too.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, "-I", "-S", __file__, "child"], start_new_session=True)
open(sys.argv[1] if len(sys.argv) > 2 else __file__ + "." + str(len(sys.argv)), "w").close()
time.sleep(200)
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []

    def start(*command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        record = tmp_path / "record.json"
        line = [sys.executable, "-I", "-S", supervise.__file__, "--record", str(record), *options, "--", *command]
        process = subprocess.Popen(line, stdin=subprocess.PIPE, start_new_session=True, env={MARK: "test-mark"})
        running.append(process)
        until(lambda: record.exists() or process.poll() is not None)
        return process

    yield start
    for process in running:
        process.stdin.close()
        process.wait(LONG_S)


def server_of(tmp_path: Path) -> int:
    return json.loads((tmp_path / "record.json").read_text())["server"][0]


def test_exits_as_the_server_does(started: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    assert started(sys.executable, "-c", "import sys; sys.exit(7)").wait(LONG_S) == 7
    assert started(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)").wait(LONG_S) == 128 + 9
    assert not (tmp_path / "record.json").exists()


def test_the_record_names_the_processes(started: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    supervisor = started(*SLEEP)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["mark"] == "test-mark"
    assert record["supervisor"] == [supervisor.pid, start_ticks(supervisor.pid)]
    assert record["parent"] == [os.getpid(), start_ticks(os.getpid())]
    server, ticks = record["server"]
    assert start_ticks(server) == ticks
    assert os.getsid(server) == server


@pytest.mark.parametrize("way", ["the pipe closes", signal.SIGTERM, signal.SIGINT])
def test_ends_the_server_when_told(
    started: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, way: str | signal.Signals
) -> None:
    supervisor = started(*SLEEP)
    server = server_of(tmp_path)
    if isinstance(way, str):
        supervisor.stdin.close()
    else:
        supervisor.send_signal(way)
    assert supervisor.wait(LONG_S) == 128 + signal.SIGTERM
    assert start_ticks(server) is None
    assert not (tmp_path / "record.json").exists()


def test_kills_what_does_not_end_and_what_it_started(
    started: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    supervisor = started(sys.executable, "-I", "-S", str(script), options=("--grace", "0.2"))
    until(lambda: (tmp_path / "stubborn.py.1").exists() and (tmp_path / "stubborn.py.2").exists())
    family = descendants(supervisor.pid)
    assert len(family) == 2
    supervisor.stdin.close()
    assert supervisor.wait(LONG_S) == 128 + signal.SIGKILL
    assert [pid for pid in family if start_ticks(pid) is not None] == []


def test_kills_an_orphan_of_the_server(started: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    supervisor = started(sys.executable, "-I", "-S", str(script))
    until((tmp_path / "stubborn.py.2").exists)
    family = descendants(supervisor.pid)
    os.kill(server_of(tmp_path), signal.SIGKILL)
    assert supervisor.wait(LONG_S) == 128 + signal.SIGKILL
    assert [pid for pid in family if start_ticks(pid) is not None] == []


def test_the_server_dies_with_a_killed_supervisor(
    started: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    supervisor = started(*SLEEP)
    server = server_of(tmp_path)
    supervisor.kill()
    supervisor.wait(LONG_S)
    until(lambda: start_ticks(server) is None)


def test_a_parent_that_is_gone_is_noticed_although_somebody_holds_the_pipe(tmp_path: Path) -> None:
    # The parent forks a holder of the pipe and ends; the holder lives on.
    record = tmp_path / "record.json"
    parent = f"""
import os, subprocess, sys, time
command = [sys.executable, "-I", "-S", {supervise.__file__!r}, "--record", {str(record)!r}, "--"] + {SLEEP!r}
process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
while not os.path.exists({str(record)!r}):
    time.sleep(0.01)
holder = os.fork()
if holder == 0:
    time.sleep(200)
    os._exit(0)
print(holder, flush=True)
os._exit(0)
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        holder = int(process.stdout.readline())
        try:
            until(lambda: not record.exists())
            assert start_ticks(holder) is not None
        finally:
            os.kill(holder, signal.SIGKILL)


def test_holds_the_server_to_its_cpus(started: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    started(*SLEEP, options=("--cpus", str(cpu)))
    assert os.sched_getaffinity(server_of(tmp_path)) == {cpu}


def test_removes_the_servers_shared_memory_only(
    started: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    prefix = f"burnish-test-{os.getpid()}"
    region, other = Path(f"/dev/shm/{prefix}-one"), Path(f"/dev/shm/other-{prefix}")
    region.touch()
    other.touch()
    try:
        supervisor = started(*SLEEP, options=("--shm-prefix", prefix))
        supervisor.stdin.close()
        supervisor.wait(LONG_S)
        assert not region.exists()
        assert other.exists()
        assert remove_shared_memory("") == []
    finally:
        other.unlink()


def test_a_command_that_does_not_exist_is_an_error(started: Callable[..., subprocess.Popen[bytes]]) -> None:
    assert started("/nonexistent/server").wait(LONG_S) == 127


def test_start_ticks_of_nobody() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert start_ticks(gone.pid) is None
    assert start_ticks(os.getpid()) == start_ticks(os.getpid())
