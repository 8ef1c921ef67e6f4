"""``burnish job``: campaigns as Jobs of a Kubernetes cluster."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimize.cli.output import Json, emit_json, say

if TYPE_CHECKING:
    from optimize.engines.kubernetes_jobs_client import JobsClient

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Run campaigns as Jobs of a Kubernetes cluster.")

File = Annotated[Path, typer.Argument(help="The job's file: image, campaigns, resources, secrets by name.")]
Name = Annotated[str, typer.Argument(help="The job's name.")]
Namespace = Annotated[str | None, typer.Option(help="The namespace; the context's if not given.")]
Context = Annotated[str | None, typer.Option(help="The kubeconfig's context; its current one if not given.")]
Kubeconfig = Annotated[Path | None, typer.Option(help="The kubeconfig, in place of the usual one.")]


@app.command("render")
def render(
    file: File,
    out: Annotated[Path | None, typer.Option(help="A file for the manifests; stdout if not given.")] = None,
    json_output: Json = False,
) -> None:
    """Write the manifests of a job: a ConfigMap with its campaigns, and a Job or RayJobs.

    Example: burnish job render job.yaml | kubectl apply -f -
    """
    from optimize.engines.kubernetes_job import as_yaml, render_file
    from registry.ledger import write_durably

    rendered = render_file(file)
    for warning in rendered.warnings:
        say(f"warning: {warning}")
    text = as_yaml(rendered.manifests)
    if out is not None:
        write_durably(out, text)
    if json_output:
        emit_json(
            {
                "manifests": list(rendered.manifests),
                "warnings": list(rendered.warnings),
                "written": None if out is None else str(out),
            }
        )
    elif out is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(f"Wrote {out}: {', '.join(_named(rendered.manifests))}.")


@app.command("submit")
def submit(
    file: File,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Let the cluster check it, and make nothing.")] = False,
    json_output: Json = False,
) -> None:
    """Send a job to the cluster. The same job twice is one.

    Example: burnish job submit job.yaml --namespace models
    """
    from optimize.engines.kubernetes_job import render_file

    rendered = render_file(file)
    for warning in rendered.warnings:
        say(f"warning: {warning}")
    with _client(namespace, context, kubeconfig) as client:
        sent = client.submit(rendered, dry_run=dry_run)
        where = client.namespace
    names = _named(rendered.manifests)
    if json_output:
        emit_json({"submitted": sent and not dry_run, "dry_run": dry_run, "namespace": where, "resources": names})
        return
    word = "Would send" if dry_run else "Sent" if sent else "Was there already:"
    typer.echo(f"{word} {', '.join(names)} in the namespace {where}.")


@app.command("status")
def status(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    json_output: Json = False,
) -> None:
    """Say how a job is, and what became of each of its campaigns.

    Example: burnish job status nightly --namespace models
    """
    with _client(namespace, context, kubeconfig) as client:
        states = client.states(name)
    if json_output:
        emit_json({"jobs": [asdict(state) for state in states]})
        return
    for state in states:
        typer.echo(f"{state.kind} {state.name}: {state.state}" + (f" ({state.reason})" if state.reason else ""))
        for pod in state.pods:
            index = "" if pod.index is None else f"{pod.index:>4}  "
            typer.echo(f"  {index}{pod.name:<40} {pod.phase:<10} {pod.told}".rstrip())


@app.command("logs")
def logs(
    name: Name,
    index: Annotated[int | None, typer.Option(help="Only this campaign's, counted from 0.")] = None,
    tail: Annotated[int | None, typer.Option(min=1, help="Only so many lines of each pod.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    json_output: Json = False,
) -> None:
    """Print what the pods of a job printed.

    Example: burnish job logs nightly --index 3 --tail 50
    """
    with _client(namespace, context, kubeconfig) as client:
        found = client.logs(name, index=index, tail=tail)
    if json_output:
        emit_json({"logs": [{"pod": pod.name, "index": pod.index, "text": text} for pod, text in found]})
        return
    for pod, text in found:
        if len(found) > 1:
            typer.echo(f"--- {pod.name}")
        typer.echo(text, nl=not text.endswith("\n"))


@app.command("cancel")
def cancel(
    name: Name,
    timeout: Annotated[float, typer.Option(help="Longest wait for its end, in seconds.")] = 180.0,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    json_output: Json = False,
) -> None:
    """End a job and take it away; what it stored and recorded stays.

    Example: burnish job cancel nightly
    """
    with _client(namespace, context, kubeconfig) as client:
        gone = client.cancel(name, timeout_s=timeout)
    if json_output:
        emit_json({"cancelled": gone})
    else:
        typer.echo(f"Took away {', '.join(gone)}.")


def _client(namespace: str | None, context: str | None, kubeconfig: Path | None) -> "JobsClient":
    from optimize.engines.kubernetes_jobs_client import JobsClient

    return JobsClient(namespace=namespace, context=context, kubeconfig=kubeconfig)


def _named(manifests: tuple[dict[str, object], ...]) -> list[str]:
    return [f"{one['kind']} {one['metadata']['name']}" for one in manifests]  # type: ignore[index]
