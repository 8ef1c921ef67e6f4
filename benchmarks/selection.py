"""How long a verdict among 10,000 candidates takes: records to table, table to verdict. Made-up records, fixed seed."""

import statistics
import time

import numpy as np
from figures import figure, finish, say

from registry.policy import parse_policy
from registry.records import (
    Artifact,
    ArtifactFile,
    Candidate,
    Comparison,
    EngineSpec,
    Estimate,
    Fidelity,
    Measurement,
    Policy,
    Recipe,
    ServingProfile,
    StageCall,
    Variant,
    Verdict,
    exact,
)
from registry.selection import metric_table, select

VARIANTS = 1_000
PROFILES = 10
REPEATS = 5
CONSTRAINTS = (
    "accuracy_drop <= 1% rel",
    "flip_rate <= 2%",
    "latency_p99_ms <= 25 at 0.8 saturation",
    "rss_mb <= 600",
    "load_time_s <= 20",
)
ENGINE = EngineSpec(name="onnxruntime")
Records = tuple[list[Candidate], list[Variant], list[Fidelity], list[Measurement], list[Comparison]]


def estimate(value: float, spread: float, unit: str) -> Estimate:
    low, high = value - abs(value) * spread, value + abs(value) * spread
    return Estimate(value=value, low=low, high=high, runs=5, method="t over runs", unit=unit)


def variant(number: int) -> Variant:
    file = ArtifactFile(path="model.onnx", sha256=f"{number:064x}", size_bytes=1_000_000 + 997 * (VARIANTS - number))
    calls = tuple(StageCall(name=f"stage-{step}") for step in range(number % 5))
    return Variant(
        id=f"{number:016x}", name=f"variant-{number}", source="model", source_digest="0" * 64,
        recipe=Recipe(name=f"variant-{number}", stages=calls, engines=(ENGINE,)),
        calibration_digest=None, seed=0, tool_versions={},
        artifact=Artifact(
            digest=f"{number:064x}", format="onnx", entry="model.onnx", files=(file,), inputs=(), outputs=()
        ),
    )  # fmt: skip


def fidelity(of: Variant, drop: float) -> Fidelity:
    metrics = {
        "accuracy": exact(0.98 - drop, "fraction"),
        "accuracy_drop": Estimate(
            value=drop, low=drop - 0.002, high=drop + 0.002, runs=2000, method="paired bootstrap", unit="fraction"
        ),
        "flip_rate": estimate(2 * drop, 0.1, "fraction"),
    }
    return Fidelity(
        variant_id=of.id, engine=ENGINE, engine_version="1", instruction_set="avx2", batch_size=8,
        samples_digest="0" * 64, samples=2000, task_metric="accuracy", metrics=metrics,
    )  # fmt: skip


def records(seed: int) -> Records:
    """Candidates that trade throughput for accuracy, latency and memory; every axis with noise."""
    chance = np.random.default_rng(seed)
    variants = [variant(number) for number in range(VARIANTS)]
    drops = np.sort(chance.gamma(2.0, 0.003, VARIANTS))
    fidelities = [fidelity(one, float(drop)) for one, drop in zip(variants, drops, strict=True)]
    candidates, measurements, comparisons = [], [], []
    for place, one in enumerate(variants):
        for batch in range(1, PROFILES + 1):
            serving = ServingProfile(server="triton", backend="python", max_batch_size=batch)
            made = Candidate(
                id=f"{place:08x}{batch:08x}", name=f"{one.name} @ {serving.key}", variant_id=one.id,
                variant_name=one.name, engine=ENGINE, engine_version="1", serving=serving, server_version="1",
            )  # fmt: skip
            candidates.append(made)
            rate, memory = float(100 + place / 4 + 20 * batch * chance.random()), float(200 + 500 * chance.random())
            p99 = float(4 + 2.5 * batch * chance.random())
            closed = {"max_throughput_rps": estimate(rate, 0.02, "1/s"), "rss_mb": estimate(memory, 0.05, "MB"),
                      "load_time_s": exact(float(25 * chance.random()), "s")}  # fmt: skip
            measurements.append(Measurement(candidate_id=made.id, load=None, metrics=closed))
            latency = {"latency_p99_ms": estimate(p99, 0.05, "ms")}
            measurements.append(Measurement(candidate_id=made.id, load="0.8 saturation", metrics=latency))
            ratio = estimate(rate / 100, 0.015, "1")
            comparisons.append(Comparison(candidate_id=made.id, baseline_id=candidates[batch - 1].id,
                metric="max_throughput_rps", load=None, ratio=ratio, noise_floor=0.02, word="faster"))  # fmt: skip
    return candidates, variants, fidelities, measurements, comparisons


def verdict(made: Records, policy: Policy) -> Verdict:
    candidates, variants, fidelities, measurements, comparisons = made
    return select(
        policy=policy,
        candidates=candidates,
        variants=variants,
        metrics=metric_table(candidates, measurements, fidelities, variants),
        comparisons=comparisons,
        failures=[],
        baseline_id=candidates[0].id,
        provisional=False,
    )


def seconds(made: Records, policy: Policy) -> tuple[float, Verdict]:
    """The median of some runs, and the verdict."""
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        found = verdict(made, policy)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken), found


def main() -> None:
    made = records(seed=0)
    met = []
    for name, constraints, objective in (
        ("lexicographic", CONSTRAINTS, ("maximize max_throughput_rps", "minimize rss_mb")),
        ("weighted", CONSTRAINTS, ("maximize max_throughput_rps weight 2", "minimize rss_mb weight 1")),
        ("nothing_passes", (*CONSTRAINTS, "size_mb <= 0.1"), ("maximize max_throughput_rps",)),
    ):
        taken, found = seconds(made, parse_policy(constraints, objective))
        say(f"{name}: {len(made[0]):,} candidates, front of {len(found.pareto)}: {found.sentence}")
        met.append(figure(f"selection_{name}_s", taken, "<= 1.0"))
    finish(*met)


if __name__ == "__main__":
    main()
