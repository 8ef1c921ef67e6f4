"""A realistic campaign record: made up, deterministic, and complete enough for reports, tracking and selection."""

import dataclasses
import hashlib
from typing import Literal

from registry.records import (
    Artifact,
    ArtifactFile,
    Campaign,
    Candidate,
    Capacity,
    ClosedLoop,
    ClosestMiss,
    Comparison,
    Constraint,
    EngineSpec,
    Estimate,
    Failure,
    Fidelity,
    GateFinding,
    Host,
    Judgement,
    LoadProfile,
    Measurement,
    Objective,
    OpenLoop,
    Policy,
    RateStage,
    Recipe,
    Rejection,
    Round,
    RunRecord,
    Screening,
    ServingProfile,
    Source,
    StageCall,
    TensorSpec,
    Variant,
    Verdict,
)

AT_SATURATION = "0.8 saturation"
VERSIONS = {"burnish": "0.1.0", "onnx": "1.23.2", "onnxruntime": "1.31.1", "openvino": "2026.4.1", "mlserver": "1.7.1"}
ORT = EngineSpec(name="onnxruntime")
OPENVINO = EngineSpec(name="openvino")
INPUTS = (TensorSpec(name="image", dtype="float32", shape=("batch", 1, 32, 32)),)
OUTPUTS = (TensorSpec(name="logits", dtype="float32", shape=("batch", 10)),)

ACCURACY = Constraint(text="accuracy_drop <= 0.01", metric="accuracy_drop", op="<=", limit=0.01)
LATENCY = Constraint(
    text="latency_p90_ms <= 50 at 0.8 saturation", metric="latency_p90_ms", op="<=", limit=50.0, load=AT_SATURATION
)
POLICY = Policy(
    constraints=(ACCURACY, LATENCY),
    objectives=(Objective(text="maximize max_throughput_rps", direction="maximize", metric="max_throughput_rps"),),
)


def sha(text: str) -> str:
    """A digest that is the same in each run."""
    return hashlib.sha256(text.encode()).hexdigest()


def estimate(value: float, spread: float, unit: str, *, runs: int = 3, method: str = "t over runs") -> Estimate:
    """An estimate whose interval reaches ``spread`` to both sides."""
    return Estimate(value=value, low=value - spread, high=value + spread, runs=runs, method=method, unit=unit)


def artifact(name: str, size_bytes: int, *, format: Literal["onnx", "openvino"] = "onnx") -> Artifact:
    """An artifact of made-up bytes."""
    entry = "model.onnx" if format == "onnx" else "model.xml"
    files = [ArtifactFile(path=entry, sha256=sha(name), size_bytes=size_bytes)]
    if format == "openvino":
        files.append(ArtifactFile(path="model.bin", sha256=sha(name + ".bin"), size_bytes=size_bytes))
    return Artifact(
        digest=sha("artifact " + name),
        format=format,
        entry=entry,
        files=tuple(files),
        inputs=INPUTS,
        outputs=OUTPUTS,
    )


def variant(
    name: str, stages: tuple[StageCall, ...], engine: EngineSpec, size_bytes: int, *, batch_dependent: bool = False
) -> Variant:
    """A variant of the source ``digits``."""
    return Variant(
        id=sha("variant " + name)[:16],
        name=name,
        source="digits",
        source_digest=sha("digits"),
        recipe=Recipe(name=name, stages=stages, engines=(engine,)),
        calibration_digest=sha("calibration") if "static" in name else None,
        seed=7,
        tool_versions={"onnxruntime": VERSIONS["onnxruntime"]},
        artifact=artifact(name, size_bytes, format="openvino" if engine.name == "openvino" else "onnx"),
        batch_dependent=batch_dependent,
        made_in_s=1.5,
        notes=("calibrated on 256 samples",) if "static" in name else (),
    )


FLOAT32 = variant("float32", (), ORT, 1_118_000)
OPTIMIZED = variant("ort-optimized", (StageCall(name="optimize", params={"level": "extended"}),), ORT, 1_109_000)
DYNAMIC = variant(
    "int8-dynamic", (StageCall(name="quantize", params={"scheme": "dynamic"}),), ORT, 312_000, batch_dependent=True
)
STATIC = variant(
    "int8-static",
    (StageCall(name="simplify"), StageCall(name="quantize", params={"scheme": "static", "per_channel": True})),
    ORT,
    331_000,
)
OPENVINO_BF16 = variant("openvino", (StageCall(name="openvino"),), OPENVINO, 1_121_000)
VARIANTS = (FLOAT32, OPTIMIZED, DYNAMIC, STATIC, OPENVINO_BF16)


def candidate(made: Variant, server: Literal["mlserver", "triton"]) -> Candidate:
    """A variant behind a server, batching up to 8."""
    serving = ServingProfile(
        server=server,
        backend="burnish" if server == "mlserver" else "python",
        max_batch_size=8,
        max_batch_delay_ms=2.0,
    )
    engine = made.recipe.engines[0]
    name = f"{made.name} @ {serving.key}"
    return Candidate(
        id=sha("candidate " + name)[:16],
        name=name,
        variant_id=made.id,
        variant_name=made.name,
        engine=engine,
        engine_version=VERSIONS[engine.name],
        serving=serving,
        server_version="1.7.1" if server == "mlserver" else "2.51.0",
    )


BASELINE = candidate(FLOAT32, "mlserver")
STATIC_MLSERVER = candidate(STATIC, "mlserver")
STATIC_TRITON = candidate(STATIC, "triton")
OPENVINO_TRITON = candidate(OPENVINO_BF16, "triton")
CANDIDATES = (BASELINE, STATIC_MLSERVER, STATIC_TRITON, OPENVINO_TRITON)

# What each candidate is like: saturation, closed-loop maximum, half its spread (requests a second), service time (ms).
LAWS = {
    BASELINE.id: (412.0, 455.3, 6.2, 8.1),
    STATIC_MLSERVER.id: (790.0, 884.6, 21.0, 4.4),
    STATIC_TRITON.id: (1104.0, 1236.9, 14.8, 2.3),
    OPENVINO_TRITON.id: (905.0, 1010.2, 96.0, 3.0),
}


def _latency(service_ms: float, load: float) -> tuple[float, float]:
    return service_ms * (1 + load / (2 * (1 - load))), service_ms * (1.6 + 2.3 * load / (1 - load))


def capacity(candidate_id: str) -> Capacity:
    """The ladder and stages of a candidate that follow its law; the last stage is not sustained."""
    saturation, peak, _, service_ms = LAWS[candidate_id]
    stages = []
    for load in (0.2, 0.4, 0.6, 0.8, 0.9, 0.98):
        p50, p90 = _latency(service_ms, load)
        stages.append(
            RateStage(
                offered_rps=round(saturation * load / 0.9, 1),
                achieved_rps=round(saturation * min(load / 0.9, 1.0), 1),
                latency_p50_ms=round(p50, 3),
                latency_p90_ms=round(p90, 3),
                sustained=load <= 0.9,
            )
        )
    stages.append(
        RateStage(
            offered_rps=round(saturation * 1.2, 1),
            achieved_rps=saturation,
            latency_p50_ms=None,
            latency_p90_ms=None,
            sustained=False,
            findings=(GateFinding(gate="in_flight", observed="1024", limit="1024"),),
        )
    )
    ladder = tuple((n, round(peak * (1 - 0.5**n), 1)) for n in (1, 2, 4, 8))
    return Capacity(
        candidate_id=candidate_id, concurrency=8, ladder=ladder, stages=tuple(stages), saturation_rps=saturation
    )


def _run(
    load: LoadProfile, metrics: dict[str, float], *, raw: str, findings: tuple[GateFinding, ...] = ()
) -> RunRecord:
    scheduled = round(metrics["throughput_rps"] * load.duration_s)
    return RunRecord(
        load=load,
        scheduled=scheduled,
        ok=scheduled,
        errors={},
        window_s=load.duration_s,
        metrics=metrics,
        findings=findings,
        raw=raw,
    )


def rounds() -> tuple[Round, ...]:
    """Three rounds over all candidates, each with a closed and an open loop; one run failed a gate."""
    made = []
    for number in (1, 2, 3):
        for position in range(len(CANDIDATES)):
            which = CANDIDATES[(position + number) % len(CANDIDATES)]
            saturation, peak, spread, service_ms = LAWS[which.id]
            shift = (number - 2) * spread / 2
            p50, p90 = _latency(service_ms, 0.72)
            closed = LoadProfile(name="closed", load=ClosedLoop(concurrency=8), warmup_s=1.0, duration_s=3.0)
            opened = LoadProfile(
                name=AT_SATURATION, load=OpenLoop(rate_rps=round(0.8 * saturation, 1)), warmup_s=1.0, duration_s=5.0
            )
            late = GateFinding(gate="lateness", observed="p99 3.1 ms", limit="1 ms")
            bad = (late,) if which is OPENVINO_TRITON and number == 2 else ()
            made.append(
                Round(
                    candidate_id=which.id,
                    number=number,
                    position=position,
                    runs=(
                        _run(
                            closed,
                            {"throughput_rps": round(peak + shift, 1)},
                            raw=f"raw/{which.id}-{number}-closed.npz",
                        ),
                        _run(
                            opened,
                            {
                                "throughput_rps": round(0.8 * saturation, 1),
                                "latency_p50_ms": round(p50, 3),
                                "latency_p90_ms": round(p90 + shift / 100, 3),
                            },
                            raw=f"raw/{which.id}-{number}-open.npz",
                            findings=bad,
                        ),
                    ),
                )
            )
    return tuple(made)


def measurements() -> tuple[Measurement, ...]:
    """What the rounds say: two measurements a candidate."""
    made = []
    for which in CANDIDATES:
        saturation, peak, spread, service_ms = LAWS[which.id]
        p50, p90 = _latency(service_ms, 0.72)
        slow = 3.0 if which is STATIC_MLSERVER else 1.0
        latencies = {
            "latency_p50_ms": estimate(round(p50 * slow, 3), 0.21, "ms"),
            "latency_p90_ms": estimate(round(p90 * slow, 3), 1.1 * slow, "ms"),
            "throughput_rps": estimate(round(0.8 * saturation, 1), 1.9, "1/s"),
        }
        if which is OPENVINO_TRITON:
            latencies = {"latency_p50_ms": latencies["latency_p50_ms"]}
        made += [
            Measurement(
                candidate_id=which.id,
                load=None,
                metrics={
                    "max_throughput_rps": estimate(peak, spread, "1/s"),
                    "saturation_rps": estimate(saturation, 0.05 * saturation, "1/s", runs=1, method="staged search"),
                    "rss_mb": estimate(241.0 + spread, 4.0, "MB"),
                    "load_time_s": estimate(1.31, 0.09, "s"),
                },
            ),
            Measurement(
                candidate_id=which.id,
                load=AT_SATURATION,
                metrics=latencies,
                invalid_runs=int(which is OPENVINO_TRITON),
            ),
        ]
    return tuple(made)


def comparisons() -> tuple[Comparison, ...]:
    """Throughput of each candidate but the baseline against the baseline."""
    base = LAWS[BASELINE.id][1]
    made = []
    for which in CANDIDATES[1:]:
        ratio = LAWS[which.id][1] / base
        undecided = which is OPENVINO_TRITON
        spread = 1.3 if undecided else 0.06
        made.append(
            Comparison(
                candidate_id=which.id,
                baseline_id=BASELINE.id,
                metric="max_throughput_rps",
                load=None,
                ratio=estimate(round(ratio, 4), spread, "1", method="paired bootstrap"),
                noise_floor=0.031,
                word="undecided" if undecided else "faster",
            )
        )
    return tuple(made)


def fidelities() -> tuple[Fidelity, ...]:
    """Accuracy of each variant in its engine."""
    drops = {FLOAT32.id: 0.0, OPTIMIZED.id: 0.0, DYNAMIC.id: 0.0022, STATIC.id: 0.0011, OPENVINO_BF16.id: 0.0}
    made = []
    for which in VARIANTS:
        drop = drops[which.id]
        made.append(
            Fidelity(
                variant_id=which.id,
                engine=which.recipe.engines[0],
                engine_version=VERSIONS[which.recipe.engines[0].name],
                instruction_set="avx512_vnni",
                batch_size=8,
                samples_digest=sha("samples"),
                samples=899,
                task_metric="accuracy",
                metrics={
                    "accuracy": estimate(0.9855 - drop, 0.0071, "fraction", runs=899, method="Wilson"),
                    "accuracy_drop": estimate(drop, 0.0033, "fraction", runs=899, method="paired bootstrap"),
                    "flip_rate": Estimate(value=drop, low=0.0, high=drop + 0.0033, runs=899, method="exact", unit="1"),
                },
            )
        )
    return tuple(made)


FAILURES = (
    Failure(
        subject="float16",
        phase="make",
        kind="not_applicable",
        reason="the CPU has no float16 arithmetic, so ONNX Runtime would cast every node back to float32",
    ),
    Failure(
        subject="int8-dynamic",
        phase="screen",
        kind="screened_out",
        reason="0.27 times the speed of float32 in process; a faster sibling was served instead",
    ),
    Failure(
        subject="ort-optimized",
        phase="screen",
        kind="screened_out",
        reason="not faster than float32 in process (ratio 1.00 [0.98, 1.02])",
    ),
    Failure(
        subject="openvino @ mlserver-grpc-b8-d2",
        phase="deploy",
        kind="died",
        reason="the server ended with exit code 137 while it loaded the model",
        detail="Killed\nlast line of <server.log>",
    ),
)


def verdict() -> Verdict:
    """Static int8 on Triton wins; one is too slow, one is unknown, the baseline is beaten."""
    slow = dict(measurements()[3].metrics)["latency_p90_ms"]
    return Verdict(
        policy=POLICY,
        baseline=BASELINE.id,
        selected=STATIC_TRITON.id,
        sentence=(
            "int8-static @ triton-grpc-b8-d2 serves 1237 requests/s, 2.72 times the float32 baseline, and loses "
            "at most 0.0044 of accuracy."
        ),
        provisional=True,
        pareto=(BASELINE.id, STATIC_TRITON.id),
        rejections=(
            Rejection(
                candidate_id=BASELINE.id,
                candidate_name=BASELINE.name,
                reason="meets the policy, but serves 455 requests/s against 1237",
                judgements=(),
            ),
            Rejection(
                candidate_id=STATIC_MLSERVER.id,
                candidate_name=STATIC_MLSERVER.name,
                reason="latency_p90_ms 99.2 ms [95.9, 102.5] > 50 ms at 0.8 saturation",
                judgements=(
                    Judgement(
                        constraint=LATENCY, outcome="fail", observed=slow, reason="99.2 ms [95.9, 102.5] > 50 ms"
                    ),
                ),
            ),
            Rejection(
                candidate_id=OPENVINO_TRITON.id,
                candidate_name=OPENVINO_TRITON.name,
                reason="latency_p90_ms at 0.8 saturation is unknown: 1 of 3 runs was invalid (lateness)",
                judgements=(
                    Judgement(constraint=LATENCY, outcome="unknown", observed=None, reason="1 of 3 runs was invalid"),
                ),
            ),
        ),
        unknown=(OPENVINO_TRITON.id,),
        closest=(),
    )


def no_winner() -> Verdict:
    """Nothing meets the policy; the closest miss says what would."""
    return dataclasses.replace(
        verdict(),
        selected=None,
        sentence="No candidate meets the policy; the closest misses accuracy_drop <= 0.001 by 0.0034.",
        pareto=(),
        closest=(
            ClosestMiss(
                constraint=ACCURACY,
                candidate_id=STATIC_TRITON.id,
                candidate_name=STATIC_TRITON.name,
                observed=estimate(0.0011, 0.0033, "fraction", runs=899),
                relaxation="accuracy_drop <= 0.0044 would admit it",
            ),
        ),
    )


def campaign(*, level: str = "quick") -> Campaign:
    """The whole campaign. Other shapes of it by ``dataclasses.replace``."""
    made = verdict()
    return Campaign(
        id=sha("campaign")[:16],
        name="digits",
        model_name="digits",
        level=level,
        seed=7,
        started_at="2026-01-15T09:30:00+00:00",
        host=Host(
            fingerprint=sha("host")[:16],
            cpu_model="AMD EPYC 9R14",
            cores=2,
            memory_mb=23_000,
            instruction_sets=("avx2", "avx512_bf16", "avx512_vnni"),
            gpus=(),
            kernel="6.1.0",
            pinning="server on core 0, load generator on core 1",
        ),
        versions=VERSIONS,
        samples_digest=sha("samples"),
        task_metric="accuracy",
        sources=(
            Source(
                name="digits",
                kind="onnx",
                location="digits.onnx",
                digest=sha("digits"),
                artifact=artifact("float32", 1_118_000),
            ),
        ),
        variants=VARIANTS,
        fidelities=fidelities(),
        screenings=tuple(
            Screening(
                variant_id=which.id,
                engine=which.recipe.engines[0],
                threads=1,
                metrics={
                    "inprocess_ms.batch_1": estimate(time_ms, 0.02, "ms", runs=50, method="median, order statistics"),
                    "inprocess_ms.batch_8": estimate(
                        8 * time_ms, 0.1, "ms", runs=50, method="median, order statistics"
                    ),
                },
            )
            for which, time_ms in zip(VARIANTS, (1.62, 1.61, 6.0, 0.46, 0.81), strict=True)
        ),
        candidates=CANDIDATES,
        capacities=tuple(capacity(which.id) for which in CANDIDATES),
        rounds=rounds(),
        measurements=measurements(),
        comparisons=comparisons(),
        failures=FAILURES,
        rendered={
            which.id: {"model-settings.json": f'{{"name": "{which.variant_name}"}}\n'}
            if which.serving.server == "mlserver"
            else {f"{which.variant_name}/config.pbtxt": f'name: "{which.variant_name}"\nmax_batch_size: 8\n'}
            for which in CANDIDATES
        },
        artifacts={},
        verdict=dataclasses.replace(made, provisional=level == "quick"),
    )
