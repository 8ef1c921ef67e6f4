"""``burnish explain``: why a variant is faster or slower."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.endings import terminable
from optimize.cli.output import Json, emit_json


def explain(
    variant: Annotated[str, typer.Argument(help="Name or id of a variant or candidate, or with --against a model.")],
    work: Annotated[Path, typer.Option(help="The campaign's working folder.")] = Path("burnish-work"),
    against: Annotated[Path | None, typer.Option(help="Another model file, to compare with instead.")] = None,
    samples: Annotated[Path | None, typer.Option(help="What to run, an .npz; else the campaign's samples.")] = None,
    campaign: Annotated[Path | None, typer.Option(help="Else campaign.yaml beside the working folder.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Else the largest that was served, or 1.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a session; else as many as were served, or 1.")] = None,
    json_output: Json = False,
) -> None:
    """Say why a variant is faster or slower, from the graph that its engine really runs and a profile of it.

    Example: burnish explain int8-static --work burnish-work
    """
    from optimize.explain import explain_campaign, explain_files
    from registry.codec import to_jsonable
    from registry.errors import InputError

    if against is not None and samples is None:
        raise InputError("--against needs --samples", hint="Name an .npz with one array per input of both models.")
    with terminable():
        if against is not None and samples is not None:
            told = explain_files(Path(variant), against, samples=samples, batch_size=batch_size, threads=threads)
        else:
            told = explain_campaign(
                work, variant, samples=samples, campaign_file=campaign, batch_size=batch_size, threads=threads
            )
    if json_output:
        emit_json({"explanations": [to_jsonable(one) for one in told]})
        return
    from optimize.explain import as_lines

    for one in told:
        typer.echo("\n".join(as_lines(one)))
