"""What is wrong with a pipeline before it is deployed: joins that never fire, and tensors that do not fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from profiles.pipelines.graph import Pipeline, Source, Step, answers, fired, routings
from registry.records import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a step's model takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


Signatures = Mapping[str, Signature]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes:
        severity: an ``error`` keeps requests from being answered.
        step: where, or ``output``.
        text: what, and what to do.
    """

    severity: Literal["error", "warning"]
    step: str
    text: str


def check_pipeline(pipeline: Pipeline, signatures: Signatures | None = None) -> tuple[Finding, ...]:
    """All that is found.

    Args:
        pipeline: the graph, whose names are known to be right.
        signatures: step -> what its model takes and gives; what is not known is not judged.

    Raises:
        InputError: there are too many ways through its choices to look at all.
    """
    known = dict(signatures or {})
    found = [*_dead(pipeline), *_idle(pipeline), *_unknown(pipeline, known)]
    for step in pipeline.steps:
        found += _sources_have(pipeline, step.name, step.sources, known)
        if step.name in known:
            found += _fits(pipeline, step, known)
    if pipeline.output is not None:
        found += _sources_have(pipeline, "output", pipeline.output.sources, known)
    return (*found, *_common_inputs(pipeline, known))


# --- joins -----------------------------------------------------------------------------------------------------


def _dead(pipeline: Pipeline) -> Iterator[Finding]:
    reached: set[str] = set()
    answered, unanswered = False, 0.0
    for routing, share in routings(pipeline):
        done = fired(pipeline, routing)
        reached |= done
        if answers(pipeline, done, routing):
            answered = True
        else:
            unanswered += share
    for step in pipeline.steps:
        if step.name not in reached:
            yield Finding(severity="error", step=step.name, text=_why_dead(pipeline, step, reached))
    if not answered:
        yield Finding(
            severity="error",
            step="output",
            text="its join never fires, so that every request waits until it times out; join with any, or other steps",
        )
    elif unanswered > 1e-9 and pipeline.max_revisits is None:  # who comes round again chooses again
        text = f"{unanswered:.1%} of requests get no answer and time out: what is chosen leads to no output"
        yield Finding(severity="warning", step="output", text=text)


def _why_dead(pipeline: Pipeline, step: Step, reached: set[str]) -> str:
    waits = [source.text for source in step.sources if source.step is not None and source.step not in reached]
    if step.name in waits or any(source.step == step.name for source in step.sources):
        return f"it waits for itself ({step.name}) in an inner join, which never fires; join with any"
    if waits:
        return f"it never fires: it waits for {', '.join(waits)}, which never comes; join a way back with any"
    sources = ", ".join(source.text for source in step.sources)
    return f"it never fires: {sources} exclude each other and are joined inner; join with any"


def _idle(pipeline: Pipeline) -> Iterator[Finding]:
    waited = {before for before, _ in pipeline.edges} | set(pipeline.last)
    for name in pipeline.names:
        if name not in waited:
            text = "nobody takes its answers: it costs, and no request waits for it"
            yield Finding(severity="warning", step=name, text=text)


def _unknown(pipeline: Pipeline, known: Signatures) -> Iterator[Finding]:
    for name in pipeline.names:
        if known and name not in known:
            text = "its model is not known here, so that its tensors are not judged; name its file in the plan"
            yield Finding(severity="warning", step=name, text=text)


# --- tensors ---------------------------------------------------------------------------------------------------


def _sources_have(pipeline: Pipeline, where: str, sources: Sequence[Source], known: Signatures) -> Iterator[Finding]:
    for source in sources:
        if source.step is None or source.step not in known or source.tensor is None:
            continue
        signature = known[source.step]
        names = [one.name for one in (signature.inputs if source.side == "inputs" else signature.outputs)]
        if source.tensor not in names:
            text = f"it takes {source.text}, and {source.step} has only {', '.join(names)}"
            yield Finding(severity="error", step=where, text=text)


def arriving(pipeline: Pipeline, step: Step, source: Source, known: Signatures) -> dict[str, TensorSpec] | None:
    """Input name -> the tensor that this source brings under it; None where nothing is known of it."""
    if source.step is None or source.step not in known:
        return None
    signature = known[source.step]
    given = {one.name: one for one in (signature.inputs if source.side == "inputs" else signature.outputs)}
    taken = given.values() if source.tensor is None else [given[source.tensor]] if source.tensor in given else []
    return {renamed(step.tensor_map, source, one.name, pipeline): one for one in taken}


def renamed(tensor_map: Mapping[str, str], source: Source, tensor: str, pipeline: Pipeline) -> str:
    """The name that a source's tensor has where it arrives."""
    return tensor_map.get(f"{source.step or pipeline.name}.{source.side}.{tensor}", tensor)


def _fits(pipeline: Pipeline, step: Step, known: Signatures) -> Iterator[Finding]:
    wanted = {one.name: one for one in known[step.name].inputs}
    brought = [(source, arriving(pipeline, step, source, known)) for source in step.inputs.sources]
    for source, tensors in brought:
        for name, tensor in (tensors or {}).items():
            if name not in wanted:
                hint = f"rename {source.step}.{source.side}.{tensor.name} by tensorMap, or take single tensors"
                text = f"it gets {name!r} from {source.text}, and its model takes {', '.join(wanted)}; {hint}"
                yield Finding(severity="error", step=step.name, text=text)
            elif why := why_unfit(tensor, wanted[name]):
                yield Finding(severity="error", step=step.name, text=f"input {name!r} from {source.text}: {why}")
    if any(tensors is None for _, tensors in brought):
        return
    yield from _complete(step, wanted, [tensors or {} for _, tensors in brought])


def _complete(step: Step, wanted: Mapping[str, TensorSpec], brought: list[dict[str, TensorSpec]]) -> Iterator[Finding]:
    """Whether a message has all inputs, and none twice."""
    if step.inputs.join == "any":
        for source, tensors in zip(step.inputs.sources, brought, strict=True):
            if lacking := sorted(set(wanted) - set(tensors)):
                text = f"joined with any, {source.text} comes alone, and lacks {', '.join(lacking)}"
                yield Finding(severity="error", step=step.name, text=text)
        return
    names = [name for tensors in brought for name in tensors]
    if lacking := sorted(set(wanted) - set(names)):
        text = f"its model's input {', '.join(lacking)} comes from nowhere; rename a tensor by tensorMap"
        yield Finding(severity="error", step=step.name, text=text)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield Finding(
            severity="error", step=step.name, text=f"input {twice[0]!r} comes from two sources; rename one by tensorMap"
        )
    if step.inputs.join == "outer" and len(brought) > 1:
        text = "joined outer, a message may lack the inputs that did not come within the window"
        yield Finding(severity="warning", step=step.name, text=text)


def why_unfit(given: TensorSpec, wanted: TensorSpec) -> str | None:
    """Why one tensor is no input of the other's kind, or None where it may be."""
    if given.dtype != wanted.dtype:
        return f"{given.name} is {given.dtype}, and {wanted.name} takes {wanted.dtype}"
    if len(given.shape) != len(wanted.shape):
        return f"{given.name} has {len(given.shape)} dimensions, and {wanted.name} takes {len(wanted.shape)}"
    for place, (have, want) in enumerate(zip(given.shape, wanted.shape, strict=True)):
        if isinstance(have, int) and isinstance(want, int) and have != want:
            return f"dimension {place} of {given.name} is {have}, and {wanted.name} takes {want}"
    return None


def pipeline_inputs(pipeline: Pipeline, known: Signatures) -> dict[str, list[tuple[str, TensorSpec]]]:
    """Name in a request to the pipeline -> (step, its input) that take it."""
    found: dict[str, list[tuple[str, TensorSpec]]] = {}
    for step in pipeline.steps:
        outside = [source for source in step.inputs.sources if source.step is None]
        if step.name not in known or not outside:
            continue
        others = (arriving(pipeline, step, one, known) or {} for one in step.inputs.sources if one.step is not None)
        taken = {name for tensors in others for name in tensors}
        back = {renamed_: key.rpartition(".")[2] for key, renamed_ in step.tensor_map.items()
                if key.startswith(f"{pipeline.name}.inputs.")}  # fmt: skip
        named = {one.tensor for one in outside if one.tensor}
        for wanted in known[step.name].inputs:
            original = back.get(wanted.name, wanted.name)
            if wanted.name not in taken and (not named or original in named):
                found.setdefault(original, []).append((step.name, wanted))
    return found


def _common_inputs(pipeline: Pipeline, known: Signatures) -> Iterator[Finding]:
    for name, takers in pipeline_inputs(pipeline, known).items():
        first, wanted = takers[0]
        for step, other in takers[1:]:
            if why := why_unfit(wanted, other):
                yield Finding(
                    severity="error",
                    step=step,
                    text=f"it takes the pipeline's input {name!r}, and so does {first}: {why}",
                )
