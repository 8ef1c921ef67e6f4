"""The load generator against a fake server; what is asserted of time is only what no busy machine can upset."""

import datetime
import hashlib
import ipaddress
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest

from profiles.deploy.cluster import Usage
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Payload, encode_payloads, expected_answers
from profiles.load.recording import load_arrays
from profiles.testing import FakeV2Server, Fixed, Law, Queue, RudeServer
from registry.errors import GeneratorLostError, ServerDiedError, StorageError, UnreachableError
from registry.records import ClosedLoop, LoadProfile, OpenLoop, RunRecord, Target
from tests.doubles.busy import LONG_S, undisturbed

Protocol = Literal["grpc", "rest"]
X = np.random.default_rng(0).normal(size=(64, 16)).astype("f4")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadGenerator]:
    with LoadGenerator(None, tmp_path_factory.mktemp("generator")) as generator:
        yield generator


def profile(load: ClosedLoop | OpenLoop, duration_s: float = 0.4, **more: Any) -> LoadProfile:
    return LoadProfile(**{"name": "test", "load": load, "warmup_s": 0.1, "duration_s": duration_s, **more})


def payloads_for(target: Target) -> tuple[Payload, ...]:
    return encode_payloads({"x": X}, target=target)


def run(generator: LoadGenerator, server: FakeV2Server, wanted: LoadProfile, tmp_path: Path, **more: Any) -> RunRecord:
    target = server.target(more.pop("protocol", "grpc"))
    return generator.run(target, payloads_for(target), wanted, raw_path=tmp_path / "raw" / "w.npz", **more)


def gates(record: RunRecord) -> set[str]:
    return {finding.gate for finding in record.findings}


def enough(requests: int) -> Callable[[RunRecord], bool]:
    """Whether a closed loop came to so many: how many it sends is the machine's affair."""
    return lambda record: record.scheduled >= requests


@dataclass(slots=True)
class Freeze:
    """Another law, frozen once, from the so many-th arrival on: wherever that falls, it lies in the window."""

    law: Law
    at: int
    for_s: float
    _came: int = 0
    _until_s: float = field(default=0.0)

    def delay_s(self, at_s: float) -> float:
        """As the law has it, after the freeze."""
        self._came += 1
        if self._came == self.at:
            self._until_s = at_s + self.for_s
        start_s = max(at_s, self._until_s)
        return start_s - at_s + self.law.delay_s(start_s)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_closed_loop_counts_what_comes_back(generator: LoadGenerator, tmp_path: Path, protocol: Protocol) -> None:
    wanted = profile(ClosedLoop(concurrency=4))
    with FakeV2Server(Fixed(0.02)) as server:
        record = undisturbed(lambda: run(generator, server, wanted, tmp_path, protocol=protocol), enough(30))
        assert server.asked >= record.scheduled
    assert record.errors == {}
    assert record.ok == record.scheduled
    # Four in flight, 20 ms each: at most 200 a second, on a busy machine less.
    assert 0 < record.metrics["throughput_rps"] < 205
    assert record.metrics["service_p50_ms"] >= 20
    # The window may end in the instant between an answer and the request that follows it.
    assert record.metrics["in_flight_end"] in {3, 4}
    assert "in_flight" not in gates(record)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_open_loop_sends_what_is_scheduled(generator: LoadGenerator, tmp_path: Path, protocol: Protocol) -> None:
    with FakeV2Server(Fixed(0.005)) as server:
        record = run(generator, server, profile(OpenLoop(rate_rps=200)), tmp_path, protocol=protocol)
    assert abs(record.scheduled - 80) < 5 * np.sqrt(80)
    assert record.ok == record.scheduled
    assert record.metrics["latency_p50_ms"] >= 5
    assert not gates(record) & {"errors", "offered", "in_flight", "mismatch"}


def test_raw_arrays_are_kept_whole(generator: LoadGenerator, tmp_path: Path) -> None:
    with FakeV2Server(Fixed(0.005)) as server:
        record = run(
            generator, server, profile(OpenLoop(rate_rps=200, arrivals="constant")), tmp_path, raw_root=tmp_path
        )
    assert record.raw == "raw/w.npz"
    arrays = load_arrays(tmp_path / record.raw, record.raw_sha256)
    assert record.raw_sha256 == hashlib.sha256((tmp_path / record.raw).read_bytes()).hexdigest()
    assert set(arrays) == {"intended_ns", "sent_ns", "done_ns", "status", "payload"}
    assert len(arrays["intended_ns"]) == record.scheduled == 80
    assert arrays["status"].dtype == np.int8
    assert (arrays["sent_ns"] >= arrays["intended_ns"]).all()
    assert (arrays["done_ns"] - arrays["sent_ns"] >= 5_000_000).all()
    assert set(np.diff(arrays["intended_ns"])) == {5_000_000}
    assert len(set(arrays["payload"][:32])) == 32
    assert list((tmp_path / "raw").iterdir()) == [tmp_path / "raw" / "w.npz"]


def test_a_stall_shows_in_full_from_the_intended_time(generator: LoadGenerator, tmp_path: Path) -> None:
    with FakeV2Server(Freeze(Queue(0.002), at=50, for_s=0.5)) as server:
        record = run(generator, server, profile(OpenLoop(rate_rps=100), duration_s=1.2), tmp_path)
    # A fifth or more of the arrivals fall into the freeze and wait up to 0.5 s.
    assert record.metrics["latency_p90_ms"] > 200
    assert record.metrics["latency_max_ms"] > 400
    assert record.scheduled > 80


def test_a_closed_loop_hides_the_same_stall(generator: LoadGenerator, tmp_path: Path) -> None:
    # The first is asked before the window, which has no warm-up.
    wanted = profile(ClosedLoop(concurrency=1), duration_s=1.0, warmup_s=0.0)

    def frozen() -> RunRecord:
        with FakeV2Server(Freeze(Queue(0.002), at=20, for_s=0.4)) as server:
            return run(generator, server, wanted, tmp_path)

    record = undisturbed(frozen, enough(40))
    assert record.metrics["latency_max_ms"] > 300
    assert record.metrics["latency_p50_ms"] < 100


def test_overload_drops_and_ends_in_bounded_time(generator: LoadGenerator, tmp_path: Path) -> None:
    overload = profile(OpenLoop(rate_rps=400), duration_s=0.6, timeout_s=0.3, max_in_flight=20)
    began = time.monotonic()
    with FakeV2Server(Queue(0.01)) as server:
        record = run(generator, server, overload, tmp_path)
    assert time.monotonic() - began < LONG_S
    assert record.errors["dropped"] > 20
    assert {"errors", "offered"} <= gates(record)
    # A dropped request is a miss: nobody knows what its latency would have been.
    assert not {"latency_max_ms", "latency_p90_ms"} & set(record.metrics)
    assert record.ok + sum(record.errors.values()) == record.scheduled


def test_late_answers_are_timeouts(generator: LoadGenerator, tmp_path: Path) -> None:
    late = profile(OpenLoop(rate_rps=100), timeout_s=0.2)

    def asked_in_vain() -> RunRecord:
        with FakeV2Server(Freeze(Fixed(0.001), at=20, for_s=60.0)) as server:
            return run(generator, server, late, tmp_path)

    # What a client that stood still is too late for, it does not send.
    record = undisturbed(asked_in_vain, lambda record: record.errors.get("timeout", 0) >= 5)
    assert record.errors["timeout"] >= 5
    assert not record.valid


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_errors_of_the_server_are_counted(generator: LoadGenerator, tmp_path: Path, protocol: Protocol) -> None:
    wanted = profile(ClosedLoop(concurrency=2))
    with FakeV2Server(Fixed(0.002), fail_every=10) as server:
        record = undisturbed(lambda: run(generator, server, wanted, tmp_path, protocol=protocol), enough(40))
    assert record.errors["status"] == pytest.approx(record.scheduled / 10, abs=2)
    assert "errors" in gates(record)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_wrong_answers_are_found_under_load(generator: LoadGenerator, tmp_path: Path, protocol: Protocol) -> None:
    sums, wanted = {"sum": X.sum(axis=1, keepdims=True)}, profile(ClosedLoop(concurrency=2))
    with FakeV2Server(Fixed(0.002)) as right, FakeV2Server(Fixed(0.0), wrong_every=2) as wrong:
        for server, is_wrong in ((right, False), (wrong, True)):
            expected = expected_answers(payloads_for(server.target(protocol)), sums)
            how = {"protocol": protocol, "expected": expected}
            record = undisturbed(
                lambda server=server, how=how: run(generator, server, wanted, tmp_path, **how), enough(20)
            )
            assert ("mismatch" in gates(record)) == is_wrong
            assert ("mismatch" in record.errors) == is_wrong


def test_usage_is_read_at_both_ends(generator: LoadGenerator, tmp_path: Path) -> None:
    readings = itertools.cycle([Usage(cpu_s=10.0, rss_mb=50.0), Usage(cpu_s=10.5, rss_mb=60.0)])
    wanted = profile(OpenLoop(rate_rps=100))
    with FakeV2Server(Fixed(0.01)) as server:
        record = undisturbed(
            lambda: run(generator, server, wanted, tmp_path, usage=lambda: next(readings)),
            lambda record: record.metrics["throughput_rps"],
        )
    assert record.metrics["rss_mb"] == 60
    answered = record.metrics["throughput_rps"] * record.window_s
    assert record.metrics["cpu_s_per_1k"] == pytest.approx(500 / answered)


def test_usage_that_nobody_knows_is_left_out(generator: LoadGenerator, tmp_path: Path) -> None:
    with FakeV2Server(Fixed(0.01)) as server:
        record = run(generator, server, profile(OpenLoop(rate_rps=100)), tmp_path, usage=lambda: None)
    assert record.ok > 0
    assert not {"rss_mb", "cpu_s_per_1k"} & set(record.metrics)


def test_a_window_lasts_to_its_end_when_answers_come_before(generator: LoadGenerator, tmp_path: Path) -> None:
    readings = itertools.cycle([Usage(cpu_s=1.0, rss_mb=50.0), Usage(cpu_s=1.5, rss_mb=60.0)])
    sparse = profile(OpenLoop(rate_rps=5, arrivals="constant"), warmup_s=0.0)
    with FakeV2Server(Fixed(0.001)) as server:
        record = undisturbed(
            lambda: run(generator, server, sparse, tmp_path, usage=lambda: next(readings)),
            lambda record: record.metrics["throughput_rps"] == 5,
        )
    assert record.metrics["cpu_s_per_1k"] == pytest.approx(250)
    assert record.metrics["client_cpu"] > 0


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_the_first_failure_speaks_in_the_servers_words(
    generator: LoadGenerator, tmp_path: Path, protocol: Protocol
) -> None:
    with FakeV2Server(model="m") as server:
        target = replace(server.target(protocol), model="elsewhere")
        with pytest.raises(UnreachableError, match="unknown model 'elsewhere'"):
            generator.run(target, payloads_for(target), profile(ClosedLoop(concurrency=1)), raw_path=tmp_path / "w.npz")
    assert not (tmp_path / "w.npz").exists()


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_nobody_there(generator: LoadGenerator, tmp_path: Path, protocol: Protocol) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody else can listen there meanwhile
        target = Target(url=f"127.0.0.1:{silent.getsockname()[1]}", protocol=protocol, model="m")
        with pytest.raises(UnreachableError, match=target.url):
            generator.run(target, payloads_for(target), profile(ClosedLoop(concurrency=1)), raw_path=tmp_path / "w.npz")


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_server_that_goes_away_ends_the_window(generator: LoadGenerator, tmp_path: Path, protocol: Protocol) -> None:
    def usage() -> Usage:
        server.stop()
        return Usage(cpu_s=0.0, rss_mb=0.0)

    began = time.monotonic()
    with FakeV2Server(Fixed(0.005)) as server:
        long = profile(ClosedLoop(concurrency=4), duration_s=200.0)
        with pytest.raises(UnreachableError, match="stopped answering"):
            run(generator, server, long, tmp_path, protocol=protocol, usage=usage)
    assert time.monotonic() - began < 150


def test_a_dead_server_is_named_by_who_knows(generator: LoadGenerator, tmp_path: Path) -> None:
    def usage() -> Usage:
        raise ServerDiedError("the server ended with signal 9")

    with FakeV2Server(Fixed(0.005)) as server, pytest.raises(ServerDiedError, match="signal 9"):
        run(generator, server, profile(ClosedLoop(concurrency=1)), tmp_path, usage=usage)


@pytest.mark.parametrize("kills", [1, 2])
def test_a_lost_generator_is_replaced_once(tmp_path: Path, kills: int) -> None:
    killed: list[int] = []

    with FakeV2Server(Fixed(0.005)) as server, LoadGenerator(None, tmp_path / "own") as generator:

        def kill() -> Usage:
            (child,) = generator.pids
            if len(killed) < kills and child not in killed:
                killed.append(child)
                os.kill(child, signal.SIGKILL)
            return Usage(cpu_s=0.0, rss_mb=0.0)

        window = profile(OpenLoop(rate_rps=100, arrivals="constant"))
        if kills == 1:
            assert run(generator, server, window, tmp_path, usage=kill).ok > 0
        else:
            with pytest.raises(GeneratorLostError, match="ended unasked"):
                run(generator, server, window, tmp_path, usage=kill)
            assert run(generator, server, window, tmp_path).ok > 0
    assert len(killed) == kills


def test_a_folder_that_cannot_be_written_is_no_fault_of_the_server(generator: LoadGenerator, tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("in the way of a folder", encoding="utf-8")
    with FakeV2Server(Fixed(0.005)) as server, pytest.raises(StorageError, match="could not be written"):
        run(generator, server, profile(ClosedLoop(concurrency=1), duration_s=0.1), tmp_path)


def test_no_process_is_left(tmp_path: Path) -> None:
    with FakeV2Server() as server, LoadGenerator([min(os.sched_getaffinity(0))], tmp_path) as generator:
        run(generator, server, profile(ClosedLoop(concurrency=1), duration_s=0.1), tmp_path)
        child = psutil.Process(*generator.pids)
        assert child.cpu_affinity() == [min(os.sched_getaffinity(0))]
    assert not child.is_running()


def test_the_process_ends_with_the_pipe_to_it(tmp_path: Path) -> None:
    with LoadGenerator(None, tmp_path) as generator:
        process = generator._workers[0].start()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=LONG_S) == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """PEM files of a certificate for 127.0.0.1 that signs itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_tls_is_verified(
    generator: LoadGenerator,
    tmp_path: Path,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    protocol: Protocol,
) -> None:
    window = profile(OpenLoop(rate_rps=100, arrivals="constant"))
    with FakeV2Server(tls=certificate) as server:
        with pytest.raises(UnreachableError):
            run(generator, server, window, tmp_path, protocol=protocol)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(certificate[0]))
        with LoadGenerator(None, tmp_path / "trusting") as trusting:
            assert run(trusting, server, window, tmp_path, protocol=protocol).ok > 0


@pytest.mark.parametrize("load", [OpenLoop(rate_rps=200, arrivals="constant"), ClosedLoop(concurrency=3)])
def test_two_processes_offer_one_load(tmp_path: Path, load: ClosedLoop | OpenLoop) -> None:
    sums = {"sum": X.sum(axis=1, keepdims=True)}
    core = [min(os.sched_getaffinity(0))]
    with FakeV2Server(Fixed(0.01)) as server, LoadGenerator(core, tmp_path / "own", workers=2) as generator:
        expected = expected_answers(payloads_for(server.target("grpc")), sums)
        record = undisturbed(
            lambda: run(generator, server, profile(load), tmp_path, expected=expected, raw_root=tmp_path), enough(21)
        )
        assert len(generator.pids) == 2
        assert all(psutil.Process(pid).cpu_affinity() == core for pid in generator.pids)
    arrays = load_arrays(tmp_path / record.raw, record.raw_sha256)
    assert record.ok == record.scheduled == len(arrays["status"]) > 20
    assert (np.diff(arrays["intended_ns"]) >= 0).all()
    assert not gates(record) & {"errors", "mismatch", "in_flight", "offered"}
    if isinstance(load, OpenLoop):
        assert record.scheduled == 80
        assert set(np.diff(arrays["intended_ns"])) == {5_000_000}
    else:
        # The window may end in that instant in both processes, as they have one core.
        assert record.metrics["in_flight_end"] in {1, 2, 3}
        assert record.metrics["throughput_rps"] < 305
    assert not list((tmp_path / "own").glob("lane-*"))


def test_a_lost_process_of_two_is_replaced(tmp_path: Path) -> None:
    killed: list[int] = []
    with FakeV2Server(Fixed(0.005)) as server, LoadGenerator(None, tmp_path / "own", workers=2) as generator:

        def kill() -> Usage:
            if not killed:
                killed.append(generator.pids[1])
                os.kill(killed[0], signal.SIGKILL)
            return Usage(cpu_s=0.0, rss_mb=0.0)

        window = profile(OpenLoop(rate_rps=100, arrivals="constant"))
        assert run(generator, server, window, tmp_path, usage=kill).ok > 0
        assert killed[0] not in generator.pids


@pytest.mark.parametrize(
    ("before", "after"), [({"instance": "pod 1"}, {"instance": "pod 2"}), ({"pids": (7, 8)}, {"pids": (7, 9)})]
)
def test_a_server_that_was_restarted_in_the_window_makes_it_invalid(
    generator: LoadGenerator, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    readings = iter([Usage(cpu_s=1.0, rss_mb=50.0, **before), Usage(cpu_s=0.1, rss_mb=60.0, **after)])
    with FakeV2Server(Fixed(0.005)) as server:
        record = run(generator, server, profile(ClosedLoop(concurrency=1)), tmp_path, usage=lambda: next(readings))
    assert "restarted" in gates(record)


def test_packed_tensors_travel(generator: LoadGenerator, tmp_path: Path) -> None:
    with FakeV2Server(Fixed(0.002)) as server:
        target = replace(server.target("grpc"), packed=True)
        expected = expected_answers(payloads_for(target), {"sum": X.sum(axis=1, keepdims=True)})
        window = profile(ClosedLoop(concurrency=2))
        record = undisturbed(
            lambda: generator.run(target, payloads_for(target), window, raw_path=tmp_path / "w.npz", expected=expected),
            enough(11),
        )
    assert record.ok == record.scheduled > 10
    assert "mismatch" not in gates(record)


# --- servers that do not behave ----------------------------------------------------------------------------------


def rude(generator: LoadGenerator, server: RudeServer, wanted: LoadProfile, tmp_path: Path) -> RunRecord:
    target = server.target
    return generator.run(target, payloads_for(target), wanted, raw_path=tmp_path / "w.npz")


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_rubbish_that_comes_at_once_is_no_answer(generator: LoadGenerator, tmp_path: Path, protocol: Protocol) -> None:
    with RudeServer("rubbish", protocol=protocol) as server:
        record = undisturbed(lambda: rude(generator, server, profile(ClosedLoop(concurrency=2)), tmp_path), enough(20))
    assert record.errors["mismatch"] > 0
    assert "mismatch" in gates(record)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_an_answer_that_never_ends_is_a_miss(generator: LoadGenerator, tmp_path: Path, protocol: Protocol) -> None:
    slow = profile(OpenLoop(rate_rps=50, arrivals="constant"), timeout_s=0.3)

    def dripped_on() -> RunRecord:
        with RudeServer("drip", good=10, protocol=protocol) as server:
            return rude(generator, server, slow, tmp_path)

    began = time.monotonic()
    # What a client that stood still is too late for, it does not send.
    record = undisturbed(dripped_on, lambda record: record.errors.get("timeout", 0) > 5)
    assert time.monotonic() - began < LONG_S
    assert record.errors["timeout"] > 5
    assert "errors" in gates(record)
    assert "latency_max_ms" not in record.metrics


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_connections_that_break_off_are_counted(generator: LoadGenerator, tmp_path: Path, protocol: Protocol) -> None:
    with RudeServer("reset", good=10, protocol=protocol) as server:
        record = rude(generator, server, profile(OpenLoop(rate_rps=50, arrivals="constant")), tmp_path)
    assert record.errors["connection"] > 5
    assert "errors" in gates(record)


def test_a_server_that_never_answers_well_is_named(generator: LoadGenerator, tmp_path: Path) -> None:
    with RudeServer("reset") as server, pytest.raises(UnreachableError, match=server.target.url):
        generator.run(
            server.target,
            payloads_for(server.target),
            profile(ClosedLoop(concurrency=1), timeout_s=0.2),
            raw_path=tmp_path / "w.npz",
        )


def test_a_wrong_tensor_speaks_in_the_servers_words(generator: LoadGenerator, tmp_path: Path) -> None:
    with FakeV2Server(binary=False) as server:
        target = replace(server.target("rest"), binary=True)
        with pytest.raises(UnreachableError, match="HTTP 400: binary tensors are not supported"):
            generator.run(target, payloads_for(target), profile(ClosedLoop(concurrency=1)), raw_path=tmp_path / "w.npz")


def test_a_client_too_weak_for_the_rate_says_so(generator: LoadGenerator, tmp_path: Path) -> None:
    with FakeV2Server(Fixed(0.0)) as server:
        load = OpenLoop(rate_rps=100_000, arrivals="constant")
        window = profile(load, duration_s=0.2, warmup_s=0.0, timeout_s=1.0, max_in_flight=100_000)
        # A client that stood still for the whole of it has sent nothing that could be late.
        record = undisturbed(lambda: run(generator, server, window, tmp_path), lambda record: record.ok)
    assert gates(record) & {"client_cpu", "lateness"}
    assert not record.valid


def test_what_the_client_is_too_late_for_is_dropped(generator: LoadGenerator, tmp_path: Path) -> None:
    with FakeV2Server(Fixed(0.0)) as server:
        load = OpenLoop(rate_rps=500_000, arrivals="constant")
        window = profile(load, duration_s=0.3, warmup_s=0.0, timeout_s=0.1, max_in_flight=1_000_000)
        record = run(generator, server, window, tmp_path)
    assert record.scheduled == 150_000
    assert record.errors["dropped"] > 0
    assert "offered" in gates(record)
