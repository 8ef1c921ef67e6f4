import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimize.readiness.profile import Range, parse_sizes, profile_of, profile_text
from optimize.stages.base import Context, StageInput, read_input
from optimize.stages.tensorrt import Prepare, command_for, triton_profiles, trtexec_command
from optimize.testing import cosine, run_model, samples_for, tiny_conv_net, tiny_transformer
from registry.errors import InputError, NotApplicableError
from registry.records import TensorSpec
from tests.doubles.models import two_inputs, write_onnx

DATA = Path(__file__).parents[3] / "data"
PROFILE = {
    "ids": Range(min=(1, 1), opt=(8, 128), max=(16, 512)),
    "mask": Range(min=(1, 1), opt=(8, 128), max=(16, 512)),
}
COMMON = [
    "trtexec",
    "--onnx=model.onnx",
    "--saveEngine=model.plan",
    "--memPoolSize=workspace:4096",
    "--minShapes=ids:1x1,mask:1x1",
    "--optShapes=ids:8x128,mask:8x128",
    "--maxShapes=ids:16x512,mask:16x512",
    "--timingCacheFile=timing.cache",
]


# --- commands and profiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "added"),
    [
        ((10, 0), ["--fp16", "--int8"]),
        ((10, 11), ["--fp16", "--int8"]),
        ((10, 12), ["--stronglyTyped"]),
        ((10, 16), ["--stronglyTyped"]),
        ((11, 0), []),
        ((11, 5), []),
    ],
)
def test_the_command_of_each_version(version, added) -> None:
    assert trtexec_command(version=version, profile=PROFILE, quantized=True, float16=True) == COMMON + added


def test_a_plain_model_gets_no_precision_flags_and_fixed_shapes_none() -> None:
    assert trtexec_command(version=(10, 0), profile={}, workspace_mb=64, onnx="a.onnx", plan="a.plan") == [
        "trtexec",
        "--onnx=a.onnx",
        "--saveEngine=a.plan",
        "--memPoolSize=workspace:64",
        "--timingCacheFile=timing.cache",
    ]


def test_the_strings_for_triton() -> None:
    assert triton_profiles(PROFILE) == {
        "trt_profile_min_shapes": "ids:1x1,mask:1x1",
        "trt_profile_opt_shapes": "ids:8x128,mask:8x128",
        "trt_profile_max_shapes": "ids:16x512,mask:16x512",
    }
    assert triton_profiles({}) == {}


def test_a_profile_names_all_inputs_and_takes_sizes_by_name() -> None:
    inputs = (
        TensorSpec(name="ids", dtype="int64", shape=("batch", "sequence")),
        TensorSpec(name="table", dtype="float32", shape=(4, 2)),
        TensorSpec(name="limit", dtype="float32", shape=()),
    )
    batch = Range(min=(1,), opt=(2,), max=(4,))
    profile = profile_of(inputs, batch=batch, sizes=parse_sizes("sequence=1, 64, 128"))
    assert profile_text(profile, "opt") == "ids:2x64,table:4x2"
    assert profile_of(inputs[1:], batch=batch, sizes={}) == {}


@pytest.mark.parametrize("text", ["sequence", "sequence=1,2", "=1,2,3", "sequence=3,2,1", "sequence=0,1,2", "s=a,b,c"])
def test_sizes_that_are_none(text) -> None:
    with pytest.raises(InputError, match="sizes"):
        parse_sizes(text)


# --- the stage -------------------------------------------------------------------------------------------------


def prepared(source: StageInput, out: Path, **params):
    out.mkdir(parents=True)
    result = Prepare(params)(source, Context(out=out))
    return result, json.loads((out / "build.json").read_text())


def test_what_the_build_needs_stands_beside_the_model(tmp_path: Path) -> None:
    result, build = prepared(tiny_conv_net(tmp_path / "source"), tmp_path / "out", version=10, max_batch=32)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["build.json", "model.onnx"]
    assert build["checked_for"] == "10.0"
    assert build["trtexec"]["10.12"] == trtexec_command(
        version=(10, 12), profile={"image": Range(min=(1, 3, 8, 8), opt=(8, 3, 8, 8), max=(32, 3, 8, 8))}
    )
    assert "--stronglyTyped" not in build["trtexec"]["11.0"]
    assert build["triton"]["trt_profile_max_shapes"] == "image:32x3x8x8"
    assert build["findings"] == []
    assert result.notes == ("how to build the engine is in build.json",)


def test_float16_is_in_the_graph_and_not_at_its_edges(tmp_path: Path) -> None:
    source = tiny_transformer(tmp_path / "source")
    result, build = prepared(source, tmp_path / "out", precision="float16")
    model = onnx.load(result.folder / result.entry)
    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert (result.inputs, result.outputs) == (source.inputs, source.outputs)
    assert "--fp16" in build["trtexec"]["10.0"]
    feeds = samples_for(source.inputs, count=3)
    assert cosine(run_model(source, feeds)[0], run_model(result, feeds)[0]) > 0.9999


def test_a_quantized_model_goes_to_float16_between_its_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(DATA / "modelopt-int8-float32.onnx", folder / "model.onnx")
    source = read_input(folder, "model.onnx")
    result, build = prepared(source, tmp_path / "out", precision="float16", version=10)
    model = onnx.load(result.folder / result.entry)
    onnx.checker.check_model(model, full_check=True)
    scales = [node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {kinds[name] for name in scales} == {onnx.TensorProto.FLOAT16}
    assert build["trtexec"]["10.0"][-2:] == ["--fp16", "--int8"]
    feeds = samples_for(source.inputs, count=3)
    assert cosine(run_model(source, feeds)[0], run_model(result, feeds)[0]) > 0.999


def test_opsets_that_no_node_uses_are_gone(tmp_path: Path) -> None:
    source = tiny_conv_net(tmp_path / "source")
    model = onnx.load(source.path)
    model.opset_import.add(domain="ai.onnx.ml", version=5)
    onnx.save(model, source.path)
    result, _ = prepared(source, tmp_path / "out")
    assert [entry.domain for entry in onnx.load(result.folder / result.entry).opset_import] == [""]


def test_an_old_opset_is_raised_for_float16(tmp_path: Path) -> None:
    source = tiny_conv_net(tmp_path / "source", opset=11)
    result, _ = prepared(source, tmp_path / "out", precision="float16")
    assert onnx.load(result.folder / result.entry).opset_import[0].version == 13


def test_a_model_that_tensorrt_would_refuse_is_refused_with_the_rule(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(
        [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])],
        "unsigned",
        ends[:1],
        ends[1:],
        [onnx.numpy_helper.from_array(np.float32(0.1), "s"), onnx.numpy_helper.from_array(np.uint8(128), "z")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    write_onnx(model, tmp_path / "source")
    with pytest.raises(NotApplicableError, match=r"TensorRT 11 would not take the model: E401 .* E402") as caught:
        prepared(read_input(tmp_path / "source", "model.onnx"), tmp_path / "out")
    assert "quantize.tensorrt" in str(caught.value.hint)


def test_free_dimensions_want_sizes(tmp_path: Path) -> None:
    write_onnx(two_inputs(), tmp_path / "source")
    source = read_input(tmp_path / "source", "model.onnx")
    with pytest.raises(NotApplicableError, match="'sequence' of the input 'ids' is free and has no sizes"):
        prepared(source, tmp_path / "none")
    with pytest.raises(NotApplicableError, match="no input has a free dimension 'width'"):
        prepared(source, tmp_path / "wrong", shapes="sequence=1,8,16; width=1,2,3")
    _, build = prepared(source, tmp_path / "out", shapes="sequence=1,8,16")
    assert build["profile"]["mask"] == {"min": [1, 1], "opt": [8, 8], "max": [16, 16]}


@pytest.mark.parametrize("params", [{"min_batch": 9}, {"shapes": "s=1"}, {"version": 9}, {"precision": "int8"}])
def test_parameters_that_do_not_fit(params) -> None:
    with pytest.raises(InputError):
        Prepare(params)


def test_the_command_for_a_version_is_the_newest_that_fits() -> None:
    build = {"trtexec": {"10.0": ["old"], "10.12": ["new"], "11.0": ["newest"]}}
    assert [command_for(build, version) for version in ((10, 3), (10, 14), (11, 5))] == [["old"], ["new"], ["newest"]]
    with pytest.raises(InputError, match=r"TensorRT 8\.6"):
        command_for(build, (8, 6))
