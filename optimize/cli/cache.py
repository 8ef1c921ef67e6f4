"""``burnish cache``: what is reused from earlier runs."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.output import Json, emit_json

app = typer.Typer(help="What is reused from earlier runs.", rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def cache() -> None:
    """Ask what is reused from earlier runs.

    Example: burnish cache why int8-static
    """


@app.command()
def why(
    variant: Annotated[str, typer.Argument(help="Name or id of a variant.")],
    work: Annotated[Path, typer.Option(help="The campaign's working folder.")] = Path("burnish-work"),
    campaign: Annotated[Path | None, typer.Option(help="Else campaign.yaml beside the working folder.")] = None,
    level: Annotated[str | None, typer.Option(help="Level of proof, instead of the file's.")] = None,
    json_output: Json = False,
) -> None:
    """Say which results of a variant the next run would reuse, and what differs where it would not.

    Example: burnish cache why int8-static --work burnish-work
    """
    from dataclasses import asdict

    from optimize.config import load_campaign
    from optimize.reuse import reuse_of

    file = campaign or work.resolve().parent / "campaign.yaml"
    config = load_campaign(file)
    if level is not None:
        config = config.model_copy(update={"level": level})
    findings = reuse_of(config, base=file.parent, work=work, wanted=variant)
    if json_output:
        emit_json({"variant": variant, "results": [asdict(one) for one in findings]})
        return
    for one in findings:
        told = "would be reused" if one.reused else f"would be made again: {one.reason}"
        typer.echo(f"{one.kind:<10} {one.subject}: {told}")
