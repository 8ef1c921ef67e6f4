"""The null server, and what the generator's ceiling does to a window near to it."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from profiles.load.ceiling import FILE, Ceilings, null_server
from profiles.load.engine import LoadGenerator
from profiles.load.null_server import GRPC_REPLY
from profiles.load.payloads import decode_outputs, encode_payloads
from profiles.testing import FakeV2Server
from registry.records import ClosedLoop, LoadProfile, RunRecord, Target
from tests.doubles.busy import undisturbed

X = {"x": np.ones((64, 16), "f4")}
LARGE = {"x": np.ones((2, 40_000), "f4")}


def window(duration_s: float = 0.2) -> LoadProfile:
    return LoadProfile(name="test", load=ClosedLoop(concurrency=4), warmup_s=0.0, duration_s=duration_s)


def test_the_null_server_answers_both_protocols_and_any_size(tmp_path: Path) -> None:
    with null_server([min(os.sched_getaffinity(0))]) as ports, LoadGenerator(None, tmp_path) as generator:
        for inputs in (X, LARGE):
            for protocol in ("rest", "grpc"):
                target = null(ports, protocol)
                payloads = encode_payloads(inputs, target=target)
                offer = partial(generator.run, target, payloads, window(), raw_path=tmp_path / "w.npz")
                record = undisturbed(offer, lambda record: record.ok > 10)
                assert record.errors == {}
                assert record.ok > 10


def null(ports: dict[str, str], protocol: Literal["rest", "grpc"]) -> Target:
    return Target(url=ports[protocol], protocol=protocol, model="null", binary=protocol == "rest")


def test_its_reply_is_one_of_v2() -> None:
    target = Target(url="127.0.0.1:1", protocol="grpc", model="null")
    assert decode_outputs(GRPC_REPLY, {}, target)["y"].tolist() == [0.0]


def test_the_ceiling_is_measured_once_and_gates_what_is_near_to_it(tmp_path: Path) -> None:
    with FakeV2Server() as server:
        target = server.target("grpc")
        payloads = encode_payloads(X, target=target)

        def measured() -> tuple[str, dict[str, Any], float]:
            (tmp_path / FILE).unlink(missing_ok=True)
            ceilings = Ceilings(tmp_path, (), "this host")
            with LoadGenerator(None, tmp_path / "own", ceiling=ceilings) as generator:
                free = generator.run(target, payloads, window(), raw_path=tmp_path / "w.npz")
            ((key, found),) = json.loads((tmp_path / FILE).read_text(encoding="utf-8")).items()
            return key, found, free.metrics["throughput_rps"]

        # The fake server computes and shares its CPU with this test, the null server does neither.
        key, found, free_rps = undisturbed(measured, lambda seen: seen[1]["rate_rps"] > seen[2])
        assert found["rate_rps"] > free_rps
        # The next one believes what is remembered, here that this client can do anything.
        (tmp_path / FILE).write_text(json.dumps({key: {**found, "rate_rps": 1e9}}), encoding="utf-8")
        with LoadGenerator(None, tmp_path / "other", ceiling=Ceilings(tmp_path, (), "this host")) as strong:
            record = strong.run(target, payloads, window(), raw_path=tmp_path / "w.npz")
    assert not [finding for finding in record.findings if finding.gate == "ceiling"]
    assert [*json.loads((tmp_path / FILE).read_text(encoding="utf-8")).values()] == [{**found, "rate_rps": 1e9}]


def test_a_ceiling_of_a_busy_machine_is_measured_again_where_it_makes_a_window_invalid(tmp_path: Path) -> None:
    ceilings = Ceilings(tmp_path, (), "this host")
    with FakeV2Server() as server, LoadGenerator(None, tmp_path / "own", ceiling=ceilings) as generator:
        target = server.target("grpc")
        payloads = encode_payloads(X, target=target)
        generator.run(target, payloads, window(), raw_path=tmp_path / "w.npz")
        (key,) = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))

        def measured_again() -> tuple[dict[str, Any], RunRecord]:
            low = {key: {"rate_rps": 1.0, "date": "2000-01-01"}}
            (tmp_path / FILE).write_text(json.dumps(low), encoding="utf-8")
            with LoadGenerator(None, tmp_path / "other", ceiling=Ceilings(tmp_path, (), "this host")) as other:
                record = other.run(target, payloads, window(), raw_path=tmp_path / "w.npz")
            return json.loads((tmp_path / FILE).read_text(encoding="utf-8"))[key], record

        # In a window without an answer nothing speaks against the low one.
        kept, record = undisturbed(
            measured_again, lambda seen: seen[0]["rate_rps"] > seen[1].metrics["throughput_rps"] > 1.0
        )
    assert kept["rate_rps"] > record.metrics["throughput_rps"] > 1.0
    assert kept["date"] > "2000-01-01"
    assert not [finding for finding in record.findings if "of 1/s that the client can" in finding.observed]


def test_a_ceiling_that_stays_too_low_is_not_measured_at_each_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([1.0, 0.8])  # and then no more
    monkeypatch.setattr(Ceilings, "_measure", lambda *_: next(asked))
    with FakeV2Server() as server:
        ceilings = Ceilings(tmp_path, (), "this host")
        target = server.target("grpc")
        payloads = encode_payloads(X, target=target)
        with LoadGenerator(None, tmp_path / "own", ceiling=ceilings) as generator:
            offer = partial(generator.run, target, payloads, window(), raw_path=tmp_path / "w.npz")
            for _ in range(2):
                record = undisturbed(offer, lambda record: record.metrics["throughput_rps"] > 1.0)
                (finding,) = [finding for finding in record.findings if finding.gate == "ceiling"]
                assert "of 1/s that the client can" in finding.observed
            # A day later it would be.
            ceilings._taken_s.clear()
            assert ceilings(generator, target, payloads, doubted=True) == 1.0
    assert next(asked, None) is None


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "b"}', '{"a": 10.0}', "{"])
def test_what_is_remembered_may_be_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content, encoding="utf-8")
    assert Ceilings(tmp_path, (), "h")._known == {}
