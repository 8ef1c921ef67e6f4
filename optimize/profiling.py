"""Where a model's time goes in an engine: the graph that really runs, its operators' times and multiply-adds.

ONNX Runtime writes the graph it made of the model, and a profile with the shapes of each node's tensors. OpenVINO
gives its execution graph, with shapes once it has run, and a time for each node. Operators that are not known to
multiply matrices count no multiply-adds.
"""

import json
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.adaptation import adapt, as_jsonable, from_jsonable
from optimize.engines.local import Limits, run_in_child
from optimize.fidelity import thread_limits
from optimize.samples import load_samples
from optimize.screening import time_runs
from profiles.serving.session import GRAPH_LEVELS, import_engine
from registry import codec
from registry.errors import StageError
from registry.records import Adaptation, EngineGraph, EngineSpec, Estimate, OperatorShare

TIMING_S = 1.5
_FEWEST_RUNS, _MOST_RUNS, _WARM_UP_RUNS = 3, 50, 2

_ORT_FATAL = 4
_KERNEL = "_kernel_time"

# Operators of ONNX and of ONNX Runtime that multiply and add, each with the place of its weight among the inputs.
_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_TRANSPOSED_CONVOLUTIONS = {"ConvTranspose": 1, "QLinearConvTranspose": 3}
_PRODUCTS = frozenset(
    {"MatMul", "FusedMatMul", "FusedMatMulActivation", "Gemm", "FusedGemm", "QGemm", "MatMulInteger",
     "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"}
)  # fmt: skip
_ATTENTION = frozenset({"Attention", "QAttention"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
# These take float32 and compute in int8 inside.
_QUANTIZING = frozenset({"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
# Their time is that of the nodes inside them, which are listed, too.
_CONTROL = frozenset({"If", "Loop", "Scan"})
_ORT_KINDS = {"float": "float32", "double": "float64", "uint8": "int8"}
_OPENVINO_KINDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "u8": "int8", "i8": "int8"}
_NARROW_WEIGHTS = {"u4": "int4 weights", "i4": "int4 weights", "u8": "int8 weights", "i8": "int8 weights"}

Shape = tuple[int, ...]


def profile_variant(
    entry: Path,
    engine: EngineSpec,
    *,
    samples: Path,
    batch_size: int,
    threads: int = 1,
    timing_s: float = TIMING_S,
    adaptation: Sequence[Adaptation] = (),
    limits: Limits | None = None,
    cpus: Sequence[int] | None = None,
) -> EngineGraph:
    """The graph that an engine makes of a model, timed and profiled in a child process.

    Args:
        entry: the model file.
        engine: the engine, and how it is set.
        samples: the ``.npz`` that the batch is made of.
        batch_size: samples in a run; a model that fixes its batch is profiled at that.
        threads: of the session.
        timing_s: wall time for the timing without the profiler, and again with it.
        adaptation: how the model's inputs come from the samples.
        limits: of the child.
        cpus: the child may run on, or None for all.

    Raises:
        StageError: the model cannot be opened or run in this engine, or the samples do not fit.
        InputError: the samples cannot be read.
        ChildFailure: the child was stopped by a limit, or died.
    """
    with tempfile.TemporaryDirectory(prefix="burnish-profile-") as work:
        found = run_in_child(
            "optimize.profiling:profile_here",
            {
                "entry": str(entry.resolve()),
                "engine": codec.to_jsonable(engine),
                "samples": str(samples.resolve()),
                "batch_size": batch_size,
                "threads": threads,
                "timing_s": timing_s,
                "adaptation": as_jsonable(adaptation),
                "work": work,
            },
            limits=limits,
            cpus=cpus,
            environment=thread_limits(threads),
        )
    return codec.from_jsonable(EngineGraph, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Profile:
    """What a profiler says: operator -> time of some runs, and nodes; kind -> multiply-adds of one run."""

    times: Mapping[str, float]
    nodes: Mapping[str, int]
    macs: Mapping[str, int]
    unfused_qdq: int
    rows: int


def profile_here(
    *,
    entry: str,
    engine: Mapping[str, str],
    samples: str,
    batch_size: int,
    threads: int,
    timing_s: float,
    work: str,
    adaptation: Sequence[Any] = (),
) -> dict[str, Any]:
    """Times and profiles a model in this process; the child's side of `profile_variant`.

    Returns:
        An `EngineGraph` as JSON has it.
    """
    spec = codec.from_jsonable(EngineSpec, dict(engine))
    batch = adapt(next(load_samples(Path(samples)).batches(batch_size)), from_jsonable(adaptation))
    version, time_ms = _timed(entry, spec, batch, threads, timing_s)
    profiler = _profile_openvino if spec.name == "openvino" else _profile_ort
    profile = profiler(Path(entry), spec, batch, threads=threads, budget_s=timing_s, work=Path(work))
    total = sum(profile.times.values()) or 1.0
    shares = [
        OperatorShare(operator=name, nodes=profile.nodes[name], time_share=round(spent / total, 6))
        for name, spent in sorted(profile.times.items(), key=lambda item: -item[1])
    ]
    graph = EngineGraph(
        engine=spec,
        engine_version=version,
        batch_size=_rows(batch),
        threads=threads,
        time=time_ms,
        operators=tuple(shares),
        macs={kind: round(count / profile.rows) for kind, count in sorted(profile.macs.items()) if count},
        unfused_qdq=profile.unfused_qdq,
    )
    plain: dict[str, Any] = codec.to_jsonable(graph)
    return plain


def _timed(
    entry: str, spec: EngineSpec, batch: Mapping[str, Any], threads: int, timing_s: float
) -> tuple[str, Estimate]:
    """The engine's version and the time of a run, in a session as it is served, which is closed again."""
    from profiles.serving.session import SessionError, open_session

    try:
        session = open_session(entry, engine=spec.name, precision=spec.precision, graph_level=spec.graph_level,
                               threads=threads)  # fmt: skip
        return session.engine_version, time_runs(lambda _: session.run(batch), timing_s)
    except SessionError as error:
        raise StageError(str(error)) from error


def _times(budget_s: float) -> Iterator[int]:
    """The numbers of runs that fit into a time, some at least."""
    deadline = time.perf_counter() + budget_s
    for number in range(_MOST_RUNS):
        if number >= _FEWEST_RUNS + _WARM_UP_RUNS and time.perf_counter() > deadline:
            return
        yield number


# --- ONNX Runtime ----------------------------------------------------------------------------------------------


def _profile_ort(
    entry: Path, spec: EngineSpec, batch: Mapping[str, Any], *, threads: int, budget_s: float, work: Path
) -> _Profile:
    model = _named(entry)
    options: dict[str, Any] = {"threads": threads, "folder": entry.parent, "work": work}
    graph, events, rows = _run_ort(model, spec.graph_level, batch, budget_s=budget_s, **options)
    shares = _warm_events(events)
    times: dict[str, float] = defaultdict(float)
    nodes: dict[str, set[str]] = defaultdict(set)
    for event in shares:
        times[event["args"]["op_name"]] += event["dur"]
        nodes[event["args"]["op_name"]].add(event["name"])
    counted = graph
    if spec.graph_level == "all":
        # The last level pads channels to the width of a vector, which would count what is no part of the model.
        counted, events, _ = _run_ort(model, "extended", batch, budget_s=0, **options)
    return _Profile(
        times=times,
        nodes={operator: len(names) for operator, names in nodes.items()},
        macs=_ort_totals(counted, _warm_events(events, last=True)),
        unfused_qdq=unfused_pairs(graph),
        rows=rows,
    )


def _run_ort(
    model: str | bytes,
    level: str,
    batch: Mapping[str, Any],
    *,
    budget_s: float,
    threads: int,
    folder: Path,
    work: Path,
) -> tuple[Any, list[dict[str, Any]], int]:
    """The graph that ONNX Runtime makes of a model, the events of its profile, and the rows of a run."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, GRAPH_LEVELS[level])
    options.log_severity_level = _ORT_FATAL
    for key in ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning"):
        options.add_session_config_entry(key, "0")
    # Weights go into a file of their own, so that the graph is small and is never beyond protobuf's 2 GiB.
    written = work / f"{level}.onnx"
    options.optimized_model_filepath = str(written)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{level}.bin")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.enable_profiling = True
    options.profile_file_prefix = str(work / level)
    # A model of bytes has no folder of its own.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    fed = _fitted(batch, [(port.name, port.shape) for port in session.get_inputs()])
    for _ in _times(budget_s):
        session.run(None, fed)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return onnx.load(str(written), load_external_data=False).graph, events, _rows(fed)


def _named(entry: Path) -> str | bytes:
    """The model with a name of its own for each node, by which its profile tells them apart: its file, or bytes."""
    import onnx

    from optimize.stages.onnx_files import nodes

    model = onnx.load(str(entry), load_external_data=False)
    taken: set[str] = set()
    renamed = False
    inside = (node for function in model.functions for node in function.node)
    for number, node in enumerate((*nodes(model.graph), *inside)):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}#{number}"
            renamed = True
        taken.add(node.name)
    return bytes(model.SerializeToString()) if renamed else str(entry)


def _fitted(batch: Mapping[str, Any], inputs: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, Any]:
    """The batch, cut or filled up to the batch that the model fixes, if it does."""
    fixed = {shape[0] for _, shape in inputs if len(shape) and isinstance(shape[0], int)}
    rows = _rows(batch)
    if len(fixed) != 1 or fixed == {rows}:
        return dict(batch)
    size = fixed.pop()
    return {name: array[[min(i, rows - 1) for i in range(size)]] for name, array in batch.items()}


def _rows(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))


def _warm_events(events: Sequence[Mapping[str, Any]], *, last: bool = False) -> list[Mapping[str, Any]]:
    """The kernels of the runs after the warm-up, or of the last run only."""
    runs = [event["ts"] for event in events if event.get("cat") == "Session" and event["name"] == "model_run"]
    begin = runs[-1 if last else _WARM_UP_RUNS]
    return [
        event
        for event in events
        if event.get("cat") == "Node"
        and event["name"].endswith(_KERNEL)
        and event["args"]["op_name"] not in _CONTROL
        and event["ts"] >= begin
    ]


def _ort_totals(graph: Any, events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Kind of arithmetic -> multiply-adds of the kernels of one run."""
    known, dims = _by_name(graph)
    macs: Counter[str] = Counter()
    for event in events:
        node = known.get(event["name"].removesuffix(_KERNEL))
        if node is not None:
            kind, count = _ort_macs(node, dims, event["args"])
            macs[kind] += count
    return macs


def unfused_pairs(graph: Any) -> int:
    """DequantizeLinear nodes of an ONNX graph that read from a QuantizeLinear, or a weight."""
    from optimize.stages.onnx_files import nodes

    quantized = {name for node in nodes(graph) if node.op_type == "QuantizeLinear" for name in node.output}
    constant = {tensor.name for tensor in graph.initializer}
    return sum(node.op_type == "DequantizeLinear" and node.input[0] in quantized | constant for node in nodes(graph))


def _by_name(graph: Any) -> tuple[dict[str, Any], dict[str, Shape]]:
    """The nodes by name, and the sizes of the weights by name; those of inner graphs, too."""
    from optimize.stages.onnx_files import nodes

    found = {node.name: node for node in nodes(graph)}
    graphs = [graph, *(inner for node in nodes(graph) for a in node.attribute for inner in (a.g, *a.graphs))]
    return found, {tensor.name: tuple(tensor.dims) for inner in graphs for tensor in inner.initializer}


def _ort_macs(node: Any, dims: Mapping[str, Shape], told: Mapping[str, Any]) -> tuple[str, int]:
    """The kind of arithmetic of a node, and its multiply-adds in one run.

    The profile leaves out weights that were packed for the kernel; their sizes come from the graph.
    """
    import onnx

    inputs, outputs = _tensors(told["input_type_shape"]), _tensors(told["output_type_shape"])
    if not inputs or not outputs:
        return "", 0
    settings = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    shapes = [shape for _, shape in inputs]
    known = [*shapes, *[()] * len(node.input)]  # a weight that is computed is in the profile, at its place
    weights = [dims.get(name, known[place]) for place, name in enumerate(node.input)]
    count = multiply_adds(node.op_type, shapes, outputs[0][1], weights, settings)
    if node.op_type == "MatMulNBits":
        return f"int{settings['bits']} weights", count
    element = inputs[0][0]
    return "int8" if node.op_type in _QUANTIZING else _ORT_KINDS.get(element, element), count


def multiply_adds(
    operator: str, inputs: Sequence[Shape], output: Shape, weights: Sequence[Shape], settings: Mapping[str, Any]
) -> int:
    """Multiply-adds of an operator on tensors of these sizes; 0 for one that is not known to multiply matrices.

    Args:
        operator: its type.
        inputs: sizes of the tensors that the profile names, in order.
        output: sizes of the first output.
        weights: sizes of the inputs in the node's order, packed weights among them.
        settings: its attributes.
    """
    first, tokens = inputs[0], math.prod(inputs[0][:2])
    if operator in _CONVOLUTIONS:
        return math.prod(output) * math.prod(weights[_CONVOLUTIONS[operator]][1:])
    if operator in _TRANSPOSED_CONVOLUTIONS:
        return math.prod(first) * math.prod(weights[_TRANSPOSED_CONVOLUTIONS[operator]][1:])
    if operator in _PRODUCTS:
        return _product_macs(first, output, transposed=bool(settings.get("transA")))
    if operator == "MatMulNBits":
        return math.prod(output) * int(settings["K"])
    if operator in _ATTENTION and len(first) == 3:
        return tokens * (math.prod(weights[1]) + 2 * first[1] * output[-1])
    if operator == "MultiHeadAttention" and len(inputs) > 1 and len(first) == len(inputs[1]) == 3:
        return 2 * math.prod(first) * inputs[1][1]
    if operator in _RECURRENT:
        return tokens * (math.prod(weights[1]) + math.prod(weights[2]))
    return 0


def _tensors(told: Sequence[Mapping[str, Sequence[int]]]) -> list[tuple[str, Shape]]:
    """(type, sizes) of each tensor of a profile's list."""
    return [(element, tuple(shape)) for one in told for element, shape in one.items()]


def _product_macs(first: Shape, output: Shape, *, transposed: bool = False) -> int:
    if not first:
        return 0
    return math.prod(output) * first[-2 if transposed and len(first) > 1 else -1]


# --- OpenVINO --------------------------------------------------------------------------------------------------


def _profile_openvino(
    entry: Path, spec: EngineSpec, batch: Mapping[str, Any], *, threads: int, budget_s: float, work: Path
) -> _Profile:
    openvino = import_engine("openvino")
    settings: dict[str, Any] = {
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": True,
    }
    if spec.precision == "float32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    core = openvino.Core()
    model = core.read_model(str(entry))
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    ports = [(port.get_any_name(), _sizes(port)) for port in model.inputs]
    fed = _fitted(batch, ports)
    spent: dict[str, float] = defaultdict(float)
    for number in _times(budget_s):
        request.infer(fed)
        if number < _WARM_UP_RUNS:
            continue
        for one in request.get_profiling_info():
            if one.status == openvino.ProfilingInfo.Status.EXECUTED:
                spent[one.node_name] += one.real_time.total_seconds()
    # The execution graph has the shapes of the last run.
    ran = compiled.get_runtime_model().get_ordered_ops()
    model.reshape({name: list(array.shape) for name, array in fed.items()})
    return _read_openvino(ran, spent, _inner_macs(model), rows=_rows(fed))


def _sizes(port: Any) -> list[int | None]:
    return [dim.get_length() if dim.is_static else None for dim in port.get_partial_shape()]


def _read_openvino(ran: Sequence[Any], spent: Mapping[str, float], inner: Mapping[str, int], *, rows: int) -> _Profile:
    times: dict[str, float] = defaultdict(float)
    nodes: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    unfused = 0
    for op in ran:
        layer = _told(op, "layerType")
        if op.get_friendly_name() not in spent:
            continue
        times[layer] += spent[op.get_friendly_name()]
        nodes[layer] += 1
        macs[_openvino_kind(op, layer)] += _openvino_macs(op, layer, inner)
        if layer == "FakeQuantize" and _told(op.input(0).get_source_output().get_node(), "layerType") != "Input":
            unfused += 1
    return _Profile(times=times, nodes=nodes, macs=macs, unfused_qdq=unfused, rows=rows)


def _told(op: Any, key: str) -> str:
    known = op.get_rt_info()
    return str(known[key].value) if key in known else ""


def _openvino_kind(op: Any, layer: str) -> str:
    precision = _told(op, "runtimePrecision")
    kind = _OPENVINO_KINDS.get(precision, precision)
    if layer.startswith("FullyConnected") and kind != "int8" and len(op.inputs()) > 1:
        weight = _told(op.input(1).get_source_output().get_node(), "outputPrecisions")
        return _NARROW_WEIGHTS.get(weight, kind)
    return kind


def _openvino_macs(op: Any, layer: str, inner: Mapping[str, int]) -> int:
    """Multiply-adds of a node of the execution graph in the last run."""
    shapes = [tuple(size or 0 for size in _sizes(port)) for port in op.inputs()]
    output = tuple(size or 0 for size in _sizes(op.output(0))) if op.outputs() else ()
    if len(shapes) > 1 and layer in {"Convolution", "Deconvolution"}:
        # Weights of groups have one dimension more than the image, and the groups first.
        kernel = math.prod(shapes[1][1 + len(shapes[1]) - len(output) :])
        return math.prod(output if layer == "Convolution" else shapes[0]) * kernel
    if layer.startswith("FullyConnected"):
        return _product_macs(shapes[0], output)
    if layer == "MatMul" and len(shapes[0]) > 1 and len(output) > 1:
        return _product_macs(shapes[0], output, transposed=shapes[0][-2] != output[-2])
    # A fused subgraph tells which of the model's layers went into it.
    return sum(inner.get(name, 0) for name in set(_told(op, "originalLayersNames").split(",")))


def _inner_macs(model: Any) -> dict[str, int]:
    """Multiply-adds of the model's matrix products by name, where all its shapes are known."""
    found = {}
    for op in model.get_ops():
        if op.get_type_name() not in {"MatMul", "ScaledDotProductAttention"}:
            continue
        sizes = [_sizes(port) for port in (*op.inputs()[:2], op.output(0))]
        if any(None in shape for shape in sizes):
            continue
        first, second, output = (tuple(size or 0 for size in shape) for shape in sizes)
        if op.get_type_name() == "MatMul":
            transposed = bool(op.get_attributes().get("transpose_a"))
            found[op.get_friendly_name()] = _product_macs(first, output, transposed=transposed)
        else:
            found[op.get_friendly_name()] = 2 * math.prod(output) * second[-2]
    return found
