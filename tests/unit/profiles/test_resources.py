"""Resources of a server, from counters of this machine and of GPUs that are not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from profiles.deploy.cluster import Usage
from profiles.deploy.local_process import peak_rss_bytes, watch_process
from profiles.load.payloads import encode_payloads
from profiles.measure.resources import NvmlProbe, PackageEnergy, ResourceMeter, first_request_ms, peak_over_runs
from profiles.testing import FakeV2Server, Fixed
from registry.errors import InputError, ServerDiedError
from registry.records import ClosedLoop, LoadProfile, RunRecord, Target
from tests.doubles.busy import LONG_S
from tests.doubles.gpus import FakeGpu, FakeNvml, FakeProcess

PROFILE = LoadProfile(name="closed", load=ClosedLoop(concurrency=1), warmup_s=0.0, duration_s=2.0)


def run(**metrics: float) -> RunRecord:
    return RunRecord(
        load=PROFILE, scheduled=500, ok=500, errors={}, window_s=2.0, metrics=metrics, findings=(), raw="r.npz"
    )


def test_the_peak_of_this_process_is_no_less_than_what_it_has_now() -> None:
    import psutil

    peak = peak_rss_bytes(os.getpid())
    assert peak is not None
    assert peak >= psutil.Process().memory_info().rss * 0.9
    assert peak_rss_bytes(2**30) is None


def test_a_process_of_somebody_elses_is_watched_with_its_children() -> None:
    child = "import time; print(1, flush=True); time.sleep(200)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # its child is there
        use = watch_process(process.pid)
        found = use()
        assert found.pids[0] == process.pid
        assert len(found.pids) == 2
        assert found.rss_mb is not None
        assert found.peak_rss_mb is not None
        assert found.peak_rss_mb >= 0.9 * found.rss_mb > 1
        os.killpg(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is listed all the same
        with pytest.raises(ServerDiedError, match=f"process {process.pid} has ended"):
            use()
    with pytest.raises(InputError, match=f"the process {process.pid} is not there"):
        watch_process(process.pid)
    with pytest.raises(InputError, match="is not there"):
        watch_process(-1)


def test_gpus_of_other_processes_do_not_count() -> None:
    mine, others = FakeGpu([FakeProcess(7, 500_000_000), FakeProcess(9, 1)], 40, 5000), FakeGpu([FakeProcess(9, 1)])
    reading = NvmlProbe(FakeNvml([others, mine])).read([7, 8])
    assert reading is not None
    assert (reading.cards, reading.memory_mb, reading.utilisation, reading.energy_j) == ((1,), 500.0, 0.4, 5.0)
    assert NvmlProbe(FakeNvml([others, mine])).read([1]) is None
    assert NvmlProbe(FakeNvml([FakeGpu(processes=None)])).read([7]) is None


def test_two_gpus_add_up_and_what_one_does_not_tell_is_not_known() -> None:
    first, second = FakeGpu([FakeProcess(7, 10_000_000)], 100, 5000), FakeGpu([FakeProcess(7, None)], 50, None)
    reading = NvmlProbe(FakeNvml([first, second])).read([7])
    assert reading is not None
    assert (reading.memory_mb, reading.utilisation, reading.energy_j) == (None, 0.75, None)


def test_a_machine_without_a_gpu_has_no_probe() -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert NvmlProbe.open() is None
    else:
        pytest.skip("this machine has NVIDIA's driver")


def package(root: Path, name: str, zone: str, *, used: int | None, most: int = 1000) -> None:
    folder = root / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    if used is not None:
        (folder / "energy_uj").write_text(f"{used}\n")


def test_energy_of_packages_adds_up_over_a_wrapped_counter(tmp_path: Path) -> None:
    package(tmp_path, "package-0", "intel-rapl:0", used=900)
    package(tmp_path, "package-1", "intel-rapl:1", used=100)
    package(tmp_path, "dram", "intel-rapl:0:1", used=5)
    package(tmp_path, "psys", "intel-rapl:2", used=5)
    package(tmp_path, "package-0", "intel-rapl-mmio:0", used=900)
    energy = PackageEnergy(tmp_path)
    begin = energy.read()
    package(tmp_path, "package-0", "intel-rapl:0", used=100)
    package(tmp_path, "package-1", "intel-rapl:1", used=150)
    package(tmp_path, "package-0", "intel-rapl-mmio:0", used=100)
    assert energy.joules(begin, energy.read()) == pytest.approx(250e-6)


def test_energy_that_may_not_be_read_is_not_known_rather_than_zero(tmp_path: Path) -> None:
    package(tmp_path, "package-0", "intel-rapl:0", used=None)
    package(tmp_path, "package-1", "intel-rapl:1", used=10)
    energy = PackageEnergy(tmp_path)
    assert energy.read() is None
    assert energy.joules(energy.read(), energy.read()) is None
    assert PackageEnergy(tmp_path / "none").read() is None


def test_a_window_is_given_its_energy_and_memory(tmp_path: Path) -> None:
    gpu = FakeGpu([FakeProcess(7, 2_000_000)], 40, 5000)
    package(tmp_path, "package-0", "intel-rapl:0", used=0, most=10**9)
    usages = iter([Usage(cpu_s=1.0, rss_mb=50.0, peak_rss_mb=70.0 + n, pids=(7,)) for n in range(3)])
    meter = ResourceMeter(lambda: next(usages), gpus=NvmlProbe(FakeNvml([gpu])), package=PackageEnergy(tmp_path))
    meter.read()  # of a window that broke off
    meter.read()
    gpu.energy_mj = 6000
    package(tmp_path, "package-0", "intel-rapl:0", used=3_000_000, most=10**9)
    meter.read()
    record = meter.completed(run(throughput_rps=250.0, rss_mb=50.0))
    assert record.metrics == pytest.approx(
        {
            "throughput_rps": 250.0,
            "rss_mb": 50.0,
            "peak_rss_mb": 72.0,
            "gpu_memory_mb": 2.0,
            "gpu_utilisation": 0.4,
            "cpu_joules_per_1k": 6.0,
            "gpu_joules_per_1k": 2.0,
        }
    )


def test_a_server_that_cannot_be_looked_at_adds_nothing() -> None:
    meter = ResourceMeter(lambda: None, gpus=NvmlProbe(FakeNvml([FakeGpu()])))
    meter.read()
    meter.read()
    assert meter.completed(run(throughput_rps=1.0)).metrics == {"throughput_rps": 1.0}


def test_the_highest_peak_counts() -> None:
    peak = peak_over_runs([run(peak_rss_mb=70.0), run(), run(peak_rss_mb=90.0)])
    assert peak is not None
    assert (peak.low, peak.value, peak.high, peak.runs) == (90.0, 90.0, 90.0, 2)
    assert peak_over_runs([run()]) is None


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_the_first_request_is_timed(protocol: str) -> None:
    import numpy as np

    inputs = {"x": np.zeros((4, 16), dtype=np.float32)}
    with FakeV2Server(Fixed(0.05)) as server:
        target = server.target(protocol)  # type: ignore[arg-type]
        took_ms = first_request_ms(target, encode_payloads(inputs, target=target, seed=0)[0], timeout_s=LONG_S)
        assert took_ms is not None
        assert took_ms >= 50
        gone = Target(url=target.url, protocol=target.protocol, model="another", binary=target.binary)
        assert first_request_ms(gone, encode_payloads(inputs, target=gone, seed=0)[0], timeout_s=LONG_S) is None
    assert first_request_ms(target, encode_payloads(inputs, target=target, seed=0)[0], timeout_s=LONG_S) is None
