"""What ``burnish check`` says of what it found."""

from typing import Any

import pytest

from optimize.checking import lines

TOLD: dict[str, Any] = {
    "target": {"url": "host:1", "protocol": "grpc", "model": "m"}, "against": "m.onnx", "requests": 8, "rows": 8,
    "failed": 0, "wrong": 0, "swapped": [], "told_apart": 8, "worst": 0.0, "passed": True, "reason": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "passed: each request got its own answer"),
        ({"told_apart": 0}, "passed, as far as can be told: answers are too much alike"),
        ({"passed": False, "reason": "it is broken"}, "FAILED: it is broken"),
    ],
)
def test_no_more_is_said_than_was_seen(found: dict[str, Any], said: str) -> None:
    assert lines({**TOLD, **found})[-1].startswith(said)
