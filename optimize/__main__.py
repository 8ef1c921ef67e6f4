"""``python -P -m optimize`` is ``burnish``."""

from optimize.cli import main

main()
