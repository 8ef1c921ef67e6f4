"""One model on a real server, and load on any V2 endpoint: what ``serve`` and ``bench`` do."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import ValidationError

from optimize.admission import ENTRY, Format, ask_child
from optimize.cluster_config import load_cluster
from optimize.clusters import Site, open_file
from optimize.config import ServingConfig
from optimize.samples import load_samples
from optimize.signature import signature_of
from profiles.deploy.cluster import Deployment
from profiles.deploy.core2_candidates import UNKNOWN_VERSION
from profiles.deploy.local import LOOPBACK, LocalDeployment
from profiles.load.ceiling import Ceilings
from profiles.load.library import LoadPlan, load_plan
from profiles.load.payloads import Payload, encode_payloads, encoding_of
from profiles.measure.advice import Advice, advice_of, advise
from profiles.measure.bench import Bench, bench_target, takes_binary
from profiles.measure.breakdown import WatchingGenerator, statistics_at
from profiles.measure.host import fingerprint_host, split_cpus
from profiles.measure.plans import Planned, curves_of, run_plan
from profiles.measure.recorded import recorded_of, write_recorded
from profiles.measure.rounds import CLOSED
from profiles.measure.slo import SloSearch
from profiles.measure.spectrum import spectra_of
from registry.codec import digest, to_jsonable
from registry.errors import InputError
from registry.records import Artifact, Candidate, EngineSpec, Estimate, Round, RunRecord, ServingProfile, Target
from registry.report.numbers import text
from registry.store import FolderStore

_DURATION_S, _RUNS = 5.0, 3
# Fewer different requests, and a cache of responses may answer.
_DISTINCT = 32
# How tensors travel -> the protocol.
_SPOKEN = {"raw": "grpc", "packed": "grpc", "binary": "rest", "json": "rest"}
_LOAD_TIMEOUT_S = 120.0
_LOOK_S = 0.5
_LOOK_AT_CORE2_S = 5.0
# Somebody may be waiting for an answer when the user ends a server; in a campaign nobody is.
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that is being served.

    Attributes:
        deployment: of it.
        rest: ``host:port`` of REST.
        grpc: ``host:port`` of gRPC.
        log: the server's, where it is of this machine.
        look_s: how often to see whether it is still there.
    """

    deployment: Deployment
    rest: str
    grpc: str
    log: Path | None
    look_s: float

    @property
    def model(self) -> str:
        """The model's name on the server."""
        return self.deployment.target.model

    @property
    def headers(self) -> dict[str, str]:
        """What each request has to carry."""
        return dict(self.deployment.target.headers)

    def describe(self) -> dict[str, Any]:
        """Where it is served, as plain values."""
        return {
            "model": self.model,
            "rest": self.rest,
            "grpc": self.grpc,
            "headers": self.headers,
            "load_time_s": round(self.deployment.load_time_s, 3),
            "log": None if self.log is None else str(self.log),
        }

    def wait(self) -> None:
        """Returns never: ends by Ctrl-C, SIGTERM, or the server's end.

        Raises:
            ServerDiedError: the server ended, or serves something else.
        """
        while True:
            self.deployment.usage()
            time.sleep(self.look_s)


def serving_profile(**fields: Any) -> ServingProfile:
    """The serving profile of command-line options.

    Raises:
        InputError: an option's value does not fit; the message names it.
    """
    try:
        return ServingConfig(**fields).profile()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + ".".join(map(str, first["loc"])).replace("_", "-") if first["loc"] else "the serving options"
        raise InputError(f"{option}: {first['msg']} (given: {first['input']!r})") from error


@contextmanager
def serve_model(
    model: Path,
    profile: ServingProfile,
    *,
    precision: str,
    http_port: int | None,
    grpc_port: int | None,
    cluster: Path | None = None,
) -> Iterator[Served]:
    """Serves one model on this machine's loopback or on a Core 2, and ends that when the block ends.

    Args:
        model: an ONNX file, an OpenVINO ``.xml``, or a folder with one of either.
        profile: server, batching, threads.
        precision: ``default``, or ``float32`` to hold OpenVINO to it.
        http_port: REST port of this machine, or None for a free one.
        grpc_port: gRPC port of this machine, or None for a free one.
        cluster: a file that names a Core 2, see `optimize.cluster_config.ClusterFile`; None for this machine.

    Raises:
        InputError: there is no such model, or it cannot be served so.
        UnreachableError: a port is in use, the server refused the model, or the Core 2 does not answer.
        ServerDiedError: the server ended while it loaded.
    """
    entry = _entry(model)
    if precision not in ("default", "float32"):
        raise InputError(f"--precision {precision!r} is not known", hint="There are default and float32.")
    if cluster is not None and (http_port or grpc_port):
        raise InputError("--http-port and --grpc-port are of this machine", hint="Leave them out, or --cluster.")
    if (why := load_cluster(cluster).why_not(profile)) is not None:
        raise InputError(f"it cannot be served so: {why}")
    ports = {"http_port": http_port, "grpc_port": grpc_port}
    with (
        TemporaryDirectory(prefix="burnish-serve-") as name,
        open_file(
            cluster, work=Path(name), purpose="serve", server_cpus=split_cpus()[0], grace_s=_GRACE_S, **ports
        ) as site,
    ):
        work = Path(name)
        artifact = _stored(entry, FolderStore(work), work)
        candidate = _candidate(entry.stem, artifact, profile, precision, site)
        files = FolderStore(work).path(artifact)
        yield _served(site.cluster.deploy(candidate, artifact, files, timeout_s=_LOAD_TIMEOUT_S))


def _served(deployment: Deployment) -> Served:
    if isinstance(deployment, LocalDeployment):
        rest, grpc = f"{LOOPBACK}:{deployment.ports.http}", f"{LOOPBACK}:{deployment.ports.grpc}"
        return Served(deployment=deployment, rest=rest, grpc=grpc, log=deployment.log, look_s=_LOOK_S)
    mesh = deployment.target.url
    return Served(deployment=deployment, rest=mesh, grpc=mesh, log=None, look_s=_LOOK_AT_CORE2_S)


def _entry(model: Path) -> Path:
    if model.is_file():
        return model
    found = sorted([*model.glob("*.onnx"), *model.glob("*.xml")]) if model.is_dir() else []
    if len(found) != 1:
        what = f"{len(found)} models" if found else "no model"
        raise InputError(f"{what} at {model}", hint="Give the path of one .onnx file or OpenVINO .xml.")
    return found[0]


def _stored(entry: Path, store: FolderStore, work: Path) -> Artifact:
    """The model's own files in the store, and nothing else of its folder."""
    folder = work / "admitted"
    folder.mkdir()
    kind: Format = "openvino" if entry.suffix == ".xml" else "onnx"
    inputs, outputs = signature_of(ask_child("optimize.admission:admit_here", entry, folder=str(folder), format=kind))
    name = entry.name if kind == "openvino" else ENTRY
    return store.add(folder, format=kind, entry=name, inputs=inputs, outputs=outputs)


def _candidate(stem: str, artifact: Artifact, profile: ServingProfile, precision: str, site: Site) -> Candidate:
    from optimize.packages import version

    name: Literal["onnxruntime", "openvino"] = "openvino" if artifact.format == "openvino" else "onnxruntime"
    engine = EngineSpec(name=name, precision="float32" if precision == "float32" else "default")
    identity = {"artifact": artifact.digest, "engine": to_jsonable(engine), "serving": to_jsonable(profile)}
    return Candidate(
        id=digest(identity),
        name=f"{stem} @ {profile.key}",
        variant_id=artifact.digest[:16],
        variant_name=stem,
        engine=engine,
        engine_version=UNKNOWN_VERSION if profile.of_server else version(name),
        serving=profile,
        server_version=site.server_version(profile.server),
        cluster=site.served_by(profile.server),
    )


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
    """
    _check_amounts(
        for_rate=for_rate_rps, concurrency=concurrency, rate=rate_rps, duration_s=duration_s, runs=runs, workers=workers
    )
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
    journal = _Journal(told)
    capacity = None
    with TemporaryDirectory(prefix="burnish-bench-") as scratch:
        raw_root = out or Path(scratch)
        _make_folder(raw_root, "--out")
        if pictures is not None:
            _make_folder(pictures, "--pictures")
        ceilings = Ceilings(raw_root, server_cpus, client.fingerprint)
        process: dict[str, Any] = {"cpus": client_cpus, "work": Path(scratch), "workers": workers}
        try:
            with WatchingGenerator(**process, ceiling=ceilings, statistics=watched) as generator:
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
            if out is not None and journal.rounds:
                settings: dict[str, Any] = {"seed": seed, "rounds": runs, "duration_s": duration_s}
                if plan is not None:
                    settings |= {
                        "rounds": plan.runs,
                        "duration_s": plan.duration_s,
                        "load": plan.model_dump(mode="json"),
                    }
                write_recorded(
                    recorded_of(
                        target, journal.rounds, capacity, client=client, samples_digest=asked.digest, settings=settings
                    ),
                    out,
                )
    return _plain(target, found, payloads, for_rate_rps) | {"pictures": [str(path) for path in drawn]}


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


class _Journal:
    """What was measured so far."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told
        self._runs: dict[int, list[RunRecord]] = {}

    def keep(self, number: int, record: RunRecord) -> None:
        self._runs.setdefault(number, []).append(record)
        gates = ", ".join(f"{finding.gate} {finding.observed}" for finding in record.findings)
        median_ms = record.metrics.get("latency_p50_ms")
        latency = "" if median_ms is None else f", p50 {median_ms:.2f} ms"
        throughput = f"{record.metrics['throughput_rps']:.1f} requests a second{latency}"
        self._told(f"run {number + 1}, {record.load.name}: {f'invalid: {gates}' if gates else throughput}")

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The windows by the number of their round."""
        made = sorted(self._runs.items())
        return tuple(Round(candidate_id="bench", number=n, position=0, runs=tuple(runs)) for n, runs in made)


def _make_folder(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {folder} cannot be made: {error.strerror}", hint="Name another folder.") from error


def endpoint(
    url: str, model: str, protocol: str | None, headers: Sequence[str], tls: bool, *, encoding: str | None = None
) -> Target:
    """The endpoint that command-line options name; a REST endpoint is asked whether it takes binary tensors.

    Without a protocol it is that of the encoding (``raw`` and ``packed`` are gRPC, ``binary`` and ``json`` REST), or
    gRPC; without an encoding it is raw, or binary where that is taken.

    Raises:
        InputError: an option's value does not fit.
        UnreachableError: the REST endpoint does not answer.
    """
    if encoding is not None and encoding not in _SPOKEN:
        raise InputError(f"--encoding {encoding!r} is not known", hint=f"There are {', '.join(_SPOKEN)}.")
    spoken = _SPOKEN[encoding] if encoding else protocol or "grpc"
    if protocol not in (None, spoken):
        raise InputError(f"--encoding {encoding} is of {spoken}, not {protocol}", hint="Leave out --protocol.")
    protocol = spoken
    if protocol not in ("grpc", "rest"):
        raise InputError(f"--protocol {protocol!r} is not known", hint="There are grpc and rest.")
    pairs = [header.partition("=") for header in headers]
    if wrong := [header for header, pair in zip(headers, pairs, strict=True) if not pair[1] or not pair[0]]:
        raise InputError(f"--header {wrong[0].partition(':')[0]!r} is not name=value")
    scheme, _, rest = url.rpartition("://")
    kind: Literal["grpc", "rest"] = "grpc" if protocol == "grpc" else "rest"
    target = Target(
        url=rest.rstrip("/"),
        protocol=kind,
        model=model,
        headers={name: value for name, _, value in pairs},
        tls=tls or scheme in ("https", "grpcs"),
    )
    if target.protocol == "grpc":
        return replace(target, packed=encoding == "packed")
    binary = takes_binary(target)
    if encoding == "binary" and not binary:
        raise InputError(
            f"{target.url} takes no binary tensors over REST",
            hint="Its extensions do not name binary_tensor_data: take --encoding json, or gRPC.",
        )
    return replace(target, binary=binary and encoding != "json")


def _check_amounts(**amounts: float | None) -> None:
    for name, amount in amounts.items():
        if amount is not None and amount <= 0:
            raise InputError(f"--{name.replace('_', '-')} is above 0, not {amount:g}")


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


def show_bench(result: dict[str, Any]) -> None:
    """Prints what a bench found, one load after the other."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if result["payloads"]["distinct"] < _DISTINCT:
        console.print(
            f"Only {result['payloads']['distinct']} different requests: a cache of responses would look fast. "
            f"Give at least {_DISTINCT} samples."
        )
    if (slo := result["slo"]) is not None:
        rate = "no rate" if slo["rate_rps"] is None else f"{slo['rate_rps']:.1f} requests a second"
        console.print(f"{slo['limit']}: {rate}. {slo['reason']}")
    elif result["capacity"] is not None:
        saturation = result["capacity"]["saturation_rps"]
        told = "was not reached by any stage" if saturation is None else f"{saturation:.1f} requests a second"
        ladder = f"; closed-loop maximum at concurrency {result['capacity']['concurrency']}"
        console.print(f"Saturation: {told}{ladder if result['capacity']['ladder'] else ''}")
        for stage in result["capacity"]["stages"]:
            held = "sustained" if stage["sustained"] else "not sustained"
            console.print(f"  {stage['offered_rps']:.1f}/s: {stage['achieved_rps']:.1f}/s came back, {held}")
        for line in result["advice"]["lines"]:
            console.print(line, highlight=False)
    for path in result["pictures"]:
        console.print(f"Picture: {path}", highlight=False, soft_wrap=True)
    for measurement in result["measurements"]:
        table = Table("metric", "value", title=measurement["load"] or "closed loop", title_justify="left")
        for name, fields in measurement["metrics"].items():
            table.add_row(name, text(Estimate(**fields)))
        console.print(table)
        if measurement["invalid_runs"]:
            console.print(f"{measurement['invalid_runs']} invalid runs were left out")
    for one in result["invalid"]:
        for finding in one["findings"]:
            console.print(
                f"invalid: {one['load']}, round {one['round'] + 1}: {finding['gate']} "
                f"{finding['observed']} (limit {finding['limit']})"
            )
