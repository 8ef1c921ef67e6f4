"""Serving candidates and measuring them in interleaved rounds, each result committed before the next begins."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from numpy.typing import NDArray

from optimize.adaptation import adapt
from optimize.budget import Budget
from optimize.in_process import answer_in_process
from optimize.judging import failure_of, limits_of, told_of
from optimize.plan import Workspace
from optimize.served_answers import components_of, judge_served
from profiles.deploy.cluster import Cluster, Deployment
from profiles.load.ceiling import Ceilings
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import Expected, Payload, encode_payloads, encode_rows, expected_answers
from profiles.measure.capacity import find_capacity, told_saturation
from profiles.measure.compare import looks_at
from profiles.measure.equivalence import MOST_ROWS, Reference, check_equivalence
from profiles.measure.levels import Level
from profiles.measure.resources import GpuProbe, NvmlProbe, PackageEnergy, first_request_ms
from profiles.measure.rounds import AGAIN, CLOSED, Slot, measure_in_round, round_order, undecided, window_profile
from profiles.measure.slo import LatencyLimit, measure_slo_max
from registry.codec import digest
from registry.errors import (
    BudgetUsedUpError,
    BurnishError,
    CheckFailedError,
    GeneratorLostError,
    ServerDiedError,
    StorageError,
    UnreachableError,
)
from registry.policy import DEFAULT_LOAD, loads_named, slo_limit
from registry.records import (
    Adaptation,
    Artifact,
    Candidate,
    Capacity,
    Deployed,
    Equivalence,
    Failure,
    FailurePhase,
    Fidelity,
    LoadProfile,
    Policy,
    Round,
    RunRecord,
)

# How many requests show whether answers get mixed up, and how long that may take; the first holds for levels whose
# verdict is provisional.
_CHECKS = {True: (32, 1.5), False: (64, 10.0)}
_LEAST_BURST, _LARGEST_BURST = 4, 32
_ASKED_ALONE = 64
# Fewer runs have no interval, so that they decide nothing.
_FEWEST_ROUNDS = 2
_FEWEST_COMPARED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A candidate with what serving and checking it takes.

    Attributes:
        artifact: the candidate's model.
        files: the folder with its files.
        answers: what it should answer for each sample (output name -> array), or None where an answer depends on its
            neighbours in the batch and so cannot be foretold.
        adaptation: how the candidate's inputs come from the samples.
        baseline: whether others are compared with it, so that it has two slots in a round, for the noise floor.
        reference: file with the baseline's answers, which a server's own engine is judged by; None where it is not.
        parity: whether the baseline is of the same source.
        champion: whether it serves now, so that others are compared with it, too.
    """

    candidate: Candidate
    artifact: Artifact
    files: Path
    answers: Mapping[str, NDArray[Any]] | None
    baseline: bool
    adaptation: tuple[Adaptation, ...] = ()
    reference: Path | None = None
    parity: bool = True
    champion: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What serving and measuring gave; a candidate that failed on the way is among the failures.

    Attributes:
        cut: whether the campaign's time was used up before all rounds were played.
        short: whether candidates that count have fewer rounds for it than their level of proof has.
    """

    deployed: tuple[Deployed, ...]
    capacities: tuple[Capacity, ...]
    rounds: tuple[Round, ...]
    failures: tuple[Failure, ...]
    fidelities: tuple[Fidelity, ...] = ()
    cut: bool = False
    short: bool = False


def measure(
    workspace: Workspace,
    cluster: Cluster,
    servings: Sequence[Serving],
    inputs: Mapping[str, NDArray[Any]],
    samples_digest: str,
) -> Measured:
    """Serves every candidate that is not measured yet, and measures it in interleaved rounds.

    All candidates stay deployed through all rounds, so that rounds alternate quickly; each waits idle while another is
    measured. Where the campaign's limits say ``deployed: one``, each is deployed for its turn alone. Servers and load
    generator are pinned to CPUs of their own. Candidates that in an objective are neither certainly another than the
    baseline nor its like go on with it for more rounds, where the level has more.

    Where the campaign's time is limited, the baseline comes first, and others are only begun as long as the rounds of
    all still fit. Whoever is not begun, or has too few rounds in the end, becomes a failure of kind ``budget``.

    Args:
        workspace: the plan, and where results go.
        cluster: where candidates are deployed; what is still deployed at the end is left for its `close` to end.
        servings: the candidates.
        inputs: the evaluation samples, input name -> array of shape (samples, ...), that payloads are made of.
        samples_digest: what identifies them.

    Raises:
        StorageError: the working folder cannot be written.
        GeneratorLostError: the load generator does not stay alive.
    """
    plan = workspace.plan
    slots = [
        Slot(serving.candidate.id, again)
        for serving in servings
        for again in ((False, True) if plan.level.a_a and serving.baseline else (False,))
    ]
    # A verdict that is only a hint is not worth the seconds.
    ceiling = None if plan.level.provisional else Ceilings(plan.work, plan.server_cpus, plan.host.fingerprint)
    with LoadGenerator(cpus=plan.client_cpus, work=plan.work, ceiling=ceiling) as generator:
        hall = _Hall(workspace, cluster, generator, servings=servings, inputs=inputs, samples_digest=samples_digest)
        workspace.observer.phase("Finding capacities", len(servings))
        for serving in servings:
            hall.attempt(serving, hall.find_capacity)
        workspace.observer.phase("Measuring", len(slots) * plan.level.rounds)
        hall.play(slots, range(plan.level.rounds))
        for played, look in pairwise(looks_at(plan.level.rounds, plan.level.most_rounds)):
            slots = hall.undecided(slots)
            if not slots:
                break
            workspace.observer.phase("Measuring what is undecided", len(slots) * (look - played))
            hall.play(slots, range(played, look))
    return hall.measured()


class _Hall:
    """What is deployed during one call of `measure`, and what has been found in it."""

    def __init__(
        self,
        workspace: Workspace,
        cluster: Cluster,
        generator: LoadGenerator,
        *,
        servings: Sequence[Serving],
        inputs: Mapping[str, NDArray[Any]],
        samples_digest: str,
    ) -> None:
        self.servings = {serving.candidate.id: serving for serving in servings}
        self._workspace = workspace
        self._budget = workspace.budget
        self._plan = workspace.plan
        self._cluster = cluster
        self._generator = generator
        self._inputs = inputs
        self._loads = loads_of(self._plan.policy)
        self._shared = {
            "host": self._plan.host.fingerprint,
            "level": asdict(self._plan.level),
            "samples": samples_digest,
            "seed": self._plan.config.seed,
        }
        self._one_at_a_time = self._plan.config.limits.deployed == "one"
        if self._one_at_a_time:
            self._shared["deployed"] = "one"  # those with idle neighbours are others
        self._gpus, self._package = _meters(workspace)
        self._deployments: dict[str, Deployment] = {}
        self._first_ms: dict[str, float | None] = {}
        self._deployed: dict[str, Deployed] = {}
        self._capacities: dict[str, Capacity] = {}
        self._rounds: list[Round] = []
        self._fidelities: list[Fidelity] = []
        self._failures: dict[str, Failure] = {}
        self._took_s: list[float] = []
        self._cut = False

    def attempt(self, serving: Serving, work: Callable[[Serving], str]) -> None:
        """Does one piece of work on a candidate; a failure becomes its record, and the candidate is left out.

        Raises:
            StorageError: the working folder cannot be written.
            GeneratorLostError: the load generator does not stay alive.
        """
        name = serving.candidate.name
        if (failure := self._failures.get(serving.candidate.id)) is not None:
            why = "it was not begun" if failure.kind == "budget" else "it failed"
            self._workspace.observer.done(name, f"left out: {why}")
            return
        try:
            outcome = work(serving)
            if self._one_at_a_time:
                self._undeploy(serving.candidate.id)
        except BudgetUsedUpError as error:
            self._not_begun(serving, error)
            return
        except (StorageError, GeneratorLostError):
            raise  # no fault of the candidate; the next one would meet it too
        except BurnishError as error:
            served = serving.candidate.id in self._deployments or isinstance(error, CheckFailedError)
            phase: FailurePhase = "measure" if served else "deploy"
            failure = failure_of(name, phase, self._died(serving) or error)
            self._failures[serving.candidate.id] = failure
            self._undeploy(serving.candidate.id)
            outcome = told_of(failure)
        self._workspace.observer.done(name, outcome)

    def _not_begun(self, serving: Serving, error: BudgetUsedUpError) -> None:
        """Notes that there was no time for it; a candidate keeps its rounds, and gets those that are known."""
        candidate_id, observer = serving.candidate.id, self._workspace.observer
        if candidate_id not in self._capacities:
            self._failures[candidate_id] = failure_of(serving.candidate.name, "measure", error)
            self._undeploy(candidate_id)
            observer.done(serving.candidate.name, told_of(self._failures[candidate_id]))
        elif not self._cut:
            observer.note(f"No further round is begun: {error.message}.")
            self._cut = True

    def _died(self, serving: Serving) -> ServerDiedError | None:
        """That the candidate's server is no more, which says more than that it did not answer; None where it lives."""
        deployment = self._deployments.get(serving.candidate.id)
        try:
            if deployment is not None:
                deployment.usage()
        except ServerDiedError as died:
            return died
        except BurnishError:
            pass  # what is known already says more
        return None

    def find_capacity(self, serving: Serving) -> str:
        """Where the candidate saturates, once it is known to give each request its own answer."""
        self._workspace = replace(self._workspace, budget=self._budget_for_another())
        began = monotonic()
        deployed = self._remembered_deployment(serving)
        self._check_answers(serving)
        self._judge_answers(serving)
        candidate_id = serving.candidate.id

        def search() -> Capacity:
            deployment = self._deployment(serving)
            payloads = self._payloads(serving, deployment)
            # The search keeps its stages, not their arrays: each window overwrites the last one's.
            raw = self._workspace.folder("raw") / f"{candidate_id}-capacity.npz"

            def run(profile: LoadProfile, path: Path) -> RunRecord:
                return self._generator.run(deployment.target, payloads, profile, raw_path=path, usage=deployment.usage)

            level, seed = self._plan.level, self._plan.config.seed
            try:
                found = find_capacity(lambda one: run(one, raw), level, candidate_id=candidate_id, seed=seed)
                if limit is None:
                    return found
                searched = measure_slo_max(run, limit, found, level=level, seed=seed, raw=raw)
                return replace(found, slo_max=searched.estimate)
            finally:
                raw.unlink(missing_ok=True)

        limit = _latency_limit(self._plan.policy)
        components = {"candidate": candidate_id, **self._shared}
        if limit is not None:
            components["slo"] = asdict(limit)
        capacity, known = self._workspace.remember("Capacity", serving.candidate.name, components, search)
        self._capacities[candidate_id] = capacity
        self._deployed[candidate_id] = deployed
        if not known:
            self._took_s.append(monotonic() - began)
        return told_saturation(capacity) + _reused(known)

    def _budget_for_another(self) -> Budget:
        """The time in which one more candidate may be begun; what the rounds of all will take is kept for them.

        The baseline and the first of the others are begun as long as there is any, since there is no verdict without.
        """
        known = list(self._capacities.values())
        if self._budget.minutes is None or len(known) < _FEWEST_COMPARED:
            return self._budget
        level, twice = self._plan.level, [self.servings[one.candidate_id].baseline for one in known]
        slots_s = [_slot_s(one, self._loads, level) for one in known]
        each_s = [slot_s * (2 if level.a_a and again else 1) for slot_s, again in zip(slots_s, twice, strict=True)]
        rounds_s = level.rounds * (sum(each_s) + max(slots_s))
        its_own_s = median(self._took_s) if self._took_s else 0.0
        return self._budget.keeping(rounds_s + its_own_s, "the rounds of others")

    def _check_answers(self, serving: Serving) -> None:
        """Returns when the candidate gives each of many concurrent requests its own answer.

        Raises:
            CheckFailedError: it does not, so that its numbers would say nothing.
        """
        candidate = serving.candidate
        requests, budget_s = _CHECKS[self._plan.level.provisional]

        def check() -> Equivalence:
            deployment = self._deployment(serving)
            inputs = adapt(self._inputs, serving.adaptation)
            if serving.answers is not None:
                reference = Reference(outputs=serving.answers)
            else:
                inputs = {name: array[:_ASKED_ALONE] for name, array in inputs.items()}
                reference = self._answers_alone(serving, inputs)
            return check_equivalence(
                deployment.target,
                inputs,
                reference=reference,
                requests=requests,
                concurrency=min(max(candidate.serving.max_batch_size, _LEAST_BURST), _LARGEST_BURST),
                most_rows=min(candidate.serving.max_batch_size, MOST_ROWS),
                seed=self._plan.config.seed,
                budget_s=budget_s,
            )

        components = {"candidate": candidate.id, "requests": requests, **self._shared}
        found, _ = self._workspace.remember("Equivalence", candidate.name, components, check)
        if not found.passed:
            raise CheckFailedError(
                f"its answers cannot be trusted: {found.reason}", hint="Nothing was measured; burnish check shows more."
            )

    def _judge_answers(self, serving: Serving) -> None:
        """Finds how true the answers of a server's own engine are, of which nothing is known from ours."""
        candidate, reference = serving.candidate, serving.reference
        if not candidate.serving.of_server or reference is None:
            return
        samples, parity = str(self._shared["samples"]), serving.parity

        def judge() -> Fidelity:
            return judge_served(
                self._workspace,
                candidate,
                self._deployment(serving).target,
                adapt(self._inputs, serving.adaptation),
                samples_digest=samples,
                reference=reference,
                parity=parity,
                adapted=bool(serving.adaptation),
            )

        components = components_of(
            self._workspace, candidate, samples_digest=samples, reference=reference, parity=parity
        )
        self._fidelities.append(self._workspace.remember("Fidelity", candidate.name, components, judge)[0])

    def _answers_alone(self, serving: Serving, inputs: Mapping[str, NDArray[Any]]) -> Reference:
        """What a model whose answers depend on their neighbours answers without any."""
        candidate = serving.candidate
        return answer_in_process(
            serving.files / serving.artifact.entry,
            candidate.engine,
            inputs,
            batch_size=candidate.serving.max_batch_size,
            threads=candidate.serving.threads,
            seed=self._plan.config.seed,
            limits=limits_of(self._workspace),
        )

    def play(self, slots: Sequence[Slot], numbers: Iterable[int]) -> None:
        """Measures these slots in rounds of these numbers."""
        self._workspace = replace(self._workspace, budget=self._budget)
        together = sorted({slot.candidate_id for slot in slots})
        for number in numbers:
            for position, slot in enumerate(round_order(self._plan.config.seed, number, slots)):
                self.attempt(self.servings[slot.candidate_id], self._in_slot(slot, number, position, together))

    def undecided(self, slots: Sequence[Slot]) -> list[Slot]:
        """The slots of candidates that the rounds so far leave open in an objective, and of baselines and champion."""
        wanted = [(objective.metric, objective.load) for objective in self._plan.policy.objectives]
        left: set[str] = set()
        standing = [one for identity, one in self.servings.items() if identity not in self._failures]
        for baseline in (one.candidate for one in standing if one.baseline):
            alike = {one.candidate.id for one in standing if one.candidate.serving == baseline.serving}
            rounds = [one for one in self._rounds if one.candidate_id in alike]
            found = undecided(baseline.id, rounds, wanted, raw_root=self._plan.work, level=self._plan.level)
            left |= {baseline.id, *found} if found else set()
        left |= self._undecided_against_champion(standing, wanted)
        return [slot for slot in slots if slot.candidate_id in left]

    def _undecided_against_champion(
        self, standing: Sequence[Serving], wanted: Sequence[tuple[str, str | None]]
    ) -> set[str]:
        """Candidates that the rounds so far do not tell from the champion, it, and who gives the noise floor."""
        champion = next((one.candidate.id for one in standing if one.champion), None)
        twice = next((one.candidate.id for one in standing if one.baseline), None)
        if champion is None or champion == twice:
            return set()
        found = undecided(
            champion, self._rounds, wanted, raw_root=self._plan.work, level=self._plan.level, a_a_id=twice
        )
        return {champion, *found, *([] if twice is None else [twice])} if found else set()

    def _in_slot(self, slot: Slot, number: int, position: int, together: list[str]) -> Callable[[Serving], str]:
        """The work of measuring the slot's candidate in it."""
        return lambda serving: self._measure_round(serving, slot, number, position, together=together)

    def _measure_round(self, serving: Serving, slot: Slot, number: int, position: int, *, together: list[str]) -> str:
        candidate_id = serving.candidate.id
        components = {
            "candidate": candidate_id,
            "again": slot.again,
            # Pairs are compared because they stand close together in time: runs of a round with other candidates in
            # it, perhaps of another day, are no pairs of this one's. Planned candidates count, failed or not. A round
            # that a kill has parted in two stays one; the drift between its halves is what its noise floor is for.
            "candidates": together,
            "loads": list(self._loads),
            "round": number,
            **self._shared,
        }
        # Named by all that the round depends on: another level's or seed's arrays are not to overwrite these.
        folder = self._workspace.folder("raw") / candidate_id / f"round-{number}-{digest(components)}"

        def run() -> Round:
            deployment = self._deployment(serving)
            payloads = self._payloads(serving, deployment)
            return measure_in_round(
                self._generator,
                deployment,
                payloads,
                self._capacities[candidate_id],
                self._loads,
                level=self._plan.level,
                number=number,
                position=position,
                seed=self._plan.config.seed,
                raw_root=self._plan.work,
                folder=folder,
                expected=_expected(payloads, serving),
                again=slot.again,
                gpus=self._gpus,
                package=self._package,
            )

        name = f"round {number + 1}{AGAIN if slot.again else ''}"
        made, known = self._workspace.remember("Round", f"{name} of {serving.candidate.name}", components, run)
        self._rounds.append(made)
        invalid = sum(not run.valid for run in made.runs)
        return name + (f", {invalid} invalid runs" if invalid else "") + _reused(known)

    def measured(self) -> Measured:
        """What has been found."""
        short = self._few_rounds() if self._cut else False
        return Measured(
            cut=self._cut,
            short=short,
            deployed=tuple(self._deployed.values()),
            capacities=tuple(self._capacities.values()),
            rounds=tuple(self._rounds),
            failures=tuple(self._failures.values()),
            fidelities=tuple(self._fidelities),
        )

    def _few_rounds(self) -> bool:
        """Whether candidates have fewer rounds than the level has; those with too few become failures."""
        few, level = False, self._plan.level
        for candidate_id, serving in self.servings.items():
            played = sum(one.candidate_id == candidate_id and not _is_again(one) for one in self._rounds)
            if candidate_id in self._failures or played >= level.rounds:
                continue
            few |= played >= _FEWEST_ROUNDS
            if played < _FEWEST_ROUNDS:
                name, reason = serving.candidate.name, f"after {played} of {level.rounds} rounds"
                reason = f"{self._budget.error.message} {reason}"
                self._failures[candidate_id] = Failure(subject=name, phase="measure", kind="budget", reason=reason)
        return few

    def _deployment(self, serving: Serving) -> Deployment:
        candidate_id = serving.candidate.id
        if candidate_id not in self._deployments:
            timeout_s = self._plan.config.limits.load_timeout_s
            deployment = self._cluster.deploy(serving.candidate, serving.artifact, serving.files, timeout_s=timeout_s)
            self._deployments[candidate_id] = deployment
            if candidate_id not in self._first_ms:
                first = encode_rows(adapt(self._inputs, serving.adaptation), [0], deployment.target)
                self._first_ms[candidate_id] = first_request_ms(deployment.target, first, timeout_s=timeout_s)
        return self._deployments[candidate_id]

    def _remembered_deployment(self, serving: Serving) -> Deployed:
        """What the first deployment showed; where the policy asks for the load time, that of some more after it.

        Each of them has a server of its own that never had the model, where the cluster gives it one: a model that is
        loaded once more into the same server finds the engine's library there, and is quicker.
        """
        candidate_id = serving.candidate.id

        def look() -> Deployed:
            first, again = self._deployment(serving), []
            for _ in range(loads - 1):
                self._undeploy(candidate_id)
                again.append(self._deployment(serving).load_time_s)
            return Deployed(
                candidate_id=candidate_id,
                load_time_s=first.load_time_s,
                rendered=first.rendered,
                first_request_ms=self._first_ms[candidate_id],
                reload_times_s=tuple(again),
            )

        policy = self._plan.policy
        named = [one.metric for one in policy.constraints] + [one.metric for one in policy.objectives]
        asked = "load_time_s" in named
        loads = self._plan.level.loads if asked else 1
        components: dict[str, Any] = {
            "candidate": candidate_id,
            "host": self._plan.host.fingerprint,
            # What the time is of; once it was of the server's start, too.
            "load_time": "of the model",
        }
        if loads > 1:
            components["loads"] = loads
        return self._workspace.remember("Deployed", serving.candidate.name, components, look)[0]

    def _payloads(self, serving: Serving, deployment: Deployment) -> tuple[Payload, ...]:
        inputs = adapt(self._inputs, serving.adaptation)
        return encode_payloads(inputs, target=deployment.target, seed=self._plan.config.seed)

    def _undeploy(self, candidate_id: str) -> None:
        deployment = self._deployments.pop(candidate_id, None)
        if deployment is None:
            return
        try:
            deployment.undeploy()
        except UnreachableError as error:
            # No reason to end the campaign: closing the cluster tries again, and says what stays.
            self._workspace.observer.note(f"{deployment.target.model} is not taken away yet: {error.message}")


def loads_of(policy: Policy) -> tuple[str, ...]:
    """The loads that every candidate is measured at in each round, beside the closed loop."""
    return loads_named(policy) or (DEFAULT_LOAD,)


def _meters(workspace: Workspace) -> tuple[GpuProbe | None, PackageEnergy | None]:
    """What reads the GPUs and the energy of the machine that serves, where that is this one."""
    if workspace.plan.config.cluster.kind != "local":
        return None, None
    gpus = NvmlProbe.open()
    if gpus is None and workspace.plan.host.gpus:
        workspace.observer.note(
            "This machine has a GPU, but NVML does not answer: its memory, utilisation and energy are not measured "
            "(the extra `gpu` brings the library)."
        )
    return gpus, PackageEnergy()


def _latency_limit(policy: Policy) -> LatencyLimit | None:
    """The limit that the highest rate is looked for under; None where the policy does not ask for it."""
    asked = slo_limit(policy)
    if asked is None:
        return None
    percentile = int(asked.metric.removeprefix("latency_p").removesuffix("_ms"))
    return LatencyLimit(percentile=percentile, latency_ms=asked.limit)


def _is_again(one: Round) -> bool:
    return any(run.load.name.endswith(AGAIN) for run in one.runs)


def _slot_s(capacity: Capacity, loads: Sequence[str], level: Level) -> float:
    """How long the windows of one slot of a round take, as far as that is known before."""
    names = (CLOSED, *(name for name in loads if name != CLOSED))
    windows = (window_profile(name, capacity, level, seed=0) for name in names)
    return sum(window.warmup_s + window.duration_s for window in windows if window is not None)


def _expected(payloads: Sequence[Payload], serving: Serving) -> Expected | None:
    """What replies are checked against under load, or None where that cannot be foretold."""
    return None if serving.answers is None else expected_answers(payloads, serving.answers)


def _reused(known: bool) -> str:
    return " (known)" if known else ""
