"""Sources and variants: each made in a child process, kept in the store, and not made again."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from optimize.adaptation import as_jsonable, from_jsonable
from optimize.config import SourceConfig
from optimize.engines.local import run_in_child
from optimize.explain import predict, predictable, weights_of
from optimize.judging import as_input, failure_of, limits_of
from optimize.plan import Plan, Workspace
from optimize.recipes import (
    apply_recipe,
    functions_of,
    needs_calibration,
    needs_module,
    tool_versions,
    variant_id,
)
from optimize.samples import SampleFile, Samples, open_samples
from optimize.sources import code_digests, load_huggingface, load_onnx, load_torch, sha256_of, source_components
from optimize.stages import make_stage
from optimize.stages.base import TorchOrigin, input_of
from registry import codec
from registry.errors import BurnishError, NotApplicableError, StorageError
from registry.records import Failure, Recipe, Source, TensorSpec, Variant
from registry.shared_store import once


def make_sources(workspace: Workspace) -> tuple[list[Source], list[Failure]]:
    """The campaign's sources as float32 artifacts.

    Raises:
        BurnishError: the first source, which is the baseline's, cannot be had.
    """
    configs = workspace.plan.config.sources
    workspace.observer.phase("Sources", len(configs))
    sources: list[Source] = []
    failures: list[Failure] = []
    for config in configs:
        try:
            source, known = make_source(workspace, config)
        except StorageError:
            raise
        except BurnishError as error:
            if not sources:
                raise as_input(error, f"source {config.name!r}") from error
            failures.append(failure_of(config.name, "source", error))
            workspace.observer.done(config.name, f"failed: {error.message}")
            continue
        sources.append(source)
        megabytes = source.artifact.size_bytes / 1e6
        workspace.observer.done(config.name, f"{megabytes:.2f} MB" + (" (known)" if known else ""))
    return sources, failures


def make_source(workspace: Workspace, config: SourceConfig) -> tuple[Source, bool]:
    """The source as its float32 artifact, and whether it was known.

    Raises:
        BurnishError: it cannot be had.
    """
    plan = workspace.plan
    location = config.location if config.kind == "torch" else str(plan.source_path(config))
    options = _options(plan, config)
    read = [plan.path(given) for given in config.depends_on]
    components = source_components(config.kind, location, depends_on=read, **options) | {"name": config.name}

    def load() -> Source:
        common: dict[str, Any] = {"limits": limits_of(workspace)}
        work = workspace.folder("tmp")
        if config.kind == "onnx":
            return load_onnx(config.name, Path(location), workspace.store, work, **common)
        if config.kind == "torch":
            return load_torch(config.name, location, workspace.store, work, **options, **common)
        return load_huggingface(config.name, Path(location), workspace.store, work, **options, **common)

    return workspace.remember("Source", config.name, components, load)


def _options(plan: Plan, config: SourceConfig) -> dict[str, Any]:
    """What the loader of this kind of source takes beside its location."""
    if config.kind == "onnx":
        return {}
    if config.kind == "torch":
        samples = plan.path(plan.config.samples.evaluation)
        return {"samples": samples, "python_path": plan.base, "opset": config.opset, "seed": plan.config.seed}
    return {
        "task": config.task,
        "pooling": config.pooling,
        "normalize": config.normalize,
        "opset": config.opset,
        "allow_pickle": config.allow_pickle,
    }


def make_variants(
    workspace: Workspace, sources: Sequence[Source], calibration: SampleFile | None
) -> tuple[list[Variant], list[Failure]]:
    """Every recipe applied to every source; a recipe that cannot apply is a failure with its reason.

    Raises:
        BurnishError: the baseline, the first source's float32, cannot be made.
    """
    work = [(source, recipe) for source in sources for recipe in workspace.plan.recipes]
    workspace.observer.phase("Making variants", len(work))
    variants: list[Variant] = []
    failures: list[Failure] = []
    for source, recipe in work:
        name = f"{source.name}/{recipe.name}" if workspace.plan.several_sources else recipe.name
        try:
            made = make_variant(workspace, source, recipe, name, calibration)
        except StorageError:
            raise
        except BurnishError as error:
            if not variants:
                raise as_input(error, f"the baseline {name!r} cannot be made") from error
            made = failure_of(name, "make", error)
        if isinstance(made, Failure):
            failures.append(made)
            workspace.observer.done(name, f"{made.kind.replace('_', ' ')}: {made.reason}")
        else:
            variants.append(made)
            workspace.observer.done(name, f"{made.artifact.size_bytes / 1e6:.2f} MB")
    return variants, failures


def make_variant(
    workspace: Workspace, source: Source, recipe: Recipe, name: str, calibration: Samples | SampleFile | None
) -> Variant | Failure:
    """The variant, or the failure that says why the recipe cannot apply; both are remembered.

    Raises:
        BurnishError: it failed in another way, which the next run tries again.
    """
    calibrated = calibration.digest if calibration is not None and needs_calibration(recipe) else None
    versions = tool_versions(recipe) | code_versions(workspace.plan, source, recipe)
    identity = variant_id(source.digest, recipe, calibrated, workspace.plan.config.seed, versions)
    foreseen = workspace.plan.config.predict and predictable(recipe)

    def make() -> Variant:
        begin = monotonic()
        with tempfile.TemporaryDirectory(prefix="make-", dir=workspace.folder("tmp")) as scratch:
            arguments = {
                "recipe": codec.to_jsonable(recipe),
                "source": codec.to_jsonable(source),
                "files": str(workspace.store.path(source.artifact)),
                "calibration": _path(workspace.plan) if calibrated else None,
                "seed": workspace.plan.config.seed,
                "foreseen": foreseen,
                "origin": origin_of(workspace.plan, source, recipe),
                "threads": workspace.plan.host.cores,
                "work": scratch,
            }
            made = run_in_child(
                "optimize.making:make_here",
                arguments,
                limits=limits_of(workspace),
                python_path=workspace.plan.base if needs_module(recipe) else None,
            )
            artifact = workspace.store.add(
                Path(made["folder"]),
                format=made["format"],
                entry=made["entry"],
                inputs=tuple(codec.from_jsonable(TensorSpec, spec) for spec in made["inputs"]),
                outputs=tuple(codec.from_jsonable(TensorSpec, spec) for spec in made["outputs"]),
            )
        return Variant(
            id=identity,
            name=name,
            source=source.name,
            source_digest=source.digest,
            recipe=recipe,
            calibration_digest=calibrated,
            seed=workspace.plan.config.seed,
            tool_versions=versions,
            artifact=artifact,
            signature_changed=made["signature_changed"],
            batch_dependent=made["batch_dependent"],
            made_in_s=round(monotonic() - begin, 3),
            notes=tuple(made["notes"]),
            adaptation=from_jsonable(made["adaptation"]),
        )

    # The id says whether it is the same work, and its parts beside it what differs if not.
    components = {
        "variant": identity,
        "name": name,
        "source": source.digest,
        "stages": _stages(recipe),
        "calibration": calibrated,
        "seed": workspace.plan.config.seed,
        "tools": versions,
        "predict": foreseen,
    }

    def made() -> Variant | Failure:
        try:
            shared = once(workspace.store, f"variant-{identity}", make)
        except NotApplicableError as error:
            return failure_of(name, "make", error)
        workspace.store.path(shared.artifact)  # into the working folder, where all else looks for it
        # Another campaign may have made it, under names of its own.
        return replace(shared, name=name, source=source.name, recipe=recipe)

    return workspace.remember("Variant", name, components, made)[0]


def origin_of(plan: Plan, source: Source, recipe: Recipe) -> dict[str, Any] | None:
    """The fields of the source's `TorchOrigin`, as a child takes them; None where the recipe or source needs none."""
    if source.kind != "torch" or not needs_module(recipe):
        return None
    options = _options(plan, _config(plan, source))
    return {
        "factory": source.location,
        "samples": str(options["samples"]),
        "opset": options["opset"],
        "seed": options["seed"],
    }


def code_versions(plan: Plan, source: Source, recipe: Recipe) -> dict[str, str]:
    """Name -> digest of the user's code that makes the variant: it counts as packages' versions do.

    That is what the recipe's stages call and, where one changes the torch module, the module's factory with the files
    that the campaign says are read.

    Raises:
        InputError: a function's module, or a file, is not there.
    """
    functions = [*functions_of(recipe)]
    reads: dict[str, str] = {}
    if source.kind == "torch" and needs_module(recipe):
        functions.append(source.location)
        reads = {given: sha256_of(plan.path(given)) for given in _config(plan, source).depends_on}
    versions = {name: codec.digest(code_digests(name, plan.base)) for name in functions}
    return versions | reads


def _config(plan: Plan, source: Source) -> SourceConfig:
    return next(config for config in plan.config.sources if config.name == source.name)


def _stages(recipe: Recipe) -> dict[str, Any]:
    """The stages with their versions and all their parameters, by place and name."""
    stages = [make_stage(call) for call in recipe.stages]
    return {
        f"{place} {stage.name}": {"version": stage.version, **stage.call.params}
        for place, stage in enumerate(stages, start=1)
    }


def _path(plan: Plan) -> str | None:
    given = plan.config.samples.calibration
    return None if given is None else str(plan.path(given))


def make_here(
    *,
    recipe: Mapping[str, Any],
    source: Mapping[str, Any],
    files: str,
    calibration: str | None,
    seed: int,
    threads: int,
    work: str,
    foreseen: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Applies a recipe in this process; the child's side of `make_variants`, with records as plain JSON values.

    ``origin`` are the fields of a `TorchOrigin`, for recipes that change the torch module.

    Raises:
        NotApplicableError: a stage does not apply, or outcomes are to be ``foreseen`` and this one is hopeless.
    """
    module = None if origin is None else TorchOrigin(**origin)
    given = input_of(codec.from_jsonable(Source, source).artifact, Path(files), module)
    wanted = codec.from_jsonable(Recipe, recipe)
    if foreseen and given.format == "onnx" and (reason := predict(wanted, weights_of(given.path))):
        raise NotApplicableError(reason)
    made = apply_recipe(
        wanted,
        given,
        calibration=None if calibration is None else open_samples(Path(calibration)),
        seed=seed,
        threads=threads,
        work=Path(work),
    )
    return {
        "folder": str(made.folder),
        "entry": made.entry,
        "format": made.format,
        "inputs": [codec.to_jsonable(spec) for spec in made.inputs],
        "outputs": [codec.to_jsonable(spec) for spec in made.outputs],
        "notes": list(made.notes),
        "batch_dependent": made.batch_dependent,
        "signature_changed": made.signature_changed,
        "adaptation": as_jsonable(made.adaptation),
    }
