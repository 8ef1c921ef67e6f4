"""Recipes: ordered stages and the engines that their outcome is meant for, by name or from the user's own words."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from optimize.adaptation import adapt_calibration
from optimize.config import RecipeConfig
from optimize.packages import PackageNotFoundError, version
from optimize.stages import make_stage
from optimize.stages.base import Context, Format, StageInput
from registry import codec
from registry.documents import load_document
from registry.errors import InputError, NotApplicableError
from registry.records import Adaptation, EngineSpec, Recipe, StageCall, TensorSpec

BASELINE = "float32"

_ORT = EngineSpec(name="onnxruntime")
# What makes a torch module into a model once more, for stages that change the module.
_EXPORT_TOOLS = ("onnx", "onnx-ir", "onnxscript", "torch")
_OPENVINO = EngineSpec(name="openvino", precision="float32")
_OPENVINO_DEFAULT = EngineSpec(name="openvino", precision="default")
# Where the CPU has one of these, OpenVINO computes a float32 model in bfloat16 unless it is told otherwise.
_BFLOAT16_SETS = frozenset({"avx512_bf16", "amx_bf16"})
LIBRARY = Path(__file__).with_name("recipes.yaml")


class _LibraryModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    recipes: tuple[RecipeConfig, ...] = ()
    sets: Mapping[str, tuple[str, ...]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeLibrary:
    """Named recipes, and named sets of them.

    Attributes:
        recipes: name -> the recipe as it was written.
        sets: name -> names of recipes, in order.
    """

    recipes: Mapping[str, RecipeConfig]
    sets: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a campaign may write: recipes first, then sets."""
        return (*self.recipes, *self.sets)


@cache
def load_recipes(path: Path | None = None) -> RecipeLibrary:
    """The recipes that ship with burnish, and those of a file of the same form beside them.

    Raises:
        DocumentError: the file does not fit.
        InputError: it takes a shipped name, gives a name twice, or has a set of recipes that are not there.
    """
    shipped = _library(LIBRARY, RecipeLibrary(recipes={}, sets={}))
    if path is None:
        return shipped
    own = _library(path, shipped)
    return RecipeLibrary(recipes={**shipped.recipes, **own.recipes}, sets={**shipped.sets, **own.sets})


def _library(path: Path, shipped: RecipeLibrary) -> RecipeLibrary:
    document = load_document(path, _LibraryModel)
    names = [one.name for one in document.recipes] + list(document.sets)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: the name {twice[0]!r} is given twice", hint="Each recipe and set has its own.")
    if taken := sorted({*names}.intersection(shipped.names)):
        raise InputError(f"{path}: the name {taken[0]!r} is one of burnish's own", hint="Choose another.")
    recipes = {one.name: one for one in document.recipes}
    known = (*shipped.recipes, *recipes)
    for name, members in document.sets.items():
        if unknown := [member for member in members if member not in known]:
            raise _unknown(f"recipe in the set {name!r} of {path}:", unknown[0], known)
    return RecipeLibrary(recipes=recipes, sets=document.sets)


def preset_names() -> tuple[str, ...]:
    """The names of the shipped recipes, the baseline first."""
    return tuple(load_recipes().recipes)


def recipe(name: str, *, instruction_sets: Sequence[str] = (), library: RecipeLibrary | None = None) -> Recipe:
    """A recipe of the library, with the engines that make a difference on this CPU.

    Args:
        name: of a recipe; `recipes_of` takes sets, too.
        instruction_sets: those of the CPU (``avx512_vnni``, ``avx512_bf16``, ...).
        library: where it is looked up; None for the shipped one.

    Raises:
        InputError: there is no such recipe, or what it says does not fit a stage.
    """
    known = library or load_recipes()
    if name not in known.recipes:
        raise _unknown("recipe", name, known.names)
    return recipe_from_mapping(_words(known.recipes[name]), instruction_sets=instruction_sets)


def recipes_of(
    entry: str | RecipeConfig, *, instruction_sets: Sequence[str] = (), library: RecipeLibrary | None = None
) -> tuple[Recipe, ...]:
    """The recipes of one entry of a campaign's variants: the name of a recipe or of a set, or a recipe written there.

    Raises:
        InputError: there is no such recipe or set, or what a recipe says does not fit a stage.
    """
    if not isinstance(entry, str):
        return (recipe_from_mapping(_words(entry), instruction_sets=instruction_sets),)
    known = library or load_recipes()
    return tuple(
        recipe(name, instruction_sets=instruction_sets, library=known) for name in known.sets.get(entry, (entry,))
    )


def _words(written: RecipeConfig) -> dict[str, Any]:
    return written.model_dump(mode="json", exclude_none=True)


def openvino_engines(instruction_sets: Sequence[str]) -> tuple[EngineSpec, ...]:
    """OpenVINO held to float32 and, where its default differs from that on this CPU, at its default as well."""
    if _BFLOAT16_SETS.intersection(instruction_sets):
        return (_OPENVINO, _OPENVINO_DEFAULT)
    return (_OPENVINO,)


def recipe_from_mapping(content: Mapping[str, Any], *, instruction_sets: Sequence[str] = ()) -> Recipe:
    """The user's own recipe: ``{name, stages: [{name: quantize.static, <parameter>: ...}], engine}``.

    A stage without parameters may be just its name. ``engine`` is ``onnxruntime`` or ``openvino``; without it, the
    stages decide. Stages and parameters are validated here, before anything is made.

    Raises:
        InputError: a key, stage, parameter or engine is unknown, or a value does not fit.
    """
    known = ("name", "stages", "engine")
    for key in content:
        if key not in known:
            raise _unknown("key of a recipe", str(key), known)
    name = content.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"a recipe needs a name, not {name!r}")
    given = content.get("stages", [])
    if not isinstance(given, list | tuple):
        raise InputError(f"the recipe {name!r}: stages are a list, not {given!r}")
    stages = tuple(_call(name, item) for item in given)
    for call in stages:
        make_stage(call)
    return Recipe(name=name, stages=stages, engines=_engines(name, content.get("engine"), stages, instruction_sets))


def engine_label(engine: EngineSpec, recipe: Recipe) -> str:
    """What tells this engine of the recipe from its others: ``float32`` or ``bfloat16``; empty where it is alone."""
    if len(recipe.engines) < 2:
        return ""
    return "float32" if engine.precision == "float32" else "bfloat16"


def needs_calibration(recipe: Recipe) -> bool:
    """Whether a stage of the recipe takes samples."""
    return any(make_stage(call).needs_calibration for call in recipe.stages)


def needs_module(recipe: Recipe) -> bool:
    """Whether a stage of the recipe changes the torch module that the source comes from."""
    return any(make_stage(call).needs_module for call in recipe.stages)


def functions_of(recipe: Recipe) -> tuple[str, ...]:
    """The user's functions that the recipe's stages call, ``package.module:function``, each once and in order."""
    return tuple(dict.fromkeys(name for call in recipe.stages for name in make_stage(call).functions))


def tool_versions(recipe: Recipe) -> dict[str, str]:
    """The installed versions of the packages that the recipe's stages name; ``absent`` where one is missing."""
    packages = {tool for call in recipe.stages for tool in make_stage(call).tools}
    if needs_module(recipe):
        packages.update(_EXPORT_TOOLS)
    return {package: _version(package) for package in sorted(packages)}


def variant_id(
    source_digest: str,
    recipe: Recipe,
    calibration_digest: str | None,
    seed: int,
    tool_versions: Mapping[str, str],
) -> str:
    """The variant's id: the first 16 hex digits of SHA-256 over all that decides its bytes.

    That is the source, each stage with its version and all its parameters (defaults, too), the calibration samples if
    a stage takes any, the seed, and the versions of tools. The recipe's name and engines are not part of it.
    """
    stages = [make_stage(call) for call in recipe.stages]
    return codec.digest(
        {
            "source": source_digest,
            "stages": [
                {"name": stage.name, "version": stage.version, "params": dict(stage.call.params)} for stage in stages
            ],
            "calibration": calibration_digest if any(stage.needs_calibration for stage in stages) else None,
            "seed": seed,
            "tools": dict(tool_versions),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a recipe made of a source.

    Attributes:
        folder: where the files are; the source's own folder where no stage changed anything.
        entry: the file in it that an engine opens.
        notes: what the stages have to say, each with the stage's name before it.
        batch_dependent: whether an answer depends on its neighbours in the batch.
        signature_changed: whether names, types or shapes of inputs or outputs differ from the source's by a stage
            that declares so.
        adaptation: how the inputs come from the source's, in order.
    """

    folder: Path
    entry: str
    format: Format
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...]
    batch_dependent: bool
    signature_changed: bool
    adaptation: tuple[Adaptation, ...] = ()


def apply_recipe(
    recipe: Recipe,
    source: StageInput,
    *,
    calibration: Mapping[str, NDArray[Any]] | None,
    seed: int,
    threads: int,
    work: Path,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Made:
    """Runs the recipe's stages in order, each in a folder of its own inside ``work``.

    Args:
        recipe: what to do.
        source: the model to start from; its folder is not written to.
        calibration: input name -> samples of shape (samples, ...), or None.
        seed: of every random choice.
        threads: how many a library may use.
        work: an existing folder; what is left of an earlier try in it must be removed first.
        on_stage: told the name of each stage before it starts.

    Raises:
        NotApplicableError: a stage does not apply to this model.
        StageError: a stage failed.
        InputError: an unknown stage or parameter, or samples that do not fit.
    """
    current, notes, batch_dependent, signature_changed = source, [], False, False
    adaptation: tuple[Adaptation, ...] = ()
    for position, call in enumerate(recipe.stages, start=1):
        on_stage(call.name)
        stage = make_stage(call)
        out = work / f"{position}-{call.name}"
        out.mkdir()
        result = stage(current, Context(out=out, calibration=calibration, seed=seed, threads=threads))
        notes += [f"{stage.name}: {note}" for note in result.notes]
        if result.changed:
            batch_dependent = batch_dependent or stage.batch_dependent
            signature_changed = signature_changed or stage.changes_signature
        adaptation += result.adaptation
        calibration = adapt_calibration(calibration, result.adaptation)
        current = StageInput(
            folder=result.folder,
            entry=result.entry,
            format=result.format,
            inputs=result.inputs,
            outputs=result.outputs,
            # Files that a stage has written are no longer those of the torch module.
            origin=None if result.changed else current.origin,
        )
    if recipe.stages and current.folder == source.folder:
        raise NotApplicableError(f"no stage of the recipe {recipe.name!r} changes this model: {'; '.join(notes)}")
    return Made(
        folder=current.folder,
        entry=current.entry,
        format=current.format,
        inputs=current.inputs,
        outputs=current.outputs,
        notes=tuple(notes),
        batch_dependent=batch_dependent,
        signature_changed=signature_changed,
        adaptation=adaptation,
    )


def _call(recipe_name: str, item: Any) -> StageCall:
    if isinstance(item, str):
        return StageCall(name=item)
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        raise InputError(
            f"the recipe {recipe_name!r}: a stage is its name, or a mapping with its name and parameters, not {item!r}"
        )
    return StageCall(name=item["name"], params={key: value for key, value in item.items() if key != "name"})


def _engines(
    recipe_name: str, engine: Any, stages: tuple[StageCall, ...], instruction_sets: Sequence[str]
) -> tuple[EngineSpec, ...]:
    made_for = "openvino" if any(call.name == "convert.openvino" for call in stages) else "onnxruntime"
    chosen = made_for if engine is None else engine
    if chosen not in {"onnxruntime", "openvino"}:
        raise _unknown(f"engine of the recipe {recipe_name!r}:", str(chosen), ("onnxruntime", "openvino"))
    if made_for == "openvino" and chosen == "onnxruntime":
        raise InputError(
            f"the recipe {recipe_name!r} converts to OpenVINO, which the engine onnxruntime cannot run",
            hint="Leave out the engine, or write engine: openvino.",
        )
    return openvino_engines(instruction_sets) if chosen == "openvino" else (_ORT,)


def _unknown(what: str, name: str, known: Sequence[str]) -> InputError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    listed = f"There are: {', '.join(known)}."
    return InputError(
        f"there is no {what} {name!r}", hint=f"Did you mean {nearest[0]!r}? {listed}" if nearest else listed
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
