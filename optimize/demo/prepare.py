"""Lays out a working folder: the demo's, or a newcomer's first campaign file."""

from importlib.resources import files
from pathlib import Path

from optimize.endpoints import make_folder
from registry.errors import InputError


def prepare_demo(folder: Path) -> Path:
    """The demo's campaign file in ``folder``, with its samples beside it; what is there already stays.

    Raises:
        InputError: the folder cannot be made.
        MissingExtraError: torch is not installed.
    """
    make_folder(folder, "--work")
    from optimize.demo.digits import write_samples

    write_samples(folder / "data")
    return _write(folder / "campaign.yaml", "campaign.yaml")


def write_template(folder: Path) -> Path:
    """A commented campaign file in ``folder``.

    Raises:
        InputError: there is one already, or the folder cannot be made.
    """
    path = folder / "campaign.yaml"
    if path.exists():
        raise InputError(f"{path} is there already", hint="Name another folder, or remove it first.")
    make_folder(folder, "the folder")
    return _write(path, "template.yaml")


def _write(path: Path, shipped: str) -> Path:
    path.write_text(files("optimize.demo").joinpath(shipped).read_text(encoding="utf-8"), encoding="utf-8")
    return path
