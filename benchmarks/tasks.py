"""The two tasks that variants are made for in benchmarks: a ResNet-18 on enlarged digits, and MiniLM on docstrings.

Both are written once into ``benchmarks/burnish-work-tasks`` (the second into ``examples/minilm``) and kept.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import say

from optimize.config import CampaignConfig
from profiles.measure.host import VNNI, fingerprint_host

HERE = Path(__file__).resolve().parent
TASKS = HERE / "burnish-work-tasks"
MINILM = HERE.parent / "examples" / "minilm"
BATCH_SIZES = (1, 32)


@dataclass(frozen=True)
class Task:
    """A model with its samples, as a campaign names them.

    Attributes:
        name: of the task.
        base: the folder that paths are relative to.
        source: the entry of ``sources``.
        evaluation: path of the held-out samples.
        calibration: path of the calibration samples.
        metric: the task metric.
    """

    name: str
    base: Path
    source: dict[str, Any]
    evaluation: str
    calibration: str
    metric: str

    def config(self, variants: list[Any]) -> CampaignConfig:
        """A campaign of these variants that judges them at the batch sizes of the benchmark."""
        return CampaignConfig.model_validate(
            {
                "name": self.name,
                "sources": [self.source],
                "samples": {"evaluation": self.evaluation, "calibration": self.calibration},
                "metric": self.metric,
                "variants": variants,
                "serving": [
                    {"server": "triton", "max_batch_size": size, "max_batch_delay_ms": 1.0}
                    for size in sorted(BATCH_SIZES, reverse=True)
                ],
                "level": "quick",
            }
        )


def resnet18() -> Task:
    """The network of ``resnet18.py``, trained once, as a torch source: so that it can be pruned, too."""
    import resnet18 as network

    network.prepare()
    folder = network.FOLDER.relative_to(HERE)
    weights = str(network.WEIGHTS.relative_to(HERE))
    source = {"name": "resnet18", "torch": "resnet18:create", "depends_on": [weights]}
    return Task("resnet18", HERE, source, str(folder / "evaluation.npz"), str(folder / "calibration.npz"), "accuracy")


def minilm() -> Task:
    """all-MiniLM-L6-v2 with the retrieval task of examples/minilm."""
    subprocess.run([sys.executable, str(MINILM / "prepare.py")], check=True)
    source = {"name": "minilm", "huggingface": "data/model", "task": "feature-extraction", "pooling": "mean"}
    return Task("minilm", MINILM, source, "data/evaluation.npz", "data/calibration.npz", "recall_at_1")


def leave_without_vnni() -> None:
    """Ends the benchmark with status 0 where int8 gains little, as it does without VNNI."""
    if not VNNI.intersection(fingerprint_host("none").instruction_sets):
        say("not applicable: this CPU has no VNNI")
        sys.exit(0)
