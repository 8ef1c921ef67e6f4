"""docs/reference/stages.md knows every stage of the house, its parameters and what it needs."""

import re
from pathlib import Path

import pytest

from optimize.stages import find_stage, stage_names

PAGE = Path(__file__).parents[4] / "docs" / "reference" / "stages.md"
OURS = [name for name in stage_names() if find_stage(name).__module__.startswith("optimize.")]


@pytest.fixture(scope="module")
def rows():
    return {
        match.group(1): line
        for line in PAGE.read_text().splitlines()
        if (match := re.match(r"\| `([a-z]+\.[a-z0-9_]+)`", line))
    }


def test_the_page_has_the_stages_there_are(rows):
    assert sorted(rows) == sorted(OURS)


@pytest.mark.parametrize("name", OURS)
def test_a_stages_row_says_what_it_takes(rows, name):
    stage, row = find_stage(name), rows[name]
    assert [field for field in stage.Params.model_fields if f"`{field}`" not in row] == []
    assert ("(samples)" in row) == stage.needs_calibration
    assert ("(batch)" in row) == stage.batch_dependent
    signature = row.split("|")[-3].strip()
    # OpenVINO IR has no names for free dimensions, which is no change that a stage declares.
    assert name == "convert.openvino" or (not signature.startswith("stays")) == stage.changes_signature
