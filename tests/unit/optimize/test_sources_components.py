"""What a source depends on, so that an export is done again when, and only when, it must be."""

import sys
from importlib.machinery import PathFinder

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from optimize.export import kept_files
from optimize.sources import code_digests, load_huggingface, load_onnx, source_components
from registry.codec import canonical
from registry.errors import InputError, UntrustedModelError


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "nets"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "layers.py").write_text("SIZE = 3\n")
    (folder / "model.py").write_text("import json\nfrom . import layers\nimport helpers_of_mine\ndef make(): ...\n")
    (folder / "unused.py").write_text("")
    (tmp_path / "helpers_of_mine.py").write_text("")
    np.savez(tmp_path / "samples.npz", x=np.ones((3, 4), np.float32))
    return tmp_path


def torch_components(package, **options):
    options.setdefault("samples", package / "samples.npz")
    return source_components("torch", "nets.model:make", python_path=package, **options)


def test_a_factory_depends_on_what_its_module_imports_and_no_more(package):
    found = torch_components(package, seed=1)
    assert set(found["files"]) == {"nets", "nets.model", "nets.layers", "helpers_of_mine"}
    assert found["seed"] == 1
    assert found["examples"] == {"x": ["float32", 4]}
    assert "nets" not in sys.modules
    assert canonical(found)


@pytest.mark.parametrize("file", ["nets/layers.py", "nets/model.py", "helpers_of_mine.py"])
def test_a_change_to_any_of_them_is_seen(package, file):
    before = torch_components(package)
    (package / file).write_text((package / file).read_text() + "# changed\n")
    assert torch_components(package) != before


def test_a_change_elsewhere_is_not(package):
    before = torch_components(package)
    (package / "nets" / "unused.py").write_text("# changed\n")
    np.savez(package / "samples.npz", x=np.zeros((5, 4), np.float32))
    assert torch_components(package) == before


def test_files_that_the_factory_reads_are_named_by_the_user(package):
    (package / "weights.safetensors").write_bytes(b"1")
    before = torch_components(package, depends_on=[package / "weights.safetensors"])
    (package / "weights.safetensors").write_bytes(b"2")
    assert torch_components(package, depends_on=[package / "weights.safetensors"]) != before


def test_a_module_that_is_not_there(package):
    with pytest.raises(InputError, match="no module named 'nowhere'") as caught:
        source_components("torch", "nowhere:make", python_path=package)
    assert "beside the campaign file" in caught.value.hint


def test_code_of_the_users_is_digested_file_by_file(package):
    before = code_digests("nets.model:make", package)
    assert set(before) == {"nets", "nets.model", "nets.layers", "helpers_of_mine"}
    (package / "helpers_of_mine.py").write_text("# changed\n")
    after = code_digests("nets.model:make", package)
    assert {name for name in before if before[name] != after[name]} == {"helpers_of_mine"}


def test_folders_without_an_init_are_packages_too(tmp_path):
    (tmp_path / "plain" / "inner").mkdir(parents=True)
    (tmp_path / "plain" / "inner" / "metric.py").write_text("from plain.inner import other\n")
    (tmp_path / "plain" / "inner" / "other.py").write_text("")
    assert set(code_digests("plain.inner.metric:score", tmp_path)) == {"plain.inner.metric", "plain.inner.other"}


def test_a_package_that_is_installed_in_place_is_found(package, monkeypatch, tmp_path_factory):
    class InPlace:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return PathFinder.find_spec(name, [str(package)]) if name == "nets" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, InPlace])
    assert "nets.layers" in code_digests("nets.model:make", tmp_path_factory.mktemp("elsewhere"))


def test_a_compiled_module_has_no_code_to_digest():
    assert code_digests("math:fsum", None) == {}


def save(path, **options):
    model = parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[b,4] x) => (float[b,4] y) '
                               "{ y = Mul(x, w) }")  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "w"))
    onnx.save(model, path, **options)
    return path


def test_an_onnx_file_depends_on_its_external_data(tmp_path):
    path = save(tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    before = source_components("onnx", str(path))
    assert set(before["files"]) == {"model.onnx", "m.data"}
    (tmp_path / "m.data").write_bytes(b"\1" * 16)
    assert source_components("onnx", str(path)) != before
    (tmp_path / "m.data").unlink()
    with pytest.raises(InputError, match=r"m\.onnx keeps weights in 'm\.data', which is not beside it"):
        source_components("onnx", str(path))


def test_external_data_elsewhere_is_not_even_read(tmp_path):
    path = save(tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../secret"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UntrustedModelError, match="stays inside"):
        source_components("onnx", str(path))


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "modeling.py").write_text("raise RuntimeError")
    return tmp_path


def test_pickles_and_code_beside_safetensors_are_left_out(bert):
    assert [file.name for file in kept_files(bert)] == ["config.json", "model.safetensors"]
    found = source_components("huggingface", str(bert), task="feature-extraction", pooling="mean")
    assert set(found["files"]) == {"config.json", "model.safetensors"}
    assert found["pooling"] == "mean"


def test_pickles_alone_are_refused_unless_named(bert):
    (bert / "model.safetensors").unlink()
    with pytest.raises(UntrustedModelError, match=r"pytorch_model\.bin, a pickle") as caught:
        kept_files(bert)
    assert "safe_serialization" in caught.value.hint
    assert "pytorch_model.bin" in [file.name for file in kept_files(bert, allow_pickle=True)]


@pytest.mark.parametrize(
    ("config", "kind", "text"),
    [
        ('{"auto_map": {"AutoModel": "modeling.Evil"}}', UntrustedModelError, "code of its own"),
        ("{", InputError, "not JSON"),
        ('["a list"]', InputError, "not JSON|no object"),
    ],
)
def test_configurations_that_are_refused(bert, config, kind, text):
    (bert / "config.json").write_text(config)
    with pytest.raises(kind, match=text):
        kept_files(bert)


def test_shards_stay_in_the_folder(bert):
    index = bert / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "../other.safetensors"}}')
    with pytest.raises(UntrustedModelError, match="same folder"):
        kept_files(bert)
    index.write_text('{"weight_map": {"w": "model-2.safetensors"}}')
    with pytest.raises(InputError, match="not there"):
        kept_files(bert)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        kept_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no weights"):
        kept_files(tmp_path)


def test_what_is_wrong_is_said_before_anything_is_started(bert, tmp_path):
    with pytest.raises(InputError, match="there is no pooling"):
        load_huggingface("m", bert, None, tmp_path / "work", normalize=True)
    with pytest.raises(InputError, match="no model at"):
        load_onnx("m", tmp_path / "none.onnx", None, tmp_path / "work")
    assert not (tmp_path / "work").exists()
