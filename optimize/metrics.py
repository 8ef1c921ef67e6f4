"""Task metrics: how good a model's answers are, sample by sample, larger being better.

A metric gives one score a sample wherever it can, so that two models are compared in pairs. `find_metric` knows the
built-in ones by name (`BUILT_IN`, and those that carry a number: ``top<k>`` and ``recall_at_<k>``) and the user's own
as ``package.module:function``.
"""

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import InputError

Outputs = Mapping[str, NDArray[Any]]
Rows = NDArray[Any]

MOST_K = 100
IGNORED = -100  # a label that is not to be scored, as torch and transformers write it


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One way to score answers.

    Attributes:
        name: as the user writes it.
        unit: of its value (``fraction``, ``1``).
        score: (outputs, labels) -> one score a sample, shape (samples,), NaN where a sample is not scored; or a
            single number where the metric is no mean of scores.
        decide: (outputs, labels) -> what was decided for each sample, shape (samples, ...), to count flips; None
            where the metric knows of no decisions.
        rows: for a metric that is no mean: (outputs, labels) -> (one row a sample, function from any choice of rows to
            the metric), so that samples can be drawn again; None where that cannot be done.
        label_free: whether the baseline's first output can stand in for labels that the samples do not have.
        needs_labels: whether it cannot be given without labels, or something in their place.
    """

    name: str
    unit: str
    score: Callable[[Outputs, NDArray[Any] | None], NDArray[np.float64] | float]
    decide: Callable[[Outputs, NDArray[Any] | None], Rows] | None = None
    rows: Callable[[Outputs, NDArray[Any] | None], tuple[Rows, Callable[[Rows], float]]] | None = None
    label_free: bool = False
    needs_labels: bool = True


def find_metric(name: str) -> Metric:
    """The built-in metric of this name, or the user's own of ``package.module:function``.

    The user's function takes ``(outputs, labels)``, ``outputs`` a dict of arrays and ``labels`` an array or None,
    and returns an array of one score a sample (NaN: not scored) or one number; larger is better. From one number no
    interval can be made, so a limit on it stays unknown.

    Raises:
        InputError: there is no such metric, or the function cannot be imported.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" in name:
        return _users_metric(name)
    if (found := _NUMBERED.fullmatch(name)) and 1 <= int(found[2]) <= MOST_K:
        return _numbered(found[1], int(found[2]))
    near = _nearest(name)
    hint = f"Did you mean {near!r}? " if near else ""
    families = ", ".join(f"{family}<1 to {MOST_K}>" for family in _FAMILIES)
    raise InputError(
        f"no metric is named {name!r}",
        hint=f"{hint}Built in are {', '.join(sorted(BUILT_IN))}, {families}; your own is written "
        "package.module:function.",
    )


def _nearest(name: str) -> str | None:
    """The metric that the user may have meant."""
    plain = re.sub(r"[\s@_-]+", "_", name.strip().lower())
    number = re.fullmatch(r"(?P<family>[a-z_]*?)_*(?:at_*)?0*(?P<k>[1-9]\d*)", plain)
    if number is None:
        return next(iter(difflib.get_close_matches(_OTHER_NAMES.get(plain, plain), BUILT_IN, n=1)), None)
    if number["family"] == "f":
        return "f1"
    family = next(iter(difflib.get_close_matches(number["family"], ("recall", "top"), n=1)), None)
    if family is None:
        return next(iter(difflib.get_close_matches(plain, BUILT_IN, n=1)), None)
    k = min(int(number["k"]), MOST_K)
    return f"recall_at_{k}" if family == "recall" else f"top{k}"


def _users_metric(name: str) -> Metric:
    from optimize.engines.child import resolve

    function = resolve(name)
    if not callable(function):
        raise InputError(f"the metric {name!r} is not a function")

    def score(outputs: Outputs, labels: NDArray[Any] | None) -> NDArray[np.float64] | float:
        try:
            given = np.asarray(function(dict(outputs), labels), dtype=np.float64)
        except Exception as error:  # whatever a user's function raises
            raise InputError(f"the metric {name!r} raised {type(error).__name__}: {error}") from error
        count = len(next(iter(outputs.values())))
        if given.ndim == 0 and np.isfinite(given):
            return float(given)
        if given.shape != (count,) or np.isinf(given).any() or np.isnan(given).all():
            raise InputError(
                f"the metric {name!r} gave an array of shape {list(given.shape)} for {count} samples",
                hint="It must give one finite score a sample (NaN where a sample is not scored), or one number.",
            )
        return given

    return Metric(name=name, unit="1", score=score, needs_labels=False)


# --- built in --------------------------------------------------------------------------------------------------


def _first(outputs: Outputs) -> NDArray[Any]:
    return next(iter(outputs.values()))


def _labels(name: str, labels: NDArray[Any] | None) -> NDArray[Any]:
    if labels is None:
        raise InputError(
            f"the metric {name!r} needs labels, and the samples have none",
            hint="Save them in the samples' .npz file as the array 'labels'.",
        )
    return labels


def _misfit(name: str, outputs: NDArray[Any], labels: NDArray[Any], wanted: str) -> InputError:
    return InputError(
        f"the metric {name!r} cannot be given: the first output has shape {list(outputs.shape)} and type "
        f"{outputs.dtype}, the labels {list(labels.shape)} and {labels.dtype}",
        hint=f"It wants {wanted}.",
    )


def _classes(name: str, outputs: Outputs, labels: NDArray[Any] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """The first output as (..., classes) with at least two classes, and labels (...) that name them."""
    scores, truth = _first(outputs), _labels(name, labels)
    wanted = "outputs of shape (samples, ..., classes) and integer labels of shape (samples, ...)"
    fits = scores.ndim >= 2 and scores.shape[-1] >= 2 and truth.shape == scores.shape[:-1] and truth.dtype.kind in "iu"
    if not fits:
        raise _misfit(name, scores, truth, wanted)
    named = truth[truth != IGNORED]
    if named.size and (named.min() < 0 or named.max() >= scores.shape[-1]):
        raise InputError(
            f"the metric {name!r} cannot be given: the labels go from {named.min()} to {named.max()}, "
            f"but the model tells {scores.shape[-1]} classes apart",
            hint=f"It wants {wanted}, counted from 0; {IGNORED} marks what is not scored.",
        )
    return scores, truth


def _mean_where(values: NDArray[Any], scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mean of each sample's scored values, NaN where it has none; shape (samples,)."""
    flat, keep = values.reshape(len(values), -1), scored.reshape(len(values), -1)
    counts = keep.sum(axis=1)
    totals = np.where(keep, flat, 0.0).sum(axis=1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def _accuracy(outputs: Outputs, labels: NDArray[Any] | None) -> NDArray[np.float64]:
    scores, truth = _classes("accuracy", outputs, labels)
    return _mean_where(scores.argmax(axis=-1) == truth, truth != IGNORED)


def _top(outputs: Outputs, labels: NDArray[Any] | None, *, k: int) -> NDArray[np.float64]:
    scores, truth = _classes(f"top{k}", outputs, labels)
    # Unsigned numbers have no negative ones, nor has the least of signed ones.
    falling = -scores if scores.dtype.kind == "f" else -scores.astype(np.float64)
    best = np.argsort(falling, axis=-1, kind="stable")[..., :k]
    return _mean_where((best == truth[..., None]).any(axis=-1), truth != IGNORED)


def _argmax(outputs: Outputs, labels: NDArray[Any] | None) -> Rows:
    chosen: Rows = _first(outputs).argmax(axis=-1)
    return chosen


def _f1_rows(outputs: Outputs, labels: NDArray[Any] | None) -> tuple[Rows, Callable[[Rows], float]]:
    """Predicted and true class of each sample, shape (samples, 2)."""
    scores, truth = _classes("f1", outputs, labels)
    if truth.ndim != 1 or (truth == IGNORED).any():
        raise _misfit("f1", scores, truth, "outputs of shape (samples, classes) and a label for every sample")
    classes = scores.shape[-1]
    return np.stack([scores.argmax(axis=-1), truth.astype(np.int64)], axis=1), lambda rows: _macro_f1(rows, classes)


def _macro_f1(rows: Rows, classes: int) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of each class that was predicted or is true, and their mean."""
    predicted = np.bincount(rows[:, 0], minlength=classes)
    true = np.bincount(rows[:, 1], minlength=classes)
    hits = np.bincount(rows[rows[:, 0] == rows[:, 1], 0], minlength=classes)
    seen = predicted + true
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())


def _f1(outputs: Outputs, labels: NDArray[Any] | None) -> float:
    rows, reduce = _f1_rows(outputs, labels)
    return reduce(rows)


def _mse(outputs: Outputs, labels: NDArray[Any] | None) -> NDArray[np.float64]:
    given, truth = _first(outputs), _labels("mse", labels)
    if given.size != truth.size or len(given) != len(truth) or truth.dtype.kind not in "iuf":
        raise _misfit("mse", given, truth, "outputs and labels of the same shape")
    difference = given.reshape(len(given), -1).astype(np.float64) - truth.reshape(len(given), -1)
    losses: NDArray[np.float64] = np.square(difference).mean(axis=1)
    return -losses


def _cosine(outputs: Outputs, labels: NDArray[Any] | None) -> NDArray[np.float64]:
    from optimize.parity import row_cosines, rows_of

    given, truth = _first(outputs), _labels("cosine", labels)
    if given.shape != truth.shape or given.ndim < 2 or truth.dtype.kind not in "iuf":
        raise _misfit("cosine", given, truth, "outputs and labels of the same shape (samples, ...)")
    return row_cosines(rows_of(given), rows_of(truth))


def _retrieved(outputs: Outputs, labels: NDArray[Any] | None, *, k: int) -> NDArray[np.int64]:
    """For each query the k rows it finds, nearest first, -1 where there are none; shape (samples, k).

    The corpus is every row labelled -1 and every row that some query's label names. Similarity is the cosine.
    """
    name = f"recall_at_{k}"
    vectors, truth = _first(outputs), _labels(name, labels)
    count = len(vectors)
    wanted = "outputs of shape (samples, size) and integer labels (samples,): the row that matches, -1 for none"
    if vectors.ndim != 2 or truth.shape != (count,) or truth.dtype.kind not in "iu":
        raise _misfit(name, vectors, truth, wanted)
    queries = np.flatnonzero(truth >= 0)
    matches = truth[queries]
    if not len(queries) or truth.min() < -1 or truth.max() >= count or (matches == queries).any():
        raise InputError(
            f"the metric {name!r} cannot be given: the labels must name other rows, from 0 to {count - 1}, or "
            f"be -1; they go from {truth.min()} to {truth.max()}",
            hint=f"It wants {wanted}.",
        )
    corpus = np.union1d(np.flatnonzero(truth == -1), matches)
    vectors = vectors.astype(np.promote_types(vectors.dtype, np.float32), copy=False)  # float16 cannot hold squares
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    unit = (vectors / lengths).astype(np.float32)
    found = np.full((count, k), -1, dtype=np.int64)
    for start in range(0, len(queries), 512):
        rows = queries[start : start + 512]
        similar = unit[rows] @ unit[corpus].T
        similar[rows[:, None] == corpus[None, :]] = -np.inf
        nearest = _largest(similar, k)
        # A query that is in the corpus does not find itself, even where there is nothing else left.
        itself = np.isneginf(np.take_along_axis(similar, nearest, axis=1))
        found[rows, : nearest.shape[1]] = np.where(itself, -1, corpus[nearest])
    return found


def _largest(values: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Where the k largest of each row are, largest first, of equal ones the earlier; shape (rows, at most k)."""
    if k == 1:
        first: NDArray[np.int64] = values.argmax(axis=1, keepdims=True)
        return first
    return np.argsort(-values, axis=1, kind="stable")[:, :k]


def _recall(outputs: Outputs, labels: NDArray[Any] | None, *, k: int) -> NDArray[np.float64]:
    found, truth = _retrieved(outputs, labels, k=k), _labels(f"recall_at_{k}", labels)
    hits = (found == truth[:, None]).any(axis=1)
    return np.where(truth >= 0, hits.astype(np.float64), np.nan)


def _nearest_row(outputs: Outputs, labels: NDArray[Any] | None, *, k: int) -> Rows:
    found: Rows = _retrieved(outputs, labels, k=k)[:, 0]
    return found


_FAMILIES = ("top", "recall_at_")
_NUMBERED = re.compile(rf"({'|'.join(_FAMILIES)})([1-9]\d*)")
_OTHER_NAMES = {"cos": "cosine", "cosine_similarity": "cosine", "mean_squared_error": "mse", "macro_f": "f1"}


def _numbered(family: str, k: int) -> Metric:
    """A metric that looks at the best k: every recall counts a flip where the nearest row is another one."""
    if family == "top":
        return Metric(name=f"top{k}", unit="fraction", score=functools.partial(_top, k=k), decide=_argmax)
    return Metric(
        name=f"recall_at_{k}",
        unit="fraction",
        score=functools.partial(_recall, k=k),
        decide=functools.partial(_nearest_row, k=k),
    )


BUILT_IN: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="accuracy", unit="fraction", score=_accuracy, decide=_argmax),
        _numbered("top", 5),
        Metric(name="f1", unit="fraction", score=_f1, decide=_argmax, rows=_f1_rows),
        Metric(name="mse", unit="1", score=_mse),
        Metric(name="cosine", unit="1", score=_cosine, label_free=True, needs_labels=False),
        _numbered("recall_at_", 1),
    )
}
"""The metrics that need no code of the user: ``accuracy`` (top-1), ``top5``, ``f1`` (macro), ``mse`` (its negative, so
that larger is better), ``cosine`` (with labels that are vectors, or without labels with the baseline's first output)
and ``recall_at_1`` (embeddings; a label is the row that matches, -1 marks the corpus)."""
