"""The pictures of a campaign: what levers bought, what candidates trade, their curves, and the searched surface."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from registry.policy import METRICS
from registry.records import (
    Campaign,
    Capacity,
    CapacityAdvice,
    Estimate,
    ServingPoint,
    ServingProfile,
    ServingSearch,
    Spectrum,
)
from registry.report import numbers
from registry.report.curves import Line, concurrency_picture, rate_picture, spectrum_picture
from registry.report.drawing import Palette, Picture, as_png, colour, limit_line, marker, new_figure
from registry.report.table import Row, accuracy_limit, capacity_of, latency_limit, latency_name, printable, rows
from registry.report.waterfall import TITLE, Step, Waterfall, waterfall

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

# More lines than this cannot be told apart; the table has the rest.
MOST_LINES = 8
_LONGEST_LEVER = 14


def pictures_of(campaign: Campaign, shown: Sequence[Row]) -> tuple[Picture, ...]:
    """Every picture that the campaign's records hold the data of, in the order of the report."""
    found = (
        waterfall_picture(campaign),
        pareto_picture(campaign, shown),
        latency_picture(campaign, shown),
        throughput_picture(campaign, shown),
        percentile_picture(campaign, shown),
        *(surface_picture(search, number) for number, search in enumerate(campaign.serving_searches, 1)),
    )
    return tuple(one for one in found if one is not None)


def png_files(campaign: Campaign) -> dict[str, bytes]:
    """The same as PNG files, by their names: ``latency.png``, ..."""
    return {f"{one.name}.png": as_png(one) for one in pictures_of(campaign, rows(campaign))}


def endpoint_files(
    label: str, capacity: Capacity | None, advice: CapacityAdvice | None, spectra: Sequence[Spectrum]
) -> dict[str, bytes]:
    """The pictures of one endpoint as PNG files, by their names; those whose data there is.

    Args:
        label: what people call it.
        capacity: None where it was not looked for.
        advice: what follows from it, or None.
        spectra: one a load.
    """
    line = Line(number=1, label=label, selected=True)
    found: list[Picture | None] = []
    if capacity is not None:
        found += [rate_picture([(line, capacity)]), concurrency_picture([(line, capacity, advice)])]
    loads = [(Line(number=number, label=one.load), one) for number, one in enumerate(spectra[:MOST_LINES], 1)]
    found.append(spectrum_picture(loads, left_out=len(spectra) - len(loads)))
    return {f"{one.name}.png": as_png(one) for one in found if one is not None}


def latency_picture(campaign: Campaign, shown: Sequence[Row]) -> Picture | None:
    """p50 and p90 against the offered rate, a line a candidate; None where no stages were measured."""
    known = [(row, found) for row in shown if (found := capacity_of(campaign, row.candidate.id)) is not None]
    known = [(row, found) for row, found in known if any(one.latency_p50_ms is not None for one in found.stages)]
    drawn = _foremost(known)
    limit = latency_limit(campaign)
    return rate_picture(
        [(_line(row), found) for row, found in drawn],
        limit_ms=None if limit is None else limit.limit,
        left_out=len(known) - len(drawn),
    )


def throughput_picture(campaign: Campaign, shown: Sequence[Row]) -> Picture | None:
    """Throughput against requests outstanding, a line a candidate; None where no ladder was climbed."""
    advice = {one.candidate_id: one for one in campaign.advice}
    known = [(row, found) for row in shown if (found := capacity_of(campaign, row.candidate.id)) is not None]
    drawn = _foremost([(row, found) for row, found in known if len(found.ladder) > 1])
    return concurrency_picture(
        [(_line(row), found, advice.get(row.candidate.id)) for row, found in drawn], left_out=len(known) - len(drawn)
    )


def percentile_picture(campaign: Campaign, shown: Sequence[Row]) -> Picture | None:
    """Latency by percentile at the load whose latency is reported; None where no spectrum is known there."""
    _, load = latency_name(campaign)
    spectra = {one.candidate_id: one for one in campaign.spectra if one.load == load}
    known = [(row, spectra[row.candidate.id]) for row in shown if row.candidate.id in spectra]
    drawn = _foremost(known)
    limit = latency_limit(campaign)
    percentile = "" if limit is None else limit.metric.removeprefix("latency_p").removesuffix("_ms")
    return spectrum_picture(
        [(_line(row), found) for row, found in drawn],
        str(load),
        limit_ms=(int(percentile), limit.limit) if limit is not None and percentile.isdecimal() else None,
        left_out=len(known) - len(drawn),
    )


def pareto_picture(campaign: Campaign, shown: Sequence[Row]) -> Picture | None:
    """Throughput against the accuracy lost, else against latency, a point a candidate; None where too little is known.

    The Pareto front is drawn as a line, the baseline as a square and the selected as a star.
    """
    by_drop = any(row.drop is not None and row.throughput is not None for row in shown)
    points = [
        (row, cost, row.throughput)
        for row in shown
        if (cost := row.drop if by_drop else row.latency) is not None and row.throughput is not None
    ]
    if not points:
        return None
    metric, load = latency_name(campaign)
    words = f"{metric.removesuffix('_ms')}, ms" + (f", at {load}" if load else "")
    cost_words = "accuracy lost against the baseline" if by_drop else printable(words)
    front = sorted((cost.value, rate.value) for row, cost, rate in points if row.pareto)
    limit = accuracy_limit(campaign) if by_drop else latency_limit(campaign)

    def draw(palette: Palette) -> "Figure":
        figure, axes = new_figure(4.2, legend_lines=1)
        for row, cost, throughput in points:
            _point(axes, palette, row, cost, throughput)
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=palette.muted, linewidth=1.2, zorder=1)
        if limit is not None:
            limit_line(axes, f"limit {numbers.plain(limit.limit)}", palette, x=limit.limit)
        axes.margins(0.12, 0.14)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"{cost_words} (less is better)")
        axes.set_ylabel("throughput, requests/s (more is better)")
        _point_legend(figure, palette)
        return figure

    return Picture(
        name="pareto",
        title="Throughput against " + ("accuracy lost" if by_drop else "latency"),
        description=f"{len(points)} candidates by their number in the table, with intervals; "
        f"{len(front)} of them are on the Pareto front.",
        caption="Numbers are those of the table; thin lines are intervals. No candidate is better than one on the "
        "front in every objective.",
        draw=draw,
    )


def waterfall_picture(campaign: Campaign) -> Picture | None:
    """What each lever bought, a bar a step from baseline to selected; None where there is no such way."""
    found = waterfall(campaign)
    if found is None:
        return None
    good = METRICS[found.objective.metric].larger_is_better if found.objective.metric in METRICS else True

    def draw(palette: Palette) -> "Figure":
        lines = max(_folded(step).count("\n") for step in found.steps)
        figure, axes = new_figure(3.8, legend_lines=lines)
        _bars(axes, palette, found, larger_is_better=good)
        return figure

    told = "; ".join(f"{step.name}: {numbers.times(step.ratio)}" for step in found.steps)
    return Picture(
        name="waterfall",
        title=TITLE,
        description=f"{found.label} from {found.baseline.name} to {found.steps[-1].candidate.name}. {told}.",
        caption=" ".join(found.notes),
        draw=draw,
    )


def surface_picture(search: ServingSearch, number: int) -> Picture | None:
    """The rates that a search found against the batch size, a panel for each server and protocol.

    None where it measured fewer than two profiles.
    """
    points = [one for one in search.points if one.score is not None]
    if len(points) < 2:
        return None
    named = f" for {search.variant_name}" if search.variant_name else ""
    return Picture(
        name=f"surface-{number}",
        title=f"The searched surface{named}",
        description=f"{len(points)} serving profiles that were measured, of {search.space}: rate by largest batch, "
        "a panel for each server and protocol.",
        caption="Each point is one profile that was served and measured; the star is the best. Points above each "
        f"other differ in delay or threads. {search.sentence}.",
        draw=lambda palette: _surface(palette, search, points),
    )


# --- the searched surface ----------------------------------------------------------------------------------------


def _lanes(profile: ServingProfile) -> int:
    return profile.parallel_workers if profile.server == "mlserver" else profile.instances


def _surface(palette: Palette, search: ServingSearch, points: Sequence[ServingPoint]) -> "Figure":
    from matplotlib.lines import Line2D

    panels = sorted({(one.profile.server, one.profile.protocol) for one in points})
    lanes = sorted({_lanes(one.profile) for one in points})
    sizes = sorted({one.profile.max_batch_size for one in points})
    figure, whole = new_figure(3.4, legend_lines=1)
    box = whole.get_position()
    whole.remove()
    gap = 0.02
    width = (box.width - gap * (len(panels) - 1)) / len(panels)
    first: Axes | None = None
    for place, panel in enumerate(panels):
        at = (box.x0 + place * (width + gap), box.y0, width, box.height * 0.92)
        axes = figure.add_axes(at, sharey=first)
        axes.set_title(f"{panel[0]}, {panel[1]}", fontsize="small", color=palette.muted)
        if first is None:
            first = axes
            axes.set_ylabel("closed-loop rate, requests/s")
        else:
            axes.tick_params(labelleft=False)
        for one in points:
            if (one.profile.server, one.profile.protocol) == panel:
                _surface_point(axes, palette, one, search, number=lanes.index(_lanes(one.profile)) + 1)
        axes.set_xscale("log", base=2)
        axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    if first is not None:
        first.margins(y=0.1)
        first.set_ylim(bottom=0)
    figure.text(box.x0 + box.width / 2, box.y0 - 0.115, "largest batch", ha="center", va="top")
    handles = [
        Line2D(
            [], [], color=colour(palette, place), marker=marker(place), linestyle="none",
            label=str(count),
        )
        for place, count in enumerate(lanes, 1)
    ]  # fmt: skip
    handles.insert(0, Line2D([], [], color=palette.ink, linestyle="none", label="workers or instances:"))
    figure.legend(
        handles=handles, loc="lower left", ncols=len(handles), borderpad=0, borderaxespad=0.5, columnspacing=0.8,
        handletextpad=0.2, handlelength=1.2,
    )  # fmt: skip
    return figure


def _surface_point(axes: "Axes", palette: Palette, one: ServingPoint, search: ServingSearch, *, number: int) -> None:
    if one.score is None:
        return
    best = one == search.best
    axes.plot(
        one.profile.max_batch_size, one.score.value, linestyle="none", color=colour(palette, number),
        marker="*" if best else marker(number), markersize=15 if best else 6, zorder=4 if best else 3,
        markerfacecolor=colour(palette, number) if best else palette.surface, markeredgewidth=1.4,
    )  # fmt: skip


# --- what levers bought ------------------------------------------------------------------------------------------


def _bars(axes: "Axes", palette: Palette, found: Waterfall, *, larger_is_better: bool) -> None:
    values = [found.start, *(step.value for step in found.steps)]
    tops = [one.value for one in values]
    axes.bar(0, tops[0], color=palette.muted, width=0.62)
    _interval(axes, palette, 0, values[0])
    for place, (step, before) in enumerate(zip(found.steps, tops, strict=False), 1):
        after = step.value.value
        better = (after >= before) == larger_is_better
        axes.bar(
            place, after - before, bottom=before, color=palette.good if better else palette.bad, width=0.62,
            hatch=None if better else "//", edgecolor=palette.surface, linewidth=0,
        )  # fmt: skip
        axes.plot([place - 0.69, place + 0.31], [before, before], color=palette.muted, linewidth=0.8)
        _interval(axes, palette, place, step.value)
        _above(axes, place, max(after, before, step.value.high or 0.0), numbers.times(step.ratio))
    last = len(found.steps) + 1
    axes.bar(last, tops[-1], color=palette.series[0], width=0.62)
    axes.plot([last - 0.69, last + 0.31], [tops[-1], tops[-1]], color=palette.muted, linewidth=0.8)
    _above(axes, last, tops[-1], numbers.times(found.total))
    axes.set_xticks(range(last + 1), ["baseline", *(_folded(step) for step in found.steps), "selected"])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.14)
    if min(tops) >= 0:
        axes.set_ylim(bottom=0)
    unit = found.start.unit.replace("1/s", "requests/s")
    axes.set_ylabel(printable(f"{found.label}, {unit}"))


def _interval(axes: "Axes", palette: Palette, place: int, value: Estimate) -> None:
    axes.errorbar(
        place,
        value.value,
        yerr=_reach(value),
        fmt="none",
        color=palette.ink,
        ecolor=palette.ink,
        elinewidth=0.9,
        capsize=3,
    )


def _above(axes: "Axes", place: int, top: float, words: str) -> None:
    axes.annotate(words, (place, top), xytext=(0, 4), textcoords="offset points", ha="center", weight="bold")


def _folded(step: Step) -> str:
    """The levers, a line each where they are many."""
    return step.name if len(step.name) <= _LONGEST_LEVER else " +\n".join(step.levers)


# --- what candidates trade ---------------------------------------------------------------------------------------


def _point(axes: "Axes", palette: Palette, row: Row, cost: Estimate, throughput: Estimate) -> None:
    shape, size = ("*", 17) if row.outcome == "selected" else ("s", 9) if row.baseline else ("o", 8)
    shade = colour(palette, row.number)
    axes.errorbar(
        cost.value,
        throughput.value,
        xerr=_reach(cost),
        yerr=_reach(throughput),
        ecolor=palette.muted,
        elinewidth=0.8,
        color=shade,
        marker=shape,
        markersize=size,
        markerfacecolor=shade if row.pareto or row.outcome == "selected" else palette.surface,
        markeredgecolor=shade,
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


def _point_legend(figure: "Figure", palette: Palette) -> None:
    from matplotlib.lines import Line2D

    def handle(shape: str, words: str, *, filled: bool = True, line: Any = "none") -> Line2D:
        face = palette.ink if filled else palette.surface
        return Line2D([], [], color=palette.ink, marker=shape, markerfacecolor=face, linestyle=line, label=words)

    handles = [
        handle("*", "selected"),
        handle("s", "baseline", filled=False),
        handle("o", "other", filled=False),
        handle("", "Pareto front (filled)", line="-"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=4, borderpad=0, borderaxespad=0.5, columnspacing=1.2)


# --- lines -------------------------------------------------------------------------------------------------------


def _foremost(known: list[tuple[Row, T]]) -> list[tuple[Row, T]]:
    """The first few, the baseline always among them."""
    kept = known[:MOST_LINES]
    baseline = [pair for pair in known[MOST_LINES:] if pair[0].baseline]
    return kept[: MOST_LINES - len(baseline)] + baseline


def _line(row: Row) -> Line:
    notes = [word for word, holds in (("selected", row.outcome == "selected"), ("baseline", row.baseline)) if holds]
    label = row.candidate.name + (f" ({', '.join(notes)})" if notes else "")
    return Line(number=row.number, label=label, selected=row.outcome == "selected")
