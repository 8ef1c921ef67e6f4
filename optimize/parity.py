"""How alike the outputs of two models are, by statistics that survive zeros, constants and outliers.

Nothing is divided by a single value of the reference, which may be zero; errors are held against an output's *spread*
(`spread`). Metrics of parity (P: the larger the better, N: the smaller):

- ``cosine`` (P): the mean over samples of the cosine between the two answers; ``worst_cosine`` (P) the lowest.
- ``snr_db`` (P): signal-to-noise ratio, 10 log10(sum of squares of the reference / of the difference), in decibels;
  held to +-200, which is what "no difference at all" and "nothing but difference" get.
- ``p99_error`` (N): the 99th percentile of the absolute error over all elements, as a part of the spread. Unlike
  ``max_abs_error`` (N, in the output's own unit) it is not ruled by a few outlier dimensions, as transformers have.
- ``mismatch_share`` (N): share of elements with |difference| > 0.01 spread + 0.01 |reference|; of whole numbers and
  booleans, the share that is not equal. The mixed form is that of `numpy.isclose`.
"""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from optimize.intervals import RARE, bootstrap_mean, exact_bounds, holding, resampled_means, tail_ends
from optimize.metrics import Outputs
from registry.errors import StageError
from registry.records import Estimate

MOST_DB = 200.0
TOLERANCE = 0.01
_QUANTILE = 0.99
_WORTH_SAYING = 0.999  # an answer with a higher cosine is as good as the baseline's
_HUGE = 1e300  # what lies beyond is held to it, so that no ratio overflows
_LARGER_IS_BETTER = {"cosine", "worst_cosine", "snr_db"}

Rows = NDArray[np.float64]


def check_alike(reference: Outputs, variant: Outputs) -> None:
    """Returns when the variant's answers can be compared with the reference's.

    Raises:
        StageError: names or shapes differ, NaN came out, or an infinity where the reference has none.
    """
    if set(reference) != set(variant):
        raise StageError(f"its outputs are {sorted(variant)}, the baseline's {sorted(reference)}")
    for name, wanted in reference.items():
        got = variant[name]
        if got.shape != wanted.shape:
            raise StageError(
                f"its output {name!r} has shape {list(got.shape)} over all samples, the baseline's {list(wanted.shape)}"
            )
        if got.dtype.kind != "f" or wanted.dtype.kind != "f":
            continue
        _refuse_rows(np.isnan(wanted), f"the baseline gives NaN in the output {name!r}")
        _refuse_rows(np.isnan(got), f"gives NaN in the output {name!r}")
        _refuse_rows(np.isinf(got) & (got != wanted), f"overflows to infinity in the output {name!r}")


def check_finite(outputs: Outputs) -> None:
    """Returns when no answer is NaN or infinite.

    Raises:
        StageError: one is.
    """
    for name, array in outputs.items():
        if array.dtype.kind == "f":
            _refuse_rows(np.isnan(array), f"gives NaN in the output {name!r}")
            _refuse_rows(np.isinf(array), f"overflows to infinity in the output {name!r}")


def _refuse_rows(bad: NDArray[np.bool_], what: str) -> None:
    if not bad.any():
        return
    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
    raise StageError(f"{what} for {len(rows)} of {len(bad)} samples, first for sample {rows[0]}")


def parity(reference: Outputs, variant: Outputs) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    """The module's metrics of two models' outputs, and which answer is least alike, in words.

    Args:
        reference: output name -> array (samples, ...) of the baseline; `check_alike` has passed.
        variant: the same of the variant, samples in the same order.

    Returns:
        Each metric of the output where it is worst. Where there are several outputs, also each one's own as
        ``<metric>.<output>`` (signs that the tracking store does not take become ``_``). Outputs of numbers only.
    """
    per_output = {
        name: _output_parity(wanted, variant[name])
        for name, wanted in reference.items()
        if wanted.dtype.kind in "fiub" and wanted.size
    }
    found: dict[str, Estimate] = {}
    for metrics, _ in per_output.values():
        for name, estimate in metrics.items():
            if name not in found or _is_worse(name, estimate, found[name]):
                found[name] = estimate
    if len(per_output) > 1:
        for output, label in _labels(list(per_output)).items():
            found |= {f"{name}.{label}": estimate for name, estimate in per_output[output][0].items()}
    return found, _notes(per_output)


def spread(reference: Rows) -> float:
    """What errors of an output are held against: the width between its 1st and its 99th percentile over all elements.

    An output that is nearly always the same has none; then it is the width of all values, of a constant its magnitude,
    and of a constant zero 1.
    """
    flat = np.clip(reference.reshape(-1), -_HUGE, _HUGE)
    low, high = np.quantile(flat, [1 - _QUANTILE, _QUANTILE])
    widths = (high - low, flat.max() - flat.min(), np.abs(flat).max())
    return float(next((width for width in widths if width > 0), 1.0))


def rows_of(array: NDArray[np.generic]) -> Rows:
    """One row a sample, in float64; infinities (the same in both models) as zeros, which weigh nothing."""
    rows: Rows = np.nan_to_num(array.reshape(len(array), -1).astype(np.float64), posinf=0.0, neginf=0.0)
    return rows


def row_cosines(a: Rows, b: Rows) -> Rows:
    """The cosine of each pair of rows, shape (rows,): 1 for two zero rows, 0 for one; no overflow at any scale."""
    a, b = (rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float64).tiny) for rows in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    cosines = np.einsum("ij,ij->i", a, b) / np.where(lengths > 0, lengths, 1.0)
    clipped: Rows = np.where(both_zero, 1.0, np.clip(cosines, -1.0, 1.0))
    return clipped


def _output_parity(wanted: NDArray[np.generic], got: NDArray[np.generic]) -> tuple[dict[str, Estimate], int | None]:
    """The metrics of one output, and the row with the lowest cosine where the output has cosines."""
    a, b = rows_of(wanted), rows_of(got)
    errors, count, worst = np.abs(a - b), len(wanted), None
    found = {"max_abs_error": _over_samples(float(errors.max()), count, "largest")}
    if wanted.dtype.kind != "f":
        return found | {"mismatch_share": _share((wanted != got).reshape(count, -1))}, None
    width = spread(a)
    found["mismatch_share"] = _share(errors > TOLERANCE * width + TOLERANCE * np.abs(a))
    with np.errstate(over="ignore"):
        found["p99_error"] = _high_quantile(np.minimum(errors / width, _HUGE))
    found["snr_db"] = _signal_to_noise(a, b)
    if a.shape[1] > 1:
        cosines = row_cosines(a, b)
        worst = int(cosines.argmin())
        found["cosine"] = holding(float(cosines.mean()), bootstrap_mean(cosines), count, "bootstrap", "1")
        found["worst_cosine"] = _over_samples(float(cosines[worst]), count, "lowest")
    return found, worst


def _over_samples(value: float, count: int, which: str) -> Estimate:
    return Estimate(value=value, low=value, high=value, runs=count, method=f"{which} over the samples", unit="1")


def _share(outside: NDArray[np.bool_]) -> Estimate:
    """The share of elements that are marked, shape (samples, elements)."""
    shares = outside.mean(axis=1)
    count, marked = len(shares), int(outside.any(axis=1).sum())
    low, high = bootstrap_mean(shares)
    if high is not None and marked < RARE:
        # As for a drop: a sample not seen yet may be marked as far as the heaviest was, or wholly.
        high = max(high, exact_bounds(marked, count)[1] * (float(shares.max()) or 1.0))
    return holding(float(shares.mean()), (low, high), count, "bootstrap", "fraction")


def _high_quantile(errors: Rows) -> Estimate:
    """The 99th percentile of all elements, with an interval from samples (rows) drawn again.

    A sorted list of every draw's elements would be too much; the share of elements beyond each of some hundred levels
    is a mean over samples, and says at which level the percentile lies.
    """
    count, elements = errors.shape
    value = float(np.quantile(errors, _QUANTILE))
    levels = np.unique(np.quantile(errors, np.linspace(0.9, 1.0, 101)))
    below = np.searchsorted(levels, errors.reshape(-1), side="left")  # this many levels lie below an error
    places = np.repeat(np.arange(count), elements) * (len(levels) + 1) + below
    table = np.bincount(places, minlength=count * (len(levels) + 1)).reshape(count, len(levels) + 1)
    beyond = table[:, ::-1].cumsum(axis=1)[:, -2::-1] / elements  # (samples, levels): share of elements beyond a level
    drawn = resampled_means(beyond)
    if drawn is None:
        return holding(value, (None, None), count, "bootstrap", "1")
    ends = tail_ends(levels[(drawn <= 1 - _QUANTILE + 1e-12).argmax(axis=1)])
    return holding(value, ends, count, "bootstrap", "1")


def _signal_to_noise(a: Rows, b: Rows) -> Estimate:
    scale = max(float(np.abs(a).max()), float(np.abs(b).max()), float(np.finfo(np.float64).tiny))
    a, b = a / scale, b / scale
    powers = np.stack([np.square(a).mean(axis=1), np.square(a - b).mean(axis=1)], axis=1)
    drawn = resampled_means(powers)
    ends = (None, None) if drawn is None else tail_ends(_decibels(drawn))
    return holding(float(_decibels(powers.mean(axis=0))), ends, len(a), "bootstrap", "dB")


def _decibels(powers: Rows) -> Rows:
    """(..., signal and noise) -> (...): their ratio in dB, held to +-`MOST_DB`; no noise at all is the most."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = 10 * np.log10(powers[..., 0] / powers[..., 1])
    held: Rows = np.clip(np.nan_to_num(ratios, nan=MOST_DB, posinf=MOST_DB, neginf=-MOST_DB), -MOST_DB, MOST_DB)
    return held


def _is_worse(name: str, one: Estimate, other: Estimate) -> bool:
    return one.value < other.value if name in _LARGER_IS_BETTER else one.value > other.value


def _labels(names: list[str]) -> dict[str, str]:
    """Output name -> what stands for it in a metric's name, each another one."""
    labels: dict[str, str] = {}
    for name in names:
        label = re.sub(r"[^A-Za-z0-9_/-]", "_", name) or "_"
        while label in labels.values():
            label += "_"
        labels[name] = label
    return labels


def _notes(per_output: Mapping[str, tuple[Mapping[str, Estimate], int | None]]) -> tuple[str, ...]:
    rows = [
        (metrics["worst_cosine"].value, row, name) for name, (metrics, row) in per_output.items() if row is not None
    ]
    cosine, row, name = min(rows, default=(1.0, 0, ""))
    if cosine > _WORTH_SAYING:
        return ()
    return (f"least like the baseline's is its answer to sample {row}: cosine {cosine:.4f} in the output {name!r}",)
