"""A store of artifacts in a local folder, addressed by their content.

Layout under the root::

    artifacts/<digest>/<files>             read-only copies of the files
    artifacts/<digest>.json                the artifact's record; written last, so that what has one is complete
    artifacts/.incoming/<pid>-<random>/    what a process is copying; locked by it, removed once it is gone
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from registry import codec
from registry.errors import InputError, StorageError
from registry.ledger import fsync_folder
from registry.records import Artifact, ArtifactFile, TensorSpec

_log = logging.getLogger(__name__)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20
_READ_ONLY = 0o444
_LOCK_ATTEMPTS = 100


class FolderStore:
    """Implements `registry.ports.Store` in a folder of this machine; several processes may use one at once."""

    def __init__(self, root: Path) -> None:
        """Opens the store, creates what is not there, and removes what killed processes left half-copied.

        Args:
            root: the folder of the store.

        Raises:
            StorageError: the folder cannot be created or written.
        """
        self.root = root.absolute()
        self._artifacts = self.root / "artifacts"
        self._incoming = self._artifacts / ".incoming"
        self._verified: dict[str, tuple[tuple[int, int], ...]] = {}
        with self._refusals():
            self._artifacts.mkdir(parents=True, exist_ok=True)
            self._incoming.mkdir(exist_ok=True)
            for leftover in sorted(self._incoming.iterdir()):
                _remove_if_abandoned(leftover)

    def add(
        self,
        folder: Path,
        *,
        format: Literal["onnx", "openvino"],
        entry: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> Artifact:
        """Copies every file under ``folder`` in and returns the artifact; the same bytes twice are one artifact.

        Files are hashed as they are copied, made durable and read-only, and appear under their digest at once.

        Raises:
            InputError: ``entry`` is not in the folder, a file is a link that leads out of it or is no regular file,
                or the same bytes are stored already as something else.
            StorageError: the store cannot be written (a full disk, say).
        """
        sources = _sources(folder)
        if entry not in sources:
            raise InputError(
                f"{folder} holds no file {entry!r} for an engine to open",
                hint=f"It holds: {', '.join(sorted(sources)[:10]) or 'nothing'}.",
            )
        with self._refusals(), _workplace(self._incoming) as workplace:
            files = _copy(sources, workplace / "files")
            artifact = Artifact(
                digest=_digest(files), format=format, entry=entry, files=files, inputs=inputs, outputs=outputs
            )
            return self._commit(artifact, workplace)

    def receive(self, artifact: Artifact, chunks: Callable[[ArtifactFile], Iterable[bytes]]) -> Artifact:
        """Takes in an artifact that is kept elsewhere; nothing is kept unless all bytes are those of its digest.

        Args:
            artifact: its record.
            chunks: the bytes of one of its files, some at a time.

        Raises:
            InputError: record or bytes are not those of the digest, or a file would stand outside its folder.
            StorageError: the store cannot be written.
        """
        if _digest(artifact.files) != artifact.digest:
            raise InputError(f"artifact {artifact.digest}: the record's files are not those of its digest")
        with self._refusals(), _workplace(self._incoming) as workplace:
            place = workplace / "files"
            place.mkdir()
            for file in artifact.files:
                path = place / file.path
                if not path.resolve().is_relative_to(place.resolve()) or not file.path.isprintable():
                    raise InputError(f"artifact {artifact.digest} names the file {file.path!r}, which is none of its")
                path.parent.mkdir(parents=True, exist_ok=True)
                found = _written(path, chunks(file))
                if found != (file.sha256, file.size_bytes):
                    raise InputError(
                        f"artifact {artifact.digest}: {file.path} arrived with {found[1]} bytes of another digest"
                    )
            _fsync_folders(place)
            return self._commit(artifact, workplace)

    def write_file(self, place: Path, sha256: str, chunks: Iterable[bytes]) -> None:
        """Writes a single file of the store, whole or not at all.

        Raises:
            InputError: the bytes are not those of the digest.
            StorageError: the store cannot be written.
        """
        with self._refusals(), _workplace(self._incoming) as workplace:
            found, _ = _written(workplace / "file", chunks)
            if found != sha256:
                raise InputError(f"{place.name} arrived with other bytes than its digest says")
            place.parent.mkdir(parents=True, exist_ok=True)
            (workplace / "file").rename(place)
            fsync_folder(place.parent)

    def path(self, artifact: Artifact) -> Path:
        """The local folder that holds the artifact's files, read-only by agreement.

        Every file is hashed the first time in a process, and again when its size or time of change differs.

        Raises:
            InputError: the artifact is not in the store, or its bytes are not those of its digest.
        """
        if artifact.digest not in self:
            raise InputError(
                f"artifact {artifact.digest} is not in the store {self.root}",
                hint="Make it again with the same command.",
            )
        folder = self._artifacts / artifact.digest
        if _digest(artifact.files) != artifact.digest:
            raise self._corrupted(artifact.digest, "the record's files are not those of its digest")
        found = _stamps(folder, artifact.files)
        if found is None or self._verified.get(artifact.digest) != found:
            self._verify(folder, artifact)
            self._verified[artifact.digest] = _stamps(folder, artifact.files) or ()
        return folder

    def get(self, digest: str) -> Artifact:
        """The record of an artifact in the store.

        Raises:
            InputError: there is none of this digest, or its record cannot be read.
        """
        if digest not in self:
            raise InputError(f"artifact {digest!r} is not in the store {self.root}", hint="Make it again.")
        record_path = self._record_path(digest)
        try:
            artifact = codec.loads(record_path.read_text(encoding="utf-8"))
        except (InputError, UnicodeDecodeError) as error:
            raise self._corrupted(digest, f"{record_path.name} cannot be read ({error})") from error
        if not isinstance(artifact, Artifact) or artifact.digest != digest or _digest(artifact.files) != digest:
            raise self._corrupted(digest, f"{record_path.name} is the record of something else")
        return artifact

    def __contains__(self, digest: object) -> bool:
        """Whether an artifact of this digest is complete in the store."""
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            return False
        return self._record_path(digest).is_file() and (self._artifacts / digest).is_dir()

    def _record_path(self, digest: str) -> Path:
        return self._artifacts / f"{digest}.json"

    def _commit(self, artifact: Artifact, workplace: Path) -> Artifact:
        """Moves a copied artifact to its place, files first and record last; keeps what is there already."""
        place = self._artifacts / artifact.digest
        if artifact.digest not in self:
            _move_folder(workplace / "files", place)
            _write_durably(workplace / "record.json", codec.dumps(artifact).encode())
            fsync_folder(self._artifacts)
            (workplace / "record.json").rename(self._record_path(artifact.digest))
            fsync_folder(self._artifacts)
        stored = self.get(artifact.digest)
        self.path(stored)
        if (stored.format, stored.entry) != (artifact.format, artifact.entry):
            raise InputError(
                f"the same bytes are stored already as {stored.format} with the entry {stored.entry!r}, "
                f"not as {artifact.format} with {artifact.entry!r}"
            )
        return stored

    def _verify(self, folder: Path, artifact: Artifact) -> None:
        extra = {name for name, _ in _walk(folder)} - {file.path for file in artifact.files}
        if extra:
            raise self._corrupted(artifact.digest, f"{folder / min(extra)} is no part of it")
        for file in artifact.files:
            path = folder / file.path
            if not path.is_file() or path.is_symlink():
                raise self._corrupted(artifact.digest, f"{path} is missing")
            if path.stat().st_size != file.size_bytes or codec.file_sha256(path) != file.sha256:
                raise self._corrupted(artifact.digest, f"{path} has changed")

    def _corrupted(self, digest: str, what: str) -> InputError:
        return InputError(
            f"artifact {digest} is damaged: {what}",
            hint=f"Remove {self._artifacts / digest} and {self._record_path(digest)}, and make it again.",
        )

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"the artifact store {self.root} refused: {error.strerror or error}"
                + (f" ({error.filename})" if error.filename else ""),
                hint="Check free space and permissions of the folder.",
            ) from error


# --- what goes in ----------------------------------------------------------------------------------------------


def _sources(folder: Path) -> dict[str, Path]:
    """POSIX path inside the folder -> regular file to read, links followed inside the folder only."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    root = folder.resolve()
    sources: dict[str, Path] = {}
    for name, path in _walk(folder):
        if not name.isprintable():
            raise InputError(f"the file name {name!r} in {folder} cannot be stored; rename the file")
        real = path.resolve()
        if not real.is_relative_to(root):
            raise InputError(
                f"{path} is a link that leads out of its folder, to {real}", hint="Put the file itself there."
            )
        if not real.exists() or not stat.S_ISREG(real.stat().st_mode):
            raise InputError(f"{path} is not a file", hint="Only regular files, and links to them, can be stored.")
        if not os.access(real, os.R_OK):
            raise InputError(f"{path} cannot be read", hint="Check its permissions.")
        sources[name] = real
    return sources


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything under a folder that is not a folder itself (links to folders are not followed)."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in files + links:
            path = Path(parent) / name
            yield path.relative_to(folder).as_posix(), path


def _copy(sources: dict[str, Path], place: Path) -> tuple[ArtifactFile, ...]:
    """Copies, hashes and makes durable; what is hashed is what is written, even if a source changes meanwhile."""
    place.mkdir()
    files = []
    for name, source in sorted(sources.items()):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reader:
            sha256, size_bytes = _written(path, iter(partial(reader.read, _CHUNK_BYTES), b""))
        files.append(ArtifactFile(path=name, sha256=sha256, size_bytes=size_bytes))
    _fsync_folders(place)
    return tuple(files)


def _written(path: Path, chunks: Iterable[bytes]) -> tuple[str, int]:
    """(SHA-256 (hex), size) of what was written to a new read-only file, durably."""
    hasher, size_bytes = hashlib.sha256(), 0
    with path.open("xb") as writer:
        for chunk in chunks:
            hasher.update(chunk)
            writer.write(chunk)
            size_bytes += len(chunk)
        writer.flush()
        os.fchmod(writer.fileno(), _READ_ONLY)
        os.fsync(writer.fileno())
    return hasher.hexdigest(), size_bytes


def _fsync_folders(root: Path) -> None:
    for parent, _, _ in os.walk(root):
        fsync_folder(Path(parent))


def _digest(files: tuple[ArtifactFile, ...]) -> str:
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stamps(folder: Path, files: tuple[ArtifactFile, ...]) -> tuple[tuple[int, int], ...] | None:
    """Size and time of change of each file, or None where one is missing."""
    try:
        states = [(folder / file.path).stat() for file in files]
    except OSError:
        return None
    return tuple((state.st_size, state.st_mtime_ns) for state in states)


# --- durable moves and temporary folders -----------------------------------------------------------------------


def _move_folder(source: Path, place: Path) -> None:
    try:
        source.rename(place)
    except OSError:
        # Another process was first, or was killed between the folder and its record: the same bytes stand there.
        if not place.is_dir():
            raise


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fchmod(stream.fileno(), _READ_ONLY)
        os.fsync(stream.fileno())


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """A temporary folder of this process, locked while it is in use, so that others can tell whether we live."""
    place, descriptor = _locked_folder(parent)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(descriptor)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    for _ in range(_LOCK_ATTEMPTS):
        place = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
        descriptor = _try_lock(place)
        # Between the two calls another process may have taken the new folder for an abandoned one.
        if descriptor is not None and place.is_dir():
            return place, descriptor
        if descriptor is not None:
            os.close(descriptor)
    raise OSError(errno.EBUSY, "no temporary folder could be locked", str(parent))


def _try_lock(folder: Path) -> int | None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_if_abandoned(leftover: Path) -> None:
    descriptor = _try_lock(leftover)
    if descriptor is None:
        return
    _log.info("removing %s, left by a run that was killed", leftover)
    shutil.rmtree(leftover, ignore_errors=True)
    os.close(descriptor)
