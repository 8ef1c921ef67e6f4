"""Files in a local folder, S3 or Google Cloud Storage, through fsspec: each is written whole or not at all."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.filesystems import BLOCK_BYTES, Destination, open_filesystem, put_local, refusals

_ABANDONED_S = 3600.0


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
            object.__setattr__(self, "system", open_filesystem(self.place.scheme))

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
        with self.system.open(f"{self.base}/{path}", "rb", block_size=BLOCK_BYTES) as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(BLOCK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def put(self, path: str, source: Path) -> None:
        """Writes one file, which appears whole or not at all."""
        if self.place.scheme == "file":
            put_local(Path(self.base), Path(self.base, path), source)
        else:
            self.system.put_file(str(source), f"{self.base}/{path}")

    def put_manifest(self, content: Mapping[str, Any]) -> None:
        """Writes the manifest beside the folder."""
        with tempfile.TemporaryDirectory(prefix="burnish-") as folder:
            source = Path(folder, "manifest.json")
            source.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            if self.place.scheme == "file":
                put_local(Path(self.base), Path(f"{self.base}.json"), source)
                _remove_abandoned(Path(self.base))
            else:
                self.system.put_file(str(source), f"{self.base}.json")

    def refusals(self) -> AbstractContextManager[None]:
        """Turns what the store's libraries raise into our errors; see `registry.filesystems.refusals`."""
        return refusals(self.place.scheme, self.base)


def _remove_abandoned(base: Path) -> None:
    """Removes what killed uploads of this folder left half-written, if nobody wrote to it for an hour."""
    for leftover in base.parent.glob(f".{base.name}.*.part"):
        with suppress(OSError):
            # Against the clock of the file system, which is another machine's if it is mounted.
            if Path(f"{base}.json").stat().st_mtime - leftover.stat().st_mtime > _ABANDONED_S:
                leftover.unlink()
