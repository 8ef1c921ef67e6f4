"""A pipeline on real servers of this machine: checked, served as one endpoint, and measured."""

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimize.cli import main
from optimize.pipelines import measure_plan, message_bytes, run_truth, serve_plan, signatures
from optimize.samples import load_samples
from profiles.measure.levels import find_level
from profiles.pipelines.analysis import pipeline_limits
from profiles.pipelines.choice import Combination
from profiles.pipelines.documents import Plan, load_plan
from profiles.pipelines.gateway import Model
from profiles.pipelines.measured import load_measured, write_measured
from registry.errors import InputError, UnreachableError
from registry.records import exact
from tests.doubles.models import mlp, mlp_answer, write_onnx

pytestmark = pytest.mark.slow

PLAN = """
name: both
steps:
- name: left
- name: right
output:
  steps: [left, right]
  tensorMap: {left.outputs.logits: first, right.outputs.logits: second}
models:
  left: {variants: {one: one/model.onnx, two: two/model.onnx}}
  right: {variants: {two: two/model.onnx}}
samples: samples.npz
answer: first
"""
TINY = {"warmup_s": 0.1, "closed_s": 0.3, "open_s": 0.3, "longest_s": 0.5, "ladder": (2,), "ladder_s": 0.2,
        "stages": (0.05,), "stage_s": 0.2, "reruns": 9}  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two perceptrons side by side; the second variant of the left one is the right one."""
    for seed, name in enumerate(("one", "two")):
        write_onnx(mlp(seed=seed), tmp_path / name)
    features = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    labels = mlp_answer(features, seed=0).argmax(axis=1)
    np.savez(tmp_path / "samples.npz", x=features, labels=labels)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return load_plan(tmp_path / "plan.yaml")


def test_the_whole_answers_and_is_measured_like_its_steps(plan: Plan, tmp_path: Path):
    features = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)

    async def ask(target) -> dict:
        model = Model([target])
        await model.open()
        try:
            with pytest.raises(UnreachableError, match="wrong"):
                await model("both", {"wrong": features})
            return await model("both", {"x": features})
        finally:
            await model.close()

    with serve_plan(plan, tmp_path / "served") as target:
        answer = asyncio.run(ask(target))
    assert np.allclose(answer["first"], mlp_answer(features, seed=0), atol=1e-4)
    assert np.allclose(answer["second"], mlp_answer(features, seed=1), atol=1e-4)


def test_a_step_and_the_whole_are_measured(plan: Plan, tmp_path: Path):
    alone = PLAN.replace("- name: right\n", "").replace("steps: [left, right]", "steps: [left]")
    alone = alone.replace(", right.outputs.logits: second", "").replace(
        "  right: {variants: {two: two/model.onnx}}\n", ""
    )
    plan.path.write_text(alone)
    plan = load_plan(plan.path)
    level = replace(find_level("quick"), **TINY)
    measured = measure_plan(plan, level=level, work=tmp_path / "work", variants=False, workers=(1, 2))
    assert list(measured.of("left").by_workers) == [2]
    write_measured(measured, tmp_path / "m.yaml")
    assert load_measured(tmp_path / "m.yaml", plan.pipeline) == measured
    assert list(measured.steps["left"]) == ["one"]
    assert measured.of("left").accuracy_drop == 0.0
    assert measured.whole is not None
    assert "Kafka" in measured.whole.without
    assert {limit.what for limit in pipeline_limits(plan.pipeline, measured)} >= {"left"}


def test_combinations_are_run_on_samples(plan: Plan):
    other = Combination(variants={"left": "two", "right": "two"}, surrogate={})
    first = Combination(variants={"left": "one", "right": "two"}, surrogate={})
    truth, own = run_truth(plan, [other, first])
    # Labels are what the first variants answer.
    assert truth.accuracy_drop.value == pytest.approx(1.0 - truth.accuracy.value)
    assert truth.accuracy.value < 1.0
    assert truth.accuracy_drop.high is not None
    assert truth.accuracy_drop.high > truth.accuracy_drop.value
    assert (own.accuracy.value, own.accuracy_drop) == (1.0, exact(0.0, "fraction"))
    x = load_samples(plan.folder / "samples.npz").inputs["x"]
    np.savez(plan.folder / "samples.npz", x=x)
    # Without labels there is no truth, and no reason to choose nothing.
    assert run_truth(plan, [other]) == ()


def test_models_are_read_for_their_tensors(plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys):
    assert message_bytes(signatures(plan), rows=2)["left.inputs"] == 2 * 8 * 4
    chained = PLAN.replace("- name: right\n", "- {name: right, inputs: [left]}\n")
    plan.path.write_text(chained)
    monkeypatch.setattr(sys, "argv", ["burnish", "pipeline", "check", str(plan.path), "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 5
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [one["step"] for one in found] == ["right", "right"]
    (plan.folder / "two" / "model.onnx").unlink()
    with pytest.raises(InputError, match="'right': there is no model file"):
        signatures(plan)
