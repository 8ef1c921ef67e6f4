"""The tables of docs/reference/tensorrt.md are those of the code."""

from pathlib import Path

from optimize.readiness.lint import RULES
from optimize.readiness.releases import TRITON
from optimize.readiness.rules import Rule
from optimize.readiness.triton import TRITON_RULES

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "tensorrt.md"


def rule_row(rule: Rule) -> str:
    return f"| {rule.id} | {rule.severity} | {rule.versions} | {rule.title} | {rule.fix} |"


def triton_row(rule: str) -> str:
    return f"| {rule} | {' | '.join(TRITON_RULES[rule])} |"


def release_row(release: str) -> str:
    known = TRITON[release]
    return f"| {release} | {known.onnxruntime} | {known.opset} | {known.ml_opset} | {known.ir_version} |"


def test_the_page_has_the_rules_and_releases_of_the_code() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(("| E", "| T1", "| 2"))]
    assert rows == [*map(rule_row, RULES), *map(triton_row, TRITON_RULES), *map(release_row, TRITON)]
