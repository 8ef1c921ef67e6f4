"""Our service times beside perf_analyzer's on the same Triton; only where it is asked for, as it downloads it.

``BURNISH_TEST_AGREEMENT=1 pytest tests/integration/profiles/test_agreement.py`` on a machine that does nothing else.
"""

import os
import sys
from pathlib import Path

import pytest

from profiles.load.engine import LoadGenerator
from profiles.measure.host import split_cpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif("BURNISH_TEST_AGREEMENT" not in os.environ, reason="BURNISH_TEST_AGREEMENT is not set"),
]

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_the_median_service_time_is_perf_analyzers(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import load_generator

    monkeypatch.setattr(load_generator, "ROUNDS", 3)
    servers, clients, _ = split_cpus()
    with LoadGenerator(clients, tmp_path / "generator") as generator:
        found = load_generator.beside_perf_analyzer(
            generator, protocol, tmp_path, {"server": servers, "client": clients}
        )
    # The median within 5 % or perf_analyzer's own spread, the p99, and the CPU a request.
    assert found[0]
