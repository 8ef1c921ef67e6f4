"""Which results of a variant the next run of its campaign would take from the journal, and what differs where not.

The campaign's own functions are asked, over a workspace that looks up and never makes: so the answer is theirs, and
cannot differ from what a run does.
"""

import difflib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from optimize.config import CampaignConfig, SourceConfig
from optimize.judging import Judged, judge_one, screen_one
from optimize.making import made_under_another_name, make_source, make_variant
from optimize.plan import Plan, Workspace, plan
from optimize.recipes import engine_label
from optimize.samples import SampleFile, Samples, load_samples, open_samples
from registry.codec import digest
from registry.errors import InputError
from registry.ledger import Ledger
from registry.records import EngineSpec, Failure, Recipe, Variant
from registry.store import FolderStore

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result that a run would need.

    Attributes:
        kind: of the result: ``Source``, ``Variant``, ``Fidelity``, ``AccuracySearch`` or ``Screening``.
        subject: the name that it has in the journal.
        reused: whether the next run takes it as it is.
        reason: what differs from the newest result of this kind for this subject, or why there is none to take.
    """

    kind: str
    subject: str
    reused: bool
    reason: str


class _Missing(Exception):
    """A result that is not there; what needs it cannot be asked for."""


class _Silent:
    def phase(self, name: str, total: int) -> None:
        """Says nothing."""

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        """Says nothing."""

    def ended(self, kind: str, subject: str) -> None:
        """Says nothing."""

    def done(self, subject: str, outcome: str) -> None:
        """Says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inquiry(Workspace):
    """A workspace that keeps what it was asked for, and makes nothing."""

    findings: list[Finding]

    def folder(self, name: str) -> Path:
        return self.plan.work / name

    def remember(self, kind: str, subject: str, components: Mapping[str, Any], make: Callable[[], R]) -> tuple[R, bool]:
        found = self.ledger.find(kind, components)
        reason = self._obstacle(kind, subject, components, found)
        self.findings.append(Finding(kind=kind, subject=subject, reused=not reason, reason=reason))
        if reason:
            raise _Missing
        return found, True

    def _obstacle(self, kind: str, subject: str, components: Mapping[str, Any], found: Any) -> str:
        if found is None:
            told = self.ledger.differences(kind, subject, components)
            # The id of the variant is made of the other parts, and differs with each of them.
            parts = [one for one in told if not one.startswith("variant ")] if kind == "Variant" else told
            return "; ".join(parts or told) if told else "nothing was done for it before"
        artifact = getattr(found, "artifact", None)
        if artifact is not None and artifact.digest not in self.store:
            return "its files are no longer in the working folder"
        if kind == "Fidelity" and not (self.folder("outputs") / f"{digest(components)}.npz").is_file():
            return "its answers are no longer in the working folder"
        return ""


def reuse_of(config: CampaignConfig, *, base: Path, work: Path, wanted: str) -> list[Finding]:
    """What the next run of a campaign would reuse of a variant, in the order in which it is done.

    A result that needs one that is made again is not listed as reused either.

    Args:
        config: the campaign file as it is now.
        base: the folder that its paths are relative to.
        work: the campaign's working folder; it is only read.
        wanted: name or id of a variant, or its name in one engine.

    Raises:
        InputError: the campaign has no such variant, or no journal; or its file or samples do not fit.
    """
    ledger = Ledger.read(work / "ledger.jsonl")
    planned = plan(config, base=base, work=work)
    inquiry = _Inquiry(plan=planned, store=FolderStore(work), ledger=ledger, observer=_Silent(), findings=[])
    subject = _subject(ledger, wanted)
    searched = _searched(planned, subject)
    source, recipe, engines = _find(planned, searched or subject)
    evaluation = load_samples(planned.path(config.samples.evaluation))
    given = config.samples.calibration
    calibration = None if given is None else open_samples(planned.path(given))
    variant = _variant(inquiry, source, recipe, calibration)
    is_baseline = (source, recipe) == (config.sources[0], planned.recipes[0])
    baseline = None if is_baseline else _baseline(replace(inquiry, findings=[]), evaluation, calibration)
    if searched:
        _ask_tuned(inquiry, subject, source, variant, baseline, evaluation=evaluation, calibration=calibration)
        return list(dict.fromkeys(inquiry.findings))
    for engine in engines:
        name = _name(planned, source, recipe, engine)
        if variant is None:
            _follows(inquiry, name, ("Fidelity", "Screening"), "the variant is not reused")
        elif baseline is None and not is_baseline:
            _follows(inquiry, name, ("Fidelity", "Screening"), "the answers of the baseline are not reused")
        else:
            _ask_in_engine(inquiry, variant, engine, evaluation, baseline)
    return list(dict.fromkeys(inquiry.findings))


def _ask_tuned(
    inquiry: _Inquiry,
    name: str,
    source: SourceConfig,
    variant: Variant | None,
    baseline: Judged | None,
    *,
    evaluation: Samples,
    calibration: SampleFile | None,
) -> None:
    """What became of the search for nodes of a variant to leave in float32, and of the variant that it ended with."""
    from optimize.tuning import tune_variants

    kinds = ("AccuracySearch", "Variant", "Fidelity", "Screening")
    if variant is None:
        _follows(inquiry, name, kinds, "the variant that is searched is not reused")
        return
    if baseline is None:
        _follows(inquiry, name, kinds, "the answers of the baseline are not reused")
        return
    try:
        judged = judge_one(inquiry, variant, variant.recipe.engines[0], evaluation, baseline)
        known, _ = make_source(inquiry, source)
        begun = len(inquiry.findings)
        tuned, failures = tune_variants(
            inquiry, [known], [baseline, judged], calibration=calibration, evaluation=evaluation
        )
    except _Missing:
        last = inquiry.findings[-1]
        rest = kinds[kinds.index(last.kind) + 1 :] if last.subject == name else kinds
        _follows(inquiry, name, rest, f"{last.subject} is not reused")
        return
    if not tuned:
        why = failures[0].reason if failures else f"{variant.name} meets the limit, or is not searched"
        reused = all(one.reused for one in inquiry.findings[begun:])
        inquiry.findings.append(Finding(kind="Variant", subject=name, reused=reused, reason=why))
        return
    for engine in tuned[0].recipe.engines:
        _ask_in_engine(inquiry, tuned[0], engine, evaluation, baseline)


def _variant(inquiry: _Inquiry, source: SourceConfig, recipe: Recipe, calibration: SampleFile | None) -> Variant | None:
    """The variant, or None where it would not be taken from the journal, or is a failure there."""
    name = _name(inquiry.plan, source, recipe)
    try:
        known, _ = make_source(inquiry, source)
    except _Missing:
        _follows(inquiry, name, ("Variant",), "the source is not reused")
        return None
    try:
        made = make_variant(inquiry, known, recipe, name, calibration)
    except _Missing:
        other = made_under_another_name(inquiry, known, recipe, name, calibration)
        if other is not None:
            inquiry.findings[-1] = replace(inquiry.findings[-1], reused=True, reason="")
        return other
    return None if isinstance(made, Failure) else made


def _baseline(inquiry: _Inquiry, evaluation: Samples, calibration: SampleFile | None) -> Judged | None:
    """The answers of the baseline, or None where they would not be taken from the journal."""
    variant = _variant(inquiry, inquiry.plan.config.sources[0], inquiry.plan.recipes[0], calibration)
    if variant is None:
        return None
    try:
        return judge_one(inquiry, variant, variant.recipe.engines[0], evaluation, None)
    except _Missing:
        return None


def _ask_in_engine(
    inquiry: _Inquiry, variant: Variant, engine: EngineSpec, evaluation: Samples, baseline: Judged | None
) -> None:
    try:
        judged = judge_one(inquiry, variant, engine, evaluation, baseline)
    except _Missing:
        _follows(inquiry, inquiry.findings[-1].subject, ("Screening",), "the answers are not reused")
        return
    with suppress(_Missing):
        screen_one(inquiry, judged)


def _follows(inquiry: _Inquiry, subject: str, kinds: tuple[str, ...], reason: str) -> None:
    """Notes what cannot be looked up, because what it depends on is made again."""
    inquiry.findings.extend(Finding(kind=kind, subject=subject, reused=False, reason=reason) for kind in kinds)


def _subject(ledger: Ledger, wanted: str) -> str:
    """The name that the journal has for a variant's name or id."""
    by_id = {entry.record.id: entry.subject for entry in ledger.entries("Variant") if isinstance(entry.record, Variant)}
    return by_id.get(wanted, wanted)


def _searched(planned: Plan, subject: str) -> str | None:
    """The variant that is searched, where the subject is what such a search ends with."""
    from optimize.tuning import tuned_name

    if planned.config.search.accuracy is None:
        return None
    names = [_name(planned, source, recipe) for source in planned.config.sources for recipe in planned.recipes]
    return next((name for name in names if tuned_name(name) == subject and subject not in names), None)


def _find(planned: Plan, subject: str) -> tuple[SourceConfig, Recipe, tuple[EngineSpec, ...]]:
    names = []
    for source in planned.config.sources:
        for recipe in planned.recipes:
            name = _name(planned, source, recipe)
            if subject == name:
                return source, recipe, recipe.engines
            for engine in recipe.engines:
                if subject == _name(planned, source, recipe, engine):
                    return source, recipe, (engine,)
            names.append(name)
    nearest = difflib.get_close_matches(subject, names, n=1, cutoff=0.4)
    listed = f"There are: {', '.join(names)}."
    raise InputError(
        f"the campaign makes no variant {subject!r}",
        hint=f"Did you mean {nearest[0]!r}? {listed}" if nearest else listed,
    )


def _name(planned: Plan, source: SourceConfig, recipe: Recipe, engine: EngineSpec | None = None) -> str:
    name = f"{source.name}/{recipe.name}" if planned.several_sources else recipe.name
    label = "" if engine is None else engine_label(engine, recipe)
    return f"{name}.{label}" if label else name
