"""Load on any V2 endpoint: what ``burnish bench`` does."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from optimize.bench_generator import BenchGenerator, Journal
from optimize.endpoints import check_amounts, check_seed, endpoint, make_folder
from optimize.in_process import answers_of_file, check_reference
from optimize.samples import Samples, load_samples
from profiles.deploy.local_process import watch_process
from profiles.load.ceiling import Ceilings
from profiles.load.library import LoadPlan, load_plan
from profiles.load.payloads import Expected, Payload, encode_payloads, encoding_of, expected_answers
from profiles.measure.advice import Advice, advice_of, advise
from profiles.measure.bench import Bench, bench_target
from profiles.measure.breakdown import statistics_at
from profiles.measure.host import fingerprint_host, split_cpus
from profiles.measure.plans import Planned, curves_of, run_plan
from profiles.measure.recorded import recorded_of, write_recorded
from profiles.measure.rounds import CLOSED
from profiles.measure.slo import SloSearch
from profiles.measure.spectrum import spectra_of
from registry.codec import to_jsonable
from registry.errors import InputError
from registry.records import Estimate, Target
from registry.report.numbers import text

if TYPE_CHECKING:
    from rich.console import Console

_DURATION_S, _RUNS = 5.0, 3
# Fewer different requests, and a cache of responses may answer.
_DISTINCT = 32
# As many neighbours as a batch may have, for models whose answers depend on them.
_BATCH = 16


def bench_endpoint(
    url: str,
    *,
    model: str,
    samples: Path,
    protocol: str | None,
    concurrency: int | None,
    rate_rps: float | None,
    duration_s: float | None,
    runs: int | None,
    headers: Sequence[str],
    tls: bool,
    out: Path | None,
    seed: int,
    load: str | None = None,
    arrivals: Path | None = None,
    encoding: str | None = None,
    workers: int = 1,
    statistics: str | None = None,
    for_rate_rps: float | None = None,
    pictures: Path | None = None,
    reference: Path | None = None,
    server_pid: int | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures a V2 endpoint; see ``burnish bench --help``.

    What was measured before something ends it stays in ``out``; ``told`` takes a line for each window, as soon as it
    was measured.

    Returns:
        The target, each load's measurement, and the capacity where it was searched, as plain values.

    Raises:
        InputError: an option or the samples do not fit.
        UnreachableError: the endpoint does not answer, or refuses.
        ServerDiedError: the server's process has ended.
        StorageError: ``out`` cannot be written.
    """
    check_seed(seed)
    check_amounts(
        for_rate=for_rate_rps, concurrency=concurrency, rate=rate_rps, duration_s=duration_s, runs=runs, workers=workers
    )
    check_reference(reference)
    plan = _plan(load, arrivals, concurrency=concurrency, rate=rate_rps, duration_s=duration_s, runs=runs)
    watched = None if statistics is None else statistics_at(statistics, model)
    target = endpoint(url, model, protocol, headers, tls, encoding=encoding)
    exact = duration_s is not None
    duration_s, runs = duration_s or _DURATION_S, runs or _RUNS
    loads = []
    if concurrency is not None:
        loads.append(f"concurrency {concurrency}")
    if rate_rps is not None:
        loads.append(f"{rate_rps:g} rps")
    asked = load_samples(samples)
    payloads = encode_payloads(asked.inputs, target=target, seed=seed)
    server_cpus, client_cpus, pinning = split_cpus()
    client = fingerprint_host(pinning)
    journal = Journal(told, out)
    expected = None if reference is None else _expected(reference, asked, payloads, seed)
    usage = None if server_pid is None else watch_process(server_pid)
    capacity = None
    with TemporaryDirectory(prefix="burnish-bench-") as scratch:
        raw_root = out or Path(scratch)
        make_folder(raw_root, "--out")
        if pictures is not None:
            make_folder(pictures, "--pictures")
        ceilings = Ceilings(raw_root, server_cpus, client.fingerprint)
        process: dict[str, Any] = {"cpus": client_cpus, "work": Path(scratch), "workers": workers, "ceiling": ceilings}
        looks: dict[str, Any] = {"statistics": watched, "expected": expected, "usage": usage}
        try:
            with BenchGenerator(**process, **looks, on_search=journal.keep_search) as generator:
                how: dict[str, Any] = {"seed": seed, "raw_root": raw_root, "on_run": journal.keep}
                if plan is not None:
                    found: Bench = run_plan(generator, target, payloads, plan, **how)
                else:
                    found = bench_target(
                        generator, target, payloads, loads=loads, duration_s=duration_s, exact=exact, runs=runs, **how
                    )
            capacity = found.capacity
            drawn = [] if pictures is None else _draw(target, found, raw_root, pictures)
        finally:
            if out is not None and (journal.rounds or journal.searched):
                settings: dict[str, Any] = {"seed": seed, "rounds": runs, "duration_s": duration_s}
                if plan is not None:
                    settings |= {
                        "rounds": plan.runs,
                        "duration_s": plan.duration_s,
                        "load": plan.model_dump(mode="json"),
                    }
                recorded = recorded_of(
                    target, journal.rounds, capacity, client=client, samples_digest=asked.digest, settings=settings
                )
                write_recorded(replace(recorded, searched=tuple(journal.searched)), out)
    return _plain(target, found, payloads, for_rate_rps) | {"pictures": [str(path) for path in drawn]}


def _expected(reference: Path, asked: Samples, payloads: Sequence[Payload], seed: int) -> Expected:
    """What the model's own file answers to each payload, in process."""
    rows = sorted({row for payload in payloads for row in payload.rows})
    place = {row: number for number, row in enumerate(rows)}
    inputs = {name: array[rows] for name, array in asked.inputs.items()}
    known = answers_of_file(reference, inputs, batch_size=_BATCH, seed=seed)
    own = [replace(payload, rows=tuple(place[row] for row in payload.rows)) for payload in payloads]
    found = expected_answers(own, known.outputs)
    wider = {name: limit + known.allowance.get(name, 0.0) for name, limit in found.absolute.items()}
    return replace(found, absolute=wider)


def _draw(target: Target, found: Bench, raw_root: Path, folder: Path) -> list[Path]:
    """Pictures of what was measured, as PNG files in a folder."""
    from optimize.reporting import write_pictures
    from registry.report.pictures import endpoint_files

    # A closed loop's latency is that of its concurrency; the closed-loop maximum is no load of anybody's.
    loads = dict.fromkeys(run.load.name for one in found.rounds for run in one.runs if run.load.name != CLOSED)
    spectra = spectra_of(found.rounds, raw_root=raw_root, loads=loads)
    # Where no capacity was looked for, windows at several loads make curves all the same.
    capacity = found.capacity or curves_of(found.rounds)
    return write_pictures(endpoint_files(target.model, capacity, advice_of(capacity), spectra), folder)


def _plan(load: str | None, arrivals: Path | None, **chosen: float | None) -> LoadPlan | None:
    """The load profile that the options name, with their lengths in place of its own."""
    if load is None:
        if arrivals is not None:
            raise InputError("--arrivals is for --load replay", hint="Give both.")
        return None
    if chosen.pop("concurrency") is not None or chosen.pop("rate") is not None:
        raise InputError("--load says what is offered", hint="Leave out --concurrency and --rate.")
    given = {name: value for name, value in chosen.items() if value is not None}
    return load_plan(load, arrivals=arrivals).model_copy(update=given)


def _plain(target: Target, found: Bench, payloads: Sequence[Payload], for_rate_rps: float | None) -> dict[str, Any]:
    shown = {
        "url": target.url,
        "protocol": target.protocol,
        "model": target.model,
        "binary": target.binary,
        "encoding": encoding_of(target),
    }
    sent = {"distinct": len({payload.body for payload in payloads}), "largest": max(len(one.body) for one in payloads)}
    slo = found.slo if isinstance(found, Planned) else None
    return {
        "target": shown,
        "payloads": sent,
        "slo": None if slo is None else _plain_slo(slo),
        "capacity": None if found.capacity is None else to_jsonable(found.capacity),
        "advice": None if found.capacity is None else _plain_advice(advise(found.capacity, for_rate_rps=for_rate_rps)),
        "measurements": [to_jsonable(measurement) for measurement in found.measurements],
        "valid_windows": sum(run.valid for one in found.rounds for run in one.runs),
        "invalid": [
            {"load": run.load.name, "round": one.number, "findings": [to_jsonable(finding) for finding in run.findings]}
            for one in found.rounds
            for run in one.runs
            if not run.valid
        ],
    }


_LAW = ("gamma", "sigma", "kappa")


def _plain_advice(advice: Advice) -> dict[str, Any]:
    law = advice.law
    return {
        "knee": advice.knee,
        "law": law if isinstance(law, str) else {name: to_jsonable(getattr(law, name)) for name in _LAW},
        "target_rps": advice.target_rps,
        "replicas": advice.replicas,
        "lines": list(advice.lines),
    }


def _plain_slo(slo: SloSearch) -> dict[str, Any]:
    return {
        "limit": f"p{slo.limit.percentile} <= {slo.limit.latency_ms:g} ms",
        "rate_rps": slo.rate_rps,
        "failing_rps": slo.failing_rps,
        "reason": slo.reason,
        "runs": [asdict(run) for run in slo.runs],
    }


def measured_nothing(result: dict[str, Any]) -> bool:
    """Whether not one window of what was asked for is valid."""
    if (slo := result["slo"]) is not None:
        return not any(run["requests"] for run in slo["runs"])
    return not result["valid_windows"]


def show_bench(result: dict[str, Any]) -> None:
    """Prints what a bench found, one load after the other."""
    from rich.console import Console

    console = Console()

    def say(line: str, **how: Any) -> None:
        # Names that a server gives itself are no markup.
        console.print(line, markup=False, highlight=False, **how)

    if result["payloads"]["distinct"] < _DISTINCT:
        say(
            f"Only {result['payloads']['distinct']} different requests: a cache of responses would look fast. "
            f"Give at least {_DISTINCT} samples."
        )
    if (slo := result["slo"]) is not None:
        rate = "no rate" if slo["rate_rps"] is None else f"{slo['rate_rps']:.1f} requests a second"
        say(f"{slo['limit']}: {rate}. {slo['reason']}")
    elif result["capacity"] is not None:
        saturation, stages = result["capacity"]["saturation_rps"], result["capacity"]["stages"]
        unknown = "not found, as no stage was sustained" if stages else "not found, as nothing was answered"
        told = unknown if saturation is None else f"{saturation:.1f} requests a second"
        ladder = f"; closed-loop maximum at concurrency {result['capacity']['concurrency']}"
        say(f"Saturation: {told}{ladder if result['capacity']['ladder'] else ''}")
        for stage in stages:
            held = "sustained" if stage["sustained"] else "not sustained"
            say(f"  {stage['offered_rps']:.1f}/s: {stage['achieved_rps']:.1f}/s came back, {held}")
        for line in result["advice"]["lines"]:
            say(line)
    for path in result["pictures"]:
        say(f"Picture: {path}", soft_wrap=True)
    for measurement in result["measurements"]:
        _show_measurement(console, measurement)
    for one in result["invalid"]:
        for finding in one["findings"]:
            say(
                f"invalid: {one['load']}, round {one['round'] + 1}: {finding['gate']} "
                f"{finding['observed']} (limit {finding['limit']})"
            )
    if measured_nothing(result):
        say("Not one window is valid: nothing was measured at these loads.")


def _show_measurement(console: "Console", measurement: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    server_only = set(measurement["metrics"]) == {"peak_rss_mb"}
    title = measurement["load"] or ("all windows" if server_only else "closed loop")
    table = Table("metric", "value", title=Text(title), title_justify="left")
    for name, fields in measurement["metrics"].items():
        table.add_row(*map(Text, (name, text(Estimate(**fields)))))
    console.print(table)
    if measurement["invalid_runs"]:
        console.print(f"{measurement['invalid_runs']} invalid runs were left out")
