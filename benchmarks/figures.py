"""How a benchmark says what it found: a line ``FIGURE name value goal``, and exit status 1 where the goal is missed."""

import signal
import sys

_COMPARE = {"<=": float.__le__, ">=": float.__ge__, ">": float.__gt__}


def figure(name: str, value: float, goal: str) -> bool:
    """Prints the figure and returns whether it meets its goal (``<= 2.0`` or ``>= 2.0``)."""
    op, limit = goal.split()
    met = _COMPARE[op](float(value), float(limit))
    sys.stdout.write(f"FIGURE {name} {value:.4g} {op}{limit}{'' if met else '  MISSED'}\n")
    sys.stdout.flush()
    return met


def finish(*met: bool) -> None:
    """Ends the benchmark with status 0 where every goal was met, else 1."""
    sys.exit(0 if all(met) else 1)


def say(text: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def end_on_sigterm() -> None:
    """Has SIGTERM end a benchmark as Ctrl-C does, with the servers and processes that it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
