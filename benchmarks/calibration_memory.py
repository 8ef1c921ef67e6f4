"""Memory and ranges of calibration, with 64 and with 4,096 samples.

``quantize.static`` runs in a process of its own for each method, on images of 3x64x64 in float32 that it reads from an
``.npz`` file. Two figures a method: the most memory that the process ever held (VmHWM) with 4,096 samples over that
with 64; and the farthest that an end of a range is from what the calibrators of onnxruntime find when they get all
samples at once, in bins of their histogram (for minmax in units of the value).
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from figures import figure, finish, say

from optimize.calibration import BINS, whole_batches, write_ranges
from optimize.engines.local import run_in_child
from optimize.samples import open_samples
from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from registry.records import StageCall

FEW, MANY = 64, 4096
METHODS = ("minmax", "entropy", "percentile")
PERCENTILE = 99.9
OPS = ["Conv", "Gemm", "Relu", "GlobalAveragePool"]
BATCH = 8
SEED = 3


def write_net(path: Path) -> None:
    """A convolutional net for ``image`` (batch, 3, 64, 64) with random weights."""
    import onnx

    random = np.random.default_rng(SEED)
    weights, make = [], onnx.helper.make_node

    def weight(*shape: int) -> str:
        values = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        weights.append(onnx.numpy_helper.from_array(values.astype(np.float32), f"weight_{len(weights)}"))
        return str(weights[-1].name)

    nodes, last = [], "image"
    for place, (inside, outside, stride) in enumerate([(3, 16, 4), (16, 32, 2), (32, 64, 2)]):
        kernel = weight(outside, inside, 3, 3)
        nodes.append(make("Conv", [last, kernel], [f"c{place}"], pads=[1, 1, 1, 1], strides=[stride, stride]))
        last = f"r{place}"
        nodes.append(make("Relu", [f"c{place}"], [last]))
    nodes.append(make("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(make("Flatten", ["pooled"], ["flat"]))
    nodes.append(make("Gemm", ["flat", weight(10, 64)], ["logits"], transB=1))
    for place, node in enumerate(nodes):
        node.name = f"{node.op_type}_{place}"
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 64, 64])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 10])
    graph = onnx.helper.make_graph(nodes, "net", [image], [logits], initializer=weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True)
    onnx.save(model, str(path))


def write_samples(path: Path, count: int) -> None:
    """Images whose brightness grows, so that late batches reach further than early ones."""
    random = np.random.default_rng(SEED)
    images = random.standard_normal((count, 3, 64, 64), dtype=np.float32)
    images *= np.linspace(0.5, 2.0, count, dtype=np.float32)[:, None, None, None]
    np.savez(path, image=images)


def peak_bytes(*, model: str, samples: str, out: str, method: str) -> int:
    """Runs the stage in this process and returns the most memory it held."""
    stage = make_stage(StageCall(name="quantize.static", params={"method": method, "batch_size": BATCH}))
    folder = Path(model).parent
    Path(out).mkdir(parents=True)
    context = Context(out=Path(out), calibration=open_samples(Path(samples)), seed=SEED, threads=1)
    stage(read_input(folder, Path(model).name), context)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def farthest(*, model: str, samples: str, work: str, method: str) -> float:
    """The farthest that an end of a range is from what onnxruntime finds with all samples in memory."""
    from onnxruntime.quantization.calibrate import load_tensors_data

    source, given = read_input(Path(model).parent, Path(model).name), open_samples(Path(samples))
    batches = whole_batches(given, source.inputs, wanted=BATCH)
    target = Path(work) / f"{method}.json"
    options: dict[str, Any] = {"op_types": OPS, "percentile": PERCENTILE, "symmetric": False, "threads": 1}
    write_ranges(source.path, batches, target, method=method, **options)  # type: ignore[arg-type]
    ours = load_tensors_data(target)
    theirs, units = all_at_once(source.path, list(batches), method, target)
    if set(ours.keys()) != set(theirs.keys()):
        raise SystemExit("not the same tensors have ranges")
    worst = 0.0
    for name, expected in theirs.items():
        ends, wanted = (np.array([np.ravel(end)[0] for end in one.range_value]) for one in (ours[name], expected))
        worst = max(worst, float(np.abs(ends - wanted).max() / units[name]))
    return worst


def all_at_once(model: Path, batches: list[Any], method: str, target: Path) -> tuple[Any, dict[str, float]]:
    """The ranges that onnxruntime finds, and the width of a bin of each tensor (1 where there are no bins)."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class InMemory(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[Any] = iter(batches)

        def get_next(self) -> Any:
            return next(self._left, None)

    kinds = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    options: dict[str, Any] = {"symmetric": False}
    if method != "minmax":
        options["num_bins"] = BINS[method]
    if method == "percentile":
        options["percentile"] = PERCENTILE
    augmented = str(target.with_suffix(".all.onnx"))
    calibrator = create_calibrator(model, OPS, augmented, calibrate_method=kinds[method], extra_options=options)
    calibrator.collect_data(InMemory())
    found = calibrator.compute_data()
    if method == "minmax":
        return found, dict.fromkeys(found.keys(), 1.0)
    edges = {name: histogram[1] for name, histogram in calibrator.collector.get_histogram_dict().items()}
    return found, {name: float(one[1] - one[0]) for name, one in edges.items()}


def main() -> None:
    here = Path(__file__).resolve()
    met = []
    with tempfile.TemporaryDirectory(prefix="burnish-calibration-") as name:
        folder = Path(name)
        model = folder / "net" / "model.onnx"
        write_net(model)
        for count in (FEW, MANY):
            write_samples(folder / f"{count}.npz", count)
        for method in METHODS:
            peaks = []
            for count in (FEW, MANY):
                given = {"model": str(model), "samples": str(folder / f"{count}.npz"), "method": method}
                given["out"] = str(folder / f"{method}-{count}" / "made")
                peaks.append(run_in_child(f"{here.stem}:peak_bytes", given, python_path=here.parent))
                say(f"{method}, {count} samples: at most {peaks[-1] / 1e6:.1f} MB")
            met.append(figure(f"calibration_peak_ratio_{method}", peaks[1] / peaks[0], "<= 1.10"))
            given = {"model": str(model), "samples": str(folder / f"{MANY}.npz"), "method": method, "work": name}
            worst = run_in_child(f"{here.stem}:farthest", given, python_path=here.parent)
            met.append(
                figure(f"calibration_range_difference_{method}", worst, "<= 0" if method == "minmax" else "<= 1")
            )
    finish(*met)


if __name__ == "__main__":
    main()
