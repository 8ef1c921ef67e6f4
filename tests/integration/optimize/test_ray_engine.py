"""The engine of Ray on a real cluster of two nodes on this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

ray = pytest.importorskip("ray")

from optimize.campaign import make_variants  # noqa: E402
from optimize.engines import ray_engine  # noqa: E402
from optimize.engines.port import Resources, Task  # noqa: E402
from optimize.engines.ray_engine import RayEngine  # noqa: E402
from optimize.testing import tiny_conv_net  # noqa: E402
from registry.errors import InputError, UnreachableError  # noqa: E402
from registry.shared_store import SharedStore  # noqa: E402
from registry.store import FolderStore  # noqa: E402
from tests.doubles.busy import LONG_S, until  # noqa: E402
from tests.doubles.ray_cluster import Cluster, ray_cluster  # noqa: E402

STEPS = "tests.doubles.steps"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # campaigns wait for each other's cores
    pytest.mark.xdist_group("ray"),
    # Ray leaves sockets and files to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    # Ray's sockets are in the folder, and a path of a socket is short.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        ray_cluster(2, Path(folder)) as started,
    ):
        yield started


@pytest.fixture
def cluster(running: Cluster) -> str:
    return running.address


@pytest.fixture(autouse=True)
def environment_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine sets for Ray is put back."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for variable in ("RAY_ADDRESS", "BURNISH_ENGINE", "BURNISH_STORE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def store(tmp_path: Path) -> SharedStore:
    return SharedStore(str(tmp_path / "mount"), FolderStore(tmp_path / "work"))


def task(name: str, step: str, resources: Resources | None = None, **arguments: Any) -> Task:
    return Task(name=name, step=f"{STEPS}:{step}", arguments=arguments, resources=resources or Resources())


def test_tasks_run_on_nodes_and_tell_what_became_of_them(cluster: str, store: SharedStore, tmp_path: Path):
    (tmp_path / "given.txt").write_text("what was given")
    with RayEngine(store, address=cluster) as engine:
        assert engine.nodes == 2
        tasks = [task(f"t{number}", "where", number=number) for number in range(4)]
        tasks += [task("shelf", "where", Resources(labels={"shelf": "1"})), task("no", "refuse")]
        tasks.append(Task(name="r", step=f"{STEPS}:read", arguments={}, files={"file": tmp_path / "given.txt"}))
        found = {one.task.name: one for one in engine.run(tasks)}
        assert [found[f"t{number}"].result["number"] for number in range(4)] == list(range(4))
        assert found["r"].result == "what was given"
        assert isinstance(found["no"].error, InputError)
        assert found["no"].error.hint == "Ask another one."
        assert {one.host for one in found.values()} == {found["t0"].host}
        assert os.getpid() not in {found[f"t{number}"].result["pid"] for number in range(4)}

        for resources, words in (
            (Resources(cores=7), "7 cores"),
            (Resources(gpus=1, accelerator="L4"), "1 GPUs of type L4"),
            (Resources(memory_mb=1e7), "1e.07 MB"),
            (Resources(labels={"shelf": "9"}), "shelf=9"),
        ):
            with pytest.raises(InputError, match=f"no node of the Ray cluster has what big needs: .*{words}"):
                list(engine.run([task("big", "where", resources)]))
            with pytest.raises(InputError, match=f"what the measuring needs: .*{words}"):
                engine.check("the measuring", resources)
        engine.check("the measuring", Resources(cores=None, alone=True, labels={"shelf": "1"}))
        with pytest.raises(InputError, match="which nodes of a cluster do not have"):
            list(engine.run([Task(name="own", step=f"{STEPS}:where", arguments={}, python_path=tmp_path)]))


def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_done_twice(
    cluster: str, store: SharedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # So often that hardly one of these is begun and ended between two looks.
    monkeypatch.setattr(ray_engine, "_MARKS_S", 0.05)
    names = [f"w{number}" for number in range(6)]
    victims: list[str] = []
    begun: list[tuple[str, str]] = []
    over = threading.Event()

    def kill() -> None:
        while not victims and not over.wait(0.01):
            for mark in tmp_path.glob("w?.*"):
                if mark.suffix != ".done" and _killed_at(mark):
                    victims.append(mark.name)
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with RayEngine(store, address=cluster) as engine:
            tasks = [task(name, "begin_and_wait", folder=str(tmp_path), mark=name, wait_s=0.5) for name in names]
            outcomes = list(engine.run(tasks, begun=lambda task, where: begun.append((task.name, where))))
    finally:
        over.set()
        killer.join()
    assert len(victims) == 1
    assert begun
    assert {name for name, _ in begun} <= set(names)
    assert {where for _, where in begun} == {socket.gethostname()}
    assert sorted(one.result for one in outcomes) == names
    assert sorted(mark.name.split(".")[0] for mark in tmp_path.glob("w*.done")) == names


def _killed_at(mark: Path) -> bool:
    """Kills the worker that has left a mark, if it is in the middle of that, and not on to the next meanwhile."""
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(int(mark.name.split(".")[1]))
        worker.suspend()
        until(lambda: worker.status() == psutil.STATUS_STOPPED)
        if mark.exists():
            worker.kill()
            return True
        worker.resume()
    return False


def test_variants_are_made_on_the_cluster_though_a_worker_is_killed_at_it(
    running: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BURNISH_ENGINE", "ray")
    monkeypatch.setenv("RAY_ADDRESS", running.address)
    monkeypatch.setenv("BURNISH_STORE", str(tmp_path / "mount"))
    model = tmp_path / "source" / "model.onnx"
    tiny_conv_net(model.parent)
    victims: list[psutil.Process] = []
    over = threading.Event()

    def kill() -> None:
        while not victims and not over.wait(0.02):
            # It may have ended since it was seen.
            with suppress(psutil.NoSuchProcess):
                if (worker := _making(running.pid)) is not None:
                    worker.kill()
                    victims.append(worker)

    killer = threading.Thread(target=kill)
    killer.start()
    names = ("float32", "ort-optimized")
    where: dict[str, Any] = {"out": tmp_path / "out", "work": tmp_path / "work", "observer": Quiet()}
    try:
        made, failures = make_variants(model, variants=names, calibration=None, **where)
    finally:
        over.set()
        killer.join()
    assert victims
    assert not failures
    assert tuple(one["name"] for one in made) == names
    assert all(Path(one["path"]).is_file() for one in made)
    assert len(list((tmp_path / "mount" / "records").glob("variant-*"))) == 2
    assert not [path for path in (tmp_path / "mount" / "leases").rglob("*") if path.is_file()]


class Quiet:
    """An observer that tells nobody."""

    def phase(self, name: str, total: int) -> None: ...

    def begun(self, kind: str, subject: str, where: str = "") -> None: ...

    def ended(self, kind: str, subject: str) -> None: ...

    def done(self, subject: str, outcome: str) -> None: ...

    def note(self, text: str) -> None: ...


def _making(cluster: int) -> psutil.Process | None:
    """A worker of Ray that makes a variant just now: the parent of the process in which that is done."""
    there = psutil.Process(cluster).children(recursive=True)
    for process in there:
        with suppress(psutil.NoSuchProcess):
            if "optimize.engines.child" in process.cmdline() and (worker := process.parent()) in there:
                return worker
    return None


def test_sigterm_ends_the_campaign_and_what_runs_for_it(cluster: str, tmp_path: Path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    command = [sys.executable, str(script), cluster, str(tmp_path)]
    driver = subprocess.Popen(command, cwd=Path(__file__).parents[3], env={**os.environ, "PYTHONPATH": "."})
    try:
        while not (marks := list(tmp_path.glob("long.*"))):
            assert driver.poll() is None
            time.sleep(0.02)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=LONG_S) == 143
    finally:
        driver.kill()
        driver.wait()
    worker = int(marks[0].name.split(".")[1])
    until(lambda: not psutil.pid_exists(worker))
    assert not list(tmp_path.glob("*.done"))


DRIVER = """
import sys
from pathlib import Path
from optimize.cli.endings import Terminated, terminable
from optimize.engines.port import Task
from optimize.engines.ray_engine import RayEngine
from registry.shared_store import SharedStore
from registry.store import FolderStore
address, folder = sys.argv[1], Path(sys.argv[2])
store = SharedStore(str(folder / "mount"), FolderStore(folder / "work"))
task = Task(
    name="long", step="tests.doubles.steps:begin_and_wait",
    arguments={"folder": str(folder), "mark": "long", "wait_s": 300.0},
)
try:
    with terminable(), RayEngine(store, address=address) as engine:
        list(engine.run([task]))
except Terminated:
    sys.exit(143)
"""


class AnotherThere(SharedStore):
    """A store at whose URI the nodes find another place than this machine does."""

    there = ""

    @property
    def uri(self) -> str:
        return self.there


@pytest.mark.parametrize(
    ("there", "words"), [("file/store", "Not a directory"), ("empty", "is another place there, without what")]
)
def test_a_node_that_cannot_use_the_store_is_said_before_any_work(cluster: str, tmp_path: Path, there: str, words: str):
    (tmp_path / "file").write_text("")
    store = AnotherThere(str(tmp_path / "mount"), FolderStore(tmp_path / "work"))
    store.there = str(tmp_path / there)
    with (
        pytest.raises(UnreachableError, match=rf"cannot use the shared store: .*{words}"),
        RayEngine(store, address=cluster),
    ):
        pass
    assert not list((tmp_path / "mount" / "progress").iterdir())


class Noticing:
    """Ray's module as far as it asks nodes, where all but one have died and Ray notices at the third look.

    A real one takes some 20 s for that.
    """

    exceptions = ray.exceptions

    def __init__(self, *names: str) -> None:
        self._ids = {name: f"{number:056x}" for number, name in enumerate(names, start=1)}
        self._looks = 0

    def nodes(self) -> list[dict[str, Any]]:
        self._looks += 1
        return [
            {"NodeID": node_id, "NodeManagerHostname": name, "Alive": name == "well" or self._looks < 3}
            for name, node_id in self._ids.items()
        ]

    def remote(self, function: Callable[..., str]) -> SimpleNamespace:
        def options(*, scheduling_strategy: Any, **_: Any) -> SimpleNamespace:
            def begin(*arguments: str) -> SimpleNamespace:
                future: Future[str] = Future()
                if scheduling_strategy.node_id == self._ids.get("well"):
                    future.set_result(function(*arguments))
                else:
                    future.set_exception(ray.exceptions.TaskUnschedulableError("the node has died"))
                return SimpleNamespace(future=lambda: future)

            return SimpleNamespace(remote=begin)

        return SimpleNamespace(options=options)


def test_nodes_that_have_died_are_left_out_once_ray_notices(
    store: SharedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))

    def looked_at(*names: str) -> list[str]:
        engine = RayEngine(store)
        engine._ray = Noticing(*names)
        engine._nodes = engine._ray.nodes()
        engine._look_at_nodes()
        return [node["NodeManagerHostname"] for node in engine._nodes]

    assert looked_at("ill", "well", "worse") == ["well"]
    assert "the node ill of the Ray cluster has gone: nothing runs there" in caplog.messages
    with pytest.raises(UnreachableError, match="all nodes of the Ray cluster have gone"):
        looked_at("ill")


@pytest.mark.parametrize("versions", [("2.59.0", "3.11.7"), (ray.__version__, "3.9.2")])
def test_another_version_of_ray_or_python_is_said(
    cluster: str, store: SharedStore, monkeypatch: pytest.MonkeyPatch, versions: tuple[str, str]
):
    monkeypatch.setattr(ray._private.utils, "compute_version_info", lambda: versions)
    with (
        pytest.raises(
            InputError, match=rf"does not fit: Version mismatch: .*{re.escape(versions[0])}.*{re.escape(versions[1])}"
        ),
        RayEngine(store, address=cluster),
    ):
        pass
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("127.0.0.1:1", UnreachableError, "there is no Ray cluster at 127.0.0.1:1: Connection refused"),
        ("nowhere", InputError, "'nowhere' is no address of a Ray cluster"),
        ("ray://127.0.0.1:10001", InputError, "is no address of a Ray cluster"),
    ],
)
def test_no_cluster_at_the_address_is_said(store: SharedStore, address: str, error: type[Exception], words: str):
    with pytest.raises(error, match=words), RayEngine(store, address=address):
        pass


def test_a_ray_of_ones_own_listens_on_loopback_only_and_leaves_nothing(
    store: SharedStore, monkeypatch: pytest.MonkeyPatch
):
    others = psutil.Process().children(recursive=True)
    # Ray's sockets are in the folder, and a path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="r-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with RayEngine(store) as engine:
            (outcome,) = engine.run([task("one", "where")])
            assert outcome.error is None
            assert list(Path(folder).glob("burnish-ray-*"))
            listening = {
                connection.laddr.ip
                for process in psutil.Process().children(recursive=True)
                if process not in others
                for connection in _connections(process)
                if connection.status == psutil.CONN_LISTEN
            }
        assert not list(Path(folder).glob("burnish-ray-*"))
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def _connections(process: psutil.Process) -> list[Any]:
    try:
        return list(process.net_connections(kind="inet"))
    except psutil.Error:
        return []
