"""Stages that change the floating-point type a model computes in."""

from typing import Any

import numpy as np

from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageResult
from registry.errors import NotApplicableError


class Float16(Stage):
    """Weights and computation in float16; inputs and outputs stay float32.

    Operators that ONNX Runtime has no float16 form of stay in float32 between Cast nodes. Halves the file. On CPUs it
    is rarely faster. Weights beyond 65,504 are clipped to it, which a note tells. Source:
    onnxruntime.transformers.float16.
    """

    name = "precision.float16"
    tools = ("onnx", "onnxruntime")

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Converts, and counts weights that float16 cannot hold."""
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = onnx_files.load(source)
        clipped = _beyond_float16(model)
        made = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=model.ByteSize() > 1_900_000_000)
        notes = [f"{clipped} weights beyond float16's range were clipped to it"] if clipped else []
        return self.written(context, onnx_files.save(made, context.out), *notes)

    def requires(self, source: StageInput, context: Context) -> None:
        """Looks for float32 weights."""
        from onnx import TensorProto

        model = onnx_files.load(source)
        onnx_files.refuse_quantized(self.name, model)
        constants = [
            attribute.t
            for node in model.graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        ]
        if not any(tensor.data_type == TensorProto.FLOAT for tensor in (*model.graph.initializer, *constants)):
            raise NotApplicableError(f"{self.name}: the model has no float32 weights")


def _beyond_float16(model: Any) -> int:
    from onnx import TensorProto, numpy_helper

    largest = float(np.finfo(np.float16).max)
    count = 0
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            count += int((np.abs(numpy_helper.to_array(tensor)) > largest).sum())
    return count
