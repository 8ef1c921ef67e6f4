"""E4: explicit quantization, the Q/DQ pairs that TensorRT takes and those that it fuses.

Sources: onnx-tensorrt's operators.md at 10.1; NVIDIA TensorRT documentation, "Working with Quantized Types"; what
NVIDIA ModelOpt writes.
"""

from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from optimize.readiness.graph import Graph, attributes, given, named
from optimize.readiness.rules import Hit, Rule, Target

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = frozenset({
    "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Gelu", "Mish",
})  # fmt: skip
_NEVER_QUANTIZED = frozenset({"Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "Shape", "Size"})
_SIGNED = frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"})
# Type -> the opset that brought it to Q and DQ.
_OPSETS = {"FLOAT8E4M3FN": 19, "INT4": 21, "FLOAT4E2M1": 23}
# Type -> block sizes that TensorRT has kernels for.
_BLOCKS = {"INT4": (64, 128), "FLOAT4E2M1": (16,), "FLOAT8E4M3FN": (32,)}
_WEIGHT_ONLY = frozenset({"INT4"})
_LEAST_COVERAGE = 0.5


# --- what a Q or DQ is -----------------------------------------------------------------------------------------


def _pairs(graph: Graph) -> Iterator[Any]:
    return graph.of_type(_Q, _DQ)


def _quantized_type(graph: Graph, node: Any) -> str:
    """The type that a Q makes or a DQ takes."""
    if node.op_type == _DQ and (kind := graph.type_name(node.input[0])) != "UNDEFINED":
        return kind
    if zero := given(node, 2):
        return graph.type_name(zero)
    if node.op_type == _Q:
        from onnx import TensorProto

        number = attributes(node).get("output_dtype", 0)
        return TensorProto.DataType.Name(number) if number else "UINT8"
    return "UNDEFINED"


def _of_weight(graph: Graph, node: Any) -> bool:
    """Whether a Q or DQ quantizes something constant."""
    return graph.is_constant(node.input[0])


def _dq_before(graph: Graph, name: str) -> Any | None:
    """The DQ that makes a tensor, looking through what only moves or casts values."""
    node = graph.producer(name)
    while node is not None and node.op_type in {"Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Identity"}:
        node = graph.producer(node.input[0])
    return node if node is not None and node.op_type == _DQ else None


def _weighted(graph: Graph) -> Iterator[Any]:
    """Nodes that multiply with a constant weight."""
    for node in graph.of_type(*_WEIGHTED):
        if len(node.input) > 1 and any(graph.is_constant(name) for name in node.input[:2]):
            yield node


def _inputs_quantized(graph: Graph, node: Any) -> list[bool]:
    return [_dq_before(graph, name) is not None for name in node.input[:2]]


def _requantized(graph: Graph, node: Any) -> Iterator[Any]:
    """What takes a node's output after a Q and a DQ."""
    for quantize in graph.consumers[node.output[0]]:
        if quantize.op_type == _Q:
            for dequantize in graph.consumers[quantize.output[0]]:
                yield from graph.consumers[dequantize.output[0]]


# --- errors ----------------------------------------------------------------------------------------------------


def zero_points(graph: Graph, target: Target) -> Iterator[Hit]:
    """Zero points that are not zero."""
    values = {node.output[0]: graph.constant(given(node, 2)) for node in _pairs(graph) if given(node, 2)}
    computed = [named(node) for node in _pairs(graph) if values.get(node.output[0], 0) is None]
    if computed:
        yield Hit(message=f"{len(computed)} zero points are computed at run time", nodes=tuple(computed))
    shifted = {name: value.astype(np.float64) for name, value in values.items() if value is not None}
    found = [node for node in _pairs(graph) if np.any(shifted.get(node.output[0], 0))]
    if found:
        first = shifted[found[0].output[0]].flat[0]
        message = f"{len(found)} Q and DQ have a zero point that is not 0: {first:g}, for one"
        yield Hit(message=message, nodes=tuple(map(named, found)))


def unsigned_types(graph: Graph, target: Target) -> Iterator[Hit]:
    """Q and DQ of another type than the signed ones; int32 has a rule of its own."""
    found = defaultdict(list)
    for node in _pairs(graph):
        kind = _quantized_type(graph, node)
        if kind not in _SIGNED | {"INT32", "UNDEFINED"}:
            found[kind].append(named(node))
    for kind, nodes in sorted(found.items()):
        yield Hit(message=f"{len(nodes)} Q and DQ are of {kind.lower()}", nodes=tuple(nodes))


def quantized_bias(graph: Graph, target: Target) -> Iterator[Hit]:
    """DQ of int32, which is how ONNX Runtime quantizes biases."""
    found = [node for node in graph.of_type(_DQ) if _quantized_type(graph, node) == "INT32"]
    if found:
        message = f"{len(found)} DequantizeLinear take int32: {found[0].input[0]!r}, for one"
        yield Hit(message=message, nodes=tuple(map(named, found)))


def scales(graph: Graph, target: Target) -> Iterator[Hit]:
    """Scales that are not constant, positive and finite, or have another shape than they should."""
    for node in _pairs(graph):
        if reason := _wrong_scale(graph, node):
            yield Hit(message=reason, nodes=(named(node),))


def _wrong_scale(graph: Graph, node: Any) -> str | None:
    name = given(node, 1)
    if not graph.is_constant(name):
        return f"the scale {name!r} is computed at run time"
    values = graph.constant(name)
    if values is None:  # made of constants: its shape tells no less, but only folding shows the values
        return None
    numbers = values.astype(np.float64)
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        return f"the scale {name!r} is not positive and finite"
    if numbers.size == 1 or attributes(node).get("block_size", 0) or numbers.ndim > 1:
        return None
    if not _of_weight(graph, node):
        return f"the activation {node.input[0]!r} has {numbers.size} scales; it takes one"
    return _wrong_axis(graph, node)


def _wrong_axis(graph: Graph, node: Any) -> str | None:
    shape = graph.shape(node.input[0])
    if not shape:
        return None
    axis = attributes(node).get("axis", 1) % len(shape)
    for taker in graph.consumers[node.output[0]] if node.op_type == _DQ else ():
        expected = _output_axis(taker, node.output[0], len(shape))
        if expected is not None and axis != expected:
            return (
                f"the weight of {named(taker)} is quantized along axis {axis}; its output channels are axis {expected}"
            )
    return None


def _output_axis(node: Any, weight: str, rank: int) -> int | None:
    """The axis of output channels of a weight, or None where the node is no weighted one."""
    position = list(node.input).index(weight)
    if position > 1 or node.op_type not in _WEIGHTED:
        return None
    if node.op_type in {"Conv", "ConvTranspose"}:
        return 0 if node.op_type == "Conv" else 1
    if node.op_type == "Gemm":
        flipped = attributes(node).get("transB" if position else "transA", 0)
        return rank - 1 - position if flipped else rank - 2 + position
    return rank - 2 + position


def opsets_and_blocks(graph: Graph, target: Target) -> Iterator[Hit]:
    """Types before their opset, and the narrow ones where they have no kernels."""
    for node in _pairs(graph):
        if reason := _wrong_kind(graph, node):
            yield Hit(message=reason, nodes=(named(node),))


def _wrong_kind(graph: Graph, node: Any) -> str | None:
    kind = _quantized_type(graph, node)
    block = attributes(node).get("block_size", 0)
    needed = max(_OPSETS.get(kind, 10), 21 if block else 10)
    scale = graph.shape(given(node, 1))
    if scale and prod(size or 2 for size in scale) > 1:
        needed = max(needed, 13)
    if graph.opset < needed:
        return f"{node.op_type} of {kind.lower()} this way needs opset {needed}; the model has {graph.opset}"
    if block and block not in _BLOCKS.get(kind, ()):
        return f"{kind.lower()} in blocks of {block}; TensorRT has {_BLOCKS.get(kind, 'none')}"
    if kind not in _WEIGHT_ONLY:
        return None
    if not _of_weight(graph, node):
        return f"the activation {node.input[0]!r} is {kind.lower()}, which is for weights"
    others = {taker.op_type for taker in graph.consumers[node.output[0]]} - {"MatMul", "Gemm", _DQ, "Transpose", "Cast"}
    return f"a weight of {kind.lower()} goes to {sorted(others)[0]}; it is for matrix products" if others else None


def mixed_types(graph: Graph, target: Target) -> Iterator[Hit]:
    """int8 and float8 in one network."""
    kinds = {_quantized_type(graph, node) for node in _pairs(graph)}
    if {"INT8", "FLOAT8E4M3FN"} <= kinds:
        yield Hit(message="int8 and float8 stand side by side")


# --- what does not fuse ----------------------------------------------------------------------------------------


def half_quantized(graph: Graph, target: Target) -> Iterator[Hit]:
    """Weighted operators of which only one side is quantized; narrow weights alone are meant to be so."""
    for node in _weighted(graph):
        quantized = _inputs_quantized(graph, node)
        kinds = {_quantized_type(graph, dq) for name in node.input[:2] if (dq := _dq_before(graph, name))}
        if any(quantized) and not all(quantized) and not kinds & {"INT4", "FLOAT4E2M1"}:
            side = "activation" if quantized[0] else "weight"
            yield Hit(message=f"{node.op_type}: only its {side} is quantized", nodes=(named(node),))


def quantized_outputs(graph: Graph, target: Target) -> Iterator[Hit]:
    """Matrix products with a Q/DQ pair before their bias or activation, or before the model's output."""
    ends = {value.name for value in graph.outputs}
    for node in _weighted(graph):
        after = {taker.op_type for taker in _requantized(graph, node)}
        if node.op_type in {"Gemm", "MatMul"} and after & (_ACTIVATIONS | {"Add"}):
            yield Hit(message=f"{node.op_type} is quantized before {sorted(after)[0]}", nodes=(named(node),))
        for quantize in graph.consumers[node.output[0]]:
            if quantize.op_type == _Q and any(
                dequantize.output[0] in ends for dequantize in graph.consumers[quantize.output[0]]
            ):
                yield Hit(message=f"{node.op_type} is quantized before the model's output", nodes=(named(node),))


def float_shortcuts(graph: Graph, target: Target) -> Iterator[Hit]:
    """Residual sums whose shortcut is not quantized, while the convolution beside it is."""
    for node in graph.of_type("Add"):
        makers = [graph.producer(name) for name in node.input]
        for position, maker in enumerate(makers):
            if maker is None or maker.op_type not in {"Conv", "ConvTranspose"}:
                continue
            shortcut = node.input[1 - position]
            if (
                all(_inputs_quantized(graph, maker))
                and not graph.is_constant(shortcut)
                and _dq_before(graph, shortcut) is None
                and getattr(makers[1 - position], "op_type", "") not in {"Conv", "ConvTranspose"}
            ):
                yield Hit(message=f"the shortcut {shortcut!r} is not quantized", nodes=(named(node),))


def split_convolutions(graph: Graph, target: Target) -> Iterator[Hit]:
    """A Q/DQ pair between a convolution and its normalization or activation."""
    for node in graph.of_type("Conv", "ConvTranspose"):
        after = {taker.op_type for taker in _requantized(graph, node)} & (_ACTIVATIONS | {"BatchNormalization"})
        if after:
            yield Hit(message=f"a Q/DQ pair keeps {sorted(after)[0]} from fusing", nodes=(named(node),))


def stored_int8(graph: Graph, target: Target) -> Iterator[Hit]:
    """Weights stored as int8 with a DQ only."""
    nodes = tuple(named(node) for node in graph.of_type(_DQ) if graph.type_name(node.input[0]) == "INT8"
                  and node.input[0] in graph.initializers)  # fmt: skip
    if nodes:
        yield Hit(message=f"{len(nodes)} weights are stored as int8, without the Q of the pair", nodes=nodes)


def lonely_nodes(graph: Graph, target: Target) -> Iterator[Hit]:
    """Q without DQ, DQ without Q, and pairs before operators that are not run quantized."""
    for node in graph.of_type(_Q):
        if any(taker.op_type != _DQ for taker in graph.consumers[node.output[0]]):
            yield Hit(message="a QuantizeLinear goes to something else than DequantizeLinear", nodes=(named(node),))
    for node in graph.of_type(_DQ):
        maker = graph.producer(node.input[0])
        if not _of_weight(graph, node) and (maker is None or maker.op_type != _Q):
            yield Hit(
                message="a DequantizeLinear of an activation has no QuantizeLinear before it", nodes=(named(node),)
            )
        for taker in graph.consumers[node.output[0]]:
            if taker.op_type in _NEVER_QUANTIZED:
                yield Hit(
                    message=f"a Q/DQ pair stands before {taker.op_type}, which runs in float", nodes=(named(node),)
                )


def coverage(graph: Graph, target: Target) -> Iterator[Hit]:
    """The share of multiply-accumulates in operators with all inputs quantized, where it is small."""
    if not any(_pairs(graph)):
        return
    done = total = 0
    for node in graph.of_type(*_WEIGHTED):
        count = macs(graph, node)
        total += count
        done += count if all(_inputs_quantized(graph, node)) else 0
    if total and done / total < _LEAST_COVERAGE:
        yield Hit(message=f"{done / total:.0%} of the multiply-accumulates are quantized: expect no gain over float16")


def macs(graph: Graph, node: Any) -> int:
    """Multiply-accumulates of a weighted node, free dimensions counted as 1; 0 where a rank is unknown."""
    shapes = [graph.shape(name) for name in (node.input[0], node.input[1], node.output[0])]
    if None in shapes:
        return 0
    left, weight, out = ([size or 1 for size in shape or ()] for shape in shapes)
    if node.op_type == "Conv":
        return prod(weight[1:]) * prod(out)
    if node.op_type == "ConvTranspose":
        return prod(weight[1:]) * prod(left)
    if node.op_type == "Gemm":
        return prod(out) * left[0 if attributes(node).get("transA", 0) else 1]
    return prod(out) * (left[-1] if left else 1)


def full_range_weights(graph: Graph, target: Target) -> Iterator[Hit]:
    """int8 weights that use -128."""
    for node in graph.of_type(_DQ):
        name = node.input[0]
        if graph.type_name(name) != "INT8":
            continue
        values = graph.constant(name)
        if values is not None and values.size and values.min() == -128:
            yield Hit(message=f"the weight {name!r} uses -128", nodes=(named(node),))


RULES = (
    Rule(
        id="E401", severity="error", title="zero point that is not zero", check=zero_points,
        fix="Quantize symmetrically: the stage quantize.tensorrt.",
    ),
    Rule(
        id="E402", severity="error", title="unsigned quantized type", check=unsigned_types,
        fix="Quantize activations and weights to int8: the stage quantize.tensorrt.",
    ),
    Rule(
        id="E403", severity="error", title="quantized bias", check=quantized_bias,
        fix="Leave biases in float (ONNX Runtime: QuantizeBias False): the stage quantize.tensorrt.",
    ),
    Rule(
        id="E404", severity="error", title="scale that TensorRT does not take", check=scales,
        fix="One positive constant scale for each activation; for weights one, or one for each output channel.",
    ),
    Rule(
        id="E405", severity="error", title="quantized type without a kernel, or before its opset",
        check=opsets_and_blocks,
        fix="Convert to the opset first; use INT4 for the weights of matrix products, in blocks of 64 or 128.",
    ),
    Rule(
        id="E406", severity="warning", title="int8 and float8 together", check=mixed_types,
        fix="Choose one of the two; whether they mix depends on the version.",
    ),
    Rule(
        id="E407", severity="warning", title="half-quantized operator", check=half_quantized,
        fix="Quantize both inputs, or none.",
    ),
    Rule(
        id="E408", severity="warning", title="output of a matrix product quantized", check=quantized_outputs,
        fix="Quantize inputs of weighted operators only.",
    ),
    Rule(
        id="E409", severity="warning", title="shortcut in float", check=float_shortcuts,
        fix="Quantize the shortcut, so that the sum fuses with the convolution.",
    ),
    Rule(
        id="E410", severity="warning", title="Q/DQ pair inside a convolution's fusion", check=split_convolutions,
        fix="Fold BatchNormalization first, and quantize after the activation.",
    ),
    Rule(
        id="E411", severity="info", title="weights stored as int8", check=stored_int8,
        fix="Legal; a float weight with a Q/DQ pair is what NVIDIA's own tool writes.",
    ),
    Rule(
        id="E412", severity="warning", title="Q or DQ that nothing fuses with", check=lonely_nodes,
        fix="Take it out: it is work of its own.",
    ),
    Rule(
        id="E413", severity="info", title="little of the work is quantized", check=coverage,
        fix="Quantize more of the weighted operators, or take float16.",
    ),
    Rule(
        id="E414", severity="warning", title="weights use -128", check=full_range_weights,
        fix="Quantize weights to the range -127 to 127.",
    ),
)  # fmt: skip
