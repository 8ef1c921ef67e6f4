"""MLServer and Triton as they are installed here: versions, commands, and the environment they are started with."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from profiles.deploy.local_ports import LOOPBACK, Ports
from profiles.serving.roundtrip import Server
from registry.errors import MissingExtraError, UnreachableError

INHERITED = (
    "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR", "TZ",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "ONEDNN_MAX_CPU_ISA",
    "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
)  # fmt: skip
"""What a server inherits of our environment: what it needs to run, and nothing that may be a secret."""
CORE2_GRPC_MESSAGE_BYTES = 1_048_576_000
"""The longest gRPC message of an MLServer on Core 2, by its ServerConfig."""


# --- starting --------------------------------------------------------------------------------------------------


def server_command(server: Server, repository: Path, ports: Ports, *, name: str, work: Path) -> list[str]:
    """What starts a server that has no model yet, and waits to be told which to load.

    Args:
        server: which.
        repository: the folder that models are looked for in.
        ports: where Triton is to listen; MLServer is told by its environment, see `server_environment`.
        name: what Triton calls itself, and its shared memory begins with.
        work: gets a folder of links with Triton's backends.
    """
    if server == "mlserver":
        # -P: a folder of the same name as a package, where the server runs, must not shadow it.
        return [sys.executable, "-P", "-c", "from mlserver.cli import main; main()", "start", str(repository)]
    return [
        str(_triton_home() / "bin" / "tritonserver"),
        f"--id={name}",
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        f"--backend-directory={_backend_folder(work)}",
        f"--http-address={LOOPBACK}",
        f"--http-port={ports.http}",
        f"--grpc-address={LOOPBACK}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-address={LOOPBACK}",
        f"--metrics-port={ports.metrics}",
        "--allow-gpu-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={name}",
    ]


def server_environment(
    server: Server, settings: Mapping[str, str] | None = None, *, ports: Ports | None = None, name: str = "burnish"
) -> dict[str, str]:
    """The environment a server is started with: the allowed part of ours, what its libraries need, and its settings.

    Args:
        server: which.
        settings: what a Core 2 Server would have in its container's environment, see
            `profiles.serving.container.container_environment`; goes before what is inherited.
        ports: where MLServer is to listen.
        name: what MLServer calls itself.
    """
    environment = {key: os.environ[key] for key in INHERITED if key in os.environ}
    # OpenVINO reports its use over the network at import, except where this is set.
    environment["CI"] = "true"
    # This interpreter first: Triton's stub takes its environment from the first python3 on PATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    if server == "triton":
        libraries = [str(_site_packages() / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        inherited = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries + ([inherited] if inherited else []))
    elif ports is not None:
        environment |= {
            "MLSERVER_SERVER_NAME": name,
            "MLSERVER_HOST": LOOPBACK,
            "MLSERVER_HTTP_PORT": str(ports.http),
            "MLSERVER_GRPC_PORT": str(ports.grpc),
            "MLSERVER_METRICS_PORT": str(ports.metrics),
            "MLSERVER_LOAD_MODELS_AT_STARTUP": "false",
            # It is on where nothing is said, and then writes a line a request.
            "MLSERVER_DEBUG": "false",
            "MLSERVER_GRPC_MAX_MESSAGE_LENGTH": str(CORE2_GRPC_MESSAGE_BYTES),
        }
    return environment | dict(settings or {})


# --- what is here ----------------------------------------------------------------------------------------------


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
    check_libraries(stub_of_python())
    return f"{_triton_version()} (nvidia-pytriton {wheel})"


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


def stub_of_python() -> Path:
    """The process that runs a Python model for Triton.

    Raises:
        UnreachableError: the wheel has none for this Python.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = _triton_home() / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise UnreachableError(f"the Triton that is installed has no Python backend for Python {version}")
    return stub


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


def _site_packages() -> Path:
    return Path(str(importlib.metadata.distribution("nvidia-pytriton").locate_file("")))


def _triton_home() -> Path:
    return _site_packages() / "pytriton" / "tritonserver"


def _backend_folder(work: Path) -> Path:
    """A folder that holds Triton's Python backend with the stub of this Python, as links into the wheel."""
    stub = stub_of_python()
    folder = work / "triton-backends" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*(_triton_home() / "backends" / "python").iterdir(), stub):
        link = folder / source.name
        if not (link.is_symlink() and link.readlink() == source):
            link.unlink(missing_ok=True)
            link.symlink_to(source)
    return folder.parent
