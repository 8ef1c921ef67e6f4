"""Variants as MLflow's logged models: the files of each, and where they are logged."""

# First, as it sets how MLflow is imported.
from registry.mlflow_store import each, pages  # isort: split

import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow.onnx
import mlflow.pyfunc
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema
from mlflow.types import TensorSpec as MlflowTensorSpec

from registry import tracked
from registry.errors import InputError
from registry.mlflow_sending import SENDER, may_be_sending
from registry.records import Campaign, Candidate, TensorSpec, Variant

logger = logging.getLogger(__name__)

ModelKey = tuple[str, str]
"""What two candidates of one logged model have in common: the variant's id, and the precision it computes in."""

# An example is written as JSON, so a large one would outweigh the model.
LARGEST_EXAMPLE = 200_000
_NOT_IN_A_LOGGED_NAME = re.compile(r"[^A-Za-z0-9_-]+")
_PACKAGES = {"onnx": ("mlflow", "onnx", "onnxruntime", "numpy"), "openvino": ("mlflow", "openvino", "numpy")}
_FOR_TENSORRT = "tensorrt."
_RUNS_A_QUERY = 50
# MLflow's writers of models set what is of the whole process.
_ONE_WRITER = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A model to log: a variant, the precision it computes in, and what people call both."""

    variant: Variant
    precision: str
    name: str

    @property
    def key(self) -> ModelKey:
        return self.variant.id, self.precision


def model_key(candidate: Candidate) -> ModelKey:
    """The key of the logged model that a candidate serves."""
    return candidate.variant_id, candidate.engine.precision


def log_models(
    client: MlflowClient,
    campaign: Campaign,
    *,
    experiment_id: str,
    run_id: str,
    at_once: int,
    sender: Mapping[str, str],
) -> dict[ModelKey, str]:
    """One logged model for each variant (and precision it was served in), made, or found from an earlier time.

    Args:
        client: of the tracking store.
        campaign: whose variants; one whose folder is not on this machine is left out, with a warning.
        experiment_id: where they are logged.
        run_id: of the campaign, which they are outputs of.
        at_once: how many are uploaded at a time.
        sender: tags of who logs them, see `registry.mlflow_sending.sender_tags`.

    Returns:
        The models' ids.
    """
    wanted = [one for one in _wanted(campaign) if _is_here(campaign, one)]

    def logged(one: _Wanted) -> str:
        found = _found(client, experiment_id, one, sender)
        if found is not None:
            return found
        made = _logged(client, campaign, one, experiment_id=experiment_id, run_id=run_id, sender=sender)
        # Another folder may have logged it meanwhile; of two the first that was ready counts, for both.
        first = _found(client, experiment_id, one, sender) or made
        if first != made:
            client.delete_logged_model(made)
        return first

    ids = each(logged, wanted, at_once=at_once)
    if ids:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0) for model_id in ids])
    return {one.key: model_id for one, model_id in zip(wanted, ids, strict=True)}


def drop_half_logged(client: MlflowClient, experiment_id: str, run_ids: Sequence[str]) -> None:
    """Takes away what runs that are no more began to log, and never ended."""

    def logged_by(some: Sequence[str]) -> Iterator[Any]:
        query = f"source_run_id IN ({', '.join(map(repr, some))})"
        return pages(lambda token: client.search_logged_models([experiment_id], query, page_token=token))

    for first in range(0, len(run_ids), _RUNS_A_QUERY):
        for model in logged_by(run_ids[first : first + _RUNS_A_QUERY]):
            if str(model.status) != "READY":
                client.delete_logged_model(model.model_id)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what is uploaded."""
    with tempfile.TemporaryDirectory(prefix="burnish-") as name:
        yield Path(name)


def inside(folder: Path, name: str) -> Path:
    """The path of a file in the folder, its parents made.

    Raises:
        InputError: the name leads out of the folder.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise InputError(f"the file {name!r} would be written outside its folder")
    path = folder / parts
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _wanted(campaign: Campaign) -> list[_Wanted]:
    """What was served first, then the variants that were only made."""
    variants = {variant.id: variant for variant in campaign.variants}
    found: dict[ModelKey, _Wanted] = {}
    for candidate in campaign.candidates:
        variant = variants.get(candidate.variant_id)
        if variant is not None:
            found[model_key(candidate)] = _Wanted(
                variant=variant, precision=candidate.engine.precision, name=candidate.variant_name
            )
    served = {one.variant.id for one in found.values()}
    for variant in campaign.variants:
        if variant.id not in served:
            engine = next(iter(variant.recipe.engines), None)
            one = _Wanted(
                variant=variant, precision=engine.precision if engine is not None else "default", name=variant.name
            )
            found[one.key] = one
    return list(found.values())


def _is_here(campaign: Campaign, one: _Wanted) -> bool:
    place = campaign.artifacts.get(one.variant.id)
    if place is not None and Path(place).is_dir():
        return True
    logger.warning("The files of %s are not on this machine, so no model is logged.", one.name)
    return False


def _found(client: MlflowClient, experiment_id: str, one: _Wanted, sender: Mapping[str, str]) -> str | None:
    """The model where an earlier try or campaign logged it; half-logged ones are removed, unless another logs them."""
    query = f"tags.`burnish.variant_id` = '{one.variant.id}'"
    ready: list[tuple[int, str]] = []
    for model in pages(lambda token: client.search_logged_models([experiment_id], query, page_token=token)):
        known = (model.tags.get("burnish.artifact_digest"), model.tags.get("burnish.precision"))
        if known != (one.variant.artifact.digest, one.precision):
            continue
        if str(model.status) == "READY":
            ready.append((model.last_updated_timestamp, str(model.model_id)))
        elif not may_be_sending(model.tags, sender[SENDER]):
            client.delete_logged_model(model.model_id)
    return min(ready)[1] if ready else None


def _logged(
    client: MlflowClient,
    campaign: Campaign,
    one: _Wanted,
    *,
    experiment_id: str,
    run_id: str,
    sender: Mapping[str, str],
) -> str:
    made = client.create_logged_model(
        experiment_id,
        name=_NOT_IN_A_LOGGED_NAME.sub("-", one.name),
        source_run_id=run_id,
        tags={
            "burnish.variant_id": one.variant.id,
            "burnish.artifact_digest": one.variant.artifact.digest,
            "burnish.precision": one.precision,
            **sender,
        },
        params=tracked.model_parameters(one.variant, one.precision),
    )
    with scratch_folder() as folder:
        described = Model(
            artifact_path=made.artifact_location, model_uuid=made.model_id, model_id=made.model_id, run_id=run_id
        )
        with _ONE_WRITER:
            _save_model(campaign, one, described, folder / "model")
        client.log_model_artifacts(made.model_id, str(folder / "model"))
    client.finalize_logged_model(made.model_id, "READY")
    return str(made.model_id)


# --- files -------------------------------------------------------------------------------------------------------


def _save_model(campaign: Campaign, one: _Wanted, described: Model, path: Path) -> None:
    """Writes the variant as an MLflow model: its own bytes, signature, input example and requirements."""
    variant = one.variant
    place = Path(campaign.artifacts[variant.id])
    given: dict[str, Any] = {
        "mlflow_model": described,
        "signature": _signature(variant),
        "input_example": _example(variant.artifact.inputs),
        "pip_requirements": _requirements(campaign, variant.artifact.format),
    }
    if variant.artifact.format == "onnx":
        _save_onnx(variant, place, path, providers=_providers(variant, gpu=bool(campaign.host.gpus)), given=given)
    else:
        code = Path(__file__).with_name("openvino_pyfunc.py")
        mlflow.pyfunc.save_model(
            path,
            loader_module="openvino_pyfunc",
            data_path=str(place),
            code_paths=[str(code)],
            model_config={"precision": one.precision},
            **given,
        )


def _save_onnx(
    variant: Variant, place: Path, path: Path, *, providers: Sequence[str], given: Mapping[str, Any]
) -> None:
    import onnx

    entry = variant.artifact.entry
    # The weights of external files need not be read: the files themselves are put in place below.
    proto = onnx.load(place / entry, load_external_data=False)
    mlflow.onnx.save_model(proto, path, onnx_execution_providers=list(providers), save_as_external_data=False, **given)
    # MLflow wrote the graph anew; what was measured is these bytes. It loads the entry as model.onnx.
    for file in variant.artifact.files:
        target = inside(path, "model.onnx" if file.path == entry else file.path)
        shutil.copyfile(inside(place, file.path), target)


def _providers(variant: Variant, *, gpu: bool) -> list[str]:
    """ONNX Runtime's execution providers, best first; MLflow takes those that are there where the model is loaded.

    A variant made for TensorRT stays an ONNX model: an engine is bound to one GPU and one version of TensorRT, and
    ONNX Runtime builds it there.
    """
    tensorrt = any(stage.name.startswith(_FOR_TENSORRT) for stage in variant.recipe.stages)
    found = ["TensorrtExecutionProvider"] if tensorrt else []
    if tensorrt or gpu:
        found.append("CUDAExecutionProvider")
    return [*found, "CPUExecutionProvider"]


def _signature(variant: Variant) -> ModelSignature | None:
    inputs, outputs = schema_of(variant.artifact.inputs), schema_of(variant.artifact.outputs)
    return None if inputs is None or outputs is None else ModelSignature(inputs=inputs, outputs=outputs)


def schema_of(specs: Sequence[TensorSpec]) -> Schema | None:
    """The tensors' schema, -1 for each size that is free; None where numpy lacks a type (bfloat16)."""
    try:
        return Schema(
            [
                MlflowTensorSpec(
                    np.dtype(spec.dtype), tuple(size if isinstance(size, int) else -1 for size in spec.shape), spec.name
                )
                for spec in specs
            ]
        )
    except TypeError:
        return None


def _example(specs: Sequence[TensorSpec]) -> dict[str, Any] | None:
    """Zeros for each input, 1 for each size that is free; None where it would be large, or numpy lacks a type."""
    shapes = [tuple(size if isinstance(size, int) else 1 for size in spec.shape) for spec in specs]
    if sum(int(np.prod(shape)) for shape in shapes) > LARGEST_EXAMPLE or schema_of(specs) is None:
        return None
    return {spec.name: np.zeros(shape, np.dtype(spec.dtype)) for spec, shape in zip(specs, shapes, strict=True)}


def _requirements(campaign: Campaign, format: str) -> list[str]:
    """Exact versions of what loads the model; given, so that MLflow does not run a child process to find them."""
    found = []
    for package in _PACKAGES[format]:
        try:
            known = campaign.versions.get(package) or version(package)
        except PackageNotFoundError:
            continue
        found.append(f"{package}=={known.partition('+')[0]}")
    return found
