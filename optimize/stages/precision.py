"""Stages that change the floating-point type a model computes in.

There is no stage for bfloat16: where a CPU has it, OpenVINO computes a float32 model in bfloat16 by itself (the
engine's precision ``default``), and ONNX Runtime's CPU provider has next to no kernels for it.
"""

from typing import Any

import numpy as np
from pydantic import Field

from optimize.calibration import whole_batches
from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageParams, StageResult
from optimize.stages.checking import Runner
from registry.errors import NotApplicableError

_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)


class Float16(Stage):
    """Weights and computation in float16; inputs and outputs stay float32.

    Operators that ONNX Runtime has no float16 form of stay in float32 between Cast nodes. Halves the file. On CPUs it
    is rarely faster. Weights beyond 65,504 are clipped to it, which a note tells. Source:
    onnxruntime.transformers.float16.
    """

    name = "precision.float16"
    version = 2
    tools = ("onnx", "onnxruntime")

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Converts, and counts weights that float16 cannot hold."""
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = _load_float32(self.name, source)
        clipped = _beyond_float16(model)
        made = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=onnx_files.is_large(model))
        _sort(made)
        notes = [f"{clipped} weights beyond float16's range were clipped to it"] if clipped else []
        return self.written(context, onnx_files.save(made, context.out), *notes)


class MixedFloat16Params(StageParams):
    """Parameters of ``precision.mixed``.

    Attributes:
        share: of float16's largest number (65,504) that a value may reach before its nodes stay in float32; below 1,
            because other inputs than the calibration samples reach further.
        batch_size: samples run at once, where the model does not fix the batch.
    """

    share: float = Field(default=0.5, gt=0, le=1)
    batch_size: int = Field(default=8, ge=1)


class MixedFloat16(Stage):
    """Float16, but for the nodes whose values it cannot hold, which stay in float32; so do inputs and outputs.

    The float32 model is run on the calibration samples, batch by batch, with every tensor inside it as an output. A
    node stays in float32 where it gives or takes an activation, or holds a weight, that goes beyond a share of
    float16's range, or a weight most of whose values vanish in float16. Neither sums inside one operator nor nodes
    inside control flow are looked into: what overflows there, and gives small values, is not found. It matters most on
    a GPU: on a CPU ONNX Runtime computes most float16 operators in float32. Source: onnxruntime.transformers.float16
    with its list of blocked nodes; the same idea as the range rules of AutoCast in NVIDIA's Model Optimizer.
    """

    name = "precision.mixed"
    Params = MixedFloat16Params
    needs_calibration = True
    tools = ("onnx", "onnxruntime", "numpy")
    params: MixedFloat16Params

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Finds the nodes that float16 cannot serve, and converts the others."""
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = _load_float32(self.name, source)
        onnx_files.lift_constants(model)
        onnx_files.name_nodes(model)
        limit = self.params.share * _LARGEST
        wide = {tensor.name for tensor in model.graph.initializer if not _fits_float16(tensor, limit)}
        wide |= self._wide_activations(model, source, context, limit)
        kept = [node for node in model.graph.node if wide.intersection((*node.input, *node.output))]
        if len(kept) == len(model.graph.node):
            raise NotApplicableError(f"{self.name}: every node holds values that float16 cannot")
        # Weights that both kinds of nodes take would be clipped to float16's range; float32 ones get copies.
        _own_weights(model, kept)
        blocked = [node.name for node in kept]
        made = convert_float_to_float16(
            model, keep_io_types=True, node_block_list=blocked, disable_shape_infer=onnx_files.is_large(model)
        )
        _take_out_round_trips(made)
        _sort(made)
        return self.written(context, onnx_files.save(made, context.out), _told_kept(kept, limit))

    def _wide_activations(self, model: Any, source: StageInput, context: Context, limit: float) -> set[str]:
        import onnx

        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        there = {value.name for value in watched.graph.output}
        # Without a type: ONNX Runtime infers it.
        watched.graph.output.extend(
            onnx.ValueInfoProto(name=name)
            for node in watched.graph.node
            for name in node.output
            if name and name not in there
        )
        wide: set[str] = set()
        assert context.calibration is not None  # the contract has looked
        with context.scratch() as scratch:
            runner = Runner(scratch / onnx_files.save(watched, scratch), threads=context.threads)
            for batch in whole_batches(context.calibration, source.inputs, wanted=self.params.batch_size):
                for name, values in zip(runner.outputs, runner(batch), strict=True):
                    if name not in wide and _is_beyond(values, limit):
                        wide.add(name)
        return wide


def _load_float32(stage: str, source: StageInput) -> Any:
    """The model, where it has float32 weights and no quantized ones; else the stage does not apply."""
    from onnx import TensorProto

    model = onnx_files.load(source)
    onnx_files.refuse_quantized(stage, model)
    if not any(tensor.data_type == TensorProto.FLOAT for tensor in onnx_files.constants(model).values()):
        raise NotApplicableError(f"{stage}: the model has no float32 weights")
    return model


def _fits_float16(tensor: Any, limit: float) -> bool:
    """Whether float16 holds the weights: none beyond the limit, and most of those that are not 0 stay so."""
    from onnx import TensorProto, numpy_helper

    if tensor.data_type != TensorProto.FLOAT:
        return True
    sizes = np.abs(numpy_helper.to_array(tensor))
    sizes = sizes[sizes > 0]
    return not sizes.size or bool(sizes.max() <= limit and np.median(sizes) >= _SMALLEST)


def _is_beyond(values: Any, limit: float) -> bool:
    """Whether a float32 activation goes beyond the limit; infinities, which masks have on purpose, do not count."""
    if not isinstance(values, np.ndarray) or values.dtype != np.float32 or not values.size:
        return False
    sizes = np.abs(values[np.isfinite(values)])
    return bool(sizes.size and sizes.max() > limit)


def _own_weights(model: Any, kept: list[Any]) -> None:
    """Gives the nodes that stay in float32 copies of weights that other nodes take, too."""
    names = {node.name for node in kept}
    shared = {name for node in model.graph.node if node.name not in names for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in shared]:
        takers = [node for node in kept if tensor.name in node.input]
        if not takers:
            continue
        copy = model.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = f"{tensor.name}_float32"
        for node in takers:
            for position, name in enumerate(node.input):
                if name == tensor.name:
                    node.input[position] = copy.name


def _take_out_round_trips(model: Any) -> None:
    """Joins nodes that stayed in float32 directly.

    The converter casts what each of them gives to float16, where it would overflow, and back for the next; and it adds
    the same Cast once for every use, by the same name.
    """
    graph = model.graph
    narrowed = {node.output[0]: node.input[0] for node in graph.node if node.name.endswith("_cast_to_fp16_node")}
    direct: dict[str, str] = {}
    seen: set[str] = set()
    for node in [node for node in graph.node if node.name.endswith("_cast_to_fp32_node")]:
        if node.input[0] in narrowed:
            direct[node.output[0]] = narrowed[node.input[0]]
        if node.input[0] in narrowed or node.name in seen:
            graph.node.remove(node)
        seen.add(node.name)
    for node in onnx_files.nodes(graph):
        for position, name in enumerate(node.input):
            if name in direct:
                node.input[position] = direct[name]
    taken = {name for node in onnx_files.nodes(graph) for name in node.input} | {value.name for value in graph.output}
    for node in [node for node in graph.node if node.output[0] in narrowed and node.output[0] not in taken]:
        graph.node.remove(node)


def _sort(model: Any) -> None:
    """Puts the nodes in the order that the specification asks for; the converter adds its Casts at the end."""
    from onnxruntime.transformers.onnx_model import OnnxModel

    OnnxModel(model).topological_sort(is_deterministic=True)


def _told_kept(kept: list[Any], limit: float) -> str:
    if not kept:
        return f"no value reached {limit:.0f}, so nothing stayed in float32"
    shown = ", ".join(f"{node.op_type} {node.name!r}" for node in kept[:5])
    rest = f" and {len(kept) - 5} more" if len(kept) > 5 else ""
    return f"{len(kept)} nodes stayed in float32: {shown}{rest}"


def _beyond_float16(model: Any) -> int:
    """How many weights are clipped: finite ones beyond float16's range, since it holds infinities as they are."""
    from onnx import TensorProto, numpy_helper

    count = 0
    for tensor in onnx_files.constants(model).values():
        if tensor.data_type == TensorProto.FLOAT:
            weights = numpy_helper.to_array(tensor)
            # The ends alone take no copy; a NaN among the weights hides them, and is looked past below.
            if weights.size and not (weights.min() >= -_LARGEST and weights.max() <= _LARGEST):
                count += int((np.isfinite(weights) & (np.abs(weights) > _LARGEST)).sum())
    return count
