"""A double of NVML: the functions of the module ``pynvml`` that the probe calls, over GPUs that are not there."""

from dataclasses import dataclass, field


class FakeNvmlError(Exception):
    """As ``pynvml.NVMLError``: this GPU has no such thing."""


class FakeMismatchError(Exception):
    """As ``pynvml.NVMLLibraryMismatchError``: the driver is too old for this query."""


@dataclass
class FakeProcess:
    pid: int
    usedGpuMemory: int | None


@dataclass
class FakeRates:
    gpu: int


@dataclass
class FakeGpu:
    processes: list[FakeProcess] | None = field(default_factory=list)
    utilisation: int = 0
    energy_mj: int | None = 0


@dataclass
class FakeNvml:
    gpus: list[FakeGpu]
    NVMLError = FakeNvmlError
    NVMLLibraryMismatchError = FakeMismatchError

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[FakeProcess]:
        if gpu.processes is None:
            raise FakeMismatchError
        return gpu.processes

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> FakeRates:
        return FakeRates(gpu.utilisation)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGpu) -> int:
        if gpu.energy_mj is None:
            raise FakeNvmlError("Not Supported")
        return gpu.energy_mj
