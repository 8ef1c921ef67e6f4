"""T: what Triton's own onnxruntime backend takes in a release. CPU and CUDA alike; TensorRT's rules are E."""

from collections import defaultdict
from collections.abc import Iterator

from optimize.readiness.graph import Graph, named
from optimize.readiness.releases import CONTRIB_SINCE, TYPE_SINCE, TritonRelease, triton_release
from optimize.readiness.rules import Finding, Severity

# Types that requests carry and that the backend hands to ONNX Runtime.
_CARRIED = frozenset({
    "BOOL", "FLOAT16", "FLOAT", "DOUBLE", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64",
    "STRING",
})  # fmt: skip
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})

# Rule -> what it finds, and what to do.
TRITON_RULES: dict[str, tuple[Severity, str, str]] = {
    "T101": ("error", "opset too new", "Convert the model to an older opset (onnx.version_converter)."),
    "T102": (
        "error",
        "IR version too new",
        "Save the model with an older ir_version; its opset decides what it needs.",
    ),
    "T103": ("error", "input or output of a type that is not carried", "Cast inside of the model."),
    "T104": ("error", "operator that its ONNX Runtime lacks", "Leave out the fusion or quantization that made it."),
    "T105": ("error", "tensor type that its ONNX Runtime lacks", "Take a variant without it, or a later release."),
    "T106": ("error", "bfloat16", "Take float32 or float16: there are no bfloat16 kernels to rely on."),
    "T107": ("error", "opset of ai.onnx.ml too new", "Take the import out where no node uses it."),
}


def check_triton(graph: Graph, release: str) -> tuple[Finding, ...]:
    """What the stock Triton of a release would refuse, by id.

    Raises:
        InputError: nothing is known of the release.
    """
    known = triton_release(release)
    findings = []
    for rule, message, nodes in _find(graph, known):
        severity, _, fix = TRITON_RULES[rule]
        versions = f"Triton {release} (ONNX Runtime {known.onnxruntime})"
        findings.append(Finding(rule=rule, severity=severity, versions=versions, message=message, nodes=nodes, fix=fix))
    return tuple(sorted(findings, key=lambda finding: finding.rule))


def _find(graph: Graph, known: TritonRelease) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    if graph.opset > known.opset:
        yield "T101", f"the model has opset {graph.opset}; {known.opset} is the newest", ()
    for entry in graph.model.opset_import:
        if entry.domain == "ai.onnx.ml" and entry.version > known.ml_opset:
            yield "T107", f"the model imports ai.onnx.ml {entry.version}; {known.ml_opset} is the newest", ()
    if graph.model.ir_version > known.ir_version:
        yield "T102", f"the model has IR version {graph.model.ir_version}; {known.ir_version} is the newest", ()
    for value in (*graph.inputs, *graph.outputs):
        kind = graph.type_name(value.name)
        if kind not in _CARRIED:
            yield "T103", f"{value.name!r} is of {kind.lower()}", (value.name,)
    yield from _operators(graph, known)
    kinds = defaultdict(list)
    for name in graph.tensors:
        kinds[graph.type_name(name)].append(name)
    for kind, names in sorted(kinds.items()):
        if TYPE_SINCE.get(kind, 0) > known.ir_version:
            yield "T105", f"{len(names)} tensors are of {kind.lower()}", tuple(names)
    if kinds["BFLOAT16"]:
        yield "T106", f"{len(kinds['BFLOAT16'])} tensors are of bfloat16", tuple(kinds["BFLOAT16"])


def _operators(graph: Graph, known: TritonRelease) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    minor = int(known.onnxruntime.split(".")[1])
    own = {function.domain for function in graph.model.functions}
    found = defaultdict(list)
    for node in graph.nodes:
        missing = node.domain == "com.microsoft" and CONTRIB_SINCE.get(node.op_type, 0) > minor
        if missing or node.domain not in _DOMAINS | own:
            found[node.domain, node.op_type].append(named(node))
    for (domain, op), nodes in sorted(found.items()):
        yield "T104", f"{op} of the domain {domain} is not in ONNX Runtime {known.onnxruntime}", tuple(nodes)
