"""Real MLServer and Triton servers as child processes on this machine's loopback, told what to load as on Core 2.

A server starts without a model. A candidate's folder is rendered as Core 2 would fetch it, goes through what a Core 2
agent does to it, is put into the server's repository, and is loaded by the V2 protocol's repository API. So what works
here works there, and what Core 2 would lose or refuse is refused here.
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from profiles.deploy.cluster import Statistics, Usage
from profiles.deploy.local_installation import ServerHere, available_servers, server_version
from profiles.deploy.local_ports import LOOPBACK, Ports, choose_ports
from profiles.deploy.local_process import GRACE_S, PortTakenError, ServerProcess
from profiles.deploy.local_repository import Fetched, fetch, remove_model
from profiles.deploy.reaper import RECORDS, reap
from profiles.serving.container import container_environment
from profiles.serving.naming import model_name_of
from registry.codec import digest
from registry.errors import InputError, UnreachableError
from registry.records import Artifact, Candidate, Target

__all__ = [
    "GRACE_S",
    "LOOPBACK",
    "LocalCluster",
    "LocalDeployment",
    "Ports",
    "ServerHere",
    "available_servers",
    "server_version",
]

logger = logging.getLogger(__name__)

PORT_ATTEMPTS = 4


class LocalDeployment:
    """One candidate served by a child process; made by `LocalCluster.deploy`.

    Attributes:
        candidate: what is served.
        target: where it is served. Its model has the name that a Core 2 agent gives it, ``<name>_1``.
        load_time_s: from putting its files into the repository of a server that runs to the model's readiness: what a
            Model takes on a Core 2 that has the server already, without the download.
        rendered: path in its folder -> text of the files that were rendered for it, as Core 2 would fetch them.
        ports: where the server listens, whatever the candidate's protocol.
        log: the server's log file.
    """

    def __init__(
        self, candidate: Candidate, process: ServerProcess, fetched: Fetched, *, load_time_s: float, alone: bool
    ) -> None:
        self.candidate = candidate
        self.rendered = dict(fetched.folder.rendered)
        self.ports = process.ports
        self.log = process.log
        self.load_time_s = load_time_s
        self.target = _target(candidate, process.ports, fetched.rewritten.model)
        self._process = process
        self._alone = alone

    @property
    def statistics(self) -> Statistics:
        """Where the server tells of its own times."""
        server = self.candidate.serving.server
        port = self.ports.http if server == "triton" else self.ports.metrics
        return Statistics(server=server, address=f"{LOOPBACK}:{port}", model=self.target.model)

    def usage(self) -> Usage:
        """CPU time and resident memory of the server and all its processes, without the supervisor's.

        A server that other candidates share is told of as a whole.

        Raises:
            ServerDiedError: the server has ended.
        """
        return self._process.usage()

    def undeploy(self) -> None:
        """Ends the server, or unloads the model from one that is shared, and removes its files; the log stays."""
        if self._alone:
            self._process.end()
            shutil.rmtree(self._process.repository, ignore_errors=True)
        else:
            _take_away(self._process, self.target.model)


class LocalCluster:
    """Serves candidates on this machine. A context manager that ends all of its servers.

    Every server is watched by a supervisor of its own that ends it when this process ends, however that happens.
    Servers that a killed run left under `work` are ended first.
    """

    def __init__(
        self,
        work: Path,
        *,
        server_cpus: Sequence[int] | None = None,
        shared: bool = False,
        http_port: int | None = None,
        grpc_port: int | None = None,
        grace_s: float | None = None,
    ) -> None:
        """Ends what was left behind, and is then ready to deploy.

        Args:
            work: folder for the servers' files, logs and records, under ``servers``.
            server_cpus: the CPUs that servers may use; all where none are given.
            shared: whether candidates whose server has the same settings (kind, threads, workers) are loaded into one,
                as Core 2 does; it runs until the end. Otherwise each candidate has a server of its own.
            http_port: REST port of the one server to be started, where the user chose it; else a free one.
            grpc_port: the same for gRPC.
            grace_s: how long a server that is to end may go on answering; `GRACE_S` where it is not given.
        """
        self._records = work.resolve() / RECORDS
        self._cpus = tuple(server_cpus or ())
        self._shared = shared
        self._fixed = {"http": http_port, "grpc": grpc_port}
        self._grace_s = grace_s
        self._servers: dict[str, ServerProcess] = {}
        reap(work)

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def deploy(self, candidate: Candidate, artifact: Artifact, files: Path, *, timeout_s: float) -> LocalDeployment:
        """Serves the candidate and returns when its model is ready.

        Args:
            candidate: what to serve, and how.
            artifact: its model.
            files: folder with the artifact's files; they are linked, or copied where they are on another device.
            timeout_s: longest wait for readiness, over all attempts, and the start of its server included.

        Raises:
            InputError: the candidate cannot be rendered for its server, Core 2 would lose one of its settings or refuse
                it, or its backend is not here.
            MissingExtraError: its server is not installed.
            UnreachableError: a port is in use, the server refused the model, or was not ready in time; the message
                ends with the end of the server's log.
            ServerDiedError: the server ended while it started or loaded.
        """
        _require(candidate)
        deadline = time.monotonic() + timeout_s
        settings = container_environment(candidate.serving)
        stem = f"{candidate.serving.server}-{digest(settings)[:8]}" if self._shared else candidate.id
        name = self._name(stem, candidate)
        place = self._records / name / "fetched"
        try:
            fetched = fetch(candidate, artifact, files, place)
            process = self._servers.get(name)
            if process is None or process.ended:
                process = self._start(name, candidate, settings, deadline)
            return self._load(process, candidate, fetched, deadline)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        """Ends all servers: all are told first, then each is waited for. Logs stay."""
        for process in self._servers.values():
            process.tell_to_end()
        for process in self._servers.values():
            process.end()
            shutil.rmtree(process.repository, ignore_errors=True)
        self._servers.clear()

    def _name(self, stem: str, candidate: Candidate) -> str:
        """The name of a server for a candidate: of one that runs and is to be shared, or else of none that runs."""
        model = model_name_of(candidate)
        for name in (stem if n == 1 else f"{stem}-{n}" for n in range(1, 1000)):
            process = self._servers.get(name)
            if process is not None and not process.ended:
                # As on Core 2, no server has a model twice.
                if self._shared and not any(process.repository.glob(f"{model}_*")):
                    return name
            elif not (self._records / f"{name}.json").exists():
                return name
        raise UnreachableError(f"{candidate.name!r} is deployed too often")

    def _start(self, name: str, candidate: Candidate, settings: Mapping[str, str], deadline: float) -> ServerProcess:
        """A server of this name, without a model."""
        folder = self._records / name
        if name in self._servers:
            self._servers.pop(name).end()
        shutil.rmtree(folder / "repository", ignore_errors=True)
        for attempt in range(1, PORT_ATTEMPTS + 1):
            process = ServerProcess(
                folder,
                server=candidate.serving.server,
                settings=settings,
                ports=choose_ports(self._fixed),
                cpus=self._cpus,
                grace_s=self._grace_s,
            )
            try:
                process.wait_live(deadline)
            except PortTakenError as error:
                process.end()
                if attempt == PORT_ATTEMPTS or any(self._fixed.values()):
                    raise UnreachableError(error.message, hint="Another process took a port; try again.") from error
                logger.info("A port of %s was taken meanwhile; trying others", process.ports)
            except BaseException:
                # Ctrl-C too: nothing half-started is left.
                process.end()
                raise
            else:
                self._servers[name] = process
                return process
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _load(self, process: ServerProcess, candidate: Candidate, fetched: Fetched, deadline: float) -> LocalDeployment:
        model = fetched.rewritten.model
        began = time.monotonic()
        try:
            remove_model(process.repository, model)
            fetched.rewritten.lay_out(process.repository)
            process.load(model, deadline)
        except BaseException:
            if self._shared:
                _take_away(process, model)
            else:
                process.end()
                shutil.rmtree(process.repository, ignore_errors=True)
            raise
        load_time_s = time.monotonic() - began
        return LocalDeployment(candidate, process, fetched, load_time_s=load_time_s, alone=not self._shared)


def _take_away(process: ServerProcess, model: str) -> None:
    process.unload(model)
    remove_model(process.repository, model)


def _require(candidate: Candidate) -> None:
    server_version(candidate.serving.server)
    if candidate.serving.backend not in {"burnish", "python"}:
        raise InputError(
            f"{candidate.name!r} needs Triton's {candidate.serving.backend} backend, which no package brings here",
            hint="Serve it with the python backend here; the other can be rendered for an image that has it.",
        )


def _target(candidate: Candidate, ports: Ports, model: str) -> Target:
    serving = candidate.serving
    port = ports.grpc if serving.protocol == "grpc" else ports.http
    return Target(
        url=f"{LOOPBACK}:{port}",
        protocol=serving.protocol,
        model=model,
        binary=serving.server == "triton" and serving.protocol == "rest",
    )
