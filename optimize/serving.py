"""One model on a real server: what ``burnish serve`` does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import ValidationError

from optimize.admission import ENTRY, Format, ask_child
from optimize.cluster_config import load_cluster
from optimize.clusters import open_file
from optimize.config import ServingConfig
from optimize.signature import signature_of
from profiles.deploy.cluster import Deployment
from profiles.deploy.core2_candidates import UNKNOWN_VERSION
from profiles.deploy.local import LOOPBACK, LocalDeployment
from profiles.measure.host import split_cpus
from registry.codec import digest, to_jsonable
from registry.errors import InputError
from registry.records import Artifact, Candidate, EngineSpec, ServingProfile
from registry.store import FolderStore

_LOAD_TIMEOUT_S = 120.0
_LOOK_S = 0.5
_LOOK_AT_CORE2_S = 5.0
# Somebody may be waiting for an answer when the user ends a server; in a campaign nobody is.
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that is being served.

    Attributes:
        deployment: of it.
        rest: ``host:port`` of REST.
        grpc: ``host:port`` of gRPC.
        log: the server's, where it is of this machine.
        look_s: how often to see whether it is still there.
    """

    deployment: Deployment
    rest: str
    grpc: str
    log: Path | None
    look_s: float

    @property
    def model(self) -> str:
        """The model's name on the server."""
        return self.deployment.target.model

    @property
    def headers(self) -> dict[str, str]:
        """What each request has to carry."""
        return dict(self.deployment.target.headers)

    @property
    def pid(self) -> int | None:
        """The id of the server's process, where it is of this machine."""
        usage = self.deployment.usage() if isinstance(self.deployment, LocalDeployment) else None
        return usage.pids[0] if usage is not None and usage.pids else None

    def describe(self) -> dict[str, Any]:
        """Where it is served, as plain values."""
        return {
            "model": self.model,
            "rest": self.rest,
            "grpc": self.grpc,
            "headers": self.headers,
            "pid": self.pid,
            "load_time_s": round(self.deployment.load_time_s, 3),
            "log": None if self.log is None else str(self.log),
        }

    def wait(self) -> None:
        """Returns never: ends by Ctrl-C, SIGTERM, or the server's end.

        Raises:
            ServerDiedError: the server ended, or serves something else.
        """
        while True:
            self.deployment.usage()
            time.sleep(self.look_s)


def serving_profile(**fields: Any) -> ServingProfile:
    """The serving profile of command-line options.

    Raises:
        InputError: an option's value does not fit; the message names it.
    """
    try:
        return ServingConfig(**fields).profile()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + ".".join(map(str, first["loc"])).replace("_", "-") if first["loc"] else "the serving options"
        raise InputError(f"{option}: {first['msg']} (given: {first['input']!r})") from error


@contextmanager
def serve_model(
    model: Path,
    profile: ServingProfile,
    *,
    precision: str,
    http_port: int | None,
    grpc_port: int | None,
    cluster: Path | None = None,
) -> Iterator[Served]:
    """Serves one model on this machine's loopback or on a Core 2, and ends that when the block ends.

    Args:
        model: an ONNX file, an OpenVINO ``.xml``, or a folder with one of either.
        profile: server, batching, threads.
        precision: ``default``, or ``float32`` to hold OpenVINO to it.
        http_port: REST port of this machine, or None for a free one.
        grpc_port: gRPC port of this machine, or None for a free one.
        cluster: a file that names a Core 2, see `optimize.cluster_config.ClusterFile`; None for this machine.

    Raises:
        InputError: there is no such model, or it cannot be served so.
        UnreachableError: a port is in use, the server refused the model, or the Core 2 does not answer.
        ServerDiedError: the server ended while it loaded.
    """
    entry = _entry(model)
    if precision not in ("default", "float32"):
        raise InputError(f"--precision {precision!r} is not known", hint="There are default and float32.")
    if cluster is not None and (http_port or grpc_port):
        raise InputError("--http-port and --grpc-port are of this machine", hint="Leave them out, or --cluster.")
    if (why := load_cluster(cluster).why_not(profile)) is not None:
        raise InputError(f"it cannot be served so: {why}")
    ports = {"http_port": http_port, "grpc_port": grpc_port}
    with (
        TemporaryDirectory(prefix="burnish-serve-") as name,
        open_file(
            cluster, work=Path(name), purpose="serve", server_cpus=split_cpus()[0], grace_s=_GRACE_S, **ports
        ) as site,
    ):
        work = Path(name)
        artifact = _stored(entry, FolderStore(work), work)
        candidate = _candidate(
            entry.stem,
            artifact,
            profile,
            precision,
            server_version=site.server_version(profile.server),
            cluster=site.served_by(profile.server),
        )
        files = FolderStore(work).path(artifact)
        yield _served(site.cluster.deploy(candidate, artifact, files, timeout_s=_LOAD_TIMEOUT_S))


def _served(deployment: Deployment) -> Served:
    if isinstance(deployment, LocalDeployment):
        rest, grpc = f"{LOOPBACK}:{deployment.ports.http}", f"{LOOPBACK}:{deployment.ports.grpc}"
        return Served(deployment=deployment, rest=rest, grpc=grpc, log=deployment.log, look_s=_LOOK_S)
    mesh = deployment.target.url
    return Served(deployment=deployment, rest=mesh, grpc=mesh, log=None, look_s=_LOOK_AT_CORE2_S)


def _entry(model: Path) -> Path:
    if model.is_file():
        return model
    found = sorted([*model.glob("*.onnx"), *model.glob("*.xml")]) if model.is_dir() else []
    if len(found) != 1:
        what = f"{len(found)} models" if found else "no model"
        raise InputError(f"{what} at {model}", hint="Give the path of one .onnx file or OpenVINO .xml.")
    return found[0]


def _stored(entry: Path, store: FolderStore, work: Path) -> Artifact:
    """The model's own files in the store, and nothing else of its folder."""
    folder = work / "admitted"
    folder.mkdir()
    kind: Format = "openvino" if entry.suffix == ".xml" else "onnx"
    inputs, outputs = signature_of(ask_child("optimize.admission:admit_here", entry, folder=str(folder), format=kind))
    name = entry.name if kind == "openvino" else ENTRY
    return store.add(folder, format=kind, entry=name, inputs=inputs, outputs=outputs)


def stored_candidate(model: Path, profile: ServingProfile, *, work: Path) -> tuple[Candidate, Artifact, Path]:
    """One model in the store of a working folder: as a candidate, its artifact, and the folder with its files.

    Args:
        model: as for `serve_model`.
        profile: how it is to be served.
        work: the working folder.

    Raises:
        InputError: there is no such model.
    """
    entry, store = _entry(model), FolderStore(work)
    with TemporaryDirectory(prefix="burnish-admitted-") as scratch:
        artifact = _stored(entry, store, Path(scratch))
    candidate = _candidate(entry.stem, artifact, profile, "default", server_version=UNKNOWN_VERSION, cluster="")
    return candidate, artifact, store.path(artifact)


def _candidate(
    stem: str, artifact: Artifact, profile: ServingProfile, precision: str, *, server_version: str, cluster: str
) -> Candidate:
    from optimize.packages import version

    name: Literal["onnxruntime", "openvino"] = "openvino" if artifact.format == "openvino" else "onnxruntime"
    engine = EngineSpec(name=name, precision="float32" if precision == "float32" else "default")
    identity = {"artifact": artifact.digest, "engine": to_jsonable(engine), "serving": to_jsonable(profile)}
    return Candidate(
        id=digest(identity),
        name=f"{stem} @ {profile.key}",
        variant_id=artifact.digest[:16],
        variant_name=stem,
        engine=engine,
        engine_version=UNKNOWN_VERSION if profile.of_server else version(name),
        serving=profile,
        server_version=server_version,
        cluster=cluster,
    )
