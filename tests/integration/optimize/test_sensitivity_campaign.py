"""A campaign whose int8 variant misses the limit on accuracy, and what the search makes of it."""

from pathlib import Path

import numpy as np
import pytest

from optimize.campaign import Prepared, judge_campaign
from optimize.config import CampaignConfig
from optimize.plan import Observer
from optimize.reuse import Finding, reuse_of
from registry.codec import from_jsonable, to_jsonable
from registry.ledger import Ledger
from registry.records import AccuracySearch
from tests.doubles.sensitive import clear_samples, conv_chain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores


class Log(Observer):
    """Keeps what a campaign says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def phase(self, name: str, total: int) -> None:
        self.lines.append(f"{name}: {total}")

    def done(self, subject: str, outcome: str) -> None:
        self.lines.append(f"{subject}: {outcome}")

    def note(self, text: str) -> None:
        self.lines.append(text)


def prepare(folder: Path, *, samples: int) -> None:
    model = conv_chain(folder, spiked=(2,))
    np.savez(folder / "evaluation.npz", **clear_samples(model, count=samples))
    np.savez(folder / "calibration.npz", image=clear_samples(model, count=64, seed=1)["image"])


def config_with(**search: float) -> CampaignConfig:
    return CampaignConfig.model_validate(
        {
            "name": "spiked",
            "sources": [{"onnx": "model.onnx"}],
            "samples": {"evaluation": "evaluation.npz", "calibration": "calibration.npz"},
            "variants": ["int8-static"],
            "serving": [{"server": "mlserver"}],
            "level": "quick",
            "policy": {"constraints": ["accuracy_drop <= 0.01"]},
            "search": {"accuracy": search},
        }
    )


def run(folder: Path, **search: float) -> tuple[Prepared, Log]:
    log, config = Log(), config_with(**search)
    return judge_campaign(config, base=folder, work=folder / "work", observer=log), log


def reused(folder: Path, **search: float) -> list[Finding]:
    return reuse_of(config_with(**search), base=folder, work=folder / "work", wanted="int8-static-tuned")


def searches(folder: Path) -> list[AccuracySearch]:
    with Ledger.open(folder / "work" / "ledger.jsonl") as ledger:
        return [entry.record for entry in ledger.entries("AccuracySearch")]


def test_the_search_finds_the_bad_layers_and_the_tuned_variant_keeps_the_limit(tmp_path):
    prepare(tmp_path, samples=600)
    first, _ = run(tmp_path, trials=1)
    assert [one.name for one in first.judged] == ["float32", "int8-static"]
    (failure,) = first.failures
    assert failure.subject == "int8-static-tuned"
    assert "(1 trial, which is the budget)" in failure.reason

    prepared, log = run(tmp_path, trials=8)
    assert not prepared.failures
    float32, int8, tuned = prepared.judged
    assert [float32.name, int8.name, tuned.name] == ["float32", "int8-static", "int8-static-tuned"]
    assert int8.fidelities[1].metrics["accuracy_drop"].value > 0.5
    assert tuned.fidelities[1].metrics["accuracy_drop"].high <= 0.01
    assert tuned.screening is not None

    assert tuned.variant.recipe.name == "int8-static-tuned"
    assert set(tuned.variant.recipe.stages[0].params["float_nodes"]) == {"conv_2", "conv_3"}
    assert "left 2 of 7 nodes in float32 (" in tuned.variant.notes[-1]
    assert "37 % of MACs in float32" in tuned.variant.notes[-1]

    _, search = searches(tmp_path)
    assert search.stopped == "done"
    assert search.monotone
    assert [trial.outcome for trial in search.trials] == ["fail", "pass", "fail"]
    assert search.best.drop == tuned.fidelities[1].metrics["accuracy_drop"]
    assert from_jsonable(AccuracySearch, to_jsonable(search)) == search

    trials = [line for line in log.lines if line.startswith("int8-static-tuned, ")]
    assert [line.endswith("(known)") for line in trials] == [True, False, False], "one was made before"
    assert not list((tmp_path / "work" / "tmp").iterdir())

    names = ["Source", "Variant", "Fidelity", "AccuracySearch", "Variant", "Fidelity", "Screening"]
    known = reused(tmp_path, trials=8)
    assert [one.kind for one in known] == names
    assert all(one.reused for one in known)
    more = reused(tmp_path, trials=9)
    assert [one.kind for one in more] == names
    assert [one.reused for one in more] == [True, True, True, False, False, False, False]
    assert more[3].reason == "trials was 8, is now 9"


def test_where_so_few_samples_can_show_nothing_no_trial_is_made(tmp_path):
    prepare(tmp_path, samples=60)
    prepared, log = run(tmp_path, trials=8)
    (failure,) = prepared.failures
    assert (failure.subject, failure.kind) == ("int8-static-tuned", "not_applicable")
    assert "not even all the baseline's answers would pass on 60 samples: accuracy drop 0.000" in failure.reason
    assert not any(line.startswith("int8-static-tuned, ") for line in log.lines)
