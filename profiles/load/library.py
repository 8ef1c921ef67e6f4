"""What is to be offered, as a YAML document: the load profiles of ``profiles/library``, and the user's own."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from profiles.load.arrivals import LONGEST_S
from registry.documents import load_document
from registry.errors import InputError

FOLDER = Path(__file__).parents[1] / "library"
PREFIX = "load-"

# No client of one machine goes beyond these.
MOST_RPS, MOST_CONCURRENCY = 1e6, 100_000

Rate = Annotated[float, Field(gt=0, le=MOST_RPS)]
Concurrency = Annotated[int, Field(ge=1, le=MOST_CONCURRENCY)]
Seconds = Annotated[float, Field(ge=0, le=LONGEST_S)]
SomeSeconds = Annotated[float, Field(gt=0, le=LONGEST_S)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClosedPlan(_Model):
    """So many requests outstanding, at each of the concurrencies in turn."""

    kind: Literal["closed"]
    concurrency: tuple[Concurrency, ...] = Field(min_length=1)


class OpenPlan(_Model):
    """Arrivals that do not wait for answers: at given rates, or at shares of the saturation point, found first."""

    kind: Literal["open"]
    arrivals: Literal["poisson", "constant"] = "poisson"
    rates_rps: tuple[Rate, ...] = ()
    shares: tuple[Rate, ...] = ()

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        _check_one(self.rates_rps, self.shares)
        return self


class StagedPlan(_Model):
    """Ramp and hold: the rate rises linearly to a target, is held there and measured, and rises to the next.

    The targets are rates, or shares of the closed-loop maximum, found first. It ends after two targets in a row that
    the server did not sustain. Source: the load-testing page of Seldon Core 2's guide to performance tuning.
    """

    kind: Literal["staged"]
    arrivals: Literal["poisson", "constant"] = "constant"
    rates_rps: tuple[Rate, ...] = ()
    shares: tuple[Rate, ...] = ()
    ramp_s: Seconds = 2.0

    @model_validator(mode="after")
    def _rises(self) -> Self:
        for name, targets in (("rates_rps", self.rates_rps), ("shares", self.shares)):
            if list(targets) != sorted(set(targets)):
                raise ValueError(f"{name} have to rise from stage to stage")
        _check_one(self.rates_rps, self.shares)
        return self


class SweepPlan(_Model):
    """The whole curve: a closed loop at rising concurrencies, then Poisson arrivals at shares of its throughput."""

    kind: Literal["sweep"]
    concurrency: tuple[Concurrency, ...] = Field(min_length=1)
    shares: tuple[Rate, ...] = Field(min_length=1)


class SloPlan(_Model):
    """The highest rate of Poisson arrivals that keeps a latency limit, confirmed by fresh runs."""

    kind: Literal["slo"]
    percentile: Literal[50, 90, 95, 99]
    limit_ms: float = Field(gt=0, le=1000 * LONGEST_S)


class ReplayPlan(_Model):
    """Arrivals as they were recorded, in a file with one time in seconds a line; a window lasts as long as they do."""

    kind: Literal["replay"]
    file: str | None = None
    speed: float = Field(gt=0, le=MOST_RPS, default=1.0)


class LoadPlan(_Model):
    """What a bench offers, and how often.

    Attributes:
        load: what is offered.
        warmup_s: sent before each window, not recorded; the ramps of ``staged`` take its place.
        duration_s: of each window.
        timeout_s: an answer later than this is a miss.
        max_in_flight: of arrivals that do not wait: one that finds so many outstanding is dropped, which is a miss.
        runs: independent runs of each window.
        reruns: how often an invalid window is measured again.
    """

    load: Annotated[ClosedPlan | OpenPlan | StagedPlan | SweepPlan | SloPlan | ReplayPlan, Field(discriminator="kind")]
    warmup_s: Seconds = 1.0
    duration_s: SomeSeconds = 5.0
    timeout_s: SomeSeconds = 10.0
    max_in_flight: Concurrency = 1024
    runs: int = Field(ge=1, le=1000, default=3)
    reruns: int = Field(ge=0, le=100, default=2)


def shipped_plans() -> dict[str, Path]:
    """The load profiles that ship with burnish: name -> file."""
    return {path.stem.removeprefix(PREFIX): path for path in sorted(FOLDER.glob(f"{PREFIX}*.yaml"))}


def load_plan(name: str, *, arrivals: Path | None = None) -> LoadPlan:
    """The load profile of a name that ships, or of a file.

    Args:
        name: one of `shipped_plans`, or the path of a YAML file.
        arrivals: of a replay, in place of its own file. A file that a document names is looked for beside it.

    Raises:
        InputError: there is no such profile, or a replay has no arrivals.
        DocumentError: the file is no load profile; the message has lines, keys and the nearest right ones.
    """
    shipped, path = shipped_plans(), Path(name)
    if name not in shipped and path.suffix not in {".yaml", ".yml"}:
        hint = f"Load profiles are {', '.join(shipped)}, or a YAML file of your own."
        raise InputError(f"there is no load profile {name!r}", hint=hint)
    file = shipped.get(name, path)
    plan = load_document(file, LoadPlan)
    if not isinstance(plan.load, ReplayPlan):
        if arrivals is not None:
            raise InputError(f"--arrivals is for a replay, and {name} is {plan.load.kind!r}", hint="Leave one out.")
        return plan
    if arrivals is None and plan.load.file is None:
        raise InputError("a replay needs recorded arrivals", hint="Name a file of times in seconds with --arrivals.")
    recorded = arrivals if arrivals is not None else file.parent / str(plan.load.file)
    return plan.model_copy(update={"load": plan.load.model_copy(update={"file": str(recorded)})})


def _check_one(rates_rps: tuple[float, ...], shares: tuple[float, ...]) -> None:
    if bool(rates_rps) == bool(shares):
        raise ValueError("give rates_rps, or shares of what the server can, and not both")
