"""``burnish check``: whether a server gives each of many concurrent requests its own answer."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.endings import terminable
from optimize.cli.output import ClusterOption, Json, emit_json


def check(
    target: Annotated[str, typer.Argument(help="host:port of a V2 endpoint, or with --work a candidate.")],
    model: Annotated[str | None, typer.Option(help="The model's name at the endpoint.")] = None,
    work: Annotated[Path | None, typer.Option(help="A campaign's working folder: serve its candidate here.")] = None,
    samples: Annotated[Path | None, typer.Option(help="An .npz with one array per input; else random ones.")] = None,
    reference: Annotated[Path | None, typer.Option(help="The model's .onnx or .xml, to be run in process.")] = None,
    protocol: Annotated[str | None, typer.Option(help="grpc or rest; that of http:// or grpc://, else grpc.")] = None,
    requests: Annotated[int, typer.Option(help="How many are sent.")] = 64,
    concurrency: Annotated[int, typer.Option(help="How many at once; at least the batch size.")] = 16,
    tolerance: Annotated[float, typer.Option(help="Largest deviation, as a share of an output's largest.")] = 0.05,
    header: Annotated[list[str] | None, typer.Option(help="name=value, sent with each request.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt, and verify the server's certificate.")] = False,
    seed: Annotated[int, typer.Option(help="Of samples and their order.")] = 0,
    cluster: ClusterOption = None,
    json_output: Json = False,
) -> None:
    """Ask a server many things at once, and see whether each request gets its own answer.

    A server that splits its batches wrongly answers every request, some with the answer of another. Exit code 5 where
    that is so, and where another model answers than the one asked.

    Example: burnish check 127.0.0.1:8001 --model digits --samples evaluation.npz --reference digits.onnx
    """
    from optimize.checking import check_candidate, check_endpoint, lines
    from registry.errors import CheckFailedError, InputError

    how = {"requests": requests, "concurrency": concurrency, "tolerance": tolerance, "seed": seed}
    with terminable():
        if work is None:
            if cluster is not None:
                raise InputError("--cluster is for a candidate", hint="Name its campaign's folder with --work.")
            told = check_endpoint(
                target, model=model, samples=samples, reference=reference, protocol=protocol,
                headers=header or [], tls=tls, **how,
            )  # fmt: skip
        elif model or reference or header or tls:
            raise InputError("--model, --reference, --header and --tls are for an endpoint", hint="Leave out --work.")
        else:
            told = check_candidate(target, work, samples=samples, protocol=protocol, cluster=cluster, **how)
    if json_output:
        emit_json(told)
    else:
        typer.echo("\n".join(lines(told)))
    if not told["passed"]:
        raise typer.Exit(CheckFailedError.exit_code)
