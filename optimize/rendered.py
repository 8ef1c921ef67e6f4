"""The folder that a rendering is written into: replaced whole, and only where it is ours."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from profiles.serving.core2.folder import ModelFolder, write_folder
from registry.codec import file_sha256
from registry.errors import InputError, StorageError
from registry.records import Candidate

MARKER = ".burnish-render"
"""Lists what was written into a folder, with digests, so that it can be known as ours and replaced."""


def former_rendering(out: Path) -> str | None:
    """The name of the candidate that was rendered into a folder before; None where it is new or empty.

    Raises:
        InputError: it holds something that burnish did not write, or that was changed since.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} is no folder", hint="Name another with --out.")
    here = {str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_symlink() or path.is_file()}
    marker = here.pop(MARKER, None)
    if not here and marker is None:
        return None
    listed = _marked(marker)
    for name, path in here.items():
        if marker is not None and path.parent.name == "__pycache__" and path.suffix == ".pyc":
            continue  # a server that was started right here compiled the code beside the model
        if name not in listed["files"]:
            raise InputError(
                f"{out} holds {name!r}, which no rendering put there", hint="Name another folder with --out."
            )
        if path.is_symlink() or file_sha256(path) != listed["files"][name]:
            raise InputError(
                f"{path} was changed since it was rendered",
                hint="Name another folder with --out, or remove this one if nothing in it is needed.",
            )
    return str(listed["candidate"])


def _marked(marker: Path | None) -> dict[str, Any]:
    nothing: dict[str, Any] = {"candidate": "", "files": {}}
    if marker is None or marker.is_symlink():
        return nothing
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return nothing
    known = isinstance(content, dict) and isinstance(content.get("files"), dict)
    return nothing | content if known else nothing


def put_rendering(
    out: Path,
    *,
    folder: ModelFolder,
    source: Path,
    place: str,
    texts: Mapping[str, str],
    candidate: Candidate,
    check: Callable[[Path], None],
) -> list[str]:
    """Writes all of it beside the folder, has the model's folder checked, and then puts it in its place."""
    out = out.resolve()
    fresh, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        write_folder(folder, source, fresh / place)
        check(fresh / place)
        for path, text in texts.items():
            (fresh / path).parent.mkdir(exist_ok=True)
            (fresh / path).write_text(text, encoding="utf-8")
        written = sorted(path for path in fresh.rglob("*") if path.is_file())
        digests = {str(path.relative_to(fresh)): file_sha256(path) for path in written}
        marker = {"candidate": candidate.name, "candidate_id": candidate.id, "files": digests}
        (fresh / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not out.exists():  # ended between the two
            old.rename(out)
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return sorted(digests)
