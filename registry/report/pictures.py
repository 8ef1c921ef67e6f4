"""The pictures of the report, as SVG that stands inside a page and takes its colours from the page's style.

Lines and points are told apart by number, marker and dash as well as by colour. The series' colours are those of
Okabe and Ito (https://jfly.uni-koeln.de/color/), which the colour-blind can tell apart; the page sets them.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from registry.records import Campaign, Capacity, Estimate, RateStage
from registry.report import numbers
from registry.report.table import Row, accuracy_limit, capacity_of, latency_limit, latency_name, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that no drawing uses: each is replaced by a variable of the page, which knows light from dark.
_INK, _MUTED, _GRID, _SURFACE = "#0a0c01", "#0a0c02", "#0a0c03", "#0a0c04"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _SURFACE: "surface"}
SERIES = 6
_MARKERS = ("o", "s", "^", "D", "v", "P")
# More lines than this cannot be told apart; the table has the rest.
MOST_LINES = 8
_SETTINGS: Any = {  # matplotlib types the keys one by one
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud, and takes the page's font
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 10.5,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_WIDTH_IN = 6.4
_LEGEND_LINE_IN = 0.19


def latency_picture(campaign: Campaign, rows: Sequence[Row]) -> str:
    """p50 and p90 against the offered rate, a line a candidate; empty where no stages were measured."""
    drawn = [(row, stages) for row in rows if (stages := _stages(capacity_of(campaign, row.candidate.id)))]
    if not drawn:
        return ""
    drawn = _foremost(drawn)
    with _drawing():
        figure, axes = _figure(3.8, legend_lines=len(drawn) + 2)
        for row, stages in drawn:
            _curve(axes, row, stages, capacity_of(campaign, row.candidate.id))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlim(left=0)
        axes.set_xlabel("offered rate, requests/s")
        axes.set_ylabel("latency, ms (log scale)")
        limit = latency_limit(campaign)
        if limit is not None:
            _limit_line(axes, f"limit {numbers.plain(limit.limit)} ms", y=limit.limit)
        _curve_legend(figure, [row for row, _ in drawn])
        best = drawn[0][0].candidate.name
        return _svg(
            figure,
            name="latency",
            title="Latency against offered rate",
            description=f"p50 and p90 latency of {len(drawn)} candidates as the offered rate rises; "
            f"number 1 in the table is {best}. The same numbers are in campaign.json.",
        )


def pareto_picture(campaign: Campaign, rows: Sequence[Row]) -> str:
    """Throughput against the accuracy lost, else against latency, a point a candidate; empty where too little is known.

    The Pareto front is drawn as a line, the baseline as a square and the selected as a star.
    """
    by_drop = any(row.drop is not None and row.throughput is not None for row in rows)
    points = [
        (row, cost, row.throughput)
        for row in rows
        if (cost := row.drop if by_drop else row.latency) is not None and row.throughput is not None
    ]
    if not points:
        return ""
    metric, load = latency_name(campaign)
    words = f"{metric.removesuffix('_ms')}, ms" + (f", at {load}" if load else "")
    cost_words = "accuracy lost against the baseline" if by_drop else printable(words)
    with _drawing():
        figure, axes = _figure(4.2, legend_lines=1)
        for row, cost, throughput in points:
            _point(axes, row, cost, throughput)
        front = sorted((cost.value, rate.value) for row, cost, rate in points if row.pareto)
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=_MUTED, linewidth=1.2, zorder=1)
        limit = accuracy_limit(campaign) if by_drop else latency_limit(campaign)
        if limit is not None:
            _limit_line(axes, f"limit {numbers.plain(limit.limit)}", x=limit.limit)
        axes.margins(0.12, 0.14)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"{cost_words} (less is better)")
        axes.set_ylabel("throughput, requests/s (more is better)")
        _point_legend(figure)
        return _svg(
            figure,
            name="pareto",
            title="Throughput against " + ("accuracy lost" if by_drop else "latency"),
            description=f"{len(points)} candidates by their number in the table, with intervals; "
            f"{len(front)} of them are on the Pareto front.",
        )


def _stages(capacity: Capacity | None) -> list[RateStage]:
    return [] if capacity is None else [stage for stage in capacity.stages if stage.latency_p90_ms is not None]


def _foremost(drawn: list[tuple[Row, list[RateStage]]]) -> list[tuple[Row, list[RateStage]]]:
    """The first few, the baseline always among them."""
    kept = drawn[:MOST_LINES]
    baseline = [pair for pair in drawn[MOST_LINES:] if pair[0].baseline]
    return kept[: MOST_LINES - len(baseline)] + baseline


def _curve(axes: "Axes", row: Row, stages: list[RateStage], capacity: Capacity | None) -> None:
    colour, marker = _colour(row), _marker(row)
    rates = [stage.offered_rps for stage in stages]
    width = 2.4 if row.outcome == "selected" else 1.5
    p90 = [float("nan") if stage.latency_p90_ms is None else stage.latency_p90_ms for stage in stages]
    p50 = [float("nan") if stage.latency_p50_ms is None else stage.latency_p50_ms for stage in stages]
    axes.plot(rates, p50, color=colour, linewidth=width * 0.6, linestyle=(0, (4, 2)))
    axes.plot(rates, p90, color=colour, linewidth=width)
    for stage, value in zip(stages, p90, strict=True):
        face = colour if stage.sustained else _SURFACE
        axes.plot(stage.offered_rps, value, color=colour, marker=marker, markersize=5, markerfacecolor=face)
    if capacity is not None and capacity.saturation_rps is not None:
        where = axes.get_xaxis_transform()
        rate = capacity.saturation_rps
        axes.plot([rate, rate], [0, 0.07], color=colour, linewidth=1.2, transform=where)
        axes.plot(rate, 0.07, marker=marker, color=colour, markersize=7, transform=where)


def _point(axes: "Axes", row: Row, cost: Estimate, throughput: Estimate) -> None:
    marker, size = ("*", 17) if row.outcome == "selected" else ("s", 9) if row.baseline else ("o", 8)
    axes.errorbar(
        cost.value,
        throughput.value,
        xerr=_reach(cost),
        yerr=_reach(throughput),
        ecolor=_MUTED,
        elinewidth=0.8,
        color=_colour(row),
        marker=marker,
        markersize=size,
        markerfacecolor=_colour(row) if row.pareto or row.outcome == "selected" else _SURFACE,
        markeredgecolor=_colour(row),
        markeredgewidth=1.6,
        zorder=3,
    )
    axes.annotate(
        str(row.number), (cost.value, throughput.value), xytext=(9, 6), textcoords="offset points", weight="bold"
    )


def _reach(estimate: Estimate) -> list[list[float]]:
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    return [[max(0.0, estimate.value - low)], [max(0.0, high - estimate.value)]]


def _limit_line(axes: "Axes", words: str, *, x: float | None = None, y: float | None = None) -> None:
    style: dict[str, Any] = {"color": _MUTED, "linewidth": 1.2, "linestyle": (0, (1, 2))}
    if y is not None:
        axes.axhline(y, **style)
        axes.annotate(words, (0.01, y), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points")
    elif x is not None:
        axes.axvline(x, **style)
        axes.annotate(
            words, (x, 0.02), xycoords=("data", "axes fraction"), xytext=(-4, 0), textcoords="offset points", ha="right"
        )


def _curve_legend(figure: "Figure", rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_colour(row), marker=_marker(row), linewidth=1.8, label=_label(row)) for row in rows
    ]
    handles += [
        Line2D([], [], color=_INK, linestyle=(0, (4, 2)), linewidth=1, label="dashed: p50; solid: p90"),
        Line2D(
            [], [], color=_INK, marker="o", markerfacecolor=_SURFACE, linestyle="none",
            label="hollow: not sustained; on a stalk at the foot: saturation",
        ),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="lower left", borderpad=0, borderaxespad=0.1)


def _point_legend(figure: "Figure") -> None:
    from matplotlib.lines import Line2D

    def handle(marker: str, words: str, *, filled: bool = True, line: Any = "none") -> Line2D:
        face = _INK if filled else _SURFACE
        return Line2D([], [], color=_INK, marker=marker, markerfacecolor=face, linestyle=line, label=words)

    handles = [
        handle("*", "selected"),
        handle("s", "baseline", filled=False),
        handle("o", "other", filled=False),
        handle("", "Pareto front (filled)", line="-"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=4, borderpad=0, borderaxespad=0.1, columnspacing=1.2)


def _label(row: Row) -> str:
    words = f"{row.number}  {printable(row.candidate.name)}"
    notes = [word for word, holds in (("selected", row.outcome == "selected"), ("baseline", row.baseline)) if holds]
    return words + (f" ({', '.join(notes)})" if notes else "")


def _colour(row: Row) -> str:
    return f"#0a0b{(row.number - 1) % SERIES:02x}"


def _marker(row: Row) -> str:
    return _MARKERS[(row.number - 1) % len(_MARKERS)]


@contextmanager
def _drawing() -> Iterator[None]:
    """Settings for the time of drawing only; the browser has the glyphs that the measuring font lacks."""
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _figure(plot_in: float, *, legend_lines: int) -> "tuple[Figure, Axes]":
    """A figure with one plot, and room for the legend under it."""
    from matplotlib.figure import Figure

    legend_in = legend_lines * _LEGEND_LINE_IN
    height = plot_in + legend_in + 0.2
    figure = Figure(figsize=(_WIDTH_IN, height))
    left, right, top, foot = 0.75, 0.15, 0.12, 0.55
    axes = figure.add_axes(
        (
            left / _WIDTH_IN,
            (legend_in + foot + 0.15) / height,
            (_WIDTH_IN - left - right) / _WIDTH_IN,
            (plot_in - foot - top) / height,
        )
    )
    return figure, axes


def _svg(figure: "Figure", *, name: str, title: str, description: str) -> str:
    """The drawing as one ``svg`` element: no prolog, no metadata, ids of its own, the page's colours."""
    import matplotlib as mpl

    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=nothing)
    drawing = out.getvalue()
    body = drawing[drawing.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', body)
    inner = body[body.index(">") + 1 : body.rindex("</svg>")]
    # The style would hold for the whole page; the page has its own rule for pictures.
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'\bid="', f'id="{name}-', inner)
    inner = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", inner)
    inner = re.sub(r"#0a0[bc][0-9a-f]{2}", _variable, inner)
    head = (
        f'<svg class="picture" role="img" aria-labelledby="{name}-title {name}-description" '
        f'viewBox="{box.group(1) if box else ""}"><title id="{name}-title">{escape(printable(title))}</title>'
        f'<desc id="{name}-description">{escape(printable(description))}</desc>'
    )
    return f"{head}{inner.strip()}</svg>"


def _variable(found: "re.Match[str]") -> str:
    colour = found.group(0)
    word = _VARIABLES.get(colour)
    return f"var(--{word})" if word else f"var(--series-{int(colour[-2:], 16)})"
