"""Live endpoints on loopback, measured in turns by the command."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.cli import main
from profiles.testing import FakeV2Server, Queue
from tests.doubles.busy import undisturbed

pytestmark = pytest.mark.slow


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["burnish", "compare", *arguments, "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    np.savez(tmp_path / "samples.npz", x=np.ones((8, 4), dtype=np.float32))
    return tmp_path / "samples.npz"


def is_drowned(pair: dict[str, Any]) -> bool:
    """Whether the second is the faster by what was seen, and chance or noise may have made it so."""
    [chosen] = [one for one in pair["comparisons"] if (one["metric"], one["load"]) == (pair["metric"], pair["load"])]
    ratio = pair["ratio"]
    doubtful = ratio["high"] is None or ratio["high"] * (1 + chosen["noise_floor"]) >= 1
    return bool(ratio["value"] < 1 and doubtful)


def test_the_faster_of_two_servers_is_found_and_kept(
    tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = itertools.count()

    def measured() -> tuple[Path, Any]:
        kept = tmp_path / f"kept-{next(numbers)}"
        with FakeV2Server(Queue(0.01), model="slow") as slow, FakeV2Server(Queue(0.002), model="fast") as fast:
            one, other = f"{slow.target('grpc').url}/slow", f"http://{fast.target('rest').url}/fast"
            asked = ["--samples", str(samples), "--concurrency", "2", "--level", "quick", "--rounds", "3"]
            assert compare(monkeypatch, one, other, *asked, "--duration-s", "0.4", "--out", str(kept)) == 0
        return kept, json.loads(capsys.readouterr().out)

    kept, told = undisturbed(measured, lambda found: found[1]["pairs"][0]["word"] == "faster", tries=2)
    [pair] = told["pairs"]
    assert told["kind"] == "live"
    # Five times as fast is seen on any machine that lets a few windows through, and beyond doubt on a calm one.
    assert pair["word"] == "faster" or any("invalid" in note for note in pair["notes"]) or is_drowned(pair)
    assert {row["what"] for row in pair["differences"]} >= {"url", "protocol", "model"}
    assert compare(monkeypatch, str(kept / "A"), str(kept / "B")) == 0
    [again] = json.loads(capsys.readouterr().out)["pairs"]
    assert again["word"] == pair["word"]


def test_an_endpoint_that_is_not_there_is_exit_4(
    samples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeV2Server(Queue(0.001)) as server:
        there = f"{server.target('grpc').url}/m"
        gone = "127.0.0.1:9/m"
        assert compare(monkeypatch, there, gone, "--samples", str(samples), "--concurrency", "1", "--rounds", "1") == 4
    assert "127.0.0.1:9" in json.loads(capsys.readouterr().out)["error"]["message"]
