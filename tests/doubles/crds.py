"""A strict check against the CRD files of Core 2, which themselves let unknown fields through."""

import functools
import re
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "../shared/crds"

# What came after these files were made: kind -> path in spec -> schema.
LATER: dict[str, dict[str, Any]] = {
    "Model": {"dataflow": {"type": "object", "properties": {"cleanTopicsOnDelete": {"type": "boolean"}}}},
    "Pipeline": {"dataflow": {"type": "object", "properties": {"cleanTopicsOnDelete": {"type": "boolean"}}}},
    "Server": {
        "statefulSetPersistentVolumeClaimRetentionPolicy": {
            "type": "object",
            "properties": {"whenDeleted": {"type": "string"}, "whenScaled": {"type": "string"}},
        }
    },
}
_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}


@functools.cache
def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a kind, as it is in the file."""
    text = (FOLDER / f"mlops.seldon.io_{kind.lower()}s.yaml").read_text(encoding="utf-8")
    document = yaml.load(text, Loader=yaml.CSafeLoader)  # noqa: TID251  a foreign file, larger than ours may be
    found: dict[str, Any] = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def problems(manifest: dict[str, Any], *, later: bool = True) -> list[str]:
    """What the CRD has against a manifest; with ``later`` also knowing what came after it."""
    schema = schema_of(manifest["kind"])
    if later:
        spec = schema["properties"]["spec"]
        spec = {**spec, "properties": {**spec["properties"], **LATER.get(manifest["kind"], {})}}
        schema = {**schema, "properties": {**schema["properties"], "spec": spec}}
    return list(_problems(schema, manifest, manifest["kind"]))


def _problems(schema: dict[str, Any], value: Any, path: str):
    if schema.get("x-kubernetes-int-or-string"):
        fits = isinstance(value, int | str) and re.fullmatch(schema.get("pattern", ".*"), str(value))
        if not fits:
            yield f"{path}: {value!r}"
        return
    wanted = _TYPES.get(schema.get("type", ""), object)
    if not isinstance(value, wanted) or (isinstance(value, bool) and schema.get("type") != "boolean"):
        yield f"{path}: {value!r} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _problems(schema.get("items", {}), entry, f"{path}[{number}]")
    if isinstance(value, dict):
        yield from (f"{path}.{name} is missing" for name in schema.get("required", ()) if name not in value)
        for name, entry in value.items():
            known = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            # Metadata is Kubernetes' own, and has no properties here.
            if known is None and "properties" in schema:
                yield f"{path}.{name} is unknown"
            elif isinstance(known, dict):
                yield from _problems(known, entry, f"{path}.{name}")
