"""What the stage ``tensorrt.prepare`` made, as models for a Triton on GPUs: of an engine, and of ONNX Runtime.

The engine is built where there is a GPU; elsewhere it is left out with the reason, and all else is written.
"""

import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from optimize.admission import ENTRY, ask_child
from optimize.endpoints import make_folder
from optimize.judging import as_input
from optimize.signature import signature_of
from optimize.stages.tensorrt import PLAN
from optimize.trtexec import build_engine, read_build
from profiles.serving.triton import GpuServing, TensorRtProvider, render_triton_plan, render_triton_tensorrt
from registry.errors import InputError, MissingExtraError, NotApplicableError, StageError
from registry.records import Artifact

Precision = Literal["FP32", "FP16", "BF16", "INT8"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def write_repository(
    folder: Path,
    out: Path,
    *,
    name: str | None = None,
    max_batch_size: int | None = None,
    max_batch_delay_ms: float = 0.0,
    instances: int = 1,
    engine_cache: str = "/mnt/trt-cache",
    timeout_s: float = 3600.0,
) -> dict[str, Any]:
    """Writes a model repository for Triton: ``<name>-plan`` with the engine, and ``<name>-onnx`` with the ONNX file.

    Args:
        folder: a variant that ends with ``tensorrt.prepare``: ``model.onnx`` and ``build.json``.
        out: a folder that is new or empty.
        name: of the models; the folder's where not given.
        max_batch_size: most rows in a batch; the profile's largest batch where not given, 1 for none.
        max_batch_delay_ms: how long a request may wait for company.
        instances: of each model on each GPU.
        engine_cache: a folder of the server on a volume that stays, for engines that ONNX Runtime builds.
        timeout_s: longest time for trtexec.

    Returns:
        ``models`` (name -> folder), ``engine`` (the plan, or None), ``skipped`` (why there is none, or None), and
        ``commands`` (TensorRT from this version on -> the command that builds it, to be run in ``folder``).

    Raises:
        InputError: the folder is not what the stage makes, ``out`` is not empty, a model cannot be served so, or
            trtexec failed.
        MissingExtraError: Triton's client, which knows the configuration, is not installed.
    """
    build = read_build(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty", hint="Name a folder that is new or empty.")
    name = name or folder.resolve().name
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name for a model", hint="Give --name: letters, digits, '.', '-' and '_'.")
    make_folder(out.parent, "--out")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made, admitted = Path(scratch) / "made", Path(scratch) / "model"
        admitted.mkdir()
        artifact = _artifact(folder, admitted)
        serving = GpuServing(
            max_batch_size=_largest_batch(build, artifact) if max_batch_size is None else max_batch_size,
            max_batch_delay_ms=max_batch_delay_ms,
            instances=instances,
        )
        _write_configs(made, artifact, build, name=name, serving=serving, engine_cache=engine_cache)
        shutil.move(admitted, made / f"{name}-onnx" / "1")
        skipped = _build(folder, made / f"{name}-plan" / "1", timeout_s)
        if out.exists():
            out.rmdir()
        made.replace(out)
    return {
        "models": {model: str(out / model) for model in (f"{name}-plan", f"{name}-onnx")},
        "engine": None if skipped else str(out / f"{name}-plan" / "1" / PLAN),
        "skipped": skipped,
        "commands": {version: shlex.join(command) for version, command in build["trtexec"].items()},
    }


def lines(told: Mapping[str, Any], folder: Path) -> list[str]:
    """What `write_repository` told, for people."""
    shown = [f"Wrote {place}" for place in told["models"].values()]
    if told["engine"]:
        return [*shown, f"Built {told['engine']}"]
    shown.append(f"{told['skipped']}; where the GPU is, run the last of these that its TensorRT takes, in {folder}:")
    shown += [f"  from TensorRT {version} on: {command}" for version, command in told["commands"].items()]
    return [*shown, f"and put {PLAN} into {next(iter(told['models'].values()))}/1"]


def _artifact(folder: Path, admitted: Path) -> Artifact:
    """The model's signature, from a copy of its files that was let in as any model is."""
    described = ask_child("optimize.admission:admit_here", folder / ENTRY, folder=str(admitted))
    inputs, outputs = signature_of(described)
    return Artifact(digest="", format="onnx", entry=ENTRY, files=(), inputs=inputs, outputs=outputs)


def _largest_batch(build: Mapping[str, Any], artifact: Artifact) -> int:
    """The profile's largest batch, where each tensor has a free one and something beside it."""
    tensors = (*artifact.inputs, *artifact.outputs)
    if any(len(tensor.shape) < 2 or isinstance(tensor.shape[0], int) for tensor in tensors):
        return 1
    return max((int(shapes["max"][0]) for shapes in build["profile"].values()), default=1)


def _write_configs(
    made: Path, artifact: Artifact, build: Mapping[str, Any], *, name: str, serving: GpuServing, engine_cache: str
) -> None:
    provider = TensorRtProvider(
        precision_mode=_precision(build), engine_cache_path=engine_cache, profile_shapes=build["triton"]
    )
    try:
        files = render_triton_plan(artifact, model_name=f"{name}-plan", serving=serving)
        files |= render_triton_tensorrt(artifact, model_name=f"{name}-onnx", provider=provider, serving=serving)
    except ImportError as error:
        raise MissingExtraError("writing a config.pbtxt", extra="triton") from error
    for path, text in files.items():
        (made / path).parent.mkdir(parents=True)
        (made / path).write_text(text)


def _precision(build: Mapping[str, Any]) -> Precision:
    """What the builder was allowed before types were the graph's, which is what the graph holds."""
    flags = next(iter(build["trtexec"].values()))
    return "INT8" if "--int8" in flags else "FP16" if "--fp16" in flags else "FP32"


def _build(folder: Path, target: Path, timeout_s: float) -> str | None:
    """Builds the engine; why not, where it cannot be here."""
    target.mkdir()
    try:
        build_engine(folder, target, timeout_s=timeout_s)
    except NotApplicableError as error:
        return error.message
    except StageError as error:
        raise as_input(error, "no engine was built") from error
    return None
