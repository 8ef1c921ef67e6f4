"""Ranges of activations, found on the user's samples batch by batch, in memory that does not grow with their number.

The least and greatest value of each tensor come first, then, for ``entropy`` and ``percentile``, a histogram between
them in a second pass over the samples. Both are merged batch by batch, so batches may differ in size and shape, and
ranges do not depend on how the samples were split into them. They are handed on as the JSON file that
``onnxruntime.quantization.quantize_static`` reads in place of samples.

What ONNX Runtime 1.31 has for this in ``onnxruntime.quantization.calibrate`` is used in part. Its choice of tensors,
and how it gets a range out of a histogram, are. How it collects is not:

* fed with all samples at once, it holds every activation of every sample, and batches must have one shape;
* fed batch by batch, a histogram keeps the width of the first batch's bins and gets more of them when a later batch
  reaches further, without limit: an outlier after a batch near zero costs gigabytes, and the entropy of more than
  10,000 bins ends in an ``AssertionError``;
* the symmetric percentile drops what is nearer to zero than anything in the first batch;
* ReduceMin and ReduceMax skip NaN, and the merge of ranges keeps the older one, so NaN goes unseen;
* ``CalibMaxIntermediateOutputs`` drops what was collected before it is merged.

Entropy is that of ONNX Runtime with its defaults, 128 bins and 128 levels. There the whole range is the only one to
choose when all samples are looked at together, so it gives what minmax gives. More bins are not better: on normal
values of which the negative ones became zero, 2,048 bins cut off 37 % of the range, and the error of 8-bit values
rose from 0.5 to 4 % of their size, because its measure looks at the number of zeros most of all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optimize.samples import Batch, StreamedSamples, batches_of
from optimize.stages import onnx_files
from registry.errors import InputError, NotApplicableError
from registry.records import TensorSpec

Method = Literal["minmax", "entropy", "percentile"]
Range = tuple[NDArray[Any], NDArray[Any]]

# The defaults of onnxruntime.quantization.calibrate.create_calibrator.
BINS = {"percentile": 2048, "entropy": 128}
_LEVELS = 128
_FLAT = "calibration/flat"


class Batches:
    """Samples in batches, read anew from the first each time they are iterated over."""

    def __init__(self, samples: Mapping[str, NDArray[Any]], *, size: int, count: int) -> None:
        """The first ``count`` batches of ``size`` samples."""
        self._samples = samples
        self._size = size
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        return islice(batches_of(self._samples, self._size), self._count)


def whole_batches(samples: Mapping[str, NDArray[Any]], inputs: tuple[TensorSpec, ...], *, wanted: int) -> Batches:
    """The samples in batches of the size that the model fixes, else of ``wanted``.

    A rest that does not fill a fixed batch is left out.

    Args:
        samples: input name -> array of shape (samples, ...); `StreamedSamples` are read batch by batch.
        inputs: of the model.
        wanted: samples in a batch where the model does not fix it; the last batch may have fewer.

    Raises:
        InputError: there are no samples.
        NotApplicableError: the model fixes a batch larger than the number of samples.
    """
    count = samples.count if isinstance(samples, StreamedSamples) else len(next(iter(samples.values()), ()))
    if not count:
        raise InputError("the calibration samples are empty", hint="Give one array per input, samples first.")
    fixed = next((spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)), 0)
    if fixed > count:
        raise NotApplicableError(f"the model fixes its batch at {fixed}, and there are only {count} samples")
    size = fixed or wanted
    return Batches(samples, size=size, count=count // fixed if fixed else -(-count // size))


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

    Args:
        model: the float model; files in between are written beside ``target``.
        batches: what to feed it, such as `whole_batches`. Iterated over twice unless ``method`` is ``minmax``; at any
            time one batch is in memory, with the activations that it gives.
        target: the JSON file to write.
        op_types: operators whose inputs and outputs count.
        method: least and greatest value; the range that loses the least information, as ONNX Runtime has it, which is
            least and greatest value again; or a percentile of values.
        percentile: the one that ``percentile`` takes, in percent.
        symmetric: whether a range is centred on zero.
        threads: of the session that runs the model.

    Raises:
        InputError: there are no batches.
        NotApplicableError: an activation is not finite on the samples.
        ValueError: the batches can be iterated over only once, and the method needs them twice.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

    if method != "minmax" and iter(batches) is batches:
        raise ValueError(f"the method {method} reads the batches twice, so they must not be an iterator")
    kinds = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    ranges = _extremes(model, batches, target.with_suffix(".onnx"), op_types, threads)
    if method == "minmax" and symmetric:
        ranges = {name: _centred(found) for name, found in ranges.items()}
    elif method != "minmax":
        histograms = Histograms(ranges, method=method, symmetric=symmetric)
        for activations in _activations(model, batches, target.with_suffix(".onnx"), op_types, threads):
            histograms.add(activations)
        ranges = histograms.ranges(percentile)
    found = {name: TensorData(lowest=lowest, highest=highest) for name, (lowest, highest) in ranges.items()}
    save_tensors_data(TensorsData(kinds[method], found), target)


class Histograms:
    """Histograms of tensors whose extremes are known: of as many bins, however many values are added.

    They and their ranges are those of ``onnxruntime.quantization.calibrate.HistogramCollector`` for all values at once;
    but absolute values are counted from zero, not from the least of them.
    """

    def __init__(
        self, extremes: Mapping[str, Range], *, method: Literal["entropy", "percentile"], symmetric: bool = False
    ) -> None:
        """Empty histograms.

        Args:
            extremes: tensor name -> its least and greatest value, float32 of shape (1,) or ().
            method: what they are for, which decides the number of bins.
            symmetric: whether a percentile is one of absolute values, for a range that is centred on zero.
        """
        self._extremes = {name: _scalars(ends) for name, ends in extremes.items()}
        self._method = method
        self._absolute = symmetric and method == "percentile"
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._edges: dict[str, NDArray[Any]] = {}

    def add(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Counts the values of one batch: tensor name -> array of any shape, finite, within its extremes."""
        bins = BINS[self._method]
        for name, given in values.items():
            reach = _centred(self._extremes[name])[1]
            if reach < np.finfo(reach.dtype).tiny * bins:
                continue  # bins would have no width: all but zero, and its extremes are its range
            flat = np.absolute(given).ravel() if self._absolute else given.ravel()
            limits = (0.0 if self._absolute else -float(reach), float(reach))
            counts, edges = np.histogram(flat, bins, range=limits)
            if name in self._counts:
                self._counts[name] += counts
            else:
                self._counts[name], self._edges[name] = counts, edges.astype(reach.dtype)

    def ranges(self, percentile: float) -> dict[str, Range]:
        """Tensor name -> the ends of its range, each of shape ().

        Args:
            percentile: percent of values inside the range, for the method ``percentile``; as much is cut off on either
                side.
        """
        from onnxruntime.quantization.calibrate import HistogramCollector

        bins = BINS[self._method]
        collector = HistogramCollector(self._method, self._absolute, bins, _LEVELS, percentile, "same")
        collector.histogram_dict = {
            name: (counts, self._edges[name], *self._extremes[name]) for name, counts in self._counts.items()
        }
        found = collector.compute_collection_result() if self._counts else {}
        return self._within({name: (ends[0], ends[1]) for name, ends in found.items()})

    def _within(self, found: Mapping[str, Range]) -> dict[str, Range]:
        """The ranges, none beyond its tensor's extremes, nor turned round where nearly all values are the same."""
        ranges = {}
        for name, (least, greatest) in self._extremes.items():
            low, high = found.get(name, (least, greatest))
            low = np.maximum(low, least)
            ranges[name] = np.asarray(low), np.asarray(np.maximum(np.minimum(high, greatest), low))
        return ranges


def _extremes(
    model: Path, batches: Iterable[Batch], scratch: Path, op_types: Sequence[str], threads: int
) -> dict[str, Range]:
    """Tensor name -> its least and greatest value over all batches, each of shape (1,)."""
    names, session = _session(model, scratch, op_types, threads, _add_extremes)
    found: dict[str, Range] = {}
    seen = False
    for batch in batches:
        seen = True
        answers = session.run([output for name in names for output in _outputs_of(name)], batch) if names else []
        for name, least, greatest, total in zip(names, answers[::3], answers[1::3], answers[2::3], strict=True):
            # The extremes of no values at all are the other way round, plus and minus infinity.
            unbounded = (least <= greatest) & ~(np.isfinite(least) & np.isfinite(greatest))
            if (np.isnan(total) | unbounded).any():
                raise NotApplicableError(
                    f"the tensor {name!r} is not finite on the calibration samples, so it has no range to quantize to"
                )
            before = found.get(name, (least, greatest))
            found[name] = np.minimum(before[0], least), np.maximum(before[1], greatest)
    if not seen:
        raise InputError("the calibration samples are empty", hint="Give one array per input, samples first.")
    # What was empty in every batch is taken for zero.
    return {
        name: ends if ends[0] <= ends[1] else (np.zeros_like(ends[0]), np.zeros_like(ends[1]))
        for name, ends in found.items()
    }


def _activations(
    model: Path, batches: Iterable[Batch], scratch: Path, op_types: Sequence[str], threads: int
) -> Iterator[Batch]:
    """The values of all tensors, one batch after the other."""
    names, session = _session(model, scratch, op_types, threads, _add_outputs)
    # A graph's input that is its output, too, is what was fed: microsoft/onnxruntime#21922 loses the copy.
    computed = [name for name in names if name not in {given.name for given in session.get_inputs()}]
    for batch in batches:
        fed = {name: batch[name] for name in names if name in batch}
        yield fed | (dict(zip(computed, session.run(computed, batch), strict=True)) if computed else {})


def _session(
    model: Path, scratch: Path, op_types: Sequence[str], threads: int, add: Callable[[Any, list[str]], None]
) -> tuple[list[str], Any]:
    """The tensors to be observed, in the graph's order, and a session of the model to which ``add`` was done."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization.calibrate import CalibraterBase

    chooser = CalibraterBase(model, op_types)
    chosen, _ = chooser.select_tensors_to_calibrate(chooser.model)
    graph = chooser.model.graph
    ordered = [value.name for value in graph.input]
    ordered += [output for node in graph.node for output in node.output]
    names = [name for name in ordered if name in chosen]
    add(chooser.model, names)
    onnx.save(chooser.model, str(scratch), save_as_external_data=onnx_files.is_large(chooser.model))
    del chooser, graph  # the session reads the weights from the file
    options = onnxruntime.SessionOptions()
    # Ranges are those of the tensors that are going to be quantized, so nothing may be fused away.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return names, onnxruntime.InferenceSession(str(scratch), options, providers=["CPUExecutionProvider"])


def _outputs_of(name: str) -> tuple[str, str, str]:
    return f"{name}/calibration/least", f"{name}/calibration/greatest", f"{name}/calibration/sum"


def _add_extremes(model: Any, names: list[str]) -> None:
    """Adds the least and the greatest value of each tensor, and their sum: the reductions skip NaN, a sum does not."""
    import onnx

    graph, make = model.graph, onnx.helper.make_node
    kinds = _kinds(graph)
    for name in names:
        for reduction, output in zip(("ReduceMin", "ReduceMax", "ReduceSum"), _outputs_of(name), strict=True):
            graph.node.append(make(reduction, [name], [f"{output}/kept"], keepdims=1))
            graph.node.append(make("Reshape", [f"{output}/kept", _FLAT], [output]))
            graph.output.append(onnx.helper.make_tensor_value_info(output, kinds[name], [1]))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), _FLAT))


def _add_outputs(model: Any, names: list[str]) -> None:
    import onnx

    graph = model.graph
    kinds = _kinds(graph)
    known = {value.name for value in (*graph.input, *graph.output)}
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kinds[name], None) for name in names if name not in known
    )


def _kinds(graph: Any) -> dict[str, int]:
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _centred(found: Range) -> Range:
    reach = np.maximum(np.abs(found[0]), np.abs(found[1]))
    return -reach, reach


def _scalars(found: Range) -> Range:
    return found[0].reshape(()), found[1].reshape(())
