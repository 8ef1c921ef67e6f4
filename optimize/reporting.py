"""Where a campaign's outcome goes: its working folder, the terminal, the page, MLflow."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from registry import codec
from registry.errors import InputError, UnreachableError
from registry.full_disk import full_disk_error
from registry.ports import Published, Tracker
from registry.records import Campaign
from registry.tracking import holds_secret, open_tracker, redact

RECORD = "campaign.json"
PAGE = "report.html"
PICTURES = "pictures"
"""Folder beside the page with its pictures as PNG files."""
# The names that pictures of a report may have, see `registry.report.pictures`.
_OWN_PICTURES = ("waterfall.png", "pareto.png", "latency.png", "throughput.png", "spectrum*.png", "surface-*.png")
_STORE = "tracking-uri"  # only where the campaign file names a store


def write_campaign(campaign: Campaign, work: Path) -> Path:
    """Writes the campaign's record into its working folder, whole or not at all."""
    return _write(work / RECORD, codec.dumps(campaign))


def read_campaign(work: Path) -> Campaign:
    """The record of the last campaign in a working folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = work / RECORD
    if not path.is_file():
        raise InputError(
            f"no finished campaign in {work}", hint="Run `burnish run CAMPAIGN` first, or name its --work."
        )
    record = codec.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, Campaign):
        raise InputError(f"{path} holds a {type(record).__name__}, not a campaign")
    return record


def begun(work: Path, campaign_id: str) -> str | None:
    """When the campaign of this id began, if the working folder holds its record."""
    with contextlib.suppress(InputError):
        campaign = read_campaign(work)
        return campaign.started_at if campaign.id == campaign_id else None
    return None


def write_report(campaign: Campaign, work: Path) -> Path:
    """Writes the page into the working folder, whole or not at all, and its pictures as PNG files into a folder."""
    from registry.report.html import render_html
    from registry.report.pictures import png_files

    write_pictures(png_files(campaign), work / PICTURES)
    return _write(work / PAGE, render_html(campaign))


def write_pictures(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Writes PNG files into a folder and removes those of an earlier report that are not among them.

    Raises:
        InputError: the folder cannot be made or written.
        StorageError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        for old in _OWN_PICTURES:
            for path in folder.glob(old):
                if path.name not in files:
                    path.unlink()
    except OSError as error:
        if (full := full_disk_error(error)) is not None:
            raise full from error
        raise InputError(f"no pictures can be written into {folder}: {error.strerror or error}") from error
    return [folder / name for name in files]


def files_of(work: Path) -> dict[str, Path]:
    """Name -> file of a written report: the page, and its pictures below ``pictures/``."""
    pictures = sorted((work / PICTURES).glob("*.png"))
    return {PAGE: work / PAGE, **{f"{PICTURES}/{path.name}": path for path in pictures}}


def as_markdown(campaign: Campaign) -> str:
    """The report as Markdown."""
    from registry.report.markdown import render_markdown

    return render_markdown(campaign)


def publish(campaign: Campaign, work: Path) -> Published:
    """Records the campaign, its page and its pictures in the tracking store that `use_tracker` chose.

    Raises:
        UnreachableError: the tracking store does not answer, refuses or is full; nothing is lost, the working folder
            holds it all.
    """
    try:
        return _tracker(work).publish(campaign, files=files_of(work))
    except UnreachableError as error:
        later = f"Nothing is lost: `burnish report {work} --sync` sends it later."
        raise UnreachableError(error.message, hint=f"{error.hint or ''} {later}".strip()) from error


def use_tracker(uri: str | None, work: Path) -> None:
    """Has `publish` record in this store, now and whenever the working folder is reported on again.

    Raises:
        InputError: the URI holds a secret, which would be kept in the working folder.
        UnreachableError: the store does not answer, or refuses.
    """
    if uri is not None and holds_secret(uri):
        raise InputError(
            f"the tracking store {redact(uri)} is named with its credentials, which would be kept in {work}",
            hint="Set MLFLOW_TRACKING_URI instead, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN (PGPASSWORD for a PostgreSQL).",
        )
    place = work / _STORE
    if uri is None:
        place.unlink(missing_ok=True)
    else:
        _write(place, uri)
    _tracker(work).check()


def named_store(work: Path) -> str | None:
    """The tracking store that the working folder's campaign names; None for the usual one."""
    place = work / _STORE
    return place.read_text(encoding="utf-8") if place.is_file() else None


def _tracker(work: Path) -> Tracker:
    return open_tracker(named_store(work), work)


def show(campaign: Campaign, page: Path, published: Published | None) -> None:
    """Prints the report in the terminal, and where the rest is."""
    from rich.console import Console

    from registry.report.terminal import render_terminal

    console = Console()
    render_terminal(campaign, console)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    if published is not None:
        version = f", version {published.model_version} of {campaign.model_name!r}" if published.model_version else ""
        console.print(f"MLflow: {published.location}{version}", highlight=False, soft_wrap=True)


def summary(campaign: Campaign, page: Path, published: Published | None) -> dict[str, Any]:
    """What a script wants to know of a campaign: the verdict, and where everything is."""
    from registry.report.champions import champion_sentence

    names = {candidate.id: candidate.name for candidate in campaign.candidates}
    selected, champion = campaign.verdict.selected, campaign.champion
    return {
        "campaign_id": campaign.id,
        "selected": names.get(selected) if selected else None,
        "provisional": campaign.verdict.provisional,
        "sentence": campaign.verdict.sentence,
        "cut_short": campaign.verdict.cut_short,
        "champion": None if champion is None else names.get(champion.candidate_id or ""),
        "against_champion": champion_sentence(campaign),
        "report": str(page),
        "mlflow": None if published is None else _plain(published),
    }


def _plain(published: Published) -> dict[str, Any]:
    return {
        "location": published.location,
        "runs": dict(published.runs),
        "model_version": published.model_version,
    }


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
