"""What pipeline gateways count of a pipeline, from a Prometheus that answers as it should."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from profiles.measure.gateway_counts import GatewayProbe, counted_of_pipeline
from registry.errors import InputError
from registry.records import PromotionStep
from tests.doubles.promotions import StatedProbe

INF = float("inf")
STEP = PromotionStep(name="weights-10", action="weights", percent=10, watch_s=1)
GATEWAY = {"job": "seldon", "instance": "10.0.0.2:9006"}


@dataclass
class Counting:
    """Counts up 500 requests within 50 ms at each look; 5 of them fail.

    Attributes:
        told_apart: whether the histogram has the label of the pipeline.
    """

    told_apart: bool = True
    url: str = "http://here"
    asked: list[str] = field(default_factory=list)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        self.asked.append(expression)
        looks = sum("_bucket" in one for one in self.asked)
        if "count by" in expression:
            return [({**GATEWAY, "namespace": space}, 1.0) for space in ("seldon", "staging")]
        if "_bucket" in expression:
            edges = ("0.025", "0.05", "+Inf") if self.told_apart else ()
            return [({**GATEWAY, "le": edge}, (edge != "0.025") * looks * 500.0) for edge in edges]
        return [(GATEWAY, looks * (5.0 if "code" in expression else 500.0))]


def probe(prometheus: Counting) -> GatewayProbe:
    told: Any = prometheus
    return GatewayProbe(
        prometheus=told,
        production="both",
        challenger="both-challenger",
        meanwhile=StatedProbe(p90_ms=70.0),
        settle=lambda: None,
    )


def test_the_counts_of_a_pipeline():
    prometheus = Counting()
    told: Any = prometheus
    [found] = counted_of_pipeline(told, "both-v1", matchers='namespace="seldon"').values()
    # Its edges are seconds.
    assert found.buckets == {25.0: 0, 50.0: 500, INF: 500}
    assert (found.completed, found.failed) == (500, 5)
    where = 'pipeline=~"both\\\\-v1([.]pipeline)?",namespace="seldon"'
    assert prometheus.asked == [
        f"sum by (namespace,job,instance,le) (seldon_pipeline_infer_api_seconds_bucket{{{where}}})",
        f"sum by (namespace,job,instance) (seldon_pipeline_infer_total{{{where}}})",
        f'sum by (namespace,job,instance) (seldon_pipeline_infer_total{{{where},code!~"200|OK"}})',
    ]


def test_the_gateways_time_goes_before_our_own():
    seen = probe(Counting()).watch(STEP)
    p90 = seen.challenger["latency_p90_ms"]
    assert (p90.low, p90.high, p90.method) == (25, 50, "the pipeline gateway's histogram")
    assert seen.challenger["failed_share"].value == pytest.approx(0.01)
    assert seen.notes == ()


def test_a_gateway_that_does_not_tell_pipelines_apart_leaves_our_own():
    seen = probe(Counting(told_apart=False)).watch(STEP)
    assert (seen.challenger["latency_p90_ms"].value, seen.challenger["latency_p90_ms"].method) == (70.0, "stated")
    assert seen.challenger["failed_share"].value == pytest.approx(0.01)


def test_gateways_of_another_core2_are_not_mixed_in():
    prometheus = Counting()
    with pytest.raises(InputError, match="knows of both in several namespaces: seldon, staging"):
        probe(prometheus).envoys()
    assert "(seldon_pipeline_infer_total{pipeline=" in prometheus.asked[0]
