"""Models of every kind through the door and every stage: each works, or is refused with a reason."""

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from optimize.admission import admit
from optimize.sources import load_onnx
from optimize.stages import make_stage, stage_names
from optimize.stages.base import Context, Stage, StageInput, StageResult, read_input
from optimize.testing import contents, run_model, samples_for
from profiles.serving.session import open_session
from registry.errors import InputError, NotApplicableError
from registry.records import StageCall
from registry.store import FolderStore
from tests.doubles import zoo

pytestmark = pytest.mark.slow

# Parameters of stages that cannot do without, or whose defaults are not for models as small as these.
PARAMS: dict[str, dict[str, Any]] = {
    "convert.fixed_shape": {"dims": ("b=3",)},
    "reduce.image_side": {"side": 4},
    "reduce.sequence_length": {"length": 2},
}

# Least cosine with the source's answers, by family. A family that is not here changes answers as much as it likes, but
# not into what is no number.
LEAST_COSINE = {"simplify": 0.9999, "convert": 0.9999, "precision": 0.99, "quantize": 0.95, "tensorrt": 0.95}
ROUNDED = 0.999

OPSETS = {f"opset-{opset}" for opset in zoo.OPSETS}
CONVOLUTIONAL = OPSETS | {"constant-nodes", "fixed-batch", "uint8", "detector"}
PERCEPTRONS = {"perceptron", "several-inputs-and-outputs", "repeated-inputs", "local-functions", "external-data"}
# What must work; of the rest it is enough that it is refused with a reason.
MUST_WORK = {
    "simplify.ort": set(zoo.KINDS),
    "convert.openvino": set(zoo.KINDS) - {"local-functions"},
    "quantize.dynamic": PERCEPTRONS | {"int32", "int64", "float16-input", "lstm", "loop", "scan", "if"},
    "quantize.static": PERCEPTRONS | CONVOLUTIONAL | {"int32", "int64", "float16-input", "loop", "scan", "if"},
    "quantize.openvino": CONVOLUTIONAL | PERCEPTRONS - {"local-functions"} | {"int32", "int64", "lstm", "gru", "loop"},
    "precision.float16": set(zoo.KINDS) - {"float16", "float64", "integers"},
}


class Answers(NamedTuple):
    """What a model answers to feeds."""

    feeds: dict[str, Any]
    outputs: list[Any]


class Outcome(NamedTuple):
    """``works``, ``refused: why`` or ``BAD: what``, and the model where one was made."""

    said: str
    made: StageResult | None = None


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str], Outcome]:
    """Outcomes on OpenVINO models by stage and digest: models of all opsets convert to the same bytes."""
    return {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_every_stage_works_or_refuses(
    kind: str, known: dict[tuple[str, str], Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # nothing may be left in the working directory
    source = admitted(kind, tmp_path)
    answers = answered(source)
    outcomes = {name: tried(name, source, answers, tmp_path) for name in stage_names() if "onnx" in formats(name)}
    converted = outcomes["convert.openvino"].made
    for name in set(stage_names()) - set(outcomes):
        given = read_input(converted.folder, converted.entry) if converted else source
        key = name, digest(given)
        if key not in known:
            known[key] = tried(name, given, answers, tmp_path)
        outcomes[name] = known[key]
    assert {name: outcome.said for name, outcome in outcomes.items() if outcome.said.startswith("BAD")} == {}
    required = {name for name, kinds in MUST_WORK.items() if kind in kinds}
    assert {name: outcomes[name].said for name in required if outcomes[name].said != "works"} == {}
    assert list((tmp_path / "here").iterdir()) == []


def call(name: str) -> StageCall:
    return StageCall(name=name, params=PARAMS.get(name, {}))


def admitted(kind: str, tmp_path: Path) -> StageInput:
    path = zoo.write(kind, tmp_path / "given")
    (tmp_path / "source").mkdir()
    admit(path, tmp_path / "source")
    return read_input(tmp_path / "source", "model.onnx")


def answered(source: StageInput) -> Answers:
    fixed = source.inputs[0].shape[0] == 1
    feeds = samples_for(source.inputs, count=1 if fixed else 3, seed=5)
    answers = open_session(source.path, engine="onnxruntime").run(feeds)
    return Answers(feeds, [answers[spec.name] for spec in source.outputs])


def digest(model: StageInput) -> str:
    return hashlib.sha256(repr(sorted(contents(model.folder).items())).encode()).hexdigest()


def formats(name: str) -> tuple[str, ...]:
    return make_stage(call(name)).formats


def tried(name: str, source: StageInput, answers: Answers, tmp_path: Path) -> Outcome:
    out = tmp_path / f"made-{name}"
    out.mkdir()
    try:
        stage = make_stage(call(name))
        made = stage(source, Context(out=out, calibration=samples_for(source.inputs, count=8)))
    except (NotApplicableError, InputError) as error:
        return Outcome(f"refused: {error.message}" if len(error.message) > 20 else f"BAD: no reason: {error.message}")
    except Exception as error:  # whatever a stage lets through
        return Outcome(f"BAD: {type(error).__name__}: {error}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Outcome(compared(stage, made, source, answers), made)
    except Exception as error:  # whatever an engine says of a model that it should take
        return Outcome(f"BAD: what was made does not run: {type(error).__name__}: {error}")


def compared(stage: Stage, made: StageResult, source: StageInput, answers: Answers) -> str:
    family, feeds = stage.name.partition(".")[0], answers.feeds
    least, before = LEAST_COSINE.get(family, -1.0), answers.outputs
    if stage.changes_signature and not fits(made, feeds):
        # Other inputs than the source's: what they should give is the stage's own affair and tests.
        batch = made.inputs[0].shape[0]
        feeds = samples_for(made.inputs, count=batch if isinstance(batch, int) else 3)
        least = -1.0
    after = run_model(made, feeds)
    if least < 0:
        before = after
    for spec, was, now in zip(made.outputs, before, after, strict=True):
        if now.dtype.kind == "f" and not np.isfinite(now).all():
            return f"BAD: {spec.name} holds what is no number"
        if not stage.changes_signature and (was.dtype, was.ndim) != (now.dtype, now.ndim):
            return f"BAD: {spec.name} is {now.dtype} {now.shape}, not {was.dtype} {was.shape}"
        # A rounded score may win where two are near, so what is counted or chosen is compared where nothing is rounded.
        comparable = was.shape == now.shape and (now.dtype.kind == "f" or least > ROUNDED)
        if comparable and (cosine := likeness(was, now)) < least:
            return f"BAD: {spec.name} has a cosine of {cosine:.4f} with the source's"
    return "works"


def fits(made: StageResult, feeds: dict[str, Any]) -> bool:
    return {spec.name: spec.dtype for spec in made.inputs} == {
        name: str(array.dtype) for name, array in feeds.items()
    } and all(
        not isinstance(dim, int) or dim == size
        for spec in made.inputs
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
    )


def likeness(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> float:
    a, b = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
    length = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / length) if length else float(np.array_equal(a, b))


@pytest.mark.parametrize(
    "kind",
    ["several-inputs-and-outputs", "int32", "uint8", "float16", "float16-input", "float64", "if", "loop", "scan",
     "gru", "detector", "repeated-inputs"],
)  # fmt: skip
def test_both_engines_answer_the_file_as_it_came_alike(kind: str, tmp_path: Path) -> None:
    source = admitted(kind, tmp_path)
    feeds, outputs = answered(source)
    session = open_session(source.path, engine="openvino", precision="float32")
    assert [port.name for port in session.outputs] == [spec.name for spec in source.outputs]
    got = session.run(feeds)
    for spec, wanted in zip(source.outputs, outputs, strict=True):
        assert got[spec.name].shape == wanted.shape
        assert np.abs(got[spec.name].astype(np.float64) - wanted).max(initial=0) < 1e-3


@pytest.mark.parametrize("kind", ["external-data", "detector"])
def test_sources_keep_what_came(kind: str, tmp_path: Path) -> None:
    path = zoo.write(kind, tmp_path / "given")
    store = FolderStore(tmp_path / "store")
    source = load_onnx("m", path, store, tmp_path / "work")
    assert contents(store.path(source.artifact)) == contents(path.parent)


@pytest.mark.timeout(1800)
def test_a_model_above_two_gigabytes(tmp_path: Path) -> None:
    """Through the door and through the stages that need no second copy of the weights.

    With BURNISH_LARGE_MODELS=1 it goes through every stage, which takes some minutes and 12 GB of memory.
    """
    (tmp_path / "given").mkdir()
    (tmp_path / "source").mkdir()
    admit(zoo.write_large(tmp_path / "given"), tmp_path / "source")
    source = read_input(tmp_path / "source", "model.onnx")
    assert (source.folder / "table.data").stat().st_size > 2**31
    answers = answered(source)
    assert np.abs(answers.outputs[0]).max() > 0.1
    names = stage_names() if os.environ.get("BURNISH_LARGE_MODELS") else ("convert.free_batch",)
    outcomes = {name: tried(name, source, answers, tmp_path).said for name in names}
    assert {name: said for name, said in outcomes.items() if said.startswith("BAD")} == {}
