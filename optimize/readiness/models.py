"""E1: the model file and its opset."""

from collections import defaultdict
from collections.abc import Iterator

from optimize.readiness.graph import Graph, named
from optimize.readiness.releases import tensorrt_release
from optimize.readiness.rules import Hit, Rule, Target

_DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})


def unknown_ranks(graph: Graph, target: Target) -> Iterator[Hit]:
    """Where shape inference first loses the rank of a tensor."""
    if graph.inference_error:
        yield Hit(message=f"shape inference fails: {graph.inference_error}")
        return
    for value in graph.inputs:
        if graph.shape(value.name) is None:
            yield Hit(message=f"the input {value.name!r} has no rank", nodes=(value.name,))
    for node in graph.model.graph.node:
        if "Sequence" in node.op_type:  # sequences have no rank; they have a rule of their own
            continue
        lost = [name for name in node.output if name and graph.consumers[name] and graph.shape(name) is None]
        known = all(graph.shape(name) is not None for name in filter(None, node.input))
        if lost and known and node.domain in _DEFAULT_DOMAINS and node.op_type not in {"If", "Loop", "Scan"}:
            yield Hit(message=f"the rank of {lost[0]!r} is unknown, which {node.op_type} makes", nodes=(named(node),))


def opset_out_of_range(graph: Graph, target: Target) -> Iterator[Hit]:
    """An opset that the parser does not take."""
    least, most = tensorrt_release(target.tensorrt).opsets
    if not least <= graph.opset <= most:
        version = ".".join(map(str, target.tensorrt))
        yield Hit(message=f"the model has opset {graph.opset}; TensorRT {version} takes {least} to {most}")


def ir_too_new(graph: Graph, target: Target) -> Iterator[Hit]:
    """An IR version newer than the ONNX that the parser is built with."""
    newest = tensorrt_release(target.tensorrt).ir_version
    if graph.model.ir_version > newest:
        yield Hit(message=f"the model has IR version {graph.model.ir_version}; {newest} is the newest known there")


def foreign_domains(graph: Graph, target: Target) -> Iterator[Hit]:
    """Operators of other domains than ai.onnx; the model's own functions are looked into instead."""
    own = {(function.domain, function.name) for function in graph.model.functions}
    found = defaultdict(list)
    for node in graph.nodes:
        if node.domain not in _DEFAULT_DOMAINS and (node.domain, node.op_type) not in own:
            found[node.domain, node.op_type].append(named(node))
    for (domain, op), nodes in sorted(found.items()):
        yield Hit(message=f"{op} of the domain {domain} is no standard operator", nodes=tuple(nodes))


def external_weights(graph: Graph, target: Target) -> Iterator[Hit]:
    """Weights that are kept in other files."""
    from onnx import TensorProto

    files = {
        entry.value
        for tensor in graph.initializers.values()
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if files:
        yield Hit(message=f"weights are kept in {', '.join(sorted(files))}", nodes=tuple(sorted(files)))


RULES = (
    Rule(
        id="E101", severity="error", title="a tensor of unknown rank", check=unknown_ranks,
        fix="Give every input a shape, with names for free dimensions, and export again; fold constants first.",
    ),
    Rule(
        id="E102", severity="error", title="opset out of range", check=opset_out_of_range,
        fix="Convert the model to an opset in the range (onnx.version_converter), or export it with one.",
    ),
    Rule(
        id="E103", severity="warning", title="IR version newer than the parser's ONNX", check=ir_too_new,
        fix="Save the model with an older ir_version; the opset decides what it needs.",
    ),
    Rule(
        id="E104", severity="error", title="operator of another domain", check=foreign_domains,
        partitions=True,
        fix="Make the TensorRT variant from the model before ONNX Runtime's fusions; Triton's TensorRT execution "
        "provider leaves such nodes to CUDA or the CPU.",
    ),
    Rule(
        id="E105", severity="info", title="weights in other files", check=external_weights,
        fix="Copy these files beside the model wherever an engine is built.",
    ),
)  # fmt: skip
