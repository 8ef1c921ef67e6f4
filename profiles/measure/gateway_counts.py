"""What Core 2's pipeline gateways count of a pipeline, as Prometheus has it.

Envoy's histograms are of Models. Of pipelines there is ``seldon_pipeline_infer_total``, by pipeline and code, and the
histogram ``seldon_pipeline_infer_api_seconds``, which tells pipelines apart in newer versions of Core 2 alone. Both
count mirrored requests, too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from profiles.measure.prometheus import COUNTING, Counted, Prometheus, PrometheusProbe, named

BUCKETS: Final = "seldon_pipeline_infer_api_seconds_bucket"
COUNT: Final = "seldon_pipeline_infer_total"
# The status of REST, and that of gRPC.
_FINE = "200|OK"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayProbe(PrometheusProbe):
    """The same as its base, of pipelines: production and challenger are names of Pipelines."""

    who: ClassVar[str] = "the pipeline gateway"
    method: ClassVar[str] = "the pipeline gateway's histogram"
    completed: ClassVar[str] = COUNT

    def _counted(self, name: str) -> Mapping[str, Counted]:
        return counted_of_pipeline(self.prometheus, name, matchers=self.matchers)

    def _where(self, name: str) -> str:
        return _series(name, self.matchers)


def counted_of_pipeline(prometheus: Prometheus, pipeline: str, *, matchers: str = "") -> Mapping[str, Counted]:
    """What each pipeline gateway has counted of a pipeline; one that does not know it yet is not among them.

    Args:
        prometheus: where it is asked.
        pipeline: its name on Core 2.
        matchers: more matchers of PromQL, to tell one Core 2 from another.

    Raises:
        UnreachableError: Prometheus does not answer.
    """
    where, by = _series(pipeline, matchers), ",".join(COUNTING)

    def totals(more: str = "") -> dict[str, float]:
        found = prometheus.query(f"sum by ({by}) ({COUNT}{{{where}{more}}})")
        return {named(labels): value for labels, value in found}

    buckets: dict[str, dict[float, float]] = {}
    for labels, value in prometheus.query(f"sum by ({by},le) ({BUCKETS}{{{where}}})"):
        buckets.setdefault(named(labels), {})[1000 * float(labels["le"])] = value
    completed, failed = totals(), totals(f',code!~"{_FINE}"')
    return {
        gateway: Counted(
            buckets=buckets.get(gateway, {}),
            completed=completed.get(gateway, 0.0),
            failed=failed.get(gateway, 0.0),
        )
        for gateway in buckets.keys() | completed.keys()
    }


def _series(pipeline: str, matchers: str) -> str:
    own = f'pipeline=~"{re.escape(pipeline)}([.]pipeline)?"'.replace("\\", "\\\\")
    return ",".join(one for one in (own, matchers) if one)
