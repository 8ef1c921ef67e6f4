"""The examples' campaign files are ones that this burnish takes."""

from pathlib import Path

import pytest

from optimize.config import load_campaign
from optimize.fleet.config import FiledModel, FleetConfig
from registry.documents import read_document
from registry.policy import parse_policy

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.mark.parametrize("name", ["digits", "minilm"])
def test_an_example_is_a_valid_campaign_with_a_readme(name: str):
    config = load_campaign(EXAMPLES / name / "campaign.yaml")
    assert parse_policy(config.policy.constraints, config.policy.objectives).constraints
    assert (EXAMPLES / name / "README.md").is_file()


def test_the_fleet_takes_the_campaigns_of_the_others():
    document = read_document(EXAMPLES / "fleet" / "fleet.yaml")
    models = document.as_model(FleetConfig).models
    campaigns = [EXAMPLES / "fleet" / FiledModel(**model).campaign for model in models]
    assert [load_campaign(path).name for path in campaigns] == ["digits-example", "minilm"]
