"""A campaign killed with SIGKILL at ten moments spread over its length, and started again each time.

After each kill: no server lives on. After each resumption: what was committed before the kill is still there byte for
byte, nothing was made or measured twice, and the verdict is that of the undisturbed campaign wherever the winner's
margin is above the noise floor.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from figures import figure, finish, say

from registry import codec
from registry.records import Campaign

MOMENTS = 10
VARIANTS = "[float32, int8-static, openvino]"
# Shorter than level quick: what is asked is whether work is lost, not how fast a variant is.
LEVELS = """
levels:
  - name: short
    provisional: true
    screen_s: 0.3
    served: 2
    rounds: 3
    reruns: 1
    a_a: true
    warmup_s: 0.2
    closed_s: 0.5
    open_s: 0.6
    longest_s: 2.0
    requests: 100
    percentiles: [50, 90]
    ladder: [1, 4, 8]
    ladder_s: 0.3
    stages: [0.5, 0.7, 0.9]
    stage_s: 0.4
    timeout_s: 5.0
"""
BURNISH = str(Path(sys.executable).with_name("burnish"))


def lay_out(folder: Path) -> Path:
    """The demo's campaign with fewer variants, one server and short windows, from an ONNX file: nothing is trained."""
    text = (folder / "demo" / "campaign.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    source = "    onnx: " + str(folder / "float32" / "model.onnx")
    lines = [source if line.strip().startswith("torch:") else line for line in lines]
    lines = [f"variants: {VARIANTS}" if line.startswith("variants:") else line for line in lines]
    lines = ["level: short\nlevels: levels.yaml" if line.startswith("level:") else line for line in lines]
    # One server; and no limit on latency, so that there is a verdict to compare on a busy machine, too.
    lines = [line for line in lines if "server: triton" not in line and "latency_p90_ms" not in line]
    (folder / "demo" / "levels.yaml").write_text(LEVELS, encoding="utf-8")
    path = folder / "demo" / "small.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def start(campaign: Path, work: Path) -> "subprocess.Popen[bytes]":
    log = (work.parent / f"{work.name}.log").open("ab")
    return subprocess.Popen([BURNISH, "run", str(campaign), "--work", str(work)], stdout=log, stderr=log)


def committed(work: Path) -> bytes:
    """The complete lines of the ledger."""
    path = work / "ledger.jsonl"
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1]


def left_running(work: Path) -> list[str]:
    """Processes that still have to do with the working folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        words = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if process.pid != os.getpid() and any(str(work) in word for word in words):
            found.append(f"{process.pid} {' '.join(words)[:120]}")
    return found


def wait_for_quiet(work: Path, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := left_running(work)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def units(work: Path) -> dict[str, int]:
    """How often each unit of work was done: a made variant, a judgement, a candidate in one round."""
    counts: dict[str, int] = {}
    for entry in map(json.loads, committed(work).splitlines()):
        parts = entry["components"]
        details = [str(parts[name]) for name in ("round", "again", "batch_size") if name in parts]
        unit = " ".join([entry["kind"], entry["subject"], *details])
        counts[unit] = counts.get(unit, 0) + 1
    return counts


def verdict(work: Path) -> tuple[str | None, float, float]:
    """The winner's variant, its margin over the best of another variant in the objective, and the noise floor."""
    campaign: Campaign = codec.loads((work / "campaign.json").read_text(encoding="utf-8"))
    variants = {candidate.id: candidate.variant_name for candidate in campaign.candidates}
    rates = {
        m.candidate_id: m.metrics["max_throughput_rps"].value
        for m in campaign.measurements
        if "max_throughput_rps" in m.metrics
    }
    selected = campaign.verdict.selected
    if selected is None:
        return None, 0.0, 0.0
    others = [rate for id_, rate in rates.items() if variants[id_] != variants[selected]]
    floor = max((c.noise_floor for c in campaign.comparisons if c.metric == "max_throughput_rps"), default=0.0)
    return variants[selected], rates[selected] / max(others, default=1e-9) - 1, floor


def trial(campaign: Path, work: Path, moment_s: float) -> dict[str, object]:
    process = start(campaign, work)
    try:
        process.wait(moment_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = committed(work)
    left = wait_for_quiet(work, 15)
    again = start(campaign, work)
    code = again.wait(900)
    after = committed(work)
    return {
        "killed_at_s": round(moment_s, 1),
        "code": code,
        "committed_before": len(before.splitlines()),
        "kept": after.startswith(before),
        "twice": [unit for unit, count in units(work).items() if count > 1],
        "units": len(units(work)),
        "left": left + wait_for_quiet(work, 15),
        "verdict": verdict(work),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="burnish-kill-") as name:
        folder = Path(name)
        prepare = "import sys; from pathlib import Path; from optimize.demo.prepare import prepare_demo; "
        subprocess.run(
            [sys.executable, "-c", prepare + "prepare_demo(Path(sys.argv[1]))", str(folder / "demo")], check=True
        )
        make = [BURNISH, "make", str(folder / "demo" / "campaign.yaml"), "--variant", "float32", "--out", str(folder)]
        subprocess.run(make, check=True)
        campaign = lay_out(folder)
        begin = time.monotonic()
        if code := start(campaign, folder / "undisturbed").wait(900):
            sys.stdout.write((folder / "undisturbed.log").read_text())
            sys.exit(f"the undisturbed campaign ended with {code}")
        length_s = time.monotonic() - begin
        winner, margin, floor = verdict(folder / "undisturbed")
        wanted = len(units(folder / "undisturbed"))
        say(f"undisturbed: {length_s:.1f} s, {wanted} units; {winner} wins by {margin:.0%}, noise floor {floor:.0%}")
        good = 0
        for number in range(MOMENTS):
            moment_s = length_s * (number + 0.5) / MOMENTS
            outcome = trial(campaign, folder / f"killed-{number}", moment_s)
            say(json.dumps(outcome))
            its_winner, its_margin, its_floor = outcome["verdict"]  # type: ignore[misc]
            # Another winner is a fault only where the margin is above the noise.
            same = its_winner == winner or min(margin, its_margin) <= max(floor, its_floor)
            whole = outcome["units"] == wanted and not outcome["twice"] and outcome["kept"]
            clean = whole and not outcome["left"] and outcome["code"] == 0
            good += bool(clean and same)
        finish(figure("kill_resume_clean", good, f">= {MOMENTS}"))


if __name__ == "__main__":
    main()
