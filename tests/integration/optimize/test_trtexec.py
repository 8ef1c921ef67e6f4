"""An engine built by a double of trtexec, on a machine with a double of nvidia-smi: no GPU was at hand."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import onnx
import pytest

from optimize.cli import main
from optimize.readiness.serving import parse_config
from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from optimize.stages.tensorrt import Prepare
from optimize.testing import samples_for, tiny_conv_net, tiny_transformer
from optimize.trtexec import build_engine, read_build
from registry.errors import InputError, NotApplicableError, StageError
from registry.records import StageCall

DOUBLES = Path(__file__).parents[2] / "doubles" / "trtexec"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """What the stage made of a model."""
    folder = tmp_path_factory.mktemp("trtexec")
    (folder / "ready").mkdir()
    Prepare({"version": 10})(tiny_conv_net(folder / "source"), Context(out=folder / "ready"))
    return folder / "ready"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch):
    """A machine whose PATH begins with some of the doubles, which do as wished."""

    def with_tools(*names: str, wish: str = "build 101200") -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            shutil.copy(DOUBLES / name, folder / name)
        (folder / "wish").write_text(wish)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return with_tools


def test_the_double_builds_and_what_it_was_built_with_is_kept(ready, machine, tmp_path: Path) -> None:
    machine("trtexec", "nvidia-smi")
    plan = build_engine(ready, tmp_path / "engine")
    assert plan.read_text() == "a plan\n"
    facts = json.loads((tmp_path / "engine" / "engine.json").read_text())
    assert (facts["tensorrt"], facts["gpu"], facts["compute_capability"]) == ("10.12", "NVIDIA L4", "8.9")
    assert facts["command"][-1] == "--stronglyTyped"
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == ["engine.json", "model.plan"]


@pytest.mark.parametrize(
    ("wish", "timeout_s", "said"),
    [
        ("fail 110000", 60, r"exit code 1\n(.*\n)*\[E\] Error\[4\]: network is not supported"),
        ("nothing 110000", 60, "wrote no model.plan"),
        ("hang 110000", 0.5, "more than 0.5 s"),
    ],
)
def test_a_build_that_fails_leaves_nothing(ready, machine, tmp_path: Path, wish, timeout_s, said) -> None:
    machine("trtexec", "nvidia-smi", wish=wish)
    with pytest.raises(StageError, match=said):
        build_engine(ready, tmp_path / "engine", timeout_s=timeout_s)
    assert list((tmp_path / "engine").iterdir()) == []


def test_without_a_gpu_or_trtexec_the_reason_is_said(ready, machine, tmp_path: Path, monkeypatch) -> None:
    machine("trtexec")
    if shutil.which("nvidia-smi") is None:
        with pytest.raises(NotApplicableError, match="no GPU"):
            build_engine(ready, tmp_path / "engine")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotApplicableError, match="no trtexec on PATH"):
        build_engine(ready, tmp_path / "engine")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no build\.json"):
        build_engine(tmp_path, tmp_path / "engine")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trtexec": {}}, "is not what the stage tensorrt.prepare makes"),
        ({"trtexec": {"newest": ["trtexec"]}}, "is not what the stage tensorrt.prepare makes"),
        ({"trtexec": {"10.0": "trtexec --onnx=model.onnx"}}, "is not what the stage tensorrt.prepare makes"),
        ({"profile": {"x": {"max": 3}}}, "is not what the stage tensorrt.prepare makes"),
        ({"trtexec": {"10.0": ["trtexec", "--staticPlugins=/tmp/own.so"]}}, "'--staticPlugins=/tmp/own.so'"),
        ({"trtexec": {"10.0": ["trtexec", "--saveEngine=/home/me/.profile"]}}, "'--saveEngine=/home/me/.profile'"),
        ({"trtexec": {"10.0": ["sh", "--onnx=model.onnx"]}}, "'sh'"),
    ],
)
def test_a_build_file_of_somebody_elses_is_refused(ready, tmp_path: Path, change: dict, said: str) -> None:
    folder = shutil.copytree(ready, tmp_path / "variant")
    build = json.loads((folder / "build.json").read_text())
    assert read_build(folder) == build
    (folder / "build.json").write_text(json.dumps(build | change))
    with pytest.raises(InputError, match=re.escape(said)):
        read_build(folder)


def test_an_engine_that_is_there_is_not_written_through(ready, machine, tmp_path: Path) -> None:
    machine("trtexec", "nvidia-smi")
    folder = shutil.copytree(ready, tmp_path / "variant")
    (tmp_path / "elsewhere").write_text("of somebody")
    for name in ("model.plan", "timing.cache"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    plan = build_engine(folder, tmp_path / "engine")
    assert not plan.is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "of somebody"


def test_int8_made_here_gives_the_rules_nothing_to_say(machine, tmp_path: Path) -> None:
    source = tiny_transformer(tmp_path / "source")
    made = source
    for call in (
        StageCall(name="quantize.tensorrt"),
        StageCall(name="tensorrt.prepare", params={"version": 10, "precision": "float16"}),
    ):
        out = tmp_path / call.name
        out.mkdir()
        context = Context(out=out, calibration=samples_for(source.inputs, count=16))
        result = make_stage(call)(made, context)
        made = read_input(result.folder, result.entry)
    assert json.loads((made.folder / "build.json").read_text())["findings"] == []
    assert onnx.load(made.path).opset_import[0].version == 19  # from which on Q and DQ take float16
    machine("trtexec", "nvidia-smi", wish="build 100300")
    build_engine(made.folder, tmp_path / "engine")
    command = json.loads((tmp_path / "engine" / "engine.json").read_text())["command"]
    assert command[-2:] == ["--fp16", "--int8"]


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def tensorrt(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["burnish", "tensorrt", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, capsys.readouterr().out

    return run


def config_of(model: str) -> object:
    return parse_config((Path(model) / "config.pbtxt").read_text())


def test_where_there_is_a_gpu_both_models_are_whole(ready, machine, tensorrt, tmp_path: Path) -> None:
    machine("trtexec", "nvidia-smi")
    code, told = tensorrt(ready, "--out", tmp_path / "repository", "--name", "net", "--json")
    assert code == 0
    document = json.loads(told)
    assert document["skipped"] is None
    assert Path(document["engine"]).read_text() == "a plan\n"
    plan, served = (config_of(place) for place in document["models"].values())
    assert (plan.name, plan.platform, plan.max_batch_size) == ("net-plan", "tensorrt_plan", 16)
    (accelerator,) = served.optimization.execution_accelerators.gpu_execution_accelerator
    assert (served.name, served.backend, accelerator.name) == ("net-onnx", "onnxruntime", "tensorrt")
    assert accelerator.parameters["trt_profile_max_shapes"] == "image:16x3x8x8"
    assert accelerator.parameters["precision_mode"] == "FP32"
    copied = tmp_path / "repository" / "net-onnx" / "1" / "model.onnx"
    assert copied.read_bytes() == (ready / "model.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "repository"]


def test_elsewhere_the_engine_is_left_out_with_the_reason_and_the_commands(
    ready, tensorrt, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, told = tensorrt(ready, "--out", tmp_path / "repository", "--max-batch-size", "1")
    assert code == 0
    assert "no engine was built: no trtexec on PATH; where the GPU is, run" in told
    assert "from TensorRT 10.0 on: trtexec --onnx=model.onnx" in told
    assert "from TensorRT 11.0 on: trtexec --onnx=model.onnx" in told
    assert config_of(str(tmp_path / "repository" / "ready-plan")).max_batch_size == 0
    assert list((tmp_path / "repository" / "ready-plan" / "1").iterdir()) == []
    code, _ = tensorrt(ready, "--out", tmp_path / "repository")
    assert code == 2


def test_a_build_that_fails_writes_nothing_and_is_told(ready, machine, tensorrt, tmp_path: Path) -> None:
    machine("trtexec", "nvidia-smi", wish="fail 110000")
    code, told = tensorrt(ready, "--out", tmp_path / "repository", "--json")
    assert code == 2
    assert "network is not supported" in json.loads(told)["error"]["message"]
    assert not (tmp_path / "repository").exists()
    code, told = tensorrt(ready, "--out", tmp_path / "bin" / "wish" / "below", "--json")
    assert code == 2
    assert "cannot be made" in json.loads(told)["error"]["message"]
