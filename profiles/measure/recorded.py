"""What a measurement of an endpoint leaves in a folder, beside its raw arrays, so that it can be compared later."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from registry.codec import digest, from_jsonable, to_jsonable
from registry.errors import InputError
from registry.ledger import write_durably
from registry.records import Capacity, Host, Round, RunRecord, Target

FILE = "bench.json"
SCHEMA = 1
# Settings that rounds are looked at by.
_COUNTS = ("rounds", "most_rounds")
_PACKAGES = ("burnish", "numpy", "tritonclient", "grpcio")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Runs of one endpoint.

    Attributes:
        session: equal for endpoints that were measured in turns; rounds of one number are then pairs.
        endpoint: ``url``, ``protocol``, ``model`` and the like: what may be told of the target, so no headers.
        client: the machine that offered the load.
        versions: package -> version, of what measured.
        samples_digest: SHA-256 (hex) of the samples that payloads were made of.
        settings: seed, level and whatever else was chosen.
        capacity: None where it was not looked for.
        rounds: their runs name arrays relative to the folder.
        searched: the windows of searches for a load, which belong to no round.
    """

    session: str
    endpoint: Mapping[str, Any]
    client: Host
    versions: Mapping[str, str]
    samples_digest: str
    settings: Mapping[str, Any]
    capacity: Capacity | None
    rounds: tuple[Round, ...]
    searched: tuple[RunRecord, ...] = ()


def endpoint_of(target: Target) -> dict[str, Any]:
    """What may be told of a target: headers may hold credentials, and only their names are."""
    return {
        "url": target.url,
        "protocol": target.protocol,
        "model": target.model,
        "binary": target.binary,
        "tls": target.tls,
        "headers": sorted(target.headers),
    }


def recorded_of(
    target: Target,
    rounds: Sequence[Round],
    capacity: Capacity | None,
    *,
    client: Host,
    samples_digest: str,
    settings: Mapping[str, Any],
    session: str = "",
) -> Recorded:
    """What is kept of runs on a target; see `Recorded`.

    Args:
        target: where they were offered.
        rounds: their runs name arrays relative to the folder of the record.
        capacity: None where it was not looked for.
        client: the machine that offered them.
        samples_digest: of the samples.
        settings: what was chosen.
        session: of endpoints that were measured in turns; one of its own if empty.
    """
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return Recorded(
        session=session or digest([to_jsonable(one) for one in rounds]),
        endpoint=endpoint_of(target),
        client=client,
        versions=versions,
        samples_digest=samples_digest,
        settings=settings,
        capacity=capacity,
        rounds=tuple(rounds),
    )


def write_recorded(recorded: Recorded, folder: Path) -> Path:
    """Writes the record into the folder of its arrays, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    content = {
        "schema": SCHEMA,
        "session": recorded.session,
        "endpoint": dict(recorded.endpoint),
        "client": to_jsonable(recorded.client),
        "versions": dict(recorded.versions),
        "samples_digest": recorded.samples_digest,
        "settings": dict(recorded.settings),
        "capacity": None if recorded.capacity is None else to_jsonable(recorded.capacity),
        "rounds": [to_jsonable(one) for one in recorded.rounds],
        "searched": [to_jsonable(one) for one in recorded.searched],
    }
    path = folder / FILE
    write_durably(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return path


def read_recorded(folder: Path) -> Recorded:
    """The record in a folder; its runs name their arrays by absolute paths, so that records of several mix.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
        if schema != SCHEMA:
            raise InputError(f"{path} is of schema {schema}; this burnish reads schema {SCHEMA}")
        capacity = content["capacity"]
        return Recorded(
            session=str(content["session"]),
            endpoint=dict(content["endpoint"]),
            client=from_jsonable(Host, content["client"]),
            versions=dict(content["versions"]),
            samples_digest=str(content["samples_digest"]),
            settings={name: _setting(name, value) for name, value in content["settings"].items()},
            capacity=None if capacity is None else from_jsonable(Capacity, capacity),
            rounds=tuple(_placed(from_jsonable(Round, one), folder.resolve()) for one in content["rounds"]),
            searched=tuple(from_jsonable(RunRecord, one) for one in content.get("searched", ())),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"no measurement can be read from {folder}: {error}",
            hint="`burnish bench ... --out FOLDER` and `burnish compare ... --out FOLDER` write such folders.",
        ) from error


def _setting(name: str, value: Any) -> Any:
    return int(value) if name in _COUNTS else value


def _placed(one: Round, folder: Path) -> Round:
    runs = []
    for run in one.runs:
        raw = (folder / run.raw).resolve()
        if not raw.is_relative_to(folder):
            raise InputError(f"{folder / FILE} names a file outside its folder: {run.raw}")
        runs.append(replace(run, raw=str(raw)))
    return replace(one, runs=tuple(runs))
