"""Tiny models, made in code from a fixed seed: real ONNX and OpenVINO files that run in microseconds."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from registry.records import Artifact, ArtifactFile, TensorSpec

FEATURES = 8
CLASSES = 4
HIDDEN = 16
OPSET = 17
IR_VERSION = 9


def _weights(seed: int = 0) -> tuple[npt.NDArray[np.float32], ...]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(FEATURES, HIDDEN)).astype(np.float32),
        rng.normal(size=HIDDEN).astype(np.float32),
        rng.normal(size=(HIDDEN, CLASSES)).astype(np.float32),
        rng.normal(size=CLASSES).astype(np.float32),
    )


def mlp_answer(features: npt.NDArray[np.float32], *, seed: int = 0) -> npt.NDArray[np.float32]:
    """What `mlp` answers, computed with numpy: (rows, 8) float32 -> (rows, 4) float32."""
    w1, b1, w2, b2 = _weights(seed)
    return np.maximum(features @ w1 + b1, 0) @ w2 + b2


def mlp(
    *, batch: int | str = "batch", seed: int = 0, dtype: Literal["float32", "float16"] = "float32"
) -> onnx.ModelProto:
    """A two-layer perceptron ``x`` (batch, 8) -> ``logits`` (batch, 4); `batch` may be a fixed number."""
    element = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
    names = ("w1", "b1", "w2", "b2")
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", element, [batch, FEATURES])],
        [helper.make_tensor_value_info("logits", element, [batch, CLASSES])],
        [numpy_helper.from_array(w.astype(dtype), n) for n, w in zip(names, _weights(seed), strict=True)],
    )
    return _checked(graph)


def two_inputs() -> onnx.ModelProto:
    """``ids`` and ``mask`` (batch, sequence) int64 -> ``total`` (batch,) int64 and ``present`` (batch, sequence) bool.

    ``total`` is the sum of the ids that the mask keeps; ``present`` says where the mask is 1. Both dimensions are
    dynamic, as a language model's are.
    """
    shape = ["batch", "sequence"]
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["ids", "mask"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "axis"], ["total"], keepdims=0),
            helper.make_node("Cast", ["mask"], ["present"], to=TensorProto.BOOL),
        ],
        "two_inputs",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("ids", "mask")],
        [
            helper.make_tensor_value_info("total", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("present", TensorProto.BOOL, shape),
        ],
        [numpy_helper.from_array(np.array([1], dtype=np.int64), "axis")],
    )
    return _checked(graph)


def _checked(graph: onnx.GraphProto) -> onnx.ModelProto:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def write_onnx(model: onnx.ModelProto, folder: Path, *, name: str = "model.onnx") -> Artifact:
    """Writes the model into `folder` and returns the artifact record that describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(model.SerializeToString())
    inputs, outputs = (tuple(map(_spec, values)) for values in (model.graph.input, model.graph.output))
    return artifact_of(folder, format="onnx", entry=name, inputs=inputs, outputs=outputs)


def write_openvino(model: onnx.ModelProto, folder: Path) -> Artifact:
    """Writes the model as OpenVINO IR (``model.xml``, ``model.bin``) and returns its artifact record."""
    import openvino

    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.onnx"
    source.write_bytes(model.SerializeToString())
    openvino.save_model(openvino.Core().read_model(str(source)), str(folder / "model.xml"), compress_to_fp16=False)
    source.unlink()
    inputs, outputs = (tuple(map(_spec, values)) for values in (model.graph.input, model.graph.output))
    return artifact_of(folder, format="openvino", entry="model.xml", inputs=inputs, outputs=outputs)


def artifact_of(
    folder: Path,
    *,
    format: Literal["onnx", "openvino"],
    entry: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> Artifact:
    """The artifact record of the files in `folder`, digested as the store does it."""
    files = tuple(
        ArtifactFile(path=path.relative_to(folder).as_posix(), sha256=_sha256(path), size_bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    lines = "".join(sorted(f"{file.sha256}  {file.path}\n" for file in files))
    return Artifact(
        digest=hashlib.sha256(lines.encode()).hexdigest(),
        format=format,
        entry=entry,
        files=files,
        inputs=inputs,
        outputs=outputs,
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    shape = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)
