"""Accuracy-aware mixed precision: which nodes of a quantized variant to leave in float32, and how to find them.

Two parts that know nothing of each other. `rank_groups` measures how much quantizing each group of nodes alone
disturbs the outputs; `search_float_nodes` tries sets of groups in that order, and is pure: what a trial costs and how
it is made is its caller's affair (`optimize.tuning`).

*Ranking.* One graph computes the float model with a switch at every tensor that the quantized variant rounds: the
tensor itself, or what QuantizeLinear and DequantizeLinear with the variant's own scales make of it. For each group only
the switches of its tensors are set, and the disturbance is the power of what changes at the outputs over their own
(the inverse of the signal-to-noise ratio that ``onnxruntime.quantization.qdq_loss_debug`` computes of tensors). That
the noise of one layer, measured at the output with all others in float, tells its part in the whole: Zhou,
Moosavi-Dezfooli, Cheung and Frossard, "Adaptive quantization for deep neural network", 2018. (NNCF's accuracy control
goes the other way round: it turns one group of the quantized model back to float. Where two groups are bad, each hides
the other then.) One graph serves all groups, with one run each; nothing is quantized anew.

*Search.* The longer the beginning of the ranking that is in float, the smaller the loss, or so it is assumed: its
length doubles until the limit is met, then is bisected. That is about 2 log2(k) trials instead of k. What turns out not
to be needed is then put back, all at once first and by halves after (binary splitting, as in group testing: Hwang, "A
method for detecting all defective members in a population by group testing", 1972). A set is kept only because it was
tried.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optimize.profiling import multiply_adds
from optimize.stages import onnx_files
from optimize.stages.openvino import WITHOUT_BIASES
from optimize.stages.preparation import write
from registry.records import NodeGroup, SearchTrial

MOST_GROUPS = 64  # neighbours are joined beyond it: a run a group is what ranking costs
RANKED_ROWS = 32  # enough for an order of magnitude, which is what separates nodes that matter from those that do not
_WORST_NOISE = 1e9  # an output that is not finite, in a number that JSON can hold
_SWITCH = "switch::"
_QUANTIZED, _QUANTIZE_INPUT = "_quantized", "_QuantizeLinear_Input"  # how ONNX Runtime names what it makes

Stopped = Literal["done", "trials", "minutes", "exhausted"]


# --- searching -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to.

    Attributes:
        best: the trial to keep: of those that passed the one with the least work in float32, else the one with the
            smallest loss; None where no trial gave an estimate.
        trials: all of them, in order.
        stopped: why it ended: all was tried that the method tries (``done``), the budget (``trials``, ``minutes``), or
            not even the longest set of nodes met the limit (``exhausted``).
        monotone: whether no larger set of the ranking lost certainly more than a smaller one.
    """

    best: SearchTrial | None
    trials: tuple[SearchTrial, ...]
    stopped: Stopped
    monotone: bool


class _BudgetSpentError(Exception):
    """No trial is left."""

    def __init__(self, what: Stopped) -> None:
        super().__init__(what)
        self.what = what


def search_float_nodes(
    groups: Sequence[NodeGroup],
    evaluate: Callable[[tuple[str, ...]], SearchTrial],
    *,
    trials: int,
    seconds: float,
    spent_s: float = 0.0,
) -> Found:
    """The smallest set of groups to leave in float32 with which the limit is met, as far as the budget reaches.

    Time is what the trials say they took, not a clock, so that a search that goes on with trials of an earlier run
    takes the same way. The trial that begins last may end after the budget.

    Args:
        groups: those of the ranking, the most disturbing first.
        evaluate: makes and judges the variant with these nodes in float32; a trial that failed says so in its outcome.
        trials: how many it may be called.
        seconds: how long all trials together may take.
        spent_s: what of it is spent already.
    """
    search = _Search(groups=groups, evaluate=evaluate, most_trials=trials, seconds=seconds, spent_s=spent_s)
    stopped: Stopped = "done"
    try:
        length = search.shortest_prefix()
        if length is None:
            stopped = "exhausted"
        else:
            # The group that bisection ended at is needed: without it the limit was not met.
            search.put_back(frozenset(range(length)), range(length - 1))
    except _BudgetSpentError as error:
        stopped = error.what
    return Found(
        best=search.best(), trials=tuple(search.tried.values()), stopped=stopped, monotone=search.is_monotone()
    )


@dataclass(slots=True, kw_only=True)
class _Search:
    groups: Sequence[NodeGroup]
    evaluate: Callable[[tuple[str, ...]], SearchTrial]
    most_trials: int
    seconds: float
    spent_s: float
    tried: dict[frozenset[int], SearchTrial] = field(default_factory=dict)

    def shortest_prefix(self) -> int | None:
        """The shortest beginning of the ranking that passes, or None where none does; all of it is not quantized."""
        longest = len(self.groups) - 1
        failing, length = 0, 1
        if longest < 1:
            return None
        while not self._passes(range(length)):
            if length == longest:
                return None
            failing, length = length, min(2 * length, longest)
        while length - failing > 1:
            middle = (failing + length) // 2
            if self._passes(range(middle)):
                length = middle
            else:
                failing = middle
        return length

    def put_back(self, kept: frozenset[int], candidates: Sequence[int]) -> frozenset[int]:
        """The passing set without those candidates that it also passes without."""
        if not candidates:
            return kept
        fewer = kept.difference(candidates)
        if fewer and self._passes(fewer):
            return fewer
        if len(candidates) == 1:
            return kept
        half = len(candidates) // 2
        kept = self.put_back(kept, candidates[half:])  # these disturb less
        return self.put_back(kept, candidates[:half])

    def best(self) -> SearchTrial | None:
        """The trial to keep."""
        passed = [chosen for chosen, trial in self.tried.items() if trial.outcome == "pass"]
        if passed:
            return self.tried[min(passed, key=self._cost)]
        judged = [(trial, chosen) for chosen, trial in self.tried.items() if trial.drop is not None]
        return min(judged, key=lambda one: (_loss(one[0]), self._cost(one[1])))[0] if judged else None

    def is_monotone(self) -> bool:
        """Whether no set that holds another lost certainly more than it."""
        judged = [(chosen, trial.drop) for chosen, trial in self.tried.items() if trial.drop is not None]
        return not any(
            less < more and more_drop.low is not None and less_drop.high is not None and more_drop.low > less_drop.high
            for less, less_drop in judged
            for more, more_drop in judged
        )

    def _passes(self, chosen: Iterable[int]) -> bool:
        wanted = frozenset(chosen)
        if wanted not in self.tried:
            if len(self.tried) >= self.most_trials:
                raise _BudgetSpentError("trials")
            if self.spent_s >= self.seconds:
                raise _BudgetSpentError("minutes")
            nodes = tuple(node for i in sorted(wanted) for node in self.groups[i].nodes)
            self.tried[wanted] = self.evaluate(nodes)
            self.spent_s += self.tried[wanted].took_s
        return self.tried[wanted].outcome == "pass"

    def _cost(self, chosen: frozenset[int]) -> tuple[float, int]:
        return sum(self.groups[i].macs for i in chosen), sum(len(self.groups[i].nodes) for i in chosen)


def _loss(trial: SearchTrial) -> float:
    """The pessimistic end of the drop; the value where the end is not known."""
    assert trial.drop is not None
    return trial.drop.value if trial.drop.high is None else trial.drop.high


# --- ranking ---------------------------------------------------------------------------------------------------


def rank_groups(
    prepared: Any,
    quantized: Any,
    operators: Iterable[str],
    batches: Sequence[Mapping[str, NDArray[Any]]],
    *,
    scratch: Path,
    left_out: Iterable[str] = (),
    threads: int = 1,
) -> list[NodeGroup]:
    """Groups of nodes by how much quantizing each alone disturbs the outputs, the most disturbing first.

    A node counts where its operator is one of ``operators`` and rounds something by itself; what only hands on the
    int8 of others (Relu, MaxPool, Reshape, ...) follows its neighbours. Nodes are groups of their own up to
    `MOST_GROUPS`; beyond, neighbours in the graph are joined.

    Args:
        prepared: the float model (an ``onnx.ModelProto``) that was quantized, with every node named.
        quantized: what was made of it, with QuantizeLinear and DequantizeLinear, around weights, too, or with int8
            weights; or with MatMulInteger and DynamicQuantizeLinear.
        operators: types of the operators that were quantized.
        batches: input name -> array (rows, ...), which the outputs are compared on.
        scratch: a folder for the graph with switches.
        left_out: names of nodes that are in float32 already.
        threads: of the session.
    """
    groups = _grouped(_own_nodes(prepared, set(operators), set(left_out)))
    switched, tensors = _switched(prepared, quantized)
    ends = _ends(prepared, tensors)
    touched = [
        sorted(tensors.intersection(name for node in group for name in (*node.input, *map(ends, node.output))))
        for group in groups
    ]
    noises = _noises(switched, sorted(tensors), touched, batches, scratch=scratch, threads=threads)
    macs = _mac_shares(prepared, batches[0])
    ranked = [
        NodeGroup(
            nodes=tuple(node.name for node in group), noise=noise, macs=sum(macs.get(node.name, 0.0) for node in group)
        )
        for group, noise, names in zip(groups, noises, touched, strict=True)
        if names
    ]
    return sorted(ranked, key=lambda group: (-group.noise, group.nodes))


def named_in_ir(groups: Sequence[NodeGroup], known: Collection[str], outputs: Mapping[str, str]) -> list[NodeGroup]:
    """The groups by the names that OpenVINO's IR has for their nodes; a node that it has none for is left out.

    It calls a node by its output where it has no name, or where that is an output of the model. What ONNX Runtime fused
    has a ``/`` and more behind the name of the first of what it was.

    Args:
        groups: of nodes of the prepared ONNX graph.
        known: names of the nodes of the IR.
        outputs: node of the prepared graph -> its first output.
    """

    def in_ir(name: str) -> str | None:
        candidates = (name, outputs.get(name, ""), name.rpartition("/")[0])
        return next((one for one in candidates if one in known or f"{one}{WITHOUT_BIASES}" in known), None)

    named = [
        replace(group, nodes=tuple(dict.fromkeys(found for name in group.nodes if (found := in_ir(name)))))
        for group in groups
    ]
    return [group for group in named if group.nodes]


def _own_nodes(model: Any, operators: set[str], left_out: set[str]) -> list[Any]:
    from onnxruntime.quantization import registry

    follow = ("QDQDirect8BitOp", "QDQRemovableActivation", "QDQMaxPool", "QDQSplit", "QDQPad", "QDQGather", "QDQResize")
    following = {name for name, one in registry.QDQRegistry.items() if one.__name__ in follow}
    return [node for node in model.graph.node if node.op_type in operators - following and node.name not in left_out]


def _ends(model: Any, tensors: set[str]) -> Callable[[str], str]:
    """What is rounded in place of a tensor: where a Relu or Clip is all that takes it, what that gives."""
    takers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)

    def end(name: str) -> str:
        taking = takers.get(name, [])
        follows = len(taking) == 1 and taking[0].op_type in {"Relu", "Clip"}
        return end(taking[0].output[0]) if follows and name not in tensors else name

    return end


def _grouped(nodes: Sequence[Any]) -> list[list[Any]]:
    size = -(-len(nodes) // MOST_GROUPS) or 1
    return [list(nodes[start : start + size]) for start in range(0, len(nodes), size)]


def _switched(prepared: Any, quantized: Any) -> tuple[Any, set[str]]:
    """The float model with a switch at each tensor that the quantized one rounds, and the names of those tensors."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(prepared)
    graph = model.graph
    known = (
        {tensor.name for tensor in graph.initializer}
        | {value.name for value in graph.input}
        | {out for node in graph.node for out in node.output}
    )
    rounded = _Rounding(quantized, known, {node.input[1] for node in graph.node if _transposes(node)})
    made: dict[str, list[Any]] = {}
    for name in rounded.tensors:
        made[name] = rounded.nodes_for(name, source=_renamed(graph, name))
    graph.initializer.extend(rounded.constants)
    for name in made:
        graph.input.append(onnx.helper.make_tensor_value_info(_SWITCH + name, onnx.TensorProto.BOOL, []))
    _insert(graph, made)
    return model, set(made)


class _Rounding:
    """What the quantized model does to each tensor of the float model, as nodes that can be put into the latter."""

    def __init__(self, quantized: Any, known: set[str], transposed: set[str]) -> None:
        self._transposed = transposed
        self.constants: list[Any] = []
        self._tensors = {tensor.name: tensor for tensor in quantized.graph.initializer}
        self._taken: set[str] = set()
        self._activations: dict[str, Any] = {}
        self._weights: dict[str, Any] = {}
        for node in quantized.graph.node:
            name = node.input[0].removesuffix(_QUANTIZE_INPUT) if node.input else ""
            if node.op_type in {"QuantizeLinear", "DynamicQuantizeLinear"} and name in known:
                self._activations[name] = node
            elif node.op_type == "DequantizeLinear" and node.input[0].removesuffix(_QUANTIZED) in known:
                self._weights[node.input[0].removesuffix(_QUANTIZED)] = node
            elif node.op_type == "MatMulInteger" and node.input[1].removesuffix(_QUANTIZED) in known:
                self._weights[node.input[1].removesuffix(_QUANTIZED)] = node
        self.tensors = sorted({*self._activations, *self._weights})

    def nodes_for(self, name: str, *, source: str) -> list[Any]:
        """Nodes from ``source`` to ``name``: the tensor itself, or rounded, as the switch says."""
        import onnx

        make = onnx.helper.make_node
        rounded = f"{name}::rounded"
        nodes = self._weight(name, rounded) if name in self._weights else self._activation(name, source, rounded)
        return [*nodes, make("Where", [_SWITCH + name, rounded, source], [name if source != name else f"{name}::on"])]

    def _weight(self, name: str, rounded: str) -> list[Any]:
        import onnx

        node = self._weights[name]
        if node.op_type == "DequantizeLinear":
            one = onnx.NodeProto()
            one.CopyFrom(node)
            one.name, one.output[0] = rounded, rounded
            self._take(one.input)
            return [one]
        # MatMulInteger: the scale stands apart, one for all or one for each column; a Gemm's weight was transposed.
        inputs = [f"{name}{suffix}" for suffix in (_QUANTIZED, "_scale", "_zero_point")]
        self._take(inputs)
        if name not in self._transposed:
            return [onnx.helper.make_node("DequantizeLinear", inputs, [rounded], axis=1)]
        turned = f"{name}::turned"
        return [
            onnx.helper.make_node("DequantizeLinear", inputs, [turned], axis=1),
            onnx.helper.make_node("Transpose", [turned], [rounded], perm=[1, 0]),
        ]

    def _activation(self, name: str, source: str, rounded: str) -> list[Any]:
        import onnx

        node = self._activations[name]
        middle = [f"{name}::{part}" for part in ("int8", "scale", "zero")]
        along = {attribute.name: attribute.i for attribute in node.attribute if attribute.name == "axis"}
        if node.op_type == "QuantizeLinear":
            scales = list(node.input[1:])
            self._take(scales)
            one = onnx.helper.make_node("QuantizeLinear", [source, *scales], middle[:1], **along)
        else:
            scales = middle[1:]
            one = onnx.helper.make_node("DynamicQuantizeLinear", [source], middle)
        return [one, onnx.helper.make_node("DequantizeLinear", [middle[0], *scales], [rounded], **along)]

    def _take(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._taken:
                self._taken.add(name)
                self.constants.append(self._tensors[name])


def _transposes(node: Any) -> bool:
    return node.op_type == "Gemm" and any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _renamed(graph: Any, name: str) -> str:
    """What the tensor is called before its switch: another name where a node makes it, since outputs keep theirs."""
    for node in graph.node:
        for position, output in enumerate(node.output):
            if output == name:
                node.output[position] = f"{name}::float"
                return f"{name}::float"
    for node in graph.node:
        for position, given in enumerate(node.input):
            if given == name:
                node.input[position] = f"{name}::on"
    return name


def _insert(graph: Any, made: Mapping[str, Sequence[Any]]) -> None:
    """Puts the switches of a tensor right behind the node that makes it, and those of others first."""
    waiting = dict(made)
    ordered = []
    for node in graph.node:
        ordered.append(node)
        for output in node.output:
            ordered += waiting.pop(output.removesuffix("::float"), ()) if output.endswith("::float") else ()
    first = [node for nodes in waiting.values() for node in nodes]
    copies = []
    for node in (*first, *ordered):
        copy = type(node)()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def _noises(
    model: Any,
    tensors: Sequence[str],
    touched: Sequence[Sequence[str]],
    batches: Sequence[Mapping[str, NDArray[Any]]],
    *,
    scratch: Path,
    threads: int,
) -> list[float]:
    """For each group the power of what its rounding adds to the outputs over their own, the worst of the outputs."""
    session = _session(model, scratch, threads)
    off = {_SWITCH + name: np.array(False) for name in tensors}
    added = [0.0] * len(touched)
    for batch in batches:
        wanted = session.run(None, {**batch, **off})
        for position, names in enumerate(touched):
            on = {_SWITCH + name: np.array(True) for name in names}
            got = session.run(None, {**batch, **off, **on})
            added[position] += max((_noise(a, b) for a, b in zip(wanted, got, strict=True)), default=0.0)
    return [min(one / len(batches), _WORST_NOISE) for one in added]


def _noise(wanted: NDArray[Any], got: NDArray[Any]) -> float:
    if wanted.shape != got.shape or wanted.dtype.kind != "f":
        return 1.0 if wanted.shape != got.shape else float((wanted != got).mean()) if wanted.size else 0.0
    a, b = wanted.astype(np.float64), got.astype(np.float64)
    where = np.isfinite(a)  # what the float model itself overflows at says nothing of rounding
    difference, power = a[where] - b[where], float(np.square(a[where]).sum())
    noise = float(np.square(difference).sum()) / (power or 1.0)
    return noise if np.isfinite(noise) else _WORST_NOISE


def _session(model: Any, scratch: Path, threads: int) -> Any:
    import onnxruntime

    path = scratch / "switched.onnx"
    write(model, path, large=onnx_files.is_large(model))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # rounding is to be seen, not optimized
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# --- what a node costs -----------------------------------------------------------------------------------------


def _mac_shares(model: Any, batch: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Node name -> share of the graph's multiply-accumulate operations on such a batch; free sizes count as 1."""
    shapes = _shapes(model, batch)
    macs = {node.name: _macs(node, shapes) for node in model.graph.node}
    total = sum(macs.values()) or 1
    return {name: count / total for name, count in macs.items()}


def _shapes(model: Any, batch: Mapping[str, NDArray[Any]]) -> dict[str, list[int]]:
    import onnx

    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value in sized.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, batch[value.name].shape, strict=False):
            dim.dim_value = size
    if not onnx_files.is_large(sized):
        del sized.graph.value_info[:]  # they hold names where there are sizes now
        sized = onnx.shape_inference.infer_shapes(sized)
    values = (*sized.graph.input, *sized.graph.value_info, *sized.graph.output)
    shapes = {value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim] for value in values}
    return shapes | {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


def _macs(node: Any, shapes: Mapping[str, list[int]]) -> int:
    if node.op_type not in {"Conv", "ConvTranspose", "MatMul", "Gemm"}:
        return 0
    import onnx

    sizes = [tuple(shapes.get(name, [1])) for name in (*node.input, node.output[0])]
    settings = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    return multiply_adds(node.op_type, sizes[:-1], sizes[-1], sizes[:-1], settings)
