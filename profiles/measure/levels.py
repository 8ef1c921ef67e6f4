"""The levels of proof: how many rounds, how long each window, which percentiles."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from registry.documents import load_document
from registry.errors import DocumentError, InputError

LIBRARY = Path(__file__).parents[1] / "library" / "levels.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level of proof.

    Attributes:
        name: ``quick``, ``standard``, ...
        provisional: whether its verdict is only a hint, which `promote` refuses.
        screen_s: in-process timing of each variant, at each batch size.
        served: how many of the best screened variants are served beside the baseline; None for all.
        rounds: in each every candidate is measured once.
        most_rounds: as many are played by candidates of which fewer do not say whether they differ from the baseline.
            A file that leaves it out has no more than ``rounds``.
        loads: how often a model is loaded where the policy limits how long that takes; one load has no interval.
        reruns: how often an invalid window is measured again.
        a_a: whether the baseline has two slots in each round, for the noise floor.
        warmup_s: sent before each window, not recorded.
        closed_s: the closed-loop window of a round.
        open_s: the open-loop window of a round, at least.
        longest_s: the most that a window grows to, so that a slow model earns its percentiles.
        requests: what a window grows for.
        percentiles: those that may be reported, where the sample earns them.
        ladder: closed-loop concurrencies of the capacity search, rising.
        ladder_s: window of each.
        stages: open-loop rates of the capacity search, as shares of the closed-loop maximum, rising.
        stage_s: window of each.
        timeout_s: an answer later than this is a miss.
    """

    name: str
    provisional: bool
    screen_s: float
    served: int | None
    rounds: int
    most_rounds: int
    loads: int
    reruns: int
    a_a: bool
    warmup_s: float
    closed_s: float
    open_s: float
    longest_s: float
    requests: int
    percentiles: tuple[int, ...]
    ladder: tuple[int, ...]
    ladder_s: float
    stages: tuple[float, ...]
    stage_s: float
    timeout_s: float

    def window_s(self, shortest_s: float, rate_rps: float) -> float:
        """How long a window at this rate lasts: long enough for `requests`, within `shortest_s` and `longest_s`."""
        wanted_s = self.requests / rate_rps if rate_rps > 0 else self.longest_s
        return min(max(shortest_s, wanted_s), max(shortest_s, self.longest_s))


class _LevelModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    provisional: bool
    screen_s: float = Field(gt=0)
    served: int | None = Field(ge=1)
    rounds: int = Field(ge=1)
    most_rounds: int | None = Field(default=None, ge=1)
    loads: int = Field(default=2, ge=1)
    reruns: int = Field(ge=0)
    a_a: bool
    warmup_s: float = Field(ge=0)
    closed_s: float = Field(gt=0)
    open_s: float = Field(gt=0)
    longest_s: float = Field(gt=0)
    requests: int = Field(ge=1)
    percentiles: tuple[int, ...]
    ladder: tuple[int, ...] = Field(min_length=1)
    ladder_s: float = Field(gt=0)
    stages: tuple[float, ...] = Field(min_length=1)
    stage_s: float = Field(gt=0)
    timeout_s: float = Field(gt=0)


class _LevelsModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    levels: tuple[_LevelModel, ...]


@cache
def load_levels(path: Path = LIBRARY) -> dict[str, Level]:
    """The levels of a file, by name; those that ship with burnish unless another file is named.

    Raises:
        DocumentError: the file is not a list of levels, or one has more rounds than it may have.
    """
    document = load_document(path, _LevelsModel)
    for model in document.levels:
        if model.most_rounds is not None and model.most_rounds < model.rounds:
            raise DocumentError(
                f"{path}: the level {model.name} has {model.rounds} rounds and at most {model.most_rounds}",
                hint="most_rounds is at least rounds.",
            )
    return {
        model.name: Level(**{**model.model_dump(), "most_rounds": model.most_rounds or model.rounds})
        for model in document.levels
    }


def find_level(name: str) -> Level:
    """The level of this name.

    Raises:
        InputError: there is none.
    """
    levels = load_levels()
    if name not in levels:
        raise InputError(f"there is no level {name!r}", hint=f"The levels are: {', '.join(levels)}.")
    return levels[name]
