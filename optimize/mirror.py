"""Results of a campaign in the store that machines share, each with the files that later work needs.

What is measured on a node of a cluster is kept there before the next piece of work begins. So a node that dies takes
only what it was at with it: whoever goes on, there or on another node, finds the rest, and so does the machine that
started it all.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from registry.codec import digest
from registry.errors import InputError
from registry.records import ArtifactFile, Fidelity, Round
from registry.shared_store import SharedStore

R = TypeVar("R")

RECORDS = "found"
"""Begins the key of each record in the store."""


class StoreMirror:
    """Implements `optimize.plan.Mirror` in a shared store."""

    def __init__(self, store: SharedStore, work: Path, campaign: str) -> None:
        """Asks for nothing yet.

        Args:
            store: that machines share.
            work: the working folder here, which files are kept from and fetched to.
            campaign: whose results these are; those of others, of the same work even, are not taken.
        """
        self._store = store
        self._work = work
        self._campaign = campaign

    def find(self, kind: str, components: Mapping[str, Any]) -> Any:
        """The record of work that was done before, its files in the working folder; None where there is none.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        record: Any = self._store.find(self._key(kind, components))
        return record if record is not None and self.fetch(kind, components, record) else None

    def keep(self, kind: str, components: Mapping[str, Any], record: R) -> R:
        """Keeps a record with its files, and returns the one that counts: the first that was kept.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        # Files first: where there is a record, there are its files.
        if isinstance(record, Round):
            for run in record.runs:
                self._store.share_file(self._work / run.raw)
        if isinstance(record, Fidelity) and (answers := self._answers(components)).is_file():
            self._store.keep(self._key("Answers", components), self._shared(answers))
        kept = self._store.keep(self._key(kind, components), record)
        if kept != record and not self.fetch(kind, components, kept):
            return record
        return kept

    def fetch(self, kind: str, components: Mapping[str, Any], record: Any) -> bool:
        """Brings the files of a record that is in the store into the working folder; False where one is lost.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        with suppress(InputError):
            if isinstance(record, Round):
                for run in record.runs:
                    self._bring(run.raw, run.raw_sha256)
            if isinstance(record, Fidelity):
                answers: Any = self._store.find(self._key("Answers", components))
                if isinstance(answers, ArtifactFile):
                    self._bring(answers.path, answers.sha256)
            return True
        return False

    def _key(self, kind: str, components: Mapping[str, Any]) -> str:
        return f"{RECORDS}-{digest([self._campaign, kind, components])}"

    def _answers(self, components: Mapping[str, Any]) -> Path:
        """The file with the answers that a variant was judged by; see `optimize.judging`."""
        return self._work / "outputs" / f"{digest(components)}.npz"

    def _shared(self, path: Path) -> ArtifactFile:
        return ArtifactFile(
            path=path.relative_to(self._work).as_posix(),
            sha256=self._store.share_file(path),
            size_bytes=path.stat().st_size,
        )

    def _bring(self, path: str, sha256: str) -> None:
        target = self._work / path
        if not target.resolve().is_relative_to(self._work.resolve()):
            raise InputError(f"{path!r} is no file of a working folder")
        self._store.fetch_file(sha256, target)
