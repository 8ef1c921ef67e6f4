"""What a stage is: one step that turns a model's files into another model's files, inside a contract.

An author writes `Stage.apply`, and `Stage.requires` where the stage can tell beforehand that it does not apply. The
rest is checked around them: what goes in, what comes out, and that a foreign library's noise and exceptions stay
inside. ``optimize.testing.StageContract`` is the suite that every stage passes.

::

    requires ──► apply ──► ensures
       │           │          └─ StageContractError: the stage broke its promise
       │           └─ StageError: a library failed, with the stage's name
       └─ NotApplicableError: a verdict on this model, not a fault
"""

import contextlib
import difflib
import io
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from optimize.samples import check_fit
from optimize.signature import read_signature
from registry.codec import file_sha256
from registry.errors import BurnishError, InputError, NotApplicableError, StageContractError, StageError
from registry.records import Adaptation, Artifact, Param, StageCall, TensorSpec

logger = logging.getLogger(__name__)

Format = Literal["onnx", "openvino"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchOrigin:
    """How the torch module that a model was exported from is made again, and exported in the same way.

    Attributes:
        factory: ``package.module:function``, on the module search path of the process that makes the module.
        samples: path of the ``.npz`` with the example inputs, where the factory gives none.
        opset: of the ONNX model, or None for the exporter's own.
        seed: of torch's random numbers before the factory is called.
    """

    factory: str
    samples: str
    opset: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """The model that a stage is given: a folder of files that it must not write to.

    Attributes:
        folder: where the files are.
        entry: the file in it that an engine opens.
        format: what the files are.
        inputs: the model's inputs, in the graph's order.
        outputs: the model's outputs, in the graph's order.
        origin: the torch module that these files were exported from, as they are; None for all other models.
    """

    folder: Path
    entry: str
    format: Format
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    origin: TorchOrigin | None = None

    @property
    def path(self) -> Path:
        """The file that an engine opens."""
        return self.folder / self.entry


def read_input(folder: Path, entry: str) -> StageInput:
    """The model in a folder, with its signature read from the file.

    Raises:
        InputError: the file is not a model.
    """
    inputs, outputs = read_signature(folder / entry)
    kind: Format = "openvino" if entry.endswith(".xml") else "onnx"
    return StageInput(folder=folder, entry=entry, format=kind, inputs=inputs, outputs=outputs)


def input_of(artifact: Artifact, folder: Path, origin: TorchOrigin | None = None) -> StageInput:
    """A stored artifact, whose files are in ``folder``, as a stage takes it."""
    return StageInput(
        folder=folder,
        entry=artifact.entry,
        format=artifact.format,
        inputs=artifact.inputs,
        outputs=artifact.outputs,
        origin=origin,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a stage may use.

    Attributes:
        out: an empty folder to write the model into.
        calibration: input name -> samples of shape (samples, ...), or None where there are none;
            `optimize.calibration.whole_batches` gives them batch by batch, without reading all of them.
        seed: of every random choice.
        threads: how many a library may use.
    """

    out: Path
    calibration: Mapping[str, NDArray[Any]] | None = None
    seed: int = 0
    threads: int = 1

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder beside ``out`` for files in between; it is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=self.out.parent) as folder:
            yield Path(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """The model that a stage made.

    Attributes:
        changed: False where there was nothing to do: ``folder`` is then the source's.
        notes: what the stage has to say of what it did, one sentence each.
        adaptation: how its inputs come from the source's, where a client has to send them in another form.
    """

    folder: Path
    entry: str
    format: Format
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    changed: bool
    notes: tuple[str, ...] = ()
    adaptation: tuple[Adaptation, ...] = ()


class StageParams(BaseModel):
    """The parameters of a stage; this one has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(ABC):
    """One step of a recipe.

    Attributes:
        name: what recipes call it: ``<family>.<way>``.
        version: raised when the same input gives other bytes; a part of the variant's id.
        Params: the model of its parameters.
        formats: the formats it takes.
        needs_calibration: whether it takes samples.
        batch_dependent: whether an answer of what it makes depends on its neighbours in the batch.
        changes_signature: whether names, types or ranks of inputs and outputs may change.
        tools: the packages that do the work; their versions are a part of the variant's id.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    Params: ClassVar[type[StageParams]] = StageParams
    formats: ClassVar[tuple[Format, ...]] = ("onnx",)
    needs_calibration: ClassVar[bool] = False
    batch_dependent: ClassVar[bool] = False
    changes_signature: ClassVar[bool] = False
    tools: ClassVar[tuple[str, ...]] = ()

    params: StageParams

    def __init__(self, params: Mapping[str, Param] | None = None) -> None:
        """Validates the parameters.

        Raises:
            InputError: a parameter is unknown or its value does not fit.
        """
        self.params = _validated(self.name, self.Params, params or {})

    @property
    def call(self) -> StageCall:
        """The stage with all its parameters, defaults included."""
        return StageCall(name=self.name, params=self.params.model_dump(mode="json"))

    @property
    def needs_module(self) -> bool:
        """Whether it changes the torch module that a source comes from, and has it exported again."""
        return False

    @property
    def functions(self) -> tuple[str, ...]:
        """The user's functions that it calls, ``package.module:function``; their code is a part of the variant's id."""
        return ()

    def requires(self, source: StageInput, context: Context) -> None:  # noqa: B027 - nothing to require is right, too
        """Returns when the stage applies to the model; override it where that can be told cheaply.

        Raises:
            NotApplicableError: it does not, with the reason.
        """

    @abstractmethod
    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Writes the new model into ``context.out``; see `written` and `unchanged`.

        Raises:
            NotApplicableError: the stage finds that it does not apply to this model.
        """

    def ensures(self, source: StageInput, result: StageResult) -> None:
        """Returns when the stage kept what it promised.

        Raises:
            StageContractError: it did not: the signature changed, or a "change" left the same bytes.
        """
        if not result.changed:
            return
        if _sizes(result.folder) == _sizes(source.folder) and _content(result.folder) == _content(source.folder):
            raise StageContractError(f"{self.name} reports a change but wrote identical bytes")
        if not self.changes_signature:
            _check_kept(self.name, "input", source.inputs, result.inputs)
            _check_kept(self.name, "output", source.outputs, result.outputs)

    def __call__(self, source: StageInput, context: Context) -> StageResult:
        """The model that the stage makes of ``source``.

        Raises:
            NotApplicableError: the stage does not apply to the model; the message says why.
            InputError: the calibration samples do not fit the model.
            StageContractError: the stage broke its promise.
            StageError: a library failed.
        """
        self._check_given(source, context)
        try:
            with _quiet(self.name):
                self.requires(source, context)
                result = self.apply(source, context)
        except (BurnishError, MemoryError):
            raise
        except Exception as error:
            raise StageError(f"{self.name} failed with {type(error).__name__}: {first_line(error)}") from error
        self.ensures(source, result)
        return result

    def written(
        self, context: Context, entry: str, *notes: str, adaptation: tuple[Adaptation, ...] = ()
    ) -> StageResult:
        """The result for a model that was written to ``entry`` in ``context.out``; its signature is read back.

        Raises:
            StageContractError: what was written is not a model.
        """
        try:
            made = read_input(context.out, entry)
        except InputError as error:
            raise StageContractError(f"{self.name} wrote what cannot be read: {error.message}") from error
        return StageResult(
            folder=made.folder,
            entry=made.entry,
            format=made.format,
            inputs=made.inputs,
            outputs=made.outputs,
            changed=True,
            notes=notes,
            adaptation=adaptation,
        )

    def unchanged(self, source: StageInput, note: str) -> StageResult:
        """The result where there was nothing to do: the source itself, and why."""
        return StageResult(
            folder=source.folder,
            entry=source.entry,
            format=source.format,
            inputs=source.inputs,
            outputs=source.outputs,
            changed=False,
            notes=(note,),
        )

    def _check_given(self, source: StageInput, context: Context) -> None:
        if source.format not in self.formats:
            wanted = " or ".join(self.formats)
            raise NotApplicableError(
                f"{self.name} takes a model in the format {wanted}, not {source.format}",
                hint="Put a stage that converts it before this one." if wanted == "openvino" else None,
            )
        if self.needs_module and source.origin is None:
            raise NotApplicableError(
                f"{self.name} needs the torch module that the model was exported from, and here is ONNX alone",
                hint="Name the model in the campaign as a torch source, and put this stage first in its recipe.",
            )
        if self.needs_calibration:
            if context.calibration is None:
                raise NotApplicableError(
                    f"{self.name} needs calibration samples, and none were given",
                    hint="Name a calibration .npz in the campaign, or take a recipe that needs none.",
                )
            check_fit(context.calibration, source.inputs, where="the calibration samples")
        if any(context.out.iterdir()):
            raise StageContractError(f"{self.name} must get an empty folder to write into, not {context.out}")


def _validated(stage: str, model: type[StageParams], given: Mapping[str, Param]) -> StageParams:
    known = sorted(model.model_fields)
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            allowed = f"It takes: {', '.join(known)}." if known else "It takes none."
            hint = f"Did you mean {nearest[0]!r}? {allowed}" if nearest else allowed
            raise InputError(f"the stage {stage} has no parameter {key!r}", hint=hint)
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise InputError(f"the stage {stage} does not take {first['input']!r} for {where!r}: {first['msg']}") from error


def _check_kept(stage: str, side: str, before: tuple[TensorSpec, ...], after: tuple[TensorSpec, ...]) -> None:
    def told(specs: tuple[TensorSpec, ...]) -> list[tuple[str, str, int]]:
        return [(spec.name, spec.dtype, len(spec.shape)) for spec in specs]

    if told(before) != told(after):
        raise StageContractError(
            f"{stage} changed the {side}s (name, type, rank) from {told(before)} to {told(after)}, "
            "and does not declare a change of signature"
        )


def _sizes(folder: Path) -> list[int]:
    return sorted(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _content(folder: Path) -> list[str]:
    return sorted(file_sha256(path) for path in folder.rglob("*") if path.is_file())


def first_line(error: BaseException) -> str:
    """The first line of what an error says, not too long; its class where it says nothing."""
    said = str(error).strip().splitlines()
    return said[0][:500] if said else type(error).__name__


@contextlib.contextmanager
def _quiet(stage: str) -> Iterator[None]:
    """Sends what libraries print and warn about to the log, whose level they may not set for us."""
    printed = io.StringIO()
    theirs: list[logging.Logger | logging.Handler] = [logging.root, *logging.root.handlers]
    levels = [(one, one.level) for one in theirs]
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for one, level in levels:
                one.setLevel(level)
            for warning in caught:
                logger.debug("%s: %s: %s", stage, warning.category.__name__, warning.message)
            if text := printed.getvalue().strip():
                logger.debug("%s printed: %s", stage, text)
