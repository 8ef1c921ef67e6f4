"""What the answers of a pipeline in production are worth, by labelled samples that are held out."""

import tempfile
from pathlib import Path

from optimize.engines.local import run_in_child
from optimize.fidelity import save_outputs
from optimize.metrics import find_metric
from optimize.pipelines import answers, judged_outputs
from optimize.samples import Samples
from profiles.pipelines.documents import Plan
from registry.records import Estimate, Metrics, Target


def why_unjudged(plan: Plan, loaded: Samples | None) -> str | None:
    """Why the answers of a plan's pipeline cannot be judged by these samples, or None."""
    if loaded is None:
        return "no samples are named"
    if loaded.labels is None:
        return "the samples have no labels"
    if lacking := [name for name in plan.pipeline.names if name not in plan.models]:
        return f"the plan has no model of {lacking[0]}, so that nothing tells what the present pipeline answers"
    return None


class PipelineFidelity:
    """Judges what a pipeline answers to samples, against the present variants' answers in process.

    Attributes:
        judged: the metrics that it gives.
    """

    def __init__(self, plan: Plan, *, samples: Path, loaded: Samples, metric: str) -> None:
        """Runs nothing yet.

        Args:
            plan: of the pipeline, with a model for each step.
            samples: the file of labelled samples of its inputs.
            loaded: what is in it.
            metric: the task metric.

        Raises:
            InputError: there is no such metric.
        """
        self._plan = plan
        self._samples = samples
        self._loaded = loaded
        self._metric = metric
        self._reference: Path | None = None
        decides = find_metric(metric).decide is not None
        self.judged = frozenset({"accuracy", "accuracy_drop"} | ({"flip_rate"} if decides else set()))
        self._scratch = tempfile.TemporaryDirectory(prefix="burnish-live-")

    def close(self) -> None:
        """Removes what was answered."""
        self._scratch.cleanup()

    def __call__(self, target: Target) -> Metrics:
        """The metrics of what a target answers.

        Raises:
            UnreachableError: it does not answer.
            BurnishError: its answers cannot be judged.
        """
        from profiles.measure.answers import answers_of

        plan, given = self._plan, Path(self._scratch.name) / "answers.npz"
        save_outputs(given, judged_outputs(plan, answers_of(target, self._loaded.inputs)))
        found = run_in_child(
            "optimize.fidelity:evaluate_answers",
            {
                "answers": str(given),
                "samples": str(self._samples.resolve()),
                "samples_digest": self._loaded.digest,
                "reference": str(self._answered()),
                "parity": False,
                "metric": self._metric,
                "adapted": False,
            },
        )
        return {name: Estimate(**fields) for name, fields in found["metrics"].items() if name in self.judged}

    def _answered(self) -> Path:
        """What the present variants answer, asked once."""
        if self._reference is None:
            path = Path(self._scratch.name) / "reference.npz"
            save_outputs(path, judged_outputs(self._plan, answers(self._plan, self._loaded, {})[0]))
            self._reference = path
        return self._reference
