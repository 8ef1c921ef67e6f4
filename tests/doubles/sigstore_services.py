"""Doubles of Sigstore's certificate authority (Fulcio) and log (Rekor), on loopback, with keys of their own.

They speak the two requests that a signature takes, and answer with certificates, timestamps and proofs that the library
``sigstore`` checks as it checks those of the public services. What they leave out: they believe any token without
asking its issuer, and each entry is the only one of its log, so that no proof of inclusion has a path. A GET is what a
job of GitHub Actions asks for its identity token.
"""

import base64
import hashlib
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER = "https://issuer.example"
IDENTITY = "https://example.org/release.yml@refs/heads/main"
_ISSUER_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_TIMESTAMPS_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_TREE = 1234567890


def token(*, identity: str = IDENTITY, issuer: str = ISSUER, audience: str = "sigstore", lives_s: int = 600) -> str:
    """An identity token; the signature is by a secret that nobody asks for."""
    now = datetime.now(UTC)
    claims = {"iss": issuer, "sub": identity, "aud": audience, "iat": now, "exp": now + timedelta(seconds=lives_s)}
    return jwt.encode(claims, "a secret of the double, long enough for HMAC", algorithm="HS256")


class Sigstore:
    """What the services know: their keys, and how they answer.

    Attributes:
        url: of all of them.
        refuses: the status that they answer with; 0 where they do what they are asked for.
        late_s: how long after the signature the log says that it was recorded.
        asked: the paths of the requests so far.
    """

    def __init__(self) -> None:
        self.url = ""
        self.refuses = 0
        self.late_s = 0
        self.asked: list[str] = []
        self._authority, self._timestamps, self._log = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self._now = datetime.now(UTC).replace(microsecond=0)
        self._root = self._root_certificate()

    def trust_config(self) -> dict[str, Any]:
        """What a client has to know of this instance, as JSON."""
        since = (self._now - timedelta(days=1)).isoformat().replace("+00:00", "Z")
        service = {"url": self.url, "majorApiVersion": 1, "validFor": {"start": since}, "operator": "double"}
        authority = {
            "subject": {"organization": "double", "commonName": "double"},
            "uri": self.url,
            "certChain": {"certificates": [{"rawBytes": _text(self._root.public_bytes(serialization.Encoding.DER))}]},
            "validFor": {"start": since},
        }
        return {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [self._known(self._log, since)],
                "certificateAuthorities": [authority],
                "ctlogs": [self._known(self._timestamps, since)],
                "timestampAuthorities": [],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [service],
                "oidcUrls": [],
                "rekorTlogUrls": [service],
                "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaConfig": {"selector": "ANY"},
            },
        }

    def certify(self, raw_token: str, request: dict[str, Any]) -> dict[str, Any]:
        """Fulcio: a certificate that the key of a request is that of the token's identity, for ten minutes."""
        claims = jwt.decode(raw_token, options={"verify_signature": False})
        csr = x509.load_pem_x509_csr(base64.b64decode(request["certificateSigningRequest"]))
        key = csr.public_key()
        unlogged = self._certificate(key, claims).sign(self._authority, hashes.SHA256())
        builder = self._certificate(key, claims, serial=unlogged.serial_number)
        logged = builder.add_extension(
            x509.UnrecognizedExtension(_TIMESTAMPS_EXTENSION, self._timestamp(unlogged)), critical=False
        ).sign(self._authority, hashes.SHA256())
        chain = [one.public_bytes(serialization.Encoding.PEM).decode() for one in (logged, self._root)]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}

    def enter(self, request: dict[str, Any]) -> dict[str, Any]:
        """Rekor: an entry for an envelope, with a promise and a proof that it is in the log."""
        proposed = request["spec"]["proposedContent"]
        envelope = json.loads(proposed["envelope"])
        signed = [
            {"signature": one["sig"], "verifier": verifier}
            for one, verifier in zip(envelope["signatures"], proposed["verifiers"], strict=True)
        ]
        spec = {
            "envelopeHash": _hash(proposed["envelope"].encode()),
            "payloadHash": _hash(base64.b64decode(envelope["payload"])),
            "signatures": signed,
        }
        body = rfc8785.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        identity = _key_id(self._log)
        entry = {
            "body": _text(body),
            "integratedTime": int(datetime.now(UTC).timestamp()) + self.late_s,
            "logID": identity.hex(),
            "logIndex": 0,
        }
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"double - {_TREE}\n1\n{_text(root)}\n"
        signature = _text(identity[:4] + self._signed(self._log, note.encode()))
        proof = {
            "logIndex": 0,
            "rootHash": root.hex(),
            "treeSize": 1,
            "hashes": [],
            "checkpoint": f"{note}\n\N{EM DASH} double {signature}\n",
        }
        promise = _text(self._signed(self._log, rfc8785.dumps(entry)))
        return {"0" * 64: {**entry, "verification": {"inclusionProof": proof, "signedEntryTimestamp": promise}}}

    def _root_certificate(self) -> x509.Certificate:
        key, name = self._authority.public_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "double")])
        return (
            x509.CertificateBuilder(name, name, key, x509.random_serial_number())
            .not_valid_before(self._now - timedelta(days=1))
            .not_valid_after(self._now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .sign(self._authority, hashes.SHA256())
        )

    def _certificate(self, key: Any, claims: dict[str, Any], serial: int = 0) -> x509.CertificateBuilder:
        serial = serial or x509.random_serial_number()
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._authority.public_key())
        return (
            x509.CertificateBuilder(self._root.subject, x509.Name([]), key, serial)
            .not_valid_before(self._now)
            .not_valid_after(self._now + timedelta(minutes=10))
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(authority, critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(claims["sub"])]), critical=True
            )
            .add_extension(
                x509.UnrecognizedExtension(_ISSUER_EXTENSION, claims["iss"].encode()), critical=False
            )
        )  # fmt: skip

    def _timestamp(self, certificate: x509.Certificate) -> bytes:
        """The list of signed certificate timestamps (RFC 6962, 3.2 and 3.3) that a certificate carries."""
        milliseconds = int(self._now.timestamp() * 1000)
        told = certificate.tbs_certificate_bytes
        entry = _key_id(self._authority) + struct.pack("!I", len(told))[1:] + told
        signature = self._signed(self._timestamps, struct.pack("!BBQH", 0, 0, milliseconds, 1) + entry + bytes(2))
        one = b"\0" + _key_id(self._timestamps) + struct.pack("!QHBBH", milliseconds, 0, 4, 3, len(signature))
        one += signature
        listed = struct.pack("!HH", len(one) + 2, len(one)) + one
        if len(listed) >= 128:
            raise ValueError("too long for the one byte of its length")
        return b"\x04" + bytes([len(listed)]) + listed

    def _known(self, key: ec.EllipticCurvePrivateKey, since: str) -> dict[str, Any]:
        public = {
            "rawBytes": _text(_der(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": {"start": since}
        }  # fmt: skip
        return {
            "baseUrl": self.url,
            "hashAlgorithm": "SHA2_256",
            "publicKey": public,
            "logId": {"keyId": _text(_key_id(key))},
        }

    @staticmethod
    def _signed(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
        return key.sign(message, ec.ECDSA(hashes.SHA256()))


@contextmanager
def serve_sigstore(folder: Path) -> Iterator[tuple[Sigstore, Path]]:
    """The services, and the file with their trust configuration, written into the folder."""
    services = Sigstore()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            services.asked.append(self.path)
            self._answer(200, {"value": token()})

        def do_POST(self) -> None:
            services.asked.append(self.path)
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if services.refuses:
                self._answer(services.refuses, {"code": services.refuses, "message": "the double refuses"})
            elif self.path == "/api/v2/signingCert":
                self._answer(200, services.certify(self.headers["Authorization"].removeprefix("Bearer "), request))
            else:
                self._answer(201, services.enter(request))

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        services.url = f"http://127.0.0.1:{server.server_port}"
        file = folder / "trust.json"
        file.write_text(json.dumps(services.trust_config()))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield services, file
        finally:
            server.shutdown()
            thread.join()


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _key_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_der(key)).digest()


def _hash(content: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()}


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
