"""What commands share: options that behave alike, one JSON document on stdout, progress on stderr."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from optimize.plan import Observer

_REFRESHES_PER_S = 4.0
_BAR_WIDTH = 30
_MOST_LINES = 12
"""Of work that runs; the rest is counted."""

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else on stderr.")]

ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", help="A YAML file with a section `cluster:` that names a Core 2.")
]

# Of whom a passport must be signed by.
PublicKeyOption = Annotated[Path | None, typer.Option(help="PEM file: of whom it must be signed by.")]
IdentityOption = Annotated[str | None, typer.Option(help="Whom it must be signed by without a key: me@example.org.")]
IssuerOption = Annotated[str | None, typer.Option(help="URL of who must have vouched for the identity.")]
TrustConfigOption = Annotated[
    Path | None, typer.Option(help="File of the Sigstore to trust; the public one if not given.")
]


def emit_json(document: Any) -> None:
    """Writes the one JSON document of a command to stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Writes a line for people to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextmanager
def progress() -> Iterator["Observer"]:
    """An observer of a campaign: what runs, and how far it is, on a terminal; plain lines elsewhere. Logs go along."""
    _quiet_logs()
    if not sys.stderr.isatty():
        shown = logging.StreamHandler()
        shown.setLevel(logging.WARNING)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[shown])
        yield LineObserver()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.logging import RichHandler

    console = Console(stderr=True)
    rich_shown = RichHandler(console=console, level=logging.WARNING)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[rich_shown])
    observer = LiveObserver(console)
    with Live(observer, console=console, refresh_per_second=_REFRESHES_PER_S, transient=True):
        yield observer


class LineObserver:
    """One plain line for each thing that is done, with how far the phase is."""

    def __init__(self) -> None:
        from optimize.progress import Progress

        self._progress = Progress()

    def phase(self, name: str, total: int) -> None:
        """Says that a phase of ``total`` units begins."""
        self._progress.phase(name, total)
        say(f"{name}: {total}")

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        """Says that a piece of work begins, where that is on another machine."""
        self._progress.begun(kind, subject, where)
        if where:
            say(f"  {subject} begins on {where}")

    def ended(self, kind: str, subject: str) -> None:
        """Keeps how long a piece of work took."""
        self._progress.ended(kind, subject)

    def done(self, subject: str, outcome: str) -> None:
        """Says what became of one unit."""
        self._progress.done(subject, outcome)
        say(f"  {subject}: {outcome}{self._far()}")

    def note(self, text: str) -> None:
        """Says something that is no unit of a phase."""
        say(f"  {text}")

    def _far(self) -> str:
        """How far the phase is, once that says something."""
        from optimize.progress import remaining

        phase, left_s = self._progress.current, self._progress.left_s
        return f" ({phase.done} of {phase.total}, {remaining(left_s)})" if phase is not None and left_s else ""


class LiveObserver:
    """A bar for the phase and a line for each piece of work that runs, below a line for each thing that is done."""

    def __init__(self, console: "Console") -> None:
        from rich.spinner import Spinner

        from optimize.progress import Progress

        self._console = console
        self._progress = Progress()
        self._spinner = Spinner("dots")

    def phase(self, name: str, total: int) -> None:
        """Begins the bar of a phase; the last one's goes."""
        self._progress.phase(name, total)

    def begun(self, kind: str, subject: str, where: str = "") -> None:
        """Shows a piece of work."""
        self._progress.begun(kind, subject, where)

    def ended(self, kind: str, subject: str) -> None:
        """Takes it away."""
        self._progress.ended(kind, subject)

    def done(self, subject: str, outcome: str) -> None:
        """Moves the bar on, and says what became of one unit."""
        self._progress.done(subject, outcome)
        self._console.print(f"[green]·[/] {_escaped(subject)}: {_escaped(outcome)}", highlight=False)

    def note(self, text: str) -> None:
        """Says something above the bar."""
        self._console.print(f"[dim]{_escaped(text)}[/]", highlight=False)

    def __rich__(self) -> "RenderableType":
        """What the terminal shows now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        from optimize.progress import duration, remaining

        phase = self._progress.current
        if phase is None:
            return Text("")
        bar = Table.grid(padding=(0, 1))
        total = max(phase.total, 1)
        bar.add_row(
            self._spinner,
            Text(phase.name, style="bold"),
            ProgressBar(total=total, completed=min(phase.done, total), width=_BAR_WIDTH),
            Text(f"{phase.done}/{phase.total}"),
            Text(duration(time.time() - phase.began), style="dim"),
            Text(remaining(self._progress.left_s), style="dim"),
        )
        lines = [
            Text(f"  {one.words}  ").append(duration(time.time() - one.since), style="dim")
            for one in self._progress.running
        ]
        more = len(lines) - _MOST_LINES
        return Group(bar, *lines[:_MOST_LINES], *([Text(f"  and {more} more", style="dim")] if more > 0 else []))


def _quiet_logs() -> None:
    for name in ("mlflow", "alembic", "matplotlib", "asyncio", "aiohttp", "httpx", "urllib3", "nncf", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _escaped(text: str) -> str:
    """Text of models and servers, which must not be taken for markup."""
    from rich.markup import escape

    return escape(text)
