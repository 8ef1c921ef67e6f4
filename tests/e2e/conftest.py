"""Campaigns that are small enough for a test, on the real servers."""

from pathlib import Path

import numpy as np
import pytest

from tests.doubles.models import FEATURES, mlp, mlp_answer, write_onnx

CAMPAIGN = """
name: tiny
sources: [{name: mlp, onnx: model.onnx}]
samples: {evaluation: evaluation.npz, calibration: calibration.npz}
variants: [float32, int8-dynamic, int8-static]
serving:
  - {server: mlserver, max_batch_size: 4, max_batch_delay_ms: 1}
  - {server: triton, protocol: rest, max_batch_size: 4, max_batch_delay_ms: 1}
level: quick
policy:
  constraints: [accuracy_drop <= 0.5]
  objective: maximize max_throughput_rps
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a perceptron that answers its own labels rightly, samples for it, and a campaign file."""
    write_onnx(mlp(), tmp_path)
    rng = np.random.default_rng(1)
    for name, count in (("evaluation", 900), ("calibration", 64)):
        x = rng.normal(size=(count, FEATURES)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=x, labels=mlp_answer(x).argmax(axis=1))
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    return tmp_path
