"""Whether an int8 model overflows on CPUs without VNNI, found by emulation on any CPU.

Where the CPU has no dot-product instruction (VNNI), the kernels of ONNX Runtime's library MLAS multiply unsigned
activations with signed weights by ``vpmaddubsw``: it adds two neighbouring products u8 x s8 in 16 bits and cuts the sum
off at -32,768 and 32,767; only then ``vpmaddwd`` widens to 32 bits. Two large weights of one sign and two large
activations are enough (255 * 127 + 255 * 127 = 64,770), and the same file answers differently from machine to machine.
With VNNI nothing is cut off, nor with weights of 7 bits (``reduce_range``): 255 * (64 + 64) = 32,640.

*Pairing.* MLAS packs the inner dimension K in groups of 4, and the instruction adds the 1st and 2nd, and the 3rd and
4th element of each: elements 2j and 2j + 1 of K. K of a MatMul or Gemm is the inner dimension as it stands; K of a
convolution is (kernel position, input channel), because ONNX Runtime brings images to channels-last order and lays out
each window so (im2col); each group of a grouped convolution has its own. An odd end is paired with zero. A depthwise
convolution (one input channel a group) has a kernel of its own that widens before it multiplies, and is left out. The
kernels are MLAS' QgemmU8X8KernelAvx2, QgemvU8S8KernelAvx2 and QgemmU8X8KernelAvx512Core; the layout of convolutions is
that of ONNX Runtime's qlinearconv.cc.

*What is looked at.* Conv, MatMul and Gemm between DequantizeLinear nodes, QLinearConv, QLinearMatMul, QGemm,
ConvInteger and MatMulInteger, where the activation is uint8 and the weight a constant int8, in the main graph. It is
assumed that the engine runs all of these in int8. Activations are those of the graph run node by node without
optimization, so an overflow is counted as if nothing before it had overflowed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.measure.host import VNNI
from registry.errors import StageError

SATURATED = "u8 x s8 sums overflow 16 bits on CPUs without VNNI"
SAMPLES = 32
_ARM = {"neon", "asimdhp", "asimddp", "i8mm", "sve", "sve2"}  # their kernels widen at once
_LARGEST, _SMALLEST, _MOST_ACTIVATION = 32_767, -32_768, 255
_BATCH = 4
_ROOM = 4_000_000  # sums held at once
_MOST_NAMED = 3
# Where operators have their activation, its zero point, and their weight. None: between DequantizeLinear nodes.
_QUANTIZED_OPS = {
    "QLinearConv": (0, 2, 3), "QLinearMatMul": (0, 2, 3), "QGemm": (0, 2, 3),
    "ConvInteger": (0, 2, 1), "MatMulInteger": (0, 2, 1),
}  # fmt: skip
_FLOAT_OPS = ("Conv", "MatMul", "Gemm")

Weights = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSaturation:
    """One node that multiplies u8 with s8.

    Attributes:
        name: the node's name, or that of its first output where it has none.
        op: its operator.
        sums: pair sums made for the samples; 0 where the weights alone prove that none can overflow.
        saturated: those cut off.
    """

    name: str
    op: str
    sums: int
    saturated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """What `check_saturation` found, over ``samples`` samples."""

    nodes: tuple[NodeSaturation, ...]
    samples: int

    @property
    def saturated(self) -> int:
        """The sums that were cut off."""
        return sum(node.saturated for node in self.nodes)

    @property
    def share(self) -> float:
        """The part of all sums, of nodes where one could be cut off at all, that was."""
        sums = sum(node.sums for node in self.nodes)
        return self.saturated / sums if sums else 0.0

    @property
    def sentence(self) -> str:
        """What was found and what to do, for people."""
        hit = sorted((node for node in self.nodes if node.saturated), key=lambda node: -node.saturated)
        named = ", ".join(repr(node.name) for node in hit[:_MOST_NAMED])
        return (
            f"{self.saturated:,} {SATURATED} ({self.share:.2g} of those looked at on {self.samples} samples), in "
            f"{len(hit)} of {len(self.nodes)} nodes, most in {named}; make it with reduce_range: true, or with "
            "activations in int8 (S8S8)"
        )


def saturates_on(instruction_sets: Sequence[str]) -> bool:
    """Whether a machine with these sets (`profiles.measure.host.INSTRUCTION_SETS`) cuts u8 x s8 sums off at 16 bits."""
    return not {*VNNI, *_ARM}.intersection(instruction_sets)


def check_saturation(
    entry: Path, inputs: Mapping[str, NDArray[Any]], *, most_samples: int = SAMPLES, threads: int = 1
) -> Saturation:
    """The sums of u8 x s8 products that a CPU without VNNI would cut off; see the module's docstring.

    Nodes whose weights cannot overflow with any activation need no run; for the others only those pairs of weights are
    emulated that can. Memory is that of a few samples' activations and some million sums.

    Args:
        entry: the ONNX file; external data stays where it is.
        inputs: input name -> array (samples, ...).
        most_samples: of these many, spread evenly over all, the activations are taken.
        threads: of the session that computes them.

    Returns:
        Every node that multiplies u8 with constant s8; no node where the model has none.

    Raises:
        StageError: the model cannot be opened or run.
    """
    import onnx

    model = onnx.load(str(entry), load_external_data=False)
    sites = _sites(model, entry.parent)
    risky = {site.activation: True for site in sites if any(len(group.risky()[0]) for group in site.groups)}
    counts = {site.name: [0, 0] for site in sites}
    used = 0
    if risky:
        session = _session(model, entry.parent, list(risky), threads)
        for batch, rows in _batches(session, inputs, most_samples):
            used += rows
            found = _run(session, batch, list(risky))
            for site in sites:
                if site.activation in risky and found[site.activation].dtype == np.uint8:
                    sums, saturated = site.count(found[site.activation])
                    counts[site.name][0] += sums
                    counts[site.name][1] += saturated
    nodes = tuple(
        NodeSaturation(name=site.name, op=site.op, sums=counts[site.name][0], saturated=counts[site.name][1])
        for site in sites
    )
    return Saturation(nodes=nodes, samples=used)


def saturated_sums(activations: NDArray[np.uint8], weights: NDArray[np.int8]) -> int:
    """How many pair sums of ``activations`` (rows, K) @ ``weights`` (K, N) are cut off."""
    return _Group(weights=weights.astype(np.int32)).count(lambda k: activations[:, k])


# --- counting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """One matrix of weights (K, N); a grouped convolution has several."""

    weights: Weights

    def pairs(self) -> tuple[Weights, Weights]:
        """Weights of the even and of the odd elements of K, shape (pairs, N) each."""
        padded = np.pad(self.weights, ((0, len(self.weights) % 2), (0, 0)))
        return padded[::2], padded[1::2]

    def risky(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(pair, column) of the sums that some activations from 0 to 255 would make overflow."""
        even, odd = self.pairs()
        highest = _MOST_ACTIVATION * (np.maximum(even, 0) + np.maximum(odd, 0))
        lowest = _MOST_ACTIVATION * (np.minimum(even, 0) + np.minimum(odd, 0))
        pairs, columns = np.nonzero((highest > _LARGEST) | (lowest < _SMALLEST))
        return pairs, columns

    def count(self, column: Callable[[int], NDArray[np.uint8]]) -> int:
        """The sums that overflow, given what gives all rows of one element of K, shape (rows,)."""
        even, odd = self.pairs()
        pairs, columns = self.risky()
        saturated = 0
        for pair in np.unique(pairs):
            risky = columns[pairs == pair]
            first, second = even[pair, risky], odd[pair, risky]
            # A risky pair has both elements: one product alone cannot overflow.
            a, b = column(2 * int(pair)).astype(np.int32), column(2 * int(pair) + 1).astype(np.int32)
            largest = int(max(np.abs(first).max(), np.abs(second).max()))
            rows = np.flatnonzero((a + b) * largest > _LARGEST)
            at_once = max(1, _ROOM // len(risky))
            for start in range(0, len(rows), at_once):
                some = rows[start : start + at_once]
                sums = a[some, None] * first + b[some, None] * second
                saturated += int(np.count_nonzero((sums > _LARGEST) | (sums < _SMALLEST)))
        return saturated


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """A node that multiplies a uint8 tensor with constant int8 weights.

    ``columns`` turns the tensor into, for each group, its number of rows and what gives all rows of one element of K.
    """

    name: str
    op: str
    activation: str
    groups: tuple[_Group, ...]
    columns: Callable[[NDArray[np.uint8]], list[tuple[int, Callable[[int], NDArray[np.uint8]]]]]

    def count(self, activation: NDArray[np.uint8]) -> tuple[int, int]:
        """(all pair sums, those cut off) for one batch."""
        sums = saturated = 0
        for group, (rows, column) in zip(self.groups, self.columns(activation), strict=True):
            sums += rows * math.ceil(len(group.weights) / 2) * group.weights.shape[1]
            saturated += group.count(column)
        return sums, saturated


# --- finding the nodes -----------------------------------------------------------------------------------------


class _Graph:
    """What is looked up of a model's main graph."""

    def __init__(self, model: Any, folder: Path) -> None:
        from onnx import numpy_helper

        self._folder = str(folder)
        self._to_array = numpy_helper.to_array
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes = list(model.graph.node)
        self._producer = {name: node for node in self.nodes for name in node.output if name}

    def producer(self, name: str, op: str) -> Any | None:
        """The node that gives this tensor, if it is of this operator."""
        node = self._producer.get(name)
        return node if node is not None and node.op_type == op else None

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of an initializer or Constant node."""
        if name in self._tensors:
            return np.asarray(self._to_array(self._tensors[name], self._folder))
        node = self.producer(name, "Constant")
        value = None if node is None else next((one for one in node.attribute if one.name == "value"), None)
        return None if value is None else np.asarray(self._to_array(value.t, self._folder))

    def int8_weight(self, name: str) -> NDArray[np.int8] | None:
        """The value of a constant int8 tensor, also of one that is quantized in the graph."""
        value = self.constant(name)
        if value is None and (node := self.producer(name, "QuantizeLinear")) is not None:
            value = self._quantized(node)
        return value if value is not None and value.dtype == np.int8 else None

    def _quantized(self, node: Any) -> NDArray[Any] | None:
        """QuantizeLinear of a constant: round half to even, one scale for all or one along an axis."""
        values = [self.constant(name) for name in node.input]
        if len(values) < 3 or any(value is None for value in values):
            return None
        data, scale, zero = (np.asarray(value) for value in values)
        axis = _attribute(node, "axis", 1)
        shape = [-1 if scale.ndim and dim == axis % data.ndim else 1 for dim in range(data.ndim)]
        limits = np.iinfo(zero.dtype)
        raw = np.rint(data / scale.reshape(shape)) + zero.reshape(shape).astype(np.float64)
        quantized: NDArray[Any] = np.clip(raw, limits.min, limits.max).astype(zero.dtype)
        return quantized


def _sites(model: Any, folder: Path) -> list[_Site]:
    graph = _Graph(model, folder)
    found = []
    for node in graph.nodes:
        if node.op_type in _QUANTIZED_OPS:
            activation, zero, weight = (_input(node, place) for place in _QUANTIZED_OPS[node.op_type])
        elif node.op_type in _FLOAT_OPS:
            left, right = (graph.producer(name, "DequantizeLinear") for name in node.input[:2])
            if left is None or right is None:
                continue
            activation, zero, weight = left.input[0], _input(left, 2), right.input[0]
        else:
            continue
        values = graph.int8_weight(weight)
        if values is None or graph.constant(activation) is not None:
            continue
        site = _site(node, activation, values, graph.constant(zero))
        if site is not None:
            found.append(site)
    return found


def _site(node: Any, activation: str, weights: NDArray[np.int8], zero: NDArray[Any] | None) -> _Site | None:
    name, op = node.name or node.output[0], node.op_type
    if zero is not None and zero.dtype != np.uint8:
        return None
    if "Conv" in op:
        return _conv_site(node, name, activation, weights, 0 if zero is None else int(zero.reshape(-1)[0]))
    matrix = weights.reshape(weights.shape[-2:]) if weights.ndim > 1 and weights.size == _last(weights) else None
    if matrix is None:
        return None
    if _attribute(node, "transB", 0):
        matrix = matrix.T
    turned = bool(_attribute(node, "transA", 0))

    def columns(tensor: NDArray[np.uint8]) -> list[tuple[int, Callable[[int], NDArray[np.uint8]]]]:
        rows = tensor.T if turned else tensor.reshape(-1, tensor.shape[-1])
        return [(len(rows), lambda k: rows[:, k])]

    group = _Group(weights=matrix.astype(np.int32))
    return _Site(name=name, op=op, activation=activation, groups=(group,), columns=columns)


def _last(weights: NDArray[Any]) -> int:
    """Elements of one matrix of a stack of matrices."""
    return weights.shape[-2] * weights.shape[-1]


def _conv_site(node: Any, name: str, activation: str, weights: NDArray[np.int8], zero: int) -> _Site | None:
    groups, (outputs, channels, *kernel) = _attribute(node, "group", 1), weights.shape
    if channels == 1 and groups > 1:
        return None  # depthwise
    spatial = len(kernel)
    strides = _attribute(node, "strides", [1] * spatial)
    dilations = _attribute(node, "dilations", [1] * spatial)
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    each = outputs // groups
    # (outputs, channels, *kernel) -> (kernel position, channel) x output, for each group
    ordered = np.moveaxis(weights, 1, -1).reshape(groups, each, -1).astype(np.int32)

    def columns(tensor: NDArray[np.uint8]) -> list[tuple[int, Callable[[int], NDArray[np.uint8]]]]:
        pads = _pads(node, tensor.shape[2:], reach, strides)
        padded = np.pad(tensor, [(0, 0), (0, 0), *pads], constant_values=zero)
        sizes = [(size - span) // step + 1 for size, span, step in zip(padded.shape[2:], reach, strides, strict=True)]

        def column(group: int, k: int) -> NDArray[np.uint8]:
            position, channel = divmod(k, channels)
            starts = [int(at) * step for at, step in zip(np.unravel_index(position, kernel), dilations, strict=True)]
            window = (
                slice(start, start + (size - 1) * step + 1, step)
                for start, size, step in zip(starts, sizes, strides, strict=True)
            )
            place: Any = (slice(None), group * channels + channel, *window)
            values: NDArray[np.uint8] = padded[place].reshape(-1)
            return values

        rows = len(tensor) * math.prod(sizes)
        return [(rows, lambda k, group=group: column(group, k)) for group in range(groups)]  # type: ignore[misc]

    return _Site(
        name=name,
        op=node.op_type,
        activation=activation,
        groups=tuple(_Group(weights=ordered[group].T) for group in range(groups)),
        columns=columns,
    )


def _pads(node: Any, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after each spatial dimension, as ONNX defines ``pads`` and ``auto_pad``."""
    auto = _attribute(node, "auto_pad", b"NOTSET")
    if auto in {b"NOTSET", b"VALID"}:
        pads = _attribute(node, "pads", [0] * (2 * len(sizes))) if auto == b"NOTSET" else [0] * (2 * len(sizes))
        return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))
    found = []
    for size, span, step in zip(sizes, reach, strides, strict=True):
        total = max(0, (math.ceil(size / step) - 1) * step + span - size)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto == b"SAME_UPPER" else (large, small))
    return found


def _attribute(node: Any, name: str, default: Any) -> Any:
    import onnx

    return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _input(node: Any, place: int) -> str:
    return node.input[place] if place < len(node.input) else ""


# --- running ---------------------------------------------------------------------------------------------------


def _session(model: Any, folder: Path, tensors: Sequence[str], threads: int) -> Any:
    """A session of the graph as it stands that also gives these tensors."""
    import onnx
    import onnxruntime as ort

    named = {value.name for value in (*model.graph.output, *model.graph.input)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in named)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base of its errors
        raise StageError(f"the int8 graph cannot be opened to look for overflow: {error}") from error


def _batches(
    session: Any, inputs: Mapping[str, NDArray[Any]], most: int
) -> Iterator[tuple[dict[str, NDArray[Any]], int]]:
    """Inputs of a few samples at a time, with their number; where the batch is fixed, whole ones, wrapped around."""
    names = [port.name for port in session.get_inputs()]
    first = session.get_inputs()[0].shape
    fixed = first[0] if first and isinstance(first[0], int) else None
    size, count = fixed or _BATCH, len(inputs[names[0]])
    chosen = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))
    if fixed:
        chosen = np.resize(chosen, max(1, len(chosen) // fixed) * fixed)
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        yield {name: np.ascontiguousarray(inputs[name][rows]) for name in names}, len(rows)


def _run(session: Any, batch: Mapping[str, NDArray[Any]], tensors: Sequence[str]) -> dict[str, NDArray[Any]]:
    given = {name: batch[name] for name in tensors if name in batch}
    wanted = [name for name in tensors if name not in given]
    try:
        return given | dict(zip(wanted, session.run(wanted, dict(batch)), strict=True)) if wanted else given
    except Exception as error:
        raise StageError(f"the int8 graph cannot be run to look for overflow: {error}") from error
