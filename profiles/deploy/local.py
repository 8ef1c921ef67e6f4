"""Real MLServer and Triton servers as child processes on this machine's loopback."""

import contextlib
import http.client
import importlib.metadata
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

from profiles.deploy import supervise
from profiles.deploy.cluster import Usage
from profiles.deploy.reaper import RECORDS, end_server, reap
from profiles.serving import mlserver
from profiles.serving.mlserver import render_mlserver
from profiles.serving.naming import model_name_of
from profiles.serving.triton import render_triton
from registry.errors import BurnishError, InputError, MissingExtraError, ServerDiedError, UnreachableError
from registry.records import Artifact, Candidate, Target

logger = logging.getLogger(__name__)

Server = Literal["mlserver", "triton"]

LOOPBACK = "127.0.0.1"
ENVIRONMENT = (
    "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR", "TZ",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "ONEDNN_MAX_CPU_ISA",
    "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
)  # fmt: skip
"""What a server inherits of our environment: what it needs to run, and nothing that may be a secret."""

GRACE_S: Mapping[Server, float] = {"mlserver": 5.0, "triton": 0.3}
"""How long a server may take to end by itself before it is killed, where nobody waits for an answer any more.

MLServer takes about 0.6 s. Triton takes 3 s, most of it waiting for its stubs, and keeps nothing that could be lost:
its shared memory is removed by the supervisor.
"""
POLL_S = 0.02
PORT_ATTEMPTS = 4
LOG_LINES = 25
LOG_LINE_LENGTH = 400
# Triton's tables and notes, which would push the reason out of the end of its log.
_LOG_NOISE = re.compile(r"[|+]|I\d{4} |$")
_REASON = re.compile(r"(?:SessionError|RuntimeError): (.+)")
_PORT_TAKEN = re.compile(r"already in use|failed to bind|errno 98", re.IGNORECASE)
# MLServer goes on for a while, or for good, after a model failed to load; this line is its last word on it.
_LOAD_FAILED = "Some of the models failed to load during startup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The three ports of one server."""

    http: int
    grpc: int
    metrics: int


class LocalDeployment:
    """One candidate served by a child process; made by `LocalCluster.deploy`.

    Attributes:
        candidate: what is served.
        target: where it is served.
        load_time_s: from the start of the server to the model's readiness.
        rendered: path -> text of the files that were rendered for it.
        ports: where the server listens, whatever the candidate's protocol.
        log: the server's log file.
    """

    def __init__(self, candidate: Candidate, folder: Path, process: "_ServerProcess", rendered: dict[str, str]) -> None:
        self.candidate = candidate
        self.rendered = rendered
        self.ports = process.ports
        self.log = process.log
        self.load_time_s = 0.0
        self.target = _target(candidate, process.ports)
        self._folder = folder
        self._process = process

    def usage(self) -> Usage:
        """CPU time and resident memory of the server and all its processes, without the supervisor's.

        Raises:
            ServerDiedError: the server has ended.
        """
        return self._process.usage()

    def undeploy(self) -> None:
        """Ends the server with all its processes and removes its model files; its log stays."""
        self._process.end()
        shutil.rmtree(self._folder / "repository", ignore_errors=True)


class LocalCluster:
    """Serves candidates on this machine, each by a server of its own. A context manager that ends them all.

    Every server is watched by a supervisor of its own that ends it when this process ends, however that happens.
    Servers that a killed run left under `work` are ended first.
    """

    def __init__(
        self,
        work: Path,
        *,
        server_cpus: Sequence[int] | None = None,
        http_port: int | None = None,
        grpc_port: int | None = None,
        grace_s: float | None = None,
    ) -> None:
        """Ends what was left behind, and is then ready to deploy.

        Args:
            work: folder for the servers' files, logs and records, under ``servers``.
            server_cpus: the CPUs that servers may use; all where none are given.
            http_port: REST port of the one server to be deployed, where the user chose it; else a free one.
            grpc_port: the same for gRPC.
            grace_s: how long a server that is to end may go on answering; `GRACE_S` where it is not given.
        """
        self._records = work.resolve() / RECORDS
        self._cpus = tuple(server_cpus or ())
        self._fixed = {"http": http_port, "grpc": grpc_port}
        self._grace_s = grace_s
        self._deployments: dict[str, LocalDeployment] = {}
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
            timeout_s: longest wait for readiness, over all attempts.

        Raises:
            InputError: the candidate cannot be rendered for its server, or its backend is not here.
            MissingExtraError: its server is not installed.
            UnreachableError: a port is in use, the server refused the model, or was not ready in time; the message
                ends with the end of the server's log.
            ServerDiedError: the server ended while it loaded.
        """
        _require(candidate)
        deadline = time.monotonic() + timeout_s
        for attempt in range(1, PORT_ATTEMPTS + 1):
            ports = _choose_ports(self._fixed)
            try:
                return self._deploy_on(ports, candidate, artifact, files, deadline)
            except _PortTakenError as error:
                if attempt == PORT_ATTEMPTS or any(self._fixed.values()):
                    raise UnreachableError(error.message, hint="Another process took a port; try again.") from error
                logger.info("A port of %s was taken meanwhile; trying others", ports)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def close(self) -> None:
        """Ends all that is deployed: all are told first, then each is waited for."""
        for deployment in self._deployments.values():
            deployment._process.tell()
        for deployment in self._deployments.values():
            deployment.undeploy()
        self._deployments.clear()

    def _deploy_on(
        self, ports: Ports, candidate: Candidate, artifact: Artifact, files: Path, deadline: float
    ) -> LocalDeployment:
        name = self._free_name(candidate)
        folder = self._records / name
        shutil.rmtree(folder, ignore_errors=True)
        rendered = _render(candidate, artifact, ports)
        _lay_out(folder / "repository", rendered, candidate, artifact, files)
        server = candidate.serving.server
        grace_s = GRACE_S[server] if self._grace_s is None else self._grace_s
        process = _ServerProcess(folder, name, ports, cpus=self._cpus, server=server, grace_s=grace_s)
        started = time.monotonic()
        try:
            process.wait_ready(model_name_of(candidate), deadline)
        except BaseException:
            # Ctrl-C too: nothing half-started is left.
            process.end()
            shutil.rmtree(folder / "repository", ignore_errors=True)
            raise
        deployment = LocalDeployment(candidate, folder, process, rendered)
        deployment.load_time_s = time.monotonic() - started
        self._deployments[name] = deployment
        return deployment

    def _free_name(self, candidate: Candidate) -> str:
        """The candidate's id, with a number where it is deployed already."""
        names = (candidate.id if n == 1 else f"{candidate.id}-{n}" for n in range(1, 1000))
        for name in names:
            deployment = self._deployments.get(name)
            if deployment is not None and not deployment._process.ended:
                continue
            if not (self._records / f"{name}.json").exists():
                return name
        raise UnreachableError(f"{candidate.name!r} is deployed too often")


class _PortTakenError(BurnishError):
    """A port that was free a moment ago is not; another may be tried."""


class _ServerProcess:
    """A server under its supervisor."""

    def __init__(
        self, folder: Path, name: str, ports: Ports, *, cpus: Sequence[int], server: Server, grace_s: float
    ) -> None:
        self.ports = ports
        self.log = folder / "server.log"
        self._server = server
        self._grace_s = grace_s
        self._record = folder.parent / f"{name}.json"
        mark = f"burnish-{secrets.token_hex(6)}"
        command = [sys.executable, "-I", "-S", supervise.__file__, "--record", str(self._record)]
        command += ["--grace", str(grace_s), "--shm-prefix", mark]
        command += ["--cpus", ",".join(map(str, cpus))] if cpus else []
        command += ["--", *_command(server, folder / "repository", ports, mark)]
        with self.log.open("wb") as log:
            self._supervisor = subprocess.Popen(
                command,
                cwd=folder,
                env={**server_environment(server), supervise.MARK: mark},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether the server is no more."""
        return self._supervisor.poll() is not None

    def wait_ready(self, model: str, deadline: float) -> None:
        """Returns when the server answers that the model is ready, over REST, and its gRPC port is open.

        Raises:
            ServerDiedError: the server ended.
            UnreachableError: it refused the model, or time is up.
            _PortTakenError: it could not have a port.
        """
        began = time.monotonic()
        while not (
            _answers(self.ports.http, "/v2/health/ready", f"/v2/models/{model}/ready") and _open(self.ports.grpc)
        ):
            if self.ended:
                self._raise_ended(
                    f"{self._server} ended with status {self._supervisor.returncode} while it loaded {model}"
                )
            if _LOAD_FAILED in self._log_text():
                raise self._error(UnreachableError, f"{self._server} could not load {model}")
            if time.monotonic() > deadline:
                waited = time.monotonic() - began
                raise self._error(UnreachableError, f"{self._server} did not have {model} ready after {waited:.0f} s")
            time.sleep(POLL_S)

    def usage(self) -> Usage:
        """See `LocalDeployment.usage`."""
        processes = self._processes()
        if not processes:
            raise self._error(ServerDiedError, f"{self._server} has ended with status {self._supervisor.poll()}")
        cpu_s = rss = 0.0
        for process in processes:
            with contextlib.suppress(psutil.Error), process.oneshot():
                # Children that have ended count with the parent that waited for them.
                cpu_s += sum(process.cpu_times()[:4])
                rss += process.memory_info().rss
        return Usage(cpu_s=cpu_s, rss_mb=rss / 1e6)

    def tell(self) -> None:
        """Tells the supervisor to end the server, by closing its pipe; does not wait."""
        if self._supervisor.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._supervisor.stdin.close()

    def end(self) -> None:
        """Ends the server and waits until nothing of it is left."""
        self.tell()
        try:
            self._supervisor.wait(self._grace_s + 5)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        end_server(self._record)

    def _processes(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._supervisor.pid).children(recursive=True) if not self.ended else []
        except psutil.NoSuchProcess:
            return []

    def _raise_ended(self, message: str) -> None:
        if _PORT_TAKEN.search(self._log_text()):
            raise self._error(_PortTakenError, message)
        raise self._error(ServerDiedError, message)

    def _error(self, kind: type[BurnishError], message: str) -> BurnishError:
        reasons = _REASON.findall(self._log_text())
        because = f": {reasons[-1]}" if reasons else ""
        return kind(f"{message}{because}\nIts log ends:\n{self._log_end()}", hint=f"The whole log: {self.log}")

    def _log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def _log_end(self) -> str:
        lines = [line for line in self._log_text().splitlines() if not _LOG_NOISE.match(line)]
        return "\n".join(line[:LOG_LINE_LENGTH] for line in lines[-LOG_LINES:])


def server_environment(server: Server) -> dict[str, str]:
    """The environment a server is started with: the allowed part of ours, and what its libraries need."""
    own = mlserver.ENVIRONMENT if server == "mlserver" else {}
    environment = {**own, **{name: os.environ[name] for name in ENVIRONMENT if name in os.environ}}
    # OpenVINO reports its use over the network at import, except where this is set.
    environment["CI"] = "true"
    # This interpreter first: Triton's stub takes its environment from the first python3 on PATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    if server == "triton":
        libraries = [str(_site_packages() / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        inherited = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries + ([inherited] if inherited else []))
    return environment


@cache
def server_version(server: Server) -> str:
    """The version of a server that is installed here.

    Raises:
        MissingExtraError: it is not installed.
        UnreachableError: it is installed and does not run, or could not run a model.
    """
    if server == "mlserver":
        return _installed("mlserver", extra="mlserver", what="MLServer")
    wheel = _installed("nvidia-pytriton", extra="triton", what="Triton")
    check_libraries(_stub())
    return f"{_triton_version()} (nvidia-pytriton {wheel})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHere:
    """Whether a server can be used here: its version, or the reason why not."""

    version: str | None
    reason: str | None = None


def available_servers() -> dict[Server, ServerHere]:
    """Each server that burnish knows, with its version or with the reason why it cannot be used here."""
    servers: tuple[Server, ...] = ("mlserver", "triton")
    found: dict[Server, ServerHere] = {}
    for server in servers:
        try:
            found[server] = ServerHere(version=server_version(server))
        except (MissingExtraError, UnreachableError) as error:
            found[server] = ServerHere(version=None, reason=str(error))
    return found


def _installed(distribution: str, *, extra: str, what: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError(what, extra=extra) from error


def _triton_version() -> str:
    """What the binary says. It has no --version, and prints its version before it finds that there is no repository."""
    off = [f"--allow-{what}=false" for what in ("http", "grpc", "metrics")]
    command = [str(_triton_home() / "bin" / "tritonserver"), "--model-repository=/nonexistent", *off]
    try:
        said = subprocess.run(
            command, env=server_environment("triton"), capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnreachableError(f"tritonserver does not start: {error}") from error
    match = re.search(r"server_version\s*\|\s*(\S+)", said.stderr + said.stdout)
    if match is None:
        raise UnreachableError(f"tritonserver does not start: {(said.stderr + said.stdout)[-1000:]}")
    return match[1]


def check_libraries(binary: Path) -> None:
    """Returns when every library that a binary of Triton's needs is found, with the environment it is started with.

    A server starts without its stub's libpython, and then fails on every model.

    Raises:
        UnreachableError: one is not found.
    """
    # The loader itself says so, without running the binary (ld.so(8)).
    environment = {**server_environment("triton"), "LD_TRACE_LOADED_OBJECTS": "1"}
    try:
        said = subprocess.run(
            [str(binary)], env=environment, capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnreachableError(f"{binary.name} does not start: {error}") from error
    if missing := re.findall(r"(\S+) => not found", said):
        package = missing[0].partition(".so")[0]
        raise UnreachableError(
            f"Triton's Python backend needs {', '.join(missing)}, which is not here",
            hint=f"On Debian and Ubuntu: apt-get install {package}",
        )


def _require(candidate: Candidate) -> None:
    server_version(candidate.serving.server)
    if candidate.serving.backend not in {"burnish", "python"}:
        raise InputError(
            f"{candidate.name!r} needs Triton's {candidate.serving.backend} backend, which no package brings here",
            hint="Serve it with the python backend here; the other can be rendered for an image that has it.",
        )


def _target(candidate: Candidate, ports: Ports) -> Target:
    serving = candidate.serving
    port = ports.grpc if serving.protocol == "grpc" else ports.http
    return Target(
        url=f"{LOOPBACK}:{port}",
        protocol=serving.protocol,
        model=model_name_of(candidate),
        binary=serving.server == "triton" and serving.protocol == "rest",
    )


def _render(candidate: Candidate, artifact: Artifact, ports: Ports) -> dict[str, str]:
    name = model_name_of(candidate)
    if candidate.serving.server == "triton":
        return render_triton(candidate, artifact, model_name=name)
    return render_mlserver(
        candidate, artifact, model_name=name, http_port=ports.http, grpc_port=ports.grpc, metrics_port=ports.metrics
    )


def _lay_out(
    repository: Path, rendered: Mapping[str, str], candidate: Candidate, artifact: Artifact, files: Path
) -> None:
    """Writes the rendered files and links the artifact's where the server looks for them."""
    for path, text in rendered.items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(text)
    beside = repository / model_name_of(candidate)
    beside = beside / "1" if candidate.serving.server == "triton" else beside
    for file in artifact.files:
        place = beside / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(files / file.path, place)


def _link(source: Path, place: Path) -> None:
    # A hard link: engines refuse weights outside the model's folder, which is where a symbolic link leads.
    try:
        place.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, place)


def _command(server: Server, repository: Path, ports: Ports, mark: str) -> list[str]:
    if server == "mlserver":
        # -P: a folder of the same name as a package, where the server runs, must not shadow it.
        return [sys.executable, "-P", "-c", "from mlserver.cli import main; main()", "start", str(repository)]
    return [
        str(_triton_home() / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={_backend_folder(repository.parent.parent)}",
        f"--http-address={LOOPBACK}",
        f"--http-port={ports.http}",
        f"--grpc-address={LOOPBACK}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-address={LOOPBACK}",
        f"--metrics-port={ports.metrics}",
        "--allow-gpu-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={mark}",
    ]


def _site_packages() -> Path:
    return Path(str(importlib.metadata.distribution("nvidia-pytriton").locate_file("")))


def _triton_home() -> Path:
    return _site_packages() / "pytriton" / "tritonserver"


def _stub() -> Path:
    """The process that runs a Python model for Triton.

    Raises:
        UnreachableError: the wheel has none for this Python.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = _triton_home() / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise UnreachableError(f"the Triton that is installed has no Python backend for Python {version}")
    return stub


def _backend_folder(work: Path) -> Path:
    """A folder that holds Triton's Python backend with the stub of this Python, as links into the wheel."""
    stub = _stub()
    folder = work / "triton-backends" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*(_triton_home() / "backends" / "python").iterdir(), stub):
        link = folder / source.name
        if not (link.is_symlink() and link.readlink() == source):
            link.unlink(missing_ok=True)
            link.symlink_to(source)
    return folder.parent


def _choose_ports(fixed: Mapping[str, int | None]) -> Ports:
    """The fixed ports, and free ones for the rest.

    Raises:
        UnreachableError: a fixed port is in use.
    """
    with contextlib.ExitStack() as held:
        # All are held until all are known, so that they differ.
        chosen = {name: held.enter_context(_bound(fixed.get(name) or 0)) for name in ("http", "grpc", "metrics")}
        return Ports(**chosen)


@contextlib.contextmanager
def _bound(port: int) -> Iterator[int]:
    with socket.socket() as listener:
        # As servers do, so that connections of an ended server that linger on do not count. A listener still does,
        # even one that shares its port (SO_REUSEPORT, as gRPC does, so that two servers would answer in turn).
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
            listener.listen(1)
        except OSError as error:
            raise UnreachableError(
                f"the port {port} cannot be had on {LOOPBACK}: {error.strerror}",
                hint="End the process that uses it, or choose another port.",
            ) from error
        yield listener.getsockname()[1]


def _answers(port: int, *paths: str) -> bool:
    """Whether every path is answered with status 200."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        for path in paths:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            if response.status != http.client.OK:
                return False
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((LOOPBACK, port)) == 0
