"""Signed envelopes: Ed25519 over canonical JSON, in the form of DSSE that other tools of the supply chain read.

The form is that of https://github.com/secure-systems-lab/dsse (protocol and envelope, version 1.0): the signature is
over the type and the very bytes of the payload, so that it does not depend on how a reader understands them.
"""

import base64
import binascii
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry import codec
from registry.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_VARIABLE: Final = "BURNISH_SIGNING_KEY"
_MOST_BYTES = 50_000_000
_IN_BUNDLE = "dsseEnvelope"
_HOW_TO_MAKE = "Make one with: openssl genpkey -algorithm ed25519 -out key.pem"
_HOW_TO_SHOW = "Take it from the key with: openssl pkey -in key.pem -pubout -out key.pub.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What was signed, and the signatures; nothing of it is to be trusted before `fits` says so.

    Attributes:
        payload_type: the media type of the payload.
        payload: the bytes that were signed.
        signatures: (name of the key, signature), as the envelope has them.
    """

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]


def sign(payload: bytes, payload_type: str, key: "Ed25519PrivateKey") -> str:
    """The envelope as JSON text; the same text for the same payload and key (Ed25519 draws no random numbers)."""
    signature = key.sign(_authenticated(payload_type, payload))
    content = {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    return codec.canonical(content) + "\n"


def read_envelope(path: Path) -> Envelope:
    """The envelope in a file.

    Raises:
        InputError: there is no such file, or it holds none.
    """
    content = _parsed(path, _read(path))
    if isinstance(content, dict) and _IN_BUNDLE in content:
        raise InputError(f"{path} was signed without a key", hint="Check it by --identity and --issuer.")
    return _envelope(path, content)


def read_bundle(path: Path) -> tuple[bytes, Envelope]:
    """The bytes of a Sigstore bundle, and the envelope in it.

    Raises:
        InputError: there is no such file, or it holds none.
    """
    text = _read(path)
    content = _parsed(path, text)
    if not isinstance(content, dict) or _IN_BUNDLE not in content:
        raise InputError(
            f"{path} holds no Sigstore bundle with an envelope", hint="Was it signed with a key? Name --public-key."
        )
    return text, _envelope(path, content[_IN_BUNDLE])


def fits(envelope: Envelope, key: "Ed25519PublicKey") -> bool:
    """Whether one of the signatures is by this key, over this type and payload."""
    from cryptography.exceptions import InvalidSignature

    message = _authenticated(envelope.payload_type, envelope.payload)
    for _, signature in envelope.signatures:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            continue
        return True
    return False


def key_id(key: "Ed25519PublicKey") -> str:
    """The name of a key: SHA-256 (hex) of its DER form."""
    from cryptography.hazmat.primitives import serialization

    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def signing_key(path: Path | None, environment: Mapping[str, str] = os.environ) -> "Ed25519PrivateKey":
    """The private key of a PEM file, or of the environment variable ``BURNISH_SIGNING_KEY``.

    Raises:
        InputError: there is none, or it is no Ed25519 key without a password. No message shows what it holds.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    where = f"the variable {KEY_VARIABLE}" if path is None else str(path)
    pem = environment.get(KEY_VARIABLE, "").encode() if path is None else _read_key(path)
    if not pem.strip():
        raise InputError("there is no key to sign with", hint=f"Name a file, or set {KEY_VARIABLE}. {_HOW_TO_MAKE}")
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise InputError(
            f"the key in {where} is protected by a password",
            hint=f"Give it decrypted, in {KEY_VARIABLE} say: openssl pkey -in key.pem",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{where} holds no private key in PEM form", hint=_HOW_TO_MAKE) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"the key in {where} is not an Ed25519 key", hint=_HOW_TO_MAKE)
    return key


def public_key(path: Path) -> "Ed25519PublicKey":
    """The public key of a PEM file.

    Raises:
        InputError: there is none, or it is no Ed25519 key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    pem = _read_key(path)
    if b"PRIVATE KEY" in pem:
        raise InputError(f"{path} holds a private key, which a check has no need of", hint=_HOW_TO_SHOW)
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{path} holds no public key in PEM form", hint=_HOW_TO_SHOW) from None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"the key in {path} is not an Ed25519 key", hint=_HOW_TO_SHOW)
    return key


def parse_json(text: bytes) -> Any:
    """Plain values of JSON in which no key stands twice.

    Raises:
        ValueError: it is no such JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refused, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path} is larger than {_MOST_BYTES} bytes; is it the right file?")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint="Check the path.") from error


def _parsed(path: Path, text: bytes) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise _no_envelope(path, error) from error


def _envelope(path: Path, content: Any) -> Envelope:
    try:
        payload, signatures = _decoded(content["payload"]), content["signatures"]
        found = tuple((str(one.get("keyid", "")), _decoded(one["sig"])) for one in signatures)
        return Envelope(payload_type=str(content["payloadType"]), payload=payload, signatures=found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_envelope(path, error) from error


def _no_envelope(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} holds no signed envelope ({error})", hint="It was damaged, or is another file.")


def _authenticated(payload_type: str, payload: bytes) -> bytes:
    """The pre-authentication encoding of DSSE, which is what the signature is over."""
    kind = payload_type.encode()
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str):
        raise TypeError("a payload and a signature are text in base64")
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the key {path} cannot be read: {error.strerror}", hint="Check the path.") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice")
    return content


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number
