"""ONNX files read and written the same way by every stage, and what a graph holds."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optimize.protobuf_wire import contents, mapped, without
from optimize.stages.base import StageInput
from registry.errors import NotApplicableError

ENTRY = "model.onnx"
# protobuf ends at 2 GiB; weights of a larger model go into a file beside the graph.
LARGEST_FILE_BYTES = 1_900_000_000
# Fields of ModelProto, GraphProto and TensorProto in onnx.proto; the last are those that hold a tensor's numbers.
_GRAPH = 7
_INITIALIZER = 5
_NUMBERS = (4, 5, 6, 7, 9, 10, 11)


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


def load_graph(path: Path) -> Any:
    """The model in a file without its weights: initializers keep name, type and shape, and have no numbers.

    For what looks at nodes alone: a model that is read whole takes its size again, and most of the time.

    Raises:
        ValueError: the file is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        with mapped(path) as data:
            whole = (0, len(data))
            model = onnx.ModelProto.FromString(without(data, whole, _GRAPH))
            for graph in contents(data, whole, _GRAPH):
                model.graph.MergeFromString(without(data, graph, _INITIALIZER))
                for tensor in contents(data, graph, _INITIALIZER):
                    model.graph.initializer.add().MergeFromString(without(data, tensor, *_NUMBERS))
    except DecodeError as error:
        raise ValueError(f"{path.name} is not an ONNX model: {error}") from error
    return model


def has_external_weights(path: Path) -> bool:
    """Whether weights of the model stand in other files than ``path``, which are in its folder."""
    return any(other != path for other in path.parent.rglob("*")) and names_other_files(load_graph(path))


def names_other_files(model: Any) -> bool:
    """Whether initializers of the model say that their numbers stand in other files."""
    import onnx

    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)


def save(model: Any, folder: Path) -> str:
    """Writes the model with the same bytes each time; returns the entry's name."""
    import onnx

    _drop_unused_imports(model)
    if is_large(model):
        onnx.save(model, str(folder / ENTRY), save_as_external_data=True, location=f"{ENTRY}.data")
    else:
        (folder / ENTRY).write_bytes(model.SerializeToString(deterministic=True))
    return ENTRY


def move(made: Path, folder: Path) -> str:
    """Moves a model that a library wrote into the folder, as `save` would write it; returns the entry's name."""
    import onnx

    graph = load_graph(made)
    if names_other_files(graph) or _drop_unused_imports(graph):
        return save(onnx.load(str(made)), folder)
    made.replace(folder / ENTRY)
    return ENTRY


def _drop_unused_imports(model: Any) -> bool:
    """Takes out opsets of domains that no node is of: older ONNX Runtimes refuse those that they do not know.

    Returns:
        Whether there was one.
    """
    used = {node.domain for node in nodes(model.graph)} | {function.domain for function in model.functions}
    used |= {entry.domain for function in model.functions for entry in function.opset_import}
    unused = [entry for entry in model.opset_import if entry.domain not in used | {"", "ai.onnx"}]
    for entry in unused:
        model.opset_import.remove(entry)
    return bool(unused)


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


def opset_of(model: Any) -> int:
    """The version of the standard operators that the model uses."""
    return next((item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}), 1)


def is_large(model: Any) -> bool:
    """Whether the model does not fit one protobuf, which most functions of onnx need.

    Its tensors are counted as they declare themselves: protobuf takes as long to say its size as to write the model.
    """
    return sum(map(_declared_bytes, _tensors(model))) > LARGEST_FILE_BYTES


def _tensors(model: Any) -> Iterator[Any]:
    """Initializers and Constant nodes' values of the main graph, where all large tensors of a model are."""
    yield from model.graph.initializer
    for node in model.graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _declared_bytes(tensor: Any) -> int:
    import math

    from onnx import helper

    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def name_nodes(model: Any) -> None:
    """Gives each node of the main graph a name of its own; names that are unique stay."""
    taken: set[str] = set()
    for position, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{position}_{len(taken)}"
        taken.add(node.name)


def lift_constants(model: Any) -> int:
    """Turns Constant nodes of the main graph that hold a tensor into initializers; returns how many."""
    outputs = {value.name for value in model.graph.output}
    found = [
        (node, _constant_of(node))
        for node in model.graph.node
        if node.op_type == "Constant" and node.domain in {"", "ai.onnx"} and node.output[0] not in outputs
    ]
    lifted = [(node, value) for node, value in found if value is not None]
    for node, value in lifted:
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    for node, _ in lifted:
        model.graph.node.remove(node)
    return len(lifted)


def _constant_of(node: Any) -> Any:
    """The tensor that a Constant node holds, or None for one of text, sequences or sparse values."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    attribute = node.attribute[0]
    if attribute.name == "value":
        return None if attribute.t.data_type == TensorProto.STRING else attribute.t
    plain = {
        "value_float": np.float32(attribute.f),
        "value_floats": np.array(attribute.floats, np.float32),
        "value_int": np.int64(attribute.i),
        "value_ints": np.array(attribute.ints, np.int64),
    }
    values = plain.get(attribute.name)
    return None if values is None else numpy_helper.from_array(np.asarray(values))


def constants(model: Any) -> dict[str, Any]:
    """The tensors of the main graph that never change, by name: initializers, and what Constant nodes hold."""
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and (value := _constant_of(node)) is not None:
            known[node.output[0]] = value
    return known


def infer_again(model: Any, *, keep_outputs: bool) -> Any:
    """The model with the shapes inside it, and those of its outputs, inferred anew from its inputs.

    What cannot be inferred stays open: shapes that contradict each other show when the model is run.

    Args:
        model: an ``onnx.ModelProto``; it is changed.
        keep_outputs: whether the sizes that outputs declare still hold.
    """
    import onnx

    del model.graph.value_info[:]
    if not keep_outputs:
        for value in model.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()
    return model if is_large(model) else onnx.shape_inference.infer_shapes(model, data_prop=True)
