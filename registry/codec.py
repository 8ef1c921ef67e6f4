"""Records to JSON and back, with a schema version. Nothing else in the house turns a record into JSON."""

import hashlib
import inspect
import json
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter

from registry import records
from registry.errors import InputError

SCHEMA = 1
R = TypeVar("R")

_RECORDS: dict[str, Any] = {
    name: one for name, one in inspect.getmembers(records, is_dataclass) if inspect.isclass(one)
}
for _record in _RECORDS.values():
    # What pydantic reads the configuration of a standard dataclass from; without it unknown fields get lost.
    _record.__pydantic_config__ = ConfigDict(extra="forbid")


@cache
def _adapter(record_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(record_type)


def to_jsonable(record: object) -> Any:
    """The record as plain dicts, lists and scalars, as JSON has them."""
    return _adapter(cast(Any, type(record))).dump_python(record, mode="json")


def dumps(record: object) -> str:
    """One line of canonical JSON: sorted keys, no spaces, the record's type and schema version in an envelope.

    Raises:
        ValueError: the record holds a NaN or an infinity.
    """
    envelope = {"schema": SCHEMA, "type": type(record).__name__, "record": to_jsonable(record)}
    return canonical(envelope)


def loads(text: str) -> Any:
    """The record that `dumps` wrote.

    Raises:
        InputError: not JSON, another schema version, an unknown type, or fields that do not fit.
    """
    try:
        envelope = json.loads(text)
        schema, name, content = envelope["schema"], envelope["type"], envelope["record"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"not a record of burnish: {text[:80]!r} ({error})") from error
    if schema != SCHEMA:
        raise InputError(
            f"a record of schema {schema}; this burnish reads schema {SCHEMA}",
            hint="Read it with the version of burnish that wrote it.",
        )
    record_type = _RECORDS.get(str(name))
    if record_type is None:
        raise InputError(f"a record of the unknown type {name!r}")
    return from_jsonable(record_type, content)


def from_jsonable(record_type: type[R], content: Any) -> R:
    """A record of the given type from plain dicts, lists and scalars.

    Raises:
        InputError: fields are missing, unknown or of the wrong type.
    """
    try:
        return cast(R, _adapter(cast(Any, record_type)).validate_json(canonical(content)))
    except ValueError as error:
        raise InputError(f"not a valid {record_type.__name__}: {error}") from error


def canonical(content: Any) -> str:
    """JSON that is the same for equal content: sorted keys, no spaces, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def file_sha256(path: Path) -> str:
    """The SHA-256 (hex) of a file's bytes, which are not held in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: Any) -> str:
    """SHA-256 (hex, first 16 digits) of the canonical JSON: the ids of variants, candidates and campaigns."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]
