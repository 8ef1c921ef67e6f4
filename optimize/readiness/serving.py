"""E7: a Triton configuration beside the model, for an engine of its own or for ONNX Runtime's TensorRT provider.

Sources: the README of Triton's onnxruntime backend (accelerators, graph levels), Triton's guide to configurations, and
ONNX Runtime's page on its TensorRT execution provider.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from optimize.readiness.graph import Graph, named
from optimize.readiness.models import foreign_domains
from optimize.readiness.operators import QUANTIZED, unsupported
from optimize.readiness.profile import ENDS, Profile, Range
from optimize.readiness.rules import Hit, Rule, Target
from registry.errors import InputError, MissingExtraError

_PRECISIONS = ("FP32", "FP16", "BF16", "INT8")
_CALIBRATION_TABLES = ("int8_calibration_table_name", "int8_use_native_calibration_table")
_ACCELERATORS = {"gpu": ("tensorrt", "cuda"), "cpu": ("openvino",)}
# Graph optimization of ONNX Runtime, as ``optimization.graph.level`` has it.
_LEVELS = {-1: "basic", 0: "all", 1: "extended", 2: "disabled"}


def parse_config(text: str) -> Any:
    """The ``ModelConfig`` of a ``config.pbtxt``.

    Raises:
        InputError: it is none.
        MissingExtraError: Triton's client, which knows the schema, is not installed.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise MissingExtraError("reading a config.pbtxt", extra="triton") from error
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"the configuration is no config.pbtxt of Triton: {error}") from error


def profile_in(config: Any) -> Profile | None:
    """The shapes that a configuration gives ONNX Runtime's TensorRT provider; None where it does not, or in part."""
    given = Target(tensorrt=(10, 0), config=config).provider or {}
    ends = [_shapes(given.get(f"trt_profile_{end}_shapes", "")) for end in ENDS]
    least, best, most = ends
    if not least or not least.keys() == best.keys() == most.keys() or _unequal_ranks(ends):
        return None
    return {name: Range(min=least[name], opt=best[name], max=most[name]) for name in least}


def _shapes(text: str) -> dict[str, tuple[int, ...]]:
    """``x:1x3x8x8,mask:1x4`` as input -> shape; empty where it is not written so."""
    try:
        parts = [entry.rpartition(":") for entry in text.split(",") if entry]
        return {name: tuple(int(size) for size in shape.split("x")) for name, _, shape in parts}
    except ValueError:
        return {}


def _unequal_ranks(ends: Iterable[Mapping[str, tuple[int, ...]]]) -> list[str]:
    """The inputs whose shapes have other numbers of dimensions at one end than at another."""
    ranks: dict[str, set[int]] = {}
    for shapes in ends:
        for name, shape in shapes.items():
            ranks.setdefault(name, set()).add(len(shape))
    return [name for name, found in ranks.items() if len(found) > 1]


# --- what a configuration says -----------------------------------------------------------------------------------


def _is_plan(config: Any) -> bool:
    return bool(config.platform == "tensorrt_plan" or config.backend == "tensorrt")


def _is_onnx(config: Any) -> bool:
    return bool(config.platform == "onnxruntime_onnx" or config.backend == "onnxruntime")


def _kinds(config: Any) -> set[str]:
    """Where instances run: ``KIND_CPU`` and the like; nothing where that is left to Triton."""
    from tritonclient.grpc import model_config_pb2

    return {model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group}


def _accelerators(config: Any, kind: str) -> Mapping[str, Mapping[str, str]]:
    """Name -> parameters of the accelerators for ``gpu`` or ``cpu``."""
    given = getattr(config.optimization.execution_accelerators, f"{kind}_execution_accelerator")
    return {one.name: dict(one.parameters) for one in given}


# --- rules -------------------------------------------------------------------------------------------------------


def plan_on_cpu(graph: Graph, target: Target) -> Iterator[Hit]:
    """An engine, or the TensorRT provider, on instances without a GPU."""
    if target.config is None or "KIND_CPU" not in _kinds(target.config):
        return
    if _is_plan(target.config):
        yield Hit(message="an engine is to run on instances of KIND_CPU; TensorRT runs on GPUs only")
    elif target.provider is not None:
        yield Hit(message="the TensorRT accelerator is not used by instances of KIND_CPU", severity="warning")


def provider_settings(graph: Graph, target: Target) -> Iterator[Hit]:
    """Accelerators and settings of the TensorRT provider that there are not."""
    if target.config is None:
        return
    for kind, known in _ACCELERATORS.items():
        for name in _accelerators(target.config, kind):
            if name not in known:
                yield Hit(message=f"there is no {kind}_execution_accelerator {name!r}; it is {' or '.join(known)}")
    given = target.provider
    if given is None:
        return
    precision = given.get("precision_mode", "FP32")
    if precision not in _PRECISIONS:
        yield Hit(message=f"precision_mode is {precision!r}; it is {', '.join(_PRECISIONS)}")
    named_ends = [end for end in ENDS if f"trt_profile_{end}_shapes" in given]
    if named_ends and len(named_ends) < len(ENDS):
        yield Hit(message=f"trt_profile_{named_ends[0]}_shapes stands without the other two of min, opt and max")
    for end in named_ends:
        shapes = {entry.rpartition(":")[0] for entry in given[f"trt_profile_{end}_shapes"].split(",")}
        lacking = [value.name for value in graph.inputs if None in (graph.shape(value.name) or ())]
        if missing := [name for name in lacking if name not in shapes]:
            yield Hit(message=f"trt_profile_{end}_shapes lacks the input {missing[0]!r}", nodes=tuple(missing))
    if odd := _unequal_ranks(_shapes(given[f"trt_profile_{end}_shapes"]) for end in named_ends):
        yield Hit(message=f"the shapes of {odd[0]!r} at min, opt and max differ in rank", nodes=tuple(odd))


def int8_settings(graph: Graph, target: Target) -> Iterator[Hit]:
    """A calibration table beside Q/DQ pairs, and pairs for which int8 is not switched on."""
    given = target.provider
    pairs = tuple(named(node) for node in graph.of_type("QuantizeLinear", "DequantizeLinear"))
    if given is None or not pairs:
        return
    if table := next((name for name in _CALIBRATION_TABLES if name in given), None):
        yield Hit(message=f"{table} is given, and the model has Q/DQ pairs: the session cannot be made", nodes=pairs)
    if given.get("precision_mode", "FP32") != "INT8" and target.tensorrt < (11, 0):
        mode = given.get("precision_mode", "FP32")
        yield Hit(message=f"precision_mode is {mode}, and Q/DQ pairs need INT8 before TensorRT 11", nodes=pairs)


def engine_builds(graph: Graph, target: Target) -> Iterator[Hit]:
    """Engines that are built anew at each start, and first requests that pay for it."""
    given = target.provider
    if given is None or target.config is None:
        return
    kept = given.get("trt_engine_cache_enable") in {"1", "true"} and given.get("trt_engine_cache_path")
    if not kept:
        count = sum(group.count or 1 for group in target.config.instance_group) or 1
        each = f"each of {count} instances builds its engine" if count > 1 else "the engine is built"
        yield Hit(message=f"no engine cache is kept, so that {each} anew at each start")
    if not target.config.model_warmup:
        yield Hit(message="there is no model_warmup: the first requests wait for the build", severity="info")


def left_to_cuda(graph: Graph, target: Target) -> Iterator[Hit]:
    """Nodes that the TensorRT provider leaves to the CUDA provider, which cut the graph into pieces."""
    if target.provider is None:
        return
    checks = (foreign_domains(graph, target), unsupported(graph, target))
    left = dict.fromkeys(name for hits in checks for hit in hits for name in hit.nodes)
    left |= dict.fromkeys(named(node) for node in graph.of_type(*QUANTIZED))
    if left:
        share = len(left) / len(graph.nodes)
        message = f"{len(left)} of {len(graph.nodes)} nodes ({share:.0%}) are left to CUDA, and cut the graph there"
        yield Hit(message=message, nodes=tuple(left))


def cpu_settings(graph: Graph, target: Target) -> Iterator[Hit]:
    """Settings of the onnxruntime backend whose numbers do not mean what they seem to, or that Triton fills in."""
    config = target.config
    if config is None or not _is_onnx(config):
        return
    if config.optimization.HasField("graph") and (level := config.optimization.graph.level):
        known = ", ".join(f"{number} {name}" for number, name in _LEVELS.items())
        told = _LEVELS.get(level, "unknown")
        yield Hit(message=f"optimization.graph.level {level} means {told} here: {known}")
    if "KIND_CPU" in _kinds(config) and "intra_op_thread_count" not in config.parameters:
        yield Hit(message="intra_op_thread_count is not set: each instance takes all cores")
    if not config.max_batch_size and not config.input:
        yield Hit(message="max_batch_size and inputs are left out: Triton batches up to 4, unasked", severity="info")


def openvino_on_cpu(graph: Graph, target: Target) -> Iterator[Hit]:
    """ONNX Runtime on CPUs without the accelerator that Triton has for them."""
    config = target.config
    if config is None or not _is_onnx(config) or "KIND_CPU" not in _kinds(config):
        return
    if not _accelerators(config, "cpu"):
        yield Hit(message="instances of KIND_CPU run on ONNX Runtime's own kernels")


RULES = (
    Rule(
        id="E701", severity="error", title="engine on a CPU", check=plan_on_cpu,
        fix="Give the instance_group kind KIND_GPU, or serve the ONNX file on the CPU.",
    ),
    Rule(
        id="E702", severity="error", title="accelerator or setting that Triton does not take", check=provider_settings,
        fix="Take the settings that `burnish tensorrt` writes: precision_mode, and the three shapes of each input.",
    ),
    Rule(
        id="E703", severity="error", title="int8 set otherwise than the model's pairs want", check=int8_settings,
        fix="With Q/DQ pairs: precision_mode INT8, and no calibration table.",
    ),
    Rule(
        id="E704", severity="warning", title="engines built at each start", check=engine_builds,
        fix="Set trt_engine_cache_enable and trt_engine_cache_path on a volume that stays, and a model_warmup.",
    ),
    Rule(
        id="E705", severity="warning", title="nodes left to CUDA", check=left_to_cuda,
        fix="Make the variant for TensorRT from the model before other fusions; read E104, E201 and E202.",
    ),
    Rule(
        id="E706", severity="warning", title="settings of ONNX Runtime that mislead", check=cpu_settings,
        fix="Set threads, batches and the graph level outright; leave the level out for all optimizations.",
    ),
    Rule(
        id="E707", severity="info", title="CPU without an accelerator", check=openvino_on_cpu,
        fix="Measure it with cpu_execution_accelerator openvino, too, or take a variant for OpenVINO.",
    ),
)  # fmt: skip
