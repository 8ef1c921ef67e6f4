"""The serving profiles that a campaign measures beside those it names: searched for before its rounds.

The method is that of `profiles.search`; here its points are served and measured, one after the other, and kept in the
journal, so that a search that was killed goes on where it stopped. It is made for the variant that is fastest in
process, and for the baseline where its in-process curve leaves it a chance. What it finds is an ordinary serving
profile, under which every variant that is served is measured in the rounds, so that a lucky window wins nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from optimize.adaptation import adapt
from optimize.config import ServingSearchConfig
from optimize.fidelity import load_outputs
from optimize.judging import Judged, judge_one, time_in_process
from optimize.plan import Plan, Workspace
from optimize.samples import Samples
from profiles.deploy.cluster import Cluster
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads, expected_answers
from profiles.measure.rounds import run_until_valid
from profiles.search import InProcessCurve, curve_of, highest_bound, search_serving, search_space
from registry.codec import to_jsonable
from registry.errors import (
    BudgetUsedUpError,
    BurnishError,
    CheckFailedError,
    GeneratorLostError,
    InputError,
    StorageError,
)
from registry.records import (
    Candidate,
    ClosedLoop,
    Estimate,
    LoadProfile,
    RunRecord,
    Screening,
    ServingPoint,
    ServingProfile,
    ServingSearch,
)

CandidateOf = Callable[[Judged, ServingProfile], Candidate]

METHOD = 2  # raised when points are measured in another way, so that earlier ones do not count
# A window after which nothing is known of the server's rate. Other gates say that it may be more, or was disturbed.
_SPOILING = frozenset({"errors", "mismatch", "answered_by", "restarted", "in_flight"})
_DISTURBED_NOISE = 1.2
_AGAIN = 6
_FEWEST_CLIENTS, _MOST_CLIENTS = 8, 64
_LONGEST_SCREEN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the searches of a campaign came to.

    Attributes:
        workspace: the campaign's, whose plan has the profiles that were found, too.
        served: the variants, judged at the batch sizes of those as well where answers depend on them.
        searches: one for each variant that was searched for.
    """

    workspace: Workspace
    served: list[Judged]
    searches: tuple[ServingSearch, ...] = ()


def find_profiles(
    workspace: Workspace, served: Sequence[Judged], cluster: Cluster, evaluation: Samples, candidate_of: CandidateOf
) -> Found:
    """The campaign with the serving profiles that its searches found; as it is, where its file asks for none.

    Args:
        workspace: of the campaign.
        served: the variants that are to be served: the baseline, and the others with the fastest in process first.
        cluster: where they are.
        evaluation: samples that requests are made of.
        candidate_of: the candidate of a variant under a profile.

    Raises:
        StorageError: the working folder cannot be written.
        GeneratorLostError: the load generator does not stay alive.
    """
    budget = workspace.plan.config.search.serving
    if budget is None:
        return Found(workspace=workspace, served=list(served))
    plan = workspace.plan
    space = space_of(plan, budget)
    workspace.observer.phase("Searching serving profiles", 2 * (budget.points + _AGAIN))
    searches: list[ServingSearch] = []
    with LoadGenerator(cpus=plan.client_cpus, work=plan.work) as generator:
        place = _Range(
            workspace=workspace,
            cluster=cluster,
            generator=generator,
            evaluation=evaluation,
            candidate_of=candidate_of,
        )
        for one in (*served[1:2], served[0]):
            fitting = [profile for profile in space if not profile.of_server or profile.backend == one.engine.name]
            try:
                search = _Hunt(place, one, fitting).search(budget, rate_to_beat=_rate(searches)) if fitting else None
            except BudgetUsedUpError as error:
                workspace.observer.note(f"{one.name} is searched no further: {error.message}")
                continue
            if search is not None:
                searches.append(search)
                workspace.observer.note(f"{one.name}: {search.sentence}")
    new = [search.best.profile for search in searches if search.best is not None]
    profiles = tuple(dict.fromkeys((*plan.profiles, *new)))
    widened = replace(workspace, plan=replace(plan, profiles=profiles))
    return Found(workspace=widened, served=_judged_again(widened, served, evaluation), searches=tuple(searches))


def space_of(plan: Plan, budget: ServingSearchConfig) -> tuple[ServingProfile, ...]:
    """The profiles to choose from: those of the axes that the cluster serves, by the backends of the campaign.

    Raises:
        InputError: there are none.
    """
    space = search_space(
        cores=len(plan.server_cpus),
        servers=budget.servers or tuple(dict.fromkeys(profile.server for profile in plan.profiles)),
        protocols=budget.protocols,
        batch_sizes=budget.batch_sizes,
        delays_ms=budget.delays_ms,
        lane_counts=budget.lanes,
        threads=budget.threads,
    )
    backends = {profile.server: profile.backend for profile in reversed(plan.profiles)}
    ours = [replace(profile, backend=backends.get(profile.server, profile.backend)) for profile in space]
    refusals = [plan.config.cluster.why_not(profile) for profile in ours]
    if all(refusals):
        raise InputError(f"search.serving: nothing of it can be served: {refusals[0]}")
    return tuple(profile for profile, why in zip(ours, refusals, strict=True) if why is None)


def clients_of(space: Sequence[ServingProfile]) -> int:
    """How many requests are outstanding at any time, at every point alike: enough to fill the largest batch twice."""
    largest = max(profile.max_batch_size for profile in space)
    return min(max(2 * largest, _FEWEST_CLIENTS), _MOST_CLIENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """Where the profiles of all variants are tried."""

    workspace: Workspace
    cluster: Cluster
    generator: LoadGenerator
    evaluation: Samples
    candidate_of: CandidateOf


class _Hunt:
    """The search for one variant."""

    def __init__(self, place: _Range, one: Judged, space: Sequence[ServingProfile]) -> None:
        self._place, self._workspace, self._one, self._space = place, place.workspace, one, space
        self._inputs = adapt(place.evaluation.inputs, one.variant.adaptation)
        # A server that answers at once with rubbish is not fast.
        known = next(iter(one.answers.values()), None)
        self._answers = None if known is None or one.variant.batch_dependent else load_outputs(known)
        self._looks: dict[str, int] = {}

    def search(self, budget: ServingSearchConfig, *, rate_to_beat: float) -> ServingSearch | None:
        """What the search came to; None where no profile can bring the variant to the rate of another."""
        space, curve = self._space, self._curve()
        bound = highest_bound(space, curve)
        if bound <= rate_to_beat:
            self._workspace.observer.note(
                f"{self._one.name} is not searched: in process it does {bound:.0f} rows a second at most, and another "
                f"variant is served at {rate_to_beat:.0f}"
            )
            return None
        plan = self._workspace.plan
        components = {
            **self._shared(),
            "variant": self._one.variant.id,
            "engine": self._one.engine.key,
            "space": [profile.key for profile in space],
            "start": [profile.key for profile in plan.profiles],
            "points": budget.points,
            "minutes": budget.minutes,
            "curve": [[*at, rate] for at, rate in sorted(curve.rows_per_s.items())],
        }

        def run() -> ServingSearch:
            deadline = monotonic() + 60 * budget.minutes
            found = search_serving(
                space,
                self._measure,
                curve=curve,
                points=budget.points,
                again=_AGAIN,
                start=plan.profiles,
                seed=plan.config.seed,
                out_of_time=lambda: monotonic() > deadline,
            )
            return replace(found, variant_name=self._one.name)

        return self._workspace.remember("ServingSearch", self._one.name, components, run)[0]

    def _curve(self) -> InProcessCurve:
        """The variant in process, at each number of threads and batch size of the space, as far as it runs there."""
        sizes = sorted({profile.max_batch_size for profile in self._space})
        screenings = []
        for threads in sorted({profile.threads for profile in self._space}):
            try:
                screenings.append(self._screen(threads, sizes))
            except StorageError:
                raise
            except BurnishError as error:
                told = f"{self._one.name} is searched without its time in process on {threads} threads: {error.message}"
                self._workspace.observer.note(told)
        return curve_of(screenings)

    def _screen(self, threads: int, sizes: Sequence[int]) -> Screening:
        budget_s = min(self._workspace.plan.level.screen_s, _LONGEST_SCREEN_S)
        name = f"{self._one.name} on {threads} threads"
        return time_in_process(self._workspace, self._one, name, sizes=sizes, threads=threads, budget_s=budget_s)

    def _measure(self, profile: ServingProfile) -> Estimate:
        """The rate of one window; a failure is remembered like a rate.

        Raises:
            CheckFailedError: it was not served, or its window says nothing.
        """
        candidate = self._place.candidate_of(self._one, profile)
        look = self._looks[profile.key] = self._looks.get(profile.key, 0) + 1

        def attempt() -> ServingPoint:
            try:
                return ServingPoint(profile=profile, score=self._window(candidate), reason="")
            except (StorageError, GeneratorLostError):
                raise  # no fault of the profile; the next one would meet it too
            except BurnishError as error:
                return ServingPoint(profile=profile, score=None, reason="", failure=error.message.partition("\n")[0])

        components = {**self._shared(), "candidate": candidate.id, "look": look}
        point, known = self._workspace.remember("ServingPoint", candidate.name, components, attempt)
        told = f"failed: {point.failure}" if point.score is None else f"{point.score.value:.0f} requests a second"
        self._workspace.observer.done(candidate.name, told + (" (known)" if known else ""))
        if point.score is None:
            raise CheckFailedError(point.failure)
        return point.score

    def _window(self, candidate: Candidate) -> Estimate:
        plan, variant = self._workspace.plan, self._one.variant
        files = self._workspace.store.path(variant.artifact)
        raw = self._workspace.folder("raw") / f"{candidate.id}-search.npz"
        deployment = self._place.cluster.deploy(
            candidate, variant.artifact, files, timeout_s=plan.config.limits.load_timeout_s
        )
        try:
            payloads = encode_payloads(self._inputs, target=deployment.target, seed=plan.config.seed)
            expected = None if self._answers is None else expected_answers(payloads, self._answers)

            def run(load: LoadProfile, _: object) -> RunRecord:
                return self._place.generator.run(
                    deployment.target, payloads, load, raw_path=raw, usage=deployment.usage, expected=expected
                )

            return rate_of(run_until_valid(run, self._load(), raw, plan.level))
        finally:
            deployment.undeploy()
            raw.unlink(missing_ok=True)

    def _load(self) -> LoadProfile:
        level = self._workspace.plan.level
        return LoadProfile(
            name="search",
            load=ClosedLoop(concurrency=clients_of(self._space)),
            warmup_s=level.warmup_s,
            duration_s=level.ladder_s,
            timeout_s=level.timeout_s,
            seed=self._workspace.plan.config.seed,
        )

    def _shared(self) -> dict[str, Any]:
        """What each window depends on, beside the candidate."""
        plan = self._workspace.plan
        return {
            "host": plan.host.fingerprint,
            "load": to_jsonable(self._load()),
            "samples": self._place.evaluation.digest,
            "seed": plan.config.seed,
            "method": METHOD,
        }


def rate_of(record: RunRecord) -> Estimate:
    """What a window says of the rate; without an interval where it is as sure as windows are.

    Raises:
        CheckFailedError: it says nothing.
    """
    spoiled = [finding for finding in record.findings if finding.gate in _SPOILING]
    rate = record.metrics["throughput_rps"]
    if spoiled or rate <= 0:
        reason = ", ".join(f"{finding.gate}: {finding.observed}" for finding in spoiled)
        raise CheckFailedError(f"its window says nothing of its rate ({reason or 'no answers'})")
    sure = record.valid
    return Estimate(
        value=rate,
        low=None if sure else rate / _DISTURBED_NOISE,
        high=None if sure else rate * _DISTURBED_NOISE,
        runs=1,
        method="single run" if sure else f"single run, disturbed: {', '.join(one.gate for one in record.findings)}",
        unit="1/s",
    )


def _rate(searches: Sequence[ServingSearch]) -> float:
    """The best rate that was found so far."""
    found = [
        search.best.score.value for search in searches if search.best is not None and search.best.score is not None
    ]
    return max(found, default=0.0)


def _judged_again(workspace: Workspace, served: Sequence[Judged], evaluation: Samples) -> list[Judged]:
    """The variants; those whose answers depend on the batch are judged at the batch sizes that came in, too."""
    sizes = {profile.max_batch_size for profile in workspace.plan.profiles}
    found: list[Judged] = []
    for one in served:
        depends = one.variant.batch_dependent or len(one.fidelities) > 1
        if depends and sizes - set(one.fidelities):
            found.append(_judged_wider(workspace, one, found[0] if found else None, evaluation))
        else:
            found.append(one)
    return found


def _judged_wider(workspace: Workspace, one: Judged, baseline: Judged | None, evaluation: Samples) -> Judged:
    """The variant judged at all batch sizes; as it was, where that fails, so that it stays unknown at the new ones."""
    try:
        again = judge_one(workspace, one.variant, one.engine, evaluation, baseline)
    except StorageError:
        raise
    except BurnishError as error:
        workspace.observer.note(f"{one.name} is not judged at the batch sizes that were found: {error.message}")
        return one
    return replace(again, screening=one.screening)
