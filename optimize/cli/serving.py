"""``burnish serve`` and ``burnish bench``: one model on a real server, and load on any V2 endpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from optimize.cli.endings import Terminated, terminable
from optimize.cli.output import ClusterOption, Json, emit_json, say


def serve(
    model: Annotated[Path, typer.Argument(help="An ONNX file, an OpenVINO .xml, or a folder with either.")],
    server: Annotated[str, typer.Option(help="mlserver or triton.")] = "mlserver",
    backend: Annotated[str | None, typer.Option(help="Triton on a Core 2: onnxruntime or openvino.")] = None,
    precision: Annotated[str, typer.Option(help="OpenVINO: default or float32.")] = "default",
    max_batch_size: Annotated[int, typer.Option(help="Most requests in a batch; 1 switches batching off.")] = 1,
    max_batch_delay_ms: Annotated[float, typer.Option(help="How long a request may wait for company.")] = 0.0,
    instances: Annotated[int, typer.Option(help="Triton: instances of the model.")] = 1,
    parallel_workers: Annotated[int, typer.Option(help="MLServer: worker processes; 0 is none.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of each engine session.")] = 1,
    http_port: Annotated[int | None, typer.Option(help="REST port; a free one if not given.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port; a free one if not given.")] = None,
    cluster: ClusterOption = None,
    json_output: Json = False,
) -> None:
    """Serve one model until Ctrl-C: on this machine, on loopback, or on a Core 2.

    Example: burnish serve model.onnx --server triton --http-port 8000
    """
    from optimize.serving import serve_model, serving_profile

    profile = serving_profile(
        server=server,
        backend=backend,
        max_batch_size=max_batch_size,
        max_batch_delay_ms=max_batch_delay_ms,
        instances=instances,
        parallel_workers=parallel_workers,
        threads=threads,
    )
    with (
        terminable(),
        serve_model(
            model, profile, precision=precision, http_port=http_port, grpc_port=grpc_port, cluster=cluster
        ) as served,
    ):
        if json_output:
            emit_json(served.describe())
        else:
            typer.echo(f"{served.model} is ready: REST http://{served.rest}, gRPC {served.grpc}")
            options = "".join(f" --header {name}={value}" for name, value in served.headers.items())
            say(
                f"Try it: burnish bench {served.grpc} --model {served.model}{options} --samples SAMPLES.npz   "
                "(Ctrl-C ends it)"
            )
        try:
            served.wait()
        except (KeyboardInterrupt, Terminated) as ending:  # how serving is meant to end: no error, no second document
            raise typer.Exit(143 if isinstance(ending, Terminated) else 130) from None


def bench(
    url: Annotated[str, typer.Argument(help="host:port of a V2 endpoint, with http:// or grpc:// before it or not.")],
    model: Annotated[str, typer.Option(help="The model's name there.")],
    samples: Annotated[Path, typer.Option(help="An .npz file with one array per input.")],
    protocol: Annotated[
        str | None, typer.Option(help="grpc or rest; else that of --encoding or http://, or grpc.")
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="gRPC: raw or packed; REST: binary or json.")] = None,
    load: Annotated[str | None, typer.Option(help="A load profile by name, or your own YAML file.")] = None,
    arrivals: Annotated[Path | None, typer.Option(help="Recorded arrivals for --load replay.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop with so many requests outstanding.")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop with Poisson arrivals at so many a second.")] = None,
    duration_s: Annotated[
        float | None, typer.Option(help="Length of one run; the load profile's, or 5 and more for slow ones.")
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Independent runs; 3, or the load profile's.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the load, for more than one core.")] = 1,
    statistics: Annotated[
        str | None,
        typer.Option(help="Ask the server where time goes: triton=HOST:PORT (REST) or mlserver=HOST:PORT (metrics)."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The model's .onnx or .xml: replies under load have to be its answers.")
    ] = None,
    server_pid: Annotated[
        int | None, typer.Option(help="The server's process on this machine: tell CPU time, memory and energy.")
    ] = None,
    agent: Annotated[
        str | None, typer.Option(help="host:port of a Core 2 agent's proxy: tell what the mesh adds to it.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="host:port of the server behind it: tell what the way there adds.")
    ] = None,
    internal: Annotated[str | None, typer.Option(help="The model's name on that server; MODEL_1.")] = None,
    for_rate: Annotated[
        float | None, typer.Option(help="Say how many replicas take so many requests a second.")
    ] = None,
    header: Annotated[list[str] | None, typer.Option(help="name=value, sent with each request.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt, and verify the server's certificate.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Keep the records in this folder, also of a run that is ended.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="Draw PNG files of the result into this folder.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and payloads.")] = 0,
    json_output: Json = False,
) -> None:
    """Measure any V2 endpoint: capacity in a closed loop, or latency at a rate in an open loop.

    With none of --load, --concurrency and --rate it finds the closed-loop maximum and the saturation point first, then
    measures latency at 0.8 of it. Load profiles: closed, poisson, staged, sweep, slo, replay. With --agent or --server
    it measures what the places on the way to a model on a Core 2 add, URL being the mesh.

    Exit code 5 where not one window is valid.

    Example: burnish bench 127.0.0.1:8001 --model digits --samples evaluation.npz --load staged
    """
    from optimize.benching import bench_endpoint, measured_nothing, show_bench
    from registry.errors import CheckFailedError

    if agent or server or internal:
        _bench_depths(
            url,
            json_output=json_output,
            unfitting={
                "--load": load, "--arrivals": arrivals, "--statistics": statistics, "--for-rate": for_rate,
                "--pictures": pictures, "--reference": reference, "--server-pid": server_pid,
                "--workers": workers - 1,
            },
            model=model, samples=samples, agent=agent, server=server, internal=internal, protocol=protocol,
            encoding=encoding, concurrency=concurrency, rate_rps=rate, duration_s=duration_s, rounds=runs,
            headers=header or [], tls=tls, out=out, seed=seed, told=say,
        )  # fmt: skip
        return
    with terminable():
        result = bench_endpoint(
            url,
            model=model,
            samples=samples,
            protocol=protocol,
            concurrency=concurrency,
            rate_rps=rate,
            duration_s=duration_s,
            runs=runs,
            headers=header or [],
            tls=tls,
            out=out,
            seed=seed,
            load=load,
            arrivals=arrivals,
            encoding=encoding,
            workers=workers,
            statistics=statistics,
            for_rate_rps=for_rate,
            pictures=pictures,
            reference=reference,
            server_pid=server_pid,
            told=say,
        )
    if json_output:
        emit_json(result)
    else:
        show_bench(result)
    if measured_nothing(result):
        raise typer.Exit(CheckFailedError.exit_code)


def _bench_depths(url: str, *, json_output: bool, unfitting: dict[str, object], **asked: Any) -> None:
    from optimize.depths import bench_depths, show_depths
    from registry.errors import CheckFailedError, InputError

    if other := next((name for name, value in unfitting.items() if value), None):
        raise InputError(f"{other} does not go with --agent and --server", hint="They take --concurrency or --rate.")
    with terminable():
        result = bench_depths(url, **asked)
    if json_output:
        emit_json(result)
    else:
        show_depths(result)
    if all(one["service_p50_ms"] is None for one in result["depths"]):
        raise typer.Exit(CheckFailedError.exit_code)
