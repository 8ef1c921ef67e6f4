"""What ``burnish pipeline`` does: reads plans, serves and measures their steps, and runs combinations on samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from optimize.admission import ENTRY, Format, admit_here
from optimize.engines.local import run_in_child
from optimize.fidelity import compare_outputs
from optimize.metrics import find_metric
from optimize.samples import Samples, load_samples
from optimize.serving import Served, serve_model, serving_profile
from optimize.signature import signature_of
from profiles.deploy.cluster import Usage
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Payload, encode_payloads
from profiles.measure.host import fingerprint_host, split_cpus
from profiles.measure.levels import Level
from profiles.pipelines.analysis import Analysis, Overhead, predict_latency, stations_of
from profiles.pipelines.balance import check_p99
from profiles.pipelines.checks import Signature
from profiles.pipelines.choice import Combination, Shortlist
from profiles.pipelines.documents import ModelPart, Plan, load_plan
from profiles.pipelines.gateway import WITHOUT, core2_target, local_pipeline
from profiles.pipelines.graph import Pipeline, in_order, visits
from profiles.pipelines.measured import Measured, StepNumbers, WholeNumbers
from profiles.pipelines.measuring import Found, as_step, as_whole, cpu_at, latency_at, measure_endpoint
from profiles.pipelines.rollout import stages_of
from profiles.pipelines.run import run_samples
from profiles.serving.core2.manifests import as_yaml
from profiles.serving.session import open_session
from registry.errors import InputError, StageError
from registry.ledger import write_durably
from registry.records import Estimate, ServingProfile, Target, exact
from registry.report import numbers
from registry.report.pipeline import PipelineView, StepView

Told = Callable[[str], None]
RATE_SHARES = (0.3, 0.6)
_MOST_SAMPLES = 64
_BYTES = {"bool": 1, "int8": 1, "uint8": 1, "float16": 2, "int16": 2, "uint16": 2, "float64": 8, "int64": 8}


# --- reading ---------------------------------------------------------------------------------------------------


def file_of(plan: Plan, step: str, variant: str | None = None) -> Path:
    """The model file of a step's variant; of its first where none is named.

    Raises:
        InputError: the plan has no model for the step, no such variant, or no such file.
    """
    if step not in plan.models:
        raise InputError(
            f"step {step!r} has no model", hint=f"Name its file in the plan: models: {{{step}: {{variants: {{...}}}}}}."
        )
    variants = plan.models[step].variants
    name = next(iter(variants)) if variant is None else variant
    if name not in variants:
        raise InputError(f"step {step!r} has no variant {name!r}", hint=f"There are: {', '.join(variants)}.")
    path = plan.folder / variants[name]
    if not path.is_file():
        raise InputError(f"step {step!r}: there is no model file {path}", hint="Check the path in the plan.")
    return path


def signatures(plan: Plan) -> dict[str, Signature]:
    """Step -> what its first variant takes and gives, for the steps that the plan has models of.

    Raises:
        InputError: a file is missing, or no model.
    """
    files = {step: str(file_of(plan, step).absolute()) for step in plan.pipeline.names if step in plan.models}
    described = run_in_child("optimize.pipelines:read_here", {"files": files}) if files else {}
    found = {}
    for step, one in described.items():
        inputs, outputs = signature_of(one)
        found[step] = Signature(inputs=inputs, outputs=outputs)
    return found


def read_here(*, files: dict[str, str]) -> dict[str, Any]:
    """`signatures` as JSON has them, in this process, which is a child."""
    found = {}
    for step, path in files.items():
        with TemporaryDirectory(prefix="burnish-pipeline-") as folder:
            found[step] = admit_here(path=path, folder=folder, format=_format(path))
    return found


def _format(path: str) -> Format:
    return "openvino" if path.endswith(".xml") else "onnx"


def message_bytes(signature: Mapping[str, Signature], *, rows: int = 1, free: int = 64) -> dict[str, int]:
    """Topic in words -> bytes of a message, free dimensions after the first taken for ``free``."""
    found = {}
    for step, one in signature.items():
        for side, tensors in (("inputs", one.inputs), ("outputs", one.outputs)):
            size = 0
            for tensor in tensors:
                sizes = [size if isinstance(size, int) else free for size in tensor.shape[1:]]
                size += rows * math.prod(sizes) * _BYTES.get(tensor.dtype, 4)
            found[f"{step}.{side}"] = size
    return found


# --- on samples ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """A combination run end to end on labelled samples.

    Attributes:
        combination: the variants and their surrogate.
        accuracy: the metric.
        accuracy_drop: what it loses against the first variants, sample by sample; exactly 0 of these themselves.
        samples: how many.
    """

    combination: Combination
    accuracy: Estimate
    accuracy_drop: Estimate
    samples: int


def answers(plan: Plan, samples: Samples, variants: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every sample through the graph with these variants, in a child process with limits.

    Returns:
        Output -> array, and step -> input -> array of what reached it.

    Raises:
        InputError: a model is missing, or does not fit.
    """
    with TemporaryDirectory(prefix="burnish-pipeline-") as name:
        work = Path(name)
        files = {step: str(file_of(plan, step, variants.get(step)).absolute()) for step in plan.pipeline.names}
        np.savez(work / "inputs.npz", **dict(samples.inputs))
        run_in_child(
            "optimize.pipelines:answer_here", {"plan": str(plan.path.absolute()), "files": files, "work": str(work)}
        )
        outputs = _unpacked(work / "outputs.npz")
        seen: dict[str, dict[str, NDArray[Any]]] = {}
        for key, array in _unpacked(work / "seen.npz").items():
            step, _, tensor = key.partition("/")
            seen.setdefault(step, {})[tensor] = array
    return outputs, seen


def answer_here(*, plan: str, files: dict[str, str], work: str) -> None:
    """`answers`, in this process, which is a child."""
    read, folder = load_plan(Path(plan)), Path(work)
    models = {}
    for step, path in files.items():
        own, kind = folder / step, _format(path)
        own.mkdir()
        admit_here(path=path, folder=str(own), format=kind)
        entry = own / (Path(path).name if kind == "openvino" else ENTRY)
        models[step] = open_session(entry, engine="openvino" if kind == "openvino" else "onnxruntime").run
    outputs, seen = run_samples(read.pipeline, models, _unpacked(folder / "inputs.npz"))
    np.savez(folder / "outputs.npz", **outputs)
    np.savez(
        folder / "seen.npz", **{f"{step}/{name}": array for step, ones in seen.items() for name, array in ones.items()}
    )


def _unpacked(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def samples_of(plan: Plan) -> Samples:
    """The plan's samples.

    Raises:
        InputError: it names none, or they cannot be read.
    """
    if plan.samples is None:
        raise InputError("the plan names no samples", hint="Say samples: FILE.npz with the pipeline's inputs.")
    return load_samples(plan.samples)


def score(plan: Plan, outputs: Mapping[str, NDArray[Any]], samples: Samples, metric: str) -> float:
    """The metric of a pipeline's answers.

    Raises:
        InputError: the samples have no labels, or the metric does not fit.
    """
    if samples.labels is None:
        raise InputError("the samples have no labels, so that nothing is known of accuracy", hint="Add labels.")
    found = find_metric(metric).score(judged_outputs(plan, outputs), samples.labels)
    return float(found) if isinstance(found, float) else float(np.nanmean(found))


def judged_outputs(plan: Plan, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The outputs that hold what is judged.

    Raises:
        InputError: the plan names one that is not there.
    """
    if plan.answer is None:
        return dict(outputs)
    if plan.answer not in outputs:
        raise InputError(f"the pipeline has no output {plan.answer!r}", hint=f"It has: {', '.join(outputs)}.")
    return {plan.answer: outputs[plan.answer]}


def run_truth(
    plan: Plan, combinations: Sequence[Combination], *, metric: str = "accuracy", told: Told = lambda line: None
) -> tuple[Truth, ...]:
    """The combinations end to end on the plan's labelled samples; none where it has no models, or no such samples.

    Raises:
        InputError: see `answers`; or the metric does not fit, or answers are not finite.
    """
    samples = load_samples(plan.samples) if plan.models and plan.samples is not None else None
    if samples is None or samples.labels is None:
        return ()
    base = judged_outputs(plan, answers(plan, samples, {})[0])
    found = []
    for combination in combinations:
        own = all(variant == next(iter(plan.models[step].variants)) for step, variant in combination.variants.items())
        outputs = base if own else judged_outputs(plan, answers(plan, samples, combination.variants)[0])
        try:
            known = compare_outputs(base, outputs, samples.labels, find_metric(metric), parity=False)
        except StageError as error:
            raise InputError(f"{_named(combination)}: {error.message}", hint="Leave that variant out.") from error
        drop = exact(0.0, known["accuracy_drop"].unit) if own else known["accuracy_drop"]
        told(f"{_named(combination)}: {metric} {numbers.text(known['accuracy'])}")
        found.append(
            Truth(combination=combination, accuracy=known["accuracy"], accuracy_drop=drop, samples=len(samples))
        )
    return tuple(found)


# --- measuring -------------------------------------------------------------------------------------------------


def measure_plan(
    plan: Plan,
    *,
    level: Level,
    work: Path,
    metric: str | None = "accuracy",
    variants: bool = True,
    workers: Sequence[int] = (),
    mesh: str | None = None,
    mesh_tls: bool = False,
    told: Told = lambda line: None,
    seed: int = 0,
) -> Measured:
    """Every step alone, each of its variants, and then the whole with the first ones.

    Args:
        plan: with models and samples.
        level: how long windows are.
        work: folder for logs and arrays.
        metric: for what each variant loses alone; None to leave it out.
        variants: whether others than the first are measured.
        workers: numbers of worker processes (Triton: instances) to measure each first variant with besides, for
            balancing.
        mesh: ``host:port`` of a Core 2 where the pipeline is deployed; the whole is then measured there.
        mesh_tls: whether it speaks TLS.
        told: takes a line for each that is measured.
        seed: of arrivals and payloads.

    Raises:
        InputError: a model or the samples are missing or do not fit.
        UnreachableError: a server refused.
    """
    pipeline = plan.pipeline
    in_order(pipeline)
    samples = samples_of(plan)
    outputs, seen = answers(plan, samples, {})
    metric = metric if samples.labels is not None else None
    base = None if metric is None else score(plan, outputs, samples, metric)
    server_cpus, client_cpus, pinning = split_cpus()
    work.mkdir(parents=True, exist_ok=True)
    steps: dict[str, dict[str, StepNumbers]] = {}
    with LoadGenerator(client_cpus, work) as generator, ExitStack() as stack:
        # They stand idle while another is measured, and serve the whole at the end.
        first = {step: _replicas(stack, plan, step) for step in pipeline.names}
        bench = _Bench(generator=generator, level=level, work=work, seed=seed)
        if missing := [step for step in pipeline.names if step not in seen]:
            raise InputError(
                f"no sample reaches step {missing[0]!r}, so that it cannot be measured", hint="Add samples."
            )
        alone = {step: bench.model(first[step][0], seen[step]) for step in pipeline.names}
        # What the whole would do where its servers took turns on the same CPUs.
        counts = visits(pipeline)
        rate = 1 / sum(counts[step] / alone[step].saturation_rps for step in pipeline.names)
        for step in pipeline.names:
            own = max(1, plan.models[step].parallel_workers)
            cpu_ms = bench.cpu(first[step][0], seen[step], rate * counts[step])
            numbers = as_step(alone[step], workers=own, cpu_ms=cpu_ms, accuracy_drop=0.0)
            others = sorted(set(workers) - {own})
            by_workers = {count: bench.workers(plan, step, count, seen[step]) for count in others}
            names = list(plan.models[step].variants)
            steps[step] = {names[0]: numbers.model_copy(update={"by_workers": by_workers})}
            for variant in names[1:] if variants else ():
                with _served(plan.models[step], file_of(plan, step, variant)) as served:
                    found = bench.model(served, seen[step])
                    cpu_ms = bench.cpu(served, seen[step], rate * counts[step])
                loss = _loss(plan, samples, {step: variant}, metric, base)
                steps[step][variant] = as_step(found, workers=own, cpu_ms=cpu_ms, accuracy_drop=loss)
            for variant, known in steps[step].items():
                told(f"{step} {variant}: saturates at {known.saturation_rps:.4g} a second")
        if mesh is None:
            targets = {step: [one.deployment.target for one in ones] for step, ones in first.items()}
            target = stack.enter_context(local_pipeline(pipeline, targets, work, cpus=client_cpus))
        else:
            target = core2_target(pipeline, mesh, tls=mesh_tls)
        whole = bench.whole(target, plan, samples, without=WITHOUT if mesh is None else "")
        told(f"{pipeline.name}: saturates at {whole.saturation_rps or 0:.4g} a second")
    cpus = None if mesh else float(len(server_cpus))
    return Measured(steps=steps, whole=whole, host=fingerprint_host(pinning).fingerprint, shared_cpus=cpus)


def _loss(
    plan: Plan, samples: Samples, variants: Mapping[str, str], metric: str | None, base: float | None
) -> float | None:
    """What these variants lose against the first ones; None where nothing is known of that."""
    if metric is None or base is None:
        return None
    return base - score(plan, answers(plan, samples, variants)[0], samples, metric)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """How everything is measured."""

    generator: LoadGenerator
    level: Level
    work: Path
    seed: int

    def model(self, served: Served, inputs: Mapping[str, NDArray[Any]]) -> Found:
        target = served.deployment.target
        return self._endpoint(target, inputs, served.deployment.usage)

    def cpu(self, served: Served, inputs: Mapping[str, NDArray[Any]], rate_rps: float) -> float | None:
        target, usage = served.deployment.target, served.deployment.usage
        if rate_rps <= 0:
            return None
        return cpu_at(
            self.generator,
            target,
            _payloads(target, inputs),
            rate_rps,
            level=self.level,
            raw_root=self.work,
            usage=usage,
            seed=self.seed,
        )

    def workers(self, plan: Plan, step: str, count: int, inputs: Mapping[str, NDArray[Any]]) -> float:
        """Saturation of the step's first variant with so many workers."""
        model = plan.models[step].model_copy(update={"parallel_workers": count})
        with _served(model, file_of(plan, step)) as served:
            return self.model(served, inputs).saturation_rps

    def whole(self, target: Target, plan: Plan, samples: Samples, *, without: str) -> WholeNumbers:
        found = self._endpoint(target, samples.inputs, None)
        rates = [share * found.saturation_rps for share in RATE_SHARES]
        payloads = _payloads(target, samples.inputs)
        at = latency_at(self.generator, target, payloads, rates, level=self.level, raw_root=self.work, seed=self.seed)
        first = {step: next(iter(plan.models[step].variants)) for step in plan.pipeline.names}
        return as_whole(found, variants=first, rates=at, without=without)

    def _endpoint(
        self, target: Target, inputs: Mapping[str, NDArray[Any]], usage: Callable[[], Usage | None] | None
    ) -> Found:
        return measure_endpoint(
            self.generator,
            target,
            _payloads(target, inputs),
            level=self.level,
            raw_root=self.work,
            usage=usage,
            seed=self.seed,
        )


def _payloads(target: Target, inputs: Mapping[str, NDArray[Any]]) -> tuple[Payload, ...]:
    return encode_payloads({name: array[:_MOST_SAMPLES] for name, array in inputs.items()}, target=target)


def profile_of(model: ModelPart) -> ServingProfile:
    """How the plan has a step served.

    Raises:
        InputError: it cannot be served so.
    """
    lanes = {"instances": max(1, model.parallel_workers)} if model.server == "triton" else {
        "parallel_workers": model.parallel_workers
    }  # fmt: skip
    return serving_profile(server=model.server, threads=model.threads, **lanes)


@contextmanager
def _served(model: ModelPart, path: Path) -> Iterator[Served]:
    with serve_model(path, profile_of(model), precision="default", http_port=None, grpc_port=None) as served:
        yield served


@contextmanager
def serve_plan(plan: Plan, work: Path, *, variants: Mapping[str, str] | None = None) -> Iterator[Target]:
    """The whole pipeline on this machine: a server for each replica of each step, and a gateway before them.

    Raises:
        InputError: a model is missing, or cannot be served so.
        UnreachableError: a server or the gateway did not start.
    """
    chosen = variants or {}
    _, client_cpus, _ = split_cpus()
    with ExitStack() as stack:
        targets = {
            step: [one.deployment.target for one in _replicas(stack, plan, step, chosen.get(step))]
            for step in plan.pipeline.names
        }
        yield stack.enter_context(local_pipeline(plan.pipeline, targets, work, cpus=client_cpus))


def _replicas(stack: ExitStack, plan: Plan, step: str, variant: str | None = None) -> list[Served]:
    """The servers of a step, as many as the plan has; they end with the stack."""
    path, model = file_of(plan, step, variant), plan.models[step]
    return [stack.enter_context(_served(model, path)) for _ in range(model.replicas)]


# --- showing ---------------------------------------------------------------------------------------------------


def view_of(
    pipeline: Pipeline,
    measured: Measured,
    found: Analysis,
    *,
    variants: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> PipelineView:
    """What is shown of an analysis."""
    chosen = variants or {}
    by_step = {limit.what: limit.rate_rps for limit in found.limits}
    layers: dict[str, int] = {}
    for name in in_order(pipeline):
        layers[name] = 1 + max((layers[before] for before in pipeline.before(name)), default=-1)
    steps = tuple(
        StepView(
            name=name,
            variant=chosen.get(name) or next(iter(measured.steps[name])),
            layer=layers[name],
            limit_rps=by_step[name],
            utilisation=found.latency.steps[name].utilisation,
            sojourn_ms=found.latency.steps[name].sojourn_ms,
            slack_ms=found.slack_ms[name],
            decides=found.latency.steps[name].decides,
        )
        for name in pipeline.names
    )
    latency_ms = {f"p{one}": estimate.value for one, estimate in found.latency.percentiles.items()}
    return PipelineView(
        name=pipeline.name,
        steps=steps,
        edges=pipeline.edges,
        throughput_path=found.throughput_path,
        latency_path=found.latency_path,
        bottleneck=found.bottleneck.what,
        saturation_rps=found.bottleneck.rate_rps,
        rate_rps=found.latency.rate_rps,
        latency_ms=latency_ms,
        notes=(*found.notes, *notes),
    )


def overhead_words(found: Overhead | None) -> tuple[str, ...]:
    """The overhead of a stage, as a sentence."""
    if found is None:
        return ()
    return (
        f"a single request takes {found.measured_ms:.3g} ms, its steps alone {found.predicted_ms:.3g} ms: "
        f"{found.per_stage_ms:+.2g} ms a stage",
    )


def plain(record: Any) -> Any:
    """A record as JSON has it: what is infinite is null."""
    if isinstance(record, float):
        return record if math.isfinite(record) else None
    if isinstance(record, Mapping):
        return {str(key): plain(value) for key, value in record.items()}
    if isinstance(record, tuple | list):
        return [plain(value) for value in record]
    if hasattr(record, "__dataclass_fields__"):
        return plain(asdict(record))
    return record


def quicker(level: Level) -> Level:
    """A level with finer steps near saturation, since limits of steps are held against the whole's."""
    return replace(level, stages=tuple(sorted({*level.stages, 0.75, 0.8, 0.9, 0.95})))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A combination of the shortlist, and what is known of it beyond the surrogate.

    Attributes:
        p99: predicted at the rate, or None where it is beyond saturation.
        truth: on samples, or None where it was not run.
        kept: whether it meets the limits on both, the drop with the worse end of its interval; what was not run is not
            held against it.
    """

    combination: Combination
    p99: Estimate | None
    truth: Truth | None
    kept: bool


def judge(
    pipeline: Pipeline,
    measured: Measured,
    found: Shortlist,
    truths: Sequence[Truth],
    *,
    rate_rps: float,
    replicas: Mapping[str, int],
    accuracy_drop: float | None,
    p99_ms: float | None,
) -> tuple[Judged, ...]:
    """The shortlist held against what its surrogate only estimates: predicted p99, and accuracy on samples.

    Raises:
        InputError: ``p99_ms`` is no number above 0.
    """
    check_p99(p99_ms)
    judged = []
    for place, one in enumerate(found.combinations):
        try:
            stations = stations_of(pipeline, measured, variants=one.variants, replicas=replicas)
            p99 = predict_latency(pipeline, stations, rate_rps).percentiles[99]
        except InputError:
            p99 = None
        truth = truths[place] if place < len(truths) else None
        kept = p99_ms is None or (p99 is not None and p99.value <= p99_ms)
        kept = kept and (accuracy_drop is None or truth is None or _certainly_within(truth, accuracy_drop))
        judged.append(Judged(combination=one, p99=p99, truth=truth, kept=kept))
    return tuple(judged)


def _certainly_within(truth: Truth, accuracy_drop: float) -> bool:
    most = truth.accuracy_drop.high
    return most is not None and most <= accuracy_drop


def choice_lines(found: Shortlist, judged: Sequence[Judged]) -> list[str]:
    """A shortlist and what came of it, as lines."""
    if not found.combinations:
        lines = [
            "No combination meets the budget."
            if found.exact
            else "None was found that meets the budget, and time ran out before it was known whether one does."
        ]
        if found.closest is not None:
            lines.append(f"Closest: {_named(found.closest)}")
            lines += [f"  {one.quantity} {one.value:.4g}, and the limit is {one.limit:.4g}" for one in found.misses]
        return lines
    how = "proved best" if found.exact else f"not proved best: none has less than {found.bound:.4g}"
    lines = [f"By the surrogate, least {found.objective} first ({how}):"]
    for place, one in enumerate(judged, 1):
        said = ", ".join(f"{name} {value:.4g}" for name, value in one.combination.surrogate.items())
        lines += [
            f"{place}. {_named(one.combination)}{'' if one.kept else ' (not certainly within the limits)'}",
            f"   surrogate: {said}",
        ]
        lines.append(f"   predicted p99: {'beyond saturation' if one.p99 is None else f'{one.p99.value:.4g} ms'}")
        if one.truth is not None:
            accuracy, drop = numbers.text(one.truth.accuracy), numbers.text(one.truth.accuracy_drop)
            lines.append(f"   on {one.truth.samples} samples: {accuracy}, a drop of {drop}")
    best = taken(judged)
    if best is None:
        lines.append(
            "None of them keeps the limits for certain: ask for more with --best, give more samples, or loosen one."
        )
    elif best.truth is None:
        lines.append(
            f"Take, if samples agree: {_named(best.combination)} (the plan has no models and labelled samples)"
        )
    else:
        lines.append(f"Take: {_named(best.combination)}")
    return lines


def _named(combination: Combination) -> str:
    return ", ".join(f"{step}={variant}" for step, variant in combination.variants.items())


# --- promoting -------------------------------------------------------------------------------------------------


def taken(judged: Sequence[Judged]) -> Judged | None:
    """The combination of a shortlist to take: the first that keeps the limits."""
    return next((one for one in judged if one.kept), None)


def write_chosen(path: Path, plan: Plan, one: Judged, *, accuracy_drop: float | None, p99_ms: float | None) -> None:
    """Writes what was chosen, for ``burnish pipeline promote --chosen``: variants, and limits to be watched by.

    Args:
        path: the file.
        plan: of the pipeline.
        one: what was chosen.
        accuracy_drop: the limit that it was chosen by; None for none.
        p99_ms: the same.
    """
    limits = [] if accuracy_drop is None else [f"accuracy_drop <= {accuracy_drop:g}"]
    limits += [] if p99_ms is None else [f"latency_p99_ms <= {p99_ms:g}"]
    surrogate = ", ".join(f"{name} {value:.4g}" for name, value in one.combination.surrogate.items())
    truth = ""
    if one.truth is not None:
        truth = f"; on {one.truth.samples} samples a drop of {numbers.text(one.truth.accuracy_drop)}"
    document = {
        "pipeline": plan.pipeline.name,
        "variants": dict(one.combination.variants),
        "limits": limits,
        "reason": f"{_named(one.combination)}: {surrogate}{truth}.",
    }
    write_durably(path, yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True))


def write_promotion(
    manifest: Mapping[str, Any], models: Mapping[str, str], weights: Sequence[int], out: Path
) -> list[Path]:
    """The manifests of a promotion by hand, written in their order; see `profiles.pipelines.rollout.stages_of`.

    Args:
        manifest: the production Pipeline.
        models: step -> Model to take its place, served already.
        weights: percent of requests that the challenger answers, rising to 100.
        out: folder that is written to.

    Raises:
        InputError: a Model or a weight does not fit.
        StorageError: a file cannot be written.
    """
    made = stages_of(manifest, models, [percent for percent in weights if percent != 100])
    return write_manifests({f"{name}.yaml": content for name, content in made.items()}, out)


def write_manifests(manifests: Mapping[str, Mapping[str, Any]], out: Path) -> list[Path]:
    """Writes manifests under their files' names into a folder, which is made; returns the paths in their order.

    Raises:
        StorageError: a file cannot be written.
    """
    for name, content in manifests.items():
        write_durably(out / name, as_yaml(content))
    return [out / name for name in manifests]
