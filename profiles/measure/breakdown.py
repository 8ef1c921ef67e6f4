"""Where the time of a request goes: client, network, queue, compute, and what each place on the way adds.

The server's part comes from counts that it keeps of a model since it started, read before and after a window of load,
so that no reading falls into it. Triton counts, for every request, its whole time, its wait and its computing. MLServer
counts the whole time of every request, and our runtime in it the seconds and rows of every run of the model; its queue
is what is left, so that it holds decoding, batching and the way between threads too.

Sources: Triton's statistics extension of the V2 protocol (``extension_statistics.md`` in its documentation); MLServer's
metrics (its user guide, "Metrics"); `profiles.serving.runtime` for the two of ours.
"""

import http.client
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from profiles.deploy.cluster import Statistics
from profiles.load import gates
from profiles.load.engine import LoadGenerator
from profiles.load.recording import NS_PER_MS, NS_PER_S, load_arrays
from profiles.load.transports import Status
from profiles.measure.asking import ask, what_is_wrong
from profiles.measure.percentiles import estimate_over_runs
from registry.errors import InputError
from registry.records import Breakdown, Depth, Estimate, GateFinding, LoadProfile, RunRecord, Target

logger = logging.getLogger(__name__)

_ASK_S = 5.0
MS_PER_S = 1000.0
PARTS: Mapping[str, tuple[str, str]] = {
    "lateness_ms": ("time_lateness_ms", "ms"),
    "service_ms": ("time_service_ms", "ms"),
    "network_ms": ("time_network_ms", "ms"),
    "server_ms": ("time_server_ms", "ms"),
    "queue_ms": ("time_queue_ms", "ms"),
    "compute_ms": ("time_compute_ms", "ms"),
    "batch_rows": ("batch_rows", "1"),
}
"""Field of a `Breakdown` -> the metric that it becomes over runs, and its unit."""

# --- what a server has counted -----------------------------------------------------------------------------------


class Total(NamedTuple):
    """So many times something was counted, and how much that was together."""

    times: float = 0.0
    amount: float = 0.0

    def plus(self, times: float, amount: float) -> Self:
        """Both of these more."""
        return type(self)(self.times + times, self.amount + amount)

    def since(self, before: "Total") -> "Total":
        """What has been added."""
        return Total(self.times - before.times, self.amount - before.amount)

    @property
    def mean(self) -> float | None:
        """Of one; None where there was none."""
        return self.amount / self.times if self.times > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a server has counted of a model since it started.

    Attributes:
        requests: answered requests, and the seconds they took in the server.
        queue: requests, and the seconds they waited; None where the server does not count that.
        compute: seconds of the model, counted for each request (Triton) or each run (MLServer).
        rows: runs of the model, and rows in them.
    """

    requests: Total
    queue: Total | None
    compute: Total
    rows: Total

    def since(self, before: "Counts") -> "Counts":
        """What has been added."""
        return Counts(
            requests=self.requests.since(before.requests),
            queue=None if self.queue is None else self.queue.since(before.queue or Total()),
            compute=self.compute.since(before.compute),
            rows=self.rows.since(before.rows),
        )

    @property
    def gone_back(self) -> bool:
        """Whether anything is less than nothing: the server was started anew in between."""
        totals = (self.requests, self.queue or Total(), self.compute, self.rows)
        return any(part < 0 for total in totals for part in total)


def read_counts(statistics: Statistics | None) -> Counts | None:
    """What a server has counted so far; None where it cannot be asked, or does not say."""
    if statistics is None:
        return None
    triton = statistics.server == "triton"
    path = f"/v2/models/{statistics.model}/stats" if triton else "/metrics"
    try:
        text = ask(statistics.address, path, timeout_s=_ASK_S)[1].decode()
        return parse_triton(text, statistics.model) if triton else parse_mlserver(text, statistics.model)
    except (OSError, http.client.HTTPException, ValueError) as error:
        logger.warning("%s does not tell of its times: %s", statistics.address, what_is_wrong(error))
        return None


def parse_triton(text: str, model: str) -> Counts | None:
    """The counts in the reply of Triton's statistics extension, of all versions together; None of an unknown model.

    Raises:
        ValueError: it is no such reply.
    """
    requests, queue, compute, rows = Total(), Total(), Total(), Total()
    found = False
    try:
        for entry in json.loads(text)["model_stats"]:
            if entry["name"] != model:
                continue
            found = True
            stats = entry["inference_stats"]
            requests = requests.plus(*_seconds(stats["success"]))
            queue = queue.plus(*_seconds(stats["queue"]))
            steps = [_seconds(stats[step]) for step in ("compute_infer", "compute_input", "compute_output")]
            compute = compute.plus(steps[0].times, sum(step.amount for step in steps))
            rows = rows.plus(entry["execution_count"], entry["inference_count"])
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"these are no statistics of Triton: {text[:80]!r}") from error
    return Counts(requests=requests, queue=queue, compute=compute, rows=rows) if found else None


def _seconds(stat: Mapping[str, Any]) -> Total:
    # Triton leaves out what is zero in its gRPC replies, and may in these.
    return Total(float(stat.get("count", 0)), float(stat.get("ns", 0)) / NS_PER_S)


_MLSERVER = {
    "model_infer_request_duration": "requests",
    "burnish_model_seconds": "compute",
    "burnish_batch_size": "rows",
}


def parse_mlserver(text: str, model: str) -> Counts | None:
    """The counts in MLServer's Prometheus metrics, of all versions together; None of an unknown model.

    Raises:
        ValueError: it is no such text.
    """
    from prometheus_client.parser import text_string_to_metric_families

    totals = {"requests": Total(), "compute": Total(), "rows": Total()}
    found = False
    for family in text_string_to_metric_families(text):
        field = _MLSERVER.get(family.name)
        if field is None:
            continue
        for sample in family.samples:
            # MLServer's own label has another name than that of metrics which a runtime brings.
            if model not in {sample.labels.get("model"), sample.labels.get("model_name")}:
                continue
            found = True
            if sample.name == f"{family.name}_count":
                totals[field] = totals[field].plus(sample.value, 0.0)
            elif sample.name == f"{family.name}_sum":
                totals[field] = totals[field].plus(0.0, sample.value)
    return Counts(queue=None, **totals) if found else None


# --- one window ----------------------------------------------------------------------------------------------------


def with_breakdown(record: RunRecord, before: Counts | None, after: Counts | None, *, raw_root: Path) -> RunRecord:
    """The record of a window, with where the time of its requests went.

    Args:
        record: of the window; without one answer it is returned as it is. One in which the server began to count
            anew, because it was restarted or had to load the model again, becomes invalid.
        before: what the server had counted before the load began.
        after: the same when all of it had been answered.
        raw_root: the folder that the record names the file of its times relative to.

    Raises:
        InputError: that file is missing or damaged.
    """
    arrays = load_arrays(raw_root / record.raw, record.raw_sha256)
    ok = arrays["status"] == Status.OK
    if not ok.any():
        return record
    lateness_ms = float(np.mean((arrays["sent_ns"] - arrays["intended_ns"])[ok])) / NS_PER_MS
    service_ms = float(np.mean((arrays["done_ns"] - arrays["sent_ns"])[ok])) / NS_PER_MS
    found = break_down(before, after, lateness_ms=lateness_ms, service_ms=service_ms)
    return replace(record, breakdown=found, findings=(*record.findings, *_restarted(record, before, after)))


def _restarted(record: RunRecord, before: Counts | None, after: Counts | None) -> Iterable[GateFinding]:
    """A finding where the server has counted less after a window than before it, unless somebody else has seen it."""
    if before is None or after is None or not after.since(before).gone_back:
        return
    told = (f"{before.requests.times:.0f} requests counted", f"{after.requests.times:.0f} after it")
    finding = gates.restarts(told)
    if finding is not None and finding.gate not in {one.gate for one in record.findings}:
        yield finding


def break_down(before: Counts | None, after: Counts | None, *, lateness_ms: float, service_ms: float) -> Breakdown:
    """Where the time went, from the server's counts at both ends and the client's means.

    Args:
        before: what the server had counted before the load.
        after: the same after it.
        lateness_ms: mean of (sent - due), as the client recorded it.
        service_ms: mean of (answered - sent).
    """
    client = Breakdown(requests=0, lateness_ms=lateness_ms, service_ms=service_ms)
    if before is None or after is None:
        return replace(client, notes=("the server does not tell of its times",))
    counted = after.since(before)
    if counted.gone_back:
        return replace(client, notes=("the server was started anew meanwhile",))
    server_ms, compute_ms = _ms(counted.requests.mean), _ms(counted.compute.mean)
    network_ms = _difference(service_ms, server_ms)
    waits = counted.queue is not None
    queue_ms = _ms(counted.queue.mean) if counted.queue is not None else _difference(server_ms, compute_ms)
    differences = {"network_ms": network_ms} if waits else {"network_ms": network_ms, "queue_ms": queue_ms}
    return replace(
        client,
        requests=round(counted.requests.times),
        network_ms=network_ms,
        server_ms=server_ms,
        queue_ms=queue_ms,
        compute_ms=compute_ms,
        batch_rows=counted.rows.mean,
        by_difference=tuple(name for name, value in differences.items() if value is not None),
        notes=(*_unknown(server_ms, compute_ms), *_negative(differences)),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * MS_PER_S


def _difference(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else whole - part


def _unknown(server_ms: float | None, compute_ms: float | None) -> Iterable[str]:
    if server_ms is None:
        yield "the server counted no request"
    elif compute_ms is None:
        yield "the server counted no run of the model"


def _negative(differences: Mapping[str, float | None]) -> Iterable[str]:
    for name, value in differences.items():
        if value is not None and value < 0:
            yield f"{name} came out as {value:.3f}: what it is the difference of was not counted over the same requests"


def times_over_runs(runs: Sequence[RunRecord]) -> dict[str, Estimate]:
    """The parts of the time over several runs, as metrics (see `PARTS`).

    A negative part of one run counts as it is, or the mean would be too large; a part that is negative on average is
    left out, as nothing is known of it.
    """
    broken_down = [run.breakdown for run in runs if run.breakdown is not None]
    found = {}
    for part, (name, unit) in PARTS.items():
        values = [value for one in broken_down if (value := getattr(one, part)) is not None]
        if values and sum(values) >= 0:
            found[name] = estimate_over_runs(values, None, unit, log=False)
    return found


class WatchingGenerator(LoadGenerator):
    """A load generator that asks the server before and after each window, so that records hold where the time went."""

    def __init__(self, *args: Any, statistics: Statistics | None, **rest: Any) -> None:
        """As a `LoadGenerator`.

        Args:
            args: those of a `LoadGenerator`.
            statistics: where the server tells of its times; None to ask nobody.
            rest: those of a `LoadGenerator`.
        """
        super().__init__(*args, **rest)
        self._statistics = statistics

    def run(self, *args: Any, raw_path: Path, raw_root: Path | None = None, **rest: Any) -> RunRecord:
        """See `LoadGenerator.run`."""
        if self._statistics is None:
            return super().run(*args, raw_path=raw_path, raw_root=raw_root, **rest)
        before = read_counts(self._statistics)
        record = super().run(*args, raw_path=raw_path, raw_root=raw_root, **rest)
        return with_breakdown(record, before, read_counts(self._statistics), raw_root=raw_root or raw_path.parent)


def statistics_at(text: str, model: str) -> Statistics:
    """Where a server tells of its times, as a user writes it: ``triton=host:port`` or ``mlserver=host:port``.

    Args:
        text: with ``/name`` behind it where the server has the model by another name than its clients.
        model: the clients' name of it.

    Raises:
        InputError: it is neither.
    """
    found = re.fullmatch(r"(triton|mlserver)=([^/\s]+:\d+)(?:/(\S+))?", text)
    if found is None:
        raise InputError(
            f"--statistics {text!r} is not understood",
            hint="Write triton=host:port with the port of REST, or mlserver=host:port with that of metrics.",
        )
    server: Literal["mlserver", "triton"] = "triton" if found[1] == "triton" else "mlserver"
    return Statistics(server=server, address=found[2], model=found[3] or model)


# --- depths ----------------------------------------------------------------------------------------------------------


def measure_depths(
    run: Callable[[Target, LoadProfile, Path], RunRecord],
    targets: Mapping[str, Target],
    profile: LoadProfile,
    *,
    rounds: int,
    seed: int,
    folder: Path,
) -> tuple[Depth, ...]:
    """What each place on the way to a model adds to its time.

    On Core 2 these are the server itself, the agent before it, and the mesh: all three lead to the same model, so the
    same load at each tells them apart. In each round every place has one window, in an order of chance, so that the
    machine's drift falls on all of them; what a place adds is the difference of medians within a round.

    Args:
        run: offers a profile to a target, and writes the arrays to a path.
        targets: name -> place, from the innermost outwards.
        profile: the load, of one request at a time, say: where requests queue, the queue's chance hides what a place
            adds.
        rounds: how often each is measured.
        seed: of the order.
        folder: for the raw arrays.

    Raises:
        UnreachableError: a place refused, or stopped answering.
    """
    medians: dict[str, dict[int, float]] = {name: {} for name in targets}
    for number in range(rounds):
        order = np.random.default_rng((seed, number)).permutation(len(targets))
        for name in (list(targets)[index] for index in order):
            window = replace(profile, name=f"{profile.name} at {name}", seed=profile.seed + number)
            record = run(targets[name], window, folder / f"{name}-{number}.npz")
            if record.valid and "service_p50_ms" in record.metrics:
                medians[name][number] = record.metrics["service_p50_ms"]
    found: list[Depth] = []
    before: dict[int, float] | None = None
    for name, target in targets.items():
        here = medians[name]
        added = [] if before is None else [here[number] - before[number] for number in here if number in before]
        found.append(
            Depth(
                name=name,
                url=target.url,
                service_p50_ms=estimate_over_runs([*here.values()], None, "ms") if here else None,
                added_ms=estimate_over_runs(added, None, "ms", log=False) if added else None,
                invalid_runs=rounds - len(here),
            )
        )
        before = here
    return tuple(found)
