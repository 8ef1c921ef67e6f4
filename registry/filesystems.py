"""Places for files that this machine and others reach: a folder, S3, Google Cloud Storage, through fsspec.

Credentials come from where s3fs and gcsfs look for them (environment, profiles, service accounts), never from a URI,
and no message holds one.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from registry.errors import InputError, MissingExtraError, UnreachableError
from registry.full_disk import FULL
from registry.ledger import fsync_folder

Scheme = Literal["file", "s3", "gs"]
MLFLOW_SCHEMES = frozenset({"runs", "models", "mlflow-artifacts"})
"""What MLflow resolves; nothing else can write there."""
BLOCK_BYTES = 8 << 20
"""How much is read or written at once."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_EXTRAS: Mapping[str, str] = {"s3": "s3", "gs": "gcs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A place: the store's scheme, and ``bucket/prefix`` or an absolute path, without a slash at the end."""

    scheme: Scheme
    root: str

    def uri(self, path: str) -> str:
        """The URI of a path that begins with the bucket, or with ``/``."""
        return path if self.scheme == "file" else f"{self.scheme}://{path}"


def scheme_of(uri: str) -> str | None:
    """What stands before the colon, in small letters; None for a path."""
    found = _SCHEME.match(uri)
    return None if found is None else found[1].lower()


def destination_of(uri: str) -> Destination:
    """The place that a URI or local path names.

    Raises:
        InputError: nothing can be placed there, or the URI may have credentials in it.
    """
    scheme = scheme_of(uri)
    if scheme not in (None, "file") and ("@" in uri or "?" in uri or "#" in uri):
        # Not shown: what stands there may be a password or a signature.
        raise InputError(
            f"the {scheme} URI has '@', '?' or '#' in it, as one with credentials has",
            hint="Give scheme://bucket/prefix alone; credentials come from the environment or its files.",
        )
    if re.search(r"\s", uri) or not uri.isprintable() or not uri:
        raise InputError(f"{uri!r} is empty, or has a space in it", hint="Give a URI or path without one.")
    if scheme in MLFLOW_SCHEMES:
        raise InputError(f"{uri} is MLflow's, where nothing else can be placed", hint="Give s3://, gs:// or a path.")
    if scheme in (None, "file"):
        return Destination(scheme="file", root=_local_root(uri))
    if scheme not in ("s3", "gs"):
        raise InputError(f"there is no way to place anything at {scheme}:", hint="Give s3://, gs:// or a path.")
    bucket, _, prefix = uri.partition(":")[2].removeprefix("//").strip("/").partition("/")
    if not _BUCKET.fullmatch(bucket) or any(part in {"", ".", ".."} for part in prefix.split("/") if prefix):
        raise InputError(f"{uri!r} names no bucket and prefix", hint=f"It is {scheme}://bucket/prefix.")
    root = f"{bucket}/{prefix}" if prefix else bucket
    return Destination(scheme="s3" if scheme == "s3" else "gs", root=root)


def _local_root(uri: str) -> str:
    path = uri
    if uri.lower().startswith("file:"):
        path = uri[len("file:") :]
        if path.startswith("//"):
            path = path.removeprefix("//")
        if not path.startswith("/"):
            raise InputError(f"{uri!r} is no file of this machine", hint="Write file:///path, or the path alone.")
    return str(local_path(path).resolve())


def local_path(given: str, base: Path | None = None) -> Path:
    """A path as a user writes it: ``~`` is the home folder, and what is relative is seen from ``base``.

    ``~name`` of a user that there is not stays as it is, as in a shell, and is then a file that is missing.
    """
    path = Path(os.path.expanduser(given))  # noqa: PTH111 (Path's own raises for such a user, and takes ./~ for ~)
    return path if base is None else base / path


# --- file systems -----------------------------------------------------------------------------------------------


@contextmanager
def refusals(scheme: Scheme, path: str) -> Iterator[None]:
    """Turns what the store's libraries raise into our errors, without what they quote of credentials.

    Args:
        scheme: of the store.
        path: what it is about, the bucket first; part of each message.
    """
    remote = scheme != "file"
    uri = f"{scheme}://{path}" if remote else path
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{scheme}://", extra=_EXTRAS[scheme]) from error
    except InterruptedError:
        raise  # nobody waits for it any more, which is no word of the store's
    except PermissionError:
        hint = "The credentials have to allow listing, reading and writing there, and not be expired."
        raise UnreachableError(
            f"{uri}: access denied", hint=hint if remote else "Check the folder's permissions."
        ) from None
    except FileNotFoundError as error:
        if not remote or error.filename:  # a store's has none: this is a file of ours that went away
            raise UnreachableError(f"{uri}: {_said(error)}") from None
        bucket = path.partition("/")[0]
        raise InputError(f"{scheme}://{bucket}: there is no such bucket", hint="Create it, or name another.") from None
    # Before OSError: some of these are of it, and quote the endpoint.
    except _library_errors(scheme) as error:
        raise _unanswered(uri, error) from None
    except OSError as error:
        raise UnreachableError(
            f"{uri}: {'no space is left there' if error.errno in FULL else _said(error)}",
            hint="What was written is kept, and completed by the same command.",
        ) from None


def _unanswered(uri: str, error: BaseException) -> UnreachableError:
    kind = type(error).__name__
    if "Credential" in kind or "Profile" in kind or "Auth" in kind or "Token" in kind:
        return UnreachableError(
            f"{uri}: no credentials that could be used were found ({kind})",
            hint="Give them where the store's own tools look: AWS_PROFILE, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, or the machine's account.",
        )
    if "SSL" in kind:
        return UnreachableError(
            f"{uri}: the store's certificate is not one that this machine trusts ({kind})",
            hint="AWS_CA_BUNDLE names a file with the authority of a store of your own.",
        )
    return UnreachableError(
        f"{uri}: the store does not answer ({kind})",
        hint="Check the network, the region, and AWS_ENDPOINT_URL if it is set. What was written is kept.",
    )


def open_filesystem(scheme: Scheme) -> Any:
    """Fsspec's file system, which keeps no listings and gives a silent store up soon; to be used within `refusals`."""
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


def put_local(base: Path, target: Path, source: Path) -> None:
    """Writes a file, which appears whole or not at all, by way of a temporary one beside the folder ``base``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, and not in it: nobody may fetch half a file.
    descriptor, name = tempfile.mkstemp(prefix=f".{base.name}.", suffix=".part", dir=base.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as writer, source.open("rb") as reader:
            shutil.copyfileobj(reader, writer, BLOCK_BYTES)
            writer.flush()
            # rclone's container reads it under another account.
            os.fchmod(writer.fileno(), 0o644)
            os.fsync(writer.fileno())
        partial.rename(target)
        fsync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)
