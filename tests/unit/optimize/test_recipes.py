"""Recipes by name and from the user's words, the ids of variants, and how stages follow one another."""

import pytest

from optimize.recipes import (
    apply_recipe,
    engine_label,
    load_recipes,
    needs_calibration,
    preset_names,
    recipe,
    recipe_from_mapping,
    recipes_of,
    tool_versions,
    variant_id,
)
from optimize.testing import contents, tiny_conv_net, tiny_transformer
from registry.errors import InputError, NotApplicableError
from registry.records import EngineSpec, Recipe, StageCall

DYNAMIC = (StageCall(name="quantize.dynamic"),)


def test_the_baseline_comes_first_and_does_nothing():
    assert preset_names()[0] == "float32"
    assert recipe("float32") == Recipe(name="float32", stages=(), engines=(EngineSpec(name="onnxruntime"),))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_made_of_known_stages(name):
    made = recipe(name, instruction_sets=("avx512_bf16",))
    assert made.name == name
    assert isinstance(needs_calibration(made), bool)
    assert "absent" not in tool_versions(made).values()


def test_openvino_runs_at_its_default_precision_too_where_that_is_bfloat16():
    plain = recipe("openvino", instruction_sets=("avx2", "avx512_vnni"))
    assert [engine.precision for engine in plain.engines] == ["float32"]
    assert engine_label(plain.engines[0], plain) == ""
    both = recipe("openvino", instruction_sets=("avx512_vnni", "amx_bf16"))
    assert [engine_label(engine, both) for engine in both.engines] == ["float32", "bfloat16"]


def test_an_unknown_preset_is_told_with_the_nearest():
    with pytest.raises(InputError, match="no recipe 'int8_static'") as caught:
        recipe("int8_static")
    assert "'int8-static'" in caught.value.hint


def test_a_recipe_in_the_users_words():
    made = recipe_from_mapping(
        {"name": "mine", "stages": ["simplify.ort", {"name": "quantize.static", "method": "entropy", "batch_size": 4}]}
    )
    static = StageCall(name="quantize.static", params={"method": "entropy", "batch_size": 4})
    assert made.stages == (StageCall(name="simplify.ort"), static)
    assert made.engines == (EngineSpec(name="onnxruntime"),)


def test_a_recipe_that_converts_runs_in_openvino():
    made = recipe_from_mapping({"name": "mine", "stages": ["convert.openvino"]}, instruction_sets=("avx512_bf16",))
    assert {engine.name for engine in made.engines} == {"openvino"}
    assert len(made.engines) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "x", "stage": []}, "no key of a recipe 'stage'"),
        ({"stages": []}, "needs a name"),
        ({"name": "x", "stages": "simplify.ort"}, "stages are a list"),
        ({"name": "x", "stages": [{"level": "basic"}]}, "a stage is its name"),
        ({"name": "x", "stages": ["simplify.otr"]}, "no stage 'simplify.otr'"),
        ({"name": "x", "stages": [{"name": "simplify.ort", "levle": "basic"}]}, "no parameter 'levle'"),
        ({"name": "x", "stages": [{"name": "simplify.ort", "level": "most"}]}, "does not take 'most' for 'level'"),
        ({"name": "x", "stages": [{"name": "quantize.static", "percentile": 120}]}, "does not take 120"),
        ({"name": "x", "stages": [], "engine": "tensorrt"}, "no engine of the recipe 'x': 'tensorrt'"),
        ({"name": "x", "stages": ["convert.openvino"], "engine": "onnxruntime"}, "cannot run"),
    ],
)
def test_mistakes_in_a_recipe_are_told(content, message):
    with pytest.raises(InputError, match=message):
        recipe_from_mapping(content)


def identity(stages=DYNAMIC, *, source="a", calibration=None, seed=0, tools=None, name="r", engines=()):
    made = Recipe(name=name, stages=stages, engines=engines)
    return variant_id(source, made, calibration, seed, tools or {"onnx": "1"})


def test_the_id_covers_all_that_decides_the_bytes():
    others = [
        identity(source="b"),
        identity(seed=1),
        identity(tools={"onnx": "2"}),
        identity((StageCall(name="quantize.dynamic", params={"per_channel": False}),)),
        identity((*DYNAMIC, *DYNAMIC)),
        identity(()),
    ]
    assert len({identity(), *others}) == 7


def test_the_id_covers_nothing_else():
    spelt_out = (StageCall(name="quantize.dynamic", params={"per_channel": True}),)
    assert identity(spelt_out) == identity()
    assert identity(name="other", engines=(EngineSpec(name="onnxruntime"),)) == identity()
    assert identity(calibration="c" * 64) == identity(), "no stage takes samples"


def test_the_id_covers_the_samples_where_a_stage_takes_them():
    static = (StageCall(name="quantize.static"),)
    assert identity(static, calibration="c") != identity(static, calibration="d")


def test_the_id_covers_the_stages_version(monkeypatch):
    before = identity()
    monkeypatch.setattr("optimize.stages.quantize.DynamicInt8.version", 99)
    assert identity() != before


def test_stages_follow_one_another_each_in_its_folder(tmp_path):
    source = tiny_transformer(tmp_path / "source")
    before, told = contents(source.folder), []
    (tmp_path / "work").mkdir()
    mine = recipe_from_mapping({"name": "mine", "stages": ["simplify.ort", "precision.float16"]})
    made = apply_recipe(mine, source, calibration=None, seed=0, threads=1, work=tmp_path / "work", on_stage=told.append)
    assert told == ["simplify.ort", "precision.float16"]
    assert made.folder == tmp_path / "work" / "2-precision.float16"
    assert (made.inputs, made.outputs) == (source.inputs, source.outputs)
    assert (made.batch_dependent, made.signature_changed) == (False, False)
    assert contents(source.folder) == before


def test_dynamic_quantization_makes_answers_batch_dependent(tmp_path):
    source = tiny_transformer(tmp_path / "source")
    (tmp_path / "work").mkdir()
    made = apply_recipe(recipe("int8-dynamic"), source, calibration=None, seed=0, threads=1, work=tmp_path / "work")
    assert made.batch_dependent
    assert made.notes == ("quantize.dynamic: 6 nodes in int8",)


def test_the_baseline_is_the_source_itself(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    made = apply_recipe(recipe("float32"), source, calibration=None, seed=0, threads=1, work=tmp_path)
    assert (made.folder, made.entry) == (source.folder, source.entry)


def test_a_recipe_that_changes_nothing_does_not_apply(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    (tmp_path / "work").mkdir()
    passing = {"name": "simplify.transformer", "if_none": "pass"}
    mine = recipe_from_mapping({"name": "mine", "stages": [passing]})
    with pytest.raises(NotApplicableError, match="no stage of the recipe 'mine' changes"):
        apply_recipe(mine, source, calibration=None, seed=0, threads=1, work=tmp_path / "work")


def test_the_sets_grow_from_fast_to_thorough():
    sets = load_recipes().sets
    assert set(sets["fast"]) < set(sets["balanced"]) < set(sets["thorough"])
    assert [made.name for made in recipes_of("fast")] == list(sets["fast"])


OWN = """
recipes:
  - name: gentle
    stages: [{name: quantize.static, ops: matmul, per_channel: false}]
sets:
  mine: [float32, gentle, openvino]
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "recipes.yaml").write_text(OWN)
    return tmp_path / "recipes.yaml"


def test_a_file_of_the_users_own_adds_recipes_and_sets(own):
    made = recipes_of("mine", library=load_recipes(own))
    assert [one.name for one in made] == ["float32", "gentle", "openvino"]
    assert made[1].stages == (StageCall(name="quantize.static", params={"ops": "matmul", "per_channel": False}),)
    assert "fast" in load_recipes(own).sets


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("name: gentle", "name: int8-static", "'int8-static' is one of burnish's own"),
        ("mine:", "fast:", "'fast' is one of burnish's own"),
        ("mine:", "gentle:", "'gentle' is given twice"),
        ("float32, gentle, openvino", "gentel", "no recipe in the set 'mine' .* 'gentel'"),
        ("stages:", "stage:", "stage"),
    ],
)
def test_mistakes_in_a_file_of_recipes_are_told(own, before, after, message):
    own.write_text(OWN.replace(before, after))
    with pytest.raises(InputError, match=message):
        load_recipes(own)
