from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator

from registry import documents
from registry.documents import load_document, parse_document
from registry.errors import DocumentError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantize(Strict):
    kind: Literal["quantize"]
    scheme: Literal["dynamic", "static"] = "dynamic"


class Prune(Strict):
    kind: Literal["prune"]
    ratio: float


Stage = Annotated[Quantize | Prune, Field(discriminator="kind")]


class Load(Strict):
    duration_s: float
    arrivals: Literal["poisson", "constant"] = "poisson"


class Document(Strict):
    name: str
    seed: int = 0
    load: Load | None = None
    loads: dict[str, Load] = {}
    stages: tuple[Stage, ...] = ()
    mixed: tuple[str | Load, ...] = ()
    numbers: list[int] | int | None = None
    choice: Stage | str | None = None
    hidden: int = Field(default=1, alias="shown-as")

    @field_validator("seed")
    @classmethod
    def _not_negative(cls, seed: int) -> int:
        if seed < 0:
            raise ValueError("a seed is not negative; give one from 0 on")
        return seed


def refused(text: str, model: type[BaseModel] = Document) -> str:
    with pytest.raises(DocumentError) as caught:
        parse_document(text, model, name="campaign.yaml")
    return str(caught.value)


def plain(text: str) -> dict[str, Any]:
    return parse_document(text, RootModel[dict[str, Any]], name="plain.yaml").root


def test_a_good_document_becomes_its_model():
    document = parse_document(
        "name: digits\nseed: 7\nstages:\n  - {kind: prune, ratio: 5e-1}\nmixed: [a, {duration_s: 2}]\nshown-as: 3\n",
        Document,
        name="campaign.yaml",
    )
    assert document.seed == 7
    assert document.stages == (Prune(kind="prune", ratio=0.5),)
    assert document.mixed == ("a", Load(duration_s=2))
    assert document.hidden == 3


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("name: a\nsede: 3\n", 2, ["sede", "unknown key", "did you mean 'seed'"]),
        ("name: a\nzzz: 3\n", 2, ["unknown key 'zzz'", "the keys here are: name, seed, load", "shown-as"]),
        ("name: a\nshwn-as: 3\n", 2, ["did you mean 'shown-as'"]),
        ("seed: 3\n", 1, ["name: the key is missing; add it"]),
        ("name: a\nseed: x3\n", 2, ["seed: 'x3': must be a valid integer"]),
        ("name: a\nseed: -3\n", 2, ["seed: -3: a seed is not negative; give one from 0 on"]),
        ("name: a\nload:\n  duration: 3\n  duration_s: 3\n", 3, ["load.duration:", "did you mean 'duration_s'"]),
        ("name: a\nload:\n  arrivals: poisson\n", 2, ["load.duration_s: the key is missing"]),
        (
            "name: a\nload:\n  duration_s: 1\n  arrivals: poison\n",
            4,
            ["load.arrivals: 'poison'", "'poisson' or 'constant'", "did you mean 'poisson'?"],
        ),
        ("name: a\nloads:\n  x:\n    duration_z: 1\n    duration_s: 1\n", 4, ["loads.x.duration_z", "'duration_s'"]),
        (
            "name: a\nstages:\n  - kind: prune\n    ratio: 1\n  - kind: quantize\n    shceme: static\n",
            6,
            ["stages[1].shceme: unknown key 'shceme'; did you mean 'scheme'?"],
        ),
        (
            "name: a\nstages:\n  - kind: quantise\n",
            3,
            ["stages[0].kind: 'quantise': must be one of 'quantize', 'prune'; did you mean 'quantize'?"],
        ),
        ("name: a\nstages:\n  - ratio: 1\n", 3, ["stages[0]", "'kind' is missing"]),
        ("name: a\nmixed:\n  - b\n  - {duration_z: 1, duration_s: 1}\n", 4, ["mixed[1].duration_z", "'duration_s'"]),
        ("name: a\nchoice:\n  kind: prune\n  ratoi: 3\n  ratio: 1\n", 4, ["choice.ratoi", "did you mean 'ratio'"]),
        ("name: a\nchoice: {kind: pune, ratio: 1}\n", 2, ["choice.kind: 'pune': must", "did you mean 'prune'?"]),
        ("name: a\nnumbers: [1, x]\n", 2, ["numbers[1]: 'x': must be a valid integer"]),
        ("name: a\nstages: [[1]]\n", 2, ["stages[0]: [1]: must be a mapping of keys to values"]),
        ("name: a\nname: b\n", 2, ["name: the key is given twice, first on line 1; keep one"]),
        ("name: a\nload: {duration_s: 1, duration_s: 2}\n", 2, ["load.duration_s", "twice"]),
        ("name: !!python/object/apply:os.getcwd []\n", 1, ["python/object/apply:os.getcwd", "refused"]),
        ("name: !thing x\n", 1, ["'!thing'", "refused"]),
        ("name: a\nseed: .nan\n", 2, ["seed: .nan is not a finite number"]),
        ("name: a\nseed: 1e999\n", 2, ["1e999 is not a finite number"]),
        ("name: a\nseed: " + "9" * 5000 + "\n", 2, ["seed", "is not a number"]),
        ("name: a\nload: &l {duration_s: 1}\nloads: {x: {<<: *l}}\n", 3, ["merge keys are refused"]),
        ("name: a\n? [1, 2]\n: b\n", 2, ["a key is sequence"]),
        ("name: a\nseed: [1\n", 3, ["not valid YAML"]),
        ("name: a\n  seed: 3\n", 2, ["not valid YAML", "'seed: 3'", "check indents"]),
        ("name: a\n\tseed: 3\n", 2, ["not valid YAML"]),
        ("name: a\n--- \nname: b\n", 2, ["not valid YAML", "single document"]),
        ("name: a\nseed: \x00\n", 2, ["'\\x00'", "remove it"]),
        ("- a\n", 1, ["the document is a list, not a mapping", "name, seed"]),
        ("just text\n", 1, ["the single value 'just text'"]),
        ("", 1, ["the document is empty"]),
        ("name: *nothing\n", 1, ["not valid YAML", "undefined alias"]),
    ],
)
def test_what_is_wrong_is_named_with_line_and_remedy(text, line, parts):
    message = refused(text)
    assert message.startswith(f"campaign.yaml:{line}: "), message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_several_problems_are_one_message_in_the_order_of_the_file():
    message = refused("sede: 3\nload: {}\nseed: x\n")
    lines = message.splitlines()
    assert [line.split(":")[1] for line in lines] == ["1", "1", "2", "3"]
    assert "sede" in lines[1] or "sede" in lines[0]


def test_more_than_ten_problems_are_counted():
    text = "name: a\n" + "".join(f"unknown{number}: 1\n" for number in range(14))
    lines = refused(text).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 4 more"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("no", "no"),
        ("True", True),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1e-3", 0.001),
        ("-.5", -0.5),
        ("012", 12),
        ("0x1F", 31),
        ("0o17", 15),
        ("~", None),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("1_000", "1_000"),
        ("+7", 7),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    loaded = plain(f"key: {text}\n")["key"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_keys_are_text():
    assert plain("1: a\ntrue: b\non: c\n") == {"1": "a", "true": "b", "on": "c"}


def test_aliases_work_within_reason():
    assert plain("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}


def test_billion_laughs_are_refused():
    text = "a0: &a0 [x]\n" + "".join(
        f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 12)
    )
    assert "aliases" in refused(text)


def test_an_alias_inside_itself_is_refused():
    assert "aliases" in refused("name: &x [*x]\n")


def test_deep_nesting_is_refused():
    message = refused("name: " + "[" * 4000 + "\n")
    assert "nested deeper than 50 levels" in message


def test_a_large_file_is_refused(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text("name: " + "a" * documents.MAX_BYTES)
    with pytest.raises(DocumentError, match="larger than 1000000 bytes"):
        load_document(path, Document)
    with pytest.raises(DocumentError, match="larger than"):
        parse_document(path.read_text(), Document, name="big.yaml")


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "campaign.yaml").write_text("name: a\n")
    with pytest.raises(DocumentError, match=r"(?s)there is no file .*campaing\.yaml.*Did you mean .*campaign\.yaml"):
        load_document(tmp_path / "campaing.yaml", Document)
    with pytest.raises(DocumentError, match="Check the path"):
        load_document(tmp_path / "nowhere" / "a.yaml", Document)


def test_a_folder_and_a_file_that_is_not_text_are_refused(tmp_path):
    with pytest.raises(DocumentError, match="is not a file"):
        load_document(tmp_path, Document)
    (tmp_path / "latin.yaml").write_bytes(b"seed: 1\nname: caf\xe9\n")
    with pytest.raises(DocumentError, match=r"latin\.yaml:2: not UTF-8"):
        load_document(tmp_path / "latin.yaml", Document)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("name: a\n")

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(DocumentError, match="cannot be read: Permission denied"):
        load_document(path, Document)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfname: a\n")
    assert load_document(tmp_path / "a.yaml", Document).name == "a"


def test_long_values_are_cut_in_messages():
    assert len(refused(f"name: a\nseed: {'x' * 500}\n")) < 250


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"\n #,?%@01.~<\t", max_size=60))
def test_any_text_gives_a_model_or_a_document_error(text):
    try:
        parse_document(text, Document, name="campaign.yaml")
    except DocumentError as error:
        message = str(error)
    else:
        message = "campaign.yaml:1: fits"
    assert message.startswith("campaign.yaml:")


LAYERS = """
below:
  name: digits
  load: {duration_s: 2, arrivals: constant}
  stages:
    - {kind: prune, ratio: 0.5}
    - {kind: quantize}
  choice: {kind: prune, ratio: 0.5}
above:
  - load: {duration_s: 3}
    stages: [{kind: quantize, scheme: static}]
    choice: {kind: quantize}
  - seed: -1
  - seed: 1
    sede: 2
  - load: {arrivals: never}
"""


def laid(folder: Path, number: int) -> documents.Document:
    (folder / "layers.yaml").write_text(LAYERS)
    document = documents.read_document(folder / "layers.yaml")
    return document.part("above", number).over(document.part("below"))


def test_a_part_laid_over_another_takes_mappings_key_by_key_and_the_rest_whole(tmp_path: Path):
    made = laid(tmp_path, 0).as_model(Document)
    assert made.name == "digits"
    assert made.load == Load(duration_s=3, arrivals="constant")
    assert made.stages == (Quantize(kind="quantize", scheme="static"),)
    assert made.choice == Quantize(kind="quantize")


@pytest.mark.parametrize(
    ("number", "line", "words"),
    [
        (1, 13, "seed: -1: a seed is not negative"),
        (2, 15, "sede: unknown key 'sede'; did you mean 'seed'?"),
        (3, 16, "load.arrivals: 'never': must be 'poisson' or 'constant'"),
    ],
)
def test_what_does_not_fit_in_layers_is_told_with_the_line_of_its_own_layer(
    tmp_path: Path, number: int, line: int, words: str
):
    with pytest.raises(DocumentError) as caught:
        laid(tmp_path, number).as_model(Document)
    assert f"layers.yaml:{line}: {words}" in str(caught.value)


def test_lines_of_what_was_replaced_are_gone(tmp_path: Path):
    made = laid(tmp_path, 0)
    assert made.lines[("stages", 0, "scheme")] == 11
    assert ("stages", 1) not in made.lines
    assert made.place.endswith("layers.yaml:10")
    assert made.only(["name", "other"]).value == {"name": "digits"}


def test_a_document_that_is_read_is_a_mapping(tmp_path: Path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(DocumentError, match="not a mapping"):
        documents.read_document(tmp_path / "list.yaml")
    (tmp_path / "good.yaml").write_text("a: {b: 1}")
    assert documents.read_document(tmp_path / "good.yaml").part("a", "b").value == 1
