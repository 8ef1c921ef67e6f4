"""The best variant of each model against float32 in ONNX Runtime: same threads, in process, paired rounds.

Each timing runs in a process of its own on one CPU, baseline and candidates in a new order each round; the figure is
the median over rounds of the ratio within a round. A candidate counts where the upper end of the accuracy it loses is
at most 0.01. Without VNNI int8 gains little, and the figures do not apply.
"""

import random
from statistics import median

from figures import figure, finish, say
from tasks import BATCH_SIZES, HERE, Task, leave_without_vnni, minilm, resnet18

from optimize.campaign import judge_campaign
from optimize.cli.output import progress
from optimize.judging import Judged
from optimize.screening import screen_variant
from profiles.measure.host import split_cpus
from registry.store import FolderStore

ROUNDS, CANDIDATES, BUDGET_S = 5, 3, 3.0
MOST_LOST = 0.01
GOALS = {"resnet18": {1: 3.3, 32: 3.3}, "minilm": {1: 2.3, 32: 3.0}}
PRUNED = {"name": "prune.structured", "sparsity": 0.25, "fine_tune": "resnet18:fine_tune"}
VARIANTS = {
    "resnet18": [
        "float32",
        "int8-static",
        "openvino-int8",
        {"name": "pruned-int8-static", "stages": [PRUNED, "quantize.static"]},
        {"name": "pruned-openvino-int8", "stages": [PRUNED, "convert.openvino", "quantize.openvino"]},
    ],
    "minilm": ["float32", "int8-dynamic", "fused-int8-dynamic", "int8-static", "openvino-int8"],
}


def judged(task: Task) -> tuple[list[Judged], FolderStore]:
    """Every variant of the task, made, judged and timed once."""
    work = HERE / f"burnish-work-{task.name}"
    with progress() as observer:
        prepared = judge_campaign(task.config(VARIANTS[task.name]), base=task.base, work=work, observer=observer)
    for failure in prepared.failures:
        say(f"{task.name}: {failure.subject} is out: {failure.reason}")
    return prepared.judged, FolderStore(work)


def accurate(one: Judged, size: int) -> bool:
    """Whether the accuracy lost at this batch size is at most 0.01, at the pessimistic end."""
    fidelity = one.fidelities.get(size) or next(iter(one.fidelities.values()))
    high = fidelity.metrics["accuracy_drop"].high
    return high is not None and high <= MOST_LOST


def ms(one: Judged, task: Task, store: FolderStore) -> dict[int, float]:
    """The time of a batch in ms, by batch size, in a process of its own."""
    found = screen_variant(
        one.variant.id,
        store.path(one.variant.artifact) / one.variant.artifact.entry,
        one.engine,
        samples=task.base / task.evaluation,
        batch_sizes=BATCH_SIZES,
        threads=1,
        budget_s=BUDGET_S,
        cpus=split_cpus()[0],
    )
    return {size: found.metrics[f"inprocess_ms.batch_{size}"].value for size in BATCH_SIZES}


def best_ratios(task: Task) -> dict[int, float]:
    """By batch size, how many times faster than float32 the best accurate variant is."""
    (baseline, *others), store = judged(task)
    wanted: list[Judged] = []
    for size in BATCH_SIZES:
        fit = [one for one in others if accurate(one, size) and one.screening]
        fit.sort(key=lambda one: one.screening.metrics[f"inprocess_ms.batch_{size}"].value)
        wanted += [one for one in fit[:CANDIDATES] if one not in wanted]
    ratios: dict[tuple[str, int], list[float]] = {}
    order = random.Random(0)
    for number in range(ROUNDS):
        entries = [baseline, *wanted]
        order.shuffle(entries)
        times = {one.name: ms(one, task, store) for one in entries}
        for one in wanted:
            for size in BATCH_SIZES:
                ratios.setdefault((one.name, size), []).append(times[baseline.name][size] / times[one.name][size])
        say(f"{task.name}, round {number + 1} of {ROUNDS}: float32 {times[baseline.name][1]:.2f} ms at batch 1")
    for (name, size), found in sorted(ratios.items()):
        say(f"{task.name}, batch {size}: {name} {median(found):.2f} times [{min(found):.2f}, {max(found):.2f}]")
    return {size: max(median(ratios[one.name, size]) for one in wanted if accurate(one, size)) for size in BATCH_SIZES}


def main() -> None:
    leave_without_vnni()
    met = []
    for task in (resnet18(), minilm()):
        found = best_ratios(task)
        met += [figure(f"{task.name}_batch_{size}", found[size], f">= {GOALS[task.name][size]}") for size in found]
    finish(*met)


if __name__ == "__main__":
    main()
