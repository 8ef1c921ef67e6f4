"""What was measured of a pipeline's steps, each alone, and of the whole, as a YAML document that a user can read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from profiles.pipelines.graph import Pipeline
from registry.documents import load_document
from registry.errors import InputError
from registry.ledger import write_durably

MOST_KEPT = 400
Positive = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepNumbers(_Part):
    """One variant of a step, measured alone.

    Attributes:
        latency_ms: of single requests with nothing else to do, as values at equal steps of probability.
        saturation_rps: the highest rate that was sustained.
        workers: that served side by side when it was measured.
        cpu_ms: the server's CPU time for one request at the rate that the pipeline may have, or None where it was not
            measured. A server that is mostly idle wakes for each request, which takes more than at its saturation.
        busy_cpus: CPUs that the server kept busy at its saturation, or None.
        memory_mb: the server's resident memory, or None.
        price_per_hour: of one replica, or None.
        accuracy_drop: what the pipeline's metric loses when this variant takes the place of the first one, the other
            steps being the first ones; None where it was not measured.
        response_bytes: of one answer, or None.
        by_workers: workers -> saturation with as many, for balancing; that of ``workers`` goes without saying.
        rates: offered rate, at constant arrivals -> [p50, p90] in ms, of the rates that were sustained.
    """

    latency_ms: Annotated[tuple[Positive, ...], Field(min_length=1)]
    saturation_rps: Positive
    workers: Annotated[int, Field(ge=1)] = 1
    cpu_ms: Positive | None = None
    busy_cpus: Positive | None = None
    memory_mb: Positive | None = None
    price_per_hour: Positive | None = None
    accuracy_drop: float | None = None
    response_bytes: Annotated[int, Field(ge=0)] | None = None
    by_workers: dict[int, Positive] = {}
    rates: dict[str, tuple[float, float]] = {}


class WholeNumbers(_Part):
    """The whole pipeline, measured end to end.

    Attributes:
        latency_ms: as of a step.
        saturation_rps: the highest rate that was sustained.
        variants: step -> variant that it had.
        rates: offered rate -> [p50, p99] in ms.
        without: what is not in it.
    """

    latency_ms: Annotated[tuple[Positive, ...], Field(min_length=1)]
    saturation_rps: Positive | None = None
    variants: dict[str, str] = {}
    rates: dict[str, tuple[float, float]] = {}
    without: str = ""


class _Document(_Part):
    host: str = ""
    shared_cpus: Positive | None = None
    steps: dict[str, dict[str, StepNumbers]]
    pipeline: WholeNumbers | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is known of a pipeline.

    Attributes:
        steps: step -> variant -> numbers; a step's first variant is the one in use.
        whole: of the pipeline, or None.
        host: fingerprint of the machine.
        shared_cpus: how many CPUs all servers share, on one machine; None where each has its own.
    """

    steps: Mapping[str, Mapping[str, StepNumbers]]
    whole: WholeNumbers | None = None
    host: str = ""
    shared_cpus: float | None = None

    def of(self, step: str, variant: str | None = None) -> StepNumbers:
        """The numbers of a step's variant; of its first where none is named.

        Raises:
            InputError: it was not measured.
        """
        known = self.steps.get(step, {})
        if not known or (variant is not None and variant not in known):
            what = step if variant is None else f"{step} with variant {variant}"
            raise InputError(
                f"step {what!r} is unknown: it was not measured",
                hint="Measure it: burnish pipeline measure PLAN --out MEASURED.yaml"
                + (f" (known variants: {', '.join(known)})" if known else ""),
            )
        return known[variant] if variant is not None else next(iter(known.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A step as a queue: so many servers, how long each is held, and what a message spends without holding one.

    Attributes:
        servers: that serve side by side.
        services_ms: times that a server is held, values at equal steps of probability.
        delay_ms: spent beside the server: network, encoding.
    """

    servers: int
    services_ms: NDArray[np.float64] = field(repr=False)
    delay_ms: float = 0.0

    @property
    def mean_ms(self) -> float:
        """Mean time that a server is held."""
        return float(self.services_ms.mean())

    @property
    def variability(self) -> float:
        """Variance of these times over their mean's square."""
        return float(self.services_ms.var() / self.services_ms.mean() ** 2)

    @property
    def capacity_rps(self) -> float:
        """The rate at which all servers are always held."""
        return 1000 * self.servers / self.mean_ms


def station_of(numbers: StepNumbers, replicas: int = 1) -> Station:
    """A step as a queue, from what was measured of it.

    Saturation says how long a request holds one of ``workers`` servers: ``workers / saturation_rps``. What a single
    request takes longer than that holds no server. Where it takes less, requests get in each other's way, and single
    latencies are stretched to what saturation says.
    """
    latencies = np.asarray(numbers.latency_ms, dtype=np.float64)
    held_ms = 1000 * numbers.workers / numbers.saturation_rps
    delay_ms = min(max(0.0, float(latencies.mean()) - held_ms), float(latencies.min()) * 0.999)
    services = latencies - delay_ms
    return Station(
        servers=numbers.workers * replicas, services_ms=services * (held_ms / services.mean()), delay_ms=delay_ms
    )


def load_measured(path: Path, pipeline: Pipeline | None = None) -> Measured:
    """What a file says.

    Raises:
        DocumentError: it does not fit.
        InputError: it tells of a step that the pipeline has not.
    """
    document = load_document(path, _Document)
    if pipeline is not None and (unknown := sorted(set(document.steps) - set(pipeline.names))):
        raise InputError(
            f"{path} tells of {unknown[0]!r}, which is no step of {pipeline.name!r}",
            hint=f"Its steps are: {', '.join(pipeline.names)}.",
        )
    return Measured(steps=document.steps, whole=document.pipeline, host=document.host, shared_cpus=document.shared_cpus)


def write_measured(measured: Measured, path: Path) -> None:
    """Writes what `load_measured` reads, whole or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    steps = {
        step: {name: _plain(numbers) for name, numbers in variants.items()} for step, variants in measured.steps.items()
    }
    document: dict[str, Any] = {"host": measured.host, "steps": steps}
    if measured.shared_cpus is not None:
        document["shared_cpus"] = measured.shared_cpus
    if measured.whole is not None:
        document["pipeline"] = _plain(measured.whole)
    write_durably(path, yaml.safe_dump(document, sort_keys=False, width=120, default_flow_style=None))


def _plain(part: BaseModel) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude_none=True, exclude_defaults=True)


def thin(latencies_ms: NDArray[np.float64], most: int = MOST_KEPT) -> tuple[float, ...]:
    """Latencies as at most so many values at equal steps of probability, rising; each the mean of its step.

    Means of equal shares keep the mean of all, and nearly the tail: the last step holds the largest 1/most of them.
    """
    rising = np.sort(np.asarray(latencies_ms, dtype=np.float64))
    if len(rising) <= most:
        return tuple(float(f"{value:.5g}") for value in rising)
    return tuple(float(f"{part.mean():.5g}") for part in np.array_split(rising, most))
