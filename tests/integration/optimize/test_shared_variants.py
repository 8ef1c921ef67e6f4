"""Two campaigns that share a store make a variant once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimize.testing import tiny_conv_net

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores


def make(model: Path, work: Path, store: Path | str, *variants: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "optimize", "make", str(model), "--work", str(work), "--json"]
    command += ["--out", str(work / "out"), *(word for name in variants for word in ("--variant", name))]
    environment = {**os.environ, "BURNISH_STORE": str(store)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def times_of(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_second_campaign_takes_what_the_first_made(tmp_path: Path) -> None:
    model = tmp_path / "source" / "model.onnx"
    tiny_conv_net(model.parent)
    store = tmp_path / "mount"
    first = make(model, tmp_path / "a", store, "float32", "ort-optimized")
    assert first.returncode == 0, first.stderr
    records = list((store / "records").glob("variant-*.json"))
    assert len(records) == 2  # the baseline, and what was asked for
    before = times_of(store)

    second = make(model, tmp_path / "b", store, "float32", "ort-optimized")
    assert second.returncode == 0, second.stderr
    assert times_of(store) == before
    told, again = json.loads(first.stdout)["variants"], json.loads(second.stdout)["variants"]
    assert [(one["name"], one["size_bytes"]) for one in again] == [(one["name"], one["size_bytes"]) for one in told]
    for one, other in zip(told, again, strict=True):
        assert Path(one["path"]).read_bytes() == Path(other["path"]).read_bytes()
    # The second never made it: its record says how long the first took.
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("a", "b")]
    took = [
        [line.split('"made_in_s":')[1].split(",")[0] for line in text.splitlines() if "made_in_s" in line]
        for text in ledgers
    ]
    assert took[0] == took[1]


def test_a_source_that_was_known_before_the_store_was_shared_is_put_there(tmp_path: Path) -> None:
    model = tmp_path / "source" / "model.onnx"
    tiny_conv_net(model.parent)
    assert make(model, tmp_path / "a", "", "float32").returncode == 0
    done = make(model, tmp_path / "a", tmp_path / "mount", "float32", "ort-optimized")
    assert done.returncode == 0, done.stderr
    known = {path.stem for path in (tmp_path / "a" / "artifacts").glob("*.json")}
    assert {path.stem for path in (tmp_path / "mount" / "artifacts").glob("*.json")} == known


def test_a_store_that_cannot_be_written_is_said_before_anything_is_made(tmp_path: Path) -> None:
    model = tmp_path / "source" / "model.onnx"
    tiny_conv_net(model.parent)
    (tmp_path / "file").write_text("")
    done = make(model, tmp_path / "a", tmp_path / "file" / "store", "float32", "ort-optimized")
    assert done.returncode == 4
    assert "Not a directory" in done.stdout
    assert not list((tmp_path / "a").rglob("*.onnx"))
