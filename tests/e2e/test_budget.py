"""A campaign that has less time than it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from optimize.reporting import read_campaign
from optimize.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BURNISH = str(Path(sys.executable).with_name("burnish"))


def test_a_campaign_without_time_ends_with_a_report_and_nothing_wins(tiny: Path):
    work = tiny / "burnish-work"
    done = subprocess.run(
        [BURNISH, "run", "campaign.yaml", "--minutes", "0.001", "--json"],
        check=False, cwd=tiny, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert told["selected"] is None
    assert "The budget of 0.001 minutes was used up before all was measured." in told["sentence"]
    assert Path(told["report"]).is_file()
    assert told["mlflow"]["runs"]
    campaign = read_campaign(work)
    assert [one.name for one in campaign.variants] == ["float32"]
    assert {one.variant_name for one in campaign.candidates} == {"float32"}
    assert set(campaign.verdict.unknown) == {one.id for one in campaign.candidates}
    assert all("the budget of 0.001 minutes was used up" in one.reason for one in campaign.verdict.rejections)
    unmade = {one.subject: (one.phase, one.kind) for one in campaign.failures if "@" not in one.subject}
    assert unmade == dict.fromkeys(("int8-dynamic", "int8-static"), ("make", "budget"))
    left = read_status(work)
    assert (left["state"], left["resumable"]) == ("done", True)
    assert left["verdict"]["cut_short"] == "The budget of 0.001 minutes was used up before all was measured."
    kinds = {json.loads(line)["kind"] for line in (work / "ledger.jsonl").read_text().splitlines()}
    assert kinds == {"Source", "Variant", "Fidelity", "Screening"}
