"""Stages on models as exporters really write them, and in processes of their own."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest

from optimize.calibration import whole_batches, write_ranges
from optimize.recipes import apply_recipe, load_recipes, recipe
from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from optimize.stages.simplify import optimize_with_ort
from optimize.testing import cosine, run_model, samples_for, tiny_conv_net, tiny_transformer
from registry.errors import NotApplicableError
from registry.records import StageCall

pytestmark = pytest.mark.slow


def run(name, source, tmp_path, calibration=None, **params):
    out = tmp_path / f"made-{name}"
    out.mkdir()
    context = Context(out=out, calibration=calibration, threads=1)
    return make_stage(StageCall(name=name, params=params))(source, context)


def op_types(path):
    return {node.op_type for node in onnx.load(str(path)).graph.node}


def op_types_as_run(result, tmp_path):
    optimize_with_ort(result.folder / result.entry, tmp_path / "as-run.onnx", level="all", threads=1)
    return op_types(tmp_path / "as-run.onnx")


@pytest.mark.parametrize("name", ["quantize.dynamic", "quantize.static", "precision.float16"])
def test_weights_in_constant_nodes(name, tmp_path):
    source = tiny_transformer(tmp_path / "source", constant_nodes=True)
    made = run(name, source, tmp_path, samples_for(source.inputs, count=8))
    feeds = samples_for(source.inputs, count=2, seed=3)
    assert cosine(run_model(source, feeds)[0], run_model(made, feeds)[0]) > 0.98
    assert (made.folder / made.entry).stat().st_size < 0.75 * source.path.stat().st_size


@pytest.mark.parametrize("opset", [9, 10, 11, 12])
def test_old_opsets_are_raised_for_static_int8(opset, tmp_path):
    source = tiny_conv_net(tmp_path / "source", opset=opset)
    made = run("quantize.static", source, tmp_path, samples_for(source.inputs, count=8))
    assert any(f"opset raised from {opset} to 13" in note for note in made.notes)
    feeds = samples_for(source.inputs, count=2, seed=3)
    assert cosine(run_model(source, feeds)[0], run_model(made, feeds)[0]) > 0.98


def test_weights_repeated_among_the_inputs(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    model = onnx.load(str(source.path))
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, str(source.path))
    source = read_input(source.folder, source.entry)
    assert [spec.name for spec in source.inputs] == ["image"]
    made = run("quantize.static", source, tmp_path, samples_for(source.inputs, count=8))
    assert [value.name for value in onnx.load(str(made.folder / made.entry)).graph.input] == ["image"]


def test_external_weights_come_along(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    onnx.save(
        onnx.load(str(source.path)), str(source.path), save_as_external_data=True, location="w.bin", size_threshold=0
    )
    assert (source.folder / "w.bin").exists()
    feeds = samples_for(source.inputs, count=2)
    for name in ("simplify.ort", "quantize.static", "precision.float16", "convert.openvino"):
        made = run(name, source, tmp_path, samples_for(source.inputs, count=8))
        assert cosine(run_model(source, feeds)[0], run_model(made, feeds)[0]) > 0.98


def test_a_fixed_batch_is_fed_as_it_is(tmp_path):
    source = tiny_conv_net(tmp_path / "source", batch=3)
    made = run("quantize.static", source, tmp_path, samples_for(source.inputs, count=8))
    assert made.inputs[0].shape == (3, 3, 8, 8)
    with pytest.raises(NotApplicableError, match="fixes its batch at 3, and there are only 2 samples"):
        run("quantize.static", source, tmp_path / "source", samples_for(source.inputs, count=2))


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_ranges_do_not_depend_on_how_samples_are_batched(method, tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    samples = samples_for(source.inputs, count=32)
    found = []
    for size in (1, 5, 32):
        target = tmp_path / f"{method}-{size}.json"
        batches = whole_batches(samples, source.inputs, wanted=size)
        common = {"op_types": ["Conv", "Gemm"], "percentile": 99.9, "symmetric": False, "threads": 1}
        write_ranges(source.path, batches, target, method=method, **common)
        ranges = json.loads(target.read_text())["data"]
        found.append([float(np.ravel(ranges[name][end]["data"] if isinstance(ranges[name][end], dict)
                                     else ranges[name][end])[0])
                      for name in sorted(ranges) for end in ("lowest", "highest")])  # fmt: skip
    # Histograms are widened bin by bin as batches come, which moves a percentile by a bin or so.
    tolerance = {"minmax": 1e-6, "percentile": 0.1}[method]
    assert len(found[0]) > 4
    np.testing.assert_allclose(found[0], found[2], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found[1], found[2], rtol=tolerance, atol=tolerance)


def test_an_activation_that_is_not_finite_is_a_verdict(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    model = onnx.load(str(source.path))
    huge = onnx.numpy_helper.from_array(np.full((8, 3, 3, 3), 3e38, np.float32), model.graph.initializer[0].name)
    model.graph.initializer[0].CopyFrom(huge)
    onnx.save(model, str(source.path))
    with pytest.raises(NotApplicableError, match="not finite on the calibration samples"):
        run("quantize.static", source, tmp_path, samples_for(source.inputs, count=4))


def test_a_quantized_model_is_not_quantized_again(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    samples = samples_for(source.inputs, count=4)
    once = run("quantize.static", source, tmp_path, samples)
    again = read_input(once.folder, once.entry)
    for name in ("quantize.dynamic", "quantize.static", "precision.float16"):
        with pytest.raises(NotApplicableError, match="quantized already"):
            run(name, again, tmp_path / "source", samples)


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_a_missing_extra_is_a_verdict_that_names_it(missing, tmp_path, monkeypatch):
    source = tiny_conv_net(tmp_path / "source")
    made = run("convert.openvino", source, tmp_path)
    converted, samples = read_input(made.folder, made.entry), samples_for(source.inputs, count=4)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(NotApplicableError, match="extra 'openvino'") as caught:
        run("quantize.openvino", converted, tmp_path / "source", samples)
    assert "pip install 'burnish[openvino]'" in caught.value.hint


def test_an_operator_that_no_engine_knows_is_a_verdict(tmp_path):
    source = tiny_conv_net(tmp_path / "source")
    model = onnx.load(str(source.path))
    model.graph.node[2].op_type, model.graph.node[2].domain = "Swirl", "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(model, str(source.path))
    for name in ("simplify.ort", "convert.openvino"):
        with pytest.raises(NotApplicableError, match="Swirl"):
            run(name, source, tmp_path)


MAKE = """
import sys
from pathlib import Path
from optimize.stages import make_stage
from optimize.stages.base import Context, read_input
from optimize.testing import contents, samples_for
from registry.records import StageCall
folder, entry, out, name = sys.argv[1:]
source = read_input(Path(folder), entry)
Path(out).mkdir()
samples = samples_for(source.inputs, count=8)
made = make_stage(StageCall(name=name))(source, Context(out=Path(out), calibration=samples))
print(sorted(contents(made.folder).items()))
"""


@pytest.mark.parametrize(
    "name", ["simplify.ort", "simplify.transformer", "quantize.dynamic", "quantize.static", "precision.float16",
             "convert.openvino", "quantize.openvino"],
)  # fmt: skip
def test_another_process_makes_the_same_bytes(name, tmp_path):
    source = tiny_transformer(tmp_path / "source")
    if name == "quantize.openvino":
        made = run("convert.openvino", source, tmp_path)
        source = read_input(made.folder, made.entry)
    told = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", MAKE, str(source.folder), source.entry, str(tmp_path / f"out{seed}"), name]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert told[0] == told[1]
    assert "model." in told[0]


# --- exports -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_export(tmp_path_factory):
    """A residual network as torch's dynamo exporter writes it, with a free batch."""
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    import warnings

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16))
            self.inner = torch.nn.Sequential(
                torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16)
            )
            self.head = torch.nn.Linear(16, 10)

        def forward(self, image):
            first = self.stem(image)
            return self.head(torch.relu(first + self.inner(first)).mean((2, 3)))

    torch.manual_seed(0)
    net = Net().eval()
    folder = tmp_path_factory.mktemp("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.randn(2, 3, 16, 16),),
            str(folder / "model.onnx"),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        )
    return read_input(folder, "model.onnx")


def test_static_int8_of_a_torch_export_fuses_in_the_engine(torch_export, tmp_path):
    made = run("quantize.static", torch_export, tmp_path, samples_for(torch_export.inputs, count=16))
    as_run = op_types_as_run(made, tmp_path)
    assert "QLinearConv" in as_run
    assert not as_run & {"Conv", "FusedConv", "BatchNormalization"}
    assert "Conv" in op_types(made.folder / made.entry)


@pytest.fixture(scope="module")
def bert_export(tmp_path_factory):
    """A tiny BERT as optimum exports it."""
    pytest.importorskip("optimum.exporters.onnx", reason="the extra hf is not installed")
    import warnings

    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bert")
    BertModel(config).eval().save_pretrained(folder / "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.exporters.onnx import onnx_export_from_model

        onnx_export_from_model(
            BertModel.from_pretrained(folder / "hf"), folder / "onnx", task="feature-extraction", do_validation=False
        )
    return read_input(folder / "onnx", "model.onnx")


def tokens(count, seed=0, *, left=False):
    random = np.random.default_rng(seed)
    ids = random.integers(1, 64, (count, 12))
    mask = (np.arange(12) < random.integers(4, 13, (count, 1))).astype(np.int64)
    mask = mask[:, ::-1].copy() if left else mask
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize("name", load_recipes().sets["balanced"])
def test_every_balanced_recipe_makes_something_of_an_encoder(name, bert_export, tmp_path):
    calibration = tokens(16)
    made = apply_recipe(recipe(name), bert_export, calibration=calibration, seed=0, threads=1, work=tmp_path)
    assert (made.inputs, made.outputs) != ((), ())
    assert [spec.name for spec in made.inputs] == [spec.name for spec in bert_export.inputs]
    assert {spec.dtype for spec in made.inputs} == {"int64"}
    feeds = tokens(5, seed=9)
    assert cosine(run_model(bert_export, feeds)[0], run_model(made, feeds)[0]) > 0.98


def test_fusion_is_right_for_padding_on_either_side(bert_export, tmp_path):
    made = run("simplify.transformer", bert_export, tmp_path)
    assert "Attention" in op_types(made.folder / made.entry)
    for left in (False, True):
        feeds = tokens(5, seed=9, left=left)
        rows = feeds["attention_mask"].astype(bool)
        before, after = run_model(bert_export, feeds)[0], run_model(made, feeds)[0]
        np.testing.assert_allclose(after[rows], before[rows], atol=1e-4)


def test_fused_attention_is_quantized_too(bert_export, tmp_path):
    fused = run("simplify.transformer", bert_export, tmp_path)
    made = run("quantize.dynamic", read_input(fused.folder, fused.entry), tmp_path)
    assert "QAttention" in op_types(made.folder / made.entry)
    feeds = tokens(5, seed=9)
    assert cosine(run_model(bert_export, feeds)[0], run_model(made, feeds)[0]) > 0.98
