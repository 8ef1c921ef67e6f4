"""Where the time goes, from counts as Triton and MLServer give them."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from profiles.deploy.cluster import Statistics
from profiles.load.payloads import encode_payloads
from profiles.load.recording import save_arrays
from profiles.load.summary import summarize
from profiles.measure.breakdown import (
    Counts,
    Total,
    WatchingGenerator,
    break_down,
    measure_depths,
    parse_mlserver,
    parse_triton,
    read_counts,
    statistics_at,
    times_over_runs,
    with_breakdown,
)
from profiles.testing import FakeV2Server, Fixed, simulate
from registry.codec import dumps, file_sha256, loads
from registry.errors import InputError
from registry.records import Breakdown, ClosedLoop, GateFinding, LoadProfile, OpenLoop, RunRecord, Target

MS = 1_000_000


def triton(
    requests: int, runs: int, *, model: str = "m", version: str = "1", queue_ms: int = 2, infer_ms: int = 6
) -> str:
    """The reply of a server that has answered so many requests of one row."""

    def stat(each_ms: int) -> dict[str, int]:
        return {"count": requests, "ns": requests * each_ms * MS}

    stats = {
        "success": stat(queue_ms + infer_ms + 3),
        "fail": {"count": 0, "ns": 0},
        "queue": stat(queue_ms),
        "compute_input": stat(1),
        "compute_infer": stat(infer_ms),
        "compute_output": stat(1),
    }
    entry = {
        "name": model,
        "version": version,
        "inference_count": requests,
        "execution_count": runs,
        "inference_stats": stats,
    }
    return json.dumps({"model_stats": [entry]})


def mlserver(requests: int, runs: int, *, request_s: float = 0.009, run_s: float = 0.004, model: str = "m") -> str:
    """The metrics of a server that has answered so many requests of one row."""
    return f"""# HELP model_infer_request_duration Model infer request latency
# TYPE model_infer_request_duration summary
model_infer_request_duration_count{{model="{model}",version=""}} {requests}
model_infer_request_duration_sum{{model="{model}",version=""}} {requests * request_s}
model_infer_request_duration_count{{model="another",version="None"}} 1000
model_infer_request_duration_sum{{model="another",version="None"}} 1000
# HELP burnish_batch_size rows of each run of the model
# TYPE burnish_batch_size histogram
burnish_batch_size_bucket{{le="1.0",model_name="{model}",model_version="1"}} 0
burnish_batch_size_bucket{{le="+Inf",model_name="{model}",model_version="1"}} {runs}
burnish_batch_size_count{{model_name="{model}",model_version="1"}} {runs}
burnish_batch_size_sum{{model_name="{model}",model_version="1"}} {requests}
# HELP burnish_model_seconds seconds of each run of the model
# TYPE burnish_model_seconds histogram
burnish_model_seconds_bucket{{le="+Inf",model_name="{model}",model_version="1"}} {runs}
burnish_model_seconds_count{{model_name="{model}",model_version="1"}} {runs}
burnish_model_seconds_sum{{model_name="{model}",model_version="1"}} {runs * run_s}
"""


def test_triton_counts_a_requests_whole_time_wait_and_computing() -> None:
    before, after = parse_triton(triton(100, 50), "m"), parse_triton(triton(500, 150), "m")
    found = break_down(before, after, lateness_ms=0.1, service_ms=12.5)
    assert (found.requests, found.batch_rows) == (400, 4.0)
    assert found.server_ms == pytest.approx(11.0)
    assert found.queue_ms == pytest.approx(2.0)
    assert found.compute_ms == pytest.approx(8.0)
    assert found.network_ms == pytest.approx(1.5)
    assert found.by_difference == ("network_ms",)
    assert found.notes == ()


def test_mlserver_leaves_the_queue_to_a_difference() -> None:
    before, after = parse_mlserver(mlserver(100, 50), "m"), parse_mlserver(mlserver(500, 250), "m")
    found = break_down(before, after, lateness_ms=0.1, service_ms=10.0)
    assert (found.requests, found.batch_rows) == (400, 2.0)
    assert found.server_ms == pytest.approx(9.0)
    assert found.compute_ms == pytest.approx(4.0)
    assert found.queue_ms == pytest.approx(5.0)
    assert found.network_ms == pytest.approx(1.0)
    assert found.by_difference == ("network_ms", "queue_ms")


def test_versions_of_a_model_add_up_and_other_models_do_not() -> None:
    one, two = json.loads(triton(1, 1)), json.loads(triton(2, 1, version="2"))
    both = {
        "model_stats": [*one["model_stats"], *two["model_stats"], *json.loads(triton(9, 9, model="n"))["model_stats"]]
    }
    counts = parse_triton(json.dumps(both), "m")
    assert counts is not None
    assert counts.requests.times == 3
    assert counts.rows == Total(2, 3)
    assert parse_triton(triton(1, 1), "another") is None
    assert parse_mlserver(mlserver(1, 1), "n") is None


def test_a_model_of_another_runtime_has_no_compute() -> None:
    text = "\n".join(line for line in mlserver(100, 50).splitlines() if "burnish" not in line) + "\n"
    counts = parse_mlserver(text, "m")
    assert counts is not None
    found = break_down(
        Counts(requests=Total(), queue=None, compute=Total(), rows=Total()), counts, lateness_ms=0, service_ms=10
    )
    assert (found.compute_ms, found.queue_ms, found.batch_rows) == (None, None, None)
    assert found.server_ms == pytest.approx(9.0)
    assert found.by_difference == ("network_ms",)
    assert found.notes == ("the server counted no run of the model",)


def test_what_nobody_tells_is_not_known() -> None:
    counts = parse_triton(triton(100, 50), "m")
    for before, after in ((None, counts), (counts, None), (None, None)):
        found = break_down(before, after, lateness_ms=0.1, service_ms=5.0)
        assert (found.network_ms, found.server_ms, found.queue_ms, found.compute_ms) == (None, None, None, None)
        assert found.notes == ("the server does not tell of its times",)
    assert break_down(counts, counts, lateness_ms=0, service_ms=5).notes == ("the server counted no request",)


def test_counts_that_went_back_are_of_another_server() -> None:
    before, after = parse_triton(triton(100, 50), "m"), parse_triton(triton(90, 60), "m")
    found = break_down(before, after, lateness_ms=0, service_ms=5)
    assert found.server_ms is None
    assert found.notes == ("the server was started anew meanwhile",)


def test_a_negative_difference_is_told() -> None:
    before, after = parse_triton(triton(0, 0), "m"), parse_triton(triton(100, 50), "m")
    found = break_down(before, after, lateness_ms=0, service_ms=10.5)
    assert found.network_ms == pytest.approx(-0.5)
    (note,) = found.notes
    assert "network_ms came out as -0.500" in note


@pytest.mark.parametrize("text", ["<html>", "{}", '{"model_stats": [{"name": "m"}]}', '{"model_stats": 3}', "[]"])
def test_what_is_no_statistics_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"statistics|Expecting"):
        parse_triton(text, "m")


@contextmanager
def serving(path: str, text: str) -> Iterator[str]:
    """An HTTP server on loopback that has one page."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == path
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(text.encode() if found else b"no such page")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_counts_are_read_from_a_server() -> None:
    with serving("/v2/models/m/stats", triton(100, 50)) as address:
        counts = read_counts(Statistics(server="triton", address=address, model="m"))
        assert counts is not None
        assert counts.requests.times == 100
        assert read_counts(Statistics(server="triton", address=address, model="n")) is None
    with serving("/metrics", mlserver(100, 50)) as address:
        counts = read_counts(Statistics(server="mlserver", address=address, model="m"))
        assert counts is not None
        assert counts.rows == Total(50, 100)
    assert read_counts(Statistics(server="mlserver", address=address, model="m")) is None
    assert read_counts(None) is None


def test_a_window_gets_its_breakdown_and_keeps_it_in_json(tmp_path: Path) -> None:
    profile = LoadProfile(name="100 rps", load=OpenLoop(rate_rps=100), warmup_s=0.0, duration_s=3.0)
    recording = simulate(Fixed(0.012), profile)
    save_arrays(tmp_path / "r.npz", recording)
    record = summarize(recording, profile, raw="r.npz", raw_sha256=file_sha256(tmp_path / "r.npz"))
    counts = parse_triton(triton(300, 300), "m")
    record = with_breakdown(record, parse_triton(triton(0, 0), "m"), counts, raw_root=tmp_path)
    assert record.breakdown is not None
    assert record.breakdown.service_ms == pytest.approx(12.0)
    assert record.breakdown.network_ms == pytest.approx(1.0)
    assert loads(dumps(record)) == record


def test_a_server_that_counts_anew_makes_its_window_invalid(tmp_path: Path) -> None:
    profile = LoadProfile(name="100 rps", load=OpenLoop(rate_rps=100), warmup_s=0.0, duration_s=3.0)
    recording = simulate(Fixed(0.012), profile)
    save_arrays(tmp_path / "r.npz", recording)
    record = summarize(recording, profile, raw="r.npz", raw_sha256=file_sha256(tmp_path / "r.npz"))
    before, after = parse_triton(triton(300, 300), "m"), parse_triton(triton(90, 90), "m")
    found = with_breakdown(record, before, after, raw_root=tmp_path)
    assert [one.gate for one in found.findings] == ["restarted"]
    assert found.findings[0].observed == "300 requests counted, then 90 after it"
    assert with_breakdown(found, before, after, raw_root=tmp_path).findings == found.findings
    assert with_breakdown(record, after, before, raw_root=tmp_path).valid


def run(**parts: float) -> RunRecord:
    whole = Breakdown(requests=1, **{"lateness_ms": 0.0, "service_ms": 1.0, **parts})  # type: ignore[arg-type]
    profile = LoadProfile(name="n", load=ClosedLoop(concurrency=1), warmup_s=0, duration_s=1)
    return RunRecord(
        load=profile, scheduled=1, ok=1, errors={}, window_s=1, metrics={}, findings=(), raw="", breakdown=whole
    )


def test_parts_over_runs_count_the_negative_ones_too() -> None:
    found = times_over_runs([run(network_ms=-1.0, queue_ms=-3.0), run(network_ms=3.0, queue_ms=1.0), run()])
    assert found["time_network_ms"].value == pytest.approx(1.0)
    assert "time_queue_ms" not in found
    assert "time_compute_ms" not in found


def test_a_generator_that_watches_asks_around_each_window(tmp_path: Path) -> None:
    import numpy as np

    profile = LoadProfile(name="n", load=OpenLoop(rate_rps=100), warmup_s=0.0, duration_s=0.2)
    with FakeV2Server() as server, serving("/v2/models/m_1/stats", triton(100, 50, model="m_1")) as address:
        where = server.target("grpc")
        payloads = encode_payloads({"x": np.ones((4, 16), np.float32)}, target=where)
        statistics = statistics_at(f"triton={address}/m_1", "m")
        with WatchingGenerator(cpus=None, work=tmp_path, statistics=statistics) as generator:
            record = generator.run(where, payloads, profile, raw_path=tmp_path / "r.npz")
        assert record.breakdown is not None
        assert record.breakdown.service_ms > 0
        assert record.breakdown.notes == ("the server counted no request",)


def test_where_to_ask_is_checked() -> None:
    assert statistics_at("mlserver=127.0.0.1:8082", "m") == Statistics(
        server="mlserver", address="127.0.0.1:8082", model="m"
    )
    for wrong in ("127.0.0.1:8000", "triton=127.0.0.1", "other=h:1", "triton=h:1/"):
        with pytest.raises(InputError, match="--statistics"):
            statistics_at(wrong, "m")


# --- depths ---


def target(url: str) -> Target:
    return Target(url=url, protocol="grpc", model="m")


def test_each_place_on_the_way_adds_its_part(tmp_path: Path) -> None:
    profile = LoadProfile(name="alone", load=ClosedLoop(concurrency=1), warmup_s=0.0, duration_s=0.5)
    takes_s = {"server:1": 0.002, "agent:1": 0.003, "mesh:1": 0.005}
    asked: list[str] = []

    def offer(where: Target, window: LoadProfile, path: Path) -> RunRecord:
        asked.append(where.url)
        drift_s = 0.001 * (len(asked) > 3)  # the machine is slower in the second round, for all three
        record = summarize(simulate(Fixed(takes_s[where.url] + drift_s), window), window, raw=path.name)
        spoilt = (GateFinding(gate="steal", observed="9 %", limit="2 %"),) if len(asked) == 7 else ()
        return RunRecord(**{name: getattr(record, name) for name in RunRecord.__slots__} | {"findings": spoilt})

    places = {name: target(f"{name}:1") for name in ("server", "agent", "mesh")}
    server, agent, mesh = measure_depths(offer, places, profile, rounds=3, seed=3, folder=tmp_path)
    assert sorted(asked) == sorted([*takes_s] * 3)
    assert asked[:3] != asked[3:6] or asked[3:6] != asked[6:]
    assert server.added_ms is None
    assert agent.added_ms is not None
    assert mesh.added_ms is not None
    assert agent.added_ms.value == pytest.approx(1.0, abs=1e-3)
    assert mesh.added_ms.value == pytest.approx(2.0, abs=1e-3)
    assert sum(depth.invalid_runs for depth in (server, agent, mesh)) == 1
    assert loads(dumps(mesh)) == mesh


def test_a_place_that_was_never_measured_is_not_known(tmp_path: Path) -> None:
    profile = LoadProfile(name="alone", load=ClosedLoop(concurrency=1), warmup_s=0.0, duration_s=0.5)

    def offer(where: Target, window: LoadProfile, path: Path) -> RunRecord:
        record = summarize(simulate(Fixed(0.002), window), window, raw=path.name)
        spoilt = (GateFinding(gate="steal", observed="9 %", limit="2 %"),) if where.url == "agent:1" else ()
        return RunRecord(**{name: getattr(record, name) for name in RunRecord.__slots__} | {"findings": spoilt})

    places = {name: target(f"{name}:1") for name in ("server", "agent", "mesh")}
    server, agent, mesh = measure_depths(offer, places, profile, rounds=2, seed=0, folder=tmp_path)
    assert server.service_p50_ms is not None
    assert (agent.service_p50_ms, agent.added_ms, agent.invalid_runs) == (None, None, 2)
    assert mesh.service_p50_ms is not None
    assert mesh.added_ms is None
