"""What an agent does to an artifact for Triton; see `profiles.serving.roundtrip`."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from profiles.serving.roundtrip_findings import (
    CONFIG,
    TOP,
    Files,
    Finding,
    ModelResource,
    RefusedError,
    Severity,
    below,
    escaped,
    finding,
    is_there,
    refusal,
    version_of,
)
from registry.errors import MissingExtraError

_NEWER: Mapping[str, str] = {
    "TYPE_BF16": "Declare TYPE_FP32 and cast inside the model.",
    "count": "Leave it out: each sample runs once; give more samples of other names for more.",
    "model_metrics": "Leave it out, and set --metrics-config in the arguments of the Server's container triton.",
    "runtime": "Leave it out: Triton finds the library by the backend's name.",
}
_LEAVE_OUT = "Leave it out."


def rewrite_for_triton(
    files: Files, model: ModelResource, findings: list[Finding]
) -> tuple[dict[str, bytes], dict[str, Path]]:
    """What is written and what is copied into the model's folder in the repository; notes what is not kept.

    Raises:
        RefusedError: the model would fail to load.
        MissingExtraError: Triton's schema is not installed.
    """
    chosen = _folder(files, model.artifact_version, findings)
    # Where a version is chosen, the configuration and labels are looked for in the folder above it.
    home = TOP if chosen is None else chosen.parent
    copied = below(files, home if chosen is None else chosen)
    copied |= {path.name: source for path, source in files.items() if path.parent == home and path.name != CONFIG}
    for key in model.parameters:
        message = "Triton's models get no parameters from the Model"
        way = f"Give it in {CONFIG}: parameters {{ key: ... value {{ string_value: ... }} }}."
        findings.append(finding("C306", "error", message, file="parameters", key=f"/{escaped(key)}", way=way))
    file = str(home / CONFIG)
    if home / CONFIG not in files:
        message = f"there is no {CONFIG}; the agent writes one with nothing but the name"
        way = "Triton completes it for ONNX, TensorFlow and TensorRT models, without batching or instances."
        findings.append(finding("C305", "info", message, file=file, way=way))
        return {CONFIG: f'name: "{model.name}"\n'.encode()}, copied
    config = _config(files[home / CONFIG], file)
    _look_at_config(config, file, copied, findings)
    config.name = model.name
    return {CONFIG: _as_text(config).encode()}, copied


def _folder(files: Files, artifact_version: int | None, findings: list[Finding]) -> PurePosixPath | None:
    folders = sorted({parent for path in files for parent in path.parents if parent != TOP}, key=lambda at: at.parts)
    if artifact_version is not None:
        if PurePosixPath(str(artifact_version)) not in folders:
            message = f"no folder named {artifact_version} at the top, which artifactVersion asks for"
            raise refusal("C201", message, file="storageUri", way=f"Put the model into {artifact_version}/.")
        return PurePosixPath(str(artifact_version))
    numbered = [folder for folder in folders if (version_of(folder) or 0) > 0]
    if not numbered:
        configs = [path for path in files if path.name == CONFIG]
        if configs and PurePosixPath(CONFIG) not in configs:
            message = f"{CONFIG} is in {str(configs[0].parent)!r}, and is not looked for there"
            way = f"Point storageUri at the folder {str(configs[0].parent)!r} itself."
            raise refusal("C201", message, file=str(configs[0]), way=way)
        return None
    chosen = max(numbered, key=lambda folder: version_of(folder) or 0)
    if len(chosen.parts) > 1:
        message = f"{chosen} is taken for the model's version: it has the highest number of all folders at any depth"
        if chosen.parent / CONFIG in files:
            way = f"Point storageUri at the folder {str(chosen.parent)!r} itself."
        else:
            way = "Give the folder a name that is no number, or set artifactVersion."
        findings.append(finding("C207", "error", message, file=str(chosen), way=way))
    elif len(numbered) > 1:
        message = f"of {len(numbered)} numbered folders, {chosen} is taken, under the name 1"
        findings.append(finding("C206", "info", message, file=str(chosen)))
    return chosen


def _config(path: Path, file: str) -> Any:
    from profiles.serving import model_config_2022

    try:
        text = path.read_bytes().decode()
        return model_config_2022.parse(text)
    except UnicodeDecodeError as error:
        message = f"it is not UTF-8 text, so the load fails: {error}"
        raise refusal("C303", message, file=file, way="Save it as UTF-8.") from error
    except ImportError as error:
        raise MissingExtraError(f"reading {CONFIG}", extra="triton") from error
    except model_config_2022.ConfigError as error:
        try:
            newer = model_config_2022.unknown_then(text)
        except model_config_2022.ConfigError as today:
            message = f"it cannot be read, so the load fails: {today}"
            raise refusal("C303", message, file=file, way="Correct the file.") from error
        if not newer:
            message = f"Core 2's schema, of January 2022, cannot read it, so the load fails: {error}"
            raise refusal("C301", message, file=file, way=_LEAVE_OUT) from error
        raise RefusedError(*(_too_new(key, value, file) for key, value in newer)) from error


def _too_new(key: str, value: str, file: str) -> Finding:
    what = f"the value {value}" if value else "the field"
    message = f"Core 2's schema, of January 2022, does not know {what}, so the load fails"
    way = _NEWER.get(value) or _NEWER.get(key.rpartition(".")[2], _LEAVE_OUT)
    return finding("C302" if value else "C301", "error", message, file=file, key=key, way=way)


def _look_at_config(config: Any, file: str, copied: Mapping[str, Path], findings: list[Finding]) -> None:
    specific = list(config.version_policy.specific.versions)
    if specific and specific != [1]:
        severity: Severity = "warning" if 1 in specific else "error"
        message = f"it asks for {specific}, and the one version that there will be is named 1"
        way = "Leave out version_policy; set artifactVersion of the Model to choose a folder."
        findings.append(finding("C304", severity, message, file=file, key="version_policy.specific.versions", way=way))
    if (name := config.default_model_filename) and not is_there(f"1/{name}", copied):
        message = f"{name} is not in the folder that becomes the model's version 1"
        way = "Put the file there."
        findings.append(finding("C309", "error", message, file=file, key="default_model_filename", way=way))
    _look_at_instances(config, file, findings)


def _look_at_instances(config: Any, file: str, findings: list[Finding]) -> None:
    kinds = type(config).DESCRIPTOR.fields_by_name["instance_group"].message_type.enum_types_by_name["Kind"]
    counted = False
    for index, group in enumerate(config.instance_group):
        key, kind = f"instance_group[{index}].count", kinds.values_by_number[group.kind].name
        if kind == "KIND_CPU" and not counted:
            counted = True
            if group.count > 1:
                message = f"Core 2 reserves the Model's memory {group.count} times"
                way = "Give the Model the memory of one instance."
                findings.append(finding("C307", "info", message, file=file, key=key, way=way))
        elif kind == "KIND_CPU" or group.count > 1:
            severity: Severity = "info" if kind == "KIND_GPU" else "warning"
            message = f"Core 2 counts the first group of KIND_CPU only, and reserves no memory for these of {kind}"
            way = "Give the Model the memory of all instances, or have one group of KIND_CPU."
            findings.append(finding("C308", severity, message, file=file, key=key, way=way))


def _as_text(config: Any) -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))
