"""Many models, each with a campaign of its own: the file, the queue, the processes, and what became of them."""

from pathlib import Path

JOURNAL = "fleet.jsonl"
"""Name of the file in a fleet's working folder that tells of all its attempts."""
MODELS = "models"
"""Folder of the models' working folders, in the fleet's."""


def is_fleet(work: Path) -> bool:
    """Whether a folder is the working folder of a fleet."""
    return (work / JOURNAL).is_file()
