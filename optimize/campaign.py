"""A campaign from end to end: its phases in order, the verdict, and where the outcome goes."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optimize import reporting
from optimize.champion import NONE_YET, Contender, judge_champion, record_of, with_champion
from optimize.clusters import Site, open_site, owner_of
from optimize.config import CampaignConfig, SamplesConfig, SourceConfig, load_campaign
from optimize.fidelity import load_outputs
from optimize.judging import Judged, choose_served, judge_variants, screen_variants
from optimize.making import make_sources
from optimize.making import make_variants as make_all
from optimize.measuring import Measured, Serving, loads_of, measure
from optimize.packages import PackageNotFoundError, version
from optimize.plan import Observer, Plan, Workspace, plan, plan_id
from optimize.samples import SampleFile, Samples, check_fit, load_samples, open_samples
from optimize.serving_search import CandidateOf, find_profiles, space_of
from optimize.tuning import tune_variants
from profiles.deploy.core2_candidates import UNKNOWN_VERSION
from profiles.deploy.reaper import reap
from profiles.measure.advice import advice_of
from profiles.measure.compare import turned
from profiles.measure.cost import with_costs
from profiles.measure.rounds import compare_rounds, reduce_rounds
from profiles.measure.spectrum import spectra_of
from registry.codec import digest, to_jsonable
from registry.errors import InputError
from registry.ledger import Ledger
from registry.ports import Published
from registry.records import (
    Campaign,
    Candidate,
    Comparison,
    Failure,
    Measurement,
    Round,
    ServingProfile,
    ServingSearch,
    Source,
    Variant,
)
from registry.selection import metric_table, select
from registry.shared_store import open_store

_PACKAGES = (
    "burnish", "mlflow", "mlserver", "nncf", "numpy", "nvidia-pytriton", "onnx", "onnxruntime", "onnxscript",
    "openvino", "optimum", "optimum-onnx", "torch", "transformers", "tritonclient",
)  # fmt: skip


def run_campaign(
    config: CampaignConfig, *, base: Path, work: Path, observer: Observer
) -> tuple[Campaign, Path, Published]:
    """Runs a campaign, or goes on with it where it stopped.

    Args:
        config: the campaign file.
        base: the folder that its paths are relative to.
        work: the working folder; every result in it that is still valid is reused.
        observer: told what is done.

    Returns:
        The campaign's record, the page of its report, and what MLflow made of it.

    Raises:
        InputError: the configuration or the samples do not fit.
        UnreachableError: the tracking store or the cluster does not answer. Before the work this costs nothing; after
            it nothing is lost, and `burnish report --sync` sends it later.
    """
    planned = plan(config, base=base, work=work)
    if config.search.serving is not None:
        space_of(planned, config.search.serving)  # says so now where there is nothing to search
    planned.work.mkdir(parents=True, exist_ok=True)
    planned = with_champion(planned)
    with _workspace(planned, observer) as workspace:
        if planned.passed_over:
            observer.note(f"{NONE_YET} Limits against it are passed over: {'; '.join(planned.passed_over)}")
        _look_at_cluster(workspace)
        reporting.use_tracker(config.registry.tracking_uri, planned.work)
        campaign = _campaign(workspace)
        reporting.write_campaign(campaign, planned.work)
        page = reporting.write_report(campaign, planned.work)
    observer.phase("Recording", 1)
    published = reporting.publish(campaign, planned.work)
    observer.done("MLflow", published.location)
    return campaign, page, published


@contextlib.contextmanager
def _workspace(planned: Plan, observer: Observer) -> Iterator[Workspace]:
    """The places of the working folder, with the leftovers of a killed run ended and removed."""
    with Ledger.open(planned.work / "ledger.jsonl") as ledger:
        reap(planned.work)
        shutil.rmtree(planned.work / "tmp", ignore_errors=True)
        yield Workspace(plan=planned, store=open_store(planned.work), ledger=ledger, observer=observer)


@contextlib.contextmanager
def _site(workspace: Workspace) -> Iterator[Site]:
    """The campaign's cluster, for the time of a block."""
    planned = workspace.plan
    with open_site(
        planned.config.cluster,
        base=planned.base,
        work=planned.work,
        owner=owner_of(planned.work),
        server_cpus=planned.server_cpus,
    ) as site:
        yield site


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
    with _site(workspace) as site:
        site.check(workspace.plan.profiles)
        left = site.clear()
    removed = f"; took away what a killed run left: {', '.join(left)}" if left else ""
    observer.done(site.location, f"is ready{removed}")
    if config.target_instruction_sets is None:
        observer.note("Variants are judged for this machine's instruction sets; target_instruction_sets names others.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a campaign knows before it serves anything: every variant made, judged and timed in process."""

    evaluation: Samples
    sources: list[Source]
    variants: list[Variant]
    judged: list[Judged]
    failures: list[Failure]


def judge_campaign(config: CampaignConfig, *, base: Path, work: Path, observer: Observer) -> Prepared:
    """The part of a campaign that needs no server: variants made, judged against the baseline, timed in process.

    `run_campaign` with the same working folder goes on from there.

    Raises:
        InputError: the configuration or the samples do not fit.
    """
    planned = plan(config, base=base, work=work)
    planned.work.mkdir(parents=True, exist_ok=True)
    with _workspace(planned, observer) as workspace:
        return _prepare(workspace)


def _calibration(planned: Plan) -> SampleFile | None:
    """The calibration samples, all read once, so that a fault in them is told before anything heavy begins."""
    given = planned.config.samples.calibration
    return None if given is None else open_samples(planned.path(given)).checked()


def _prepare(workspace: Workspace) -> Prepared:
    planned = workspace.plan
    samples = planned.config.samples
    evaluation = load_samples(planned.path(samples.evaluation))
    calibration = _calibration(planned)
    sources, failures = make_sources(workspace)
    sources, unfit = _fitting(sources, evaluation, calibration)
    variants, unmade = make_all(workspace, sources, calibration)
    judged, misjudged = judge_variants(workspace, variants, evaluation)
    tuned, untuned = tune_variants(workspace, sources, judged, calibration=calibration, evaluation=evaluation)
    if tuned:
        [_, *rejudged], misjudged_again = judge_variants(workspace, [judged[0].variant, *tuned], evaluation)
        variants, judged, misjudged = [*variants, *tuned], [*judged, *rejudged], [*misjudged, *misjudged_again]
    timed, untimed = screen_variants(workspace, judged)
    return Prepared(
        evaluation=evaluation,
        sources=sources,
        variants=variants,
        judged=timed,
        failures=[*failures, *unfit, *unmade, *misjudged, *untuned, *untimed],
    )


def _campaign(workspace: Workspace) -> Campaign:
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    prepared = _prepare(workspace)
    evaluation = prepared.evaluation
    contender = judge_champion(workspace, evaluation=evaluation, sources=prepared.sources, judged=prepared.judged)
    served, unserved = choose_served(workspace, prepared.judged)
    unserved = [_but_as_champion(one, contender) for one in unserved]
    with _site(workspace) as site:
        found = find_profiles(workspace, served, site.cluster, evaluation, _candidates(site))
        workspace, served = found.workspace, found.served
        servings, unfit = _servings(workspace, served, site)
        servings, refused = _with_champion(workspace, servings, served[0], contender, site)
        measured = measure(workspace, site.cluster, servings, evaluation.inputs, evaluation.digest)
        if not measured.deployed:
            site.check(workspace.plan.profiles)  # where all failed, the cluster may be why
    return _assembled(
        workspace,
        started_at=started_at,
        evaluation=evaluation,
        sources=prepared.sources,
        variants=prepared.variants,
        judged=[next((again for again in served if again.name == one.name), one) for one in prepared.judged],
        servings=servings,
        measured=measured,
        searches=found.searches,
        failures=[*prepared.failures, *unserved, *unfit, *refused, *measured.failures],
        contender=contender,
    )


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


def _servings(workspace: Workspace, served: Sequence[Judged], site: Site) -> tuple[list[Serving], list[Failure]]:
    """Every variant worth serving, under every serving profile whose backend runs its engine."""
    candidate_of = _candidates(site)
    servings: list[Serving] = []
    failures: list[Failure] = []
    for profile in workspace.plan.profiles:
        for one in served:
            candidate = candidate_of(one, profile)
            if profile.of_server and profile.backend != one.engine.name:
                reason = f"Triton's {profile.backend} backend does not run models for {one.engine.name}"
                failures.append(Failure(subject=candidate.name, phase="deploy", kind="not_applicable", reason=reason))
                continue
            servings.append(_serving(workspace, one, candidate, served[0], baseline=one is served[0]))
    return servings, failures


def _serving(
    workspace: Workspace, one: Judged, candidate: Candidate, first: Judged, *, baseline: bool = False
) -> Serving:
    """A candidate with what serving and checking it takes; ``first`` is the baseline's variant."""
    answers = None if one.variant.batch_dependent else load_outputs(next(iter(one.answers.values())))
    return Serving(
        candidate=candidate,
        artifact=one.variant.artifact,
        files=workspace.store.path(one.variant.artifact),
        answers=answers,
        baseline=baseline,
        adaptation=one.variant.adaptation,
        reference=next(iter(first.answers.values())),
        parity=one.variant.source == first.variant.source,
    )


def _with_champion(
    workspace: Workspace, servings: Sequence[Serving], first: Judged, contender: Contender | None, site: Site
) -> tuple[list[Serving], list[Failure]]:
    """The servings with the champion's among them, which may be one of them anyway."""
    standing = workspace.plan.champion
    if contender is None or standing is None:
        return list(servings), []
    if contender.judged is None:
        return list(servings), [contender.failure] if contender.failure else []
    profile = standing.candidate.serving
    candidate = _candidates(site)(contender.judged, profile)
    if candidate.id in {one.candidate.id for one in servings}:
        return [replace(one, champion=one.candidate.id == candidate.id) for one in servings], []
    if (why := workspace.plan.config.cluster.why_not(profile)) is not None:
        reason = f"the champion cannot be served here as it is now: {why}"
        return list(servings), [Failure(subject=candidate.name, phase="deploy", kind="not_applicable", reason=reason)]
    serving = _serving(workspace, contender.judged, candidate, first)
    return [*servings, replace(serving, champion=True)], []


def _but_as_champion(failure: Failure, contender: Contender | None) -> Failure:
    """Why a variant is not served; the champion is all the same, in its own way."""
    if contender is None or contender.judged is None or contender.judged.name != failure.subject:
        return failure
    return replace(failure, reason=f"{failure.reason}; it is served as the champion is, and in no other way")


def _candidates(site: Site) -> CandidateOf:
    """The candidate of a variant under a serving profile on this site, which is asked once for each of its servers."""
    known: dict[str, tuple[str, str]] = {}

    def candidate_of(one: Judged, profile: ServingProfile) -> Candidate:
        server = profile.server
        if server not in known:
            known[server] = site.server_version(server), site.served_by(server)
        fidelity = one.fidelities.get(profile.max_batch_size) or next(iter(one.fidelities.values()))
        return _candidate(one, profile, fidelity.engine_version, *known[server])

    return candidate_of


def _candidate(
    one: Judged, profile: ServingProfile, engine_version: str, serving_version: str, served_by: str
) -> Candidate:
    # A server's own engine is of another version than ours, so that our numbers are not its.
    engine_version = UNKNOWN_VERSION if profile.of_server else engine_version
    identity = {
        "variant": one.variant.id,
        "engine": to_jsonable(one.engine),
        "engine_version": engine_version,
        "serving": to_jsonable(profile),
        "server_version": serving_version,
        # What one cluster gave is not taken for another's.
        **({"cluster": served_by} if served_by else {}),
    }
    return Candidate(
        id=digest(identity),
        name=f"{one.name} @ {profile.key}",
        variant_id=one.variant.id,
        variant_name=one.name,
        engine=one.engine,
        engine_version=engine_version,
        serving=profile,
        server_version=serving_version,
        cluster=served_by,
    )


def _assembled(
    workspace: Workspace,
    *,
    started_at: str,
    evaluation: Samples,
    sources: Sequence[Source],
    variants: Sequence[Variant],
    judged: Sequence[Judged],
    servings: Sequence[Serving],
    measured: Measured,
    searches: tuple[ServingSearch, ...],
    failures: Sequence[Failure],
    contender: Contender | None,
) -> Campaign:
    planned = workspace.plan
    candidates = [serving.candidate for serving in servings]
    champion = next((serving.candidate for serving in servings if serving.champion), None)
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
        provisional=planned.level.provisional,
        champion_id=None if champion is None else champion.id,
    )
    identity = plan_id(planned, sources=tuple(source.digest for source in sources), samples_digest=evaluation.digest)
    return Campaign(
        id=identity,
        name=planned.config.name,
        model_name=planned.config.registry.model_name or planned.config.name,
        level=planned.level.name,
        seed=planned.config.seed,
        started_at=reporting.begun(planned.work, identity) or started_at,
        host=planned.host,
        versions=_versions(),
        samples_digest=evaluation.digest,
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
        serving_searches=searches,
        hardware=planned.hardware,
        advice=tuple(advice_of(one) for one in measured.capacities),
        spectra=spectra_of(measured.rounds, raw_root=planned.work, loads=loads_of(planned.policy)),
        champion=record_of(planned, contender, champion, against),
    )


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


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


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
        variants: names of presets to make, or none for all that the campaign names.
        calibration: for an ONNX file: the samples that static quantization takes its ranges from.
        out: the folder that gets one folder a variant.
        work: the working folder, or None for ``burnish-work`` beside the model.
        observer: told what is done.

    Returns:
        The variants (name, path of the entry file, size, notes) and the failures, as plain values.

    Raises:
        InputError: the model or a preset cannot be taken.
    """
    config = _config_for(model, variants, calibration)
    planned = plan(config, base=model.parent, work=work or model.parent / "burnish-work")
    with _workspace(planned, observer) as workspace:
        samples = _calibration(planned)
        sources, failures = make_sources(workspace)
        if samples is not None:
            check_fit(samples, sources[0].artifact.inputs, where="the calibration samples")
        made, unmade = make_all(workspace, sources, samples)
        placed = [_placed(workspace, variant, out) for variant in made]
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


def _config_for(model: Path, variants: tuple[str, ...], calibration: Path | None) -> CampaignConfig:
    if model.suffix in {".yaml", ".yml"}:
        if calibration is not None:
            raise InputError("--calibration is for an ONNX file; a campaign file names its own samples.calibration")
        config = load_campaign(model)
        return config.model_copy(update={"variants": variants}) if variants else config
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


def _placed(workspace: Workspace, variant: Variant, out: Path) -> dict[str, Any]:
    """Copies a variant to its folder; one that is there already is replaced."""
    folder = out / variant.name.replace("/", "-")
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(workspace.store.path(variant.artifact), folder)
    return {
        "name": variant.name,
        "id": variant.id,
        "path": str(folder / variant.artifact.entry),
        "size_bytes": variant.artifact.size_bytes,
        "notes": list(variant.notes),
    }
