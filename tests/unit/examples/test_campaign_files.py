"""The examples' campaign files are ones that this burnish takes."""

from pathlib import Path

import pytest

from optimize.config import load_campaign
from registry.policy import parse_policy

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.mark.parametrize("name", ["digits", "minilm"])
def test_an_example_is_a_valid_campaign_with_a_readme(name: str):
    config = load_campaign(EXAMPLES / name / "campaign.yaml")
    assert parse_policy(config.policy.constraints, config.policy.objectives).constraints
    assert (EXAMPLES / name / "README.md").is_file()
