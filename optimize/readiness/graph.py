"""An ONNX model as rules look at it: who makes and who takes a tensor, its type and shape, and whether it is constant.

Graphs inside of nodes (If, Loop, Scan) and the model's own functions are looked at as one with the graph.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.stages.base import first_line

Dims = tuple[int | None, ...]

# Operators that stay, whatever they take.
_NEVER_FOLDED = frozenset({"RandomNormal", "RandomUniform", "Multinomial", "Bernoulli", "If", "Loop", "Scan"})


class Graph:
    """A view of a model that is never changed.

    Args:
        model: an ``onnx.ModelProto``; weights in other files need not be loaded.
        folder: where those files are.
    """

    def __init__(self, model: Any, folder: Path | None = None) -> None:
        self.model = model
        self.folder = folder
        self.opset = max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=1)
        self.graphs = [model.graph, *_inner_graphs(model.graph)]
        for function in model.functions:
            self.graphs += [function, *_inner_graphs(function)]
        self.nodes = [node for graph in self.graphs for node in graph.node]
        self.initializers = {
            tensor.name: tensor for graph in self.graphs for tensor in getattr(graph, "initializer", ())
        }
        self.inputs = [value for value in model.graph.input if value.name not in self.initializers]
        self.outputs = list(model.graph.output)
        self.producers: dict[str, Any] = {}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            self.producers.update({name: node for name in node.output if name})
            for name in filter(None, node.input):
                self.consumers[name].append(node)

    # --- nodes -------------------------------------------------------------------------------------------------

    def of_type(self, *ops: str) -> Iterator[Any]:
        """The nodes of these operators."""
        return (node for node in self.nodes if node.op_type in ops)

    def producer(self, name: str) -> Any | None:
        """The node that makes a tensor, or None for inputs and initializers."""
        return self.producers.get(name)

    # --- constants ---------------------------------------------------------------------------------------------

    def constant(self, name: str) -> NDArray[Any] | None:
        """The values of an initializer, or of a Constant node; None for anything else."""
        from onnx import numpy_helper

        tensor = self._constant_tensor(name)
        return None if tensor is None else numpy_helper.to_array(tensor, base_dir=str(self.folder or ""))

    def _constant_tensor(self, name: str) -> Any | None:
        if name in self.initializers:
            return self.initializers[name]
        node = self.producer(name)
        if node is None or node.op_type != "Constant":
            return None
        value = attributes(node)
        if "value" in value:
            return value["value"]
        return _scalar_tensor(value)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is known when an engine is built: constant itself, or made of constants only."""
        return name in self.initializers or name in self._folded

    @cached_property
    def _folded(self) -> set[str]:
        """What nodes make of constants. Nodes stand after those that they take from, so one pass finds all."""
        found: set[str] = set()
        for node in self.nodes:
            taken = [name for name in node.input if name]
            if node.op_type == "Shape":
                constant = None not in (self.shape(taken[0]) or (None,))
            else:
                constant = node.op_type == "Constant" or (
                    bool(taken)
                    and node.op_type not in _NEVER_FOLDED
                    and all(name in self.initializers or name in found for name in taken)
                )
            if constant:
                found.update(node.output)
        return found

    # --- types and shapes --------------------------------------------------------------------------------------

    @cached_property
    def inference_error(self) -> str | None:
        """What shape inference says against the model, or None."""
        return self._inferred[1]

    @cached_property
    def _values(self) -> dict[str, Any]:
        model, _ = self._inferred
        graphs = [model.graph, *_inner_graphs(model.graph)]
        return {
            value.name: value.type.tensor_type
            for graph in graphs
            for value in (*graph.input, *graph.output, *graph.value_info)
            if value.type.HasField("tensor_type")
        }

    @cached_property
    def _inferred(self) -> tuple[Any, str | None]:
        import onnx

        try:
            return onnx.shape_inference.infer_shapes(self.model, data_prop=True), None
        except Exception as error:  # the library raises several kinds, for one and the same reason
            return self.model, first_line(error)

    def shape(self, name: str) -> Dims | None:
        """The dimensions of a tensor, None for one that is not fixed; None for a tensor of unknown rank."""
        tensor = self._constant_tensor(name)
        if tensor is not None:
            return tuple(tensor.dims)
        value = self._values.get(name)
        if value is None or not value.HasField("shape"):
            return None
        return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.shape.dim)

    def type_name(self, name: str) -> str:
        """ONNX's name of the type of a tensor's elements (``FLOAT``, ``INT8``, ...); ``UNDEFINED`` where unknown."""
        tensor = self._constant_tensor(name)
        number = tensor.data_type if tensor is not None else getattr(self._values.get(name), "elem_type", 0)
        return _type_names().get(number, "UNDEFINED")

    @cached_property
    def tensors(self) -> list[str]:
        """Names of all tensors: inputs, weights, and what nodes make."""
        return list(dict.fromkeys([*(value.name for value in self.inputs), *self.initializers, *self.producers]))


@cache
def _type_names() -> dict[int, str]:
    import onnx

    return {number: kind for kind, number in onnx.TensorProto.DataType.items()}


def attributes(node: Any) -> dict[str, Any]:
    """Name -> value of a node's attributes; text is decoded."""
    from onnx import helper

    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in values.items()
    }


def named(node: Any) -> str:
    """What a message calls a node: its name, or what it makes."""
    return node.name or f"{node.op_type} -> {next(iter(node.output), '')}"


def given(node: Any, position: int) -> str:
    """The name of an input, or an empty one where it is left out."""
    return node.input[position] if len(node.input) > position else ""


def _inner_graphs(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield inner
                yield from _inner_graphs(inner)


def _scalar_tensor(value: dict[str, Any]) -> Any | None:
    from onnx import numpy_helper

    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    for name, kind in kinds.items():
        if name in value:
            return numpy_helper.from_array(np.array(value[name], dtype=kind))
    return None
