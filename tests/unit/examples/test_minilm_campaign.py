from pathlib import Path

import pytest

from optimize.config import load_campaign
from registry.policy import parse_policy

ROOT = Path(__file__).parents[3]
CAMPAIGNS = ("optimize/demo/campaign.yaml", "examples/digits/campaign.yaml", "examples/minilm/campaign.yaml")


@pytest.mark.parametrize("path", CAMPAIGNS)
def test_a_shipped_campaign_is_valid_and_limits_loss_and_latency(path: str) -> None:
    campaign = load_campaign(ROOT / path)
    policy = parse_policy(campaign.policy.constraints, campaign.policy.objectives)
    assert [constraint.metric for constraint in policy.constraints] == ["accuracy_drop", "latency_p90_ms"]
    assert [profile.server for profile in campaign.serving] == ["mlserver", "triton"]


def test_the_digits_example_is_the_demo_told_for_newcomers() -> None:
    demo, example = (load_campaign(ROOT / path) for path in CAMPAIGNS[:2])
    own = {"name": "digits", "registry": demo.registry}
    assert example.model_copy(update=own) == demo
