"""``burnish run --fleet`` before it starts anything, and ``burnish report`` of a fleet."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimize.cli import main
from registry.ledger import Ledger
from tests.doubles import fleets


def burnish(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["burnish", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"model")
    np.savez(tmp_path / "held-out.npz", x=np.zeros((4, 8), np.float32), labels=np.zeros(4, np.int64))
    (tmp_path / "fleet.yaml").write_text(
        "name: spring\n"
        "models: [{name: a, sources: [{onnx: model.onnx}], samples: {evaluation: held-out.npz}, level: quick}]\n"
    )
    return tmp_path / "fleet.yaml"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name either a campaign file, or a fleet's"),
        (("campaign.yaml", "--fleet", "FILE"), "name either a campaign file, or a fleet's"),
        (("--fleet", "gone.yaml"), "there is no file gone.yaml"),
        (("--fleet", "FILE", "--minutes", "5"), "--minutes is for a campaign"),
        (("--fleet", "FILE", "--level", "best"), "there is no level 'best'"),
    ],
)
def test_what_cannot_be_run_is_said(monkeypatch, capsys, file: Path, arguments: tuple[str, ...], words: str):
    monkeypatch.chdir(file.parent)
    given = [str(file) if word == "FILE" else word for word in arguments]
    assert burnish(monkeypatch, "run", *given, "--json") == 2
    assert words in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (file.parent / "burnish-work").exists()


def test_a_store_that_cannot_be_written_is_said_once_before_anything_begins(monkeypatch, capsys, file: Path):
    monkeypatch.setenv("BURNISH_STORE", str(file / "below-a-file"))
    assert burnish(monkeypatch, "run", "--fleet", str(file), "--json") in {2, 4}
    assert "below-a-file" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (file.parent / "burnish-work").exists()


def test_an_engine_that_cannot_be_had_is_said_once_before_anything_begins(monkeypatch, capsys, file: Path):
    def refused(**variables: str) -> tuple[int, str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        code = burnish(monkeypatch, "run", "--fleet", str(file), "--json")
        assert not (file.parent / "burnish-work").exists()
        return code, json.loads(capsys.readouterr().out)["error"]["message"]

    monkeypatch.delenv("BURNISH_STORE", raising=False)
    assert refused(BURNISH_ENGINE="slurm")[0] == 2
    assert refused(BURNISH_ENGINE="ray", RAY_ADDRESS="127.0.0.1:1") == (
        2,
        "workers on a Ray cluster need a store that they share with this machine",
    )
    code, words = refused(BURNISH_STORE=str(file.parent / "mount"))
    assert (code, words) == (4, "there is no Ray cluster at 127.0.0.1:1: Connection refused")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    made = fleets.fleet()
    with Ledger.open(tmp_path / "fleet.jsonl") as ledger:
        ledger.commit("Fleet", made.name, {"number": 0}, replace(made, outcomes=(), spent={}))
        for outcome in made.outcomes:
            ledger.commit("FleetOutcome", outcome.model, {"model": outcome.model, "attempt": 1}, outcome)
    return tmp_path


def test_a_report_shows_what_the_journal_has(monkeypatch, capsys, work: Path):
    assert burnish(monkeypatch, "report", str(work), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in told["models"]] == ["sure", "kept", "wide", "strict", "broken", "late", "next"]
    first, last = told["models"][0], told["models"][-1]
    assert first["gain"]["speed_up"]["low"] == 1.8
    assert first["report"] == str(work / "models/sure/report.html")
    assert (last["state"], last["report"], last["log"]) == ("waiting", None, None)
    assert told["exit_code"] == 2
    assert Path(told["report"]).read_text().startswith("<!doctype html>")


def test_a_report_as_markdown_and_what_a_fleet_has_none_of(monkeypatch, capsys, work: Path):
    assert burnish(monkeypatch, "report", str(work), "--markdown") == 0
    assert capsys.readouterr().out.startswith("# spring: what was won")
    assert burnish(monkeypatch, "report", str(work), "--sync", "--json") == 2
    assert "is a fleet's" in json.loads(capsys.readouterr().out)["error"]["message"]
