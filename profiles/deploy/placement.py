"""Where a model's folder goes so that Core 2 can fetch it: a local folder, S3 or Google Cloud Storage.

Layout under the destination::

    <model name>/<digest>/<files>      the folder as it was rendered, and nothing else: a Core 2 agent copies all of it
    <model name>/<digest>.json         the manifest: every file's SHA-256 and size; written last

So a folder without its manifest is one that a killed upload left, and is completed by the next. Bytes that are there
already are never written over. Credentials come from where fsspec's s3fs and gcsfs look for them (environment,
profiles, service accounts), never from a URI.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.deploy.storage import Store
from profiles.deploy.storage_uris import rclone_uri
from profiles.serving.naming import check_core2_name
from registry.codec import file_sha256
from registry.errors import InputError, UnreachableError
from registry.filesystems import destination_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A folder that Core 2 can fetch.

    Attributes:
        uri: of the folder, as this machine names it: ``s3://``, ``gs://``, or an absolute path.
        rclone_uri: of the same folder, as a Model's ``storageUri`` has to name it.
        digest: SHA-256 (hex) over the folder, see `folder_digest`.
        uploaded: whether anything had to be written; False where all of it was there.
        size_bytes: of all files together.
    """

    uri: str
    rclone_uri: str
    digest: str
    uploaded: bool
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedFile:
    """A file of a folder: its path in it with ``/``, the SHA-256 (hex) of its bytes, and how many there are."""

    path: str
    sha256: str
    size_bytes: int


def place(
    folder: Path,
    destination: str,
    *,
    name: str,
    remotes: Mapping[str, str] | None = None,
    mounts: Mapping[str, str] | None = None,
    verify: bool = False,
) -> Placed:
    """Puts a model's folder where Core 2 can fetch it, unless it is there; what was written is read back.

    The same folder has the same place, and another one another, so that a second call writes nothing, and a Model's
    ``storageUri`` changes whenever its bytes do (Core 2 does not look again under a URI that it has).

    Args:
        folder: as it is to be served: regular files only.
        destination: a local folder, ``s3://bucket/prefix`` or ``gs://bucket/prefix``.
        name: the model's.
        remotes: ``s3`` or ``gs`` -> the rclone remote of the cluster that reads it; see `storage_uris.rclone_uri`.
        mounts: local folder -> where the rclone container has it; see `storage_uris.rclone_uri`.
        verify: read every byte that is there already, too. Otherwise sizes are compared where there is a manifest.

    Raises:
        InputError: the folder, the destination or the name cannot be used, the bucket is not there, or what is there
            is not this folder.
        MissingExtraError: s3fs or gcsfs is not installed.
        UnreachableError: the store does not answer, refuses, is full, or gives back other bytes than it was given.
    """
    check_core2_name(name, "Model")
    where = destination_of(destination)
    files = read_folder(folder)
    digest = folder_digest(files)
    base = f"{where.root}/{model_path(name, digest)}"
    uri = where.uri(base)
    # Before anything is written: what Core 2 cannot fetch need not be uploaded.
    fetched = rclone_uri(uri, remotes=remotes, mounts=mounts)
    store = Store(where, base)
    with store.refusals():
        missing, committed = _compare(store, files, digest, verify=verify)
        for file in missing:
            _log.info("writing %s (%d bytes) to %s", file.path, file.size_bytes, uri)
            store.put(file.path, folder / file.path)
            _check_bytes(store, file, written=True)
        if not committed:
            store.put_manifest(_manifest(files, digest))
    return Placed(
        uri=uri,
        rclone_uri=fetched,
        digest=digest,
        uploaded=bool(missing) or not committed,
        size_bytes=sum(file.size_bytes for file in files),
    )


def check_destination(destination: str) -> None:
    """Returns where a destination answers with these credentials; nothing is written.

    Raises:
        InputError: the destination cannot be used.
        MissingExtraError: s3fs or gcsfs is not installed.
        UnreachableError: the store does not answer, or refuses.
    """
    where = destination_of(destination)
    store = Store(where, f"{where.root}/burnish-looks-here")
    with store.refusals():
        store.sizes()


def model_path(name: str, digest: str) -> str:
    """Where a model's folder is under a destination."""
    return f"{name}/{digest}"


# --- the folder ------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> tuple[PlacedFile, ...]:
    """Every file under a folder, hashed, in the order of their paths.

    Raises:
        InputError: there is none, or something in it is no regular file, cannot be read, or has an unusual name.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    files = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is no regular file", hint="Put the file itself there: rclone leaves links out.")
        if not inside.isprintable() or "\\" in inside:
            raise InputError(f"the file name {inside!r} in {folder} cannot be uploaded", hint="Rename the file.")
        if path.is_file():
            try:
                files.append(PlacedFile(path=inside, sha256=file_sha256(path), size_bytes=path.stat().st_size))
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not files:
        raise InputError(f"{folder} holds no file")
    return tuple(files)


def folder_digest(files: tuple[PlacedFile, ...]) -> str:
    """SHA-256 (hex) over the lines ``<sha256>  <path>``, sorted by path; as `core2.folder.ModelFolder.digest` is."""
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return hashlib.sha256(lines.encode()).hexdigest()


def _manifest(files: tuple[PlacedFile, ...], digest: str) -> dict[str, Any]:
    listed = {file.path: {"sha256": file.sha256, "size_bytes": file.size_bytes} for file in files}
    return {"schema": 1, "digest": digest, "files": listed}


# --- what is there, and what is missing ------------------------------------------------------------------------


def _compare(
    store: Store, files: tuple[PlacedFile, ...], digest: str, *, verify: bool
) -> tuple[list[PlacedFile], bool]:
    """The files that are not there yet, and whether there is a manifest.

    Raises:
        InputError: something is there that is not of this folder.
    """
    found = store.manifest()
    if found is not None and _parsed(found) != _manifest(files, digest):
        raise _foreign(store, f"{store.base}.json is not the manifest of this folder")
    sizes = store.sizes()
    if extra := sorted(sizes.keys() - {file.path for file in files}):
        raise _foreign(store, f"{extra[0]!r} is no file of this folder")
    missing = []
    for file in files:
        if file.path not in sizes:
            missing.append(file)
        elif sizes[file.path] != file.size_bytes:
            raise _foreign(store, f"{file.path!r} has {sizes[file.path]} bytes instead of {file.size_bytes}")
        elif verify or found is None:
            _check_bytes(store, file, written=False)
    return missing, found is not None


def _check_bytes(store: Store, file: PlacedFile, *, written: bool) -> None:
    # Read back, since what a store calls a checksum differs: an ETag is no MD5 with encryption or several parts.
    if store.sha256(file.path) == file.sha256:
        return
    if not written:
        raise _foreign(store, f"{file.path!r} has other bytes")
    raise UnreachableError(
        f"{store.uri}/{file.path} reads back with other bytes than were written",
        hint="Was the file changed meanwhile? Otherwise the store damaged it. Remove it there and try again.",
    )


def _foreign(store: Store, what: str) -> InputError:
    return InputError(
        f"what is at {store.uri} is not what is to be placed: {what}",
        hint="Nothing was written over. Remove it if no Model uses it, and place the folder again.",
    )


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
