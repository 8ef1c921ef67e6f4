"""The file of a fleet: models with shared defaults, read and checked whole before any work."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from optimize.config import CampaignConfig, Name, load_campaign
from optimize.fleet import MODELS
from optimize.plan import Plan, plan
from registry.documents import Document, KeyPath, read_document
from registry.errors import BurnishError, DocumentError, InputError
from registry.filesystems import local_path

_SHOWN = 20
_OWN = ("share", "minutes", "group")

Share = Annotated[float, Field(gt=0, le=1000)]
Minutes = Annotated[float, Field(gt=0, le=100_000)]


class FleetConfig(BaseModel):
    """The file as a whole; what stands in ``defaults`` and ``models`` is held against other models below.

    Attributes:
        name: of the fleet.
        parallel: how many campaigns are under way at the same time.
        minutes: the most that one run of the fleet may take, by the clock; None for any.
        groups: group -> its share of the minutes; 1 for each where none is named.
        defaults: keys of a campaign, and ``share``, ``minutes`` and ``group``, for models that do not name them.
        models: each with keys of a campaign, or with ``campaign:``, the file of one.
        models_from: patterns for campaign files, relative to this file, as ``campaigns/*.yaml``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    parallel: int = Field(default=1, ge=1, le=256)
    minutes: Minutes | None = None
    groups: dict[Name, Share] = {}
    defaults: dict[str, Any] = {}
    models: tuple[dict[str, Any], ...] = ()
    models_from: tuple[str, ...] = ()

    @field_validator("models_from", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("models_from")
    @classmethod
    def _relative(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            if not pattern or Path(pattern).is_absolute():
                raise ValueError("give a pattern relative to this file, such as campaigns/*.yaml")
        return value


class WrittenModel(CampaignConfig):
    """A model whose campaign is written into the fleet's file, or comes from its defaults.

    Attributes:
        share: its weight among the models of its group.
        minutes: the most that it may take, in all runs together; None for any.
        group: whose it is; None for nobody's.
    """

    share: Share = 1.0
    minutes: Minutes | None = None
    group: Name | None = None


class FiledModel(BaseModel):
    """A model whose campaign is a file of its own, which stands for itself: no default reaches into it.

    Attributes:
        campaign: the file, relative to the fleet's.
        name: the model's; None for the campaign's own.
        share: see `WrittenModel`.
        minutes: see `WrittenModel`.
        group: see `WrittenModel`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    campaign: str
    name: Name | None = None
    share: Share = 1.0
    minutes: Minutes | None = None
    group: Name | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model of a fleet, its campaign checked.

    Attributes:
        name: of the model, and of its folder.
        group: whose it is; empty for nobody's.
        share: its weight in its group.
        minutes: the most that it may take; None for any.
        planned: its campaign.
    """

    name: str
    group: str
    share: float
    minutes: float | None
    planned: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """A fleet, checked and ready to run.

    Attributes:
        config: its file.
        work: its working folder.
        entries: its models, in the order of the file.
    """

    config: FleetConfig
    work: Path
    entries: tuple[Entry, ...]


def default_work(file: Path) -> Path:
    """Where a fleet works if nobody says where: beside its file, in a folder of its own.

    Raises:
        DocumentError: the file is missing or malformed, or its name is none.
    """
    return file.parent / "burnish-work" / "fleets" / _config_of(read_document(file)).name


def plan_fleet(file: Path, *, work: Path, level: str | None = None) -> FleetPlan:
    """The fleet, with the campaign of each model loaded and planned.

    Args:
        file: the fleet's.
        work: the fleet's working folder; nothing is written.
        level: a level of proof in place of all campaigns' own.

    Raises:
        DocumentError: the file or a campaign does not fit, or names what is not there; with a line for each problem
            and its place.
    """
    document = read_document(file)
    config = _config_of(document)
    reading = _Reading(document, config, file.parent, level)
    found = list(reading.models())
    named: dict[str, _Read] = {}
    for one in found:
        first = named.setdefault(one.name, one)
        if first is not one:
            reading.refuse(
                f"{one.place}: the name {one.name!r} is taken by the model at {first.place}; give each one of its own"
            )
    if not found and not reading.problems:
        raise DocumentError(f"{document.place}: the fleet has no models", hint="List them under `models:`.")
    entries = [entry for one in named.values() if (entry := reading.entry(one, work / MODELS / one.name)) is not None]
    if reading.problems:
        raise _refusal(reading.problems)
    return FleetPlan(config=config, work=work.resolve(), entries=tuple(entries))


def _config_of(document: Document) -> FleetConfig:
    return document.as_model(FleetConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A model as it was read: its campaign is not planned yet."""

    name: str
    place: str
    own: WrittenModel | FiledModel
    config: CampaignConfig
    base: Path


class _Reading:
    """Reads the models of a fleet's file, and keeps what is wrong with them."""

    def __init__(self, document: Document, config: FleetConfig, folder: Path, level: str | None) -> None:
        self._problems: list[str] = []
        self._told: dict[str, list[_Read]] = {}
        self._document = document
        self._config = config
        self._folder = folder
        self._level = level
        self._defaults = document.part("defaults") if config.defaults else None

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line each with its place; what is wrong with many models in the same way is one."""
        told = []
        for words, models in self._told.items():
            more = f" and {len(models) - 1} more" if len(models) > 1 else ""
            told.append(f"{models[0].place}: {models[0].name}{more}: {words}")
        return self._problems + told

    def refuse(self, problem: str) -> None:
        """Notes what is wrong."""
        self._problems.append(problem)

    def models(self) -> Iterator[_Read]:
        """Those that could be read."""
        parts = [self._document.part("models", number) for number in range(len(self._config.models))]
        for part in parts:
            yield from self._tried(part, self._filed if "campaign" in part.value else self._written)
        for pattern in self._config.models_from:
            yield from self._matching(pattern, {str(part.value.get("campaign")) for part in parts})
        self._check_defaults(written=any("campaign" not in part.value for part in parts))

    def entry(self, one: _Read, work: Path) -> Entry | None:
        """The model with its campaign planned; None where something is wrong with it."""
        from optimize.serving_search import space_of

        groups = self._config.groups
        if one.own.group is not None and groups and one.own.group not in groups:
            self._problems.append(
                f"{one.place}: {one.name}: there is no group {one.own.group!r}; {_near(one.own.group, groups)}"
            )
        try:
            planned = plan(one.config, base=one.base, work=work)
            if one.config.search.serving is not None:
                space_of(planned, one.config.search.serving)
        except BurnishError as error:
            self._note(one, error)
            return None
        return Entry(
            name=one.name,
            group=one.own.group or "",
            share=one.own.share,
            minutes=one.own.minutes,
            planned=planned,
        )

    def _tried(self, part: Document, read: Any) -> Iterator[_Read]:
        try:
            yield read(part)
        except DocumentError as error:
            # What is wrong with a default is wrong with every model, and said once.
            self._problems += [line for line in str(error).splitlines() if line not in self._problems]

    def _written(self, part: Document) -> _Read:
        own = (part if self._defaults is None else part.over(self._defaults)).as_model(WrittenModel)
        fields = {name: getattr(own, name) for name in own.model_fields_set if name not in _OWN}
        return self._read(own.name, part.place, own, CampaignConfig.model_construct(**fields), self._folder)

    def _filed(self, part: Document) -> _Read:
        laid = part if self._defaults is None else part.over(self._defaults.only(_OWN))
        own = laid.as_model(FiledModel)
        path = local_path(own.campaign, self._folder)
        try:
            config = load_campaign(path)
        except InputError as error:
            hint = "" if error.hint is None else f". {error.hint}"
            raise DocumentError(f"{part.place}: campaign: {error.message}{hint}") from error
        name = own.name or config.name
        return self._read(name, part.place, own, config.model_copy(update={"name": name}), path.parent)

    def _read(self, name: str, place: str, own: WrittenModel | FiledModel, config: CampaignConfig, base: Path) -> _Read:
        if self._level is not None:
            config = config.model_copy(update={"level": self._level})
        return _Read(name=name, place=place, own=own, config=config, base=base)

    def _matching(self, pattern: str, listed: set[str]) -> Iterator[_Read]:
        """The campaign files that a pattern matches, but for those that ``models`` lists themselves."""
        known = {local_path(name, self._folder).resolve() for name in listed}
        place = self._document.part("models_from").place
        try:
            matching = sorted(path for path in self._folder.glob(pattern) if path.is_file())
        except ValueError as error:
            self._problems.append(f"{place}: models_from: {pattern!r} is no pattern: {error}")
            return
        if not matching:
            self._problems.append(f"{place}: models_from: no file matches {pattern!r} in {self._folder.resolve()}")
        for path in matching:
            if path.resolve() not in known:
                lines: dict[KeyPath, int] = {(): self._document.part("models_from").lines.get((), 1)}
                relative = str(path.relative_to(self._folder))
                yield from self._tried(
                    Document(name=self._document.name, value={"campaign": relative}, lines=lines), self._filed
                )

    def _check_defaults(self, *, written: bool) -> None:
        """Notes defaults that nobody would ever take."""
        if self._defaults is None or written:
            return
        for key in self._defaults.value:
            if key not in _OWN:
                self._problems.append(
                    f"{self._defaults.part(key).place}: defaults.{key}: every model is a campaign file, which stands "
                    f"for itself; defaults reach it only as {', '.join(_OWN)}"
                )

    def _note(self, one: _Read, error: BurnishError) -> None:
        hint = "" if error.hint is None else f". {error.hint}"
        self._told.setdefault(f"{error.message}{hint}", []).append(one)


def _near(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def _refusal(problems: list[str]) -> DocumentError:
    more = len(problems) - _SHOWN
    lines = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return DocumentError("\n".join(lines), hint="Nothing was begun: a fleet is checked whole first.")
