"""What became of an attempt at a model, from its campaign's exit code, words and record."""

import signal
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from optimize.fleet.journal import BUDGET, beside_of
from optimize.fleet.process import last_words, read_said
from optimize.plan import Plan
from optimize.reporting import read_campaign
from registry.errors import BurnishError, InputError, NoVariantError, UnreachableError
from registry.records import Campaign, Fleet, FleetOutcome
from registry.report import numbers
from registry.report.fleet_gains import gain_of
from registry.tracking import hide_secrets

KILLED = "killed"
_DONE = 0
_BUG = 1


def outcome_of(
    planned: Plan, *, name: str, code: int, ended: str, attempt: int, minutes: float, allotted: float | None
) -> FleetOutcome:
    """What became of an attempt.

    Args:
        planned: the campaign.
        name: of the model.
        code: exit code of its process; negative where a signal ended it.
        ended: why the fleet ended it: ``budget``, ``stopped``, or empty where it ended itself.
        attempt: counts from 1.
        minutes: that it took.
        allotted: minutes that it might take; None for any.
    """
    about: dict[str, Any] = {
        "model": name,
        "attempt": attempt,
        "exit_code": code,
        "minutes": minutes,
        "allotted": allotted,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    said = read_said(planned.work)
    if code in {_DONE, NoVariantError.exit_code} and said and "error" not in said:
        try:
            return FleetOutcome(**about, **_of_verdict(read_campaign(planned.work), planned))
        except BurnishError as error:
            return FleetOutcome(**about, state="failed", kind=error.kind, reason=error.message)
    if ended == BUDGET:
        reason = f"it was ended without a verdict, long after its {numbers.plain(allotted or 0)} minutes were used up"
        return FleetOutcome(**about, state="failed", kind=BUDGET, reason=reason)
    if ended:
        return FleetOutcome(**about, state="stopped", reason="the fleet was ended while it was under way")
    kind, reason = _of_failure(code, said, last_words(planned.work))
    # The words of a library's error may quote what it was called with.
    return FleetOutcome(**about, state="failed", kind=kind, reason=hide_secrets(reason))


def _of_verdict(campaign: Campaign, planned: Plan) -> dict[str, Any]:
    verdict = campaign.verdict
    won = verdict.selected is not None
    return {
        "state": "won" if won else "no_winner",
        "reason": "" if won else verdict.sentence,
        "cut": bool(verdict.cut_short),
        "campaign_id": campaign.id,
        "level": campaign.level,
        "provisional": verdict.provisional,
        "host": campaign.host.fingerprint,
        "cpu_model": campaign.host.cpu_model,
        "sentence": verdict.sentence,
        "gain": gain_of(campaign),
        "misses": tuple(
            f"{miss.constraint.text}: {miss.candidate_name} has {numbers.text(miss.observed)}; {miss.relaxation}"
            for miss in verdict.closest
        ),
        "beside": beside_of(planned),
    }


def _of_failure(code: int, said: Mapping[str, Any], last: str) -> tuple[str, str]:
    """The kind of a failure, and its reason."""
    error = said.get("error")
    if isinstance(error, dict):
        hint = f". {error['hint']}" if error.get("hint") else ""
        return str(error["kind"]), f"{error['message']}{hint}"
    tail = f"; its log ends: {last}" if last else ""
    if code < 0:
        return KILLED, f"its process was ended by {signal.Signals(-code).name}{tail}"
    return "bug", f"its process ended with code {code} and no word{tail}"


def exit_code_of(fleet: Fleet) -> int:
    """How ``burnish run --fleet`` ends.

    4 where a model could not reach something, or its process was ended: the same command may get further. Else 1 where
    burnish failed at one, 2 where one's input is wrong, 3 where one has no winner (yet), and 0 where all have.
    """
    codes = {one.exit_code if one.state == "failed" else _DONE for one in fleet.outcomes}
    if UnreachableError.exit_code in codes or any(one.kind == KILLED for one in fleet.outcomes):
        return UnreachableError.exit_code
    for code in (_BUG, InputError.exit_code):
        if code in codes:
            return code
    won = {one.model for one in fleet.outcomes if one.state == "won"}
    return _DONE if all(model.name in won for model in fleet.models) else NoVariantError.exit_code
