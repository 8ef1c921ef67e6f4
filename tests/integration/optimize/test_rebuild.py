"""A variant made again from its passport: with the same bytes, the same answers, or neither."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from optimize.config import load_campaign
from optimize.making import make_source, make_variant
from optimize.plan import Observer, Workspace, plan
from optimize.rebuild import Rebuilt, rebuild
from optimize.samples import load_samples
from registry import passport
from registry.errors import CheckFailedError
from registry.ledger import Ledger
from registry.records import Campaign, Variant
from registry.store import FolderStore
from tests.doubles import campaigns
from tests.doubles.models import CLASSES, FEATURES, mlp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CAMPAIGN = """
name: tiny
sources: [{name: first, onnx: first.onnx}]
samples: {evaluation: evaluation.npz, calibration: calibration.npz}
variants: [int8-static]
serving: [{server: triton}]
level: quick
seed: 3
"""


class Quiet(Observer):
    def phase(self, name: str, total: int) -> None: ...
    def done(self, subject: str, outcome: str) -> None: ...
    def note(self, text: str) -> None: ...


class Made:
    """A campaign whose variant was really made, and what to issue its passport with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        (folder / "first.onnx").write_bytes(mlp().SerializeToString())
        features = rng.normal(size=(24, FEATURES)).astype(np.float32)
        np.savez(folder / "evaluation.npz", x=features, labels=np.arange(24) % CLASSES)
        np.savez(folder / "calibration.npz", x=features[::2])
        (folder / "campaign.yaml").write_text(CAMPAIGN)
        (folder / "public.pem").write_bytes(
            KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        work = folder / "work"
        planned = plan(load_campaign(folder / "campaign.yaml"), base=folder, work=work)
        with Ledger.open(work / "ledger.jsonl") as ledger:
            workspace = Workspace(plan=planned, store=FolderStore(work), ledger=ledger, observer=Quiet())
            source, _ = make_source(workspace, planned.config.sources[0])
            recipe = next(one for one in planned.recipes if one.name == "int8-static")
            made = make_variant(workspace, source, recipe, "int8-static", load_samples(folder / "calibration.npz"))
        assert isinstance(made, Variant)
        self.variant = made
        self.files = FolderStore(work).path(made.artifact)
        self.campaign: Campaign = replace(
            campaigns.campaign(), sources=(source,), variants=(made,), candidates=(), rounds=(), measurements=()
        )

    def rebuild(self, variant: Variant, *, original: Path | None = None, out: Path | None = None) -> Rebuilt:
        path = self.folder / "passport.json"
        path.write_text(passport.issue(self.campaign, variant, KEY))
        return rebuild(
            path, signer=self.folder / "public.pem", campaign_file=self.folder / "campaign.yaml", original=original,
            out=out, observer=Quiet(),
        )  # fmt: skip

    def altered(self) -> tuple[Variant, Path]:
        """The variant with another text in its model file, as if other tools had made it."""
        folder = self.folder / "altered"
        folder.mkdir()
        model = onnx.load(self.files / "model.onnx")
        model.doc_string = "made elsewhere"
        onnx.save(model, folder / "model.onnx")
        made = self.variant.artifact
        artifact = FolderStore(self.folder / "work").add(
            folder, format="onnx", entry="model.onnx", inputs=made.inputs, outputs=made.outputs
        )
        return replace(self.variant, artifact=artifact), folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("campaign"))


def test_it_has_the_same_bytes(made, tmp_path):
    rebuilt = made.rebuild(made.variant, out=tmp_path / "again")
    assert (rebuilt.equal, rebuilt.findings) == ("bytes", ())
    assert (tmp_path / "again/model.onnx").read_bytes() == (made.files / "model.onnx").read_bytes()


def test_other_bytes_that_answer_the_same_are_equal_in_outputs(made):
    variant, folder = made.altered()
    rebuilt = made.rebuild(variant, original=folder)
    assert (rebuilt.equal, rebuilt.findings) == ("outputs", ("not the same bytes: model.onnx",))


def test_what_is_not_the_same_work_is_refused(made):
    with pytest.raises(CheckFailedError, match=r"was changed|none of the variant's files"):
        made.rebuild(made.variant, original=made.folder)
    with pytest.raises(CheckFailedError, match="calibrated on samples of the digest"):
        made.rebuild(replace(made.variant, calibration_digest="0" * 64))
    with pytest.raises(CheckFailedError, match="it is another model"):
        made.rebuild(replace(made.variant, source_digest="0" * 64))
