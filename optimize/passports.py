"""Passports of a campaign's variants: issued into its working folder, and checked against files and records."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.reporting import read_campaign
from registry import dsse, passport
from registry.errors import InputError
from registry.keyless import SignerIdentity
from registry.records import Campaign, Variant
from registry.report.table import printable
from registry.store import FolderStore

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

FOLDER = "passports"


def passport_path(work: Path, variant: Variant, *, keyless: bool) -> Path:
    """Where the passport of a variant is kept: a Sigstore bundle has its own ending, as other tools expect."""
    ending = "passport.sigstore.json" if keyless else "passport.json"
    return work / FOLDER / f"{variant.name.replace('/', '-')}.{ending}"


def issue_passport(
    campaign: Campaign,
    wanted: str,
    work: Path,
    *,
    key: Path | None = None,
    keyless: bool = False,
    trust_config: Path | None = None,
    licence: str = "",
) -> Path:
    """Writes ``passports/<variant>.passport.json`` into the working folder, or ``.passport.sigstore.json``.

    Args:
        campaign: the folder's campaign.
        wanted: name or id of a variant.
        work: the working folder, whose store must hold the variant's files unchanged.
        key: PEM file of an Ed25519 key; None for that of the environment variable ``BURNISH_SIGNING_KEY``.
        keyless: sign by an identity instead, as `registry.keyless.sign` does.
        trust_config: of an instance of Sigstore; see `registry.keyless.SignerIdentity`.
        licence: of the model, as its owner states it.

    Raises:
        InputError: there is no such variant, key or identity, or the variant's files are not what the record says.
        MissingExtraError: an identity cannot sign without the extra ``sigstore``.
        UnreachableError: Sigstore did not sign.
    """
    if keyless and key is not None:
        raise InputError("--keyless goes with no --key", hint="Name one of them.")
    if trust_config is not None and not keyless:
        raise InputError("--trust-config is for a signature without a key", hint="Name it with --keyless.")
    variant = find_variant(campaign, wanted)
    signing = None if keyless else dsse.signing_key(key)
    FolderStore(work).path(variant.artifact)
    if signing is None:
        text = passport.issue_keyless(campaign, variant, trust_config=trust_config, licence=licence)
    else:
        text = passport.issue(campaign, variant, signing, licence=licence)
    path = passport_path(work, variant, keyless=keyless)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def named_signer(
    public_key: Path | None, identity: str | None, issuer: str | None, trust_config: Path | None
) -> Path | SignerIdentity | None:
    """Who must have signed, by the options of a command: the file of a public key, or an identity; None for nobody.

    Raises:
        InputError: the options do not go together.
    """
    if identity and issuer:
        if public_key is not None:
            raise InputError("--identity and --issuer go with no --public-key", hint="Check by one, then by the other.")
        return SignerIdentity(identity=identity, issuer=issuer, trust_config=trust_config)
    if identity is not None or issuer is not None:
        raise InputError(
            "--identity and --issuer go together",
            hint="A name proves nothing without who vouched for it: https://accounts.google.com, say.",
        )
    if trust_config is not None:
        raise InputError("--trust-config is for an identity", hint="Name it with --identity and --issuer.")
    return public_key


def resolved_signer(named: Path | SignerIdentity | None) -> "Ed25519PublicKey | SignerIdentity":
    """What a passport is checked by.

    Raises:
        InputError: nothing is named, or the file holds no public key.
    """
    if named is None:
        raise InputError(
            "a passport proves nothing without a key or an identity to check it by",
            hint="Name it with --public-key, or with --identity and --issuer.",
        )
    return dsse.public_key(named) if isinstance(named, Path) else named


def check_passport(
    path: Path, *, signer: Path | SignerIdentity | None, artifact: Path | None, work: Path | None
) -> dict[str, Any]:
    """What a check of a passport found, as plain values.

    Args:
        path: the passport.
        signer: PEM file of the public key, or the identity, that it must be signed by.
        artifact: a folder that must hold the variant's files, or None.
        work: a campaign's working folder, whose record must say the same, or None.

    Raises:
        InputError: no signer is named, or there is no passport, key, folder or campaign where one is named.
    """
    expected = resolved_signer(signer)
    campaign = None if work is None else read_campaign(work)
    checked = passport.check(path, expected, artifact=artifact, campaign=campaign)
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
