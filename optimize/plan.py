"""What a campaign is to make, serve and measure, decided before anything heavy begins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from optimize.config import CampaignConfig, RecipeConfig, SourceConfig
from optimize.recipes import recipe, recipe_from_mapping
from profiles.measure.host import fingerprint_host, split_cpus
from profiles.measure.levels import Level, find_level
from registry.codec import digest
from registry.errors import InputError
from registry.ledger import Ledger
from registry.policy import parse_policy
from registry.ports import Store
from registry.records import Host, Policy, Recipe, ServingProfile

R = TypeVar("R")


class Observer(Protocol):
    """Told what a campaign does; see `optimize.cli.output` for those that show it."""

    def phase(self, name: str, total: int) -> None:
        """A phase of ``total`` units begins."""

    def done(self, subject: str, outcome: str) -> None:
        """One unit of the phase is done."""

    def note(self, text: str) -> None:
        """Something worth saying that is no unit of the phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A campaign, checked and ready to run.

    Attributes:
        config: the campaign file.
        base: the folder that its paths are relative to.
        work: the working folder: store, ledger, raw runs, report.
        policy: its constraints and objectives, parsed.
        level: its level of proof.
        recipes: what to make of each source; the first is the float32 baseline.
        profiles: the serving profiles; the first is the baseline's.
        host: this machine, with the pinning that measurements use.
        server_cpus: the CPUs that servers and in-process sessions are pinned to.
        client_cpus: the CPUs that generate load.
    """

    config: CampaignConfig
    base: Path
    work: Path
    policy: Policy
    level: Level
    recipes: tuple[Recipe, ...]
    profiles: tuple[ServingProfile, ...]
    host: Host
    server_cpus: tuple[int, ...]
    client_cpus: tuple[int, ...]

    @property
    def several_sources(self) -> bool:
        """Whether names of variants must say which source they come from."""
        return len(self.config.sources) > 1

    def path(self, given: str) -> Path:
        """A path of the campaign file, as seen from its folder."""
        return (self.base / Path(given).expanduser()).resolve()

    def source_path(self, source: SourceConfig) -> Path:
        """The file or folder that a source names.

        Raises:
            InputError: there is nothing there.
        """
        path = self.path(source.location)
        if not path.exists():
            raise InputError(
                f"source {source.name!r}: nothing at {path}",
                hint=f"Correct `{source.kind}:` in the campaign file; paths are relative to it.",
            )
        return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A plan with the places where its results go."""

    plan: Plan
    store: Store
    ledger: Ledger
    observer: Observer

    def folder(self, name: str) -> Path:
        """A folder of the working folder, made if it is missing."""
        path = self.plan.work / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remember(self, kind: str, subject: str, components: Mapping[str, Any], make: Callable[[], R]) -> tuple[R, bool]:
        """The result of earlier work if it is still valid, else that of ``make``, committed before it is returned.

        Returns:
            The record, and whether it was there already.
        """
        found = self.ledger.find(kind, components)
        if found is not None:
            return found, True
        if (why := self.ledger.why(kind, subject, components)) is not None:
            self.observer.note(why)
        return self.ledger.commit(kind, subject, components, make()), False


def plan(config: CampaignConfig, *, base: Path, work: Path) -> Plan:
    """The campaign, with everything decided that the file and this machine decide.

    Raises:
        InputError: a preset is unknown, the baseline is missing, a file that is named does not exist, or a policy line
            cannot be understood.
    """
    server_cpus, client_cpus, pinning = split_cpus()
    host = fingerprint_host(pinning)
    recipes = _recipes(config, host.instruction_sets)
    planned = Plan(
        config=config,
        base=base.resolve(),
        work=work.resolve(),
        policy=parse_policy(config.policy.constraints, config.policy.objectives),
        level=find_level(config.level),
        recipes=recipes,
        profiles=tuple(entry.profile() for entry in config.serving),
        host=host,
        server_cpus=tuple(server_cpus),
        client_cpus=tuple(client_cpus),
    )
    _check_files(planned)
    return planned


def plan_id(planned: Plan, *, sources: tuple[str, ...], samples_digest: str) -> str:
    """What makes two campaigns the same one: configuration, contents of sources and samples, and the host."""
    return digest(
        {
            "config": planned.config.model_dump(mode="json", exclude={"registry", "limits"}),
            "sources": list(sources),
            "samples": samples_digest,
            "host": planned.host.fingerprint,
        }
    )


def _recipes(config: CampaignConfig, instruction_sets: tuple[str, ...]) -> tuple[Recipe, ...]:
    recipes: dict[str, Recipe] = {}
    for entry in ("float32", *config.variants):  # the baseline comes first, named or not
        if isinstance(entry, RecipeConfig):
            made = recipe_from_mapping(
                entry.model_dump(mode="json", exclude_none=True), instruction_sets=instruction_sets
            )
        else:
            made = recipe(entry, instruction_sets=instruction_sets)
        if recipes.setdefault(made.name, made) != made:
            raise InputError(f"two variants are named {made.name!r}", hint="Give each recipe a name of its own.")
        twin = next((one.name for one in recipes.values() if one.stages == made.stages and one.name != made.name), None)
        if twin is not None:
            raise InputError(
                f"the variants {twin!r} and {made.name!r} are the same recipe", hint="Leave one of them out."
            )
    return tuple(recipes.values())


def _check_files(planned: Plan) -> None:
    for source in planned.config.sources:
        if source.kind != "torch":
            planned.source_path(source)
    samples = planned.config.samples
    for key, given in (("evaluation", samples.evaluation), ("calibration", samples.calibration)):
        if given is not None and not planned.path(given).is_file():
            raise InputError(
                f"samples.{key}: no file at {planned.path(given)}",
                hint="Write one array per input with numpy.savez; paths are relative to the campaign file.",
            )
