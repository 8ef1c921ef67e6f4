"""Which variants are searched for nodes to leave in float32, from made-up judgements; nothing is made here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optimize.config import AccuracySearchConfig, CampaignConfig, SearchConfig
from optimize.judging import Judged
from optimize.tuning import tune_variants
from registry.policy import parse_policy
from registry.records import Artifact, EngineSpec, Estimate, Fidelity, Recipe, Source, StageCall, Variant

ORT = EngineSpec(name="onnxruntime")
ARTIFACT = Artifact(digest="a", format="onnx", entry="model.onnx", files=(), inputs=(), outputs=())
SOURCE = Source(name="model", kind="onnx", location="model.onnx", digest="s", artifact=ARTIFACT)


def judged(name: str, drop: float, *stages: str) -> Judged:
    variant = Variant(
        id=name,
        name=name,
        source="model",
        source_digest="s",
        recipe=Recipe(name=name, stages=tuple(StageCall(name=stage) for stage in stages), engines=(ORT,)),
        calibration_digest=None,
        seed=0,
        tool_versions={},
        artifact=ARTIFACT,
    )

    def estimate(value: float) -> Estimate:
        return Estimate(value=value, low=value - 0.002, high=value + 0.002, runs=900, method="made up", unit="fraction")

    fidelity = Fidelity(
        variant_id=name,
        engine=ORT,
        engine_version="1",
        instruction_set="avx2",
        batch_size=1,
        samples_digest="d",
        samples=900,
        task_metric="accuracy",
        metrics={"accuracy": estimate(0.99 - drop), "accuracy_drop": estimate(drop)},
    )
    return Judged(name=name, variant=variant, engine=ORT, fidelities={1: fidelity}, answers={1: Path("a.npz")})


def tuned(*ones: Judged, search: dict[str, Any] | None, constraint: str = "accuracy_drop <= 0.01") -> tuple[Any, ...]:
    """What is found and what fails, and what was said; a search that begins ends at its first phase."""
    said: list[str] = []

    def phase(name: str, total: int) -> None:
        said.append(f"{name}: {total}")
        raise KeyboardInterrupt

    accuracy = None if search is None else AccuracySearchConfig(**search)
    workspace: Any = SimpleNamespace(
        plan=SimpleNamespace(
            config=SimpleNamespace(search=SearchConfig(accuracy=accuracy)),
            policy=parse_policy((constraint,), "maximize max_throughput_rps"),
        ),
        observer=SimpleNamespace(phase=phase, note=said.append),
    )
    evaluation: Any = None
    try:
        found = tune_variants(workspace, [SOURCE], ones, calibration=None, evaluation=evaluation)
    except KeyboardInterrupt:
        found = ([], [])
    return (*found, said)


BASELINE = judged("float32", 0.0)
BAD = judged("int8", 0.05, "quantize.static")


def test_what_misses_the_limit_is_searched_within_the_budget_of_the_file():
    assert tuned(BASELINE, BAD, search={"trials": 3}) == ([], [], ["Leaving nodes of int8 in float32: 3"])
    dynamic = judged("dynamic", 0.009, "simplify.ort", "quantize.dynamic")  # its upper end is 0.011
    assert tuned(BASELINE, dynamic, search={}) == ([], [], ["Leaving nodes of dynamic in float32: 12"])


def test_stages_may_follow_the_one_that_quantizes():
    engine = judged("engine", 0.05, "quantize.tensorrt", "tensorrt.prepare")
    assert tuned(BASELINE, engine, search={}) == ([], [], ["Leaving nodes of engine in float32: 12"])
    nncf = judged("nncf", 0.05, "convert.openvino", "quantize.openvino")
    assert tuned(BASELINE, nncf, search={}) == ([], [], ["Leaving nodes of nncf in float32: 12"])


@pytest.mark.parametrize(
    ("ones", "search", "constraint"),
    [
        ((BASELINE, BAD), None, "accuracy_drop <= 0.01"),
        ((BASELINE, BAD), {}, "cosine >= 0.9"),
        ((BASELINE, judged("good", 0.005, "quantize.static")), {}, "accuracy_drop <= 0.01"),
        ((BASELINE, judged("half", 0.05, "precision.float16")), {}, "accuracy_drop <= 0.01"),
        ((BASELINE, judged("weights", 0.05, "quantize.weights")), {}, "accuracy_drop <= 0.01"),
    ],
    ids=["no section", "no limit", "limit met", "not quantized", "quantized out of sight"],
)
def test_nothing_else_is_searched(ones, search, constraint):
    assert tuned(*ones, search=search, constraint=constraint) == ([], [], [])


def test_a_name_that_is_taken_is_not_taken_twice():
    found, failures, said = tuned(BASELINE, BAD, judged("int8-tuned", 0.0), search={})
    assert (found, failures) == ([], [])
    assert said == ["int8 is not searched, because another variant is named int8-tuned"]


def test_a_campaign_file_without_the_section_searches_nothing():
    content = {"name": "c", "sources": [{"onnx": "model.onnx"}], "samples": {"evaluation": "e.npz"}}
    assert CampaignConfig.model_validate(content).search.accuracy is None
    found = CampaignConfig.model_validate({**content, "search": {"accuracy": {}}}).search.accuracy
    assert found is not None
    assert (found.trials, found.minutes) == (12, 10.0)
