"""What the places on the way to a model on a Core 2 add, as ``burnish bench`` asks."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from optimize import depths
from optimize.cli import main
from profiles.testing import FakeV2Server, Fixed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def way() -> Iterator[dict[str, FakeV2Server]]:
    """A server, an agent and a mesh, each slower than the one before."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(FakeV2Server(Fixed(delay_s), model=model, route=route))
            for name, delay_s, model, route in (
                ("server", 0.002, "m_1", ""), ("agent", 0.010, "m", ""), ("mesh", 0.020, "m", ":m_1:"),
            )
        }  # fmt: skip


def run(
    way: dict[str, FakeV2Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str, protocol: str = "grpc"
) -> int:
    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(0).normal(size=(8, 16)).astype("f4"))
    monkeypatch.setattr(depths, "Ceilings", lambda *_: None)
    url = {name: server.target(protocol).url for name, server in way.items()}  # type: ignore[arg-type]
    line = [url["mesh"], "--model", "m", "--samples", str(tmp_path / "samples.npz"), "--protocol", protocol]
    line += ["--header", "seldon-model=m", "--header", "authorization=secret", "--agent", url["agent"]]
    monkeypatch.setattr("sys.argv", ["burnish", "bench", *line, "--server", url["server"], *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_each_place_is_asked_by_its_own_name_for_the_model(
    way: dict[str, FakeV2Server],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    protocol: str,
) -> None:
    options = ("--duration-s", "0.4", "--runs", "1", "--json")
    assert run(way, monkeypatch, tmp_path, *options, protocol=protocol) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert [one["name"] for one in told["depths"]] == ["server", "agent", "mesh"]
    assert told["load"] == "concurrency 1"
    assert said.err.count("concurrency 1 at ") >= 3
    server, agent, mesh = (way[name].last_headers for name in ("server", "agent", "mesh"))
    assert agent["seldon-internal-model"] == "m_1"
    assert "authorization" not in server
    assert "authorization" not in agent
    assert (mesh["seldon-model"], mesh["authorization"]) == ("m", "secret")


def test_the_medians_stand_in_a_table(
    way: dict[str, FakeV2Server],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert run(way, monkeypatch, tmp_path, "--duration-s", "0.4", "--runs", "1", "--out", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("place", "server", "agent", "mesh", "adds"))
    assert {path.name for path in (tmp_path / "out").glob("*.npz")} == {
        "server-0.npz", "agent-0.npz", "mesh-0.npz",
    }  # fmt: skip
    kept = json.loads((tmp_path / "out" / depths.FILE).read_text(encoding="utf-8"))
    assert [one["name"] for one in kept["depths"]] == ["server", "agent", "mesh"]
    assert all((tmp_path / "out" / window["raw"]).is_file() for window in kept["windows"])


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--load", "slo"), 2, "--load does not go with --agent"),
        (("--concurrency", "2", "--rate", "5"), 2, "one load"),
        (("--runs", "0"), 2, "--runs is above 0"),
        (("--internal", "other_1", "--duration-s", "0.2"), 4, "other_1"),
    ],
)
def test_what_does_not_go_together(
    way: dict[str, FakeV2Server],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    assert run(way, monkeypatch, tmp_path, *options) == code
    assert said in capsys.readouterr().err
