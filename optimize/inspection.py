"""What a model file is: its tensors, operators, opsets and size. Nothing is run, and a child process reads it."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from optimize.admission import ask_child, external_files, parse, refuse_other_formats
from optimize.signature import describe_signature, read_signature
from optimize.stages.onnx_files import constants
from registry.errors import InputError


def describe(model: Path) -> dict[str, Any]:
    """The model as plain values: format, size, inputs, outputs, operators, parameters; opsets of an ONNX model.

    ``beside`` names the files beside it that hold its weights.

    Raises:
        InputError: there is no such file, or it is neither ONNX nor OpenVINO IR.
        UntrustedModelError: it is a pickle, keeps weights outside of its folder, or reading it broke a limit.
    """
    if model.suffix != ".xml":
        refuse_other_formats(model)
    elif not model.is_file():
        raise InputError(f"no model at {model}", hint="Give the path of an .onnx file or of an OpenVINO .xml.")
    found: dict[str, Any] = ask_child("optimize.inspection:describe_here", model)
    # Of weights in other files, those count that are there.
    beside = [model.parent / name for name in found["beside"]]
    size_bytes = sum(file.stat().st_size for file in (model, *beside) if file.is_file())
    return {"path": str(model), "size_bytes": size_bytes, **found}


def describe_here(*, path: str) -> dict[str, Any]:
    """What `describe` says of the file's contents, found in this process, which is a child.

    Raises:
        InputError: it is neither ONNX nor OpenVINO IR.
    """
    model = Path(path)
    signature = describe_signature(read_signature(model))
    return signature | (_describe_openvino(model) if model.suffix == ".xml" else _describe_onnx(model))


def _describe_onnx(model: Path) -> dict[str, Any]:
    proto = parse(model, model.name)
    operators = Counter(node.op_type for node in proto.graph.node)
    return {
        "format": "onnx",
        "ir_version": proto.ir_version,
        "opsets": {entry.domain: entry.version for entry in proto.opset_import},
        "parameters": sum(prod(tensor.dims) for tensor in constants(proto).values()),
        "operators": dict(operators.most_common()),
        "beside": external_files(model),
    }


def _describe_openvino(model: Path) -> dict[str, Any]:
    from profiles.serving.session import import_engine

    nodes = import_engine("openvino").Core().read_model(str(model)).get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    operators = Counter(node.get_type_name() for node in nodes)
    return {
        "format": "openvino",
        "parameters": sum(prod(node.get_output_shape(0)) for node in constants),
        "operators": dict(operators.most_common()),
        "beside": [model.with_suffix(".bin").name],
    }
