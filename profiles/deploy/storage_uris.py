"""URIs of places for models: what the cluster's rclone calls them, and where MLflow's are."""

import re
from collections.abc import Mapping
from pathlib import Path

from profiles.serving.roundtrip import DEFAULT_REMOTE
from registry.errors import InputError
from registry.filesystems import MLFLOW_SCHEMES, destination_of, local_path, scheme_of
from registry.tracking import artifact_location, redact

_REMOTE = re.compile(r"\w[\w.+-]*")
_PARAMETERS: Mapping[str, str] = {
    "s3": '{"provider": "AWS", "region": "...", "access_key_id": "...", "secret_access_key": "..."}',
    "gs": '{"service_account_credentials": "..."}',
}
_RCLONE_TYPES: Mapping[str, str] = {"s3": "s3", "gs": "google cloud storage"}


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
    where = destination_of(uri)
    if where.scheme == "file":
        return _in_container(Path(where.root), mounts or {})
    known = {"gs": DEFAULT_REMOTE, **(remotes or {})}
    remote = known.get(where.scheme)
    if remote is None:
        raise InputError(
            f"it is not known which rclone remote of the cluster reads {where.scheme}://",
            hint=f"Core 2 comes with {DEFAULT_REMOTE!r} alone. {_how_to_configure(where.scheme)}",
        )
    if not _REMOTE.fullmatch(remote):
        raise InputError(
            f"{remote!r} cannot be the name of an rclone remote",
            hint="Give the name that the Secret has, without a colon: letters, digits, _ . + and -.",
        )
    return f"{remote}://{where.root}"


def fetched_as(destination: str, storage_uri: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The remotes and mounts (see `rclone_uri`) of a cluster that knows a destination as ``storage_uri``.

    Raises:
        InputError: the two are not the same place.
    """
    where = destination_of(destination)
    if storage_uri is None:
        return {}, {}
    if where.scheme == "file":
        return {}, {where.root: storage_uri.rstrip("/") or "/"}
    remote, _, rest = storage_uri.partition(":")
    if rest.strip("/") != where.root:
        raise InputError(
            f"{redact(storage_uri)} is not where {where.uri(where.root)} is",
            hint=f"Give NAME://{where.root}, with the name of the cluster's rclone remote.",
        )
    return {where.scheme: remote}, {}


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
        root = local_path(local).resolve()
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
    if scheme_of(uri) not in MLFLOW_SCHEMES:
        return rclone_uri(uri, remotes=remotes, mounts=mounts)
    location = artifact_location(uri, tracking_uri)
    if scheme_of(location) not in (None, "file", "s3", "gs"):
        raise InputError(
            f"{uri} is kept where rclone cannot read it: {redact(location)}",
            hint=f"Fetch it with `mlflow artifacts download --artifact-uri {uri} --dst-path FOLDER`, put the folder "
            "into a bucket (`rclone copy FOLDER s3:bucket/path`), and give that URI.",
        )
    return rclone_uri(location, remotes=remotes, mounts=mounts)
