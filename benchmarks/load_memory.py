"""Memory of a measured window, by its number of requests.

A closed loop on the null server, for 3 s and for 30 s (up to 60,000 and 600,000 requests on 2 cores), each twice, one
window after the other, in fresh processes: an allocator keeps more of the first window for the second. Memory is the
most that the process that asks for the windows and the generator's process have resident at any one time, both
together, looked at every 2 ms (Linux). The figure a protocol is what each further request of a window added to it, in
bytes. Beside it stands the most that each of the two ever had by itself (VmHWM).
"""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
from figures import figure, finish, say

from profiles.load.ceiling import null_server
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads
from profiles.measure.host import split_cpus
from registry.records import ClosedLoop, LoadProfile, Target

SHORT_S, LONG_S = 3.0, 30.0
WINDOWS = 2
CONCURRENCY = 16
PROTOCOLS = ("grpc", "rest")


LOOK_S = 0.002


def memory_bytes(pid: int | str, field: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


class Watch(threading.Thread):
    """Sees how much this process and those of a generator have resident together, at most."""

    def __init__(self, generator: LoadGenerator) -> None:
        super().__init__(daemon=True)
        self._generator = generator
        self._ended = threading.Event()
        self.most = 0

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.most = max(self.most, sum(memory_bytes(pid, "VmRSS") for pid in ("self", *self._generator.pids)))

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.most


def windows(protocol: str, duration_s: float) -> None:
    """Prints the requests of the larger window and the memory that both took, in bytes."""
    servers, clients, _ = split_cpus()
    samples = np.random.default_rng(0).standard_normal((64, 16), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder, null_server(servers) as ports:
        target = Target(url=ports[protocol], protocol=protocol, model="null", binary=True)
        payloads = encode_payloads({"x": samples}, target=target)
        load = ClosedLoop(concurrency=CONCURRENCY)
        profile = LoadProfile(name="memory", load=load, warmup_s=0.5, duration_s=duration_s)
        with LoadGenerator(clients, Path(folder)) as generator:
            watch = Watch(generator)
            watch.start()
            raw = Path(folder) / "window.npz"
            records = [generator.run(target, payloads, profile, raw_path=raw) for _ in range(WINDOWS)]
            most = watch.end()
            peaks = [memory_bytes(pid, "VmHWM") for pid in ("self", *generator.pids)]
    sys.stdout.write(f"{max(record.scheduled for record in records)} {most} {' '.join(map(str, peaks))}\n")


def measured(protocol: str, duration_s: float) -> tuple[int, int]:
    command = [sys.executable, __file__, protocol, str(duration_s)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    requests, total, asking, offering = map(int, done.stdout.split())
    each = f"{asking / 1e6:.1f} MB where it is asked for, {offering / 1e6:.1f} MB where it is offered"
    say(f"{protocol}: {requests} requests: {total / 1e6:.1f} MB together, {each}")
    return requests, total


def main() -> None:
    met = []
    for protocol in PROTOCOLS:
        (few, least), (many, most) = (measured(protocol, duration_s) for duration_s in (SHORT_S, LONG_S))
        met.append(figure(f"load_memory.{protocol}.bytes_a_request", (most - least) / (many - few), "<= 32"))
    finish(*met)


if __name__ == "__main__":
    windows(sys.argv[1], float(sys.argv[2])) if sys.argv[1:] else main()
