"""How near a saturated server with batching comes to the session alone: MiniLM, 64 tokens a text, one thread.

The best batch size is found in process. MLServer with our runtime and Triton with its Python backend then serve the
model with batches up to that size, one after the other, to twice as many clients. Each round measures all three, in an
order of chance. As in `runtime_overhead` it is done apart (servers on one CPU, where what a server does for a request
is taken from the session's time) and together, on both CPUs, where the limits hold.
"""

import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from figures import figure, finish, say
from numpy.typing import NDArray
from others import undisturbed
from runtime_overhead import START_S, artifact_of, candidate_of, on_cpus
from stage_overhead import INPUTS, source

from profiles.deploy.local import LocalCluster
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads
from profiles.load.transports import Status
from profiles.serving.session import Session, open_session
from registry.records import ClosedLoop, LoadProfile, ServingProfile, TensorSpec

# The limits hold together, where rounds differ by 2 %.
ROUNDS_APART, ROUNDS = 3, 9
WINDOW_S = 8.0
ALONE_S = 4.0
BATCH_SIZES = (2, 4, 8, 16)
DELAY_MS = 5.0
# Answers of one batch are this near to each other; a batch takes several times as long.
BATCH_OF_ANSWERS_NS = 20_000_000


def rows_per_s(session: Session, samples: Mapping[str, NDArray[Any]], batch: int, *, seconds: float) -> float:
    """Rows a second of the session alone, in batches of this size."""
    inputs = {name: array[:batch] for name, array in samples.items()}
    session.run(inputs)
    rows, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        session.run(inputs)
        rows += batch
    return rows / spent


def answered_per_s(raw: Path) -> float:
    """Requests a second between the first batch of answers of a window and its last.

    A window of a length of its own holds one batch more or less, as chance has it, which is as much as servers differ.
    """
    with np.load(raw, allow_pickle=False) as columns:
        done = np.sort(columns["done_ns"][columns["status"] == Status.OK])
    first = int(np.searchsorted(done, done[0] + BATCH_OF_ANSWERS_NS))
    return float((len(done) - first) / ((done[-1] - done[0]) / 1e9))


Ratios = dict[str, list[float]]


def measured(
    model: Path, calibration: Path, server_cpus: tuple[int, ...], client_cpus: tuple[int, ...], *, rounds: int
) -> Ratios:
    """MLServer's rate over the session's and over Triton's, in each round."""
    with np.load(calibration, allow_pickle=False) as archive:
        samples = {name: archive[name] for name in INPUTS}
    with on_cpus(server_cpus):
        # Opened here: the engine's threads inherit the CPUs.
        session = open_session(model, engine="onnxruntime")
        alone = {batch: rows_per_s(session, samples, batch, seconds=ALONE_S / 2) for batch in BATCH_SIZES}
    best = max(alone, key=lambda batch: alone[batch])
    say("in process: " + ", ".join(f"{rate:.1f}/s at {batch}" for batch, rate in alone.items()))
    shape = ("batch", "tokens")
    artifact = artifact_of(
        model,
        inputs=tuple(TensorSpec(name=name, dtype="int64", shape=shape) for name in INPUTS),
        outputs=tuple(TensorSpec(name=p.name, dtype=p.dtype.name, shape=("batch", 384)) for p in session.outputs),
    )
    batching = {"max_batch_size": best, "max_batch_delay_ms": DELAY_MS}
    served = {
        "mlserver": ServingProfile(server="mlserver", backend="burnish", **batching),
        "triton": ServingProfile(server="triton", backend="python", **batching),
    }
    load = LoadProfile(name="closed", load=ClosedLoop(concurrency=2 * best), warmup_s=1.5, duration_s=WINDOW_S)
    ratios: Ratios = defaultdict(list)
    order = random.Random(0)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix="burnish-work-") as folder:
        work = Path(folder)
        with LocalCluster(work, server_cpus=server_cpus) as cluster, LoadGenerator(client_cpus, work) as generator:
            deployed = {
                name: cluster.deploy(candidate_of(name, profile), artifact, model.parent, timeout_s=START_S)
                for name, profile in served.items()
            }
            payloads = {name: encode_payloads(samples, target=one.target) for name, one in deployed.items()}
            for number in range(rounds):
                sides, rates = ["session", *deployed], {}
                order.shuffle(sides)
                for side in sides:
                    if side == "session":
                        with on_cpus(server_cpus):
                            rates[side] = undisturbed(partial(rows_per_s, session, samples, best, seconds=ALONE_S))
                        continue
                    target, window = deployed[side].target, work / "window.npz"
                    record = undisturbed(partial(generator.run, target, payloads[side], load, raw_path=window))
                    rates[side] = answered_per_s(window)
                    if record.errors:
                        say(f"{side}: errors {dict(record.errors)}")
                ratios["session"].append(rates["mlserver"] / rates["session"])
                ratios["triton"].append(rates["mlserver"] / rates["triton"])
                found = ", ".join(f"{side} {rate:.1f}/s" for side, rate in sorted(rates.items()))
                say(f"round {number + 1}, batches of {best}: {found}; load average {os.getloadavg()[0]:.2f}")
    say("medians of MLServer's rate: " + ", ".join(f"{median(of):.3f} of {name}'s" for name, of in ratios.items()))
    return ratios


def main() -> None:
    one, other = sorted(os.sched_getaffinity(0))[:2]
    model, calibration = source()
    say(f"load average at the start: {os.getloadavg()[0]:.2f}")
    say(f"apart: servers on CPU {one}, the load on CPU {other}")
    measured(model, calibration, (one,), (other,), rounds=ROUNDS_APART)
    say(f"together: servers and the load on CPUs {one} and {other}")
    ratios = measured(model, calibration, (one, other), (one, other), rounds=ROUNDS)
    finish(
        figure("runtime_saturation_of_session", median(ratios["session"]), ">= 0.85"),
        figure("runtime_saturation_of_triton", median(ratios["triton"]), ">= 1.0"),
    )


if __name__ == "__main__":
    sys.exit(main())
