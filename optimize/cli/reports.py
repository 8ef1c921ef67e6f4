"""``burnish report``: a campaign's report once more, and its results sent to MLflow."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.fleet import report_fleet
from optimize.cli.output import Json, TrustConfigOption, emit_json


def report(
    work: Annotated[Path, typer.Argument(help="Working folder of a campaign or fleet.")] = Path("burnish-work"),
    sync: Annotated[bool, typer.Option("--sync", help="Send the results to MLflow again.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of the table.")] = False,
    passport: Annotated[str | None, typer.Option(help="Issue the signed passport of this variant instead.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file to sign it with; else BURNISH_SIGNING_KEY.")] = None,
    keyless: Annotated[
        bool, typer.Option("--keyless", help="Sign it by an identity, with Sigstore, instead of a key.")
    ] = False,
    trust_config: TrustConfigOption = None,
    licence: Annotated[str, typer.Option(help="The model's licence, as you state it in the passport.")] = "",
    json_output: Json = False,
) -> None:
    """Show the report of the last campaign in a working folder, and write report.html anew.

    With --passport, write a signed statement of what a variant is and how it was judged.

    Example: burnish report burnish-work --sync
    """
    from optimize import reporting
    from optimize.fleet import is_fleet
    from registry.codec import to_jsonable
    from registry.errors import InputError

    if is_fleet(work):
        if sync or passport is not None:
            raise InputError(
                f"{work} is a fleet's", hint="Name the working folder of one of its models, under models/."
            )
        report_fleet(work, markdown=markdown, json_output=json_output)
        return
    if passport is None and (key or keyless or trust_config or licence):
        raise InputError(
            "--key, --keyless, --trust-config and --licence are for a passport",
            hint="Name its variant with --passport.",
        )
    campaign = reporting.read_campaign(work)
    if passport is not None:
        from optimize.passports import issue_passport

        issued = issue_passport(
            campaign, passport, work, key=key, keyless=keyless, trust_config=trust_config, licence=licence
        )
        emit_json({"passport": str(issued)}) if json_output else typer.echo(f"Passport: {issued}")
        return
    path = reporting.write_report(campaign, work)
    published = reporting.publish(campaign, work) if sync else None
    if json_output:
        emit_json(reporting.summary(campaign, path, published) | {"campaign": to_jsonable(campaign)})
    elif markdown:
        typer.echo(reporting.as_markdown(campaign))
    else:
        reporting.show(campaign, path, published)
