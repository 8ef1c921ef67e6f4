"""Stages that make int8 of float32: with ranges found at run time, or beforehand on samples."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from optimize.calibration import Method, whole_batches, write_ranges
from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageResult
from optimize.stages.preparation import (
    PREPARED,
    FloatNodesParams,
    check_float_nodes,
    is_large,
    prepare,
)
from registry.errors import NotApplicableError

__all__ = ["DynamicInt8", "DynamicInt8Params", "StaticInt8", "StaticInt8Params", "prepare"]

# Operators that ONNX Runtime computes fast with ranges found at run time. A Gemm becomes a MatMul first.
_DYNAMIC_OPS = ("MatMul", "Gemm", "Attention", "LSTM")
_WEIGHTED_OPS = ("Conv", "ConvTranspose", *_DYNAMIC_OPS)
_MATMUL_OPS = ("MatMul", "Gemm")


class DynamicInt8Params(FloatNodesParams):
    """Parameters of ``quantize.dynamic``.

    Attributes:
        ops: ``matmul`` is MatMul, Gemm, Attention and LSTM; ``all`` adds Conv.
        per_channel: one scale for each output channel of a weight, else one for the whole weight.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI, where u8 times s8 sums overflow.
    """

    ops: Literal["matmul", "all"] = "matmul"
    per_channel: bool = True
    reduce_range: bool = False


class DynamicInt8(Stage):
    """Int8 weights (QInt8) and activations that are quantized (uint8) as they come, from the range of each batch.

    Shapes and types of inputs and outputs stay. An answer depends on its neighbours in the batch, because a range is
    taken over all of it. Convolutions are left in float32: their int8 form with run-time ranges (ConvInteger) ran at
    0.14 to 0.44 times the speed of float32 on every network it was tried on. A model that is mostly convolutions is
    therefore refused, unless ``ops`` is ``all``. Source: onnxruntime.quantization.quantize_dynamic.
    """

    name = "quantize.dynamic"
    version = 2
    Params = DynamicInt8Params
    batch_dependent = True
    tools = ("onnx", "onnxruntime", "sympy")
    params: DynamicInt8Params

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Prepares the graph, then quantizes."""
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with context.scratch() as scratch:
            prepared, notes = prepare(source, scratch, stage=self.name)
            ops = self.operators(prepared)
            self._check_worth(prepared, ops)
            check_float_nodes(self.name, prepared, self.params.float_nodes)
            # A Gemm is made a MatMul of this name before nodes are left out.
            excluded = [*self.params.float_nodes, *(f"{name}_MatMul" for name in self.params.float_nodes)]
            del prepared
            quantize_dynamic(
                scratch / PREPARED,
                scratch / "int8.onnx",
                nodes_to_exclude=excluded,
                op_types_to_quantize=ops,
                per_channel=self.params.per_channel,
                reduce_range=self.params.reduce_range,
                weight_type=QuantType.QInt8,
                use_external_data_format=is_large(scratch),
                # Fused operators have no type inference; what is left in this graph is float32.
                extra_options={"DefaultTensorType": TensorProto.FLOAT},
            )
            counts = onnx_files.op_counts(onnx_files.load_graph(scratch / "int8.onnx"))
            done = sum(counts[name] for name in ("MatMulInteger", "ConvInteger", "QAttention", "DynamicQuantizeLSTM"))
            if not done:
                raise NotApplicableError(f"{self.name}: no node with constant weights that could be quantized")
            entry = onnx_files.move(scratch / "int8.onnx", context.out)
        return self.written(context, entry, *notes, f"{done} nodes in int8")

    def operators(self, prepared: Any) -> list[str]:
        """Types of the operators whose nodes are quantized, where they are not left in float32."""
        return [*_DYNAMIC_OPS, "Conv"] if self.params.ops == "all" else list(_DYNAMIC_OPS)

    def _check_worth(self, model: Any, ops: list[str]) -> None:
        weights = onnx_files.weight_elements(model)
        total = sum(weights[name] for name in _WEIGHTED_OPS)
        mine = sum(weights[name] for name in ops)
        if not mine and not total:
            raise NotApplicableError(f"{self.name}: no {', '.join(ops)} with constant weights in this model")
        # A convolution uses each weight at many places, so half of the weights is most of the work.
        if mine < total / 2:
            raise NotApplicableError(
                f"{self.name}: {100 * (total - mine) / total:.0f} % of the weights are of convolutions, which are "
                "slower in int8 with run-time ranges than in float32; the rest is not worth it",
                hint="Take quantize.static; ops: all here and predict: false in the campaign make it nevertheless.",
            )


class StaticInt8Params(FloatNodesParams):
    """Parameters of ``quantize.static``.

    Attributes:
        scheme: types of activations and weights: ``u8s8`` is uint8 and int8. It is the fast one on x86 with VNNI,
            ``s8s8`` on Arm; ``u8u8`` never overflows without VNNI, and is slower than ``u8s8`` with it.
        format: ``qdq`` wraps float operators in QuantizeLinear and DequantizeLinear, which every engine reads;
            ``qoperator`` writes QLinearConv and its like, which run as they are written.
        ops: ``matmul`` is MatMul and Gemm; ``weighted`` adds Conv; ``all`` is every operator that has an int8 form.
            ``auto`` takes ``all`` for a convolutional net, ``weighted`` for one that attends, too, and ``matmul``
            for a net without convolutions.
        matmul_output: whether what a MatMul or Gemm gives is quantized; ``auto`` does so with ``ops`` all only, and
            with the format ``qoperator``, whose MatMul has no other form.
        method: how the range of an activation is found.
        percentile: percent of values inside the range, for the method ``percentile``.
        batch_size: samples fed at once, where the model does not fix the batch.
        per_channel: one scale for each output channel of a weight, else one for the whole weight.
        symmetric_activations: ranges of activations centred on zero.
        reduce_range: 7-bit weights, for x86 CPUs without VNNI, where u8 times s8 sums overflow.
    """

    scheme: Literal["u8s8", "s8s8", "u8u8"] = "u8s8"
    format: Literal["qdq", "qoperator"] = "qdq"
    ops: Literal["auto", "matmul", "weighted", "all"] = "auto"
    matmul_output: Literal["auto", "quantized", "float"] = "auto"
    method: Method = "minmax"
    percentile: float = Field(default=99.999, gt=50, le=100)
    batch_size: int = Field(default=8, ge=1)
    per_channel: bool = True
    symmetric_activations: bool = False
    reduce_range: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "StaticInt8Params":
        if self.format == "qoperator" and self.matmul_output == "float":
            raise ValueError("matmul_output float needs the format qdq: a QLinearMatMul gives int8")
        return self


class StaticInt8(Stage):
    """Uint8 or int8 activations and weights, as QuantizeLinear and DequantizeLinear pairs or as int8 operators.

    Ranges come from the calibration samples, so an answer does not depend on its neighbours. Shapes and types of
    inputs and outputs stay. Transformers keep the outputs of their MatMuls in float32: on MiniLM that took the cosine
    with float32 from .93 to .99 and was not slower. Source: onnxruntime.quantization.quantize_static after its
    quant_pre_process.
    """

    name = "quantize.static"
    version = 2
    Params = StaticInt8Params
    needs_calibration = True
    tools = ("onnx", "onnxruntime", "numpy", "sympy")
    params: StaticInt8Params

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Prepares the graph, finds the ranges, then quantizes."""
        assert context.calibration is not None  # the contract has looked
        with context.scratch() as scratch:
            prepared, notes = prepare(source, scratch, stage=self.name)
            ops, float_outputs = self._choose(prepared)
            check_float_nodes(self.name, prepared, self.params.float_nodes)
            del prepared
            ranges = scratch / "ranges.json"
            write_ranges(
                scratch / PREPARED,
                whole_batches(context.calibration, source.inputs, wanted=self.params.batch_size),
                ranges,
                op_types=ops,
                method=self.params.method,
                percentile=self.params.percentile,
                symmetric=self.params.symmetric_activations,
                threads=context.threads,
            )
            made = self._quantize(ranges, scratch, ops, float_outputs)
            counts = onnx_files.op_counts(onnx_files.load_graph(made))
            if not counts["DequantizeLinear"] and not any(name.startswith(("QLinear", "QGemm")) for name in counts):
                raise NotApplicableError(f"{self.name}: no {', '.join(ops)} in this model that could be quantized")
            entry = onnx_files.move(made, context.out)
        told = f"{_told(ops)} in int8, outputs of MatMul in {'float32' if float_outputs else 'int8'}"
        return self.written(context, entry, *notes, told)

    def operators(self, prepared: Any) -> list[str]:
        """Types of the operators whose nodes are quantized, where they are not left in float32."""
        return self._choose(prepared)[0]

    def _choose(self, model: Any) -> tuple[list[str], bool]:
        counts = onnx_files.op_counts(model)
        if not any(counts[name] for name in (*_MATMUL_OPS, "Conv", "ConvTranspose")):
            raise NotApplicableError(f"{self.name}: no Conv, MatMul or Gemm in this model")
        wanted = self.params.ops
        if wanted == "auto":
            attends, convolves = onnx_files.has_attention(model), counts["Conv"] + counts["ConvTranspose"] > 0
            wanted = "matmul" if not convolves else "weighted" if attends else "all"
        ops = {"matmul": _MATMUL_OPS, "weighted": (*_MATMUL_OPS, "Conv", "ConvTranspose"), "all": _all_ops()}[wanted]
        output = self.params.matmul_output
        keeps_float = self.params.format == "qdq" and wanted != "all"
        return list(ops), output == "float" or (output == "auto" and keeps_float)

    def _quantize(self, ranges: Path, scratch: Path, ops: list[str], float_outputs: bool) -> Path:
        from onnx import TensorProto
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        methods = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }
        formats = {"qdq": QuantFormat.QDQ, "qoperator": QuantFormat.QOperator}
        types = {"u": QuantType.QUInt8, "s": QuantType.QInt8}
        quantize_static(
            scratch / PREPARED,
            scratch / "int8.onnx",
            None,
            calibration_cache_path=ranges,
            calibrate_method=methods[self.params.method],
            quant_format=formats[self.params.format],
            op_types_to_quantize=ops,
            per_channel=self.params.per_channel,
            reduce_range=self.params.reduce_range,
            activation_type=types[self.params.scheme[0]],
            weight_type=types[self.params.scheme[2]],
            nodes_to_exclude=list(self.params.float_nodes),
            use_external_data_format=is_large(scratch),
            extra_options={
                "ActivationSymmetric": self.params.symmetric_activations,
                "DefaultTensorType": TensorProto.FLOAT,
                "OpTypesToExcludeOutputQuantization": list(_MATMUL_OPS) if float_outputs else [],
            },
        )
        return scratch / "int8.onnx"


def _all_ops() -> tuple[str, ...]:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return tuple(sorted({*QDQRegistry, *QLinearOpsRegistry}))


def _told(ops: list[str]) -> str:
    return "all operators that have an int8 form" if len(ops) > 4 else ", ".join(ops)
