"""The stage that stores weights in 4 or 8 bits and leaves activations in float32."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageResult, first_line
from optimize.stages.preparation import (
    PREPARED,
    FloatNodesParams,
    check_float_nodes,
    load,
    prepare,
)
from registry.errors import NotApplicableError

_WEIGHTED_OPS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "LSTM", "GRU", "RNN")
_MATMUL_OPS = ("MatMul", "Gemm")


class WeightOnlyParams(FloatNodesParams):
    """Parameters of ``quantize.weights``.

    Attributes:
        bits: of a weight.
        block_size: how many weights of one output share a scale; a smaller block is closer and larger on disk.
        symmetric: whether a block has a scale alone, else also a zero point, which is closer at 4 bits.
        accuracy_level: the least type that the product is computed in: 0 leaves it to the engine, 1 is float32,
            2 float16, 3 bfloat16 and 4 int8, for which each row is quantized as it comes, in blocks of its own.
    """

    bits: Literal[4, 8] = 4
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = True
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4


class WeightOnly(Stage):
    """Weights of MatMul and Gemm in 4 or 8 bits, in blocks (MatMulNBits of com.microsoft); activations stay float32.

    Shapes and types of inputs and outputs stay, no samples are needed, and an answer does not depend on its neighbours
    in the batch. It makes files and memory smaller; it is faster where reading weights is what takes the time, as at
    batch 1 with large matrices. The graph needs ONNX Runtime afterwards. ONNX Runtime 1.31 runs both 4 and 8 bits on
    the CPU; where an older one does not, the stage says so, because it opens what it wrote. Source:
    onnxruntime.quantization.matmul_nbits_quantizer, its round-to-nearest method.
    """

    name = "quantize.weights"
    Params = WeightOnlyParams
    tools = ("onnx", "onnxruntime", "onnx-ir", "sympy")
    params: WeightOnlyParams

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Prepares the graph, turns each Gemm into a MatMul, then stores the weights of each MatMul in blocks."""
        from onnxruntime.quantization.onnx_model import ONNXModel

        with context.scratch() as scratch:
            graph, notes = prepare(source, scratch, stage=self.name)
            self._check_worth(graph)
            check_float_nodes(self.name, graph, self.params.float_nodes)
            model = load(scratch / PREPARED)
        left_out = [*self.params.float_nodes, *(f"{name}_MatMul" for name in self.params.float_nodes)]
        ONNXModel(model).replace_gemm_with_matmul()
        made = self._quantized(model, left_out)
        done = onnx_files.op_counts(made)["MatMulNBits"]
        if not done:
            raise NotApplicableError(f"{self.name}: no MatMul with a constant weight matrix that could be quantized")
        entry = onnx_files.save(made, context.out)
        self._check_runs(context.out / entry)
        return self.written(context, entry, *notes, f"the weights of {done} MatMul in int{self.params.bits}")

    def _check_worth(self, model: Any) -> None:
        weights = onnx_files.weight_elements(model)
        total, mine = (sum(weights[name] for name in ops) for ops in (_WEIGHTED_OPS, _MATMUL_OPS))
        if not mine:
            raise NotApplicableError(f"{self.name}: no MatMul or Gemm with constant weights in this model")
        if mine < total / 2:
            raise NotApplicableError(
                f"{self.name}: MatMul and Gemm hold {100 * mine / total:.0f} % of the weights, so little would change",
                hint="Take quantize.static, which has an int8 form of convolutions.",
            )

    def _quantized(self, model: Any, left_out: list[str]) -> Any:
        with _no_root_logging():
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            model,
            bits=self.params.bits,
            block_size=self.params.block_size,
            is_symmetric=self.params.symmetric,
            accuracy_level=self.params.accuracy_level,
            nodes_to_exclude=left_out,
        )
        quantizer.process()
        made = quantizer.model.model
        _drop_repeated(made.graph)
        return made

    def _check_runs(self, path: Path) -> None:
        import onnxruntime

        errors: Any = onnxruntime.capi.onnxruntime_pybind11_state
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (errors.Fail, errors.InvalidGraph, errors.InvalidArgument, errors.NotImplemented) as error:
            raise NotApplicableError(
                f"{self.name}: ONNX Runtime {onnxruntime.__version__} does not run MatMulNBits with "
                f"{self.params.bits} bits and blocks of {self.params.block_size} on this CPU: "
                f"{first_line(error)}"
            ) from error


@contextlib.contextmanager
def _no_root_logging() -> Iterator[None]:
    """Keeps the module that is imported inside from setting up the logging of the whole process."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def _drop_repeated(graph: Any) -> None:
    """Keeps one of the tensors that the quantizer writes once for each node that shares a weight."""
    seen: set[str] = set()
    for position, tensor in reversed(list(enumerate(graph.initializer))):
        if tensor.name in seen:
            del graph.initializer[position]
        seen.add(tensor.name)
