"""``burnish bench`` as a user runs it, against a fake server: load profiles, encodings, and an end before the end."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from profiles.measure.recorded import FILE
from profiles.testing import FakeV2Server, Fixed
from registry.records import Target

pytestmark = pytest.mark.slow

BURNISH = str(Path(sys.executable).with_name("burnish"))


@pytest.fixture(scope="module")
def server() -> Iterator[FakeV2Server]:
    with FakeV2Server(Fixed(0.004)) as server:
        yield server


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(0).normal(size=(8, 16)).astype("f4"))
    return tmp_path / "samples.npz"


def command(target: Target, samples: Path, *options: str) -> list[str]:
    return [BURNISH, "bench", target.url, "--model", "m", "--samples", str(samples), *options]


def run(target: Target, samples: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(command(target, samples, *options), check=False, capture_output=True, text=True, timeout=250)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_load_profile_of_ones_own_in_an_encoding_of_choice(server: FakeV2Server, samples: Path) -> None:
    file = samples.with_name("my.yaml")
    file.write_text("load:\n  kind: staged\n  rates_rps: [40, 80]\n  ramp_s: 0.2\nwarmup_s: 0\n", encoding="utf-8")
    pictures = samples.with_name("pictures")
    options = ("--duration-s", "1", "--runs", "1", "--encoding", "packed", "--workers", "2", "--json")
    options += ("--pictures", str(pictures))
    done = run(server.target("grpc"), samples, "--load", str(file), "--out", str(samples.with_name("out")), *options)
    found = json.loads(done.stdout)
    # A machine that is too busy leaves no window valid.
    assert done.returncode == (0 if found["valid_windows"] else 5), done.stderr
    assert found["target"]["encoding"] == "packed"
    assert found["payloads"]["distinct"] == 8
    assert [stage["offered_rps"] for stage in found["capacity"]["stages"]] == [40, 80]
    assert "run 1, 80 rps: " in done.stderr
    # There is no ladder of concurrencies to draw; a machine that is too busy for the load earns no spectrum.
    drawn = {Path(path).name for path in found["pictures"]}
    assert {"latency.png"} <= drawn <= {"latency.png", "spectrum.png"}
    assert all((pictures / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    kept = {path.name for path in samples.with_name("out").iterdir()}
    assert {FILE, "round-0-0.npz", "round-0-1.npz", "ceilings.json"} <= kept


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_was_measured_before_the_end_stays(
    server: FakeV2Server, samples: Path, number: signal.Signals, status: int
) -> None:
    out = samples.with_name("out")
    options = ("--concurrency", "2", "--duration-s", "0.5", "--runs", "100", "--out", str(out))
    with subprocess.Popen(
        command(server.target("grpc"), samples, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("run 2, "):
                break
        process.send_signal(number)
        assert process.wait(60) == status
        assert "Traceback" not in process.stderr.read()
    kept = json.loads((out / FILE).read_text(encoding="utf-8"))
    rounds = kept.get("record", kept)["rounds"]
    assert len(rounds) >= 2
    assert all((out / run["raw"]).is_file() for one in rounds for run in one["runs"])


@pytest.mark.parametrize(
    ("options", "status", "problem"),
    [
        (("--load", "stagd"), 2, "no load profile 'stagd'"),
        (("--load", "staged", "--rate", "5"), 2, "--load says what is offered"),
        (("--encoding", "jsn"), 2, "--encoding 'jsn' is not known"),
        (("--encoding", "json", "--protocol", "grpc"), 2, "is of rest, not grpc"),
        (("--workers", "0"), 2, "--workers is above 0"),
        (("--arrivals", "t.txt"), 2, "--arrivals is for --load replay"),
    ],
)
def test_options_that_do_not_fit(
    server: FakeV2Server, samples: Path, options: tuple[str, ...], status: int, problem: str
) -> None:
    done = run(server.target("grpc"), samples, *options)
    assert done.returncode == status
    assert problem in done.stderr


def test_binary_tensors_where_the_server_takes_none(samples: Path) -> None:
    with FakeV2Server(binary=False) as plain:
        done = run(plain.target("rest"), samples, "--encoding", "binary")
    assert done.returncode == 2
    assert "takes no binary tensors" in done.stderr
