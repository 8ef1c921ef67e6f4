"""What ``burnish bench`` says of what it found."""

from typing import Any

import pytest

from optimize import benching, depths
from optimize.cli import main

GATE = {"gate": "errors", "observed": "3 of 9 failed", "limit": "0.1%"}
FIELDS = {"value": 205.0, "low": 205.0, "high": 205.0, "runs": 1, "method": "exact", "unit": "MB"}
PEAK = {"candidate_id": "bench", "load": None, "metrics": {"peak_rss_mb": FIELDS}, "invalid_runs": 0}


NOTHING = "Not one window is valid"


def told(monkeypatch: Any, capsys: Any, **found: Any) -> tuple[int, str]:
    """The exit code, and what people read."""
    empty = {"slo": None, "capacity": None, "measurements": [], "valid_windows": 0, "invalid": []}
    result = {"payloads": {"distinct": 32}, "pictures": [], **empty, **found}
    monkeypatch.setattr(benching, "bench_endpoint", lambda url, **asked: result)
    monkeypatch.setattr("sys.argv", ["burnish", "bench", "host:1", "--model", "m", "--samples", "s.npz"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("valid", "code"), [(0, 5), (1, 0)])
def test_not_one_valid_window_is_no_success(monkeypatch: Any, capsys: Any, valid: int, code: int) -> None:
    invalid = [{"load": "concurrency 2", "round": 0, "findings": [GATE]}]
    ended, said = told(monkeypatch, capsys, measurements=[PEAK], valid_windows=valid, invalid=invalid)
    assert ended == code
    assert "round 1: errors 3 of 9 failed" in said
    assert "all windows" in said
    assert (NOTHING in said) == (code == 5)


@pytest.mark.parametrize(
    ("stages", "why"),
    [([{"offered_rps": 9.0, "achieved_rps": 5.0, "sustained": False}], "no stage was sustained"), ([], "nothing was")],
)
def test_where_no_saturation_is_known_no_share_of_it_was_offered(
    monkeypatch: Any, capsys: Any, stages: list[Any], why: str
) -> None:
    capacity = {"saturation_rps": None, "concurrency": 1, "ladder": [[1, 9.0]], "stages": stages}
    ended, said = told(monkeypatch, capsys, capacity=capacity, advice={"lines": []})
    assert ended == 5
    assert f"Saturation: not found, as {why}" in said
    assert NOTHING in said


@pytest.mark.parametrize(("requests", "code"), [([0, 0], 5), ([0, 1000], 0), ([], 5)])
def test_a_search_of_invalid_windows_is_no_success(
    monkeypatch: Any, capsys: Any, requests: list[int], code: int
) -> None:
    slo = {"limit": "p99 <= 5 ms", "rate_rps": None, "reason": "r.", "runs": [{"requests": n} for n in requests]}
    ended, said = told(monkeypatch, capsys, slo=slo)
    assert (ended, NOTHING in said) == (code, code == 5)


def test_what_a_server_calls_itself_is_no_markup(monkeypatch: Any, capsys: Any) -> None:
    gate = {"gate": "answered_by", "observed": "answered by '[/red]', not 'm'", "limit": "one version"}
    invalid = [{"load": "replay of [/x].txt", "round": 0, "findings": [gate]}]
    measured = {**PEAK, "load": "replay of [/x].txt"}
    _, said = told(monkeypatch, capsys, measurements=[measured], valid_windows=1, invalid=invalid)
    assert said.count("replay of [/x].txt") == 2
    assert "answered by '[/red]', not 'm'" in said


@pytest.mark.parametrize(("known", "code"), [((None, None), 5), ((None, 3.0), 0)])
def test_places_of_which_none_could_be_measured_are_no_success(
    monkeypatch: Any, capsys: Any, known: tuple[float | None, ...], code: int
) -> None:
    places = [
        {"name": name, "url": "u", "added_ms": None, "invalid_runs": 8,
         "service_p50_ms": None if value is None else {**FIELDS, "value": value, "unit": "ms"}}
        for name, value in zip(("agent", "mesh"), known, strict=True)
    ]  # fmt: skip
    result = {"model": "m", "load": "concurrency 1", "rounds": 8, "depths": places}
    monkeypatch.setattr(depths, "bench_depths", lambda url, **asked: result)
    asked = ["burnish", "bench", "host:1", "--model", "m", "--samples", "s.npz", "--agent", "host:2"]
    monkeypatch.setattr("sys.argv", asked)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert "agent: 8 invalid windows were left out" in capsys.readouterr().out


def test_a_seed_below_0_is_no_bug_of_burnish(monkeypatch: Any, capsys: Any) -> None:
    asked = ["burnish", "bench", "host:1", "--model", "m", "--samples", "s.npz", "--seed", "-1"]
    for more in ([], ["--agent", "host:2"]):
        monkeypatch.setattr("sys.argv", [*asked, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert "--seed is 0 or more, not -1" in capsys.readouterr().err
