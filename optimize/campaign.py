"""A campaign from end to end: its phases in order, the verdict, and where the outcome goes."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optimize import reporting
from optimize.budget import Budget
from optimize.champion import NONE_YET, record_of, with_champion
from optimize.config import CampaignConfig, SamplesConfig, SourceConfig, load_campaign
from optimize.endpoints import make_folder
from optimize.engines.choosing import engine_named, engine_on_demand
from optimize.engines.cores import pinned, usable_cores
from optimize.engines.pool import LocalEngine
from optimize.finding import Findings, Made, Prepared, campaign_site, find, prepare, with_cores_alone
from optimize.making import make_sources
from optimize.making import make_variants as make_all
from optimize.measuring import Measured, loads_of
from optimize.measuring_step import NAME, find_on_node, was_found
from optimize.plan import Observer, Plan, Workspace, plan, plan_id
from optimize.progress import working
from optimize.samples import SampleFile, Samples, check_fit, load_samples, open_samples
from optimize.serving_search import space_of
from optimize.status import Watch
from optimize.variant_folder import place_variant
from profiles.deploy.reaper import reap
from profiles.measure.advice import advice_of
from profiles.measure.compare import turned
from profiles.measure.cost import with_costs
from profiles.measure.rounds import compare_rounds, reduce_rounds
from profiles.measure.spectrum import spectra_of
from registry.codec import to_jsonable
from registry.errors import InputError
from registry.ledger import Ledger
from registry.ports import Published
from registry.records import Campaign, Candidate, Comparison, Failure, Measurement, Round, Source, Variant
from registry.selection import metric_table, select
from registry.shared_store import open_store


def run_campaign(
    config: CampaignConfig,
    *,
    base: Path,
    work: Path,
    observer: Observer,
    engine: str | None = None,
    store: str | None = None,
) -> tuple[Campaign, Path, Published]:
    """Runs a campaign, or goes on with it where it stopped.

    Args:
        config: the campaign file.
        base: the folder that its paths are relative to.
        work: the working folder; every result in it that is still valid is reused.
        observer: told what is done.
        engine: ``local`` or ``ray``: where its steps run; None for what ``BURNISH_ENGINE`` says.
        store: URI of a store that machines share; None for what ``BURNISH_STORE`` says.

    Returns:
        The campaign's record, the page of its report, and what MLflow made of it.

    Raises:
        InputError: the configuration or the samples do not fit.
        UnreachableError: the tracking store or the cluster does not answer. Before the work this costs nothing; after
            it nothing is lost, and `burnish report --sync` sends it later.
    """
    budget = Budget.from_now(config.limits.minutes)
    named = engine_named(engine)
    with _on_its_cores(config, named):
        planned = plan(config, base=base, work=work, engine=named)
        if config.search.serving is not None and not planned.elsewhere:
            space_of(planned, config.search.serving)  # says so now where there is nothing to search
        make_folder(planned.work, "--work")
        planned = with_champion(planned)
        with _workspace(planned, observer, budget, store=store) as workspace:
            told = workspace.observer
            for sentence in _beforehand(planned):
                told.note(sentence)
            _look_at_cluster(workspace)
            reporting.use_tracker(config.registry.tracking_uri, planned.work)
            campaign = _campaign(workspace, named)
            reporting.write_campaign(campaign, planned.work)
            page = reporting.write_report(campaign, planned.work)
            told.phase("Recording", 1)
            with working(told, "Published", "MLflow"):
                published = reporting.publish(campaign, planned.work)
            told.done("MLflow", published.location)
    return campaign, page, published


@contextlib.contextmanager
def _on_its_cores(config: CampaignConfig, engine: str) -> Iterator[None]:
    """This process on as many cores as the campaign asks for, where it measures here.

    Raises:
        InputError: this machine does not have what the campaign asks for.
    """
    needed = config.resources.needed()
    if engine != "local":
        yield
        return
    LocalEngine.check(NAME, needed)
    with contextlib.nullcontext() if needed.cores is None else pinned(usable_cores()[: needed.cores]):
        yield


@contextlib.contextmanager
def _workspace(planned: Plan, observer: Observer, budget: Budget, *, store: str | None = None) -> Iterator[Workspace]:
    """The places of the working folder, with the leftovers of a killed run ended and removed; others see how it is."""
    name, level = planned.config.name, planned.level.name
    with (
        Ledger.open(planned.work / "ledger.jsonl") as ledger,
        Watch(planned.work, observer, campaign=name, level=level, budget=budget) as watch,
    ):
        reap(planned.work)
        shutil.rmtree(planned.work / "tmp", ignore_errors=True)
        opened = open_store(planned.work, store)
        yield Workspace(plan=planned, store=opened, ledger=ledger, observer=watch, budget=budget)


def _beforehand(planned: Plan) -> Iterator[str]:
    """What is worth saying before the work begins."""
    yield from planned.remarks
    if planned.passed_over:
        yield f"{NONE_YET} Limits against it are passed over: {'; '.join(planned.passed_over)}"
    if planned.stays is not None:
        yield planned.stays


@contextlib.contextmanager
def _with_engine(workspace: Workspace, name: str) -> Iterator[Workspace]:
    """The workspace with its engine, which is opened before the first work, where there is any left.

    One that is to measure is looked at now, unless that was done.

    Raises:
        InputError: no node has what the campaign asks for, or one cannot run burnish.
        UnreachableError: there is no cluster, or a node cannot use the store.
    """
    planned = workspace.plan
    scratch = workspace.folder("tmp")
    with engine_on_demand(workspace.store, scratch=scratch, name=name, waiting=workspace.waits_for_cores) as engine:
        if planned.elsewhere and not was_found(planned.work):
            engine().check(NAME, planned.config.resources.needed())

        def begin_work() -> None:
            engine()

        yield replace(workspace, engine=engine, begin_work=begin_work)


def _look_at_cluster(workspace: Workspace) -> None:
    """Returns when a Core 2 is ready for candidates, and nothing of a killed run is left there.

    Raises:
        InputError: it does not take what the campaign file says.
        UnreachableError: it does not answer, or refuses.
    """
    config, observer = workspace.plan.config, workspace.observer
    if config.cluster.kind == "local":
        return
    observer.phase("Looking at the cluster", 1)
    with campaign_site(workspace) as site:
        site.check(workspace.plan.profiles)
        left = site.clear()
    removed = f"; took away what a killed run left: {', '.join(left)}" if left else ""
    observer.done(site.location, f"is ready{removed}")
    if config.target_instruction_sets is None:
        observer.note("Variants are judged for this machine's instruction sets; target_instruction_sets names others.")


def judge_campaign(config: CampaignConfig, *, base: Path, work: Path, observer: Observer) -> Prepared:
    """The part of a campaign that needs no server: variants made, judged against the baseline, timed in process.

    `run_campaign` with the same working folder goes on from there.

    Raises:
        InputError: the configuration or the samples do not fit.
    """
    budget = Budget.from_now(config.limits.minutes)
    named = engine_named()
    planned = plan(config, base=base, work=work)
    with _workspace(planned, observer, budget) as workspace:
        with _with_engine(workspace, named) as working_there:
            made, failures = _make(working_there)
        with with_cores_alone(workspace) as alone:
            prepared = prepare(alone, made)
    return replace(prepared, failures=[*failures, *prepared.failures])


def _calibration(planned: Plan) -> SampleFile | None:
    """The calibration samples, all read once, so that a fault in them is told before anything heavy begins."""
    given = planned.config.samples.calibration
    return None if given is None else open_samples(planned.path(given)).checked()


def _make(workspace: Workspace) -> tuple[Made, list[Failure]]:
    """Sources and variants, and what could not be had of them."""
    planned = workspace.plan
    evaluation = load_samples(planned.path(planned.config.samples.evaluation))
    calibration = _calibration(planned)
    sources, failures = make_sources(workspace)
    sources, unfit = _fitting(sources, evaluation, calibration)
    variants, unmade = make_all(workspace, sources, calibration)
    made = Made(evaluation=evaluation, calibration=calibration, sources=tuple(sources), variants=tuple(variants))
    return made, [*failures, *unfit, *unmade]


def _campaign(workspace: Workspace, engine: str) -> Campaign:
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    preparing = workspace.budget.preparing()
    found = None
    with _with_engine(workspace, engine) as working_there:
        made, failures = _make(replace(working_there, budget=preparing))
        if workspace.plan.elsewhere:
            found = find_on_node(working_there, made, preparing)
    if found is None:  # here, where no engine is in the way any more
        with with_cores_alone(workspace) as alone:
            found = find(alone, made, preparing)
    return _assembled(workspace, made, found, started_at=started_at, failures=[*failures, *found.failures])


def _fitting(
    sources: Sequence[Source], evaluation: Samples, calibration: SampleFile | None
) -> tuple[list[Source], list[Failure]]:
    """The sources whose inputs the samples fit; all of them are judged on the same samples.

    Raises:
        InputError: they do not fit the first source, which is the baseline's.
    """
    fitting: list[Source] = []
    failures: list[Failure] = []
    for source in sources:
        try:
            check_fit(evaluation.inputs, source.artifact.inputs, where="the evaluation samples")
            if calibration is not None:
                check_fit(calibration, source.artifact.inputs, where="the calibration samples")
        except InputError as error:
            if not fitting:
                raise
            failures.append(Failure(subject=source.name, phase="source", kind="error", reason=error.message))
            continue
        fitting.append(source)
    return fitting, failures


def _assembled(
    workspace: Workspace, made: Made, found: Findings, *, started_at: str, failures: Sequence[Failure]
) -> Campaign:
    # As it was where the numbers were taken.
    planned = replace(workspace.plan, host=found.host, server_cpus=found.server_cpus, profiles=found.profiles)
    measured, contender, candidates = found.measured, found.contender, list(found.candidates)
    sources, variants, judged = list(made.sources), list(found.variants), list(found.judged)
    champion = next((one for one in candidates if one.id == found.champion_id), None)
    if contender is not None and contender.judged is not None and champion is not None:
        known = {one.id for one in variants}
        variants = [*variants, *([] if contender.judged.variant.id in known else [contender.judged.variant])]
        sources = [*sources, *([] if contender.source is None else [contender.source])]
        judged = [*judged, *([] if contender.judged.name in {one.name for one in judged} else [contender.judged])]
    fidelities = [fidelity for one in judged for fidelity in one.fidelities.values()]
    fidelities += measured.fidelities
    measurements = _measurements(planned, candidates, measured)
    comparisons = _comparisons(planned, candidates, measured)
    against = _against_champion(planned, candidates[0], champion, measured)
    verdict = select(
        policy=planned.policy,
        candidates=candidates,
        variants=variants,
        metrics=metric_table(candidates, measurements, fidelities, variants),
        comparisons=[*comparisons, *against],
        failures=failures,
        baseline_id=candidates[0].id,
        provisional=planned.level.provisional or measured.short,
        champion_id=None if champion is None else champion.id,
        cut_short=_cut_short(workspace.budget, measured, failures),
    )
    samples_digest = made.evaluation.digest
    identity = plan_id(planned, sources=tuple(source.digest for source in sources), samples_digest=samples_digest)
    return Campaign(
        id=identity,
        name=planned.config.name,
        model_name=planned.config.registry.model_name or planned.config.name,
        level=planned.level.name,
        seed=planned.config.seed,
        started_at=reporting.begun(planned.work, identity) or started_at,
        host=planned.host,
        versions=found.versions,
        samples_digest=samples_digest,
        samples_name=Path(planned.config.samples.evaluation).name,
        task_metric=planned.config.metric,
        sources=tuple(sources),
        variants=tuple(variants),
        fidelities=tuple(fidelities),
        screenings=tuple(one.screening for one in judged if one.screening is not None),
        candidates=tuple(candidates),
        capacities=measured.capacities,
        rounds=measured.rounds,
        measurements=tuple(measurements),
        comparisons=tuple(comparisons),
        failures=tuple(failures),
        rendered={one.candidate_id: one.rendered for one in measured.deployed},
        artifacts={variant.id: str(workspace.store.path(variant.artifact)) for variant in variants},
        verdict=verdict,
        serving_searches=found.searches,
        hardware=planned.hardware,
        advice=tuple(advice_of(one) for one in measured.capacities),
        spectra=spectra_of(measured.rounds, raw_root=planned.work, loads=loads_of(planned.policy)),
        champion=record_of(planned, contender, champion, against),
    )


def _cut_short(budget: Budget, measured: Measured, failures: Sequence[Failure]) -> str:
    if not measured.cut and not any(failure.kind == "budget" for failure in failures):
        return ""
    return f"The budget of {budget.minutes or 0:g} minutes was used up before all was measured."


def _measurements(planned: Plan, candidates: Sequence[Candidate], measured: Measured) -> list[Measurement]:
    capacities = {capacity.candidate_id: capacity for capacity in measured.capacities}
    deployed = {one.candidate_id: one for one in measured.deployed}
    found: list[Measurement] = []
    for candidate in candidates:
        rounds = _rounds_of(candidate, measured)
        if not rounds:
            continue
        found += reduce_rounds(
            candidate.id,
            rounds,
            capacities[candidate.id],
            raw_root=planned.work,
            level=planned.level,
            load_time_s=(deployed[candidate.id].load_time_s, *deployed[candidate.id].reload_times_s),
            first_request_ms=deployed[candidate.id].first_request_ms,
        )
    # How many cores a server of Core 2 could use is not known here.
    cores = len(planned.server_cpus) if planned.config.cluster.kind == "local" else None
    return [*with_costs(found, planned.hardware, cores=cores)]


def _comparisons(planned: Plan, candidates: Sequence[Candidate], measured: Measured) -> list[Comparison]:
    """Each candidate against the baseline under the same serving profile; numbers of two servers are never paired."""
    found: list[Comparison] = []
    for profile in planned.profiles:
        alike = [candidate for candidate in candidates if candidate.serving == profile]
        first = (candidates[0].variant_id, candidates[0].engine)
        baseline = next((one for one in alike if (one.variant_id, one.engine) == first), None)
        if baseline is None:
            continue  # the profile's backend does not run it
        rounds = [one for one in measured.rounds if one.candidate_id in {one.id for one in alike}]
        found += compare_rounds(baseline.id, rounds, raw_root=planned.work, level=planned.level)
    return found


def _against_champion(
    planned: Plan, baseline: Candidate, champion: Candidate | None, measured: Measured
) -> list[Comparison]:
    """Each candidate against the champion, however the two are served: all of them were in the same rounds."""
    if champion is None:
        return []
    how: dict[str, Any] = {"raw_root": planned.work, "level": planned.level}
    if champion.id == baseline.id:
        return list(compare_rounds(baseline.id, measured.rounds, **how))
    found = compare_rounds(champion.id, measured.rounds, a_a_id=baseline.id, **how)
    # Whose two slots give the noise floor is not compared there.
    both = [one for one in measured.rounds if one.candidate_id in {baseline.id, champion.id}]
    of_baseline = [turned(one) for one in compare_rounds(baseline.id, both, **how)]
    return [*of_baseline, *found]


def _rounds_of(candidate: Candidate, measured: Measured) -> list[Round]:
    return [one for one in measured.rounds if one.candidate_id == candidate.id]


# --- variants only ---------------------------------------------------------------------------------------------


def make_variants(
    model: Path,
    *,
    variants: tuple[str, ...],
    calibration: Path | None,
    out: Path,
    work: Path | None,
    observer: Observer,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Makes variants and copies each into a folder of its own.

    Args:
        model: a campaign file, or an ONNX file.
        variants: names of the campaign's own recipes, of shipped ones and of sets; none for all of the campaign's. The
            baseline is made in any case.
        calibration: for an ONNX file: the samples that static quantization takes its ranges from.
        out: the folder that gets one folder a variant.
        work: the working folder, or None for ``burnish-work`` beside the model.
        observer: told what is done.

    Returns:
        The variants (name, path of the entry file, size, notes) and the failures, as plain values.

    Raises:
        InputError: the model or a recipe cannot be taken, or ``out`` cannot be made, or holds what is no variant.
        StorageError: ``out`` cannot be written.
        UnreachableError: they are to be made on a cluster, and there is none.
    """
    config = _config_for(model, variants, calibration)
    budget = Budget.from_now(config.limits.minutes)
    named = engine_named()
    planned = plan(config, base=model.parent, work=work or model.parent / "burnish-work")
    make_folder(out, "--out")
    with _workspace(planned, observer, budget) as opened, _with_engine(opened, named) as workspace:
        samples = _calibration(planned)
        sources, failures = make_sources(workspace)
        if samples is not None:
            check_fit(samples, sources[0].artifact.inputs, where="the calibration samples")
        made, unmade = make_all(workspace, sources, samples)
        placed = [
            _placed(variant, place_variant(workspace.store.path(variant.artifact), variant, out)) for variant in made
        ]
    return placed, [to_jsonable(failure) for failure in (*failures, *unmade)]


def judge_variants_of(
    model: Path, *, variants: tuple[str, ...], work: Path | None, observer: Observer
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the variants of a campaign file answer and how long they take in process; no server is involved.

    Returns:
        Each variant in each of its engines (name, id, engine, metrics) and the failures, as plain values.

    Raises:
        InputError: the model is no campaign file, or the samples do not fit.
    """
    if model.suffix not in {".yaml", ".yml"}:
        raise InputError(
            f"{model} says nothing of samples and metric, so that nothing can be judged",
            hint="Name both in a campaign file (burnish init) and give that.",
        )
    config = _config_for(model, variants, None)
    prepared = judge_campaign(config, base=model.parent, work=work or model.parent / "burnish-work", observer=observer)
    judged = [
        {
            "name": one.name,
            "id": one.variant.id,
            "engine": one.engine.key,
            "metrics": to_jsonable({**fidelity.metrics, **(one.screening.metrics if one.screening else {})}),
        }
        for one in prepared.judged
        for fidelity in one.fidelities.values()
    ]
    return judged, [to_jsonable(failure) for failure in prepared.failures]


def with_variants(config: CampaignConfig, names: Sequence[str]) -> CampaignConfig:
    """The campaign with the variants of these names alone; without any, as it is.

    A name is that of a recipe which the campaign file writes out, else of one, or a set, of the library.
    """
    if not names:
        return config
    own = {entry.name: entry for entry in config.variants if not isinstance(entry, str)}
    return config.model_copy(update={"variants": tuple(own.get(name, name) for name in names)})


def _config_for(model: Path, variants: tuple[str, ...], calibration: Path | None) -> CampaignConfig:
    if model.suffix in {".yaml", ".yml"}:
        if calibration is not None:
            raise InputError("--calibration is for an ONNX file; a campaign file names its own samples.calibration")
        return with_variants(load_campaign(model), variants)
    if not model.is_file():
        raise InputError(f"no model at {model}", hint="Give an ONNX file, or a campaign file.")
    calibrating = None if calibration is None else str(calibration.resolve())
    fields: dict[str, Any] = {"variants": variants} if variants else {}
    return CampaignConfig(
        name="model",
        sources=(SourceConfig(onnx=model.name),),
        # Nothing is judged here, so that no held-out samples are needed; the model stands in for their file.
        samples=SamplesConfig(evaluation=model.name, calibration=calibrating),
        **fields,
    )


def _placed(variant: Variant, folder: Path) -> dict[str, Any]:
    return {
        "name": variant.name,
        "id": variant.id,
        "path": str(folder / variant.artifact.entry),
        "size_bytes": variant.artifact.size_bytes,
        "notes": list(variant.notes),
    }
