"""Answers to every sample, from a server that gives each its sum."""

import numpy as np
import pytest

from profiles.measure.answers import answers_of
from profiles.testing import Exponential, FakeV2Server, Fixed
from registry.errors import UnreachableError

X = np.arange(40, dtype=np.float32).reshape(20, 2)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_each_sample_has_its_answer_in_the_samples_order(protocol) -> None:
    with FakeV2Server(Exponential(mean_s=0.002, seed=1)) as server:
        (found,) = answers_of(server.target(protocol), {"x": X}).values()
    np.testing.assert_array_equal(found.reshape(-1), X.sum(axis=1))


def test_a_sample_that_is_not_answered_is_named() -> None:
    with (
        FakeV2Server(Exponential(mean_s=0.001, seed=1), fail_every=7) as server,
        pytest.raises(UnreachableError, match=r"does not answer sample \d+"),
    ):
        answers_of(server.target("grpc"), {"x": X})


def test_a_server_that_answers_each_too_slowly_is_given_up() -> None:
    with (
        FakeV2Server(Fixed(0.2)) as server,
        pytest.raises(UnreachableError, match=r"did not answer 20 samples within 0\.3 s"),
    ):
        answers_of(server.target("grpc"), {"x": X}, limit_s=0.3)
