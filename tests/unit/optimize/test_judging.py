"""Which variants are worth serving, from made-up judgements."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from optimize.judging import (
    Judged,
    choose_served,
    depends_undeclared,
    failure_of,
    overflow_matters,
    refuse_saturated,
)
from optimize.saturation import SATURATED
from registry.errors import NotApplicableError, ServerDiedError, StageError
from registry.policy import parse_policy
from registry.records import (
    Artifact,
    EngineSpec,
    Estimate,
    Fidelity,
    Recipe,
    Screening,
    Variant,
)

ORT = EngineSpec(name="onnxruntime")


def estimate(value: float, width: float = 0.0, unit: str = "ms") -> Estimate:
    return Estimate(value=value, low=value - width, high=value + width, runs=5, method="made up", unit=unit)


def judged(name: str, ms: float, *, drop: float = 0.0, variant: str | None = None, rows: int = 1) -> Judged:
    artifact = Artifact(digest=name, format="onnx", entry="model.onnx", files=(), inputs=(), outputs=())
    made = Variant(
        id=variant or name,
        name=name,
        source="model",
        source_digest="s",
        recipe=Recipe(name=name, stages=(), engines=(ORT,)),
        calibration_digest=None,
        seed=0,
        tool_versions={},
        artifact=artifact,
    )
    fidelity = Fidelity(
        variant_id=made.id,
        engine=ORT,
        engine_version="1",
        instruction_set="avx2",
        batch_size=rows,
        samples_digest="d",
        samples=900,
        task_metric="accuracy",
        metrics={"accuracy": estimate(0.99 - drop, 0.001), "accuracy_drop": estimate(drop, 0.002, "fraction")},
    )
    screening = Screening(
        variant_id=made.id,
        engine=ORT,
        threads=1,
        metrics={"inprocess_ms.batch_1": estimate(ms), f"inprocess_ms.batch_{rows}": estimate(ms * rows)},
    )
    return Judged(
        name=name, variant=made, engine=ORT, fidelities={rows: fidelity}, answers={rows: Path()}, screening=screening
    )


def workspace(served: int | None, *constraints: str) -> SimpleNamespace:
    policy = parse_policy(constraints, "maximize max_throughput_rps")
    return SimpleNamespace(plan=SimpleNamespace(policy=policy, level=SimpleNamespace(served=served)))


def choose(served: int | None, *ones: Judged, constraints: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    chosen, failures = choose_served(workspace(served, *constraints), ones)
    assert all(failure.kind == "screened_out" for failure in failures)
    return [one.name for one in chosen], {failure.subject: failure.reason for failure in failures}


def test_the_baseline_and_the_fastest_are_served():
    chosen, reasons = choose(2, judged("float32", 9.0), judged("c", 3.0), judged("a", 1.0), judged("b", 2.0))
    assert chosen == ["float32", "a", "b"]
    assert reasons == {"c": "3.00 ms a row in process; the 2 served take 1.00 to 2.00 ms"}


def test_what_answers_too_differently_takes_no_place():
    chosen, reasons = choose(
        1,
        judged("float32", 9.0),
        judged("fast", 1.0, drop=0.05),
        judged("good", 2.0),
        constraints=("accuracy_drop <= 0.01",),
    )
    assert chosen == ["float32", "good"]
    assert "accuracy drop" in reasons["fast"]


def test_what_may_still_pass_is_served():
    chosen, _ = choose(
        1, judged("float32", 9.0), judged("near", 1.0, drop=0.009), constraints=("accuracy_drop <= 0.01",)
    )
    assert chosen == ["float32"], "the pessimistic end fails, so serving it would tell nothing"


def test_of_one_model_in_two_settings_the_faster_is_served():
    chosen, reasons = choose(
        2,
        judged("float32", 9.0),
        judged("ov.bf16", 1.0, variant="ov"),
        judged("ov.f32", 1.1, variant="ov"),
        judged("int8", 2.0),
    )
    assert chosen == ["float32", "ov.bf16", "int8"]
    assert "ov.bf16" in reasons["ov.f32"]


def test_without_a_bound_all_are_served():
    chosen, reasons = choose(None, judged("float32", 1.0), judged("a", 2.0), judged("b", 3.0))
    assert chosen == ["float32", "a", "b"]
    assert not reasons


def test_errors_become_failures_of_their_kind():
    assert failure_of("v", "make", NotApplicableError("no MatMul")).kind == "not_applicable"
    died = failure_of("c", "measure", ServerDiedError("it ended\nlog"))
    assert (died.kind, died.reason, died.detail) == ("died", "it ended", "log")


def answered(**metrics: float) -> Fidelity:
    fidelity = judged("v", 1.0).fidelities[1]
    return replace(fidelity, metrics={name: estimate(value) for name, value in metrics.items()})


def test_dependence_on_neighbours_that_no_stage_declared():
    variant = judged("v", 1.0).variant
    assert depends_undeclared(variant, answered(batch_dependence=0.2))
    assert not depends_undeclared(variant, answered(batch_dependence=0.001))
    assert not depends_undeclared(variant, answered())
    assert not depends_undeclared(replace(variant, batch_dependent=True), answered(batch_dependence=0.2))


def test_overflow_is_looked_at_where_it_happens():
    variant = judged("v", 1.0).variant
    assert overflow_matters(variant, ORT, ("avx2",))
    assert not overflow_matters(variant, ORT, ("avx2", "avx512_vnni"))
    assert not overflow_matters(variant, EngineSpec(name="openvino"), ("avx2",))


def test_a_variant_that_overflows_is_refused_with_what_was_found():
    refuse_saturated(answered(saturated_share=0.0))
    refuse_saturated(answered())
    told = f"12 {SATURATED}, in 1 of 2 nodes; make it with reduce_range: true"
    with pytest.raises(StageError, match="reduce_range"):
        refuse_saturated(replace(answered(saturated_share=0.1), notes=("another note", told)))


def test_what_is_limited_by_slice_or_by_parity_is_judged_before_serving():
    one = judged("fast", 1.0)
    fidelity = replace(one.fidelities[1], metrics={**one.fidelities[1].metrics, "slice_drop_max": estimate(0.2, 0.1)})
    chosen, reasons = choose(
        None,
        judged("float32", 9.0),
        replace(one, fidelities={1: fidelity}),
        constraints=("slice_drop_max <= 0.03",),
    )
    assert chosen == ["float32"]
    assert "largest drop of a slice" in reasons["fast"]


def test_other_inputs_are_not_served_where_they_could_not_win():
    smaller = judged("smaller", 1.0)
    smaller = replace(smaller, variant=replace(smaller.variant, signature_changed=True))
    chosen, reasons = choose(2, judged("float32", 9.0), smaller)
    assert chosen == ["float32"]
    assert "signature: may_change" in reasons["smaller"]
