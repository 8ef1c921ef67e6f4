"""What the house needs from outside; rooms to the left, and adapters, implement these."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from registry.records import Artifact, Campaign, TensorSpec


class Store(Protocol):
    """Keeps artifacts by their content. What is in it is never written again."""

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

        Raises:
            InputError: ``entry`` is not in the folder, or a file is a link that leads out of it.
        """

    def path(self, artifact: Artifact) -> Path:
        """The local folder that holds the artifact's files, read-only by agreement.

        Raises:
            InputError: the artifact is not in the store, or its bytes are not those of its digest.
        """

    def __contains__(self, digest: object) -> bool:
        """Whether an artifact of this digest is complete in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a tracker made of a campaign.

    Attributes:
        location: where people look at it (a URL or path).
        runs: candidate id -> run id; the campaign's own run under its campaign id.
        model_version: version of the registered model that the winner became, or None.
    """

    location: str
    runs: Mapping[str, str]
    model_version: str | None


class Tracker(Protocol):
    """Records campaigns where a team looks at them."""

    def check(self) -> None:
        """Returns when the tracking store answers.

        Raises:
            UnreachableError: it does not.
        """

    def publish(self, campaign: Campaign, *, files: Mapping[str, Path]) -> Published:
        """Records the whole campaign; twice the same campaign is one.

        Args:
            campaign: everything that was found.
            files: name -> local file to keep with the campaign (the report, pictures).

        Raises:
            UnreachableError: the tracking store does not answer or refuses.
        """
