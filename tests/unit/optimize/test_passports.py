import base64
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from optimize.cli import main
from optimize.reporting import write_campaign
from registry.dsse import KEY_VARIABLE
from registry.keyless import TOKEN_VARIABLE
from registry.store import FolderStore
from tests.doubles import campaigns
from tests.doubles.sigstore_services import IDENTITY, ISSUER, serve_sigstore, token

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PEM = KEY.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
).decode()
PUBLIC_PEM = (
    KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
)


def burnish(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["burnish", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working folder whose record has ``int8-static`` with files that are there."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made/model.onnx").write_bytes(b"graph" * 100)
    (tmp_path / "key.pem").write_text(PEM)
    (tmp_path / "public.pem").write_text(PUBLIC_PEM)
    made, work = campaigns.STATIC, tmp_path / "work"
    artifact = FolderStore(work).add(tmp_path / "made", format="onnx", entry="model.onnx", inputs=(), outputs=())
    campaign = campaigns.campaign()
    variants = tuple(replace(one, artifact=artifact) if one.id == made.id else one for one in campaign.variants)
    write_campaign(replace(campaign, variants=variants), work)
    return work


def test_a_passport_is_issued_and_checked(monkeypatch, capsys, work: Path):
    issue = ("report", work, "--passport", "int8-static", "--json")
    assert burnish(monkeypatch, *issue, "--key", work.parent / "key.pem") == 0
    path = Path(json.loads(capsys.readouterr().out)["passport"])
    assert path == work / "passports/int8-static.passport.json"
    by_file = path.read_bytes()
    monkeypatch.setenv(KEY_VARIABLE, PEM)
    assert burnish(monkeypatch, *issue) == 0
    assert path.read_bytes() == by_file
    said = capsys.readouterr()
    assert PEM.splitlines()[1] not in said.out + said.err + by_file.decode()
    check = ("lint", "--passport", path, "--public-key", work.parent / "public.pem", "--work", work)
    assert burnish(monkeypatch, *check, "--artifact", work.parent / "made") == 0
    assert "genuine; int8-static: " in capsys.readouterr().out
    (work.parent / "made/model.onnx").write_bytes(b"graph" * 99 + b"grapf")
    assert burnish(monkeypatch, *check, "--artifact", work.parent / "made", "--json") == 5
    told = json.loads(capsys.readouterr().out)
    assert not told["passed"]
    assert "it was changed" in told["findings"][0]


def test_a_passport_is_signed_without_a_key_and_checked(monkeypatch, capsys, work: Path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(TOKEN_VARIABLE, token())
    with serve_sigstore(work.parent) as (_, trust):
        issue = ("report", work, "--passport", "int8-static", "--keyless", "--trust-config", trust, "--json")
        assert burnish(monkeypatch, *issue) == 0
    path = Path(json.loads(capsys.readouterr().out)["passport"])
    assert path == work / "passports/int8-static.passport.sigstore.json"
    check = ("lint", "--passport", path, "--work", work, "--artifact", work.parent / "made")
    of_whom = ("--identity", IDENTITY, "--issuer", ISSUER, "--trust-config", trust)
    assert burnish(monkeypatch, *check, *of_whom) == 0
    assert "genuine; int8-static: " in capsys.readouterr().out
    assert burnish(monkeypatch, *check, *of_whom, "--identity", "me@example.org") == 5
    assert f"me@example.org of {ISSUER} is not shown to have signed it" in capsys.readouterr().out
    rebuild = ("rebuild", path, *of_whom, "--identity", "me@example.org")
    assert burnish(monkeypatch, *rebuild) == 5
    assert "is not shown to have signed it" in capsys.readouterr().err
    assert burnish(monkeypatch, *check, "--public-key", work.parent / "public.pem") == 2
    assert "was signed without a key" in capsys.readouterr().err
    bundle = json.loads(path.read_text())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b"int8-static", b"int8-statis")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    path.write_text(json.dumps(bundle))
    assert burnish(monkeypatch, *check, *of_whom, "--json") == 5
    refusal, *parts = json.loads(capsys.readouterr().out)["findings"]
    assert "is not shown to have signed it" in refusal
    assert "predicate.variant is not what was written there first" in parts
    assert burnish(monkeypatch, "lint", "--passport", work / "campaign.json", *of_whom) == 2
    assert "holds no Sigstore bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--passport", "int8-statc", "--key", "key.pem"), "Did you mean 'int8-static'?"),
        (("--passport", "int8-static"), "no key to sign with"),
        (("--passport", "int8-static", "--key", "nowhere.pem"), "cannot be read"),
        (("--passport", "float32", "--key", "key.pem"), "is not in the store"),
        (("--passport", "int8-static", "--key", "key.pem", "--keyless"), "goes with no --key"),
        (("--passport", "int8-static", "--key", "key.pem", "--trust-config", "x"), "for a signature without a key"),
        (("--passport", "int8-static", "--keyless", "--trust-config", "nowhere.json"), "cannot be read"),
    ],
)
def test_what_cannot_be_issued_is_exit_2(monkeypatch, capsys, work: Path, arguments, part):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv(TOKEN_VARIABLE, token())
    monkeypatch.chdir(work.parent)
    assert burnish(monkeypatch, "report", work, *arguments) == 2
    assert part in capsys.readouterr().err
    assert not (work / "passports").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "work", "--key", "key.pem"),
        ("report", "work", "--keyless"),
        ("lint", "--artifact", "made"),
        ("lint", "--identity", "me@example.org", "--issuer", ISSUER),
    ],
)
def test_options_of_a_passport_without_one_are_exit_2(monkeypatch, capsys, work: Path, arguments):
    monkeypatch.chdir(work.parent)
    assert burnish(monkeypatch, *arguments) == 2
    assert "are for a passport" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "proves nothing without a key or an identity"),
        (("--identity", "me@example.org"), "go together"),
        (("--issuer", ISSUER), "go together"),
        (("--identity", "", "--issuer", ISSUER), "go together"),
        (("--trust-config", "trust.json"), "is for an identity"),
        (("--public-key", "public.pem", "--identity", "me@example.org", "--issuer", ISSUER), "with no --public-key"),
        (("--public-key", "key.pem"), "holds a private key"),
        (("--public-key", "public.pem"), "holds no signed envelope"),
        (("model.onnx",), "a check of its own"),
    ],
)
def test_a_check_without_what_it_needs_is_exit_2(monkeypatch, capsys, work: Path, arguments, part):
    monkeypatch.chdir(work.parent)
    assert burnish(monkeypatch, "lint", "--passport", "work/campaign.json", *arguments) == 2
    assert part in capsys.readouterr().err
