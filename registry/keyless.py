"""Signatures without a key of one's own: an identity instead, which Sigstore certifies for minutes and logs for ever.

A signer shows an identity token of OpenID Connect. A certificate authority (Fulcio) certifies a key made for this one
signature to be that identity's, and a log that anybody can read (Rekor) records it, so that the certificate need not
be valid any more when the signature is checked. All of it is done by the library ``sigstore``, an optional extra; see
https://docs.sigstore.dev and, for the bundle, https://github.com/sigstore/protobuf-specs.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from registry import dsse
from registry.errors import InputError, MissingExtraError, UnreachableError

if TYPE_CHECKING:
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken
    from sigstore.verify import Verifier

TOKEN_VARIABLE: Final = "SIGSTORE_ID_TOKEN"  # noqa: S105
_OTHER_INSTANCE: Final = "For an instance of your own, name its file with --trust-config."


@dataclass(frozen=True, slots=True, kw_only=True)
class SignerIdentity:
    """Who must have signed.

    Attributes:
        identity: as the certificate names it, exactly: an e-mail address, or the URI of a workflow.
        issuer: URL of who vouched for it, exactly.
        trust_config: file with the trust configuration of an instance of Sigstore (``ClientTrustConfig``); None for
            the public one, whose trust root the library fetches and keeps.
    """

    identity: str
    issuer: str
    trust_config: Path | None = None


def sign(payload: bytes, trust_config: Path | None = None) -> str:
    """A Sigstore bundle as JSON text: the payload in an envelope of DSSE, the certificate, the entry of the log.

    The identity is that of the token in the environment variable ``SIGSTORE_ID_TOKEN``, else what the library finds in
    a CI system, else that of whoever logs in by a browser, at a terminal.

    Args:
        payload: a Statement of in-toto, the bytes that are signed.
        trust_config: as in `SignerIdentity`.

    Raises:
        InputError: there is no identity, or its token cannot be used. No message shows the token.
        MissingExtraError: the extra ``sigstore`` is not installed.
        UnreachableError: a service did not answer, or refused.
    """
    _require_library()
    from sigstore.dsse import Statement
    from sigstore.sign import SigningContext

    token = _token_at_hand()
    trust = _trust(trust_config)
    try:
        token = token or _token_by_browser(trust)
        with SigningContext.from_trust_config(trust).signer(token) as signer:
            return signer.sign_dsse(Statement(payload)).to_json() + "\n"
    except Exception as error:  # those of the library's clients have no root in common
        raise UnreachableError(f"Sigstore did not sign: {_said(error)}", hint=_OTHER_INSTANCE) from error


def verify(path: Path, signer: SignerIdentity) -> tuple[dsse.Envelope, str]:
    """The envelope in a bundle, and why it is refused: empty where the signer signed it, and a log says so.

    Raises:
        InputError: there is no such file, or it holds no bundle; or the trust configuration cannot be used.
        MissingExtraError: the extra ``sigstore`` is not installed.
        UnreachableError: the trust root of the public instance cannot be fetched.
    """
    text, envelope = dsse.read_bundle(path)
    _require_library()
    verifier = _verifier(signer.trust_config)
    from sigstore.models import Bundle
    from sigstore.verify.policy import Identity

    policy = Identity(identity=signer.identity, issuer=signer.issuer)
    try:
        verified = verifier.verify_dsse(Bundle.from_json(text), policy)
    except Exception as error:  # whatever stops the library: it was not verified
        return envelope, f"{signer.identity} of {signer.issuer} is not shown to have signed it: {_said(error)}"
    if verified != (envelope.payload_type, envelope.payload):
        return envelope, "what was verified is not what is read here"
    return envelope, ""


def _require_library() -> None:
    try:
        importlib.import_module("sigstore")
    except ImportError as error:
        raise MissingExtraError("A signature without a key", extra="sigstore") from error


def _token_at_hand() -> "IdentityToken | None":
    """The token of the environment, or of a CI system; None where somebody at a terminal can log in."""
    from sigstore.oidc import IdentityError, IdentityToken, detect_credential

    try:
        raw = os.environ.get(TOKEN_VARIABLE) or detect_credential()
        if raw:
            return IdentityToken(raw)
    except IdentityError as error:
        # Not chained: what caused it may hold the token.
        raise InputError(
            f"the identity cannot be used: {error}", hint=f"Is the token in {TOKEN_VARIABLE} one for sigstore, of now?"
        ) from None
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(
            "there is no identity to sign with",
            hint=f"Set {TOKEN_VARIABLE}, allow the CI job an identity token, or log in at a terminal.",
        )
    return None


def _token_by_browser(trust: "ClientTrustConfig") -> "IdentityToken":
    from sigstore.oidc import Issuer

    return Issuer(trust.signing_config.get_oidc_url()).identity_token()


def _trust(path: Path | None) -> "ClientTrustConfig":
    from sigstore.errors import Error
    from sigstore.models import ClientTrustConfig

    if path is None:
        try:
            return ClientTrustConfig.production()
        except (Error, OSError) as error:
            raise UnreachableError(
                f"the trust root of Sigstore cannot be fetched: {_said(error)}", hint=_OTHER_INSTANCE
            ) from error
    try:
        return ClientTrustConfig.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint="Check the path.") from error
    except (Error, ValueError) as error:
        raise _no_trust(path) from error


def _verifier(path: Path | None) -> "Verifier":
    from sigstore.errors import Error
    from sigstore.verify import Verifier

    trust = _trust(path)
    try:
        return Verifier(trusted_root=trust.trusted_root)
    except (Error, ValueError) as error:
        raise _no_trust(path) from error


def _no_trust(path: Path | None) -> InputError:
    where = "what the library keeps" if path is None else str(path)
    return InputError(f"{where} is no trust configuration of Sigstore", hint="It is JSON, a ClientTrustConfig.")


def _said(error: BaseException) -> str:
    """What an error says, or else what caused it."""
    told = str(error)
    if not told and error.__cause__ is not None:
        told = str(error.__cause__)
    return told or type(error).__name__
