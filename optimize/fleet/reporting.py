"""Where the outcome of a fleet goes: its working folder, the terminal, a script."""

from pathlib import Path
from typing import Any

from optimize.fleet.outcomes import exit_code_of
from registry.codec import to_jsonable
from registry.ledger import write_durably
from registry.records import Fleet
from registry.report.fleet import FleetRow, fleet_rows, fleet_sentence

PAGE = "fleet.html"


def write_page(fleet: Fleet, work: Path) -> Path:
    """Writes the page into the fleet's working folder, whole or not at all.

    Raises:
        StorageError: it could not be written.
    """
    from registry.report.fleet_html import render_fleet_html

    page = work / PAGE
    write_durably(page, render_fleet_html(fleet))
    return page


def as_markdown(fleet: Fleet) -> str:
    """The report as Markdown."""
    from registry.report.fleet_markdown import render_fleet_markdown

    return render_fleet_markdown(fleet)


def show(fleet: Fleet, page: Path) -> None:
    """Prints the report in the terminal, and where the page is."""
    from rich.console import Console

    from registry.report.fleet_terminal import render_fleet_terminal

    console = Console()
    render_fleet_terminal(fleet, console)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def summary(fleet: Fleet, page: Path) -> dict[str, Any]:
    """What a script wants to know of a fleet: its models in the order of the report, and where everything is."""
    return {
        "fleet": fleet.name,
        "sentence": fleet_sentence(fleet),
        "exit_code": exit_code_of(fleet),
        "report": str(page),
        "models": [_row(row, page.parent) for row in fleet_rows(fleet)],
    }


def _row(row: FleetRow, work: Path) -> dict[str, Any]:
    outcome = row.outcome
    return {
        "rank": row.rank,
        "name": row.model.name,
        "group": row.model.group or None,
        "state": row.state,
        "kind": outcome.kind or None if outcome else None,
        "reason": row.reason or None,
        "minutes": round(row.minutes, 3),
        "cut": outcome.cut if outcome else False,
        "provisional": outcome.provisional if outcome else None,
        "level": outcome.level or None if outcome else None,
        "host": outcome.host or None if outcome else None,
        "campaign_id": outcome.campaign_id or None if outcome else None,
        "sentence": outcome.sentence or None if outcome else None,
        "gain": to_jsonable(row.gain) if row.gain else None,
        "misses": list(outcome.misses) if outcome else [],
        "work": str(work / row.model.work),
        "report": str(work / row.link) if outcome and outcome.campaign_id else None,
        "log": str(work / row.link) if outcome and not outcome.campaign_id else None,
    }
