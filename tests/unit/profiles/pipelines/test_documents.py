"""Pipelines from manifests and plans, and what is refused of them."""

from pathlib import Path

import pytest

from profiles.pipelines.documents import SpecPart, as_spec, load_plan, parse_manifest, read_spec
from profiles.pipelines.graph import in_order, visits
from profiles.serving.core2.manifests import as_yaml, render_pipeline
from registry.errors import DocumentError, InputError

HEAD = "apiVersion: mlops.seldon.io/v1alpha1\nkind: Pipeline\nmetadata: {name: p, namespace: mesh}\n"

# The shapes of the examples in Seldon's guide: a chain, a join, a choice, triggers, another pipeline's answers.
CHAIN = """
spec:
  steps:
  - name: one
  - name: two
    inputs: [one]
    tensorMap: {one.outputs.OUTPUT0: INPUT0, one.outputs.OUTPUT1: INPUT1}
  output: {steps: [two]}
"""
JOIN = """
spec:
  steps:
  - name: one
  - name: two
  - name: three
    inputs: [one.outputs.OUTPUT0, two.outputs.OUTPUT1]
    tensorMap: {one.outputs.OUTPUT0: INPUT0, two.outputs.OUTPUT1: INPUT1}
  output: {steps: [three]}
"""
CHOICE = """
spec:
  steps:
  - name: choose
  - {name: mul10, inputs: [choose.outputs.OUTPUT0], tensorMap: {choose.outputs.OUTPUT0: INPUT}}
  - {name: add10, inputs: [choose.outputs.OUTPUT1], tensorMap: {choose.outputs.OUTPUT1: INPUT}}
  output: {steps: [mul10, add10], stepsJoin: any}
"""
TRIGGERS = """
spec:
  steps:
  - name: mul10
    inputs: [p.inputs.INPUT]
    triggers: [p.inputs.ok1, p.inputs.ok2]
    triggersJoinType: any
  - {name: add10, inputs: [p.inputs.INPUT], triggers: [p.inputs.ok3]}
  output: {steps: [mul10, add10], stepsJoin: any}
"""
FED = """
spec:
  input:
    externalInputs: [other.outputs]
    externalTriggers: [third.outputs]
    tensorMap: {other.outputs.OUTPUT0: INPUT0}
  steps:
  - {name: one, batch: {size: 5, windowMs: 1000}}
  output: {steps: [one]}
"""
ROUND = """
spec:
  steps:
  - {name: count, inputs: [p.inputs, again.outputs], inputsJoinType: any}
  - {name: again, inputs: [count.outputs.output], triggers: [count.outputs.continue]}
  output: {steps: [count.outputs.stop]}
  allowCycles: true
  maxStepRevisits: 10
"""


@pytest.mark.parametrize("text", [CHAIN, JOIN, CHOICE, TRIGGERS, FED, ROUND])
def test_the_guides_kinds_of_pipeline_are_read_and_written_again(text: str):
    pipeline = parse_manifest(HEAD + text)
    again = read_spec(pipeline.name, SpecPart.model_validate(as_spec(pipeline)))
    assert again.steps == pipeline.steps
    assert again.output == pipeline.output
    assert again.max_revisits == pipeline.max_revisits


def test_what_burnish_renders_is_read():
    pipeline = parse_manifest(as_yaml(render_pipeline("p", ["a", "b", "c"], labels={"burnish.campaign": "x"})))
    assert in_order(pipeline) == ("a", "b", "c")
    assert pipeline.edges == (("a", "b"), ("b", "c"))


def test_a_cycle_with_a_bound_counts_its_revisits():
    assert visits(parse_manifest(HEAD + ROUND)) == {"count": 11, "again": 11}


def test_another_pipelines_answers_are_the_input():
    pipeline = parse_manifest(HEAD + FED)
    assert pipeline.external == ("other",)
    assert pipeline.steps[0].batch_size == 5


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("inputs: [one]", "inputs: [on]", "no step 'on'"),
        ("name: two", "name: one", "the step 'one' twice"),
        ("name: two", "name: Two", "no Model named 'Two'"),
        ("one.outputs.OUTPUT0: INPUT0", "two.outputs.OUTPUT0: INPUT0", "none of its inputs"),
        ("inputs: [one]", "inputs: [one.result.x]", "step.outputs"),
        ("inputs: [one]", "inputs: [p.outputs]", "only the inputs"),
        ("- name: one\n", "- {name: one, inputs: [two]}\n", "goes round: "),
        ("steps: [two]", "steps: [twoo]", "no step 'twoo'"),
    ],
)
def test_a_wrong_graph_is_refused_with_what_is_wrong(old: str, new: str, says: str):
    assert old in CHAIN
    with pytest.raises(InputError, match=says):
        parse_manifest(HEAD + CHAIN.replace(old, new))


def test_a_cycle_without_a_bound_is_refused():
    with pytest.raises(InputError, match="goes round without a bound: "):
        parse_manifest(HEAD + ROUND.replace("maxStepRevisits: 10", ""))
    with pytest.raises(InputError, match="goes round: "):
        parse_manifest(HEAD + ROUND.replace("allowCycles: true", "allowCycles: false"))


def test_an_unknown_key_is_told_with_its_line():
    with pytest.raises(DocumentError, match=r"manifest:\d+: .*'inputJoinType'; did you mean 'inputsJoinType'"):
        parse_manifest(HEAD + ROUND.replace("inputsJoinType", "inputJoinType"))


def test_a_plan_says_what_a_manifest_cannot(tmp_path: Path):
    (tmp_path / "manifest.yaml").write_text(HEAD + CHOICE)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "manifest: manifest.yaml\nroutes: {choose: {OUTPUT0: 0.25, OUTPUT1: 0.75}}\n"
        "models: {mul10: {variants: {fp32: mul.onnx}}}\nsamples: s.npz\n"
    )
    read = load_plan(plan)
    assert visits(read.pipeline) == {"choose": 1, "mul10": 0.25, "add10": 0.75}
    assert read.samples == tmp_path / "s.npz"
    assert load_plan(tmp_path / "manifest.yaml").pipeline.routes == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: p\n", "either manifest, or name and steps"),
        ("steps: [{name: a}]\n", "without manifest has a name"),
        ("name: p\nsteps: [{name: a}]\nmodels: {b: {variants: {x: y}}}\n", "'b', which is no step"),
        ("name: p\nsteps: [{name: a}]\nroutes: {b: {x: 1}}\n", "'b', which is no step"),
        ("name: p\nsteps: [{name: a}]\nroutes: {a: {x: 0.7, y: 0.7}}\n", "add up to 1.4"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path, text: str, says: str):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        load_plan(tmp_path / "plan.yaml")
