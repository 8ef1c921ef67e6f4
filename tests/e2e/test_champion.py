"""A campaign that measures an earlier one's choice again, through the command line and on real servers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from registry import codec
from registry.records import Campaign, ServingProfile, Source
from registry.store import FolderStore
from tests.doubles import campaigns
from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx
from tests.doubles.promotions import finished_campaign
from tests.e2e.conftest import CAMPAIGN, LEVELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BURNISH = str(Path(sys.executable).with_name("burnish"))
BOTH = CAMPAIGN[CAMPAIGN.index("serving:") : CAMPAIGN.index("level:")]


def samples(count: int) -> dict[str, npt.NDArray[Any]]:
    """Inputs, and the labels that the perceptron gives them."""
    x = np.random.default_rng(1).normal(size=(count, FEATURES)).astype(np.float32)
    return {"x": x, "labels": mlp_answer(x).argmax(axis=1)}


def earlier(place: Path) -> Campaign:
    """A finished campaign that chose int8-static: real files in its working folder, and numbers that are made up."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows: Iterator[npt.NDArray[Any]] = iter(samples(32)["x"])

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            row = next(self.rows, None)
            return None if row is None else {"x": row[None]}

    source, made, work = write_onnx(mlp(), place), place / "made", place / "burnish-work"
    made.mkdir()
    quantize_static(place / "model.onnx", made / "model.onnx", Reader())
    artifact = FolderStore(work).add(
        made, format="onnx", entry="model.onnx", inputs=source.inputs, outputs=source.outputs
    )
    digest = codec.file_sha256(place / "model.onnx")
    variant = replace(campaigns.STATIC, artifact=artifact, source="mlp", source_digest=digest)
    return finished_campaign(
        work,
        variant,
        ServingProfile(server="mlserver", backend="burnish", max_batch_size=4, max_batch_delay_ms=1.0),
        sources=(Source(name="mlp", kind="onnx", location="model.onnx", digest=digest, artifact=source),),
    )


# MLflow's own queries use an option of SQLAlchemy that is on its way out.
@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")
def test_the_champion_is_measured_in_the_same_rounds_however_it_is_served(tmp_path: Path, empty_store: Path) -> None:
    first = earlier(tmp_path / "first")
    [chosen] = first.candidates
    place = tmp_path / "second"
    work = place / "burnish-work"
    work.mkdir(parents=True)
    shutil.copyfile(empty_store, work / "mlflow.db")
    write_onnx(mlp(), place)
    np.savez(place / "evaluation.npz", **samples(300))
    (place / "levels.yaml").write_text(LEVELS)
    changes = {
        BOTH: "serving: [{server: mlserver, protocol: rest}]\n",
        ", calibration: calibration.npz": "",
        "[float32, int8-dynamic, int8-static]": "[float32]",
        "accuracy_drop <= 0.5": "accuracy >= 50% rel vs champion, load_time_s <= 200",
    }
    text = f"{CAMPAIGN}champion: {{work: ../first/burnish-work, candidate: '{chosen.name}'}}\n"
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (place / "campaign.yaml").write_text(text)
    done = subprocess.run(
        [BURNISH, "run", "campaign.yaml", "--json"],
        cwd=place, check=False, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    # With so small a model the machine's noise decides who wins, or that nobody does.
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["report"]
    found = codec.loads((work / "campaign.json").read_text())
    assert isinstance(found, Campaign)

    champion = found.champion
    assert champion is not None
    assert (champion.was, champion.campaign_id) == (chosen.name, first.id)
    again = next(one for one in found.candidates if one.id == champion.candidate_id)
    assert again.serving == chosen.serving
    assert again.variant_name == "champion/int8-static"
    assert found.verdict.champion == again.id
    numbers = {
        one.candidate_id: {r.number for r in found.rounds if r.candidate_id == one.candidate_id} for one in found.rounds
    }
    assert numbers[again.id] == numbers[found.verdict.baseline or ""]
    judged = {one.candidate_id: one.judgements[0].outcome for one in found.verdict.rejections if one.judgements}
    assert set(judged.values()) <= {"pass"}
    # Where the policy limits it, the time to load has an interval: each was loaded twice.
    loads = {one.candidate_id: one.metrics["load_time_s"] for one in found.measurements if one.load is None}
    assert all(estimate.runs == 2 and estimate.high is not None for estimate in loads.values())
    page = (work / "report.html").read_text()
    assert "champion/int8-static" in page
    assert (work / "pictures" / "throughput.png").is_file()
