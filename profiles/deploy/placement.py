"""Where a model's folder goes so that Core 2 can fetch it: a local folder, S3 or Google Cloud Storage.

Layout under the destination::

    <model name>/<digest>/<files>      the folder as it was rendered, and nothing else: a Core 2 agent copies all of it
    <model name>/<digest>.json         the manifest: every file's SHA-256 and size; written last

So a folder without its manifest is one that a killed upload left, and is completed by the next. Bytes that are there
already are never written over. Credentials come from where fsspec's s3fs and gcsfs look for them (environment,
profiles, service accounts), never from a URI.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from profiles.serving.naming import check_core2_name
from profiles.serving.roundtrip import DEFAULT_REMOTE
from registry.errors import InputError, MissingExtraError, UnreachableError
from registry.ledger import fsync_folder
from registry.tracking import artifact_location, redact

_log = logging.getLogger(__name__)

Scheme = Literal["file", "s3", "gs"]
MLFLOW_SCHEMES = frozenset({"runs", "models", "mlflow-artifacts"})
"""What MLflow resolves; rclone has no remote for any of it."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
_REMOTE = re.compile(r"\w[\w.+-]*")
_BLOCK_BYTES = 8 << 20
_ABANDONED_S = 3600.0
_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_EXTRAS: Mapping[str, str] = {"s3": "s3", "gs": "gcs"}
_PARAMETERS: Mapping[str, str] = {
    "s3": '{"provider": "AWS", "region": "...", "access_key_id": "...", "secret_access_key": "..."}',
    "gs": '{"service_account_credentials": "..."}',
}
_RCLONE_TYPES: Mapping[str, str] = {"s3": "s3", "gs": "google cloud storage"}


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
        remotes: ``s3`` or ``gs`` -> the rclone remote of the cluster that reads it; see `rclone_uri`.
        mounts: local folder -> where the rclone container has it; see `rclone_uri`.
        verify: read every byte that is there already, too. Otherwise sizes are compared where there is a manifest.

    Raises:
        InputError: the folder, the destination or the name cannot be used, the bucket is not there, or what is there
            is not this folder.
        MissingExtraError: s3fs or gcsfs is not installed.
        UnreachableError: the store does not answer, refuses, is full, or gives back other bytes than it was given.
    """
    check_core2_name(name, "Model")
    place_ = _destination(destination)
    files = read_folder(folder)
    digest = folder_digest(files)
    base = f"{place_.root}/{model_path(name, digest)}"
    uri = place_.uri(base)
    # Before anything is written: what Core 2 cannot fetch need not be uploaded.
    fetched = rclone_uri(uri, remotes=remotes, mounts=mounts)
    store = _Store(place_, base)
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
                files.append(PlacedFile(path=inside, sha256=_sha256(path), size_bytes=path.stat().st_size))
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not files:
        raise InputError(f"{folder} holds no file")
    return tuple(files)


def folder_digest(files: tuple[PlacedFile, ...]) -> str:
    """SHA-256 (hex) over the lines ``<sha256>  <path>``, sorted by path; as `core2.folder.ModelFolder.digest` is."""
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _manifest(files: tuple[PlacedFile, ...], digest: str) -> dict[str, Any]:
    listed = {file.path: {"sha256": file.sha256, "size_bytes": file.size_bytes} for file in files}
    return {"schema": 1, "digest": digest, "files": listed}


# --- URIs ------------------------------------------------------------------------------------------------------


def rclone_uri(uri: str, *, remotes: Mapping[str, str] | None = None, mounts: Mapping[str, str] | None = None) -> str:
    """What a Model's ``storageUri`` has to be, for the cluster to fetch what is under a URI.

    rclone takes what stands before the colon for the name of a remote that the cluster has configured, and a path for
    one in its own container.

    Args:
        uri: ``s3://...``, ``gs://...``, or a local path.
        remotes: ``s3`` or ``gs`` -> the remote's name. Core 2 is installed with one for ``gs``, which reads public
            buckets only.
        mounts: local folder -> the absolute path under which a volume shows it to the rclone container. Without any,
            the path is taken to be the same there.

    Raises:
        InputError: no remote or mount is known for it.
    """
    place_ = _destination(uri)
    if place_.scheme == "file":
        return _in_container(Path(place_.root), mounts or {})
    known = {"gs": DEFAULT_REMOTE, **(remotes or {})}
    remote = known.get(place_.scheme)
    if remote is None:
        raise InputError(
            f"it is not known which rclone remote of the cluster reads {place_.scheme}://",
            hint=f"Core 2 comes with {DEFAULT_REMOTE!r} alone. {_how_to_configure(place_.scheme)}",
        )
    if not _REMOTE.fullmatch(remote):
        raise InputError(
            f"{remote!r} cannot be the name of an rclone remote",
            hint="Give the name that the Secret has, without a colon: letters, digits, _ . + and -.",
        )
    return f"{remote}://{place_.root}"


def fetched_as(destination: str, storage_uri: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The remotes and mounts (see `rclone_uri`) of a cluster that knows a destination as ``storage_uri``.

    Raises:
        InputError: the two are not the same place.
    """
    place_ = _destination(destination)
    if storage_uri is None:
        return {}, {}
    if place_.scheme == "file":
        return {}, {place_.root: storage_uri.rstrip("/") or "/"}
    remote, _, rest = storage_uri.partition(":")
    if rest.strip("/") != place_.root:
        raise InputError(
            f"{redact(storage_uri)} is not where {place_.uri(place_.root)} is",
            hint=f"Give NAME://{place_.root}, with the name of the cluster's rclone remote.",
        )
    return {place_.scheme: remote}, {}


def _how_to_configure(scheme: str) -> str:
    content = f'{{"type": "{_RCLONE_TYPES[scheme]}", "name": "NAME", "parameters": {_PARAMETERS[scheme]}}}'
    return (
        f"Put a remote into a Secret, one key with the value {content}, name the Secret in the Model's secretName (or "
        "in config_secrets of the SeldonRuntime), and say what NAME is (burnish render: --storage-uri NAME://bucket/path)."
    )


def _in_container(path: Path, mounts: Mapping[str, str]) -> str:
    if not mounts:
        return str(path)
    for local, inside in mounts.items():
        if not inside.startswith("/"):
            raise InputError(f"{inside!r} is no absolute path in the rclone container")
        root = Path(local).expanduser().resolve()
        if path.is_relative_to(root):
            return f"{inside.rstrip('/')}/{path.relative_to(root)}".removesuffix("/.") or "/"
    raise InputError(
        f"the rclone container has no mount of {path}; it has {', '.join(sorted(mounts))}",
        hint="Place it under one of these, or mount a volume in the container `rclone` of the Server.",
    )


def resolve(
    uri: str,
    *,
    tracking_uri: str | None = None,
    remotes: Mapping[str, str] | None = None,
    mounts: Mapping[str, str] | None = None,
) -> str:
    """The rclone URI of what is anywhere: a URI that `rclone_uri` takes, or an artifact that MLflow keeps.

    Args:
        uri: also ``runs:/<run id>/<path>``, ``models:/<name>/<version>``, ``models:/<name>@<alias>``.
        tracking_uri: MLflow's; None for ``MLFLOW_TRACKING_URI``.
        remotes: see `rclone_uri`.
        mounts: see `rclone_uri`.

    Raises:
        InputError: it is not there, or cannot be fetched with rclone, and why.
        UnreachableError: the tracking store does not answer.
    """
    if _scheme(uri) not in MLFLOW_SCHEMES:
        return rclone_uri(uri, remotes=remotes, mounts=mounts)
    location = artifact_location(uri, tracking_uri)
    if _scheme(location) not in (None, "file", "s3", "gs"):
        raise InputError(
            f"{uri} is kept where rclone cannot read it: {redact(location)}",
            hint=f"Fetch it with `mlflow artifacts download --artifact-uri {uri} --dst-path FOLDER`, put the folder "
            "into a bucket (`rclone copy FOLDER s3:bucket/path`), and give that URI.",
        )
    return rclone_uri(location, remotes=remotes, mounts=mounts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Destination:
    """A place: the store's scheme, and ``bucket/prefix`` or an absolute path, without a slash at the end."""

    scheme: Scheme
    root: str

    def uri(self, path: str) -> str:
        return path if self.scheme == "file" else f"{self.scheme}://{path}"


def _scheme(uri: str) -> str | None:
    found = _SCHEME.match(uri)
    return None if found is None else found[1].lower()


def _destination(uri: str) -> _Destination:
    scheme = _scheme(uri)
    if scheme not in (None, "file") and ("@" in uri or "?" in uri or "#" in uri):
        # Not shown: what stands there may be a password or a signature.
        raise InputError(
            f"the {scheme} URI has '@', '?' or '#' in it, as one with credentials has",
            hint="Give scheme://bucket/prefix alone; credentials come from the environment or its files.",
        )
    if re.search(r"\s", uri) or not uri.isprintable() or not uri:
        raise InputError(f"{uri!r} is empty, or has a space in it", hint="Core 2 takes a URI without one.")
    if scheme in MLFLOW_SCHEMES:
        raise InputError(f"{uri} is MLflow's, and Core 2 cannot fetch from there", hint="Give s3://, gs:// or a path.")
    if scheme in (None, "file"):
        return _Destination(scheme="file", root=_local_root(uri))
    if scheme not in ("s3", "gs"):
        raise InputError(f"there is no way to place anything at {scheme}:", hint="Give s3://, gs:// or a path.")
    bucket, _, prefix = uri.partition(":")[2].removeprefix("//").strip("/").partition("/")
    if not _BUCKET.fullmatch(bucket) or any(part in {"", ".", ".."} for part in prefix.split("/") if prefix):
        raise InputError(f"{uri!r} names no bucket and prefix", hint=f"It is {scheme}://bucket/prefix.")
    root = f"{bucket}/{prefix}" if prefix else bucket
    return _Destination(scheme="s3" if scheme == "s3" else "gs", root=root)


def _local_root(uri: str) -> str:
    path = uri
    if uri.lower().startswith("file:"):
        path = uri[len("file:") :]
        if path.startswith("//"):
            path = path.removeprefix("//")
        if not path.startswith("/"):
            raise InputError(f"{uri!r} is no file of this machine", hint="Write file:///path, or the path alone.")
    return str(Path(path).expanduser().resolve())


# --- what is there, and what is missing ------------------------------------------------------------------------


def _compare(
    store: "_Store", files: tuple[PlacedFile, ...], digest: str, *, verify: bool
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


def _check_bytes(store: "_Store", file: PlacedFile, *, written: bool) -> None:
    # Read back, since what a store calls a checksum differs: an ETag is no MD5 with encryption or several parts.
    if store.sha256(file.path) == file.sha256:
        return
    if not written:
        raise _foreign(store, f"{file.path!r} has other bytes")
    raise UnreachableError(
        f"{store.uri}/{file.path} reads back with other bytes than were written",
        hint="Was the file changed meanwhile? Otherwise the store damaged it. Remove it there and try again.",
    )


def _foreign(store: "_Store", what: str) -> InputError:
    return InputError(
        f"what is at {store.uri} is not what is to be placed: {what}",
        hint="Nothing was written over. Remove it if no Model uses it, and place the folder again.",
    )


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


# --- stores ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Store:
    """One model's folder in a store.

    Attributes:
        place: the destination.
        base: path of the folder in the file system, the bucket first.
        system: fsspec's file system for it.
    """

    place: _Destination
    base: str
    system: Any = field(init=False)

    def __post_init__(self) -> None:
        with self.refusals():
            object.__setattr__(self, "system", _filesystem(self.place.scheme))

    @property
    def uri(self) -> str:
        return self.place.uri(self.base)

    def manifest(self) -> bytes | None:
        try:
            content: bytes = self.system.cat_file(f"{self.base}.json")
        except FileNotFoundError:
            return None
        return content

    def sizes(self) -> dict[str, int]:
        """Path in the folder -> bytes, of each file that is there."""
        found: Mapping[str, Mapping[str, Any]] = self.system.find(self.base, detail=True)
        inside = f"{self.base}/"
        return {
            path.removeprefix(inside): int(about["size"] or 0)
            for path, about in found.items()
            # A key that ends in a slash is how consoles draw an empty folder.
            if path.startswith(inside) and about["type"] != "directory" and not path.endswith("/")
        }

    def sha256(self, path: str) -> str:
        with self.system.open(f"{self.base}/{path}", "rb", block_size=_BLOCK_BYTES) as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(_BLOCK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def put(self, path: str, source: Path) -> None:
        """Writes one file, which appears whole or not at all."""
        if self.place.scheme == "file":
            _put_local(Path(self.base), Path(self.base, path), source)
        else:
            self.system.put_file(str(source), f"{self.base}/{path}")

    def put_manifest(self, content: Mapping[str, Any]) -> None:
        with tempfile.TemporaryDirectory(prefix="burnish-") as folder:
            source = Path(folder, "manifest.json")
            source.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            if self.place.scheme == "file":
                _put_local(Path(self.base), Path(f"{self.base}.json"), source)
                _remove_abandoned(Path(self.base))
            else:
                self.system.put_file(str(source), f"{self.base}.json")

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Turns what the store's libraries raise into our errors, without what they quote of credentials."""
        remote = self.place.scheme != "file"
        try:
            yield
        except ImportError as error:
            raise MissingExtraError(f"{self.place.scheme}://", extra=_EXTRAS[self.place.scheme]) from error
        except PermissionError:
            hint = "The credentials have to allow listing, reading and writing there, and not be expired."
            raise UnreachableError(
                f"{self.uri}: access denied", hint=hint if remote else "Check the folder's permissions."
            ) from None
        except FileNotFoundError as error:
            if not remote or error.filename:  # a store's has none: this is a file of ours that went away
                raise UnreachableError(f"{self.uri}: {_said(error)}") from None
            bucket = self.base.partition("/")[0]
            raise InputError(
                f"{self.place.scheme}://{bucket}: there is no such bucket", hint="Create it, or name another."
            ) from None
        # Before OSError: some of these are of it, and quote the endpoint.
        except _library_errors(self.place.scheme) as error:
            raise self._unanswered(error) from None
        except OSError as error:
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            raise UnreachableError(
                f"{self.uri}: {'no space is left there' if full else _said(error)}",
                hint="What was written is kept, and completed by the same command.",
            ) from None

    def _unanswered(self, error: BaseException) -> UnreachableError:
        kind = type(error).__name__
        if "Credential" in kind or "Profile" in kind or "Auth" in kind or "Token" in kind:
            return UnreachableError(
                f"{self.uri}: no credentials that could be used were found ({kind})",
                hint="Give them where the store's own tools look: AWS_PROFILE, AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, or the machine's account.",
            )
        if "SSL" in kind:
            return UnreachableError(
                f"{self.uri}: the store's certificate is not one that this machine trusts ({kind})",
                hint="AWS_CA_BUNDLE names a file with the authority of a store of your own.",
            )
        return UnreachableError(
            f"{self.uri}: the store does not answer ({kind})",
            hint="Check the network, the region, and AWS_ENDPOINT_URL if it is set. What was written is kept.",
        )


def _filesystem(scheme: Scheme) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        # Nothing is asked of the environment here: botocore finds credentials, region and endpoint by itself.
        config: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 2}}
        if "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
            # botocore's default, a checksum behind the body, is refused by many stores that are not AWS's.
            # Nothing is lost with it: what is written is read back.
            config["request_checksum_calculation"] = "when_required"
        options["config_kwargs"] = config
    # Listings are read to see what others wrote, and a later call may have other credentials.
    system = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    if scheme == "s3":
        # botocore tries again as well; with s3fs's own five times a store that is silent would hold us for minutes.
        system.retries = 2
    return system


def _library_errors(scheme: Scheme) -> tuple[type[BaseException], ...]:
    """What the store's library raises beside OSError, when it gets no answer or has no credentials."""
    if scheme == "file":
        return ()
    from aiohttp import ClientError
    from fsspec.exceptions import FSTimeoutError

    found: tuple[type[BaseException], ...] = (ClientError, FSTimeoutError, TimeoutError)
    if scheme == "s3":
        from botocore import exceptions as s3

        return (*found, s3.BotoCoreError, s3.ClientError)
    with suppress(ImportError):
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError

        found = (*found, HttpError, GoogleAuthError)
    return found


def _said(error: OSError) -> str:
    """The first line of what an error says, without the credentials of the environment."""
    said = (error.strerror or str(error) or type(error).__name__).partition("\n")[0]
    for variable in _SECRET_VARIABLES:
        if secret := os.environ.get(variable):
            said = said.replace(secret, "***")
    return said


def _put_local(base: Path, target: Path, source: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, and not in it: nobody may fetch half a file.
    descriptor, name = tempfile.mkstemp(prefix=f".{base.name}.", suffix=".part", dir=base.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as writer, source.open("rb") as reader:
            shutil.copyfileobj(reader, writer, _BLOCK_BYTES)
            writer.flush()
            # rclone's container reads it under another account.
            os.fchmod(writer.fileno(), 0o644)
            os.fsync(writer.fileno())
        partial.rename(target)
        fsync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _remove_abandoned(base: Path) -> None:
    """Removes what killed uploads of this folder left half-written, if nobody wrote to it for an hour."""
    for leftover in base.parent.glob(f".{base.name}.*.part"):
        with suppress(OSError):
            # Against the clock of the file system, which is another machine's if it is mounted.
            if Path(f"{base}.json").stat().st_mtime - leftover.stat().st_mtime > _ABANDONED_S:
                leftover.unlink()
