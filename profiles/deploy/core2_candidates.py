"""Candidates on Core 2, whoever commands it: their folder is placed, and the mesh is asked for their models."""

import hashlib
import http.client
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from profiles.serving.core2.folder import ModelFolder, model_folder, write_folder
from profiles.serving.core2.manifests import REQUIREMENTS
from profiles.serving.naming import model_name_of
from registry.errors import InputError, ServerDiedError, UnreachableError
from registry.records import Artifact, ArtifactFile, Candidate, Target

logger = logging.getLogger(__name__)

T = TypeVar("T")

Place = Callable[[Artifact, Path], str]
"""Puts the files of a folder where Core 2 can fetch them, under their digest, and returns the rclone URI of that.

The folder has the model's name; the artifact is the folder's, with the rendered files and the digest over all.
"""

UNLOAD_S = 60.0
"""Longest that a model may take to be gone: the agent waits 2 s for requests, and the server then frees its memory."""
UNKNOWN_VERSION = "unknown"
_POLL_S = 0.05
_MESH_TIMEOUT_S = 5.0
_REASON_LENGTH = 400


def size_of(_: Candidate, artifact: Artifact) -> int:
    """Bytes of the artifact's files: the memory of a candidate of which nothing else is known."""
    return artifact.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Core2Options:
    """How candidates are served on a Core 2, whoever commands it.

    Attributes:
        mesh: ``host:port`` of the data plane, where REST and gRPC are both answered.
        place: puts a candidate's folder where Core 2 fetches it.
        owner: the campaign's name for itself, the same in each of its runs and no other campaign's.
        mesh_tls: whether the mesh speaks TLS.
        servers: ``mlserver`` or ``triton`` -> the one server to use; without one, the scheduler chooses.
        requirements: backend -> capabilities; what is not named here is as in `REQUIREMENTS`.
        memory_bytes: what all copies of a candidate take together; without it, the size of the artifact's files,
            which is less than it will take.
        workers: ``MLSERVER_PARALLEL_WORKERS`` of the MLServer servers, which no model can change.
        secret: the Kubernetes secret with the rclone remote; None where the cluster has the remote already.
        unload_s: longest that a model may take to be gone.
    """

    mesh: str
    place: Place
    owner: str
    mesh_tls: bool = False
    servers: Mapping[str, str] = field(default_factory=dict)
    requirements: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    memory_bytes: Callable[[Candidate, Artifact], int] = size_of
    workers: int = 0
    secret: str | None = None
    unload_s: float = UNLOAD_S

    def needed_by(self, backend: str) -> tuple[str, ...]:
        """The capabilities that a server must have for a backend, all of them."""
        return {**REQUIREMENTS, **self.requirements}[backend]

    def folder_of(self, candidate: Candidate, artifact: Artifact) -> tuple[str, ModelFolder]:
        """A candidate's name as a model, and its folder.

        Raises:
            InputError: it cannot be served as it asks to be.
        """
        name = model_name_of(candidate)
        check_workers(candidate, self.workers)
        return name, model_folder(candidate, artifact, model_name=name)


def one_line(value: object) -> str:
    """Text of others on one line, and not too long: a server's log can be in it."""
    line = " ".join(str(value or "").split())
    return line if len(line) <= _REASON_LENGTH else f"{line[:_REASON_LENGTH]}..."


def look_again(name: str, check: Callable[[], T]) -> T | None:
    """What ``check`` finds of a model that is still served as it was; None where that cannot be asked, which is logged.

    Raises:
        ServerDiedError: ``check`` says that it is not.
    """
    try:
        return check()
    except ServerDiedError:
        raise
    except UnreachableError as error:
        logger.warning("Whether %s is still served as it was is not known: %s", name, error.message)
        return None


def check_workers(candidate: Candidate, workers: int) -> None:
    """Returns where MLServer's ``workers`` (the servers' ``MLSERVER_PARALLEL_WORKERS``) are what a candidate asks for.

    Raises:
        InputError: they are not, which no model can change.
    """
    serving = candidate.serving
    if serving.server == "mlserver" and serving.parallel_workers != workers:
        raise InputError(
            f"{candidate.name!r} asks for {serving.parallel_workers} parallel workers, and the servers have {workers}",
            hint="On Core 2 that is the server's setting: MLSERVER_PARALLEL_WORKERS in its environment.",
        )


def place_folder(name: str, folder: ModelFolder, artifact: Artifact, files: Path, place: Place) -> str:
    """Writes a model's folder, has it placed, and returns the URI where Core 2 fetches it.

    Args:
        name: of the model, and of the folder.
        folder: what is in it.
        artifact: the candidate's.
        files: folder with the artifact's files, which are copied.
        place: where it goes.
    """
    own = {file.path: file for file in artifact.files}
    parts = [replace(own[source], path=path) for path, source in folder.files.items()]
    with tempfile.TemporaryDirectory(prefix="burnish-core2-") as scratch:
        written = Path(scratch) / name
        write_folder(folder, files, written)
        parts += [_file(written, path) for path in folder.rendered]
        whole = replace(artifact, digest=folder.digest, files=tuple(sorted(parts, key=lambda part: part.path)))
        return place(whole, written)


class Mesh:
    """The data plane of a Core 2, where REST and gRPC are both answered."""

    def __init__(self, address: str, *, tls: bool, hint: str) -> None:
        """Connects to nothing yet.

        Args:
            address: ``host:port``.
            tls: whether it speaks TLS.
            hint: where it usually is, for whoever gave an address at which nobody listens.
        """
        self._address = address
        self._tls = tls
        self._hint = hint

    def check(self) -> None:
        """Returns when somebody listens where the mesh should be: it is only needed at the end of a long way.

        Raises:
            InputError: that is no address.
            UnreachableError: nobody does.
        """
        try:
            connection = http.client.HTTPConnection(self._address, timeout=_MESH_TIMEOUT_S)
        except http.client.InvalidURL as error:
            raise InputError(f"the mesh {self._address!r} is not host:port ({error})") from error
        try:
            connection.connect()
        except OSError as error:
            raise UnreachableError(
                f"the mesh of Core 2 cannot be reached at {self._address}: {error.strerror or error}", hint=self._hint
            ) from error
        finally:
            connection.close()

    def target(self, candidate: Candidate, name: str) -> Target:
        """Where a candidate's model is asked, with the header that leads to it."""
        serving = candidate.serving
        return Target(
            url=self._address,
            protocol=serving.protocol,
            model=name,
            headers={"seldon-model": name},
            tls=self._tls,
            binary=serving.server == "triton" and serving.protocol == "rest",
        )

    def target_of(self, name: str, protocol: Literal["grpc", "rest"], *, binary: bool = False) -> Target:
        """Where whatever has a name is asked: a model, or ``<experiment>.experiment``.

        Args:
            name: as the header ``seldon-model`` has it.
            protocol: what is spoken.
            binary: whether all that may answer take binary tensors over REST.
        """
        return Target(
            url=self._address,
            protocol=protocol,
            model=name.partition(".")[0],
            headers={"seldon-model": name},
            tls=self._tls,
            binary=binary,
        )

    def wait_for(self, target: Target, deadline: float) -> None:
        """Returns when the mesh answers for a model, of which it hears a moment after Core 2 says that it is there.

        Args:
            target: the model, see `target`.
            deadline: by the monotonic clock.

        Raises:
            UnreachableError: it does not answer for it in time.
        """
        while (answer := _readiness(target)) is not None:
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"Core 2 says that {target.model} is available, and the mesh at {target.url} does not: {answer}",
                    hint="Check the address of the mesh, and that its envoy is connected to the scheduler.",
                )
            time.sleep(_POLL_S)


def _readiness(target: Target) -> str | None:
    """None where the mesh answers that the model is ready, else what it answers."""
    kind = http.client.HTTPSConnection if target.tls else http.client.HTTPConnection
    connection = kind(target.url, timeout=_MESH_TIMEOUT_S)
    try:
        connection.request("GET", f"/v2/models/{target.model}/ready", headers=dict(target.headers))
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    return None if answer.status == http.client.OK else f"status {answer.status}"


def _file(folder: Path, path: str) -> ArtifactFile:
    content = (folder / path).read_bytes()
    return ArtifactFile(path=path, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
