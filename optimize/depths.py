"""What each place on the way to a model on a Core 2 adds: ``burnish bench MESH --agent ... --server ...``."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optimize.endpoints import check_amounts, check_seed, endpoint, make_folder
from optimize.samples import load_samples
from profiles.load.ceiling import Ceilings
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads
from profiles.measure.breakdown import measure_depths
from profiles.measure.host import fingerprint_host, split_cpus
from profiles.measure.levels import find_level
from profiles.measure.rounds import run_until_valid
from registry.codec import to_jsonable
from registry.errors import InputError
from registry.ledger import write_durably
from registry.records import ClosedLoop, Depth, Estimate, LoadProfile, OpenLoop, RunRecord, Target
from registry.report import numbers

_DURATION_S, _ROUNDS, _WARMUP_SHARE = 3.0, 8, 0.3
FILE = "depths.json"
INTERNAL = "seldon-internal-model"
"""The header by which an agent knows a model: under its internal name, ``<model>_<version>``."""


def bench_depths(
    mesh: str,
    *,
    model: str,
    samples: Path,
    agent: str | None,
    server: str | None,
    internal: str | None,
    protocol: str | None = None,
    encoding: str | None = None,
    concurrency: int | None = None,
    rate_rps: float | None = None,
    duration_s: float | None = None,
    rounds: int | None = None,
    headers: Sequence[str] = (),
    tls: bool = False,
    out: Path | None = None,
    seed: int = 0,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Offers the same load to a model at its server, at the agent before it, and at the mesh.

    Args:
        mesh: the endpoint that clients use, with its ``headers`` and ``tls``; the other two get neither.
        model: its name there.
        samples: an ``.npz`` with one array per input.
        agent: ``host:port`` of the agent's proxy, or None.
        server: ``host:port`` of the server itself, or None.
        internal: the model's name on the server; ``<model>_1`` if None.
        protocol: as for `optimize.endpoints.endpoint`, the same at each place.
        encoding: the same.
        concurrency: a closed loop with so many outstanding; 1 where no rate is given either.
        rate_rps: an open loop at this rate, or None.
        duration_s: of each window.
        rounds: how often each place is measured.
        headers: ``name=value``, sent to the mesh.
        tls: whether the mesh is spoken to with TLS.
        out: keeps the times of each request, and in `FILE` what was found, also where something ends it before its end;
            or None.
        seed: of arrivals, payloads and the order in rounds.
        told: takes a line for each window.

    Returns:
        The places from the innermost outwards, as plain values.

    Raises:
        InputError: an option or the samples do not fit.
        UnreachableError: a place does not answer, or refuses.
        StorageError: ``out`` cannot be written.
    """
    check_seed(seed)
    check_amounts(concurrency=concurrency, rate=rate_rps, duration_s=duration_s, runs=rounds)
    if concurrency is not None and rate_rps is not None:
        raise InputError("one load is offered at each place", hint="Leave out --concurrency or --rate.")
    target = endpoint(mesh, model, protocol, headers, tls, encoding=encoding)
    own = internal or f"{model}_1"
    # Neither credentials nor the mesh's certificate are theirs.
    inner = replace(target, headers={}, tls=False)
    places: dict[str, Target] = {}
    if server is not None:
        places["server"] = replace(inner, url=server, model=own)
    if agent is not None:
        places["agent"] = replace(inner, url=agent, headers={INTERNAL: own})
    places["mesh"] = target
    asked = load_samples(samples)
    payloads = {name: encode_payloads(asked.inputs, target=place, seed=seed) for name, place in places.items()}
    load = OpenLoop(rate_rps=rate_rps) if rate_rps is not None else ClosedLoop(concurrency=concurrency or 1)
    named = f"{rate_rps:g} rps" if rate_rps is not None else f"concurrency {concurrency or 1}"
    standard = find_level("standard")
    window = LoadProfile(
        name=named,
        load=load,
        warmup_s=min(standard.warmup_s, _WARMUP_SHARE * (duration_s or _DURATION_S)),
        duration_s=duration_s or _DURATION_S,
        timeout_s=standard.timeout_s,
        seed=seed,
    )
    windows: list[RunRecord] = []

    def found(depths: Sequence[Depth] = ()) -> dict[str, Any]:
        told_of = [to_jsonable(one) for one in depths]
        return {"model": model, "load": named, "rounds": rounds or _ROUNDS, "depths": told_of}

    def keep(depths: Sequence[Depth] = ()) -> None:
        if out is not None and windows:
            about = {"seed": seed, "samples_digest": asked.digest, "windows": [to_jsonable(one) for one in windows]}
            write_durably(out / FILE, json.dumps({**found(depths), **about}, indent=2) + "\n")

    with TemporaryDirectory(prefix="burnish-bench-") as scratch:
        folder = out or Path(scratch)
        make_folder(folder, "--out")
        server_cpus, client_cpus, pinning = split_cpus()
        ceilings = Ceilings(folder, server_cpus, fingerprint_host(pinning).fingerprint)
        with LoadGenerator(client_cpus, Path(scratch), ceiling=ceilings) as generator:

            def run(place: Target, profile: LoadProfile, path: Path) -> RunRecord:
                name = next(name for name, one in places.items() if one is place)

                def offer(one: LoadProfile, file: Path) -> RunRecord:
                    return generator.run(place, payloads[name], one, raw_path=file, raw_root=folder)

                windows.append(run_until_valid(offer, profile, path, standard))
                told(f"{profile.name}: {_outcome(windows[-1])}")
                return windows[-1]

            try:
                measured = measure_depths(run, places, window, rounds=rounds or _ROUNDS, seed=seed, folder=folder)
            except BaseException:
                keep()  # what was measured before something ended it stays
                raise
    keep(measured)
    return found(measured)


def show_depths(result: dict[str, Any]) -> None:
    """Prints the places from the innermost outwards, and what each adds."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    title = f"{result['model']} at {result['load']}, {result['rounds']} rounds"
    table = Table("place", "address", "service time p50", "adds", title=Text(title), title_justify="left")
    for one in result["depths"]:
        known = [None if one[name] is None else Estimate(**one[name]) for name in ("service_p50_ms", "added_ms")]
        added = "" if one["name"] == result["depths"][0]["name"] else numbers.text(known[1])
        table.add_row(*map(Text, (one["name"], one["url"], numbers.text(known[0]), added)))
    console.print(table)
    for one in result["depths"]:
        if one["invalid_runs"]:
            console.print(f"{one['name']}: {one['invalid_runs']} invalid windows were left out", highlight=False)


def _outcome(record: RunRecord) -> str:
    gates = ", ".join(f"{finding.gate} {finding.observed}" for finding in record.findings)
    median_ms = record.metrics.get("service_p50_ms")
    if gates or median_ms is None:
        return f"invalid: {gates or 'too few answers'}"
    return f"service time p50 {median_ms:.2f} ms"
