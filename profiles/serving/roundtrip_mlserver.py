"""What an agent does to an artifact for MLServer; see `profiles.serving.roundtrip`."""

import json
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from profiles.serving.roundtrip_findings import (
    SETTINGS,
    TOP,
    Files,
    Finding,
    ModelResource,
    Severity,
    below,
    described,
    escaped,
    finding,
    is_there,
    refusal,
    version_of,
)
from profiles.serving.self_contained import PREFIX, module_name


def rewrite_for_mlserver(
    files: Files, model: ModelResource, findings: list[Finding]
) -> tuple[dict[str, bytes], dict[str, Path]]:
    """What is written and what is copied into the model's folder in the repository; notes what is not kept.

    Raises:
        RefusedError: the model would fail to load.
    """
    chosen = _folder(files, model, findings)
    copied = below(files, chosen)
    file = str(chosen / SETTINGS)
    _look_beside(copied, file, findings)
    if f"1/{SETTINGS}" in copied:
        content = _read(copied[f"1/{SETTINGS}"], file)
    else:
        content = _made(copied, model.requirements)
        message = f"there is no {SETTINGS}; the agent writes one for {content['implementation']}"
        findings.append(finding("C205", "info", message, file=file))
    kept = _struct(content, _STRUCT, "", file, findings)
    kept.setdefault("parameters", {})
    _merge(kept, model.parameters, findings)
    _look(kept, file, copied, findings)
    findings[:] = _forgiven(findings, content, kept)
    kept["name"] = model.name
    kept["parameters"]["version"] = "1"
    return {f"1/{SETTINGS}": json.dumps(kept).encode()}, copied


# --- which folder -----------------------------------------------------------------------------------------------


def _look_beside(copied: Mapping[str, Path], file: str, findings: list[Finding]) -> None:
    for other in sorted(copied):
        if other.endswith(f"/{SETTINGS}") and other != f"1/{SETTINGS}":
            message = f"{other.removeprefix('1/')} is copied along, and MLServer takes it for one more model"
            findings.append(finding("C203", "warning", message, file=file, way="Keep one model in a folder."))
    if "1/settings.json" in copied:
        message = "settings.json beside it has no effect: the server's own settings are not read from an artifact"
        way = "Set them in the environment of the Server's container mlserver, as MLSERVER_<KEY>."
        findings.append(finding("C204", "warning", message, file=file, way=way))


def _folder(files: Files, model: ModelResource, findings: list[Finding]) -> PurePosixPath:
    artifact_version = model.artifact_version
    holders = [path.parent for path in files if path.name == SETTINGS]
    numbered = [holder for holder in holders if holder != TOP and version_of(holder) is not None]
    if TOP in holders:
        if artifact_version is not None or numbered:
            asked = f"artifactVersion {artifact_version}" if artifact_version is not None else "the numbered folders"
            message = f"the {SETTINGS} at the top is taken whatever the version; {asked} have no effect"
            way = "Leave it out, or leave out the numbered folders and artifactVersion."
            findings.append(finding("C202", "warning", message, file=SETTINGS, way=way))
        return TOP
    if artifact_version is not None:
        named = [holder for holder in holders if holder.name == str(artifact_version)]
        if len(named) != 1:
            what = "no folder" if not named else f"{len(named)} folders"
            message = f"{what} named {artifact_version} with a {SETTINGS}, which artifactVersion asks for"
            raise refusal("C201", message, file="storageUri", way=f"Have one folder {artifact_version}/{SETTINGS}.")
        return named[0]
    if numbered:
        chosen = max(numbered, key=lambda holder: version_of(holder) or 0)
        if len(numbered) > 1:
            message = f"of {len(numbered)} numbered folders, {chosen} is taken, under the name 1"
            findings.append(finding("C206", "info", message, file=str(chosen)))
        return chosen
    if holders:
        message = f"{SETTINGS} is in {str(holders[0])!r}, which is neither the top nor a folder named by a number"
        way = f"Point storageUri at the folder {str(holders[0])!r} itself."
        raise refusal("C201", message, file=str(holders[0] / SETTINGS), way=way)
    if not any(requirement in _STOCK for requirement in model.requirements):
        message = f"there is no {SETTINGS}, and Core 2 writes one only for a Model that requires {', '.join(_STOCK)}"
        raise refusal("C201", message, file="storageUri", way=f"Put a {SETTINGS} with the implementation at the top.")
    return TOP


_STOCK: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "alibi-detect": ("mlserver_alibi_detect.AlibiDetectRuntime", ()),
    "alibi-explain": ("mlserver_alibi_explain.AlibiExplainRuntime", ()),
    "lightgbm": ("mlserver_lightgbm.LightGBMModel", ("bst",)),
    "mlflow": ("mlserver_mlflow.MLflowRuntime", ()),
    "python": ("", ("py",)),
    "sklearn": ("mlserver_sklearn.SKLearnModel", ("joblib", "pkl", "pickle")),
    "xgboost": ("mlserver_xgboost.XGBoostModel", ("json", "bst")),
}
"""Requirement -> the stock runtime that settings are made for, and the endings of its model's file."""

_CLASS = re.compile(r".*class (.*)\(MLModel\):")


def _made(copied: Mapping[str, Path], requirements: Sequence[str]) -> dict[str, Any]:
    requirement = next(name for name in requirements if name in _STOCK)
    implementation, endings = _STOCK[requirement]
    top = [path.removeprefix("1/") for path in copied if path.count("/") == 1]
    uri = next((f"./{path}" for ending in endings for path in top if path.endswith(f".{ending}")), None)
    if requirement == "python":
        for path in (path for path in top if path.endswith(".py")):
            if found := _CLASS.search(copied[f"1/{path}"].read_text("utf-8", "replace")):
                implementation, uri = f"{path.removesuffix('.py')}.{found.group(1)}", f"./{path}"
                break
    elif requirement == "alibi-explain":
        folders = [path.split("/")[1] for path in copied if path.count("/") > 1]
        uri = f"./{folders[0]}" if folders else None
    elif not endings:
        uri = "./"
    if uri is None or not implementation:
        wanted = "a class that extends MLModel" if requirement == "python" else "the file of a model"
        message = f"there is no {SETTINGS}, and none can be made for {requirement}: {wanted} is not at the top"
        raise refusal("C201", message, file="storageUri", way=f"Put a {SETTINGS} beside the model.")
    workers = {"parallel_workers": 0} if requirement == "alibi-explain" else {}
    return {"implementation": implementation, **workers, "parameters": {"uri": uri}}


# --- the struct -------------------------------------------------------------------------------------------------

_TENSOR = {"name": "text", "shape": "shape", "datatype": "text"}
_PARAMETERS = {
    "uri": "text", "version": "text", "format": "text", "content_type": "text", "extra": "object",
    "environment_tarball": "text",
}  # fmt: skip
_STRUCT = {
    "name": "text", "inputs": "tensors", "outputs": "tensors", "platform": "text", "versions": "texts",
    "parallel_workers": "integer", "implementation": "text", "parameters": "parameters",
}  # fmt: skip
"""Key -> type, of all that the agent keeps; in the order in which it writes them."""

_IN_EXTRA = "Give it in parameters.extra, which Core 2 keeps, or as a parameter of the Model."
_LOST: Mapping[str, tuple[tuple[Any, ...], str, str]] = {
    "/max_batch_size": (
        (0, 1),
        "MLServer will not batch",
        "Give max_batch_size in parameters.extra, where burnish's runtime reads it, or set"
        " MLSERVER_MODEL_MAX_BATCH_SIZE in the environment of the Server, for all of its models.",
    ),
    "/max_batch_time": (
        (0, 0.0),
        "MLServer will not batch",
        "Give max_batch_time in parameters.extra, where burnish's runtime reads it, or set"
        " MLSERVER_MODEL_MAX_BATCH_TIME in the environment of the Server, for all of its models.",
    ),
    "/warm_workers": ((True, False), "nothing changes: MLServer always warms its workers", "Leave it out."),
    "/cache_enabled": (
        (False,),
        "its responses will not be cached",
        "Set MLSERVER_MODEL_CACHE_ENABLED and MLSERVER_CACHE_ENABLED to true in the environment of the Server.",
    ),
    "/parameters/environment_path": (
        (),
        "the model is loaded in the server's own environment",
        "Pack the environment and name it in parameters.environment_tarball, or install it in the Server's image.",
    ),
    "/parameters/inference_pool_gid": (
        (),
        "the model shares the default pool of workers",
        "Set MLSERVER_MODEL_AUTOGENERATE_INFERENCE_POOL_GID to true in the environment of the Server.",
    ),
    "/parameters/autogenerate_inference_pool_gid": (
        (False,),
        "the model shares the default pool of workers",
        "Set MLSERVER_MODEL_AUTOGENERATE_INFERENCE_POOL_GID to true in the environment of the Server.",
    ),
}
"""Pointer -> values that are MLServer's defaults or have no effect, what is lost otherwise, and the way that works."""

_LOST_IN_TENSOR: tuple[tuple[Any, ...], str, str] = (
    ({},),
    "MLServer will not know the tensor's content type",
    "Give parameters.content_type for the whole model, send it with each request, or set MLSERVER_MODEL_INPUTS in the"
    " environment of the Server.",
)
_TENSOR_PARAMETERS = re.compile(r"/(inputs|outputs)/\d+/parameters")
_BATCHING = ("max_batch_size", "max_batch_time")


def _read(path: Path, file: str) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        content = json.loads(path.read_bytes().decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        message = f"it is not JSON, so the load fails: {error}"
        raise refusal("C104", message, file=file, way="Correct the file.") from error
    if not isinstance(content, dict):
        message = f"it is {described(content)}, not an object, so the load fails"
        raise refusal("C104", message, file=file, way="Give the keys of MLServer's model settings.")
    return content


def _struct(
    content: dict[str, Any], keys: Mapping[str, str], at: str, file: str, findings: list[Finding]
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    # Go finds a field by the key as it is, or else without regard to case.
    given = {key if key in keys else key.lower(): (key, value) for key, value in content.items()}
    for key, kind in keys.items():
        if key in given:
            value = _value(given[key][1], kind, f"{at}/{key}", file, findings)
            # Fields marked omitempty: a zero is left out, but for a pointer to a number.
            if value not in (None, "", [], {}) or kind == "parameters":
                kept[key] = value or {} if kind == "parameters" else value
    for key, (written, value) in given.items():
        if key not in keys:
            findings.append(_lost(f"{at}/{escaped(written)}", value, file))
    return kept


def _value(value: Any, kind: str, at: str, file: str, findings: list[Finding]) -> Any:
    if value is None:
        return None
    wanted, fits = _TYPES[kind]
    if not fits(value):
        message = f"it is {described(value)}, not {wanted}, so the load fails"
        raise refusal("C103", message, file=file, key=at, way=f"Write {wanted}.")
    if kind == "parameters":
        return _struct(value, _PARAMETERS, at, file, findings)
    if kind == "tensors":
        return [_struct(tensor, _TENSOR, f"{at}/{index}", file, findings) for index, tensor in enumerate(value)]
    if kind == "shape" and not value:
        message = "an empty shape is left out, and MLServer refuses a tensor without one, so the load fails"
        way = "Leave the tensors out; burnish's runtime publishes them from the model."
        raise refusal("C105", message, file=file, key=at, way=way)
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(fits(item) for item in value)


_TYPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda value: isinstance(value, str)),
    "integer": ("an integer", _is_integer),
    "texts": ("a list of texts", lambda value: _is_list(value, lambda item: isinstance(item, str))),
    "shape": ("a list of integers", lambda value: _is_list(value, _is_integer)),
    "tensors": ("a list of objects", lambda value: _is_list(value, lambda item: isinstance(item, dict))),
    "parameters": ("an object", lambda value: isinstance(value, dict)),
    "object": ("an object", lambda value: isinstance(value, dict)),
}
"""Type of a field -> what it is called, and whether Go decodes a value into it."""


def _lost(pointer: str, value: Any, file: str) -> Finding:
    lost = _LOST_IN_TENSOR if _TENSOR_PARAMETERS.fullmatch(pointer) else _LOST.get(pointer)
    if lost is None:
        # MLServer itself ignores top-level keys it does not know; in `parameters` it keeps them for the runtime.
        severity: Severity = "error" if pointer.startswith("/parameters/") else "warning"
        message = "lost: Core 2 does not know the key"
        return finding("C106", severity, message, file=file, key=pointer, way=_IN_EXTRA)
    harmless, consequence, way = lost
    if value is None or value in harmless:
        return finding("C101", "info", "lost, and it has no effect", file=file, key=pointer)
    return finding("C101", "error", f"lost: {consequence}", file=file, key=pointer, way=way)


def _forgiven(findings: list[Finding], content: dict[str, Any], kept: dict[str, Any]) -> list[Finding]:
    """The findings; a lost key of batching is no error where the runtime reads it elsewhere, or it had no effect."""
    extra = kept["parameters"].get("extra", {})
    batched = _above(content.get("max_batch_size"), 1) and _above(content.get("max_batch_time"), 0)

    def forgiven(found: Finding) -> Finding:
        key = found.key.removeprefix("/")
        if found.rule != "C101" or found.severity != "error" or key not in _BATCHING:
            return found
        if key in extra and _is_ours(kept):
            return replace(found, severity="info", message="lost; parameters.extra has it, and is read", way="")
        if not batched:
            return replace(found, severity="info", message="lost; MLServer would not batch by it alone", way="")
        return found

    return [forgiven(found) for found in findings]


def _merge(kept: dict[str, Any], parameters: Mapping[str, object], findings: list[Finding]) -> None:
    extra = dict(kept["parameters"].get("extra") or {})
    for key, value in parameters.items():
        if not isinstance(value, str):
            message = f"it is {described(value)}; the Model takes texts only"
            way = f"Write it as a text: {json.dumps(str(value))}."
            raise refusal("C107", message, file="parameters", key=f"/{escaped(key)}", way=way)
        if key in extra and extra[key] != value:
            message = f"the Model's {value!r} takes the place of {extra[key]!r} in parameters.extra"
            findings.append(finding("C108", "info", message, file="parameters", key=f"/{escaped(key)}"))
        extra[key] = value
    if extra:
        kept["parameters"]["extra"] = dict(sorted(extra.items()))


def _look(kept: dict[str, Any], file: str, copied: Mapping[str, Path], findings: list[Finding]) -> None:
    """Notes what is kept and has no effect, is overwritten, or cannot work where the files will be."""
    parameters = kept["parameters"]
    if "name" in kept:
        findings.append(finding("C102", "info", "overwritten: it becomes <model>_<version>", file=file, key="/name"))
    if "version" in parameters:
        findings.append(finding("C102", "info", "overwritten: it becomes 1", file=file, key="/parameters/version"))
    if "versions" in kept:
        message = "no effect: Core 2 counts versions itself"
        findings.append(finding("C102", "info", message, file=file, key="/versions"))
    if "implementation" not in kept:
        message = "no runtime is named, so MLServer refuses the model unless its environment names one for all"
        way = "Name the runtime's class."
        findings.append(finding("C109", "error", message, file=file, key="/implementation", way=way))
    if "parallel_workers" in kept:
        off = kept["parallel_workers"] <= 0
        message = "the model runs in the server's own process" if off else "no effect: it is the server's setting"
        way = "" if off else "Set MLSERVER_PARALLEL_WORKERS in the environment of the Server."
        severity: Severity = "info" if off else "warning"
        findings.append(finding("C110", severity, message, file=file, key="/parallel_workers", way=way))
    for key in ("uri", "environment_tarball"):
        if key in parameters:
            _look_for(key, parameters[key], file, copied, findings)
    _look_at_code(kept, file, copied, findings)
    _look_at_batching(kept, file, findings)


def _look_for(key: str, path: str, file: str, copied: Mapping[str, Path], findings: list[Finding]) -> None:
    beside = "Put the file beside the settings, and write its path from there, such as ./model.onnx."
    if path.startswith("/") or "://" in path:
        severity: Severity = "warning"
        message = f"{path} is not in the artifact; it is looked for from the server's container"
    elif (within := posixpath.normpath(path)).startswith(".."):
        severity, message = "error", f"{path} leaves the folder, and only that folder is copied"
    elif within == "." or is_there(f"1/{within}", copied):
        return
    else:
        severity, message = "error", f"{path} is not in the folder that is copied"
    findings.append(finding("C111", severity, message, file=file, key=f"/parameters/{key}", way=beside))


def _look_at_code(kept: dict[str, Any], file: str, copied: Mapping[str, Path], findings: list[Finding]) -> None:
    """Notes where a self-contained model's own code is missing, or is not what its name says."""
    module = str(kept.get("implementation", "")).rpartition(".")[0]
    if not module.startswith(PREFIX):
        return
    code = copied.get(f"1/{module}.py")
    if code is None:
        message = f"{module}.py is not in the folder that is copied"
    elif module_name(code.read_bytes()) != module:
        message = f"{module}.py was changed since it was named: a server that has the other one answers with that"
    else:
        return
    way = "Render the model again, and upload the folder whole."
    findings.append(finding("C114", "error", message, file=file, key="/implementation", way=way))


def _look_at_batching(kept: dict[str, Any], file: str, findings: list[Finding]) -> None:
    in_extra = [key for key in _BATCHING if key in kept["parameters"].get("extra", {})]
    if not in_extra:
        return
    key = f"/parameters/extra/{in_extra[0]}"
    if not _is_ours(kept):
        message = f"{kept.get('implementation', 'the runtime')} has to read it there itself; stock runtimes do not"
        way = "Serve it with burnish's runtime, or set MLSERVER_MODEL_MAX_BATCH_SIZE and _TIME on the Server."
        findings.append(finding("C112", "warning", message, file=file, key=key, way=way))
    elif len(in_extra) == 1:
        missing = next(name for name in _BATCHING if name not in in_extra)
        message = f"MLServer batches only where {missing} is given too"
        way = f"Give {missing} in parameters.extra as well."
        findings.append(finding("C113", "warning", message, file=file, key=key, way=way))


def _is_ours(kept: dict[str, Any]) -> bool:
    """Whether burnish's runtime serves it, under the name of its package or of a file in the artifact."""
    return str(kept.get("implementation", "")).rpartition(".")[2] == "SessionRuntime"


def _above(value: Any, limit: int) -> bool:
    return isinstance(value, (int, float)) and value > limit
