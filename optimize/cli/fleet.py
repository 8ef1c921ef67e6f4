"""``burnish run --fleet`` and what ``burnish report`` shows of a fleet."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from optimize.cli.endings import terminable
from optimize.cli.output import emit_json, progress, say


def run_fleet_file(file: Path, work: Path | None, level: str | None, json_output: bool) -> None:
    """Runs the fleet of a file, shows its report, and exits with the code of its outcome."""
    from optimize.fleet import reporting
    from optimize.fleet.config import default_work, plan_fleet
    from optimize.fleet.outcomes import exit_code_of
    from optimize.fleet.running import run_fleet

    fleet = plan_fleet(file, work=work or default_work(file), level=level)
    _check_store()
    say(f"{fleet.config.name}: {len(fleet.entries)} models, {fleet.config.parallel} at a time, in {fleet.work}")
    with progress() as observer, terminable():
        found = run_fleet(fleet, observer=observer)
    page = fleet.work / reporting.PAGE
    if json_output:
        emit_json(reporting.summary(found, page))
    else:
        reporting.show(found, page)
    if code := exit_code_of(found):
        raise typer.Exit(code)


def _check_store() -> None:
    """Returns where there is no store that machines share, or it can be written: else every campaign would say so."""
    from registry.shared_store import VARIABLE, open_store

    if os.environ.get(VARIABLE):
        with TemporaryDirectory(prefix="burnish-fleet-") as folder:
            open_store(Path(folder))


def report_fleet(work: Path, *, markdown: bool, json_output: bool) -> None:
    """Shows the report of the fleet that worked in a folder, and writes its page anew."""
    from optimize.fleet import reporting
    from optimize.fleet.journal import read_fleet

    fleet = read_fleet(work)
    page = reporting.write_page(fleet, work)
    if json_output:
        emit_json(reporting.summary(fleet, page))
    elif markdown:
        typer.echo(reporting.as_markdown(fleet))
    else:
        reporting.show(fleet, page)
