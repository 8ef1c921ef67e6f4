"""Pipelines and what was measured of them, as YAML.

A pipeline is read from Core 2's own manifest (``kind: Pipeline``), or from a plan: the same fields without the
manifest's frame, and beside them what a manifest cannot say (the models' files and variants, and how often a step
chooses which answer).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from profiles.pipelines.graph import WINDOW_MS, Gathering, Join, Pipeline, Source, Step, find_cycle
from profiles.serving.core2.schema import LabelValue, Name
from profiles.serving.naming import check_core2_name
from registry.documents import load_document, parse_document
from registry.errors import InputError

Text = Annotated[str, Field(min_length=1)]
Milliseconds = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BatchPart(_Part):
    """``batch`` of a step."""

    size: Annotated[int, Field(ge=1)] | None = None
    windowMs: Milliseconds | None = None
    rolling: bool = False


class StepPart(_Part):
    """One of a pipeline's ``steps``."""

    name: Text
    inputs: list[Text] = []
    inputsJoinType: Join = "inner"
    joinWindowMs: Milliseconds | None = None
    tensorMap: dict[Text, Text] = {}
    triggers: list[Text] = []
    triggersJoinType: Join = "inner"
    batch: BatchPart | None = None


class InputPart(_Part):
    """``input`` of a pipeline: other pipelines that feed it."""

    externalInputs: list[Text] = []
    externalTriggers: list[Text] = []
    joinWindowMs: Milliseconds | None = None
    joinType: Join = "inner"
    triggersJoinType: Join = "inner"
    tensorMap: dict[Text, Text] = {}


class OutputPart(_Part):
    """``output`` of a pipeline."""

    steps: Annotated[list[Text], Field(min_length=1)]
    stepsJoin: Join = "inner"
    joinWindowMs: Milliseconds | None = None
    tensorMap: dict[Text, Text] = {}


class DataflowPart(_Part):
    """``dataflow`` of a pipeline."""

    cleanTopicsOnDelete: bool = False


class SpecPart(_Part):
    """``spec`` of a Pipeline."""

    steps: Annotated[list[StepPart], Field(min_length=1)]
    input: InputPart | None = None
    output: OutputPart | None = None
    allowCycles: bool = False
    maxStepRevisits: Annotated[int, Field(ge=0)] | None = None
    dataflow: DataflowPart | None = None


class MetadataPart(_Part):
    """``metadata`` of a Pipeline."""

    name: Name
    namespace: Name | None = None
    labels: dict[str, LabelValue] = {}
    annotations: dict[str, str] = {}


class ManifestPart(_Part):
    """A Pipeline as Core 2 has it."""

    apiVersion: Literal["mlops.seldon.io/v1alpha1"]
    kind: Literal["Pipeline"]
    metadata: MetadataPart
    spec: SpecPart


class ModelPart(_Part):
    """What serves a step.

    Attributes:
        variants: name -> ONNX file, or OpenVINO's ``.xml``, relative to the plan; the first is the one in use.
        server: what serves it on this machine.
        parallel_workers: MLServer's worker processes, 0 being none beside the server's own; Triton's instances.
        threads: of each engine session.
        replicas: servers with this model.
    """

    variants: Annotated[dict[Text, Path], Field(min_length=1)]
    server: Literal["mlserver", "triton"] = "mlserver"
    parallel_workers: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=1)] = 1
    replicas: Annotated[int, Field(ge=1)] = 1


class PlanPart(SpecPart):
    """A pipeline with what a manifest cannot say; ``manifest`` names one instead of ``steps`` and the rest.

    Attributes:
        models: step -> what serves it.
        routes: step -> tensor -> share of its answers with this tensor and none of the others named.
        samples: an .npz with the pipeline's inputs, and ``labels``.
        answer: the output that holds the predicted labels or scores; the only one where it is not given.
    """

    manifest: Path | None = None
    name: Name | None = None
    steps: list[StepPart] = []
    models: dict[Text, ModelPart] = {}
    routes: dict[Text, dict[Text, Share]] = {}
    samples: Path | None = None
    answer: Text | None = None

    @model_validator(mode="after")
    def _one_graph(self) -> "PlanPart":
        if (self.manifest is None) == (not self.steps):
            raise ValueError("a plan has either manifest, or name and steps of its own")
        if self.manifest is None and self.name is None:
            raise ValueError("a plan without manifest has a name")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A pipeline, and what is known of it besides.

    Attributes:
        path: of the document; its own paths are relative to its folder.
        spec: of the manifest.
        models: step -> what serves it; empty for a bare manifest.
        samples: the path, or None.
        answer: the output to be judged, or None for the only one.
    """

    pipeline: Pipeline
    path: Path
    spec: dict[str, Any] = field(default_factory=dict)
    models: dict[str, ModelPart] = field(default_factory=dict)
    samples: Path | None = None
    answer: str | None = None

    @property
    def folder(self) -> Path:
        """That the document's paths are relative to."""
        return self.path.parent


class _Anything(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


def load_plan(path: Path) -> Plan:
    """The pipeline of a file: a manifest, or a plan.

    Raises:
        DocumentError: it is no YAML, or does not fit; with file, line and key.
        InputError: it is no graph that Core 2 can run: an unknown step, a name given twice, a cycle without a bound.
    """
    if getattr(load_document(path, _Anything), "kind", None) is not None:
        manifest = load_document(path, ManifestPart)
        return Plan(pipeline=read_spec(manifest.metadata.name, manifest.spec), path=path, spec=_told(manifest.spec))
    document = load_document(path, PlanPart)
    name, spec = (
        document.name or "",
        SpecPart.model_construct(**{k: getattr(document, k) for k in SpecPart.model_fields}),
    )
    if document.manifest is not None:
        manifest = load_document(path.parent / document.manifest, ManifestPart)
        name, spec = document.name or manifest.metadata.name, manifest.spec
    pipeline = read_spec(name, spec, routes=document.routes)
    if unknown := sorted(set(document.models) - set(pipeline.names)):
        raise InputError(
            f"{path}: models names {unknown[0]!r}, which is no step", hint=f"Steps: {', '.join(pipeline.names)}."
        )
    samples = None if document.samples is None else path.parent / document.samples
    return Plan(
        pipeline=pipeline,
        path=path,
        spec=_told(spec),
        models=dict(document.models),
        samples=samples,
        answer=document.answer,
    )


def _told(spec: SpecPart) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_none=True, exclude_unset=True)


def parse_manifest(text: str, *, name: str = "manifest") -> Pipeline:
    """The pipeline of a manifest's text; see `load_plan`."""
    manifest = parse_document(text, ManifestPart, name=name)
    return read_spec(manifest.metadata.name, manifest.spec)


def read_spec(name: str, spec: SpecPart, *, routes: dict[str, dict[str, float]] | None = None) -> Pipeline:
    """The graph of a manifest's ``spec``.

    Raises:
        InputError: see `load_plan`.
    """
    check_core2_name(name, "Pipeline")
    names = [part.name for part in spec.steps]
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise InputError(f"the pipeline {name!r} has the step {twice[0]!r} twice", hint="Name each model once.")
    for part in spec.steps:
        check_core2_name(part.name, "Model")
    steps = tuple(_step(part, name, names) for part in spec.steps)
    outside = spec.input
    external = tuple(dict.fromkeys(text.split(".")[0] for text in outside.externalInputs)) if outside else ()
    pipeline = Pipeline(
        name=name,
        steps=steps,
        output=_output(spec.output, name, names),
        output_map=dict(spec.output.tensorMap) if spec.output else {},
        external=external,
        routes=_routes(name, names, routes or {}),
        max_revisits=spec.maxStepRevisits if spec.allowCycles else None,
    )
    _check_cycles(pipeline, spec)
    return pipeline


def _step(part: StepPart, pipeline: str, names: list[str]) -> Step:
    window = float(part.joinWindowMs or WINDOW_MS)
    inputs = tuple(_source(text, part.name, pipeline, names) for text in part.inputs)
    triggers = tuple(_source(text, part.name, pipeline, names) for text in part.triggers)
    if stray := sorted(key for key in part.tensorMap if not _is_mapped(key, inputs, pipeline)):
        raise InputError(
            f"step {part.name!r} renames {stray[0]!r}, which is none of its inputs",
            hint=f"Its inputs are: {', '.join(part.inputs) or f'{pipeline}.inputs'}.",
        )
    return Step(
        name=part.name,
        inputs=Gathering(
            sources=inputs or (Source(step=None, side="inputs", text=f"{pipeline}.inputs"),),
            join=part.inputsJoinType,
            window_ms=window,
        ),
        triggers=Gathering(sources=triggers, join=part.triggersJoinType, window_ms=window) if triggers else None,
        tensor_map=dict(part.tensorMap),
        batch_size=part.batch.size if part.batch else None,
        batch_window_ms=part.batch.windowMs if part.batch else None,
    )


def _is_mapped(key: str, sources: tuple[Source, ...], pipeline: str) -> bool:
    """Whether a key of ``tensorMap`` is a tensor of a source, or one that a source of all tensors may have."""
    found = re.fullmatch(r"([^.]+)\.(inputs|outputs)\.(.+)", key)
    if found is None:
        return False
    step = None if found[1] == pipeline else found[1]
    own = sources or (Source(step=None, side="inputs"),)
    return any(one.step == step and one.side == found[2] and one.tensor in {None, found[3]} for one in own)


def _source(text: str, step: str, pipeline: str, names: list[str]) -> Source:
    name, _, rest = text.partition(".")
    side, _, tensor = rest.partition(".")
    if name == pipeline and name not in names:
        if side != "inputs":
            raise InputError(
                f"step {step!r} takes {text!r}: of its own pipeline a step can take only the inputs",
                hint=f"Write {pipeline}.inputs, or {pipeline}.inputs.<tensor>.",
            )
        return Source(step=None, side="inputs", tensor=tensor or None, text=text)
    if name not in names:
        raise InputError(
            f"step {step!r} takes {text!r}, and the pipeline {pipeline!r} has no step {name!r}",
            hint=f"Its steps are: {', '.join(names)}.",
        )
    if side not in {"", "inputs", "outputs"}:
        raise InputError(
            f"step {step!r} takes {text!r}",
            hint="A source is step, step.outputs, step.outputs.<tensor> or step.inputs.",
        )
    taken: Literal["inputs", "outputs"] = "inputs" if side == "inputs" else "outputs"
    return Source(step=name, side=taken, tensor=tensor or None, text=text)


def _output(part: OutputPart | None, pipeline: str, names: list[str]) -> Gathering | None:
    if part is None:
        return None
    sources = tuple(_source(text, "output", pipeline, names) for text in part.steps)
    return Gathering(sources=sources, join=part.stepsJoin, window_ms=float(part.joinWindowMs or WINDOW_MS))


def _routes(pipeline: str, names: list[str], routes: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    for step, shares in routes.items():
        if step not in names:
            raise InputError(f"routes names {step!r}, which is no step of {pipeline!r}")
        if sum(shares.values()) > 1 + 1e-9:
            raise InputError(f"the routes of {step!r} add up to {sum(shares.values()):g}", hint="At most to 1.")
    return {step: dict(shares) for step, shares in routes.items()}


def _check_cycles(pipeline: Pipeline, spec: SpecPart) -> None:
    cycle = find_cycle(pipeline)
    if cycle is None:
        return
    if not spec.allowCycles:
        raise InputError(
            f"the pipeline {pipeline.name!r} goes round: {' -> '.join(cycle)}",
            hint="Break the cycle, or allow it: allowCycles: true with maxStepRevisits.",
        )
    if spec.maxStepRevisits is None:
        raise InputError(
            f"the pipeline {pipeline.name!r} goes round without a bound: {' -> '.join(cycle)}",
            hint="Say with maxStepRevisits how often a message may come back to a step.",
        )


def as_spec(pipeline: Pipeline) -> dict[str, Any]:
    """The graph as a manifest's ``spec``, without what is Core 2's default."""
    steps = []
    for step in pipeline.steps:
        own: dict[str, Any] = {"name": step.name}
        if any(source.step is not None or source.tensor for source in step.inputs.sources):
            own["inputs"] = [source.text for source in step.inputs.sources]
        if step.inputs.join != "inner":
            own["inputsJoinType"] = step.inputs.join
        if step.inputs.window_ms != WINDOW_MS:
            own["joinWindowMs"] = int(step.inputs.window_ms)
        if step.tensor_map:
            own["tensorMap"] = dict(step.tensor_map)
        if step.triggers:
            own["triggers"] = [source.text for source in step.triggers.sources]
            own |= {} if step.triggers.join == "inner" else {"triggersJoinType": step.triggers.join}
        if step.batch_size:
            window = {} if step.batch_window_ms is None else {"windowMs": int(step.batch_window_ms)}
            own["batch"] = {"size": step.batch_size, **window}
        steps.append(own)
    spec: dict[str, Any] = {"steps": steps}
    if pipeline.output is not None:
        spec["output"] = {"steps": [source.text for source in pipeline.output.sources]}
        if pipeline.output.join != "inner":
            spec["output"]["stepsJoin"] = pipeline.output.join
        if pipeline.output_map:
            spec["output"]["tensorMap"] = dict(pipeline.output_map)
    if pipeline.max_revisits is not None:
        spec |= {"allowCycles": True, "maxStepRevisits": pipeline.max_revisits}
    return spec
