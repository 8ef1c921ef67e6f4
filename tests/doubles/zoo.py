"""Models as they come: one tiny model of each kind that exporters and users hand in, made in code from a fixed seed.

Every model takes inputs whose first dimension is the batch, free unless its kind says otherwise, and runs in
microseconds.
"""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

OPSETS = range(9, 23)

Weights = Mapping[str, tuple[int, ...] | npt.NDArray[Any] | np.generic]
Maker = Callable[[Path], None]

_CONV = """(float[b,3,8,8] image) => (float[b,4] logits) {
    c = Conv <pads = [1, 1, 1, 1]> (image, w1)
    n = BatchNormalization (c, scale, shift, mean, variance)
    r = Relu (n)
    d = Conv <strides = [2, 2]> (r, w2, b2)
    e = Relu (d)
    p = GlobalAveragePool (e)
    f = Flatten (p)
    logits = Gemm (f, w3, b3)
}"""
_CONV_WEIGHTS: Weights = {
    "w1": (8, 3, 3, 3),
    "scale": np.linspace(0.5, 1.5, 8, dtype=np.float32),
    "shift": (8,),
    "mean": (8,),
    "variance": np.linspace(0.6, 1.4, 8, dtype=np.float32),
    "w2": (16, 8, 3, 3),
    "b2": (16,),
    "w3": (16, 4),
    "b3": (4,),
}
_PERCEPTRON = """(float[b,8] x) => (float[b,4] y) {
    h = Gemm (x, w1, b1)
    r = Relu (h)
    m = MatMul (r, w2)
    y = Add (m, b2)
}"""
_PERCEPTRON_WEIGHTS: Weights = {"w1": (8, 16), "b1": (16,), "w2": (16, 4), "b2": (4,)}


def build(body: str, weights: Weights, *, opset: int = 17, ir_version: int | None = None) -> onnx.ModelProto:
    """The model of a graph in ONNX's text form, with random weights of these shapes, or these very ones.

    Raises:
        onnx.checker.ValidationError: it is no valid model.
    """
    domains = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(domains) if ir_version is None else ir_version
    # IR version 4 is the first in which weights need not be inputs.
    model = parser.parse_model(f'<ir_version: {max(version, 4)}, opset_import: ["" : {opset}]> zoo {body}')
    for name, weight in weights.items():
        array = _random(name, weight) if isinstance(weight, tuple) else weight
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for position, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{position}"
    onnx.checker.check_model(model)
    return model


def _random(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
    generator = np.random.default_rng(zlib.crc32(f"{name}{shape}".encode()))
    array: npt.NDArray[np.float32] = (generator.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
    return array


def conv(opset: int) -> onnx.ModelProto:
    """Two convolutions, batch normalization and a Gemm: ``image`` (b, 3, 8, 8) to ``logits`` (b, 4)."""
    return build(_CONV, _CONV_WEIGHTS, opset=opset)


def perceptron() -> onnx.ModelProto:
    """Two layers, as a Gemm and as a MatMul with an Add: ``x`` (b, 8) to ``y`` (b, 4)."""
    return build(_PERCEPTRON, _PERCEPTRON_WEIGHTS)


def constant_nodes() -> onnx.ModelProto:
    """The convolutional net of opset 11 with all its weights in Constant nodes."""
    model = conv(11)
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in reversed(tensors):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], name=tensor.name, value=tensor))
    return model


def fixed_batch() -> onnx.ModelProto:
    """The convolutional net with its batch fixed at 1, as exporters without dynamic axes write it."""
    return build(_CONV.replace("[b,", "[1,"), _CONV_WEIGHTS, opset=12)


def several() -> onnx.ModelProto:
    """Two inputs of different widths, and two outputs of which one is float32 and one int64."""
    body = """(float[b,8] left, float[b,6] right) => (float[b,4] scores, int64[b] best) {
        p = MatMul (left, w1)
        q = MatMul (right, w2)
        s = Add (p, q)
        t = Tanh (s)
        scores = MatMul (t, w3)
        best = ArgMax <axis = 1, keepdims = 0> (scores)
    }"""
    return build(body, {"w1": (8, 16), "w2": (6, 16), "w3": (16, 4)})


def token_model(kind: str) -> onnx.ModelProto:
    """Token ids and a mask of an integer type, (b, s) both, to the mean of token states (b, 8)."""
    body = f"""({kind}[b,s] ids, {kind}[b,s] mask) => (float[b,8] embedding) {{
        e = Gather (table, ids)
        m = Cast <to = 1> (mask)
        column = Unsqueeze (m, last)
        k = Mul (e, column)
        t = ReduceMean <axes = [1], keepdims = 0> (k)
        h = MatMul (t, w1)
        g = Relu (h)
        embedding = MatMul (g, w2)
    }}"""
    last = np.array([2], np.int64)
    return build(body, {"table": (20, 16), "last": last, "w1": (16, 16), "w2": (16, 8)}, opset=17)


def uint8_image() -> onnx.ModelProto:
    """Pixels as bytes, channels last, scaled inside of the graph: ``pixels`` (b, 8, 8, 3) uint8 to ``logits``."""
    body = """(uint8[b,8,8,3] pixels) => (float[b,4] logits) {
        f = Cast <to = 1> (pixels)
        s = Div (f, scale)
        t = Transpose <perm = [0, 3, 1, 2]> (s)
        c = Conv <pads = [1, 1, 1, 1]> (t, w1)
        r = Relu (c)
        p = GlobalAveragePool (r)
        v = Flatten (p)
        logits = Gemm (v, w2)
    }"""
    return build(body, {"scale": np.float32(255), "w1": (8, 3, 3, 3), "w2": (8, 4)}, opset=12)


def half() -> onnx.ModelProto:
    """The perceptron in float16 from its input to its output."""
    body = _PERCEPTRON.replace("float[", "float16[")
    shapes = {"w1": (8, 16), "b1": (16,), "w2": (16, 4), "b2": (4,)}
    return build(body, {name: _random(name, shape).astype(np.float16) for name, shape in shapes.items()})


def half_input() -> onnx.ModelProto:
    """A float16 input to float32 weights and a float32 output."""
    body = """(float16[b,8] x) => (float[b,4] y) {
        f = Cast <to = 1> (x)
        h = MatMul (f, w1)
        r = Relu (h)
        y = MatMul (r, w2)
    }"""
    return build(body, {"w1": (8, 16), "w2": (16, 4)})


def double() -> onnx.ModelProto:
    """A float64 input to float64 weights, as numerical libraries write them."""
    body = "(double[b,8] x) => (double[b,4] y) { y = MatMul (x, w) }"
    return build(body, {"w": _random("w", (8, 4)).astype(np.float64)})


def branches() -> onnx.ModelProto:
    """An If whose two branches hold weights of their own use."""
    body = """(float[b,8] x) => (float[b,4] y) {
        m = ReduceMax <keepdims = 0> (x)
        c = Greater (m, zero)
        h = MatMul (x, w1)
        z = If (c) <
            then_branch = yes () => (float[b,4] t) { t = MatMul (h, w2) },
            else_branch = no () => (float[b,4] e) { n = Neg (h) e = MatMul (n, w2) }
        >
        y = Relu (z)
    }"""
    return build(body, {"zero": np.float32(0), "w1": (8, 16), "w2": (16, 4)})


def loop() -> onnx.ModelProto:
    """A Loop of three rounds that carries a state through a weight of the graph around it."""
    body = """(float[b,8] x) => (float[b,4] y) {
        s = Loop (rounds, go, x) <
            body = once (int64 i, bool on, float[b,8] state) => (bool still, float[b,8] next) {
                still = Identity (on)
                h = MatMul (state, w1)
                next = Tanh (h)
            }
        >
        y = MatMul (s, w2)
    }"""
    return build(body, {"rounds": np.int64(3), "go": np.bool_(True), "w1": (8, 8), "w2": (8, 4)}, opset=16)


def scan() -> onnx.ModelProto:
    """A Scan along time that sums a projection of each step: ``x`` (b, 4, 8) to ``y`` (b, 4)."""
    body = """(float[b,4,8] x) => (float[b,4] y) {
        steps = Transpose <perm = [1, 0, 2]> (x)
        flat = ReduceMean <axes = [1], keepdims = 0> (x)
        begin = Mul (flat, zero)
        s, all = Scan (begin, steps) <
            num_scan_inputs = 1,
            body = once (float[b,8] state, float[b,8] step) => (float[b,8] next, float[b,8] each) {
                h = MatMul (step, w1)
                k = Add (h, state)
                next = Tanh (k)
                each = Identity (next)
            }
        >
        y = MatMul (s, w2)
    }"""
    return build(body, {"zero": np.float32(0), "w1": (8, 8), "w2": (8, 4)}, opset=16)


def recurrent(kind: str) -> onnx.ModelProto:
    """An LSTM or GRU that takes its state as inputs and gives the new one as outputs; time is the second dimension."""
    gates, cell = {"LSTM": (4, True), "GRU": (3, False)}[kind]
    states = ("float[b,8] h", "float[b,8] c") if cell else ("float[b,8] h",)
    news = ("float[b,8] new_h", "float[b,8] new_c") if cell else ("float[b,8] new_h",)
    body = f"""(float[b,4,6] x, {", ".join(states)}) => (float[b,4,8] y, {", ".join(news)}) {{
        steps = Transpose <perm = [1, 0, 2]> (x)
        h0 = Unsqueeze (h, first)
        {"c0 = Unsqueeze (c, first)" if cell else ""}
        seq, h1{", c1" if cell else ""} = {kind} <hidden_size = 8> (steps, w, r, bias, , h0{", c0" if cell else ""})
        one = Squeeze (seq, second)
        y = Transpose <perm = [1, 0, 2]> (one)
        new_h = Squeeze (h1, first)
        {"new_c = Squeeze (c1, first)" if cell else ""}
    }}"""
    weights: Weights = {
        "w": (1, 8 * gates, 6), "r": (1, 8 * gates, 8), "bias": (1, 16 * gates),
        "first": np.array([0], np.int64), "second": np.array([1], np.int64),
    }  # fmt: skip
    return build(body, weights)


def detector() -> onnx.ModelProto:
    """A detection head: boxes and scores of a convolution, then NonMaxSuppression; the number of rows depends on data.

    ``image`` (1, 3, 8, 8) to ``found`` (any, 3) int64, ``boxes`` (1, 64, 4) and ``scores`` (1, 2, 64). The batch is 1.
    """
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1).reshape(1, 64, 2).astype(np.float32)
    body = """(float[1,3,8,8] image) => (int64[n,3] found, float[1,64,4] boxes, float[1,2,64] scores) {
        c = Conv <pads = [1, 1, 1, 1]> (image, w1)
        r = Relu (c)
        d = Conv (r, w2)
        flat = Reshape (d, six)
        offsets, raw = Split <axis = 1> (flat, parts)
        o = Transpose <perm = [0, 2, 1]> (offsets)
        t = Tanh (o)
        small = Mul (t, tenth)
        boxes = Add (small, priors)
        scores = Sigmoid (raw)
        found = NonMaxSuppression (boxes, scores, most, overlap, threshold)
    }"""
    weights: Weights = {
        "w1": (8, 3, 3, 3), "w2": (6, 8, 1, 1),
        "six": np.array([1, 6, 64], np.int64), "parts": np.array([4, 2], np.int64),
        "tenth": np.float32(0.1), "priors": np.concatenate([grid, grid + 1], -1),
        "most": np.array([5], np.int64), "overlap": np.array([0.5], np.float32),
        "threshold": np.array([0.3], np.float32),
    }  # fmt: skip
    return build(body, weights)


def integers() -> onnx.ModelProto:
    """No weight at all, and integers only."""
    return build("(int64[b,2] left, int64[b,2] right) => (int64[b,2] total) { total = Add (left, right) }", {})


def repeated_inputs() -> onnx.ModelProto:
    """The perceptron of IR version 3, whose weights are inputs, too."""
    model = build(_PERCEPTRON, _PERCEPTRON_WEIGHTS, opset=9)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def local_functions() -> onnx.ModelProto:
    """A layer as a function inside of the model, as onnxscript writes it."""
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "zoo" : 1]>
        zoo (float[b,8] x) => (float[b,4] y) { h = zoo.Layer (x, w1) y = zoo.Layer (h, w2) }
        <domain: "zoo", opset_import: ["" : 17]> Layer (a, w) => (r) { m = MatMul (a, w) r = Relu (m) }"""
    )
    for name, shape in (("w1", (8, 16)), ("w2", (16, 4))):
        model.graph.initializer.append(numpy_helper.from_array(_random(name, shape), name))
    onnx.checker.check_model(model)
    return model


def write_large(folder: Path) -> Path:
    """A model whose one table has 2.2 GB of zeros in a sparse file beside it; ``ids`` (b, 1) int64 to ``y`` (b, 4).

    The table is too large for a model of one file. Its last two rows, which ids 0 and 1 stand for, are no zeros.
    """
    rows, width = 550_001, 1000
    model = build(
        """(int64[b,1] ids) => (float[b,4] y) {
            back = Sub (last, ids)
            e = Gather (table, back)
            s = Squeeze (e, axis)
            y = MatMul (s, w)
        }""",
        {"last": np.int64(rows - 1), "axis": np.array([1], np.int64), "w": (width, 4), "table": (2, width)},
    )
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    ends = table.raw_data
    table.ClearField("raw_data")
    table.dims[0] = rows
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "table.data"), ("offset", 0), ("length", rows * width * 4)):
        table.external_data.add(key=key, value=str(value))
    with (folder / "table.data").open("wb") as file:
        file.seek(rows * width * 4 - len(ends))
        file.write(ends)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _write(model: onnx.ModelProto, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))


def _write_external(folder: Path) -> None:
    path = str(folder / "model.onnx")
    onnx.save(perceptron(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def _writer(make: Callable[..., onnx.ModelProto], *given: int | str) -> Maker:
    return lambda folder: _write(make(*given), folder)


KINDS: Mapping[str, Maker] = {
    **{f"opset-{opset}": _writer(conv, opset) for opset in OPSETS},
    "perceptron": _writer(perceptron),
    "constant-nodes": _writer(constant_nodes),
    "fixed-batch": _writer(fixed_batch),
    "several-inputs-and-outputs": _writer(several),
    "int32": _writer(token_model, "int32"),
    "int64": _writer(token_model, "int64"),
    "uint8": _writer(uint8_image),
    "float16": _writer(half),
    "float16-input": _writer(half_input),
    "float64": _writer(double),
    "if": _writer(branches),
    "loop": _writer(loop),
    "scan": _writer(scan),
    "lstm": _writer(recurrent, "LSTM"),
    "gru": _writer(recurrent, "GRU"),
    "detector": _writer(detector),
    "integers": _writer(integers),
    "repeated-inputs": _writer(repeated_inputs),
    "local-functions": _writer(local_functions),
    "external-data": _write_external,
}


def write(kind: str, folder: Path) -> Path:
    """Writes the model of this kind into the folder, which is made; returns the path of ``model.onnx``."""
    folder.mkdir(parents=True, exist_ok=True)
    KINDS[kind](folder)
    return folder / "model.onnx"
