"""How long ``make demo`` takes in an empty working folder, once installed; then a second one, which reuses all.

The demo's working folder in this checkout is moved aside meanwhile, and comes back.
"""

import subprocess
import tempfile
import time
from pathlib import Path

from figures import figure, finish, say

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "burnish-work" / "demo"
STAMP = ROOT / ".venv" / ".installed"


def make_demo() -> float:
    begin = time.perf_counter()
    subprocess.run(["make", "demo"], cwd=ROOT, check=True)
    return time.perf_counter() - begin


def main() -> None:
    subprocess.run(["make", "setup"], cwd=ROOT, check=True)
    installed = STAMP.stat().st_mtime_ns
    with tempfile.TemporaryDirectory(dir=ROOT, prefix="burnish-work-") as aside:
        kept = Path(aside) / "demo"
        if WORK.exists():
            WORK.rename(kept)
        try:
            first = make_demo()
            again = make_demo()
        finally:
            if kept.exists():
                WORK.rename(Path(aside) / "measured")
                kept.rename(WORK)
    reinstalled = STAMP.stat().st_mtime_ns != installed
    say(f"first {first:.1f} s, again {again:.1f} s, installed again: {reinstalled}")
    finish(
        figure("demo_seconds", first, "<= 240"),
        figure("demo_again_ratio", again / first, "<= 0.25"),
        figure("demo_reinstalls", float(reinstalled), "<= 0"),
    )


if __name__ == "__main__":
    main()
