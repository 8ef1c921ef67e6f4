"""Judging in a campaign: machines without VNNI, slices, and samples without labels."""

from pathlib import Path

import numpy as np
import pytest

from optimize.campaign import Prepared, judge_campaign
from optimize.config import CampaignConfig
from optimize.plan import Observer
from tests.doubles.models import FEATURES, mlp, write_onnx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # campaigns wait for each other's cores


class Log(Observer):
    """Keeps what a campaign says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def phase(self, name: str, total: int) -> None:
        self.lines.append(f"{name}: {total}")

    def done(self, subject: str, outcome: str) -> None:
        self.lines.append(f"{subject}: {outcome}")

    def note(self, text: str) -> None:
        self.lines.append(text)


def judge(folder: Path, **fields: object) -> tuple[Prepared, Log]:
    log = Log()
    given = {
        "name": "tiny",
        "sources": [{"onnx": "model.onnx"}],
        "samples": {"evaluation": "samples.npz"},
        "metric": "cosine",
        "variants": [
            {"name": "full", "stages": [{"name": "quantize.dynamic"}]},
            {"name": "seven-bits", "stages": [{"name": "quantize.dynamic", "reduce_range": True}]},
        ],
        "serving": [{"server": "mlserver", "max_batch_size": 4, "max_batch_delay_ms": 1.0}, {"server": "mlserver"}],
        "level": "quick",
        "policy": {"constraints": ["slice_drop_max <= 0.2"]},
    }
    config = CampaignConfig.model_validate(given | fields)
    return judge_campaign(config, base=folder, work=folder / "work", observer=log), log


def test_what_overflows_without_vnni_is_refused_where_such_machines_serve(tmp_path: Path) -> None:
    write_onnx(mlp(), tmp_path)
    rows = np.random.default_rng(0).normal(size=(120, FEATURES)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=rows, slices=np.array(["a", "b", "c"])[[0] * 70 + [1] * 40 + [2] * 10])

    refused, log = judge(tmp_path, target_instruction_sets=["avx2"])
    assert [one.name for one in refused.judged] == ["float32", "seven-bits"]
    (failure,) = refused.failures
    assert (failure.subject, failure.phase, failure.kind) == ("full", "fidelity", "error")
    assert "u8 x s8 sums overflow" in failure.reason
    assert "reduce_range: true" in failure.reason
    small = [line for line in log.lines if "1 of 3 slices have fewer than 20 scored samples" in line]
    assert small == ["float32: 1 of 3 slices have fewer than 20 scored samples and are not judged: 'c'"], "told once"

    seven = refused.judged[1]
    assert sorted(seven.fidelities) == [1, 4]
    assert 0 < seven.fidelities[4].metrics["slice_drop_max"].value < 0.1
    assert seven.fidelities[4].metrics["batch_dependence"].value > 0
    assert seven.fidelities[4].metrics["saturated_share"].value == 0


def test_a_model_that_mixes_its_batch_is_found_out_and_judged_at_each_size(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    model = mlp()
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.extend([
        helper.make_node("ReduceMax", ["raw"], ["most"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["raw", "most"], ["logits"]),
    ])  # fmt: skip
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(0).normal(size=(64, FEATURES)).astype(np.float32))
    found, log = judge(tmp_path, variants=["float32"], policy={"constraints": ["accuracy_drop <= 0.2"]})
    assert sorted(found.judged[0].fidelities) == [1, 4]
    (said,) = [line for line in log.lines if "none of its stages says so" in line]
    assert said.startswith("float32: an answer depends on its neighbours in the batch")
