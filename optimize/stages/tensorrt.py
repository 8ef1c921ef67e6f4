"""The stage that makes an ONNX model ready for TensorRT, and the build of an engine where a GPU is.

The stage runs anywhere. The build needs NVIDIA's ``trtexec`` and a GPU, and says so where they are missing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from optimize.readiness.profile import ENDS, Profile, Range, parse_sizes, profile_of, profile_text
from optimize.readiness.releases import Version
from optimize.readiness.rules import Finding, Target, apply_rules
from optimize.stages import onnx_files
from optimize.stages.base import Context, Stage, StageInput, StageParams, StageResult
from optimize.stages.simplify import folded
from registry.errors import InputError, NotApplicableError

BUILD_FILE = "build.json"
PLAN = "model.plan"

# From this version on the types of the graph are the engine's, and trtexec has to be told so until 11.
_STRONGLY_TYPED: Version = (10, 12)
_ALWAYS_TYPED: Version = (11, 0)
COMMAND_VERSIONS: tuple[Version, ...] = ((10, 0), _STRONGLY_TYPED, _ALWAYS_TYPED)
"""The versions from which trtexec takes other flags."""

# Opsets from which operators, and Q and DQ, take float16.
_FLOAT16_OPSET = 13
_FLOAT16_SCALES_OPSET = 19


class PrepareParams(StageParams):
    """Parameters of ``tensorrt.prepare``.

    Attributes:
        version: the major version of TensorRT that the model is checked for.
        precision: what the graph computes in, where it is not quantized; inputs and outputs stay float32.
        min_batch: least rows, where the batch is free.
        opt_batch: the rows that kernels are tuned for.
        max_batch: most rows.
        shapes: sizes of other free dimensions: ``sequence=1,128,512; height=224,224,448`` (min, opt, max).
        workspace_mb: memory (MiB) that the builder may try kernels with.
    """

    version: Literal[10, 11] = 11
    precision: Literal["float32", "float16"] = "float32"
    min_batch: int = Field(default=1, ge=1)
    opt_batch: int = Field(default=8, ge=1)
    max_batch: int = Field(default=16, ge=1)
    shapes: str = ""
    workspace_mb: int = Field(default=4096, ge=1)

    @field_validator("shapes")
    @classmethod
    def _shapes_can_be_read(cls, shapes: str) -> str:
        parse_sizes(shapes)
        return shapes

    @model_validator(mode="after")
    def _batches_rise(self) -> Self:
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError("it must hold that min_batch <= opt_batch <= max_batch")
        return self


class Prepare(Stage):
    """An ONNX model that TensorRT builds an engine from, with what the build needs beside it in ``build.json``.

    Constants are folded, and with ``precision`` float16 the graph computes in float16 (a quantized one, between its
    Q/DQ pairs); names, types and shapes of inputs and outputs stay. The outcome is checked by the static rules of
    ``burnish lint``: errors refuse the model, warnings become notes. ``build.json`` holds the optimization profile,
    the trtexec commands, the strings for Triton, and the findings. For int8 put ``quantize.tensorrt`` before it.
    Source: NVIDIA TensorRT documentation, strongly typed networks and dynamic shapes; onnxslim folds, and
    onnxruntime.transformers.float16 converts.
    """

    name = "tensorrt.prepare"
    Params = PrepareParams
    tools = ("onnx", "onnxruntime", "onnxslim")
    params: PrepareParams

    def requires(self, source: StageInput, context: Context) -> None:
        """Looks for sizes of all free dimensions."""
        self._profile(source)

    def apply(self, source: StageInput, context: Context) -> StageResult:
        """Folds, converts, checks, and writes the model and how to build it."""
        model = onnx_files.load(source)
        if self.params.precision == "float16":
            model = _in_float16(self.name, model)
        model = folded(model)
        profile = self._profile(source)
        entry = onnx_files.save(model, context.out)
        findings = self._checked(context.out / entry, profile)
        facts = self._facts(model, profile, findings)
        (context.out / BUILD_FILE).write_text(json.dumps(facts, indent=2) + "\n")
        notes = [f"{finding.rule}: {finding.message}" for finding in findings]
        return self.written(context, entry, *notes, f"how to build the engine is in {BUILD_FILE}")

    def _profile(self, source: StageInput) -> dict[str, Range]:
        params = self.params
        batch = Range(min=(params.min_batch,), opt=(params.opt_batch,), max=(params.max_batch,))
        try:
            return profile_of(source.inputs, batch=batch, sizes=parse_sizes(params.shapes))
        except InputError as error:
            raise NotApplicableError(f"{self.name}: {error.message}", hint=error.hint) from error

    def _checked(self, path: Path, profile: Profile) -> tuple[Finding, ...]:
        """What the rules find in the model's file: weights in other files stay out of memory.

        Raises:
            NotApplicableError: one of them is an error.
        """
        from optimize.readiness.lint import RULES, load_graph

        params = self.params
        target = Target(tensorrt=(params.version, 0), profile=profile, precision=params.precision)
        findings = apply_rules(RULES, load_graph(path), target)
        errors = [finding for finding in findings if finding.severity == "error"]
        if errors:
            told = "; ".join(f"{finding.rule} {finding.message}" for finding in errors[:5])
            more = f", and {len(errors) - 5} more" if len(errors) > 5 else ""
            raise NotApplicableError(
                f"{self.name}: TensorRT {params.version} would not take the model: {told}{more}", hint=errors[0].fix
            )
        return findings

    def _facts(self, model: Any, profile: Profile, findings: tuple[Finding, ...]) -> dict[str, Any]:
        quantized = onnx_files.op_counts(model)["QuantizeLinear"] > 0
        float16 = self.params.precision == "float16"
        commands = {
            _text(version): trtexec_command(
                version=version,
                profile=profile,
                quantized=quantized,
                float16=float16,
                workspace_mb=self.params.workspace_mb,
            )
            for version in COMMAND_VERSIONS
        }
        return {
            "checked_for": _text((self.params.version, 0)),
            "profile": {name: asdict(shapes) for name, shapes in profile.items()},
            "trtexec": commands,
            "triton": triton_profiles(profile),
            "findings": [asdict(finding) for finding in findings],
        }


def trtexec_command(
    *,
    version: Version,
    profile: Profile,
    quantized: bool = False,
    float16: bool = False,
    onnx: str = onnx_files.ENTRY,
    plan: str = PLAN,
    workspace_mb: int = 4096,
    timing_cache: str = "timing.cache",
) -> list[str]:
    """The command that builds an engine, as a list: no shell is asked to take it apart.

    Args:
        version: of TensorRT. Before 10.12 the builder is told which precisions it may use; from 10.12 on that the
            graph's types are the engine's; from 11 on that is so anyway.
        profile: empty where all shapes are fixed.
        quantized: whether the graph holds Q/DQ pairs.
        float16: whether it holds float16.
        onnx: the model.
        plan: where the engine goes.
        workspace_mb: memory (MiB) to try kernels with.
        timing_cache: a file that makes the next build on the same GPU faster.

    Source: NVIDIA, "Migrating trtexec Usage from TensorRT 10.x to 11.x".
    """
    command = ["trtexec", f"--onnx={onnx}", f"--saveEngine={plan}", f"--memPoolSize=workspace:{workspace_mb}"]
    if profile:
        command += [f"--{end}Shapes={profile_text(profile, end)}" for end in ENDS]
    command.append(f"--timingCacheFile={timing_cache}")
    if _STRONGLY_TYPED <= version < _ALWAYS_TYPED:
        command.append("--stronglyTyped")
    elif version < _STRONGLY_TYPED:
        command += ["--fp16"] * float16 + ["--int8"] * quantized
    return command


def triton_profiles(profile: Profile) -> dict[str, str]:
    """The profile as parameters of Triton's TensorRT execution accelerator; empty where all shapes are fixed."""
    return {f"trt_profile_{end}_shapes": profile_text(profile, end) for end in ENDS} if profile else {}


def command_for(build: Mapping[str, Any], version: Version) -> list[str]:
    """The command of a ``build.json`` for the TensorRT that is installed.

    Raises:
        InputError: it holds none for the version.
    """
    commands = {tuple(int(part) for part in text.split(".")): command for text, command in build["trtexec"].items()}
    fitting = [known for known in commands if known <= version]
    if not fitting:
        raise InputError(f"{BUILD_FILE} has no command for TensorRT {_text(version)}")
    return list(commands[max(fitting)])


def _in_float16(stage: str, model: Any) -> Any:
    """The model with its inside in float16, in an opset whose Q and DQ take that, sorted.

    Raises:
        NotApplicableError: the opset cannot be raised.
    """
    from onnx import TensorProto, version_converter
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer):
        return model
    quantized = onnx_files.op_counts(model)["QuantizeLinear"] > 0
    needed = _FLOAT16_SCALES_OPSET if quantized else _FLOAT16_OPSET
    if onnx_files.opset_of(model) < needed:
        try:
            model = version_converter.convert_version(model, needed)
        except Exception as error:  # the converter raises RuntimeError, ConvertError and others for what it lacks
            raise NotApplicableError(
                f"{stage}: float16 needs opset {needed}, and the model cannot be converted to it: {error}"
            ) from error
    made = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=onnx_files.is_large(model))
    OnnxModel(made).topological_sort(is_deterministic=True)
    return made


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
