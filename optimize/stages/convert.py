"""Stages that keep an ONNX model an ONNX model: another opset, sizes fixed, or a batch freed."""

import re
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from optimize.readiness.releases import tensorrt_release, tensorrt_version, triton_release
from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageParams, StageResult, first_line
from optimize.stages.checking import Runner, alike, runs_on, with_same_answers
from registry.errors import InputError, NotApplicableError

# Initializers that are no inputs came with IR version 4; functions inside a model with 8.
_LEAST_IR = 4
_LEAST_OPSET = 7
_ANY = (_LEAST_OPSET, 99, 99)
_LEAST_IR_WITH_FUNCTIONS = 8
_NO_ADAPTER = re.compile(r"No (?:Adapter From Version \$?\d+ for|Previous Version of) (\w+)")
_SIZE = re.compile(r"^(?P<name>.+?)(?:\[(?P<axis>\d+)\])?=(?P<size>\d+)$")


class OpsetParams(StageParams):
    """Parameters of ``convert.opset``.

    Attributes:
        opset: the version of the standard operators to convert to, up or down; 0 for the model's own.
        ir_version: the version of the file's format; 0 for the lowest that goes with the opset, so that engines of
            its time read the file.
        target: what the model is for, ``triton 23.03`` or ``tensorrt 10``: the opset is then moved to the nearest that
            this takes. Empty for anything.
    """

    opset: int = Field(default=17, ge=0, le=28)
    ir_version: int = Field(default=0, ge=0, le=13)
    target: str = ""

    @field_validator("opset")
    @classmethod
    def _is_one(cls, opset: int) -> int:
        if 0 < opset < _LEAST_OPSET:
            raise ValueError(f"it is {_LEAST_OPSET} or more, or 0 for the model's own")
        return opset

    @field_validator("target")
    @classmethod
    def _is_known(cls, target: str) -> str:
        _limits_of(target)
        return target


class Opset(Stage):
    """The same model in another version of the standard operators.

    Shapes and types of inputs and outputs stay. Operators of other domains are left as they are. The result is checked
    against the specification, and its answers against the source's. Source: onnx.version_converter; where that has no
    adapter downwards (Relu, BatchNormalization) the operator is left as it is, if the checks then pass.
    """

    name = "convert.opset"
    Params = OpsetParams
    tools = ("onnx", "onnxruntime", "numpy")
    params: OpsetParams

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Converts, checks, and compares answers."""
        import onnx

        model = onnx_files.load(source)
        before = onnx_files.opset_of(model), model.ir_version
        least, most, newest_ir = _limits_of(self.params.target)
        wanted = min(max(self.params.opset or before[0], least), most)
        made = model if before[0] == wanted else self._converted(model, wanted)
        lowest = _LEAST_IR_WITH_FUNCTIONS if made.functions else _LEAST_IR
        fitting = onnx.helper.find_min_ir_version_for(list(made.opset_import), ignore_unknown=True)
        made.ir_version = self.params.ir_version or max(lowest, fitting)
        if made.ir_version > newest_ir:
            raise NotApplicableError(
                f"{self.name}: the model needs IR version {made.ir_version}, and {self.params.target} takes {newest_ir}"
            )
        if before == (wanted, made.ir_version):
            return self.unchanged(source, f"it has opset {before[0]} and IR version {before[1]} already")
        self._check(made, wanted)
        result = self.written(
            context,
            onnx_files.save(made, context.out),
            f"opset {before[0]} to {wanted}, IR version {before[1]} to {made.ir_version}",
        )
        return with_same_answers(self.name, source, result, threads=context.threads)

    def _converted(self, model: Any, after: int) -> Any:
        import onnx.inliner
        import onnx.version_converter

        if onnx_files.is_large(model):
            raise NotApplicableError(f"{self.name} takes models below 2 GB: onnx converts in one protobuf")
        if model.functions:
            # The converter drops functions that a model brings; what they stand for is put in their place.
            model = onnx.inliner.inline_local_functions(model)
        before = onnx_files.opset_of(model)
        try:
            return onnx.version_converter.convert_version(model, after)
        except Exception as error:  # the converter raises RuntimeError and its own ConvertError, by build
            if after > before or "No Adapter" not in str(error):
                raise self._refusal(model, after, str(error)) from error
        return self._converted_by_steps(model, before, after)

    def _converted_by_steps(self, model: Any, before: int, after: int) -> Any:
        """The model in a lower opset, where the converter has no adapter for an operator that hardly changed.

        In such a step the graph stays and only the version falls. The checks that follow show whether that was right:
        types and attributes must be those of the lower version, and the answers the source's.
        """
        import onnx.version_converter

        for version in range(before - 1, after - 1, -1):
            try:
                model = onnx.version_converter.convert_version(model, version)
            except Exception as error:  # as above
                if "No Adapter" not in str(error):
                    raise self._refusal(model, after, str(error)) from error
                next(item for item in model.opset_import if item.domain in {"", "ai.onnx"}).version = version
        return model

    def _refusal(self, model: Any, after: int, message: str) -> NotApplicableError:
        before = onnx_files.opset_of(model)
        found = _NO_ADAPTER.search(message)
        if not found:
            what = first_line(RuntimeError(message))
            return NotApplicableError(f"{self.name}: opset {before} cannot be converted to {after}: {what}")
        op_type = found.group(1)
        named = [node.name or node.output[0] for node in onnx_files.nodes(model.graph) if node.op_type == op_type]
        where = f" (node {named[0]!r}" + (f" and {len(named) - 1} more)" if len(named) > 1 else ")") if named else ""
        return NotApplicableError(
            f"{self.name}: {op_type}{where} of opset {before} has no form in opset {after} that the converter knows"
        )

    def _check(self, made: Any, opset: int) -> None:
        import onnx

        if onnx_files.is_large(made):
            return
        try:
            onnx.checker.check_model(made, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise NotApplicableError(
                f"{self.name}: the model is not valid in opset {opset}: {first_line(error)}"
            ) from error


def _limits_of(target: str) -> tuple[int, int, int]:
    """The oldest and the newest opset, and the newest IR version, that a target takes.

    Raises:
        ValueError: nothing is known of it.
    """
    if not target:
        return _ANY
    kind, _, release = target.partition(" ")
    try:
        if kind == "triton":
            triton = triton_release(release)
            return _LEAST_OPSET, triton.opset, triton.ir_version
        if kind == "tensorrt":
            tensorrt = tensorrt_release(tensorrt_version(release))
            return (*tensorrt.opsets, tensorrt.ir_version)
    except InputError as error:
        raise ValueError(f"{error.message}; {error.hint}") from error
    raise ValueError(f"{target!r} is none; write triton 23.03, or tensorrt 10")


class FixedShapeParams(StageParams):
    """Parameters of ``convert.fixed_shape``.

    Attributes:
        dims: ``name=size`` for every dimension of that name (``batch=1``), or ``input[axis]=size`` for one that has no
            name (``image[2]=224``).
    """

    dims: tuple[str, ...] = Field(default=("batch=1",), min_length=1)

    @field_validator("dims")
    @classmethod
    def _are_sizes(cls, dims: tuple[str, ...]) -> tuple[str, ...]:
        for text in dims:
            found = _SIZE.match(text)
            if found is None or not int(found["size"]):
                raise ValueError(f"{text!r} is no dimension with its size; write name=size, or input[axis]=size")
        return dims


class FixedShape(Stage):
    """Free dimensions fixed at sizes; then what has become constant is folded.

    Names, types and ranks of inputs and outputs stay. The model takes these sizes only from then on, which its
    signature says. Source: onnxruntime.tools.onnx_model_utils, and `simplify.constants` for the rest.
    """

    name = "convert.fixed_shape"
    Params = FixedShapeParams
    changes_signature = True
    tools = ("onnx", "onnxruntime", "onnxslim", "numpy")
    params: FixedShapeParams

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Sets the sizes, infers all others, folds, and compares answers."""
        from optimize.stages.simplify import folded

        model = onnx_files.load(source)
        for text in self.params.dims:
            self._fix(model.graph, text)
        made = folded(onnx_files.infer_again(model, keep_outputs=True))
        result = self.written(context, onnx_files.save(made, context.out), f"fixed {', '.join(self.params.dims)}")
        return with_same_answers(self.name, source, result, threads=context.threads)

    def _fix(self, graph: Any, text: str) -> None:
        from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

        found = _SIZE.match(text)
        assert found is not None  # the parameters were validated
        size = int(found["size"])
        if found["axis"] is not None:
            self._fix_axis(graph, found["name"], int(found["axis"]), size)
            return
        free = sorted({dim.dim_param for value in graph.input for dim in _dims(value) if dim.dim_param})
        if found["name"] not in free:
            known = f"There are: {', '.join(free)}." if free else "Unnamed ones are written input[axis]=size."
            raise NotApplicableError(f"{self.name}: no input has a free dimension {found['name']!r}", hint=known)
        make_dim_param_fixed(graph, found["name"], size)

    def _fix_axis(self, graph: Any, name: str, axis: int, size: int) -> None:
        from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

        value = next((value for value in graph.input if value.name == name), None)
        if value is None or axis >= len(_dims(value)):
            raise NotApplicableError(f"{self.name}: the model has no input {name!r} with an axis {axis}")
        dim = _dims(value)[axis]
        if dim.HasField("dim_value") and dim.dim_value != size:
            raise NotApplicableError(f"{self.name}: axis {axis} of {name!r} is fixed at {dim.dim_value} already")
        if dim.dim_param:
            make_dim_param_fixed(graph, dim.dim_param, size)
        dim.dim_value = size


class FreeBatch(Stage):
    """A batch that the model fixes at 1 made free, so that a server can batch.

    The first dimension of each input and output becomes ``batch``. A Reshape to a constant shape that begins with 1
    gets a -1 there, or a 0 where another -1 stands; all else is left. Whether that was right is proved and not guessed:
    the model is run on a batch of 1 and a batch of 3, and each row must be the source's answer to that row alone. The
    same rule as that of several exporters; no library does it. Types and ranks stay.
    """

    name = "convert.free_batch"
    changes_signature = True
    tools = ("onnx", "onnxruntime", "numpy")

    def requires(self, source: StageInput, context: Context) -> None:
        """Looks whether every input fixes its batch at 1."""
        other = [spec for spec in source.inputs if not spec.shape or spec.shape[0] != 1]
        if other or not source.inputs:
            told = f"{other[0].name!r} has shape {list(other[0].shape)}" if other else "it has none"
            raise NotApplicableError(f"{self.name} takes a model whose inputs all have a batch fixed at 1, but {told}")

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Frees the first dimension, and proves it."""
        model = onnx_files.load(source)
        reshaped = _free_reshapes(model)
        for value in (*model.graph.input, *model.graph.output):
            if _dims(value):
                _dims(value)[0].Clear()
                _dims(value)[0].dim_param = "batch"
        made = onnx_files.infer_again(model, keep_outputs=True)
        result = self.written(
            context, onnx_files.save(made, context.out), f"batch free, {reshaped} constant shapes of Reshape with it"
        )
        self._prove(source, result, context)
        return result

    def _prove(self, source: StageInput, result: StageResult, context: Context) -> None:
        alone, free = (Runner(path, threads=context.threads) for path in (source.path, result.folder / result.entry))
        rows = [runs_on(alone, source.inputs, seed=context.seed + number) for number in range(3)]
        wanted = [alone(row) for row in rows]
        for count in (1, 3):
            feeds = {name: np.concatenate([row[name] for row in rows[:count]]) for name in rows[0]}
            try:
                answers = free(feeds)
            except NotApplicableError as error:
                raise NotApplicableError(
                    f"{self.name}: the graph holds on to a batch of 1; with {count} rows {error.message}"
                ) from error
            for number, (name, answer) in enumerate(zip(free.outputs, answers, strict=True)):
                together = np.concatenate([one[number] for one in wanted[:count]]) if wanted[0][number].ndim else None
                if together is None or not alike(together, answer):
                    raise NotApplicableError(
                        f"{self.name}: the graph holds on to a batch of 1; its output {name!r} for {count} rows "
                        "at once is not what each row gives alone"
                    )


def _free_reshapes(model: Any) -> int:
    """Frees the leading 1 of constant shapes of Reshape nodes; returns how many."""
    from onnx import numpy_helper

    known = onnx_files.constants(model)
    count = 0
    for position, node in enumerate(model.graph.node):
        if node.op_type != "Reshape" or node.input[1] not in known:
            continue
        shape = numpy_helper.to_array(known[node.input[1]]).copy()
        if not shape.size or shape[0] != 1:
            continue
        takes_zero = not any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute)
        if -1 in shape and not takes_zero:
            continue
        shape[0] = 0 if -1 in shape else -1
        # Other nodes may take the same tensor, so this one gets its own.
        node.input[1] = f"{node.input[1]}_free_{position}"
        model.graph.initializer.append(numpy_helper.from_array(shape, node.input[1]))
        count += 1
    return count


def _dims(value: Any) -> Any:
    return value.type.tensor_type.shape.dim
