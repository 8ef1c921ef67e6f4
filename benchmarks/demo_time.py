"""How long the demo takes in an empty folder, once installed; then how long the second one takes, which reuses all."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import figure, finish, say

LIMIT_S = 240.0


def seconds(folder: str) -> float:
    burnish = str(Path(sys.executable).with_name("burnish"))
    begin = time.perf_counter()
    subprocess.run([burnish, "demo", "--work", str(Path(folder) / "demo")], check=True)
    return time.perf_counter() - begin


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="burnish-demo-") as folder:
        first = seconds(folder)
        again = seconds(folder)
    say(f"first {first:.1f} s, again {again:.1f} s")
    finish(figure("demo_seconds", first, f"<= {LIMIT_S}"), figure("demo_again_ratio", again / first, "<= 0.25"))


if __name__ == "__main__":
    main()
