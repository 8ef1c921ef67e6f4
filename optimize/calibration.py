"""Ranges of activations, found on the user's samples batch by batch.

The samples are fed one batch at a time and each batch is merged into the ranges before the next, so memory stays flat
in their number, and batches may differ in shape. Ranges are handed on as the JSON file that
``onnxruntime.quantization.quantize_static`` reads in place of samples.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from registry.errors import NotApplicableError
from registry.records import TensorSpec

Method = Literal["minmax", "entropy", "percentile"]
Batch = dict[str, NDArray[Any]]


def whole_batches(
    samples: Mapping[str, NDArray[Any]], inputs: tuple[TensorSpec, ...], *, wanted: int
) -> Iterator[Batch]:
    """The samples in batches of the size that the model fixes, else of ``wanted``.

    A rest that does not fill a fixed batch is left out.

    Raises:
        NotApplicableError: the model fixes a batch larger than the number of samples.
    """
    count = len(next(iter(samples.values())))
    fixed = next((spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)), 0)
    if fixed > count:
        raise NotApplicableError(f"the model fixes its batch at {fixed}, and there are only {count} samples")
    size = fixed or wanted
    end = count - count % fixed if fixed else count
    for start in range(0, end, size):
        yield {name: np.ascontiguousarray(array[start : start + size]) for name, array in samples.items()}


def write_ranges(
    model: Path,
    batches: Iterable[Batch],
    target: Path,
    *,
    op_types: Sequence[str],
    method: Method,
    percentile: float,
    symmetric: bool,
    threads: int,
) -> None:
    """Writes the range of each tensor at nodes of ``op_types`` to ``target``.

    ``CalibMaxIntermediateOutputs`` of ONNX Runtime 1.31 is not used: it drops what it collected before it is merged.

    Args:
        model: the float model; files in between are written beside ``target``.
        batches: what to feed it.
        target: the JSON file to write.
        op_types: operators whose inputs and outputs count.
        method: least and greatest value; the range that loses the least information; or a percentile of values.
        percentile: the one that ``percentile`` takes, in percent.
        symmetric: whether a range is centred on zero.
        threads: of the session that runs the model.

    Raises:
        NotApplicableError: an activation is not finite on the samples.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    options: dict[str, Any] = {"symmetric": symmetric}
    if method == "percentile":
        options["percentile"] = percentile
    calibrator = create_calibrator(
        model,
        op_types,
        augmented_model_path=str(target.with_suffix(".onnx")),
        calibrate_method=methods[method],
        extra_options=options,
    )
    calibrator.infer_session = _session(target.with_suffix(".onnx"), threads)
    for batch in batches:
        calibrator.collect_data(_one(batch))
    ranges = calibrator.compute_data()
    _check_finite(ranges)
    save_tensors_data(ranges, target)


def _session(model: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Ranges are those of the tensors that are going to be quantized, so nothing may be fused away.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _one(batch: Batch) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class OneBatch(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = [batch]

        def get_next(self) -> Batch | None:
            return self._left.pop() if self._left else None

    return OneBatch()


def _check_finite(ranges: Any) -> None:
    for name, found in ranges.items():
        if not all(np.isfinite(end).all() for end in found.range_value):
            raise NotApplicableError(
                f"the tensor {name!r} is not finite on the calibration samples, so it has no range to quantize to"
            )
