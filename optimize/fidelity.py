"""How truly a variant answers in one engine: parity with the baseline, the task metric, and what flipped.

A variant of another source than the baseline's is judged by the task metric alone: it is another model of the same
task, whose outputs may have other names and widths.

`measure_fidelity` has a child process run the held-out samples and compare the answers; `compare_outputs` is the
comparison alone. Intervals are 95 %. Their sources:

- *A proportion* (accuracy): Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
- *A rare event* (flips, losses, gains): each end is the one-sided 95 % bound of Clopper and Pearson, "The use of
  confidence or fiducial limits", 1934. For no event in n it is 1 - 0.05^(1/n), about 3/n: the rule of three of Hanley
  and Lippman-Hand, 1983. So no count of zero is ever taken for a rate of zero.
- *The drop of a metric of 0/1 scores*: with b samples that only the baseline has right and c that only the variant
  has right, drop = (b - c)/n. Both counts get the exact bounds above, which are joined by the method of variance
  estimates recovery (Newcombe, "Improved confidence intervals for the difference between binomial proportions based
  on paired data", 1998; Zou and Donner, "Construction of confidence limits about effect measures", 2008)::

      high = (b - c)/n + sqrt((upper(b) - b/n)^2 + (c/n - lower(c))^2)

  and the interval reported is the hull of this one and of the paired bootstrap. The exact part rules where the
  counts are small, the bootstrap where they are large, and nothing jumps between.
- *Everything else*: the percentile bootstrap over samples, drawn in pairs (Efron and Tibshirani, 1993, chapter 13).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.engines.local import Limits, run_in_child
from optimize.metrics import Metric, Outputs, find_metric
from optimize.samples import load_samples
from registry.errors import InputError, StageError
from registry.records import EngineSpec, Estimate, Fidelity, exact

RESAMPLES = 2000
RARE = 10  # fewer events than this, and a bootstrap has not seen enough of them
FEWEST = 20  # fewer samples than this, and a bootstrap's ends mean nothing
_SEED = 20_231
_Z = 1.959964  # of 95 %, two-sided
_ONE_SIDED = 0.05

Pair = tuple[float, float]
Ends = tuple[float | None, float | None]


# --- comparing -------------------------------------------------------------------------------------------------


def compare_outputs(
    reference: Outputs,
    variant: Outputs,
    labels: NDArray[Any] | None,
    metric: Metric | None,
    *,
    parity: bool = True,
) -> dict[str, Estimate]:
    """How the variant's answers differ from the reference's, sample by sample.

    Args:
        reference: output name -> array (samples, ...) of the baseline.
        variant: the same of the variant, in the same order of samples.
        labels: what the task metric understands, or None.
        metric: the task metric, or None for parity alone.
        parity: whether the two are the same model, so that their answers are to be alike. Another model of the same
            task may name and shape its outputs otherwise; then the metric alone tells.

    Returns:
        With parity ``cosine`` (mean over samples, of the output where it is lowest) and ``max_abs_error`` (over all
        outputs); with a metric ``accuracy``, ``accuracy_drop`` (reference minus variant) and, where the metric knows of
        decisions, ``flip_rate``.

    Raises:
        StageError: the answers hold NaN or new infinities, or, with parity, are of other names or shapes than the
            reference's.
        InputError: the metric cannot be given.
    """
    if parity:
        check_alike(reference, variant)
        found = _parity(reference, variant)
    else:
        check_finite(variant)
        found = {}
    if metric is not None:
        found |= _task(reference, variant, labels, metric)
    return found


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


def _parity(reference: Outputs, variant: Outputs) -> dict[str, Estimate]:
    cosines, largest = [], 0.0
    for name, wanted in reference.items():
        if wanted.dtype.kind not in "fiub" or not wanted.size:
            continue
        a, b = _rows(wanted), _rows(variant[name])
        largest = max(largest, float(np.abs(a - b).max()))
        if wanted.dtype.kind == "f" and a.shape[1] > 1:
            cosines.append(row_cosines(a, b))
    count = len(next(iter(reference.values())))
    found = {
        "max_abs_error": Estimate(
            value=largest, low=largest, high=largest, runs=count, method="largest over the samples", unit="1"
        )
    }
    if cosines:
        worst = min(cosines, key=lambda values: float(values.mean()))
        found["cosine"] = _estimate(float(worst.mean()), _bootstrap_mean(worst), count, "bootstrap", "1")
    return found


def _rows(array: NDArray[Any]) -> NDArray[np.float64]:
    """One row a sample, in float64; infinities (the same in both models) as zeros, which weigh nothing."""
    return np.nan_to_num(array.reshape(len(array), -1).astype(np.float64), posinf=0.0, neginf=0.0)


def row_cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine of each pair of rows, shape (rows,): 1 for two zero rows, 0 for one; no overflow at any scale."""
    a, b = (rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float64).tiny) for rows in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    cosines = np.einsum("ij,ij->i", a, b) / np.where(lengths > 0, lengths, 1.0)
    clipped: NDArray[np.float64] = np.where(both_zero, 1.0, np.clip(cosines, -1.0, 1.0))
    return clipped


def _task(reference: Outputs, variant: Outputs, labels: NDArray[Any] | None, metric: Metric) -> dict[str, Estimate]:
    before, after = metric.score(reference, labels), metric.score(variant, labels)
    if isinstance(before, float) or isinstance(after, float):
        if metric.rows is not None:
            found = _from_rows(metric.rows(reference, labels), metric.rows(variant, labels), metric.unit)
        else:
            found = _from_numbers(float(np.mean(before)), float(np.mean(after)), reference, metric.unit)
        scored = np.ones(len(next(iter(reference.values()))), dtype=bool)
    else:
        scored = np.isfinite(before) & np.isfinite(after)
        if not scored.any():
            raise InputError(f"the metric {metric.name!r} scores none of the {len(scored)} samples")
        found = {
            "accuracy": _mean_score(after[scored], metric.unit),
            "accuracy_drop": drop_of_scores(before[scored], after[scored], metric.unit),
        }
    if metric.decide is not None:
        was, now = metric.decide(reference, labels)[scored], metric.decide(variant, labels)[scored]
        flipped = (was != now).reshape(len(was), -1).any(axis=1)
        found["flip_rate"] = rate(int(flipped.sum()), len(flipped))
    return found


def _from_numbers(before: float, after: float, outputs: Outputs, unit: str) -> dict[str, Estimate]:
    count = len(next(iter(outputs.values())))
    return {
        "accuracy": _estimate(after, (None, None), count, "one number, no interval", unit),
        "accuracy_drop": _estimate(before - after, (None, None), count, "one number, no interval", unit),
    }


def _mean_score(scores: NDArray[np.float64], unit: str) -> Estimate:
    count, mean = len(scores), float(scores.mean())
    if np.isin(scores, (0.0, 1.0)).all():
        return _estimate(mean, wilson(int(scores.sum()), count), count, "Wilson", unit)
    return _estimate(mean, _bootstrap_mean(scores), count, "bootstrap", unit)


def drop_of_scores(before: NDArray[np.float64], after: NDArray[np.float64], unit: str = "fraction") -> Estimate:
    """The mean of ``before - after`` with the interval that the module's docstring explains.

    Args:
        before: the baseline's score for each sample, shape (samples,), finite.
        after: the variant's, for the same samples.
        unit: of the scores.
    """
    if np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all():
        losses, gains = int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())
        return _drop_of_counts(losses, gains, len(before), unit)
    differences = before - after
    value = float(differences.mean())
    low, high = _bootstrap_mean(differences)
    if low is not None and high is not None and np.count_nonzero(differences) < RARE:
        # So few samples differ that the bootstrap has not seen how many might; each may weigh as the heaviest did.
        weight = float(np.abs(differences).max()) or float(np.ptp(before))
        worse, better = int((differences > 0).sum()), int((differences < 0).sum())
        net_low, net_high = net_bounds(worse, better, len(differences))
        low, high = min(low, weight * net_low), max(high, weight * net_high)
    return _estimate(value, (low, high), len(before), "paired bootstrap", unit)


def _drop_of_counts(losses: int, gains: int, count: int, unit: str) -> Estimate:
    net_low, net_high = net_bounds(losses, gains, count)
    shares = [losses / count, gains / count, (count - losses - gains) / count]
    drawn = np.random.default_rng(_SEED).multinomial(count, shares, RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, [0.025, 0.975])
    ends = min(float(low), net_low), max(float(high), net_high)
    return _estimate((losses - gains) / count, ends, count, "paired bootstrap, exact bounds", unit)


def net_bounds(losses: int, gains: int, count: int) -> Pair:
    """Ends of the interval of (losses - gains)/count from exact bounds of both; see the module's docstring."""
    loss, gain = losses / count, gains / count
    (loss_low, loss_high), (gain_low, gain_high) = exact_bounds(losses, count), exact_bounds(gains, count)
    below = math.hypot(loss - loss_low, gain_high - gain)
    above = math.hypot(loss_high - loss, gain - gain_low)
    return loss - gain - below, loss - gain + above


def exact_bounds(events: int, count: int) -> Pair:
    """The lowest and the highest rate that this many events in this many samples leave possible, each at 95 %."""
    from scipy.special import betaincinv

    low = float(betaincinv(events, count - events + 1, _ONE_SIDED)) if events else 0.0
    high = float(betaincinv(events + 1, count - events, 1 - _ONE_SIDED)) if events < count else 1.0
    return low, high


def rate(events: int, count: int) -> Estimate:
    """The share of events, with exact bounds."""
    return _estimate(events / count, exact_bounds(events, count), count, "Clopper-Pearson", "fraction")


def wilson(events: int, count: int) -> Pair:
    """Wilson's 95 % interval of a proportion."""
    share, spread = events / count, _Z**2 / count
    half = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def _bootstrap_mean(values: NDArray[np.float64]) -> Ends:
    if len(values) < FEWEST:
        return None, None
    generator = np.random.default_rng(_SEED)
    at_once = max(1, 4_000_000 // len(values))
    means = [
        values[generator.integers(0, len(values), (min(at_once, RESAMPLES - done), len(values)))].mean(axis=1)
        for done in range(0, RESAMPLES, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


Resampled = tuple[NDArray[Any], Any]


def _from_rows(before: Resampled, after: Resampled, unit: str) -> dict[str, Estimate]:
    """Estimates of a metric that is no mean, from samples drawn again for both models alike."""
    (was, reduce), (now, reduce_now) = before, after
    count = len(was)
    drop = reduce(was) - reduce_now(now)
    if count < FEWEST:
        return _from_numbers(reduce(was), reduce_now(now), {"rows": was}, unit)
    generator = np.random.default_rng(_SEED)
    pairs = np.empty((RESAMPLES, 2))
    for i in range(RESAMPLES):
        drawn = generator.integers(0, count, count)
        pairs[i] = reduce(was[drawn]), reduce_now(now[drawn])
    value_low, value_high = np.quantile(pairs[:, 1], [0.025, 0.975])
    low, high = np.quantile(pairs[:, 0] - pairs[:, 1], [0.025, 0.975])
    changed = int((was != now).any(axis=1).sum())
    if changed < RARE:
        unseen = exact_bounds(changed, count)[1] * count * _weight_of_one_flip(was, reduce)
        low, high = min(low, -unseen), max(high, unseen)
    return {
        "accuracy": _estimate(reduce_now(now), (float(value_low), float(value_high)), count, "bootstrap", unit),
        "accuracy_drop": _estimate(drop, (float(low), float(high)), count, "paired bootstrap", unit),
    }


def _weight_of_one_flip(rows: NDArray[Any], reduce: Any) -> float:
    """The most that the metric loses when one sample is decided as another one was; of up to 200 samples tried."""
    generator = np.random.default_rng(_SEED)
    whole, most = reduce(rows), 0.0
    for i in generator.permutation(len(rows))[:200]:
        others = np.flatnonzero(rows[:, 0] != rows[i, 0])
        if len(others):
            spoilt = rows.copy()
            spoilt[i, 0] = rows[generator.choice(others), 0]
            most = max(most, whole - reduce(spoilt))
    return float(most)


def _estimate(value: float, ends: Ends, runs: int, method: str, unit: str) -> Estimate:
    """An estimate whose ends hold its value, which rounding and the bootstrap's own noise may leave out by a hair."""
    low, high = (None if ends[0] is None else min(ends[0], value)), (None if ends[1] is None else max(ends[1], value))
    return Estimate(value=value, low=low, high=high, runs=runs, method=method, unit=unit)


# --- running ---------------------------------------------------------------------------------------------------


def evaluate(
    *,
    entry: str,
    engine: Mapping[str, str],
    samples: str,
    out: str,
    batch_size: int,
    threads: int,
    seed: int,
    samples_digest: str | None = None,
    reference: str | None = None,
    parity: bool = True,
    metric: str | None = None,
) -> dict[str, Any]:
    """Runs the samples through a model in this process; the child's side of `measure_fidelity`.

    Args:
        entry: the model file.
        engine: ``name``, ``precision`` and ``graph_level`` of an `EngineSpec`.
        samples: the ``.npz`` of held-out samples.
        out: where the answers are written as ``.npz``, in the samples' order.
        batch_size: samples a run; their order is shuffled, so that each meets mixed neighbours.
        threads: of the session.
        seed: of the shuffle.
        samples_digest: what the samples' digest must be, or None.
        reference: the ``.npz`` of the baseline's answers; None where this is the baseline.
        parity: whether the answers are to be like the baseline's; see `compare_outputs`.
        metric: the task metric's name, or None.

    Returns:
        ``engine_version``, ``samples`` and ``metrics`` (name -> fields of an `Estimate`).

    Raises:
        StageError: the model cannot be opened or run here, or its answers cannot be compared.
        InputError: the metric cannot be given.
    """
    from profiles.serving.session import SessionError, open_session

    held_out = load_samples(Path(samples))
    if samples_digest is not None and held_out.digest != samples_digest:
        raise InputError(f"{samples} changed while the campaign ran", hint="Run it again; what was judged is kept.")
    chosen = None if metric is None else find_metric(metric)
    try:
        session = open_session(entry, engine=engine["name"], precision=engine["precision"],
                               graph_level=engine["graph_level"], threads=threads)  # fmt: skip
        order = np.random.default_rng(seed).permutation(len(held_out))
        sizes = [len(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
        answers = [session.run(batch) for batch in held_out.batches(batch_size, order=order)]
    except SessionError as error:
        raise StageError(str(error)) from error
    outputs = _in_order(answers, sizes, order)
    wanted = outputs if reference is None else load_outputs(Path(reference))
    found = compare_outputs(wanted, outputs, held_out.labels, chosen, parity=parity)
    if reference is None:
        found |= _of_itself(found)
    _save(Path(out), outputs)
    return {
        "engine_version": session.engine_version,
        "samples": len(held_out),
        "metrics": {name: asdict(estimate) for name, estimate in found.items()},
    }


def _in_order(
    answers: Sequence[Mapping[str, NDArray[Any]]], sizes: Sequence[int], order: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """Answers of all batches by output name, in the order the samples had before they were shuffled."""
    back = np.argsort(order)
    outputs = {}
    for name in answers[0]:
        parts = [answer[name] for answer in answers]
        for part, size in zip(parts, sizes, strict=True):
            if part.ndim == 0 or len(part) != size or part.shape[1:] != parts[0].shape[1:]:
                raise StageError(
                    f"its output {name!r} has shape {list(part.shape)} for a batch of {size}: not one row a sample",
                    hint="burnish judges models whose outputs all have the batch as their first dimension.",
                )
        outputs[name] = np.concatenate(parts)[back]
    return outputs


def _of_itself(found: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """What a model differs from itself by: nothing, which is counted and not estimated."""
    nothing = {"accuracy_drop": 0.0, "flip_rate": 0.0, "max_abs_error": 0.0, "cosine": 1.0}
    return {name: exact(nothing[name], found[name].unit) for name in nothing if name in found}


def _save(path: Path, outputs: Mapping[str, NDArray[Any]]) -> None:
    partial = path.with_name(f"{path.stem}.partial.npz")
    np.savez(partial, **outputs)
    partial.replace(path)


def load_outputs(path: Path) -> dict[str, NDArray[Any]]:
    """Answers that `evaluate` wrote: output name -> array (samples, ...)."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def measure_fidelity(
    variant_id: str,
    entry: Path,
    engine: EngineSpec,
    *,
    samples: Path,
    samples_digest: str,
    out: Path,
    reference: Path | None,
    parity: bool = True,
    metric: str,
    batch_size: int,
    instruction_set: str,
    threads: int = 1,
    seed: int = 0,
    limits: Limits | None = None,
    cpus: Sequence[int] | None = None,
    python_path: Path | None = None,
) -> Fidelity:
    """How a variant answers in an engine, found in a child process.

    Args:
        variant_id: of the variant.
        entry: its model file.
        engine: the engine, and how it is set.
        samples: the ``.npz`` of held-out samples.
        samples_digest: their digest.
        out: where the answers are kept, as ``.npz``.
        reference: the baseline's answers, kept by an earlier call; None where this is the baseline.
        parity: whether they are of the same source, so that the answers are to be alike; if not, the metric alone is
            judged, and ``cosine`` and ``max_abs_error`` are not given.
        metric: the task metric's name.
        batch_size: samples a run, which should be what is served where the variant is batch dependent.
        instruction_set: the widest that the engine can use here.
        threads: of the session.
        seed: of the order in which samples meet in batches.
        limits: of the child.
        cpus: the child may run on, or None for all.
        python_path: the folder the user's own metric is found in.

    Raises:
        StageError: the model cannot be opened or run in this engine, or its answers are NaN or not comparable.
        InputError: the metric cannot be given.
        ChildFailure: the child was stopped by a limit, or died.
    """
    found = run_in_child(
        "optimize.fidelity:evaluate",
        {
            "entry": str(entry.resolve()),
            "engine": {"name": engine.name, "precision": engine.precision, "graph_level": engine.graph_level},
            "samples": str(samples.resolve()),
            "samples_digest": samples_digest,
            "out": str(out.resolve()),
            "batch_size": batch_size,
            "threads": threads,
            "seed": seed,
            "reference": None if reference is None else str(reference.resolve()),
            "parity": parity,
            "metric": metric,
        },
        limits=limits,
        cpus=cpus,
        python_path=python_path,
        environment=thread_limits(threads),
    )
    return Fidelity(
        variant_id=variant_id,
        engine=engine,
        engine_version=found["engine_version"],
        instruction_set=instruction_set,
        batch_size=batch_size,
        samples_digest=samples_digest,
        samples=found["samples"],
        task_metric=metric,
        metrics={name: Estimate(**fields) for name, fields in found["metrics"].items()},
    )


def thread_limits(threads: int) -> dict[str, str]:
    """Environment that holds the pools of numerical libraries to this many threads."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def fidelity_components(
    variant_id: str,
    engine: EngineSpec,
    *,
    engine_version: str,
    instruction_set: str,
    batch_size: int,
    samples_digest: str,
    metric: str,
    metric_code: Mapping[str, str] | None = None,
    parity: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """What a `Fidelity` depends on, by name: equal components mean the same result, and say what differed if not.

    ``metric_code`` is what `optimize.sources.code_digests` says of the user's own metric; a built-in one has none.
    """
    return {
        "variant": variant_id,
        "engine": engine.key,
        "engine_version": engine_version,
        "instruction_set": instruction_set,
        "batch_size": batch_size,
        "samples": samples_digest,
        "metric": metric,
        "metric_code": dict(metric_code or {}),
        "parity": parity,
        "seed": seed,
        "method": 1,
    }
