"""ONNX files read and written the same way by every stage, and what a graph holds."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optimize.stages.base import StageInput
from registry.errors import NotApplicableError

ENTRY = "model.onnx"
# protobuf ends at 2 GiB; weights of a larger model go into a file beside the graph.
_LARGEST_FILE_BYTES = 1_900_000_000


def load(source: StageInput) -> Any:
    """The model with all its weights in memory, an ``onnx.ModelProto``.

    Initializers that models of IR version 3 repeat among the inputs are taken out of the inputs.
    """
    import onnx

    model = onnx.load(str(source.path))
    weights = {tensor.name for tensor in model.graph.initializer}
    repeated = [value for value in model.graph.input if value.name in weights]
    for value in repeated:
        model.graph.input.remove(value)
    if repeated:
        model.ir_version = max(model.ir_version, 4)
    return model


def has_external_weights(path: Path) -> bool:
    """Whether weights of the model stand in other files than ``path``."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer)


def save(model: Any, folder: Path) -> str:
    """Writes the model with the same bytes each time; returns the entry's name."""
    import onnx

    if model.ByteSize() > _LARGEST_FILE_BYTES:
        onnx.save(model, str(folder / ENTRY), save_as_external_data=True, location=f"{ENTRY}.data")
    else:
        (folder / ENTRY).write_bytes(model.SerializeToString(deterministic=True))
    return ENTRY


def nodes(graph: Any) -> Iterator[Any]:
    """Every node of the graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes(inner)


def op_counts(model: Any) -> Counter[str]:
    """How many nodes of each operator type there are."""
    return Counter(node.op_type for node in nodes(model.graph))


def has_attention(model: Any) -> bool:
    """Whether the graph attends: a fused attention operator, or a Softmax that a MatMul takes."""
    if any("Attention" in name for name in op_counts(model)):
        return True
    softmax = {name for node in model.graph.node if node.op_type == "Softmax" for name in node.output}
    # Dropout, Cast and the Where that clears masked rows may stand between the two.
    for node in model.graph.node:
        if node.op_type in {"Dropout", "Cast", "Where", "Identity"} and softmax.intersection(node.input):
            softmax.update(node.output)
    return any(node.op_type == "MatMul" and softmax.intersection(node.input) for node in model.graph.node)


def weight_elements(model: Any) -> Counter[str]:
    """Elements of the constant weights that nodes of each operator type multiply with."""
    import math

    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    total: Counter[str] = Counter()
    for node in model.graph.node:
        # The weight of these operators is their second input, and of recurrent ones their third, too.
        total[node.op_type] += sum(sizes.get(name, 0) for name in node.input[1:3])
    return total


def refuse_quantized(stage: str, model: Any) -> None:
    """Returns when the model computes in float32.

    Raises:
        NotApplicableError: it holds quantized operators, or float16 weights.
    """
    import onnx

    done = sorted(
        name for name in op_counts(model) if "Quantize" in name or name.startswith(("QLinear", "MatMulNBits"))
    )
    if done:
        raise NotApplicableError(
            f"{stage} takes a float32 model, and this one is quantized already ({', '.join(done)})"
        )
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer):
        raise NotApplicableError(f"{stage} takes a float32 model, and this one has float16 weights")
