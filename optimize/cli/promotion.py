"""What `promote` and `pipeline promote` share: options that behave alike, and how both tell what was done."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimize.cli.endings import Terminated, terminable
from optimize.cli.output import emit_json, say

if TYPE_CHECKING:
    from optimize.production import Place
    from optimize.promoting import BasePromoting

ApplyOption = Annotated[bool, typer.Option("--apply", help="Do it; without, the plan is shown and nothing changes.")]
WeightsOption = Annotated[str, typer.Option(help="Percent of the requests, step by step.")]
MirrorOption = Annotated[int, typer.Option(help="Percent of the requests to copy before; 0 for none.")]
WatchOption = Annotated[float, typer.Option(help="Seconds that each step is watched; 0 for not at all.")]
RateOption = Annotated[float, typer.Option(help="Requests a second of our own while watching.")]
MatchersOption = Annotated[str, typer.Option(help='More matchers for it: namespace="seldon".')]
ScrapeOption = Annotated[float, typer.Option(help="How often it asks, in seconds.")]
WEIGHTS, MIRROR, WATCH_S, RATE_RPS, SCRAPE_S = "10,50,100", 100, 60.0, 25.0, 15.0
"""What these options are where they are not given."""


def percentages(text: str) -> tuple[int, ...]:
    """The numbers of ``--weights``.

    Raises:
        InputError: they are no whole numbers with commas between.
    """
    from registry.errors import InputError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"the weights are {text!r}", hint="They are percentages with commas between: 10,50,100.")
    return tuple(map(int, parts))


def run_promotion(
    promoting: "BasePromoting",
    *,
    apply: bool,
    work: Path,
    back: str,
    json_output: bool,
    hold: "Callable[[Place], None]" = lambda _: None,
) -> None:
    """Shows the plan of a promotion, or carries it out and tells what was done.

    Args:
        promoting: what is promoted, and how.
        apply: whether it is carried out.
        work: the working folder.
        back: the command that takes it back.
        json_output: whether stdout takes one JSON document.
        hold: as `optimize.promoting.BasePromoting.apply` takes it.
    """
    if not apply:
        planned = promoting.plan()
        emit_json(planned.summary()) if json_output else typer.echo("\n".join(planned.lines()))
        if not json_output:
            say("Nothing was changed; --apply does it.")
        return
    with told_how_things_stand(work, back):
        planned = promoting.apply(hold=hold)
    done = planned.promotion
    if json_output:
        emit_json(planned.summary())
    else:
        typer.echo(f"{done.candidate_name} is the champion of {done.model}: version {done.version}, {done.production}.")
        say(f"Back to what was: {back}")


def way_back(work: Path, cluster: Path | None, campaign: Path | None) -> str:
    """The command that takes back what was promoted from a folder."""
    where = ["--cluster", str(cluster)] if cluster else ["--campaign", str(campaign)] if campaign else []
    return shlex.join(["burnish", "rollback", str(work), *where])


@contextmanager
def told_how_things_stand(work: Path, back: str) -> Iterator[None]:
    """Whoever ends the command by Ctrl-C or SIGTERM is told how things stand, and what goes on or back."""
    from optimize.rollback import after_interruption
    from registry.errors import InterruptedCampaignError

    try:
        with terminable():
            yield
    except (KeyboardInterrupt, Terminated) as ending:
        stands, hint = after_interruption(work, back)
        code = 143 if isinstance(ending, Terminated) else 130
        raise InterruptedCampaignError(f"Interrupted. {stands}", hint=hint, exit_code=code) from None
