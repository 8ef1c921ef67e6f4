"""What a stage costs over calling its library by hand: time and peak memory, each in a fresh process, in pairs.

The model is MiniLM's sentence encoder in float32 (90 MB). A stage starts 0.2 s later than its library, whatever the
model, since more has to be imported; libraries that take less than three seconds there are measured on the same model
with a larger vocabulary: that of its multilingual siblings (428 MB), or three times as large (1.2 GB). The hand-written
side does what a user would write from the
library's documentation, with the settings that the stage chooses, and writes the model to a file, too.
"""

import json
import math
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from figures import figure, finish, say
from others import undisturbed

ROUNDS = 9
MULTILINGUAL = 250_037  # of paraphrase-multilingual-MiniLM-L12-v2
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
STAGES = ("simplify.ort", "quantize.dynamic", "quantize.static", "precision.float16", "convert.openvino")
# On 90 MB their libraries take 1.7, 0.5 and 0.7 s.
VOCABULARIES = {
    "precision.float16": MULTILINGUAL,
    "simplify.ort": 3 * MULTILINGUAL,
    "convert.openvino": 3 * MULTILINGUAL,
}


def arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files if name != "labels"}


def by_stage(name: str, model: Path, calibration: Path, out: Path) -> None:
    from optimize.samples import load_samples
    from optimize.stages import make_stage
    from optimize.stages.base import Context, StageInput
    from registry.records import StageCall, TensorSpec

    stage = make_stage(StageCall(name=name))
    samples = load_samples(calibration).inputs if stage.needs_calibration else None
    # A campaign knows the signature from the record of the model, as whoever calls a library by hand knows it.
    shape = ("batch", "tokens")
    inputs = tuple(TensorSpec(name=name, dtype="int64", shape=shape) for name in INPUTS)
    output = TensorSpec(name="embedding", dtype="float32", shape=("batch", 384))
    given = StageInput(folder=model.parent, entry=model.name, format="onnx", inputs=inputs, outputs=(output,))
    stage(given, Context(out=out, calibration=samples, threads=2))


def dynamic(model: Path, _calibration: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(model), str(out / "prepared.onnx"), auto_merge=True)
    quantize_dynamic(
        out / "prepared.onnx",
        out / "model.onnx",
        op_types_to_quantize=["MatMul", "Gemm", "Attention", "LSTM"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def static(model: Path, calibration: Path, out: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    samples = arrays(calibration)
    count = len(next(iter(samples.values())))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.starts = iter(range(0, count, 8))

        def get_next(self) -> dict[str, Any] | None:
            at = next(self.starts, None)
            return None if at is None else {name: array[at : at + 8] for name, array in samples.items()}

    quant_pre_process(str(model), str(out / "prepared.onnx"), auto_merge=True)
    quantize_static(
        out / "prepared.onnx",
        out / "model.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )


def optimized(model: Path, _calibration: Path, out: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out / "model.onnx")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def float16(model: Path, _calibration: Path, out: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(str(model)), keep_io_types=True), str(out / "model.onnx"))


def openvino_ir(model: Path, _calibration: Path, out: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(str(model)), str(out / "model.xml"), compress_to_fp16=False)


BY_HAND: dict[str, Callable[[Path, Path, Path], None]] = {
    "simplify.ort": optimized,
    "quantize.dynamic": dynamic,
    "quantize.static": static,
    "precision.float16": float16,
    "convert.openvino": openvino_ir,
}


def child(side: str, name: str, model: Path, calibration: Path, out: Path) -> None:
    """One side in this process; prints its peak resident memory in bytes."""
    if side == "stage":
        by_stage(name, model, calibration, out)
    else:
        BY_HAND[name](model, calibration, out)
    sys.stdout.write(f"\n{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}\n")


def measured(side: str, name: str, model: Path, calibration: Path) -> tuple[float, float, int]:
    """Seconds on the clock, CPU seconds and peak bytes of one side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, __file__, "--child", side, name, str(model), str(calibration), str(out)],
            check=True, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "CI": "true"},
        )  # fmt: skip
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return seconds, cpu_s, int(done.stdout.split()[-1])


def source() -> tuple[Path, Path]:
    """MiniLM's float32 ONNX model (90 MB) and its calibration samples."""
    from tasks import TASKS, minilm
    from variants import judged

    task = minilm()
    model = TASKS / "minilm" / "model.onnx"
    if not model.exists():
        (baseline, *_), store = judged(task)
        model.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(store.path(baseline.variant.artifact) / baseline.variant.artifact.entry, model)
    return model, task.base / task.calibration


def with_vocabulary(model: Path, words: int) -> Path:
    """The model with the rows of its word embeddings repeated to so many; no sample names the new ones.

    Another process makes it: Linux counts what this one has ever taken into the peak of each process that it starts.
    """
    target = model.with_name(f"vocabulary-{words}") / model.name
    if not target.exists():
        subprocess.run([sys.executable, __file__, "--widen", str(model), str(target), str(words)], check=True)
    return target


def widen(model: Path, target: Path, words: int) -> None:
    """Writes the model of `with_vocabulary`."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    made = onnx.load(str(model))
    table = max(made.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    rows = numpy_helper.to_array(table)
    table.CopyFrom(numpy_helper.from_array(np.resize(rows, (words, rows.shape[1])), table.name))
    target.parent.mkdir(exist_ok=True)
    draft = target.with_suffix(".draft")
    onnx.save(made, str(draft))
    draft.replace(target)


def main() -> None:
    small, calibration = source()
    met, order = [], random.Random(0)
    for name in STAGES:
        model = with_vocabulary(small, VOCABULARIES[name]) if name in VOCABULARIES else small
        times: list[float] = []
        cpu: list[float] = []
        peaks: list[float] = []
        for _ in range(ROUNDS):
            sides = ["stage", "hand"]
            order.shuffle(sides)
            found = {side: undisturbed(partial(measured, side, name, model, calibration)) for side in sides}
            times.append(found["stage"][0] / found["hand"][0])
            cpu.append(found["stage"][1] / found["hand"][1])
            peaks.append(found["stage"][2] / found["hand"][2])
        hand = found["hand"]
        size = f"{model.stat().st_size / 1e6:.0f} MB"
        say(f"{name} on {size}: by hand {hand[0]:.1f} s, {hand[1]:.1f} s of CPU, {hand[2] / 1e6:.0f} MB; "
            f"time ratios {json.dumps([round(ratio, 2) for ratio in times])}, CPU time {median(cpu):.3f}")  # fmt: skip
        met.append(figure(f"stage_time_ratio_{name}", median(times), "<= 1.10"))
        met.append(figure(f"stage_memory_ratio_{name}", median(peaks), "<= 1.2"))
    finish(*met)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], *(Path(argument) for argument in sys.argv[4:7]))
    elif sys.argv[1:2] == ["--widen"]:
        widen(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
