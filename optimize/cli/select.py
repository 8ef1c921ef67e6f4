"""``burnish select``: another verdict over recorded results."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.output import Json, emit_json, say


def select(
    work: Annotated[Path, typer.Argument(help="The campaign's working folder.")] = Path("burnish-work"),
    policy: Annotated[Path | None, typer.Option(help="A YAML file with a section `policy:`.")] = None,
    constraint: Annotated[list[str] | None, typer.Option(help="Instead of the recorded ones; once each.")] = None,
    objective: Annotated[list[str] | None, typer.Option(help="Instead of the recorded ones; in their order.")] = None,
    signature: Annotated[str | None, typer.Option(help="same or may_change.")] = None,
    champion: Annotated[str | None, typer.Option(help="The candidate that `vs champion` refers to.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Make it the recorded verdict.")] = False,
    json_output: Json = False,
) -> None:
    """Choose again among a campaign's results, by another policy; nothing is measured anew.

    Exit code 3 where no candidate meets the policy. The recorded verdict stays, unless --record is given.

    Example: burnish select burnish-work --constraint "latency_p90_ms <= 20" --objective "minimize rss_mb"
    """
    from optimize import choosing
    from optimize.reporting import read_campaign
    from registry.errors import NoVariantError

    campaign = read_campaign(work)
    wanted = choosing.policy_for(
        campaign.verdict.policy,
        file=policy,
        constraints=constraint or (),
        objectives=objective or (),
        signature=signature,
    )
    choice = choosing.choose_again(campaign, wanted, champion=champion)
    page = choosing.record(choice, work) if record else None
    if json_output:
        emit_json(choosing.summary(choice) | {"report": None if page is None else str(page)})
    else:
        typer.echo("\n".join(choosing.lines(choice, replaced=record)))
        if page is not None:
            say(f"Recorded; report: {page}. `burnish report {work} --sync` sends it to MLflow.")
    if choice.chosen.verdict.selected is None:
        # The lines say it all; the exit code is for scripts.
        raise typer.Exit(NoVariantError.exit_code)
