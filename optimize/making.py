"""Sources and variants: each made in a child process, kept in the store, and not made again."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname
from time import monotonic
from typing import Any, cast

from optimize.adaptation import as_jsonable
from optimize.config import SourceConfig
from optimize.engines.choosing import choose_engine
from optimize.engines.local import Limits, run_in_child
from optimize.engines.pool import LocalEngine
from optimize.engines.port import Engine, Outcome, Place, Resources, Task
from optimize.explain import predict, predictable, weights_of
from optimize.judging import as_input, failure_of, limits_of, needed, told_of
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
from registry.errors import BudgetUsedUpError, BurnishError, InputError, NotApplicableError, StorageError
from registry.records import Failure, Recipe, Source, TensorSpec, Variant
from registry.shared_store import once, share


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
            source, known = make_source(workspace if sources else needed(workspace), config)
        except StorageError:
            raise
        except BurnishError as error:
            if not sources:
                raise as_input(error, f"source {config.name!r}") from error
            failures.append(failure_of(config.name, "source", error))
            workspace.observer.done(config.name, told_of(failures[-1]))
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
    first, *others = [
        _work(workspace, source, recipe, f"{source.name}/{recipe.name}" if several else recipe.name, calibration)
        for several in [workspace.plan.several_sources]
        for source in sources
        for recipe in workspace.plan.recipes
    ]
    works = [replace(first, needed=True), *others]
    workspace.observer.phase("Making variants", len(works))
    for source in sources:
        share(workspace.store, source.artifact)  # one that was known before the store was shared is not there yet
    made: dict[str, Variant | Failure] = {}
    with contextlib.closing(_made(workspace, works)) as outcomes:
        for work, outcome in outcomes:
            if isinstance(outcome, StorageError):
                raise outcome
            if isinstance(outcome, BurnishError) and work is works[0]:
                raise as_input(outcome, f"the baseline {work.name!r} cannot be made") from outcome
            one = failure_of(work.name, "make", outcome) if isinstance(outcome, BurnishError) else outcome
            made[work.name] = one
            workspace.observer.done(work.name, _told(one))
    ordered = [made[work.name] for work in works]
    return [one for one in ordered if isinstance(one, Variant)], [one for one in ordered if isinstance(one, Failure)]


def make_variant(
    workspace: Workspace, source: Source, recipe: Recipe, name: str, calibration: Samples | SampleFile | None
) -> Variant | Failure:
    """The variant, or the failure that says why the recipe cannot apply; both are remembered. Made on this machine.

    Raises:
        BurnishError: it failed in another way, which the next run tries again.
    """
    work = _work(workspace, source, recipe, name, calibration)

    def make() -> Variant | Failure:
        if known := _under_another_name(workspace, work):
            return known
        with LocalEngine(workspace.store, scratch=workspace.folder("tmp")) as engine:
            (outcome,) = engine.run([work.task(workspace)])
        return _received(workspace, work, outcome)

    return workspace.remember("Variant", name, work.components, make)[0]


def made_under_another_name(
    workspace: Workspace, source: Source, recipe: Recipe, name: str, calibration: Samples | SampleFile | None
) -> Variant | None:
    """The variant under its name here, where the journal has it under another one, so that it is not made again."""
    return _under_another_name(workspace, _work(workspace, source, recipe, name, calibration))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """One variant that is to be made.

    Attributes:
        name: the variant's.
        needed: whether it is made even where no time is left, since nothing is known without it.
        variant: the variant, but for what is only known once it is made: its artifact, and what was found.
        components: everything that it depends on.
        arguments: of `make_in_place`, but for the calibration samples.
        calibration: the file of the calibration samples, if they are needed.
        python_path: the folder of the user's code, if it is needed.
    """

    name: str
    needed: bool = False
    variant: Mapping[str, Any]
    components: Mapping[str, Any]
    arguments: Mapping[str, Any]
    calibration: Path | None
    python_path: Path | None

    def task(self, workspace: Workspace) -> Task:
        """The step that makes it."""
        limits = limits_of(workspace)
        return Task(
            name=self.name,
            step="optimize.making:make_in_place",
            arguments={
                **self.arguments,
                "variant": dict(self.variant),
                "timeout_s": limits.timeout_s,
                "memory_mb": limits.memory_mb,
            },
            files={} if self.calibration is None else {"calibration": self.calibration},
            python_path=self.python_path,
            resources=Resources(cores=None),
            begin_by=None if self.needed else workspace.budget.begin_by,
        )


def _work(
    workspace: Workspace, source: Source, recipe: Recipe, name: str, calibration: Samples | SampleFile | None
) -> _Work:
    plan = workspace.plan
    calibrated = calibration.digest if calibration is not None and needs_calibration(recipe) else None
    versions = tool_versions(recipe) | code_versions(plan, source, recipe)
    identity = variant_id(source.digest, recipe, calibrated, plan.config.seed, versions)
    foreseen = plan.config.predict and predictable(recipe)
    given = plan.config.samples.calibration
    return _Work(
        name=name,
        variant={
            "id": identity,
            "name": name,
            "source": source.name,
            "source_digest": source.digest,
            "recipe": codec.to_jsonable(recipe),
            "calibration_digest": calibrated,
            "seed": plan.config.seed,
            "tool_versions": versions,
        },
        # The id says whether it is the same work, and its parts beside it what differs if not.
        components={
            "variant": identity,
            "name": name,
            "source": source.digest,
            "stages": _stages(recipe),
            "calibration": calibrated,
            "seed": plan.config.seed,
            "tools": versions,
            "predict": foreseen,
        },
        arguments={
            "source": codec.to_jsonable(source),
            "foreseen": foreseen,
            "origin": origin_of(plan, source, recipe),
        },
        calibration=plan.path(given) if calibrated and given is not None else None,
        python_path=plan.base if needs_module(recipe) else None,
    )


_Outcomes = Generator[tuple[_Work, Variant | Failure | BurnishError], None, None]


def _made(workspace: Workspace, works: Sequence[_Work]) -> _Outcomes:
    """What became of each work: first what is known, then the others in the order in which they end.

    Whatever was made is remembered before it is yielded.
    """
    unknown = []
    for work in works:
        found = workspace.known("Variant", work.components) or _under_another_name(workspace, work)
        if found is not None:
            yield work, _kept(workspace, work, found)
            continue
        if (why := workspace.ledger.why("Variant", work.name, work.components)) is not None:
            workspace.observer.note(why)
        unknown.append(work)
    # What needs the user's code is made where that is.
    near = [work for work in unknown if work.python_path is not None]
    far = [work for work in unknown if work.python_path is None]
    scratch = workspace.folder("tmp")
    if far:
        with contextlib.ExitStack() as opened:
            if workspace.engine is None:
                engine = opened.enter_context(choose_engine(workspace.store, scratch=scratch))
            else:
                engine = workspace.engine()
            yield from _made_on(engine, workspace, far)
    if near:
        with LocalEngine(workspace.store, scratch=scratch, waiting=workspace.waits_for_cores) as engine:
            yield from _made_on(engine, workspace, near)


def _under_another_name(workspace: Workspace, work: _Work) -> Variant | None:
    """The variant of this id that was made under another name, or of a source of another name; None if none was.

    Where outcomes are foreseen, the recipe may be hopeless, which nobody knew then.
    """
    if work.components["predict"]:
        return None
    for entry in reversed(workspace.ledger.entries("Variant")):
        one = entry.record
        if isinstance(one, Variant) and one.id == work.variant["id"] and one.artifact.digest in workspace.store:
            return _renamed(one, work)
    return None


def _kept(workspace: Workspace, work: _Work, outcome: Variant | Failure) -> Variant | Failure:
    """The outcome, which is in the journal from here on; where it was before, its files are back now."""
    if workspace.ledger.find("Variant", work.components) is not None:
        return outcome
    return workspace.ledger.commit("Variant", work.name, work.components, outcome)


def _renamed(variant: Variant, work: _Work) -> Variant:
    """The variant under the names that this campaign has for it."""
    recipe = codec.from_jsonable(Recipe, work.variant["recipe"])
    return replace(variant, name=work.name, source=work.variant["source"], recipe=recipe)


def _made_on(engine: Engine, workspace: Workspace, works: Sequence[_Work]) -> _Outcomes:
    tasks = {work.name: work for work in works}

    def begun(task: Task, where: str) -> None:
        workspace.observer.begun("Variant", task.name, where)

    with contextlib.closing(engine.run([work.task(workspace) for work in works], begun=begun)) as outcomes:
        for outcome in outcomes:
            work = tasks[outcome.task.name]
            workspace.observer.ended("Variant", work.name)
            try:
                received = _received(workspace, work, outcome)
            except BurnishError as error:
                yield work, error
                continue
            yield work, _kept(workspace, work, received)


def _received(workspace: Workspace, work: _Work, outcome: Outcome) -> Variant | Failure:
    """The variant that an engine made, its files in the working folder, where all else looks for them.

    Raises:
        BurnishError: it failed in a way that the next run tries again.
    """
    if isinstance(outcome.error, NotApplicableError):
        return failure_of(work.name, "make", outcome.error)
    if isinstance(outcome.error, BudgetUsedUpError):
        raise workspace.budget.error
    if outcome.error is not None:
        raise outcome.error
    variant = codec.from_jsonable(Variant, outcome.result)
    workspace.store.path(variant.artifact)
    return _renamed(variant, work)  # another campaign may have made it


def _told(made: Variant | Failure) -> str:
    if isinstance(made, Variant):
        return f"{made.artifact.size_bytes / 1e6:.2f} MB"
    return told_of(made)


def make_in_place(
    place: Place,
    *,
    source: Mapping[str, Any],
    variant: Mapping[str, Any],
    foreseen: bool,
    origin: Mapping[str, Any] | None,
    timeout_s: float,
    memory_mb: float | None,
    calibration: str | None = None,
) -> dict[str, Any]:
    """The step that makes a variant, once among all that share the store; records are plain JSON values.

    Raises:
        NotApplicableError: a stage does not apply.
        InputError: this machine has other versions of the recipe's tools than the one that asks.
        BurnishError: it failed in another way.
    """

    def make() -> Variant:
        begin = monotonic()
        _check_tools(codec.from_jsonable(Recipe, variant["recipe"]), variant["tool_versions"])
        made = run_in_child(
            "optimize.making:make_here",
            {
                "recipe": variant["recipe"],
                "source": source,
                "files": str(place.store.path(codec.from_jsonable(Source, source).artifact)),
                "calibration": calibration,
                "seed": variant["seed"],
                "foreseen": foreseen,
                "origin": origin,
                "threads": len(place.cpus),
                "work": str(place.scratch),
            },
            limits=Limits(timeout_s=timeout_s, memory_mb=memory_mb),
            cpus=place.cpus,
            python_path=place.python_path,
        )
        artifact = place.store.add(
            Path(made["folder"]),
            format=made["format"],
            entry=made["entry"],
            inputs=tuple(codec.from_jsonable(TensorSpec, spec) for spec in made["inputs"]),
            outputs=tuple(codec.from_jsonable(TensorSpec, spec) for spec in made["outputs"]),
        )
        return codec.from_jsonable(
            Variant,
            {
                **variant,
                "artifact": codec.to_jsonable(artifact),
                "signature_changed": made["signature_changed"],
                "batch_dependent": made["batch_dependent"],
                "made_in_s": round(monotonic() - begin, 3),
                "notes": made["notes"],
                "adaptation": made["adaptation"],
            },
        )

    return cast(dict[str, Any], codec.to_jsonable(once(place.store, f"variant-{variant['id']}", make)))


def _check_tools(recipe: Recipe, known_by: Mapping[str, str]) -> None:
    """Returns where the recipe's tools are here of the versions that the variant will be known by.

    Raises:
        InputError: they are not; builds for other hardware are of the same version.
    """
    other = [
        f"{tool} {here}, not {known_by[tool]}"
        for tool, here in tool_versions(recipe).items()
        if here.partition("+")[0] != known_by[tool].partition("+")[0]
    ]
    if other:
        raise InputError(
            f"{gethostname()} has {', '.join(other)}",
            hint="Install the versions of the machine that runs the campaign in the environment of all nodes.",
        )


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
