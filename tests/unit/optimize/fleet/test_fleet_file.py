"""The file of a fleet: shared defaults, and everything that is wrong with it said at once, with its place."""

from pathlib import Path

import numpy as np
import pytest

from optimize.config import load_campaign
from optimize.fleet.config import FleetPlan, default_work, plan_fleet
from registry.errors import DocumentError

DEFAULTS = """
name: spring
defaults:
  samples: {evaluation: held-out.npz, calibration: other.npz}
  variants: [float32, int8-dynamic]
  level: quick
  minutes: 30
  policy: {constraints: [accuracy_drop <= 0.01]}
"""
MODELS = """
models:
  - name: digits
    sources: [{onnx: digits.onnx}]
  - name: letters
    sources: [{onnx: letters.onnx}]
    samples: {calibration: third.npz}
    policy: {objective: minimize latency_p90_ms}
    variants: fast
    share: 2
    minutes: 5
    group: text
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("digits", "letters", "words"):
        (tmp_path / f"{name}.onnx").write_bytes(b"model")
    x = np.zeros((4, 8), np.float32)
    for name in ("held-out", "other", "third"):
        np.savez(tmp_path / f"{name}.npz", x=x, labels=np.zeros(4, np.int64))
    return tmp_path


def planned(folder: Path, text: str, **options: str) -> FleetPlan:
    file = folder / "fleet.yaml"
    file.write_text(text)
    return plan_fleet(file, work=folder / "work", **options)


def refused(folder: Path, text: str) -> list[str]:
    with pytest.raises(DocumentError) as caught:
        planned(folder, text)
    return [line.replace(f"{folder}/", "") for line in caught.value.message.splitlines()]


def campaign_file(folder: Path, name: str, *, model: str = "words") -> Path:
    path = folder / "campaigns" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"name: {name}\nsources: [{{onnx: ../{model}.onnx}}]\nsamples: {{evaluation: ../held-out.npz}}\nlevel: quick\n"
    )
    return path


def test_models_take_what_they_do_not_say_from_the_defaults(folder: Path):
    digits, letters = planned(folder, DEFAULTS + MODELS).entries
    assert digits.planned.config.variants == ("float32", "int8-dynamic")
    assert digits.planned.config.samples.calibration == "other.npz"
    assert digits.minutes == 30
    assert digits.group == ""
    assert digits.planned.work == folder / "work" / "models" / "digits"
    config = letters.planned.config
    assert config.variants == ("fast",)
    assert config.samples.model_dump() == {"evaluation": "held-out.npz", "calibration": "third.npz"}
    assert config.policy.constraints == ("accuracy_drop <= 0.01",)
    assert config.policy.objective == "minimize latency_p90_ms"
    assert (letters.share, letters.minutes, letters.group) == (2.0, 5.0, "text")


def test_a_mapping_of_another_kind_takes_nothing_from_the_default(folder: Path):
    text = DEFAULTS + "  cluster: {kind: scheduler, address: 'a:1', mesh: 'b:2', storage: /x, servers: {triton: t}}\n"
    entry = planned(
        folder,
        text + "models:\n  - {name: digits, sources: [{onnx: digits.onnx}], cluster: {kind: local}}\n",
    ).entries[0]
    assert entry.planned.config.cluster.kind == "local"


def test_campaign_files_stand_for_themselves(folder: Path):
    path = campaign_file(folder, "words")
    text = DEFAULTS + MODELS + f"  - {{campaign: {path.relative_to(folder)}, share: 3}}\n"
    entry = planned(folder, text).entries[2]
    assert entry.planned.config == load_campaign(path)
    assert entry.planned.base == path.parent
    assert (entry.name, entry.share, entry.minutes) == ("words", 3.0, 30.0)


def test_a_pattern_finds_campaign_files_and_leaves_out_those_that_are_listed(folder: Path):
    for name in ("b", "a", "c"):
        campaign_file(folder, name)
    text = "name: f\nmodels_from: campaigns/*.yaml\nmodels: [{campaign: campaigns/b.yaml, name: renamed}]\n"
    fleet = planned(folder, text)
    assert [entry.name for entry in fleet.entries] == ["renamed", "a", "c"]
    assert fleet.entries[0].planned.config.name == "renamed"


def test_a_level_of_the_command_line_is_everybodys(folder: Path):
    path = campaign_file(folder, "words")
    text = DEFAULTS + MODELS + f"  - {{campaign: {path.relative_to(folder)}}}\n"
    assert {entry.planned.level.name for entry in planned(folder, text, level="standard").entries} == {"standard"}


@pytest.mark.parametrize(
    ("change", "at", "words"),
    [
        (("name: spring", "name: spring\nparalel: 2"), "paralel", "unknown key 'paralel'; did you mean 'parallel'?"),
        (("  level: quick", "  levle: quick"), "levle", "unknown key 'levle'; did you mean 'level'?"),
        (("    minutes: 5", "    minuts: 5"), "minuts", "unknown key 'minuts'; did you mean 'minutes'?"),
        (("    minutes: 5", "    minutes: 0"), "    minutes", "minutes: 0"),
        (("    share: 2", "    share: -1"), "share", "share: -1"),
        (("  level: quick", "  level: quik"), "name: digits", "digits and 1 more: there is no level 'quik'"),
        (("{onnx: letters.onnx}", "{onnx: gone.onnx}"), "name: letters", "letters: source 'model': nothing at"),
        (("third.npz", "gone.npz"), "name: letters", "letters: samples.calibration: no file at"),
        (
            ("name: letters", "name: digits\n    seed: 1"),
            "    seed",
            "the name 'digits' is taken by the model at fleet",
        ),
        (("    group: text", "    group: text\ngroups: {texts: 2}"), "name: letters", "did you mean 'texts'?"),
        (("accuracy_drop <= 0.01", "acuracy_drop <= 0.01"), "name: digits", "acuracy_drop"),
        (("models:", "models_from: x/*.yaml\nmodels:"), "models_from", "no file matches 'x/*.yaml'"),
        (("models:", "models_from: x/**.yaml\nmodels:"), "models_from", "'x/**.yaml'"),
        (("    share: 2", "    campaign: a.yaml"), "onnx: letters", "unknown key 'sources'"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(folder: Path, change: tuple[str, str], at: str, words: str):
    text = (DEFAULTS + MODELS).replace(*change, 1)
    told = refused(folder, text)
    line = next(number for number, row in enumerate(text.splitlines(), start=1) if at in row)
    if at == "    seed":
        line -= 1  # of the model, not of the key
    assert any(one.startswith(f"fleet.yaml:{line}:") and words in one for one in told), told


def test_everything_that_is_wrong_is_told_at_once_and_nothing_is_begun(folder: Path):
    text = (DEFAULTS + MODELS).replace("digits.onnx", "gone.onnx").replace("third.npz", "gone.npz")
    told = refused(folder, text)
    assert len(told) == 2
    assert "digits: source" in told[0]
    assert "letters: samples" in told[1]
    assert not (folder / "work").exists()


def test_a_wrong_default_is_told_once(folder: Path):
    told = refused(folder, (DEFAULTS + MODELS).replace("variants: [float32", "varants: [float32"))
    assert len(told) == 1


def test_a_wrong_campaign_file_is_told_with_both_places(folder: Path):
    path = campaign_file(folder, "words")
    path.write_text(path.read_text() + "metrc: accuracy\n")
    (told,) = refused(folder, "name: f\nmodels:\n  - campaign: campaigns/words.yaml\n")
    assert told.startswith("fleet.yaml:3: campaign: campaigns/words.yaml:5: metrc: unknown key")


def test_defaults_that_reach_nobody_are_refused(folder: Path):
    campaign_file(folder, "words")
    text = "name: f\ndefaults: {level: quick, minutes: 3}\nmodels: [{campaign: campaigns/words.yaml}]\n"
    (told,) = refused(folder, text)
    assert "defaults.level" in told
    entry = planned(folder, text.replace("level: quick, ", "")).entries[0]
    assert entry.minutes == 3


def test_a_fleet_without_models(folder: Path):
    assert "the fleet has no models" in refused(folder, "name: f\n")[0]


def test_a_fleet_has_a_folder_of_its_own(folder: Path):
    (folder / "fleet.yaml").write_text(DEFAULTS + MODELS)
    assert default_work(folder / "fleet.yaml") == folder / "burnish-work" / "fleets" / "spring"


def test_hundreds_of_models_are_planned_together(folder: Path):
    models = "".join(f"  - {{name: m{number}, sources: [{{onnx: digits.onnx}}]}}\n" for number in range(200))
    assert len(planned(folder, DEFAULTS + "models:\n" + models).entries) == 200
