"""Core 2's data plane by its documented formulas, and the patches against the CRDs."""

import pytest

from profiles.pipelines.documents import SpecPart, read_spec
from profiles.pipelines.graph import Pipeline
from profiles.pipelines.sizing import (
    DATAFLOW,
    MODEL_GATEWAY,
    PIPELINE_GATEWAY,
    render_config,
    render_runtime,
    replicas_in_use,
    size_core2,
)
from registry.errors import InputError
from tests.doubles import crds

# What came after the CRD files were made.
LATER = {
    "scalingConfig": {
        "type": "object",
        "properties": {
            "pipelines": {"type": "object", "properties": {"maxShardCountMultiplier": {"type": "integer"}}},
        },
    },
    "topics": {
        "type": "object",
        "properties": {"numPartitions": {"type": "integer"}, "replicationFactor": {"type": "integer"}},
    },
}


def two(**join) -> Pipeline:
    steps = [{"name": "a"}, {"name": "b"}, {"name": "c", "inputs": ["a", "b"], **join}]
    return read_spec("p", SpecPart.model_validate({"steps": steps, "output": {"steps": ["c"]}}))


def sized(rate: float = 100, latency: float = 20.0, pipeline: Pipeline | None = None, **more):
    pipeline = pipeline or two()
    each = dict.fromkeys(pipeline.names, latency)
    return size_core2(pipeline, rate_rps=rate, latency_ms=each, visits=dict.fromkeys(pipeline.names, 1.0), **more)


@pytest.mark.parametrize(
    ("asked", "units", "multiplier", "in_use"),
    [(9, 3, 4, 9), (9, 1, 4, 4), (20, 5, 4, 20), (10, 8, 4, 10), (7, 0, 4, 1)],
)
def test_replicas_in_use_are_those_of_the_guides_examples(asked: int, units: int, multiplier: int, in_use: int):
    assert replicas_in_use(asked, units, multiplier) == in_use


def test_a_low_rate_needs_nothing_but_the_defaults():
    found = sized()
    assert (found.partitions, found.multiplier, found.num_workers, found.max_num_consumers) == (1, 1, 8, 100)
    assert dict(found.replicas) == {DATAFLOW: 1, MODEL_GATEWAY: 1, PIPELINE_GATEWAY: 1}
    assert found.warnings == ()


def test_workers_are_raised_first_and_gateways_after():
    # 1000 a second for 40 ms is 40 in hand, by Little's law; a quarter more is 50.
    assert (sized(1000, 40.0).num_workers, sized(1000, 40.0).partitions) == (50, 1)
    many = sized(10_000, 40.0)
    assert (many.num_workers, many.partitions, many.multiplier) == (64, 8, 8)
    assert dict(many.replicas) == {DATAFLOW: 8, MODEL_GATEWAY: 8, PIPELINE_GATEWAY: 8}
    assert sized(100, models=250).max_num_consumers == 250


def test_what_the_guide_warns_of_is_warned_of():
    assert any("requests would be dropped" in text for text in sized(partitions=2, multiplier=4).warnings)
    assert any("only 4 would have anything to do" in text for text in sized(partitions=4, asked={DATAFLOW: 9}).warnings)
    assert any("the rate needs 8" in text for text in sized(10_000, 40.0, partitions=2).warnings)
    assert any("cooperative-sticky" in text for text in sized(partitions=2).warnings)
    windowed = two(joinWindowMs=50)
    assert any("is not joined" in text for text in sized(pipeline=windowed).warnings)
    outer = two(inputsJoinType="outer")
    assert any("60000 ms (Core 2's own)" in text for text in sized(pipeline=outer).warnings)
    assert any("brokers take" in text for text in sized(payload_bytes={"a.outputs": 2_000_000}).warnings)
    assert any("at most" in text for text in sized(payload_bytes={"a.outputs": 2_000_000_000}).warnings)


@pytest.mark.parametrize(
    "wrong", [{"rate": 0.0}, {"rate": float("nan")}, {"partitions": 0}, {"multiplier": 0}, {"pipelines": 0}]
)
def test_numbers_that_cannot_be_are_refused(wrong: dict):
    with pytest.raises(InputError):
        sized(**wrong)


def test_a_multiplier_above_the_partitions_is_not_rendered_nor_a_field_younger_than_the_release():
    with pytest.raises(InputError, match="would drop"):
        render_config(sized(partitions=2, multiplier=4))
    with pytest.raises(InputError, match=r"came after Core 2 2\.6"):
        render_config(sized(partitions=2), version="2.6")
    assert "scalingConfig" not in render_config(sized(), version="2.6")["spec"]["config"]
    with pytest.raises(InputError, match="nothing is known"):
        render_config(sized(), version="3.0")


def test_the_patches_say_what_was_sized():
    found = sized(10_000, 40.0)
    config = render_config(found)["spec"]["config"]
    assert config["scalingConfig"] == {"pipelines": {"maxShardCountMultiplier": 8}}
    assert config["kafkaConfig"]["topics"] == {"numPartitions": 8}
    overrides = {one["name"]: one for one in render_runtime(found)["spec"]["overrides"]}
    assert overrides[MODEL_GATEWAY]["podSpec"]["containers"][0]["env"][0] == {
        "name": "MODELGATEWAY_NUM_WORKERS",
        "value": "64",
    }
    assert {name: one["replicas"] for name, one in overrides.items()} == dict(found.replicas)


@pytest.mark.skipif(not crds.FOLDER.is_dir(), reason="the CRD files are not here")
def test_the_patches_are_what_the_crds_take(monkeypatch: pytest.MonkeyPatch):
    config, runtime = render_config(sized(partitions=3)), render_runtime(sized(partitions=3))
    overrides = crds.schema_of("SeldonRuntime")["properties"]["spec"]["properties"]["overrides"]
    item = {**overrides["items"], "properties": {**overrides["items"]["properties"], "podSpec": {"type": "object"}}}
    monkeypatch.setitem(crds.LATER, "SeldonRuntime", {"overrides": {**overrides, "items": item}})
    assert crds.problems(runtime) == []
    assert crds.problems(render_runtime(sized(partitions=3), version="2.6"), later=False) == []
    with pytest.raises(InputError, match=r"overrides\.podSpec came after"):
        render_runtime(sized(10_000, 40.0), version="2.6")
    old = crds.schema_of("SeldonConfig")
    fields = old["properties"]["spec"]["properties"]["config"]["properties"]
    kafka = {**fields["kafkaConfig"], "properties": {**fields["kafkaConfig"]["properties"], "topics": LATER["topics"]}}
    later = {**fields, "kafkaConfig": kafka, "scalingConfig": LATER["scalingConfig"]}
    whole = {"config": {"type": "object", "properties": later}}
    monkeypatch.setitem(crds.LATER, "SeldonConfig", whole)
    assert crds.problems(config) == []
