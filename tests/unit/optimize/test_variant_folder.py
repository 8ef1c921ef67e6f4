"""Where `burnish make` leaves variants: a folder each, replaced whole, and nothing else lost."""

from dataclasses import replace
from pathlib import Path

import pytest

from optimize.campaign import with_variants
from optimize.config import CampaignConfig
from optimize.variant_folder import place_variant
from registry.errors import InputError, StorageError
from registry.records import ArtifactFile, Variant
from tests.doubles.campaigns import FLOAT32


@pytest.fixture
def variant() -> Variant:
    names = ("model.onnx", "build.json", "weights/part", "onnx__MatMul_12")
    files = tuple(ArtifactFile(path=name, sha256="0" * 64, size_bytes=1) for name in names)
    return replace(FLOAT32, name="first/mine", artifact=replace(FLOAT32.artifact, files=files))


@pytest.fixture
def files(tmp_path: Path, variant: Variant) -> Path:
    for file in variant.artifact.files:
        path = tmp_path / "store" / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    return tmp_path / "store"


def held(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_variant_takes_the_place_of_the_one_before_it(files: Path, variant: Variant, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert place_variant(files, variant, out) == out / "first-mine"
    (out / "first-mine" / "model.onnx.data").write_text("of the one before")
    (files / "model.onnx").write_text("2")
    place_variant(files, variant, out)
    assert held(out / "first-mine") == held(files)
    assert [path.name for path in out.iterdir()] == ["first-mine"]


def test_what_is_no_part_of_a_variant_stays(files: Path, variant: Variant, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    folder = place_variant(files, variant, tmp_path / "out")
    (folder / "weights" / "notes.txt").write_text("of somebody")
    with pytest.raises(InputError, match=r"notes\.txt is in the way, and no part of a variant"):
        place_variant(files, variant, tmp_path / "out")
    (folder / "weights" / "notes.txt").unlink()
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(files / "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx is in the way"):
        place_variant(files, variant, tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_said(files: Path, variant: Variant, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file cannot be written"):
        place_variant(files, variant, tmp_path / "file")


def test_variants_are_named_as_the_campaign_has_them() -> None:
    own = {"name": "mine", "stages": ["simplify.ort"]}
    config = CampaignConfig.model_validate(
        {"name": "net", "sources": [{"onnx": "m.onnx"}], "samples": {"evaluation": "e.npz"}, "variants": ["fast", own]}
    )
    assert with_variants(config, ("mine", "float16")).variants == (config.variants[1], "float16")
    assert with_variants(config, ()) == config
