"""What ``burnish bench`` says of what it found."""

from typing import Any

import pytest

from optimize import benching
from optimize.cli import main

GATE = {"gate": "errors", "observed": "3 of 9 failed", "limit": "0.1%"}
FIELDS = {"value": 205.0, "low": 205.0, "high": 205.0, "runs": 1, "method": "exact", "unit": "MB"}
PEAK = {"candidate_id": "bench", "load": None, "metrics": {"peak_rss_mb": FIELDS}, "invalid_runs": 0}


@pytest.mark.parametrize(("valid", "code"), [(0, 5), (1, 0)])
def test_not_one_valid_window_is_no_success(monkeypatch: Any, capsys: Any, valid: int, code: int) -> None:
    found = {
        "payloads": {"distinct": 32},
        "slo": None,
        "capacity": None,
        "pictures": [],
        "measurements": [PEAK],
        "valid_windows": valid,
        "invalid": [{"load": "concurrency 2", "round": 0, "findings": [GATE]}],
    }
    monkeypatch.setattr(benching, "bench_endpoint", lambda url, **asked: found)
    monkeypatch.setattr("sys.argv", ["burnish", "bench", "host:1", "--model", "m", "--samples", "s.npz"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    said = capsys.readouterr().out
    assert "round 1: errors 3 of 9 failed" in said
    assert "all windows" in said
    assert ("Not one window is valid" in said) == (code == 5)
