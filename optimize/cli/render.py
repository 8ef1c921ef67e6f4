"""``burnish render``: the files that serve a candidate, for Seldon Core 2 or a plain server."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.endings import terminable
from optimize.cli.output import Json, emit_json, say


def render(
    candidate: Annotated[str | None, typer.Argument(help="Name or id; the campaign's choice if not given.")] = None,
    work: Annotated[Path, typer.Option(help="The campaign's working folder.")] = Path("burnish-work"),
    target: Annotated[str, typer.Option(help="core2, or files: a repository of MLServer or Triton.")] = "core2",
    out: Annotated[Path, typer.Option(help="A folder for it: new, or rendered before.")] = Path("rendered"),
    core2_version: Annotated[str, typer.Option(help="2.6 or 2.10.")] = "2.10",
    storage_uri: Annotated[str | None, typer.Option(help="Where Core 2 fetches from: NAME://bucket/path, say.")] = None,
    upload: Annotated[str | None, typer.Option(help="Upload it: to a folder, s3://bucket/path, gs://...")] = None,
    server: Annotated[str | None, typer.Option(help="An existing Server to schedule the model to.")] = None,
    with_server: Annotated[str | None, typer.Option(help="Render a Server of its own, with this image.")] = None,
    hardware: Annotated[Path | None, typer.Option(help="YAML: CPUs, GPUs and nodes of that Server.")] = None,
    server_config: Annotated[Path | None, typer.Option(help="The cluster's ServerConfig as JSON, to adapt.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Of the model; 1 if not given.")] = None,
    for_rate: Annotated[float | None, typer.Option(help="As many replicas as so many requests a second need.")] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Render an autoscaler up to so many.")] = None,
    margin: Annotated[float, typer.Option(help="How far below saturation replicas run: 0.1 to 0.2.")] = 0.15,
    secret: Annotated[str | None, typer.Option(help="The Kubernetes secret with the rclone remote.")] = None,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Put burnish's code beside the model, for a server without it.")
    ] = False,
    environment: Annotated[
        str | None, typer.Option(help="Beside it, the engine: a tarball of yours, or pack, to make one.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write the files that serve a candidate: its folder as Core 2 fetches it, and the manifests.

    Example: burnish render --storage-uri s3://models/digits --with-server registry/burnish-serve:1 --out deploy
    """
    from optimize.rendering import lines, render_candidate, rendering
    from optimize.uploading import upload_rendering, where_fetched

    if upload is not None:
        storage_uri = where_fetched(upload, storage_uri, target=target)
    asked = rendering(
        target=target, core2_version=core2_version, storage_uri=storage_uri, server=server, image=with_server,
        hardware=hardware, server_config=server_config, replicas=replicas, for_rate=for_rate,
        max_replicas=max_replicas, margin=margin, secret=secret, self_contained=self_contained,
        environment=environment,
    )  # fmt: skip
    with terminable():
        told = render_candidate(work, candidate, out, asked)
        if upload is not None:
            told |= upload_rendering(told, upload, storage_uri)
    for warning in told["warnings"]:
        say(f"warning: {warning}")
    if json_output:
        emit_json(told)
    else:
        typer.echo("\n".join(lines(told)))
