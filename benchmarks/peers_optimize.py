"""Our best variant beside Olive's best and nncf's by hand: same models, same samples, each in its own environment.

Every model file is run by ``peers/run_model.py`` with the Python of whoever made it, in a process of its own on one
CPU with one thread; all files take a turn in each round, in a new order, and ours takes two, so that the spread of
the same thing twice is seen. A file counts where the upper end of the accuracy it loses is at most 0.01. What is
compared is their time over ours, in pairs of one round, with the interval of the mean log-ratio at 95 %: against Olive
the figure is its lower end (above 1, ours is certainly faster), against nncf its upper end (below 1, ours would
certainly be slower).

Olive's passes are those for ONNX Runtime on a CPU. The environments are made once, in ``burnish-work-peers``.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
from figures import figure, finish, say
from tasks import BATCH_SIZES, HERE, Task, leave_without_vnni, minilm, resnet18
from variants import MOST_LOST, accurate, judged

from optimize.fidelity import compare_outputs
from optimize.judging import Judged
from optimize.metrics import find_metric
from optimize.samples import load_samples
from profiles.measure.compare import compare_pairs
from profiles.measure.host import split_cpus
from registry.records import Estimate
from registry.store import FolderStore

PEERS, WORK = HERE / "peers", HERE / "burnish-work-peers"
ENVIRONMENTS = {
    "olive": ["olive-ai==0.13.0", "onnxruntime==1.31.1", "requests", "numpy"],
    "nncf": ["openvino==2026.4.1", "nncf==3.4.0", "numpy"],
}
ROUNDS, BUDGET_S = 7, 2.0
File = tuple[str, str, Path]  # python, engine, model


def environment(name: str) -> str:
    """The Python of a peer's environment, made where it is missing."""
    folder = WORK / f"env-{name}"
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        say(f"installing {name}: {', '.join(ENVIRONMENTS[name])}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *ENVIRONMENTS[name]], check=True)
        done.touch()
    return str(python)


def theirs(task: Task, model: Path) -> dict[str, list[File]]:
    """The model files of each peer."""
    calibration = str(task.base / task.calibration)
    olive, nncf = environment("olive"), environment("nncf")
    out = WORK / task.name
    if not (out / "olive").exists():
        subprocess.run(
            [olive, str(PEERS / "olive_quantize.py"), str(model), calibration, str(out / "olive")],
            check=True, env={"PATH": "/usr/bin:/bin", "HOME": str(WORK), "OLIVE_DISABLE_TELEMETRY": "1"},
        )  # fmt: skip
    if not (out / "nncf" / "model.xml").exists():
        kind = "transformer" if task.name == "minilm" else "none"
        command = [nncf, str(PEERS / "nncf_quantize.py"), str(model), calibration, str(out / "nncf"), kind]
        subprocess.run(command, check=True, env={"PATH": "/usr/bin:/bin", "HOME": str(WORK), "CI": "true"})
    return {
        "olive": [(olive, "onnxruntime", path) for path in sorted((out / "olive").glob("*/model.onnx"))],
        "nncf": [(nncf, "openvino", out / "nncf" / "model.xml")],
    }


def lost(task: Task, file: File, baseline: dict[str, np.ndarray]) -> float:
    """The upper end of the accuracy that a peer's file loses."""
    python, engine, path = file
    out = path.parent / "answers.npz"
    samples = task.base / task.evaluation
    if not out.exists():
        command = [python, str(PEERS / "run_model.py"), engine, str(path), str(samples), "answer", str(out)]
        subprocess.run(command, check=True)
    with np.load(out) as archive:
        answers = {next(iter(baseline)): archive["output"]}
    labels = load_samples(samples).labels
    found = compare_outputs(baseline, answers, labels, find_metric(task.metric), parity=False)
    high = found["accuracy_drop"].high
    return 1.0 if high is None else high


def times(task: Task, file: File) -> dict[int, float]:
    """The time of a batch in ms, by batch size."""
    python, engine, path = file
    done = subprocess.run(
        [python, str(PEERS / "run_model.py"), engine, str(path), str(task.base / task.evaluation), "time",
         str(split_cpus()[0][0]), str(BUDGET_S), *map(str, BATCH_SIZES)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {int(size): found for size, found in json.loads(done.stdout.splitlines()[-1]).items()}


def ours(task: Task) -> tuple[list[File], Path, dict[str, np.ndarray]]:
    """Our accurate variants as files, the float32 model that peers start from, and its answers."""
    (baseline, *others), store = judged(task)

    def entry(one: Judged, store: FolderStore = store) -> Path:
        return store.path(one.variant.artifact) / one.variant.artifact.entry

    # The engine's default precision is what a plain session takes, so a variant held to float32 is left out.
    fit = [
        one
        for one in others
        if all(accurate(one, size) for size in BATCH_SIZES)
        and (one.engine.name == "onnxruntime" or one.engine.precision == "default")
    ]
    with np.load(next(iter(baseline.answers.values()))) as archive:
        answers = {name: archive[name] for name in archive.files}
    return [(sys.executable, one.engine.name, entry(one)) for one in fit], entry(baseline), answers


def compared(task: Task) -> dict[tuple[str, int], Estimate]:
    """By peer and batch size, how many times faster ours is than the peer's best."""
    mine, model, answers = ours(task)
    entries: dict[str, list[File]] = {"ours": mine}
    for peer, files in theirs(task, model).items():
        entries[peer] = []
        for file in files:
            drop = lost(task, file, answers)
            say(f"{task.name}: {peer} {file[2].parent.name} loses at most {drop:.4f}")
            entries[peer] += [file] if drop <= MOST_LOST else []
    names = [(who, file) for who, files in entries.items() for file in files]
    # The fastest of each, by one look at all; then rounds among those alone.
    look = [(who, file, times(task, file)) for who, file in names]
    found: dict[tuple[str, int], Estimate] = {}
    order = random.Random(0)
    for size in BATCH_SIZES:
        best = {who: min((t[size], f) for w, f, t in look if w == who)[1] for who in entries if entries[who]}
        slots = [*best.items(), ("ours again", best["ours"])]
        rounds = []
        for _ in range(ROUNDS):
            order.shuffle(slots)
            rounds.append({who: times(task, file)[size] for who, file in slots})
        for who in (*entries, "ours again"):
            ratio = compare_pairs(
                [(one[who], one["ours"]) for one in rounds],
                candidate_id=who, baseline_id="ours", metric="inprocess_ms", load=None,
            ).ratio  # fmt: skip
            found[who, size] = ratio
            say(f"{task.name}, batch {size}: {who} ({best.get(who, best['ours'])[2].parent.name[:24]}) "
                f"{median(one[who] for one in rounds):.2f} ms, {ratio.value:.3f} of ours "
                f"[{ratio.low:.3f}, {ratio.high:.3f}]")  # fmt: skip
    return found


def main() -> None:
    leave_without_vnni()
    met = []
    for task in (resnet18(), minilm()):
        found = compared(task)
        for size in BATCH_SIZES:
            name = f"{task.name}_batch_{size}_over"
            met.append(figure(f"{name}_olive_low", found["olive", size].low or 0.0, "> 1.0"))
            met.append(figure(f"{name}_nncf_high", found["nncf", size].high or 0.0, ">= 1.0"))
    finish(*met)


if __name__ == "__main__":
    main()
