"""What commands share: options that behave alike, one JSON document on stdout, progress on stderr."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from optimize.plan import Observer

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
    """An observer of a campaign: a progress bar on a terminal, plain lines elsewhere; logs go the same way."""
    _quiet_logs()
    if not sys.stderr.isatty():
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        yield LineObserver()
        return
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield BarObserver(bar)


class LineObserver:
    """One plain line for each thing that is done."""

    def phase(self, name: str, total: int) -> None:
        """Says that a phase of ``total`` units begins."""
        say(f"{name}: {total}")

    def done(self, subject: str, outcome: str) -> None:
        """Says what became of one unit."""
        say(f"  {subject}: {outcome}")

    def note(self, text: str) -> None:
        """Says something that is no unit of a phase."""
        say(f"  {text}")


class BarObserver:
    """A bar for each phase, with a line above it for each thing that is done."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task: Any = None

    def phase(self, name: str, total: int) -> None:
        """Begins the bar of a phase; the last one's goes."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total)

    def done(self, subject: str, outcome: str) -> None:
        """Moves the bar on, and says what became of one unit."""
        self._bar.console.print(f"[green]·[/] {_escaped(subject)}: {_escaped(outcome)}", highlight=False)
        self._bar.advance(self._task)

    def note(self, text: str) -> None:
        """Says something above the bar."""
        self._bar.console.print(f"[dim]{_escaped(text)}[/]", highlight=False)


def _quiet_logs() -> None:
    for name in ("mlflow", "alembic", "matplotlib", "asyncio", "aiohttp", "httpx", "urllib3", "nncf", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _escaped(text: str) -> str:
    """Text of models and servers, which must not be taken for markup."""
    from rich.markup import escape

    return escape(text)
