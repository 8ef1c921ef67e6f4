"""Stages that keep what a model computes and make its graph simpler."""

from pathlib import Path
from typing import Any, Literal

from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageParams, StageResult, first_line
from optimize.stages.checking import with_same_answers
from registry.errors import NotApplicableError


class OrtGraphParams(StageParams):
    """Parameters of ``simplify.ort``.

    Attributes:
        level: ``basic`` keeps to standard operators; ``extended`` adds ONNX Runtime's fused ones. There is no ``all``
            here: it bakes in layouts for the CPU at hand, in an order that differs from run to run, and a session at
            that level adds them at load time anyway.
    """

    level: Literal["basic", "extended"] = "extended"


class OrtGraph(Stage):
    """The graph as ONNX Runtime optimizes it, saved: constants folded, nodes fused, dead ones gone.

    Shapes and types of inputs and outputs stay. It saves work at load time; a session at graph level ``all`` computes
    the same from the plain model. Source: ONNX Runtime's offline graph optimizations.
    """

    name = "simplify.ort"
    Params = OrtGraphParams
    tools = ("onnxruntime",)
    params: OrtGraphParams

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Opens a session that writes its optimized graph."""
        target = context.out / onnx_files.ENTRY
        with context.scratch() as scratch:
            path = source.path
            if onnx_files.has_external_weights(path):
                # The optimized graph would go on naming the source's file of weights.
                path = scratch / onnx_files.save(onnx_files.load(source), scratch)
            optimize_with_ort(path, target, level=self.params.level, threads=context.threads)
        return self.written(context, onnx_files.ENTRY)


class TransformerFusionParams(StageParams):
    """Parameters of ``simplify.transformer``.

    Attributes:
        model_type: the family of fusions; ``bert`` fits encoders.
        if_none: what to do with a model in which nothing fuses: refuse it, or pass it on with a note.
    """

    model_type: Literal["bert", "vit", "clip", "bart", "t5", "gpt2"] = "bert"
    if_none: Literal["refuse", "pass"] = "refuse"


class TransformerFusion(Stage):
    """Attention, layer normalization and gelu as ONNX Runtime's fused operators.

    Shapes and types of inputs and outputs stay; the graph needs ONNX Runtime afterwards (domain com.microsoft).
    Source: onnxruntime.transformers.
    """

    name = "simplify.transformer"
    Params = TransformerFusionParams
    tools = ("onnx", "onnxruntime")
    params: TransformerFusionParams

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Fuses, and counts what was fused."""
        from onnxruntime.transformers.fusion_options import FusionOptions
        from onnxruntime.transformers.optimizer import optimize_model

        options = FusionOptions(self.params.model_type)
        # The default takes the mask as "first n tokens count", which is wrong for padding on the left.
        options.use_raw_attention_mask(True)
        model = onnx_files.load(source)
        before = onnx_files.op_counts(model)
        fused = optimize_model(model, self.params.model_type, opt_level=0, optimization_options=options)
        counts = {name: n for name, n in fused.get_fused_operator_statistics().items() if n > before[name]}
        if not counts:
            reason = "no attention, layer normalization or gelu that ONNX Runtime can fuse was found"
            if self.params.if_none == "pass":
                return self.unchanged(source, reason)
            raise NotApplicableError(f"{self.name}: {reason}")
        fused.topological_sort(is_deterministic=True)
        entry = onnx_files.save(fused.model, context.out)
        made = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        return self.written(context, entry, f"fused into {made}")


class Constants(Stage):
    """Constants folded, Constant nodes turned into initializers, and dead, doubled and identity nodes taken out.

    Shapes and types of inputs and outputs stay, and so does every opset: only standard operators are used, so that any
    tool can go on from here. Batch normalization, and what is added or multiplied, goes into the convolution before it.
    Answers are compared with the source's. Source: onnxslim.
    """

    name = "simplify.constants"
    tools = ("onnx", "onnxruntime", "onnxslim", "numpy")

    def requires(self, source: StageInput, context: Context) -> None:
        """Looks whether the model fits one protobuf, which onnxslim needs."""
        if onnx_files.is_large(onnx_files.load_graph(source.path)):
            raise NotApplicableError(f"{self.name} takes models below 2 GB: onnxslim works in one protobuf")

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Folds, and counts the nodes that are gone."""
        model = onnx_files.load(source)
        before = _sizes(model)
        made = folded(model)
        after = _sizes(made)
        if after == before:
            return self.unchanged(source, "there is nothing to fold")
        note = f"{before[0]} nodes became {after[0]}, Constant nodes {before[1]} became {after[1]}"
        result = self.written(context, onnx_files.save(made, context.out), note)
        return with_same_answers(self.name, source, result, threads=context.threads)


def folded(model: Any) -> Any:
    """The model with what is constant in it folded into initializers; one too large for one protobuf as it is.

    Args:
        model: an ``onnx.ModelProto``; it may be changed.
    """
    import onnx
    import onnxslim

    onnx_files.lift_constants(model)
    if onnx_files.is_large(model):
        return model
    ends = onnx.GraphProto(input=model.graph.input, output=model.graph.output)
    made = onnxslim.slim(model)
    onnx_files.lift_constants(made)
    # Inputs that no node takes are a part of the signature, too, which onnxslim does not think.
    for kept, side in ((ends.input, made.graph.input), (ends.output, made.graph.output)):
        del side[:]
        side.extend(kept)
    return made


def _sizes(model: Any) -> tuple[int, int]:
    counts = onnx_files.op_counts(model)
    return sum(counts.values()), counts["Constant"]


def optimize_with_ort(source: Path, target: Path, *, level: str, threads: int) -> None:
    """Writes the graph that ONNX Runtime makes of ``source`` at a level.

    Raises:
        NotApplicableError: ONNX Runtime cannot load the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if sum(path.stat().st_size for path in source.parent.iterdir() if path.is_file()) > onnx_files.LARGEST_FILE_BYTES:
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{target.name}.data"
        )
    errors: Any = onnxruntime.capi.onnxruntime_pybind11_state
    refused = (errors.Fail, errors.InvalidGraph, errors.InvalidArgument, errors.NotImplemented, errors.NoSuchFile)
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except refused as error:
        raise NotApplicableError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
