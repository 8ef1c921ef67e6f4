"""The page on the policy's language is held to the parser."""

import re
from pathlib import Path

import pytest

from optimize.choosing import PolicyFile
from registry.documents import parse_document
from registry.errors import PolicyError
from registry.policy import METRICS, parse_policy

PAGE = (Path(__file__).parents[3] / "docs/reference/policy.md").read_text(encoding="utf-8")
GOAL = "maximize max_throughput_rps"
POLICIES = [
    parse_document(text, PolicyFile, name="policy.md").policy
    for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
]
WRITTEN = re.findall(r"^\| `([^`]*(?:<|>)[^`]*)` \|", PAGE, re.MULTILINE)
REFUSALS = re.findall(r"```\n((?:unknown|no value).*?)\n```", PAGE, re.DOTALL)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_is_understood(policy):
    parse_policy(policy.constraints, policy.objectives)


def test_each_limit_of_the_tables_is_understood():
    assert len(WRITTEN) > 8
    parse_policy(WRITTEN, GOAL)


def test_each_refusal_is_what_the_parser_says():
    assert len(REFUSALS) == 2
    for refusal in REFUSALS:
        lines = [line.strip() for line in refusal.splitlines() if re.match(r" +\w", line)]
        with pytest.raises(PolicyError) as caught:
            parse_policy(lines, GOAL)
        assert str(caught.value) == refusal


def test_the_metrics_of_the_table_are_known():
    table = PAGE.partition("## Metrics")[2].partition("## ")[0]
    named = {
        name
        for row in table.splitlines()
        for name in re.findall(r"`([a-z0-9_]+)`", row.split("|")[1] if "|" in row else "")
    }
    assert named
    assert named <= METRICS.keys()


def test_the_grammar_is_that_of_the_module():
    import registry.policy

    grammar = re.findall(r"```\n(constraint = .*?)```", PAGE, re.DOTALL)[0]
    written = [line.strip() for line in (registry.policy.__doc__ or "").splitlines()]
    assert all(line in written for line in grammar.splitlines())
