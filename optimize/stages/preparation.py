"""A float32 graph made ready to be quantized: what every stage of the family ``quantize`` does first.

Between steps the model is a file, and no step keeps a copy while the next one works: a stage needs about the memory
that the library would need by itself.
"""

import contextlib
import difflib
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimize.stages import onnx_files
from optimize.stages.base import StageInput, StageParams, first_line
from registry.errors import InputError, NotApplicableError

logger = logging.getLogger(__name__)

PREPARED = "prepared.onnx"
# Quantization per channel needs DequantizeLinear with an axis, which opset 13 brought.
_LEAST_OPSET = 13


class FloatNodesParams(StageParams):
    """Parameters of every stage that quantizes nodes of a graph.

    Attributes:
        float_nodes: names of nodes that stay in float32. They are those of the prepared graph (see `prepare`), which
            keeps the names of the original nodes that it keeps.
    """

    float_nodes: tuple[str, ...] = ()


def prepare(source: StageInput, scratch: Path, *, stage: str = "quantization") -> tuple[Any, list[str]]:
    """Writes the model made ready for quantization to ``prepared.onnx`` in ``scratch``.

    Constant nodes become initializers, batch normalization is folded into convolutions, shapes are inferred (with
    sympy), and an opset below 13 is raised. Every node has a name of its own: one without is named
    ``<operator>_<first output>``, and one that repeats a name gets a number. The same model gives the same names.
    Source: onnxruntime.quantization.quant_pre_process.

    Args:
        source: the model; it is not written to.
        scratch: a folder for files in between.
        stage: who asks, for messages.

    Returns:
        The prepared graph without its weights (see `onnx_files.load_graph`), and notes on it.

    Raises:
        NotApplicableError: the model is not in float32, or its opset cannot be raised.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    given, large, notes = _given(source, scratch, stage)
    # Absolute, because symbolic inference runs in another working directory.
    given, target = given.absolute(), scratch.absolute() / PREPARED
    common = {
        "output_model_path": target,
        "save_as_external_data": large,
        "all_tensors_to_one_file": True,
        "external_data_location": f"{PREPARED}.data",
    }
    if not large:
        notes += _prepare_symbolically(quant_pre_process, given, common, scratch)
    if not target.exists():
        quant_pre_process(given, skip_symbolic_shape=True, **common)
    for path in scratch.glob("given.onnx*"):
        path.unlink()
    graph = onnx_files.load_graph(target)
    if _name_nodes(graph) | _own_transposed(graph):
        model = load(target)
        _name_nodes(model)
        _own_transposed(model)
        write(model, target, large=large)
    return graph, notes


def _prepare_symbolically(
    quant_pre_process: Callable[..., None], given: Path, common: dict[str, Any], scratch: Path
) -> list[str]:
    """Prepares with symbolic shape inference; where that gives up, no file is written and a note says so.

    It copies the model several times over and takes minutes above 2 GB, so that it is not for large ones.
    """
    try:
        # Where it gives up, symbolic inference leaves a copy of the model in the working directory.
        with contextlib.chdir(scratch):
            quant_pre_process(given, auto_merge=True, **common)
    except Exception as error:  # symbolic inference gives up with a bare Exception, and works without it, too
        logger.debug("symbolic shape inference gave up: %s", error)
        common["output_model_path"].unlink(missing_ok=True)
        return ["shapes were inferred without symbolic inference, which gave up on this graph"]
    return []


def load(path: Path) -> Any:
    """The model in a file of ours, with its weights in memory."""
    import onnx

    return onnx.load(str(path))


def write(model: Any, path: Path, *, large: bool) -> None:
    """Writes the model; where it is large, its weights go into ``<path>.data``, and are taken out of ``model``."""
    import onnx

    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would append to it
    onnx.save(model, str(path), save_as_external_data=large, location=data.name)


def is_large(scratch: Path) -> bool:
    """Whether the prepared model was too large for one file."""
    return (scratch / f"{PREPARED}.data").exists()


def check_float_nodes(stage: str, model: Any, names: tuple[str, ...]) -> None:
    """Returns when each name is that of a node of the prepared graph.

    Raises:
        InputError: one is not; the message names the nearest.
    """
    known = [node.name for node in model.graph.node]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            listed = f"Nodes are named {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}."
            raise InputError(
                f"{stage}: float_nodes names {name!r}, and the prepared graph has no such node",
                hint=f"Did you mean {nearest[0]!r}?" if nearest else listed,
            )


def _given(source: StageInput, scratch: Path, stage: str) -> tuple[Path, bool, list[str]]:
    """A file that the library takes, whether it is large, and notes. It is the source's own where that will do."""
    notes: list[str] = []
    model = onnx_files.load_graph(source.path)
    onnx_files.refuse_quantized(stage, model)
    weights = {tensor.name for tensor in model.graph.initializer}
    rewritten = onnx_files.names_other_files(model) or any(value.name in weights for value in model.graph.input)
    opset = next((item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}), _LEAST_OPSET)
    if not _name_nodes(model) and not rewritten and opset >= _LEAST_OPSET:
        return source.path, source.path.stat().st_size > onnx_files.LARGEST_FILE_BYTES, notes
    model = onnx_files.load(source)
    if opset < _LEAST_OPSET:
        model = _raised(model, opset)
        notes.append(f"opset raised from {opset} to {_LEAST_OPSET}")
    _name_nodes(model)
    large = onnx_files.is_large(model)
    write(model, scratch / "given.onnx", large=large)
    return scratch / "given.onnx", large, notes


def _name_nodes(model: Any) -> bool:
    """Gives every node of the outer graph a name of its own; returns whether one had none."""
    taken: set[str] = set()
    changed = False
    for node in model.graph.node:
        wanted = node.name or f"{node.op_type}_{next(filter(None, node.output), '')}"
        name, number = wanted, 2
        while name in taken:
            name, number = f"{wanted}_{number}", number + 1
        taken.add(name)
        if name != node.name:
            node.name, changed = name, True
    return changed


def _own_transposed(model: Any) -> bool:
    """Gives a Gemm with ``transB`` a weight of its own; returns whether one shared it.

    ONNX Runtime turns the weight itself when it makes such a Gemm a MatMul, and so spoils it for others.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = Counter(name for node in onnx_files.nodes(model.graph) for name in node.input)
    changed = False
    for position, node in enumerate(model.graph.node):
        if node.op_type != "Gemm" or not any(one.name == "transB" and one.i for one in node.attribute):
            continue
        name = node.input[1]
        if name in tensors and readers[name] > 1:
            own = model.graph.initializer.add()
            own.CopyFrom(tensors[name])
            own.name = node.input[1] = f"{name}/of_gemm_{position}"
            readers[name] -= 1
            changed = True
    return changed


def _raised(model: Any, opset: int) -> Any:
    import onnx.version_converter

    try:
        return onnx.version_converter.convert_version(model, _LEAST_OPSET)
    except Exception as error:  # the converter raises RuntimeError and its own ConvertError, by build
        raise NotApplicableError(
            f"quantization per channel needs opset {_LEAST_OPSET}, and this model of opset {opset} cannot be raised: "
            f"{first_line(error)}"
        ) from error
