"""How truly a variant answers in one engine: parity with the baseline, the task metric, and what flipped.

A variant of another source than the baseline's is judged by the task metric alone: it is another model of the same
task, whose outputs may have other names and widths.

`measure_fidelity` has a child process run the held-out samples and compare the answers; `compare_outputs` is the
comparison alone. What intervals mean, and where they come from, says `optimize.intervals`; the statistics of parity
are those of `optimize.parity`. Besides those and the task metric there are

- ``slice_drop_max``: the drop of the slice (a group of samples that the user named) that lost most. Its interval holds
  for the worst of all slices, not only for the one that happened to be it (`drop_by_slice`).
- ``batch_dependence``: how far an answer moves with other neighbours in the batch (`batch_dependence`), and
  ``batch_flip_rate``, the share of samples whose decision moves with it.
"""

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.adaptation import adapt_samples, as_jsonable, from_jsonable
from optimize.engines.local import Limits, run_in_child
from optimize.intervals import (
    FEWEST,
    drop_of_rows,
    drop_of_scores,
    exact_bounds,
    mean_of_scores,
    net_bounds,
    rate,
    single,
    wilson,
)
from optimize.metrics import Metric, Outputs, find_metric
from optimize.parity import MOST_DB, check_alike, check_finite, parity, row_cosines, rows_of, spread
from optimize.samples import Samples, load_samples
from registry.errors import InputError, StageError
from registry.records import Adaptation, EngineSpec, Estimate, Fidelity, exact

__all__ = (
    "batch_dependence", "check_alike", "check_finite", "compare_outputs", "drop_by_slice", "drop_of_scores", "evaluate",
    "exact_bounds", "fidelity_components", "judge_answers", "load_outputs", "measure_fidelity", "net_bounds", "rate",
    "row_cosines", "save_outputs", "thread_limits", "wilson",
)  # fmt: skip

BATCHED = 128  # samples that meet other neighbours, to see whether that moves their answers
_ARRANGEMENTS = 2
_MOST_NAMED = 5


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
        With parity the metrics of `optimize.parity`, of the output where each is worst, and per output where there are
        several; with a metric ``accuracy``, ``accuracy_drop`` (reference minus variant) and, where the metric knows of
        decisions, ``flip_rate``.

    Raises:
        StageError: the answers hold NaN or new infinities, or, with parity, are of other names or shapes than the
            reference's.
        InputError: the metric cannot be given.
    """
    found, _ = _compared(reference, variant, labels, metric, alike=parity)
    return found


def _compared(
    reference: Outputs, variant: Outputs, labels: NDArray[Any] | None, metric: Metric | None, *, alike: bool
) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    if alike:
        check_alike(reference, variant)
        found, notes = parity(reference, variant)
    else:
        check_finite(variant)
        found, notes = {}, ()
    if metric is not None:
        found |= _task(reference, variant, truth_of(metric, reference, labels), metric)
    return found, notes


def truth_of(metric: Metric, reference: Outputs, labels: NDArray[Any] | None) -> NDArray[Any] | None:
    """The labels, or, where there are none and the metric can do without, the baseline's answers in their place."""
    if labels is None and metric.label_free:
        return next(iter(reference.values()))
    return labels


def _task(reference: Outputs, variant: Outputs, labels: NDArray[Any] | None, metric: Metric) -> dict[str, Estimate]:
    before, after = metric.score(reference, labels), metric.score(variant, labels)
    if isinstance(before, float) or isinstance(after, float):
        count = len(next(iter(reference.values())))
        if metric.rows is not None:
            value, drop = drop_of_rows(metric.rows(reference, labels), metric.rows(variant, labels), metric.unit)
        else:
            was, now = float(np.mean(before)), float(np.mean(after))
            value, drop = single(now, count, metric.unit), single(was - now, count, metric.unit)
        found = {"accuracy": value, "accuracy_drop": drop}
        scored = np.ones(count, dtype=bool)
    else:
        scored = np.isfinite(before) & np.isfinite(after)
        if not scored.any():
            raise InputError(f"the metric {metric.name!r} scores none of the {len(scored)} samples")
        found = {
            "accuracy": mean_of_scores(after[scored], metric.unit),
            "accuracy_drop": drop_of_scores(before[scored], after[scored], metric.unit),
        }
    if metric.decide is not None:
        was, now = metric.decide(reference, labels)[scored], metric.decide(variant, labels)[scored]
        found["flip_rate"] = rate(int(_differ(was, now).sum()), len(was))
    return found


def _differ(was: NDArray[Any], now: NDArray[Any]) -> NDArray[np.bool_]:
    """Which samples were decided otherwise, shape (samples,)."""
    differ: NDArray[np.bool_] = (was != now).reshape(len(was), -1).any(axis=1)
    return differ


# --- slices ----------------------------------------------------------------------------------------------------


def drop_by_slice(
    reference: Outputs, variant: Outputs, labels: NDArray[Any] | None, metric: Metric, slices: NDArray[Any]
) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    """The drop of the task metric where it is largest among the slices.

    Args:
        reference: the baseline's outputs.
        variant: the variant's.
        labels: what the metric understands, or None.
        metric: the task metric.
        slices: the slice of each sample, shape (samples,), whole numbers or text.

    Returns:
        ``slice_drop_max``, and what is to be said: which slice it is, and which slices have fewer than 20 samples that
        are scored and were therefore not judged. No metric where all are that small, or where the metric is one number
        that belongs to no sample. Its ends are the largest of the slices' ends, each made at 1 - 0.05 over the number
        of slices: with 95 % no slice has lost more than the upper one (Bonferroni).

    Raises:
        InputError: the metric cannot be given.
    """
    drop_in = _drop_within(reference, variant, truth_of(metric, reference, labels), metric)
    if drop_in is None:
        return {}, (f"the metric {metric.name!r} is one number over all samples, which slices cannot be judged by",)
    scored, drop = drop_in
    members = {str(name): np.flatnonzero((slices == name) & scored) for name in np.unique(slices)}
    judged = {name: rows for name, rows in members.items() if len(rows) >= FEWEST}
    small = sorted(set(members) - set(judged))
    notes = [_too_small(small, len(members))] if small else []
    if not judged:
        return {}, tuple(notes)
    drops = {name: drop(rows, len(judged)) for name, rows in judged.items()}
    worst = max(drops, key=lambda name: (drops[name].value, drops[name].high))
    highs, lows = [one.high for one in drops.values()], [one.low for one in drops.values()]
    found = Estimate(
        value=drops[worst].value,
        low=max(low for low in lows if low is not None),
        high=max(high for high in highs if high is not None),
        runs=len(judged[worst]),
        method=f"{drops[worst].method}, Bonferroni over {len(judged)} slices",
        unit=metric.unit,
    )
    told = f"the slice with the largest drop is {worst!r}: {drops[worst].value:+.4f} over {len(judged[worst])} samples"
    return {"slice_drop_max": found}, (told, *notes)


DropIn = Callable[[NDArray[np.int64], int], Estimate]


def _drop_within(
    reference: Outputs, variant: Outputs, labels: NDArray[Any] | None, metric: Metric
) -> tuple[NDArray[np.bool_], DropIn] | None:
    """Which samples are scored, and (rows, how many such intervals hold together) -> the drop over those rows."""
    if metric.rows is not None:
        (was, reduce), (now, reduce_now) = metric.rows(reference, labels), metric.rows(variant, labels)
        return np.ones(len(was), dtype=bool), lambda rows, several: drop_of_rows(
            (was[rows], reduce), (now[rows], reduce_now), metric.unit, comparisons=several
        )[1]
    before, after = metric.score(reference, labels), metric.score(variant, labels)
    if isinstance(before, float) or isinstance(after, float):
        return None
    first, second = before, after
    return np.isfinite(first) & np.isfinite(second), lambda rows, several: drop_of_scores(
        first[rows], second[rows], metric.unit, comparisons=several
    )


def _too_small(small: Sequence[str], all_of_them: int) -> str:
    named = ", ".join(repr(name) for name in small[:_MOST_NAMED]) + (", ..." if len(small) > _MOST_NAMED else "")
    return f"{len(small)} of {all_of_them} slices have fewer than {FEWEST} scored samples and are not judged: {named}"


# --- neighbours ------------------------------------------------------------------------------------------------


def batch_dependence(
    run: Callable[[NDArray[np.int64]], Outputs],
    outputs: Outputs,
    order: NDArray[np.int64],
    labels: NDArray[Any] | None,
    metric: Metric | None,
    *,
    batch_size: int,
    seed: int,
) -> dict[str, Estimate]:
    """How far answers move when the same samples meet other neighbours, at other places, in batches of the same size.

    Args:
        run: order of samples -> their answers, in the samples' order (rows of samples that were not run are left out).
        outputs: the answers known, in the samples' order.
        order: in which they were found.
        labels: what the metric understands, or None.
        metric: whose decisions are counted, or None.
        batch_size: samples a run.
        seed: of the new arrangements.

    Returns:
        ``batch_dependence``: the largest difference of an answer's element over up to 128 samples (one batch, where
        that is larger) in two other arrangements, as a part of the output's `optimize.parity.spread`; where the metric
        decides, ``batch_flip_rate``.
    """
    if batch_size == 1:
        return {"batch_dependence": exact(0.0, "1")}  # no neighbours
    generator = np.random.default_rng([seed, batch_size])
    whole = order[: len(order) // batch_size * batch_size]  # met a full batch; all of them where there is none
    whole = whole if len(whole) else order
    count = min(len(whole), max(BATCHED // batch_size * batch_size, batch_size))
    chosen = np.sort(generator.choice(whole, count, replace=False))
    widths = {name: spread(rows_of(array)) for name, array in outputs.items() if array.size}
    known = {name: rows_of(array[chosen]) for name, array in outputs.items() if array.size}
    decided = None if metric is None or metric.decide is None else metric.decide(outputs, labels)
    largest, flipped = 0.0, np.zeros(count, dtype=bool)
    for _ in range(_ARRANGEMENTS):
        again = run(generator.permutation(chosen))
        for name, rows in known.items():
            largest = max(largest, float(np.abs(rows_of(again[name]) - rows).max()) / widths[name])
        if metric is not None and metric.decide is not None and decided is not None:
            moved = {name: array.copy() for name, array in outputs.items()}
            for name, array in again.items():
                moved[name][chosen] = array
            flipped |= _differ(decided[chosen], metric.decide(moved, labels)[chosen])
    found = {
        "batch_dependence": Estimate(
            value=largest, low=largest, high=largest, runs=count, method="largest over the samples", unit="1"
        )
    }
    if decided is not None:
        found["batch_flip_rate"] = rate(int(flipped.sum()), count)
    return found


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
    saturation: bool = False,
    adaptation: Sequence[Any] = (),
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
        saturation: whether to count u8 times s8 sums that a CPU without VNNI would cut off (`optimize.saturation`).
        adaptation: how the model's inputs come from the samples, as `optimize.adaptation.as_jsonable` wrote it.

    Returns:
        ``engine_version``, ``samples``, ``metrics`` (name -> fields of an `Estimate`) and ``notes``.

    Raises:
        StageError: the model cannot be opened or run here, or its answers cannot be compared.
        InputError: the metric cannot be given.
    """
    from profiles.serving.session import SessionError, open_session

    held_out = load_samples(Path(samples))
    if samples_digest is not None and held_out.digest != samples_digest:
        raise InputError(f"{samples} changed while the campaign ran", hint="Run it again; what was judged is kept.")
    held_out = adapt_samples(held_out, from_jsonable(adaptation))
    chosen = None if metric is None else find_metric(metric)

    def answers(order: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        sizes = [len(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
        try:
            found = [session.run(batch) for batch in held_out.batches(batch_size, order=order)]
        except SessionError as error:
            raise StageError(str(error)) from error
        return _in_order(found, sizes, order)

    try:
        session = open_session(entry, engine=engine["name"], precision=engine["precision"],
                               graph_level=engine["graph_level"], threads=threads)  # fmt: skip
    except SessionError as error:
        raise StageError(str(error)) from error
    order = np.random.default_rng(seed).permutation(len(held_out))
    outputs = answers(order)
    wanted = outputs if reference is None else load_outputs(Path(reference))
    labels = held_out.labels
    found, notes = _against(wanted, outputs, held_out, chosen, parity=parity, adapted=bool(adaptation))
    if reference is None:
        found, notes = found | _of_itself(found), tuple(note for note in notes if "not judged" in note)
    truth = labels if chosen is None else truth_of(chosen, wanted, labels)
    found |= batch_dependence(answers, outputs, order, truth, chosen, batch_size=batch_size, seed=seed)
    if saturation:
        saturated, told = _saturated(Path(entry), held_out.inputs)
        found, notes = found | saturated, (*notes, *told)
    save_outputs(Path(out), outputs)
    return {
        "engine_version": session.engine_version,
        "samples": len(held_out),
        "metrics": {name: asdict(estimate) for name, estimate in found.items()},
        "notes": list(notes),
    }


def evaluate_answers(
    *,
    answers: str,
    samples: str,
    samples_digest: str,
    reference: str,
    parity: bool,
    metric: str,
    adapted: bool,
) -> dict[str, Any]:
    """Judges answers that somebody else gave; the child's side of `judge_answers`, as `evaluate` is otherwise.

    Raises:
        StageError: the answers cannot be compared.
        InputError: the metric cannot be given, or the samples changed.
    """
    held_out = load_samples(Path(samples))
    if held_out.digest != samples_digest:
        raise InputError(f"{samples} changed while the campaign ran", hint="Run it again; what was judged is kept.")
    wanted, outputs = load_outputs(Path(reference)), load_outputs(Path(answers))
    found, notes = _against(wanted, outputs, held_out, find_metric(metric), parity=parity, adapted=adapted)
    return {
        "samples": len(held_out),
        "metrics": {name: asdict(estimate) for name, estimate in found.items()},
        "notes": list(notes),
    }


def _against(
    wanted: Outputs, outputs: Outputs, held_out: Samples, metric: Metric | None, *, parity: bool, adapted: bool
) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    """Answers held against the baseline's, as a whole and by slice."""
    # Smaller inputs may give outputs of fewer rows a sample, which nothing of the baseline's is to be compared with.
    smaller = adapted and any(wanted[name].shape != outputs[name].shape for name in outputs if name in wanted)
    found, notes = _compared(wanted, outputs, held_out.labels, metric, alike=parity and not smaller)
    if metric is not None and held_out.slices is not None:
        by_slice, told = drop_by_slice(wanted, outputs, held_out.labels, metric, held_out.slices)
        found, notes = found | by_slice, (*notes, *told)
    return found, notes


def _saturated(entry: Path, inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    from optimize.saturation import check_saturation

    found = check_saturation(entry, inputs)
    if not found.nodes:
        return {}, ()
    return {"saturated_share": exact(found.share, "fraction")}, ((found.sentence,) if found.saturated else ())


def _in_order(
    answers: Sequence[Mapping[str, NDArray[Any]]], sizes: Sequence[int], order: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """Answers of all batches by output name, in the order the samples of ``order`` have among all."""
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
    nothing = {
        "accuracy_drop": 0.0, "slice_drop_max": 0.0, "flip_rate": 0.0, "max_abs_error": 0.0, "p99_error": 0.0,
        "mismatch_share": 0.0, "cosine": 1.0, "worst_cosine": 1.0, "snr_db": MOST_DB,
    }  # fmt: skip
    known = {name: nothing.get(name.partition(".")[0]) for name in found}
    return {name: exact(value, found[name].unit) for name, value in known.items() if value is not None}


def save_outputs(path: Path, outputs: Mapping[str, NDArray[Any]]) -> None:
    """Writes answers for `load_outputs`, whole or not at all, so that they survive a loss of power."""
    partial = path.with_name(f"{path.stem}.partial.npz")
    try:
        with partial.open("wb") as file:
            # numpy's savez leaves its archive open where it fails.
            with zipfile.ZipFile(file, "w") as archive:
                for name, array in outputs.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)  # type: ignore[no-untyped-call]
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
    saturation: bool = False,
    adaptation: Sequence[Adaptation] = (),
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
            judged, and the metrics of `optimize.parity` are not given.
        metric: the task metric's name.
        batch_size: samples a run, which should be what is served where the variant is batch dependent.
        instruction_set: the widest that the engine can use here.
        threads: of the session.
        seed: of the order in which samples meet in batches.
        saturation: whether to count what a CPU without VNNI would cut off, as ``saturated_share``.
        adaptation: how the variant's inputs come from the samples.
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
            "saturation": saturation,
            "adaptation": as_jsonable(adaptation),
        },
        limits=limits,
        cpus=cpus,
        python_path=python_path,
        environment=thread_limits(threads),
    )
    return _fidelity(
        found,
        variant_id=variant_id,
        engine=engine,
        engine_version=found["engine_version"],
        instruction_set=instruction_set,
        batch_size=batch_size,
        samples_digest=samples_digest,
        task_metric=metric,
    )


def judge_answers(
    variant_id: str,
    engine: EngineSpec,
    *,
    engine_version: str,
    instruction_set: str,
    batch_size: int,
    answers: Path,
    samples: Path,
    samples_digest: str,
    reference: Path,
    parity: bool,
    metric: str,
    adapted: bool,
    limits: Limits | None = None,
    python_path: Path | None = None,
) -> Fidelity:
    """How a server answers with a variant, from the answers it gave; compared in a child process.

    Args:
        variant_id: of the variant.
        engine: what serves it.
        engine_version: of that, as far as it is known.
        instruction_set: the same.
        batch_size: most requests in one of the server's batches.
        answers: the server's, as `save_outputs` wrote them.
        samples: the ``.npz`` of held-out samples.
        samples_digest: their digest.
        reference: the baseline's answers in process.
        parity: as for `measure_fidelity`.
        metric: the task metric's name.
        adapted: whether the variant's inputs are others than the samples.
        limits: of the child.
        python_path: the folder the user's own metric is found in.

    Raises:
        StageError: the answers are NaN or not comparable.
        InputError: the metric cannot be given.
        ChildFailure: the child was stopped by a limit, or died.
    """
    found = run_in_child(
        "optimize.fidelity:evaluate_answers",
        {
            "answers": str(answers.resolve()),
            "samples": str(samples.resolve()),
            "samples_digest": samples_digest,
            "reference": str(reference.resolve()),
            "parity": parity,
            "metric": metric,
            "adapted": adapted,
        },
        limits=limits,
        python_path=python_path,
    )
    return _fidelity(
        found,
        variant_id=variant_id,
        engine=engine,
        engine_version=engine_version,
        instruction_set=instruction_set,
        batch_size=batch_size,
        samples_digest=samples_digest,
        task_metric=metric,
    )


def _fidelity(found: Mapping[str, Any], **of: Any) -> Fidelity:
    """What a child process found out, as a record; ``of`` says of what it is."""
    return Fidelity(
        samples=found["samples"],
        metrics={name: Estimate(**fields) for name, fields in found["metrics"].items()},
        notes=tuple(found["notes"]),
        **of,
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
    saturation: bool = False,
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
        "saturation": saturation,
        "method": 3,
    }
