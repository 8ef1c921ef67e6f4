"""One server of this machine, started without a model, under a supervisor that ends it when this process ends."""

import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from profiles.deploy.child import SupervisedChild
from profiles.deploy.cluster import Usage
from profiles.deploy.local_installation import server_command, server_environment
from profiles.deploy.local_ports import LOOPBACK, Ports, is_open
from profiles.deploy.model_control import ModelControl, ModelRefusedError
from profiles.deploy.supervise import start_ticks
from profiles.serving.roundtrip import Server
from registry.errors import BurnishError, InputError, ServerDiedError, UnreachableError

GRACE_S: Mapping[Server, float] = {"mlserver": 5.0, "triton": 0.3}
"""How long a server may take to end by itself before it is killed, where nobody waits for an answer any more.

MLServer takes about 0.6 s. Triton takes 3 s, most of it waiting for its stubs, and keeps nothing that could be lost:
its shared memory is removed by the supervisor.
"""
POLL_S = 0.02
_REASON_S = 1.0
_NOTICE_S = 2.0
# What is left of a server that has ended is ended first, and on a busy machine that takes its time.
_ENDING_S = 20.0
_UNLOAD_S = 10.0
# Triton's tables and notes, which would push the reason out of the end of its log.
_LOG_NOISE = re.compile(r"[|+]|I\d{4} |$")
_REASON = re.compile(r"(?:SessionError|RuntimeError): (.+)")
_PORT_TAKEN = re.compile(r"already in use|failed to bind|errno 98", re.IGNORECASE)


def peak_rss_bytes(pid: int) -> int | None:
    """The most memory that a process has had resident since it started; None where the kernel does not tell.

    Source: ``VmHWM`` in proc_pid_status(5).
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("VmHWM:"))
    return next((int(words[1]) * 1024 for words in found), None)


def usage_of(processes: Iterable[psutil.Process]) -> Usage:
    """What processes have used so far, together; one that ends meanwhile, or may not be looked at, counts nothing."""
    cpu_s = rss = 0.0
    pids, peaks = [], []
    for process in processes:
        pids.append(process.pid)
        with contextlib.suppress(psutil.Error), process.oneshot():
            # Children that have ended count with the parent that waited for them.
            cpu_s += sum(process.cpu_times()[:4])
            rss += process.memory_info().rss
        if (peak := peak_rss_bytes(process.pid)) is not None:
            peaks.append(peak)
    return Usage(cpu_s=cpu_s, rss_mb=rss / 1e6, peak_rss_mb=sum(peaks) / 1e6 if peaks else None, pids=tuple(pids))


def watch_process(pid: int) -> Callable[[], Usage]:
    """What gives the use of a process that somebody else has started, and of its children.

    Args:
        pid: of the process.

    Returns:
        What asks anew each time; it raises `ServerDiedError` once the process has ended.

    Raises:
        InputError: there is no such process, or this user may not look at it.
    """
    try:
        process = psutil.Process(pid)
        process.memory_info()
    except (psutil.Error, ValueError, OverflowError) as error:
        told = "may not be looked at by this user" if isinstance(error, psutil.AccessDenied) else "is not there"
        raise InputError(
            f"the process {pid} {told}", hint="Give the id of the server's process on this machine."
        ) from error

    def use() -> Usage:
        with contextlib.suppress(psutil.NoSuchProcess):
            # A process that has ended and was not waited for is still listed.
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return usage_of([process, *process.children(recursive=True)])
        raise ServerDiedError(f"the server's process {pid} has ended")

    return use


class PortTakenError(BurnishError):
    """A port that was free a moment ago is not; another may be tried."""


class ServerProcess:
    """A server under its supervisor, and what it is told.

    Attributes:
        server: which.
        ports: where it listens.
        folder: what it has for its own.
        repository: where models are put for it, one folder each.
        log: all that it wrote; what a server in the same folder wrote before stays.
        control: of its models.
    """

    def __init__(
        self,
        folder: Path,
        *,
        server: Server,
        settings: Mapping[str, str],
        ports: Ports,
        cpus: Sequence[int],
        grace_s: float | None,
    ) -> None:
        """Starts it; see `wait_live`.

        Args:
            folder: is made where it is not there; the folder beside it gets the record that the reaper reads.
            server: which.
            settings: goes into its environment.
            ports: where it is to listen.
            cpus: those that it may use; all where none are given.
            grace_s: how long it may take to end; `GRACE_S` where it is not given.
        """
        self.server: Server = server
        self.ports = ports
        self.folder = folder
        self.repository = folder / "repository"
        self.repository.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        self.control = ModelControl(f"{LOOPBACK}:{ports.http}")
        self._name = f"burnish-{secrets.token_hex(6)}"
        self._record = folder.with_name(f"{folder.name}.json")
        self._child = SupervisedChild(
            server_command(server, self.repository, ports, name=self._name, work=folder.parent),
            log=self.log,
            record=self._record,
            environment=server_environment(server, settings, ports=ports, name=self._name),
            grace_s=GRACE_S[server] if grace_s is None else grace_s,
            cpus=cpus,
            shm_prefix=self._name,
        )
        self._load_began = 0

    @property
    def ended(self) -> bool:
        """Whether the server is no more."""
        return self._child.status is not None

    def wait_live(self, deadline: float) -> None:
        """Returns when the server answers over REST, and its gRPC port is open.

        Args:
            deadline: by the monotonic clock.

        Raises:
            ServerDiedError: it ended.
            UnreachableError: time is up.
            PortTakenError: it could not have a port.
        """
        began = time.monotonic()
        # It is asked for its name, as another server may have taken the port.
        while not (self.control.server_name() == self._name and is_open(self.ports.grpc)):
            if self.ended:
                taken = _PORT_TAKEN.search(self._child.log_text())
                raise self._ended("before it was ready", PortTakenError if taken else ServerDiedError)
            if time.monotonic() > deadline:
                waited = time.monotonic() - began
                raise self._error(UnreachableError, f"{self.server} was not ready after {waited:.0f} s")
            time.sleep(POLL_S)
        self._pid = int(json.loads(self._record.read_text())["server"][0])

    def load(self, model: str, deadline: float) -> None:
        """Has the server load a model of its repository; returns when it is ready.

        Args:
            model: its name there.
            deadline: by the monotonic clock.

        Raises:
            ServerDiedError: the server ended.
            UnreachableError: it refused the model, or time is up.
        """
        began = time.monotonic()
        self._load_began = self._child.log_size()
        try:
            self.control.load(model, timeout_s=deadline - began)
            self._wait_ready(model, deadline)
        except ModelRefusedError as error:
            raise self._error(UnreachableError, f"{self.server} could not load {model}", error.message) from error
        except TimeoutError as error:
            waited = time.monotonic() - began
            message = f"{self.server} did not have {model} ready after {waited:.0f} s"
            raise self._error(UnreachableError, message) from error
        except OSError as error:
            self._wait_for_status()
            if self.ended:
                raise self._ended(f"while it loaded {model}") from error
            raise self._error(UnreachableError, f"{self.server} does not answer any more ({error})") from error

    def _wait_ready(self, model: str, deadline: float) -> None:
        while not self.control.is_ready(model):
            if time.monotonic() > deadline:
                raise TimeoutError
            if self.ended:
                raise ConnectionError
            time.sleep(POLL_S)

    def _wait_for_status(self) -> None:
        """Returns when it is known how the server ended; not long after, where it does not end."""
        deadline = time.monotonic() + _NOTICE_S
        while start_ticks(self._pid) is not None:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_S)
        self._child.wait(_ENDING_S)

    def unload(self, model: str) -> None:
        """Has the server unload a model, where it has it and still answers."""
        with contextlib.suppress(UnreachableError, OSError):
            self.control.unload(model, timeout_s=_UNLOAD_S)

    def usage(self) -> Usage:
        """CPU time and resident memory of the server and all its processes, without the supervisor's.

        It is live, see `wait_live`.

        Raises:
            ServerDiedError: the server has ended.
        """
        processes = self._processes()
        # The supervisor may be about to end what is left of it.
        if not processes or start_ticks(self._pid) is None:
            self._wait_for_status()
            raise self._error(ServerDiedError, f"{self.server} has ended with status {self._child.status}")
        return usage_of(processes)

    def tell_to_end(self) -> None:
        """Tells the server to end; does not wait."""
        self._child.tell()

    def end(self) -> None:
        """Ends the server and waits until nothing of it is left."""
        self._child.end()

    def _processes(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._child.supervisor).children(recursive=True) if not self.ended else []
        except psutil.NoSuchProcess:
            return []

    def _ended(self, when: str, kind: type[BurnishError] = ServerDiedError) -> BurnishError:
        return self._error(kind, f"{self.server} ended with status {self._child.status} {when}")

    def _error(self, kind: type[BurnishError], message: str, said: str = "") -> BurnishError:
        """An error with the reason, and the end of the log.

        Args:
            kind: of the error.
            message: what happened.
            said: what the server answered, if it did.
        """
        reasons = _REASON.findall(said)
        if said and not reasons:
            # MLServer answers that it is an internal error, and writes to its log what kind of one a moment later.
            deadline = time.monotonic() + _REASON_S
            while not (reasons := self._reasons()) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        reasons = reasons or self._reasons() or said.splitlines()
        because = f": {reasons[-1]}" if reasons else ""
        end = self._child.log_end(_LOG_NOISE)
        return kind(f"{message}{because}\nIts log ends:\n{end}", hint=f"The whole log: {self.log}")

    def _reasons(self) -> list[str]:
        return _REASON.findall(self._child.log_text(self._load_began))
