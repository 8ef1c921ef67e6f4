"""ONNX files read without their weights, and moved as they would be written."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize.stages import onnx_files
from tests.doubles.models import mlp


def of_every_type() -> onnx.ModelProto:
    """A model with weights of many types, each written in every field that ONNX has for it, and a Constant node."""
    arrays = {
        "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f8": np.arange(4, dtype=np.float64),
        "i4": np.arange(3, dtype=np.int32),
        "i8": np.arange(5, dtype=np.int64),
        "u8": np.arange(7, dtype=np.uint64),
    }
    tensors = [numpy_helper.from_array(array, f"{name}_raw") for name, array in arrays.items()]
    for name, array in arrays.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensors.append(helper.make_tensor(f"{name}_typed", kind, array.shape, array.ravel().tolist()))
    tensors.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"b"]))
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["kept"], value=numpy_helper.from_array(np.ones(4, np.float32))),
            helper.make_node("Add", ["x", "kept"], ["y"], name="add"),
        ],
        "types",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {"author": "somebody"})
    return model


def test_a_graph_is_read_without_the_numbers_of_its_weights(tmp_path: Path) -> None:
    model = of_every_type()
    onnx.save(model, tmp_path / "model.onnx")
    for tensor in model.graph.initializer:
        for kind in ("float", "int32", "string", "int64", "raw", "double", "uint64"):
            tensor.ClearField(f"{kind}_data")
    assert onnx_files.load_graph(tmp_path / "model.onnx") == model


def test_weights_in_other_files_keep_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(mlp(), path, save_as_external_data=True, size_threshold=0, location="weights")
    assert onnx_files.load_graph(path) == onnx.load(path, load_external_data=False)
    assert onnx_files.has_external_weights(path)
    (tmp_path / "alone").mkdir()
    onnx.save(onnx.load(path), tmp_path / "alone" / "model.onnx")
    assert not onnx_files.has_external_weights(tmp_path / "alone" / "model.onnx")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\x0f" + data, lambda _: b""])
def test_what_is_no_model_is_said(tmp_path: Path, damage: "object") -> None:
    assert callable(damage)
    path = tmp_path / "model.onnx"
    path.write_bytes(damage(mlp().SerializeToString()))
    with pytest.raises(ValueError, match=r"protobuf|ONNX|empty"):
        onnx_files.load_graph(path)


@pytest.mark.parametrize("imports", [[("", 17)], [("", 17), ("nobody.uses.it", 3)]])
@pytest.mark.parametrize("outside", [False, True])
def test_a_file_is_moved_as_it_would_be_written(
    tmp_path: Path, imports: list[tuple[str, int]], *, outside: bool
) -> None:
    model = mlp()
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*one) for one in imports)
    folders = [tmp_path / name for name in ("made", "written", "moved")]
    for folder in folders:
        folder.mkdir()
    made, written, moved = folders
    path = made / "int8.onnx"
    onnx.save(model, path, save_as_external_data=outside, size_threshold=0, location="int8.onnx.data")
    onnx_files.save(onnx.load(path), written)
    assert onnx_files.move(path, moved) == onnx_files.ENTRY
    assert {one.name: one.read_bytes() for one in moved.iterdir()} == {
        one.name: one.read_bytes() for one in written.iterdir()
    }
