"""What is known of each candidate: one table of estimates, joined from measurements and fidelities."""

from collections.abc import Iterable, Mapping, Sequence

from registry.records import Candidate, EngineSpec, Estimate, Fidelity, Measurement, Variant, exact

Key = tuple[str, str | None]
"""A metric's name, and the load it belongs to or None."""

BYTES_IN_MB = 1e6
_Work = tuple[str, EngineSpec, str]


def metric_table(
    candidates: Sequence[Candidate],
    measurements: Sequence[Measurement],
    fidelities: Sequence[Fidelity],
    variants: Sequence[Variant],
) -> dict[str, dict[Key, Estimate]]:
    """Everything that is known of each candidate: candidate id -> (metric, load) -> estimate.

    Metrics of fidelity are those that `fidelity_of` finds; ``size_mb`` (10^6 bytes) is that of the artifact.
    """
    variant_of = {variant.id: variant for variant in variants}
    sizes = {variant.id: exact(variant.artifact.size_bytes / BYTES_IN_MB, "MB") for variant in variants}
    done: dict[_Work, list[Fidelity]] = {}
    for one in fidelities:
        done.setdefault((one.variant_id, one.engine, one.engine_version), []).append(one)
    table: dict[str, dict[Key, Estimate]] = {}
    for candidate in candidates:
        variant = variant_of[candidate.variant_id]
        known: dict[Key, Estimate] = {("size_mb", None): sizes[variant.id]}
        fidelity = _served_as(candidate, done.get(_work(candidate), ()), independent=not variant.batch_dependent)
        if fidelity is not None:
            known |= _keyed(fidelity.metrics, None)
        table[candidate.id] = known
    for measurement in measurements:
        if measurement.candidate_id in table:
            table[measurement.candidate_id] |= _keyed(measurement.metrics, measurement.load)
    return table


def fidelity_of(candidate: Candidate, variants: Sequence[Variant], fidelities: Sequence[Fidelity]) -> Fidelity | None:
    """How the candidate answers: the fidelity of its variant in its engine and engine version, or None.

    That at the batch size it is served with goes before others, and where the variant's answers depend on the batch, or
    the variant is not among ``variants``, only that counts.
    """
    found = [one for one in fidelities if (one.variant_id, one.engine, one.engine_version) == _work(candidate)]
    independent = any(one.id == candidate.variant_id and not one.batch_dependent for one in variants)
    return _served_as(candidate, found, independent=independent)


def _work(candidate: Candidate) -> _Work:
    return (candidate.variant_id, candidate.engine, candidate.engine_version)


def _served_as(candidate: Candidate, found: Iterable[Fidelity], *, independent: bool) -> Fidelity | None:
    of_engine = list(found)
    served = [one for one in of_engine if one.batch_size == candidate.serving.max_batch_size]
    return next(iter(served or (of_engine if independent else ())), None)


def _keyed(metrics: Mapping[str, Estimate], load: str | None) -> dict[Key, Estimate]:
    return {(name, load): estimate for name, estimate in metrics.items()}
