"""What the house needs from outside; rooms to the left, and adapters, implement these."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from registry.records import (
    Artifact,
    Campaign,
    Observation,
    PromotionStep,
    Reign,
    RolloutSnapshot,
    TensorSpec,
)


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


# --- promotion -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredVersion:
    """A version of a registered model, as the registry has it.

    Attributes:
        model: the registered model.
        version: its number.
        fingerprint: digest of what it is: its source, campaign, candidate and the campaign's content.
        candidate_id: what it was registered as; empty for a version that is not burnish's.
        candidate: the name of that; empty where it is not known.
        signature: its inputs and outputs; None where the registry does not say.
    """

    model: str
    version: str
    fingerprint: str
    candidate_id: str
    candidate: str
    signature: str | None


class ModelRegistry(Protocol):
    """Knows versions of registered models, and which of them is called what."""

    def find(self, model: str, *, campaign_id: str, candidate_id: str) -> RegisteredVersion | None:
        """The version that a campaign's candidate was registered as, or None.

        Raises:
            UnreachableError: the registry does not answer or refuses.
        """

    def version(self, model: str, version: str) -> RegisteredVersion | None:
        """A version, or None where there is none of this number (any more)."""

    def aliases(self, model: str) -> Mapping[str, str]:
        """Alias -> version."""

    def set_alias(self, model: str, alias: str, version: str | None) -> None:
        """Gives an alias to a version, or takes it away; to do so twice is to do it once."""

    def crown(self, reign: Reign) -> None:
        """Keeps from when on a version was the champion, and why; twice the same is once."""

    def reigns(self, model: str) -> tuple[Reign, ...]:
        """All that `crown` kept, the first champion first.

        Raises:
            InputError: there is no such registered model.
            UnreachableError: the registry does not answer or refuses.
        """


class Rollout(Protocol):
    """Where a model is in production, and how its traffic is shared between champion and challenger.

    Every method can be called again after a kill at any point of it, and then completes what it began.
    """

    @property
    def location(self) -> str:
        """Where that is, for people."""

    def snapshot(self) -> RolloutSnapshot:
        """What is applied and in force now; the first thing that a promotion asks for.

        Raises:
            InputError: something that is not ours stands where the promotion would put something, or what is in force
                cannot be restored.
            UnreachableError: it cannot be asked.
        """

    def serving(self) -> str:
        """What the production Model serves; empty where there is none."""

    def planned(self, snapshot: RolloutSnapshot) -> str:
        """What `serving` tells after `swap`."""

    def load(self, snapshot: RolloutSnapshot) -> None:
        """Serves the challenger beside the champion; it gets no requests yet."""

    def mirror(self, percent: int) -> None:
        """The challenger gets copies of so many percent of the requests; nobody gets its answers."""

    def weights(self, percent: int) -> None:
        """The challenger answers so many percent of the requests."""

    def swap(self, snapshot: RolloutSnapshot) -> None:
        """The production Model serves what the challenger does, and returns when it is ready."""

    def unload(self) -> None:
        """Ends the split, and then what was served beside the production Model."""

    def restore(self, snapshot: RolloutSnapshot) -> None:
        """Makes all as it was, and returns when what is in force is equal to the snapshot.

        Raises:
            UnreachableError: it does not come about, or is not equal.
        """


class Probe(Protocol):
    """Watches champion and challenger while requests flow."""

    def sees(self, metric: str) -> bool:
        """Whether it can tell of a metric of the policy."""

    def watch(self, step: PromotionStep) -> Observation:
        """What is seen in ``step.watch_s`` seconds from now on.

        Raises:
            UnreachableError: nothing can be seen.
        """
