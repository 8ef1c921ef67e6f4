"""A pipeline's new variants promoted together, and back."""

from pathlib import Path
from typing import Any

import pytest

from profiles.pipelines.documents import parse_manifest
from profiles.pipelines.rollout import PipelineRollout, experiment_of, plain_spec, stages_of, with_models
from profiles.serving.core2.manifests import as_yaml
from registry.errors import InputError

MANIFEST: dict[str, Any] = {
    "apiVersion": "mlops.seldon.io/v1alpha1",
    "kind": "Pipeline",
    "metadata": {"name": "p"},
    "spec": {
        "steps": [
            {"name": "a", "inputs": ["p.inputs.x"], "tensorMap": {"p.inputs.x": "raw"}},
            {"name": "b", "inputs": ["a.outputs.y"], "triggers": ["a"], "tensorMap": {"a.outputs.y": "x"}},
        ],
        "output": {"steps": ["b.outputs.z"], "tensorMap": {"b.outputs.z": "answer"}},
    },
}


class Applied:
    """What is in force, and in which order it came."""

    location = "memory"

    def __init__(self) -> None:
        self.resources: dict[str, dict[str, Any]] = {}
        self.log: list[str] = []

    def read(self, kind: str, name: str) -> dict[str, Any] | None:
        return self.resources.get(f"{kind}/{name}")

    def apply(self, manifest: dict[str, Any]) -> None:
        key = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] == "Experiment":
            assert all(self.read("Pipeline", one["name"]) for one in manifest["spec"]["candidates"])
        self.log.append(f"apply {key}")
        self.resources[key] = manifest

    def delete(self, kind: str, name: str) -> None:
        self.log.append(f"delete {kind}/{name}")
        self.resources.pop(f"{kind}/{name}", None)

    def exists(self, kind: str, name: str) -> bool:
        return self.read(kind, name) is not None

    def splits(self, name: str) -> tuple[str, ...]:
        return ()

    def used_by(self, model: str) -> tuple[str, ...]:
        pipelines = {key: one for key, one in self.resources.items() if key.startswith("Pipeline/")}
        return tuple(key for key, one in pipelines.items() if model in [step["name"] for step in one["spec"]["steps"]])

    def replicas(self, model: str) -> int:
        return int(self.resources.get(f"Model/{model}", {}).get("spec", {}).get("replicas", 1))

    def is_scaled(self, model: str) -> bool:
        return False


@pytest.fixture
def applied() -> Applied:
    made = Applied()
    made.resources = {"Pipeline/p": MANIFEST, "Model/b-int8": {}, "Model/b": {"spec": {}}}
    return made


def test_a_step_becomes_another_model_wherever_it_is_named():
    made = with_models(MANIFEST, {"a": "a-int8"}, name="q")
    assert made["spec"]["steps"] == [
        {"name": "a-int8", "inputs": ["q.inputs.x"], "tensorMap": {"q.inputs.x": "raw"}},
        {"name": "b", "inputs": ["a-int8.outputs.y"], "triggers": ["a-int8"], "tensorMap": {"a-int8.outputs.y": "x"}},
    ]
    assert parse_manifest(as_yaml(made)).edges == (("a-int8", "b"),)
    assert with_models(made, {"a-int8": "a"}, name="p") == MANIFEST


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ({"c": "d"}, "no step 'c'"),
        ({"a": "b"}, "another step's"),
        ({"a": "A_1"}, "no Model named"),
        ({"a": "x", "b": "x"}, "'x' is to take the place of two steps"),
    ],
)
def test_what_cannot_be_a_step_is_refused(models: dict[str, str], says: str):
    with pytest.raises(InputError, match=says):
        with_models(MANIFEST, models)


def test_a_promotion_goes_there_and_all_the_way_back(applied: Applied, tmp_path: Path):
    rollout = PipelineRollout(applied, production="p", models={"b": "b-int8"}, folder=tmp_path)
    snapshot = rollout.snapshot()
    before = dict(applied.resources)
    rollout.load(snapshot)
    rollout.mirror(100)
    rollout.weights(10)
    assert applied.resources["Experiment/p-promotion"]["spec"] == {
        "default": "p",
        "candidates": [{"name": "p", "weight": 90}, {"name": "p-challenger", "weight": 10}],
        "resourceType": "pipeline",
    }
    rollout.swap(snapshot)
    rollout.unload()
    assert rollout.serving() == rollout.planned(snapshot)
    assert applied.resources["Pipeline/p"]["spec"]["steps"][1]["name"] == "b-int8"
    assert set(applied.resources) == set(before)
    rollout.restore(snapshot)
    assert rollout.serving() == snapshot.serving
    assert applied.resources["Pipeline/p"]["spec"] == MANIFEST["spec"]


def test_the_way_back_from_the_middle_changes_the_pipeline_before_the_split_ends(applied: Applied, tmp_path: Path):
    rollout = PipelineRollout(applied, production="p", models={"b": "b-int8"}, folder=tmp_path)
    snapshot = rollout.snapshot()
    rollout.load(snapshot)
    rollout.weights(50)
    rollout.swap(snapshot)
    applied.log.clear()
    rollout.restore(snapshot)
    assert applied.log == ["apply Pipeline/p", "delete Experiment/p-promotion", "delete Pipeline/p-challenger"]
    assert [path.name for path in tmp_path.iterdir()] == ["Pipeline-p.yaml"]
    rollout.restore(snapshot)  # twice is once


def test_a_promotion_does_not_begin_where_something_is_missing_or_in_the_way(applied: Applied, tmp_path: Path):
    for models, taken, says in (
        ({"b": "b-int4"}, None, "no Model 'b-int4'"),
        ({"b": "b-int8"}, "Experiment/p-promotion", "already"),
    ):
        if taken:
            applied.resources[taken] = {}
        with pytest.raises(InputError, match=says):
            PipelineRollout(applied, production="p", models=models, folder=tmp_path).snapshot()
    with pytest.raises(InputError, match="no Pipeline q"):
        PipelineRollout(applied, production="q", models={}, folder=tmp_path).snapshot()


def brought(applied: Applied, folder: Path) -> PipelineRollout:
    def render() -> dict[str, Any]:
        return {"apiVersion": "v", "kind": "Model", "metadata": {"name": "b-int4"}, "spec": {"storageUri": "gs://b"}}

    return PipelineRollout(applied, production="p", models={"b": "b-int4"}, folder=folder, brought={"b-int4": render})


def test_a_model_that_is_brought_goes_away_again(applied: Applied, tmp_path: Path):
    applied.resources["Model/b"] = {"spec": {"replicas": 3}}
    before = dict(applied.resources)
    rollout = brought(applied, tmp_path)
    snapshot = rollout.snapshot()
    rollout.load(snapshot)
    assert applied.resources["Model/b-int4"]["spec"] == {"storageUri": "gs://b", "replicas": 3}
    rollout.swap(snapshot)
    rollout.unload()
    assert applied.resources["Pipeline/p"]["spec"]["steps"][1]["name"] == "b-int4"
    rollout.restore(snapshot)
    assert set(applied.resources) == set(before)
    assert [path.name for path in tmp_path.iterdir()] == ["Pipeline-p.yaml"]


def test_a_model_that_others_have_taken_up_or_that_was_there_stays(applied: Applied, tmp_path: Path):
    rollout = brought(applied, tmp_path)
    snapshot = rollout.snapshot()
    rollout.load(snapshot)
    applied.resources["Pipeline/theirs"] = {"spec": {"steps": [{"name": "b-int4"}]}}
    rollout.restore(snapshot)
    assert "Model/b-int4" in applied.resources
    # Found there, it is taken as it is.
    applied.log.clear()
    rollout = brought(applied, tmp_path)
    rollout.load(rollout.snapshot())
    assert applied.log == ["apply Pipeline/p-challenger"]


def test_the_text_that_was_applied_comes_back_byte_for_byte(applied: Applied, tmp_path: Path):
    text = "# ours\n" + as_yaml(MANIFEST)
    (tmp_path / "Pipeline-p.yaml").write_text(text)
    live = plain_spec(MANIFEST["spec"], "p")
    assert live["steps"][0]["inputsJoinType"] == "inner"
    live["steps"][1]["triggers"] = ["a.outputs"]
    applied.resources["Pipeline/p"] = {**MANIFEST, "spec": live}
    rollout = PipelineRollout(applied, production="p", models={"b": "b-int8"}, folder=tmp_path)
    snapshot = rollout.snapshot()
    assert snapshot.manifests == {"Pipeline/p": text}
    rollout.load(snapshot)
    rollout.swap(snapshot)
    assert rollout.serving() == rollout.planned(snapshot) != snapshot.serving
    rollout.restore(snapshot)
    assert (tmp_path / "Pipeline-p.yaml").read_text() == text
    assert rollout.serving() == snapshot.serving


def test_a_pipeline_with_what_is_not_known_is_not_touched(applied: Applied, tmp_path: Path):
    applied.resources["Pipeline/p"] = {**MANIFEST, "spec": {**MANIFEST["spec"], "colour": "blue"}}
    with pytest.raises(InputError, match=r"cannot be read at spec\.colour"):
        PipelineRollout(applied, production="p", models={"b": "b-int8"}, folder=tmp_path).snapshot()


def test_files_for_a_promotion_by_hand_are_in_order():
    files = stages_of(MANIFEST, {"b": "b-int8"}, [10, 50])
    assert list(files) == ["0-way-back", "1-challenger", "2-mirror", "3-share-10", "4-share-50", "5-promoted"]
    assert files["2-mirror"]["spec"]["mirror"] == {"name": "p-challenger", "percent": 100}
    for shares in ([], [50, 10], [100]):
        with pytest.raises(InputError, match="shares of"):
            stages_of(MANIFEST, {"b": "b-int8"}, shares)
    assert experiment_of("p", percent=0)["spec"]["candidates"][1]["weight"] == 0
