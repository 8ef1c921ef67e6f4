"""A pipeline in a terminal, and as a picture: its steps, what saturates first, what decides latency, and slack."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import StorageError
from registry.report.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

# Okabe and Ito's colours, which the colour-blind can tell apart (https://jfly.uni-koeln.de/color/).
_BUSY, _PATH, _PLAIN, _INK = "#D55E00", "#0072B2", "#E8E8E8", "#222222"
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 2.3, 0.95, 3.2, 1.35
_INCHES = 0.62


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """What is shown of a step.

    Attributes:
        name: of the step.
        variant: that it has.
        layer: how many steps are before it at most; where it stands from left to right.
        limit_rps: requests a second to the pipeline at which it saturates.
        utilisation: share of time that its servers are held.
        sojourn_ms: mean of waiting and service.
        slack_ms: by how much it may become slower; infinite where nobody waits for it.
        decides: share of requests whose latency it is a part of.
    """

    name: str
    variant: str
    layer: int
    limit_rps: float
    utilisation: float
    sojourn_ms: float
    slack_ms: float
    decides: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineView:
    """What is shown of a pipeline.

    Attributes:
        name: of the pipeline.
        steps: in the manifest's order.
        edges: (from, to).
        throughput_path: the path with the step that saturates first.
        latency_path: the path of the requests that take longest.
        bottleneck: what saturates first.
        saturation_rps: at which rate.
        rate_rps: that latency is shown at.
        latency_ms: percentile, as ``p99``, -> ms.
        notes: sentences for the user.
    """

    name: str
    steps: tuple[StepView, ...]
    edges: tuple[tuple[str, str], ...]
    throughput_path: tuple[str, ...]
    latency_path: tuple[str, ...]
    bottleneck: str
    saturation_rps: float
    rate_rps: float
    latency_ms: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """What it comes to, in one sentence."""
        latencies = ", ".join(f"{name} is {_number(value)} ms" for name, value in self.latency_ms.items())
        return (
            f"{self.name} saturates at {_number(self.saturation_rps)} requests a second, at {self.bottleneck}; "
            f"at {_number(self.rate_rps)} a second {latencies}"
        )


def render_pipeline(view: PipelineView, console: "Console") -> None:
    """Prints the steps, both paths and the notes; fits 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("step", overflow="fold")
    table.add_column("variant", overflow="fold")
    for heading in ("saturates\nat, 1/s", "busy", "takes\nms", "slack\nms", "decides"):
        table.add_column(heading, justify="right")
    for step in view.steps:
        busiest = step.name == view.bottleneck
        cells = (
            f"{'* ' if busiest else ''}{step.name}",
            step.variant,
            _number(step.limit_rps),
            f"{step.utilisation:.0%}",
            _number(step.sojourn_ms),
            _slack(step.slack_ms),
            f"{step.decides:.0%}",
        )
        table.add_row(*(Text(printable(cell)) for cell in cells), style="bold" if busiest else "")
    console.print(table)
    console.print()
    console.print(Text(view.headline, style="bold"))
    console.print(Text(f"Path of the step that saturates first: {' -> '.join(view.throughput_path)}"))
    console.print(Text(f"Path of the slowest requests:          {' -> '.join(view.latency_path)}"))
    for note in view.notes:
        console.print(Text(f"Note: {note}.", style="dim"))


def save_picture(view: PipelineView, path: Path) -> None:
    """Writes the graph as a picture; the suffix says which kind (``.svg`` or ``.png``).

    Each box is a step with the share of time it is busy and its slack; the path of the slowest requests is drawn
    thick, and the step that saturates first has a thick frame of its own.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib import rc_context

    figure = draw_pipeline(view)
    # No date in the file: the same analysis gives the same bytes.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with rc_context(_settings(view)):
            figure.savefig(path, dpi=160, bbox_inches="tight", metadata=metadata)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}",
            hint="Check free space and permissions of its folder.",
        ) from error


def draw_pipeline(view: PipelineView) -> "Figure":
    """The graph as matplotlib's figure."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    places = _places(view.steps)
    columns = 1 + max((x for x, _ in places.values()), default=0.0)
    lines = 1 + max((y for _, y in places.values()), default=0.0)
    with rc_context(_settings(view)):
        size = (max(5.0, columns * _GAP_X * _INCHES), max(2.2, lines * _GAP_Y * _INCHES + 1.1))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_axis_off()
        path = set(zip(view.latency_path, view.latency_path[1:], strict=False))
        for before, after in view.edges:
            _edge(axes, places[before], places[after], thick=(before, after) in path)
        for step in view.steps:
            _box(axes, view, step, places[step.name])
        axes.set_xlim(-0.2, (columns - 1) * _GAP_X + _WIDTH + 0.2)
        axes.set_ylim(-((lines - 1) * _GAP_Y) - 0.2, _HEIGHT + 0.2)
        axes.set_title(_folded(view.headline), fontsize=9, color=_INK, loc="left")
        figure.text(
            0.01,
            0.01,
            "thick: what the slowest requests wait for; orange frame: saturates first",
            fontsize=7,
            color=_INK,
        )
    return figure


def _settings(view: PipelineView) -> Any:
    return {"svg.hashsalt": view.name, "svg.fonttype": "none", "text.parse_math": False}


def _places(steps: Sequence[StepView]) -> dict[str, tuple[float, float]]:
    """Step -> (column, line)."""
    used: dict[int, int] = {}
    found = {}
    for step in steps:
        line = used.get(step.layer, 0)
        used[step.layer] = line + 1
        found[step.name] = (float(step.layer), float(line))
    return found


def _corner(place: tuple[float, float]) -> tuple[float, float]:
    return place[0] * _GAP_X, -place[1] * _GAP_Y


def _box(axes: "Axes", view: PipelineView, step: StepView, place: tuple[float, float]) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = _corner(place)
    frame = _BUSY if step.name == view.bottleneck else _PATH if step.name in view.latency_path else "#999999"
    width = 2.4 if step.name == view.bottleneck or step.name in view.latency_path else 1.0
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            _WIDTH,
            _HEIGHT,
            boxstyle="round,pad=0.04",
            facecolor="white",
            edgecolor=frame,
            linewidth=width,
            clip_on=False,
        )
    )
    # How busy it is, as a bar along the bottom.
    share = min(1.0, step.utilisation)
    axes.add_patch(_bar(x, y, _WIDTH, _PLAIN))
    axes.add_patch(_bar(x, y, _WIDTH * share, _BUSY if share > 0.8 else _PATH))
    lines = (
        f"{step.name[:22]}",
        f"{_number(step.limit_rps)}/s  busy {step.utilisation:.0%}",
        f"{_number(step.sojourn_ms)} ms  slack {_slack(step.slack_ms)}",
    )
    for n, line in enumerate(lines):
        axes.text(
            x + 0.08, y + _HEIGHT - 0.18 - 0.27 * n, line, fontsize=7.5 if n else 8.5, color=_INK, va="center",
            fontweight="bold" if n == 0 else "normal",
        )  # fmt: skip


def _bar(x: float, y: float, width: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    # Names of clipping paths differ from run to run, and nothing here is to be clipped.
    return Rectangle((x, y), width, 0.09, facecolor=colour, linewidth=0, clip_on=False)


def _edge(axes: "Axes", before: tuple[float, float], after: tuple[float, float], *, thick: bool) -> None:
    x0, y0 = _corner(before)
    x1, y1 = _corner(after)
    axes.annotate(
        "",
        xy=(x1 - 0.04, y1 + _HEIGHT / 2),
        xytext=(x0 + _WIDTH + 0.04, y0 + _HEIGHT / 2),
        arrowprops={
            "arrowstyle": "-|>",
            "color": _PATH if thick else "#999999",
            "linewidth": 2.4 if thick else 1.0,
            "connectionstyle": "arc3,rad=0.12" if before[1] == after[1] and after[0] - before[0] > 1 else "arc3,rad=0",
        },
    )


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _slack(value: float) -> str:
    return "any" if math.isinf(value) else "0" if value < 0.005 else f"{value:.3g}"


def _folded(text: str) -> str:
    from textwrap import fill

    return fill(text, 88)
