"""How long MLflow takes to get a campaign of 40 candidates, 6 curves each; uploads of models apart.

To a real ``mlflow server`` on this machine, on SQLite; then once more with each answer 100 ms late, as over a long
line; then the same campaign again, which is recorded already. Made-up records.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from figures import figure, finish, say

from registry.mlflow_tracking import MlflowTracker
from registry.policy import parse_policy
from registry.records import (
    Artifact,
    ArtifactFile,
    Campaign,
    Candidate,
    Capacity,
    ClosedLoop,
    Comparison,
    EngineSpec,
    Estimate,
    Fidelity,
    Host,
    LoadProfile,
    Measurement,
    OpenLoop,
    RateStage,
    Recipe,
    Round,
    RunRecord,
    ServingProfile,
    Source,
    StageCall,
    TensorSpec,
    Variant,
)
from registry.report.html import render_html
from registry.selection import metric_table, select

CANDIDATES = 40
STAGES = 12
ROUNDS = 9
RATES = (50.0, 100.0, 200.0)
SLOW_S = 0.1
ENGINE = EngineSpec(name="onnxruntime")
READY_WITHIN_S = 90


def estimate(value: float, unit: str) -> Estimate:
    return Estimate(value=value, low=0.97 * value, high=1.03 * value, runs=ROUNDS, method="t over runs", unit=unit)


def variant(number: int) -> Variant:
    file = ArtifactFile(path="model.onnx", sha256=f"{number:064x}", size_bytes=1_000_000)
    return Variant(
        id=f"{number:016x}", name=f"variant-{number}", source="model", source_digest="0" * 64,
        recipe=Recipe(name=f"variant-{number}", engines=(ENGINE,),
                      stages=(StageCall(name="quantize", params={"scheme": "static", "seed": number}),)),
        calibration_digest="c" * 64, seed=0, tool_versions={},
        artifact=Artifact(
            digest=f"{number:064x}", format="onnx", entry="model.onnx", files=(file,),
            inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 2)),),
        ),
    )  # fmt: skip


def candidate(number: int, of: Variant) -> Candidate:
    serving = ServingProfile(server="mlserver", backend="burnish", max_batch_size=8, max_batch_delay_ms=2.0)
    return Candidate(
        id=f"{number:016x}", name=f"{of.name} @ {serving.key}", variant_id=of.id, variant_name=of.name, engine=ENGINE,
        engine_version="1", serving=serving, server_version="1",
    )  # fmt: skip


def run(load: LoadProfile, rate: float) -> RunRecord:
    metrics = {"throughput_rps": rate, "latency_p50_ms": 4.0, "latency_p90_ms": 7.0, "latency_p99_ms": 12.0,
               "rss_mb": 240.0, "cpu_s_per_1k": 2.0, "client_cpu": 0.3}  # fmt: skip
    return RunRecord(load=load, scheduled=1000, ok=1000, errors={}, window_s=5.0, metrics=metrics, findings=(), raw="")


def rounds(one: Candidate, position: int) -> list[Round]:
    closed = LoadProfile(name="closed", load=ClosedLoop(concurrency=8), warmup_s=1.0, duration_s=5.0)
    loads = [LoadProfile(name=f"{rate:g} rps", load=OpenLoop(rate_rps=rate), warmup_s=1.0, duration_s=5.0)
             for rate in RATES]  # fmt: skip
    return [
        Round(candidate_id=one.id, number=number, position=position,
              runs=(run(closed, 400.0 + number), *(run(load, load.load.rate_rps) for load in loads)))
        for number in range(1, ROUNDS + 1)
    ]  # fmt: skip


def capacity(one: Candidate, peak: float) -> Capacity:
    stages = tuple(
        RateStage(offered_rps=peak * step / STAGES, achieved_rps=peak * step / STAGES, latency_p50_ms=3.0 + step,
                  latency_p90_ms=5.0 + 2 * step, sustained=step < STAGES)
        for step in range(1, STAGES + 1)
    )  # fmt: skip
    ladder = tuple((2**step, peak * (1 - 0.5 ** (step + 1))) for step in range(8))
    return Capacity(candidate_id=one.id, concurrency=8, ladder=ladder, stages=stages, saturation_rps=peak)


def measurements(one: Candidate, peak: float) -> list[Measurement]:
    free = {"max_throughput_rps": estimate(peak, "1/s"), "saturation_rps": estimate(0.9 * peak, "1/s"),
            "rss_mb": estimate(240.0, "MB"), "load_time_s": estimate(1.3, "s")}  # fmt: skip
    latencies = {name: estimate(4.0, "ms") for name in ("latency_p50_ms", "latency_p90_ms", "latency_p99_ms")}
    at = [Measurement(candidate_id=one.id, load=f"{rate:g} rps", metrics=latencies) for rate in RATES]
    return [Measurement(candidate_id=one.id, load=None, metrics=free), *at]


def fidelity(of: Variant) -> Fidelity:
    metrics = {name: estimate(0.98, "fraction") for name in ("accuracy", "accuracy_drop", "flip_rate", "cosine")}
    return Fidelity(
        variant_id=of.id, engine=ENGINE, engine_version="1", instruction_set="avx2", batch_size=8,
        samples_digest="a" * 64, samples=2000, task_metric="accuracy", metrics=metrics,
    )  # fmt: skip


def campaign() -> Campaign:
    variants = [variant(number) for number in range(CANDIDATES)]
    served = [candidate(number, one) for number, one in enumerate(variants)]
    peaks = {one.id: 300.0 + 10 * number for number, one in enumerate(served)}
    found = [one for each in served for one in measurements(each, peaks[each.id])]
    fidelities = [fidelity(one) for one in variants]
    comparisons = [
        Comparison(candidate_id=one.id, baseline_id=served[0].id, metric="max_throughput_rps", load=None,
                   ratio=estimate(peaks[one.id] / 300, "1"), noise_floor=0.02, word="faster")
        for one in served[1:]
    ]  # fmt: skip
    verdict = select(
        policy=parse_policy(("latency_p99_ms <= 25 at 100 rps",), ("maximize max_throughput_rps",)),
        candidates=served, variants=variants, metrics=metric_table(served, found, fidelities, variants),
        comparisons=comparisons, failures=[], baseline_id=served[0].id, provisional=False,
    )  # fmt: skip
    host = Host(fingerprint="f" * 16, cpu_model="a CPU", cores=2, memory_mb=24_000, instruction_sets=("avx2",),
                gpus=(), kernel="6", pinning="none")  # fmt: skip
    rendered = {"model-settings.json": '{"name": "model"}\n', "runtime.py": "# made up\n" * 50,
                "manifests/model.yaml": "kind: Model\n" * 20}  # fmt: skip
    return Campaign(
        id="b" * 16, name="sync", model_name="sync", level="standard", seed=0, started_at="2026-01-15T09:30:00+00:00",
        host=host, versions={"burnish": "0.1.0"}, samples_digest="a" * 64, task_metric="accuracy",
        sources=(Source(name="model", kind="onnx", location="model.onnx", digest="0" * 64,
                        artifact=variants[0].artifact),),
        variants=tuple(variants), fidelities=tuple(fidelities), screenings=(), candidates=tuple(served),
        capacities=tuple(capacity(one, peaks[one.id]) for one in served),
        rounds=tuple(one for place, each in enumerate(served) for one in rounds(each, place)),
        measurements=tuple(found), comparisons=tuple(comparisons), failures=(),
        rendered={one.id: rendered for one in served}, artifacts={}, verdict=verdict,
    )  # fmt: skip


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The URL of a server of MLflow's with an empty store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/server.db",
               "--artifacts-destination", f"{folder}/artifacts"]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def wait_for(url: str) -> None:
    last = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < last:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    sys.exit("the MLflow server was not ready in time")


@contextmanager
def late(url: str, delay_s: float) -> Iterator[str]:
    """The URL of a plain relay before the server that holds each way of a request back for half of the delay."""
    host, port = url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def relay(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(delay_s / 2)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, int(port)))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=relay, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def seconds(url: str, made: Campaign, page: Path, work: Path) -> float:
    """How long it takes to publish the campaign."""
    begin = time.perf_counter()
    MlflowTracker(url, work).publish(made, files={"report.html": page})
    return time.perf_counter() - begin


def main() -> None:
    logging.getLogger("registry.mlflow_models").setLevel(logging.ERROR)  # there are no models to upload, as it says
    made = campaign()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = folder / "report.html"
        page.write_text(render_html(made), encoding="utf-8")
        with mlflow_server(folder) as url:
            MlflowTracker(url, folder).check()
            taken = seconds(url, made, page, folder)
            say(f"{CANDIDATES} candidates, {len(made.rounds)} rounds, report of {page.stat().st_size / 1e6:.2f} MB")
            again = seconds(url, made, page, folder)
            with late(url, SLOW_S) as slow:
                other = dataclasses.replace(made, id="d" * 16, model_name="sync-late")
                slowly = seconds(slow, other, page, folder)
    say(f"the same campaign again: {again:.1f} s")
    finish(
        figure("mlflow_sync_s", taken, "<= 20.0"),
        figure("mlflow_sync_late_s", slowly, "<= 30.0"),
    )


if __name__ == "__main__":
    main()
