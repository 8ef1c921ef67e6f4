"""A rendered candidate's folder, uploaded to where its manifests say that Core 2 finds it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiles.deploy.placement import place
from profiles.deploy.storage_uris import fetched_as, rclone_uri
from registry.errors import InputError


def where_fetched(upload: str, storage_uri: str | None, *, target: str) -> str:
    """The beginning of a Model's ``storageUri`` for what is uploaded to a destination.

    Args:
        upload: a local folder, ``s3://bucket/path`` or ``gs://bucket/path``.
        storage_uri: what the cluster's rclone calls it, or None where that follows from ``upload``.
        target: of the rendering.

    Raises:
        InputError: it does not follow, the two are not the same place, or nothing is rendered for Core 2.
    """
    if target != "core2":
        raise InputError("--upload is for Core 2", hint="Leave it out, or render with --target core2.")
    remotes, mounts = fetched_as(upload, storage_uri)
    return rclone_uri(upload, remotes=remotes, mounts=mounts)


def upload_rendering(told: Mapping[str, Any], upload: str, storage_uri: str | None) -> dict[str, Any]:
    """Uploads what `optimize.rendering.render_candidate` wrote, unless it is there.

    Returns:
        What to add to what was told: ``placed_uri``, ``uploaded`` and ``uploaded_bytes``.

    Raises:
        InputError: something else is there.
        UnreachableError: the store does not answer, or refuses.
    """
    remotes, mounts = fetched_as(upload, storage_uri)
    placed = place(Path(told["folder"]), upload, name=told["model"], remotes=remotes, mounts=mounts)
    sent = placed.size_bytes if placed.uploaded else 0
    return {"placed_uri": placed.uri, "uploaded": placed.uploaded, "uploaded_bytes": sent}
