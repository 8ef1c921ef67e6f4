"""The report as one page that needs nothing but itself: no network, no script, pictures inside."""

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from registry.records import Campaign, ClosedLoop, Comparison, Judgement, LoadProfile, Replay, Variant
from registry.report import numbers
from registry.report.champions import champion_sentence
from registry.report.drawing import as_svg
from registry.report.pictures import pictures_of
from registry.report.resources import Table
from registry.report.sections import all_tables
from registry.report.table import Row, engine_words, latency_name, printable, rows, serving_words
from registry.tracked import stage_words

# A mark beside each word, so that colour is never alone.
_MARKS = {"selected": "✓", "rejected": "✕", "unknown": "?", "failed": "!", "pass": "✓", "fail": "✕"}
_LEVELS = {
    "quick": "in-process screening, then a few short rounds; enough for a first look",
    "standard": "interleaved rounds against the baseline, with intervals over rounds",
    "proof": "the method in full",
}
_SHOWN_DIGITS = 12


def render_html(campaign: Campaign) -> str:
    """One self-contained HTML page; the same text for the same campaign."""
    shown = rows(campaign)
    page = page_environment().get_template("page.html")
    return page.render(
        campaign=campaign,
        verdict=campaign.verdict,
        tiles=_tiles(shown, _latency_heading(campaign)),
        latency_heading=_latency_heading(campaign),
        rows=[_cells(row) for row in shown],
        tables=[{"table": one, "numeric": numeric_columns(one)} for one in all_tables(campaign, shown)],
        champion=champion_sentence(campaign),
        policy=_policy(campaign),
        started=_started(campaign),
        pictures=[
            {"title": one.title, "caption": one.caption, "svg": Markup(as_svg(one))}  # noqa: S704 - escaped where made
            for one in pictures_of(campaign, shown)
        ],
        losers=[_loser(campaign, row) for row in shown if row.outcome != "selected"],
        closest=[
            {
                "constraint": miss.constraint.text,
                "candidate": miss.candidate_name,
                "observed": numbers.text(miss.observed),
                "relaxation": miss.relaxation,
            }
            for miss in campaign.verdict.closest
        ],
        failures=campaign.failures,
        method=_method(campaign, shown),
        variants=[_variant(campaign, variant) for variant in campaign.variants],
        rendered=_rendered(campaign),
        install=[f"{name}=={version.partition('+')[0]}" for name, version in sorted(campaign.versions.items())],
    )


def page_environment() -> Environment:
    """What pages are made with: all text is escaped, and a name that is not given is an error."""
    # The loader reads from inside the package, also from a zipped one.
    environment = Environment(
        loader=PackageLoader("registry.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_final,
    )
    environment.globals["mark"] = lambda word: _MARKS.get(word, "")
    return environment


def _final(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _tiles(shown: tuple[Row, ...], latency_words: str) -> list[dict[str, str]]:
    """The three numbers that a manager asks for; none where nothing was selected."""
    winner = next((row for row in shown if row.outcome == "selected"), None)
    if winner is None:
        return []
    against = winner.comparison
    tiles = [
        {
            "value": numbers.number(winner.throughput),
            "words": "requests/s at most",
            "note": _ratio_words(against) if against else numbers.interval(winner.throughput),
        },
        {
            "value": numbers.short(winner.latency),
            "words": latency_words,
            "note": numbers.interval(winner.latency),
        },
        {
            "value": numbers.number(winner.drop),
            "words": "accuracy lost",
            "note": f"accuracy {numbers.text(winner.accuracy)}",
        },
        {"value": numbers.short(winner.size_mb), "words": "model files", "note": ""},
    ]
    return tiles


def _ratio_words(comparison: Comparison) -> str:
    return (
        f"{numbers.times(comparison.ratio)} the baseline {numbers.times_interval(comparison.ratio)}, {comparison.word}"
    )


def _started(campaign: Campaign) -> str:
    try:
        return datetime.fromisoformat(campaign.started_at).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return campaign.started_at


def _latency_heading(campaign: Campaign) -> str:
    metric, load = latency_name(campaign)
    words = metric.removeprefix("latency_").removesuffix("_ms") + " latency"
    return f"{words} at {load}" if load else words


def _cells(row: Row) -> dict[str, Any]:
    against = ("1×", "baseline") if row.baseline else (numbers.NOT_KNOWN, "")
    if row.comparison is not None:
        against = (numbers.times(row.comparison.ratio), row.comparison.word)
    return {
        "number": row.number,
        "outcome": row.outcome,
        "baseline": row.baseline,
        "champion": row.champion,
        "pareto": row.pareto,
        "variant": row.candidate.variant_name,
        "engine": f"{engine_words(row.candidate.engine)} {row.candidate.engine_version}",
        "server": f"{row.candidate.serving.server} {row.candidate.server_version}",
        "backend": row.candidate.serving.backend,
        "protocol": row.candidate.serving.protocol,
        "serving": serving_words(row.candidate),
        "accuracy": (
            numbers.number(row.accuracy),
            f"lost {numbers.number(row.drop)}" if row.drop else "",
            numbers.interval(row.drop),
        ),
        "latency": (numbers.short(row.latency), numbers.interval(row.latency)),
        "throughput": (numbers.number(row.throughput), numbers.interval(row.throughput)),
        "against": against,
        "size": numbers.number(row.size_mb),
    }


def numeric_columns(table: Table) -> list[bool]:
    """Which columns hold numbers, and so are set to the right."""
    return [
        all(not cell or cell == numbers.NOT_KNOWN or cell[0].isdigit() or cell[0] == "-" for cell in column)
        for column in zip(*(row[1:] for row in table.rows), strict=True)
    ]


def _policy(campaign: Campaign) -> list[dict[str, str]]:
    """Each constraint and objective of the policy."""
    policy = campaign.verdict.policy
    limits = [{"kind": "limit", "text": constraint.text} for constraint in policy.constraints]
    passed_over = () if campaign.champion is None else campaign.champion.passed_over
    limits += [{"kind": "passed over", "text": text} for text in passed_over]
    return limits + [{"kind": "objective", "text": objective.text} for objective in policy.objectives]


def _loser(campaign: Campaign, row: Row) -> dict[str, Any]:
    judgements: Iterable[Judgement] = ()
    for rejection in campaign.verdict.rejections:
        if rejection.candidate_id == row.candidate.id:
            judgements = rejection.judgements
    return {
        "number": row.number,
        "name": row.candidate.name,
        "outcome": row.outcome,
        "reason": row.reason,
        "judgements": [
            {"text": one.constraint.text, "outcome": one.outcome, "reason": one.reason} for one in judgements
        ],
    }


def _method(campaign: Campaign, shown: tuple[Row, ...]) -> list[tuple[str, str]]:
    """What was measured how, as terms and their descriptions."""
    host = campaign.host
    level = f"{campaign.level}: {_LEVELS[campaign.level]}" if campaign.level in _LEVELS else campaign.level
    counted = len({one.number for one in campaign.rounds})
    invalid = sum(not run.valid for one in campaign.rounds for run in one.runs)
    runs = sum(len(one.runs) for one in campaign.rounds)
    order = "candidates in random order in each, the baseline among them" if counted else ""
    entries = [
        ("Level", level),
        ("Rounds", f"{counted}, {order}; {runs} runs, {invalid} of them invalid" if counted else "none"),
        ("Runs left out", _left_out(campaign, shown)),
        ("Loads", "; ".join(_loads(campaign)) or "none"),
        ("Latency", "counted from the intended send time; a run that fails a validity gate is not used"),
        ("Accuracy", _accuracy_words(campaign)),
        ("Served by", "; ".join(sorted({one.cluster for one in campaign.candidates if one.cluster}))),
        (
            "Host",
            f"{host.cpu_model}, {host.cores} cores, {numbers.plain(host.memory_mb / 1000)} GB, Linux {host.kernel}",
        ),
        ("Instruction sets", ", ".join(host.instruction_sets) or numbers.NOT_KNOWN),
        ("GPU", ", ".join(host.gpus) or "none"),
        ("Pinning", host.pinning),
        ("Host fingerprint", f"{host.fingerprint}; ratios hold only within one fingerprint"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(campaign.versions.items()))),
    ]
    return [(term, words) for term, words in entries if words]


def _left_out(campaign: Campaign, shown: tuple[Row, ...]) -> str:
    """Of each candidate that was measured, how many invalid runs its numbers leave out, and at which loads."""
    words = []
    for row in shown:
        found = [one for one in campaign.measurements if one.candidate_id == row.candidate.id]
        places = [
            f"{one.invalid_runs} {f'at {one.load}' if one.load else 'in a closed loop'}"
            for one in found
            if one.invalid_runs
        ]
        if found:
            words.append(f"{row.number}. {row.candidate.name}: {', '.join(places) or 'none'}")
    return "; ".join(words)


def _loads(campaign: Campaign) -> list[str]:
    """Each load once, with how many runs it had; open loops have a rate for each candidate."""
    counted: Counter[str] = Counter(_load_words(run.load) for one in campaign.rounds for run in one.runs)
    return [f"{words} ({count} runs)" for words, count in sorted(counted.items())]


def _load_words(profile: LoadProfile) -> str:
    window = f"{numbers.plain(profile.duration_s)} s after {numbers.plain(profile.warmup_s)} s of warm-up"
    if isinstance(profile.load, ClosedLoop):
        return f"{profile.name}: closed loop, {profile.load.concurrency} outstanding, {window}"
    if isinstance(profile.load, Replay):
        return f"{profile.name}: recorded arrivals, {window}"
    arrivals = "Poisson arrivals" if profile.load.arrivals == "poisson" else "evenly spaced arrivals"
    return f"{profile.name}: open loop, {arrivals}, {window}"


def _accuracy_words(campaign: Campaign) -> str:
    samples = sorted({one.samples for one in campaign.fidelities})
    if not samples:
        return ""
    counts = " or ".join(f"{count:,}" for count in samples)
    return f"{campaign.task_metric} on {counts} held-out samples, each variant in each engine against the baseline"


def _variant(campaign: Campaign, variant: Variant) -> dict[str, Any]:
    timed = [
        f"{metric.removeprefix('inprocess_ms.').replace('_', ' ')}: {numbers.text(estimate)}"
        for screening in campaign.screenings
        if screening.variant_id == variant.id
        for metric, estimate in sorted(screening.metrics.items())
    ]
    return {
        "name": variant.name,
        "recipe": " → ".join(stage_words(stage) for stage in variant.recipe.stages) or "as given",
        "digest": variant.artifact.digest[:_SHOWN_DIGITS],
        "timed": ", ".join(timed),
        "notes": [*variant.notes, *_answers_notes(campaign, variant)],
    }


def _answers_notes(campaign: Campaign, variant: Variant) -> list[str]:
    """What the judging of its answers noted, once where several batch sizes say the same."""
    judged = [one for one in campaign.fidelities if one.variant_id == variant.id]
    return list(dict.fromkeys(f"{engine_words(one.engine)}: {note}" for one in judged for note in one.notes))


def _rendered(campaign: Campaign) -> list[tuple[str, str]]:
    """The files that the selected candidate is served with."""
    selected = campaign.verdict.selected
    return sorted(campaign.rendered.get(selected, {}).items()) if selected else []
