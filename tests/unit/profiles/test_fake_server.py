"""The fake server speaks V2 as tritonclient understands it, and its laws are the laws they are named after."""

import numpy as np
import pytest

from profiles.testing import Exponential, FakeV2Server, Fixed, Queue, Stall

X = np.arange(6, dtype="f4").reshape(2, 3)


def test_tritonclient_over_grpc() -> None:
    from tritonclient.grpc import InferenceServerClient, InferInput

    with FakeV2Server(model="digits") as server:
        client = InferenceServerClient(server.target("grpc").url)
        tensor = InferInput("x", [2, 3], "FP32")
        tensor.set_data_from_numpy(X)
        assert client.is_server_live()
        assert client.is_model_ready("digits")
        assert client.infer("digits", [tensor]).as_numpy("sum").tolist() == [[3.0], [12.0]]
        client.close()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:gevent")
def test_tritonclient_over_rest(binary: bool) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    with FakeV2Server(model="digits", binary=binary) as server:
        client = InferenceServerClient(server.target("rest").url)
        tensor = InferInput("x", [2, 3], "FP32")
        tensor.set_data_from_numpy(X, binary_data=binary)
        output = InferRequestedOutput("sum", binary_data=binary)
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert not client.is_model_ready("letters")
        assert client.infer("digits", [tensor], outputs=[output]).as_numpy("sum").tolist() == [[3.0], [12.0]]
        client.close()


def test_two_servers_at_once_and_one_twice_stopped() -> None:
    with FakeV2Server() as one, FakeV2Server() as other:
        assert one.target("grpc").url != other.target("grpc").url
        one.stop()


def test_laws() -> None:
    assert Fixed(0.5).delay_s(3.0) == 0.5
    draws = [Exponential(0.1, seed=1).delay_s(0.0)]
    law = Exponential(0.1, seed=1)
    draws += [law.delay_s(float(at)) for at in range(2000)]
    assert draws[0] == draws[1]
    assert np.mean(draws) == pytest.approx(0.1, rel=0.1)


def test_a_queue_makes_arrivals_wait_in_order() -> None:
    one = Queue(1.0)
    assert [one.delay_s(at) for at in (0.0, 0.0, 0.5, 10.0)] == [1.0, 2.0, 2.5, 1.0]
    two = Queue(1.0, workers=2)
    assert [two.delay_s(at) for at in (0.0, 0.0, 0.5, 0.5)] == [1.0, 1.0, 1.5, 1.5]


def test_a_stall_delays_what_arrives_in_it() -> None:
    law = Stall(Queue(1.0), from_s=5.0, for_s=10.0)
    assert [law.delay_s(at) for at in (0.0, 6.0, 14.0, 30.0)] == [1.0, 10.0, 3.0, 1.0]
