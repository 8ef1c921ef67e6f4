"""Runs every benchmark of this folder in turn and prints the figures once more at the end."""

import subprocess
import sys
from pathlib import Path

from figures import end_on_sigterm

HERE = Path(__file__).resolve().parent
NOT_BENCHMARKS = {"figures.py", "others.py", "run_all.py", "tasks.py", "resnet18.py", "load_peers.py", "null_triton.py"}


def main() -> None:
    end_on_sigterm()
    figures, worst = [], 0
    for script in sorted(HERE.glob("*.py")):
        if script.name in NOT_BENCHMARKS:
            continue
        sys.stdout.write(f"== {script.name}\n")
        sys.stdout.flush()
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
            try:
                for line in process.stdout or ():
                    sys.stdout.write(line)
                    figures += [line] if line.startswith("FIGURE ") else []
            except BaseException:
                process.terminate()
                raise
        worst = max(worst, process.returncode)
    sys.stdout.write("\n" + "".join(figures))
    sys.exit(worst)


if __name__ == "__main__":
    main()
