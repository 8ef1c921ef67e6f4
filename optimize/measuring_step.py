"""Judging, serving and measuring on one node of a cluster: the step that runs there, and what this machine does of it.

The node judges, serves and measures as this machine would, so that all rounds of a campaign are of one machine, whose
fingerprint the numbers carry. Each result goes into the shared store before the next piece of work begins; a step whose
worker or node dies is begun again, and takes up what it finds there of its host. In the end all results are in the
working folder of the machine that asked, as if they had been found there.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from optimize.budget import UNLIMITED, Budget
from optimize.champion import share_champion
from optimize.config import CampaignConfig, SamplesConfig
from optimize.engines.local import ChildFailure
from optimize.engines.port import Outcome, Place, Task
from optimize.finding import Findings, Made, find, versions
from optimize.mirror import StoreMirror
from optimize.plan import Observer, Plan, Standing, Workspace, check_meters
from optimize.recipes import openvino_engines
from optimize.samples import load_samples, open_samples
from profiles.measure.host import fingerprint_host, split_cpus
from profiles.measure.levels import Level
from registry import codec
from registry.errors import BudgetUsedUpError, BurnishError, InputError, StorageError, UnreachableError
from registry.ledger import Ledger, write_durably
from registry.records import Policy, Recipe, ServingProfile, Source, Variant
from registry.shared_store import SharedStore, share

NAME = "the measuring"
"""What its task is called."""
FOUND = "found.json"
"""File of the working folder: the findings of a node, and what they depend on."""
_FINAL = frozenset({"not_applicable", "screened_out"})
_TOLD_EVERY_S = 1.0
_SLOW_TO_BEGIN_S = 10.0


# --- on the machine that asks -----------------------------------------------------------------------------------------


def find_on_node(workspace: Workspace, made: Made, preparing: Budget) -> Findings:
    """What `optimize.finding.find` finds, on a node of the engine's; its results are in the working folder then.

    A node is asked for nothing that was asked before, unless something failed that may pass.

    Args:
        workspace: of the campaign.
        made: the variants.
        preparing: the part of the campaign's time for what comes before measuring.

    Raises:
        BurnishError: what the node raised.
        BudgetUsedUpError: no node was free before the campaign's time was used up.
        InputError: no node has what the campaign asks for.
        UnreachableError: the engine or the store was lost; what was measured is kept.
    """
    if not isinstance(workspace.store, SharedStore) or workspace.engine is None:
        raise InputError("measuring on another machine needs a store that both share")
    store, work = workspace.store, workspace.plan.work
    key = _key(workspace.plan, made)
    if (found := _known(work, key)) is not None:
        workspace.observer.note(f"Everything was found before, on the host {found.host.fingerprint}.")
        return found
    share_champion(workspace)
    for variant in made.variants:
        share(store, variant.artifact)  # one that was known before the store was shared is not there yet
    relay = _Relay(store, key, workspace.observer)
    task = _task(
        workspace.plan, made, key, budgets={"begin_by": workspace.budget.begin_by, "prepare_by": preparing.begin_by}
    )
    (outcome,) = workspace.engine().run([task], begun=relay.begun, meanwhile=relay.forward)
    if isinstance(outcome.error, BudgetUsedUpError):
        raise workspace.budget.error from outcome.error  # no node was free in time
    told = _result(outcome)
    relay.end(told["run"], told["events"])
    mirror = StoreMirror(store, work, workspace.plan.config.name)
    for entry in told["entries"]:
        _receive(workspace, mirror, **entry)
    found = codec.from_jsonable(Findings, told["findings"])
    workspace.observer.note(f"Measured on {outcome.node}, on the CPUs {', '.join(map(str, outcome.cpus))} alone.")
    write_durably(work / FOUND, json.dumps({"key": key, "findings": told["findings"]}))
    return found


def was_found(work: Path) -> bool:
    """Whether a working folder holds findings of a node, be they those that are asked for now or not."""
    return (work / FOUND).is_file()


def _known(work: Path, key: str) -> Findings | None:
    """The findings of this key, where all was found, nothing failed that may pass, and all that they need is here."""
    try:
        content = json.loads((work / FOUND).read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        found = codec.from_jsonable(Findings, content["findings"])
    except (OSError, ValueError, TypeError, KeyError, InputError):
        return None
    if found.measured.cut or any(failure.kind not in _FINAL for failure in found.failures):
        return None
    raw = (work / run.raw for one in found.measured.rounds for run in one.runs)
    return found if all(path.is_file() for path in raw) else None


def _key(plan: Plan, made: Made) -> str:
    """Of all that the findings depend on, beside the host."""
    return codec.digest(
        {
            **_request(plan, made, key=""),
            "champion": None if plan.champion is None else plan.champion.candidate.id,
            "samples": made.evaluation.digest,
            "versions": versions(),
        }
    )


def _task(plan: Plan, made: Made, key: str, *, budgets: Mapping[str, float | None]) -> Task:
    samples = plan.config.samples
    given = {"evaluation": samples.evaluation, "calibration": samples.calibration}
    return Task(
        name=NAME,
        step="optimize.measuring_step:measure_in_place",
        arguments={"request": _request(plan, made, key=key), **budgets},
        files={name: plan.path(path) for name, path in given.items() if path is not None},
        resources=plan.config.resources.needed(),
    )


def _request(plan: Plan, made: Made, *, key: str) -> dict[str, Any]:
    return {
        "key": key,
        "config": plan.config.model_dump(mode="json", exclude={"registry"}),
        "policy": codec.to_jsonable(plan.policy),
        "level": asdict(plan.level),
        "recipes": [codec.to_jsonable(recipe) for recipe in plan.recipes],
        "profiles": [codec.to_jsonable(profile) for profile in plan.profiles],
        "champion": None if plan.champion is None else codec.to_jsonable(plan.champion),
        "sources": [codec.to_jsonable(source) for source in made.sources],
        "variants": [codec.to_jsonable(variant) for variant in made.variants],
    }


def _result(outcome: Outcome) -> dict[str, Any]:
    """What the step returned.

    Raises:
        BurnishError: what it raised.
        UnreachableError: its workers or nodes died.
    """
    if isinstance(outcome.error, ChildFailure) and not outcome.node:
        hint = "Run it again: what was measured is kept."
        raise UnreachableError(f"{outcome.error.message} ({outcome.error.log})", hint=hint) from outcome.error
    if outcome.error is not None:
        raise outcome.error
    return dict(outcome.result)


def _receive(
    workspace: Workspace, mirror: StoreMirror, *, kind: str, subject: str, components: Any, record: str
) -> None:
    """Takes a result of the node into the journal here, its files first."""
    found = codec.loads(record)
    if not mirror.fetch(kind, components, found):
        raise StorageError(f"the files of {subject} are not in the store any more", hint="Run it again.")
    if workspace.ledger.find(kind, components) is None:
        workspace.ledger.commit(kind, subject, components, found)


class _Relay:
    """Tells an observer here what the step tells on its node."""

    def __init__(self, store: SharedStore, key: str, observer: Observer) -> None:
        self._store, self._key, self._observer = store, key, observer
        self._asked = time.monotonic()
        self._node = ""
        self._run = ""
        self._told = 0

    def begun(self, task: Task, where: str) -> None:
        """The step begins on a node, or begins anew after a kill."""
        self._node = where or self._node
        self._observer.note(f"The measuring begins on {where}.")

    def forward(self) -> None:
        """Tells what is new; a store that does not answer has nothing new."""
        with suppress(BurnishError, ValueError):
            content = self._store.told(self._key)
            if content is not None:
                word = json.loads(content)
                self._forward(word["run"], word["events"])
        if not self._node and time.monotonic() - self._asked > _SLOW_TO_BEGIN_S:
            self._node = "?"
            self._observer.note("Waiting for a node that is free.")

    def end(self, run: str, events: list[list[Any]]) -> None:
        """Tells the rest of all events."""
        self._forward(run, events)
        with suppress(BurnishError):
            self._store.forget(self._key)

    def _forward(self, run: str, events: list[list[Any]]) -> None:
        if run != self._run:  # begun, or begun anew after a kill
            self._run, self._told = run, 0
        for name, *arguments in events[self._told :]:
            where = {"where": self._node} if name == "begun" else {}
            getattr(self._observer, name)(*arguments, **where)
        self._told = max(self._told, len(events))


# --- on the node ------------------------------------------------------------------------------------------------------


def measure_in_place(
    place: Place,
    *,
    request: Mapping[str, Any],
    evaluation: str,
    calibration: str | None = None,
    begin_by: float | None = None,
    prepare_by: float | None = None,
) -> dict[str, Any]:
    """The step: finds what there is to find of variants, on the cores that it has alone.

    Args:
        place: where it runs.
        request: what is to be found; see `find_on_node`.
        evaluation: the file of the samples that judge.
        calibration: the file of those that static quantization takes its ranges from, if there are any.
        begin_by: when the campaign's time is used up, in seconds since 1970; None for no end.
        prepare_by: when the part of it is that goes into what comes before measuring.

    Returns:
        ``findings``; ``entries``, the journal of all results; and ``events``, all that an observer was told in this
        ``run``.

    Raises:
        PolicyError: this machine cannot tell of what the policy names.
        BurnishError: the baseline itself cannot be judged or timed.
        StorageError: the store, or this machine's disk, cannot be written.
    """
    if not isinstance(place.store, SharedStore):
        raise InputError("measuring on another machine needs a store that both share")
    store, key = place.store, request["key"]
    work = place.scratch  # where servers of a killed step are looked for
    plan = _plan_here(request, work, evaluation=evaluation, calibration=calibration)
    check_meters(plan)
    made = Made(
        evaluation=load_samples(Path(evaluation)),
        calibration=None if calibration is None else open_samples(Path(calibration)),
        sources=tuple(codec.from_jsonable(Source, one) for one in request["sources"]),
        variants=tuple(_for_here(codec.from_jsonable(Variant, one), plan) for one in request["variants"]),
    )
    observer = _Told(store, key)
    with store.leased(f"measuring-{key}"), Ledger.open(work / "ledger.jsonl") as ledger:
        workspace = Workspace(
            plan=plan,
            store=store,
            ledger=ledger,
            observer=observer,
            budget=_budget(plan, begin_by),
            mirror=StoreMirror(store, work, plan.config.name),
        )
        found = find(workspace, made, _budget(plan, prepare_by, kept_for="measuring"))
        entries = [
            {
                "kind": entry.kind,
                "subject": entry.subject,
                "components": entry.components,
                "record": codec.dumps(entry.record),
            }
            for entry in ledger.entries()
        ]
    told = {"run": observer.run, "events": observer.events}
    return {"findings": codec.to_jsonable(_without_paths(found)), "entries": entries, **told}


def _plan_here(request: Mapping[str, Any], work: Path, *, evaluation: str, calibration: str | None) -> Plan:
    """The plan of the machine that asks, for this one."""
    server_cpus, client_cpus, pinning = split_cpus()
    host = fingerprint_host(pinning)
    config = CampaignConfig.model_validate(request["config"])
    samples = SamplesConfig(evaluation=evaluation, calibration=calibration)
    champion = request["champion"]
    standing = None if champion is None else codec.from_jsonable(Standing, champion)
    recipes = [codec.from_jsonable(Recipe, one) for one in request["recipes"]]
    return Plan(
        config=config.model_copy(update={"samples": samples}),
        base=work,
        work=work,
        policy=codec.from_jsonable(Policy, request["policy"]),
        level=codec.from_jsonable(Level, request["level"]),
        recipes=tuple(_engines_here(one, host.instruction_sets) for one in recipes),
        profiles=tuple(codec.from_jsonable(ServingProfile, one) for one in request["profiles"]),
        host=host,
        server_cpus=server_cpus,
        client_cpus=client_cpus,
        champion=standing,
    )


def _budget(plan: Plan, begin_by: float | None, kept_for: str = "") -> Budget:
    """The time until then, by this machine's clock."""
    if begin_by is None:
        return UNLIMITED
    deadline = time.monotonic() + begin_by - time.time()
    return Budget(minutes=plan.config.limits.minutes, deadline=deadline, kept_for=kept_for)


def _engines_here(recipe: Recipe, instruction_sets: tuple[str, ...]) -> Recipe:
    """A recipe with the engines that make a difference on this CPU, which may be another than where it was read."""
    if recipe.engines[0].name != "openvino":
        return recipe
    return replace(recipe, engines=openvino_engines(instruction_sets))


def _for_here(variant: Variant, plan: Plan) -> Variant:
    return replace(variant, recipe=_engines_here(variant.recipe, plan.host.instruction_sets))


def _without_paths(found: Findings) -> Findings:
    """The findings without the names of files that are on this machine alone."""
    contender = found.contender
    if contender is not None and contender.judged is not None:
        contender = replace(contender, judged=replace(contender.judged, answers={}))
    return replace(found, judged=tuple(replace(one, answers={}) for one in found.judged), contender=contender)


class _Told:
    """Implements `optimize.plan.Observer`: keeps what it is told, and leaves word of it in the store."""

    def __init__(self, store: SharedStore, key: str) -> None:
        self.events: list[list[Any]] = []
        self._store, self._key = store, key
        self.run = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self._said = 0.0

    def phase(self, name: str, total: int) -> None:
        """A phase begins."""
        self._keep("phase", name, total)

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        """A piece of work begins."""
        self._keep("begun", kind, subject)

    def ended(self, kind: str, subject: str) -> None:
        """A piece of work is over."""
        self._keep("ended", kind, subject)

    def done(self, subject: str, outcome: str) -> None:
        """One unit is done."""
        self._keep("done", subject, outcome)

    def note(self, text: str) -> None:
        """Something worth saying."""
        self._keep("note", text)

    def _keep(self, *event: Any) -> None:
        self.events.append(list(event))
        if event[0] != "begun" and time.monotonic() - self._said < _TOLD_EVERY_S:
            return
        with suppress(StorageError):  # all of it goes back with the result
            self._store.tell(self._key, json.dumps({"run": self.run, "events": self.events}).encode())
        self._said = time.monotonic()
