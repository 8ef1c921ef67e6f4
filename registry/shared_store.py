"""A store of artifacts that several campaigns on several machines share: S3, Google Cloud Storage, a network folder.

Layout under the URI::

    artifacts/<digest>/<files>      written first
    artifacts/<digest>.json         the artifact's record; written last, so that what has one is complete
    files/<sha256>/content          single files that several machines read (samples, say)
    records/<key>.json              the result of work that is done once among all; never written over
    leases/<key>/<number>           who is at work on it; see `registry.leases`
    progress/<key>.json             what was last said of work under way; written over, and taken away at its end

Files are fetched into a local store and believed by their digest alone. Work whose result is there is not done again;
work that another process is at is waited for. A place that is away is asked again for a while, see `registry.outages`.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from registry import codec
from registry.errors import InputError, StorageError
from registry.filesystems import destination_of
from registry.leases import TTL_S, lease
from registry.outages import PATIENCE_S
from registry.ports import Store
from registry.records import Artifact, ArtifactFile, TensorSpec
from registry.remote_folder import RemoteFolder
from registry.store import FolderStore

_log = logging.getLogger(__name__)
R = TypeVar("R")

VARIABLE = "BURNISH_STORE"
"""The environment variable with the URI of the shared store."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def open_store(work: Path, uri: str | None = None) -> Store:
    """The store of a working folder, shared with others where there is a URI; it was tried that it can be written.

    Args:
        work: the local folder of the store.
        uri: ``s3://bucket/prefix``, ``gs://...`` or a folder; None for ``BURNISH_STORE``, and without that a store of
            this folder alone.

    Raises:
        InputError: the URI cannot be used, or its bucket is not there.
        MissingExtraError: s3fs or gcsfs is not installed.
        StorageError: the store does not answer, refuses, or cannot be written.
    """
    local = FolderStore(work)
    uri = uri or os.environ.get(VARIABLE)
    if not uri:
        return local
    shared = SharedStore(uri, local)
    shared.check()
    return shared


def once(store: Store, key: str, make: Callable[[], R]) -> R:
    """The result of some work, done once among all that share the store; in a store of one folder it is just done.

    Args:
        store: where the result's artifacts are.
        key: of the work, the same for the same work: letters and digits.
        make: does it. What it raises is not kept.
    """
    return store.once(key, make) if isinstance(store, SharedStore) else make()


def share(store: Store, artifact: Artifact) -> None:
    """Puts an artifact that is in the local store where others find it, if the store is shared.

    Raises:
        InputError: the same bytes are shared already as something else.
        StorageError: the shared place does not answer, or refuses.
    """
    if isinstance(store, SharedStore):
        store.share(artifact)


class SharedStore:
    """Implements `registry.ports.Store` in a place that others write to as well, with a local store before it."""

    def __init__(
        self, uri: str, local: FolderStore, *, lease_ttl_s: float = TTL_S, patience_s: float = PATIENCE_S
    ) -> None:
        """Opens it; nothing is asked or written yet, see `check`.

        Args:
            uri: ``s3://bucket/prefix``, ``gs://bucket/prefix``, or a folder that the machines mount.
            local: what is fetched goes here, and what is added comes from here.
            lease_ttl_s: how long the lease of a process is believed that shows no sign of life.
            patience_s: how long the place is asked again while it is away.

        Raises:
            InputError: the URI cannot be used.
            MissingExtraError: s3fs or gcsfs is not installed.
        """
        self.local = local
        self.lease_ttl_s = lease_ttl_s
        self._folder = RemoteFolder(destination_of(uri), patience_s=patience_s)
        self._knows_conditions: bool | None = None

    @property
    def uri(self) -> str:
        """Of the shared place."""
        return self._folder.uri

    def check(self) -> None:
        """Returns where the shared place can be written. It is asked once: before any work a fault is said soon.

        What killed processes left half-written there is removed, a day later.

        Raises:
            InputError: its bucket is not there.
            StorageError: it does not answer, or refuses.
        """
        self._knows_conditions = self._folder.at_once().is_exclusive(_probe_path())
        if not self._knows_conditions:
            _log.info("%s knows no conditional writes; leases are taken by writing and looking", self.uri)
        self._folder.sweep()

    def add(
        self,
        folder: Path,
        *,
        format: Literal["onnx", "openvino"],
        entry: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> Artifact:
        """Copies every file under ``folder`` into both stores and returns the artifact.

        Raises:
            InputError: as `FolderStore.add`, or the same bytes are shared already as something else.
            StorageError: the shared place does not answer, or refuses.
        """
        artifact = self.local.add(folder, format=format, entry=entry, inputs=inputs, outputs=outputs)
        self.share(artifact)
        return artifact

    def share(self, artifact: Artifact) -> None:
        """Puts an artifact of the local store into the shared place, unless it is there.

        Raises:
            InputError: the same bytes are shared already as something else.
            StorageError: the shared place does not answer, or refuses.
        """
        there = self._manifest(artifact.digest)
        if there is None:
            source = self.local.path(artifact)
            for file in artifact.files:
                self._folder.put(_file_path(artifact.digest, file), source / file.path)
            self._folder.write(_manifest_path(artifact.digest), codec.dumps(artifact).encode())
        elif (there.format, there.entry) != (artifact.format, artifact.entry):
            raise InputError(
                f"the same bytes are in {self.uri} already as {there.format} with the entry {there.entry!r}, "
                f"not as {artifact.format} with {artifact.entry!r}"
            )

    def path(self, artifact: Artifact) -> Path:
        """The local folder that holds the artifact's files, fetched if they are not here yet.

        Raises:
            InputError: the artifact is in neither store, or its bytes are not those of its digest.
            StorageError: the shared place does not answer, or refuses.
        """
        if artifact.digest not in self.local:
            self._fetch(self.get(artifact.digest))
        return self.local.path(artifact)

    def get(self, digest: str) -> Artifact:
        """The record of an artifact in either store.

        Raises:
            InputError: there is none of this digest, or its record cannot be read.
            StorageError: the shared place does not answer, or refuses.
        """
        if digest in self.local:
            return self.local.get(digest)
        found = self._manifest(digest)
        if found is None:
            raise InputError(f"artifact {digest!r} is not in the store {self.uri}", hint="Make it again.")
        return found

    def __contains__(self, digest: object) -> bool:
        """Whether an artifact of this digest is complete in either store."""
        if digest in self.local:
            return True
        return isinstance(digest, str) and self._manifest(digest) is not None

    def once(self, key: str, make: Callable[[], R]) -> R:
        """The result of some work: what is there already, or what another process is making, or what ``make`` gives.

        The first result that is committed counts, for all. What ``make`` raises is not kept, and the work is free
        again.

        Raises:
            InputError: what is there cannot be read.
            StorageError: the shared place does not answer, or refuses.
        """
        with lease(
            self._folder,
            f"leases/{key}",
            exclusive=self._exclusive,
            is_done=lambda: self.find(key) is not None,
            ttl_s=self.lease_ttl_s,
            poll_s=min(1.0, self.lease_ttl_s / 6),
        ) as ours:
            if ours:
                return self.keep(key, make())
        found: R | None = self.find(key)
        if found is None:
            raise StorageError(f"{self.uri}/{_record_path(key)} was there and is gone", hint="Run it again.")
        artifact = getattr(found, "artifact", None)
        if isinstance(artifact, Artifact) and artifact.digest not in self:
            raise self._damaged(_record_path(key), f"its artifact {artifact.digest} is no longer there")
        return found

    def find(self, key: str) -> R | None:
        """The result that was kept under a key, if any was.

        Raises:
            InputError: it cannot be read.
            StorageError: the shared place does not answer, or refuses.
        """
        content = self._folder.read(_record_path(key))
        return None if content is None else cast(R, self._decoded(content, _record_path(key)))

    def keep(self, key: str, record: R) -> R:
        """Keeps a record under a key, and returns the one that counts: the first that was kept there.

        Raises:
            StorageError: the shared place does not answer, or refuses.
        """
        path, content = _record_path(key), codec.dumps(record).encode()
        if self._exclusive:
            self._folder.create(path, content)
        elif self._folder.read(path) is None:
            self._folder.write(path, content)
        found: R | None = self.find(key)
        return record if found is None else found

    @contextmanager
    def leased(self, key: str) -> Iterator[None]:
        """Work under a key that nobody else does meanwhile, as far as leases say; waits for who is at it.

        Raises:
            StorageError: the shared place does not answer, or refuses.
        """
        with lease(
            self._folder,
            f"leases/{key}",
            exclusive=self._exclusive,
            is_done=lambda: False,
            ttl_s=self.lease_ttl_s,
            poll_s=min(1.0, self.lease_ttl_s / 6),
        ):
            yield

    def tell(self, key: str, content: bytes) -> None:
        """Leaves word of work under way, in place of what was said before. The place is asked once: it is only shown.

        Raises:
            StorageError: the shared place does not answer, or refuses.
        """
        self._folder.at_once().write(_word_path(key), content)

    def told(self, key: str) -> bytes | None:
        """The word that was left of some work, if there is any.

        Raises:
            StorageError: the shared place does not answer, or refuses.
        """
        return self._folder.at_once().read(_word_path(key))

    def forget(self, key: str) -> None:
        """Takes the word that was left of some work away.

        Raises:
            StorageError: the shared place does not answer, or refuses.
        """
        self._folder.at_once().remove(_word_path(key))

    def share_file(self, path: Path) -> str:
        """Puts one file into the shared place, unless its bytes are there, and returns their SHA-256 (hex).

        Raises:
            StorageError: the shared place does not answer, or refuses.
        """
        sha256 = codec.file_sha256(path)
        # An object appears whole or not at all, and its name is its content.
        if not self._folder.names(f"files/{sha256}"):
            self._folder.put(f"files/{sha256}/content", path)
        return sha256

    def fetch_file(self, sha256: str, place: Path | None = None) -> Path:
        """The file of these bytes, on this machine.

        Args:
            sha256: of the bytes (hex).
            place: where it is to be, on the file system of the local store; None for a place in that.

        Raises:
            InputError: it is not in the shared place, or has other bytes there.
            StorageError: the shared place does not answer, or refuses; or the local one cannot be written.
        """
        place = place or self.local.root / "files" / sha256
        if not place.is_file() or codec.file_sha256(place) != sha256:
            self.local.write_file(place, sha256, self._folder.chunks(f"files/{sha256}/content"))
        return place

    # --- parts of it ---

    @property
    def _exclusive(self) -> bool:
        if self._knows_conditions is None:
            self._knows_conditions = self._folder.is_exclusive(_probe_path())
        return self._knows_conditions

    def _manifest(self, digest: str) -> Artifact | None:
        """The record of an artifact that is complete in the shared place."""
        if not _DIGEST.fullmatch(digest):
            return None
        content = self._folder.read(_manifest_path(digest))
        if content is None:
            return None
        found = self._decoded(content, _manifest_path(digest))
        if not isinstance(found, Artifact) or found.digest != digest:
            raise self._damaged(_manifest_path(digest), "it is the record of something else")
        return found

    def _decoded(self, content: bytes, path: str) -> Any:
        try:
            return codec.loads(content.decode())
        except (InputError, UnicodeDecodeError) as error:
            raise self._damaged(path, f"it cannot be read ({error})") from error

    def _fetch(self, artifact: Artifact) -> None:
        def chunks(file: ArtifactFile) -> Iterator[bytes]:
            return self._folder.chunks(_file_path(artifact.digest, file))

        _log.info("fetching artifact %s from %s", artifact.digest, self.uri)
        try:
            self.local.receive(artifact, chunks)
        except InputError as error:
            raise self._damaged(_manifest_path(artifact.digest), error.message) from error

    def _damaged(self, path: str, what: str) -> InputError:
        return InputError(
            f"{self.uri}/{path} is damaged: {what}",
            hint="Remove it, and the folder beside it if there is one; the same command then makes it again.",
        )


def _manifest_path(digest: str) -> str:
    return f"artifacts/{digest}.json"


def _file_path(digest: str, file: ArtifactFile) -> str:
    return f"artifacts/{digest}/{file.path}"


def _probe_path() -> str:
    return f"leases/.probe-{os.getpid()}-{os.urandom(4).hex()}"


def _record_path(key: str) -> str:
    return f"records/{key}.json"


def _word_path(key: str) -> str:
    return f"progress/{key}.json"
