"""What this host has, and what burnish will use of it."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from optimize.cluster_config import load_cluster
from optimize.clusters import open_file
from optimize.packages import PackageNotFoundError, version
from optimize.stages import broken_stages
from profiles.deploy.local import available_servers
from profiles.measure.host import VNNI, fingerprint_host, split_cpus
from registry.errors import BurnishError
from registry.tracking import open_tracker, redact

_ENGINES = {"onnxruntime": None, "openvino": "openvino", "torch": "torch", "optimum": "hf", "nncf": "openvino"}


def diagnose(cluster: Path | None = None) -> dict[str, dict[str, str]]:
    """Findings by section: the host, engines, servers, tracking, and what is made of them. Nothing is changed.

    Args:
        cluster: a file that names a Core 2, see `optimize.cluster_config.ClusterFile`, to ask whether it is ready.

    Raises:
        DocumentError: that file does not fit.
    """
    server_cpus, client_cpus, pinning = split_cpus()
    host = fingerprint_host(pinning)
    broken = broken_stages()
    return {
        "host": {
            "cpu": host.cpu_model,
            "cores": str(host.cores),
            "memory": f"{host.memory_mb} MB",
            "instructions": ", ".join(host.instruction_sets) or "none that engines make use of",
            "gpu": ", ".join(host.gpus) or "none: paths for GPUs are there, and not exercised here",
            "fingerprint": host.fingerprint,
        },
        "engines and tools": {name: _installed(name, extra) for name, extra in _ENGINES.items()},
        "servers": {name: found.version or f"no: {found.reason}" for name, found in available_servers().items()},
        **({} if cluster is None else {"cluster": _cluster(cluster)}),
        **({"plug-ins that do not load": dict(broken)} if broken else {}),
        "tracking": {"mlflow": _installed("mlflow", None), "store": _tracking()},
        "burnish will": {
            "pin servers to": f"CPU {', '.join(map(str, server_cpus))}",
            "pin load to": f"CPU {', '.join(map(str, client_cpus))}",
            "compute int8 by": _int8(host.instruction_sets),
            "compute bfloat16": _bfloat16(host.instruction_sets),
        },
    }


def _cluster(file: Path) -> dict[str, str]:
    config = load_cluster(file)
    try:
        with (
            TemporaryDirectory(prefix="burnish-doctor-") as work,
            open_file(file, work=Path(work), purpose="doctor") as site,
        ):
            site.check(())
            versions = {server: site.server_version(server) for server in ("mlserver", "triton")}
            return {"where": site.location or "this machine", "candidates": "can be deployed", **versions}
    except BurnishError as error:
        return {"kind": config.kind, "candidates": f"cannot be deployed: {error.message}"}


def _installed(name: str, extra: str | None) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"not installed: pip install 'burnish[{extra}]'" if extra else "not installed"


def _tracking() -> str:
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if not named:
        return "SQLite in each campaign's working folder (MLFLOW_TRACKING_URI names another)"
    if (database := _sqlite_file(named)) is not None and not database.exists():
        return f"{redact(named)} will be created"
    try:
        open_tracker(named, Path()).check()
    except BurnishError as error:
        return f"unreachable: {error.message}"
    return f"{redact(named)} answers"


def _sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store, which may not be there yet; None for stores of other kinds."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return None
    # sqlite:///name is relative and sqlite:////name absolute, as SQLAlchemy has it.
    return Path(parts.path[1:]) if parts.scheme == "sqlite" and len(parts.path) > 1 else None


def _int8(instruction_sets: tuple[str, ...]) -> str:
    if VNNI.intersection(instruction_sets):
        return "VNNI instructions: U8S8 static quantization pays"
    return "plain SIMD: int8 gains little here, and U8S8 may saturate (no VNNI)"


def _bfloat16(instruction_sets: tuple[str, ...]) -> str:
    if {"avx512_bf16", "amx_bf16"} & set(instruction_sets):
        return "in OpenVINO by default: the CPU has it"
    return "nowhere: the CPU has no bfloat16 instructions"
