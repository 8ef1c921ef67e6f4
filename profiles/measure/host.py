"""What this machine is, and how its CPUs are shared between server and client."""

import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

from profiles.load.priority import may_go_first
from registry.codec import digest
from registry.records import Host

logger = logging.getLogger(__name__)

# The sets that inference engines choose kernels by, from narrow to wide; those of ARM after those of x86.
INSTRUCTION_SETS = (
    "sse4_2", "f16c", "avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_int8", "amx_bf16", "neon", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
# Those that sum products of u8 and s8 in 32 bits, so that int8 pays and U8S8 cannot saturate.
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
# Flags of /proc/cpuinfo that other kernels or CPUs spell differently.
_SPELLINGS = {"asimd": "neon", "amx-tile": "amx_tile"}


def fingerprint_host(pinning: str) -> Host:
    """This machine, as far as it decides how fast a model runs.

    Args:
        pinning: how CPUs were shared, as `split_cpus` says it; part of the fingerprint.
    """
    processors = _cpuinfo()
    cpu_model = processors.get("model name") or processors.get("CPU part") or platform.processor() or "unknown"
    facts = {
        "cpu_model": cpu_model,
        "cores": len(_usable()),
        "memory_mb": _memory_mb(),
        "instruction_sets": _instruction_sets(processors),
        "gpus": _gpus(),
        "kernel": platform.release(),
        "pinning": pinning,
    }
    # Free memory and the kernel's build do not make two machines differ in speed; what is left does.
    deciding = {**facts, "memory_mb": round(facts["memory_mb"] / 1000), "kernel": platform.system()}  # type: ignore[operator]
    return Host(fingerprint=digest(deciding), **facts)  # type: ignore[arg-type]


def widest_instruction_set(host: Host) -> str:
    """The widest set that engines can use on the host, or ``none``."""
    return max(host.instruction_sets, key=INSTRUCTION_SETS.index, default="none")


def split_cpus() -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """(the server's CPUs, the client's CPUs, one sentence on it), disjoint where there are two or more.

    The client's event loop uses one core; a second one is for the threads of gRPC, where there are cores to spare.
    Only CPUs that this process may use are given out. The sentence also says whether the client is woken before
    others, so that numbers taken with and without never share a fingerprint.
    """
    usable = _usable()
    turn = "the client is woken first" if may_go_first() else "the client is not woken first"
    if len(usable) == 1:
        return usable, usable, f"server and client share the only CPU; {turn}"
    spare = 2 if len(usable) >= 8 else 1
    server, client = usable[:-spare], usable[-spare:]
    places = f"server on {_count(server)} ({_span(server)}), client on {_count(client)} ({_span(client)})"
    return server, client, f"{places}; {turn}"


def _usable() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _count(cpus: tuple[int, ...]) -> str:
    return "1 CPU" if len(cpus) == 1 else f"{len(cpus)} CPUs"


def _span(cpus: tuple[int, ...]) -> str:
    contiguous = len(cpus) > 1 and cpus[-1] - cpus[0] == len(cpus) - 1
    return f"{cpus[0]}-{cpus[-1]}" if contiguous else ",".join(map(str, cpus))


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; nothing where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _instruction_sets(processor: dict[str, str]) -> tuple[str, ...]:
    flags = (processor.get("flags") or processor.get("Features") or "").split()
    known = {_SPELLINGS.get(flag, flag) for flag in flags}
    return tuple(name for name in INSTRUCTION_SETS if name in known)


def _memory_mb() -> int:
    """Memory of the machine, or of its container where that has less, in MB of 10^6 bytes."""
    import psutil

    sizes = [psutil.virtual_memory().total]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue  # not this version of cgroups, or no limit
    return int(min(sizes) // 1_000_000)


def _gpus() -> tuple[str, ...]:
    """Names of NVIDIA GPUs by nvidia-smi; empty where it is missing or fails. Not exercised on a machine with one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    try:
        listing = subprocess.run(
            [command, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi is there but fails, so GPUs are not counted: %s", error)
        return ()
    return tuple(line.strip() for line in listing.stdout.splitlines() if line.strip())
