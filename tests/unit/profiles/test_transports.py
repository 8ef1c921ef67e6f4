import asyncio
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from profiles.load.payloads import encode_payloads
from profiles.load.transports import Reply, Status, make_transport
from profiles.testing import FakeV2Server, TransportContract
from registry.errors import UnreachableError
from registry.records import Target
from tests.doubles.busy import LONG_S


class TestGrpc(TransportContract):
    protocol: Literal["grpc", "rest"] = "grpc"


class TestRest(TransportContract):
    protocol: Literal["grpc", "rest"] = "rest"


def ask(target: Target) -> Reply:
    async def one() -> Reply:
        transport = make_transport(target, connections=1)
        try:
            await transport.open(LONG_S)
            return await transport.infer(encode_payloads({"x": np.ones((1, 3), "f4")}, target=target)[0], LONG_S)
        finally:
            await transport.close()

    return asyncio.run(one())


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_unknown_model_is_named_in_the_servers_words(protocol: Literal["grpc", "rest"]) -> None:
    with FakeV2Server() as server:
        reply = ask(replace(server.target(protocol), model="other"))
    assert reply.status == Status.STATUS
    assert "unknown model 'other'" in reply.message


def test_tls_is_not_given_up_for_a_plain_server() -> None:
    with FakeV2Server() as server:
        with pytest.raises(UnreachableError, match="TLS"):
            ask(replace(server.target("grpc"), tls=True))
        assert ask(replace(server.target("rest"), tls=True)).status == Status.CONNECTION


def test_large_messages_pass() -> None:
    async def one(target: Target) -> Reply:
        transport = make_transport(target, connections=1)
        try:
            await transport.open(LONG_S)
            payload = encode_payloads({"x": np.ones((1, 3_000_000), "f4")}, target=target)[0]
            return await transport.infer(payload, LONG_S)
        finally:
            await transport.close()

    with FakeV2Server() as server:
        for protocol in ("grpc", "rest"):
            assert asyncio.run(one(server.target(protocol))).status == Status.OK


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_headers_of_the_target_travel(protocol: Literal["grpc", "rest"]) -> None:
    with FakeV2Server() as server:
        ask(replace(server.target(protocol), headers={"Seldon-Model": "m.experiment"}))
        assert server.last_headers["seldon-model"] == "m.experiment"
