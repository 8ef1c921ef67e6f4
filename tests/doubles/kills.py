"""Batches of work on a Ray cluster whose parts are killed with SIGKILL: the driver, workers, nodes, the S3 server.

As a program it is the driver: it runs what is not done yet of a batch, and keeps each result in a journal.
"""

import faulthandler
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil

from optimize.engines.port import Task
from optimize.engines.ray_engine import RayEngine
from registry.errors import BurnishError, InputError, StorageError
from registry.ledger import Ledger
from registry.records import TensorSpec
from registry.shared_store import SharedStore
from registry.store import FolderStore
from tests.doubles.ray_cluster import Cluster
from tests.doubles.rclone import S3Server
from tests.doubles.steps import numbered

ROOT = Path(__file__).parents[2]
Victim = Literal["driver", "worker", "node", "server"]
URI = "s3://models/kills"
_POLL_S = 0.05
_PATIENCE_S = 180.0
_SERVER_AWAY_S = (1.0, 4.0)
_REFUSED = 4


@dataclass(frozen=True, slots=True)
class Kill:
    """Who is killed, and when.

    Attributes:
        victim: who.
        after_s: so long after the moment from which it is counted.
        at_work: whether that is the next begin of a unit; else it is the end of the kill before, or the start of all.
    """

    victim: Victim
    after_s: float
    at_work: bool


def random_kills(
    seed: int, count: int, *, longest_s: float, victims: Sequence[Victim] = get_args(Victim), at_work: float = 0.8
) -> list[Kill]:
    """Kills at random moments: each of the victims once, in random order, and so on.

    Args:
        seed: of all that is left to chance.
        count: how many.
        longest_s: after the moment from which they are counted.
        victims: those that may be killed.
        at_work: the share that waits until work is under way.
    """
    chance = random.Random(seed)
    found: list[Kill] = []
    while len(found) < count:
        for victim in chance.sample(list(victims), len(victims)):
            found.append(Kill(victim, chance.uniform(0, longest_s), chance.random() < at_work))
    return found[:count]


@dataclass(frozen=True, slots=True)
class Batch:
    """Units of work that one driver is to do.

    Attributes:
        folder: of the driver: its journal, its local store, its log.
        log: file in which each making of a unit is noted, the same for all batches.
        first: number of the first unit.
        count: how many there are.
        wait_s: how long each takes beside its commit, most of it afterwards.
        size_bytes: of the artifact that each commits.
    """

    folder: Path
    log: Path
    first: int
    count: int
    wait_s: float
    size_bytes: int

    @property
    def units(self) -> range:
        """Numbers of the units."""
        return range(self.first, self.first + self.count)

    def tasks(self) -> list[Task]:
        """The units as an engine takes them."""
        common = {"wait_s": self.wait_s, "size_bytes": self.size_bytes, "log": str(self.log)}
        step = "tests.doubles.steps:make_once"
        return [Task(name=f"unit{one}", step=step, arguments={"number": one, **common}) for one in self.units]

    def found(self) -> dict[int, str]:
        """Unit -> digest of its artifact, as the journal has them."""
        path = self.folder / "ledger.jsonl"
        entries = Ledger.read(path).entries("TensorSpec") if path.is_file() else ()
        return {int(entry.components["number"]): entry.record.name for entry in entries}


class Siege:
    """A driver that is started again until its batch is done, and batches one after the other, while parts are killed.

    Attributes:
        batches: those that were begun.
        runs: how many drivers were started.
    """

    def __init__(self, cluster: Cluster, server: S3Server, folder: Path, *, seed: int, of: Batch) -> None:
        """Starts nothing.

        Args:
            cluster: where the work is done.
            server: of the shared store; the environment leads to it.
            folder: an empty one.
            seed: of what is left to chance: which worker, which node, how long the server is away.
            of: what the first batch is, but for its folder; each other one has the units that follow.
        """
        self.batches: list[Batch] = []
        self.runs = 0
        self._cluster = cluster
        self._server = server
        self._folder = folder
        self._of = of
        self._chance = random.Random(seed)
        self._driver: subprocess.Popen[bytes] | None = None
        self._excused = False

    def __enter__(self) -> "Siege":
        return self

    def __exit__(self, *_: object) -> None:
        if self._driver is not None:
            self._driver.kill()
            self._driver.wait()

    def endure(self, kills: Sequence[Kill], say: Callable[[str], None] = lambda _: None) -> None:
        """Returns when all kills are done, and after them the batch that was under way."""
        begin = time.monotonic()
        for number, kill in enumerate(kills, start=1):
            if kill.at_work:
                self._until_work_begins()
            self._go_on(kill.after_s)
            killed = self._strike(kill.victim)
            begun, committed = self.makings()
            say(
                f"{time.monotonic() - begin:6.1f} s: kill {number} of {len(kills)}: {killed}; batch "
                f"{len(self.batches)}, {begun} makings begun and {committed} committed so far"
            )
        while self._keep_going(again=True):
            time.sleep(_POLL_S)

    def makings(self) -> tuple[int, int]:
        """How many makings of units were begun so far, and how many committed."""
        log = self._of.log.read_text().split() if self._of.log.exists() else []
        return log.count("begun"), log.count("committed")

    def done_twice(self) -> list[int]:
        """Units that were begun again although a result of theirs had been committed."""
        committed: set[str] = set()
        again: list[int] = []
        for line in self._of.log.read_text().splitlines():
            what, unit = line.split()
            if what == "committed":
                committed.add(unit)
            elif unit in committed:
                again.append(int(unit))
        return again

    def lost(self) -> list[int]:
        """Units whose result is not in the journal, or not to be had from the shared store byte for byte."""
        store = SharedStore(URI, FolderStore(self._folder / "reader"))
        missing: list[int] = []
        for batch in self.batches:
            found = batch.found()
            missing += [unit for unit in batch.units if not _is_whole(store, found.get(unit), unit, batch)]
        return missing

    # --- parts of it ---

    def _go_on(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self._keep_going()
            if time.monotonic() >= deadline:
                return
            time.sleep(_POLL_S)

    def _until_work_begins(self) -> None:
        begun = self.makings()[0]
        deadline = time.monotonic() + _PATIENCE_S
        while self.makings()[0] == begun:
            if time.monotonic() > deadline:
                raise AssertionError(f"no work was begun:\n{self._where_it_hangs()}")
            self._go_on(_POLL_S)

    def _where_it_hangs(self) -> str:
        """The end of the driver's log, with what each of its threads is at."""
        assert self._driver is not None
        self._driver.send_signal(signal.SIGUSR1)
        time.sleep(1)
        return self._log().read_text()[-6000:]

    def _keep_going(self, *, again: bool = False) -> bool:
        """Has a driver at work; False where the batch is done, if no other one is to be begun (``again``)."""
        code = None if self._driver is None else self._driver.poll()
        if self._driver is not None and code is None:
            return True
        if code == 0 and again:
            return False
        # 4 is what a fault of cluster or store is said with.
        if code not in {None, 0, _REFUSED} and not self._excused:
            raise AssertionError(f"the driver ended with {code}:\n{self._log().read_text()[-3000:]}")
        if code in {None, 0}:
            self.batches.append(self._next_batch())
        self._excused = False
        self._start()
        return True

    def _next_batch(self) -> Batch:
        number, of = len(self.batches), self._of
        folder = self._folder / f"batch-{number}"
        folder.mkdir(parents=True)
        return Batch(folder, of.log, of.first + number * of.count, of.count, of.wait_s, of.size_bytes)

    def _start(self) -> None:
        batch = self.batches[-1]
        words = [batch.folder, batch.log, batch.first, batch.count, batch.wait_s, batch.size_bytes]
        command = [sys.executable, "-m", "tests.doubles.kills", self._cluster.address, *map(str, words)]
        with self._log().open("ab") as log:
            self._driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        self.runs += 1

    def _log(self) -> Path:
        return self.batches[-1].folder / "log"

    def _strike(self, victim: Victim) -> str:
        if victim == "driver":
            assert self._driver is not None
            self._excused = True
            self._driver.kill()
            self._driver.wait()
            return f"driver {self._driver.pid}"
        if victim == "server":
            self._server.kill()
            away_s = self._chance.uniform(*_SERVER_AWAY_S)
            self._go_on(away_s)
            self._server.start()
            return f"server, away for {away_s:.1f} s"
        found = self._one_of(_workers if victim == "worker" else _raylets)
        if victim == "worker":
            found.kill()
            return f"worker {found.pid}"
        # The driver hangs on one of the nodes, and Ray ends it with that.
        self._excused = True
        for process in (found, *_descendants(found)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.add_node()
        return f"node {found.pid}"

    def _one_of(self, look: Callable[[psutil.Process], Iterator[psutil.Process]]) -> psutil.Process:
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if found := sorted(look(psutil.Process(self._cluster.pid)), key=lambda process: process.pid):
                return self._chance.choice(found)
            self._go_on(_POLL_S)
        raise AssertionError("there was nobody to kill")


def _is_whole(store: SharedStore, digest: str | None, unit: int, batch: Batch) -> bool:
    if digest is None:
        return False
    try:
        file = store.path(store.get(digest)) / "model.onnx"
    except (InputError, StorageError):
        return False
    return file.read_bytes() == numbered(unit, batch.size_bytes)


# --- processes of a cluster ------------------------------------------------------------------------------------------


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _workers(cluster: psutil.Process) -> Iterator[psutil.Process]:
    """Those that run tasks, or wait for one; a node's agents, with which it ends, have such names, too."""
    for process in _descendants(cluster):
        words = _words(process)
        if words.startswith("ray::") and "Agent" not in words:
            yield process


def _raylets(cluster: psutil.Process) -> Iterator[psutil.Process]:
    """Those that the nodes consist of, but for the head's, with which the cluster ends."""
    for process in _descendants(cluster):
        words = _words(process)
        if Path(words.partition(" ")[0]).name == "raylet" and "internal_head" not in words:
            yield process


def _words(process: psutil.Process) -> str:
    """The command line; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


# --- the driver ------------------------------------------------------------------------------------------------------


def drive(address: str, batch: Batch) -> None:
    """Does what is not done yet of a batch.

    Raises:
        BurnishError: the cluster or the store was lost, or a unit failed.
    """
    store = SharedStore(URI, FolderStore(batch.folder))
    store.check()
    failed: BurnishError | None = None
    with Ledger.open(batch.folder / "ledger.jsonl") as ledger:
        unknown = [task for task in batch.tasks() if ledger.find("TensorSpec", task.arguments) is None]
        with RayEngine(store, address=address) as engine:
            for outcome in engine.run(unknown):
                if outcome.error is not None:
                    failed = outcome.error
                    continue
                record = TensorSpec(name=outcome.result, dtype="float32", shape=())  # a record that keeps the digest
                ledger.commit("TensorSpec", outcome.task.name, outcome.task.arguments, record)
    if failed is not None:
        raise failed


def main(address: str, folder: str, log: str, first: str, count: str, wait_s: str, size_bytes: str) -> int:
    """Returns the exit code."""
    batch = Batch(Path(folder), Path(log), int(first), int(count), float(wait_s), int(size_bytes))
    try:
        drive(address, batch)
    except BurnishError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    return 0


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    sys.exit(main(*sys.argv[1:]))
