"""What ``burnish bench MESH --agent ... --server ...`` keeps where something ends it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize import depths
from optimize.depths import FILE, bench_depths
from registry.records import RunRecord
from tests.doubles.loads import StatedGenerator


class Ending(StatedGenerator):
    """Is ended by Ctrl-C in its third window."""

    def run(self, *given: Any, **named: Any) -> RunRecord:
        if len(self.windows) == 2:
            raise KeyboardInterrupt
        return super().run(*given, **named)


def test_what_was_measured_before_the_end_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Ending({"m": 100.0, "m_1": 120.0})
    monkeypatch.setattr(depths, "LoadGenerator", lambda *_, **__: generator)
    np.savez(tmp_path / "samples.npz", x=np.ones((4, 2), dtype=np.float32))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bench_depths(
            "127.0.0.1:1", model="m", samples=tmp_path / "samples.npz", agent=None, server="127.0.0.1:2",
            internal=None, out=out,
        )  # fmt: skip
    kept = json.loads((out / FILE).read_text(encoding="utf-8"))
    assert {window["load"]["name"] for window in kept["windows"]} == {
        "concurrency 1 at server",
        "concurrency 1 at mesh",
    }
    assert all((out / window["raw"]).is_file() for window in kept["windows"])
    assert kept["depths"] == []
