from pathlib import Path

import pytest

from optimize.config import CampaignConfig, ServingConfig, load_campaign
from optimize.engines.port import Resources
from registry.documents import parse_document
from registry.errors import DocumentError

MINIMAL = """
name: digits
sources: [{onnx: model.onnx}]
samples: {evaluation: held-out.npz}
"""


def parse(text: str) -> CampaignConfig:
    return parse_document(text, CampaignConfig, name="campaign.yaml")


def test_a_minimal_file_gets_the_balanced_recipes_and_both_servers():
    config = parse(MINIMAL)
    assert config.variants == ("balanced",)
    assert {profile.server for profile in config.serving} == {"mlserver", "triton"}
    assert config.sources[0].kind == "onnx"


def test_an_unknown_key_names_line_and_nearest_key():
    with pytest.raises(DocumentError) as caught:
        parse(MINIMAL + "objectve: maximize max_throughput_rps\nmetrc: accuracy\n")
    assert "metrc" in str(caught.value)
    assert "metric" in str(caught.value)
    assert "6" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("sources: [{onnx: a.onnx, torch: 'm:f'}]", "exactly one"),
        ("sources: [{name: a}]", "exactly one"),
        ("sources: [{onnx: a.onnx}, {onnx: b.onnx}]", "twice"),
        ("serving: [{server: mlserver, max_batch_size: 8}]", "max_batch_delay_ms"),
        ("serving: [{server: triton, parallel_workers: 2}]", "parallel_workers"),
        ("serving: []", "serving"),
        ("sources: [{torch: 'no colon'}]", "torch"),
        ("seed: -1", "seed"),
    ],
)
def test_what_does_not_fit_is_named(line: str, word: str):
    key = line.partition(":")[0]
    kept = [row for row in MINIMAL.strip().splitlines() if not row.startswith(key)]
    with pytest.raises(DocumentError) as caught:
        parse("\n".join([*kept, line]) + "\n")
    assert word in str(caught.value)


def test_what_the_measuring_needs_of_a_machine():
    config = parse(MINIMAL + "resources: {cores: 4, gpus: 1, accelerator: L4, labels: {burnish.io/pool: measure}}\n")
    needed = config.resources.needed()
    assert (needed.cores, needed.gpus, needed.accelerator, needed.alone) == (4, 1, "L4", True)
    assert needed.labels == {"burnish.io/pool": "measure"}
    assert parse(MINIMAL).resources.needed() == Resources(cores=None, alone=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("resources: {cores: 0}", "cores"),
        ("resources: {memory: 16}", "memory_mb"),
        ("resources: {accelerator: L4}", "say how many, gpus: 1 or more"),
        ("resources: {labels: {pool: 'in(a,b)'}}", "pool"),
        ("resources: {labels: {'bad label': a}}", "bad label"),
        ("resources: {gpus: 0.5}", "gpus"),
    ],
)
def test_resources_that_cannot_be_asked_for_are_named(line: str, words: str):
    with pytest.raises(DocumentError) as caught:
        parse(f"{MINIMAL}{line}\n")
    assert words in str(caught.value)


def test_a_recipe_of_the_users_own_keeps_its_parameters():
    config = parse(MINIMAL + "variants: [float32, {name: mine, stages: [{name: quantize.static, ops: matmul}]}]\n")
    recipe = config.variants[1]
    assert not isinstance(recipe, str)
    assert recipe.model_dump()["stages"][0] == {"name": "quantize.static", "ops": "matmul"}


def test_a_serving_profile_names_the_backend_that_runs_here():
    assert ServingConfig(server="triton").profile().backend == "python"
    assert ServingConfig(server="mlserver").profile().backend == "burnish"


def test_a_missing_file_is_one_clear_message(tmp_path: Path):
    with pytest.raises(DocumentError, match=r"nowhere\.yaml"):
        load_campaign(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("shipped", ["campaign.yaml", "template.yaml"])
def test_shipped_campaign_files_are_valid(shipped: str):
    from importlib.resources import files

    text = files("optimize.demo").joinpath(shipped).read_text(encoding="utf-8")
    assert parse(text).sources


def test_a_set_of_recipes_may_stand_alone():
    assert parse(MINIMAL + "variants: fast\n").variants == ("fast",)
