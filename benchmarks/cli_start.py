"""How long ``burnish --help`` takes, against ``python -c "import typer"``: pairs in turn, so that noise hits both."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from figures import figure, finish, say

PAIRS = 15


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    burnish = [str(Path(sys.executable).with_name("burnish")), "--help"]
    typer = [sys.executable, "-c", "import typer"]
    for command in (burnish, typer):  # files into the page cache, bytecode onto the disk
        seconds(command)
    pairs = [(seconds(burnish), seconds(typer)) for _ in range(PAIRS)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    say(f"burnish --help {ours * 1000:.0f} ms, import typer {theirs * 1000:.0f} ms (medians of {PAIRS})")
    finish(figure("cli_start_ratio", statistics.median(a / b for a, b in pairs), "<= 2.0"))


if __name__ == "__main__":
    main()
