"""Real models through the door: ONNX files, torch modules and a Hugging Face folder, into a real store."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from optimize.engines.local import ChildFailure, Limits
from optimize.export import export_huggingface
from optimize.sources import load_huggingface, load_onnx, load_torch
from profiles.serving.session import open_session
from registry.errors import InputError, StageError, UntrustedModelError
from registry.store import FolderStore

pytestmark = pytest.mark.slow

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """Names of this machine must not leave it."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, image):
        return self.head(torch.relu(self.norm(self.convolution(image))).mean((2, 3)))


class Two(nn.Module):
    def forward(self, a, b=None):
        return {"sum": a if b is None else a + b, "first": torch.log(a)}  # of 0, as masks are


class Counting(nn.Module):
    def forward(self, image):
        return image, 3


class Branching(nn.Module):
    def forward(self, image):
        return image if image.sum() > 0 else -image


def net():
    return Net()


def two():
    return Two(), {"b": torch.ones(1, 4), "a": torch.zeros(1, 4)}


def branching():
    return Branching()


def raising():
    raise KeyError("no weights")


def number():
    return 3


def counting():
    return Counting()


def misfit():
    return Two(), {"a": torch.ones(1, 4), "b": torch.ones(1, 3)}
'''


@pytest.fixture
def place(tmp_path):
    (tmp_path / "nets_of_a_test.py").write_text(NETS)
    rows = np.random.default_rng(0).normal(size=(9, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", image=rows, labels=np.zeros(9, np.int64))
    return tmp_path


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "store")


def torch_source(place, store, factory, **options):
    return load_torch(
        "m",
        f"nets_of_a_test:{factory}",
        store,
        place / "work",
        samples=place / "samples.npz",
        python_path=place,
        **options,
    )


def need(*modules):
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is not installed")


def test_a_torch_module_takes_any_batch_and_its_bytes_repeat(place, store):
    need("torch", "onnxscript")
    first, second = (torch_source(place, store, "net", seed=4) for _ in range(2))
    assert first == second
    assert first.digest == first.artifact.files[0].sha256
    (image,), (output,) = first.artifact.inputs, first.artifact.outputs
    assert (image.name, image.dtype, image.shape) == ("image", "float32", ("batch", 1, 8, 8))
    assert (output.name, output.shape) == ("output", ("batch", 10))
    entry = store.path(first.artifact) / "model.onnx"
    content = entry.read_bytes()
    for leak in (str(place), "nets_of_a_test", str(Path.home()), "site-packages"):
        assert leak.encode() not in content
    assert open_session(entry, engine="onnxruntime").run({"image": np.ones((7, 1, 8, 8), np.float32)})
    assert not list((place / "work").iterdir())


def test_example_inputs_of_the_factory_and_outputs_by_their_keys(place, store):
    need("torch", "onnxscript")
    source = torch_source(place, store, "two")
    assert [spec.name for spec in source.artifact.inputs] == ["a", "b"]
    assert [spec.name for spec in source.artifact.outputs] == ["sum", "first"]


def test_an_opset_that_the_exporter_cannot_give_is_no_silent_other(place, store):
    need("torch", "onnxscript")
    with pytest.raises(StageError, match="opset 17 was asked for"):
        torch_source(place, store, "net", opset=17)


@pytest.mark.parametrize(
    ("factory", "kind", "text"),
    [
        ("branching", StageError, "cannot be exported"),
        ("raising", InputError, "raised KeyError: 'no weights'"),
        ("number", InputError, "returned int, not a torch.nn.Module"),
        ("missing", InputError, "has no 'missing'"),
        ("counting", InputError, "forward of nets_of_a_test:counting returned int among its answers, not tensors"),
        ("misfit", InputError, r"forward of nets_of_a_test:misfit raised RuntimeError: .*\n?.*a \[4, 4\], b \[4, 3\]"),
    ],
)
def test_factories_that_fail(place, store, factory, kind, text):
    need("torch", "onnxscript")
    with pytest.raises(kind, match=text):
        torch_source(place, store, factory)
    assert not list((place / "work").iterdir())


def test_samples_that_do_not_fit_forward(place, store):
    need("torch", "onnxscript")
    np.savez(place / "samples.npz", a=np.ones((3, 4), np.float32), b=np.ones((3, 4), np.float32))
    with pytest.raises(InputError, match=r"takes \['image'\], but the example inputs are \['a', 'b'\]"):
        torch_source(place, store, "net")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    need("torch", "transformers", "optimum.exporters.onnx")
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder, safe_serialization=True)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    return folder


def feed():
    ids = np.array([[2, 7, 9, 3], [2, 8, 3, 0], [5, 0, 0, 0]], np.int64)
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}


def states(folder):
    import torch
    from transformers import BertModel

    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in feed().items()}
        return BertModel.from_pretrained(folder).eval()(**tensors).last_hidden_state.numpy()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), (None, False)])
def test_a_hugging_face_folder(bert, place, store, pooling, normalize):
    source = load_huggingface("m", bert, store, place / "work", pooling=pooling, normalize=normalize)
    hidden, mask = states(bert), feed()["attention_mask"][..., None]
    wanted = {"mean": (hidden * mask).sum(1) / mask.sum(1), "cls": hidden[:, 0], None: hidden}[pooling]
    if normalize:
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    entry = store.path(source.artifact) / "model.onnx"
    output = "embedding" if pooling else "last_hidden_state"
    assert [spec.name for spec in source.artifact.outputs] == [output]
    assert source.artifact.outputs[0].shape[-1] == 16
    for engine in ("onnxruntime", "openvino"):
        got = open_session(entry, engine=engine, precision="float32").run(feed())[output]
        assert np.abs(got - wanted).max() < 1e-5
    alone = open_session(entry, engine="onnxruntime").run({name: array[2:, :1] for name, array in feed().items()})
    if pooling:
        assert np.abs(alone[output] - wanted[2]).max() < 1e-5


@pytest.mark.filterwarnings("ignore")  # of torch's tracer
def test_an_export_that_answers_otherwise_is_refused(bert, tmp_path, monkeypatch):
    from optimum.exporters import onnx as exporters

    exported = exporters.main_export

    def export(*args, output, **kwargs):
        exported(*args, output=output, **kwargs)
        model = onnx.load(output / "model.onnx")
        weight = next(item for item in model.graph.initializer if "LayerNorm.bias" in item.name)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(0.01), weight.name))
        onnx.save(model, output / "model.onnx")

    monkeypatch.setattr(exporters, "main_export", export)
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"the output 'last_hidden_state' differs by \S+ between ONNX and torch"):
        export_huggingface(
            source=str(bert), folder=str(tmp_path / "out"), task="feature-extraction", pooling=None, normalize=False,
            opset=None, allow_pickle=False,
        )  # fmt: skip


def test_a_task_that_there_is_not(bert, place, store):
    with pytest.raises(StageError, match="no-such-task"):
        load_huggingface("m", bert, store, place / "work", task="no-such-task")
    assert not list((place / "work").iterdir())


def test_a_model_type_that_nobody_knows(bert, place, store):
    folder = place / "alien"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "alien"}))
    (folder / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    with pytest.raises(StageError, match="alien"):
        load_huggingface("m", folder, store, place / "work")


def save_onnx(path):
    model = parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[b,4] x) => (float[b,4] y) '
                               "{ y = Mul(x, w) }")  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "w"))
    onnx.save(model, path)
    return path


def test_an_onnx_file(place, store):
    path = save_onnx(place / "net.onnx")
    source = load_onnx("m", path, store, place / "work")
    assert (store.path(source.artifact) / "model.onnx").read_bytes() == path.read_bytes()
    assert (source.kind, source.artifact.entry, source.location) == ("onnx", "model.onnx", str(path))
    assert source.digest == source.artifact.files[0].sha256


def test_nothing_of_a_refused_model_is_kept(place, store):
    path = save_onnx(place / "net.onnx")
    model = onnx.load(path)
    model.graph.initializer.append(
        TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=(2_500_000_000,), raw_data=b"")
    )
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UntrustedModelError, match="'huge'"):
        load_onnx("m", path, store, place / "work")
    assert not list((place / "work").iterdir())
    assert not list((place / "store" / "artifacts").glob("*.json"))


def test_limits_hold(place, store):
    with pytest.raises(ChildFailure) as caught:
        load_onnx("m", save_onnx(place / "net.onnx"), store, place / "work", limits=Limits(timeout_s=0.01))
    assert caught.value.kind == "timeout"
