"""What the doctor says, and that it changes nothing."""

from pathlib import Path

import pytest

from optimize import stages
from optimize.diagnosis import diagnose


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("sqlite:///new.db", f"sqlite:///{tmp_path}/new.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert diagnose()["tracking"]["store"] == f"{uri} will be created"
    assert not list(tmp_path.iterdir())


def test_plug_ins_that_do_not_load_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    section = "plug-ins that do not load"
    monkeypatch.setattr("optimize.diagnosis.broken_stages", lambda: {"mine.cut": "no module named 'mine'"})
    assert diagnose()[section] == {"mine.cut": "no module named 'mine'"}
    monkeypatch.setattr("optimize.diagnosis.broken_stages", stages.broken_stages)
    assert section not in diagnose()
