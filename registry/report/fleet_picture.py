"""What was won for each model of a fleet, drawn: speed-ups with their intervals, one line a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from registry.records import Gain
from registry.report import numbers
from registry.report.drawing import Palette, Picture, new_figure
from registry.report.fleet import FleetRow
from registry.report.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 40
_LINE_IN, _NAME_CHARACTERS = 0.24, 22


def gains_picture(rows: Sequence[FleetRow]) -> Picture | None:
    """The speed-up of each winner over its baseline; None where no ratio is known."""
    known = [(row, row.gain) for row in rows if row.rank is not None and row.gain is not None]
    known = [(row, gain) for row, gain in known if gain.speed_up is not None and gain.speed_up.value > 0]
    if not known:
        return None
    shown = known[:_MOST]

    def draw(palette: Palette) -> "Figure":
        figure, axes = new_figure(1.1 + _LINE_IN * len(shown), legend_lines=0, left=2.0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.axvline(1, color=palette.muted, linewidth=1.2)
        for place, (_, gain) in enumerate(shown):
            _gain(axes, palette, place, gain)
        axes.set_yticks(range(len(shown)), [_name(row) for row, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.08)
        axes.set_xlabel("times the float32 baseline (more is better)")
        return figure

    told = "; ".join(f"{row.model.name} {numbers.times(gain.speed_up)}" for row, gain in shown)
    left = f" The first {_MOST} of {len(known)} are drawn." if len(known) > _MOST else ""
    return Picture(
        name="gains",
        title="What was won",
        description=f"Speed-up of {len(shown)} models over their float32 baselines: {told}.",
        caption="Filled: faster by interleaved rounds. Hollow: any other word, or none. Thin lines are intervals; each "
        f"ratio belongs to one campaign on one host.{left}",
        draw=draw,
    )


def _gain(axes: "Axes", palette: Palette, place: int, gain: Gain) -> None:
    ratio = gain.speed_up
    if ratio is None:
        return
    shade = palette.good if gain.word == "faster" else palette.bad if gain.word == "slower" else palette.muted
    ends = [end for end in (ratio.low, ratio.high) if end is not None and end > 0]
    axes.plot([*ends, ratio.value], [place] * (len(ends) + 1), color=shade, linewidth=1.2)
    face = shade if gain.word == "faster" else palette.surface
    axes.plot([ratio.value], [place], marker="o", color=shade, markerfacecolor=face, linestyle="none")


def _name(row: FleetRow) -> str:
    name = printable(row.model.name)
    return f"{row.rank}. {name if len(name) <= _NAME_CHARACTERS else name[: _NAME_CHARACTERS - 1] + '…'}"
