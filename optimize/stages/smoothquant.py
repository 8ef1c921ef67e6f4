"""The stage that moves outliers of activations into weights, so that int8 has less to lose."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimize.calibration import whole_batches
from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageParams, StageResult
from registry.errors import NotApplicableError

logger = logging.getLogger(__name__)

Array = NDArray[np.float32]
# Scales are kept away from zero by this, as in the code that the paper's authors published.
_LEAST = 1e-5


class SmoothParams(StageParams):
    """Parameters of ``quantize.smooth``.

    Attributes:
        alpha: how much of the difficulty moves from activations into weights; 0.5 shares it evenly, which the paper
            found right for most models, and 0.75 suits those with larger outliers.
        insert_mul: where a Mul may be put before the MatMul, because nothing before it can take the factor: ``never``;
            ``norm`` after a normalization that other nodes read as well (as in BERT, where the residual does); or
            ``always``, before every MatMul and Gemm with constant weights.
        batch_size: samples fed at once, where the model does not fix the batch.
    """

    alpha: float = Field(default=0.5, ge=0, le=1)
    insert_mul: Literal["never", "norm", "always"] = "norm"
    batch_size: int = Field(default=8, ge=1)


@dataclass(slots=True)
class _Group:
    """MatMuls and Gemms that read one activation, and so share one scale for each of its channels.

    Attributes:
        tensor: the activation, of shape (..., channels).
        channels: its last dimension.
        nodes: those that read it as their first input and have a constant second one.
        folds: names of the tensors of shape (channels,) that are divided by the scale; empty where a Mul is needed.
    """

    tensor: str
    channels: int
    nodes: list[Any] = field(default_factory=list)
    folds: tuple[str, ...] = ()


class Smooth(Stage):
    """The same function in float32, with channels of large activations made smaller and their weights larger.

    Each channel j of an activation that MatMuls read is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and row
    j of their weights is multiplied by it. The division goes into scale and bias of the normalization before, or into
    a Mul. Shapes, types and, up to rounding, answers stay. It gains nothing by itself: put ``quantize.static`` or
    ``quantize.dynamic`` after it. Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization
    for Large Language Models", 2023, equations 3 and 4.
    """

    name = "quantize.smooth"
    Params = SmoothParams
    needs_calibration = True
    tools = ("onnx", "onnxruntime", "numpy")
    params: SmoothParams

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Finds what can be smoothed, measures its channels on the samples, then moves the scales."""
        assert context.calibration is not None  # the contract has looked
        model = onnx_files.load(source)
        onnx_files.refuse_quantized(self.name, model)
        graph = _Graph(model)
        groups = graph.groups(self.params.insert_mul)
        if not groups:
            raise NotApplicableError(
                f"{self.name}: no MatMul or Gemm with constant weights whose input comes from a normalization",
                hint="insert_mul: norm or always takes more of them.",
            )
        with context.scratch() as scratch:
            path = graph.write_watched(groups, scratch)
            batches = whole_batches(context.calibration, source.inputs, wanted=self.params.batch_size)
            peaks = _peaks(path, groups, batches, context.threads)
        for group in groups:
            graph.smooth(group, peaks[group.tensor], self.params.alpha)
        graph.drop_dead_constants()
        folded = sum(bool(group.folds) for group in groups)
        told = [
            f"{sum(len(group.nodes) for group in groups)} MatMul smoothed, the scales of {folded} of {len(groups)} "
            f"activations folded into what comes before and {len(groups) - folded} put into a Mul"
        ]
        return self.written(context, onnx_files.save(graph.model, context.out), *told)


class _Graph:
    """A model whose weights are looked up and replaced by name."""

    def __init__(self, model: Any) -> None:
        import onnx

        self.model = model
        self._onnx = onnx
        self._producer = {name: node for node in model.graph.node for name in node.output}
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._tensors[node.output[0]] = node.attribute[0].t
        inner = [node for outer in model.graph.node for a in outer.attribute for node in _inside(a)]
        self._readers = Counter(name for node in [*model.graph.node, *inner] for name in node.input)
        self._readers.update(value.name for value in model.graph.output)

    def groups(self, insert_mul: str) -> list[_Group]:
        """What can be smoothed, in the graph's order."""
        found: dict[str, _Group] = {}
        for node in self.model.graph.node:
            channels = self._channels(node)
            if channels and channels == found.setdefault(node.input[0], _Group(node.input[0], channels)).channels:
                found[node.input[0]].nodes.append(node)
        kept = []
        for group in found.values():
            norm = self._norm(group)
            alone = self._readers[group.tensor] == len(group.nodes)
            if norm and alone:
                group.folds = norm
            elif insert_mul == "never" or (insert_mul == "norm" and not norm):
                continue
            kept.append(group)
        return kept

    def write_watched(self, groups: list[_Group], folder: Path) -> Path:
        """Writes the model with only the greatest absolute value of each group's channels as outputs."""
        make = self._onnx.helper
        watched = self._onnx.ModelProto()
        watched.CopyFrom(self.model)
        opset = next(item.version for item in watched.opset_import if item.domain in {"", "ai.onnx"})
        del watched.graph.output[:]
        axes, zero = np.array([0], np.int64), np.zeros(1, np.float32)
        constants = {"smooth/axes": axes, "smooth/zero": zero}
        reduced: dict[str, Any] = {"keepdims": 0} if opset >= 18 else {"keepdims": 0, "axes": [0]}
        over = ["smooth/axes"] if opset >= 18 else []
        for number, group in enumerate(groups):
            name = f"smooth/{number}"
            constants[f"{name}/size"] = np.array([-1, group.channels], np.int64)
            watched.graph.node.extend(
                [
                    make.make_node("Reshape", [group.tensor, f"{name}/size"], [f"{name}/flat"]),
                    make.make_node("Abs", [f"{name}/flat"], [f"{name}/abs"]),
                    make.make_node("ReduceMax", [f"{name}/abs", *over], [f"{name}/max"], **reduced),
                    # ReduceMax passes over NaN; a sum does not.
                    make.make_node("Mul", [f"{name}/flat", "smooth/zero"], [f"{name}/nothing"]),
                    make.make_node("ReduceL1", [f"{name}/nothing", *over], [f"{name}/not_finite"], **reduced),
                    make.make_node("Add", [f"{name}/max", f"{name}/not_finite"], [f"{name}/peak"]),
                ]
            )
            watched.graph.output.append(make.make_tensor_value_info(f"{name}/peak", 1, [group.channels]))
        watched.graph.initializer.extend(
            self._onnx.numpy_helper.from_array(values, name) for name, values in constants.items()
        )
        return folder / onnx_files.save(watched, folder)

    def smooth(self, group: _Group, peaks: Array, alpha: float) -> None:
        """Divides the group's activation by its scales, and multiplies the weights by them."""
        rows = [self._rows(node) for node in group.nodes]
        weights = np.max([np.abs(one).max(axis=1) for one in rows], axis=0)
        scale = _scales(peaks, weights, alpha)
        for node, one in zip(group.nodes, rows, strict=True):
            weight = one * scale[:, None]
            self._put(node, 1, weight.T if _flag(node, "transB") else weight.reshape(self._shape(node.input[1])))
        if group.folds:
            self._fold(group.folds, scale)
        else:
            self._multiply(group, scale)

    def drop_dead_constants(self) -> None:
        """Removes the Constant nodes that initializers have taken the place of."""
        for node in list(self.model.graph.node):
            if node.op_type == "Constant" and not self._readers[node.output[0]]:
                self.model.graph.node.remove(node)

    def _fold(self, names: tuple[str, ...], scale: Array) -> None:
        for name in names:
            values = self._values(name)
            for node in self.model.graph.node:
                for position, read in enumerate(node.input):
                    if read == name:
                        self._put(node, position, values / scale)

    def _multiply(self, group: _Group, scale: Array) -> None:
        nodes = self.model.graph.node
        factor, product = self._free(f"{group.tensor}/smooth_factor"), self._free(f"{group.tensor}/smooth")
        self._add(factor, 1 / scale)
        for node in group.nodes:
            node.input[0] = product
        mul = self._onnx.helper.make_node("Mul", [group.tensor, factor], [product], name=product)
        nodes.insert(min(list(nodes).index(node) for node in group.nodes), mul)

    def _channels(self, node: Any) -> int:
        """Rows of the node's constant weight, or 0 where it has none that can be scaled."""
        if node.op_type not in {"MatMul", "Gemm"} or node.domain not in {"", "ai.onnx"} or _flag(node, "transA"):
            return 0
        tensor = self._tensors.get(node.input[1])
        if tensor is None or tensor.data_type != self._onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            return 0
        if node.input[0] in self._tensors or any(dim != 1 for dim in tensor.dims[:-2]):
            return 0
        return int(tensor.dims[-1] if _flag(node, "transB") else tensor.dims[-2])

    def _norm(self, group: _Group) -> tuple[str, ...]:
        """Names of the scale and bias of the normalization that gives the activation; empty where there is none."""
        node = self._producer.get(group.tensor)
        if node is None:
            return ()
        if node.op_type in {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}:
            names = [name for name in node.input[1:] if name]
        elif node.op_type == "Add":
            # The same in small operators, as exporters wrote it before opset 17: x * scale + bias.
            bias, before = self._constant_side(node)
            mul = self._producer.get(before)
            if mul is None or mul.op_type != "Mul" or self._readers[before] != 1:
                return ()
            scale, _ = self._constant_side(mul)
            names = [scale, bias]
        else:
            return ()
        fit = all(name in self._tensors and tuple(self._tensors[name].dims) == (group.channels,) for name in names)
        # A scale that other nodes read, too, belongs to more than this activation.
        own = all(self._readers[name] == 1 for name in names)
        return tuple(names) if fit and own else ()

    def _constant_side(self, node: Any) -> tuple[str, str]:
        left, right = node.input
        return (left, right) if left in self._tensors else (right, left)

    def _rows(self, node: Any) -> Array:
        weight = self._values(node.input[1])
        weight = weight.reshape(weight.shape[-2:])
        return weight.T if _flag(node, "transB") else weight

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].dims)

    def _values(self, name: str) -> Array:
        values: Array = self._onnx.numpy_helper.to_array(self._tensors[name])
        return values

    def _put(self, node: Any, position: int, values: Array) -> None:
        """Replaces a constant input of one node; other nodes that read the same tensor keep the old one."""
        name = node.input[position]
        if self._readers[name] == 1 and name not in self._producer:
            self._tensors[name].CopyFrom(self._onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
            return
        self._readers[name] -= 1
        node.input[position] = self._free(f"{name}/smooth")
        self._add(node.input[position], values)

    def _add(self, name: str, values: Array) -> None:
        tensor = self._onnx.numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)
        self.model.graph.initializer.append(tensor)
        self._tensors[name] = self.model.graph.initializer[-1]
        self._readers[name] += 1

    def _free(self, wanted: str) -> str:
        name, number = wanted, 2
        while name in self._tensors or name in self._producer or name in self._readers:
            name, number = f"{wanted}_{number}", number + 1
        return name


def _peaks(path: Path, groups: list[_Group], batches: Any, threads: int) -> dict[str, Array]:
    """Greatest absolute value of each channel over all samples: tensor -> (channels,)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    found: dict[str, Array] = defaultdict(lambda: np.zeros(1, np.float32))
    for batch in batches:
        answers = session.run(None, {name: array for name, array in batch.items() if name in taken})
        for group, peak in zip(groups, answers, strict=True):
            if not np.isfinite(peak).all():
                raise NotApplicableError(f"the tensor {group.tensor!r} is not finite on the calibration samples")
            found[group.tensor] = np.maximum(found[group.tensor], peak)
    return found


def _scales(peaks: Array, weights: Array, alpha: float) -> Array:
    """``max|X_j|^alpha / max|W_j|^(1 - alpha)``, and 1 for a channel that is never used."""
    used = (peaks > 0) & (weights > 0)
    raw = np.maximum(peaks, _LEAST) ** alpha / np.maximum(weights, _LEAST) ** (1 - alpha)
    return np.where(used, np.maximum(raw, _LEAST), 1).astype(np.float32)


def _flag(node: Any, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)


def _inside(attribute: Any) -> Iterator[Any]:
    for graph in (attribute.g, *attribute.graphs):
        yield from onnx_files.nodes(graph)
