"""What a million inferences cost, from the price of a machine and the rate that a candidate sustains on it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.documents import load_document
from registry.errors import InputError
from registry.records import Estimate, HardwareProfile, Measurement

LIBRARY = Path(__file__).parents[1] / "library" / "hardware.yaml"
MILLION, SECONDS_PER_HOUR = 1_000_000, 3600
COST = "cost_per_million"
RATES = ("slo_max_rps", "saturation_rps")
"""What a cost is counted from, the first that is known of all candidates. A closed-loop maximum is not among them: no
service can be planned at it."""


class HardwareConfig(BaseModel):
    """A machine as it is paid for, as the user writes it.

    Attributes:
        name: what people call it.
        cores: CPUs that the price is of.
        gpus: GPUs that the price is of.
        price_per_hour: of the whole machine.
        currency: its three letters by ISO 4217.
        price_source: who says so: a page's address, a contract.
        price_date: when that was read, as ``2026-01-31``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100)
    cores: int = Field(ge=1, le=4096)
    gpus: int = Field(default=0, ge=0, le=64)
    price_per_hour: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    currency: str | None = Field(default=None, pattern=r"^[A-Z]{3}$")
    price_source: str | None = Field(default=None, min_length=1)
    price_date: date | None = None

    @model_validator(mode="after")
    def _price_is_told_whole(self) -> Self:
        beside = {"currency": self.currency, "price_source": self.price_source, "price_date": self.price_date}
        missing = [key for key, value in beside.items() if value is None]
        if self.price_per_hour is not None and missing:
            raise ValueError(f"a price_per_hour needs {', '.join(missing)} beside it: prices differ and change")
        return self

    def profile(self) -> HardwareProfile:
        """The record of it."""
        return HardwareProfile(**self.model_dump(mode="json", exclude_none=True))


class _Library(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    hardware: tuple[HardwareConfig, ...]


@cache
def load_hardware(path: Path = LIBRARY) -> dict[str, HardwareProfile]:
    """The hardware profiles of a file, by name; those that ship with burnish, which have no prices, by default.

    Raises:
        DocumentError: the file is not a list of hardware profiles.
    """
    return {entry.name: entry.profile() for entry in load_document(path, _Library).hardware}


def find_hardware(name: str) -> HardwareProfile:
    """The shipped profile of this name.

    Raises:
        InputError: there is none.
    """
    known = load_hardware()
    if name not in known:
        raise InputError(
            f"there is no hardware profile {name!r}",
            hint=f"There are {', '.join(known)}; one with a price is written into the campaign file.",
        )
    return known[name]


def cost_per_million(rate: Estimate, hardware: HardwareProfile, *, metric: str, cores: int | None) -> Estimate | None:
    """What a million inferences cost at a rate; None where there is no price, or no rate.

    On a machine without GPUs the server pays for the share of the cores that it could use, since the others could
    serve more copies of it. With a GPU, or where the cores are not known, it pays for the whole machine.

    Args:
        rate: inferences a second that are sustained; its low end makes the cost's high one.
        hardware: the machine.
        metric: the rate's name, which the method tells.
        cores: those that the server could use; None where that is not known.
    """
    if hardware.price_per_hour is None or rate.value <= 0:
        return None
    share = 1.0 if cores is None or hardware.gpus else min(1.0, cores / hardware.cores)
    hourly = hardware.price_per_hour * share

    def of(rps: float | None) -> float | None:
        return None if rps is None or rps <= 0 else hourly / (rps * SECONDS_PER_HOUR) * MILLION

    paid = f"{hourly:g} {hardware.currency} an hour" + (f" ({cores} of {hardware.cores} cores)" if share < 1 else "")
    value = of(rate.value)
    if value is None:
        return None
    return Estimate(
        value=value,
        low=of(rate.high),
        high=of(rate.low),
        runs=rate.runs,
        method=f"{paid} over {metric}",
        unit=hardware.currency,
    )


def with_costs(
    measurements: Sequence[Measurement], hardware: HardwareProfile | None, *, cores: int | None
) -> tuple[Measurement, ...]:
    """The measurements, with the metric ``cost_per_million`` beside the rate that it was counted from.

    All candidates are counted by the same rate: the highest that keeps the limit on latency where that is known of all
    of them, else saturation.

    Args:
        measurements: of a campaign.
        hardware: the machine; None to add nothing.
        cores: that a server could use; None where that is not known.
    """
    metric = _common_rate(measurements)
    if hardware is None or metric is None:
        return tuple(measurements)
    costed = []
    for one in measurements:
        rate = one.metrics.get(metric) if one.load is None else None
        cost = None if rate is None else cost_per_million(rate, hardware, metric=metric, cores=cores)
        costed.append(one if cost is None else replace(one, metrics={**one.metrics, COST: cost}))
    return tuple(costed)


def _common_rate(measurements: Iterable[Measurement]) -> str | None:
    rated = [one.metrics for one in measurements if one.load is None and any(rate in one.metrics for rate in RATES)]
    return next((rate for rate in RATES if rated and all(rate in metrics for metrics in rated)), RATES[-1])
