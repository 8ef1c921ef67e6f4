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
    beside: Annotated[
        str | None, typer.Option(help="Render an Experiment that shares this Model's requests with the candidate.")
    ] = None,
    weight: Annotated[int | None, typer.Option(help="--beside: percent that the candidate answers; 10.")] = None,
    mirror: Annotated[int | None, typer.Option(help="--beside: percent that it gets copies of, instead.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="Render a Pipeline: NAME=STEP,{model},STEP, of Models in a row.")
    ] = None,
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", help="A YAML file that names a Kubernetes: ask what applying would do.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write the files that serve a candidate: its folder as Core 2 fetches it, and the manifests.

    Example: burnish render --storage-uri s3://models/digits --with-server registry/burnish-serve:1 --out deploy
    """
    from optimize.rendering import MANIFESTS, lines, render_candidate, rendering
    from optimize.rendering_dry_run import dry_run as try_applying
    from optimize.uploading import upload_rendering, where_fetched
    from registry.errors import InputError

    if upload is not None:
        storage_uri = where_fetched(upload, storage_uri, target=target)
    if dry_run is not None and target != "core2":
        raise InputError("--dry-run is of manifests", hint="Leave it out, or render with --target core2.")
    asked = rendering(
        target=target, core2_version=core2_version, storage_uri=storage_uri, server=server, image=with_server,
        hardware=hardware, server_config=server_config, replicas=replicas, for_rate=for_rate,
        max_replicas=max_replicas, margin=margin, secret=secret, self_contained=self_contained,
        environment=environment, beside=beside, weight=weight, mirror=mirror, pipeline=pipeline,
    )  # fmt: skip
    with terminable():
        told = render_candidate(work, candidate, out, asked)
        if upload is not None:
            told |= upload_rendering(told, upload, storage_uri)
        tried = None if dry_run is None else try_applying(out / MANIFESTS, dry_run)
    for warning in told["warnings"]:
        say(f"warning: {warning}")
    if json_output:
        emit_json(told | ({} if tried is None else {"dry_run": tried.plain()}))
    else:
        typer.echo("\n".join([*lines(told), *(() if tried is None else tried.lines())]))
