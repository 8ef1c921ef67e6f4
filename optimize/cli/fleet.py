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
    _check_surroundings()
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


def _check_surroundings() -> None:
    """Returns where the campaigns will find their store and their engine: else every one of them would say so.

    Raises:
        InputError: the environment names what is none, or an engine without the store that it needs.
        UnreachableError: the store cannot be written, or nothing listens at the cluster's address.
    """
    from optimize.engines.choosing import ADDRESS, choose_engine, engine_named
    from registry.shared_store import open_store

    with TemporaryDirectory(prefix="burnish-fleet-") as folder:
        choose_engine(open_store(Path(folder)), scratch=Path(folder))
    if engine_named() == "ray":
        from optimize.engines.ray_engine import check_address

        check_address(os.environ.get(ADDRESS) or None)


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
