"""The winner on examples/minilm at level standard, against the float32 baseline on the same server.

The working folder is kept, so that a second call reports the same campaign; ``--fresh`` measures anew.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from figures import figure, finish, say

from registry import codec
from registry.records import Campaign, Candidate, Estimate

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "minilm"
WORK = EXAMPLE / "burnish-work"
METRIC = "max_throughput_rps"


def throughput(campaign: Campaign, candidate: Candidate) -> Estimate:
    found = [m.metrics[METRIC] for m in campaign.measurements if m.candidate_id == candidate.id and METRIC in m.metrics]
    return found[0]


def main() -> None:
    if "--fresh" in sys.argv:
        shutil.rmtree(WORK, ignore_errors=True)
    burnish = str(Path(sys.executable).with_name("burnish"))
    subprocess.run([sys.executable, str(EXAMPLE / "prepare.py")], check=True)
    code = subprocess.run(
        [burnish, "run", str(EXAMPLE / "campaign.yaml"), "--level", "standard"], check=False
    ).returncode
    if code:
        say(f"the campaign ended with {code}")
        finish(figure("minilm_throughput_ratio", 0.0, ">= 2.0"))
    campaign = codec.loads((WORK / "campaign.json").read_text(encoding="utf-8"))
    candidates = {candidate.id: candidate for candidate in campaign.candidates}
    winner = candidates[campaign.verdict.selected]
    baseline = next(c for c in candidates.values() if c.variant_name == "float32" and c.serving == winner.serving)
    ours, theirs = throughput(campaign, winner), throughput(campaign, baseline)
    fidelity = next(
        f for f in campaign.fidelities if f.variant_id == winner.variant_id and f.engine.key == winner.engine.key
    )
    lost = fidelity.metrics["accuracy_drop"]
    for candidate, estimate in ((winner, ours), (baseline, theirs)):
        say(f"{candidate.name}: {estimate.value:.1f} requests a second [{estimate.low:.1f}, {estimate.high:.1f}]")
    say(f"recall@1 lost: {lost.value:.4f} [{lost.low:.4f}, {lost.high:.4f}] over {fidelity.samples} samples")
    finish(
        figure("minilm_throughput_ratio", ours.value / theirs.value, ">= 2.0"),
        figure("minilm_recall_lost", lost.value, "<= 0.01"),
    )


if __name__ == "__main__":
    main()
