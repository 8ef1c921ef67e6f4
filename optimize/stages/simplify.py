"""Stages that keep what a model computes and make its graph simpler."""

from pathlib import Path
from typing import Any, Literal

from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageParams, StageResult
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
    if sum(path.stat().st_size for path in source.parent.iterdir() if path.is_file()) > 1_900_000_000:
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{target.name}.data"
        )
    errors: Any = onnxruntime.capi.onnxruntime_pybind11_state
    refused = (errors.Fail, errors.InvalidGraph, errors.InvalidArgument, errors.NotImplemented, errors.NoSuchFile)
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except refused as error:
        raise NotApplicableError(f"ONNX Runtime cannot load the model: {str(error).splitlines()[0][:300]}") from error
