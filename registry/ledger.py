"""An append-only journal of a campaign: what is done is found again, whatever kills the run.

One JSON object a line::

    {"components": {...}, "key": "<16 hex>", "kind": "...", "record": {<codec's envelope>}, "subject": "..."}

``components`` are everything that the work depends on, and with ``kind`` they make the key: equal keys mean the same
work. ``subject`` is the name that people read; it takes no part in the key.
"""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from registry import codec
from registry.errors import BurnishError, InputError, StorageError

_log = logging.getLogger(__name__)
R = TypeVar("R")
Components = Mapping[str, Any]

_FIELDS = {"components", "key", "kind", "record", "subject"}
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One committed result: the record, the work that gave it, and the name of that work."""

    kind: str
    subject: str
    key: str
    components: Components
    record: Any


class Ledger:
    """The journal of a campaign, open for its one writer. Not for use by several threads at once."""

    def __init__(self, path: Path, descriptor: int, entries: tuple[Entry, ...]) -> None:
        self.path = path
        self._descriptor = descriptor
        self._entries: list[Entry] = []
        self._by_key: dict[str, Entry] = {}
        for entry in entries:
            self._keep(entry)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """The journal at ``path``, created with its folder where there is none, and locked against other writers.

        A last line that a killed run left unfinished is cut off.

        Raises:
            InputError: another process works in this folder, or a line is damaged.
            StorageError: the folder or file cannot be written.
        """
        with _refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            with _refusals(path):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                with _refusals(path):
                    content = path.read_bytes()
                    if not content:
                        fsync_folder(path.parent)
                entries, whole_bytes = _parse(content, path)
                if whole_bytes < len(content):
                    _log.warning("%s: cutting off an unfinished last line of a killed run", path)
                    with _refusals(path):
                        os.ftruncate(descriptor, whole_bytes)
                        os.fsync(descriptor)
                yield cls(path, descriptor, entries)
            finally:
                os.close(descriptor)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The journal as it is now, for questions only: nothing is locked, and nothing can be committed.

        Raises:
            InputError: there is none, or a line is damaged.
            StorageError: it cannot be read.
        """
        if not path.is_file():
            raise InputError(f"there is no journal at {path}", hint="Name the working folder of a campaign.")
        with _refusals(path):
            content = path.read_bytes()
        return cls(path, -1, _parse(content, path)[0])

    def find(self, kind: str, components: Components) -> Any:
        """The record of work that was done before, or None."""
        entry = self._by_key.get(_key(kind, components))
        return None if entry is None else entry.record

    def why(self, kind: str, subject: str, components: Components) -> str | None:
        """A sentence on why no earlier result for this subject could be used: which components differ.

        None where the work is done already, or where nothing was done for this subject before.
        """
        told = self.differences(kind, subject, components)
        return f"{subject} is done again: {'; '.join(told)}." if told else None

    def differences(self, kind: str, subject: str, components: Components) -> list[str]:
        """What differs from the components of the newest result for this subject, a phrase each.

        Empty where the work is done already, or where nothing was done for this subject before.
        """
        if _key(kind, components) in self._by_key:
            return []
        newest = next(
            (entry for entry in reversed(self._entries) if (entry.kind, entry.subject) == (kind, subject)), None
        )
        return [] if newest is None else _differences(newest.components, _plain(components))

    def entries(self, kind: str | None = None) -> tuple[Entry, ...]:
        """The entries of one kind, or of all, in the order they were committed."""
        return tuple(entry for entry in self._entries if kind in {None, entry.kind})

    def commit(self, kind: str, subject: str, components: Components, record: R) -> R:
        """Writes a result so that it survives any kill, and returns it as it will be read back.

        Raises:
            ValueError: it is open for questions only, or this work was committed before, or components or record hold
                what JSON has no word for; a bug.
            StorageError: it could not be written (a full disk, say); the journal is as it was.
        """
        if self._descriptor < 0:
            raise ValueError("this journal was opened for questions only")
        key = _key(kind, components)
        if key in self._by_key:
            raise ValueError(f"{kind} {subject!r} is committed already under {key}")
        envelope = codec.dumps(record)
        content = {"kind": kind, "subject": subject, "key": key, "components": components}
        line = codec.canonical({**content, "record": json.loads(envelope)}) + "\n"
        read_back = cast(R, codec.loads(envelope))
        self._append(line.encode())
        self._keep(Entry(kind=kind, subject=subject, key=key, components=_plain(components), record=read_back))
        return read_back

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        with _refusals(self.path):
            try:
                _write_whole(self._descriptor, line)
            except BaseException:
                # Ctrl-C, too: a line that is on the disk and not known here would be written a second time, otherwise.
                with suppress(OSError):
                    os.ftruncate(self._descriptor, size)
                raise

    def _keep(self, entry: Entry) -> None:
        if entry.key in self._by_key:
            _log.warning("the journal holds %s %r twice; the first counts", entry.kind, entry.subject)
            return
        self._by_key[entry.key] = entry
        self._entries.append(entry)


# --- lines -----------------------------------------------------------------------------------------------------


def _key(kind: str, components: Components) -> str:
    return codec.digest({"kind": kind, "components": components})


def _plain(components: Components) -> Components:
    """Components as they are once read back (tuples are lists)."""
    return cast(Components, json.loads(codec.canonical(components)))


def _parse(content: bytes, path: Path) -> tuple[tuple[Entry, ...], int]:
    """The entries, and how many bytes of whole lines hold them; an unfinished last line is left out."""
    lines = content.split(b"\n")
    unfinished = lines.pop()
    whole_bytes = len(content) - len(unfinished)
    if not unfinished and lines and not _is_json(lines[-1]):
        whole_bytes -= len(lines.pop()) + 1
    entries = tuple(_entry(line, path, number) for number, line in enumerate(lines, start=1))
    return entries, whole_bytes


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _entry(line: bytes, path: Path, number: int) -> Entry:
    try:
        return _decoded(line)
    except InputError as error:
        raise InputError(
            f"{path}:{number}: this line of the journal cannot be used: {error.message}",
            hint="Remove the line to have its work done again, or start in another folder.",
        ) from error


def _decoded(line: bytes) -> Entry:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InputError(f"it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.keys() != _FIELDS or not isinstance(content["components"], dict):
        raise InputError(f"an entry has the fields {', '.join(sorted(_FIELDS))}")
    if content["key"] != _key(content["kind"], content["components"]):
        raise InputError("its key is not that of its components")
    return Entry(**{**content, "record": codec.loads(json.dumps(content["record"]))})


# --- why a result was not used ---------------------------------------------------------------------------------


def _differences(before: Components, now: Components) -> list[str]:
    old, new = _flat(before), _flat(now)
    told = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            told.append(f"{name} was {_shown(old[name])} and is gone")
        elif name not in old:
            told.append(f"{name} is new ({_shown(new[name])})")
        elif old[name] != new[name]:
            told.append(f"{name} was {_shown(old[name])}, is now {_shown(new[name])}")
    return told or ["its components are written in another form"]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else codec.canonical(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


# --- the file --------------------------------------------------------------------------------------------------


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock beside the journal; the kernel lets go of it when the process ends, however it ends."""
    lock = path.with_name(f"{path.name}.lock")
    with _refusals(lock):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _occupied(path, os.read(descriptor, 20)) from error
        with _refusals(lock):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _occupied(path: Path, owner: bytes) -> BurnishError:
    pid = owner.decode(errors="replace").strip()
    return InputError(
        f"another burnish is working in {path.parent}" + (f" (pid {pid})" if pid else ""),
        hint="Wait for it to end, or end it; the same command then goes on where it stopped.",
    )


def _write_whole(descriptor: int, line: bytes) -> None:
    if os.write(descriptor, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def fsync_folder(folder: Path) -> None:
    """Returns when what was created, renamed or removed in the folder would survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Writes a small file, which appears whole or not at all and survives a loss of power; folders are made.

    It is for one writer at a time: a draft that a killed one left is written over.

    Raises:
        StorageError: it could not be written (a full disk, say); what was there is there.
    """
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}",
            hint="Check free space and permissions of its folder.",
        ) from error


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the journal {path} could not be written: {error.strerror or error}",
            hint="Check free space and permissions of its folder; the same command goes on where it stopped.",
        ) from error
