"""What the local engine and the ledger add to a campaign's own work: variants of a small model, made one after another.

Own work is what each variant says of itself: its child process and the copy into the store. All else that passes until
the variants are there (engine, cores, scratch folders, ledger) is overhead. The model is small, which is unfavourable:
a large one makes the work longer and the overhead no larger.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from figures import figure, finish, say

from optimize.config import CampaignConfig
from optimize.making import make_sources, make_variants
from optimize.plan import Observer, Workspace, plan
from optimize.samples import open_samples
from optimize.testing import run_model, samples_for, tiny_conv_net
from registry.ledger import Ledger
from registry.store import FolderStore

ROUNDS = 5
VARIANTS = ["float32", "ort-optimized", "int8-static", "openvino", "openvino-int8"]
GOAL = "<= 0.05"


class Quiet(Observer):
    """Tells nobody."""

    def phase(self, name: str, total: int) -> None: ...

    def done(self, subject: str, outcome: str) -> None: ...

    def note(self, text: str) -> None: ...


def overhead(folder: Path, config: CampaignConfig, number: int) -> tuple[float, float]:
    """(seconds of overhead, seconds of own work) of making all variants once."""
    work = folder / f"work-{number}"
    planned = plan(config, base=folder, work=work)
    with Ledger.open(work / "ledger.jsonl") as ledger:
        workspace = Workspace(plan=planned, store=FolderStore(work), ledger=ledger, observer=Quiet())
        calibration = open_samples(folder / "samples.npz").checked()
        sources, _ = make_sources(workspace)
        begin = time.monotonic()
        variants, failures = make_variants(workspace, sources, calibration)
        took = time.monotonic() - begin
    assert not failures, failures
    own = sum(variant.made_in_s for variant in variants)
    return took - own, own


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix="burnish-work-") as name:
        folder = Path(name)
        model = tiny_conv_net(folder / "source")
        images = samples_for(model.inputs, count=64)
        np.savez(folder / "samples.npz", labels=run_model(model, images)[0].argmax(axis=1), **images)
        config = CampaignConfig.model_validate(
            {
                "name": "overhead",
                "sources": [{"onnx": "source/model.onnx"}],
                "samples": {"evaluation": "samples.npz", "calibration": "samples.npz"},
                "variants": VARIANTS,
                "level": "quick",
                "predict": False,
            }
        )
        shares = []
        for number in range(ROUNDS):
            extra, own = overhead(folder, config, number)
            shares.append(extra / own)
            say(f"{len(VARIANTS)} variants: own work {own:.2f} s, overhead {extra * 1000:.0f} ms ({extra / own:.2%})")
    sys.stdout.flush()
    finish(figure("engine_overhead_local", median(shares), GOAL))


if __name__ == "__main__":
    main()
