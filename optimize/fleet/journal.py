"""What a fleet knows of its models from run to run: what was tried with which files, and what came of it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimize.config import REGISTERED, SourceConfig
from optimize.fleet import JOURNAL, MODELS, is_fleet
from optimize.fleet.config import Entry, FleetPlan
from optimize.packages import PackageNotFoundError, version
from optimize.plan import Plan
from optimize.recipes import functions_of
from optimize.sources import code_digests
from registry.codec import to_jsonable
from registry.errors import InputError
from registry.ledger import Entry as Line
from registry.ledger import Ledger
from registry.records import Fleet, FleetModel, FleetOutcome

_FLEET, _OUTCOME = "Fleet", "FleetOutcome"
# What numbers depend on beside the host; the campaign itself knows more, and finds by it what is still valid.
_TOOLS = ("burnish", "onnxruntime", "openvino", "nncf", "mlserver", "nvidia-pytriton", "torch")
_VERDICTS = frozenset({"won", "no_winner"})
_CLOSE = 1e-6
BUDGET = "budget"
"""The kind of a failure for want of minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What was done for a model before.

    Attributes:
        attempts: how often it was tried, as it is now or otherwise.
        spent: minutes that the attempts at the model as it is now have taken.
        final: the outcome that another attempt would not change; None where one is worth it.
        why: what has changed since its verdict, in a sentence; None where nothing has, or there was none.
        components: what the model is now.
    """

    attempts: int
    spent: float
    final: FleetOutcome | None
    why: str | None
    components: Mapping[str, Any]


class Journal:
    """The attempts at the models of a fleet, over a ledger that is open."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lines: dict[str, list[Line]] = {}
        for line in ledger.entries(_OUTCOME):
            self._lines.setdefault(line.subject, []).append(line)

    def begin(self, fleet: FleetPlan) -> None:
        """Notes which models there are now."""
        record, known = fleet_record(fleet), self._ledger.entries(_FLEET)
        if not known or known[-1].record != record:
            self._ledger.commit(_FLEET, record.name, {"number": len(known)}, record)

    def past(self, entry: Entry) -> Past:
        """What was done for a model before.

        A verdict is final as long as nothing that the campaign depends on has changed. One that came early for want of
        minutes is so only if those were all of the model's own.
        """
        lines = self._lines.get(entry.name, [])
        components = components_of(entry.planned)
        alike = [line for line in lines if self._is_alike(line, components)] if stands_still(entry.planned) else []
        newest = lines[-1] if lines else None
        spent = sum(line.record.minutes for line in alike)
        final = None if newest is None or newest not in alike else _final(entry, newest.record, spent)
        why = None
        if newest is not None and newest not in alike and newest.record.state in _VERDICTS:
            why = self._ledger.why(_OUTCOME, entry.name, _whole(components, newest.record))
        return Past(attempts=len(lines), spent=spent, final=final, why=why, components=components)

    def commit(self, entry: Entry, outcome: FleetOutcome, components: Mapping[str, Any]) -> None:
        """Notes what came of an attempt; ``components`` are what the model was when it began."""
        self._ledger.commit(_OUTCOME, entry.name, _whole(components, outcome), outcome)

    def _is_alike(self, line: Line, components: Mapping[str, Any]) -> bool:
        return self._ledger.find(_OUTCOME, _whole(components, line.record)) is not None


def _whole(components: Mapping[str, Any], outcome: FleetOutcome) -> dict[str, Any]:
    """The components of an attempt, with the files beside that it knew of."""
    return {**components, "beside": stamps(outcome.beside), "attempt": outcome.attempt}


def _final(entry: Entry, newest: FleetOutcome, spent: float) -> FleetOutcome | None:
    early = newest.cut or newest.kind == BUDGET
    if not early:
        return newest if newest.state in _VERDICTS else None
    if entry.minutes is None or newest.allotted is None:
        return None
    before = spent - newest.minutes
    return newest if before + newest.allotted >= entry.minutes - _CLOSE else None


def fleet_record(fleet: FleetPlan) -> Fleet:
    """The fleet's record, without outcomes."""
    models = tuple(
        FleetModel(
            name=one.name, group=one.group, share=one.share, minutes=one.minutes, work=str(Path(MODELS, one.name))
        )
        for one in fleet.entries
    )
    return Fleet(
        name=fleet.config.name,
        models=models,
        groups=fleet.config.groups,
        parallel=fleet.config.parallel,
        minutes=fleet.config.minutes,
    )


def read_fleet(work: Path) -> Fleet:
    """The fleet of a working folder, with the newest outcome of each of its models.

    Raises:
        InputError: no fleet worked there, or its journal cannot be read.
    """
    if not is_fleet(work):
        raise InputError(f"no fleet has worked in {work}", hint="Run `burnish run --fleet FLEET` first.")
    return fleet_of(Ledger.read(work / JOURNAL))


def fleet_of(ledger: Ledger) -> Fleet:
    """The fleet as its ledger has it.

    Raises:
        InputError: it has none.
    """
    fleets = ledger.entries(_FLEET)
    if not fleets:
        raise InputError(f"{ledger.path} tells of no fleet", hint="Run `burnish run --fleet FLEET` first.")
    fleet: Fleet = fleets[-1].record
    newest: dict[str, FleetOutcome] = {}
    spent: dict[str, float] = {}
    for line in ledger.entries(_OUTCOME):
        newest[line.subject] = line.record
        spent[line.subject] = spent.get(line.subject, 0.0) + line.record.minutes
    names = [model.name for model in fleet.models]
    return Fleet(
        name=fleet.name,
        models=fleet.models,
        groups=fleet.groups,
        parallel=fleet.parallel,
        minutes=fleet.minutes,
        outcomes=tuple(newest[name] for name in names if name in newest),
        spent={name: spent[name] for name in names if name in spent},
    )


# --- what a model is -------------------------------------------------------------------------------------------


def components_of(planned: Plan) -> dict[str, Any]:
    """Everything that a campaign depends on, as far as it can be told without reading its files.

    A file that has the size, and the times of change and of status change to the nanosecond, that it had, is taken for
    unchanged. Where one has not, the campaign itself looks at contents.
    """
    config = planned.config
    functions = {name for recipe in planned.recipes for name in functions_of(recipe)}
    functions |= {source.location for source in config.sources if source.kind == "torch"}
    functions |= {config.metric} if ":" in config.metric else set()
    files = [planned.path(given) for given in (config.samples.evaluation, config.samples.calibration) if given]
    files += [path for source in config.sources for path in _files(planned, source)]
    return {
        "campaign": config.model_dump(mode="json", exclude={"limits": {"minutes"}}),
        "recipes": to_jsonable(planned.recipes),
        "level": asdict(planned.level),
        "host": planned.host.fingerprint,
        "files": stamps(map(str, files)),
        "code": {name: code_digests(name, planned.base) for name in sorted(functions)},
        "tools": _tools(),
    }


def stands_still(planned: Plan) -> bool:
    """Whether what the campaign depends on can be seen from here; an alias of MLflow's may name another tomorrow."""
    champion = planned.config.champion
    return not (isinstance(champion, str) and REGISTERED.fullmatch(champion))


def stamps(files: Iterable[str]) -> dict[str, list[int] | None]:
    """Path -> size in bytes, and times of change and of status change in ns; None where there is no file."""
    found: dict[str, list[int] | None] = {}
    for file in files:
        try:
            about = Path(file).stat()
        except OSError:
            found[file] = None
        else:
            found[file] = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    return found


def _files(planned: Plan, source: SourceConfig) -> list[Path]:
    """The files that a source is made of, as far as its configuration tells."""
    if source.kind == "torch":
        return [planned.path(given) for given in source.depends_on]
    path = planned.source_path(source)
    return [path] if source.kind == "onnx" else sorted(inner for inner in path.rglob("*") if inner.is_file())


def beside_of(planned: Plan) -> tuple[str, ...]:
    """Files beside its ONNX files that a campaign found to be parts of its models, by its own journal."""
    from optimize.admission import ENTRY

    folders = {source.name: planned.source_path(source).parent for source in planned.config.sources if source.onnx}
    found = []
    for line in Ledger.read(planned.work / "ledger.jsonl").entries("Source"):
        folder = folders.get(line.subject)
        if folder is not None:
            found += [str(folder / name) for name in line.components.get("files", {}) if name != ENTRY]
    return tuple(sorted({*found}))


def _tools() -> dict[str, str]:
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
