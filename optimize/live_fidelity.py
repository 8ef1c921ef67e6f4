"""What the answers of a model in production are worth, by samples that are held out."""

import tempfile
from pathlib import Path

from optimize.adaptation import adapt
from optimize.fidelity import judge_answers, measure_fidelity, save_outputs
from optimize.samples import Samples
from profiles.deploy.core2_candidates import UNKNOWN_VERSION
from profiles.measure.answers import answers_of
from profiles.measure.host import widest_instruction_set
from registry.errors import InputError
from registry.records import Campaign, Candidate, Metrics, Target, Variant
from registry.store import FolderStore

JUDGED = frozenset({"accuracy", "accuracy_drop", "flip_rate", "slice_drop_max", "cosine", "worst_cosine", "snr_db"})
"""Metrics that samples tell of, as far as the task and the policy know them."""


class LiveFidelity:
    """Judges what a target answers to the evaluation samples, against the baseline's answers in process."""

    def __init__(
        self,
        campaign: Campaign,
        candidate: Candidate,
        *,
        samples: Path,
        loaded: Samples,
        store: FolderStore,
        base: Path,
    ) -> None:
        """Runs nothing yet.

        Args:
            campaign: that the candidate is of.
            candidate: what is judged.
            samples: the file of evaluation samples.
            loaded: what is in it.
            store: has the baseline's model.
            base: the folder that the user's own metric is found in.

        Raises:
            InputError: the samples are not those of the campaign.
        """
        if loaded.digest != campaign.samples_digest:
            raise InputError(
                f"{samples} does not hold the samples that the campaign {campaign.name} was judged by",
                hint="Name the file of its evaluation samples, unchanged.",
            )
        self._campaign = campaign
        self._candidate = candidate
        self._samples = samples
        self._loaded = loaded
        self._store = store
        self._base = base
        self._variant = variant_of(campaign, candidate)
        self._reference: Path | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="burnish-live-")

    def __call__(self, target: Target) -> Metrics:
        """The metrics of what a target answers.

        Raises:
            UnreachableError: it does not answer.
            BurnishError: its answers cannot be judged.
        """
        path = Path(self._scratch.name) / "answers.npz"
        save_outputs(path, answers_of(target, adapt(self._loaded.inputs, self._variant.adaptation)))
        baseline = self._baseline()
        found = judge_answers(
            self._variant.id,
            self._candidate.engine,
            engine_version=self._candidate.engine_version,
            instruction_set=UNKNOWN_VERSION,
            batch_size=self._candidate.serving.max_batch_size,
            answers=path,
            samples=self._samples,
            samples_digest=self._loaded.digest,
            reference=self._answered(baseline),
            parity=baseline.source == self._variant.source,
            metric=self._campaign.task_metric,
            adapted=bool(self._variant.adaptation),
            python_path=self._base,
        )
        return {name: one for name, one in found.metrics.items() if name in JUDGED}

    def close(self) -> None:
        """Removes what was answered."""
        self._scratch.cleanup()

    def _baseline(self) -> Variant:
        campaign = self._campaign
        candidate = next((one for one in campaign.candidates if one.id == campaign.verdict.baseline), None)
        if candidate is None:
            raise InputError(f"the campaign {campaign.name} has no baseline to judge answers by")
        return variant_of(campaign, candidate)

    def _answered(self, baseline: Variant) -> Path:
        """The baseline's answers, given once."""
        if self._reference is None:
            path = Path(self._scratch.name) / "reference.npz"
            measure_fidelity(
                baseline.id,
                self._store.path(baseline.artifact) / baseline.artifact.entry,
                baseline.recipe.engines[0],
                samples=self._samples,
                samples_digest=self._loaded.digest,
                out=path,
                reference=None,
                metric=self._campaign.task_metric,
                batch_size=1,
                instruction_set=widest_instruction_set(self._campaign.host),
                seed=self._campaign.seed,
                adaptation=baseline.adaptation,
                python_path=self._base,
            )
            self._reference = path
        return self._reference


def variant_of(campaign: Campaign, candidate: Candidate) -> Variant:
    """The variant that a candidate serves."""
    return next(one for one in campaign.variants if one.id == candidate.variant_id)
