"""A rendered candidate is held against the Triton that would load it: by the rules themselves, in their child."""

import dataclasses
from pathlib import Path

import onnx
import pytest

from optimize.rendering import render_candidate, rendering
from optimize.reporting import write_campaign
from registry.records import ServingProfile
from registry.store import FolderStore
from tests.doubles import campaigns
from tests.doubles.models import mlp, write_onnx


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "refused"), [(17, False), (21, True)])
def test_core_2s_own_triton_is_asked_whether_it_loads_the_model(tmp_path: Path, opset: int, refused: bool) -> None:
    model = mlp()
    model.opset_import[0].version, model.ir_version = opset, 8
    onnx.checker.check_model(model, full_check=False)
    write_onnx(model, tmp_path / "from")
    artifact = FolderStore(tmp_path / "work").add(
        tmp_path / "from", format="onnx", entry="model.onnx", inputs=campaigns.INPUTS, outputs=campaigns.OUTPUTS
    )
    won = dataclasses.replace(
        campaigns.STATIC_TRITON, serving=ServingProfile(server="triton", backend="onnxruntime", max_batch_size=8)
    )
    variant = dataclasses.replace(campaigns.STATIC, artifact=artifact)
    campaign = dataclasses.replace(campaigns.campaign(), candidates=(won,), variants=(variant,))
    write_campaign(campaign, tmp_path / "work")
    told = render_candidate(tmp_path / "work", None, tmp_path / "out", rendering(storage_uri="s3://m"))
    assert told["requirements"] == ["onnx"]
    assert [warning for warning in told["warnings"] if "Triton 23.03: the model has opset 21" in warning] == (
        [warning for warning in told["warnings"] if warning.startswith("Triton")]
    )
    assert any(warning.startswith("Triton 23.03") for warning in told["warnings"]) == refused
