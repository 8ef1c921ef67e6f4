"""How much memory, and how many replicas, from what was measured."""

import math
import re

from registry.errors import InputError
from registry.records import ServingProfile

MARGINS = (0.1, 0.2)
"""How far below saturation replicas are to be run, in shares: Seldon's advice, for the time that a start takes."""
MARGIN = 0.15
MEBIBYTE = 1 << 20


def counted_copies(serving: ServingProfile) -> int:
    """By how many copies Core 2 multiplies a Model's ``memory``: Triton's instances, or MLServer's workers."""
    return serving.instances if serving.server == "triton" else max(1, serving.parallel_workers)


def memory_needed(peak_mb: float, *, headroom: float = 0.25) -> int:
    """Bytes to ask for, from the peak of resident memory in MB of 10^6 bytes, and a share of it on top.

    Raises:
        InputError: a number is not one of memory.
    """
    if not (math.isfinite(peak_mb) and peak_mb > 0 and headroom >= 0):
        raise InputError(f"memory of {peak_mb} MB with a headroom of {headroom} cannot be asked for")
    return math.ceil(peak_mb * 1e6 * (1 + headroom))


def as_quantity(size_bytes: float) -> str:
    """Bytes as Kubernetes writes them, rounded up to whole MiB."""
    return f"{math.ceil(size_bytes / MEBIBYTE)}Mi"


def quantity_bytes(quantity: str) -> float:
    """Bytes of an amount of memory as Kubernetes writes it (``512Mi``, ``2G``).

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]|[KMGT]i)?", quantity)
    if found is None:
        raise InputError(f"{quantity!r} is no amount of memory", hint="It is a number with Mi, Gi, M or G, say: 512Mi.")
    unit = found[2] or ""
    power = " kMGT".index(unit[:1].replace("K", "k")) if unit else 0
    return float(found[1]) * (1024.0 if unit.endswith("i") else 1000.0) ** power


def rate_per_replica(saturation_rps: float, margin: float = MARGIN) -> float:
    """Requests a second that one replica is to be given.

    Raises:
        InputError: the margin is not 0.1 to 0.2, or nothing was measured.
    """
    if not MARGINS[0] <= margin <= MARGINS[1]:
        raise InputError(
            f"a margin of {margin} below saturation", hint=f"It is a share from {MARGINS[0]} to {MARGINS[1]}."
        )
    if not (math.isfinite(saturation_rps) and saturation_rps > 0):
        raise InputError(f"a saturation of {saturation_rps} requests a second gives no number of replicas")
    return saturation_rps * (1 - margin)


def replicas_for(rate_rps: float, saturation_rps: float, margin: float = MARGIN) -> int:
    """How many replicas take this many requests a second, each kept below its saturation by the margin.

    Raises:
        InputError: as `rate_per_replica`, or the rate is not above 0.
    """
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise InputError(f"a rate of {rate_rps} requests a second cannot be served", hint="It is above 0.")
    return math.ceil(rate_rps / rate_per_replica(saturation_rps, margin))
