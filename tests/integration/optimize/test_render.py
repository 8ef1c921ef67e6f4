"""A rendered candidate is held against the Triton that would load it: by the rules themselves, in their child."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from optimize.cli import main
from optimize.rendering import render_candidate, rendering
from optimize.reporting import write_campaign
from registry.records import ServingProfile
from registry.store import FolderStore
from tests.doubles import campaigns
from tests.doubles.kubernetes_api import KubernetesDouble
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


@pytest.mark.slow
def test_the_cluster_is_asked_what_applying_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_onnx(mlp(), tmp_path / "from")
    artifact = FolderStore(tmp_path / "work").add(
        tmp_path / "from", format="onnx", entry="model.onnx", inputs=campaigns.INPUTS, outputs=campaigns.OUTPUTS
    )
    made = campaigns.campaign()
    variants = [dataclasses.replace(one, artifact=artifact) for one in made.variants]
    write_campaign(dataclasses.replace(made, variants=tuple(variants)), tmp_path / "work")

    def render(*options: str) -> tuple[int, Any]:
        line = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--storage-uri", "gs://m"]
        monkeypatch.setattr("sys.argv", ["burnish", "render", *line, "--with-server", "registry/serve:1", *options])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr().out
        return int(caught.value.code or 0), json.loads(said) if "--json" in options else said

    cluster = tmp_path / "cluster.yaml"
    with KubernetesDouble() as double:
        section = {
            "kind": "kubernetes", "kubeconfig": str(double.kubeconfig(tmp_path)), "mesh": double.mesh,
            "storage": str(tmp_path / "shelf"),
        }  # fmt: skip
        cluster.write_text(json.dumps({"cluster": section}))
        code, told = render("--dry-run", str(cluster), "--json")
        assert code == 0
        assert [(one["kind"], one["action"]) for one in told["dry_run"]["changes"]] == [
            ("Model", "create"), ("Server", "create"),
        ]  # fmt: skip
        assert double.names() == []
        double.put("models", told["model"], {"storageUri": "gs://m", "replicas": 3}, **{"burnish.campaign": made.id})
        code, refused = render("--dry-run", str(cluster), "--json")
        assert code == 2
        assert "kubectl has set" in refused["error"]["message"]
        double.remove(told["model"])
        assert f"make Model {told['model']}" in render("--dry-run", str(cluster))[1]
    assert render("--dry-run", str(cluster), "--json")[0] == 4
    cluster.write_text("cluster: {kind: local}")
    assert render("--dry-run", str(cluster), "--json")[0] == 2
