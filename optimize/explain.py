"""Why a variant is faster or slower than the baseline, and which recipes are hopeless before anything is made.

The reasons come from the graphs that the engines really run and from their profiles (`optimize.profiling`); the
sentence is a pure function of the two. What is predicted are only effects that were seen on every network they were
tried on.
"""

import difflib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimize.admission import ENTRY, ask_child
from optimize.config import load_campaign
from optimize.engines.local import ChildFailure, Limits
from optimize.judging import as_input
from optimize.profiling import TIMING_S, profile_variant
from optimize.recipes import engine_label
from optimize.reporting import read_campaign
from profiles.measure.host import split_cpus
from registry.errors import InputError, StageError
from registry.filesystems import local_path
from registry.records import Adaptation, Campaign, EngineGraph, EngineSpec, Estimate, Explanation, Recipe, Variant
from registry.store import FolderStore

_NOTABLE = 0.1  # a part of the time worth a word
_ALIKE = 0.05  # timings of two processes differ by as much without a cause

_AT_RUN_TIME = ("ConvInteger", "DynamicQuantizeLinear")
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize")
_CASTS = ("Cast", "Convert")
# Shown of each graph, however little time they take.
_ALWAYS_TOLD = frozenset({*_AT_RUN_TIME, "MatMulInteger", *_QUANTIZERS, *_CASTS})
_REORDERS = ("Reorder", "ReorderInput", "ReorderOutput", "Transpose")
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_WEIGHTED = frozenset({*_CONVOLUTIONS, "MatMul", "Gemm", "Attention", "LSTM", "GRU", "RNN"})


# --- the sentence ----------------------------------------------------------------------------------------------


def compare_times(before: EngineGraph, after: EngineGraph) -> Estimate:
    """The baseline's time over the variant's, with the interval that the two times allow."""
    low = high = None
    if before.time.low is not None and after.time.high is not None:
        low = before.time.low / after.time.high
    if before.time.high is not None and after.time.low is not None:
        high = before.time.high / after.time.low
    return Estimate(
        value=before.time.value / after.time.value,
        low=low,
        high=high,
        runs=min(before.time.runs, after.time.runs),
        method="ratio of medians",
        unit="1",
    )


def explain_difference(before: EngineGraph, after: EngineGraph, speedup: Estimate) -> str:
    """Why ``after`` is faster or slower than ``before``, in one sentence.

    Times within 5 % of each other, or with intervals that leave both open, count as equal.
    """
    if speedup.value > 1 + _ALIKE and (speedup.low is None or speedup.low > 1):
        return f"{_times(speedup.value)} faster: {_listed(_gains(before, after))}."
    if speedup.value < 1 - _ALIKE and (speedup.high is None or speedup.high < 1):
        return f"{_times(1 / speedup.value)} slower: {_listed(_losses(before, after))}."
    gains = _arithmetic(before, after)
    costs = _costs(before, after)
    if gains and costs:
        return f"As fast as the baseline: {_listed(gains)}, but {_listed(costs)}."
    return f"As fast as the baseline: {_listed(costs or gains or ['the arithmetic is the same'])}."


def describe_graph(graph: EngineGraph) -> str:
    """Where the time of one model goes, in one sentence."""
    return f"{_listed([*(_in(kind, share) for kind, share in _mac_shares(graph).items()), _top(graph)])}."


def _gains(before: EngineGraph, after: EngineGraph) -> list[str]:
    reasons = _arithmetic(before, after)
    if not reasons and before.engine.name != after.engine.name:
        reasons = [f"{after.engine.name} does the same arithmetic faster than {before.engine.name}"]
    fewer, many = (sum(one.nodes for one in graph.operators) for graph in (after, before))
    if not reasons and fewer < many:
        reasons = [f"it does the same arithmetic in {fewer} operators instead of {many}"]
    return [*reasons, _where(before, after)]


def _arithmetic(before: EngineGraph, after: EngineGraph) -> list[str]:
    """How the arithmetic differs: fewer multiply-adds, or narrower types than the baseline's."""
    reasons = []
    had, has = sum(before.macs.values()), sum(after.macs.values())
    # What is counted differs between engines where operators are fused or hold graphs of their own.
    if before.engine.name == after.engine.name and has < had * (1 - _ALIKE):
        reasons.append(f"it does {_percent(has / had)} of the baseline's multiply-adds")
    known = _mac_shares(before)
    for kind, share in _mac_shares(after).items():
        if kind != "float32" and share - known.get(kind, 0.0) >= 0.005:
            reasons.append(_in(kind, share))
    return reasons


def _in(kind: str, share: float) -> str:
    amount = "all" if share > 0.9995 else f"{_percent(share)} of"
    return f"{amount} multiply-adds are {'with' if 'weights' in kind else 'in'} {kind}"


def _losses(before: EngineGraph, after: EngineGraph) -> list[str]:
    costs = _costs(before, after)
    explained = sum(_share(after, names) for names in (_AT_RUN_TIME, _CASTS, _REORDERS, _QUANTIZERS))
    return costs if costs and explained > 0.5 else [*costs, _where(before, after)]


def _costs(before: EngineGraph, after: EngineGraph) -> list[str]:
    """What the variant spends time on that the baseline does not, the largest first."""
    told = [
        (share, _taking(after, names))
        for names in (_AT_RUN_TIME, _CASTS, _REORDERS)
        if (share := _share(after, names) - _share(before, names)) >= _NOTABLE
    ]
    quantizing = _share(after, _QUANTIZERS)
    if after.unfused_qdq and quantizing >= _NOTABLE:
        pairs = "1 pair" if after.unfused_qdq == 1 else f"{after.unfused_qdq} pairs"
        told.append((quantizing, f"{_taking(after, _QUANTIZERS)}, with {pairs} that are not fused"))
    return [sentence for _, sentence in sorted(told, reverse=True)]


def _taking(graph: EngineGraph, names: Sequence[str]) -> str:
    present = [one.operator for one in graph.operators if one.operator in names]
    verb = "take" if len(present) > 1 else "takes"
    return f"{_listed(present)} {verb} {_percent(_share(graph, names))} of the time"


def _where(before: EngineGraph, after: EngineGraph) -> str:
    """What takes most of the time now, and what did before."""
    if not before.operators or not after.operators:
        return "nothing is known of where the time goes"
    was, now = before.operators[0], after.operators[0]
    if was.operator == now.operator:
        return f"{now.operator} takes {_percent(now.time_share)} of the time, before {_percent(was.time_share)}"
    return f"{_top(after)} where {was.operator} took {_percent(was.time_share)}"


def _top(graph: EngineGraph) -> str:
    if not graph.operators:
        return "nothing is known of where the time goes"
    return f"{graph.operators[0].operator} takes {_percent(graph.operators[0].time_share)} of the time"


def _mac_shares(graph: EngineGraph) -> dict[str, float]:
    total = sum(graph.macs.values())
    return {kind: count / total for kind, count in sorted(graph.macs.items(), key=lambda item: -item[1])}


def _share(graph: EngineGraph, names: Sequence[str]) -> float:
    return sum(one.time_share for one in graph.operators if one.operator in names)


def _listed(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio >= 1.95 else f"{ratio:.2f} times"


def _percent(share: float) -> str:
    """Whole percents, never 0 of what is there, nor 100 of what is not all."""
    percent = 100 * share
    if 0 < percent < 0.5:
        return "<1 %"
    return ">99 %" if 99.5 <= percent < 100 else f"{percent:.0f} %"


# --- explanations ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model file in an engine, under the name that people know it by.

    Attributes:
        adaptation: how its inputs come from the samples, where it takes others than the baseline.
    """

    name: str
    entry: Path
    engine: EngineSpec
    adaptation: tuple[Adaptation, ...] = ()


def explain(
    variants: Sequence[Model],
    baseline: Model,
    *,
    samples: Path,
    batch_size: int,
    threads: int = 1,
    timing_s: float = TIMING_S,
    limits: Limits | None = None,
    cpus: Sequence[int] | None = None,
) -> list[Explanation]:
    """Why each variant is faster or slower than the baseline, from runs in child processes, one after the other.

    Args:
        variants: the models to explain; the baseline itself among them is only described.
        baseline: what they are compared with.
        samples: the ``.npz`` that batches are made of.
        batch_size: samples in a run.
        threads: of each session.
        timing_s: wall time for the timing of each model.
        limits: of each child.
        cpus: the children may run on, or None for all.

    Raises:
        StageError: a model cannot be opened or run, or the samples do not fit it.
        InputError: the samples cannot be read.
        ChildFailure: a child was stopped by a limit, or died.
    """

    def profile(model: Model) -> EngineGraph:
        return profile_variant(model.entry, model.engine, samples=samples, batch_size=batch_size, threads=threads,
                               timing_s=timing_s, adaptation=model.adaptation, limits=limits, cpus=cpus)  # fmt: skip

    before = profile(baseline)
    told = []
    for model in variants:
        after = before if model == baseline else profile(model)
        speedup = compare_times(before, after)
        sentence = f"The baseline: {describe_graph(before)}" if after is before else None
        told.append(
            Explanation(
                name=model.name,
                baseline=baseline.name,
                speedup=speedup,
                before=before,
                after=after,
                sentence=sentence or explain_difference(before, after, speedup),
            )
        )
    return told


def explain_campaign(
    work: Path,
    wanted: str,
    *,
    samples: Path | None,
    campaign_file: Path | None,
    batch_size: int | None,
    threads: int | None,
) -> list[Explanation]:
    """Why a variant of a finished campaign is faster or slower than its baseline, on this machine.

    Args:
        work: the campaign's working folder.
        wanted: name or id of a variant or candidate; a variant's stands for all the engines it is meant for.
        samples: the ``.npz`` that batches are made of; None for the campaign's evaluation samples.
        campaign_file: None for ``campaign.yaml`` beside the working folder.
        batch_size: samples in a run; None for the largest batch that was served.
        threads: of each session; None for as many as were served.

    Raises:
        InputError: there is no such campaign, variant or file, or a model does not run on the samples.
        ChildFailure: a child was stopped by a limit, or died.
    """
    campaign = read_campaign(work)
    store = FolderStore(work)
    models, baseline = models_of(campaign, wanted, lambda variant: store.path(variant.artifact))
    served = [candidate.serving for candidate in campaign.candidates]
    return _explained(
        models,
        baseline,
        samples=samples or evaluation_samples(work, campaign_file),
        batch_size=batch_size or max((profile.max_batch_size for profile in served), default=1),
        threads=threads or (served[0].threads if served else 1),
    )


def evaluation_samples(work: Path, campaign_file: Path | None) -> Path:
    """The evaluation samples that a campaign file names; it stands beside the working folder if None is given.

    Raises:
        InputError: there is no such campaign file.
    """
    file = campaign_file or work.resolve().parent / "campaign.yaml"
    if not file.is_file():
        raise InputError(
            f"no campaign file at {file}, which names the samples to run",
            hint="Name it with --campaign, or the samples with --samples.",
        )
    return local_path(load_campaign(file).samples.evaluation, file.parent)


def explain_files(
    model: Path, against: Path, *, samples: Path, batch_size: int | None, threads: int | None
) -> list[Explanation]:
    """Why a model file is faster or slower than another; ``.xml`` runs in OpenVINO at its default precision.

    Raises:
        InputError: a file is missing or no model, or does not run on the samples.
        UntrustedModelError: a file asks for more than a model may.
        ChildFailure: a child was stopped by a limit, or died.
    """
    with tempfile.TemporaryDirectory(prefix="burnish-explain-") as scratch:
        first, second = (_admitted(path, Path(scratch) / str(number)) for number, path in enumerate((model, against)))
        return _explained([first], second, samples=samples, batch_size=batch_size or 1, threads=threads or 1)


def _admitted(path: Path, folder: Path) -> Model:
    """A copy of a model that nobody has vouched for, checked as a source is."""
    folder.mkdir()
    if path.suffix == ".xml":
        ask_child("optimize.admission:admit_here", path, folder=str(folder), format="openvino")
        return Model(name=str(path), entry=folder / path.name, engine=EngineSpec(name="openvino"))
    ask_child("optimize.admission:admit_here", path, folder=str(folder))
    return Model(name=str(path), entry=folder / ENTRY, engine=EngineSpec(name="onnxruntime"))


def _explained(
    models: Sequence[Model], baseline: Model, *, samples: Path, batch_size: int, threads: int
) -> list[Explanation]:
    if not samples.is_file():
        raise InputError(f"no samples at {samples}", hint="Write one array per input with numpy.savez(path, **arrays).")
    cpus, _, _ = split_cpus()
    try:
        return explain(models, baseline, samples=samples, batch_size=batch_size, threads=threads, cpus=cpus)
    except (StageError, ChildFailure) as error:
        what = "the models cannot be run: they may need --batch-size 1, or other --samples"
        raise as_input(error, what) from error


def models_of(campaign: Campaign, wanted: str, folder: Callable[[Variant], Path]) -> tuple[list[Model], Model]:
    """The models that a name or id of a finished campaign stands for, and its baseline.

    Args:
        campaign: the campaign's record.
        wanted: name or id of a variant or candidate; a variant's stands for all the engines it is meant for.
        folder: where a variant's files are.

    Raises:
        InputError: nothing is called so, or it was not made.
    """
    known = [(variant, name, engine) for variant in campaign.variants for name, engine in _engines(variant)]
    deployed = {
        (candidate.variant_id, candidate.engine)
        for candidate in campaign.candidates
        if wanted in {candidate.id, candidate.name}
    }
    found = [
        (variant, name, engine)
        for variant, name, engine in known
        if wanted in {variant.id, variant.name, name} or (variant.id, engine) in deployed
    ]
    if not found:
        raise _unknown(campaign, wanted, sorted({text for variant, name, _ in known for text in (variant.name, name)}))

    def model(variant: Variant, name: str, engine: EngineSpec) -> Model:
        entry = folder(variant) / variant.artifact.entry
        return Model(name=name, entry=entry, engine=engine, adaptation=tuple(variant.adaptation))

    return [model(*one) for one in found], model(*known[0])


def _engines(variant: Variant) -> list[tuple[str, EngineSpec]]:
    """The engines that a variant is meant for, each with the name that reports call the variant by in it."""
    labels = ((engine_label(engine, variant.recipe), engine) for engine in variant.recipe.engines)
    return [(f"{variant.name}.{label}" if label else variant.name, engine) for label, engine in labels]


def _unknown(campaign: Campaign, wanted: str, names: Sequence[str]) -> InputError:
    failed = next((one for one in campaign.failures if one.subject == wanted), None)
    if failed is not None:
        return InputError(f"{wanted!r} was not made: {failed.reason}")
    failures = [one.subject for one in campaign.failures]
    nearest = difflib.get_close_matches(wanted, [*names, *failures], n=1, cutoff=0.4)
    listed = f"There are: {', '.join(names)}."
    return InputError(
        f"the campaign {campaign.name!r} has no variant or candidate {wanted!r}",
        hint=f"Did you mean {nearest[0]!r}? {listed}" if nearest else listed,
    )


def as_lines(explanation: Explanation, most: int = 8) -> list[str]:
    """The explanation for people: the sentence, then both graphs by operator.

    The ``most`` operators that take the longest are listed, and, however short, all that quantize, cast, or compute on
    what was quantized at run time.
    """
    before, after = explanation.before, explanation.after
    lines = [f"{explanation.name}: {explanation.sentence}"]
    sides = [(explanation.baseline, before)]
    if explanation.name != explanation.baseline:
        sides.append((explanation.name, after))
    for name, graph in sides:
        kinds = ", ".join(f"{_percent(share)} {kind}" for kind, share in _mac_shares(graph).items()) or "none known"
        lines += [
            f"  {name} in {graph.engine.name} {graph.engine_version}: {graph.time.value:.3g} ms "
            f"(batch {graph.batch_size}, {graph.threads} thread{'s' if graph.threads > 1 else ''})",
            f"    multiply-adds a sample: {sum(graph.macs.values()):,} ({kinds})",
        ]
        if graph.unfused_qdq:
            lines.append(f"    pairs of quantize and dequantize that are not fused: {graph.unfused_qdq}")
        told = [one for place, one in enumerate(graph.operators) if place < most or one.operator in _ALWAYS_TOLD]
        lines += [f"    {_percent(one.time_share):>5}  {one.operator} x {one.nodes}" for one in told]
        if left := [one for one in graph.operators if one not in told]:
            lines.append(f"    {_percent(sum(one.time_share for one in left)):>5}  {len(left)} others")
    return lines


# --- predictions -----------------------------------------------------------------------------------------------


def predictable(recipe: Recipe) -> bool:
    """Whether `predict` could have anything to say of a recipe."""
    return any(call.name == "quantize.dynamic" for call in recipe.stages)


def predict(recipe: Recipe, weights: Mapping[str, int]) -> str | None:
    """Why a variant is not worth making, or None where nothing is certain enough to say.

    Int8 with ranges found at run time made every convolutional network it was tried on slower, to 0.14 to 0.44 times
    the speed of float32 in ONNX Runtime. Nothing else is predicted: static int8 of each kind, float16 and narrow
    weights were faster on some network, and without VNNI nothing was tried.

    Args:
        recipe: what would make it.
        weights: operator -> elements of the source's constant weights; see `weights_of`.
    """
    call = next((call for call in recipe.stages if call.name == "quantize.dynamic"), None)
    convolutional, total = sum(weights.get(name, 0) for name in _CONVOLUTIONS), sum(weights.values())
    # A convolution uses each weight at many places, so half of the weights is most of the work.
    if call is None or convolutional <= total / 2:
        return None
    otherwise = "predict: false" if call.params.get("ops") == "all" else "predict: false and ops: all"
    return (
        f"predicted: {_percent(convolutional / total)} of the weights are of convolutions, and int8 with ranges found "
        f"at run time made every such network slower (0.14 to 0.44 times as fast); {otherwise} would have it made"
    )


def weights_of(path: Path) -> dict[str, int]:
    """Operator -> elements of the constant weights of an ONNX file; for a process with limits."""
    from optimize.stages.onnx_files import load_graph, weight_elements

    counts = weight_elements(load_graph(path))
    return {name: count for name, count in counts.items() if count and name in _WEIGHTED}
