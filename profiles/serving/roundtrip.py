"""What a Core 2 agent makes of an artifact's folder, and which settings do not survive it.

The agent copies one folder of what ``storageUri`` points to into its server's repository, under a name and version of
its own. It reads ``model-settings.json`` into a struct of few keys, and ``config.pbtxt`` with Triton's schema of
January 2022, and writes both anew: what the struct lacks is gone, and what the schema lacks fails the load.

Source: Seldon Core 2, ``scheduler/pkg/agent``, 2.6 to 2.10. Rules are numbered C1 (model-settings.json), C2 (folders),
C3 (config.pbtxt) and C4 (the URI).
"""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from profiles.serving.roundtrip_findings import (
    CONFIG,
    SETTINGS,
    Files,
    Finding,
    ModelResource,
    RefusedError,
    Severity,
    finding,
    version_of,
)
from profiles.serving.roundtrip_mlserver import rewrite_for_mlserver
from profiles.serving.roundtrip_triton import rewrite_for_triton
from registry.errors import InputError

__all__ = [
    "Finding",
    "Rewritten",
    "Server",
    "Severity",
    "agent_rewrite",
    "check_roundtrip",
    "check_uri",
    "guess_server",
    "refuse_errors",
]

Server = Literal["mlserver", "triton"]

DEFAULT_REMOTE = "gs"
"""The one rclone remote that Core 2 is installed with; it reads public buckets."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_RESOLVE = "Resolve it to where the files are, and write that: s3://..., gs://..., or a path that rclone has mounted."


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """What the server finds in its repository.

    Attributes:
        model: the model's name there, ``<name>_<version>``.
        files: path in the repository -> content, of the files that the agent writes.
        copies: path in the repository -> the file that is copied there as it is.
        refused: whether the agent would fail to load the model; then nothing is written.
        findings: in the order of the files.
    """

    model: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    refused: bool = False
    findings: tuple[Finding, ...] = ()

    def lay_out(self, repository: Path) -> None:
        """Writes the files into a server's repository; copies are hard links where they can be."""
        for path, source in self.copies.items():
            target = _free(repository / path)
            try:
                target.hardlink_to(source.resolve())
            except OSError:  # another device, or a file system without links
                shutil.copyfile(source, target)
        for path, content in self.files.items():
            _free(repository / path).write_bytes(content)


def _free(target: Path) -> Path:
    """The path with nothing there: what was there may be a link to a file that must not be written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    return target


def agent_rewrite(
    folder: Path,
    server: Server,
    *,
    name: str,
    version: int = 1,
    artifact_version: int | None = None,
    parameters: Mapping[str, object] | None = None,
    requirements: Sequence[str] = (),
) -> Rewritten:
    """What an agent puts into its server's repository for this folder, and what it changes on the way.

    Args:
        folder: what ``storageUri`` points to.
        server: the kind of server behind the agent.
        name: the Model's name.
        version: Core 2's own version of the Model; the server knows it as ``<name>_<version>``.
        artifact_version: the Model's ``artifactVersion``.
        parameters: the Model's ``parameters``; each is a text.
        requirements: the Model's ``requirements``: settings are made from one where the folder has none.

    Raises:
        InputError: Core 2 has no such server or refuses the name, or the folder is missing or empty.
        MissingExtraError: Triton's schema is not installed.
    """
    if server not in {"mlserver", "triton"}:
        raise InputError(f"Core 2 has no server {server!r}", hint="It is mlserver or triton.")
    if not _NAME.fullmatch(name) or version < 1:
        raise InputError(
            f"Core 2 refuses a model {name!r} of version {version}",
            hint="A name has small letters, digits and '-' in it, and begins and ends with a letter or digit; the"
            " version is 1 or more.",
        )
    files = _files(folder)
    model = f"{name}_{version}"
    resource = ModelResource(
        name=model, artifact_version=artifact_version, parameters=parameters or {}, requirements=requirements
    )
    rewrite = rewrite_for_mlserver if server == "mlserver" else rewrite_for_triton
    findings: list[Finding] = []
    try:
        written, copied = rewrite(files, resource, findings)
    except RefusedError as error:
        return Rewritten(model=model, refused=True, findings=(*findings, *error.findings))
    return Rewritten(
        model=model,
        files={f"{model}/{path}": content for path, content in written.items()},
        copies={f"{model}/{path}": source for path, source in copied.items() if path not in written},
        findings=tuple(findings),
    )


def check_roundtrip(
    folder: Path,
    server: Server,
    *,
    name: str = "model",
    uri: str | None = None,
    remotes: Sequence[str] | None = None,
    artifact_version: int | None = None,
    parameters: Mapping[str, object] | None = None,
    requirements: Sequence[str] = (),
) -> tuple[Finding, ...]:
    """What does not come through Core 2 as it stands in the folder; nothing that matters where no finding is an error.

    Args:
        folder: what ``storageUri`` points to.
        server: the kind of server behind the agent.
        name: the Model's name.
        uri: the ``storageUri`` itself, or None to leave it out of the check.
        remotes: names of the rclone remotes that the cluster has, or None where they are not known.
        artifact_version: the Model's ``artifactVersion``.
        parameters: the Model's ``parameters``; each is a text.
        requirements: the Model's ``requirements``.

    Raises:
        InputError: as `agent_rewrite`.
        MissingExtraError: as `agent_rewrite`.
    """
    rewritten = agent_rewrite(
        folder,
        server,
        name=name,
        artifact_version=artifact_version,
        parameters=parameters,
        requirements=requirements,
    )
    return (*rewritten.findings, *(() if uri is None else check_uri(uri, remotes=remotes)))


def refuse_errors(name: str, findings: Iterable[Finding]) -> None:
    """Returns where none of the findings is an error.

    Args:
        name: of the candidate that they are about.
        findings: what Core 2 would do to its folder.

    Raises:
        InputError: one is; the message tells what Core 2 would lose or refuse, and the hint how to have it.
    """
    for one in findings:
        if one.severity == "error":
            where = f"{one.file} {one.key}".rstrip()
            raise InputError(f"Core 2 would not serve {name!r} so: {where}: {one.message}", hint=one.way)


def guess_server(folder: Path) -> Server:
    """The server that a folder is for, by the files in it.

    Raises:
        InputError: the folder is missing or empty, or holds the files of no server, or of both.
    """
    files = _files(folder)
    names = {path.name for path in files}
    settings, config = SETTINGS in names, CONFIG in names
    if settings != config:
        return "mlserver" if settings else "triton"
    if not settings and any(version_of(path.parent) for path in files):
        return "triton"
    found = f"both {SETTINGS} and {CONFIG}" if settings else f"no {SETTINGS}, {CONFIG} or folder named by a number"
    raise InputError(f"{folder} has {found}", hint="Say which server it is for: --server mlserver or triton.")


def _files(folder: Path) -> Files:
    """All files by their path in the folder, in the order in which the agent walks: by name, folder after folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", hint="Name the folder that storageUri points to.")
    found = {PurePosixPath(path.relative_to(folder).as_posix()): path for path in folder.rglob("*") if path.is_file()}
    if not found:
        raise InputError(f"{folder} is empty", hint="Core 2 needs at least a model's file to load.")
    return {path: found[path] for path in sorted(found, key=lambda path: path.parts)}


def check_uri(uri: str, *, remotes: Sequence[str] | None = None) -> tuple[Finding, ...]:
    """Whether Core 2 can fetch from a ``storageUri``: rclone knows remotes by name, and paths in its own container.

    Args:
        uri: the ``storageUri``.
        remotes: names of the remotes that the cluster has, or None where they are not known.
    """
    remote, colon, rest = uri.partition(":")
    if colon and remote and "/" not in remote:
        found = _remote_finding(uri, remote, rest, remotes)
    else:
        found = _path_finding(uri)
    return () if found is None else (found,)


def _path_finding(uri: str) -> Finding:
    if not uri.strip():
        return _uri_finding("C404", "error", "it is empty", "Give the folder of the artifact.")
    if uri.startswith(":"):
        message = "a remote that is written out in the URI works for a Model without secretName only"
        return _uri_finding("C403", "warning", message, "Configure the remote, and begin the URI with its name.")
    if not uri.startswith("/"):
        message = f"{uri} is a path from wherever rclone was started in its container"
        return _uri_finding("C404", "error", message, "Write the whole path, from / on.")
    message = f"{uri} is a path in the container rclone of the Server, not on this machine"
    return _uri_finding("C404", "info", message, "Mount a volume there that has it.")


def _remote_finding(uri: str, remote: str, rest: str, remotes: Sequence[str] | None) -> Finding | None:
    if remote in {"mlflow", "mlflow-artifacts", "models", "runs", "dbfs"}:
        message = f"Core 2 cannot fetch {uri}: rclone knows nothing of MLflow"
        return _uri_finding("C401", "error", message, _RESOLVE)
    if not rest.strip("/"):
        return _uri_finding("C404", "error", f"{uri} names a remote and nothing in it", "Add the bucket and path.")
    if remote in ((DEFAULT_REMOTE,) if remotes is None else remotes):
        return None
    if remote in {"http", "https", "file"}:
        message = f"Core 2 cannot fetch {uri}: rclone takes {remote!r} for the name of a remote"
        way = "Write the path alone, as rclone's container has it." if remote == "file" else _RESOLVE
        return _uri_finding("C402", "error", message, way)
    way = (
        f"Configure rclone with a remote named {remote!r}: in a secret that the Model's secretName names, or for all"
        " models in config_secrets of the SeldonRuntime."
    )
    if remotes is None:
        message = f"it can be fetched only where rclone has a remote named {remote!r}"
        return _uri_finding("C403", "warning", message, way)
    known = ", ".join(remotes) or "none"
    return _uri_finding("C403", "error", f"there is no remote {remote!r}; the remotes are: {known}", way)


def _uri_finding(rule: str, severity: Severity, message: str, way: str) -> Finding:
    return finding(rule, severity, message, file="storageUri", way=way)
