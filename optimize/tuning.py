"""Quantized variants that miss the policy's limit on accuracy, made again with the nodes that matter left in float32.

The method is that of `optimize.sensitivity`; here its trials are made and judged, each in a child process, and kept in
the journal, so that a search that was killed goes on where it stopped. What it finds is an ordinary recipe, whose
variant is made, judged and served like any other.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from numpy.typing import NDArray

from optimize.adaptation import adapt_calibration
from optimize.calibration import whole_batches
from optimize.config import AccuracySearchConfig
from optimize.engines.local import run_in_child
from optimize.fidelity import compare_outputs, load_outputs, measure_fidelity, thread_limits
from optimize.judging import Judged, failure_of, limits_of
from optimize.making import make_variant, origin_of
from optimize.metrics import find_metric
from optimize.packages import version
from optimize.plan import Workspace
from optimize.samples import SampleFile, Samples, load_samples, open_samples
from optimize.sensitivity import RANKED_ROWS, Found, named_in_ir, rank_groups, search_float_nodes
from optimize.sources import code_digests
from optimize.stages import make_stage
from optimize.stages.base import Context, StageInput, StageResult, TorchOrigin, input_of
from optimize.stages.onnx_files import load_graph
from optimize.stages.openvino import OpenVinoInt8
from optimize.stages.preparation import PREPARED, load, prepare
from optimize.stages.quantize import DynamicInt8, StaticInt8
from optimize.stages.tensorrt_int8 import TensorRtInt8
from profiles.measure.host import widest_instruction_set
from profiles.serving.session import import_engine
from registry import codec
from registry.errors import BurnishError, NotApplicableError, StorageError
from registry.records import (
    AccuracySearch,
    Constraint,
    Estimate,
    Failure,
    Judgement,
    NodeGroup,
    Recipe,
    SearchTrial,
    Sensitivity,
    Source,
    StageCall,
    Variant,
)
from registry.report import numbers
from registry.selection import Key, judge

Arrays = Mapping[str, NDArray[Any]]
Quantizer = DynamicInt8 | StaticInt8 | TensorRtInt8 | OpenVinoInt8
"""Stages that can leave nodes in float32."""

# What nncf rounds is not seen in an ONNX graph. Where int8 hurts is much the same, and the trials are of nncf's own.
_LIKE_NNCF = StageCall(name="quantize.static")

METHOD = 1  # raised when ranking or judging of trials changes, so that earlier ones do not count
_PREPARED = "prepared"
_NAMED_NODES = 3
_RANKED_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """A quantized variant that missed, with what its trials need."""

    one: Judged
    baseline: Judged
    source: Source
    calibration: SampleFile | None
    evaluation: Samples
    limits: tuple[Constraint, ...]

    @property
    def name(self) -> str:
        return tuned_name(self.one.variant.name)

    @property
    def call(self) -> StageCall:
        recipe = self.one.variant.recipe
        return recipe.stages[_place(recipe)]

    def recipe(self, float_nodes: Sequence[str]) -> Recipe:
        """The variant's recipe with these nodes in float32, beside those that it leaves there itself."""
        recipe = self.one.variant.recipe
        place = _place(recipe)
        params = {**self.call.params, "float_nodes": (*_left_out(self.call), *float_nodes)}
        call = StageCall(name=self.call.name, params=params)
        stages = (*recipe.stages[:place], call, *recipe.stages[place + 1 :])
        return Recipe(name=f"{recipe.name}-tuned", stages=stages, engines=recipe.engines)

    @property
    def allowed(self) -> float:
        """The smallest of the limits, in the metric's unit."""
        accuracy = next(iter(self.baseline.fidelities.values())).metrics["accuracy"].value
        return min(limit.limit * (accuracy if limit.relative else 1.0) for limit in self.limits)

    def judge(self, drop: Estimate | None) -> Judgement:
        """The worst outcome of the limits on the loss of accuracy."""
        metrics: dict[Key, Estimate] = {} if drop is None else {("accuracy_drop", None): drop}
        reference = next(iter(self.baseline.fidelities.values())).metrics
        known: dict[Key, Estimate] = {(name, None): estimate for name, estimate in reference.items()}
        found = [judge(limit, metrics, known) for limit in self.limits]
        return min(found, key=lambda one: ("fail", "unknown", "pass").index(one.outcome))


def tune_variants(
    workspace: Workspace,
    sources: Sequence[Source],
    judged: Sequence[Judged],
    *,
    calibration: SampleFile | None,
    evaluation: Samples,
) -> tuple[list[Variant], list[Failure]]:
    """For each quantized variant that misses the limit on ``accuracy_drop``, the best that the search made of it.

    A variant is searched for where the campaign file asks for it (``search.accuracy``) and its recipe has the stage
    ``quantize.static``, ``quantize.dynamic``, ``quantize.tensorrt`` or ``quantize.openvino``. What still misses the
    limit, but by less, is kept, too; where nothing is better than the variant itself, a failure says why. ``judged``
    begins with the baseline.
    """
    budget = workspace.plan.config.search.accuracy
    limits = tuple(one for one in workspace.plan.policy.constraints if one.metric == "accuracy_drop")
    if budget is None or not limits:
        return [], []
    by_name = {source.name: source for source in sources}
    tuned: list[Variant] = []
    failures: list[Failure] = []
    for one in _quantized(judged):
        subject = _Subject(
            one=one,
            baseline=judged[0],
            source=by_name[one.variant.source],
            calibration=calibration,
            evaluation=evaluation,
            limits=limits,
        )
        if subject.judge(_drop(one)).outcome != "fail":
            continue
        if any(other.variant.name == subject.name for other in judged):
            workspace.observer.note(f"{one.name} is not searched, because another variant is named {subject.name}")
            continue
        try:
            made = _tune(workspace, subject, budget)
        except StorageError:
            raise
        except BurnishError as error:
            made = failure_of(subject.name, "make", error)
        if isinstance(made, Failure):
            failures.append(made)
            workspace.observer.note(f"{subject.name}: {made.reason}")
        else:
            tuned.append(made)
    return tuned, failures


def _quantized(judged: Sequence[Judged]) -> list[Judged]:
    """One of each variant with a stage that can leave nodes in float32."""
    found: dict[str, Judged] = {}
    for one in judged[1:]:
        if any(isinstance(make_stage(call), Quantizer) for call in one.variant.recipe.stages):
            found.setdefault(one.variant.id, one)
    return list(found.values())


def tuned_name(variant: str) -> str:
    """What the outcome of a variant's search is called."""
    return f"{variant}-tuned"


def _place(recipe: Recipe) -> int:
    """Where the last stage stands that can leave nodes in float32; there is one."""
    return max(place for place, call in enumerate(recipe.stages) if isinstance(make_stage(call), Quantizer))


def _tune(workspace: Workspace, subject: _Subject, budget: AccuracySearchConfig) -> Variant | Failure:
    workspace.observer.phase(f"Leaving nodes of {subject.one.name} in float32", budget.trials)
    search = _search(workspace, subject, budget)
    workspace.observer.note(f"{subject.name}: {search.sentence}")
    if search.best is None:
        return Failure(subject=subject.name, phase="make", kind="not_applicable", reason=search.sentence)
    recipe = subject.recipe(search.best.float_nodes)
    made = make_variant(workspace, subject.source, recipe, subject.name, subject.calibration)
    return made if isinstance(made, Failure) else replace(made, notes=(*made.notes, search.sentence))


def _search(workspace: Workspace, subject: _Subject, budget: AccuracySearchConfig) -> AccuracySearch:
    """The search, remembered as a whole; what it is made of is remembered before.

    Raises:
        NotApplicableError: on these samples no variant could meet the limit, or there is nothing to choose from.
    """
    before = _drop(subject.one)
    assert before is not None  # it was judged, and failed
    components = {**_components(workspace, subject), "trials": budget.trials, "minutes": budget.minutes}

    def run() -> AccuracySearch:
        ranked = _ranked(workspace, subject)
        floor = subject.judge(ranked.floor)
        if floor.outcome == "fail":
            raise NotApplicableError(
                f"not even all the baseline's answers would pass on {len(subject.evaluation)} samples: {floor.reason}",
                hint="Give more evaluation samples, or a wider limit.",
            )
        found = search_float_nodes(
            ranked.groups,
            lambda nodes: _tried(workspace, subject, nodes),
            trials=budget.trials,
            seconds=60 * budget.minutes,
            spent_s=ranked.took_s,
        )
        kept = _better(found, before)
        return AccuracySearch(
            variant_id=subject.one.variant.id,
            variant_name=subject.one.variant.name,
            before=before,
            groups=ranked.groups,
            trials=found.trials,
            best=kept,
            stopped=found.stopped,
            monotone=found.monotone,
            sentence=told(found, kept, before, ranked.groups, allowed=subject.allowed),
        )

    return workspace.remember("AccuracySearch", subject.name, components, run)[0]


def _better(found: Found, before: Estimate) -> SearchTrial | None:
    """The trial to keep, where it is better than the variant as it was."""
    best = found.best
    if best is None or best.outcome == "pass" or best.drop is None:
        return best
    return best if _end(best.drop) < _end(before) else None


def _components(workspace: Workspace, subject: _Subject) -> dict[str, Any]:
    """What trials and ranking depend on, beside the nodes."""
    plan, one = workspace.plan, subject.one
    metric = plan.config.metric
    return {
        "variant": one.variant.id,
        "engine": one.engine.key,
        "engine_version": version(one.engine.name),
        "instruction_set": widest_instruction_set(plan.host),
        "batch_size": _batch_size(subject),
        "samples": subject.evaluation.digest,
        "metric": metric,
        "metric_code": code_digests(metric, plan.base) if ":" in metric else {},
        "reference": _reference(subject).stem,
        "limits": [limit.text for limit in subject.limits],
        "child_limits": codec.to_jsonable(limits_of(workspace)),
        "seed": plan.config.seed,
        "method": METHOD,
    }


# --- ranking ---------------------------------------------------------------------------------------------------


def _ranked(workspace: Workspace, subject: _Subject) -> Sensitivity:
    plan = workspace.plan

    def rank() -> Sensitivity:
        begin = monotonic()
        with tempfile.TemporaryDirectory(prefix="rank-", dir=workspace.folder("tmp")) as scratch:
            found = run_in_child(
                "optimize.tuning:rank_here",
                {
                    **_common(workspace, subject, ()),
                    "metric": plan.config.metric,
                    "samples": str(plan.path(plan.config.samples.evaluation)),
                    "reference": str(_reference(subject).resolve()),
                    "work": scratch,
                },
                limits=limits_of(workspace),
                python_path=plan.base,
                environment=thread_limits(plan.host.cores),
            )
        return codec.from_jsonable(
            Sensitivity, {**found, "variant_id": subject.one.variant.id, "took_s": round(monotonic() - begin, 3)}
        )

    return workspace.remember("Sensitivity", subject.name, _components(workspace, subject), rank)[0]


def rank_here(
    *,
    recipe: Mapping[str, Any],
    source: Mapping[str, Any],
    files: str,
    calibration: str | None,
    seed: int,
    threads: int,
    work: str,
    samples: str,
    reference: str,
    metric: str,
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Ranks the nodes of a recipe's quantizing stage in this process; the child's side, records as plain JSON values.

    The samples that calibrate also rank, where there are any: those held out are for judging.

    Returns:
        ``groups`` and ``floor`` of a `Sensitivity`.
    """
    held_out = load_samples(Path(samples))
    ranking: Arrays = held_out.inputs if calibration is None else open_samples(Path(calibration))
    whole = codec.from_jsonable(Recipe, recipe)
    place = _place(whole)
    module = None if origin is None else TorchOrigin(**origin)
    given = input_of(codec.from_jsonable(Source, source).artifact, Path(files), module)
    call, in_onnx = whole.stages[place], given
    for position, earlier in enumerate(whole.stages[:place]):
        made = _made(earlier, given, ranking, Path(work) / str(position), seed=seed, threads=threads)
        ranking = adapt_calibration(ranking, made.adaptation) or ranking
        given = StageInput(
            folder=made.folder, entry=made.entry, format=made.format, inputs=made.inputs, outputs=made.outputs
        )
        in_onnx = given if given.format == "onnx" else in_onnx
    if given.format == "openvino":
        groups = _rank(in_onnx, _LIKE_NNCF, ranking, Path(work), seed=seed, threads=threads)
        prepared = load_graph(Path(work) / _PREPARED / PREPARED)
        outputs = {node.name: node.output[0] for node in prepared.graph.node}
        left_out = {*_left_out(call)}
        groups = [
            one for one in named_in_ir(groups, _names_in_ir(given), outputs) if not left_out.issuperset(one.nodes)
        ]
    else:
        groups = _rank(given, call, ranking, Path(work), seed=seed, threads=threads)
    answers = load_outputs(Path(reference))
    floor = compare_outputs(answers, answers, held_out.labels, find_metric(metric))["accuracy_drop"]
    return {"groups": [codec.to_jsonable(group) for group in groups], "floor": codec.to_jsonable(floor)}


def _rank(
    given: StageInput, call: StageCall, samples: Arrays, work: Path, *, seed: int, threads: int
) -> list[NodeGroup]:
    import onnx

    # As pairs of QuantizeLinear and DequantizeLinear, so that what is rounded can be seen.
    params = {**call.params, "format": "qdq"} if "format" in call.params else call.params
    explicit = StageCall(name=call.name, params=params)
    quantized = _made(explicit, given, samples, work / "quantized", seed=seed, threads=threads)
    scratch = work / _PREPARED
    scratch.mkdir()
    prepare(given, scratch)
    prepared = load(scratch / PREPARED)
    batches = iter(whole_batches(samples, given.inputs, wanted=_RANKED_AT_ONCE))
    first = next(batches)
    more = RANKED_ROWS // len(next(iter(first.values()))) - 1
    return rank_groups(
        prepared,
        onnx.load(str(quantized.folder / quantized.entry)),
        _quantizer(explicit).operators(prepared),
        [first, *islice(batches, max(0, more))],
        scratch=scratch,
        left_out=_left_out(call),
        threads=threads,
    )


def _names_in_ir(given: StageInput) -> set[str]:
    model = import_engine("openvino").Core().read_model(str(given.path))
    return {op.get_friendly_name() for op in model.get_ops()}


def _quantizer(call: StageCall) -> DynamicInt8 | StaticInt8 | TensorRtInt8:
    stage = make_stage(call)
    assert isinstance(stage, DynamicInt8 | StaticInt8 | TensorRtInt8)  # others are ranked as one of them
    return stage


def _made(call: StageCall, given: StageInput, samples: Arrays, out: Path, *, seed: int, threads: int) -> StageResult:
    out.mkdir()
    context = Context(out=out, calibration=samples, seed=seed, threads=threads)
    return make_stage(call)(given, context)


# --- one trial -------------------------------------------------------------------------------------------------


def _tried(workspace: Workspace, subject: _Subject, nodes: tuple[str, ...]) -> SearchTrial:
    """The trial with these nodes in float32, remembered; one that failed is a result, too."""

    def attempt() -> SearchTrial:
        begin = monotonic()
        drop: Estimate | None = None
        try:
            drop = _drop_with(workspace, subject, nodes)
            judgement = subject.judge(drop)
            outcome: Literal["pass", "fail", "unknown", "failed"] = judgement.outcome
            reason = judgement.reason
        except StorageError:
            raise
        except BurnishError as error:
            outcome, reason = "failed", error.message
        took_s = round(monotonic() - begin, 3)
        return SearchTrial(float_nodes=nodes, outcome=outcome, drop=drop, reason=reason, took_s=took_s)

    subject_of_trial = f"{subject.name} with {codec.digest(list(nodes))}"
    components = {**_components(workspace, subject), "float_nodes": list(nodes)}
    trial, known = workspace.remember("SearchTrial", subject_of_trial, components, attempt)
    outcome = f"{trial.outcome}: {trial.reason}" + (" (known)" if known else "")
    workspace.observer.done(f"{subject.name}, {len(nodes)} nodes in float32", outcome)
    return trial


def _drop_with(workspace: Workspace, subject: _Subject, nodes: tuple[str, ...]) -> Estimate | None:
    """The loss of accuracy with these nodes in float32; nothing is kept of the model.

    Raises:
        BurnishError: it could not be made or judged.
    """
    plan, one = workspace.plan, subject.one
    with tempfile.TemporaryDirectory(prefix="trial-", dir=workspace.folder("tmp")) as scratch:
        arguments = {**_common(workspace, subject, nodes), "work": scratch}
        made = run_in_child("optimize.making:make_here", arguments, limits=limits_of(workspace), python_path=plan.base)
        fidelity = measure_fidelity(
            "trial",
            Path(made["folder"]) / made["entry"],
            one.engine,
            samples=plan.path(plan.config.samples.evaluation),
            samples_digest=subject.evaluation.digest,
            out=Path(scratch) / "answers.npz",
            reference=_reference(subject),
            parity=one.variant.source == subject.baseline.variant.source,
            metric=plan.config.metric,
            batch_size=_batch_size(subject),
            instruction_set=widest_instruction_set(plan.host),
            threads=plan.host.cores,
            seed=plan.config.seed,
            adaptation=one.variant.adaptation,
            limits=limits_of(workspace),
            python_path=plan.base,
        )
    return fidelity.metrics.get("accuracy_drop")


def _common(workspace: Workspace, subject: _Subject, nodes: Sequence[str]) -> dict[str, Any]:
    """What the children that rank and that make are given alike."""
    plan, source = workspace.plan, subject.source
    calibrating = plan.config.samples.calibration if subject.one.variant.calibration_digest else None
    return {
        "recipe": codec.to_jsonable(subject.recipe(nodes)),
        "source": codec.to_jsonable(source),
        "files": str(workspace.store.path(source.artifact)),
        "calibration": None if calibrating is None else str(plan.path(calibrating)),
        "seed": plan.config.seed,
        "threads": plan.host.cores,
        "origin": origin_of(plan, source, subject.recipe(nodes)),
    }


# --- small things ----------------------------------------------------------------------------------------------


def _left_out(call: StageCall) -> tuple[str, ...]:
    """The nodes that a stage leaves in float32 already."""
    given = call.params.get("float_nodes", ())
    return given if isinstance(given, tuple) else ()


def _drop(one: Judged) -> Estimate | None:
    """The largest of what the variant loses at the batch sizes it is judged at."""
    found = [fidelity.metrics.get("accuracy_drop") for fidelity in one.fidelities.values()]
    return max((drop for drop in found if drop is not None), key=_end, default=None)


def _end(drop: Estimate) -> float:
    return drop.value if drop.high is None else drop.high


def _batch_size(subject: _Subject) -> int:
    return max(subject.one.fidelities)


def _reference(subject: _Subject) -> Path:
    return next(iter(subject.baseline.answers.values()))


def told(
    found: Found, kept: SearchTrial | None, before: Estimate, groups: Sequence[NodeGroup], *, allowed: float
) -> str:
    """What was left in float32 and what it cost, in a sentence for a variant's notes."""
    trials = f"{len(found.trials)} trial{'s' if len(found.trials) != 1 else ''}"
    how = {
        "done": trials,
        "trials": f"{trials}, which is the budget",
        "minutes": f"{trials} in the minutes of the budget",
        "exhausted": f"{trials}, up to all nodes but one",
    }[found.stopped]
    doubt = "" if found.monotone else "; a larger set once lost more than a smaller one, so that there may be a better"
    if kept is None:
        return f"no set of nodes in float32 that was tried does better than {_number(before)} ({how}{doubt})"
    assert kept.drop is not None  # only what was judged is kept
    chosen = set(kept.float_nodes)
    macs = sum(group.macs for group in groups if chosen.issuperset(group.nodes))
    total = sum(len(group.nodes) for group in groups)
    change = f"accuracy drop {_number(before)} -> {_number(kept.drop)}, {100 * macs:.0f} % of MACs in float32"
    missed = (
        "" if kept.outcome == "pass" else f"; still over the limit by {_end(kept.drop) - allowed:.4f}: {kept.reason}"
    )
    return f"left {len(chosen)} of {total} nodes in float32 ({_named(kept)}): {change} ({how}{doubt}){missed}"


def _named(trial: SearchTrial) -> str:
    more = len(trial.float_nodes) - _NAMED_NODES
    return ", ".join(trial.float_nodes[:_NAMED_NODES]) + (f" and {more} more" if more > 0 else "")


def _number(drop: Estimate) -> str:
    return numbers.text(drop)
