"""A network of which some layers quantize badly, whatever calibrates them, and all others well."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 8
CLASSES = 4
SPIKE = 3000.0


def conv_chain(folder: Path, *, layers: int = 6, spiked: tuple[int, ...] = ()) -> Path:
    """``image`` (batch, 3, 8, 8) through ``conv_0`` to ``conv_<layers-1>``, each with a Relu, to ``logits`` (batch, 4).

    Behind each of the layers ``spiked``, one channel is `SPIKE` times larger, and the next layer's weights for it as
    many times smaller. What is computed stays the same, because a Relu hands on any positive factor; but one range for
    all channels then leaves nothing of the others in int8. So the spiked layer, whose output it is, and the next, whose
    input it is, must both stay in float32.
    """
    random = np.random.default_rng(5)
    weights, nodes, tensors = [], [], []
    for layer in range(layers):
        inputs = 3 if layer == 0 else CHANNELS
        weights.append(random.standard_normal((CHANNELS, inputs, 3, 3)) * np.sqrt(2 / (9 * inputs)))
    for layer in spiked:
        weights[layer][0] *= SPIKE
        weights[layer + 1][:, 0] /= SPIKE
    for layer, values in enumerate(weights):
        before = "image" if layer == 0 else f"relu_{layer - 1}"
        tensors.append(numpy_helper.from_array(values.astype(np.float32), f"w_{layer}"))
        given = [before, f"w_{layer}"]
        nodes.append(helper.make_node("Conv", given, [f"c_{layer}"], name=f"conv_{layer}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c_{layer}"], [f"relu_{layer}"], name=f"activate_{layer}"))
    head = random.standard_normal((CHANNELS * 64, CLASSES)) / np.sqrt(CHANNELS * 64)
    head -= head.mean(axis=0)  # so that no class wins by the mean of what the Relus give
    tensors.append(numpy_helper.from_array(head.astype(np.float32), "w_head"))
    nodes.append(helper.make_node("Flatten", [f"relu_{layers - 1}"], ["flat"], name="flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", "w_head"], ["logits"], name="head"))
    ends = [
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "chain", *ends, initializer=tensors),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / "model.onnx"))
    return folder / "model.onnx"


def clear_samples(model: Path, *, count: int, seed: int = 0) -> Mapping[str, NDArray[Any]]:
    """Samples that the model decides clearly, and ``labels``, which are its own answers."""
    images = np.random.default_rng(seed).standard_normal((4 * count, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images})
    best = np.sort(logits, axis=1)
    clear = np.argsort(best[:, -2] - best[:, -1], kind="stable")[:count]
    return {"image": images[clear], "labels": logits[clear].argmax(axis=1)}
