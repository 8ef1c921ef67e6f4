import dataclasses
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from optimize import rendering
from optimize.cli import main
from optimize.rendered import MARKER
from optimize.reporting import write_campaign
from profiles.serving.environment_tarball import PACKAGES
from registry.errors import InputError
from registry.records import Artifact, Campaign, Candidate, ServingProfile
from registry.store import FolderStore
from tests.doubles import campaigns
from tests.doubles.models import mlp, write_onnx

URI = "s3://models/digits"
WON = campaigns.STATIC_TRITON
IMAGE = "registry.example/burnish-serve:1"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A finished campaign whose int8 variant is really in its store."""
    folder = tmp_path / "from"
    write_onnx(mlp(), folder)
    made = FolderStore(tmp_path / "work").add(
        folder, format="onnx", entry="model.onnx", inputs=campaigns.INPUTS, outputs=campaigns.OUTPUTS
    )
    write_campaign(with_artifact(made), tmp_path / "work")
    return tmp_path / "work"


def with_artifact(artifact: Artifact) -> Campaign:
    campaign = campaigns.campaign()
    variants = [
        dataclasses.replace(one, artifact=artifact) if one is campaigns.STATIC else one for one in campaign.variants
    ]
    return dataclasses.replace(campaign, variants=tuple(variants))


def changed(work: Path, **fields: Any) -> None:
    write_campaign(dataclasses.replace(rendering.read_campaign(work), **fields), work)


def render(work: Path, wanted: str | None = None, **asked: Any) -> dict[str, Any]:
    asked = {"storage_uri": URI, **asked}
    return rendering.render_candidate(work, wanted, work.parent / "out", rendering.rendering(**asked))


def manifest(work: Path, name: str, **names: str) -> dict[str, Any]:
    """A manifest that was rendered, with names in it replaced."""
    text = (work.parent / "out/manifests" / name).read_text()
    for known, word in names.items():
        text = text.replace(known, word)
    (made,) = yaml.safe_load_all(text)
    return made


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_winner_is_rendered_with_its_server(work: Path) -> None:
    told = render(work, image=IMAGE)
    assert told["candidate"] == WON.name
    assert told["storage_uri"].startswith(f"{URI}/{told['model']}/")
    assert told["server"] == f"burnish-triton-{WON.id[:8]}"
    assert told["requirements"] == ["triton", "burnish"]
    stem = told["storage_uri"].removeprefix(f"{URI}/")
    assert set(told["files"]) == {
        "manifests/model.yaml", "manifests/server.yaml",
        f"models/{stem}/config.pbtxt", f"models/{stem}/1/model.onnx", f"models/{stem}/1/model.py",
    }  # fmt: skip
    assert files_of(work.parent / "out") == {*told["files"], MARKER}
    assert told["storage_uri"] in (work.parent / "out/manifests/model.yaml").read_text()


def test_the_folder_of_manifests_holds_nothing_else(work: Path) -> None:
    render(work, image=IMAGE, max_replicas=4)
    assert sorted(path.name for path in (work.parent / "out/manifests").iterdir()) == [
        "autoscaler.yaml", "model.yaml", "server.yaml",
    ]  # fmt: skip
    assert (work.parent / "out/prometheus-adapter-values.yaml").is_file()


def test_memory_is_the_peak_that_was_seen_with_headroom(work: Path) -> None:
    campaign = rendering.read_campaign(work)
    assert render(work)["memory_bytes"] == pytest.approx(1.25e6 * (241.0 + campaigns.LAWS[WON.id][2]))
    one = campaign.rounds[0]
    run = dataclasses.replace(one.runs[0], metrics={**one.runs[0].metrics, "rss_mb": 4000.0})
    changed(work, rounds=(dataclasses.replace(one, candidate_id=WON.id, runs=(run,)), *campaign.rounds))
    assert render(work)["memory_bytes"] == 5_000_000_000


def test_unmeasured_memory_is_absent_and_said(work: Path) -> None:
    changed(work, measurements=())
    told = render(work)
    assert told["memory_bytes"] is None
    assert any("memory was not measured" in warning for warning in told["warnings"])
    assert "memory" not in (work.parent / "out/manifests/model.yaml").read_text()


def test_the_kernels_own_peak_counts(work: Path) -> None:
    # A container's limit has to hold what the server took for a moment between two looks.
    campaign = rendering.read_campaign(work)
    one = campaign.rounds[0]
    run = dataclasses.replace(one.runs[0], metrics={**one.runs[0].metrics, "peak_rss_mb": 4000.0})
    changed(work, rounds=(dataclasses.replace(one, candidate_id=WON.id, runs=(run,)), *campaign.rounds))
    assert render(work)["memory_bytes"] == 5_000_000_000


@pytest.mark.parametrize(
    ("asked", "spec"),
    [
        ({}, {"candidates": [{"name": "digits", "weight": 90}, {"name": "MODEL", "weight": 10}]}),
        ({"weight": 50}, {"candidates": [{"name": "digits", "weight": 50}, {"name": "MODEL", "weight": 50}]}),
        (
            {"mirror": 100},
            {"candidates": [{"name": "digits", "weight": 100}], "mirror": {"name": "MODEL", "percent": 100}},
        ),
    ],
)
def test_an_experiment_shares_another_models_requests(work: Path, asked: dict[str, Any], spec: dict[str, Any]) -> None:
    told = render(work, beside="digits", **asked)
    made = manifest(work, "experiment.yaml", **{told["model"]: "MODEL"})
    assert made["spec"] == {"default": "digits", "resourceType": "model", **spec}
    assert made["metadata"]["name"] == f"trial-{WON.id[:8]}"


def test_a_pipeline_has_the_candidate_among_its_steps(work: Path) -> None:
    told = render(work, pipeline="search=tokens,{model},rank")
    made = manifest(work, "pipeline.yaml")
    assert made["metadata"]["name"] == "search"
    assert [step["name"] for step in made["spec"]["steps"]] == ["tokens", told["model"], "rank"]
    assert made["spec"]["steps"][1]["inputs"] == ["tokens"]


@pytest.mark.parametrize("server", ["triton", "mlserver", "ours"])
def test_a_server_without_the_capability_is_said(work: Path, server: str) -> None:
    warned = [warning for warning in render(work, server=server)["warnings"] if "has no capability" in warning]
    lacking = {"triton": "burnish", "mlserver": "burnish, triton"}
    assert [f"{server!r} of Core 2's own has no capability {lacking[server]}:" in warning for warning in warned] == (
        [True] if server in lacking else []
    )


@pytest.mark.parametrize("won", [WON, campaigns.STATIC_MLSERVER], ids=["triton", "mlserver"])
def test_self_contained_goes_to_servers_of_core_2s_own(work: Path, won: Candidate) -> None:
    server = won.serving.server
    told = render(work, won.name, server=server, self_contained=True)
    assert told["requirements"] == [server, "python"]
    assert not any("has no capability" in warning for warning in told["warnings"])
    assert any(f"onnxruntime {won.engine_version} was measured" in warning for warning in told["warnings"])
    ours = [path for path in told["files"] if "burnish_runtime_" in path]
    assert len(ours) == (1 if server == "mlserver" else 0)
    files = [path for path in Path(told["folder"]).rglob("*") if path.suffix in {".py", ".json"}]
    assert not any(
        "from profiles" in path.read_text() or "profiles.serving.runtime" in path.read_text() for path in files
    )
    stem = told["storage_uri"].removeprefix(f"{URI}/")
    assert render(work, won.name, server=server)["storage_uri"].removeprefix(f"{URI}/") != stem


def test_self_contained_needs_no_image_with_burnish(work: Path) -> None:
    told = render(work, campaigns.STATIC_MLSERVER.name, self_contained=True, image="registry.example/mlserver:1")
    manifest = (work.parent / "out/manifests/server.yaml").read_text()
    assert "- python" in manifest
    assert "- burnish" not in manifest
    assert not any("'burnish'" in warning for warning in told["warnings"])


def test_an_environment_of_the_users_stands_beside_the_model(work: Path) -> None:
    packed = work.parent / "mine.tar.gz"
    names = ["bin/python", "lib/python3.10/site-packages/onnxruntime/__init__.py"]
    with tarfile.open(packed, "w:gz") as opened:
        for name in names:
            opened.addfile(tarfile.TarInfo(name))
    told = render(work, campaigns.STATIC_MLSERVER.name, self_contained=True, environment=str(packed))
    (beside,) = (path for path in told["files"] if path.rpartition("/")[2].startswith("environment-"))
    assert (work.parent / "out" / beside).read_bytes() == packed.read_bytes()
    said = "\n".join(told["warnings"])
    for words in ("for Python 3.10: the server", "an unknown version", "without workers", "as Python lists"):
        assert words in said
    measured = campaigns.STATIC_MLSERVER.engine_version
    assert f"onnxruntime {measured} was measured" in said


def test_an_environment_is_packed_of_what_was_measured(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "onnxruntime", ("packaging",))  # which is smaller
    asked = {"self_contained": True, "environment": "pack", "server": "mlserver"}
    told = render(work, campaigns.STATIC_MLSERVER.name, **asked)
    (beside,) = (path for path in told["files"] if path.rpartition("/")[2].startswith("environment-"))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    with tarfile.open(work.parent / "out" / beside) as opened:
        assert f"lib/python{python}/site-packages/packaging/__init__.py" in opened.getnames()
    settings = json.loads((Path(told["folder"]) / "model-settings.json").read_text())
    assert settings["parameters"]["environment_tarball"] == f"./{beside.rpartition('/')[2]}"
    assert any(f"The environment is for Python {python} on" in warning for warning in told["warnings"])
    assert render(work, campaigns.STATIC_MLSERVER.name, **asked)["storage_uri"] == told["storage_uri"]


@pytest.mark.parametrize(
    ("asked", "wanted", "said"),
    [
        ({"environment": "pack"}, None, "no use without our code"),
        ({"environment": "pack", "self_contained": True}, None, "is for Triton, and an environment is for MLServer"),
        ({"environment": "pack", "self_contained": True, "image": IMAGE}, campaigns.STATIC_MLSERVER.name, "workers"),
        (
            {"environment": "pack", "self_contained": True, "target": "files", "storage_uri": None},
            campaigns.STATIC_MLSERVER.name,
            "without workers",
        ),
        (
            {"environment": "gone.tar.gz", "self_contained": True},
            campaigns.STATIC_MLSERVER.name,
            "gone.tar.gz cannot be",
        ),
    ],
)
def test_an_environment_that_would_not_do_is_refused(
    work: Path, asked: dict[str, Any], wanted: str | None, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        render(work, wanted, **asked)
    assert not (work.parent / "out").exists()


def test_a_secret_brings_the_remote(work: Path) -> None:
    assert any("a remote named 's3'" in warning for warning in render(work)["warnings"])
    assert not any("a remote named" in warning for warning in render(work, secret="store")["warnings"])
    assert "secretName: store" in (work.parent / "out/manifests/model.yaml").read_text()


def test_a_rate_gives_replicas_from_the_pessimistic_end(work: Path) -> None:
    told = render(work, for_rate=2000.0, margin=0.2)
    low = campaigns.LAWS[WON.id][0] * 0.95
    assert told["rate_per_replica_rps"] == pytest.approx(0.8 * low)
    assert told["replicas"] == 3
    assert 2 * 0.8 * low < 2000 <= 3 * 0.8 * low


def test_the_same_again_is_the_same(work: Path) -> None:
    first = render(work, image=IMAGE)
    before = {path: (work.parent / "out" / path).read_bytes() for path in first["files"]}
    assert render(work, image=IMAGE) == first
    assert {path: (work.parent / "out" / path).read_bytes() for path in first["files"]} == before


def test_a_former_rendering_makes_room_whole(work: Path) -> None:
    render(work, image=IMAGE)
    told = render(work, campaigns.STATIC_MLSERVER.name)
    assert files_of(work.parent / "out") == {*told["files"], MARKER}
    assert any(f"rendered from {WON.name}" in warning for warning in told["warnings"])
    assert [path.name for path in work.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("change", ["added", "edited", "linked", "unmarked"])
def test_what_burnish_did_not_write_is_left_alone(work: Path, change: str) -> None:
    render(work)
    out = work.parent / "out"
    manifest = out / "manifests/model.yaml"
    if change == "added":
        (out / "notes.txt").write_text("mine")
    elif change == "edited":
        manifest.write_text(manifest.read_text() + "# mine\n")
    elif change == "linked":
        manifest.rename(work.parent / "elsewhere.yaml")
        manifest.symlink_to(work.parent / "elsewhere.yaml")
    else:
        (out / MARKER).write_text("[]")
    before = files_of(out)
    with pytest.raises(InputError, match=r"changed since|no rendering put there"):
        render(work)
    assert files_of(out) == before


def test_the_store_is_not_reached_by_what_is_done_to_copies(work: Path) -> None:
    told = render(work)
    copy = Path(told["folder"]) / "1/model.onnx"
    copy.write_bytes(b"")
    with pytest.raises(InputError, match="was changed"):
        render(work)
    (work.parent / "out").rename(work.parent / "away")
    render(work)
    assert (Path(told["folder"]) / "1/model.onnx").stat().st_size > 0


def test_plain_files_for_a_plain_server(work: Path) -> None:
    told = rendering.render_candidate(
        work, campaigns.STATIC_MLSERVER.id, work.parent / "out", rendering.rendering(target="files")
    )
    assert set(told["files"]) == {
        "settings.json", f"{told['model']}/model-settings.json", f"{told['model']}/model.onnx",
    }  # fmt: skip


def test_a_server_config_is_adapted_from_the_clusters(work: Path) -> None:
    containers = [{"name": "triton", "args": ["--log-verbose=1", "--x"]}]
    config = {"kind": "ServerConfig", "spec": {"podSpec": {"containers": containers}}}
    (work / "config.json").write_text(json.dumps(config))
    told = render(work, image=IMAGE, server_config=work / "config.json")
    text = (work.parent / "out/manifests/serverconfig.yaml").read_text()
    assert "--x" in text
    assert "--log-verbose" not in text
    assert f"serverConfig: {told['server']}" in (work.parent / "out/manifests/server.yaml").read_text()


def test_hardware_is_the_users_file(work: Path) -> None:
    (work / "gpu.yaml").write_text("gpus: 1\nnode_selector: {pool: gpu}\ntolerations: [{key: gpu, operator: Exists}]\n")
    told = render(work, image=IMAGE, hardware=work / "gpu.yaml")
    assert "The Server gets a GPU, and this candidate runs on the CPU." in told["warnings"]
    text = (work.parent / "out/manifests/server.yaml").read_text()
    assert 'nvidia.com/gpu: "1"' in text
    assert "pool: gpu" in text


def test_triton_is_asked_whether_it_takes_the_model(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = rendering.read_campaign(work)
    stock = dataclasses.replace(WON, serving=ServingProfile(server="triton", backend="onnxruntime"))
    changed(work, candidates=tuple(stock if one == WON else one for one in campaign.candidates))
    asked: list[tuple[str, str]] = []

    def lint(model: Path, *, triton: str) -> list[dict[str, str]]:
        asked.append((model.name, triton))
        return [{"message": "the model has opset 21; 18 is the newest", "fix": "Convert it."}]

    monkeypatch.setattr("optimize.readiness.lint.lint", lint)
    warnings = render(work)["warnings"]
    render(work, image="nvcr.io/nvidia/tritonserver:24.10-py3")
    render(work, image="registry.example/ours:3")
    assert asked == [("model.onnx", "23.03"), ("model.onnx", "24.10")]
    assert "Triton 23.03: the model has opset 21; 18 is the newest. Convert it." in warnings


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"storage_uri": None}, "where Core 2 is to fetch"),
        ({"storage_uri": "runs:/a"}, "cannot fetch"),
        ({"target": "kserve"}, "no target 'kserve'"),
        ({"target": "files"}, "--storage-uri is for Core 2"),
        ({"core2_version": "1.18"}, "nothing is known of Core 2 '1.18'"),
        ({"server": "a", "image": "b"}, "existing Server"),
        ({"server": "a.b"}, "no Server named 'a.b'"),
        ({"hardware": Path("x")}, "how a Server is made"),
        ({"replicas": 2, "for_rate": 3.0}, "--for-rate finds"),
        ({"replicas": 0}, "0 replicas"),
        ({"replicas": 3, "max_replicas": 2}, "below the 3 replicas"),
        ({"for_rate": -1.0}, "a rate of -1.0"),
        ({"for_rate": 10.0, "margin": 0.5}, "margin of 0.5"),
        ({"max_replicas": 3, "core2_version": "2.6"}, r"came after Core 2 2\.6"),
        ({"image": "i", "hardware": Path("/nowhere.yaml")}, r"nowhere\.yaml"),
        ({"image": "i", "server_config": Path("/nowhere.json")}, r"nowhere\.json"),
        ({"weight": 10}, "Name it with --beside"),
        ({"beside": "m", "weight": 10, "mirror": 10}, "--mirror does not"),
        ({"beside": "m", "weight": 101}, "a percentage, not 101"),
        ({"beside": "m", "mirror": 101}, r"spec\.mirror\.percent"),
        ({"beside": "m_1"}, "no Model named 'm_1'"),
        ({"pipeline": "a,{model}"}, "--pipeline 'a,{model}' is not understood"),
        ({"pipeline": "p=a,b"}, "{model} once"),
        ({"pipeline": "p=a_1,{model}"}, "no Model named 'a_1'"),
    ],
)
def test_refuses_what_cannot_be(work: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        render(work, **asked)
    assert not (work.parent / "out").exists()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("int8-statik @ triton-grpc-b8-d2", f"Did you mean '{WON.name}'"),
        ("zzz", "It has: float32 @"),
        ("int8-static", "served in several ways"),
    ],
)
def test_an_unknown_candidate_is_told_the_known_ones(work: Path, wanted: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        render(work, wanted)
    assert said in str(caught.value)


def test_a_folder_that_core_2_would_serve_otherwise_is_not_written(work: Path) -> None:
    folder = work.parent / "from"
    (folder / "7").mkdir()
    (folder / "7/vocabulary.txt").write_text("a")
    made = FolderStore(work).add(
        folder, format="onnx", entry="model.onnx", inputs=campaigns.INPUTS, outputs=campaigns.OUTPUTS
    )
    write_campaign(with_artifact(made), work)
    with pytest.raises(InputError, match=r"would not serve .*: 1/7 is taken for the model's version"):
        render(work)
    assert not (work.parent / "out").exists()
    assert any("a remote named 's3'" in warning for warning in render(work, campaigns.STATIC_MLSERVER.name)["warnings"])


def test_no_winner_and_no_saturation(work: Path) -> None:
    changed(work, measurements=())
    with pytest.raises(InputError, match="no saturation point was measured"):
        render(work, for_rate=5.0)
    changed(work, verdict=campaigns.no_winner())
    with pytest.raises(InputError, match="selected no candidate"):
        render(work)


def test_a_file_in_the_way(work: Path) -> None:
    (work.parent / "out").write_text("")
    with pytest.raises(InputError, match="is no folder"):
        render(work)


def test_the_command(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = work.parent / "out"
    command = ["burnish", "render", "--work", str(work), "--out", str(out), "--storage-uri", URI]
    monkeypatch.setattr(sys, "argv", [*command, "--environment", "pack"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "Add --self-contained." in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    told = capsys.readouterr()
    assert f"rclone copy {out}/models/" in told.out
    assert "warning: No Server of Core 2's own has the capability 'burnish'" in told.err
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert json.loads(capsys.readouterr().out)["candidate_id"] == WON.id


def test_what_is_uploaded_is_what_the_manifest_names(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, volume = work.parent / "out", work.parent / "volume"
    command = ["burnish", "render", "--work", str(work), "--out", str(out), "--with-server", IMAGE]
    uploading = [*command, "--upload", str(volume), "--storage-uri", "/mnt/models"]
    monkeypatch.setattr(sys, "argv", [*uploading, "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    told = json.loads(capsys.readouterr().out)
    assert told["uploaded"]
    assert told["placed_uri"] == told["storage_uri"].replace("/mnt/models", str(volume))
    assert told["storage_uri"] in (out / "manifests/model.yaml").read_text()
    assert files_of(Path(told["placed_uri"])) == files_of(Path(told["folder"])) != set()
    monkeypatch.setattr(sys, "argv", uploading)
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    assert f"Was there already: {told['placed_uri']}" in shown
    assert "rclone copy" not in shown


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--upload", "s3://models/a"], "which rclone remote of the cluster reads s3://"),
        (["--upload", "s3://models/a", "--storage-uri", "mine://models/b"], "is not where s3://models/a is"),
        (["--upload", "/srv/models", "--target", "files"], "--upload is for Core 2"),
    ],
)
def test_an_upload_that_core_2_could_not_fetch_is_refused_before_anything_is_written(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    out = work.parent / "out"
    monkeypatch.setattr(sys, "argv", ["burnish", "render", "--work", str(work), "--out", str(out), *given])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert said in capsys.readouterr().err
    assert not out.exists()
