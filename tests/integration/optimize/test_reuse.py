"""What the next run of a campaign would reuse, over the journal of a real one without servers."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.cli import main
from optimize.config import CampaignConfig
from optimize.judging import judge_variants, screen_variants
from optimize.making import make_sources, make_variants
from optimize.plan import Observer, Workspace, plan
from optimize.reuse import Finding, reuse_of
from optimize.samples import load_samples
from registry.errors import InputError
from registry.ledger import Ledger
from registry.store import FolderStore
from tests.doubles.models import CLASSES, FEATURES, mlp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores

CAMPAIGN: dict[str, Any] = {
    "name": "tiny",
    "sources": [{"name": "first", "onnx": "first.onnx"}],
    "samples": {"evaluation": "evaluation.npz", "calibration": "calibration.npz"},
    "variants": ["int8-static"],
    "serving": [{"server": "triton"}],
    "level": "quick",
}


class Quiet(Observer):
    def phase(self, name: str, total: int) -> None: ...
    def done(self, subject: str, outcome: str) -> None: ...
    def note(self, text: str) -> None: ...


def prepare(folder: Path, content: Mapping[str, Any]) -> CampaignConfig:
    """Does what a campaign does before it serves anything."""
    rng = np.random.default_rng(0)
    for seed, name in enumerate(("first", "second")):
        (folder / f"{name}.onnx").write_bytes(mlp(seed=seed).SerializeToString())
    features = rng.normal(size=(24, FEATURES)).astype(np.float32)
    np.savez(folder / "evaluation.npz", x=features, labels=np.arange(24) % CLASSES)
    np.savez(folder / "calibration.npz", x=features[::2])
    config = CampaignConfig.model_validate(content)
    work = folder / "burnish-work"
    planned = plan(config, base=folder, work=work)
    with Ledger.open(work / "ledger.jsonl") as ledger:
        workspace = Workspace(plan=planned, store=FolderStore(work), ledger=ledger, observer=Quiet())
        sources, _ = make_sources(workspace)
        variants, failures = make_variants(workspace, sources, load_samples(folder / "calibration.npz"))
        assert not failures
        judged, failures = judge_variants(workspace, variants, load_samples(folder / "evaluation.npz"))
        assert not failures
        screen_variants(workspace, judged)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("campaign")
    prepare(folder, CAMPAIGN)
    return folder


@pytest.fixture
def campaign(finished: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "campaign"
    shutil.copytree(finished, folder)
    return folder


def asked(folder: Path, wanted: str = "int8-static", **changes: Any) -> dict[str, Finding]:
    config = CampaignConfig.model_validate(CAMPAIGN | changes)
    findings = reuse_of(config, base=folder, work=folder / "burnish-work", wanted=wanted)
    return {one.kind: one for one in findings}


def told(findings: Mapping[str, Finding]) -> dict[str, bool]:
    return {kind: one.reused for kind, one in findings.items()}


ALL = {"Source": True, "Variant": True, "Fidelity": True, "Screening": True}


@pytest.mark.parametrize("wanted", ["int8-static", "float32"])
def test_unchanged_is_reused(campaign: Path, wanted: str):
    before = (campaign / "burnish-work" / "ledger.jsonl").read_bytes()
    assert told(asked(campaign, wanted)) == ALL
    assert (campaign / "burnish-work" / "ledger.jsonl").read_bytes() == before


def test_one_flipped_bit_of_the_calibration_is_named(campaign: Path):
    values = np.load(campaign / "calibration.npz")["x"]
    values.view(np.uint8)[0, 0] ^= 1
    np.savez(campaign / "calibration.npz", x=values)
    found = asked(campaign)
    assert told(found) == ALL | {"Variant": False, "Fidelity": False, "Screening": False}
    assert found["Variant"].reason.startswith("calibration was ")
    assert ";" not in found["Variant"].reason  # and nothing else
    assert found["Fidelity"].reason == "the variant is not reused"
    assert told(asked(campaign, "float32")) == ALL


def test_a_parameter_of_a_stage_is_named(campaign: Path):
    stages = [{"name": "quantize.static", "method": "entropy"}]
    reason = asked(campaign, variants=[{"name": "int8-static", "stages": stages}])["Variant"].reason
    assert reason == "stages.1 quantize.static.method was minmax, is now entropy"


def test_seed_and_evaluation_samples_are_named(campaign: Path):
    assert asked(campaign, seed=3)["Variant"].reason == "seed was 0, is now 3"
    values = np.load(campaign / "evaluation.npz")
    np.savez(campaign / "evaluation.npz", x=values["x"] + 1, labels=values["labels"])
    assert told(asked(campaign)) == ALL | {"Fidelity": False, "Screening": False}
    assert asked(campaign)["Fidelity"].reason == "the answers of the baseline are not reused"
    assert asked(campaign, "float32")["Fidelity"].reason.startswith("samples")


def test_answers_that_are_gone(campaign: Path):
    shutil.rmtree(campaign / "burnish-work" / "outputs")
    assert "no longer" in asked(campaign, "float32")["Fidelity"].reason


def test_files_that_are_gone_are_told_and_made_again(campaign: Path):
    (record,) = [entry.record for entry in Ledger.read(campaign / "burnish-work" / "ledger.jsonl").entries("Variant")
                 if entry.subject == "int8-static"]  # fmt: skip
    shutil.rmtree(campaign / "burnish-work" / "artifacts" / record.artifact.digest)
    assert "no longer" in asked(campaign)["Variant"].reason
    prepare(campaign, CAMPAIGN)
    assert told(asked(campaign)) == ALL


def test_a_variant_of_another_name_is_not_made_again(campaign: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("optimize.making.run_in_child", lambda *_, **__: pytest.fail("it was made again"))
    config = CAMPAIGN | {"variants": [{"name": "mine", "stages": ["quantize.static"]}]}
    prepare(campaign, config)
    assert told(asked(campaign, "mine", variants=config["variants"]))["Variant"]


def test_another_model_shares_nothing(campaign: Path):
    other = [{"name": "first", "onnx": "second.onnx"}]
    found = asked(campaign, sources=other)
    assert told(found) == dict.fromkeys(ALL, False)
    assert found["Source"].reason.startswith("files.model.onnx was ")


def test_predictions_concern_only_recipes_that_they_speak_of(campaign: Path):
    assert told(asked(campaign, predict=False)) == ALL


def test_a_name_that_is_none(campaign: Path):
    with pytest.raises(InputError, match="no variant 'int8-statik'") as caught:
        asked(campaign, "int8-statik")
    assert "Did you mean 'int8-static'?" in str(caught.value.hint)


def test_the_command(campaign: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (campaign / "campaign.yaml").write_text(json.dumps(CAMPAIGN | {"seed": 3}))  # JSON is YAML, too
    arguments = ["burnish", "cache", "why", "int8-static", "--work", str(campaign / "burnish-work")]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert "seed was 0, is now 3" in shown
    assert json.loads(shown)["results"][0]["reused"] is True


def test_a_variant_that_was_made_under_another_name_is_reused(campaign: Path):
    before = (campaign / "burnish-work" / "ledger.jsonl").read_bytes()
    variants = [{"name": "mine", "stages": ["quantize.static"]}]
    assert told(asked(campaign, "mine", variants=variants)) == ALL
    assert (campaign / "burnish-work" / "ledger.jsonl").read_bytes() == before
