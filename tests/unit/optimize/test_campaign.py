"""What a campaign says before it begins any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.campaign import judge_variants_of, make_variants, run_campaign
from optimize.config import load_campaign
from optimize.plan import Observer
from registry.errors import InputError, UnreachableError
from registry.ledger import Ledger

CAMPAIGN = """
name: digits
sources: [{torch: "network:make"}]
samples: {evaluation: held-out.npz}
variants: [float32]
level: quick
"""
NETWORK = "from pathlib import Path\nPath(__file__).with_name('was-read').touch()\n"


class Quiet(Observer):
    """Tells nobody."""


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    """A campaign file whose source, a module of the user's, tells whether it was loaded."""
    np.savez(tmp_path / "held-out.npz", x=np.zeros((4, 8), np.float32), labels=np.zeros(4, np.int64))
    (tmp_path / "network.py").write_text(NETWORK)
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    return tmp_path / "campaign.yaml"


@pytest.fixture
def without_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_ENGINE", "ray")
    monkeypatch.setenv("BURNISH_STORE", str(tmp_path / "mount"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")


def make(campaign: Path) -> Any:
    out, work = campaign.parent / "out", campaign.parent / "work"
    return make_variants(campaign, variants=(), calibration=None, out=out, work=work, observer=Quiet())


def judge(campaign: Path) -> Any:
    return judge_variants_of(campaign, variants=(), work=campaign.parent / "work", observer=Quiet())


@pytest.mark.usefixtures("without_cluster")
@pytest.mark.parametrize("command", [make, judge])
def test_a_cluster_that_is_not_there_is_said_before_any_source_is_made(campaign: Path, command: Callable[[Path], Any]):
    with pytest.raises(UnreachableError, match=r"there is no Ray cluster at 127\.0\.0\.1:1"):
        command(campaign)
    assert not (campaign.parent / "was-read").exists()
    assert not Ledger.read(campaign.parent / "work" / "ledger.jsonl").entries()


@pytest.mark.parametrize("command", [make, judge])
def test_an_engine_that_there_is_not_is_said_before_any_source_is_made(
    campaign: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[Path], Any]
):
    monkeypatch.delenv("BURNISH_STORE", raising=False)
    monkeypatch.setenv("BURNISH_ENGINE", "slurm")
    with pytest.raises(InputError, match="'slurm', and the engines are local and ray"):
        command(campaign)
    monkeypatch.setenv("BURNISH_ENGINE", "local")
    monkeypatch.setenv("BURNISH_WORKERS", "many")
    with pytest.raises(InputError, match="'many', which is no number of workers"):
        command(campaign)
    assert not (campaign.parent / "was-read").exists()


def test_a_folder_that_cannot_be_made_is_said(campaign: Path, monkeypatch: pytest.MonkeyPatch):
    for variable in ("BURNISH_ENGINE", "BURNISH_STORE"):
        monkeypatch.delenv(variable, raising=False)
    (campaign.parent / "file").touch()
    nowhere = campaign.parent / "file" / "folder"
    with pytest.raises(InputError, match=r"--work .*folder cannot be made: Not a directory"):
        run_campaign(load_campaign(campaign), base=campaign.parent, work=nowhere, observer=Quiet())
