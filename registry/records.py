"""The frozen values that flow through burnish, from an artifact to a verdict.

Every record is frozen and keyword-only. ``registry.codec`` alone turns one into JSON. A number that is reported
is an `Estimate`; a thing that failed is a `Failure`. Mappings are never changed once a record holds them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Scalar = bool | int | float | str | None
# A stage takes single values, and lists of names.
Param = Scalar | tuple[str, ...]
Params = Mapping[str, Param]

# --- models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: its name in the graph.
        dtype: numpy's name of the type (``float32``, ``int64``, ...; ``bfloat16`` and ``str`` where numpy has none).
        shape: one entry a dimension: a fixed size, the name of a symbolic size, or None where it has no name.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """One file of an artifact: its POSIX path inside the artifact, SHA-256 (hex) and size."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """The files that are one model, addressed by their content. Once stored, never written again.

    Attributes:
        digest: SHA-256 (hex) over the sorted lines ``<sha256>  <path>``, each ended by a newline, of its files.
        format: what the files are.
        entry: the file that an engine opens (``model.onnx``, ``model.xml``); the others stand beside it.
    """

    digest: str
    format: Literal["onnx", "openvino"]
    entry: str
    files: tuple[ArtifactFile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def size_bytes(self) -> int:
        """The size of all files together."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model as the user named it, turned into its float32 artifact.

    Attributes:
        name: the user's name for it, unique in a campaign.
        kind: how it was given.
        location: the path, or ``package.module:factory``, as given.
        digest: SHA-256 (hex) of what it was made from; for an ONNX file, of its bytes.
    """

    name: str
    kind: Literal["onnx", "torch", "huggingface"]
    location: str
    digest: str
    artifact: Artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCall:
    """One stage of a recipe, with the parameters it is called with; lists, as YAML has them, become tuples."""

    name: str
    params: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Makes equal calls equal, wherever they were read."""
        params = {name: tuple(value) if isinstance(value, list) else value for name, value in self.params.items()}
        object.__setattr__(self, "params", params)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """An engine and how it is set; accuracy belongs to (variant, engine, instruction set).

    Attributes:
        name: the engine.
        precision: ``default`` lets the engine choose (OpenVINO then computes in bfloat16 where the CPU has it);
            ``float32`` holds it to float32.
        graph_level: ONNX Runtime's graph optimization level; OpenVINO has none and ignores it.
    """

    name: Literal["onnxruntime", "openvino"]
    precision: Literal["default", "float32"] = "default"
    graph_level: Literal["disable", "basic", "extended", "all"] = "all"

    @property
    def key(self) -> str:
        """A short name that tells two settings of one engine apart."""
        return f"{self.name}.{self.precision}.{self.graph_level}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Ordered stages with their parameters, and the engines that the outcome is meant for."""

    name: str
    stages: tuple[StageCall, ...]
    engines: tuple[EngineSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """One step that turns samples of the source into those of a variant which takes another input.

    Attributes:
        input: the input's name.
        way: ``cast`` to another type, ``truncate`` to the first entries of an axis, or ``resize`` an image.
        dtype: with ``cast``, numpy's name of the type; a float becomes the whole number nearest to
            ``(value - offset) / scale``.
        axes: with ``truncate`` and ``resize``, which axes; 0 is the samples'.
        sizes: their new sizes.
    """

    input: str
    way: Literal["cast", "truncate", "resize"]
    dtype: str = ""
    scale: float = 1.0
    offset: float = 0.0
    axes: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An artifact made from a source by a recipe.

    Attributes:
        id: SHA-256 (hex, first 16 digits) over source digest, stages and parameters, calibration digest, seed and
            tool versions: equal ids mean the same work.
        name: the recipe's name, or ``<source>/<recipe>`` where the campaign has several sources.
        calibration_digest: digest of the samples that calibrated it, or None where no stage took any.
        signature_changed: whether a stage declared another signature than the source's.
        batch_dependent: whether an answer depends on its neighbours in the batch (dynamic quantization).
        made_in_s: how long the stages took.
        notes: what the stages have to say of what they did.
        adaptation: how its inputs come from the source's, in order; empty where they are the same.
    """

    id: str
    name: str
    source: str
    source_digest: str
    recipe: Recipe
    calibration_digest: str | None
    seed: int
    tool_versions: Mapping[str, str]
    artifact: Artifact
    signature_changed: bool = False
    batch_dependent: bool = False
    made_in_s: float = 0.0
    notes: tuple[str, ...] = ()
    adaptation: tuple[Adaptation, ...] = ()


FailurePhase = Literal["source", "make", "fidelity", "screen", "deploy", "measure"]
FailureKind = Literal["not_applicable", "screened_out", "error", "timeout", "memory", "died", "budget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A variant or candidate that could not be made, judged, served or measured, and why.

    Attributes:
        subject: the name of the variant or candidate.
        phase: where it stopped.
        kind: ``not_applicable`` (the stage cannot apply here), ``screened_out`` (a faster sibling was served
            instead), ``error``, ``timeout``, ``memory``, ``died``, or ``budget`` (the campaign had no time left for
            it, so that nothing is known of it).
        reason: one sentence for the user.
        detail: the end of a log or traceback, or empty.
    """

    subject: str
    phase: FailurePhase
    kind: FailureKind
    reason: str
    detail: str = ""


# --- numbers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number that is reported: never a bare float.

    Attributes:
        value: the point estimate.
        low: lower end of the interval; None where nothing is known of it.
        high: upper end of the interval; None where nothing is known of it.
        runs: the independent runs, or the samples for a metric of fidelity, behind it.
        method: how the interval was found (``exact``, ``t over runs``, ``paired bootstrap``, ``single run``, ...).
        unit: ``ms``, ``1/s``, ``MB``, ``s``, ``fraction``, ``bytes``, ``dB``, ``1``.

    Raises:
        ValueError: value or an end is not finite, or the ends are out of order.
    """

    value: float
    low: float | None
    high: float | None
    runs: int
    method: str
    unit: str

    def __post_init__(self) -> None:
        ends = [end for end in (self.low, self.value, self.high) if end is not None]
        if not all(math.isfinite(end) for end in ends):
            raise ValueError(f"an estimate is finite, not {self.low}, {self.value}, {self.high}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] is out of order")


def exact(value: float, unit: str) -> Estimate:
    """An estimate of what was counted, not sampled (a file's size, say)."""
    return Estimate(value=value, low=value, high=value, runs=1, method="exact", unit=unit)


Metrics = Mapping[str, Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How a variant answers in one engine, against the baseline, on held-out samples.

    Attributes:
        batch_size: the batch the answers were taken at, which counts where the variant is batch dependent.
        instruction_set: the widest set the engine can use here (``avx512_vnni``, ``avx2``, ...).
        metrics: of the task ``accuracy`` (the task metric), ``accuracy_drop`` (baseline minus variant),
            ``slice_drop_max`` (the same where it is largest among the samples' slices) and ``flip_rate``; of parity
            with the baseline ``cosine``, ``worst_cosine``, ``snr_db``, ``p99_error``, ``mismatch_share`` and
            ``max_abs_error`` (of several outputs also ``<metric>.<output>``); of an answer's neighbours in the batch
            ``batch_dependence`` and ``batch_flip_rate``; where it was asked for, ``saturated_share``.
        task_metric: the name of the metric that ``accuracy`` holds.
        notes: what numbers leave out: which slice lost most, which sample is least alike, what was not judged.
    """

    variant_id: str
    engine: EngineSpec
    engine_version: str
    instruction_set: str
    batch_size: int
    samples_digest: str
    samples: int
    task_metric: str
    metrics: Metrics
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """In-process time of a variant in one engine: no server, one process of its own.

    ``metrics`` holds ``inprocess_ms`` at each batch size screened, named ``inprocess_ms.batch_<n>``.
    """

    variant_id: str
    engine: EngineSpec
    threads: int
    metrics: Metrics


# --- accuracy-aware search -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroup:
    """Nodes that are left in float32 together.

    Attributes:
        nodes: their names in the prepared graph.
        noise: what quantizing them alone adds to the outputs: power of the difference over power of the output.
        macs: their share of the graph's multiply-accumulate operations.
    """

    nodes: tuple[str, ...]
    noise: float
    macs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """How much quantizing each group of nodes alone disturbs the outputs of a variant.

    Attributes:
        groups: the most disturbing first.
        floor: the drop that a variant with all the baseline's answers would be given: no limit below its pessimistic
            end can be met on these samples.
        took_s: how long the ranking took.
    """

    variant_id: str
    groups: tuple[NodeGroup, ...]
    floor: Estimate
    took_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTrial:
    """A variant made and judged with some nodes left in float32.

    Attributes:
        float_nodes: names of those nodes.
        outcome: whether the limits on its loss of accuracy are met; ``failed`` where it could not be made or judged.
        drop: its ``accuracy_drop``, or None where it failed or the metric gives none.
        reason: one sentence for the user.
        took_s: how long making and judging took.
    """

    float_nodes: tuple[str, ...]
    outcome: Literal["pass", "fail", "unknown", "failed"]
    drop: Estimate | None
    reason: str
    took_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracySearch:
    """What the search for nodes to leave in float32 came to.

    Attributes:
        variant_id: of the quantized variant that missed the limit.
        variant_name: its name.
        before: its loss of accuracy.
        groups: the ranking it followed, the most disturbing first.
        trials: in their order.
        best: the trial that was kept, or None where none is better than the variant itself.
        stopped: ``done``, by its budget (``trials``, ``minutes``), or ``exhausted`` where not even the longest set of
            nodes met the limit.
        monotone: whether no larger set lost certainly more than a smaller one, as the search assumes.
        sentence: what was left out, and what it cost.
    """

    variant_id: str
    variant_name: str
    before: Estimate
    groups: tuple[NodeGroup, ...]
    trials: tuple[SearchTrial, ...]
    best: SearchTrial | None
    stopped: Literal["done", "trials", "minutes", "exhausted"]
    monotone: bool
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorShare:
    """What the operators of one type take of a model's time in an engine.

    Attributes:
        operator: the engine's name of the type.
        nodes: how many nodes of it ran.
        time_share: fraction of the time of all operators, 0 to 1.
    """

    operator: str
    nodes: int
    time_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineGraph:
    """The graph that an engine really runs, and where its time goes.

    Attributes:
        batch_size: samples in one run.
        threads: of the session.
        time: wall time of one run in ms, without the profiler.
        operators: by falling share of the time.
        macs: kind of arithmetic (``float32``, ``bfloat16``, ``float16``, ``int8``; ``int4 weights`` where only weights
            are narrow) -> multiply-adds for one sample.
        unfused_qdq: values that are quantized and dequantized at once, because no operator took both in, and weights
            that are dequantized in each run.
    """

    engine: EngineSpec
    engine_version: str
    batch_size: int
    threads: int
    time: Estimate
    operators: tuple[OperatorShare, ...]
    macs: Mapping[str, int]
    unfused_qdq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a variant is faster or slower than the baseline in one engine.

    Attributes:
        name: of the variant in its engine.
        speedup: the baseline's time over the variant's.
        before: the baseline's graph.
        after: the variant's graph.
        sentence: the reason in one sentence.
    """

    name: str
    baseline: str
    speedup: Estimate
    before: EngineGraph
    after: EngineGraph
    sentence: str


# --- serving ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingProfile:
    """How a variant is served.

    Attributes:
        server: the inference server.
        backend: what runs the model in it: ``burnish`` is our MLServer runtime, ``python`` Triton's Python backend
            with our model, ``onnxruntime`` and ``openvino`` Triton's own backends.
        protocol: what requests travel over: V2 gRPC with raw tensors, or V2 REST.
        max_batch_size: most requests in one batch; 1 switches batching off.
        max_batch_delay_ms: how long a request may wait for company.
        instances: Triton instances of the model; 1 for MLServer.
        parallel_workers: MLServer worker processes; 0 runs the model in the server process; 0 for Triton.
        threads: intra-op threads of each engine session.
    """

    server: Literal["mlserver", "triton"]
    backend: Literal["burnish", "python", "onnxruntime", "openvino"]
    protocol: Literal["grpc", "rest"] = "grpc"
    max_batch_size: int = 1
    max_batch_delay_ms: float = 0.0
    instances: int = 1
    parallel_workers: int = 0
    threads: int = 1

    @property
    def key(self) -> str:
        """A short name, unique for what is set: ``mlserver-grpc-b8-d2``, ``triton-rest-b1``, ..."""
        parts = [self.server, self.protocol, f"b{self.max_batch_size}"]
        if self.max_batch_delay_ms:
            parts.append(f"d{self.max_batch_delay_ms:g}")
        if self.instances != 1:
            parts.append(f"i{self.instances}")
        if self.parallel_workers:
            parts.append(f"w{self.parallel_workers}")
        if self.threads != 1:
            parts.append(f"t{self.threads}")
        if self.of_server:
            parts.append(self.backend)
        return "-".join(parts)

    @property
    def of_server(self) -> bool:
        """Whether the backend is the server's own, with an engine of its own version, and not ours."""
        return self.backend not in {"burnish", "python"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPoint:
    """A serving profile that a search served and measured.

    Attributes:
        score: what was measured, larger being better; None where it failed.
        reason: why the search looked at it.
        failure: why it has no score, or empty.
    """

    profile: ServingProfile
    score: Estimate | None
    reason: str
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSearch:
    """What the search for a serving profile came to.

    Attributes:
        space: how many profiles there were to choose from.
        points: those that were looked at, in their order.
        best: the one with the highest score, or None where all failed.
        maxima: number of workers or instances, as text -> the best with so many.
        bounded_out: profiles that were never served, because in process they are slower than the best is served.
        stopped: why: no other was expected to pay, the budget (``points``, ``minutes``), or nothing was left.
        sentence: all of this in one sentence.
        variant_name: whose serving was searched; empty where that goes without saying.
    """

    space: int
    points: tuple[ServingPoint, ...]
    best: ServingPoint | None
    maxima: Mapping[str, ServingPoint]
    bounded_out: int
    stopped: Literal["nothing_pays", "points", "minutes", "exhausted"]
    sentence: str
    variant_name: str = ""

    @property
    def share(self) -> float:
        """The share of the profiles that was looked at, 0 to 1."""
        return len(self.points) / self.space


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A variant in an engine under a serving profile: what is deployed and measured.

    Attributes:
        id: SHA-256 (hex, first 16 digits) over all the rest.
        name: ``<variant>[.<precision>] @ <serving profile's key>``: what people read.
        engine_version: of the engine that serves it; ``unknown`` where that is a server's own, which does not say.
        server_version: of the server, as far as that is known.
        cluster: the server of a Core 2 that serves it; empty for the campaign's own machine.
    """

    id: str
    name: str
    variant_id: str
    variant_name: str
    engine: EngineSpec
    engine_version: str
    serving: ServingProfile
    server_version: str
    cluster: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go.

    Attributes:
        url: ``host:port`` of the V2 endpoint, without a scheme.
        protocol: what is spoken there.
        model: the model's name there.
        headers: sent with each request (routing on Core 2); never credentials in a log.
        tls: whether the connection is encrypted, and the server's certificate verified.
        binary: whether a REST endpoint takes binary tensors (Triton does, MLServer does not).
        packed: whether over gRPC each tensor travels as one BYTES element that holds all its values, which only a
            model that knows of it can read.
    """

    url: str
    protocol: Literal["grpc", "rest"]
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: bool = False
    binary: bool = False
    packed: bool = False


# --- measuring -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """A fixed number of requests outstanding; answers the question of capacity."""

    concurrency: int
    kind: Literal["closed"] = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Arrivals that do not wait for answers; answers the question of latency at a rate.

    Attributes:
        rate_rps: mean arrivals a second.
        arrivals: exponential gaps, or equal ones.
        ramp_from_rps: the warm-up rises linearly from this rate to ``rate_rps``; None for a warm-up at ``rate_rps``.
    """

    rate_rps: float
    arrivals: Literal["poisson", "constant"] = "poisson"
    ramp_from_rps: float | None = None
    kind: Literal["open"] = "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Arrivals as they were recorded; they do not wait for answers. The warm-up has their mean rate, evenly spaced.

    Attributes:
        file: text with one arrival a line, in seconds from any origin.
        sha256: SHA-256 (hex) of that file.
        count: arrivals in it.
        span_s: from the first to the last, as recorded.
        speed: how many times faster than recorded they come.
    """

    file: str
    sha256: str
    count: int
    span_s: float
    speed: float = 1.0
    kind: Literal["replay"] = "replay"

    @property
    def rate_rps(self) -> float:
        """Mean arrivals a second, as they are offered."""
        return self.count * self.speed / max(self.span_s, 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProfile:
    """One window of load.

    Attributes:
        name: which of the campaign's loads this is (``closed``, ``0.8 saturation``, ``100 rps``, ...).
        warmup_s: sent first, not recorded.
        duration_s: the recorded window.
        timeout_s: an answer later than this is a miss.
        max_in_flight: open loop: an arrival beyond it is dropped, and counted as a miss.
        seed: of arrivals and of the order of payloads.
    """

    name: str
    load: ClosedLoop | OpenLoop | Replay
    warmup_s: float
    duration_s: float
    timeout_s: float = 10.0
    max_in_flight: int = 1024
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateFinding:
    """A validity gate that a run failed: the run is invalid, not merely warned about."""

    gate: str
    observed: str
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Where the time of the requests of one window went: means in ms a request; None where nobody tells.

    The client's times are those of the window; the server's counts take in the warm-up before it, at the same load. So
    a part that is found by difference may be off by what the two differ in, and may come out negative; then a note
    says so.

    Attributes:
        requests: that the server counted; 0 where it does not tell.
        lateness_ms: from when a request was due to when the client sent it.
        service_ms: from then to its answer, as the client sees it.
        network_ms: of that, outside of the server's own count: the wire, the protocol, the client's own work.
        server_ms: what the server counts for a request as a whole.
        queue_ms: of that, waiting for its turn or for company in a batch.
        compute_ms: of that, the model. A request in a batch takes as long as its batch.
        batch_rows: rows of a run of the model, on average.
        by_difference: which of these are differences of others, and hold whatever else is in between.
        notes: what is not known, or contradicts itself.
    """

    requests: int
    lateness_ms: float
    service_ms: float
    network_ms: float | None = None
    server_ms: float | None = None
    queue_ms: float | None = None
    compute_ms: float | None = None
    batch_rows: float | None = None
    by_difference: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One measured window.

    Attributes:
        load: what was offered.
        scheduled: arrivals that fell into the window (closed loop: requests sent in it).
        ok: answered in time and without error.
        errors: by class of error: ``timeout``, ``dropped``, ``status``, ``connection``, ``mismatch``.
        window_s: the length of the window as it was.
        metrics: of this run alone: ``throughput_rps``, ``latency_p50_ms``, ``latency_p90_ms``, ``latency_p99_ms``
            (those that the sample earns), ``service_p50_ms``, ``lateness_p99_ms``, ``client_cpu``, ``rss_mb``,
            ``cpu_s_per_1k``; where known ``peak_rss_mb``, ``cpu_joules_per_1k``, ``gpu_joules_per_1k``,
            ``gpu_memory_mb`` and ``gpu_utilisation``.
        findings: the gates it failed; a run with any is invalid.
        raw: path inside the campaign's folder of the compressed arrays (intended, sent, done in ns, status).
        raw_sha256: SHA-256 (hex) of that file; empty in records from before it was kept.
        breakdown: where the time went, as far as the server tells; None in records from before it was asked.
    """

    load: LoadProfile
    scheduled: int
    ok: int
    errors: Mapping[str, int]
    window_s: float
    metrics: Mapping[str, float]
    findings: tuple[GateFinding, ...]
    raw: str
    raw_sha256: str = ""
    breakdown: Breakdown | None = None

    @property
    def valid(self) -> bool:
        """Whether no gate failed."""
        return not self.findings


@dataclass(frozen=True, slots=True, kw_only=True)
class RateStage:
    """One hold of the staged open-loop search: what was offered, what came back, and whether the server kept up."""

    offered_rps: float
    achieved_rps: float
    latency_p50_ms: float | None
    latency_p90_ms: float | None
    sustained: bool
    findings: tuple[GateFinding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Where a candidate saturates, found once before the rounds.

    Attributes:
        concurrency: the closed-loop concurrency with the highest throughput.
        ladder: (concurrency, throughput a second) for each one tried.
        stages: the open-loop stages, in rising order.
        saturation_rps: the highest rate that was sustained; None where none was.
        slo_max: the highest rate that kept a latency limit, in requests a second; None where none did, or where it was
            not asked for.
    """

    candidate_id: str
    concurrency: int
    ladder: tuple[tuple[int, float], ...]
    stages: tuple[RateStage, ...]
    saturation_rps: float | None
    slo_max: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityAdvice:
    """What follows from a capacity.

    Attributes:
        knee: the smallest concurrency whose throughput is within 5 % of the highest; None where nothing was answered.
        law: parameters of the Universal Scalability Law of the ladder, ``gamma``, ``sigma`` and ``kappa``; empty where
            it does not follow that.
        explanation: what the law says, or why it does not hold; empty where nothing was answered.
        target_rps: (least, most) requests a second to give one replica; None where there is no saturation point.
        lines: all of it for people, a sentence each.
    """

    candidate_id: str
    knee: int | None
    law: Metrics
    explanation: str
    target_rps: tuple[float, float] | None
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """The latencies of a candidate at one load, all valid runs together, as far as their number earns percentiles.

    Attributes:
        requests: behind it.
        points: (percentile, latency in ms), rising.
    """

    candidate_id: str
    load: str
    requests: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one candidate gave in one round: a run for each load, in the place that chance gave it."""

    candidate_id: str
    number: int
    position: int
    runs: tuple[RunRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What the first deployment of a candidate showed.

    Attributes:
        load_time_s: from the request to load the model, on a server that runs, to its readiness.
        rendered: path -> text of the files that were rendered for it.
        first_request_ms: the very first inference, over a connection that was open; None where it was not timed.
        reload_times_s: the same at each further deployment, where the policy asks how long loading takes.
    """

    candidate_id: str
    load_time_s: float
    rendered: Mapping[str, str]
    first_request_ms: float | None = None
    reload_times_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """What came of asking a server many things at once: whether each request got its own answer.

    Attributes:
        requests: sent, in bursts.
        rows: samples in them; a request may hold several.
        failed: requests without an answer.
        wrong: replies that are not the reference's answer within the tolerance.
        swapped: (sample, the other sample in the same burst whose answer came instead), for each row where that is so.
        told_apart: rows whose expected answer differs from those of all others in the burst; a swap of the rest would
            not be seen.
        worst: the largest deviation of a value, as a share of the largest value of its output.
        reason: what is wrong, for the user; empty where nothing is.
    """

    requests: int
    rows: int
    failed: int
    wrong: int
    swapped: tuple[tuple[int, int], ...]
    told_apart: int
    worst: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether every request got its own answer."""
        return not self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What the valid runs of one candidate say together.

    Attributes:
        load: the load the metrics belong to (``0.8 saturation``, ``100 rps``, ``concurrency 1``), or None for those
            that belong to none (``max_throughput_rps``, ``saturation_rps``, ``rss_mb``, ``load_time_s``, ...).
        invalid_runs: runs left out, and counted.
    """

    candidate_id: str
    load: str | None
    metrics: Metrics
    invalid_runs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A candidate against the baseline, from interleaved pairs.

    Attributes:
        ratio: candidate over baseline; the interval comes from log-ratios of pairs.
        noise_floor: the relative difference below which nothing is called a difference.
    """

    candidate_id: str
    baseline_id: str
    metric: str
    load: str | None
    ratio: Estimate
    noise_floor: float
    word: Literal["faster", "equivalent", "slower", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """How long a model takes when it is asked at one of several places on the way to it.

    Attributes:
        name: of the place: ``server``, ``agent``, ``mesh``.
        url: of the place.
        service_p50_ms: median service time there, over rounds.
        added_ms: what is more there than at the place before, by the difference of each round; None of the innermost.
        invalid_runs: windows left out, and counted.
    """

    name: str
    url: str
    service_p50_ms: Estimate | None
    added_ms: Estimate | None
    invalid_runs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A machine as it is paid for.

    Attributes:
        name: what people call it.
        cores: CPUs that the price is of.
        gpus: GPUs that the price is of.
        price_per_hour: of the whole machine; None where it is not known.
        currency: of the price, such as ``EUR``.
        price_source: who says so.
        price_date: when that was read, ISO 8601.
    """

    name: str
    cores: int
    gpus: int = 0
    price_per_hour: float | None = None
    currency: str = ""
    price_source: str = ""
    price_date: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine a number belongs to. Ratios hold only within one fingerprint.

    Attributes:
        fingerprint: SHA-256 (hex, first 16 digits) over what makes two machines differ in speed.
        instruction_sets: those of the CPU that engines make use of (``avx2``, ``avx512_vnni``, ...).
        gpus: names of GPUs, if any.
    """

    fingerprint: str
    cpu_model: str
    cores: int
    memory_mb: int
    instruction_sets: tuple[str, ...]
    gpus: tuple[str, ...]
    kernel: str
    pinning: str


# --- deciding --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A hard limit.

    Attributes:
        text: as the user wrote it.
        metric: the metric's name.
        op: which side of the limit passes.
        limit: in the metric's unit; for ``relative`` a fraction of the reference's value.
        relative: whether the limit is relative to a reference.
        load: the load the metric must be measured at, or None for a metric that has none.
        reference: what a relative limit refers to: the campaign's baseline, or the champion that serves now.
    """

    text: str
    metric: str
    op: Literal["<=", ">=", "<", ">"]
    limit: float
    relative: bool = False
    load: str | None = None
    reference: Literal["baseline", "champion"] = "baseline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is to be made large or small among those that pass.

    Attributes:
        weight: above 0, where objectives are weighed against each other; None where they count in their order.
    """

    text: str
    direction: Literal["maximize", "minimize"]
    metric: str
    load: str | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The user's constraints and objectives.

    Attributes:
        objectives: in the order they count, or each with a weight.
        signature: whether a candidate may take or give other tensors than the baseline: ``same`` refuses it, since who
            calls the model would have to change, too.
    """

    constraints: tuple[Constraint, ...]
    objectives: tuple[Objective, ...]
    signature: Literal["same", "may_change"] = "same"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One constraint on one candidate: pass, fail, or unknown (which never wins)."""

    constraint: Constraint
    outcome: Literal["pass", "fail", "unknown"]
    observed: Estimate | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why a candidate was not selected: one sentence, and the judgements behind it."""

    candidate_id: str
    candidate_name: str
    reason: str
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosestMiss:
    """Where nothing passes: the candidate that came nearest to one constraint, and what would admit it."""

    constraint: Constraint
    candidate_id: str
    candidate_name: str
    observed: Estimate
    relaxation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of a campaign.

    Attributes:
        selected: id of the selected candidate, or None where nothing may be.
        sentence: the verdict in one sentence.
        provisional: whether the level of proof forbids promotion (``quick``), or what was left of it by a budget.
        pareto: ids of the candidates that no other beats on every objective axis.
        unknown: ids of candidates that could be neither passed nor failed.
        champion: id of the candidate that serves now, which limits with ``vs champion`` refer to; None where none is
            named.
        cut_short: what ended the campaign before all was measured, in a sentence; empty where nothing did.
    """

    policy: Policy
    baseline: str | None
    selected: str | None
    sentence: str
    provisional: bool
    pareto: tuple[str, ...]
    rejections: tuple[Rejection, ...]
    unknown: tuple[str, ...]
    closest: tuple[ClosestMiss, ...]
    champion: str | None = None
    cut_short: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Champion:
    """The candidate that serves now, and what came of measuring it again beside the others.

    Attributes:
        named: where the campaign file says that it is.
        candidate_id: in this campaign; None where there is none yet, or where it could not be served again.
        was: its name in the campaign that chose it; empty where there is none yet.
        campaign_id: of that campaign; empty where there is none yet.
        comparisons: of the other candidates with it, in the same rounds.
        passed_over: limits that hold against the champion, and were not judged as there is none yet.
        notes: what differs from how it was measured then.
    """

    named: str
    candidate_id: str | None
    was: str = ""
    campaign_id: str = ""
    comparisons: tuple[Comparison, ...] = ()
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """Everything a campaign found: what a report shows and a tracker records.

    Attributes:
        id: SHA-256 (hex, first 16 digits) over the plan, so that the same campaign synced twice is one.
        model_name: the name of the registered model.
        started_at: ISO 8601, UTC.
        rendered: candidate id -> path of a rendered file -> its text.
        versions: package -> version. Never environment variables.
        artifacts: variant id -> folder of its files on this machine.
        samples_name: name of the file that held the evaluation samples, without its folder; empty where none did.
        hardware: the machine that costs are counted for; None where the user names none.
        serving_searches: what came of each search for a serving profile.
        advice: what follows from the capacities.
        spectra: latencies at each load, percentile by percentile.
        champion: what serves now, measured again; None where the campaign names none.
    """

    id: str
    name: str
    model_name: str
    level: str
    seed: int
    started_at: str
    host: Host
    versions: Mapping[str, str]
    samples_digest: str
    task_metric: str
    sources: tuple[Source, ...]
    variants: tuple[Variant, ...]
    fidelities: tuple[Fidelity, ...]
    screenings: tuple[Screening, ...]
    candidates: tuple[Candidate, ...]
    capacities: tuple[Capacity, ...]
    rounds: tuple[Round, ...]
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    failures: tuple[Failure, ...]
    rendered: Mapping[str, Mapping[str, str]]
    artifacts: Mapping[str, str]
    verdict: Verdict
    samples_name: str = ""
    hardware: HardwareProfile | None = None
    serving_searches: tuple[ServingSearch, ...] = ()
    advice: tuple[CapacityAdvice, ...] = ()
    spectra: tuple[Spectrum, ...] = ()
    champion: Champion | None = None


# --- promotion -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionStep:
    """One step of a promotion.

    Attributes:
        name: tells it from the others: the action, for a split with its share (``weights-10``).
        action: what is done.
        percent: share of the requests that the challenger answers (or gets copies of, for ``mirror``).
        watch_s: how long it is watched afterwards; 0 for not at all.
    """

    name: str
    action: Literal["register", "load", "mirror", "weights", "swap", "champion", "unload"]
    percent: int = 0
    watch_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Watching:
    """How the steps of a promotion were to be watched when it began; whoever goes on with it watches no less.

    Attributes:
        metrics: those of the policy that live traffic was to tell of.
        rate_rps: requests a second of burnish's own.
        prometheus: URL of the Prometheus that was to be asked, too; None for none.
    """

    metrics: tuple[str, ...]
    rate_rps: float
    prometheus: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What is to be done so that a candidate becomes the champion; nothing in it changes once it has begun.

    Attributes:
        id: its own, another for each time that it is begun anew.
        model: the registered model.
        production: the name of the Model that callers ask.
        challenger: the name of the Model beside it, for the time of the promotion.
        experiment: the name of the split between the two.
        location: where it is served, for people.
        campaign_id: that chose the candidate.
        candidate_id: the challenger.
        candidate_name: its name.
        version: of the registered model: the challenger.
        fingerprint: digest of what the registry says of that version.
        champion: the version that is the champion before; None where there is none.
        challenger_before: the version that had the alias ``challenger`` before; None where none had.
        policy: whose limits are watched.
        steps: in their order.
        reason: why it is promoted: the verdict's sentence.
        notes: what cannot be watched, and what else is to be known, a sentence each.
        resource: what is in production: a Model, or a Pipeline of Models.
        watching: how it was to be watched; None where nothing was.
    """

    id: str
    model: str
    production: str
    challenger: str
    experiment: str
    location: str
    campaign_id: str
    candidate_id: str
    candidate_name: str
    version: str
    fingerprint: str
    champion: str | None
    challenger_before: str | None
    policy: Policy
    steps: tuple[PromotionStep, ...]
    reason: str
    notes: tuple[str, ...] = ()
    resource: Literal["model", "pipeline"] = "model"
    watching: Watching | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSnapshot:
    """What was applied and in force before the first step of a promotion.

    Attributes:
        manifests: ``<Kind>/<name>`` -> the text of the manifest, byte for byte.
        live: ``<Kind>/<name>`` -> canonical JSON of the spec in force.
        absent: ``<Kind>/<name>`` of what the promotion adds and was not there.
        serving: what the production Model serves, as `Rollout.serving` tells it; empty where there is none.
    """

    manifests: Mapping[str, str]
    live: Mapping[str, str]
    absent: tuple[str, ...]
    serving: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was seen while a step was watched.

    Attributes:
        watched_s: for how long.
        challenger: metric -> what was seen of it.
        champion: the same of the champion: of it latency alone, where it answered enough requests.
        answered: ``challenger``, ``champion`` and ``others`` -> how many requests to the experiment each answered;
            ``unnamed`` -> how many replies did not say who had.
        notes: what is to be known of it, a sentence each.
    """

    watched_s: float
    challenger: Metrics
    champion: Metrics
    answered: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionEvent:
    """One line of a promotion's journal.

    Attributes:
        promotion_id: of the promotion.
        number: counts its events from 1.
        step: the name of a step, or ``promotion`` or ``rollback`` for the whole.
        phase: what is about to be done, was done, or failed.
        at: when, in ISO 8601, UTC.
        detail: what came of it, for people; of an intended swap, what the production Model is to serve.
        observation: what was watched, where something was.
    """

    promotion_id: str
    number: int
    step: str
    phase: Literal["intent", "done", "failed"]
    at: str
    detail: str = ""
    observation: Observation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reign:
    """From when on a version of a registered model was the champion, and why.

    Attributes:
        model: the registered model.
        version: of it; None from when on there was no champion.
        since: ISO 8601, UTC.
        how: it was promoted, or came back when another was rolled back.
        reason: why.
        candidate: what the version serves; empty where that is not known.
        promotion_id: of the promotion or rollback.
        location: where it was served.
    """

    model: str
    version: str | None
    since: str
    how: Literal["promoted", "rolled back"]
    reason: str
    candidate: str = ""
    promotion_id: str = ""
    location: str = ""


# --- fleets ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a campaign won: its selected candidate beside its baseline, on one host.

    Attributes:
        candidate: name of the selected.
        variant_name: that of its variant.
        is_baseline: whether it is the baseline itself, so that nothing was won.
        against: name of the candidate that the speed-up is over: the float32 baseline, served the same way where that
            was measured; empty where nothing was compared.
        metric: that the speed-up is of; empty where nothing was compared.
        load: of the metric, where it has one.
        speed_up: how many times better in that metric; above 1 is faster, of a latency too. None where the two were
            not compared.
        word: what the comparison says; None where rounds were not compared by the method.
        size_mb: the selected's files, in MB of 10^6 bytes.
        baseline_size_mb: the baseline's.
        accuracy_drop: what the selected loses of accuracy.
        cost: of a million inferences; None where no price is known.
        baseline_cost: the same of the baseline.
        currency: of both.
    """

    candidate: str
    variant_name: str
    is_baseline: bool
    against: str = ""
    metric: str = ""
    load: str | None = None
    speed_up: Estimate | None = None
    word: Literal["faster", "equivalent", "slower", "undecided"] | None = None
    size_mb: float | None = None
    baseline_size_mb: float | None = None
    accuracy_drop: Estimate | None = None
    cost: Estimate | None = None
    baseline_cost: Estimate | None = None
    currency: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOutcome:
    """What became of one attempt at a model of a fleet.

    Attributes:
        model: name of the model.
        attempt: counts from 1.
        state: ``won``, ``no_winner`` (a verdict, and nothing to serve), ``failed`` (no verdict), or ``stopped`` (the
            fleet was ended meanwhile).
        kind: of a failure, as errors have it (``input``, ``unreachable``), ``killed``, or ``budget``; else empty.
        reason: why there is no winner; empty where there is one.
        exit_code: of the campaign's process; negative where a signal ended it.
        minutes: that this attempt took.
        allotted: minutes that it might take; None for any.
        cut: whether the campaign ended early for want of minutes, with the best so far.
        campaign_id: of the campaign's record; empty where it left none.
        level: of proof.
        provisional: whether the level forbids promotion.
        host: fingerprint of the machine.
        cpu_model: of the machine.
        sentence: the verdict's.
        gain: what was won.
        misses: where nothing was: how near the nearest came, a sentence each.
        beside: files that the sources consist of beside those that the campaign names.
        ended_at: ISO 8601, UTC.
    """

    model: str
    attempt: int
    state: Literal["won", "no_winner", "failed", "stopped"]
    kind: str = ""
    reason: str = ""
    exit_code: int
    minutes: float
    allotted: float | None
    cut: bool = False
    campaign_id: str = ""
    level: str = ""
    provisional: bool = False
    host: str = ""
    cpu_model: str = ""
    sentence: str = ""
    gain: Gain | None = None
    misses: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    ended_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetModel:
    """A model of a fleet.

    Attributes:
        name: its own.
        group: whose it is; empty where the file names nobody.
        share: its weight in its group.
        minutes: the most that it may take; None for what the fleet has.
        work: its campaign's working folder, relative to the fleet's.
    """

    name: str
    group: str
    share: float
    minutes: float | None
    work: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A fleet of campaigns, and what became of each.

    Attributes:
        name: of the fleet.
        models: in the order of the file.
        groups: group -> its share.
        parallel: how many campaigns are under way at the same time.
        minutes: the most that a run of the fleet may take; None for any.
        outcomes: the newest of each model; a model without one was not begun.
        spent: model -> minutes of all its attempts.
    """

    name: str
    models: tuple[FleetModel, ...]
    groups: Mapping[str, float]
    parallel: int
    minutes: float | None
    outcomes: tuple[FleetOutcome, ...] = ()
    spent: Mapping[str, float] = field(default_factory=dict)
