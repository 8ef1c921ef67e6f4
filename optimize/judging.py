"""Fidelity and in-process time of every variant in every engine, and which of them are worth serving."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optimize.budget import UNLIMITED
from optimize.engines.local import ChildFailure, Limits
from optimize.fidelity import fidelity_components, measure_fidelity
from optimize.packages import version
from optimize.plan import Workspace
from optimize.progress import FAILED
from optimize.recipes import engine_label
from optimize.samples import Samples
from optimize.saturation import SATURATED, saturates_on
from optimize.screening import screen_variant
from optimize.sources import code_digests
from profiles.measure.host import widest_instruction_set
from registry.codec import digest
from registry.errors import (
    BudgetUsedUpError,
    BurnishError,
    InputError,
    NotApplicableError,
    ServerDiedError,
    StageError,
    StorageError,
)
from registry.records import (
    EngineSpec,
    Estimate,
    Failure,
    FailureKind,
    FailurePhase,
    Fidelity,
    Policy,
    Screening,
    Variant,
)
from registry.selection import OTHER_SIGNATURE, judge

# What kernels of low precision may move an answer by at another place in the batch, as a part of the outputs' spread.
BATCH_TOLERANCE = 0.01

# Which constraints can be judged before anything is served.
_METRICS_OF_FIDELITY = frozenset({
    "accuracy", "accuracy_drop", "slice_drop_max", "flip_rate", "cosine", "worst_cosine", "snr_db", "p99_error",
    "mismatch_share", "max_abs_error", "batch_dependence", "batch_flip_rate",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A variant in one engine, with what is known of it before it is served.

    Attributes:
        name: what people read: the variant's name, and the precision where its recipe has several engines.
        fidelities: batch size -> how it answers at that size.
        answers: batch size -> file with its answers to the evaluation samples.
        screening: its in-process time, or None where it has not been timed.
    """

    name: str
    variant: Variant
    engine: EngineSpec
    fidelities: Mapping[int, Fidelity]
    answers: Mapping[int, Path]
    screening: Screening | None = None


def judge_variants(
    workspace: Workspace, variants: Sequence[Variant], evaluation: Samples
) -> tuple[list[Judged], list[Failure]]:
    """How every variant answers in each engine it is meant for, against the first, which is the baseline.

    A variant whose answers depend on their neighbours in the batch is judged at each batch size it will be served at;
    any other once, at the largest. One that turns out to depend on them, though none of its stages says so, is noted
    and judged at each, too. Where the machines that are to serve have no VNNI, one whose u8 times s8 sums overflow
    without it is refused.

    Raises:
        BurnishError: the baseline itself cannot be run or judged; there is then nothing to compare with.
    """
    pairs = [(variant, engine) for variant in variants for engine in variant.recipe.engines]
    workspace.observer.phase("Judging answers", len(pairs))
    judged: list[Judged] = []
    failures: list[Failure] = []
    for variant, engine in pairs:
        name = _name(variant, engine)
        baseline = judged[0] if judged else None
        try:
            found = judge_one(workspace if judged else needed(workspace), variant, engine, evaluation, baseline)
        except StorageError:
            raise
        except BurnishError as error:
            if baseline is None:
                raise as_input(error, f"the baseline {name!r} cannot be judged") from error
            failures.append(failure_of(name, "fidelity", error))
            workspace.observer.done(name, told_of(failures[-1]))
            continue
        judged.append(found)
        workspace.observer.done(name, _sentence(next(iter(found.fidelities.values()))))
        _tell(workspace, found, judged[0])
    return judged, failures


def _tell(workspace: Workspace, one: Judged, baseline: Judged) -> None:
    """Notes what numbers leave out; what is so for the baseline, too, once."""
    said = () if one is baseline else next(iter(baseline.fidelities.values())).notes
    for note in next(iter(one.fidelities.values())).notes:
        if note not in said:
            workspace.observer.note(f"{one.name}: {note}")


def judge_one(
    workspace: Workspace, variant: Variant, engine: EngineSpec, evaluation: Samples, baseline: Judged | None
) -> Judged:
    """How a variant answers in one engine, at each batch size that counts; ``baseline`` is None for itself.

    Raises:
        BurnishError: it cannot be run or judged there.
    """
    served = sorted({profile.max_batch_size for profile in workspace.plan.profiles})
    sizes = [*served] if variant.batch_dependent else served[-1:]
    reference = None if baseline is None else next(iter(baseline.answers.values()))
    parity = baseline is None or variant.source == baseline.variant.source
    # The baseline is what is served today, and the measure of all others, whatever its sums do.
    saturation = baseline is not None and overflow_matters(variant, engine, workspace.plan.target_instruction_sets)
    fidelities: dict[int, Fidelity] = {}
    answers: dict[int, Path] = {}
    while sizes:
        size = sizes.pop()
        fidelities[size], answers[size] = _fidelity(
            workspace, variant, engine,
            batch_size=size, evaluation=evaluation, reference=reference, parity=parity, saturation=saturation,
        )  # fmt: skip
        refuse_saturated(fidelities[size])
        if len(fidelities) == 1 and depends_undeclared(variant, fidelities[size]):
            workspace.observer.note(
                f"{_name(variant, engine)}: an answer depends on its neighbours in the batch, by up to "
                f"{fidelities[size].metrics['batch_dependence'].value:.2g} of the outputs' spread, though none of its "
                "stages says so; it is judged at each batch size"
            )
            sizes = [other for other in served if other != size]
    fidelities, answers = dict(sorted(fidelities.items())), dict(sorted(answers.items()))
    return Judged(name=_name(variant, engine), variant=variant, engine=engine, fidelities=fidelities, answers=answers)


def overflow_matters(variant: Variant, engine: EngineSpec, instruction_sets: Sequence[str]) -> bool:
    """Whether sums of u8 times s8 are to be looked at: ONNX Runtime on machines whose kernels cut them off."""
    return variant.artifact.format == "onnx" and engine.name == "onnxruntime" and saturates_on(instruction_sets)


def refuse_saturated(fidelity: Fidelity) -> None:
    """Returns when no u8 times s8 sum overflows, or nobody looked.

    Raises:
        StageError: one does; the message says how many, where, and what to do.
    """
    share = fidelity.metrics.get("saturated_share")
    if share is not None and share.value > 0:
        raise StageError(next((note for note in fidelity.notes if SATURATED in note), SATURATED))


def depends_undeclared(variant: Variant, fidelity: Fidelity) -> bool:
    """Whether answers depend on their neighbours beyond rounding, and no stage of the variant has said so."""
    moved = fidelity.metrics.get("batch_dependence")
    return not variant.batch_dependent and moved is not None and moved.value > BATCH_TOLERANCE


def _fidelity(
    workspace: Workspace,
    variant: Variant,
    engine: EngineSpec,
    *,
    batch_size: int,
    evaluation: Samples,
    reference: Path | None,
    parity: bool,
    saturation: bool,
) -> tuple[Fidelity, Path]:
    plan = workspace.plan
    instruction_set = widest_instruction_set(plan.host)
    components = fidelity_components(
        variant.id,
        engine,
        engine_version=version(engine.name),
        instruction_set=instruction_set,
        batch_size=batch_size,
        samples_digest=evaluation.digest,
        metric=plan.config.metric,
        metric_code=code_digests(plan.config.metric, plan.base) if ":" in plan.config.metric else None,
        parity=parity,
        seed=plan.config.seed,
        saturation=saturation,
    )
    components["reference"] = "itself" if reference is None else reference.stem
    answers = workspace.folder("outputs") / f"{digest(components)}.npz"

    def evaluate() -> Fidelity:
        return measure_fidelity(
            variant.id,
            workspace.store.path(variant.artifact) / variant.artifact.entry,
            engine,
            samples=plan.path(plan.config.samples.evaluation),
            samples_digest=evaluation.digest,
            out=answers,
            reference=reference,
            parity=parity,
            metric=plan.config.metric,
            batch_size=batch_size,
            instruction_set=instruction_set,
            threads=plan.host.cores,
            seed=plan.config.seed,
            saturation=saturation,
            adaptation=variant.adaptation,
            limits=limits_of(workspace),
            python_path=plan.base,
        )

    fidelity, known = workspace.remember("Fidelity", _name(variant, engine), components, evaluate)
    if known and not answers.is_file():
        evaluate()  # the record stays; measuring also needs the answers, to check replies against
    return fidelity, answers


def screen_variants(workspace: Workspace, judged: Sequence[Judged]) -> tuple[list[Judged], list[Failure]]:
    """The same, each with its in-process time; one that could not be timed is a failure instead.

    Raises:
        BurnishError: the baseline cannot be timed; there is then nothing to compare with.
    """
    workspace.observer.phase("Timing in process", len(judged))
    timed: list[Judged] = []
    failures: list[Failure] = []
    for one in judged:
        try:
            timed.append(screen_one(workspace if timed else needed(workspace), one))
            outcome = ", ".join(
                f"{estimate.value:.2f} ms ({name.removeprefix('inprocess_ms.')})"
                for name, estimate in timed[-1].screening.metrics.items()  # type: ignore[union-attr]
            )
        except StorageError:
            raise
        except BurnishError as error:
            if not timed:
                raise as_input(error, f"the baseline {one.name!r} cannot be timed") from error
            failures.append(failure_of(one.name, "screen", error))
            outcome = told_of(failures[-1])
        workspace.observer.done(one.name, outcome)
    return timed, failures


def screen_one(workspace: Workspace, one: Judged) -> Judged:
    """The same with its in-process time.

    Raises:
        BurnishError: it cannot be timed.
    """
    profile = workspace.plan.profiles[0]
    sizes = tuple(sorted({1, profile.max_batch_size}))
    budget_s = workspace.plan.level.screen_s
    screening = time_in_process(workspace, one, one.name, sizes=sizes, threads=profile.threads, budget_s=budget_s)
    return replace(one, screening=screening)


def time_in_process(
    workspace: Workspace, one: Judged, name: str, *, sizes: Sequence[int], threads: int, budget_s: float
) -> Screening:
    """The variant's time in process, remembered under ``name``.

    Args:
        workspace: the plan, and where results go.
        one: the variant in its engine.
        name: what the journal calls it.
        sizes: batch sizes to time.
        threads: of the session.
        budget_s: for each batch size.

    Raises:
        BurnishError: it cannot be timed.
    """
    plan = workspace.plan
    components = {
        "variant": one.variant.id,
        "engine": one.engine.key,
        "engine_version": version(one.engine.name),
        "host": plan.host.fingerprint,
        "batch_sizes": list(sizes),
        "threads": threads,
        "budget_s": budget_s,
        "samples": next(iter(one.fidelities.values())).samples_digest,
    }

    def time_it() -> Screening:
        return screen_variant(
            one.variant.id,
            workspace.store.path(one.variant.artifact) / one.variant.artifact.entry,
            one.engine,
            samples=plan.path(plan.config.samples.evaluation),
            batch_sizes=sizes,
            threads=threads,
            budget_s=budget_s,
            adaptation=one.variant.adaptation,
            cpus=plan.server_cpus,
            limits=limits_of(workspace),
        )

    return workspace.remember("Screening", name, components, time_it)[0]


def choose_served(workspace: Workspace, judged: Sequence[Judged]) -> tuple[list[Judged], list[Failure]]:
    """The variants worth serving: the baseline, and the fastest in process of those that answer well enough.

    Of a variant with several engine settings only the fastest is served, so that places go to what differs. The rest
    become failures of kind ``screened_out`` that say why.
    """
    baseline, *others = judged
    policy, most = workspace.plan.policy, workspace.plan.level.served or len(others)
    reference = next(iter(baseline.fidelities.values()))
    served: list[Judged] = []
    failures: list[Failure] = []
    for one in sorted(others, key=_ms_a_row):
        reason = (
            (OTHER_SIGNATURE if one.variant.signature_changed and policy.signature == "same" else None)
            or _too_unlike(policy, one, reference)
            or _too_slow(one, served, most)
        )
        if reason is None:
            served.append(one)
        else:
            failures.append(Failure(subject=one.name, phase="screen", kind="screened_out", reason=reason))
    return [baseline, *served], failures


def _too_slow(one: Judged, served: Sequence[Judged], most: int) -> str | None:
    """Why a variant is not worth serving beside those that are faster in process, or None."""
    sibling = next((other for other in served if other.variant.id == one.variant.id), None)
    if sibling is not None:
        return (
            f"{_ms_a_row(one):.2f} ms a row in process; the same model as {sibling.name} takes {_ms_a_row(sibling):.2f}"
        )
    if len(served) < most:
        return None
    fastest, slowest = _ms_a_row(served[0]), _ms_a_row(served[-1])
    return f"{_ms_a_row(one):.2f} ms a row in process; the {most} served take {fastest:.2f} to {slowest:.2f} ms"


def _too_unlike(policy: Policy, one: Judged, reference: Fidelity) -> str | None:
    """Why no candidate of this variant could meet the policy's limits on its answers, or None."""
    wanted = _keyed(reference)
    for constraint in policy.constraints:
        if constraint.metric not in _METRICS_OF_FIDELITY:
            continue
        outcomes = [judge(constraint, _keyed(fidelity), wanted) for fidelity in one.fidelities.values()]
        if all(outcome.outcome == "fail" for outcome in outcomes):
            return outcomes[0].reason
    return None


def _keyed(fidelity: Fidelity) -> dict[tuple[str, str | None], Estimate]:
    return {(name, None): estimate for name, estimate in fidelity.metrics.items()}


def _ms_a_row(one: Judged) -> float:
    """Time for one row, in ms, at the batch size where it is smallest: what a saturated server comes near to."""
    metrics = one.screening.metrics if one.screening else {}
    return min(estimate.value / int(name.rpartition("_")[2]) for name, estimate in metrics.items())


def as_input(error: BurnishError, what: str) -> BurnishError:
    """The error that ends a campaign whose baseline failed: its model is the user's, so this is no bug of burnish."""
    if error.exit_code != BurnishError.exit_code:
        return error
    detail = f"\n{error.log}" if isinstance(error, ChildFailure) and error.log else ""
    return InputError(f"{what}: {error.message}{detail}", hint=error.hint)


def needed(workspace: Workspace) -> Workspace:
    """The same for work that is done even where no time is left: the baseline's, since nothing is known without it."""
    return replace(workspace, budget=UNLIMITED)


def limits_of(workspace: Workspace) -> Limits:
    """What a child process of this campaign may take."""
    limits = workspace.plan.config.limits
    return Limits(timeout_s=limits.timeout_s, memory_mb=limits.memory_mb)


def failure_of(subject: str, phase: FailurePhase, error: BurnishError) -> Failure:
    """The record of an error that stopped one variant."""
    kind: FailureKind = "error"
    detail = ""
    if isinstance(error, ChildFailure):
        kind, detail = error.kind, error.log
    elif isinstance(error, NotApplicableError):
        kind = "not_applicable"
    elif isinstance(error, ServerDiedError):
        kind = "died"
    elif isinstance(error, BudgetUsedUpError):
        kind = "budget"
    reason, _, rest = error.message.partition("\n")
    return Failure(subject=subject, phase=phase, kind=kind, reason=reason, detail=detail or rest or error.hint or "")


def told_of(failure: Failure) -> str:
    """The outcome that an observer is told of."""
    if failure.kind == "not_applicable":
        return f"not applicable: {failure.reason}"
    return f"not begun: {failure.reason}" if failure.kind == "budget" else f"{FAILED}{failure.reason}"


def _name(variant: Variant, engine: EngineSpec) -> str:
    label = engine_label(engine, variant.recipe)
    return f"{variant.name}.{label}" if label else variant.name


def _sentence(fidelity: Fidelity) -> str:
    accuracy, drop = fidelity.metrics.get("accuracy"), fidelity.metrics.get("accuracy_drop")
    if accuracy is None or drop is None:
        return "judged"
    return f"{fidelity.task_metric} {accuracy.value:.4f}, drop {drop.value:+.4f}"
