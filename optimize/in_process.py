"""What a model answers in process, to one sample at a time: what a server's answers are held against."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.engines.local import ChildFailure, Limits, run_in_child
from profiles.measure.equivalence import Reference
from profiles.serving.session import open_session
from registry.errors import InputError, StageError
from registry.records import EngineSpec

Arrays = Mapping[str, NDArray[Any]]

# Answers depend on their neighbours where these move a value by more than this share of the output's largest.
_DEPENDS = 0.01
# In process only a few arrangements are tried; a server meets others.
_ROOM = 2.0


def answer_in_process(
    entry: Path,
    engine: EngineSpec,
    inputs: Arrays,
    *,
    batch_size: int,
    threads: int = 1,
    seed: int = 0,
    limits: Limits | None = None,
) -> Reference:
    """What the samples are answered with one at a time, in a child process, and how far company moves that.

    Args:
        entry: the model file.
        engine: the engine, and how it is set.
        inputs: input name -> array (samples, ...) as the model takes it.
        batch_size: most samples in a batch; 1 where none has company.
        threads: of the session.
        seed: of the batches.
        limits: of the child.

    Raises:
        StageError: the model cannot be opened or run here.
        ChildFailure: the child was stopped by a limit, or died.
    """
    with TemporaryDirectory(prefix="burnish-check-") as folder:
        samples, out = Path(folder) / "samples.npz", Path(folder) / "answers.npz"
        _save(samples, inputs)
        allowance = run_in_child(
            "optimize.in_process:answer_here",
            {
                "entry": str(entry.resolve()),
                "engine": {"name": engine.name, "precision": engine.precision, "graph_level": engine.graph_level},
                "samples": str(samples),
                "out": str(out),
                "batch_size": batch_size,
                "threads": threads,
                "seed": seed,
            },
            limits=limits,
        )
        with np.load(out, allow_pickle=False) as archive:
            outputs = {name.removeprefix("_"): archive[name] for name in archive.files}
    return Reference(outputs=outputs, allowance=allowance)


def check_reference(reference: Path | None) -> None:
    """Returns where a model's file that a user names is there, or none is named.

    Raises:
        InputError: it is not there.
    """
    if reference is not None and not reference.is_file():
        raise InputError(f"there is no model file {reference}", hint="Name an .onnx file, or an .xml one of OpenVINO.")


def answers_of_file(reference: Path, inputs: Arrays, *, batch_size: int, seed: int = 0) -> Reference:
    """What a model's file answers, as the user names it; see `answer_in_process`.

    Args:
        reference: an ``.onnx`` file, run in ONNX Runtime, or an ``.xml`` one of OpenVINO.
        inputs: as for `answer_in_process`.
        batch_size: the same.
        seed: the same.

    Raises:
        InputError: there is no such file, or it cannot be run on these inputs here.
    """
    check_reference(reference)
    engine = EngineSpec(name="openvino" if reference.suffix == ".xml" else "onnxruntime")
    return answers_or_refusal(reference, engine, inputs, batch_size=batch_size, seed=seed)


def answers_or_refusal(entry: Path, engine: EngineSpec, inputs: Arrays, **how: Any) -> Reference:
    """As `answer_in_process`, for samples that a user has given.

    Raises:
        InputError: the model cannot be run on them here.
    """
    try:
        return answer_in_process(entry, engine, inputs, **how)
    except (StageError, ChildFailure) as error:
        raise InputError(error.message, hint="Does the model fit the samples, and this machine?") from error


def answer_here(
    *, entry: str, engine: Mapping[str, str], samples: str, out: str, batch_size: int, threads: int, seed: int
) -> dict[str, float]:
    """The child's side of `answer_in_process`: writes the answers, and returns the allowance of each output.

    Raises:
        StageError: the model cannot be opened or run here.
    """
    try:
        session = open_session(
            entry,
            engine=engine["name"],
            precision=engine["precision"],
            graph_level=engine["graph_level"],
            threads=threads,
        )
        with np.load(samples, allow_pickle=False) as archive:
            inputs = {name.removeprefix("_"): archive[name] for name in archive.files}
        count = len(next(iter(inputs.values())))

        def run(rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
            return session.run({name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()})

        each = [run(np.array([row])) for row in range(count)]
        alone = {name: np.concatenate([answer[name] for answer in each]) for name in each[0]}
        moved = dict.fromkeys((name for name, array in alone.items() if array.dtype.kind == "f"), 0.0)
        for rows in _batches(count, batch_size, seed) if batch_size > 1 else ():
            batched = run(rows)
            for name in moved:
                with np.errstate(invalid="ignore"):  # of two infinities
                    apart = np.abs(batched[name].astype(np.float64) - alone[name][rows])
                moved[name] = max(moved[name], float(np.nan_to_num(apart, posinf=0.0).max(initial=0)))
    except ValueError as error:  # a session's own, and numpy's on answers without a row for each sample
        raise StageError(f"{Path(entry).name} cannot be run on the samples here: {error}") from error
    _save(Path(out), alone)
    largest = {name: float(np.abs(alone[name][np.isfinite(alone[name])]).max(initial=0)) for name in moved}
    return {name: _ROOM * by for name, by in moved.items() if by > _DEPENDS * largest[name]}


def _batches(count: int, batch_size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Batches of chance mates: whole ones, half ones, and pairs."""
    chance = np.random.default_rng(seed)
    for size in sorted({min(size, count) for size in (2, max(2, batch_size // 2), batch_size)}):
        order = chance.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def _save(path: Path, arrays: Arrays) -> None:
    # The names are a model's: numpy would take one that is called "file" for its own argument.
    np.savez(path, **{f"_{name}": array for name, array in arrays.items()})
