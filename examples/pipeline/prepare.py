"""Writes the three models and the samples of this example into ``data/`` beside this file.

The task: of which package of Python's standard library is this docstring? ``tokens`` makes numbers of the text's
letters, three at a time; ``encoder`` makes one vector of them (random weights, fixed seed: it stands for a trained
network, and does its work); ``classifier`` is fitted on these vectors. The same Python gives the same samples.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.quantization import QuantType, quantize_dynamic
from sklearn.linear_model import LogisticRegression

DATA = Path(__file__).parent / "data"
PACKAGES = ("asyncio", "email", "importlib", "unittest", "xml")
LENGTH = 128  # bytes of a text
IDS, WIDTH, HIDDEN = 4096, 192, 2560
SEED = 0
LEAST_LETTERS = 40
HELD_OUT = 0.4


def main() -> None:
    """Writes everything."""
    DATA.mkdir(exist_ok=True)
    chance = np.random.default_rng(SEED)
    save("tokens", tokens())
    save("encoder", encoder(chance))
    texts, labels = docstrings(Path(sysconfig.get_path("stdlib")))
    features = run("encoder", ids=run("tokens", text=texts))
    order = chance.permutation(len(texts))
    held = int(HELD_OUT * len(texts))
    evaluation, training = order[:held], order[held:]
    save("classifier", classifier(features[training], labels[training]))
    for name in ("encoder", "classifier"):
        quantize_dynamic(DATA / f"{name}.onnx", DATA / f"{name}-int8.onnx", weight_type=QuantType.QInt8)
    np.savez(DATA / "evaluation.npz", text=texts[evaluation], labels=labels[evaluation])
    answers = run("classifier", features=features[evaluation]).argmax(axis=1)
    right = float((answers == labels[evaluation]).mean())
    print(f"{held} samples and the models are in {DATA}; the float32 pipeline is right on {right:.1%}")


def docstrings(stdlib: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(bytes of each docstring, filled with blanks; number of its package)."""
    texts, labels = [], []
    for label, package in enumerate(PACKAGES):
        for text in sorted({found for path in sorted((stdlib / package).rglob("*.py")) for found in _of_file(path)}):
            texts.append(text.encode()[:LENGTH].ljust(LENGTH))
            labels.append(label)
    rows = np.frombuffer(b"".join(texts), dtype=np.uint8).reshape(-1, LENGTH)
    return rows, np.array(labels, dtype=np.int64)


def _of_file(path: Path) -> Iterator[str]:
    if "test" in path.parts:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= LEAST_LETTERS:
                yield text


def tokens() -> onnx.ModelProto:
    """Bytes (n, 128) -> a number for each three in a row (n, 126)."""
    letters = LENGTH - 2
    nodes = [helper.make_node("Cast", ["text"], ["bytes"], to=TensorProto.INT64)]
    constants: dict[str, Any] = {"axis": np.array([1]), "range": np.array([IDS])}
    for n, factor in enumerate((961, 31, 1)):
        constants |= {f"from{n}": np.array([n]), f"to{n}": np.array([n + letters]), f"factor{n}": np.array([factor])}
        nodes += [
            helper.make_node("Slice", ["bytes", f"from{n}", f"to{n}", "axis"], [f"part{n}"]),
            helper.make_node("Mul", [f"part{n}", f"factor{n}"], [f"scaled{n}"]),
        ]
    nodes += [
        helper.make_node("Add", ["scaled0", "scaled1"], ["two"]),
        helper.make_node("Add", ["two", "scaled2"], ["three"]),
        helper.make_node("Mod", ["three", "range"], ["ids"]),
    ]
    return model("tokens", nodes, constants, ("text", TensorProto.UINT8, LENGTH), ("ids", TensorProto.INT64, letters))


def encoder(chance: np.random.Generator) -> onnx.ModelProto:
    """Numbers (n, 126) -> one vector (n, 192): a layer on each embedding, and their mean."""
    constants = {
        "embedding": chance.normal(size=(IDS, WIDTH)).astype(np.float32),
        "wide": (chance.normal(size=(WIDTH, HIDDEN)) / WIDTH**0.5).astype(np.float32),
        "narrow": (chance.normal(size=(HIDDEN, WIDTH)) / HIDDEN**0.5).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "wide"], ["widened"]),
        helper.make_node("Relu", ["widened"], ["active"]),
        helper.make_node("MatMul", ["active", "narrow"], ["narrowed"]),
        helper.make_node("Add", ["narrowed", "embedded"], ["kept"]),
        helper.make_node("ReduceMean", ["kept"], ["features"], axes=[1], keepdims=0),
    ]
    return model(
        "encoder", nodes, constants, ("ids", TensorProto.INT64, LENGTH - 2), ("features", TensorProto.FLOAT, WIDTH)
    )


def classifier(features: NDArray[np.float32], labels: NDArray[np.int64]) -> onnx.ModelProto:
    """One vector (n, 192) -> a score for each package (n, 5)."""
    scale = 1 / features.std()
    fitted = LogisticRegression(max_iter=2000, C=1.0).fit(features * scale, labels)
    constants = {
        "weights": (fitted.coef_.T * scale).astype(np.float32),
        "bias": fitted.intercept_.astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["features", "weights"], ["scores"]),
        helper.make_node("Add", ["scores", "bias"], ["logits"]),
    ]
    ends = ("features", TensorProto.FLOAT, WIDTH), ("logits", TensorProto.FLOAT, len(PACKAGES))
    return model("classifier", nodes, constants, *ends)


def model(
    name: str, nodes: list[Any], constants: dict[str, Any], start: tuple[str, int, int], end: tuple[str, int, int]
) -> onnx.ModelProto:
    """A model with one input and one output, each of shape (n, a size)."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        name,
        [value(start[0], start[1], ["n", start[2]])],
        [value(end[0], end[1], ["n", end[2]])],
        [numpy_helper.from_array(np.asarray(array), key) for key, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save(name: str, made: onnx.ModelProto) -> None:
    """Checks the model and writes it."""
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, DATA / f"{name}.onnx")


def run(name: str, **inputs: NDArray[Any]) -> NDArray[Any]:
    """The output of a model for all rows, some at a time."""
    session = InferenceSession(DATA / f"{name}.onnx", providers=["CPUExecutionProvider"])
    rows = len(next(iter(inputs.values())))
    parts = [
        session.run(None, {key: array[n : n + 64] for key, array in inputs.items()})[0] for n in range(0, rows, 64)
    ]
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
