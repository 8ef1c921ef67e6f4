"""``burnish pipeline``: reads, measures, analyses, chooses, balances and sizes a Core 2 pipeline of models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from optimize.cli.output import (
    ClusterOption,
    IdentityOption,
    IssuerOption,
    Json,
    PublicKeyOption,
    TrustConfigOption,
    emit_json,
    say,
)
from optimize.cli.promotion import (
    MIRROR,
    RATE_RPS,
    SCRAPE_S,
    WATCH_S,
    WEIGHTS,
    ApplyOption,
    MatchersOption,
    MirrorOption,
    RateOption,
    ScrapeOption,
    WatchOption,
    WeightsOption,
    percentages,
    run_promotion,
    way_back,
)

app = typer.Typer(
    help="Tune a Core 2 pipeline of models: what saturates first, which variants, how many of each.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PlanFile = Annotated[Path, typer.Argument(help="A Pipeline manifest, or a plan with models and samples.")]
MeasuredFile = Annotated[Path, typer.Option("--measured", help="What `pipeline measure` wrote.")]
Rate = Annotated[float | None, typer.Option(help="Requests a second; half of saturation if not given.")]
Chosen = Annotated[list[str] | None, typer.Option("--variant", help="step=variant, where it is not the first.")]
Seed = Annotated[int, typer.Option(help="Of sampled arrivals.")]


@app.command("check")
def check(plan: PlanFile, json_output: Json = False) -> None:
    """Say what is wrong with a pipeline: joins that never fire, tensors that do not fit, cycles without a bound.

    Exit code 5 where a request could not be answered.

    Example: burnish pipeline check pipeline.yaml
    """
    from optimize import pipelines
    from profiles.pipelines.checks import check_pipeline
    from profiles.pipelines.documents import load_plan
    from registry.errors import CheckFailedError

    read = load_plan(plan)
    found = check_pipeline(read.pipeline, pipelines.signatures(read))
    if json_output:
        emit_json({"pipeline": read.pipeline.name, "findings": pipelines.plain(found)})
    else:
        for one in found:
            typer.echo(f"{one.severity}: {one.step}: {one.text}")
        if not found:
            typer.echo(f"{read.pipeline.name}: {len(read.pipeline.names)} steps, nothing wrong was found")
    if any(one.severity == "error" for one in found):
        raise typer.Exit(CheckFailedError.exit_code)


@app.command("measure")
def measure(
    plan: PlanFile,
    out: Annotated[Path, typer.Option(help="The file with what was measured.")] = Path("measured.yaml"),
    level: Annotated[str, typer.Option(help="quick, standard or proof: how long windows are.")] = "quick",
    metric: Annotated[str, typer.Option(help="For what each variant loses alone.")] = "accuracy",
    variants: Annotated[bool, typer.Option("--variants/--first-only", help="Every variant, or the first.")] = True,
    workers: Annotated[list[int] | None, typer.Option(help="Measure first variants with so many, too.")] = None,
    mesh: Annotated[str | None, typer.Option(help="host:port of a Core 2 that has the pipeline.")] = None,
    mesh_tls: Annotated[bool, typer.Option("--mesh-tls", help="It speaks TLS.")] = False,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Measure each step alone on a real server of this machine, and the whole pipeline.

    Without --mesh the whole is run by a driver of this machine, and Kafka's share is not in it.

    Example: burnish pipeline measure plan.yaml --out measured.yaml
    """
    from tempfile import TemporaryDirectory

    from optimize import pipelines
    from optimize.cli.endings import terminable
    from profiles.measure.levels import find_level
    from profiles.pipelines.documents import load_plan
    from profiles.pipelines.measured import write_measured

    read, windows = load_plan(plan), pipelines.quicker(find_level(level))
    with terminable(), TemporaryDirectory(prefix="burnish-pipeline-") as work:
        found = pipelines.measure_plan(
            read,
            level=windows,
            work=Path(work),
            metric=metric,
            variants=variants,
            workers=workers or (),
            mesh=mesh,
            mesh_tls=mesh_tls,
            told=say,
            seed=seed,
        )
    write_measured(found, out)
    if json_output:
        emit_json({"measured": str(out), "pipeline": read.pipeline.name})
    else:
        say(f"Written: {out}. Next: burnish pipeline analyse {plan} --measured {out}")


@app.command("analyse")
def analyse(
    plan: PlanFile,
    measured: MeasuredFile,
    rate: Rate = None,
    variant: Chosen = None,
    picture: Annotated[Path | None, typer.Option(help="Write the graph here, as .svg or .png.")] = None,
    track: Annotated[bool, typer.Option("--track", help="Record it in MLflow, with the picture.")] = False,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Say what saturates first, what decides latency, each step's slack, and what another variant would buy.

    Example: burnish pipeline analyse plan.yaml --measured measured.yaml --picture pipeline.svg
    """
    from optimize import pipelines
    from profiles.pipelines import analysis

    read, known, chosen = _read(plan, measured, variant)
    copies = {step: model.replicas for step, model in read.models.items()}
    found = analysis.analyse(read.pipeline, known, rate_rps=rate, variants=chosen, replicas=copies, seed=seed)
    overhead = analysis.overhead_of(read.pipeline, known)
    gains = [
        analysis.gain_of(
            read.pipeline, known, step, name,
            rate_rps=found.latency.rate_rps, variants=chosen, replicas=copies, seed=seed,
        )
        for step, ones in known.steps.items()
        for name in ones
        if name != chosen.get(step, next(iter(ones)))
    ]  # fmt: skip
    view = pipelines.view_of(read.pipeline, known, found, variants=chosen, notes=pipelines.overhead_words(overhead))
    if picture is not None:
        _draw(view, picture)
    if track:
        _track(view, picture)
    if json_output:
        emit_json(
            {"analysis": pipelines.plain(found), "overhead": pipelines.plain(overhead), "gains": pipelines.plain(gains)}
        )
        return
    from rich.console import Console

    from registry.report.pipeline import render_pipeline

    render_pipeline(view, Console())
    for gain in gains:
        typer.echo(gain.sentence)


@app.command("choose")
def choose(
    plan: PlanFile,
    measured: MeasuredFile,
    rate: Rate = None,
    objective: Annotated[str, typer.Option(help="latency_ms, accuracy_drop, memory_mb or cost.")] = "latency_ms",
    latency_ms: Annotated[float | None, typer.Option(help="Most mean latency, end to end.")] = None,
    accuracy_drop: Annotated[float | None, typer.Option(help="Most loss, in points of the metric.")] = None,
    memory_mb: Annotated[float | None, typer.Option(help="Most memory of all servers.")] = None,
    cost: Annotated[float | None, typer.Option(help="Highest price an hour of all replicas.")] = None,
    p99_ms: Annotated[float | None, typer.Option(help="Highest p99 that is predicted for what is taken.")] = None,
    best: Annotated[int, typer.Option(help="How many combinations are run on samples.", min=1)] = 3,
    metric: Annotated[str, typer.Option(help="The task metric.")] = "accuracy",
    out: Annotated[Path | None, typer.Option(help="Write what is to be taken here, for `pipeline promote`.")] = None,
    json_output: Json = False,
) -> None:
    """Choose a variant for each step under one budget: a shortlist by a surrogate, then the truth on samples.

    Exit code 3 where no combination meets the budget, with the closest miss.

    Example: burnish pipeline choose plan.yaml --measured measured.yaml --accuracy-drop 0.01
    """
    from optimize import pipelines
    from profiles.pipelines.analysis import pipeline_limits
    from profiles.pipelines.choice import Budget, options_of, shortlist
    from registry.errors import NoVariantError

    read, known, _ = _read(plan, measured, None)
    copies = {step: model.replicas for step, model in read.models.items()}
    at = 0.5 * pipeline_limits(read.pipeline, known, replicas=copies)[0].rate_rps if rate is None else rate
    budget = Budget(latency_ms=latency_ms, accuracy_drop=accuracy_drop, memory_mb=memory_mb, cost=cost)
    goal: Any = _quantity(objective)
    options = options_of(read.pipeline, known, rate_rps=at, replicas=copies)
    found = shortlist(read.pipeline, options, objective=goal, budget=budget, best=best)
    truths = pipelines.run_truth(read, found.combinations, metric=metric, told=say)
    judged = pipelines.judge(
        read.pipeline, known, found, truths, rate_rps=at, replicas=copies, accuracy_drop=accuracy_drop, p99_ms=p99_ms
    )
    if json_output:
        emit_json({"rate_rps": at, "shortlist": pipelines.plain(found), "judged": pipelines.plain(judged)})
    else:
        typer.echo("\n".join(pipelines.choice_lines(found, judged)))
    take = pipelines.taken(judged)
    if take is None:
        # The lines say it all; the exit code is for scripts.
        raise typer.Exit(NoVariantError.exit_code)
    if out is not None:
        pipelines.write_chosen(out, read, take, accuracy_drop=accuracy_drop, p99_ms=p99_ms)
        say(f"Written: {out}. Next: burnish pipeline promote {plan} --chosen {out} --cluster CLUSTER.yaml")


@app.command("balance")
def balance(
    plan: PlanFile,
    measured: MeasuredFile,
    rate: Annotated[float, typer.Option(help="Requests a second that the pipeline is to take.")],
    p99_ms: Annotated[float | None, typer.Option(help="What p99 is to stay below.")] = None,
    margin: Annotated[float, typer.Option(help="Below saturation, 0.1 to 0.2.")] = 0.15,
    variant: Chosen = None,
    json_output: Json = False,
) -> None:
    """Say how many replicas and workers each step needs for a rate, and where queues would form.

    Example: burnish pipeline balance plan.yaml --measured measured.yaml --rate 200
    """
    from optimize import pipelines
    from profiles.pipelines.balance import balance as find
    from profiles.pipelines.balance import crowded

    read, known, chosen = _read(plan, measured, variant)
    found = find(read.pipeline, known, rate, variants=chosen, margin=margin, p99_ms=p99_ms)
    if json_output:
        emit_json(pipelines.plain(found))
        return
    for step in found.steps:
        typer.echo(
            f"{step.step:<24} {step.replicas} x {step.workers} workers, busy {step.utilisation:.0%}, "
            f"waiting {step.queue:.2g} messages, {step.wait_ms:.3g} ms"
        )
    p99 = found.latency.percentiles[99]
    typer.echo(f"Together {found.cost:.4g} {found.unit}; p99 is predicted at {p99.value:.3g} ms.")
    typer.echo(f"Queues form first before: {', '.join(found.queues[:3])}")
    for line in crowded(found.steps):
        say(line)


@app.command("size")
def size(
    plan: PlanFile,
    measured: MeasuredFile,
    rate: Annotated[float, typer.Option(help="Requests a second that the pipeline is to take.")],
    pipelines_count: Annotated[int, typer.Option("--pipelines", help="Pipelines on this Core 2.")] = 1,
    models: Annotated[int | None, typer.Option(help="Models on it; this pipeline's if not given.")] = None,
    partitions: Annotated[int | None, typer.Option(help="Partitions of a topic, where they are given.")] = None,
    multiplier: Annotated[
        int | None, typer.Option(help="maxShardCountMultiplier; the partitions if not given.")
    ] = None,
    core2_version: Annotated[str, typer.Option(help="2.6 or 2.10.")] = "2.10",
    out: Annotated[Path | None, typer.Option(help="Write the two patches into this folder.")] = None,
    json_output: Json = False,
) -> None:
    """Size Core 2's data plane: partitions, replicas and workers, as patches of SeldonConfig and SeldonRuntime.

    Example: burnish pipeline size plan.yaml --measured measured.yaml --rate 200 --out patches
    """
    from optimize import pipelines
    from profiles.pipelines import sizing
    from profiles.pipelines.graph import visits
    from profiles.serving.core2.manifests import as_yaml

    read, known, _ = _read(plan, measured, None)
    names = read.pipeline.names
    found = sizing.size_core2(
        read.pipeline,
        rate_rps=rate,
        latency_ms={name: max(known.of(name).latency_ms) for name in names},
        visits=visits(read.pipeline),
        pipelines=pipelines_count,
        models=models,
        partitions=partitions,
        multiplier=multiplier,
        payload_bytes=pipelines.message_bytes(pipelines.signatures(read)),
    )
    for line in found.warnings:
        say(f"Warning: {line}")
    patches = {
        "seldonconfig.yaml": sizing.render_config(found, version=core2_version),
        "seldonruntime.yaml": sizing.render_runtime(found, version=core2_version),
    }
    if out is not None:
        pipelines.write_manifests(patches, out)
    if json_output:
        emit_json({"sizing": pipelines.plain(found), "patches": patches})
    else:
        typer.echo("---\n".join(as_yaml(patch) for patch in patches.values()), nl=False)


@app.command("promote")
def promote(
    plan: Annotated[Path, typer.Argument(help="The Pipeline manifest in production, or a plan of it.")],
    apply: ApplyOption = False,
    chosen: Annotated[
        Path | None, typer.Option(help="What `pipeline choose --out` wrote: variants and limits.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="step=variant of the plan, which is brought.")] = None,
    step: Annotated[
        list[str] | None, typer.Option(help="step=FOLDER: what the campaign there chose is brought.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="step=Model that is served already.")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="Watched limit: 'latency_p99_ms <= 40'.")] = None,
    metric: Annotated[str, typer.Option(help="The task metric, by which live answers are judged.")] = "accuracy",
    weights: WeightsOption = WEIGHTS,
    mirror: MirrorOption = MIRROR,
    watch: WatchOption = WATCH_S,
    rate: RateOption = RATE_RPS,
    samples: Annotated[Path | None, typer.Option(help="The pipeline's inputs and labels; the plan's if named.")] = None,
    prometheus: Annotated[str | None, typer.Option(help="URL of a Prometheus that scrapes the gateway.")] = None,
    matchers: MatchersOption = "",
    scrape: ScrapeOption = SCRAPE_S,
    public_key: PublicKeyOption = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
    trust_config: TrustConfigOption = None,
    cluster: ClusterOption = None,
    work: Annotated[Path, typer.Option(help="The working folder, with the journal.")] = Path("burnish-work"),
    out: Annotated[
        Path | None, typer.Option(help="Write the manifests here instead, to be applied by hand; with --model.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Promote new step variants together: as a pipeline beside the one in production, by a mirror and growing weights.

    The plan is shown; --apply carries it out. Failure, Ctrl-C and kill leave the old pipeline in its place, and the
    same command again goes on where it stopped. `burnish rollback` is the way back.

    Example: burnish pipeline promote plan.yaml --chosen chosen.yaml --cluster cluster.yaml --apply
    """
    from optimize import pipelines
    from optimize.passports import named_signer
    from optimize.pipeline_promoting import PipelinePromoting
    from optimize.pipeline_sources import Sources, find_pipeline
    from optimize.promoting import Options
    from optimize.rollback import open_registry
    from registry.errors import InputError

    shares = percentages(weights)
    sources = Sources(models=model or (), steps=step or (), variants=variant or (), chosen=chosen, limits=limit or ())
    options = Options(
        weights=shares,
        mirror=mirror,
        watch_s=watch,
        rate_rps=rate,
        samples=samples,
        prometheus=prometheus,
        matchers=matchers,
        scrape_s=scrape,
        signer=named_signer(public_key, identity, issuer, trust_config),
    )
    if out is not None and (step or variant or chosen or apply):
        raise InputError("--out goes with --model alone", hint="What is brought is served by --apply, on a --cluster.")
    subject = find_pipeline(
        plan, sources, work=work, cluster=cluster, options=options, metric=metric, by_hand=out is not None
    )
    if out is not None:
        written = pipelines.write_promotion(subject.before, subject.models, shares, out)
        emit_json({"manifests": [str(path) for path in written]}) if json_output else typer.echo(
            "\n".join(map(str, written))
        )
        say("Apply them in this order, watching each; then delete the Experiment and the challenger. Back: the first.")
        return
    work.mkdir(parents=True, exist_ok=True)
    promoting = PipelinePromoting(subject, options, open_registry(work), say)
    run_promotion(promoting, apply=apply, work=work, back=way_back(work, cluster, None), json_output=json_output)


@app.command("serve")
def serve(plan: PlanFile, variant: Chosen = None, json_output: Json = False) -> None:
    """Serve a plan's pipeline on this machine, as one V2 endpoint, until Ctrl-C; Kafka's share is not in it.

    Example: burnish pipeline serve plan.yaml --variant encoder=int8
    """
    import time
    from tempfile import TemporaryDirectory

    from optimize import pipelines
    from optimize.cli.endings import Terminated, terminable
    from profiles.pipelines.documents import load_plan

    read = load_plan(plan)
    chosen = _pairs(variant, read.pipeline.names)
    with terminable(), TemporaryDirectory(prefix="burnish-pipeline-") as work:
        try:
            with pipelines.serve_plan(read, Path(work), variants=chosen) as target:
                if json_output:
                    emit_json({"url": target.url, "protocol": target.protocol, "model": target.model})
                say(f"{target.model} is served at {target.url} over {target.protocol} (Ctrl-C ends it)")
                while True:
                    time.sleep(1)
        except (KeyboardInterrupt, Terminated):
            return


def _pairs(variant: list[str] | None, steps: tuple[str, ...]) -> dict[str, str]:
    """Step -> variant, of options."""
    from registry.errors import InputError

    chosen = {}
    for text in variant or []:
        step, _, name = text.partition("=")
        if not name or step not in steps:
            raise InputError(f"--variant {text!r} is not step=variant", hint=f"Steps: {', '.join(steps)}.")
        chosen[step] = name
    return chosen


def _read(plan: Path, measured: Path, variant: list[str] | None) -> Any:
    """(the plan, what was measured, step -> variant)."""
    from profiles.pipelines.documents import load_plan
    from profiles.pipelines.measured import load_measured

    read = load_plan(plan)
    known = load_measured(measured, read.pipeline)
    chosen = _pairs(variant, read.pipeline.names)
    for step, name in chosen.items():
        known.of(step, name)
    return read, known, chosen


def _quantity(text: str) -> str:
    from profiles.pipelines.choice import QUANTITIES
    from registry.errors import InputError

    if text not in QUANTITIES:
        raise InputError(f"--objective {text!r} is not known", hint=f"There are: {', '.join(QUANTITIES)}.")
    return text


def _track(view: Any, picture: Path | None) -> None:
    from registry.mlflow_pipelines import record_pipeline

    files = {} if picture is None else {"pictures": picture}
    say(f"MLflow run: {record_pipeline(view, files=files, work=Path('burnish-work'))}")


def _draw(view: Any, picture: Path) -> None:
    from registry.errors import InputError
    from registry.report.pipeline import save_picture

    if picture.suffix not in {".svg", ".png"}:
        raise InputError(f"--picture {picture} is neither .svg nor .png")
    save_picture(view, picture)
    say(f"Picture: {picture}")
