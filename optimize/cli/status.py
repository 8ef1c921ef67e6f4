"""``burnish status``: how a campaign is, from another shell."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from optimize.cli.output import Json, emit_json

_LIVE = ("running", "unseen")
_EVERY_S = 1.0
_PLAIN_EVERY_S = 10.0
_CLOCKS = frozenset({"silent_s", "took_s", "for_s", "left_s", "updated"})


def status(
    work: Annotated[Path, typer.Argument(help="The working folder of a campaign, or of a fleet.")] = Path(
        "burnish-work"
    ),
    follow: Annotated[bool, typer.Option("--follow", help="Go on telling until it ends.")] = False,
    json_output: Json = False,
) -> None:
    """Say how the last run in a working folder is: what runs, what is done, what failed, how long it may take.

    Nothing is changed by it. With --follow and --json there is one document a line, one for each change.

    Example: burnish status burnish-work --follow
    """
    if not follow:
        found = next(_looks(work))
        emit_json(found) if json_output else typer.echo(_text(found))
    elif json_output:
        _follow_as_lines(work)
    else:
        _follow(work)


def _looks(work: Path) -> Iterator[dict[str, Any]]:
    """The status, again and again until the run is over."""
    from optimize.status import read_status

    while True:
        found = read_status(work)
        yield found
        if found["state"] not in _LIVE:
            return
        time.sleep(_EVERY_S)


def _follow_as_lines(work: Path) -> None:
    import json

    last = None
    for found in _looks(work):
        if (what := _without_clocks(found)) != last:
            typer.echo(json.dumps(found, ensure_ascii=False))
            last = what


def _without_clocks(value: Any) -> Any:
    """A status without what changes by itself."""
    if isinstance(value, dict):
        return {name: _without_clocks(one) for name, one in value.items() if name not in _CLOCKS}
    return [_without_clocks(one) for one in value] if isinstance(value, list) else value


def _follow(work: Path) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        last, told = None, 0.0
        for found in _looks(work):
            if (what := _without_clocks(found)) != last and (last is None or time.monotonic() - told > _PLAIN_EVERY_S):
                typer.echo(_text(found))
                last, told = what, time.monotonic()
        if what != last:
            typer.echo(_text(found))
        return
    with Live(Text(""), console=console) as live:
        for found in _looks(work):
            live.update(Text(_text(found)))


def _text(found: dict[str, Any]) -> str:
    return "\n".join([*_head(found), *_now(found), *_before(found), *_outcome(found), *_models(found)])


def _head(found: dict[str, Any]) -> list[str]:
    from optimize.progress import duration

    who = f"pid {found['pid']} on {found['host']}"
    told = {
        "running": f"runs for {duration(found['took_s'])} ({who})",
        "unseen": f"runs elsewhere ({who}), and gave its last sign of life {duration(found['silent_s'])} ago",
        "killed": f"was killed after {duration(found['took_s'])} ({who} is gone)",
        "interrupted": f"was interrupted after {duration(found['took_s'])}",
        "failed": f"failed after {duration(found['took_s'])}",
        "done": f"is done, after {duration(found['took_s'])}",
    }[found["state"]]
    lines = [f"{found['campaign']} ({found['level']}) in {found['work']} {told}"]
    if found["budget"] is not None:
        lines.append(f"  its budget of {found['budget']['minutes']:g} minutes ends at {found['budget']['ends']}")
    return lines


def _now(found: dict[str, Any]) -> list[str]:
    from optimize.progress import duration, remaining

    phase = found["phase"]
    if phase is None:
        return []
    left = f", {remaining(phase['left_s'])}" if found["state"] in _LIVE else ""
    failed = f", {phase['failed']} failed" if phase["failed"] else ""
    now = [f"  now: {one['words']}, for {duration(one['for_s'])}" for one in found["running"]]
    return [f"{phase['name']}: {phase['done']} of {phase['total']}{failed}{left}", *now]


def _before(found: dict[str, Any]) -> list[str]:
    past = [f"{one['name']} {one['done']}" for one in found["past"]]
    lines = [f"Before: {', '.join(past)}"] if past else []
    if found["failures"]:
        shown, failed = len(found["failures"]), found["failed"]
        of = f" (the last {shown} of {failed})" if failed > shown else ""
        lines.append(f"Failed{of}:")
        lines += [f"  {one['subject']} ({one['phase']}): {one['reason']}" for one in found["failures"]]
    return lines


def _outcome(found: dict[str, Any]) -> list[str]:
    lines = [found["message"]] if found["message"] else []
    lines += [found["hint"]] if found["hint"] else []
    if found["verdict"] is not None:
        lines.append(found["verdict"]["sentence"])
    if found["resumable"]:
        cut = found["verdict"] is not None and found["verdict"]["cut_short"] and found["state"] == "done"
        lines.append(f"The same command{' with more minutes' if cut else ''} goes on where it stopped.")
    return lines


def _models(found: dict[str, Any]) -> list[str]:
    """The campaigns of a fleet that are not done, and how many are."""
    done = sum(one["state"] == "done" for one in found["models"])
    lines = [f"{done} of {len(found['models'])} models that were begun are done."] if found["models"] else []
    for one in found["models"]:
        if one["state"] != "done":
            phase = one["phase"]
            lines.append(f"  {one['model']}: {one['state']}, {phase['name']} {phase['done']}/{phase['total']}")
    return lines
