"""No server outlives the process that deployed it, however that process ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from profiles.deploy import local
from profiles.deploy.reaper import reap
from profiles.deploy.supervise import MARK
from tests.doubles.busy import LONG_S, until
from tests.doubles.candidates import candidate
from tests.doubles.models import mlp, write_onnx

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PARENT = """
import sys, time
from pathlib import Path
from profiles.deploy.local import LocalCluster
from tests.doubles.candidates import candidate
from tests.doubles.models import mlp, write_onnx

work = Path(sys.argv[1])
artifact = write_onnx(mlp(), work / "files")
cluster = LocalCluster(work)
for serving in ({"parallel_workers": 1}, {"server": "triton", "instances": 2}):
    cluster.deploy(candidate(**serving), artifact, work / "files", timeout_s=100)
print("deployed", flush=True)
sys.stdin.read(1)
"""


@pytest.fixture(autouse=True)
def _servers_here() -> None:
    for server, here in local.available_servers().items():
        if here.version is None:
            pytest.skip(f"{server}: {here.reason}")


def deployed(work: Path) -> tuple["subprocess.Popen[str]", list[psutil.Process]]:
    """A process that has deployed MLServer with a worker, and Triton with two stubs; and all of its descendants."""
    command = [sys.executable, "-c", PARENT, str(work)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout.readline() == "deployed\n"
    family = psutil.Process(parent.pid).children(recursive=True)
    names = " ".join(process.name() for process in family)
    assert len(family) >= 7, names
    assert "tritonserver" in names
    assert "triton_python" in names
    return parent, family


def regions(family: list[psutil.Process]) -> set[Path]:
    """The shared memory and semaphores under /dev/shm that the processes have mapped."""
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in family)
    return {path for name in re.findall(r"/dev/shm/\S+", maps) if (path := Path(name)).exists()}


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # since it was found to run
        return False


def finish(parent: "subprocess.Popen[str]") -> None:
    parent.wait(LONG_S)
    parent.stdin.close()
    parent.stdout.close()


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "its normal end"])
def test_nothing_outlives_the_parent(tmp_path: Path, way: signal.Signals | str) -> None:
    parent, family = deployed(tmp_path)
    mine = regions(family)
    assert {path.name.split("-")[0] for path in mine} == {"burnish", "sem.mp"}
    if isinstance(way, str):
        parent.stdin.close()
    else:
        parent.send_signal(way)
    finish(parent)
    until(lambda: not any(map(lives, family)))
    assert reap(tmp_path) == []
    assert not [path for path in mine if path.exists()]
    assert not list((tmp_path / "servers").glob("*.json"))


def test_what_outlives_a_killed_supervisor_is_reaped(tmp_path: Path) -> None:
    parent, family = deployed(tmp_path)
    mine = regions(family)
    supervisors = [process for process in family if process.ppid() == parent.pid]
    assert len(supervisors) == 2
    # The parent first, then each supervisor before it can have noticed.
    for process in supervisors:
        process.suspend()
    parent.kill()
    finish(parent)
    for process in supervisors:
        process.kill()
    assert len(reap(tmp_path)) == 2
    until(lambda: not any(map(lives, family)))
    assert not [path for path in mine if path.exists()]
    assert reap(tmp_path) == []


def test_ctrl_c_in_the_terminal_is_the_parents_business(tmp_path: Path) -> None:
    """Servers are in sessions of their own: a signal to the parent's process group does not reach them."""
    artifact = write_onnx(mlp(), tmp_path / "files")
    with local.LocalCluster(tmp_path / "work") as cluster:
        deployment = cluster.deploy(candidate(), artifact, tmp_path / "files", timeout_s=60)
        family = psutil.Process(deployment._process._child.supervisor).children(recursive=True)
        for process in family:
            assert os.getpgid(process.pid) != os.getpgid(0)
            assert process.environ()[MARK].startswith("burnish-")
