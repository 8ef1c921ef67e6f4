"""The stage that makes int8 in the form that TensorRT reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimize.calibration import Method, whole_batches, write_ranges
from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageResult
from optimize.stages.preparation import (
    PREPARED,
    FloatNodesParams,
    check_float_nodes,
    load,
    prepare,
)
from registry.errors import NotApplicableError

_WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_GREATEST = 127  # of a symmetric int8; -128 is not used
# The scale of a tensor that is always zero has to be positive, too.
_LEAST_PEAK = 1e-12


class TensorRtInt8Params(FloatNodesParams):
    """Parameters of ``quantize.tensorrt``.

    Attributes:
        method: how the range of an activation is found.
        percentile: percent of values inside the range, for the method ``percentile``.
        batch_size: samples fed at once, where the model does not fix the batch.
    """

    method: Method = "minmax"
    percentile: float = Field(default=99.999, gt=50, le=100)
    batch_size: int = Field(default=8, ge=1)


class TensorRtInt8(Stage):
    """QuantizeLinear and DequantizeLinear pairs of symmetric int8 where TensorRT has an int8 kernel for them.

    Conv, ConvTranspose, Gemm and MatMul with constant weights get a pair on their input (one scale) and on their weight
    (a scale for each output channel), and none on bias or output, so that an activation after them can be fused. An
    Add that joins such an output with a shortcut gets a pair on the shortcut. Zero points are 0. Shapes and types of
    inputs and outputs stay. Weights stay float32 in the file, which is not smaller: the engine that is built from it
    is. On a CPU it serves to check the accuracy, not to be fast. Source: NVIDIA, "TensorRT Developer Guide", explicit
    quantization.
    """

    name = "quantize.tensorrt"
    Params = TensorRtInt8Params
    needs_calibration = True
    tools = ("onnx", "onnxruntime", "numpy", "sympy")
    params: TensorRtInt8Params

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Prepares the graph, finds the ranges, then puts the pairs in."""
        assert context.calibration is not None  # the contract has looked
        with context.scratch() as scratch:
            _, notes = prepare(source, scratch, stage=self.name)
            model = load(scratch / PREPARED)
            self._check_domains(model)
            check_float_nodes(self.name, model, self.params.float_nodes)
            pairs = _Pairs(model, left_out=set(self.params.float_nodes))
            if not pairs.weighted:
                raise NotApplicableError(f"{self.name}: no Conv, Gemm or MatMul with constant weights to quantize")
            write_ranges(
                scratch / PREPARED,
                whole_batches(context.calibration, source.inputs, wanted=self.params.batch_size),
                scratch / "ranges.json",
                op_types=self.operators(model),
                method=self.params.method,
                percentile=self.params.percentile,
                symmetric=True,
                threads=context.threads,
            )
            told = pairs.insert(_peaks(scratch / "ranges.json"))
        return self.written(context, onnx_files.save(model, context.out), *notes, *told)

    def operators(self, prepared: Any) -> list[str]:
        """Types of the operators whose nodes are quantized, where they are not left in float32."""
        return [*_WEIGHTED_OPS, "Add"]

    def _check_domains(self, model: Any) -> None:
        fused = sorted({node.op_type for node in onnx_files.nodes(model.graph) if node.domain == "com.microsoft"})
        if fused:
            raise NotApplicableError(
                f"{self.name}: TensorRT does not know operators that only ONNX Runtime has ({', '.join(fused)})",
                hint="Put it before stages that fuse for ONNX Runtime, such as simplify.transformer.",
            )


class _Pairs:
    """Where pairs go in a graph, and the pairs themselves; one is shared by all that read the tensor quantized.

    Attributes:
        weighted: nodes whose input and weight are quantized.
        shortcuts: an Add and the position of its input that is quantized.
    """

    def __init__(self, model: Any, *, left_out: set[str]) -> None:
        import onnx

        self._onnx = onnx
        self._graph = model.graph
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._made: dict[str, list[Any]] = {}
        self.weighted = [node for node in model.graph.node if node.name not in left_out and self._takes(node)]
        outputs = {node.output[0] for node in self.weighted}
        self.shortcuts = [
            (node, position)
            for node in model.graph.node
            if node.name not in left_out and (position := self._shortcut(node, outputs)) is not None
        ]

    def insert(self, peaks: Mapping[str, float]) -> list[str]:
        """Puts the pairs in; returns what to tell.

        Args:
            peaks: tensor -> the greatest absolute value in its range.
        """
        normalized = {node.input[0] for node in self._graph.node if node.op_type == "BatchNormalization"}
        unfolded = sum(bool(normalized.intersection(node.output)) for node in self.weighted)
        for node in self.weighted:
            node.input[0] = self._activation(node.input[0], peaks)
            node.input[1] = self._weight(node)
        for node, position in self.shortcuts:
            node.input[position] = self._activation(node.input[position], peaks)
        self._place()
        told = [f"{len(self.weighted)} nodes and {len(self.shortcuts)} shortcuts in int8"]
        if unfolded:
            told.append(f"{unfolded} BatchNormalization could not be folded, and TensorRT does not fuse across them")
        return told

    def _takes(self, node: Any) -> bool:
        if node.op_type not in _WEIGHTED_OPS or node.domain not in {"", "ai.onnx"} or node.input[0] in self._tensors:
            return False
        weight = self._tensors.get(node.input[1])
        return weight is not None and weight.data_type == self._onnx.TensorProto.FLOAT and len(weight.dims) > 1

    def _shortcut(self, node: Any, outputs: set[str]) -> int | None:
        """Which input of an Add is the shortcut around a quantized node; None where there is none."""
        if node.op_type != "Add" or any(name in self._tensors for name in node.input):
            return None
        around = [position for position, name in enumerate(node.input) if name not in outputs]
        return around[0] if len(around) == 1 else None

    def _activation(self, name: str, peaks: Mapping[str, float]) -> str:
        peak = np.float32(max(peaks[name], _LEAST_PEAK))
        return self._pair(name, name, peak / np.float32(_GREATEST), axis=None)

    def _weight(self, node: Any) -> str:
        name = node.input[1]
        values = self._onnx.numpy_helper.to_array(self._tensors[name])
        axis = _output_axis(node, values.ndim)
        others = tuple(one for one in range(values.ndim) if one != axis)
        peak = np.maximum(np.abs(values).max(axis=others), _LEAST_PEAK)
        return self._pair(name, f"{name}/axis{axis}", (peak / _GREATEST).astype(np.float32), axis=axis)

    def _pair(self, tensor: str, key: str, scale: NDArray[np.float32] | np.float32, *, axis: int | None) -> str:
        """The name of the tensor after its pair; the pair is made when it is first asked for."""
        key = f"{key}/quantized"
        back = f"{key}/float32"
        if back not in self._made:
            make, scales = self._onnx.helper.make_node, np.asarray(scale, np.float32)
            ends = [f"{key}/scale", f"{key}/zero_point"]
            for name, values in zip(ends, (scales, np.zeros(scales.shape, np.int8)), strict=True):
                self._graph.initializer.append(self._onnx.numpy_helper.from_array(values, name))
            given = {} if axis is None else {"axis": axis}
            self._made[back] = [
                make("QuantizeLinear", [tensor, *ends], [f"{key}/int8"], name=f"{key}/QuantizeLinear", **given),
                make("DequantizeLinear", [f"{key}/int8", *ends], [back], name=f"{key}/DequantizeLinear", **given),
            ]
        return back

    def _place(self) -> None:
        """Writes each pair before the first node that reads it, which keeps the graph in order."""
        nodes = []
        for node in self._graph.node:
            for name in node.input:
                nodes += self._made.pop(name, [])
            nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(nodes)


def _output_axis(node: Any, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if any(one.name == "transB" and one.i for one in node.attribute) else 1
    return rank - 1


def _peaks(ranges: Path) -> dict[str, float]:
    from onnxruntime.quantization.calibrate import load_tensors_data

    return {
        name: max(float(np.abs(end).max()) for end in found.range_value)
        for name, found in load_tensors_data(ranges).items()
    }
