import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from registry import dsse, passport
from registry.codec import canonical
from registry.errors import InputError
from registry.records import Campaign, Estimate, Variant
from registry.store import FolderStore
from tests.doubles import campaigns

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


def pem(key: Any, *, password: bytes | None = None) -> bytes:
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)


def public_pem(key: Any) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


class Issued:
    """A campaign whose variant ``int8-static`` has real files, and its passport."""

    def __init__(self, folder: Path) -> None:
        (folder / "made/weights").mkdir(parents=True)
        (folder / "made/model.onnx").write_bytes(b"graph" * 100)
        (folder / "made/weights/data.bin").write_bytes(bytes(1000))
        made = campaigns.STATIC
        artifact = FolderStore(folder / "work").add(
            folder / "made", format="onnx", entry="model.onnx", inputs=made.artifact.inputs,
            outputs=made.artifact.outputs,
        )  # fmt: skip
        self.variant: Variant = replace(made, artifact=artifact)
        campaign = campaigns.campaign()
        others = tuple(self.variant if one.id == made.id else one for one in campaign.variants)
        self.campaign: Campaign = replace(campaign, variants=others)
        self.files = FolderStore(folder / "work").path(artifact)
        self.path = folder / "int8-static.passport.json"
        self.path.write_text(passport.issue(self.campaign, self.variant, KEY, licence="MIT"))

    def check(self, key: Ed25519PrivateKey = KEY, **against: Any) -> tuple[str, ...]:
        return passport.check(self.path, key.public_key(), **against).findings

    def payload(self) -> dict[str, Any]:
        return json.loads(base64.b64decode(json.loads(self.path.read_text())["payload"]))

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Changes the statement as somebody without the key would."""
        content = self.payload()
        change(content)
        envelope = json.loads(self.path.read_text())
        envelope["payload"] = base64.b64encode(canonical(content).encode()).decode()
        self.path.write_text(json.dumps(envelope))


@pytest.fixture
def issued(tmp_path: Path) -> Issued:
    return Issued(tmp_path)


def test_a_passport_says_what_the_variant_is_and_how_it_was_judged(issued):
    assert issued.check(artifact=issued.files, campaign=issued.campaign) == ()
    content = issued.payload()
    assert (content["_type"], content["predicateType"]) == (passport.STATEMENT_TYPE, passport.PREDICATE_TYPE)
    assert [one["name"] for one in content["subject"]] == ["model.onnx", "weights/data.bin"]
    said = content["predicate"]
    assert said["source"]["digest"] == issued.variant.source_digest
    assert [stage["name"] for stage in said["variant"]["recipe"]["stages"]] == ["simplify", "quantize"]
    assert said["data"]["calibration"]["digest"] == issued.variant.calibration_digest
    assert {one["candidate"]["serving"]["server"] for one in said["candidates"]} == {"mlserver", "triton"}
    numbers = said["candidates"][0]["measurements"][0]["metrics"]["max_throughput_rps"]
    assert numbers["low"] < numbers["value"] < numbers["high"]
    assert said["verdict"]["policy"]["constraints"][0]["text"] == "accuracy_drop <= 0.01"
    assert said["host"]["fingerprint"] == issued.campaign.host.fingerprint
    assert said["licences"]["model"] == "MIT"
    assert said["versions"] == dict(issued.campaign.versions)


def test_the_bill_of_materials_is_cyclonedx(issued):
    bom = issued.payload()["predicate"]["sbom"]
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    root = bom["metadata"]["component"]
    assert (root["type"], root["name"]) == ("machine-learning-model", "int8-static")
    assert root["components"][0]["hashes"][0]["content"] == issued.variant.artifact.files[0].sha256
    named = {one["name"]: one for one in bom["components"]}
    assert named["onnxruntime"]["purl"] == "pkg:pypi/onnxruntime@1.31.1"
    assert named["digits"]["type"] == "machine-learning-model"
    on = next(one["dependsOn"] for one in bom["dependencies"] if one["ref"] == root["bom-ref"])
    assert len(on) == len(named)


def test_the_same_campaign_gives_the_same_passport(issued):
    assert passport.issue(issued.campaign, issued.variant, KEY, licence="MIT") == issued.path.read_text()


def test_others_can_read_the_envelope(issued):
    """The layout of DSSE, and its signature, by the library alone."""
    envelope = json.loads(issued.path.read_text())
    payload = base64.b64decode(envelope["payload"])
    kind = b"application/vnd.in-toto+json"
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    KEY.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), message)


def test_an_edited_number_is_refused_and_named(issued):
    def faster(content: dict[str, Any]) -> None:
        content["predicate"]["fidelities"][0]["metrics"]["accuracy"]["value"] = 0.9999

    issued.edit(faster)
    changed, part, number = issued.check(campaign=issued.campaign)
    assert "does not fit: something was changed after it was signed" in changed
    assert part == "predicate.fidelities is not what was written there first"
    assert number.startswith("predicate.fidelities[0].metrics.accuracy.value is 0.9999 in the passport, and 0.9")
    assert issued.check() == (changed, part)


def test_a_number_that_the_record_has_otherwise_is_named_though_the_passport_is_genuine(issued):
    slower = Estimate(value=1.0, low=0.5, high=1.5, runs=3, method="t over runs", unit="1/s")
    first = next(one for one in issued.campaign.measurements if one.candidate_id == campaigns.STATIC_MLSERVER.id)
    metrics = {**first.metrics, "max_throughput_rps": slower}
    others = tuple(replace(one, metrics=metrics) if one is first else one for one in issued.campaign.measurements)
    findings = issued.check(campaign=replace(issued.campaign, measurements=others))
    assert "max_throughput_rps.value is" in findings[2]
    assert findings[2].endswith("and 1.0 in the campaign's record")
    assert "no variant of the id" in issued.check(campaign=replace(issued.campaign, variants=()))[0]


def test_a_flipped_byte_of_a_file_is_refused_and_named(issued, tmp_path):
    copy = tmp_path / "copy"
    (copy / "weights").mkdir(parents=True)
    for file in issued.variant.artifact.files:
        (copy / file.path).write_bytes((issued.files / file.path).read_bytes())
    assert issued.check(artifact=copy) == ()
    flipped = bytearray((copy / "model.onnx").read_bytes())
    flipped[7] ^= 1
    (copy / "model.onnx").write_bytes(flipped)
    (finding,) = issued.check(artifact=copy)
    assert str(copy / "model.onnx") in finding
    assert finding.endswith("it was changed")
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").symlink_to(issued.files / "model.onnx")
    assert issued.check(artifact=copy) == (f"{copy / 'model.onnx'} is no regular file",)
    (copy / "model.onnx").unlink()
    (copy / "more.py").touch()
    assert issued.check(artifact=copy) == (
        f"model.onnx is not in {copy}",
        f"more.py in {copy} is none of the variant's files",
    )
    with pytest.raises(InputError, match="no folder"):
        issued.check(artifact=tmp_path / "nowhere")


def test_any_flipped_byte_of_the_passport_is_refused(issued):
    whole = issued.path.read_bytes()
    for place in range(0, len(whole) - 1, 397):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        issued.path.write_bytes(damaged)
        try:
            findings = issued.check()
        except InputError:
            continue
        named = whole.index(b'"keyid":') <= place < whole.index(b'","sig"')
        assert findings or named  # the name of the key is a hint, which the signature does not cover


def test_another_key_is_refused(issued):
    own, other = (dsse.key_id(key.public_key())[:16] for key in (KEY, OTHER))
    assert f"it is signed by {own}, not by key {other}" in issued.check(OTHER)[0]
    envelope = json.loads(issued.path.read_text())
    issued.path.write_text(json.dumps({**envelope, "signatures": []}))
    assert issued.check() == (f"it is signed by nobody, not by key {own}",)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda content: content.update(predicateType="https://slsa.dev/provenance/v1"), "its predicateType is"),
        (lambda content: content.update(subject=[{"name": "x"}]), "does not name files"),
        (lambda content: content["predicate"].pop("digests"), "predicate.digests is missing"),
        (lambda content: content["predicate"].pop("host"), "predicate.host is not what was written"),
    ],
)
def test_a_statement_of_another_form_is_refused(issued, change, part):
    issued.edit(change)
    assert any(part in finding for finding in issued.check(artifact=issued.files))


def test_what_burnish_did_not_write_is_refused_though_it_is_signed(issued):
    content = json.dumps(issued.payload(), indent=1).encode()
    issued.path.write_text(dsse.sign(content, "text/plain", KEY))
    kind, form = issued.check()
    assert "of the type 'text/plain'" in kind
    assert "not canonical" in form


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"payload": 3, "payloadType": "x", "signatures": []}',
        b'{"payload": "%%%", "payloadType": "x", "signatures": []}',
        b'{"payload": "e30=", "payloadType": "x", "signatures": []}',
        b'{"payload": "e30=", "payload": "e30=", "payloadType": "x", "signatures": []}',
        b'{"payload": "eyJwcmVkaWNhdGUiOnsiYSI6MWU5OTl9fQ==", "payloadType": "x", "signatures": []}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_passport(issued, text):
    issued.path.write_bytes(text)
    with pytest.raises(InputError, match=r"holds no (signed envelope|statement)"):
        issued.check()


def test_numbers_are_written_one_way(issued):
    text = canonical({"b": 1e-7, "a": [1.0, 1, 0.1 + 0.2, 1e22]})
    assert text == '{"a":[1.0,1,0.30000000000000004,1e+22],"b":1e-07}'


def test_keys_come_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "key.pem"
    file.write_bytes(pem(KEY))
    assert dsse.key_id(dsse.signing_key(file, {}).public_key()) == dsse.key_id(KEY.public_key())
    told = dsse.signing_key(None, {dsse.KEY_VARIABLE: pem(OTHER).decode()})
    assert dsse.key_id(told.public_key()) == dsse.key_id(OTHER.public_key())
    file.write_bytes(public_pem(KEY))
    assert dsse.key_id(dsse.public_key(file)) == dsse.key_id(KEY.public_key())


SECRET = pem(KEY).decode().splitlines()[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no key to sign with"),
        (b"not a key", "no private key in PEM form"),
        (pem(KEY, password=b"secret"), "protected by a password"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "not an Ed25519 key"),
        (f"-----BEGIN PRIVATE KEY-----\n{SECRET[:-8]}\n-----END PRIVATE KEY-----\n".encode(), "no private key"),
    ],
)
def test_a_key_that_cannot_sign(tmp_path, content, message):
    file = tmp_path / "key.pem"
    file.write_bytes(content)
    for path, environment in ((file, {}), (None, {dsse.KEY_VARIABLE: content.decode()})):
        with pytest.raises(InputError, match=message) as caught:
            dsse.signing_key(path, environment)
        assert SECRET[:20] not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pem(KEY), "holds a private key"),
        (b"nothing", "no public key"),
        (public_pem(ec.generate_private_key(ec.SECP256R1())), "not an Ed25519 key"),
    ],
)
def test_a_key_that_cannot_check(tmp_path, content, message):
    file = tmp_path / "key.pem"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        dsse.public_key(file)
    with pytest.raises(InputError, match="cannot be read"):
        dsse.public_key(tmp_path / "nowhere")
