"""Variants that take smaller inputs through a campaign, up to the servers."""

import json
import subprocess
import sys

import numpy as np
import pytest

from optimize.fidelity import load_outputs, measure_fidelity
from optimize.samples import load_samples
from optimize.screening import screen_variant
from optimize.stages import make_stage
from optimize.stages.base import Context
from optimize.testing import run_model, samples_for, tiny_conv_net, tiny_transformer
from registry.records import EngineSpec, StageCall

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores

ORT = EngineSpec(name="onnxruntime")
CAMPAIGN = """
name: tiny
sources: [{onnx: source/model.onnx}]
samples: {evaluation: held-out.npz, calibration: calibration.npz}
variants:
  - float32
  - name: small
    stages: [{name: reduce.image_side, side: 4}, quantize.static, {name: reduce.input_type, low: -5, high: 5}]
level: quick
"""


def test_a_campaign_judges_and_times_variants_on_samples_as_they_take_them(tmp_path):
    model = tiny_conv_net(tmp_path / "source")
    images = samples_for(model.inputs, count=60)
    # Flat images lose nothing when they shrink.
    images["image"] = np.ascontiguousarray(np.broadcast_to(images["image"][..., :1, :1], images["image"].shape))
    labels = run_model(model, images)[0].argmax(axis=1)
    np.savez(tmp_path / "held-out.npz", labels=labels, **images)
    np.savez(tmp_path / "calibration.npz", **images)
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    command = [sys.executable, "-P", "-m", "optimize", "make", str(tmp_path / "campaign.yaml"), "--judge", "--json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "variants")], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["failures"] == []
    found = {one["name"]: one["metrics"] for one in document["judged"]}
    assert set(found) == {"float32", "small"}
    assert 0.5 < found["small"]["cosine"]["value"] < 1
    assert all("inprocess_ms.batch_1" in metrics for metrics in found.values())


def test_outputs_of_other_shapes_are_left_to_the_metric(tmp_path):
    source = tiny_transformer(tmp_path / "source")
    rows = samples_for(source.inputs, count=40)
    np.savez(tmp_path / "samples.npz", **rows)
    (tmp_path / "signs.py").write_text("def first(outputs, labels): return (outputs['encoded'][:, 0, 0] > 0) * 1.0\n")
    (tmp_path / "made").mkdir()
    stage = make_stage(StageCall(name="reduce.sequence_length", params={"length": 2, "inputs": ("hidden",)}))
    made = stage(source, Context(out=tmp_path / "made"))
    digest = load_samples(tmp_path / "samples.npz").digest
    given = {
        "samples": tmp_path / "samples.npz", "samples_digest": digest, "metric": "signs:first", "batch_size": 8,
        "instruction_set": "avx2", "python_path": tmp_path,
    }  # fmt: skip
    measure_fidelity("base", source.path, ORT, out=tmp_path / "base.npz", reference=None, **given)
    fidelity = measure_fidelity(
        "small", made.folder / made.entry, ORT, out=tmp_path / "small.npz", reference=tmp_path / "base.npz",
        adaptation=made.adaptation, **given,
    )  # fmt: skip
    assert load_outputs(tmp_path / "small.npz")["encoded"].shape == (40, 2, 32)
    assert "cosine" not in fidelity.metrics
    assert "accuracy" in fidelity.metrics
    timed = screen_variant(
        "small", made.folder / made.entry, ORT, samples=tmp_path / "samples.npz", batch_sizes=[2], budget_s=0.05,
        adaptation=made.adaptation,
    )  # fmt: skip
    assert "inprocess_ms.batch_2" in timed.metrics
