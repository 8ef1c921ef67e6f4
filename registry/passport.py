"""A variant's passport: what it is, what it was made from, how it was judged; signed, and checked.

It is a Statement of in-toto (https://github.com/in-toto/attestation, version 1) about the variant's files, in a signed
envelope (`registry.dsse`). The payload is canonical JSON: keys sorted by code point, no spaces, UTF-8, no key twice, no
NaN. A float is written with the fewest digits that give the same double back, and always with a point or an exponent;
an integer has neither. What is signed are these bytes, so that a check does not depend on how numbers are read.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry import codec, dsse, keyless
from registry.errors import InputError
from registry.records import Campaign, Candidate, Rejection, Source, Variant

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:burnish:passport:v1"
# Depend on what is installed where the passport is issued, not on the campaign alone.
_OF_ISSUER: Final = frozenset({"licences", "sbom", "digests"})
_MOST_TOLD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What came of checking a passport.

    Attributes:
        statement: what it says; not to be trusted where there are findings.
        findings: what is wrong, a sentence each.
    """

    statement: Mapping[str, Any]
    findings: tuple[str, ...]


# --- issuing ---------------------------------------------------------------------------------------------------


def statement(campaign: Campaign, variant: Variant, *, licence: str = "") -> dict[str, Any]:
    """What the passport of a variant says, as plain values.

    Args:
        campaign: that made and judged it.
        variant: one of the campaign's.
        licence: of the model, as its owner states it.
    """
    from registry.sbom import bill_of_materials, stated_licences

    source = _source(campaign, variant)
    predicate = _predicate(campaign, variant, source)
    predicate["licences"] = {"model": licence or "not stated", "packages": stated_licences(campaign.versions)}
    predicate["sbom"] = bill_of_materials(campaign, variant, source)
    predicate["digests"] = {name: _digest(part) for name, part in predicate.items()}
    return _about(variant, predicate)


def issue(campaign: Campaign, variant: Variant, key: "Ed25519PrivateKey", *, licence: str = "") -> str:
    """The passport of a variant, signed, as text for a file; the arguments are those of `statement`."""
    return dsse.sign(_bytes(statement(campaign, variant, licence=licence)), PAYLOAD_TYPE, key)


def issue_keyless(campaign: Campaign, variant: Variant, *, trust_config: Path | None = None, licence: str = "") -> str:
    """The passport of a variant, signed by an identity; see `registry.keyless.sign`, and `statement`."""
    return keyless.sign(_bytes(statement(campaign, variant, licence=licence)), trust_config)


def _about(variant: Variant, predicate: Mapping[str, Any]) -> dict[str, Any]:
    subject = [{"name": file.path, "digest": {"sha256": file.sha256}} for file in variant.artifact.files]
    return {
        "_type": STATEMENT_TYPE,
        "subject": subject,
        "predicateType": PREDICATE_TYPE,
        "predicate": dict(predicate),
    }


def _predicate(campaign: Campaign, variant: Variant, source: Source) -> dict[str, Any]:
    """What the campaign alone says."""
    verdict = campaign.verdict
    of_variant = [one for one in campaign.candidates if one.variant_id == variant.id]
    return {
        "campaign": {
            "id": campaign.id,
            "name": campaign.name,
            "model": campaign.model_name,
            "level": campaign.level,
            "seed": campaign.seed,
            "started_at": campaign.started_at,
        },
        "source": codec.to_jsonable(source),
        "variant": codec.to_jsonable(variant),
        "data": {
            "evaluation": {"name": campaign.samples_name, "digest": campaign.samples_digest},
            "calibration": {"digest": variant.calibration_digest},
            "task_metric": campaign.task_metric,
        },
        "fidelities": [codec.to_jsonable(one) for one in campaign.fidelities if one.variant_id == variant.id],
        "candidates": [_candidate(campaign, candidate) for candidate in of_variant],
        "host": codec.to_jsonable(campaign.host),
        "versions": dict(campaign.versions),
        "verdict": {
            "policy": codec.to_jsonable(verdict.policy),
            "baseline": verdict.baseline,
            "selected": verdict.selected,
            "sentence": verdict.sentence,
            "provisional": verdict.provisional,
        },
    }


def _candidate(campaign: Campaign, candidate: Candidate) -> dict[str, Any]:
    rejection: Rejection | None = next(
        (one for one in campaign.verdict.rejections if one.candidate_id == candidate.id), None
    )
    rendered = campaign.rendered.get(candidate.id, {})
    return {
        "candidate": codec.to_jsonable(candidate),
        "selected": candidate.id == campaign.verdict.selected,
        "rejection": None if rejection is None else codec.to_jsonable(rejection),
        "measurements": [codec.to_jsonable(one) for one in campaign.measurements if one.candidate_id == candidate.id],
        "comparisons": [codec.to_jsonable(one) for one in campaign.comparisons if one.candidate_id == candidate.id],
        "rendered": {path: hashlib.sha256(text.encode()).hexdigest() for path, text in rendered.items()},
    }


def _source(campaign: Campaign, variant: Variant) -> Source:
    for source in campaign.sources:
        if source.name == variant.source:
            return source
    raise InputError(f"the campaign's record does not hold the source {variant.source!r} of {variant.name}")


# --- checking --------------------------------------------------------------------------------------------------


def check(
    path: Path,
    signer: "Ed25519PublicKey | keyless.SignerIdentity",
    *,
    artifact: Path | None = None,
    campaign: Campaign | None = None,
) -> Checked:
    """Whether a passport is genuine, and whether files and records are what it says.

    Args:
        path: the passport.
        signer: the key or the identity that it must be signed by.
        artifact: a folder that must hold the variant's files, and nothing else.
        campaign: a record that must say the same.

    Raises:
        InputError: there is no passport at the path, or none that is signed in this way.
        MissingExtraError: an identity cannot be checked without the extra ``sigstore``.
        UnreachableError: what it is checked by cannot be fetched.
    """
    if isinstance(signer, keyless.SignerIdentity):
        envelope, refusal = keyless.verify(path, signer)
    else:
        envelope = dsse.read_envelope(path)
        refusal = "" if dsse.fits(envelope, signer) else _forged(envelope, signer)
    found, findings = _read(path, envelope)
    if refusal:
        findings = [refusal, *findings, *_changed_parts(found)]
    if artifact is not None:
        findings += _check_files(found, artifact)
    if campaign is not None:
        findings += _check_record(found, campaign)
    return Checked(statement=found, findings=tuple(findings))


def _read(path: Path, envelope: dsse.Envelope) -> tuple[dict[str, Any], list[str]]:
    """The statement, and what is wrong with its form."""
    try:
        content = dsse.parse_json(envelope.payload)
        as_written = _bytes(content)
    except ValueError as error:
        raise InputError(f"{path} holds no statement ({error})", hint="It was damaged.") from error
    if not isinstance(content, dict) or not isinstance(content.get("predicate"), dict):
        raise InputError(f"{path} holds no statement about a variant", hint="Is it another file?")
    wanted = {"_type": STATEMENT_TYPE, "predicateType": PREDICATE_TYPE}
    findings = [
        f"its {name} is {content.get(name)!r}, not {value!r}"
        for name, value in wanted.items()
        if content.get(name) != value
    ]
    if envelope.payload_type != PAYLOAD_TYPE:
        findings.append(f"its payload is of the type {envelope.payload_type!r}, not {PAYLOAD_TYPE!r}")
    if as_written != envelope.payload:
        findings.append("its payload is not canonical JSON, so burnish did not write it")
    return content, findings


def _forged(envelope: dsse.Envelope, key: "Ed25519PublicKey") -> str:
    wanted = dsse.key_id(key)
    names = [name for name, _ in envelope.signatures]
    if wanted in names:
        return f"the signature by key {wanted[:16]} does not fit: something was changed after it was signed"
    listed = ", ".join(name[:16] for name in names) or "nobody"
    return f"it is signed by {listed}, not by key {wanted[:16]}"


def _changed_parts(content: Mapping[str, Any]) -> list[str]:
    """The parts that no longer have the digest that stands beside them: where something was changed by hand."""
    predicate = content["predicate"]
    digests = predicate.get("digests")
    if not isinstance(digests, dict):
        return ["predicate.digests is missing"]
    names = sorted((predicate.keys() - {"digests"}) | digests.keys())
    return [
        f"predicate.{name} is not what was written there first"
        for name in names
        if name not in predicate or digests.get(name) != _digest(predicate[name])
    ]


def _check_files(content: Mapping[str, Any], folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", hint="Name the one that holds the variant's files.")
    try:
        wanted = {str(one["name"]): str(one["digest"]["sha256"]) for one in content["subject"]}
    except (KeyError, TypeError):
        return ["its subject does not name files and their digests"]
    # A link may lead to anything at any time, so that it is no file of an artifact.
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    findings = [f"{name} is not in {folder}" for name in sorted(wanted.keys() - here.keys())]
    findings += [f"{name} in {folder} is none of the variant's files" for name in sorted(here.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & here.keys()):
        if here[name].is_symlink() or not here[name].is_file():
            findings.append(f"{here[name]} is no regular file")
        elif (digest := codec.file_sha256(here[name])) != wanted[name]:
            findings.append(f"{here[name]} has the SHA-256 {digest[:16]}…, not {wanted[name][:16]}…: it was changed")
    return findings


def _check_record(content: Mapping[str, Any], campaign: Campaign) -> list[str]:
    """Where the passport says something else than the campaign's record, the number itself included."""
    predicate = content["predicate"]
    told = predicate.get("variant")
    identity = told.get("id") if isinstance(told, dict) else None
    variant = next((one for one in campaign.variants if one.id == identity), None)
    if variant is None:
        return [f"the campaign {campaign.name} has no variant of the id {identity!r}"]
    recorded = _about(variant, _predicate(campaign, variant, _source(campaign, variant)))
    claimed = {**content, "predicate": {name: part for name, part in predicate.items() if name not in _OF_ISSUER}}
    differences = list(_differences("", claimed, recorded))
    more = len(differences) - _MOST_TOLD
    return differences[:_MOST_TOLD] + ([f"and {more} more differences from the record"] if more > 0 else [])


def _differences(path: str, claimed: Any, recorded: Any) -> Iterator[str]:
    if isinstance(claimed, dict) and isinstance(recorded, dict):
        # Records of a later burnish may have more fields; that one was taken out of a passport, its signature tells.
        for name in sorted(claimed):
            yield from _differences(f"{path}.{name}", claimed[name], recorded.get(name))
    elif isinstance(claimed, list) and isinstance(recorded, list) and len(claimed) == len(recorded):
        for number, (one, other) in enumerate(zip(claimed, recorded, strict=True)):
            yield from _differences(f"{path}[{number}]", one, other)
    elif codec.canonical(claimed) != codec.canonical(recorded):
        where = path.removeprefix(".")
        yield f"{where} is {_shown(claimed)} in the passport, and {_shown(recorded)} in the campaign's record"


def _shown(value: Any) -> str:
    text = codec.canonical(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(part: Any) -> str:
    return hashlib.sha256(_bytes(part)).hexdigest()


def _bytes(content: Any) -> bytes:
    return codec.canonical(content).encode()
