"""When a model is run at once, and when in a thread of its own."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from profiles.serving import runtime
from profiles.serving.session import Port


class Timed:
    """A session whose runs take as long as they are told to, by a clock of its own."""

    inputs = (Port(name="x", dtype=np.dtype("float32"), shape=(None,)),)
    outputs = (Port(name="y", dtype=np.dtype("float32"), shape=(None,)),)

    def __init__(self) -> None:
        self.now = 0.0
        self.takes = 0.0

    def run(self, inputs: Mapping[str, Any], /) -> dict[str, Any]:
        self.now += self.takes
        return {"y": inputs["x"]}


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Timed:
    timed = Timed()
    monkeypatch.setattr(runtime, "time", SimpleNamespace(perf_counter=lambda: timed.now))
    return timed


def after(session: Timed, *seconds: float) -> bool:
    """Whether the model counts as quick after runs of these lengths."""
    metered = runtime._Metered(session, "timed", "")
    for session.takes in seconds:
        metered.run({"x": np.zeros(1, np.float32)})
    return metered.is_quick


def test_a_model_is_quick_by_what_its_runs_take_in_the_mean(session: Timed):
    assert not after(session)
    assert after(session, 0.0001)
    assert not after(session, 0.001)


def test_a_quick_model_that_waited_for_its_cpu_now_and_then_stays_quick(session: Timed):
    quick = [0.00003] * 100
    assert after(session, *quick, 0.01, *quick, 0.01)


def test_a_model_that_has_become_slow_is_found_out_by_its_second_run_and_one_that_has_become_quick_later(
    session: Timed,
):
    quick, slow = [0.00003] * 100, [0.01] * 2
    assert not after(session, *quick, *slow)
    assert not after(session, *slow, *quick)
    assert after(session, *slow, *quick, *quick)
