"""Runs one model file in one engine, in whatever environment it is started from: times it, or writes its answers.

    run_model.py ENGINE MODEL SAMPLES time CPU BUDGET_S SIZE...   prints {"<size>": <median ms of a batch>}
    run_model.py ENGINE MODEL SAMPLES answer OUT                  writes the first output for every sample

ENGINE is onnxruntime or openvino; both get one thread. It needs numpy and the engine, nothing else.
"""

import json
import os
import sys
import time
from statistics import median


def open_model(engine, path):
    """A function from input arrays to the first output."""
    if engine == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1})
        request = compiled.create_infer_request()
        return lambda feeds: request.infer(feeds)[compiled.output(0)]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def timed(run, samples, size, budget_s):
    """The median time of a batch in ms: a fifth of the budget warms up, three runs at least are made."""
    count = len(next(iter(samples.values())))
    starts = list(range(0, count - size + 1, size))[:16]
    batches = [{name: array[start : start + size] for name, array in samples.items()} for start in starts]
    found, begin, number = [], time.perf_counter(), 0
    while len(found) < 3 or time.perf_counter() - begin < budget_s:
        started = time.perf_counter()
        run(batches[number % len(batches)])
        number += 1
        if number > 2 and (time.perf_counter() - begin > budget_s / 5 or number > 3):
            found.append((time.perf_counter() - started) * 1e3)
    return median(found)


def main():
    import numpy as np

    engine, path, samples_path, what, *rest = sys.argv[1:]
    if what == "time":
        os.sched_setaffinity(0, {int(rest[0])})
    with np.load(samples_path, allow_pickle=False) as archive:
        samples = {name: archive[name] for name in archive.files if name != "labels"}
    run = open_model(engine, path)
    if what == "time":
        print(json.dumps({size: timed(run, samples, int(size), float(rest[1])) for size in rest[2:]}))
        return
    count = len(next(iter(samples.values())))
    rows = [run({name: array[at : at + 8] for name, array in samples.items()}).copy() for at in range(0, count, 8)]
    np.savez(rest[0], output=np.concatenate(rows))


if __name__ == "__main__":
    main()
