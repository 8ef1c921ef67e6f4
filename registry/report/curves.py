"""Curves of what was measured, a line a candidate or endpoint: against rate, against concurrency, by percentile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from registry.records import Capacity, CapacityAdvice, Metrics, RateStage, Spectrum
from registry.report import numbers
from registry.report.drawing import Palette, Picture, colour, limit_line, marker, new_figure
from registry.report.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHED = (0, (4, 2))
# What the axis of percentiles marks; each further nine takes as much room as the one before.
_TICKS = (0, 50, 75, 90, 95, 99, 99.5, 99.9, 99.99)
_CONCURRENCIES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Whose curve it is.

    Attributes:
        number: its place in the table, which says colour and marker.
        label: in the legend.
        selected: drawn with a wider line.
    """

    number: int
    label: str
    selected: bool = False


def rate_picture(
    found: Sequence[tuple[Line, Capacity]], *, limit_ms: float | None = None, left_out: int = 0
) -> Picture | None:
    """p50 and p90 against the offered rate; None where no stages were measured."""
    drawn = [(line, capacity, stages) for line, capacity in found if (stages := _with_latency(capacity))]
    if not drawn:
        return None

    def draw(palette: Palette) -> "Figure":
        figure, axes = new_figure(3.8, legend_lines=len(drawn) + 2)
        for line, capacity, stages in drawn:
            _rates(axes, palette, line, stages, capacity.saturation_rps)
        _log_latency(axes)
        axes.set_xlim(left=0)
        axes.set_xlabel("offered rate, requests/s")
        if limit_ms is not None:
            limit_line(axes, f"limit {numbers.plain(limit_ms)} ms", palette, y=limit_ms)
        how = (
            _key(palette, linestyle=_DASHED, linewidth=1, label="dashed: p50; solid: p90"),
            _key(
                palette, marker="o", markerfacecolor=palette.surface, linestyle="none",
                label="hollow: not sustained; on a stalk at the foot: saturation",
            ),
        )  # fmt: skip
        _legend(figure, palette, [line for line, _, _ in drawn], *how)
        return figure

    return Picture(
        name="latency",
        title="Latency against offered rate",
        description=f"p50 and p90 latency in {_count(drawn)} as the offered rate rises; number {drawn[0][0].number} is "
        f"{drawn[0][0].label}.",
        caption="Open loop, arrivals that do not wait for answers. The rate at which a line turns upwards is where its "
        f"queue begins to grow.{_left_out(left_out)}",
        draw=draw,
    )


def concurrency_picture(
    found: Sequence[tuple[Line, Capacity, CapacityAdvice | None]], *, left_out: int = 0
) -> Picture | None:
    """Throughput against requests outstanding, with knee and law; None where no ladder has two rungs."""
    drawn = [one for one in found if len(one[1].ladder) > 1]
    if not drawn:
        return None
    laws = any(advice is not None and advice.law for _, _, advice in drawn)

    def draw(palette: Palette) -> "Figure":
        figure, axes = new_figure(3.6, legend_lines=len(drawn) + 1 + laws)
        for line, capacity, advice in drawn:
            _ladder(axes, palette, line, capacity, advice)
        tried = sorted({n for _, capacity, _ in drawn for n, _ in capacity.ladder})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tried, [str(n) for n in tried])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests outstanding")
        axes.set_ylabel("throughput, requests/s")
        how = [
            _key(
                palette, marker="o", markersize=11, markerfacecolor="none", linestyle="none",
                label="ringed: the knee; more at a time only wait longer",
            )
        ]  # fmt: skip
        if laws:
            law = "dashed: the Universal Scalability Law, where it fits"
            how.append(_key(palette, linestyle=_DASHED, linewidth=1, label=law))
        _legend(figure, palette, [line for line, _, _ in drawn], *how)
        return figure

    return Picture(
        name="throughput",
        title="Throughput against concurrency",
        description=f"Throughput in {_count(drawn)} as more requests are outstanding at a time.",
        caption="Closed loop: each answer is followed by the next request. One window at each concurrency, so that a "
        f"single point may be off.{_left_out(left_out)}",
        draw=draw,
    )


def spectrum_picture(
    found: Sequence[tuple[Line, Spectrum]],
    load: str = "",
    *,
    limit_ms: tuple[int, float] | None = None,
    left_out: int = 0,
) -> Picture | None:
    """Latency by percentile, as far as the requests earn it; None where nothing was measured.

    Args:
        found: spectra at one load, or one at each.
        load: that they have in common, or empty.
        limit_ms: percentile and latency of a limit there.
        left_out: how many more there are.
    """
    if not found:
        return None

    def draw(palette: Palette) -> "Figure":
        figure, axes = new_figure(3.6, legend_lines=len(found) + (limit_ms is not None))
        for line, spectrum in found:
            places = [_place(percentile) for percentile, _ in spectrum.points]
            latencies = [latency for _, latency in spectrum.points]
            width = 2.4 if line.selected else 1.5
            axes.plot(
                places, latencies, color=colour(palette, line.number), linewidth=width,
                marker=marker(line.number), markersize=4, markevery=_marked(spectrum),
            )  # fmt: skip
        highest = max(spectrum.points[-1][0] for _, spectrum in found)
        ticks = [tick for tick in _TICKS if tick <= highest]
        axes.set_xticks([_place(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        _log_latency(axes)
        axes.set_xlabel("percentile")
        how = []
        if limit_ms is not None:
            percentile, latency = limit_ms
            axes.plot(_place(percentile), latency, marker="v", color=palette.ink, markersize=9, linestyle="none")
            words = f"limit: p{percentile} at {numbers.plain(latency)} ms"
            how.append(_key(palette, marker="v", linestyle="none", label=words))
        _legend(figure, palette, [line for line, _ in found], *how)
        return figure

    return Picture(
        name="spectrum",
        title=f"Latency by percentile{f' at {load}' if load else ''}",
        description=f"The percentiles of the latency in {_count(found)}{f' at {load}' if load else ''}.",
        caption="All valid runs together, each request counted from its intended send time. A line ends where fewer "
        f"than ten requests lie beyond, which earn no percentile.{_left_out(left_out)}",
        draw=draw,
    )


def _log_latency(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylabel("latency, ms (log scale)")


def _with_latency(capacity: Capacity) -> list[RateStage]:
    return [stage for stage in capacity.stages if {stage.latency_p50_ms, stage.latency_p90_ms} != {None}]


def _rates(
    axes: "Axes", palette: Palette, line: Line, stages: Sequence[RateStage], saturation_rps: float | None
) -> None:
    shade, shape = colour(palette, line.number), marker(line.number)
    rates = [stage.offered_rps for stage in stages]
    width = 2.4 if line.selected else 1.5
    p90 = [float("nan") if stage.latency_p90_ms is None else stage.latency_p90_ms for stage in stages]
    p50 = [float("nan") if stage.latency_p50_ms is None else stage.latency_p50_ms for stage in stages]
    axes.plot(rates, p50, color=shade, linewidth=width * 0.6, linestyle=_DASHED)
    axes.plot(rates, p90, color=shade, linewidth=width)
    for stage, value in zip(stages, p90, strict=True):
        face = shade if stage.sustained else palette.surface
        axes.plot(stage.offered_rps, value, color=shade, marker=shape, markersize=5, markerfacecolor=face)
    if saturation_rps is not None:
        where = axes.get_xaxis_transform()
        axes.plot([saturation_rps, saturation_rps], [0, 0.07], color=shade, linewidth=1.2, transform=where)
        axes.plot(saturation_rps, 0.07, marker=shape, color=shade, markersize=7, transform=where)


def _ladder(axes: "Axes", palette: Palette, line: Line, capacity: Capacity, advice: CapacityAdvice | None) -> None:
    shade, shape = colour(palette, line.number), marker(line.number)
    rungs = sorted(capacity.ladder)
    tried, rates = [n for n, _ in rungs], [rps for _, rps in rungs]
    width = 2.4 if line.selected else 1.5
    axes.plot(tried, rates, color=shade, linewidth=width, marker=shape, markersize=5)
    if advice is None:
        return
    if advice.knee is not None:
        at_knee = next((rps for n, rps in rungs if n == advice.knee), None)
        if at_knee is not None:
            ring: dict[str, Any] = {"markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.3}
            axes.plot(advice.knee, at_knee, color=shade, marker="o", linestyle="none", **ring)
    if advice.law:
        n = np.geomspace(tried[0], tried[-1], _CONCURRENCIES)
        axes.plot(n, [law_rps(advice.law, one) for one in n], color=shade, linewidth=1.0, linestyle=_DASHED)


def law_rps(law: Metrics, outstanding: float) -> float:
    """Throughput by the Universal Scalability Law of Gunther (2007) with so many requests outstanding."""
    gamma, sigma, kappa = (law[name].value for name in ("gamma", "sigma", "kappa"))
    return gamma * outstanding / (1 + sigma * (outstanding - 1) + kappa * outstanding * (outstanding - 1))


def _place(percentile: float) -> float:
    """Where a percentile stands: so many tenfolds of rarity."""
    return float(-np.log10(1 - percentile / 100))


def _marked(spectrum: Spectrum) -> list[int]:
    """Which points get a marker: those that people name."""
    return [place for place, (percentile, _) in enumerate(spectrum.points) if percentile in _TICKS]


def _key(palette: Palette, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=palette.ink, **style)


def _legend(figure: "Figure", palette: Palette, lines: Sequence[Line], *how: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=colour(palette, line.number), marker=marker(line.number), linewidth=1.8,
            label=f"{line.number}  {printable(line.label)}",
        )
        for line in lines
    ]  # fmt: skip
    figure.legend(handles=[*handles, *how], loc="lower left", borderpad=0, borderaxespad=0.5)


def _count(drawn: Sequence[object]) -> str:
    return "one line" if len(drawn) == 1 else f"{len(drawn)} lines"


def _left_out(count: int) -> str:
    return f" {count} more candidates are in the table only." if count else ""
