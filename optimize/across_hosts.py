"""What several campaigns chose, side by side: on the limits of their policies, cost and energy, without ratios.

Two hosts, a CPU and a GPU say, differ in more than what was served on them, and two campaigns on one host were not
measured in turns. So nothing here is divided by anything: each candidate is held against the same limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.rendering import find_candidate
from optimize.reporting import RECORD, read_campaign
from registry.codec import to_jsonable
from registry.errors import InputError
from registry.policy import METRICS
from registry.records import Campaign, Candidate, Constraint, Estimate, HardwareProfile, Judgement
from registry.report import numbers
from registry.selection import Key, judge, metric_table

_ENERGY = ("cpu_joules_per_1k", "gpu_joules_per_1k")
_COST = "cost_per_million"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One candidate of one campaign.

    Attributes:
        name: as the user named it.
        selected: whether the campaign chose it.
        host: the machine that it was measured on, for people; the Core 2 that served it, where one did.
        fingerprint: of that.
        judgements: of each limit, in the order of `SideBySide.limits`.
        metrics: all that is known of it.
    """

    name: str
    campaign: Campaign
    candidate: Candidate
    selected: bool
    host: str
    fingerprint: str
    judgements: tuple[Judgement, ...]
    metrics: dict[Key, Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Candidates of several campaigns.

    Attributes:
        columns: one each.
        limits: the absolute ones of all their policies, each once.
        notes: what else there is to know.
    """

    columns: tuple[Column, ...]
    limits: tuple[Constraint, ...]
    notes: tuple[str, ...]

    @property
    def unlike(self) -> bool:
        """Whether they were measured on different hosts."""
        return len({one.fingerprint for one in self.columns}) > 1

    @property
    def sentence(self) -> str:
        """What this is, and who keeps all limits."""
        hosts = len({one.fingerprint for one in self.columns})
        where = f"on {hosts} unlike hosts" if self.unlike else "on one host, not measured in turns"
        told = f"{len(self.columns)} campaigns {where}: no ratios."
        if not self.limits:
            return f"{told} No policy of them has an absolute limit."
        keeping = [one.name for one in self.columns if all(it.outcome == "pass" for it in one.judgements)]
        return f"{told} All {len(self.limits)} absolute limits are kept by {', '.join(keeping) or 'none of them'}."


def names_campaign(word: str) -> bool:
    """Whether a word names the working folder of a campaign, or a candidate in one (``FOLDER:NAME``)."""
    return _parts(word) is not None


def side_by_side(words: Sequence[str]) -> SideBySide:
    """What the campaigns that are named chose, or the candidates that are named in them.

    Args:
        words: ``FOLDER`` for what its campaign selected, ``FOLDER:NAME`` for the candidate of a name or id.

    Raises:
        InputError: a word names no campaign or candidate, or all name the same.
    """
    picked = [_pick(word) for word in words]
    if len({(campaign.id, candidate.id) for campaign, candidate in picked}) < len(picked):
        raise InputError("the same candidate of the same campaign is named twice", hint="Name each once.")
    # By what they say, not by how they are written.
    limits = {
        (one.metric, one.op, one.limit, one.load): one
        for campaign, _ in picked
        for one in campaign.verdict.policy.constraints
        if not one.relative
    }
    columns = tuple(
        _column(word, campaign, candidate, tuple(limits.values()))
        for word, (campaign, candidate) in zip(words, picked, strict=True)
    )
    return SideBySide(columns=columns, limits=tuple(limits.values()), notes=_notes(columns))


def _parts(word: str) -> tuple[Path, str | None] | None:
    if Path(word, RECORD).is_file():
        return Path(word), None
    folder, colon, name = word.partition(":")
    return (Path(folder), name) if colon and name and Path(folder, RECORD).is_file() else None


def _pick(word: str) -> tuple[Campaign, Candidate]:
    parts = _parts(word)
    if parts is None:
        raise InputError(
            f"{word!r} names no campaign", hint="Give its working folder, or FOLDER:NAME for one of its candidates."
        )
    campaign = read_campaign(parts[0])
    return campaign, find_candidate(campaign, parts[1])


def _column(name: str, campaign: Campaign, candidate: Candidate, limits: tuple[Constraint, ...]) -> Column:
    table = metric_table(campaign.candidates, campaign.measurements, campaign.fidelities, campaign.variants)
    metrics = table[candidate.id]
    host = campaign.host
    machine = f"{host.cpu_model}, {host.cores} cores" + "".join(f", {gpu}" for gpu in host.gpus)
    return Column(
        name=name,
        campaign=campaign,
        candidate=candidate,
        selected=candidate.id == campaign.verdict.selected,
        host=f"{candidate.cluster}, asked from {machine}" if candidate.cluster else machine,
        fingerprint=f"{host.fingerprint} {candidate.cluster}".strip(),
        judgements=tuple(judge(limit, metrics, {}) for limit in limits),
        metrics=metrics,
    )


def _notes(columns: Sequence[Column]) -> tuple[str, ...]:
    notes = []
    if any("saturation" in (load or "") for one in columns for _, load in one.metrics):
        notes.append("Latency at a share of saturation is at another rate for each: the share of its own.")
    if len({one.campaign.samples_digest for one in columns}) > 1:
        notes.append("They were asked with different samples.")
    units = {one.metrics[_COST, None].unit for one in columns if (_COST, None) in one.metrics}
    if len(units) > 1:
        notes.append(f"Costs are in different currencies: {', '.join(sorted(units))}.")
    if any(len({(name, None) in one.metrics for one in columns}) > 1 for name in _ENERGY):
        notes.append(
            "Joules of one part of a machine (CPU, GPU) do not stand for those of another that nobody measured."
        )
    if provisional := [one.name for one in columns if one.campaign.verdict.provisional]:
        notes.append(f"Of a level that gives a hint, no proof: {', '.join(provisional)}.")
    return tuple(notes)


# --- telling ---------------------------------------------------------------------------------------------------


def document(found: SideBySide) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "kind": "campaigns",
        "sentence": found.sentence,
        "unlike_hosts": found.unlike,
        "columns": [_plain(one) for one in found.columns],
        "notes": list(found.notes),
    }


def _plain(one: Column) -> dict[str, Any]:
    return {
        "name": one.name,
        "campaign": one.campaign.name,
        "candidate": one.candidate.name,
        "selected": one.selected,
        "level": one.campaign.level,
        "host": to_jsonable(one.campaign.host),
        "served_by": one.candidate.cluster or None,
        "hardware": None if one.campaign.hardware is None else to_jsonable(one.campaign.hardware),
        "limits": [{"limit": it.constraint.text, "outcome": it.outcome, "reason": it.reason} for it in one.judgements],
        "metrics": [
            {"metric": metric, "load": load, "estimate": to_jsonable(estimate)}
            for (metric, load), estimate in sorted(one.metrics.items(), key=lambda it: _place(it[0]))
        ],
    }


def _place(key: Key) -> tuple[str, int, str]:
    """Metrics without a load first, in the policy's order."""
    metric, load = key
    order = list(METRICS)
    return load or "", order.index(metric) if metric in METRICS else len(order), metric


def show(found: SideBySide) -> None:
    """Prints the columns: what each is, which limits it keeps, and what is known of it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(found.sentence, highlight=False, markup=False)
    table = Table("")
    for one in found.columns:
        table.add_column(Text(one.name, overflow="fold"))
    facts = {
        "candidate": [one.candidate.name + ("" if one.selected else " (not selected)") for one in found.columns],
        "host": [one.host for one in found.columns],
        "price": [_price(one.campaign.hardware) for one in found.columns],
        "level": [one.campaign.level for one in found.columns],
    }
    for name, values in facts.items():
        table.add_row(*map(Text, (name, *values)))
    table.add_section()
    for place, limit in enumerate(found.limits):
        table.add_row(*map(Text, (limit.text, *(one.judgements[place].outcome for one in found.columns))))
    table.add_section()
    for key in sorted({key for one in found.columns for key in one.metrics}, key=_place):
        metric, load = key
        name = METRICS[metric].label if metric in METRICS else metric
        values = [numbers.text(one.metrics.get(key)) for one in found.columns]
        table.add_row(*map(Text, (f"{name} at {load}" if load else name, *values)))
    console.print(table)
    for note in found.notes:
        console.print(note, highlight=False, markup=False)


def _price(hardware: HardwareProfile | None) -> str:
    if hardware is None:
        return "not known"
    if hardware.price_per_hour is None:
        return f"{hardware.name}, without a price"
    said = f"{hardware.price_per_hour:g} {hardware.currency} an hour"
    return f"{hardware.name}: {said} ({hardware.price_source}, {hardware.price_date})"
