"""What is found wrong with a pipeline before it is deployed."""

from profiles.pipelines.checks import Signature, check_pipeline, pipeline_inputs
from profiles.pipelines.documents import SpecPart, read_spec
from profiles.pipelines.graph import Pipeline
from registry.records import TensorSpec


def pipeline(steps: list[dict], output: dict, *, routes: dict | None = None, **more) -> Pipeline:
    return read_spec("p", SpecPart.model_validate({"steps": steps, "output": output, **more}), routes=routes)


def tensor(name: str, dtype: str = "float32", shape: tuple = ("n", 4)) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def model(inputs: str, outputs: str, **more) -> Signature:
    return Signature(
        inputs=tuple(tensor(name, **more) for name in inputs.split()),
        outputs=tuple(tensor(name) for name in outputs.split()),
    )


def said(found, severity: str = "error") -> list[tuple[str, str]]:
    return [(one.step, one.text) for one in found if one.severity == severity]


def test_a_pipeline_that_fits_has_no_findings():
    chain = pipeline([{"name": "a"}, {"name": "b", "inputs": ["a"]}], {"steps": ["b"]})
    assert check_pipeline(chain, {"a": model("x", "y"), "b": model("y", "z")}) == ()


def test_branches_that_exclude_each_other_cannot_be_joined_inner():
    steps = [
        {"name": "choose"},
        {"name": "left", "inputs": ["choose.outputs.l"]},
        {"name": "right", "inputs": ["choose.outputs.r"]},
        {"name": "both", "inputs": ["left", "right"]},
    ]
    routes = {"choose": {"l": 0.5, "r": 0.5}}
    found = said(check_pipeline(pipeline(steps, {"steps": ["both"]}, routes=routes)))
    assert [step for step, _ in found] == ["both", "output"]
    assert "exclude each other" in found[0][1]
    steps[3]["inputsJoinType"] = "any"
    assert check_pipeline(pipeline(steps, {"steps": ["both"]}, routes=routes)) == ()


def test_a_step_that_waits_for_itself_never_fires():
    steps = [{"name": "a", "inputs": ["p.inputs", "b"]}, {"name": "b", "inputs": ["a"]}]
    found = said(check_pipeline(pipeline(steps, {"steps": ["b"]}, allowCycles=True, maxStepRevisits=3)))
    assert [step for step, _ in found] == ["a", "b", "output"]
    assert "join a way back with any" in found[0][1]
    steps[0]["inputsJoinType"] = "any"
    assert check_pipeline(pipeline(steps, {"steps": ["b"]}, allowCycles=True, maxStepRevisits=3)) == ()


def test_requests_that_nobody_answers_are_told():
    steps = [{"name": "choose"}, {"name": "left", "inputs": ["choose.outputs.l"]}]
    found = check_pipeline(pipeline(steps, {"steps": ["left"]}, routes={"choose": {"l": 0.75}}))
    assert said(found, "warning") == [
        ("output", "25.0% of requests get no answer and time out: what is chosen leads to no output")
    ]


def test_who_comes_round_again_chooses_again():
    steps = [{"name": "a", "inputs": ["p.inputs", "a.outputs.more"], "inputsJoinType": "any"}]
    bounded = {"allowCycles": True, "maxStepRevisits": 2}
    again = pipeline(steps, {"steps": ["a.outputs.done"]}, routes={"a": {"more": 0.7, "done": 0.3}}, **bounded)
    assert check_pipeline(again) == ()


def test_a_step_whose_answers_nobody_takes_is_told():
    steps = [{"name": "a"}, {"name": "drift", "inputs": ["a"]}]
    assert said(check_pipeline(pipeline(steps, {"steps": ["a"]})), "warning")[0][0] == "drift"


def test_tensors_have_to_fit_in_name_type_and_shape():
    chain = pipeline([{"name": "a"}, {"name": "b", "inputs": ["a"]}], {"steps": ["b"]})
    first = model("x", "y")
    unnamed = said(check_pipeline(chain, {"a": first, "b": model("q", "z")}))
    assert "rename a.outputs.y by tensorMap" in unnamed[0][1]
    assert "q comes from nowhere" in unnamed[1][1]
    assert "takes int64" in said(check_pipeline(chain, {"a": first, "b": model("y", "z", dtype="int64")}))[0][1]
    assert "dimension 1" in said(check_pipeline(chain, {"a": first, "b": model("y", "z", shape=("n", 5))}))[0][1]
    assert "3" in said(check_pipeline(chain, {"a": first, "b": model("y", "z", shape=("n", 5, 6))}))[0][1]


def test_a_step_without_a_model_is_told_where_others_have_one():
    chain = pipeline([{"name": "a"}, {"name": "b", "inputs": ["a"]}], {"steps": ["b"]})
    assert [step for step, _ in said(check_pipeline(chain, {"a": model("x", "y")}), "warning")] == ["b"]
    assert check_pipeline(chain) == ()


def test_a_source_has_to_have_its_tensor():
    chain = pipeline([{"name": "a"}, {"name": "b", "inputs": ["a.outputs.w"]}], {"steps": ["b.outputs.v"]})
    found = said(check_pipeline(chain, {"a": model("x", "y"), "b": model("w", "z")}))
    assert [step for step, _ in found] == ["b", "b", "output"]
    assert "a has only y" in found[0][1]


def test_each_source_of_any_brings_all_inputs_and_of_inner_none_twice():
    steps = [{"name": "a"}, {"name": "b"}, {"name": "c", "inputs": ["a", "b"]}]
    models = {"a": model("x", "y"), "b": model("x", "y"), "c": model("y", "z")}
    assert "two sources" in said(check_pipeline(pipeline(steps, {"steps": ["c"]}), models))[0][1]
    steps[2]["inputsJoinType"] = "any"
    assert check_pipeline(pipeline(steps, {"steps": ["c"]}), models) == ()
    lacking = said(
        check_pipeline(pipeline(steps, {"steps": ["c"]}), {**models, "b": model("x", "w"), "c": model("y w", "z")})
    )
    assert [text for _, text in lacking] == [
        "joined with any, a comes alone, and lacks w",
        "joined with any, b comes alone, and lacks y",
    ]


def test_an_input_of_the_pipeline_is_one_kind_for_all_that_take_it():
    both = pipeline([{"name": "a"}, {"name": "b"}], {"steps": ["a", "b"]})
    models = {"a": model("x", "y"), "b": model("x", "z", dtype="int64")}
    assert list(pipeline_inputs(both, models)) == ["x"]
    assert "so does a" in said(check_pipeline(both, models))[0][1]


def test_the_inputs_of_the_pipeline_have_the_names_before_renaming():
    steps = [{"name": "a", "inputs": ["p.inputs.raw"], "tensorMap": {"p.inputs.raw": "x"}}]
    assert list(pipeline_inputs(pipeline(steps, {"steps": ["a"]}), {"a": model("x", "y")})) == ["raw"]
