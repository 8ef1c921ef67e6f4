import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from optimize.choosing import choose_again, lines, policy_for, summary
from optimize.cli import main
from optimize.reporting import write_campaign
from registry.errors import DocumentError, InputError
from registry.records import Campaign, Failure
from tests.doubles import campaigns

GOAL = "maximize max_throughput_rps"


@pytest.fixture
def campaign() -> Campaign:
    """The double with the verdict that its own records give."""
    made = campaigns.campaign()
    return choose_again(made, made.verdict.policy).chosen


def burnish(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["burnish", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_recorded_policy_gives_the_recorded_verdict(campaign):
    again = choose_again(campaign, policy_for(campaign.verdict.policy))
    assert again.chosen == campaign
    assert again.changes == ()
    assert lines(again)[-1] == "The recorded choice stays."


def test_another_policy_changes_the_choice_and_tells_of_whom(campaign):
    fast = campaign.verdict.selected
    policy = policy_for(campaign.verdict.policy, constraints=["size_mb >= 1"])
    assert policy.objectives == campaign.verdict.policy.objectives
    choice = choose_again(campaign, policy)
    now = choice.chosen.verdict.selected
    assert now not in {None, fast}
    became = {one.id: after for one, _, after in choice.changes}
    assert (became[fast], became[now]) == ("rejected", "selected")
    shown = lines(choice)
    assert any(line.startswith("rejected ") and " (was selected)" in line for line in shown)
    assert shown[-1] == f"Recorded is: {campaign.verdict.sentence}"
    assert lines(choice, replaced=True)[-1] == f"Recorded was: {campaign.verdict.sentence}"
    assert {one["now"] for one in summary(choice)["changes"]} >= {"selected", "rejected"}


def test_what_the_results_cannot_say_is_told(campaign):
    unserved = Failure(subject="int4", phase="screen", kind="screened_out", reason="too unlike")
    policy = policy_for(campaign.verdict.policy, constraints=["latency_p90_ms <= 50 at 17 rps"])
    told = lines(choose_again(replace(campaign, failures=(*campaign.failures, unserved)), policy))
    assert any("nothing was measured at 17 rps, only at: 0.8 saturation" in line for line in told)
    assert any("nothing can be said of them:" in line and line.endswith("int4") for line in told)


def test_a_champion_is_named(campaign):
    policy = policy_for(campaign.verdict.policy, constraints=["max_throughput_rps >= 100% rel vs champion"])
    assert choose_again(campaign, policy).chosen.verdict.selected is None
    assert choose_again(campaign, policy, champion="float32").chosen.verdict.selected is not None
    with pytest.raises(InputError, match="no candidate 'nobody'"):
        choose_again(campaign, policy, champion="nobody")


def test_a_policy_comes_from_a_file(campaign, tmp_path: Path):
    file = tmp_path / "policy.yaml"
    file.write_text(
        f"name: other keys are a campaign's\npolicy:\n  constraints: [rss_mb <= 600]\n  objective: {GOAL}\n"
    )
    assert [one.metric for one in policy_for(campaign.verdict.policy, file=file).constraints] == ["rss_mb"]
    with pytest.raises(InputError, match="goes with no --constraint"):
        policy_for(campaign.verdict.policy, file=file, objectives=[GOAL])
    file.write_text("constraints: [rss_mb <= 600]\n")
    with pytest.raises(DocumentError, match="policy"):
        policy_for(campaign.verdict.policy, file=file)
    with pytest.raises(InputError, match="no signature 'other'"):
        policy_for(campaign.verdict.policy, signature="other")


def test_the_command_leaves_the_record_alone(monkeypatch, capsys, campaign, tmp_path: Path):
    written = write_campaign(campaign, tmp_path)
    before = written.read_bytes()
    nothing = ("select", str(tmp_path), "--constraint", "size_mb <= 0.001", "--json")
    assert burnish(monkeypatch, *nothing) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["selected"] is None
    assert told["report"] is None
    assert told["verdict"]["closest"][0]["relaxation"].startswith("size_mb <= 0.3")
    assert [path.name for path in tmp_path.iterdir()] == ["campaign.json"]
    assert written.read_bytes() == before


def test_contradictory_constraints_are_exit_2(monkeypatch, capsys, campaign, tmp_path: Path):
    write_campaign(campaign, tmp_path)
    both = ("--constraint", "rss_mb <= 1", "--constraint", "rss_mb >= 2")
    assert burnish(monkeypatch, "select", str(tmp_path), *both) == 2
    assert "no value of rss_mb meets both" in capsys.readouterr().err
