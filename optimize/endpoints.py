"""Endpoints that somebody else serves, as a command line names them."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from profiles.load.arrivals import LONGEST_S
from profiles.load.library import MOST_CONCURRENCY, MOST_RPS
from profiles.measure.bench import takes_binary
from registry.errors import InputError
from registry.records import Target

# How tensors travel -> the protocol.
_SPOKEN = {"raw": "grpc", "packed": "grpc", "binary": "rest", "json": "rest"}
_SCHEMES = {"grpc": "grpc", "grpcs": "grpc", "http": "rest", "https": "rest"}
_WITH_TLS = ("grpcs", "https")
_MOST = {"rate": MOST_RPS, "concurrency": MOST_CONCURRENCY, "duration_s": LONGEST_S, "runs": 1000, "workers": 64}


def endpoint(
    url: str, model: str, protocol: str | None, headers: Sequence[str], tls: bool, *, encoding: str | None = None
) -> Target:
    """The endpoint that command-line options name; one of REST is asked whether it takes binary tensors, if it matters.

    Without a protocol it is that of the encoding (``raw`` and ``packed`` are gRPC, ``binary`` and ``json`` REST), or
    that of the address (``http://``, ``grpc://``), or gRPC; without an encoding it is raw, or binary where that is
    taken.

    Raises:
        InputError: an option's value does not fit.
        UnreachableError: the REST endpoint does not answer.
    """
    if encoding is not None and encoding not in _SPOKEN:
        raise InputError(f"--encoding {encoding!r} is not known", hint=f"There are {', '.join(_SPOKEN)}.")
    if protocol not in (None, "grpc", "rest"):
        raise InputError(f"--protocol {protocol!r} is not known", hint="There are grpc and rest.")
    scheme, address = _parted(url)
    kind = _agreed(scheme, protocol, encoding)
    target = Target(
        url=address,
        protocol=kind,
        model=model,
        headers=_named(headers),
        tls=tls or scheme in _WITH_TLS,
    )
    if target.protocol == "grpc":
        return replace(target, packed=encoding == "packed")
    if encoding == "json":
        return target
    binary = takes_binary(target)
    if encoding == "binary" and not binary:
        raise InputError(
            f"{target.url} takes no binary tensors over REST",
            hint="Its extensions do not name binary_tensor_data: take --encoding json, or gRPC.",
        )
    return replace(target, binary=binary)


def check_amounts(**amounts: float | None) -> None:
    """Returns where every amount that is given is above 0, and not beyond what any client does.

    Raises:
        InputError: one is not; the message names its option.
    """
    for name, amount in amounts.items():
        option, most = f"--{name.replace('_', '-')}", _MOST.get(name, math.inf)
        if amount is not None and not 0 < amount < math.inf:
            raise InputError(f"{option} is above 0, not {amount:g}")
        if amount is not None and amount > most:
            raise InputError(f"{option} {amount:g} is beyond any client", hint=f"It is at most {most:,g}.")


def check_seed(seed: int) -> None:
    """Returns where a seed is one.

    Raises:
        InputError: it is not.
    """
    if seed < 0:
        raise InputError(f"--seed is 0 or more, not {seed}")


def make_folder(folder: Path, option: str) -> None:
    """Makes the folder that an option names.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {folder} cannot be made: {error.strerror}", hint="Name another folder.") from error


def _parted(url: str) -> tuple[str, str]:
    """(scheme or nothing, address) of what a user gives."""
    scheme, _, address = url.rpartition("://")
    if "@" in address:
        raise InputError(
            "a user or password does not belong into an address", hint="Give it with --header, or leave it out."
        )
    if scheme and scheme not in _SCHEMES:
        raise InputError(
            f"{url!r} is no address of a server", hint="Give host:port, with http:// or grpc:// or neither."
        )
    return scheme, address.rstrip("/")


def _agreed(scheme: str, protocol: str | None, encoding: str | None) -> Literal["grpc", "rest"]:
    """The protocol, where all that say one say the same."""
    said = {
        f"--encoding {encoding}": _SPOKEN.get(encoding or ""),
        f"{scheme}://": _SCHEMES.get(scheme),
        f"--protocol {protocol}": protocol,
    }
    spoken = {option: kind for option, kind in said.items() if kind is not None}
    (first, kind), *others = [*spoken.items()] or [("", "grpc")]
    for other, another in others:
        if another != kind:
            raise InputError(f"{first} is of {kind}, not {another}", hint=f"Leave out {other}.")
    return "grpc" if kind == "grpc" else "rest"


def _named(headers: Sequence[str]) -> dict[str, str]:
    pairs = [header.partition("=") for header in headers]
    if wrong := [header for header, pair in zip(headers, pairs, strict=True) if not pair[1] or not pair[0]]:
        # No more of it than a name: the rest may be a credential.
        name = re.split(r"[:\s]", wrong[0], maxsplit=1)[0]
        raise InputError(f"--header {name!r} is not name=value")
    return {name: value for name, _, value in pairs}
