"""E3: types of tensors, and the precision that an engine computes in."""

from collections.abc import Iterator, Mapping

import numpy as np

from optimize.readiness.graph import Graph, given, named
from optimize.readiness.operators import QUANTIZED
from optimize.readiness.rules import Hit, Precision, Rule, Target

_LARGEST_FLOAT16 = 65504.0
_LEAST_NORMAL_FLOAT16 = 2.0**-14
_MOST_SUBNORMAL = 0.1
# The types that a precision puts into the graph, and the opset from which operators take them.
_IN_GRAPH: Mapping[Precision, tuple[str, int]] = {"float16": ("FLOAT16", 13), "bfloat16": ("BFLOAT16", 22)}


def _of_type(graph: Graph, kind: str) -> tuple[str, ...]:
    return tuple(name for name in graph.tensors if graph.type_name(name) == kind)


def doubles(graph: Graph, target: Target) -> Iterator[Hit]:
    """Tensors of double."""
    if names := _of_type(graph, "DOUBLE"):
        yield Hit(message=f"{len(names)} tensors are double and are clamped to float", nodes=names)


def strings(graph: Graph, target: Target) -> Iterator[Hit]:
    """Tensors of text."""
    if names := _of_type(graph, "STRING"):
        yield Hit(message=f"{len(names)} tensors hold text", nodes=names)


def bytes_inside(graph: Graph, target: Target) -> Iterator[Hit]:
    """Unsigned bytes that something else than Cast, or an output, takes; quantized operators have other rules."""
    takers = tuple(
        named(node)
        for node in graph.nodes
        if node.op_type not in {"Cast", "QuantizeLinear", "DequantizeLinear", *QUANTIZED}
        and any(graph.type_name(name) == "UINT8" for name in filter(None, node.input))
    )
    if takers:
        yield Hit(message="unsigned bytes are taken by other operators than Cast", nodes=takers)


def wide_integers(graph: Graph, target: Target) -> Iterator[Hit]:
    """Constants beyond int32; ends of slices are clamped anyway."""
    ends = {given(node, 2) for node in graph.of_type("Slice")} | {given(node, 1) for node in graph.of_type("Slice")}
    limits = np.iinfo(np.int32)
    for name in graph.tensors:
        if name in ends or graph.type_name(name) != "INT64":
            continue
        values = graph.constant(name)
        if values is not None and values.size and (values.max() > limits.max or values.min() < limits.min):
            yield Hit(message=f"the int64 constant {name!r} does not fit int32", nodes=(name,))


def precision_not_in_graph(graph: Graph, target: Target) -> Iterator[Hit]:
    """A precision that is asked for and that the graph does not hold."""
    quantized = any(graph.of_type("QuantizeLinear", "DequantizeLinear", *QUANTIZED))
    if target.precision == "int8":
        if not any(graph.of_type("QuantizeLinear", "DequantizeLinear")):
            yield Hit(message="int8 is asked for, and the graph has no Q/DQ nodes")
    elif target.precision is not None and target.precision in _IN_GRAPH:
        kind, opset = _IN_GRAPH[target.precision]
        if not _of_type(graph, kind):
            yield Hit(message=f"{target.precision} is asked for, and no tensor of the graph is of it")
        elif graph.opset < opset:
            yield Hit(message=f"{target.precision} needs opset {opset}; the model has {graph.opset}")
    elif (
        target.precision is None and not quantized and not any(_of_type(graph, kind) for kind, _ in _IN_GRAPH.values())
    ):
        yield Hit(message="the graph is float32 throughout, and so will the engine be", severity="info")


def risky_float16(graph: Graph, target: Target) -> Iterator[Hit]:
    """Weights that float16 does not hold, or holds with few digits."""
    for name, tensor in graph.initializers.items():
        kind = graph.type_name(name)
        if kind != "FLOAT16" and not (kind == "FLOAT" and target.precision == "float16"):
            continue
        values = graph.constant(tensor.name)
        if values is None or not values.size:
            continue
        sizes = np.abs(values.astype(np.float64))
        if not (sizes <= _LARGEST_FLOAT16).all():
            yield Hit(message=f"the weight {name!r} has values beyond 65,504", nodes=(name,))
        elif (tiny := float(((sizes > 0) & (sizes < _LEAST_NORMAL_FLOAT16)).mean())) > _MOST_SUBNORMAL:
            yield Hit(message=f"{tiny:.0%} of the weight {name!r} are below float16's normal range", nodes=(name,))


def half_at_the_edge(graph: Graph, target: Target) -> Iterator[Hit]:
    """Inputs and outputs of float16."""
    names = tuple(value.name for value in (*graph.inputs, *graph.outputs) if graph.type_name(value.name) == "FLOAT16")
    if names:
        yield Hit(message=f"clients must send and take float16: {', '.join(names)}", nodes=names)


RULES = (
    Rule(
        id="E301", severity="warning", title="double", check=doubles,
        fix="Export in float32: values beyond its range are clamped.",
    ),
    Rule(
        id="E302", severity="error", title="text", check=strings,
        fix="Move the handling of text out of the model.",
    ),
    Rule(
        id="E303", severity="error", title="unsigned bytes inside the graph", check=bytes_inside,
        fix="Cast to float right after the input.",
    ),
    Rule(
        id="E304", severity="warning", title="constant beyond int32", check=wide_integers,
        fix="Fold shapes first, and export indices as int32.",
    ),
    Rule(
        id="E305", severity="error", title="precision that is not in the graph", check=precision_not_in_graph,
        since=(10, 12),
        fix="Networks are strongly typed: put float16 or Q/DQ pairs into the graph (tensorrt.prepare with precision "
        "float16, quantize.tensorrt); builder flags no longer do it.",
    ),
    Rule(
        id="E306", severity="warning", title="weights that float16 holds badly", check=risky_float16,
        fix="Leave the operators that take them in float32.",
    ),
    Rule(
        id="E307", severity="warning", title="float16 inputs or outputs", check=half_at_the_edge,
        fix="Convert with keep_io_types, unless clients know of it.",
    ),
)  # fmt: skip
