"""Percentiles from Envoy's histograms, and a Prometheus that answers as it should, or does not."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from profiles.measure.prometheus import Counted, Prometheus, PrometheusProbe, between, counted
from registry.errors import InputError, UnreachableError
from registry.records import PromotionStep
from tests.doubles.busy import LONG_S
from tests.doubles.promotions import StatedProbe

INF = float("inf")
ENVOY = {"job": "envoy", "instance": "10.0.0.1:9003"}
STEP = PromotionStep(name="weights-10", action="weights", percent=10, watch_s=1)


def counts(*each: float, failed: float = 0.0, envoy: str = "one") -> dict[str, Counted]:
    """Requests up to 1, 5, 10, 25 ms and at all, as one Envoy has counted them."""
    buckets = dict(zip((1.0, 5.0, 10.0, 25.0, INF), each, strict=True))
    return {envoy: Counted(buckets=buckets, completed=each[-1], failed=failed)}


ZERO = counts(0, 0, 0, 0, 0)


def test_percentiles_lie_in_their_bucket_and_end_at_an_edge():
    found = between(ZERO, counts(0, 1000, 1980, 2000, 2000))
    p50, p90, p99 = (found[f"latency_p{one}_ms"] for one in (50, 90, 99))
    assert (p50.low, p50.value, p50.high) == (1, 5, 10)
    assert (p90.low, p90.high) == (5, 10)
    assert p90.value == pytest.approx(5 + 5 * 800 / 980)
    # 20 of 2,000 are above 10 ms: the p99 is not certainly within it.
    assert (p99.value, p99.high) == (10, 25)
    assert found["failed_share"].value == 0


def test_what_happened_before_does_not_count():
    slow = counts(0, 0, 0, 0, 5000, failed=70)
    found = between(slow, counts(0, 500, 500, 500, 5500, failed=75))
    assert found["latency_p90_ms"].high == 5
    assert found["failed_share"].value == pytest.approx(0.01)


def test_too_few_earn_nothing():
    assert "latency_p90_ms" not in between(ZERO, counts(99, 99, 99, 99, 99))
    assert "latency_p50_ms" in between(ZERO, counts(99, 99, 99, 99, 99))
    assert between(ZERO, ZERO) == {}


def test_beyond_the_last_edge_there_is_no_end():
    found = between(ZERO, counts(0, 0, 0, 950, 1000))
    assert "latency_p99_ms" not in found
    assert found["latency_p95_ms"].high is None
    assert found["latency_p90_ms"].high == 25


def test_an_envoy_that_began_anew_says_nothing():
    assert between(counts(0, 500, 500, 500, 500), counts(0, 10, 10, 10, 10)) == {}


def test_several_envoys_are_added_up():
    before = {**counts(0, 100, 100, 100, 100), **counts(0, 0, 300, 300, 300, envoy="two")}
    after = {**counts(0, 600, 600, 600, 600), **counts(0, 0, 800, 800, 800, failed=10, envoy="two")}
    found = between(before, after)
    assert (found["latency_p50_ms"].runs, found["latency_p50_ms"].high) == (1000, 10)
    assert found["failed_share"].value == pytest.approx(0.01)
    # Its share of what the two had counted before is not known.
    assert between(before, counts(0, 9000, 9000, 9000, 9000)) == {}
    # One that was restarted has counted less, however much the other has counted.
    restarted = {**counts(0, 9000, 9000, 9000, 9000), **counts(0, 0, 5, 5, 5, envoy="two")}
    assert between(before, restarted) == {}
    # One that joins in begins at zero.
    assert between(counts(0, 0, 300, 300, 300, envoy="two"), after)["latency_p50_ms"].runs == 1100


def test_envoys_of_two_versions_have_some_edges_in_common():
    other = {"two": Counted(buckets={5.0: 500, 20.0: 1000, INF: 1000}, completed=1000, failed=0)}
    found = between({}, {**counts(0, 1000, 1000, 1000, 1000), **other})
    assert (found["latency_p50_ms"].low, found["latency_p50_ms"].high) == (0, 5)
    assert "latency_p90_ms" not in found


class Answers(BaseHTTPRequestHandler):
    """Counts up at each look, as scrapes do."""

    asked: list[str]

    def do_GET(self) -> None:
        (expression,) = parse_qs(urlsplit(self.path).query)["query"]
        self.asked.append(expression)
        if expression == "bad":
            self.reply(400, {"status": "error", "error": "parse error"})
        elif expression == "odd":
            self.reply(200, {"status": "success"})
        else:
            self.reply(200, {"status": "success", "data": {"resultType": "vector", "result": self.vector(expression)}})

    def vector(self, expression: str) -> list[dict[str, object]]:
        looks = sum("_bucket" in one for one in self.asked)
        if "count by" in expression:
            spaces = ("seldon",) if 'namespace="seldon"' in expression else ("seldon", "staging")
            return [{"metric": {**ENVOY, "namespace": space}, "value": [0, "1"]} for space in spaces]
        if ",le)" in expression:
            return [{"metric": {**ENVOY, "le": le}, "value": [0, str(looks * 500)]} for le in ("5", "10", "+Inf")]
        return [] if "_retry" in expression else [{"metric": ENVOY, "value": [0, str(looks * 500)]}]

    def reply(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("Handler", (Answers,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def prometheus(server: ThreadingHTTPServer) -> Prometheus:
    return Prometheus(f"http://127.0.0.1:{server.server_address[1]}/", timeout_s=LONG_S)


def test_the_counts_of_a_model(prometheus: Prometheus, server: ThreadingHTTPServer):
    told = counted(prometheus, "digits-v1", matchers='namespace="seldon"')
    assert list(told) == ["10.0.0.1:9003 envoy"]
    [found] = told.values()
    assert found.buckets == {5.0: 500, 10.0: 500, INF: 500}
    assert (found.completed, found.failed) == (500, 500)
    asked = server.RequestHandlerClass.asked
    assert asked[0] == (
        "sum by (namespace,job,instance,le) (envoy_cluster_upstream_rq_time_bucket"
        '{envoy_cluster_name=~"digits\\\\-v1_[0-9]+_(http|grpc)",namespace="seldon"})'
    )
    assert asked[3].endswith('envoy_response_code_class="5"})')


def test_envoys_of_another_core2_are_not_mixed_in(prometheus: Prometheus):
    probe = PrometheusProbe(
        prometheus=prometheus,
        production="digits",
        challenger="digits-challenger",
        meanwhile=StatedProbe(),
        settle=lambda: None,
    )
    with pytest.raises(InputError, match="knows of digits in several namespaces: seldon, staging") as caught:
        probe.envoys()
    assert "--matchers 'namespace=\"seldon\"'" in str(caught.value)
    assert replace(probe, matchers='namespace="seldon"').envoys() == ("10.0.0.1:9003 envoy seldon",)


def test_what_envoy_counts_goes_before_our_own(prometheus: Prometheus):
    settled: list[bool] = []
    probe = PrometheusProbe(
        prometheus=prometheus,
        production="digits",
        challenger="digits-challenger",
        meanwhile=StatedProbe(p90_ms=70.0),
        settle=lambda: settled.append(True),
    )
    seen = probe.watch(STEP)
    assert settled == [True]
    assert seen.challenger["latency_p90_ms"].method == "Envoy's histogram"
    assert seen.challenger["latency_p90_ms"].high == 5
    # Of two shares of failures the worse one counts.
    assert seen.challenger["failed_share"].value == 1.0
    assert seen.answered["challenger"] == 100
    assert probe.sees("latency_p90_ms")
    assert not probe.sees("rss_mb")


def test_a_prometheus_that_refuses(prometheus: Prometheus, server: ThreadingHTTPServer):
    with pytest.raises(UnreachableError, match="refuses bad: 400"):
        prometheus.query("bad")
    with pytest.raises(UnreachableError, match="is no Prometheus"):
        prometheus.query("odd")


def test_no_prometheus_there():
    with pytest.raises(UnreachableError, match="does not answer"):
        Prometheus("http://127.0.0.1:9").query("up")
    for wrong in ("ftp://here", "prometheus:9090", "", "http://[::1", "http://host:port"):
        with pytest.raises(InputError, match="no URL of a Prometheus"):
            Prometheus(wrong)
    with pytest.raises(InputError, match="no user or password") as caught:
        Prometheus("http://me:secret@here:9090")
    assert "secret" not in str(caught.value)
