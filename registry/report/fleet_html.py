"""A fleet as one page that needs nothing but itself; it leads to the campaigns' own pages beside it."""

from typing import Any

from markupsafe import Markup

from registry.records import Fleet
from registry.report import numbers
from registry.report.drawing import as_svg
from registry.report.fleet import (
    RANKING,
    STATES,
    FleetRow,
    cost_words,
    drop_words,
    fleet_rows,
    fleet_sentence,
    fleet_tables,
    metric_words,
    minutes_words,
    notes_of,
    size_words,
    speed_up_words,
)
from registry.report.fleet_picture import gains_picture
from registry.report.html import numeric_columns, page_environment

# The page's style knows a campaign's words.
_CHIPS = {"no_winner": "unknown", "failed": "failed", "stopped": "unknown", "waiting": ""}


def render_fleet_html(fleet: Fleet) -> str:
    """One self-contained HTML page; the same text for the same fleet."""
    rows = fleet_rows(fleet)
    won = [row for row in rows if row.rank is not None]
    picture = gains_picture(won)
    page = page_environment().get_template("fleet.html")
    return page.render(
        fleet=fleet,
        sentence=fleet_sentence(fleet),
        tiles=_tiles(rows),
        ranking=" ".join(part for part in (RANKING, metric_words(won)) if part),
        won=[_winner(row) for row in won],
        others=[_other(row) for row in rows if row.rank is None],
        picture=None
        if picture is None
        else {
            "title": picture.title,
            "caption": picture.caption,
            "svg": Markup(as_svg(picture)),  # noqa: S704 - escaped where made
        },
        tables=[{"table": one, "numeric": numeric_columns(one)} for one in fleet_tables(fleet)],
        budget=_budget(fleet),
    )


def _tiles(rows: tuple[FleetRow, ...]) -> list[dict[str, str]]:
    gains = [row.gain for row in rows if row.gain is not None]
    faster = sum(gain.word == "faster" for gain in gains)
    sizes = [
        (gain.baseline_size_mb, gain.size_mb)
        for gain in gains
        if gain.baseline_size_mb is not None and gain.size_mb is not None
    ]
    saved = sum(before - after for before, after in sizes)
    return [
        {"value": f"{len(gains)} of {len(rows)}", "words": "models with a winner", "note": ""},
        {"value": str(faster), "words": "faster than the baseline", "note": "by interleaved rounds"},
        {"value": f"{numbers.plain(saved)} MB", "words": "of model files saved", "note": _of(sizes)},
        {"value": minutes_words(sum(row.minutes for row in rows)), "words": "minutes of campaigns", "note": ""},
    ]


def _of(sizes: list[tuple[float, float]]) -> str:
    return f"of {numbers.plain(sum(before for before, _ in sizes))} MB of baselines" if sizes else ""


def _winner(row: FleetRow) -> dict[str, Any]:
    outcome, gain = row.outcome, row.gain
    return {
        "rank": row.rank,
        "name": row.model.name,
        "group": row.model.group,
        "link": row.link,
        "candidate": gain.candidate if gain else "",
        "speed_up": speed_up_words(gain),
        "size": size_words(gain),
        "drop": drop_words(gain),
        "cost": cost_words(gain),
        "minutes": minutes_words(row.minutes),
        "host": outcome.host if outcome else "",
        "level": outcome.level if outcome else "",
        "notes": notes_of(row),
    }


def _other(row: FleetRow) -> dict[str, Any]:
    outcome = row.outcome
    return {
        "name": row.model.name,
        "link": row.link,
        "state": STATES[row.state] + (f", {outcome.kind}" if outcome is not None and outcome.kind else ""),
        "chip": _CHIPS[row.state],
        "reason": row.reason,
        "misses": outcome.misses if outcome is not None else (),
        "minutes": minutes_words(row.minutes),
    }


def _budget(fleet: Fleet) -> list[tuple[str, str]]:
    """How the fleet was set up, as terms and their descriptions."""
    own = [model for model in fleet.models if model.minutes is not None]
    entries = [
        ("Models", str(len(fleet.models))),
        ("At the same time", str(fleet.parallel)),
        ("Minutes of a run", "any" if fleet.minutes is None else numbers.plain(fleet.minutes)),
        ("Minutes of a model", f"{len(own)} of {len(fleet.models)} models have a budget of their own" if own else ""),
        ("Measuring", "one campaign at a time on the same cores"),
    ]
    return [(term, words) for term, words in entries if words]
