"""What is found of variants once they are made: how they answer, what they take in process, and how they serve.

All of it runs on one machine, whose fingerprint goes with the numbers; `optimize.measuring_step` takes it to another.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from optimize.budget import Budget
from optimize.champion import Contender, judge_champion
from optimize.clusters import Site, open_site, owner_of
from optimize.engines.cores import alone_on, reserve_cores
from optimize.fidelity import load_outputs
from optimize.judging import Judged, choose_served, judge_variants, screen_variants
from optimize.measuring import Measured, Serving, measure
from optimize.packages import PackageNotFoundError, version
from optimize.plan import Workspace
from optimize.samples import SampleFile, Samples
from optimize.serving_search import CandidateOf, find_profiles
from optimize.tuning import tune_variants
from profiles.deploy.core2_candidates import UNKNOWN_VERSION
from registry.codec import digest, to_jsonable
from registry.records import Candidate, Failure, Host, ServingProfile, ServingSearch, Source, Variant

_PACKAGES = (
    "burnish", "mlflow", "mlserver", "nncf", "numpy", "nvidia-pytriton", "onnx", "onnxruntime", "onnxscript",
    "openvino", "optimum", "optimum-onnx", "torch", "transformers", "tritonclient",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Variants that were made, and the samples that they are judged by.

    Attributes:
        calibration: the samples that static quantization takes its ranges from, or None.
        sources: that the samples fit; the first is the baseline's.
        variants: the baseline first.
    """

    evaluation: Samples
    calibration: SampleFile | None
    sources: tuple[Source, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a campaign knows before it serves anything: every variant made, judged and timed in process."""

    evaluation: Samples
    sources: list[Source]
    variants: list[Variant]
    judged: list[Judged]
    failures: list[Failure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that was found of variants on one machine.

    Attributes:
        host: that machine, with the pinning that measurements used.
        server_cpus: the CPUs that servers and in-process sessions were pinned to.
        versions: package -> version there.
        profiles: the serving profiles, those that were found among them.
        variants: those that were made and those that came of tuning.
        judged: each variant in each engine.
        contender: the champion in this campaign; None where there is none.
        candidates: what was served, the baseline first.
        champion_id: which of them is the champion; None where it is none of them.
        measured: what serving and measuring gave.
        searches: of serving profiles.
        failures: of all these phases.
    """

    host: Host
    server_cpus: tuple[int, ...]
    versions: Mapping[str, str]
    profiles: tuple[ServingProfile, ...]
    variants: tuple[Variant, ...]
    judged: tuple[Judged, ...]
    contender: Contender | None
    candidates: tuple[Candidate, ...]
    champion_id: str | None
    measured: Measured
    searches: tuple[ServingSearch, ...]
    failures: tuple[Failure, ...]


def prepare(workspace: Workspace, made: Made) -> Prepared:
    """Every variant judged and timed in process, and those that tuning adds.

    Raises:
        BurnishError: the baseline itself cannot be judged or timed.
    """
    variants, evaluation = list(made.variants), made.evaluation
    judged, misjudged = judge_variants(workspace, variants, evaluation)
    tuned, untuned = tune_variants(workspace, made.sources, judged, calibration=made.calibration, evaluation=evaluation)
    if tuned:
        [_, *rejudged], misjudged_again = judge_variants(workspace, [judged[0].variant, *tuned], evaluation)
        variants, judged, misjudged = [*variants, *tuned], [*judged, *rejudged], [*misjudged, *misjudged_again]
    timed, untimed = screen_variants(workspace, judged)
    return Prepared(
        evaluation=evaluation,
        sources=list(made.sources),
        variants=variants,
        judged=timed,
        failures=[*misjudged, *untuned, *untimed],
    )


def find(workspace: Workspace, made: Made, preparing: Budget) -> Findings:
    """All that is to be found of the variants, on this machine.

    Args:
        workspace: of the campaign.
        made: the variants.
        preparing: the part of the campaign's time for what comes before measuring.

    Raises:
        BurnishError: the baseline itself cannot be judged or timed, or the cluster is not what it should be.
        StorageError: the working folder cannot be written.
        GeneratorLostError: the load generator does not stay alive.
    """
    prepared = prepare(replace(workspace, budget=preparing), made)
    evaluation = prepared.evaluation
    contender = judge_champion(workspace, evaluation=evaluation, sources=prepared.sources, judged=prepared.judged)
    served, unserved = choose_served(workspace, prepared.judged)
    unserved = [_but_as_champion(one, contender) for one in unserved]
    with campaign_site(workspace) as site:
        searching = replace(workspace, budget=workspace.budget.preparing())
        found = find_profiles(searching, served, site.cluster, evaluation, _candidates(site))
        workspace, served = replace(found.workspace, budget=workspace.budget), found.served
        servings, unfit = _servings(workspace, served, site)
        servings, refused = _with_champion(workspace, servings, served[0], contender, site)
        measured = measure(workspace, site.cluster, servings, evaluation.inputs, evaluation.digest)
        if not measured.deployed and not workspace.budget.is_used_up:
            site.check(workspace.plan.profiles)  # where all failed, the cluster may be why
    return Findings(
        host=workspace.plan.host,
        server_cpus=workspace.plan.server_cpus,
        versions=versions(),
        profiles=workspace.plan.profiles,
        variants=tuple(prepared.variants),
        judged=tuple(next((again for again in served if again.name == one.name), one) for one in prepared.judged),
        contender=contender,
        candidates=tuple(serving.candidate for serving in servings),
        champion_id=next((serving.candidate.id for serving in servings if serving.champion), None),
        measured=measured,
        searches=found.searches,
        failures=(*prepared.failures, *unserved, *unfit, *refused, *measured.failures),
    )


@contextlib.contextmanager
def campaign_site(workspace: Workspace) -> Iterator[Site]:
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


@contextlib.contextmanager
def with_cores_alone(workspace: Workspace) -> Iterator[Workspace]:
    """The workspace, which takes all cores of this process for itself before the first work, until the block ends.

    A campaign for which nothing is left to do waits for nobody.
    """
    with contextlib.ExitStack() as held:
        taken: list[bool] = []

        def take() -> None:
            if taken:
                return
            cores = held.enter_context(reserve_cores(None, alone=True, waiting=workspace.waits_for_cores))
            held.enter_context(alone_on(cores))
            taken.append(True)

        yield replace(workspace, begin_work=take)


def versions() -> dict[str, str]:
    """Package -> version, of those that numbers depend on, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


# --- candidates --------------------------------------------------------------------------------------------------


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
