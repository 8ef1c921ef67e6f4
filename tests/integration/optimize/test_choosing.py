from pathlib import Path

import pytest

from optimize.choosing import choose_again, policy_for, record
from optimize.reporting import read_campaign, write_campaign
from tests.doubles import campaigns


@pytest.mark.slow
def test_a_new_verdict_is_recorded_with_its_page(tmp_path: Path):
    campaign = campaigns.campaign()
    write_campaign(campaign, tmp_path)
    choice = choose_again(campaign, policy_for(campaign.verdict.policy, constraints=["size_mb <= 0.001"]))
    page = record(choice, tmp_path)
    assert read_campaign(tmp_path) == choice.chosen
    assert "No candidate meets the policy" in page.read_text()
