"""Passports of a campaign's variants: issued into its working folder, and checked against files and records."""

import difflib
from pathlib import Path
from typing import Any

from optimize.reporting import read_campaign
from registry import dsse, passport
from registry.errors import InputError
from registry.records import Campaign, Variant
from registry.report.table import printable
from registry.store import FolderStore

FOLDER = "passports"


def issue_passport(campaign: Campaign, wanted: str, work: Path, *, key: Path | None, licence: str = "") -> Path:
    """Writes ``passports/<variant>.passport.json`` into the working folder.

    Args:
        campaign: the folder's campaign.
        wanted: name or id of a variant.
        work: the working folder, whose store must hold the variant's files unchanged.
        key: PEM file of an Ed25519 key; None for that of the environment variable ``BURNISH_SIGNING_KEY``.
        licence: of the model, as its owner states it.

    Raises:
        InputError: there is no such variant or key, or the variant's files are not what the record says.
    """
    variant = find_variant(campaign, wanted)
    signing = dsse.signing_key(key)
    FolderStore(work).path(variant.artifact)
    text = passport.issue(campaign, variant, signing, licence=licence)
    folder = work / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{variant.name.replace('/', '-')}.passport.json"
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def check_passport(path: Path, *, key: Path | None, artifact: Path | None, work: Path | None) -> dict[str, Any]:
    """What a check of a passport found, as plain values.

    Args:
        path: the passport.
        key: PEM file of the public key that it must be signed with.
        artifact: a folder that must hold the variant's files, or None.
        work: a campaign's working folder, whose record must say the same, or None.

    Raises:
        InputError: no key is named, or there is no passport, key, folder or campaign where one is named.
    """
    if key is None:
        raise InputError("a passport proves nothing without a key to check it by", hint="Name it with --public-key.")
    campaign = None if work is None else read_campaign(work)
    checked = passport.check(path, dsse.public_key(key), artifact=artifact, campaign=campaign)
    predicate = checked.statement["predicate"]
    variant, verdict = predicate.get("variant"), predicate.get("verdict")
    return {
        "passport": str(path),
        "variant": printable(str(variant.get("name"))) if isinstance(variant, dict) else None,
        "verdict": printable(str(verdict.get("sentence"))) if isinstance(verdict, dict) else None,
        "passed": not checked.findings,
        "findings": [printable(finding) for finding in checked.findings],
    }


def find_variant(campaign: Campaign, wanted: str) -> Variant:
    """The variant of this name or id.

    Raises:
        InputError: there is none.
    """
    for variant in campaign.variants:
        if wanted in {variant.name, variant.id}:
            return variant
    names = [variant.name for variant in campaign.variants]
    close = difflib.get_close_matches(wanted, names, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"It has: {', '.join(names)}."
    raise InputError(f"this campaign has no variant {wanted!r}", hint=hint)
