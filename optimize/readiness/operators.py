"""E2: operators, and what of them TensorRT does not take. The lists are those of onnx-tensorrt 10.1."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from optimize.readiness.graph import Graph, attributes, given, named
from optimize.readiness.releases import TENSORRT_SINCE
from optimize.readiness.rules import Hit, Rule, Target

QUANTIZED = frozenset({
    "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "QAttention",
    "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul",
    "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere", "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "MatMulBnb4",
})  # fmt: skip

_UNSUPPORTED = frozenset({
    "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BlackmanWindow",
    "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "DFT", "Det", "HammingWindow", "HannWindow",
    "ImageDecoder", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss",
    "Optional", "OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "STFT", "SequenceAt",
    "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
    "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit",
    "TfIdfVectorizer", "Unique",
})  # fmt: skip

_DATA_DEPENDENT = frozenset({"NonZero", "NonMaxSuppression", "Loop", "Scan"})

_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
# Operator -> the input that must be constant, and its name.
_CONSTANT_INPUTS: Mapping[str, tuple[int, str]] = {
    "Slice": (3, "axes"), "Squeeze": (1, "axes"), "Unsqueeze": (1, "axes"), "Pad": (3, "axes"), "CumSum": (1, "axis"),
    "OneHot": (1, "depth"), **dict.fromkeys(_REDUCTIONS, (1, "axes")),
}  # fmt: skip

_RESIZE_MODES = frozenset({"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"})
_MOST_K = 3839


def _listed(names: frozenset[str], said: str) -> Callable[[Graph, Target], Iterator[Hit]]:
    """A check that reports the operators of a list, one hit for each operator."""

    def check(graph: Graph, target: Target) -> Iterator[Hit]:
        found = defaultdict(list)
        for node in graph.nodes:
            if node.op_type in names:
                found[node.op_type].append(named(node))
        for op, nodes in sorted(found.items()):
            yield Hit(message=f"{op} {said}", nodes=tuple(nodes))

    return check


unsupported = _listed(_UNSUPPORTED, "is not in TensorRT")


def computed_parameters(graph: Graph, target: Target) -> Iterator[Hit]:
    """Parameters that must be known when the engine is built, and are computed at run time."""
    for node in graph.of_type(*_CONSTANT_INPUTS):
        position, name = _CONSTANT_INPUTS[node.op_type]
        tensor = given(node, position)
        if tensor and not graph.is_constant(tensor):
            yield Hit(message=f"{name} of {node.op_type} is computed at run time", nodes=(named(node),))
    for node in graph.of_type("Hardmax"):
        shape, axis = graph.shape(node.input[0]), attributes(node).get("axis", -1)
        if shape and -len(shape) <= axis < len(shape) and shape[axis] is None:
            yield Hit(message="Hardmax works along a free dimension", nodes=(named(node),))


# --- limits of attributes --------------------------------------------------------------------------------------


def _pool(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    if len(value.get("kernel_shape", (0, 0))) not in {2, 3}:
        return f"pools over {len(value['kernel_shape'])} dimensions; 2 and 3 are taken"
    if len(node.output) > 1 and node.output[1]:
        return "has the output Indices"
    return _dilated(graph, node, value)


def _dilated(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    return f"has dilations {list(value['dilations'])}" if set(value.get("dilations", ())) - {1} else None


def _scatter(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    reduction = value.get("reduction", "none")
    return f"has reduction {reduction!r}" if reduction != "none" else None


def _resize(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    if (way := value.get("coordinate_transformation_mode", "half_pixel")) not in _RESIZE_MODES:
        return f"has the coordinate transformation {way!r}"
    if (mode := value.get("mode", "nearest")) not in {"nearest", "linear"}:
        return f"has mode {mode!r}"
    if value.get("antialias", 0):
        return "has antialias"
    if (policy := value.get("keep_aspect_ratio_policy", "stretch")) != "stretch":
        return f"has the aspect ratio policy {policy!r}"
    return None


def _recurrent(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    names = [name.decode() if isinstance(name, bytes) else name for name in value.get("activations", ())]
    half = len(names) // 2
    if value.get("direction") == "bidirectional" and names[:half] != names[half:]:
        return f"has other activations on the way back: {names}"
    for name in ("input_forget", "layout"):
        if value.get(name, 0):
            return f"has {name} {value[name]}"
    return None


def _if(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    then, other = (list(value[branch].output) for branch in ("then_branch", "else_branch"))
    shared = {output.name for output in then} & {output.name for output in other}
    if shared:
        return f"has branches that both name an output {sorted(shared)[0]!r}"
    for left, right in zip(then, other, strict=False):
        ranks = [graph.shape(side.name) for side in (left, right)]
        if None not in ranks and len(ranks[0] or ()) != len(ranks[1] or ()):
            return f"has branches whose outputs {left.name!r} and {right.name!r} differ in rank"
    return None


def _constant(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    odd = sorted(set(value) & {"sparse_value", "value_string", "value_strings"})
    return f"holds a {odd[0]}" if odd else None


def _top_k(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    if not value.get("sorted", 1):
        return "asks for unsorted values"
    k = graph.constant(given(node, 1))
    return f"asks for {int(k.max())} values; {_MOST_K} are the most" if k is not None and k.max() > _MOST_K else None


def _first_output_only(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    return "has other outputs than the first" if any(node.output[1:]) else None


def _dropout(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    training = given(node, 2)
    mode = graph.constant(training) if training else None
    return "is in training mode" if training and (mode is None or mode.any()) else None


def _grid(graph: Graph, node: Any, value: Mapping[str, Any]) -> str | None:
    shape = graph.shape(node.input[0])
    return f"samples a tensor of rank {len(shape)}; 4 is taken" if shape and len(shape) != 4 else None


_LIMITS: Mapping[str, Callable[[Graph, Any, Mapping[str, Any]], str | None]] = {
    "AveragePool": _pool, "MaxPool": _pool, "LpPool": _dilated, "ScatterND": _scatter, "Resize": _resize,
    "RNN": _recurrent, "LSTM": _recurrent, "GRU": _recurrent, "If": _if, "Constant": _constant, "TopK": _top_k,
    "LayerNormalization": _first_output_only, "Dropout": _dropout, "GridSample": _grid,
}  # fmt: skip


def limited_attributes(graph: Graph, target: Target) -> Iterator[Hit]:
    """Operators that are taken, set in a way that is not."""
    for node in graph.of_type(*_LIMITS):
        if reason := _LIMITS[node.op_type](graph, node, attributes(node)):
            yield Hit(message=f"{node.op_type} {reason}", nodes=(named(node),))


def younger_operators(graph: Graph, target: Target) -> Iterator[Hit]:
    """Operators that a later version of TensorRT brought."""
    for op, since in TENSORRT_SINCE.items():
        nodes = tuple(named(node) for node in graph.of_type(op) if node.domain in {"", "ai.onnx"})
        if nodes and target.tensorrt < since:
            yield Hit(message=f"{op} needs TensorRT {since[0]}.{since[1]}", nodes=nodes)


RULES = (
    Rule(
        id="E201", severity="error", title="operator that TensorRT does not have",
        check=unsupported, partitions=True,
        fix="Export the model without it, cut it off into a step before or after, or write a plugin.",
    ),
    Rule(
        id="E202", severity="error", title="QOperator or dynamically quantized",
        check=_listed(QUANTIZED, "computes on quantized tensors itself; TensorRT takes Q/DQ pairs only"),
        partitions=True,
        fix="Quantize the float32 model anew with explicit Q/DQ pairs: the stage quantize.tensorrt.",
    ),
    Rule(
        id="E203", severity="error", title="parameter computed at run time", check=computed_parameters,
        fix="Fold constants (the stage tensorrt.prepare), or export with the parameter fixed.",
    ),
    Rule(
        id="E204", severity="error", title="attribute beyond TensorRT's limits", check=limited_attributes,
        fix="Export the operator with other settings, or put a supported one in its place.",
    ),
    Rule(
        id="E205", severity="warning", title="operator of a later TensorRT", check=younger_operators,
        fix="Build with that version, or export to an opset in which the operator is taken apart.",
    ),
    Rule(
        id="E206", severity="warning", title="shape that depends on the data",
        check=_listed(_DATA_DEPENDENT, "makes shapes that depend on the data"),
        fix="Expect an output allocator, synchronization and no CUDA graphs; or move it out of the model.",
    ),
)  # fmt: skip
