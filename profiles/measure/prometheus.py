"""Prometheus: what Envoy tells of champion and challenger, read through the HTTP API.

On Core 2 the only latency that is counted for each variant is Envoy's histogram of its upstreams, whose names are
``<model>_<version>_http`` and ``..._grpc``. It counts mirrored requests, too. An estimate from a histogram is no finer
than its buckets: the upper end is the edge of one.

A Core 2 may have several Envoys, each of which counts for itself, and from zero again once it is restarted. So what was
counted in between is told of each Envoy, and then added up, by upstream.
"""

import http.client
import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Final, Protocol

from profiles.measure.early_stopping import most_over
from profiles.measure.live import PERCENTILES, share
from profiles.measure.percentiles import EARNED
from registry.errors import InputError, UnreachableError
from registry.promotion import CHALLENGER, CHAMPION, FAILED_SHARE
from registry.records import Estimate, Metrics, Observation, PromotionStep

BUCKETS: Final = "envoy_cluster_upstream_rq_time_bucket"
COMPLETED: Final = "envoy_cluster_upstream_rq_completed"
RETRIED: Final = "envoy_cluster_upstream_rq_retry"
CLASSES: Final = "envoy_cluster_upstream_rq_xx"
METHOD = "Envoy's histogram"
FLUSH_S: Final = 5.0
"""How old an Envoy's histograms may be when it is scraped: its ``stats_flush_interval`` where nobody sets another."""
_TIMEOUT_S = 10.0
_MOST_BYTES = 10_000_000
# What tells one Envoy from another among all that Prometheus scrapes.
COUNTING: Final = ("namespace", "job", "instance")


class Prometheus:
    """The HTTP API of one Prometheus."""

    def __init__(self, url: str, *, timeout_s: float = _TIMEOUT_S) -> None:
        """Connects to nothing yet.

        Args:
            url: ``http(s)://host[:port][/path]``, without a user or password.
            timeout_s: longest wait for an answer.

        Raises:
            InputError: it is no such URL.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            known = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
        except ValueError:
            known = False
        if not known:
            # Not shown: it may have a password.
            raise InputError("what is given is no URL of a Prometheus", hint="http://HOST:9090, say.")
        if parts.username or parts.password:
            raise InputError("the URL of a Prometheus has no user or password", hint="Reach it through a proxy.")
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s

    def query(self, expression: str) -> list[tuple[Mapping[str, str], float]]:
        """The instant vector of an expression: labels and value of each series.

        Raises:
            UnreachableError: it does not answer, or refuses the expression.
        """
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=self._timeout_s) as reply:  # noqa: S310  the scheme is checked
                answer: Any = json.loads(reply.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            told = error.read(2000).decode(errors="replace")
            error.close()
            raise UnreachableError(f"the Prometheus at {self.url} refuses {expression}: {error.code} {told}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"the Prometheus at {self.url} does not answer: {error}", hint="Check its address, and that it runs."
            ) from error
        try:
            return [(dict(one["metric"]), float(one["value"][1])) for one in answer["data"]["result"]]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UnreachableError(f"what answers at {self.url} is no Prometheus: {str(answer)[:200]}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What one Envoy has counted of one Model's upstreams so far, or several in some time.

    Attributes:
        buckets: upper edge (ms) -> requests up to it; the last edge is infinite.
        completed: requests that came back.
        failed: those with a status of 5xx, and those that were sent again.
    """

    buckets: Mapping[float, float]
    completed: float
    failed: float


def counted(prometheus: Prometheus, model: str, *, matchers: str = "") -> Mapping[str, Counted]:
    """What each Envoy has counted of a Model; one that does not know the Model yet is not among them.

    Args:
        prometheus: where it is asked.
        model: its name on Core 2.
        matchers: more matchers of PromQL, to tell one Envoy from another: ``namespace="seldon"``, say.

    Raises:
        UnreachableError: Prometheus does not answer.
    """
    where = _upstreams(model, matchers)
    by = ",".join(COUNTING)

    def totals(metric: str, more: str = "") -> dict[str, float]:
        found = prometheus.query(f"sum by ({by}) ({metric}{{{where}{more}}})")
        return {named(labels): value for labels, value in found}

    buckets: dict[str, dict[float, float]] = {}
    for labels, value in prometheus.query(f"sum by ({by},le) ({BUCKETS}{{{where}}})"):
        buckets.setdefault(named(labels), {})[float(labels["le"])] = value
    completed, retried = totals(COMPLETED), totals(RETRIED)
    failed = totals(CLASSES, ',envoy_response_code_class="5"')
    return {
        envoy: Counted(
            buckets=buckets.get(envoy, {}),
            completed=completed.get(envoy, 0.0),
            failed=failed.get(envoy, 0.0) + retried.get(envoy, 0.0),
        )
        for envoy in buckets.keys() | completed.keys()
    }


def _upstreams(model: str, matchers: str) -> str:
    upstream = f'envoy_cluster_name=~"{re.escape(model)}_[0-9]+_(http|grpc)"'.replace("\\", "\\\\")
    return ",".join(one for one in (upstream, matchers) if one)


def named(labels: Mapping[str, str]) -> str:
    """Who counts, by the labels of a series."""
    return " ".join(labels[name] for name in reversed(COUNTING) if labels.get(name))


def between(before: Mapping[str, Counted], after: Mapping[str, Counted], *, method: str = METHOD) -> Metrics:
    """What happened between two counts of some Envoys; what cannot be known is left out.

    Where an Envoy is gone, or its count has become less, since it was restarted, nothing is known.
    """
    parts = [_since(before.get(envoy), now) for envoy, now in after.items()]
    known = [one for one in parts if one is not None]
    if len(known) < len(parts) or before.keys() - after.keys():
        return {}
    # The edges are those of a Core 2's version; of two versions, those that both have.
    told = [set(one.buckets) for one in known if one.buckets]
    edges = sorted(set.intersection(*told)) if told else []
    steps = [sum(one.buckets.get(edge, 0.0) for one in known) for edge in edges]
    completed, failed = sum(one.completed for one in known), sum(one.failed for one in known)
    found: dict[str, Estimate] = {}
    if completed >= 1:
        found[FAILED_SHARE] = share(min(round(failed), round(completed)), round(completed))
    for percentile in PERCENTILES:
        estimate = _percentile(edges, steps, percentile, method)
        if estimate is not None:
            found[f"latency_p{percentile}_ms"] = estimate
    return found


def _since(before: Counted | None, now: Counted) -> Counted | None:
    """What one Envoy has counted since; None where it was begun anew."""
    if before is None:
        return now
    steps = {edge: count - before.buckets.get(edge, 0.0) for edge, count in now.buckets.items()}
    completed, failed = now.completed - before.completed, now.failed - before.failed
    if min(steps.values(), default=0.0) < 0 or completed < 0 or failed < 0:
        return None
    return Counted(buckets=steps, completed=completed, failed=failed)


def _percentile(edges: list[float], cumulated: list[float], percentile: int, method: str) -> Estimate | None:
    """A percentile (ms) by the buckets; its upper end is the edge that it does not exceed, as far as so many can tell.

    See `profiles.measure.early_stopping` for that.
    """
    count = round(cumulated[-1]) if cumulated else 0
    if count < EARNED[percentile]:
        return None
    wanted = count * percentile / 100
    # Between its own edges, as Prometheus' histogram_quantile does it.
    points = pairwise([(0.0, 0.0), *zip(edges, cumulated, strict=True)])
    (low, below), (high, up_to) = next(pair for pair in points if pair[1][1] >= wanted)
    if not math.isfinite(high):
        return None
    value = low + (high - low) * (wanted - below) / max(up_to - below, 1e-9)
    most = most_over(percentile, count) or 0
    bound = next((edge for edge, up_to in zip(edges, cumulated, strict=True) if count - up_to < max(most, 1)), math.inf)
    upper = bound if math.isfinite(bound) else None
    return Estimate(value=value, low=low, high=upper, runs=count, method=method, unit="ms")


class Watcher(Protocol):
    """Whoever watches meanwhile."""

    def sees(self, metric: str) -> bool:
        """As `registry.ports.Probe`."""

    def watch(self, step: PromotionStep) -> Observation:
        """As `registry.ports.Probe`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrometheusProbe:
    """Implements `registry.ports.Probe` by what Envoy counts of all traffic, while another probe adds its own.

    Attributes:
        prometheus: where it is asked.
        production: name of the Model that callers ask.
        challenger: name of the Model beside it.
        meanwhile: watches for the same time, and sees what Envoy cannot.
        settle: waits until what has happened has been scraped.
        matchers: see `counted`.
    """

    who: ClassVar[str] = "Envoy"
    method: ClassVar[str] = METHOD
    completed: ClassVar[str] = COMPLETED

    prometheus: Prometheus
    production: str
    challenger: str
    meanwhile: Watcher
    settle: Callable[[], None]
    matchers: str = ""

    def sees(self, metric: str) -> bool:
        """Whether it, or who watches meanwhile, can tell of a metric."""
        return self.meanwhile.sees(metric)

    def envoys(self) -> tuple[str, ...]:
        """The Envoys (or whoever counts) that know what is in production, whose counts are added up.

        Raises:
            InputError: they are of several namespaces, and so of several installations of Core 2.
            UnreachableError: Prometheus does not answer.
        """
        where = self._where(self.production)
        found = self.prometheus.query(f"count by ({','.join(COUNTING)}) ({self.completed}{{{where}}})")
        spaces = sorted({labels["namespace"] for labels, _ in found if labels.get("namespace")})
        if len(spaces) > 1:
            raise InputError(
                f"the Prometheus at {self.prometheus.url} knows of {self.production} in several namespaces: "
                f"{', '.join(spaces)}",
                hint=f"Name the one that is meant: --matchers 'namespace=\"{spaces[0]}\"'.",
            )
        return tuple(sorted(named(labels) for labels, _ in found))

    def watch(self, step: PromotionStep) -> Observation:
        """Counts before and after; what Envoy does not tell is taken from who watches meanwhile."""
        names = {CHAMPION: self.production, CHALLENGER: self.challenger if step.action != "swap" else self.production}
        before = {who: self._counted(name) for who, name in names.items()}
        observation = self.meanwhile.watch(step)
        self.settle()
        told = {who: between(before[who], self._counted(name), method=self.method) for who, name in names.items()}
        little = f"{self.who} has counted too little of the challenger, or one was restarted"
        missing = () if told[CHALLENGER] else (little,)
        return replace(
            observation,
            challenger=_joined(observation.challenger, told[CHALLENGER]),
            champion=_joined(observation.champion, {} if step.action == "swap" else told[CHAMPION]),
            notes=(*observation.notes, *missing),
        )

    def _counted(self, name: str) -> Mapping[str, Counted]:
        return counted(self.prometheus, name, matchers=self.matchers)

    def _where(self, name: str) -> str:
        return _upstreams(name, self.matchers)


def _joined(own: Metrics, counted_by_envoy: Metrics) -> Metrics:
    """All traffic says more of latency than our own requests; of two shares of failures, the worse."""
    joined = {**own, **counted_by_envoy}
    shares = [one[FAILED_SHARE] for one in (own, counted_by_envoy) if FAILED_SHARE in one]
    if shares:
        joined[FAILED_SHARE] = max(shares, key=lambda one: one.high if one.high is not None else math.inf)
    return joined
