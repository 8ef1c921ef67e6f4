"""How a picture of the report is drawn: once, as SVG inside a page that lends it its colours, or as a PNG file.

Lines and points are told apart by number, marker and dash as well as by colour. The series' colours are those of
Okabe and Ito (https://jfly.uni-koeln.de/color/), which the colour-blind can tell apart.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from registry.report.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """The colours of a drawing."""

    ink: str
    muted: str
    grid: str
    surface: str
    good: str
    bad: str
    series: tuple[str, ...]


SERIES = 6
# Colours that no drawing uses: each is replaced by a variable of the page, which knows light from dark.
_PAGE = Palette(
    ink="#0a0c01",
    muted="#0a0c02",
    grid="#0a0c03",
    surface="#0a0c04",
    good="#0a0c05",
    bad="#0a0c06",
    series=tuple(f"#0a0b{place:02x}" for place in range(SERIES)),
)
_VARIABLES = {
    _PAGE.ink: "ink",
    _PAGE.muted: "muted",
    _PAGE.grid: "grid",
    _PAGE.surface: "surface",
    _PAGE.good: "good",
    _PAGE.bad: "bad",
}
# Those of the page's style in the light.
_PAPER = Palette(
    ink="#1b1f24",
    muted="#59636e",
    grid="#dfe3e7",
    surface="#ffffff",
    good="#0b6e4f",
    bad="#9b2c2c",
    series=("#0072b2", "#d55e00", "#009e73", "#b4588f", "#b98200", "#3f8fc0"),
)
# One more than colours, so that no two of the lines in a picture are alike.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FONT_PT = 10.5
_WIDTH_IN = 6.4
_LEGEND_LINE_IN = 0.19
_TITLE_IN = 0.35
_DOTS_PER_INCH = 144


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture of a report.

    Attributes:
        name: of its file, and the beginning of its ids in a page: letters, digits and ``-``.
        title: above it.
        description: what it shows, for those who do not see it.
        caption: what a reader must know of it.
        draw: draws it in the colours of a palette.
    """

    name: str
    title: str
    description: str
    caption: str
    draw: "Callable[[Palette], Figure]"


def colour(palette: Palette, number: int) -> str:
    """That of the candidate of a number."""
    return palette.series[(number - 1) % SERIES]


def marker(number: int) -> str:
    """That of the candidate of a number."""
    return _MARKERS[(number - 1) % len(_MARKERS)]


def new_figure(plot_in: float, *, legend_lines: int, left: float = 0.75) -> "tuple[Figure, Axes]":
    """A figure with one plot, and room for the legend under it; all in inches."""
    from matplotlib.figure import Figure

    legend_in = legend_lines * _LEGEND_LINE_IN
    height = plot_in + legend_in + 0.2
    figure = Figure(figsize=(_WIDTH_IN, height))
    right, top, foot = 0.15, 0.12, 0.55
    axes = figure.add_axes(
        (
            left / _WIDTH_IN,
            (legend_in + foot + 0.15) / height,
            (_WIDTH_IN - left - right) / _WIDTH_IN,
            (plot_in - foot - top) / height,
        )
    )
    return figure, axes


def limit_line(axes: "Axes", words: str, palette: Palette, *, x: float | None = None, y: float | None = None) -> None:
    """A dotted line with words, across at ``y`` or up at ``x``."""
    style: dict[str, Any] = {"color": palette.muted, "linewidth": 1.2, "linestyle": (0, (1, 2))}
    if y is not None:
        axes.axhline(y, **style)
        axes.annotate(words, (0.01, y), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points")
    elif x is not None:
        axes.axvline(x, **style)
        axes.annotate(
            words, (x, 0.02), xycoords=("data", "axes fraction"), xytext=(-4, 0), textcoords="offset points", ha="right"
        )


def as_svg(picture: Picture) -> str:
    """The drawing as one ``svg`` element: no prolog, no metadata, ids of its own, the page's colours."""
    import matplotlib as mpl

    name, out = picture.name, io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _drawing(_PAGE), mpl.rc_context({"svg.hashsalt": name}):
        picture.draw(_PAGE).savefig(out, format="svg", metadata=nothing)
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
        f'viewBox="{box.group(1) if box else ""}"><title id="{name}-title">{escape(printable(picture.title))}</title>'
        f'<desc id="{name}-description">{escape(printable(picture.description))}</desc>'
    )
    return f"{head}{inner.strip()}</svg>"


def as_png(picture: Picture) -> bytes:
    """The drawing as a PNG file, on white with its title; the same bytes each time for the same versions."""
    out = io.BytesIO()
    with _drawing(_PAPER):
        figure = picture.draw(_PAPER)
        high = _make_room(figure)
        figure.text(0.02, 1 - 0.08 / high, printable(picture.title), ha="left", va="top", weight="bold")
        figure.savefig(out, format="png", dpi=_DOTS_PER_INCH, facecolor=_PAPER.surface, metadata={"Software": None})
    return out.getvalue()


def _make_room(figure: "Figure") -> float:
    """Makes the figure higher, with the new room at its top for a title; returns its height in inches."""
    wide, before = figure.get_size_inches()
    high = float(before) + _TITLE_IN
    for axes in figure.axes:
        place = axes.get_position()
        axes.set_position((place.x0, place.y0 * before / high, place.width, place.height * before / high))
    for text in figure.texts:
        text.set_y(text.get_position()[1] * before / high)
    figure.set_size_inches(wide, high)
    return high


@contextmanager
def _drawing(palette: Palette) -> Iterator[None]:
    """Settings for the time of drawing only; the browser has the glyphs that the measuring font lacks."""
    import matplotlib as mpl

    settings: Any = {  # matplotlib types the keys one by one
        "svg.fonttype": "none",  # text stays text: it can be searched, read aloud, and takes the page's font
        "text.parse_math": False,  # a name may hold a dollar sign
        "font.size": _FONT_PT,
        "axes.edgecolor": palette.muted,
        "axes.labelcolor": palette.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.grid,
        "grid.linewidth": 0.7,
        "xtick.color": palette.ink,
        "ytick.color": palette.ink,
        "text.color": palette.ink,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _variable(found: "re.Match[str]") -> str:
    shade = found.group(0)
    word = _VARIABLES.get(shade)
    return f"var(--{word})" if word else f"var(--series-{int(shade[-2:], 16)})"
