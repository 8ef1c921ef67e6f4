"""A folder of small objects and files that several machines use at once, in any place that `filesystems` knows."""

import copy
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from registry.errors import InputError, StorageError, UnreachableError
from registry.filesystems import BLOCK_BYTES, Destination, open_filesystem, put_local, refusals
from registry.ledger import fsync_folder
from registry.outages import PATIENCE_S, answer_of, patiently
from registry.stopping import pause

R = TypeVar("R")

ABANDONED_S = 86_400.0
"""How long after its last byte a file that is not whole is nobody's any more."""
_PART = ".part"


class RemoteFolder:
    """A folder that several machines use at once.

    Each object is written whole or not at all. While the place is away, a call is made again for a while; whatever was
    done by one whose answer was lost is done once. Every method raises `StorageError` where the place does not answer
    or refuses, and `InputError` where its bucket is not there.
    """

    def __init__(self, place: Destination, *, patience_s: float = PATIENCE_S) -> None:
        """Opens it; nothing is asked yet.

        Args:
            place: where it is.
            patience_s: how long a call is made again while the place is away.
        """
        self.place = place
        self._patience_s = patience_s
        with self._refusals():
            self._system = open_filesystem(place.scheme)

    @property
    def uri(self) -> str:
        """Of the folder."""
        return self.place.uri(self.place.root)

    def at_once(self) -> "RemoteFolder":
        """The same folder, whose calls are made once."""
        other = copy.copy(self)
        other._patience_s = 0.0
        return other

    def read(self, path: str) -> bytes | None:
        """What stands there, if anything does."""
        return self._call(partial(self._content, self._full(path)))

    def write(self, path: str, content: bytes) -> None:
        """Writes an object, in place of one of this name."""
        if self.place.scheme == "file":
            self._call(partial(self._write_local, path, content, replace=True))
        else:
            self._call(partial(self._system.pipe_file, self._full(path), content))

    def create(self, path: str, content: bytes) -> bool:
        """Writes an object where there is none of this name, and says whether it did.

        It is for one caller alone in a folder that knows hard links, and in a store that knows the condition
        If-None-Match; another one writes over what is there without a word, which `is_exclusive` finds out.
        """
        full = self._full(path)

        def create() -> bool:
            try:
                if self.place.scheme == "file":
                    self._write_local(path, content, replace=False)
                else:
                    self._system.pipe_file(full, content, mode="create")
            except FileExistsError:
                pass
            except OSError as error:
                if not _is_refused_condition(error):
                    raise
            else:
                return True
            # A call that was lost and made again meets what it wrote itself.
            return self._content(full) == content

        return self._call(create)

    def is_exclusive(self, path: str) -> bool:
        """Whether `create` refuses what is there; writes an object of this name, and takes it away.

        Raises:
            StorageError: nothing can be written there.
        """
        self.write(path, b"first")
        try:
            return not self.create(path, b"second")
        finally:
            self.remove(path)

    def put(self, path: str, source: Path) -> None:
        """Writes a file."""
        if self.place.scheme == "file":
            self._call(lambda: put_local(self._incoming() / "file", Path(self._full(path)), source))
        else:
            self._call(partial(self._system.put_file, str(source), self._full(path)))

    def chunks(self, path: str) -> Iterator[bytes]:
        """The bytes of a file, some at a time. Each block is asked for by itself, so that it may be asked for again.

        Raises:
            InputError: there is no such file.
            InterruptedError: nobody waits for it any more (`registry.stopping`).
        """
        full = self._full(path)

        def size() -> int | None:
            with suppress(FileNotFoundError):
                return int(self._system.info(full)["size"])
            return None

        size_bytes = self._call(size)
        if size_bytes is None:
            raise InputError(f"{self.uri}/{path} is not there")
        for start in range(0, size_bytes, BLOCK_BYTES):
            end = min(start + BLOCK_BYTES, size_bytes)
            pause(0)  # a large file is not fetched to its end for nobody
            yield self._call(partial(self._system.cat_file, full, start=start, end=end))

    def names(self, path: str) -> list[str]:
        """The objects in a folder below this one, by name and in order; none where there is no such folder."""
        inside = f"{self._full(path)}/"
        found = self._call(partial(self._system.find, inside.rstrip("/")))
        return sorted(name.removeprefix(inside) for name in found if name.startswith(inside))

    def remove(self, path: str) -> None:
        """Takes an object away; one that is gone is no error."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._system.rm_file(self._full(path))

        self._call(remove)

    def sweep(self) -> None:
        """Removes what killed processes have left half-written, a day later by the place's own clock.

        That is in a folder alone: an object of a store is there whole, or not at all. What cannot be removed stays.
        """
        if self.place.scheme != "file":
            return
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix=".now.", suffix=_PART, dir=self._incoming())
            now = os.fstat(descriptor).st_mtime
            os.close(descriptor)
            Path(name).unlink()
            for left in self._incoming().glob(f".*{_PART}"):
                if now - left.stat().st_mtime > ABANDONED_S:
                    left.unlink(missing_ok=True)

    # --- parts of it ---

    def _call(self, call: Callable[[], R]) -> R:
        with self._refusals():
            return patiently(call, scheme=self.place.scheme, uri=self.uri, patience_s=self._patience_s)

    def _full(self, path: str) -> str:
        return f"{self.place.root}/{path}"

    def _content(self, full: str) -> bytes | None:
        try:
            return bytes(self._system.cat_file(full))
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return None

    def _incoming(self) -> Path:
        """Where files are written before they get their names: on the same file system, in nobody's way."""
        folder = Path(self.place.root, ".incoming")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _write_local(self, path: str, content: bytes, *, replace: bool) -> None:
        target = Path(self._full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".object.", suffix=_PART, dir=self._incoming())
        partial_file = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fchmod(stream.fileno(), 0o644)
                os.fsync(stream.fileno())
            if replace or not _linked(partial_file, target):
                partial_file.rename(target)
            fsync_folder(target.parent)
        finally:
            partial_file.unlink(missing_ok=True)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            with refusals(self.place.scheme, self.place.root):
                yield
        except UnreachableError as error:
            raise StorageError(error.message, hint=error.hint) from None


def _linked(source: Path, target: Path) -> bool:
    """Whether a file has a second name now, which was nobody's; False where the file system has no such thing.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}:
            return False
        raise
    return True


def _is_refused_condition(error: OSError) -> bool:
    """Whether something stands where nothing was to; s3fs has no error of its own for that."""
    return _code(error) in {"PreconditionFailed", "412", "ConditionalRequestConflict"}


def _code(error: BaseException) -> str:
    answer = answer_of(error)
    return "" if answer is None else answer[1]
