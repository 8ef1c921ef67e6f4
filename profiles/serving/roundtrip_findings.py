"""What the halves of the round trip share: findings, and a Model as its agent sees it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
Files = Mapping[PurePosixPath, Path]
"""Path in the artifact's folder -> the file, in the order in which the agent walks."""

SETTINGS = "model-settings.json"
CONFIG = "config.pbtxt"
TOP = PurePosixPath()

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
"""What Go's ``strconv.Atoi`` takes for a number, but for a few of 19 digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that Core 2 does to an artifact's folder.

    Attributes:
        rule: its number, such as ``C101``.
        severity: ``error`` where the model fails to load or is served otherwise than its files say, ``warning`` where
            it may be, ``info`` where nothing changes that matters.
        file: path in the folder, ``storageUri`` or ``parameters`` (of the Model).
        key: a JSON pointer in ``model-settings.json``, a path of fields in ``config.pbtxt``, or empty.
        message: what happens.
        way: what works instead; empty where nothing needs to be done.
    """

    rule: str
    severity: Severity
    file: str
    key: str = ""
    message: str
    way: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResource:
    """What of a Model has to do with its files.

    Attributes:
        name: as the server knows it, ``<name>_<version>``.
        artifact_version: the folder it asks for.
        parameters: its ``parameters``.
        requirements: its ``requirements``.
    """

    name: str
    artifact_version: int | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    requirements: Sequence[str] = ()


class RefusedError(Exception):
    """The model would fail to load."""

    def __init__(self, *findings: Finding) -> None:
        super().__init__(findings[0].message)
        self.findings = findings


def finding(rule: str, severity: Severity, message: str, *, file: str, key: str = "", way: str = "") -> Finding:
    """A `Finding`, in one line."""
    return Finding(rule=rule, severity=severity, file=file, key=key, message=message, way=way)


def refusal(rule: str, message: str, *, file: str, key: str = "", way: str) -> RefusedError:
    """The error for one finding after which nothing is loaded."""
    return RefusedError(finding(rule, "error", message, file=file, key=key, way=way))


def version_of(folder: PurePosixPath) -> int | None:
    """The number that a folder is named by, or None."""
    return int(folder.name) if _NUMBER.fullmatch(folder.name) else None


def below(files: Files, folder: PurePosixPath) -> dict[str, Path]:
    """The files of one folder, under ``1/``: the agent calls every version 1."""
    return {f"1/{path.relative_to(folder)}": source for path, source in files.items() if path.is_relative_to(folder)}


def is_there(path: str, copied: Mapping[str, Path]) -> bool:
    """Whether a path of the repository is a file or folder of what is copied."""
    return any(found == path or found.startswith(f"{path}/") for found in copied)


def escaped(key: str) -> str:
    """A key in a JSON pointer. Source: RFC 6901, section 3."""
    return key.replace("~", "~0").replace("/", "~1")


def described(value: Any) -> str:
    """What kind of JSON a value is, and the beginning of it."""
    names = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return f"{names.get(type(value), 'null')} ({json.dumps(value, default=str)[:40]})"
