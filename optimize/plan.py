"""What a campaign is to make, serve and measure, decided before anything heavy begins."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from optimize.budget import UNLIMITED, Budget
from optimize.config import CampaignConfig, SourceConfig
from optimize.engines.port import Engine
from optimize.metrics import BUILT_IN, find_metric
from optimize.progress import working
from optimize.recipes import BASELINE, functions_of, load_recipes, needs_module, recipes_of
from optimize.samples import LABELS, SLICES, array_names
from optimize.sources import code_digests
from profiles.measure.cost import COST, find_hardware
from profiles.measure.host import fingerprint_host, split_cpus
from profiles.measure.levels import Level, load_levels
from profiles.measure.resources import PackageEnergy
from registry.codec import digest, to_jsonable
from registry.errors import InputError, PolicyError
from registry.filesystems import local_path
from registry.ledger import Ledger
from registry.policy import parse_policy, slo_limit
from registry.ports import Store
from registry.records import (
    Artifact,
    Campaign,
    Candidate,
    Constraint,
    HardwareProfile,
    Host,
    Objective,
    Policy,
    Recipe,
    ServingProfile,
    Source,
    Variant,
)

R = TypeVar("R")

_PERCENTILE = re.compile(r"latency_p(\d+)_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The champion as an earlier campaign chose it; `optimize.champion` finds it.

    Attributes:
        named: where the campaign file says that it is.
        campaign: that chose it.
        candidate: there.
        variant: of that candidate.
        source: that the variant was made from.
        files: folders that may hold the variant's files, among others.
    """

    named: str
    campaign: Campaign
    candidate: Candidate
    variant: Variant
    source: Source
    files: tuple[Path, ...]


class Observer(Protocol):
    """Told what a campaign does; see `optimize.cli.output` for those that show it."""

    def phase(self, name: str, total: int) -> None:
        """A phase of ``total`` units begins."""

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        """A piece of work begins: what it gives is of this kind; ``where`` names another machine that does it.

        Told by any thread, as `ended` is.
        """

    def ended(self, kind: str, subject: str) -> None:
        """A piece of work is over, with whatever outcome."""

    def done(self, subject: str, outcome: str) -> None:
        """One unit of the phase is done; the outcome of one that failed begins with `optimize.progress.FAILED`."""

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
        champion: what serves now, to be measured beside the others; None where the campaign names none, or nothing is
            there yet.
        passed_over: limits that hold against a champion where nothing is there yet.
        elsewhere: whether variants are judged, served and measured on a node of the engine's, whose host counts then.
        stays: why they are not, though variants are made on other machines; None where nothing keeps them.
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
    champion: Standing | None = None
    passed_over: tuple[str, ...] = ()
    elsewhere: bool = False
    stays: str | None = None

    @property
    def target_instruction_sets(self) -> tuple[str, ...]:
        """Those of the machines that are to serve the winner: this one's, where the campaign names none."""
        named = self.config.target_instruction_sets
        return self.host.instruction_sets if named is None else named

    @property
    def hardware(self) -> HardwareProfile | None:
        """The machine that costs are counted for; None where the campaign names none."""
        given = self.config.hardware
        if isinstance(given, str):
            return find_hardware(given)
        return None if given is None else given.profile()

    @property
    def several_sources(self) -> bool:
        """Whether names of variants must say which source they come from."""
        return len(self.config.sources) > 1

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is worth saying of the campaign file before the work begins, and is no error."""
        samples = self.config.samples
        if samples.calibration is None or self.path(samples.calibration) != self.path(samples.evaluation):
            return ()
        return (
            "samples.calibration is the file that judges, too: ranges that are fitted to the samples that judge make "
            "static int8 look better than it is. Give it other samples.",
        )

    def path(self, given: str) -> Path:
        """A path of the campaign file, as seen from its folder."""
        return local_path(given, self.base).resolve()

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


class Mirror(Protocol):
    """Another place of results than the ledger, which outlives this machine."""

    def find(self, kind: str, components: Mapping[str, Any]) -> Any:
        """The record of work that was done before, its files in the working folder; None where there is none."""

    def keep(self, kind: str, components: Mapping[str, Any], record: R) -> R:
        """Keeps a record with its files, and returns the one that counts: the first that was kept."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A plan with the places where its results go, and the time that there is for it.

    Attributes:
        store: of artifacts.
        ledger: of all that was found.
        observer: told what is done.
        budget: the time.
        engine: gives the engine of the campaign's steps; None where each phase is to open one of its own.
        mirror: where results are kept, too, before the next piece of work begins; None for nowhere.
        begin_work: called before each piece of work that is not known yet.
    """

    plan: Plan
    store: Store
    ledger: Ledger
    observer: Observer
    budget: Budget = UNLIMITED
    engine: Callable[[], Engine] | None = None
    mirror: Mirror | None = None
    begin_work: Callable[[], None] = _nothing

    def folder(self, name: str) -> Path:
        """A folder of the working folder, made if it is missing."""
        path = self.plan.work / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def waits_for_cores(self) -> None:
        """Says that another campaign has this machine's cores alone."""
        self.observer.note("Waiting for cores of this machine, which another campaign uses.")

    def known(self, kind: str, components: Mapping[str, Any]) -> Any:
        """The record of earlier work, or None; none, too, where the files that it is of are gone from the store."""
        found = self.ledger.find(kind, components)
        artifact = getattr(found, "artifact", None)
        return None if isinstance(artifact, Artifact) and artifact.digest not in self.store else found

    def remember(self, kind: str, subject: str, components: Mapping[str, Any], make: Callable[[], R]) -> tuple[R, bool]:
        """The result of earlier work if it is still valid, else that of ``make``, committed before it is returned.

        Returns:
            The record, and whether it was there already.

        Raises:
            BudgetUsedUpError: it was not, and there is no time left to begin with it.
        """
        found = self.known(kind, components)
        if found is not None:
            return found, True
        if self.ledger.find(kind, components) is not None:
            return make(), False  # the journal has it; its files are back
        kept = None if self.mirror is None else self.mirror.find(kind, components)
        if kept is not None:
            return self.ledger.commit(kind, subject, components, kept), True
        self.budget.check()
        if (why := self.ledger.why(kind, subject, components)) is not None:
            self.observer.note(why)
        self.begin_work()
        with working(self.observer, kind, subject):
            made = make()
            if self.mirror is not None:
                made = self.mirror.keep(kind, components, made)
            return self.ledger.commit(kind, subject, components, made), False


def plan(config: CampaignConfig, *, base: Path, work: Path, engine: Literal["local", "ray"] = "local") -> Plan:
    """The campaign, with everything decided that the file and this machine decide.

    Args:
        config: the campaign file.
        base: the folder that its paths are relative to.
        work: the working folder.
        engine: that measures, as far as it can.

    Raises:
        InputError: a preset or the metric is unknown, the baseline is missing, a file that is named does not exist, or
            a policy line cannot be understood, or names what this level or metric cannot give.
    """
    server_cpus, client_cpus, pinning = split_cpus()
    host = fingerprint_host(pinning)
    recipes = _recipes(config, base, host.instruction_sets)
    stays = None if engine == "local" else _why_here(config, recipes)
    planned = Plan(
        config=config,
        base=base.resolve(),
        work=work.resolve(),
        policy=parse_policy(config.policy.constraints, config.policy.objectives, signature=config.policy.signature),
        level=_level(config, base),
        recipes=recipes,
        profiles=tuple(entry.profile() for entry in config.serving),
        host=host,
        server_cpus=tuple(server_cpus),
        client_cpus=tuple(client_cpus),
        elsewhere=engine != "local" and stays is None,
        stays=stays,
    )
    _check_files(planned)
    arrays = array_names(planned.path(config.samples.evaluation))
    _check_policy(planned, arrays)
    if not planned.elsewhere:
        check_meters(planned)
    return planned


def _why_here(config: CampaignConfig, recipes: Sequence[Recipe]) -> str | None:
    """Why nothing is judged, served and measured on a node of a cluster; None where it can be."""
    if config.cluster.kind != "local":
        return "Candidates are served by a Core 2, and measured from this machine."
    if ":" in config.metric:
        return (
            f"The metric {config.metric} is code of yours, which nodes do not have: answers are judged, and candidates "
            "served and measured, on this machine."
        )
    own = [recipe.name for recipe in recipes if needs_module(recipe) or functions_of(recipe)]
    if own and config.search.accuracy is not None:
        return (
            f"search.accuracy may make {own[0]} again, with code of yours, which nodes do not have: answers are "
            "judged, and candidates served and measured, on this machine."
        )
    return None


def plan_id(planned: Plan, *, sources: tuple[str, ...], samples_digest: str) -> str:
    """What makes two campaigns the same one: configuration, contents of sources and samples, and the host."""
    return digest(
        {
            "config": planned.config.model_dump(mode="json", exclude={"registry", "limits", "resources"}),
            # Names in the configuration may stand for what files of the user's say.
            "recipes": to_jsonable(planned.recipes),
            "level": asdict(planned.level),
            "sources": list(sources),
            "samples": samples_digest,
            "host": planned.host.fingerprint,
            # An alias may stand for another one day.
            **({} if planned.champion is None else {"champion": planned.champion.candidate.id}),
        }
    )


def _level(config: CampaignConfig, base: Path) -> Level:
    levels = load_levels()
    if config.levels is not None:
        levels = load_levels((base / config.levels).resolve()) | levels  # the shipped names keep their meaning
    if config.level not in levels:
        raise InputError(f"there is no level {config.level!r}", hint=f"The levels are: {', '.join(sorted(levels))}.")
    return levels[config.level]


def _recipes(config: CampaignConfig, base: Path, instruction_sets: tuple[str, ...]) -> tuple[Recipe, ...]:
    library = load_recipes(None if config.recipes is None else (base / config.recipes).resolve())
    recipes: dict[str, Recipe] = {}
    written = (
        made
        for entry in (BASELINE, *config.variants)  # the baseline comes first, named or not
        for made in recipes_of(entry, instruction_sets=instruction_sets, library=library)
    )
    for made in written:
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
    for function in dict.fromkeys(name for recipe in planned.recipes for name in functions_of(recipe)):
        code_digests(function, planned.base)  # says so where there is no such module
    samples = planned.config.samples
    for key, given in (("evaluation", samples.evaluation), ("calibration", samples.calibration)):
        if given is not None and not planned.path(given).is_file():
            raise InputError(
                f"samples.{key}: no file at {planned.path(given)}",
                hint="Write one array per input with numpy.savez; paths are relative to the campaign file.",
            )


def _check_policy(planned: Plan, arrays: frozenset[str]) -> None:
    """Returns when every metric that the policy names will be measured, so that none is unknown after hours of work.

    ``arrays`` are those of the evaluation samples; none where their file is damaged, which is said when it is read.
    """
    decides = _decides(planned.config.metric)
    needs_labels = ":" not in planned.config.metric and find_metric(planned.config.metric).needs_labels
    if arrays and needs_labels and LABELS not in arrays:
        raise InputError(
            f"the metric {planned.config.metric!r} needs labels, and {planned.config.samples.evaluation} has none",
            hint=f"Save them in it as the array {LABELS!r}; without labels, metric: cosine compares with the baseline.",
        )
    kept = slo_limit(planned.policy)
    if kept is not None and kept.limit >= planned.level.timeout_s * 1000:
        raise PolicyError(
            f"no highest rate can be looked for under {kept.text!r}: the level {planned.level.name} gives requests up "
            f"after {planned.level.timeout_s:g} s"
        )
    lines: list[Constraint | Objective] = [*planned.policy.constraints, *planned.policy.objectives]
    for line in lines:
        _check_percentile(line, planned.level)
        _check_resource(line, planned)
        if line.metric.startswith("gpu_") and planned.elsewhere and not planned.config.resources.gpus:
            raise PolicyError(
                f"{line.text!r} cannot be judged: no GPU is asked for",
                hint="Write `resources: {gpus: 1}` into the campaign file, so that a node with one is taken.",
            )
        if isinstance(line, Constraint) and line.reference == "champion" and planned.config.champion is None:
            raise PolicyError(
                f"{line.text!r} cannot be judged: the campaign file names no champion",
                hint="Write `champion:` into it: the working folder of the campaign that chose what serves now, or "
                "models:/NAME@champion. Or leave the limit out.",
            )
        if line.metric == "slice_drop_max" and arrays and SLICES not in arrays:
            raise PolicyError(
                f"{line.text!r} cannot be judged: {planned.config.samples.evaluation} names no slices",
                hint=f"Save an array {SLICES!r} in it: the group of each sample, as whole numbers or text.",
            )
        if line.metric in {"flip_rate", "batch_flip_rate"} and not decides:
            raise PolicyError(
                f"{line.text!r} cannot be judged: the metric {planned.config.metric!r} knows of no decisions to count "
                "flips of",
                hint=f"Limit accuracy_drop instead, or use one of the metrics {', '.join(_deciding())}.",
            )


def _check_resource(line: Constraint | Objective, planned: Plan) -> None:
    hardware = planned.hardware
    if line.metric == COST and (hardware is None or hardware.price_per_hour is None):
        raise PolicyError(
            f"{line.text!r} cannot be judged: nothing says what the machine costs",
            hint="Write `hardware:` into the campaign file, with cores, price_per_hour, currency, price_source and "
            "price_date.",
        )
    if line.metric == "first_request_ms" and isinstance(line, Constraint):
        raise PolicyError(
            f"{line.text!r} cannot be judged: a model has one first request, and one value has no upper end",
            hint="Leave it out; the report shows it.",
        )


def check_meters(planned: Plan) -> None:
    """Returns when this machine, which measures, can tell of the GPUs and the energy that the policy names.

    Raises:
        PolicyError: it cannot.
    """
    local = planned.config.cluster.kind == "local"
    lines: list[Constraint | Objective] = [*planned.policy.constraints, *planned.policy.objectives]
    for line in lines:
        if line.metric.startswith("gpu_") and not (local and planned.host.gpus):
            raise PolicyError(f"{line.text!r} cannot be judged: there is no GPU here to measure")
        if line.metric == "cpu_joules_per_1k" and not (local and PackageEnergy().read()):
            raise PolicyError(
                f"{line.text!r} cannot be judged: the energy of the CPU cannot be read here",
                hint="It takes a machine with RAPL, and the right to read /sys/class/powercap; virtual machines have "
                "none.",
            )


def _check_percentile(line: Constraint | Objective, level: Level) -> None:
    found = _PERCENTILE.fullmatch(line.metric)
    if found is None or int(found[1]) in level.percentiles:
        return
    measured = " and ".join(f"p{percentile}" for percentile in level.percentiles)
    fitting = [other.name for other in load_levels().values() if int(found[1]) in other.percentiles]
    hint = f"Use the level {' or '.join(fitting)}" if fitting else "Name one of those"
    raise PolicyError(
        f"{line.text!r} cannot be judged: the level {level.name} measures {measured} only", hint=f"{hint}."
    )


def _decides(metric: str) -> bool:
    """Whether the metric knows what was decided for each sample; the user's own do not.

    Raises:
        InputError: no built-in metric has this name.
    """
    return ":" not in metric and find_metric(metric).decide is not None


def _deciding() -> list[str]:
    return sorted(name for name, metric in BUILT_IN.items() if metric.decide is not None)
