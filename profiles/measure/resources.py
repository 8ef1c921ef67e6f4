"""What a server takes beside time: peak memory, its first request, and where they can be read GPUs and energy.

Energy is the whole GPU's or the whole CPU package's during a window, idle power and other processes included: it is an
estimate, not a reading of a meter in the socket, and n/a where nobody counts it, never zero.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from profiles.deploy.cluster import Usage
from profiles.load.payloads import Payload
from profiles.load.transports import Status, make_transport
from registry.errors import UnreachableError
from registry.records import Estimate, RunRecord, Target

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
_MB = 1e6
_MICROJOULES, _MILLIJOULES = 1e6, 1e3
_CONNECT_S = 5.0

RESOURCES: Mapping[str, tuple[str, str]] = {
    "cpu_s_per_1k": ("cpu_s_per_1k", "s"),
    "rss_mb": ("rss_mb", "MB"),
    "cpu_joules_per_1k": ("cpu_joules_per_1k", "J"),
    "gpu_joules_per_1k": ("gpu_joules_per_1k", "J"),
    "gpu_memory_mb": ("gpu_memory_mb", "MB"),
    "gpu_utilisation": ("gpu_utilisation", "fraction"),
}
"""Metric of a run -> metric over runs, and its unit."""

# --- GPUs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """What the GPUs that some processes use show; None where a GPU does not tell.

    Attributes:
        cards: which GPUs these are.
        memory_mb: device memory of these processes, in MB of 10^6 bytes.
        utilisation: share of the last moments (a sixth of a second to one, by the GPU) in which a kernel ran, 0 to 1,
            whoever's; the mean over the GPUs.
        energy_j: joules that these GPUs have taken since the driver was loaded, whoever used them.
    """

    cards: tuple[int, ...]
    memory_mb: float | None
    utilisation: float | None
    energy_j: float | None


class GpuProbe(Protocol):
    """Looks at GPUs."""

    def read(self, pids: Iterable[int]) -> GpuReading | None:
        """The GPUs that these processes use now; None where they use none that can be seen."""


class NvmlProbe:
    """NVIDIA's GPUs by NVML. Real code that has been tried against a stand-in alone, not on a machine with a GPU.

    Source: NVML's reference, "Device Queries": ``nvmlDeviceGetTotalEnergyConsumption`` (mJ, from Volta on),
    ``nvmlDeviceGetUtilizationRates``, ``nvmlDeviceGetComputeRunningProcesses``.
    """

    def __init__(self, nvml: Any) -> None:
        """Takes the module ``pynvml`` of the package nvidia-ml-py, initialised."""
        self._nvml = nvml
        self._cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]

    @classmethod
    def open(cls) -> Self | None:
        """A probe; None where there is no driver, no library (the extra ``gpu``), or no GPU."""
        try:
            import pynvml
        except ImportError:
            logger.info("nvidia-ml-py is not installed: nothing is measured of GPUs")
            return None
        try:
            pynvml.nvmlInit()
            probe = cls(pynvml)
        except pynvml.NVMLError as error:
            logger.info("nothing is measured of GPUs: %s", error)
            return None
        return probe if probe._cards else None

    def read(self, pids: Iterable[int]) -> GpuReading | None:
        """See `GpuProbe`. In a container whose processes have other numbers outside, none is found."""
        wanted = set(pids)
        used: dict[int, list[int | None]] = {}
        for index, card in enumerate(self._cards):
            running = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, card) or []
            ours = [process.usedGpuMemory for process in running if process.pid in wanted]
            if ours:
                used[index] = ours
        if not used:
            return None
        cards = [self._cards[index] for index in used]
        rates = [self._ask(self._nvml.nvmlDeviceGetUtilizationRates, card) for card in cards]
        energies = [self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption, card) for card in cards]
        memory = _sum(size for sizes in used.values() for size in sizes)
        utilisation = _sum(None if rate is None else float(rate.gpu) for rate in rates)
        energy = _sum(energies)
        return GpuReading(
            cards=tuple(used),
            memory_mb=None if memory is None else memory / _MB,
            utilisation=None if utilisation is None else utilisation / len(cards) / 100,
            energy_j=None if energy is None else energy / _MILLIJOULES,
        )

    def _ask(self, query: Callable[[Any], Any], card: Any) -> Any:
        """What NVML answers; None where this GPU, or this driver, has no such thing."""
        try:
            return query(card)
        except (self._nvml.NVMLError, self._nvml.NVMLLibraryMismatchError) as error:
            logger.debug("NVML: %s", error)
            return None


def _sum(values: Iterable[float | None]) -> float | None:
    """None where any is not known."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


# --- energy of the CPU ---------------------------------------------------------------------------------------------


class PackageEnergy:
    """Joules of all CPU packages by the kernel's powercap interface (RAPL), client and other processes included.

    Only root may read it in most places, and most virtual machines have none.

    Source: the kernel's documentation, "Power Capping Framework": ``energy_uj`` wraps at ``max_energy_range_uj``.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        """Looks for packages; there may be none."""
        # Others named intel-rapl-mmio show the same packages again.
        self._ranges = {
            zone: most
            for zone in sorted(root.glob("intel-rapl:*"))
            if _text(zone / "name").startswith("package") and (most := _number(zone / "max_energy_range_uj"))
        }

    def read(self) -> dict[Path, int] | None:
        """Each package's counter, in microjoules; None where there is none, or it may not be read."""
        counters = {zone: _number(zone / "energy_uj") for zone in self._ranges}
        known = {zone: count for zone, count in counters.items() if count is not None}
        return known if known and len(known) == len(counters) else None

    def joules(self, begin: Mapping[Path, int] | None, end: Mapping[Path, int] | None) -> float | None:
        """Between two readings, no more than one turn of a counter apart; None where one is not known."""
        if begin is None or end is None:
            return None
        used = (
            end[zone] - begin[zone] + (most if end[zone] < begin[zone] else 0) for zone, most in self._ranges.items()
        )
        return sum(used) / _MICROJOULES


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


# --- around a window -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Mark:
    usage: Usage | None
    gpu: GpuReading | None
    package: dict[Path, int] | None


class ResourceMeter:
    """Reads what a server takes at both ends of a window; made for one window, or one that is offered again.

    Its `read` goes where a load generator takes ``usage``.
    """

    def __init__(
        self, usage: Callable[[], Usage | None], *, gpus: GpuProbe | None = None, package: PackageEnergy | None = None
    ) -> None:
        """Reads nothing yet.

        Args:
            usage: of the server.
            gpus: None where there are none.
            package: None where the server is not on this machine, or its energy is not asked for.
        """
        self._usage = usage
        self._gpus = gpus
        self._package = package
        self._marks: list[_Mark] = []

    def read(self) -> Usage | None:
        """The server's usage, as it came; the rest is kept for `completed`.

        Raises:
            ServerDiedError: the server is no more.
        """
        usage = self._usage()
        gpu = self._gpus.read(usage.pids) if self._gpus is not None and usage is not None else None
        package = self._package.read() if self._package is not None else None
        self._marks.append(_Mark(usage, gpu, package))
        return usage

    def completed(self, record: RunRecord) -> RunRecord:
        """The record of the window, with what was seen at its ends; a metric that is not known is left out."""
        if len(self._marks) < 2:
            return record
        # A generator that had to be started anew has read the beginning twice.
        begin, end = self._marks[-2:]
        answered = record.metrics.get("throughput_rps", 0.0) * record.window_s
        energies = {"cpu_joules_per_1k": self._package.joules(begin.package, end.package) if self._package else None}
        found: dict[str, float | None] = {"peak_rss_mb": end.usage.peak_rss_mb if end.usage is not None else None}
        if end.gpu is not None:
            found |= {"gpu_memory_mb": end.gpu.memory_mb, "gpu_utilisation": end.gpu.utilisation}
            energies["gpu_joules_per_1k"] = _gpu_joules(begin.gpu, end.gpu)
        if answered > 0:
            found |= {name: None if joules is None else 1000 * joules / answered for name, joules in energies.items()}
        return replace(
            record, metrics={**record.metrics, **{name: value for name, value in found.items() if value is not None}}
        )


def _gpu_joules(begin: GpuReading | None, end: GpuReading) -> float | None:
    if begin is None or begin.cards != end.cards or begin.energy_j is None or end.energy_j is None:
        return None
    return end.energy_j - begin.energy_j


def peak_over_runs(runs: Iterable[RunRecord]) -> Estimate | None:
    """The highest peak of resident memory that any run saw, in MB; None where none did.

    The kernel keeps the highest value itself, so that it is no sample, and has no interval beyond it.
    """
    peaks = [run.metrics["peak_rss_mb"] for run in runs if "peak_rss_mb" in run.metrics]
    if not peaks:
        return None
    most = max(peaks)
    return Estimate(value=most, low=most, high=most, runs=len(peaks), method="exact", unit="MB")


# --- the first request ---------------------------------------------------------------------------------------------


def first_request_ms(target: Target, payload: Payload, *, timeout_s: float) -> float | None:
    """How long a model that has just become ready takes for its first request, in ms.

    The connection is made before over gRPC, and with it over REST, as a first client of either would find it. None
    where there was no answer: what asks next will say why.
    """
    return asyncio.run(_ask_once(target, payload, timeout_s))


async def _ask_once(target: Target, payload: Payload, timeout_s: float) -> float | None:
    transport = make_transport(target, 1)
    try:
        await transport.open(_CONNECT_S)
        began = time.perf_counter()
        reply = await transport.infer(payload, timeout_s)
        took_ms = 1000 * (time.perf_counter() - began)
    except UnreachableError:
        return None
    finally:
        await transport.close()
    return took_ms if reply.status == Status.OK else None
