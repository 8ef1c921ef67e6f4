"""How the candidates compare with the champion, which was measured again in the same rounds, for every report."""

from collections.abc import Sequence

from registry.policy import METRICS
from registry.records import Campaign, Champion, Comparison
from registry.report import numbers
from registry.report.resources import Table
from registry.report.table import THROUGHPUTS, Row


def champion_sentence(campaign: Campaign) -> str:
    """How the selected compares with what serves now, in a sentence; empty where no champion is named."""
    champion = campaign.champion
    if champion is None:
        return ""
    if champion.candidate_id is None:
        passed = f" Passed over: {'; '.join(champion.passed_over)}." if champion.passed_over else ""
        return " ".join(champion.notes) + passed
    names = {one.id: one.name for one in campaign.candidates}
    name = names.get(champion.candidate_id, champion.was)
    selected = campaign.verdict.selected
    if selected is None:
        return f"The champion goes on serving: {name}."
    if selected == champion.candidate_id:
        return "Nothing was certainly better than the champion, which was measured again in the same rounds."
    found = _chosen(campaign, champion, selected)
    if found is None:
        return f"How the selected compares with the champion ({name}) is not known: they share no valid round."
    return f"Against the champion ({name}), in the same rounds: {_metric(found)} {_ratio(found)}, {found.word}."


def champion_table(campaign: Campaign, shown: Sequence[Row]) -> Table | None:
    """Every candidate held against the champion; None where that was not measured."""
    champion = campaign.champion
    if champion is None or not champion.comparisons:
        return None
    keys = list(dict.fromkeys((one.metric, one.load) for one in champion.comparisons))
    found = {(one.candidate_id, one.metric, one.load): one for one in champion.comparisons}
    rows = []
    for row in shown:
        compared = [found.get((row.candidate.id, *key)) for key in keys]
        if any(one is not None for one in compared):
            cells = [numbers.NOT_KNOWN if one is None else f"{_ratio(one)}, {one.word}" for one in compared]
            rows.append((f"{row.number}. {row.candidate.variant_name}, {row.candidate.serving.server}", *cells))
    names = {one.id: one.name for one in campaign.candidates}
    return Table(
        title=f"Against the champion, {names.get(champion.candidate_id or '', champion.was)}",
        headings=("candidate", *(_label(metric, load) for metric, load in keys)),
        rows=tuple(rows),
        notes=(
            "Times the champion's value, with the interval over rounds in which both were measured.",
            *champion.notes,
        ),
    )


def _chosen(campaign: Campaign, champion: Champion, selected: str) -> Comparison | None:
    """The selected against the champion, in the first objective if that was compared."""
    found = {(one.metric, one.load): one for one in champion.comparisons if one.candidate_id == selected}
    first = campaign.verdict.policy.objectives[0]
    wanted = [(first.metric, first.load), *((name, None) for name in THROUGHPUTS)]
    return next((found[key] for key in wanted if key in found), next(iter(found.values()), None))


def _metric(comparison: Comparison) -> str:
    return _label(comparison.metric, comparison.load)


def _label(metric: str, load: str | None) -> str:
    words = METRICS[metric].label if metric in METRICS else metric
    return f"{words} at {load}" if load else words


def _ratio(comparison: Comparison) -> str:
    ratio = comparison.ratio
    return " ".join(part for part in (numbers.times(ratio), numbers.times_interval(ratio)) if part)
