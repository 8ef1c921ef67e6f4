"""`burnish make --judge`: what variants are worth, before a server is involved."""

import json
import subprocess
import sys

import numpy as np
import pytest

from optimize.testing import run_model, samples_for, tiny_conv_net

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores

CAMPAIGN = """
name: tiny
sources: [{onnx: source/model.onnx}]
samples: {evaluation: held-out.npz}
variants: [float32, {name: mine, stages: [simplify.ort]}, int8-static]
level: quick
"""


def burnish(*arguments):
    command = [sys.executable, "-P", "-m", "optimize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture
def folder(tmp_path):
    model = tiny_conv_net(tmp_path / "source")
    images = samples_for(model.inputs, count=40)
    labels = run_model(model, images)[0].argmax(axis=1)
    np.savez(tmp_path / "held-out.npz", labels=labels, **images)
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    return tmp_path


def test_variants_are_judged_and_timed_without_a_server(folder):
    done = burnish("make", folder / "campaign.yaml", "--judge", "--json", "--out", folder / "variants")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [one["name"] for one in document["judged"]] == ["float32", "mine"]
    for one in document["judged"]:
        assert one["metrics"]["accuracy_drop"]["value"] == 0
        assert one["metrics"]["inprocess_ms.batch_1"]["unit"] == "ms"
    assert [(one["subject"], one["kind"]) for one in document["failures"]] == [("int8-static", "not_applicable")]


def test_a_model_alone_cannot_be_judged(folder):
    done = burnish("make", folder / "source" / "model.onnx", "--variant", "float32", "--judge", "--out", folder / "v")
    assert done.returncode == 2
    assert "says nothing of samples and metric" in done.stderr


def test_only_a_variant_is_replaced_by_one(folder):
    out = folder / "v"
    command = ("make", folder / "source" / "model.onnx", "--variant", "float32", "--out", out)
    for _ in range(2):
        assert burnish(*command).returncode == 0
    assert [path.name for path in out.iterdir()] == ["float32"]
    (out / "float32" / "notes.txt").write_text("of somebody")
    done = burnish(*command)
    assert done.returncode == 2
    assert "notes.txt is in the way, and no part of a variant" in done.stderr
    assert (out / "float32" / "notes.txt").read_text() == "of somebody"
