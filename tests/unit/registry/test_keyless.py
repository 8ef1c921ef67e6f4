"""Signatures without a key, by the library's own requests and checks, against doubles of Sigstore's services."""

import base64
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sigstore.models
import sigstore.oidc

from registry import keyless
from registry.codec import canonical
from registry.errors import InputError, MissingExtraError, UnreachableError
from registry.keyless import SignerIdentity
from tests.doubles.sigstore_services import IDENTITY, ISSUER, Sigstore, serve_sigstore, token

STATEMENT = {
    "_type": "https://in-toto.io/Statement/v1",
    "subject": [{"name": "model.onnx", "digest": {"sha256": "0" * 64}}],
    "predicateType": "urn:burnish:passport:v1",
    "predicate": {"accuracy": 0.97},
}
PAYLOAD = canonical(STATEMENT).encode()


class Signed:
    """A statement that was signed by a token of the environment."""

    def __init__(self, services: Sigstore, trust: Path) -> None:
        self.services, self.trust = services, trust
        self.path = trust.with_name("statement.sigstore.json")
        self.path.write_text(keyless.sign(PAYLOAD, trust))

    def refusal(self, identity: str = IDENTITY, issuer: str = ISSUER, trust: Path | None = None) -> str:
        signer = SignerIdentity(identity=identity, issuer=issuer, trust_config=trust or self.trust)
        return keyless.verify(self.path, signer)[1]

    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path.read_text())
        return content


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a job with a token in it, wherever the tests run."""
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "CIRCLECI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(keyless.TOKEN_VARIABLE, token())


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[tuple[Sigstore, Path]]:
    with serve_sigstore(tmp_path) as served:
        yield served


@pytest.fixture
def signed(instance: tuple[Sigstore, Path]) -> Signed:
    return Signed(*instance)


def test_an_identity_signs_and_is_recognised(signed):
    assert signed.services.asked == ["/api/v2/signingCert", "/api/v1/log/entries"]
    envelope, refusal = keyless.verify(
        signed.path, SignerIdentity(identity=IDENTITY, issuer=ISSUER, trust_config=signed.trust)
    )
    assert refusal == ""
    assert (envelope.payload_type, envelope.payload) == ("application/vnd.in-toto+json", PAYLOAD)
    assert signed.content()["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    assert token().split(".")[1] not in signed.path.read_text()


def test_another_identity_or_issuer_or_instance_is_refused(signed, tmp_path):
    assert f"actual SANs: {{'{IDENTITY}'}}" in signed.refusal(identity="me@example.org")
    # Nor a part of it, nor a pattern.
    assert "do not match" in signed.refusal(identity=IDENTITY.removesuffix("main"))
    assert "do not match" in signed.refusal(identity="https://example.org/.*")
    assert f"got '{ISSUER}'" in signed.refusal(issuer="https://accounts.google.com")
    (tmp_path / "other").mkdir()
    with serve_sigstore(tmp_path / "other") as (_, trust):
        assert "is not shown to have signed it" in signed.refusal(trust=trust)


def changed_payload(bundle: dict[str, Any]) -> None:
    other = {**STATEMENT, "predicate": {"accuracy": 0.99}}
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(canonical(other).encode()).decode()


def changed_type(bundle: dict[str, Any]) -> None:
    bundle["dsseEnvelope"]["payloadType"] = "text/plain"


def second_signature(bundle: dict[str, Any]) -> None:
    bundle["dsseEnvelope"]["signatures"] *= 2


def entry(bundle: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = bundle["verificationMaterial"]["tlogEntries"][0]
    return found


@pytest.mark.parametrize(
    "change",
    [
        changed_payload,
        changed_type,
        second_signature,
        lambda bundle: bundle["dsseEnvelope"].update(signatures=[]),
        lambda bundle: bundle["verificationMaterial"].update(tlogEntries=[]),
        lambda bundle: bundle["verificationMaterial"].pop("certificate"),
        lambda bundle: entry(bundle).pop("inclusionPromise"),
        lambda bundle: entry(bundle).pop("inclusionProof"),
        lambda bundle: entry(bundle).update(integratedTime="1600000000"),
        lambda bundle: entry(bundle)["kindVersion"].update(kind="hashedrekord"),
        lambda bundle: bundle.update(mediaType="application/json"),
    ],
)
def test_a_changed_bundle_is_refused(signed, change):
    content = signed.content()
    change(content)
    signed.path.write_text(json.dumps(content))
    assert "is not shown to have signed it" in signed.refusal()


def test_what_another_statement_was_logged_with_does_not_serve(signed):
    """The certificate and the log's entry of a second signature, by the same identity, under the first envelope."""
    first = signed.content()
    second = Signed(signed.services, signed.trust).content()
    signed.path.write_text(json.dumps({**second, "dsseEnvelope": first["dsseEnvelope"]}))
    assert "is not shown to have signed it" in signed.refusal()


def test_any_flipped_byte_of_a_bundle_is_refused(signed):
    whole = signed.path.read_bytes()
    # The name before a checkpoint's signature is a hint, which the signature does not cover.
    hint = whole.index("\N{EM DASH} double ".encode())
    for place in range(0, len(whole) - 1, 61):
        if whole[place + 1 : place + 3] == b"==":
            continue  # what is flipped there in Base64 belongs to no byte
        damaged = bytearray(whole)
        damaged[place] ^= 4
        signed.path.write_bytes(damaged)
        try:
            refusal = signed.refusal()
        except InputError:
            continue
        assert refusal or hint <= place < hint + 10, place


def test_a_signature_that_was_logged_after_the_certificate_is_refused(instance):
    services, trust = instance
    services.late_s = 3600
    assert "is not shown to have signed it" in Signed(services, trust).refusal()


@pytest.mark.parametrize(
    "make", [lambda: "not a token", lambda: token(lives_s=-60), lambda: token(audience="somebody-else")]
)
def test_a_token_that_cannot_be_used(monkeypatch, instance, make):
    raw = make()
    monkeypatch.setenv(keyless.TOKEN_VARIABLE, raw)
    with pytest.raises(InputError, match="the identity cannot be used") as caught:
        keyless.sign(PAYLOAD, instance[1])
    assert raw not in str(caught.value)
    assert caught.value.__cause__ is None
    assert instance[0].asked == []


def test_without_an_identity_nothing_is_asked(monkeypatch, instance):
    monkeypatch.delenv(keyless.TOKEN_VARIABLE)
    # A test may run on a machine that has an identity.
    monkeypatch.setattr(sigstore.oidc, "detect_credential", lambda: None)
    with pytest.raises(InputError, match="no identity to sign with") as caught:
        keyless.sign(PAYLOAD, instance[1])
    assert "Set SIGSTORE_ID_TOKEN" in str(caught.value)
    assert instance[0].asked == []


def test_a_ci_job_has_an_identity(monkeypatch, instance):
    monkeypatch.delenv(keyless.TOKEN_VARIABLE)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", raising=False)
    with pytest.raises(InputError, match="the identity cannot be used: GitHub"):
        keyless.sign(PAYLOAD, instance[1])
    services, trust = instance
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "of the job")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{services.url}/token?job=1")
    assert Signed(services, trust).refusal() == ""
    assert services.asked[0] == "/token?job=1&audience=sigstore"


def test_services_that_refuse_or_do_not_answer(instance, tmp_path):
    services, trust = instance
    services.refuses = 403
    with pytest.raises(UnreachableError, match=r"Sigstore did not sign: 403 Client Error") as caught:
        keyless.sign(PAYLOAD, trust)
    assert token().split(".")[1] not in str(caught.value)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        services.url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        trust.write_text(json.dumps(services.trust_config()))
        with pytest.raises(UnreachableError, match=r"Sigstore did not sign: .*refused"):
            keyless.sign(PAYLOAD, trust)


def test_the_public_trust_root_out_of_reach(monkeypatch, signed, tmp_path):
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        monkeypatch.setattr(sigstore.models, "DEFAULT_TUF_URL", nowhere)
        for attempt in (
            lambda: keyless.sign(PAYLOAD),
            lambda: keyless.verify(signed.path, SignerIdentity(identity=IDENTITY, issuer=ISSUER)),
        ):
            with pytest.raises(UnreachableError, match="trust root of Sigstore cannot be fetched") as caught:
                attempt()
            assert "--trust-config" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", "nothing", '{"mediaType": "x"}'])
def test_what_is_no_trust_configuration(signed, text):
    signed.trust.write_text(text)
    with pytest.raises(InputError, match="is no trust configuration"):
        signed.refusal()


def test_a_trust_configuration_without_its_parts(signed):
    content = json.loads(signed.trust.read_text())
    content["trustedRoot"]["certificateAuthorities"] = []
    signed.trust.write_text(json.dumps(content))
    with pytest.raises(InputError, match="is no trust configuration"):
        signed.refusal()
    signed.trust.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        signed.refusal()


def test_without_the_library_it_says_what_to_install(monkeypatch, signed):
    monkeypatch.setitem(sys.modules, "sigstore", None)
    for attempt in (lambda: keyless.sign(PAYLOAD, signed.trust), signed.refusal):
        with pytest.raises(MissingExtraError) as caught:
            attempt()
        assert "pip install 'burnish[sigstore]'" in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"payload": "e30=", "payloadType": "x", "signatures": []}'])
def test_what_is_no_bundle(tmp_path, text):
    path = tmp_path / "passport.json"
    path.write_bytes(text)
    with pytest.raises(InputError, match=r"holds no (signed envelope|Sigstore bundle)"):
        keyless.verify(path, SignerIdentity(identity=IDENTITY, issuer=ISSUER))
