"""The graph as a picture and in a terminal."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from registry.report.pipeline import PipelineView, StepView, render_pipeline, save_picture


def view() -> PipelineView:
    def step(name: str, layer: int, **more) -> StepView:
        known = {
            "variant": "fp32",
            "limit_rps": 120.0,
            "utilisation": 0.5,
            "sojourn_ms": 4.0,
            "slack_ms": 0.0,
            "decides": 1.0,
        }
        return StepView(name=name, layer=layer, **{**known, **more})

    return PipelineView(
        name="p$1",
        steps=(
            step("a$x", 0),
            step("b", 1, limit_rps=60.0, utilisation=0.9, variant="i\x1b[8mnt8"),
            step("drift", 1, limit_rps=math.inf, slack_ms=math.inf, decides=0.0),
        ),
        edges=(("a$x", "b"), ("a$x", "drift")),
        throughput_path=("a$x", "b"),
        latency_path=("a$x", "b"),
        bottleneck="b",
        saturation_rps=60.0,
        rate_rps=54.0,
        latency_ms={"p50": 9.0, "p99": 31.0},
        notes=("no Kafka",),
    )


def test_the_picture_holds_every_step_and_is_the_same_each_time(tmp_path: Path):
    for name in ("one.svg", "two.svg"):
        save_picture(view(), tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for word in ("a$x", "b", "drift", "busy 90%", "slack any", "p99 is 31 ms"):
        assert word in text
    save_picture(view(), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_tells_the_same(width: int):
    out = io.StringIO()
    render_pipeline(view(), Console(file=out, width=width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "* b" in text
    assert "saturates at 60 requests a second, at b" in " ".join(text.split())
    assert "Note: no Kafka." in text
    # A variant's name comes from a file, and says nothing to the terminal.
    assert "\x1b" not in text
