"""When a model is run at once, and when in a thread of its own."""

import json
import subprocess
import sys

import pytest

# In a process of its own: MLServer and tritonclient.grpc both register the V2 protocol's messages.
CHECKS = """
import json
from types import SimpleNamespace
import numpy as np
from profiles.serving import runtime
from profiles.serving.session import Port

now = 0.0
runtime.time = SimpleNamespace(perf_counter=lambda: now)
port = Port(name="x", dtype=np.dtype("float32"), shape=(None,))


def is_quick(*seconds):
    def run(inputs):
        global now
        now += takes
        return inputs

    metered = runtime._Metered(SimpleNamespace(inputs=(port,), outputs=(port,), run=run), "timed", "")
    for takes in seconds:
        metered.run({"x": np.zeros(1, np.float32)})
    return metered.is_quick


quick, slow = [0.00003] * 100, [0.01] * 2
print(json.dumps({
    "never run": is_quick(),
    "0.1 ms": is_quick(0.0001),
    "1 ms": is_quick(0.001),
    "its CPU was away twice": is_quick(*quick, 0.01, *quick, 0.01),
    "slow of late": is_quick(*quick, *slow),
    "slow not long ago": is_quick(*slow, *quick),
    "slow long ago": is_quick(*slow, *quick, *quick),
}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, bool]:
    command = [sys.executable, "-c", CHECKS]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    result: dict[str, bool] = json.loads(child.stdout)
    return result


@pytest.mark.parametrize("runs", ["0.1 ms", "its CPU was away twice", "slow long ago"])
def test_a_model_of_short_runs_in_the_mean_of_late_is_run_at_once(found: dict[str, bool], runs: str):
    assert found[runs]


@pytest.mark.parametrize("runs", ["never run", "1 ms", "slow of late", "slow not long ago"])
def test_any_other_is_run_in_a_thread_of_its_own(found: dict[str, bool], runs: str):
    assert not found[runs]
