"""A second campaign that measures the first one's choice again, through the command line and on real servers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from registry import codec
from registry.records import Campaign
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx
from tests.e2e.conftest import CAMPAIGN, LEVELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BURNISH = str(Path(sys.executable).with_name("burnish"))
BOTH = CAMPAIGN[CAMPAIGN.index("serving:") : CAMPAIGN.index("level:")]


def folder(place: Path, *, variants: str, serving: str, constraints: str, champion: str = "") -> Path:
    """A small campaign's folder."""
    place.mkdir()
    write_onnx(mlp(), place)
    rng = np.random.default_rng(1)
    for name, count in (("evaluation", 300), ("calibration", 32)):
        x = rng.normal(size=(count, FEATURES)).astype(np.float32)
        np.savez(place / f"{name}.npz", x=x, labels=mlp_answer(x).argmax(axis=1))
    text = CAMPAIGN.replace(BOTH, f"serving: [{serving}]\n").replace("accuracy_drop <= 0.5", constraints)
    text = text.replace("[float32, int8-dynamic, int8-static]", variants)
    (place / "campaign.yaml").write_text(text + champion)
    (place / "levels.yaml").write_text(LEVELS)
    return place


def run(place: Path) -> Campaign:
    """The campaign's record; whatever its verdict, there is one."""
    done = subprocess.run(
        [BURNISH, "run", "campaign.yaml", "--json"],
        cwd=place, check=False, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    # With so small a model the machine's noise decides who wins, or that nobody does.
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["report"]
    made = codec.loads((place / "burnish-work" / "campaign.json").read_text())
    assert isinstance(made, Campaign)
    return made


# MLflow's own queries use an option of SQLAlchemy that is on its way out.
@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")
def test_the_champion_is_measured_in_the_same_rounds_however_it_is_served(tmp_path: Path) -> None:
    first = run(
        folder(
            tmp_path / "first",
            variants="[float32, int8-static]",
            serving="{server: mlserver, max_batch_size: 4, max_batch_delay_ms: 1}",
            constraints="load_time_s <= 20",
        )
    )
    [chosen] = [one for one in first.candidates if one.variant_name == "int8-static"]
    loads = {one.candidate_id: one.metrics["load_time_s"] for one in first.measurements if one.load is None}
    assert all(estimate.runs == 2 and estimate.high is not None for estimate in loads.values())

    named = f"champion: {{work: ../first/burnish-work, candidate: '{chosen.name}'}}\n"
    second = run(
        folder(
            tmp_path / "second",
            variants="[float32]",
            serving="{server: mlserver, protocol: rest}",
            constraints="accuracy >= 50% rel vs champion",
            # The first one's store, as MLflow takes seconds to lay out a new one.
            champion=f"{named}registry: {{tracking_uri: 'sqlite:///{tmp_path}/first/burnish-work/mlflow.db'}}\n",
        )
    )
    champion = second.champion
    assert champion is not None
    assert (champion.was, champion.campaign_id) == (chosen.name, first.id)
    again = next(one for one in second.candidates if one.id == champion.candidate_id)
    assert again.serving == chosen.serving
    assert again.variant_name == "champion/int8-static"
    assert second.verdict.champion == again.id
    numbers = {
        one.candidate_id: {r.number for r in second.rounds if r.candidate_id == one.candidate_id}
        for one in second.rounds
    }
    assert numbers[again.id] == numbers[second.verdict.baseline or ""]
    judged = {one.candidate_id: one.judgements[0].outcome for one in second.verdict.rejections if one.judgements}
    assert set(judged.values()) <= {"pass"}
    page = (tmp_path / "second" / "burnish-work" / "report.html").read_text()
    assert "champion/int8-static" in page
    assert (tmp_path / "second" / "burnish-work" / "pictures" / "throughput.png").is_file()
