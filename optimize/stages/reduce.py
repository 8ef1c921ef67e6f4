"""Stages that make a model take less: narrower types, shorter sequences, smaller images.

What goes over the wire shrinks, and with the latter two the work. All change the signature: a client has to send
something else, which `StageResult.adaptation` says step by step, and which is done to the samples wherever burnish runs
the model itself. What it costs in accuracy is measured as for any other variant.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from optimize.adaptation import describe
from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageParams, StageResult
from optimize.stages.checking import Runner, runs_on
from registry.errors import NotApplicableError
from registry.records import Adaptation, TensorSpec

# Type that is sent -> type that the model takes now.
_TAKEN = {"uint8": "float32", "float16": "float32", "int32": "int64"}


class InputTypeParams(StageParams):
    """Parameters of ``reduce.input_type``.

    Attributes:
        dtype: what is sent: ``uint8`` or ``float16`` in place of float32, ``int32`` in place of int64.
        inputs: names of the inputs; none for all of the type that is replaced.
        low: the value that 0 stands for, with ``uint8``.
        high: the value that 255 stands for, with ``uint8``.
    """

    dtype: Literal["uint8", "float16", "int32"] = "uint8"
    inputs: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> "InputTypeParams":
        if not self.low < self.high:
            raise ValueError(f"low must be below high, not {self.low:g} and {self.high:g}")
        return self


class InputType(Stage):
    """Inputs of a narrower type, cast back inside the graph: a client sends a quarter or a half of the bytes.

    Shapes stay, and outputs as they are. With ``uint8`` the graph computes ``value * (high - low) / 255 + low``, so a
    float becomes the nearest of 256 steps between the two, and one outside the nearest end. int64 to int32 loses
    nothing where values fit, which is looked at. The method is that of any quantized input; no library does it.
    """

    name = "reduce.input_type"
    Params = InputTypeParams
    changes_signature = True
    tools = ("onnx", "onnxruntime", "numpy")
    params: InputTypeParams

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Puts a Cast, and where needed a Mul and an Add, behind each of the inputs."""
        model = onnx_files.load(source)
        outputs = {value.name for value in model.graph.output}
        steps = []
        for spec in self._chosen(source):
            if spec.name in outputs:
                raise NotApplicableError(f"{self.name}: the input {spec.name!r} is an output, too")
            steps.append(self._step(spec))
            _narrow(model.graph, steps[-1], spec)
        result = self.written(
            context, onnx_files.save(model, context.out), *map(describe, steps), adaptation=tuple(steps)
        )
        _check_runs(self.name, result, context)
        return result

    def _chosen(self, source: StageInput) -> list[TensorSpec]:
        taken, wanted = _TAKEN[self.params.dtype], self.params.inputs
        fitting = {spec.name: spec for spec in source.inputs if spec.dtype == taken}
        for name in wanted:
            if name not in fitting:
                kinds = ", ".join(f"{spec.name} ({spec.dtype})" for spec in source.inputs)
                raise NotApplicableError(f"{self.name}: no input {name!r} of type {taken}; there are: {kinds}")
        if not fitting:
            raise NotApplicableError(f"{self.name}: the model has no input of type {taken} to take {self.params.dtype}")
        return [fitting[name] for name in wanted or fitting]

    def _step(self, spec: TensorSpec) -> Adaptation:
        if self.params.dtype != "uint8":
            return Adaptation(input=spec.name, way="cast", dtype=self.params.dtype)
        scale = (self.params.high - self.params.low) / 255
        return Adaptation(input=spec.name, way="cast", dtype="uint8", scale=scale, offset=self.params.low)


class SequenceLengthParams(StageParams):
    """Parameters of ``reduce.sequence_length``.

    Attributes:
        length: tokens that are kept, from the start.
        inputs: names of the inputs; none for all whole-number inputs of the shape (batch, tokens).
    """

    length: int = Field(default=128, ge=1)
    inputs: tuple[str, ...] = ()


class SequenceLength(Stage):
    """Sequences of tokens cut to their first ones: the second dimension of the inputs becomes this length, fixed.

    Types and ranks stay; outputs that have a row a token get fewer. Texts are cut where they are longer, so what is
    lost depends on the task. An encoder's work falls with the length, its attention with the length squared. The
    method is the truncation of every tokenizer.
    """

    name = "reduce.sequence_length"
    Params = SequenceLengthParams
    changes_signature = True
    tools = ("onnx", "onnxruntime", "numpy")
    params: SequenceLengthParams

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Fixes the second dimension, and tries the model."""
        length = self.params.length
        chosen = self._chosen(source)
        for spec in chosen:
            if isinstance(spec.shape[1], int) and spec.shape[1] <= length:
                raise NotApplicableError(
                    f"{self.name}: {spec.name!r} has {spec.shape[1]} tokens, no more than {length}"
                )
        steps = tuple(Adaptation(input=spec.name, way="truncate", axes=(1,), sizes=(length,)) for spec in chosen)
        return _with_sizes(self, source, context, steps)

    def _chosen(self, source: StageInput) -> list[TensorSpec]:
        wanted = self.params.inputs
        whole = {spec.name: spec for spec in source.inputs if len(spec.shape) >= 2}
        if missing := [name for name in wanted if name not in whole]:
            raise NotApplicableError(f"{self.name}: the model has no input {missing[0]!r} of two dimensions or more")
        tokens = [spec.name for spec in whole.values() if len(spec.shape) == 2 and spec.dtype in {"int64", "int32"}]
        if not wanted and not tokens:
            raise NotApplicableError(f"{self.name}: the model has no whole-number input of the shape (batch, tokens)")
        return [whole[name] for name in wanted or tokens]


class ImageSideParams(StageParams):
    """Parameters of ``reduce.image_side``.

    Attributes:
        side: the new height in pixels; the width shrinks in the same proportion.
        input: the name of the image; empty for the only input of four dimensions.
        layout: the order of its dimensions; ``auto`` takes the one where 1, 3 or 4 channels stand.
    """

    side: int = Field(default=112, ge=1)
    input: str = ""
    layout: Literal["auto", "nchw", "nhwc"] = "auto"


class ImageSide(Stage):
    """Smaller images: height and width of the input become smaller, so that every layer has less to do.

    Types and ranks stay. It applies to nets that take any size, as those that are convolutions and a global pooling
    are; whether a net does is tried, not guessed. Half the side is a quarter of the work of a convolution. Samples are
    resized with a triangle filter as wide as the ratio (bilinear with antialiasing, as Pillow and torchvision do it).
    Source of the idea: Touvron et al., "Fixing the train-test resolution discrepancy", 2019, which also tells why a
    net loses accuracy at a size that it was not trained for.
    """

    name = "reduce.image_side"
    Params = ImageSideParams
    changes_signature = True
    tools = ("onnx", "onnxruntime", "numpy")
    params: ImageSideParams

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Sets height and width, and tries the model."""
        spec = self._image(source)
        axes = self._axes(spec)
        height, width = (spec.shape[axis] for axis in axes)
        side = self.params.side
        if not isinstance(height, int) or not isinstance(width, int):
            raise NotApplicableError(
                f"{self.name}: height and width of {spec.name!r} are free already; send it smaller images"
            )
        if side >= height:
            raise NotApplicableError(f"{self.name}: {spec.name!r} is {height} high, no more than {side}")
        sizes = (side, max(1, round(width * side / height)))
        steps = (Adaptation(input=spec.name, way="resize", axes=axes, sizes=sizes),)
        return _with_sizes(self, source, context, steps)

    def _image(self, source: StageInput) -> TensorSpec:
        wanted = self.params.input
        images = [spec for spec in source.inputs if len(spec.shape) == 4 and spec.name == (wanted or spec.name)]
        if len(images) != 1:
            told = f"no input {wanted!r}" if wanted else f"{len(images)} inputs"
            raise NotApplicableError(
                f"{self.name}: the model has {told} of four dimensions", hint="Name the image with input."
            )
        return images[0]

    def _axes(self, spec: TensorSpec) -> tuple[int, int]:
        layout, channels = self.params.layout, {1, 3, 4}
        if layout == "auto":
            first, last = spec.shape[1] in channels, spec.shape[3] in channels
            if first == last:
                raise NotApplicableError(
                    f"{self.name}: where the channels of {spec.name!r} stand cannot be told from its shape "
                    f"{list(spec.shape)}",
                    hint="Say so with layout: nchw or nhwc.",
                )
            layout = "nchw" if first else "nhwc"
        return (2, 3) if layout == "nchw" else (1, 2)


def _with_sizes(stage: Stage, source: StageInput, context: Context, steps: tuple[Adaptation, ...]) -> StageResult:
    """The model with the sizes of its inputs that the steps say."""
    model = onnx_files.load(source)
    for step in steps:
        value = next(value for value in model.graph.input if value.name == step.input)
        for axis, size in zip(step.axes, step.sizes, strict=True):
            value.type.tensor_type.shape.dim[axis].Clear()
            value.type.tensor_type.shape.dim[axis].dim_value = size
    batches = _first_dims(model)
    made = onnx_files.infer_again(model, keep_outputs=False)
    for value, batch in zip(made.graph.output, batches, strict=True):
        if batch is not None:
            value.type.tensor_type.shape.dim[0].CopyFrom(batch)
    entry = onnx_files.save(made, context.out)
    result = stage.written(context, entry, *map(describe, steps), adaptation=steps)
    _check_runs(stage.name, result, context)
    return result


def _first_dims(model: Any) -> list[Any]:
    """A copy of each output's first dimension, which smaller samples do not change; None where it has none."""
    import onnx

    copies: list[Any] = []
    for value in model.graph.output:
        dims = value.type.tensor_type.shape.dim
        copies.append(onnx.TensorShapeProto(dim=[dims[0]]).dim[0] if dims else None)
    return copies


def _narrow(graph: Any, step: Adaptation, spec: TensorSpec) -> None:
    """Gives an input a narrower type, and all nodes that took it what is cast back from it."""
    import onnx

    value = next(value for value in graph.input if value.name == step.input)
    wide = value.type.tensor_type.elem_type
    value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(step.dtype))
    restored = f"{step.input}_{spec.dtype}"
    for node in onnx_files.nodes(graph):
        for position, name in enumerate(node.input):
            if name == step.input:
                node.input[position] = restored
    for inner in graph.value_info:
        if inner.name == step.input:
            inner.type.tensor_type.elem_type = value.type.tensor_type.elem_type
    made, current = [], step.input
    operations: list[tuple[str, float | None]] = [("Cast", None)]
    if (step.scale, step.offset) != (1.0, 0.0):
        operations += [("Mul", step.scale), ("Add", step.offset)]
    for number, (op_type, constant) in enumerate(operations):
        target = restored if number == len(operations) - 1 else f"{restored}_{number}"
        taken = [current]
        if constant is not None:
            taken.append(f"{target}_by")
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(constant, np.float32), taken[1]))
        options = {"to": wide} if op_type == "Cast" else {}
        made.append(onnx.helper.make_node(op_type, taken, [target], name=f"{op_type}_{target}", **options))
        current = target
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*made, *rest])


def _check_runs(stage: str, result: StageResult, context: Context) -> None:
    """Returns when the model can be run, and each output has a row a sample as it says.

    Raises:
        NotApplicableError: it cannot, or answers in another shape.
    """
    try:
        runner = Runner(result.folder / result.entry, threads=context.threads)
        feeds = runs_on(runner, result.inputs)
    except NotApplicableError as error:
        raise NotApplicableError(f"{stage}: the model does not work with such inputs; {error.message}") from error
    for spec, answer in zip(result.outputs, runner(feeds), strict=True):
        if len(spec.shape) != answer.ndim:
            raise NotApplicableError(f"{stage}: the output {spec.name!r} has other dimensions with such inputs")
