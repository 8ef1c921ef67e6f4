"""``burnish compare``: candidates, recorded runs or live endpoints held against each other, or several campaigns."""

from pathlib import Path
from typing import Annotated

import typer

from optimize.cli.endings import terminable
from optimize.cli.output import Json, emit_json, say


def compare(
    a: Annotated[
        str,
        typer.Argument(
            help="A candidate or variant, a folder of `bench --out`, host:port/model, or a campaign's folder."
        ),
    ],
    b: Annotated[str, typer.Argument(help="What is held against it.")],
    more: Annotated[list[str] | None, typer.Argument(help="Further campaigns' folders.")] = None,
    work: Annotated[Path, typer.Option(help="The campaign's working folder, for candidates.")] = Path("burnish-work"),
    samples: Annotated[Path | None, typer.Option(help="Endpoints: an .npz file with one array per input.")] = None,
    protocol: Annotated[str, typer.Option(help="Endpoints: grpc or rest.")] = "grpc",
    concurrency: Annotated[int | None, typer.Option(help="Endpoints: closed loop with so many outstanding.")] = None,
    rate: Annotated[float | None, typer.Option(help="Endpoints: open loop at so many requests a second.")] = None,
    level: Annotated[str, typer.Option(help="Endpoints: level of proof.")] = "standard",
    rounds: Annotated[int | None, typer.Option(help="Endpoints: so many, and twice as many at most.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Endpoints: length of one window.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="Endpoints: name=value for each request; {model} is its own.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Endpoints: encrypt, and verify certificates.")] = False,
    out: Annotated[Path | None, typer.Option(help="Endpoints: keep the raw records in this folder.")] = None,
    seed: Annotated[int, typer.Option(help="Endpoints: of arrivals, payloads and the order in rounds.")] = 0,
    json_output: Json = False,
) -> None:
    """Say whether B is faster than A, by how much and how surely, and what differs between them.

    Live endpoints are measured in interleaved rounds, with more of them while it is undecided. Across hosts numbers
    stand side by side, without ratios: also what several campaigns selected, by their working folders (FOLDER:NAME for
    another candidate).

    Example: burnish compare 127.0.0.1:8001/float32 127.0.0.1:9001/int8 --samples evaluation.npz
    """
    from optimize import across_hosts, comparing
    from registry.errors import InputError

    kind = comparing.kind_of(a, b, *(more or ()))
    if kind != "live" and (samples or concurrency or rate or rounds or duration_s or header or tls or out):
        raise InputError(
            "options for live endpoints do not fit what was measured before", hint="Give endpoints as host:port/model."
        )
    if kind == "campaigns":
        found = across_hosts.side_by_side([a, b, *(more or ())])
        if json_output:
            emit_json(across_hosts.document(found))
        else:
            across_hosts.show(found)
        return
    with terminable():
        if kind == "campaign":
            pairs = comparing.compare_candidates(work, a, b)
        elif kind == "recorded":
            pairs = [comparing.compare_recorded(Path(a), Path(b))]
        elif samples is None:
            raise InputError("live endpoints need --samples", hint="Name an .npz with one array per input.")
        else:
            asked = comparing.Asked(
                samples=samples, protocol=protocol, concurrency=concurrency, rate_rps=rate, level=level, rounds=rounds,
                duration_s=duration_s, headers=header or (), tls=tls, seed=seed, out=out,
            )  # fmt: skip
            pairs = [comparing.compare_live(a, b, asked, told=say)]
    if json_output:
        emit_json(comparing.document(pairs))
    else:
        comparing.show(pairs)
