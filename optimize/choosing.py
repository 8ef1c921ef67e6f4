"""Another verdict over results that a campaign recorded: nothing is measured again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from optimize import reporting
from optimize.config import PolicyConfig
from optimize.rendering import find_candidate
from registry.codec import to_jsonable
from registry.documents import load_document
from registry.errors import InputError
from registry.ledger import Ledger
from registry.policy import loads_named, parse_policy
from registry.records import Campaign, Candidate, Champion, Policy
from registry.report import numbers
from registry.report.table import outcome, printable
from registry.selection import metric_table, select


class PolicyFile(BaseModel):
    """A file with the section ``policy:``, of which nothing else is read; a campaign file is one."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    policy: PolicyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A campaign with the verdict that it recorded, and with another one."""

    recorded: Campaign
    chosen: Campaign

    @property
    def changes(self) -> tuple[tuple[Candidate, str, str], ...]:
        """Each candidate of which something else becomes now: what became of it before, and what does now."""
        both = (
            (candidate, outcome(self.recorded, candidate)[0], outcome(self.chosen, candidate)[0])
            for candidate in self.recorded.candidates
        )
        return tuple(one for one in both if one[1] != one[2])


def policy_for(
    recorded: Policy,
    *,
    file: Path | None = None,
    constraints: Sequence[str] = (),
    objectives: Sequence[str] = (),
    signature: str | None = None,
) -> Policy:
    """The policy of a file, or the recorded one with other constraints, objectives or word on signatures.

    Raises:
        InputError: a file goes with other words, or there is no such word on signatures.
        DocumentError: the file is missing, malformed or does not fit.
        PolicyError: a line is not understood.
    """
    if signature not in {None, "same", "may_change"}:
        raise InputError(f"there is no signature {signature!r}", hint="It is same or may_change.")
    if file is None:
        allowed: Literal["same", "may_change"] = "may_change" if signature == "may_change" else "same"
        return parse_policy(
            list(constraints) or [one.text for one in recorded.constraints],
            list(objectives) or [one.text for one in recorded.objectives],
            signature=recorded.signature if signature is None else allowed,
        )
    if constraints or objectives or signature:
        raise InputError(
            "--policy says the whole policy, and goes with no --constraint, --objective or --signature",
            hint="Write them into the file, or leave it out.",
        )
    given = load_document(file, PolicyFile).policy
    return parse_policy(given.constraints, given.objectives, signature=given.signature)


def choose_again(campaign: Campaign, policy: Policy, *, champion: str | None = None) -> Choice:
    """The verdict of another policy over a campaign's recorded results.

    Args:
        campaign: as it was recorded.
        policy: what to judge by.
        champion: name or id of the candidate that limits with ``vs champion`` refer to; None for the one that the
            campaign measured as its champion, if it did.

    Raises:
        InputError: there is no such candidate.
    """
    measured = campaign.champion
    champion_id = None if measured is None else measured.candidate_id
    if champion is not None and (named := find_candidate(campaign, champion).id) != champion_id:
        # Nothing was compared with this one in the report's own tables.
        champion_id, measured = named, Champion(named="burnish select", candidate_id=named, was=champion)
    table = metric_table(campaign.candidates, campaign.measurements, campaign.fidelities, campaign.variants)
    verdict = select(
        policy=policy,
        candidates=campaign.candidates,
        variants=campaign.variants,
        metrics=table,
        comparisons=[*campaign.comparisons, *(() if measured is None else measured.comparisons)],
        failures=campaign.failures,
        baseline_id=campaign.verdict.baseline,
        provisional=campaign.verdict.provisional,
        champion_id=champion_id,
    )
    return Choice(recorded=campaign, chosen=replace(campaign, verdict=verdict, champion=measured))


def record(choice: Choice, work: Path) -> Path:
    """Puts the new verdict into the working folder's record and page, and returns the page.

    Raises:
        InputError: another burnish works in this folder.
        StorageError: it cannot be written.
    """
    with Ledger.open(work / "ledger.jsonl"):
        reporting.write_campaign(choice.chosen, work)
        return reporting.write_report(choice.chosen, work)


def summary(choice: Choice) -> dict[str, Any]:
    """What a script wants to know: both verdicts, and what differs."""
    names = {candidate.id: candidate.name for candidate in choice.recorded.candidates}
    before, now = choice.recorded.verdict.selected, choice.chosen.verdict.selected
    return {
        "campaign_id": choice.recorded.id,
        "selected": names.get(now) if now else None,
        "recorded": names.get(before) if before else None,
        "sentence": choice.chosen.verdict.sentence,
        "changes": [
            {"candidate": candidate.name, "before": before, "now": now, "reason": outcome(choice.chosen, candidate)[1]}
            for candidate, before, now in choice.changes
        ],
        "verdict": to_jsonable(choice.chosen.verdict),
    }


def lines(choice: Choice, *, replaced: bool = False) -> list[str]:
    """The verdict for people: what becomes of each candidate and why, and what became of it before.

    Args:
        choice: both verdicts.
        replaced: whether the new one was recorded in place of the other.
    """
    verdict = choice.chosen.verdict
    before = {candidate.id: was for candidate, was, _ in choice.changes}
    told = [verdict.sentence]
    told += [f"  {limit.text}" for limit in verdict.policy.constraints]
    told += [f"  {objective.text}" for objective in verdict.policy.objectives]
    for candidate in choice.recorded.candidates:
        word, reason = outcome(choice.chosen, candidate)
        was = f" (was {before[candidate.id]})" if candidate.id in before else ""
        front = " on the Pareto front" if candidate.id in verdict.pareto else ""
        told.append(f"{word:<9} {candidate.name}{was}{front}{f': {reason}' if reason else ''}")
    told += [
        f"closest   {miss.constraint.text}: {miss.candidate_name}, {numbers.text(miss.observed)}; {miss.relaxation}"
        for miss in verdict.closest
    ]
    told += _not_known(choice)
    same = choice.recorded.verdict.selected == verdict.selected
    recorded = f"Recorded {'was' if replaced else 'is'}: {choice.recorded.verdict.sentence}"
    told.append("The recorded choice stays." if same else recorded)
    return [printable(line) for line in told]


def _not_known(choice: Choice) -> list[str]:
    """What the recorded results cannot say of this policy, which a run with it could."""
    measured = {one.load for one in choice.recorded.measurements if one.load is not None}
    known = ", ".join(sorted(measured)) or "no load"
    loads = loads_named(choice.chosen.verdict.policy)
    told = [f"note      nothing was measured at {load}, only at: {known}" for load in loads if load not in measured]
    unserved = [one.subject for one in choice.recorded.failures if one.kind == "screened_out"]
    if unserved:
        told.append(f"note      not served, so that nothing can be said of them: {', '.join(unserved)}")
    return told
