"""What is in force on a Core 2 that a scheduler is asked about."""

from typing import Any

import pytest

from profiles.deploy.core2_candidates import Mesh
from profiles.deploy.core2_messages import ExperimentState
from profiles.deploy.rollout_scheduler import SchedulerApplier


class Stated:
    """A scheduler that tells one thing of an experiment."""

    def __init__(self, state: ExperimentState | None) -> None:
        self._state = state

    def experiment(self, name: str) -> ExperimentState | None:
        return self._state


@pytest.mark.parametrize(("active", "there"), [(None, False), (False, False), (True, True)])
def test_an_experiment_that_was_stopped_is_gone_though_the_scheduler_tells_of_it(active: bool | None, there: bool):
    """Its store keeps those that were stopped; else no way back would ever be complete, nor another promotion begin."""
    told = None if active is None else ExperimentState(
        active=active, candidates_ready=True, mirror_ready=True, description=""
    )  # fmt: skip
    client: Any = Stated(told)
    applier = SchedulerApplier(client, Mesh("here:80", tls=False, hint=""), location="here")
    found = applier.read("Experiment", "digits-promotion")
    assert (found is not None, applier.exists("Experiment", "digits-promotion")) == (there, there)
