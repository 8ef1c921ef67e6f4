"""Campaigns that are small enough for a test, on the real servers."""

import shutil
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
level: brief
levels: levels.yaml
policy:
  constraints: [accuracy_drop <= 0.5]
  objective: maximize max_throughput_rps
"""

# Short windows: what is tested is the way through, not the numbers.
LEVELS = """
levels:
  - name: brief
    provisional: true
    screen_s: 0.1
    served: 1
    rounds: 2
    reruns: 0
    a_a: true
    warmup_s: 0.1
    closed_s: 0.2
    open_s: 0.3
    longest_s: 0.5
    requests: 50
    percentiles: [50, 90]
    ladder: [1, 4]
    ladder_s: 0.2
    stages: [0.4, 0.7, 0.9]
    stage_s: 0.3
    timeout_s: 5.0
"""


@pytest.fixture
def tiny(tmp_path: Path, empty_store: Path) -> Path:
    """A folder with a perceptron that answers its own labels rightly, samples for it, and a campaign file.

    Its tracking store is there already, and empty.
    """
    (tmp_path / "burnish-work").mkdir()
    shutil.copyfile(empty_store, tmp_path / "burnish-work" / "mlflow.db")
    write_onnx(mlp(), tmp_path)
    rng = np.random.default_rng(1)
    for name, count in (("evaluation", 900), ("calibration", 64)):
        x = rng.normal(size=(count, FEATURES)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=x, labels=mlp_answer(x).argmax(axis=1))
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    (tmp_path / "levels.yaml").write_text(LEVELS)
    return tmp_path
