"""Files in a local folder, S3 or Google Cloud Storage, through fsspec: each is written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiles.deploy.storage_uris import Destination, Scheme
from registry.errors import InputError, MissingExtraError, UnreachableError
from registry.ledger import fsync_folder

_BLOCK_BYTES = 8 << 20
_ABANDONED_S = 3600.0
_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_EXTRAS: Mapping[str, str] = {"s3": "s3", "gs": "gcs"}


@dataclass(frozen=True)
class Store:
    """One model's folder in a store.

    Attributes:
        place: the destination.
        base: path of the folder in the file system, the bucket first.
        system: fsspec's file system for it.
    """

    place: Destination
    base: str
    system: Any = field(init=False)

    def __post_init__(self) -> None:
        with self.refusals():
            object.__setattr__(self, "system", _filesystem(self.place.scheme))

    @property
    def uri(self) -> str:
        """Of the folder."""
        return self.place.uri(self.base)

    def manifest(self) -> bytes | None:
        """What stands beside the folder as its manifest, if anything does."""
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
        """Of the bytes of one file, all of them read."""
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
        """Writes the manifest beside the folder."""
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
